# SPDX-License-Identifier: Apache-2.0
"""What a detector found on an image: the schema between models, metric, result files and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .boxes import xyxy_to_xywh
from .fields import Id


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found on one image.

    Attributes:
        image_id: Of the image in the records of its data set, in result files the data set's own id of it; or the name
            of its file where there is no data set.
        scores: (n,) in [0, 1].
        labels: (n,) integers from 0; whose classes they number, the model's or the data set's, says who made them.
        boxes: (n, 4) corners (x_min, y_min, x_max, y_max) in pixels of the image.
    """

    image_id: Id
    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_pipeline(
        cls, image_id: int | str, found: Sequence[Mapping[str, Any]], label2id: Mapping[str, int]
    ) -> "Detections":
        """What transformers' `object-detection` pipeline says of one image.

        Args:
            image_id: Of the image.
            found: `{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}` of each object.
            label2id: Label of each name.
        """
        corners = [[entry["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for entry in found]
        return cls(
            image_id=image_id,
            scores=np.array([entry["score"] for entry in found], dtype=np.float64),
            labels=np.array([label2id[entry["label"]] for entry in found], dtype=np.int64),
            boxes=np.array(corners, dtype=np.float64).reshape(-1, 4),
        )

    def to_coco(self, category_ids: Sequence[Id]) -> list[dict[str, Any]]:
        """The same in COCO's result format, `{"image_id", "category_id", "bbox", "score"}` of each object.

        Args:
            category_ids: The data set's own category id of each label.
        """
        columns = (self.scores.tolist(), self.labels.tolist(), xyxy_to_xywh(self.boxes).tolist())
        return [
            {"image_id": self.image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for score, label, box in zip(*columns, strict=True)
        ]
