"""Who are we, and how do we stay who we are while the process runs?

An `IdentitySource` loads an `Identity`: certificate chain, key, and the roots to trust. The `IdentityStore` keeps the
newest good one as an immutable generation, with the TLS objects that belong to it: a generation is swapped as a whole,
so no handshake ever sees the certificate of one and the key of another, and no session outlives the identity that it
was won with. Whatever is missing, unreadable, mismatched, expired or of another trust domain is refused; the last good
generation stays, and the failure is counted and logged. With two exceptions: a bundle that lost a root counts at once,
even if it leaves our own certificate without support, and an identity that its source takes back (`IdentityWithdrawn`) is not
used for another handshake. Trust that was withdrawn is never kept for comfort.

Bundles of other trust domains may come from elsewhere (`federation`): they stand beside our own in each generation, one for
each trust domain, never in one pool.

What isn't well, while calls go on, is an alarm (`alarms.py`).

The store starts no thread and takes no lock for reading. The keeper calls `look`; files are polled, not watched, since
watches don't see what network file systems and orchestrators do. A source that renews by itself is asked when it says, at
about half of the certificate's life, and on a thread of its own while it asks others. Peers are judged by the native core,
not here.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from ..errors import IdentityError, IdentityWithdrawn, MeshError
from . import alarms
from .alarms import Alarm

if TYPE_CHECKING:
    from .._native import core

log = logging.getLogger("meshlib.secure")

POLL: Final = 1.0
# A source that renews and fails is asked again after a second, then after twice as long each time, up to this.
LONGEST_PAUSE: Final = 60.0
# Renewal begins at half of the life, give or take a tenth of that: certificates issued together are not renewed together.
RENEWAL: Final = 0.5
JITTER: Final = 0.1


@dataclass(frozen=True, slots=True)
class Identity:
    """One proof of who we are, and whom we trust. Times are Unix seconds; `generation` is counted by the store.

    `bundles` (roots) and `crls` (revocations) are PEM by trust domain. `notes` say what isn't well about an identity that is good
    all the same: a federated bundle that can't be read, say. The key is plain bytes, since TLS libraries take nothing else; it's in
    no repr, and what holds it can't be pickled.
    """

    spiffe_id: str
    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    bundles: dict[str, bytes] = field(repr=False, hash=False)
    serial: str
    not_before: float
    not_after: float
    generation: int = 0
    crls: dict[str, bytes] = field(default_factory=dict, repr=False, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def trust_domain(self) -> str:
        return self.spiffe_id.removeprefix("spiffe://").split("/", 1)[0]

    def spent(self, now: float) -> float:
        """The share of its life that is gone: 0.0 at the start, 1.0 at the end."""
        return (now - self.not_before) / max(self.not_after - self.not_before, 1.0)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an identity can't be pickled or copied: it holds a private key; load it anew from its source")


class IdentitySource(Protocol):
    """Where an identity comes from. To be implemented for a new kind of source; `meshlib.testing` can check what you made.

    Three methods more are called where they are there:

    - `refresh_at(identity, now) -> float`: this source renews. It is asked for the next identity at that time (Unix seconds, like
      `now`), and not each second; its `load` may take as long as asking over a network does. `renewal_of` gives the usual answer.
    - `after_fork()`: in a forked child, before anything else: threads and connections stayed with the parent.
    - `close()`: let go of threads and connections. Whoever loads after that, begins anew.
    """

    def load(self) -> Identity:
        """The identity as it is now; unchanged content is answered by the same object.

        Raises KeyFileError, TrustDomainError or IdentityError, and never answers anything half good; what was good before goes on
        being used. IdentityWithdrawn says that it must not be.
        """
        ...


class Federation(Protocol):
    """Bundles of other trust domains (`federation.py`)."""

    @property
    def bundles(self) -> Mapping[str, bytes]:
        """The roots as PEM, by trust domain; the same object as long as nothing changes."""
        ...

    def faults(self) -> Mapping[str, str]:
        """What isn't well, by trust domain."""
        ...


def renewal_of(identity: Identity, chance: Callable[[], float] = random.random) -> float:
    """When a certificate is due to be renewed: at half of its life, give or take a tenth of that. Unix seconds."""
    share = RENEWAL * (1.0 + JITTER * (2.0 * chance() - 1.0))
    return identity.not_before + share * (identity.not_after - identity.not_before)


# Counted for the process: a store that a reload exchanged must not look like its predecessor to the connections of that one.
_generations = itertools.count(1)


@dataclass(slots=True)
class _Generation:
    identity: Identity
    digest: bytes
    client: core.TlsClient
    servers: dict[bool, core.TlsServer]


