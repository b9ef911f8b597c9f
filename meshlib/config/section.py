"""What do all sections of the file have in common?

They are frozen, strict, and closed to unknown keys, because in a policy a mistyped key is a hole. A number is never
read from a string, nor a word from a number: strictness costs a pair of quotes, and saves the version "1.10" from
becoming 1.1. Which sections there are stands in `document.py` and `secure_document.py`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the file: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Choice(Section):
    """A mapping with exactly one key: which of several is meant. An override replaces it as a whole."""

    @property
    def part(self) -> tuple[str, str]:
        """The key and its word; "" where the key says it all."""
        name, value = next((name, value) for name, value in self if value is not None)
        return name, value if isinstance(value, str) else ""


class Closed(Section):
    """A section whose values may be secret, or are for somebody else to know: none of them is in a repr."""

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Nothing: a URL may hold a password, and so may what this file doesn't know."""
        return []
