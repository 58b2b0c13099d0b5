# SPDX-License-Identifier: Apache-2.0
"""The size that an image gets from an image processor's resize."""

from collections.abc import Mapping

from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

_KEYS = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")


def resized_size(height: int, width: int, size: Mapping[str, int | None]) -> tuple[int, int]:
    """Height and width after a resize, at least one pixel each.

    Args:
        height, width: of the image, in pixels.
        size: as an image processor has it: `{"shortest_edge": s}`, with or without `"longest_edge"` as a bound that
            goes before the shortest edge; `{"max_height": h, "max_width": w}`; or `{"height": h, "width": w}`.

    Raises:
        ValueError: `size` is another kind.
    """
    given = {key: int(size[key]) for key in _KEYS if size.get(key)}
    if "shortest_edge" in given:
        longest = given.get("longest_edge")
        new_size = get_size_with_aspect_ratio((height, width), given["shortest_edge"], longest)
        # An image whose shorter side needs no resizing is left as it is, though its longer side may be too long.
        new_size = tuple(side if longest is None else min(side, longest) for side in new_size)
    elif given.keys() == {"max_height", "max_width"}:
        new_size = get_image_size_for_max_height_width((height, width), given["max_height"], given["max_width"])
    elif given.keys() == {"height", "width"}:
        new_size = (given["height"], given["width"])
    else:
        raise ValueError(
            "size must have shortest_edge (and longest_edge), or max_height and max_width, or height and width, got "
            f"{dict(size)}"
        )
    return max(1, int(new_size[0])), max(1, int(new_size[1]))
