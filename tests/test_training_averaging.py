# SPDX-License-Identifier: Apache-2.0
"""The average of the weights, and features that are kept: what is evaluated and saved, and what changes nothing."""

import pytest
import torch

from deperceiver_hf import DePerceiverV2ForObjectDetection
from deperceiver_hf.errors import UserError
from deperceiver_hf.saved_models import load_detector
from deperceiver_hf.training import DetectionTrainer
from deperceiver_hf.training.averaging import AVERAGE_FILE, WARMUP_STEPS
from deperceiver_hf.training.feature_cache import FeatureCache
from training_runs import (
    TINY_ARCHITECTURES,
    assert_equal_weights,
    read_log,
    tiny_options,
    train_until_killed,
    weights_of,
)

V2 = TINY_ARCHITECTURES["deperceiver_v2"]
FIXED = {"shortest_edge": None, "fixed_size": [64, 96], "augmentation": "flip"}


def average_of(run: DetectionTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.average.model.state_dict().items()}


def test_the_average_is_that_of_the_weights_of_all_steps(tmp_path, monkeypatch):
    history = []
    step = DetectionTrainer.optimizer_step

    def recorded(self, batches, count):
        stop = step(self, batches, count)
        history.append(weights_of(self))
        return stop

    monkeypatch.setattr(DetectionTrainer, "optimizer_step", recorded)
    run = DetectionTrainer(tiny_options(tmp_path, V2, ema_decay=0.25, epochs=1))
    run.train()

    expected = {name: tensor.double() for name, tensor in history[0].items()}
    for number, weights in enumerate(history[1:], start=1):
        kept = min(0.25, 1 - 1 / (1 + number / WARMUP_STEPS))
        for name, tensor in weights.items():
            expected[name] = kept * expected[name] + (1 - kept) * tensor.double()
    trained = {name for name, _ in run.model.named_parameters()}
    for name, tensor in average_of(run).items():
        assert torch.allclose(tensor.double(), expected[name] if name in trained else history[-1][name].double())
    saved = DePerceiverV2ForObjectDetection.from_pretrained(tmp_path / "last")
    assert_equal_weights(saved.state_dict(), average_of(run))
    assert any(not torch.equal(tensor, history[-1][name]) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_the_average_predicts_by_its_own_weights_alone(tmp_path, name):
    options = {**TINY_ARCHITECTURES[name], "dataset": "synthetic:image_size=64", "augmentation": "flip"}
    run = DetectionTrainer(tiny_options(tmp_path, options, ema_decay=0.9))
    images = torch.randn(1, 3, *[64] * 2)
    model = run.average.model.eval()
    with torch.no_grad():
        try:
            before = model(pixel_values=images).pred_boxes
        except ValueError:  # windows want other sides
            images = torch.randn(1, 3, 224, 224)
            before = model(pixel_values=images).pred_boxes
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
        assert torch.equal(model(pixel_values=images).pred_boxes, before)


def test_frozen_parts_have_no_copy(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, V2, ema_decay=0.9, lr_backbone=0.0))
    averaged = dict(run.average.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        assert (averaged[name] is parameter) == (not parameter.requires_grad) == ("backbone" in name), name


def test_killed_and_resumed_the_average_is_the_same(tmp_path, monkeypatch, scripted_ap):
    options = {"model": V2, "ema_decay": 0.5, "eval_every": 1, "checkpointing_steps": 2}
    scripted_ap(0.2, 0.1)
    straight = DetectionTrainer(tiny_options(tmp_path / "straight", **options))
    straight.train()
    scripted_ap(0.2, 0.1)
    train_until_killed(tmp_path / "resumed", monkeypatch, 3, **options)
    resumed = DetectionTrainer(tiny_options(tmp_path / "resumed", **options, resume="auto"))
    assert (resumed.state / AVERAGE_FILE).is_file()
    resumed.train()
    assert_equal_weights(average_of(straight), average_of(resumed))
    assert_equal_weights(weights_of(straight), weights_of(resumed))
    with pytest.raises(UserError, match="ema_decay"):
        DetectionTrainer(tiny_options(tmp_path / "resumed", **{**options, "ema_decay": None}, resume="auto"))


def test_weights_are_evaluated_with_and_without_their_average(tmp_path):
    options = {"ema_decay": 0.9, "eval_every": 1, "epochs": 1, "eval_without_ema": True}
    run = DetectionTrainer(tiny_options(tmp_path, V2, **options))
    seen = []
    evaluate = run._evaluated
    run._evaluated = lambda model: seen.append(model) or evaluate(model)
    run.train()
    assert seen == [run.average.model, run.accelerator.unwrap_model(run.model)]
    (averaged,), (plain,) = (read_log(tmp_path, kind) for kind in ("eval", "eval_without_ema"))
    assert averaged.keys() == plain.keys()


@pytest.mark.parametrize(
    "architecture",
    [
        *("deperceiver_v2", "detr", "lw_detr"),
        *(pytest.param(name, marks=pytest.mark.heavy) for name in ("rt_detr_v2", "deimv2", "rf_detr")),
    ],
)
def test_kept_features_are_those_of_the_backbone(tmp_path, architecture):
    """Up to the order of sums, which training makes larger: images go through the backbone one by one."""
    options = {**FIXED, "lr_backbone": 0.0, "epochs": 2, "eval_every": 2}
    runs = {}
    for cached in (False, True):
        chosen = tiny_options(
            tmp_path / f"{cached}", TINY_ARCHITECTURES[architecture], cache_features=cached, **options
        )
        runs[cached] = DetectionTrainer(chosen)
        runs[cached].train()
    losses = [[line["loss"] for line in read_log(tmp_path / f"{cached}", "train")][:6] for cached in (False, True)]
    rel = 1e-2 if architecture == "deimv2" else 1e-3  # all of its layers learn what any of them matches
    assert losses[0] == pytest.approx(losses[1], rel=rel)
    load_detector(str(tmp_path / "True" / "last"))


def test_an_image_goes_through_the_backbone_once():
    class Backbone(torch.nn.Module):
        calls = 0

        def forward(self, pixels, mask):
            self.calls += 1
            return [(pixels.mean((2, 3), keepdim=True), mask), (pixels[..., ::2, ::2], None)]

    backbone = Backbone()
    images, mask = torch.rand(3, 3, 8, 8), torch.ones(3, 8, 8, dtype=torch.bool)
    mask[1, 4:] = False
    expected = backbone(images, mask)
    cache = FeatureCache(backbone)
    for _ in range(2):
        for (features, masks), (wanted, wanted_masks) in zip(backbone.forward(images, mask), expected, strict=True):
            assert torch.equal(features, wanted)
            assert masks is None if wanted_masks is None else torch.equal(masks, wanted_masks)
    assert (backbone.calls, len(cache)) == (4, 3)
    backbone.forward(images.flip(0), mask)  # the image in the middle with its mask is known, the others are full
    assert (backbone.calls, len(cache)) == (4, 3)
    backbone.forward(images, torch.ones_like(mask))
    assert (backbone.calls, len(cache)) == (5, 4)


def test_without_room_features_are_computed(monkeypatch, caplog):
    monkeypatch.setattr("deperceiver_hf.training.feature_cache.SHARE_OF_MEMORY", 0.0)
    backbone = torch.nn.Conv2d(3, 2, 1).requires_grad_(False)
    images = torch.rand(2, 3, 4, 4)
    expected = backbone(images)
    cache = FeatureCache(backbone)
    assert torch.allclose(backbone(images), expected)
    assert len(cache) == 0


def test_only_frozen_features_are_kept():
    with pytest.raises(ValueError, match="frozen"):
        FeatureCache(torch.nn.Conv2d(3, 2, 1))


@pytest.mark.parametrize("name", ["deperceiver", "deperceiver_v2"])
def test_a_fixed_size_is_enough_to_choose_attention_and_positions(tmp_path, name):
    learned = {"position_embedding": "learned"} if name == "deperceiver" else {}
    options = {**TINY_ARCHITECTURES[name], **learned, "fixed_size": [32, 64 * 60], "attn_implementation": "auto"}
    run = DetectionTrainer(tiny_options(tmp_path, options, shortest_edge=None, max_train_samples=2))
    assert run.computation.attention in ("eager", "sdpa")
    if learned:
        assert run.model.config.num_position_embeddings >= 64 * 60 // 32


def test_a_fixed_size_is_that_of_training_and_of_the_saved_processor(tmp_path):
    run = DetectionTrainer(tiny_options(tmp_path, V2, **FIXED, epochs=1))
    assert run.data.image_processor.size == {"height": 64, "width": 96}
    assert {tuple(run.data.dataset[index]["image"].shape[-2:]) for index in range(4)} == {(64, 96)}
    run.train()
    again = tiny_options(tmp_path / "again", {"model": str(tmp_path / "last")}, **{**FIXED, "fixed_size": [32, 32]})
    assert DetectionTrainer(again).data.image_processor.size == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, "--ema_decay must be"),
        ({"ema_decay": 0.0}, "--ema_decay must be"),
        ({"eval_without_ema": True}, "--eval_without_ema"),
        ({"cache_features": True}, "--lr_backbone 0"),
        ({"fixed_size": [64]}, "--fixed_size 64: give a height and a width"),
        ({"fixed_size": [64, 0]}, "--fixed_size 64 0"),
        ({"fixed_size": [64, 64], "shortest_edge": 64}, "--shortest_edge"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tiny_options(tmp_path, V2, **{"shortest_edge": None, **options})
