# SPDX-License-Identifier: Apache-2.0
"""Errors that end a command in one line, without a traceback: the user's, and failures of the work itself."""

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pickle import UnpicklingError
from zipfile import BadZipFile

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from pyarrow import ArrowException
from safetensors import SafetensorError
from yaml import YAMLError

from .jobs import printable

USER_ERROR_CODE, FAILURE_CODE, INTERRUPTED_CODE = 2, 1, 130  # what a command ends with


class UserError(ValueError):
    """What was asked for cannot be done as it was asked; the message says what was found and what to do."""


class FailedRunError(RuntimeError):
    """What was asked for was begun in good order and failed; the message says where and what may help."""


# What libraries raise when a file, a name or a value that the user gave does not fit.
FOREIGN_USER_ERRORS = (
    *(OSError, ValueError, ImportError),  # the last: something optional is not installed
    *(StrictDataclassError, SafetensorError, SafetensorsParsingError, NotASafetensorsRepoError, HTTPError),
    *(DatasetsError, ArrowException, YAMLError),
    *(UnpicklingError, EOFError, BadZipFile, LZMAError, zlib.error),  # of files that are cut off or something else
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
FULL_DISK = ("PytorchStreamWriter failed", "No space left on device", "unexpected pos")
BROKEN_FILE = ("PytorchStreamReader failed", "failed finding central directory", "Invalid magic number; corrupt file?")


@contextlib.contextmanager
def refused_fields_as_user_errors() -> Iterator[None]:
    """Within, a field of an impossible type or value in a configuration raises a `UserError` of one line."""
    try:
        yield
    except StrictDataclassError as error:
        raise UserError(" ".join(str(error).split())) from error


@dataclass(frozen=True)
class Failure:
    """How a command ends that did not do what it was asked for.

    Attributes:
        message: What is said, on one line.
        code: Exit code of the command.
    """

    message: str
    code: int


def explain(error: BaseException) -> Failure:
    """What to say of an error that ends a command, whichever library raised it."""
    message = one_line(error)
    if is_out_of_memory(error):
        return Failure(
            f"the memory is not enough: {message} A smaller --batch_size, smaller images, a smaller model or fewer "
            "--num_workers need less.",
            FAILURE_CODE,
        )
    if _says(error, FULL_DISK):
        return Failure(f"the disk is full, or a file could not be written: {message}", USER_ERROR_CODE)
    if isinstance(error, RuntimeError) and "DataLoader worker" in message:
        return Failure(
            f"a process that loads images has ended: {message} If it was killed for its memory, fewer --num_workers "
            "or a smaller --batch_size help; --num_workers 0 loads in the process itself and shows what is wrong.",
            FAILURE_CODE,
        )
    if isinstance(error, FailedRunError | FloatingPointError):
        return Failure(message, FAILURE_CODE)
    # An import that fails within the package is a mistake in it.
    own_mistake = isinstance(error, ImportError) and (error.name or "").split(".")[0] == __package__
    if (isinstance(error, FOREIGN_USER_ERRORS) and not own_mistake) or _says(error, BROKEN_FILE):
        named = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        return Failure(f"{named}{message}", USER_ERROR_CODE)
    return Failure(
        f"unexpected {type(error).__name__}: {message} (--debug shows where; please report it)", FAILURE_CODE
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, was not enough."""
    return isinstance(error, MemoryError) or _says(error, OUT_OF_MEMORY)


def one_line(error: BaseException) -> str:
    """The message of an error, or its kind if it has none, on one line, printable.

    Of an error in a process that loads data the traceback is left out, which torch puts into the message.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if " in DataLoader worker process " in lines[0]:
        lines = [lines[-1].removeprefix(f"{type(error).__module__}.").removeprefix(f"{type(error).__qualname__}: ")]
    return printable(" ".join(" ".join(lines).split()))


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Whether the message of an error has one of the phrases: libraries in C++ raise `RuntimeError` for everything."""
    text = str(error)
    return any(phrase.lower() in text.lower() for phrase in phrases)
