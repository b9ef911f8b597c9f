"""Who are we, and how do we stay who we are while the process runs?

An `IdentitySource` loads an `Identity`: certificate chain, key, and the roots to trust. The `IdentityStore` keeps the
newest good one as an immutable generation, with the TLS objects that belong to it: a generation is swapped as a whole,
so no handshake ever sees the certificate of one and the key of another, and no session outlives the identity that it
was won with. Whatever is missing, unreadable, mismatched, expired or of another trust domain is refused; the last good
generation stays, and the failure is counted and logged. With one exception: a bundle that lost a root counts at once,
even if it leaves our own certificate without support. Trust that was withdrawn is never kept for comfort.

The store starts no thread and takes no lock for reading. The keeper calls `refresh`; files are polled, not watched,
since watches don't see what network file systems and orchestrators do. Peers are judged by the native core, not here.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from ..errors import IdentityError, MeshError

if TYPE_CHECKING:
    from .._native import core

log = logging.getLogger("meshlib.secure")

POLL: Final = 1.0
ALARM: Final = 0.75


@dataclass(frozen=True, slots=True)
class Identity:
    """One proof of who we are, and whom we trust. Times are Unix seconds; `generation` is counted by the store.

    The key is plain bytes, since TLS libraries take nothing else; it's in no repr, and what holds it can't be pickled.
    """

    spiffe_id: str
    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    bundles: dict[str, bytes] = field(repr=False, hash=False)
    serial: str
    not_before: float
    not_after: float
    generation: int = 0

    @property
    def trust_domain(self) -> str:
        return self.spiffe_id.removeprefix("spiffe://").split("/", 1)[0]

    def spent(self, now: float) -> float:
        """The share of its life that is gone: 0.0 at the start, 1.0 at the end."""
        return (now - self.not_before) / max(self.not_after - self.not_before, 1.0)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an identity can't be pickled or copied: it holds a private key; load it anew from its source")


class IdentitySource(Protocol):
    """Where an identity comes from. To be implemented for a new kind of source."""

    def load(self) -> Identity:
        """The identity as it is now; unchanged content may be answered by the same object.

        Raises KeyFileError, TrustDomainError or IdentityError, and never answers anything half good.
        """
        ...


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
        wall_clock: Callable[[], float] = time.time,
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
        self._source = source
        self._wall_clock = wall_clock
        self._tls_client = tls_client
        self._tls_server = tls_server
        self._callbacks: list[Callable[[Identity], None]] = []
        self._generation: _Generation | None = None
        self._refreshing = threading.Lock()
        self._next_refresh = 0.0
        self._has_alarmed = False

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
        return self.spent > ALARM

    @property
    def is_expired(self) -> bool:
        current = self.current
        return current is not None and self._wall_clock() >= current.not_after

    def tls_stats(self) -> dict[str, dict[str, int]]:
        """What TLS has counted over all generations, by side: `client` and `server`. {} without an identity."""
        generation = self._generation
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

    # ------------------------------------------------------------------------------------------------ what becomes

    def require(self, now: float) -> Identity:
        """The identity, loaded now if it isn't yet. Raises what the source raises, if there is none."""
        if self.current is None:
            self.refresh(now)
        current = self.current
        if current is None:
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
            try:
                is_new = self._take(self._source.load())
            except Exception as error:
                self._fail(error)
                is_new = False
            else:
                if self.last_error is not None:
                    log.info("the identity can be loaded again")
                self.last_error = None
            self._alarm()
        current = self.current
        if is_new and current is not None:
            for callback in tuple(self._callbacks):
                try:
                    callback(current)
                except Exception:
                    log.exception("a callback on the change of identity failed")
        return is_new

    def after_fork(self) -> None:
        """In a forked child: the same identity, a free lock, and TLS objects of its own: sessions are never shared."""
        self._refreshing = threading.Lock()
        if self._generation is not None:
            kept = self._generation
            # Nor are the counters: those of the parent are told by the parent.
            self._generation = self._built(kept.identity, kept.digest, dict.fromkeys(kept.servers))

    def _take(self, identity: Identity) -> bool:
        old = self._generation
        bundles = (part for name in sorted(identity.bundles) for part in (name.encode(), identity.bundles[name]))
        digest = digest_of(identity.chain, identity.key, *bundles)
        if old is not None and digest == old.digest:
            return False
        identity = replace(identity, generation=next(_generations))
        if not _is_supported(identity):
            what = "our certificate is signed by no root of our bundle, so peers will refuse us"
            if old is None or identity.bundles == old.identity.bundles:
                raise IdentityError(
                    f"{what}.",
                    hint="Certificate and bundle come from different CAs: issue both anew (`meshlib ca issue`).",
                )
            log.error("%s: the changed bundle counts; issue the certificate anew (serial %s)", what, identity.serial)
        served = dict(old.servers) if old else {}
        self._generation = self._built(identity, digest, served, old.client if old else None)
        if old is not None:
            self.rotations += 1
        log.info("identity %s, generation %d, serial %s", identity.spiffe_id, identity.generation, identity.serial)
        return True

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
        client = make(identity.chain, identity.key, identity.bundles, identity.generation, before=before)
        servers = {require: self._new_server(identity, require, old) for require, old in served.items()}
        return _Generation(identity, digest, client, servers)

    def _new_server(self, identity: Identity, require_client: bool, before: core.TlsServer | None = None) -> core.TlsServer:
        make = self._tls_server
        if make is None:
            from .._native import core

            make = core.TlsServer
        return make(identity.chain, identity.key, identity.bundles, identity.generation, require_client, before=before)

    def _fail(self, cause: Exception) -> None:
        self.failures += 1
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

    def _alarm(self) -> None:
        current = self.current
        if current is None or not self.is_overdue:
            self._has_alarmed = False
        elif not self._has_alarmed:
            self._has_alarmed = True
            left = current.not_after - self._wall_clock()
            log.warning(
                "%.0f %% of our certificate's life are gone and nothing renewed it: serial %s ends in %.0f s",
                100 * self.spent,
                current.serial,
                left,
            )


def digest_of(*parts: bytes) -> bytes:
    """One hash over several contents, which can't be confused with another division of the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _is_supported(identity: Identity) -> bool:
    from cryptography import x509

    from . import certificates

    try:
        roots = x509.load_pem_x509_certificates(identity.bundles.get(identity.trust_domain, b""))
        return certificates.is_anchored(x509.load_pem_x509_certificates(identity.chain), roots)
    except ValueError:
        return False
