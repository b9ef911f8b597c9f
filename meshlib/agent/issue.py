"""Which identities has this node, and how do they stay fresh?

One for each service that an entry names, however many entries name it: got from who vouches for it (`authorities.py`), renewed at
half of its life give or take a tenth of that, with an alarm at three quarters. Each is an `IdentityStore`, which keeps the last good
one until it ends, tries again with growing pauses, and gives up at once what was taken back. JWT-SVIDs are made when a workload asks
for one, for minutes, and given again to who asks for the same until half of that is over: the CA's audit log has a line for each.

Each store is asked on one of a few threads, so that a CA that hangs holds up neither the loop nor what others ask. What changed is
told to those who `watch`, on the loop.

Who may have which identity is not known here: `entries.py`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ..errors import IdentityError, MeshError
from ..keeper import Keeper, shared
from ..secure.ca import RENEWED_LIFE
from ..secure.federation import Federation
from ..secure.identity import Identity, IdentitySource, IdentityStore
from ..secure.jwt_svid import Handed
from ..secure.trust import Relations
from .authorities import NO_KEYS, Authority, Embedded, Enrolled

if TYPE_CHECKING:
    from ..config import Config
    from .entries import Entry

log = logging.getLogger("meshlib.agent")

# Seconds between two looks. What a look finds is told within that.
LOOK: Final = 0.5
# Threads that ask, and seconds that a token may take before the one who wants it is told to come again.
THREADS: Final = 4
PATIENCE: Final = 10.0
# Tokens that are kept to be given again, and new ones for one identity in a minute: each is a line in the CA's audit log.
MOST_TOKENS: Final = 1024
TOKENS_A_MINUTE: Final = 120
# Names of keys that nobody has heard of, which are remembered so that each is asked for once.
MOST_SOUGHT: Final = 256


@dataclass(slots=True, eq=False)
class _Held:
    """One identity, by its SPIFFE ID. `told`: the generation that who watches has heard of.

    `successor` takes its place, under the name of another service, as soon as it has an identity.
    """

    service: str
    spiffe_id: str
    source: IdentitySource
    store: IdentityStore
    token: Any = None
    successor: _Held | None = None
    asking: asyncio.Task[None] | None = None
    told: Identity | None = None
    # What was in force for all when it was looked at last.
    seen: tuple[object, ...] = ()
    # The minute in which tokens were made last, and how many.
    minute: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class _Token:
    handed: Handed = field(repr=False)
    serial: str
    stale: float


class Issuer:
    """State of the agent: the identities of its entries. All methods but `look` are called on the agent's loop."""

    def __init__(
        self,
        config: Config,
        *,
        life: float = RENEWED_LIFE,
        keeper: Keeper | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._wall_clock = wall_clock
        self._keeper = keeper or shared()
        self._authority = _authority_of(config, life, wall_clock)
        # There also without a partner: the first one changes nothing about identities but what goes with them.
        self._federation = Federation(
            Relations.of(config), self._keeper, own=lambda: {self._authority.trust_domain: self._own_roots()}
        )
        self._has_partners = False
        self._held: dict[str, _Held] = {}
        self._by_service: dict[str, str] = {}
        self._tokens: OrderedDict[tuple[str, tuple[str, ...]], _Token] = OrderedDict()
        # By what they are for: tokens that somebody waits for.
        self._under_way: dict[tuple[object, ...], asyncio.Task[str]] = {}
        # Keys of tokens that aren't known: since when, by the clock of who vouches.
        self._sought: OrderedDict[str, float] = OrderedDict()
        self._callbacks: list[Callable[[], None]] = []
        self._told: tuple[object, ...] = ()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="meshlib-issue")
        self._looking: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self.follow(config)

    # ------------------------------------------------------------------------------------------------ life

    def check(self) -> None:
        """Raise what would keep every identity from being issued. Blocks."""
        self._authority.check()

    def follow(self, config: Config) -> None:
        """Take over the entries and federation of a configuration; who vouches stays the same. Raises before anything has changed.

        What the configuration still names stays in force, whatever else about it is new: a token is for the next enrolment, and under
        another service's name an ID is replaced when it can be.
        """
        assert config.agent is not None
        wanted: dict[str, tuple[tuple[str, ...], Any]] = {}
        by_service: dict[str, str] = {}
        for entry in config.agent.entries:
            spiffe_id = config.services[entry.service].identity
            by_service[entry.service] = spiffe_id
            services, token = wanted.get(spiffe_id, ((), None))
            wanted[spiffe_id] = ((*services, entry.service), token or entry.token)
        relations = Relations.of(config)
        made = {
            spiffe_id: self._made(services[0], spiffe_id, token)
            for spiffe_id, (services, token) in wanted.items()
            if not any(each.service in services for each in _chain(self._held.get(spiffe_id)))
        }
        self._federation.follow(relations)
        self._has_partners = bool(relations.federation)
        if self._looking is not None:
            self._federate()
        held: dict[str, _Held] = {}
        for spiffe_id, (services, token) in wanted.items():
            old = self._held.get(spiffe_id)
            new = made.get(spiffe_id) or next(each for each in _chain(old) if each.service in services)
            if new.token != token:
                new.token = token
                self._authority.hand(new.source, token)
                new.store.wake()
            if old is None or old is new or self._current(old) is None:
                held[spiffe_id] = new
            else:
                held[spiffe_id] = old
            held[spiffe_id].successor = None if held[spiffe_id] is new else new
        kept = {id(each) for first in held.values() for each in _chain(first)}
        for each in self._all():
            if id(each) not in kept:
                each.store.close()
        self._held, self._by_service = held, by_service
        for key in [key for key in self._tokens if key[0] not in held]:
            del self._tokens[key]

    def _made(self, service: str, spiffe_id: str, token: Any) -> _Held:
        source = self._authority.source_of(service, spiffe_id, token)
        store = IdentityStore(source, mode="enforce", federation=self._federation, wall_clock=self._wall_clock)
        return _Held(service, spiffe_id, source, store, token)

    async def start(self, patience: float, progress: Callable[[int, int], None] | None = None) -> None:
        """Ask for every identity once, for so many seconds at most, and go on asking when they are due."""
        self._federate()
        self.look()
        end = asyncio.get_running_loop().time() + patience
        while left := [held.asking for held in self._held.values() if held.asking is not None]:
            pause = end - asyncio.get_running_loop().time()
            if pause <= 0:
                break
            await asyncio.wait(left, timeout=min(pause, 1.0))
            if progress is not None:
                progress(sum(held.store.current is not None for held in self._held.values()), len(self._held))
        self._tell()
        self._looking = asyncio.create_task(self._look_always(), name="meshlib-issue")

    async def close(self) -> None:
        """Ask no more. What is in force stays in memory until the process ends."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        self._federation.cancel()
        for held in self._all():
            held.store.close()
        for work in tuple(self._under_way.values()):
            work.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._authority.close()

    def look(self) -> None:
        """Ask whoever is due, and wait for nobody."""
        loop = asyncio.get_running_loop()
        self._exchange()
        seen = (self._authority.version, self._federation.bundles)
        for held in self._all():
            if held.asking is not None:
                continue
            is_changed = not held.seen or any(one is not other for one, other in zip(seen, held.seen, strict=True))
            if is_changed:
                held.seen = seen
                held.store.wake()
            if is_changed or held.store.is_due:
                held.asking = loop.create_task(self._ask(held))
        if self._asking is None:
            self._asking = loop.create_task(self._ask_authority())

    async def _look_always(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            self.look()
            self._tell()

    async def _ask(self, held: _Held) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, held.store.refresh, time.monotonic())
        except Exception:
            log.exception("the identity of %s could not be looked at", held.service)
        finally:
            held.asking = None

    async def _ask_authority(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, self._authority.look, self._own())
        except (MeshError, OSError):
            pass  # told by `alarms`
        except Exception:
            log.exception("the CA could not be looked at")
        finally:
            self._asking = None

    # ------------------------------------------------------------------------------------------------ what is (workload.Identities)

    def identity_of(self, entry: Entry) -> Identity | None:
        held = self._held.get(self._by_service.get(entry.service, ""))
        return None if held is None else self._current(held)

    @property
    def identities(self) -> Mapping[str, Identity]:
        """Those that are in force and have not ended, by SPIFFE ID."""
        found = ((held.spiffe_id, self._current(held)) for held in self._held.values())
        return MappingProxyType({spiffe_id: current for spiffe_id, current in found if current is not None})

    def id_of(self, entry: Entry) -> str:
        """The SPIFFE ID that an entry stands for."""
        return self._by_service.get(entry.service, "")

    def bundles(self) -> Mapping[str, bytes]:
        own = self._own()
        found = dict(self._federation.bundles)
        roots = own.bundles.get(self._authority.trust_domain, b"") if own is not None else self._authority.bundle
        return {**found, self._authority.trust_domain: roots} if roots else found

    def crls(self) -> Mapping[str, bytes]:
        own = self._own()
        return {} if own is None else dict(own.crls)

    def jwt_bundles(self) -> Mapping[str, bytes]:
        found = {self._authority.trust_domain: self._authority.token_keys or NO_KEYS}
        for name in self._federation.bundles:
            known = self._federation.bundle_of(name)
            if known is not None:
                found[name] = known.jwt
        return found

    def may_hear_of(self, trust_domain: str, kid: str) -> bool:
        if trust_domain != self._authority.trust_domain:
            return False
        first = self._sought.get(kid)
        if first is not None and self._authority.looked >= first:
            return False
        now = self._authority.seek()
        if first is None:
            self._sought[kid] = now
            while len(self._sought) > MOST_SOUGHT:
                self._sought.popitem(last=False)
        return True

    async def jwt(self, entry: Entry, audiences: Sequence[str]) -> tuple[str, str]:
        held = self._held.get(self._by_service.get(entry.service, ""))
        identity = None if held is None else self._current(held)
        if held is None or identity is None:
            raise IdentityError(f"{entry.service} has no identity now.", hint="The agent's log says why.", reason="jwt.identity")
        named = tuple(dict.fromkeys(audiences))
        key, now = (identity.spiffe_id, named), self._wall_clock()
        kept = self._tokens.get(key)
        if kept is not None and kept.serial == identity.serial and now < kept.stale:
            return kept.handed.text, ""
        # Who asks for the same meanwhile waits for the same answer, and who goes away leaves it to the others.
        work = self._under_way.get((*key, identity.serial))
        if work is None:
            self._count(held)
            work = asyncio.create_task(self._new_token(held, identity, named), name="meshlib-token")
            self._under_way[*key, identity.serial] = work
            work.add_done_callback(functools.partial(self._is_through, (*key, identity.serial)))
        return await asyncio.shield(work), ""

    async def _new_token(self, held: _Held, identity: Identity, named: tuple[str, ...]) -> str:
        asked = asyncio.get_running_loop().run_in_executor(self._pool, self._authority.jwt, identity, held.service, named)
        try:
            handed = await asyncio.wait_for(asked, PATIENCE)
        except IdentityError as error:
            if error.reason != "jwt.audience":
                log.warning("no JWT-SVID for %s: %s", held.service, error)
            raise
        except (MeshError, OSError, TimeoutError) as error:
            text = "it took too long" if isinstance(error, TimeoutError) else str(error)
            log.warning("no JWT-SVID for %s: %s", held.service, text)
            raise IdentityError(f"there is no token for {held.service} now: {text}.", reason="jwt.failed") from error
        now = self._wall_clock()
        if identity.spiffe_id in self._held:
            self._tokens[identity.spiffe_id, named] = _Token(handed, identity.serial, now + max(0.0, handed.expires - now) / 2)
        while len(self._tokens) > MOST_TOKENS:
            self._tokens.popitem(last=False)
        return handed.text

    def _is_through(self, key: tuple[object, ...], work: asyncio.Task[str]) -> None:
        self._under_way.pop(key, None)
        if not work.cancelled():
            work.exception()  # those who wait have it; where nobody waits any more, nobody has to

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._callbacks.append(callback)

        def leave() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return leave

    # ------------------------------------------------------------------------------------------------ how it is

    @property
    def alarms(self) -> list[tuple[str, str]]:
        """What isn't well: whom it is about ("" for all), and what it is."""
        found = [("", self._authority.trouble)] if self._authority.trouble else []
        for held in self._all():
            found += [(held.service, alarm.message) for alarm in held.store.alarms if alarm.kind != "federation"]
            error = held.store.last_error
            if error is not None:
                found.append((held.service, str(error)))
            elif held.store.current is None:
                found.append((held.service, "there is no identity yet"))
        found += [("", f"the bundle of {name}: {fault}") for name, fault in self._federation.faults().items()]
        return list(dict.fromkeys(found))

    def rows(self) -> list[dict[str, Any]]:
        """One for each identity, without anything secret."""
        now = self._wall_clock()
        return [_row(held, self._current(held), now) for held in sorted(self._held.values(), key=lambda held: held.spiffe_id)]

    # ------------------------------------------------------------------------------------------------ inside

    def _current(self, held: _Held) -> Identity | None:
        current = held.store.current
        return current if current is not None and self._wall_clock() < current.not_after else None

    def _own(self) -> Identity | None:
        """Of what is in force, what was confirmed last: its trust is the newest. It may also be shown to the CA."""
        found = [current for held in self._held.values() if (current := self._current(held)) is not None]
        return max(found, key=lambda identity: identity.generation, default=None)

    def _count(self, held: _Held) -> None:
        minute = int(time.monotonic() // 60)
        made = held.minute[1] if held.minute[0] == minute else 0
        if made >= TOKENS_A_MINUTE:
            raise IdentityError(
                f"{held.service} has asked for {made} different tokens within a minute.",
                hint="Ask for few audiences, and show a token until it ends.",
                reason="jwt.many",
            )
        held.minute = minute, made + 1

    def _tell(self) -> None:
        """Call those back who watch, if anything has changed since."""
        for held in self._held.values():
            current = self._current(held)
            if current is None and held.told is not None:
                log.error("%s has no identity any more", held.service)
            elif current is not None and held.told is None:
                log.info("%s: %s until %s", held.service, held.spiffe_id, _moment(current.not_after))
            held.told = current
        state = (tuple(held.told for held in self._held.values()), dict(self.jwt_bundles()), dict(self.bundles()))
        if state == self._told:
            return
        self._told = state
        for callback in tuple(self._callbacks):
            try:
                callback()
            except Exception:
                log.exception("a callback on the change of identities failed")

    def _all(self) -> list[_Held]:
        """Those that are in force, and those that are to be."""
        return [each for held in self._held.values() for each in _chain(held)]

    def _exchange(self) -> None:
        """Put those into force that have got what they wait for."""
        for spiffe_id, old in tuple(self._held.items()):
            new = old.successor
            if new is not None and self._current(new) is not None:
                new.told, new.minute = old.told, old.minute
                self._held[spiffe_id] = new
                old.store.close()

    def _federate(self) -> None:
        self._federation.jobs()
        if self._has_partners:
            self._keeper.start()

    def _own_roots(self) -> bytes:
        own = self._own()
        return self._authority.bundle if own is None else own.bundles.get(self._authority.trust_domain, b"")


def _chain(held: _Held | None) -> tuple[_Held, ...]:
    if held is None:
        return ()
    return (held,) if held.successor is None else (held, held.successor)


def _authority_of(config: Config, life: float, wall_clock: Callable[[], float]) -> Authority:
    agent = config.agent
    assert agent is not None
    if agent.ca is not None:
        return Embedded(agent.ca, config.trust_domain, config.secure.namespace, life, wall_clock=wall_clock)
    return Enrolled(agent.enrol, agent.state / "identities", config.trust_domain, wall_clock=wall_clock)


def _row(held: _Held, current: Identity | None, now: float) -> dict[str, Any]:
    store = held.store
    row: dict[str, Any] = {
        "service": held.service,
        "spiffe_id": held.spiffe_id,
        "serial": None,
        "not_after": None,
        "left": None,
        "spent": None,
        "rotations": store.rotations,
        "failures": store.failures,
        "is_overdue": store.is_overdue,
        "alarms": [alarm.message for alarm in store.alarms],
        "error": "" if store.last_error is None else str(store.last_error),
    }
    if current is not None:
        spent = round(min(1.0, max(0.0, current.spent(now))), 3)
        row |= {"serial": current.serial, "not_after": current.not_after, "left": current.not_after - now, "spent": spent}
    return row


def _moment(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))


def services_of(entries: Iterable[Entry]) -> tuple[str, ...]:
    """Whom the entries name, each once, in their order."""
    return tuple(dict.fromkeys(entry.service for entry in entries))
