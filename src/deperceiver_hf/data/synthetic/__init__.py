# SPDX-License-Identifier: Apache-2.0
"""Scenes of shapes, painted when they are asked for: data to try things on, with objects of known size and place."""
