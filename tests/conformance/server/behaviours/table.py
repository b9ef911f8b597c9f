"""What is a behaviour? A named statement about every server, with what it needs, and the modes in which it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.conformance.server.kinds import NEEDS, Kind

if TYPE_CHECKING:
    from tests.conformance.server.servers import Server

ENFORCE = ("enforce",)
# Where plain text comes in.
PLAIN = ("permissive", "observe")
ANY = ("enforce", "permissive", "observe")


@dataclass(frozen=True)
class Behaviour:
    """`check` fails if the server does not behave so; its docstring is the rule."""

    name: str
    check: Callable[[Server], None]
    needs: tuple[str, ...]
    modes: tuple[str, ...]

    @property
    def rule(self) -> str:
        return self.check.__doc__ or ""

    def obstacles(self, kind: Kind, mode: str) -> list[str]:
        """Why it has no meaning there; nothing if it has one."""
        found = [f"it needs {NEEDS[need]}: {kind.lacks[need]}" for need in self.needs if need in kind.lacks]
        return found + ([] if mode in self.modes else [f"it is about mode {' or '.join(self.modes)}"])


TABLE: list[Behaviour] = []


def behaviour(*needs: str, modes: Iterable[str] = ANY) -> Callable[[Callable[[Server], None]], Callable[[Server], None]]:
    """Put a function into the table, in the order in which it is written."""
    unknown = set(needs) - set(NEEDS)
    assert not unknown, unknown

    def enter(check: Callable[[Server], None]) -> Callable[[Server], None]:
        TABLE.append(Behaviour(check.__name__, check, needs, tuple(modes)))
        return check

    return enter
