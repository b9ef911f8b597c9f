"""How does this process get into Consul's catalogue, and stay there for as long as it lives?

It registers with the agent, which is the one that knows and tells the servers; an entry that the servers lost is put back by the
agent itself. Two kinds of checks say that it lives:

- *ttl* (the usual one): the process says so itself, three times within `ttl`. One that was killed or hangs is critical after it.
- *http*: the agent asks a URL each `interval`. Here it is only looked whether the agent still has the entry.

An agent that was restarted, or was told to forget us, answers 404 (older ones 500): then it is entered again, at once. One that
doesn't answer, or not while there is time to ask again, is asked again soon, by chance, for as long as the check still passes; that it
is over is raised, and so is an entry that the agent still doesn't know right after taking it: then the URL leads to more than one agent.

What is left behind by a process that was killed is critical after `ttl` and goes after `deregister_after`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from consul import Check  # type: ignore[import-untyped]

from meshlib.discover import Instance, limit_within, pause_within
from meshlib.errors import ConfigError

from .instances import IDENTITY, OURS, PROTOCOL, WEIGHT, ZONE
from .place import ConsulError, Reader
from .wire import Agent, Wire

log = logging.getLogger("meshlib.consul")

TTL: Final = 15.0
INTERVAL: Final = 10.0
# The least that Consul takes; it looks each half minute.
DEREGISTER_AFTER: Final = 60.0
JITTER: Final = 0.1
# Consul's own limits for Meta.
MOST_META: Final = 64
LONGEST_META_KEY: Final = 128
LONGEST_META_VALUE: Final = 512
_META_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


@dataclass(frozen=True, slots=True)
class Terms:
    """What the agent is told: the keys of `register`, and what the mesh knows of the instance."""

    name: str
    host: str
    port: int
    weight: int
    tags: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)
    ttl: float = TTL
    http: str = ""
    interval: float = INTERVAL
    deregister_after: float = DEREGISTER_AFTER

    @property
    def rhythm(self) -> float:
        """Seconds between two looks."""
        return self.interval if self.http else self.ttl / 3

    @property
    def life(self) -> float:
        """Seconds for which the agent may be silent without harm: until the check is critical. Its own looks don't end by our silence."""
        return 3 * self.rhythm

    def check(self, check_id: str) -> dict[str, Any]:
        after = f"{self.deregister_after:g}s"
        if self.http:
            made = Check.http(self.http, f"{self.interval:g}s", timeout=f"{self.interval:g}s", deregister=after)
            return {**made, "CheckID": check_id}
        # Passing from the beginning: it enters when it serves, and would otherwise be looked for in vain until the next pass.
        made = Check.ttl(f"{round(self.ttl * 1000)}ms")
        return {**made, "CheckID": check_id, "Status": "passing", "DeregisterCriticalServiceAfter": after}


def terms_of(instance: Instance, settings: Mapping[str, Any]) -> Terms:
    """What `register` says. Raises ConfigError."""
    reader = Reader(f"services.{instance.service}.register", settings)
    name = reader.text("name", instance.service)
    tags, meta = list(reader.texts("tags")), reader.pairs("meta")
    http = reader.text("http")
    ttl = reader.seconds("ttl", TTL, 0.3, 3600.0)
    interval = reader.seconds("interval", INTERVAL, 0.1, 3600.0)
    after = reader.seconds("deregister_after", DEREGISTER_AFTER, 60.0, 7 * 86400.0)
    reader.end()
    if http and not http.startswith(("http://", "https://")):
        raise reader.wrong("http", "must be the URL that the agent asks", "http://10.0.0.7:8080/healthz")
    host, colon, digits = instance.address.rpartition(":")
    if not colon or not digits.isdigit() or not host or instance.address.startswith("unix:"):
        raise ConfigError(
            f"{instance.address!r} can't be registered in Consul: others must reach it by host and port.",
            hint="Set the address under which this process is reached.",
        )
    for key, value in {**instance.labels, **meta}.items():
        if key in OURS or key.startswith("consul-"):
            raise reader.wrong("meta", f"must not name {key!r}", "meshlib-… and consul-… have a meaning of their own.")
        if _fits(key, value):
            meta[key] = value
        elif key in instance.labels:
            tags.append(f"{key}={value}")  # tags have no limits, and the resolver reads these back
        else:
            raise reader.wrong(
                "meta", f"{key!r} is refused by Consul", "Letters, digits, - and _; at most 128, its value at most 512."
            )
    said = {ZONE: instance.zone, IDENTITY: instance.identity, PROTOCOL: instance.protocol}
    if instance.weight != int(instance.weight) or instance.weight < 1:
        said[WEIGHT] = f"{instance.weight:g}"
    meta.update((key, value) for key, value in said.items() if value)
    if len(meta) > MOST_META:
        raise reader.wrong("meta", f"has {len(meta)} keys with those of the mesh, and Consul takes {MOST_META}")
    weight = max(1, min(65535, round(instance.weight)))
    host = host.removeprefix("[").removesuffix("]")
    return Terms(name, host, int(digits), weight, tuple(tags), meta, ttl, http, interval, after)


