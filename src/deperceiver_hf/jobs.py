# SPDX-License-Identifier: Apache-2.0
"""The one shape of all commands: arguments are prepared into a job, the job is run, its result says what came out."""

from collections.abc import Callable
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
