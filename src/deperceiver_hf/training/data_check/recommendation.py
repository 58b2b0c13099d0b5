# SPDX-License-Identifier: Apache-2.0
"""Which recipe for which data: size of the images, number of queries, batch and epochs from what is in a data set."""

import os
import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_utils import SizeDict

from ...data.doctor.objects import NOT_FEW, ObjectTable, TrainedSize
from ...machine import available_memory
from ..arguments import TrainingOptions
from ..recipes import read_recipe, recipe_options

RECIPES = {"cpu": "own-data-cpu", "cuda": "own-data-gpu"}  # by the kind of device; the last for all others
LARGEST = {"cpu": 640, "cuda": 1024}  # shortest edge in pixels
STEPS = {"cpu": 4_000, "cuda": 10_000}  # of an optimizer, that a training is worth
SIZE_STEP = 64
MOST_EPOCHS = 300
VAL_FRACTION = 0.1  # of the images, where there are no others to evaluate on
QUERIES_STEP, MOST_QUERIES = 50, 1_000
ROOM = 1.1  # queries for each object of the fullest image
CACHE_SHARE = 0.5  # of the memory available, that decoded images may take


@dataclass(frozen=True)
class Choice:
    """A recipe fitted to data.

    Attributes:
        recipe: Its name.
        overrides: Options that stand beside it on the command line.
        reasons: A sentence for each.
    """

    recipe: str
    overrides: dict[str, Any]
    reasons: tuple[str, ...]

    @property
    def options(self) -> TrainingOptions:
        """Those of the run."""
        return recipe_options(self.recipe, **self.overrides)

    @property
    def command(self) -> str:
        """The command line of the run."""
        words = ["deperceiver", "train", "--recipe", self.recipe]
        for name, value in self.overrides.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
        return shlex.join(words)


def recommend(
    table: ObjectTable,
    given: dict[str, Any],
    trained: TrainedSize,
    device: torch.device,
    *,
    has_validation: bool,
) -> Choice:
    """The recipe for a data set on a device.

    Args:
        table: Objects of the training split, of which there are some.
        given: Options that say how the data are read: `dataset`, splits, `box_format`, ...
        trained: Stride and queries of the recipe's model; its size is not looked at.
        device: Where the training is to run.
        has_validation: Whether there is a split to evaluate on.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    recipe = RECIPES[kind]
    values = read_recipe(recipe)
    overrides: dict[str, Any] = dict(given)
    reasons = []

    size, why = _choose_size(table, values["shortest_edge"], LARGEST[kind], trained.stride)
    reasons.append(why)
    overrides |= _unless_equal(values, {"shortest_edge": size.shortest_edge, "longest_edge": size.longest_edge})

    most, usual = int(table.per_image.max()), float(np.quantile(table.per_image, 0.99))
    queries = trained.num_queries or 0
    if most > queries:
        queries = int(min(MOST_QUERIES, QUERIES_STEP * np.ceil(ROOM * most / QUERIES_STEP)))
        overrides["num_queries"] = queries
    reasons.append(
        f"{queries} queries, the latents that become objects: images have up to {most} objects, and 99 % of them up "
        f"to {usual:.0f}."
    )

    if values.get("cache_images") and (needed := _decoded_bytes(table)) > CACHE_SHARE * available_memory():
        overrides |= {"cache_images": False, "num_workers": min(2, os.cpu_count() or 1)}
        reasons.append(f"Images are not cached: decoded they are {needed / 2**30:.1f} GiB.")

    batch = min(values["batch_size"], table.num_images)
    overrides |= _unless_equal(values, {"batch_size": batch})
    per_epoch = max(1, table.num_images // (batch * values.get("gradient_accumulation_steps", 1)))
    epochs = int(np.clip(np.ceil(STEPS[kind] / per_epoch), 1, MOST_EPOCHS))
    overrides["epochs"] = epochs
    reasons.append(f"{epochs} epochs of {per_epoch:,} steps with {batch} images: {epochs * per_epoch:,} steps.")

    if has_validation:
        overrides |= _unless_equal(values, {"eval_every": min(epochs, max(1, epochs // 10))})
    else:
        overrides.pop("eval_split", None)
        overrides["val_fraction"] = VAL_FRACTION
        reasons.append(f"{VAL_FRACTION:.0%} of the images are held back for evaluation: there is no split for it.")
    return Choice(recipe, overrides, tuple(reasons))


def _choose_size(table: ObjectTable, base: int, largest: int, stride: int | None) -> tuple[SizeDict, str]:
    """Edges of the images: from those of the recipe upwards, until few objects are below a cell of the feature map,
    but not beyond the images' own size or that of the recipe."""
    aspect = float(np.clip(np.quantile(table.sizes.max(axis=1) / table.sizes.min(axis=1), 0.95), 1, 2))
    own = int(np.median(table.sizes.min(axis=1)))
    candidates = [min(base, max(SIZE_STEP, own))]
    candidates += [base] if own < base else range(base + SIZE_STEP, min(largest, own) + 1, SIZE_STEP)
    for shortest in candidates:
        size = SizeDict(shortest_edge=shortest, longest_edge=int(np.ceil(aspect * shortest)))
        sides = table.trained_sides(TrainedSize(size))[table.ordinary]
        small = float((sides < (stride or 1)).mean())
        if small <= NOT_FEW:
            break
    cell = "" if stride is None else f", and {small:.1%} of them end below a cell of {stride} pixels"
    return size, (
        f"Images at {size.shortest_edge} pixels (their own shorter side is {own}): half of the objects are "
        f"{np.median(sides):.0f} pixels a side then{cell}."
    )


def _unless_equal(values: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Those options that a recipe does not say by itself."""
    return {name: value for name, value in wanted.items() if values.get(name) != value}


def _decoded_bytes(table: ObjectTable) -> int:
    return int(3 * table.sizes.prod(axis=1).sum())