class IdentityStore:
    """State of the process: its identity now, as one generation, and the TLS objects of that generation.

    Start with `require`, which raises what the source raises: nothing may listen or call before there is an identity.
    In mode `observe` it may be left out, and a source is not needed.
    """

    def __init__(
        self,
        source: IdentitySource | None,
        *,
        mode: str,
        federation: Federation | None = None,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        tls_client: Callable[..., core.TlsClient] | None = None,
        tls_server: Callable[..., core.TlsServer] | None = None,
    ) -> None:
        if source is None and mode != "observe":
            raise IdentityError(
                f"mode {mode} needs an identity, and none is configured.",
                hint="Set secure.identity in mesh.yaml, or use mode observe.",
            )
        self.mode = mode
        self.rotations = 0
        self.failures = 0
        self.last_error: MeshError | None = None
        self.federation = federation
        self._source = source
        self._wall_clock = wall_clock
        self._clock = clock
        self._chance = chance
        self._tls_client = tls_client
        self._tls_server = tls_server
        self._callbacks: list[Callable[[Identity], None]] = []
        self._alarms = alarms.Alarms()
        self._generation: _Generation | None = None
        # After an identity was withdrawn: what it counted, and what it served.
        self._before: _Generation | None = None
        # What the source answered last, without what federation adds.
        self._loaded: Identity | None = None
        self._refreshing = threading.Lock()
        self._next_refresh = 0.0
        # Of a source that renews: when it is asked again, in Unix seconds and by a clock that nobody sets back, whichever comes first
        # (that one may stand still while the machine sleeps); and how often it failed since it last didn't.
        self._due = self._due_steadily = 0.0
        self._tries = 0

    # ------------------------------------------------------------------------------------------------ what is

    @property
    def current(self) -> Identity | None:
        generation = self._generation
        return generation.identity if generation else None

    @property
    def client_tls(self) -> core.TlsClient | None:
        """The client side of the present generation; None without an identity."""
        generation = self._generation
        return generation.client if generation else None

    def server_tls(self, require_client: bool) -> core.TlsServer:
        """The server side of the present generation, which refuses or admits clients without a certificate."""
        generation = self._generation
        if generation is None:
            raise IdentityError(
                "there is no identity to serve TLS with.",
                hint=str(self.last_error or "Set secure.identity in mesh.yaml, or serve plain in mode observe."),
            )
        server = generation.servers.get(require_client)
        # Two threads may build one each; the first that is put in wins, so that all connections share its tickets.
        return server or generation.servers.setdefault(require_client, self._new_server(generation.identity, require_client))

    @property
    def generation(self) -> object:
        """What is in force now: another object after every change of certificate, roots or revocations; None without an identity."""
        return self._generation

    @property
    def next_refresh(self) -> float:
        """When `refresh` is due again, by the clock that its `now` is read from."""
        return self._next_refresh

    @property
    def spent(self) -> float:
        """The share of the identity's life that is gone; 0.0 without one. Past 0.5 it should have been renewed."""
        current = self.current
        return current.spent(self._wall_clock()) if current else 0.0

    @property
    def is_overdue(self) -> bool:
        """True when more than three quarters of the certificate's life are gone, and nothing has renewed it."""
        return self.spent > alarms.LATE

    @property
    def is_expired(self) -> bool:
        current = self.current
        return current is not None and self._wall_clock() >= current.not_after

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What isn't well now."""
        return self._alarms.standing

    @property
    def is_renewing(self) -> bool:
        """True if the source renews by itself, so that to ask it may take its time."""
        return hasattr(self._source, "refresh_at")

    def tls_stats(self) -> dict[str, dict[str, int]]:
        """What TLS has counted over all generations, by side: `client` and `server`. {} without an identity."""
        generation = self._generation or self._before
        if generation is None:
            return {}
        servers: dict[str, int] = {}
        for server in tuple(generation.servers.values()):
            for name, count in server.stats().items():
                servers[name] = servers.get(name, 0) + count
        return {"client": generation.client.stats(), "server": servers}

    def on_change(self, callback: Callable[[Identity], None]) -> None:
        """Call back with every new generation after it is in force, in the thread that refreshed."""
        self._callbacks.append(callback)

    def on_alarm(self, callback: Callable[[Alarm], None]) -> None:
        """Call back with every alarm when it begins, in the thread that refreshed."""
        self._alarms.on_begin(callback)

    # ------------------------------------------------------------------------------------------------ what becomes

    def require(self, now: float) -> Identity:
        """The identity, loaded now if it isn't yet. Raises what the source raises, if there is none."""
        if self.current is None:
            self.refresh(now)
        current = self.current
        if current is None:
            # Whoever gives up now leaves nothing running; who asks again, begins anew.
            self._let_go()
            raise self.last_error or IdentityError("no identity is configured.", hint="Set secure.identity in mesh.yaml.")
        return current

    def refresh(self, now: float) -> bool:
        """Ask the source; True if a new generation was taken. After a failure, counted and logged, the last one stays.

        `now` only dates the next refresh; validity is judged by the wall clock.
        """
        if self._source is None:
            return False
        with self._refreshing:
            self._next_refresh = now + POLL
            generation = self._generation
            try:
                is_asked = self._refresh(self._source)
            except IdentityWithdrawn as error:
                self._withdraw(error)
            except Exception as error:
                self._fail(error)
            else:
                if is_asked:
                    if self.last_error is not None:
                        log.info("the identity can be loaded again")
                    self.last_error = None
                    self._tries = 0
            is_new = self._generation is not generation and self._generation is not None
            begun = self._alarms.judge(self._found())
        current = self.current
        if is_new and current is not None:
            for callback in tuple(self._callbacks):
                try:
                    callback(current)
                except Exception:
                    log.exception("a callback on the change of identity failed")
        self._alarms.tell(begun)
        return is_new

    async def look(self, now: float) -> None:
        """`refresh`, for the keeper: a source that takes its time is asked on a thread that lives no longer than that."""
        if self.is_renewing and self.is_due:
            from ..keeper import apart

            await apart(lambda: self.refresh(now), "meshlib-identity")
        else:
            self.refresh(now)

    def rest(self) -> None:
        """What the source has open is closed, until it is asked again: a mesh that was closed may be started anew, in a child too."""
        self._let_go(self._source)

    def close(self) -> None:
        """The source is asked no more. What is in force stays so."""
        source, self._source = self._source, None
        self._let_go(source)

    def _let_go(self, source: IdentitySource | None = None) -> None:
        close = getattr(source or self._source, "close", None)
        if close is not None:
            close()

    def after_fork(self) -> None:
        """In a forked child: the same identity, a free lock, and TLS objects of its own: sessions are never shared."""
        self._refreshing = threading.Lock()
        of_source = getattr(self._source, "after_fork", None)
        if of_source is not None:
            of_source()
        # Nor are the counters: those of the parent are told by the parent.
        for name in ("_generation", "_before"):
            kept: _Generation | None = getattr(self, name)
            if kept is not None:
                setattr(self, name, self._built(kept.identity, kept.digest, dict.fromkeys(kept.servers)))

    def _refresh(self, source: IdentitySource) -> bool:
        """Take what the source says; False if it isn't its turn."""
        wall = self._wall_clock()
        if self.is_renewing and not self.is_due:
            # It isn't its turn. What federation has learnt counts all the same.
            if self._loaded is not None:
                self._take(self._loaded)
            return False
        try:
            loaded = source.load()
        except IdentityWithdrawn:
            raise
        except Exception:
            if self._loaded is not None:
                self._take(self._loaded)
            raise
        self._take(loaded)
        self._loaded = loaded
        if self.is_renewing:
            self._postpone(float(source.refresh_at(loaded, wall)) - wall)  # type: ignore[attr-defined]
        return True

    @property
    def is_due(self) -> bool:
        """Is the source to be asked again, as it said itself? By either clock, since one of them may be set."""
        return self._wall_clock() >= self._due or self._clock() >= self._due_steadily

    def wake(self) -> None:
        """The source is to be asked at the next look, whenever it wanted to be."""
        self._postpone(0.0)

    def _postpone(self, pause: float) -> None:
        self._due, self._due_steadily = self._wall_clock() + pause, self._clock() + pause

    def _take(self, identity: Identity) -> None:
        """Put it in force, with the bundles of other trust domains, if it is another than the one that is."""
        old = self._generation
        if self.federation is not None:
            others = {name: pem for name, pem in self.federation.bundles.items() if name != identity.trust_domain}
            identity = replace(identity, bundles={**identity.bundles, **others})
        digest = digest_of(identity.chain, identity.key, *_flat(identity.bundles), *_flat(identity.crls))
        if old is not None and digest == old.digest:
            return
        if identity.crls and _is_revoked(identity):
            raise IdentityWithdrawn(
                f"our certificate {identity.serial} has been revoked.", hint="If it was not meant for us, issue another one."
            )
        if old is None or identity.chain != old.identity.chain:
            self._refuse_outside_its_life(identity)
        identity = replace(identity, generation=next(_generations))
        if not _is_supported(identity):
            what = "our certificate is signed by no root of our bundle, so peers will refuse us"
            if old is None or identity.bundles.get(identity.trust_domain) == old.identity.bundles.get(identity.trust_domain):
                raise IdentityError(
                    f"{what}.",
                    hint="Certificate and bundle come from different CAs: issue both anew (`meshlib ca issue`).",
                )
            log.error("%s: the changed bundle counts; issue the certificate anew (serial %s)", what, identity.serial)
        before = old or self._before
        served = dict(before.servers) if before else {}
        self._generation = self._built(identity, digest, served, before.client if before else None)
        self._before = None
        if before is not None:
            self.rotations += 1
        log.info("identity %s, generation %d, serial %s", identity.spiffe_id, identity.generation, identity.serial)

    def _refuse_outside_its_life(self, identity: Identity) -> None:
        """Whatever the source thinks of it: a certificate that no peer would take never replaces one that they take."""
        now = self._wall_clock()
        if not identity.not_before <= now < identity.not_after:
            what = "has expired" if now >= identity.not_after else "is not valid yet"
            raise IdentityError(
                f"the certificate {identity.serial} {what}.", hint="Is this machine's clock right? Else issue it anew."
            )

    def _withdraw(self, error: IdentityWithdrawn) -> None:
        """No handshake is made any more with what its source has taken back. Counters go on when there is a new one."""
        self._count()
        if str(error) != str(self.last_error):
            log.error("%s (it is not used any more)", error)
        if self._generation is not None:
            self._before, self._generation = self._generation, None
        self._loaded = None
        self.last_error = error.with_traceback(None)

    def _built(
        self,
        identity: Identity,
        digest: bytes,
        served: Mapping[bool, core.TlsServer | None],
        before: core.TlsClient | None = None,
    ) -> _Generation:
        """A generation that serves what was served, and goes on with the counters of what was before."""
        make = self._tls_client
        if make is None:
            from .._native import core

            make = core.TlsClient
        client = make(identity.chain, identity.key, identity.bundles, identity.generation, before=before, **_revoked(identity))
        servers = {require: self._new_server(identity, require, old) for require, old in served.items()}
        return _Generation(identity, digest, client, servers)

    def _new_server(self, identity: Identity, require_client: bool, before: core.TlsServer | None = None) -> core.TlsServer:
        make = self._tls_server
        if make is None:
            from .._native import core

            make = core.TlsServer
        revoked = _revoked(identity)
        return make(identity.chain, identity.key, identity.bundles, identity.generation, require_client, before=before, **revoked)

    def _fail(self, cause: Exception) -> None:
        self._count()
        error = cause
        if not isinstance(error, MeshError):
            error = IdentityError(f"the identity can't be loaded: {cause}", hint="The log has more.")
            error.__cause__ = cause
        # Polled each second, a fault would fill the log: it's told once, and again when it becomes another.
        if str(error) != str(self.last_error):
            kept = self.current
            stays = f"serial {kept.serial} stays in use" if kept else "there is no identity yet"
            log.error("%s (%s)", error, stays, exc_info=None if error is cause else cause)
        # Its frames would hold the key for as long as the error is kept.
        self.last_error = error.with_traceback(None)

    def _count(self) -> None:
        self.failures += 1
        if self.is_renewing:
            pause = min(LONGEST_PAUSE, 2.0 ** min(self._tries, 30))
            self._tries += 1
            self._postpone(pause * (1.0 + JITTER * (2.0 * self._chance() - 1.0)))

    def _found(self) -> Iterator[Alarm]:
        """What isn't well now."""
        generation = self._generation
        if generation is None:
            if self._before is not None:
                yield alarms.of_withdrawn(self._before.identity.serial)
            return
        revocations_end = getattr(generation.client, "crls_until", float("inf"))
        yield from alarms.of_identity(generation.identity, self._wall_clock(), revocations_end)
        yield from alarms.of_notes((self._loaded or generation.identity).notes)
        if self.federation is not None:
            yield from alarms.of_federation(self.federation.faults())


