# SPDX-License-Identifier: Apache-2.0
"""Counts are those of pencil and paper, and grow with the tokens as the architecture says. Times are never judged."""

import json
import runpy
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from deperceiver_hf import DePerceiverForObjectDetection, DePerceiverV2Config, DePerceiverV2ForObjectDetection
from deperceiver_hf.benchmarks import cost
from deperceiver_hf.benchmarks.cost import Cost, MemoryCounter, compare_costs, count_cost, count_peak_memory
from deperceiver_hf.benchmarks.crowds import compare_crowds
from deperceiver_hf.benchmarks.scaling import compare_scaling, draw_scaling, split_at_backbone
from deperceiver_hf.benchmarks.timing import compare_times, time_models
from deperceiver_hf.benchmarks.variants import (
    SCALES,
    VARIANT_NAMES,
    deperceiver_v2_variant,
    deperceiver_variant,
    make_variant,
    maps_of,
    place_of_backbone,
)
from deperceiver_hf.errors import UserError
from deperceiver_hf.models.configuration_deperceiver_v2 import PRESETS

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
SMALL = {"backbone": "resnet18", "num_latents": 24}
PEERS = ("deimv2", "lw-detr", "rf-detr")


@cache
def count(name: str, height: int, width: int, **options) -> Cost:
    options = {**SMALL, **options}
    return count_cost(partial(make_variant, name, attn_implementation="eager", **options), height, width)


def flops_by_hand(tokens: int, channels: int, latents: int) -> int:
    """FLOPs after the backbone of the original's decoder without auxiliary losses: see the docstring of `cost`."""
    d, queries, logits, layers = 256, 100, 92, 18
    projection = 2 * tokens * channels * d
    reading = 8 * latents * d**2 + 4 * tokens * d * d + 4 * latents * tokens * d
    thinking = layers * (12 * latents * d**2 + 4 * latents**2 * d)
    decoding = 8 * queries * d**2 + 4 * latents * d * d + 4 * queries * latents * d
    return projection + reading + thinking + decoding + 2 * queries * d * logits + 4 * queries * d**2 + 8 * queries * d


def activations_by_hand(tokens: int, latents: int) -> tuple[int, int]:
    """Elements put out by matrix products and convolutions after the backbone, and attention weights among them."""
    d, queries, logits, layers, heads = 256, 100, 92, 18, 8
    weights = latents * tokens + layers * heads * latents**2 + queries * latents
    reading = tokens * d + (2 * tokens + 5 * latents) * d
    thinking = layers * 7 * latents * d
    decoding = (2 * latents + 5 * queries) * d
    return weights + reading + thinking + decoding + queries * (logits + 2 * d + 4), weights


@pytest.mark.parametrize("latents", [1024, 2048])
def test_counts_are_those_made_by_hand(latents):
    cost = count("deperceiver-16", 800, 1333, backbone="resnet50", num_latents=latents)
    assert cost.tokens == 50 * 84
    assert cost.flops_after_backbone == flops_by_hand(cost.tokens, 1024, latents)
    assert (cost.activations_after_backbone, cost.attention_weights) == activations_by_hand(cost.tokens, latents)
    assert cost.flops == cost.backbone_flops + cost.flops_after_backbone


def count_v2(config: DePerceiverV2Config, height: int, width: int) -> Cost:
    return count_cost(lambda: DePerceiverV2ForObjectDetection(config), height, width)


