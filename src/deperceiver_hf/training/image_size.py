# SPDX-License-Identifier: Apache-2.0
"""The image size that a model is trained for."""

from .arguments import TrainingOptions

DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}


def training_size(options: TrainingOptions, default: dict[str, int] = DEFAULT_SIZE) -> dict[str, int]:
    """Shortest and longest edge of the images; what options do not give is that of `default`.

    Raises:
        ValueError: The longest edge would be less than the shortest.
    """
    size = dict(default)
    if options.shortest_edge is not None:
        ratio = DEFAULT_SIZE["longest_edge"] / DEFAULT_SIZE["shortest_edge"]
        size = {"shortest_edge": options.shortest_edge, "longest_edge": round(ratio * options.shortest_edge)}
    if options.longest_edge is not None:
        size["longest_edge"] = options.longest_edge
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"--longest_edge {size['longest_edge']} is less than the shortest edge of {size['shortest_edge']}; "
            f"give a smaller --shortest_edge too."
        )
    return size
