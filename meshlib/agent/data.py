"""What does the native proxy have to know, and whose connections does it get?

The proxy (`core.Proxy`) moves bytes and decides nothing about identities. Here it is told of each identity when it begins, when it is
renewed and when it is withdrawn; of the addresses at which it ends TLS for services of this node (`inbound.agent`); and it is given
each connection to the data socket that was attested, with the identities of its caller's entries. A caller without one is closed.

    identity in force           the proxy speaks as it, and listens for its service
    withdrawn, ended, no entry  the proxy forgets it: its connections close, and its address is free
    one of its entries is gone  the proxy ends its callers' connections: who comes again is looked for in the entries anew

Nothing listens for a service before there is an identity to show. An address that can't be had is tried again at every look, and told.
So is an application that can't be reached (`reach.py`), with a line in the log at most once in `QUIET` seconds.

For each identity there is a secret by which its service knows that a call was handed over by this agent: HMAC-SHA256 of the SPIFFE ID
with a key of this node, which is made once and kept in `handover.key`. Where the state folder can't be written, the key lives as long
as the process, which is told too.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..config.values import split_address
from ..errors import KeyFileError, ListenError, MeshError
from ..secure import files
from ..secure.identity import Identity
from .reach import trouble_with
from .strangers import Strangers

if TYPE_CHECKING:
    from ..config import Config
    from .attest import Caller
    from .entries import Entries
    from .issue import Issuer

log = logging.getLogger("meshlib.agent")

KEY_NAME: Final = "handover.key"
KEY_BYTES: Final = 32
BACKLOG: Final = 1024
# Seconds between two lines about the way to one application: a server that comes and goes must not fill the log.
QUIET: Final = 10.0

# How an attempt at an application fails of which nothing was written, in the proxy's words.
_UNREACHED: Final = ("connect", "connect_timeout")

# What the proxy raises: what it refuses, and what the system does.
_Refusal = (MeshError, OSError, ValueError, RuntimeError)


class Proxy(Protocol):
    """The native data path, as far as it is told something here (`core.Proxy`)."""

    def identify(
        self, spiffe_id: str, chain: bytes, key: bytes, bundles: Mapping[str, bytes], crls: Mapping[str, bytes], secret: str
    ) -> None: ...
    def forget(self, spiffe_id: str) -> None: ...
    def readmit(self, spiffe_id: str) -> None: ...
    def adopt(self, fd: int, *spiffe_ids: str) -> None: ...
    def listen(self, name: str, fd: int, spiffe_id: str, to: str, mode: str, owners: Sequence[int]) -> None: ...
    def unlisten(self, name: str) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def connections(self) -> list[dict[str, Any]]: ...
    def drain(self) -> None: ...
    def stop(self, seconds: float) -> bool: ...


class Handover:
    """The secrets by which services know what this agent handed over to them. `trouble`: why they don't outlive the process."""

    def __init__(self, state: Path) -> None:
        self.trouble = ""
        try:
            self._key = _kept_key(state)
        except OSError as error:
            self._key = _doubtful(state, error)
            self.trouble = (
                f"the secret of handed-over calls can't be kept in {state}, and is another one after a restart: {error}"
            )

    def secret_of(self, spiffe_id: str) -> str:
        return hmac.digest(self._key, spiffe_id.encode(), "sha256").hex()

    def __repr__(self) -> str:
        return "<Handover>"