def v2_by_hand(config: DePerceiverV2Config, tokens: list[int], channels: list[int]) -> tuple[int, int, int]:
    """FLOPs, activations and attention weights after the backbone: see the docstring of `cost`."""
    d, heads, logits, widening = config.d_model, config.num_attention_heads, config.num_labels, config.widening_factor
    levels, blocks, n = len(tokens), config.decoder_layers, sum(tokens)
    queries = min(config.num_queries, n)
    numbers = 4 if config.edge_votes else 2  # that a head reports: for which edges, or where
    key_channels = d // heads + max(6 + levels, 4 * numbers)
    features, value_features = heads * (key_channels + -key_channels % 8) - d, heads * 4 * numbers
    places = queries * heads * (4 + levels)
    boxes = 4 * queries * d**2 + 8 * queries * d

    fusion, fusion_made, fusion_weights = 0, 0, 0
    if config.token_encoder == "fusion":
        fusion, fusion_made, fusion_weights = fusion_by_hand(config, tokens, channels)
        channels = [config.fusion_dim] * levels
    adapter = 2 * d * sum(cells * width for cells, width in zip(tokens, channels, strict=True))
    selection = 2 * n * d**2 + 2 * n * d * logits + 2 * queries * d**2 + boxes
    key_values = 4 * n * d**2 * (1 if config.share_key_values else blocks)
    attending = 8 * queries * d**2 + 4 * queries**2 * d
    reading = 4 * queries * d**2 + 2 * places * d
    reading += 2 * queries * n * (2 * d + features + value_features) + 2 * numbers * queries * heads * d
    thinking = 4 * widening * queries * d**2
    block = 6 * queries * d**2 + attending + reading + thinking + boxes + 2 * queries * d * logits
    votes = 4 * n if config.edge_votes else 0
    flops = fusion + adapter + selection + 2 * votes * d + key_values + blocks * block

    weights = blocks * heads * (queries**2 + queries * n) + fusion_weights
    box_outputs = queries * (2 * d + 4)
    made = fusion_made + votes + n * d + n * (d + logits) + queries * d + box_outputs
    made += 2 * n * d * (1 if config.share_key_values else blocks)
    made += blocks * (10 * queries * d + places + (widening + 1) * queries * d)
    made += blocks * (queries * value_features + queries * d + box_outputs + queries * logits)
    return flops, made + weights, weights


def fusion_by_hand(config: DePerceiverV2Config, tokens: list[int], channels: list[int]) -> tuple[int, int, int]:
    """FLOPs, activations but for the weights, and attention weights of the token encoder."""
    f, widening, coarsest = config.fusion_dim, config.widening_factor, tokens[-1]
    fused = 2 * sum(tokens) - tokens[0] - coarsest  # cells of the maps that are fused, some of them twice
    flops = 2 * f * sum(cells * width for cells, width in zip(tokens, channels, strict=True))
    flops += (8 + 4 * widening) * coarsest * f**2 + 4 * coarsest**2 * f
    flops += fused * (4 + 2 * 18) * f**2 + 18 * f**2 * sum(tokens[1:])
    made = f * (sum(tokens) + (6 + widening) * coarsest + 3 * fused + sum(tokens[1:]))
    return flops, made, config.num_attention_heads * coarsest**2


@pytest.mark.parametrize(
    ("preset", "channels", "share_key_values"),
    [
        ("base", [512, 1024, 2048], False),
        ("base", [512, 1024, 2048], True),
        ("large", [256, 512, 1024, 2048], False),
        ("small", [128, 256, 512], True),
        ("nano", [48, 192, 96], True),
    ],
)
def test_counts_of_v2_are_those_made_by_hand(preset, channels, share_key_values):
    config = deperceiver_v2_variant(preset, share_key_values=share_key_values, attn_implementation={"": "eager"})
    cost = count_v2(config, 320, 480)
    tokens = [320 * 480 // stride**2 for stride in config.feature_strides]
    assert cost.tokens == sum(tokens)
    counted = (cost.flops_after_backbone, cost.activations_after_backbone, cost.attention_weights)
    assert counted == v2_by_hand(config, tokens, channels)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        *((preset, {}) for preset in PRESETS),
        ("nano", {"share_key_values": True}),
    ],
)
def test_cost_of_v2_is_affine_in_the_tokens(preset, overrides):
    """From as many tokens on as there are object latents; but for the attention of the fusion, which has a ceiling."""
    overrides = {"token_encoder": "none", **overrides}
    config = deperceiver_v2_variant(preset, backbone="test_resnet", attn_implementation={"": "eager"}, **overrides)
    costs = [count_v2(config, 256, width) for width in (128, 224, 320)]
    assert config.num_queries < costs[0].tokens < costs[1].tokens < costs[2].tokens
    for figure in ("flops_after_backbone", "activations_after_backbone", "attention_weights"):
        small, medium, large = (getattr(cost, figure) for cost in costs)
        assert 0 < medium - small == large - medium, figure


def test_presets_bring_their_backbone_unless_one_is_given():
    own = count_cost(partial(make_variant, "deperceiver-v2-nano", attn_implementation="eager"), 64, 64)
    other = count("deperceiver-v2-nano", 64, 64)
    assert own.backbone_parameters < 1e6 < other.backbone_parameters


