# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run do one after the other, or one for all."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def main_process_first(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call on the main process, then on the others, which find its downloads; its error is raised on all."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
    (message,) = broadcast_object_list([error and str(error)])  # not every exception can be pickled
    if message is not None:
        raise error or ValueError(message)
    return result if accelerator.is_main_process else function()


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call on the main process alone; all get the result, which can be pickled, or the error."""
    result = main_process_first(accelerator, lambda: function() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0]
