# SPDX-License-Identifier: Apache-2.0
"""The two architectures. The files of this folder import each other by `from .sibling import name` and nothing else of
the package: so transformers can copy them beside the weights, where they run without it.
"""