def test_peak_memory_is_that_of_the_largest_moment():
    """In DETR's encoder two arrays of heads x N^2 are alive at once: scores before and after softmax or scaling."""
    cost = count("detr-8", 256, 256)
    scores = 4 * 8 * cost.tokens**2
    assert 2 * scores <= cost.peak_memory < 3 * scores
    fused = count_peak_memory(partial(make_variant, "detr-8", **SMALL), 256, 256)
    assert fused < scores


def test_peak_memory_does_not_hold_what_was_released():
    class Chain(torch.nn.Module):
        def __init__(self, length: int):
            super().__init__()
            self.backbone, self.length = torch.nn.Identity(), length

        @property
        def model(self) -> torch.nn.Module:
            return self

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            x = self.backbone(pixel_values)
            for _ in range(self.length):
                x = x.flatten().reshape(x.shape) + 1
            return x

    image = 4 * 3 * 32 * 32
    assert [count_peak_memory(partial(Chain, length), 32, 32) for length in (1, 2, 9)] == [image, 2 * image, 2 * image]


def test_parameters_are_those_of_the_model():
    cost = count("deperceiver-32", 64, 64)
    model = DePerceiverForObjectDetection(deperceiver_variant("32", **SMALL))
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.backbone_parameters == sum(parameter.numel() for parameter in model.model.backbone.parameters())


@pytest.mark.parametrize(
    ("name", "is_affine"),
    [(f"deperceiver-{scale}", True) for scale in SCALES] + [("detr-32", False), ("detr-multiscale", False)],
)
@pytest.mark.parametrize("figure", ["flops_after_backbone", "activations_after_backbone", "attention_weights"])
def test_only_deperceiver_is_affine_in_the_tokens(name, is_affine, figure):
    costs = [count(name, 64, width) for width in (64, 160, 256)]
    (x0, y0), (x1, y1), (x2, y2) = [(cost.tokens, getattr(cost, figure)) for cost in costs]
    assert x0 < x1 < x2
    assert ((y1 - y0) * (x2 - x1) == (y2 - y1) * (x1 - x0)) == is_affine


def test_multiscale_has_the_tokens_of_its_scales():
    ours = [name for name in VARIANT_NAMES if name.startswith(("detr", "deperceiver"))]
    tokens = {name: count(name, 96, 128).tokens for name in ours}
    for architecture in ("detr", "deperceiver"):
        parts = [tokens[f"{architecture}-{scale}"] for scale in ("32", "16", "8")]
        assert parts == [3 * 4, 6 * 8, 12 * 16]
        assert tokens[f"{architecture}-multiscale"] == sum(parts)
    assert tokens["deperceiver-v2-base"] == tokens["detr-multiscale"]
    assert tokens["deperceiver-v2-large"] == tokens["detr-multiscale"] + tokens["deperceiver-4"]


def test_counting_leaves_no_real_arrays():
    made = []

    def make() -> torch.nn.Module:
        made.append(make_variant("detr-32", attn_implementation="eager", **SMALL))
        return made[0]

    count_cost(make, 64, 64)
    assert all(isinstance(tensor, FakeTensor) for tensor in made[0].state_dict().values())


def test_fused_attention_is_not_counted():
    with pytest.raises(ValueError, match="must be eager"):
        count_cost(partial(make_variant, "deperceiver-32", **SMALL), 64, 64)


