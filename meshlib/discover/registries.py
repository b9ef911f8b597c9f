"""Which registries has this process opened, and who shares them?

One object for each entry of `registries` that a service names, whatever the number of services, and the same across reloads while its
settings are the same: connections, tokens and what is known of its health are had once. Opened is what is used; what nobody uses any
more is closed on the keeper. It asks nothing itself.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from meshlib.keeper import Keeper

from .pace import Pace
from .registry import Registry, open_registry

if TYPE_CHECKING:
    from meshlib.config.agent_policy import RegistryPolicy

logger = logging.getLogger("meshlib.discover")

Open = Callable[[str, Mapping[str, Any]], Registry]


class Opened:
    """A registry, with what it was made from."""

    __slots__ = ("pace", "policy", "registry")

    def __init__(self, policy: RegistryPolicy, registry: Registry, source: random.Random) -> None:
        self.policy = policy
        self.registry = registry
        self.pace = Pace(source)


class Registries:
    """Those of one mesh in this process."""

    def __init__(self, keeper: Keeper, source: random.Random, *, open_one: Open = open_registry) -> None:
        self._keeper = keeper
        self._random = source
        self._open = open_one
        self._opened: dict[str, Opened] = {}
        self._is_closed = False

    def prepare(self, wanted: Iterable[str], policies: Mapping[str, RegistryPolicy]) -> dict[str, Opened]:
        """Those that are wanted, opened where they are new or not as before. In force with `use`. Raises ConfigError."""
        found = {}
        for name in dict.fromkeys(wanted):
            policy, known = policies[name], self._opened.get(name)
            if known is None or known.policy != policy:
                known = Opened(policy, self._open(policy.plugin, policy.settings), self._random)
            found[name] = known
        return found

    def use(self, opened: dict[str, Opened]) -> None:
        """From now on these; the others are closed."""
        kept = {id(each) for each in opened.values()}
        gone = [each for each in self._opened.values() if id(each) not in kept]
        self._opened = opened
        self._close(gone)

    def find(self, name: str) -> Opened | None:
        return self._opened.get(name)

    def is_open(self, registry: Registry) -> bool:
        """False for one that was closed, by a reload or at the end: what asks it now has to close it again."""
        return not self._is_closed and any(each.registry is registry for each in self._opened.values())

    def close(self) -> None:
        """All of them; `reopen` may follow."""
        self._is_closed = True
        self._close(tuple(self._opened.values()))

    def reopen(self) -> list[Opened]:
        """Make those anew that `close` has closed. Raises ConfigError."""
        if not self._is_closed:
            return []
        self._is_closed = False
        for each in self._opened.values():
            each.registry = self._open(each.policy.plugin, each.policy.settings)
            each.pace.reset()
        return list(self._opened.values())

    def after_fork(self) -> None:
        """In a child: none of their connections is ours."""
        for each in self._opened.values():
            each.pace.reset()
            try:
                each.registry.after_fork()
            except Exception:
                logger.exception("the registry %s could not forget its parent's connections", each.policy.name)

    def _close(self, gone: Iterable[Opened]) -> None:
        for each in gone:
            # A keeper that doesn't run has never used it.
            if self._keeper.is_running:
                with contextlib.suppress(RuntimeError):
                    self._keeper.run(_closed(each.policy.name, each.registry))


async def _closed(name: str, registry: Registry) -> None:
    try:
        await registry.close()
    except Exception as error:
        logger.info("the registry %s could not be closed: %s", name, error)
