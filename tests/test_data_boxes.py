# SPDX-License-Identifier: Apache-2.0
"""Corners and COCO's boxes say the same."""

import numpy as np
import pytest

from deperceiver_hf.data.boxes import xywh_to_xyxy, xyxy_to_xywh


def test_boxes_in_both_formats():
    corners, coco = [[10, 20, 40, 25], [0, 0, 0.5, 1]], [[10, 20, 30, 5], [0, 0, 0.5, 1]]
    assert xyxy_to_xywh(corners).tolist() == coco
    assert xywh_to_xyxy(coco).tolist() == corners


@pytest.mark.parametrize("convert", [xywh_to_xyxy, xyxy_to_xywh])
def test_type_is_the_one_asked_for_and_none_is_a_table_too(convert):
    boxes = np.random.default_rng(0).uniform(0, 100, (50, 4)).astype(np.float32)
    assert convert(boxes).dtype == np.float64
    np.testing.assert_array_equal(convert(boxes), convert(boxes.astype(np.float64)))
    single = convert(boxes, dtype=np.float32)
    assert single.dtype == np.float32
    np.testing.assert_array_equal(single, convert(boxes).astype(np.float32))
    assert convert([]).shape == (0, 4)
    assert not np.shares_memory(convert(boxes, dtype=np.float32), boxes)
