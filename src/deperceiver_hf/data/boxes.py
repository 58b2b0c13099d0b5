# SPDX-License-Identifier: Apache-2.0
"""The two formats of boxes in pixels: corners, which models and drawing speak, and COCO's, which files hold."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


def xyxy_to_xywh(boxes: ArrayLike, dtype: DTypeLike = np.float64) -> np.ndarray:
    """Corners (x_min, y_min, x_max, y_max) to COCO's (x, y, width, height).

    Args:
        boxes: (n, 4), also an empty list.
        dtype: Type to compute and answer in.

    Returns:
        (n, 4), a new array.
    """
    boxes = np.asarray(boxes, dtype=dtype).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def xywh_to_xyxy(boxes: ArrayLike, dtype: DTypeLike = np.float64) -> np.ndarray:
    """COCO's (x, y, width, height) to corners (x_min, y_min, x_max, y_max); otherwise as `xyxy_to_xywh`."""
    boxes = np.asarray(boxes, dtype=dtype).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
