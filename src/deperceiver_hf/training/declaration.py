# SPDX-License-Identifier: Apache-2.0
"""How an option is declared: with all that is known of it, so that lists of options are made and not written."""

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from ..errors import UserError

FACTS = "facts"  # key in a field's metadata; the others are for argparse


@dataclass(frozen=True)
class OptionFacts:
    """What is known of an option beside its type, its default and its help.

    Attributes:
        at_least: The least value that makes sense; `None` if it has no such limit.
        of: Names of the architectures that take it; `None` if all do.
        new_model_only: It describes a model that is not there yet; a saved model brings its own.
        resume_may_change: A resumed run may have another value. All other options decide what the run computes.
        harmless: It changes nothing in what a run computes or how fast, so runs can be compared whatever it is.
        comparison_hint: A comparison decides this option itself; what its user is to give instead.
    """

    at_least: float | None = None
    of: tuple[str, ...] | None = None
    new_model_only: bool = False
    resume_may_change: bool = False
    harmless: bool = False
    comparison_hint: str | None = None


def option(help_text: str, default: Any = None, **facts: Any) -> Any:
    """A field of a dataclass of options; `facts` are those of [`OptionFacts`]."""
    return field(default=default, metadata=declared(help_text, **facts))


def declared(help_text: str, *, metavar: Any = None, **facts: Any) -> dict[str, Any]:
    """Metadata of such a field, for one that needs more than a default."""
    return {"help": help_text, FACTS: OptionFacts(**facts)} | ({} if metavar is None else {"metavar": metavar})


class Options:
    """Base of dataclasses whose fields are made by [`option`]."""

    _argument_group_name: str  # in the help of `HfArgumentParser`

    @classmethod
    def _fields(cls) -> tuple[Any, ...]:
        own: Any = cls  # each subclass is a dataclass
        return dataclasses.fields(own)

    @classmethod
    def facts(cls) -> dict[str, OptionFacts]:
        """The facts of every option, by its name."""
        return {f.name: f.metadata[FACTS] for f in cls._fields()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of every option, by its name."""
        return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in cls._fields()}

    @classmethod
    def for_parser(cls, **types: Any) -> type:
        """A dataclass of the same options that `HfArgumentParser` takes: argparse must not see the facts, and a user
        is to read which architectures an option is for.

        Args:
            types: Of options whose type is narrower on the command line, by name.
        """
        fields = []
        for f in cls._fields():
            metadata = {key: value for key, value in f.metadata.items() if key != FACTS}
            if (architectures := f.metadata[FACTS].of) is not None:
                metadata["help"] += f" Only for {listed(architectures, 'and')}."
            same = field(default=f.default, default_factory=f.default_factory, metadata=metadata)
            fields.append((f.name, types.get(f.name, f.type), same))
        return dataclasses.make_dataclass(
            cls.__name__, fields, namespace={"_argument_group_name": cls._argument_group_name}
        )

    def given(self, names: Sequence[str]) -> list[str]:
        """Those of the named options that differ from their default."""
        defaults = self.defaults()
        return [name for name in names if getattr(self, name) != defaults[name]]

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise a `ValueError` if one of the named options is given."""
        if given := self.given(names):
            raise UserError(f"{', '.join('--' + name for name in given)}: {reason}")

    def check_ranges(self) -> None:
        """Raise a `ValueError` if an option is less than it may be, or not a number."""
        for name, facts in self.facts().items():
            value = getattr(self, name)
            if facts.at_least is None or value is None or value == "auto":
                continue
            if not value >= facts.at_least:
                raise UserError(f"--{name} must be at least {facts.at_least}, not {value}.")


def listed(names: Sequence[str], conjunction: str) -> str:
    """`a, b and c`."""
    return f" {conjunction} ".join(", ".join(names).rsplit(", ", 1))
