# SPDX-License-Identifier: Apache-2.0
"""What a forward pass costs: operations counted, time and memory measured, both against the number of tokens."""
