# SPDX-License-Identifier: Apache-2.0
"""Outputs and image processors as transformers' common tests want them: everything in an output is numbers, the same
in a tuple and by name; every image processor says its options where it is."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deperceiver_hf
from conftest import tiny_config, tiny_model, tiny_v2_config, tiny_v2_model
from deperceiver_hf import DePerceiverModel, DePerceiverV2Model

MODELS = {
    "v1": tiny_model,
    "v1_layered": lambda: tiny_model(decoder_type="layered"),
    "v1_base": lambda: DePerceiverModel(tiny_config()).eval(),
    "v2": tiny_v2_model,
    "v2_learned": lambda: tiny_v2_model(query_selection=False),
    "v2_base": lambda: DePerceiverV2Model(tiny_v2_config()).eval(),
}
PROCESSORS = [name for name in deperceiver_hf.__all__ if "ImageProcessor" in name]


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of an output, with where it is."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{name}.{key}")
    else:
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{name}[{index}]")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recorded", [(), ("output_hidden_states",), ("output_attentions", "output_hidden_states")])
@pytest.mark.parametrize("name", MODELS)
def test_a_tuple_holds_the_same_numbers_as_the_names(name, recorded, padded, images, labels):
    model = MODELS[name]()
    inputs = {"pixel_values": images, **({} if "base" in name else {"labels": labels})}
    if padded:
        inputs["pixel_mask"] = torch.ones(2, 64, 96, dtype=torch.int64)
        inputs["pixel_mask"][1, 40:] = inputs["pixel_mask"][1, :, 50:] = 0
    options = dict.fromkeys(recorded, True)
    with torch.no_grad():
        by_name = model(**inputs, **options)
        as_tuple = model(**inputs, **options, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(by_name.to_tuple())
    found, expected = list(tensors(as_tuple)), list(tensors(by_name.to_tuple()))
    assert [place for place, _ in found] == [place for place, _ in expected]
    for (place, value), (_, other) in zip(found, expected, strict=True):
        assert value.numel() > 0, place
        assert value.dtype != torch.bool, place  # cannot be subtracted
        assert not (value - other).abs().max() > 1e-5, place


def test_the_mask_of_queries_is_like_that_of_pixels(images):
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, 8:] = mask[1, :, 8:] = 0  # one token of stride 8 and one of stride 16
    with torch.no_grad():
        outputs = tiny_v2_model()(images, mask)
    assert outputs.query_mask.dtype == mask.dtype
    assert outputs.query_mask.sum(1).tolist() == [9, 2]


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_image_processor_has_its_options_in_its_module(name):
    processor = getattr(deperceiver_hf, name)
    module = importlib.import_module(processor.__module__)
    assert processor.valid_kwargs is getattr(module, f"{name}Kwargs")
    assert processor.valid_kwargs.__module__ == processor.__module__
    assert {"do_convert_annotations", "pad_size", "do_resize"} <= processor.valid_kwargs.__annotations__.keys()
    assert processor(do_convert_annotations=False).do_convert_annotations is False
