"""What does the SPIFFE Workload API answer to an attested process?

Five calls, as the standard has them: X.509 identities, roots, tokens, the keys of tokens, and whether somebody's token is good. A
connection belongs to the process that opened it; for every call, and again after every change, its entries are looked for anew:

    no header workload.spiffe.io: true     InvalidArgument, before anything else: a browser can't send it
    no entry, or nobody attested           PermissionDenied, always in the same words
    an entry, and no identity yet          Unavailable: the caller asks again, and keeps what it has
    a token by a key of ours, unheard of   Unavailable, until the CA was asked for its keys: it may be a new one
    the first message                      at once; each one holds everything, what is not in it is taken back
    entries or identities are gone         the stream ends with PermissionDenied

Who holds the identities is somebody else (`Identities`, which `issue.py` implements). Reflection and WIT-SVIDs aren't offered.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from .._native import core
from ..errors import IdentityError, MeshError
from ..secure import Identity, certificates, jwt_svid
from . import messages
from .attest import Caller, uid_of
from .entries import Entries, Entry
from .frames import Tally
from .grpc import Code, Connection, Ended, Limits, Metadata, Method

log = logging.getLogger("meshlib.agent")

HEADER: Final = b"workload.spiffe.io"
SERVICE: Final = b"/SpiffeWorkloadAPI/"
# Who has no entry is told so, and needs no more for that than this part of the frames, and seconds without a call.
STRANGERS_SHARE: Final = 10
STRANGERS_IDLE: Final = 30.0
# Users whose frames are remembered before those are forgotten who have sent none for a while.
TALLIES: Final = 256


class Identities(Protocol):
    """What the agent has to give. All of it is asked on the agent's loop, and answered from memory."""

    def identity_of(self, entry: Entry) -> Identity | None:
        """The entry's identity now; None while there is none (not issued yet, expired, or withdrawn).

        Its `bundles` and `crls` are those that go with it: its own trust domain's, and whom that one is federated with.
        """
        ...

    def bundles(self) -> Mapping[str, bytes]:
        """Roots as PEM, by trust domain: our own, and those federated with it."""
        ...

    def crls(self) -> Mapping[str, bytes]:
        """Revocations as PEM, by trust domain."""
        ...

    async def jwt(self, entry: Entry, audiences: Sequence[str]) -> tuple[str, str]:
        """A JWT-SVID for the entry, and its hint ("" for none).

        Raises IdentityError: with the reason jwt.audience if no token may have these audiences, with any other if there is none now.
        """
        ...

    def jwt_bundles(self) -> Mapping[str, bytes]:
        """The keys of tokens as a JWK set (JSON), by trust domain."""
        ...

    def may_hear_of(self, trust_domain: str, kid: str) -> bool:
        """A token names a key that isn't there: True while that may be because it was not asked for since. Then it is, soon."""
        ...

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back, on any thread and without arguments, after any of this has changed. What is answered ends that."""
        ...


class WorkloadApi:
    """State of the agent: the open connections of the Workload API. One loop serves them all."""

    def __init__(self, entries: Entries, identities: Identities, *, limits: Limits | None = None) -> None:
        self._entries = entries
        self._identities = identities
        self._limits = limits or Limits()
        self._connections: dict[Connection, Caller | None] = {}
        self._tallies: dict[int, Tally] = {}  # by user
        self._draining: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()  # replaced with every change
        # The message's part for an identity, as long as it is the one that counts.
        self._svids: dict[str, tuple[Identity, Any]] = {}
        self._unwatch = (entries.watch(self._have_other_entries), identities.watch(self._has_changed))

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def serve(self, connection: socket.socket, caller: Caller | None) -> None:
        """Serve a connection to its end. Nobody (None) is told PermissionDenied in gRPC's words, and hung up on.

        So whoever couldn't be attested for a moment is attested anew when they ask again, which gRPC does on the same connection.
        """
        self._loop = asyncio.get_running_loop()
        limits = self._limits
        if caller is None or not self._entries.of(caller):
            limits = replace(limits, frames=limits.frames // STRANGERS_SHARE, idle=min(limits.idle, STRANGERS_IDLE))
        if caller is None:
            limits = replace(limits, calls=1)
        tally = self._tally_of(uid_of(connection) if caller is None else caller.uid)

        def earns() -> bool:
            return caller is not None and bool(self._entries.of(caller))

        made = Connection(connection, _Session(self, caller).methods, check=_check, limits=limits, tally=tally, earns=earns)
        self._connections[made] = caller
        try:
            await made.serve()
        finally:
            del self._connections[made]

    def bars(self, uid: int) -> bool:
        """Whether a user has sent so many frames that none of theirs is taken until the window is over."""
        tally = self._tallies.get(uid)
        return tally is not None and tally.is_over

    def _tally_of(self, uid: int) -> Tally:
        for name in [name for name, tally in self._tallies.items() if tally.has_ended] if len(self._tallies) > TALLIES else ():
            del self._tallies[name]
        return self._tallies.setdefault(uid, Tally(self._limits.window))

    async def drain(self) -> None:
        """GOAWAY for all connections: streams end with Unavailable, so that their clients come again to whoever listens then."""
        for end in self._unwatch:
            end()
        await asyncio.gather(*(connection.drain() for connection in tuple(self._connections)))

    def _has_changed(self) -> None:
        self._soon(self._tell)

    def _have_other_entries(self) -> None:
        self._soon(self._attest_anew)
        self._soon(self._tell)

    def _soon(self, work: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None:
            # A loop that has ended serves nobody.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(work)

    def _attest_anew(self) -> None:
        """Callers of whom more has to be known now than was asked when they came: they are sent away, to come again."""
        for connection, caller in tuple(self._connections.items()):
            if caller is not None and not caller.digest and self._entries.wants_digest(caller.uid):
                task = asyncio.get_running_loop().create_task(connection.drain())
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)

    def _tell(self) -> None:
        self._svids.clear()  # keys of those who are gone don't stay
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # ------------------------------------------------------------------------------------------------ what is

    def entitled(self, caller: Caller | None) -> tuple[Entry, ...]:
        """The entries of a caller. Raises Ended if there are none."""
        entries = () if caller is None else self._entries.of(caller)
        if not entries:
            raise Ended(Code.PERMISSION_DENIED, "no identity issued")
        return entries

    def identities_of(self, entries: Iterable[Entry]) -> list[tuple[Entry, Identity]]:
        """Each SPIFFE ID once, the first entry of it."""
        found: dict[str, tuple[Entry, Identity]] = {}
        for entry in entries:
            identity = self._identities.identity_of(entry)
            if identity is not None:
                found.setdefault(identity.spiffe_id, (entry, identity))
        return list(found.values())

    def svids(self, caller: Caller | None) -> bytes | None:
        """The X509SVIDResponse for a caller; None while there is no identity for them."""
        found = self.identities_of(self.entitled(caller))
        if not found:
            return None
        federated: dict[str, bytes] = {}
        crls: dict[bytes, None] = {}
        for _, identity in found:
            federated |= {_id_of(name): _roots(pem) for name, pem in identity.bundles.items() if name != identity.trust_domain}
            crls |= dict.fromkeys(_lists(identity.crls.values()))
        svids = [self._svid(identity, entry.service) for entry, identity in found]
        message = messages.X509SVIDResponse(svids=svids, crl=list(crls), federated_bundles=federated)
        return _bytes(message)

    def _svid(self, identity: Identity, hint: str) -> Any:
        known = self._svids.get(identity.spiffe_id)
        if known is None or known[0] is not identity or known[1].hint != hint:
            key = load_pem_private_key(identity.key, None)
            made = messages.X509SVID(
                spiffe_id=identity.spiffe_id,
                x509_svid=_roots(identity.chain),
                x509_svid_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
                bundle=_roots(identity.bundles.get(identity.trust_domain, b"")),
                hint=hint,
            )
            known = self._svids[identity.spiffe_id] = (identity, made)
        return known[1]

    def bundles(self, caller: Caller | None) -> bytes | None:
        """The X509BundlesResponse."""
        self.entitled(caller)
        bundles = {_id_of(name): _roots(pem) for name, pem in self._identities.bundles().items()}
        if not bundles:
            return None
        return _bytes(messages.X509BundlesResponse(crl=list(_lists(self._identities.crls().values())), bundles=bundles))

    def jwt_bundles(self, caller: Caller | None) -> bytes | None:
        """The JWTBundlesResponse."""
        self.entitled(caller)
        bundles = {_id_of(name): keys for name, keys in self._identities.jwt_bundles().items()}
        return _bytes(messages.JWTBundlesResponse(bundles=bundles)) if bundles else None

    async def tokens(self, caller: Caller | None, request: Any) -> bytes:
        """The JWTSVIDResponse: for the SPIFFE ID that was asked for, or for all."""
        entries = self.entitled(caller)
        audiences = list(dict.fromkeys(request.audience))
        if not audiences or not all(audiences):
            raise Ended(Code.INVALID_ARGUMENT, "an audience is required")
        found = self.identities_of(entries)
        if not found:
            raise _none_yet()
        if request.spiffe_id:
            found = [each for each in found if each[1].spiffe_id == request.spiffe_id]
            if not found:
                raise Ended(Code.PERMISSION_DENIED, "no identity issued")
        svids = []
        for entry, identity in found:
            try:
                token, hint = await self._identities.jwt(entry, audiences)
            except MeshError as error:
                if isinstance(error, IdentityError) and error.reason == "jwt.audience":
                    raise Ended(Code.INVALID_ARGUMENT, "no token may have these audiences") from None
                log.error("there is no token for a caller of the Workload API: %s", error)
                raise Ended(Code.UNAVAILABLE, "there is no token now; the agent's log says why") from None
            svids.append(messages.JWTSVID(spiffe_id=identity.spiffe_id, svid=token, hint=hint))
        return _bytes(messages.JWTSVIDResponse(svids=svids))

    def validated(self, caller: Caller | None, request: Any) -> bytes:
        """The ValidateJWTSVIDResponse, for a token that is good."""
        self.entitled(caller)
        if not request.audience or not request.svid:
            raise Ended(Code.INVALID_ARGUMENT, "an audience and a token are required")
        bad = Ended(
            Code.INVALID_ARGUMENT, "the token is not a JWT-SVID for this audience, or not of a trust domain that is believed"
        )
        domain = _domain_of(request.svid)
        keys = self._identities.jwt_bundles().get(domain) if domain else None
        if keys is None:
            raise bad
        try:
            claims = jwt_svid.validated(request.svid, keys, domain, request.audience)
            answer = messages.ValidateJWTSVIDResponse(spiffe_id=claims["sub"])
            answer.claims.update(claims)
            return _bytes(answer)
        except (MeshError, ValueError, TypeError, RecursionError, KeyError):
            if self._may_be_new(domain, keys, jwt_svid.kid_of(request.svid)):
                # Clients never ask again after InvalidArgument.
                raise Ended(Code.UNAVAILABLE, "the key of this token is not known yet, and is being asked for") from None
            raise bad from None

    def _may_be_new(self, domain: str, keys: bytes, kid: str) -> bool:
        """Is a token perhaps by a key that came after these?"""
        if not kid or kid in jwt_svid.kids_of(keys):
            return False
        # In this order: what was found meanwhile, on another thread, is there before it is said that it was looked for.
        return self._identities.may_hear_of(domain, kid) or kid in jwt_svid.kids_of(
            self._identities.jwt_bundles().get(domain, b"")
        )


class _Session:
    """The five calls, as one caller sees them."""

    def __init__(self, api: WorkloadApi, caller: Caller | None) -> None:
        self._api = api
        self._caller = caller
        self.methods: Mapping[bytes, Method] = {
            SERVICE + b"FetchX509SVID": Method(self._fetch_x509_svid, is_streaming=True),
            SERVICE + b"FetchX509Bundles": Method(self._fetch_x509_bundles, is_streaming=True),
            SERVICE + b"FetchJWTSVID": Method(self._fetch_jwt_svid),
            SERVICE + b"FetchJWTBundles": Method(self._fetch_jwt_bundles, is_streaming=True),
            SERVICE + b"ValidateJWTSVID": Method(self._validate_jwt_svid),
        }

    def _fetch_x509_svid(self, request: bytes) -> AsyncGenerator[bytes, None]:
        _parsed(messages.X509SVIDRequest, request)
        return self._watch(self._api.svids)

    def _fetch_x509_bundles(self, request: bytes) -> AsyncGenerator[bytes, None]:
        _parsed(messages.X509BundlesRequest, request)
        return self._watch(self._api.bundles)

    def _fetch_jwt_bundles(self, request: bytes) -> AsyncGenerator[bytes, None]:
        _parsed(messages.JWTBundlesRequest, request)
        return self._watch(self._api.jwt_bundles)

    async def _fetch_jwt_svid(self, request: bytes) -> AsyncGenerator[bytes, None]:
        yield await self._api.tokens(self._caller, _parsed(messages.JWTSVIDRequest, request))

    async def _validate_jwt_svid(self, request: bytes) -> AsyncGenerator[bytes, None]:
        yield self._api.validated(self._caller, _parsed(messages.ValidateJWTSVIDRequest, request))

    async def _watch(self, asked: Callable[[Caller | None], bytes | None]) -> AsyncGenerator[bytes, None]:
        """What is now, and then whatever else it becomes. Changes while nobody reads are one change."""
        last: bytes | None = None
        while True:
            changed = self._api._changed
            message = asked(self._caller)
            if message is None:
                # On a stream that had given it, it was taken back.
                raise _none_yet() if last is None else Ended(Code.PERMISSION_DENIED, "no identity issued")
            if message != last:
                last = message
                yield message
            await changed.wait()


def _check(metadata: Metadata) -> None:
    if [value for name, value in metadata if name == HEADER] != [b"true"]:
        raise Ended(Code.INVALID_ARGUMENT, "security header missing from request")


def _parsed(kind: Any, request: bytes) -> Any:
    try:
        return kind.FromString(request)
    except Exception:
        # Protobuf's own exception; what it says quotes the request.
        raise Ended(Code.INVALID_ARGUMENT, "the request is no such message") from None


def _bytes(message: Any) -> bytes:
    # In one order, so that what is the same looks the same.
    made: bytes = message.SerializeToString(deterministic=True)
    return made


def _none_yet() -> Ended:
    return Ended(Code.UNAVAILABLE, "there is no identity yet; the agent's log says why")


def _id_of(trust_domain: str) -> str:
    return f"spiffe://{trust_domain}"


def _roots(pem: bytes) -> bytes:
    """Certificates in a row, as DER."""
    if not pem.strip():
        return b""
    return b"".join(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem))


def _lists(pems: Iterable[bytes]) -> list[bytes]:
    return [each.public_bytes(Encoding.DER) for pem in pems if pem.strip() for each in certificates.crls_of(pem)]


def _domain_of(token: str) -> str:
    """The trust domain that a token says it is of, which its signature has to prove; "" if it says none."""
    parts = token.split(".")
    if len(parts) != 3 or not token.isascii():
        return ""
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        domain: str = core.parse_spiffe_id(claims["sub"])[0]
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        return ""
    return domain
