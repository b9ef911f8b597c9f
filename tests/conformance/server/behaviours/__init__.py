"""How does every server behave? Each behaviour once, as a function with its rule; `ALL` has them in order."""

from __future__ import annotations

from importlib import import_module

from tests.conformance.server.behaviours.table import TABLE, Behaviour

for name in (
    "paths",
    "heads",
    "callers",
    "bodies",
    "connections",
    "deadlines",
    "limits",
    "observed",
    "failures",
    "conversations",
    "listeners",
    "ends",
):
    import_module(f"{__name__}.{name}")
# The end of a server comes last.
ALL = [each for each in TABLE if "ends" not in each.check.__module__] + [
    each for each in TABLE if "ends" in each.check.__module__
]

__all__ = ["ALL", "Behaviour"]
