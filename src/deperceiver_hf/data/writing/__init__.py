# SPDX-License-Identifier: Apache-2.0
"""Detection data written as files of a format: `deperceiver data convert` and `deperceiver data split`."""
