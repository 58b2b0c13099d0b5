# SPDX-License-Identifier: Apache-2.0
"""COCO scores of a detector: the metric, the passes over a data set, and the job behind `evaluate`."""
