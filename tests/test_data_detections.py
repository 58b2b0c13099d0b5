# SPDX-License-Identifier: Apache-2.0
"""Detections are what the pipeline says, and what a result file says."""

import numpy as np

from deperceiver_hf.data.detections import Detections

FOUND = [
    {"score": 0.75, "label": "dog", "box": {"xmin": 1, "ymin": 2, "xmax": 30, "ymax": 42}},
    {"score": 0.5, "label": "cat", "box": {"xmin": 0, "ymin": 0, "xmax": 7, "ymax": 9}},
]


def test_detections_of_the_pipeline_in_the_format_of_coco():
    detections = Detections.from_pipeline(9, FOUND, {"cat": 0, "dog": 1})
    assert len(detections) == 2
    assert detections.boxes.tolist() == [[1, 2, 30, 42], [0, 0, 7, 9]]
    assert detections.to_coco([3, 17]) == [
        {"image_id": 9, "category_id": 17, "bbox": [1, 2, 29, 40], "score": 0.75},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 7, 9], "score": 0.5},
    ]


def test_nothing_found():
    detections = Detections.from_pipeline("empty.png", [], {})
    assert len(detections) == 0
    assert (detections.boxes.shape, detections.labels.dtype) == ((0, 4), np.int64)
    assert detections.to_coco([1]) == []


def test_sides_are_those_of_the_corners_in_float64():
    corners = np.array([[0.1, 0.2, 100.3, 50.4]], dtype=np.float32)
    (result,) = Detections(1, np.array([0.5]), np.array([0]), corners).to_coco([1])
    x, y, right, bottom = corners[0].tolist()
    assert result["bbox"] == [x, y, right - x, bottom - y]