def _kept_key(state: Path) -> bytes:
    """The key in the state folder, made now if there is none. OSError where it can't be kept; KeyFileError where it can't be trusted."""
    try:
        files.make_private(state)
    except KeyFileError as error:
        if state.exists():
            raise  # it is there, and not ours alone
        raise OSError(str(error)) from error
    with files.locked(state):
        if not (state / KEY_NAME).exists():
            files.write(state, [(KEY_NAME, secrets.token_hex(KEY_BYTES).encode() + b"\n", 0o600)])
        with files.folder(state) as fd:
            text = files.read_secret(fd, state, KEY_NAME)
    try:
        key = bytes.fromhex(bytes(text).decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyFileError(f"{state / KEY_NAME} holds no key.", hint="Take the file away: a new one is made.")
    return key


def _doubtful(state: Path, error: OSError) -> bytes:
    log.error("no secret can be kept in %s (%s): services must fetch the new one after a restart of this agent", state, error)
    return secrets.token_bytes(KEY_BYTES)


@dataclass(slots=True)
class _Door:
    """An address at which the proxy ends TLS for a service. `terms` are what the proxy was told, None while it listens for nobody.

    `owners` are the users whose process may listen at `to`: those of the service's entries, and root, whose servers drop their rights
    after they have bound. `trouble` is why it doesn't listen, `barred` why the application can't be reached, `missed` the proxy's count of
    the times that it couldn't; `said` what the log was told of that last, and when.
    """

    name: str
    address: str
    spiffe_id: str
    to: str
    mode: str
    owners: tuple[int, ...]
    sock: socket.socket | None = None
    terms: tuple[str, str, str, tuple[int, ...]] | None = None
    trouble: str = ""
    barred: str = ""
    missed: int = 0
    said: tuple[str, float] = ("", float("-inf"))


class DataPlane:
    """State of the agent: what the proxy was told. All of it runs on the agent's loop."""

    def __init__(
        self,
        proxy: Proxy,
        issuer: Issuer,
        entries: Entries,
        handover: Handover,
        strangers: Strangers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.proxy = proxy
        self._issuer = issuer
        self._entries = entries
        self._handover = handover
        self._strangers = strangers or Strangers()
        self._clock = clock
        self._told: dict[str, Identity] = {}
        self._doors: dict[str, _Door] = {}
        self._is_draining = False
        self._refused: dict[str, str] = {}
        self.adopted = 0
        self.turned_away = 0

    # ------------------------------------------------------------------------------------------------ what is told

    def follow(self, config: Config) -> None:
        """Take over the addresses of a configuration."""
        wanted = {door.name: door for door in doors_of(config)}
        for name, old in list(self._doors.items()):
            fresh = wanted.get(name)
            if fresh is None or fresh.address != old.address:
                self._shut(old)
                del self._doors[name]
            else:
                old.spiffe_id, old.to, old.mode, old.owners = fresh.spiffe_id, fresh.to, fresh.mode, fresh.owners
        for name, fresh in wanted.items():
            self._doors.setdefault(name, fresh)
        self.look()

    def look(self) -> None:
        """Tell the proxy what has changed. Called whenever an identity may have, and every second or so."""
        if self._is_draining:
            return
        identities = self._issuer.identities
        for spiffe_id in self._told.keys() - identities.keys():
            for door in self._doors.values():
                if door.spiffe_id == spiffe_id:
                    self._shut(door)
            del self._told[spiffe_id]
            self.proxy.forget(spiffe_id)
            log.warning("the data path has no identity %s any more: its connections are closed", spiffe_id)
        for spiffe_id, identity in identities.items():
            if self._told.get(spiffe_id) is not identity:
                self._identify(spiffe_id, identity)
        for door in self._doors.values():
            if door.spiffe_id in self._told:
                self._open(door)
        self._try_ways()

    def drain(self) -> None:
        """No new connections; whoever has one is told that it is the last answer."""
        self._is_draining = True
        self.proxy.drain()
        for door in self._doors.values():
            self._shut(door)

    # ------------------------------------------------------------------------------------------------ whose connections

    async def on_caller(self, connection: socket.socket, caller: Caller) -> None:
        """An attested connection to the data socket."""
        entries = self._entries.of(caller)
        if not entries:
            self._strangers.note("data", caller)
        ids = dict.fromkeys(map(self._issuer.id_of, entries))
        known = [spiffe_id for spiffe_id in ids if spiffe_id in self._told]
        if not known:
            self.turned_away += 1
            return
        fd = connection.detach()  # the proxy's from here on, whatever happens
        try:
            self.proxy.adopt(fd, *known)
        except _Refusal as error:
            self.turned_away += 1
            log.warning("a connection to the data socket was not taken: %s", error)
            return
        self.adopted += 1

    def readmit(self, spiffe_ids: Iterable[str]) -> None:
        """Entries of these are gone. A connection was attested when it came, and would be somebody for as long as it lasts."""
        for spiffe_id in spiffe_ids:
            if spiffe_id in self._told:
                self.proxy.readmit(spiffe_id)

    # ------------------------------------------------------------------------------------------------ how it is

    @property
    def alarms(self) -> list[tuple[str, str]]:
        found = [("", self._handover.trouble)] if self._handover.trouble else []
        found += [(door.name, what) for door in self._doors.values() for what in (door.trouble, door.barred) if what]
        return found + list(self._refused.items())

    def rows(self) -> list[dict[str, Any]]:
        """The addresses, one row each."""
        return [
            {
                "service": door.name,
                "address": door.address,
                "mode": door.mode,
                "is_open": door.terms is not None,
                "error": door.trouble or door.barred,
            }
            for door in self._doors.values()
        ]

    # ------------------------------------------------------------------------------------------------ inside

    def _identify(self, spiffe_id: str, identity: Identity) -> None:
        try:
            self.proxy.identify(
                spiffe_id, identity.chain, identity.key, identity.bundles, identity.crls, self._handover.secret_of(spiffe_id)
            )
        except _Refusal as error:
            if self._refused.get(spiffe_id) != str(error):
                log.error("the data path can't take the identity %s, and keeps the one before: %s", spiffe_id, error)
            self._refused[spiffe_id] = str(error)
            return
        self._refused.pop(spiffe_id, None)
        self._told[spiffe_id] = identity

    def _open(self, door: _Door) -> None:
        terms = (door.spiffe_id, door.to, door.mode, door.owners)
        if door.terms == terms:
            return
        try:
            if door.sock is None:
                door.sock = bound(door.name, door.address)
            if door.terms is not None:
                self.proxy.unlisten(door.name)
                door.terms = None
            self.proxy.listen(door.name, door.sock.fileno(), *terms)
        except _Refusal as error:
            if str(error) != door.trouble:
                log.error("%s", error)
            door.trouble = str(error)
            return
        door.terms, door.trouble = terms, ""
        log.info("%s: TLS ends here at %s (%s), and goes on to %s", door.name, door.address, door.mode, door.to)

    def _try_ways(self) -> None:
        """Whether the applications behind the open doors can be reached; asked anew where a call has failed to, until it is well."""
        counts = self.proxy.stats().get("inbound", {})
        for door in self._doors.values():
            if door.terms is None:
                door.barred = ""
                continue
            failed = counts.get(door.name, {}).get("failed", {})
            missed = sum(failed.get(why, 0) for why in _UNREACHED)
            # A door that was opened anew counts from 0.
            has_missed, door.missed = missed > 0 and missed != door.missed, missed
            door.barred = trouble_with(door.to, door.owners, is_asked=has_missed or bool(door.barred))
            self._say(door)

    def _say(self, door: _Door) -> None:
        text, when = door.said
        now = self._clock()
        if door.barred == text or now - when < QUIET:
            return
        door.said = door.barred, now
        if door.barred:
            log.error("%s: its application can't be reached: %s", door.name, door.barred)
        else:
            log.info("%s: its application can be reached again", door.name)

    def _shut(self, door: _Door) -> None:
        if door.terms is not None:
            with contextlib.suppress(*_Refusal):
                self.proxy.unlisten(door.name)
        if door.sock is not None:
            door.sock.close()
        door.sock = door.terms = None


def doors_of(config: Config) -> list[_Door]:
    """The services of this node for which the agent ends TLS: they say so, and an entry has their identity."""
    assert config.agent is not None
    ours: dict[str, set[int]] = {}
    for entry in config.agent.entries:
        ours.setdefault(entry.service, {0}).add(entry.uid)
    return [
        _Door(name, service.listen, service.identity, service.inbound.agent, service.mode, tuple(sorted(ours[name])))
        for name, service in config.services.items()
        if service.inbound.agent and service.listen is not None and name in ours
    ]


def bound(name: str, address: str) -> socket.socket:
    """A socket that listens at the address of a service; ListenError if it can't be had."""
    host, port = split_address(address)
    sock = None
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host not in {"::", ""}:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ListenError(
            f"the agent can't listen at {address} for {name}: {error.strerror or error}.",
            hint="Does the service still listen there itself? With inbound.agent it listens at that socket only."
            " Ports below 1024 need CAP_NET_BIND_SERVICE.",
        ) from error
    return sock