def digest_of(*parts: bytes) -> bytes:
    """One hash over several contents, which can't be confused with another division of the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _flat(parts: Mapping[str, bytes]) -> list[bytes]:
    # Their number goes first: bundles can't be taken for revocations.
    return [len(parts).to_bytes(8, "big"), *(part for name in sorted(parts) for part in (name.encode(), parts[name]))]


def _revoked(identity: Identity) -> dict[str, Any]:
    return {"crls": identity.crls} if identity.crls else {}


def _is_revoked(identity: Identity) -> bool:
    """Whether the lists beside it say so: of its issuer, which need not be the only one with such a serial number."""
    from cryptography import x509

    from . import certificates

    leaf = x509.load_pem_x509_certificate(identity.chain)
    lists = certificates.crls_of(identity.crls.get(identity.trust_domain, b""))
    return any(
        each.issuer == leaf.issuer and each.get_revoked_certificate_by_serial_number(leaf.serial_number) is not None
        for each in lists
    )


def _is_supported(identity: Identity) -> bool:
    from cryptography import x509

    from . import certificates

    try:
        roots = x509.load_pem_x509_certificates(identity.bundles.get(identity.trust_domain, b""))
        return certificates.is_anchored(x509.load_pem_x509_certificates(identity.chain), roots)
    except ValueError:
        return False
