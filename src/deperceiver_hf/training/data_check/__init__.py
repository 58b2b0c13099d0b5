# SPDX-License-Identifier: Apache-2.0
"""The command that looks a data set over: the doctor of `data`, at the size that a training gives it, and a recipe."""