@pytest.mark.parametrize("name", ["detr-16", "detr-multiscale", "deperceiver-multiscale", "deperceiver-v2-base"])
def test_every_kind_of_model_predicts(name):
    outputs = make_variant(name, **SMALL)(torch.randn(2, 3, 64, 64))
    logits, boxes = outputs if isinstance(outputs, tuple) else (outputs.logits, outputs.pred_boxes)
    num_queries, num_logits = (84, 91) if "v2" in name else (100, 92)  # 84 tokens are fewer than 300 latents
    assert logits.shape == (2, num_queries, num_logits)
    assert boxes.shape == (2, num_queries, 4)
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_models_take_turns():
    calls = []

    class Recorder(torch.nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def forward(self, pixel_values: torch.Tensor) -> None:
            calls.append(self.name)

    timings = time_models({name: Recorder(name) for name in "ab"}, torch.zeros(1, 3, 8, 8), warmup=1, repeats=3)
    assert calls == list("abbaabba")
    assert all(timing.latency > 0 and timing.peak_memory is None for timing in timings.values())


def test_a_model_without_memory_drops_out_alone():
    class Hungry(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> None:
            raise torch.cuda.OutOfMemoryError("no memory")

    models = {"hungry": Hungry(), "modest": torch.nn.Identity()}
    timings = time_models(models, torch.zeros(1, 3, 8, 8), warmup=1, repeats=2)
    assert timings["hungry"].latency is None
    assert timings["modest"].latency is not None


def test_times_are_related_to_the_first_model():
    names = ["deperceiver-32", "detr-32"]
    report = compare_times(names, height=64, width=64, warmup=0, repeats=1, progress=False, **SMALL)
    rows = report.rows
    assert list(rows) == names
    assert rows[names[0]]["ratio"] == 1
    assert rows[names[1]]["ratio"] == rows[names[1]]["latency"] / rows[names[0]]["latency"]
    assert report.markdown().count("\n| d") == 2


@pytest.mark.parametrize("name", ["detr-32", "detr-multiscale", "deperceiver-16", "deperceiver-v2-nano", *PEERS])
def test_model_without_its_backbone_predicts_the_same(name):
    side = {"lw-detr": 320, "rf-detr": 280}.get(name, 256 if name in PEERS else 64)  # as many cells as queries
    model, pixel_values = make_variant(name, **SMALL), torch.randn(1, 3, side, side)
    with torch.inference_mode():
        expected = model(pixel_values)
        backbone, rest = split_at_backbone(model, pixel_values)
        again, feature_maps = rest(pixel_values), backbone(pixel_values)
    before, after = (value[0] if isinstance(value, tuple) else value.pred_boxes for value in (expected, again))
    assert torch.equal(before, after)
    fixed = getattr(*place_of_backbone(rest)).feature_maps
    assert all(torch.equal(a, b) for a, b in zip(maps_of(feature_maps), maps_of(fixed), strict=True))


def test_scaling_has_a_row_for_every_model_and_size(tmp_path):
    options = {"sizes": [64, 96], "repeats": 1, "warmup": 0, "progress": False, "backbone": "test_resnet"}
    report = compare_scaling(["detr-32", "deperceiver-v2-nano"], timed=["detr-32"], **options)
    assert [(row["model"], row["size"], row["tokens"]) for row in report.rows.values()] == [
        *(("detr-32", 64, 4), ("deperceiver-v2-nano", 64, 84)),
        *(("detr-32", 96, 9), ("deperceiver-v2-nano", 96, 189)),
    ]
    assert [("latency" in row) for row in report.rows.values()] == [True, False] * 2
    pytest.importorskip("matplotlib")
    draw_scaling(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timed": ["detr-8"]}, "detr-8 cannot be timed"),
        ({"sizes": []}, "at least one side"),
        ({"sizes": [64, 16]}, "at least 32 pixels"),
        ({"warmup": -1}, "warmup must be"),
        ({"device": "tpu9"}, "device must be"),
    ],
)
def test_impossible_scaling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_scaling(["detr-32"], **{"timed": [], **SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ["detr-4"]}, "no model detr-4"),
        ({"models": []}, "none given"),
        ({"models": ["detr-8", "detr-8"]}, "named twice"),
        ({"height": 31}, "at least 32 pixels"),
        ({"num_latents": 0}, "num_latents must be at least 1"),
        ({"backbone": "no_such_model"}, "no_such_model"),
    ],
)
def test_impossible_costs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_costs(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9"}, "device must be"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"repeats": 0}, "repeats must be"),
        ({"compile": True, "warmup": 0}, "warmup must be"),
        ({"attn_implementation": "telepathy"}, "telepathy"),
    ],
)
def test_impossible_timings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_times(["deperceiver-32"], **{**SMALL, **options})