class ConsulEntry:
    """A `Registration`. State of the process: what the agent was told of it. `is_entered`: the agent has it, as far as is known."""

    def __init__(self, wire: Wire, instance: Instance, terms: Terms, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._wire = wire
        self._agent = Agent(wire)
        self._id = instance.id
        self._terms = terms
        self._clock = clock
        # The registration under way: who leaves must not be overtaken by it.
        self._entering: asyncio.Task[None] | None = None
        self.is_entered = False

    def __repr__(self) -> str:
        return f"<ConsulEntry {self._id} of {self._terms.name}>"

    @property
    def _check_id(self) -> str:
        return f"service:{self._id}"

    async def keep(self) -> None:
        while True:
            self._entering = asyncio.ensure_future(self._enter())
            await asyncio.shield(self._entering)
            self.is_entered = True
            try:
                is_known = await self._stay()
            finally:
                self.is_entered = False
            if not is_known:
                raise ConsulError(
                    f"{self._wire.place.name} has taken the entry {self._id}, and doesn't know it a moment later.",
                    hint="Ask the agent of this machine itself: behind a balancer of several agents, each knows its own entries.",
                )
            log.warning("%s has lost the entry %s of %s: entered again", self._wire.place.name, self._id, self._terms.name)

    async def leave(self) -> None:
        entering, self._entering = self._entering, None
        if entering is not None and not entering.done():
            await asyncio.wait([entering], timeout=self._wire.place.timeout)
        if await self._agent.agent.service.deregister(self._id):
            log.info("%s has left Consul", self._id)

    async def _enter(self) -> None:
        terms = self._terms
        is_taken = await self._agent.agent.service.register(
            terms.name,
            service_id=self._id,
            address=terms.host,
            port=terms.port,
            tags=list(terms.tags),
            meta=dict(terms.meta),
            weights={"Passing": terms.weight, "Warning": terms.weight},
            check=terms.check(self._check_id),
            replace_existing_checks=True,
        )
        if not is_taken:
            raise ConsulError(f"{self._wire.place.name} takes no registrations.", hint="Is that the URL of a Consul agent?")
        log.info("%s is in Consul as %s, at %s:%d", self._id, terms.name, terms.host, terms.port)

    async def _stay(self) -> bool:
        """Until the agent doesn't know us any more. True if it did at least once."""
        terms = self._terms
        look: Callable[[], Coroutine[Any, Any, bool]] = self._has_entry if terms.http else self._pass
        known, last, pause = False, self._clock(), 0.0
        while True:
            await asyncio.sleep(pause)
            asked = self._clock()
            try:
                async with asyncio.timeout(limit_within(last + terms.life - asked)):
                    has_entry = await look()
                if not has_entry:
                    return known
                last, pause = asked, terms.rhythm * (1 + JITTER * random.uniform(-1, 1))
            except (ConsulError, TimeoutError):
                left = last + terms.life - self._clock()
                if left <= 0.0:
                    raise
                # The check still passes: one question that was lost must not take us out.
                pause = pause_within(left, terms.life)
            known = True

    async def _pass(self) -> bool:
        try:
            return bool(await self._agent.agent.check.ttl_pass(self._check_id))
        except ConsulError as error:
            # Older agents say so with a 500, as they say everything.
            if error.status == 500 and "does not have associated TTL" in error.message:
                return False
            raise

    async def _has_entry(self) -> bool:
        answer = await self._wire.ask("GET", f"/v1/agent/service/{self._id}", may_lack=True)
        return answer.code != 404


def _fits(key: str, value: str) -> bool:
    """Whether Consul takes it as Meta."""
    return 0 < len(key) <= LONGEST_META_KEY and set(key) <= _META_CHARS and len(value) <= LONGEST_META_VALUE
