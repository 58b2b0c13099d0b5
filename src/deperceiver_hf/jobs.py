# SPDX-License-Identifier: Apache-2.0
"""The one shape of all commands: arguments are prepared into a job, the job is run, its result says what came out.

What it says is for a terminal: see [`printable`].
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


class Result(Protocol):
    """What a command ends with. If not all is well, it has an `exit_code`, too, that is not 0."""

    def summary(self) -> str:
        """What came out, as text for the user."""

    def to_dict(self) -> dict[str, Any]:
        """What came out, for JSON; paths may be `Path`."""


class Job(Protocol):
    """Work whose arguments have been checked."""

    def run(self) -> Result:
        """Do it."""


ResultType = TypeVar("ResultType", bound=Result)

# Zero-width joiners belong to the spelling between letters of Persian, Hindi and others, and within emoji.
_JOINER_IN_A_WORD = re.compile(r"(?<=[^\x00-\u05ff\u2000-\u206f])[\u200c\u200d](?=[^\x00-\u05ff\u2000-\u206f])")
_UNSEEN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, format (bidi, zero width), surrogates, separators


@dataclass(frozen=True)
class FunctionJob(Generic[ResultType]):
    """A job that is a function, which checks its arguments itself before it does anything.

    Attributes:
        function: Does the work.
        options: Its arguments by name.
    """

    function: Callable[..., ResultType]
    options: dict[str, Any]

    def run(self) -> ResultType:
        """Call the function."""
        return self.function(**self.options)


def printable(text: str, keep: str = "") -> str:
    """Text of a user (names of classes and files) as it may be printed or drawn.

    What a terminal would obey or nobody would see is escaped: control characters, line ends, marks of the writing
    direction, characters of no width, bytes of a file name that are no text. `"\\x1b[31m"` becomes `r"\\x1b[31m"`.

    Args:
        text: Any.
        keep: Characters that are left as they are, such as the line ends between lines of one's own.
    """
    joiners = {match.start() for match in _JOINER_IN_A_WORD.finditer(text)}
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _UNSEEN_CATEGORIES and character not in keep and place not in joiners
        else character
        for place, character in enumerate(text)
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], labelled: bool = True) -> str:
    """A Markdown table of numbers, the first column of which are labels."""
    alignment = ["---" if labelled and not column else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, alignment, *rows))


def plural(count: int, noun: str) -> str:
    """A number of things in words."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