def test_the_memory_of_a_training_step_has_a_ceiling_in_the_number_of_objects(tmp_path):
    """60 latents of `nano`: from 60 objects on, denoising draws, and only what is compared with them grows."""
    options = {"height": 64, "width": 64, "batch_size": 2, "warmup": 0, "repeats": 1, "progress": False}
    report = compare_crowds("deperceiver-v2-nano", objects=[10, 60, 120, 600], **options)
    few, limit, twice, many = (row["peak_memory"] for row in report.rows.values())
    assert few < limit
    assert twice <= 1.05 * limit
    pairs = 4 * 3 * 2 * 60 * 600  # bytes of an array of all blocks, images, latents and objects
    assert many <= limit + 12 * pairs
    assert all(0 < row["matching_seconds"] < row["seconds"] for row in report.rows.values())
    assert report.markdown().count("\n| ") == 2 + 4 - 1 + 1
    report.write(tmp_path / "report.json")
    assert list(json.loads((tmp_path / "report.json").read_text())["crowds"])[-1] == "600 objects"


def test_memory_of_a_step_is_what_is_kept_for_the_backward_pass():
    x = torch.randn(2**10, requires_grad=True)
    with MemoryCounter() as memory:
        y = x
        for _ in range(10):
            y = y.exp() * 0.01
        y.sum().backward()
    assert 10 <= memory.peak / x.untyped_storage().nbytes() <= 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "detr-16"}, "crowds are measured with one of deperceiver-v2-nano"),
        ({"objects": []}, "at least one"),
        ({"objects": [5, -1]}, "from 0 on"),
        ({"height": 16}, "at least 32 pixels"),
        ({"repeats": 0}, "repeats must be"),
        ({"warmup": -1}, "warmup must be"),
    ],
)
def test_impossible_crowds_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        compare_crowds(**{"model": "deperceiver-v2-nano", **options})


def run_script(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_script_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    arguments = ["cost", "--models", "detr-32", "deperceiver-8", "--backbone", "resnet18", "--width", "64"]
    for name in ("report.json", "report.md"):
        assert run_script(monkeypatch, *arguments, "--output", str(tmp_path / name)) == 0
        printed = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text() == printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["width"] == 64
    assert report["models"]["deperceiver-8"]["tokens"] == 100 * 8
    assert "| deperceiver-8 | 800 |" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["cost", "--height", "1"],
        ["cost", "--output", "report.txt"],
        ["time", "--repeats", "0"],
        ["scaling", "--figure", "figure.jpg"],
    ],
)
def test_script_refuses_in_one_line(monkeypatch, capsys, arguments):
    assert run_script(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("deperceiver benchmark: error: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["deformable-detr", "rt-detr-v2", "d-fine", *PEERS])
def test_models_of_transformers_are_counted_and_timed(name):
    """On fake tensors, which have no contents, they cost what they cost on real ones."""
    side, tokens = {"lw-detr": (320, 20 * 20), "rf-detr": (280, 20 * 20)}.get(name, (256, 32 * 32 + 16 * 16 + 8 * 8))
    counted = count_cost(partial(make_variant, name, backbone="test_resnet", attn_implementation="eager"), side, side)
    assert counted.tokens == tokens
    model = make_variant(name, backbone="test_resnet", attn_implementation="eager").requires_grad_(False)
    assert counted.backbone_parameters == sum(p.numel() for p in getattr(*place_of_backbone(model)).parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, side, side))
    assert 0 < counted.backbone_flops < counted.flops == counter.get_total_flops()
    report = compare_times(
        [name], height=side, width=side, backbone="test_resnet", warmup=0, repeats=1, progress=False
    )
    assert report.rows[name]["latency"] > 0


@pytest.mark.parametrize(
    ("name", "what", "width"),
    [
        ("rt-detr-v2", "images whose sides are multiples of 32", 250),
        ("d-fine", "images whose sides are multiples of 32", 250),
        ("deimv2", "images whose sides are multiples of 32", 250),
        ("lw-detr", "images whose sides are multiples of 64", 416),
        ("rf-detr", "square images whose sides are multiples of 56", 504),
    ],
)
def test_sides_that_a_model_does_not_take_are_refused_before_any_work(name, what, width):
    for compare in (compare_costs, compare_times):
        with pytest.raises(UserError, match=f"{name} takes {what}"):
            compare(["deperceiver-v2-nano", name], height=448, width=width)


def test_without_names_all_are_counted_that_take_the_size(monkeypatch):
    monkeypatch.setattr(cost, "count_cost", lambda make, height, width: Cost(*[1] * 8))
    assert list(compare_costs(height=448, width=448).rows) == list(VARIANT_NAMES)
    left_out = {"rt-detr-v2", "d-fine", *PEERS}
    assert set(VARIANT_NAMES) - set(compare_costs(height=256, width=250).rows) == left_out
