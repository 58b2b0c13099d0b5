# SPDX-License-Identifier: Apache-2.0
"""Errors that end a command in one line, without a traceback: the user's, and failures of the work itself."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from safetensors import SafetensorError

USER_ERROR_CODE, FAILURE_CODE, INTERRUPTED_CODE = 2, 1, 130  # what a command ends with


class UserError(ValueError):
    """What was asked for cannot be done as it was asked; the message says what was found and what to do."""


class FailedRunError(RuntimeError):
    """What was asked for was begun in good order and failed; the message says where and what may help."""


# What libraries raise when a file, a name or a value that the user gave does not fit.
FOREIGN_USER_ERRORS = (
    *(OSError, ValueError, ImportError),  # the last: something optional is not installed
    *(StrictDataclassError, SafetensorError, SafetensorsParsingError, NotASafetensorsRepoError, HTTPError),
)


@contextlib.contextmanager
def refused_fields_as_user_errors() -> Iterator[None]:
    """Within, a field of an impossible type or value in a configuration raises a `UserError` of one line."""
    try:
        yield
    except StrictDataclassError as error:
        raise UserError(" ".join(str(error).split())) from error


def is_user_error(error: BaseException) -> bool:
    """Whether a command takes an error for the user's. An import that fails within the package is a mistake in it."""
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == __package__:
        return False
    return isinstance(error, FOREIGN_USER_ERRORS)


def one_line(error: BaseException) -> str:
    """The message of an error, or its kind if it has none, on one line.

    Of an error in a process that loads data the traceback is left out, which torch puts into the message.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if " in DataLoader worker process " in lines[0]:
        lines = lines[-1:]
    return " ".join(" ".join(lines).split())
