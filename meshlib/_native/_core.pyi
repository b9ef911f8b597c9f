"""The seam between Python and Rust. Rust returns data and never calls Python; checked against the library by stubtest.

Times named `now` and deadlines are monotonic seconds (`time.monotonic()`, or a virtual clock in tests). Header lists hold
lower- or mixed-case names as bytes. Nothing here does I/O. Failures raise the exceptions of `meshlib.errors`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, final

from _typeshed import ReadableBuffer

_Headers: TypeAlias = list[tuple[bytes, bytes]]
# Address, weight, zone, labels, identity; and whether the source doesn't tell it any more.
_Endpoint: TypeAlias = tuple[str, float, str, Mapping[str, str], str] | tuple[str, float, str, Mapping[str, str], str, bool]

__all__ = [
    "AWAIT",
    "CONVERSE_CLOSED",
    "CONVERSE_DONE",
    "CONVERSE_EARLY",
    "CONVERSE_INTERRUPTED",
    "CONVERSE_LATE",
    "DELIVER",
    "EVENT_BODY",
    "EVENT_CLOSED",
    "EVENT_END",
    "EVENT_HEAD",
    "EVENT_OPEN",
    "EVENT_RESET",
    "EVENT_RESPONSE",
    "EVENT_WRITABLE",
    "EXTRA_HEDGE",
    "EXTRA_PER_TRY",
    "EXTRA_REPORT",
    "EXTRA_SESSION",
    "OUTCOME_CANCELLED",
    "OUTCOME_DECLINED",
    "OUTCOME_IDENTITY",
    "OUTCOME_PROTOCOL",
    "OUTCOME_REFUSED",
    "OUTCOME_RESET",
    "OUTCOME_RESPONSE",
    "OUTCOME_STALE",
    "OUTCOME_TIMEOUT",
    "OUTCOME_UNWRITTEN",
    "RETRY",
    "SEND",
    "TARGET",
    "TODO_ASK",
    "TODO_CANCEL",
    "TODO_DEADLINE",
    "TODO_HEADERS",
    "TODO_ID",
    "TODO_KEEP",
    "TODO_LAYER",
    "TODO_LOAD",
    "TODO_PRIORITY",
    "TODO_RATES",
    "TODO_REFUSED",
    "TODO_TRACED",
    "TODO_WAIT",
    "VERSION",
    "WAIT",
    "Call",
    "Engine",
    "Entry",
    "Gate",
    "HttpConnection",
    "Place",
    "Proxy",
    "Tally",
    "TlsClient",
    "TlsConnection",
    "TlsServer",
    "TlsTunnel",
    "canonical_path",
    "crypto_provider",
    "is_plain_target",
    "normalized_path",
    "parse_jwks",
    "parse_spiffe_id",
    "passed",
    "verify_chain",
    "verify_jws",
    "verify_jwt",
    "verify_path",
]
VERSION: str

# ---------------------------------------------------------------- outbound decisions (binding/src/engine.rs)

WAIT: int
SEND: int
DELIVER: int
RETRY: int
# Both of a step and of a judgement: another attempt is under way.
AWAIT: int
EXTRA_HEDGE: int
EXTRA_SESSION: int
EXTRA_PER_TRY: int
EXTRA_REPORT: int

# What became of an attempt, as the driver saw it. One list for Rust and Python (core/src/model.rs, `Outcome`).
OUTCOME_RESPONSE: int
OUTCOME_REFUSED: int
OUTCOME_UNWRITTEN: int
OUTCOME_STALE: int
OUTCOME_RESET: int
OUTCOME_TIMEOUT: int
OUTCOME_IDENTITY: int
OUTCOME_PROTOCOL: int
OUTCOME_CANCELLED: int
OUTCOME_DECLINED: int

def is_plain_target(target: str) -> bool: ...

@final
class Engine:
    """All outbound decisions of one process: routes, balancers, breakers, budgets. State of Services, Backends and Endpoints."""
    def __new__(cls, seed: int) -> Engine: ...
    def publish(self, plan: bytes, now: float) -> None: ...
    def resolve(self, service: str, version: int, endpoints: Sequence[_Endpoint], now: float) -> None: ...
    def amend(
        self,
        service: str,
        base: int,
        version: int,
        changed: Sequence[_Endpoint],
        gone: Sequence[str],
        now: float,
    ) -> bool: ...
    def unreachable(self, service: str) -> int: ...
    def service_of(self, authority: str) -> str | None: ...
    def route_of(self, authority: str, method: str, path: str, headers: _Headers) -> tuple[str, str] | None: ...
    def begin(
        self,
        authority: str,
        method: str,
        path: str,
        headers: _Headers,
        now: float,
        deadline: float | None = None,
        idempotent: bool | None = None,
        replayable: bool = True,
        attempt: int = 0,
        timeout: float | None = None,
        retries: int | None = None,
        hedge: float | None = None,
        zone: str | None = None,
        key: str | None = None,
        peer: str | None = None,
        standby: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> Call: ...
    def guard(
        self,
        name: str,
        now: float,
        deadline: float | None = None,
        idempotent: bool = False,
        retries: int | None = None,
        timeout: float | None = None,
        peer: str | None = None,
    ) -> tuple[Call, int, float]:
        """`begin` and `next` for a function: the call, its token and its end.

        A token of 2**32 - 1: the call waits for a permit, and goes on with `next`.
        """
    def depart(
        self,
        service: str,
        path: str,
        headers: _Headers,
        now: float,
        deadline: float | None,
        idempotent: bool | None,
        replayable: bool,
        attempt: int,
        peer: str | None,
        sample: float | None,
    ) -> tuple[Call, float, int, str | None, tuple[Any, ...]]:
        """`begin` and the first `next` of a gRPC call: the call, its deadline, its extras, the trace that it begins (if `sample` is
        said), and what `next` says.
        """
    def check(self, service: str, address: str, is_healthy: bool, now: float) -> bool: ...
    def tend(self, now: float) -> None: ...
    def calls(self, service: str) -> int: ...
    def isolate(self, service: str, address: str, isolated: bool, now: float) -> bool: ...
    def hold(self) -> None:
        """Before a fork: wait for the change that is under way, and let none begin."""
    def release(self) -> None:
        """After a fork, on both sides."""
    def reseed(self, seed: int) -> None: ...
    def stats(self, now: float) -> list[dict[str, Any]]: ...

@final
class Call:
    """One call on its way out. `next` names an attempt; `head`, `finish` and `abandon` end what it began."""
    @property
    def service(self) -> str: ...
    @property
    def route(self) -> str: ...
    @property
    def deadline(self) -> float: ...
    @property
    def connect_timeout(self) -> float: ...
    @property
    def stream_idle(self) -> float: ...
    @property
    def is_idempotent(self) -> bool: ...
    @property
    def extras(self) -> int: ...  # EXTRA_* of what the driver has to do beyond the ordinary
    @property
    def per_try(self) -> float: ...  # seconds for one attempt; 0.0: as long as the call has
    @property
    def session(self) -> tuple[bytes, bytes] | None: ...  # the header that keeps the caller at its endpoint
    def stop(self) -> None: ...
    def wait(self, wait: float, now: float) -> None: ...
    def report(self, token: int, value: bytes, now: float) -> None: ...
    @property
    def is_spent(self) -> bool: ...  # it failed with its retries used up
    @property
    def attempt(self) -> int: ...
    @property
    def has_attempts_left(self) -> bool: ...
    def next(self, now: float) -> tuple[Any, ...]: ...  # (WAIT, seconds), (SEND, token, address, identity, is_http2) or (AWAIT,)
    def hedge(self, now: float, can_overlap: bool = True, is_streamed: bool = False) -> float | None:
        """Seconds until a second attempt goes out beside the one under way; 0.0: now, and `next` names it. None: there will be none."""
    def headers(self, given: _Headers, now: float, end: float, trace: _Headers | None, sample: float) -> _Headers:
        """The caller's headers with ours: deadline (unless `end` is ages away), attempt, and the trace (None: a new one)."""
    def traceparent(self, sample: float) -> str:
        """The trace that this call begins, where it is part of none: the same for all its attempts."""
    def head(self, token: int, outcome: int, status: int, now: float, retry_after: float = ..., is_whole: bool = False) -> int:
        """`retry_after`: seconds, -1.0 where nothing was said, -2.0 where it was said: never again.

        `is_whole`: the body is here too, so that an answer that is delivered ends the call.
        """
    def good(self, token: int, now: float) -> None:
        """`head` and `finish` of a function that returned."""
    def finish(self, token: int, outcome: int, now: float) -> None: ...
    def abandon(self, now: float) -> None: ...
    def record(self) -> dict[str, Any]: ...

# ---------------------------------------------------------------- inbound decisions (binding/src/gate.rs)

# The key of a scope under which a server of ours puts the whole target, as it came.
TARGET: str

# The bits of Entry.todo.
TODO_REFUSED: int  # it is refused, and over
TODO_WAIT: int  # it waits for a place
TODO_HEADERS: int  # header fields are to be put in or taken out
TODO_ID: int  # it needs a request id in place of its own
TODO_ASK: int  # an authorizer has to be asked
TODO_RATES: int  # rates are to be asked that all processes share
TODO_DEADLINE: int
TODO_LAYER: int
TODO_PRIORITY: int
TODO_LOAD: int  # the caller wants to know our load
TODO_KEEP: int  # nothing ends when the client goes away
TODO_CANCEL: int  # the handler ends, too
TODO_TRACED: int  # the caller has named a trace

def passed(headers: _Headers) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The fields that a handler gets to see, as a list of its own; True: a request id has to be made for it."""

@final
class Place:
    """Where a connection came in and who is at its other end: what a server knows of it once and for all of its calls."""
    def __new__(cls, peer: str, is_tls: bool, source: str, port: int = 0, sni: str = "", is_public: bool = False) -> Place: ...
    @property
    def is_public(self) -> bool: ...

@final
class Gate:
    """All inbound decisions of one process: canonical path, authorisation, admission. State of the Service that we are."""
    def __new__(cls) -> Gate: ...
    def publish(self, plan: bytes, now: float) -> None: ...
    def begin(
        self,
        method: str,
        target: bytes,
        headers: _Headers,
        peer: str | None,
        is_tls: bool,
        now: float,
        deadline: float | None = None,
        wall: float = 0.0,  # Unix seconds, by which tokens are judged
        source: str = "",  # the address at the other end; "" where it is not known
        port: int = 0,
        sni: str = "",
        version: str = "",  # of HTTP: "1.0", "1.1" or "2"; "" where it is not known
        is_public: bool = False,  # it came in at the public listener, which has rules of its own
        arrived: float
        | None = None,  # when it came into the process, if that was before now: its deadline and its time count from there
    ) -> Entry: ...
    def arrive(self, scope: dict[str, Any], place: Place, now: float, wall: float) -> Entry:
        """`begin` for an ASGI scope. The canonical path and the headers that get in are written into it."""
    def begin_grpc(
        self,
        method: str,
        peer: str | None,
        is_tls: bool,
        now: float,
        deadline: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        wall: float = 0.0,
        source: str = "",
        port: int = 0,
        can_wait: bool = False,  # an entry with a ticket is waited with; otherwise it finds a place at once, or is refused
    ) -> Entry: ...
    def reset(self) -> None: ...
    def called(self) -> list[int]: ...  # tickets that were called by entries which nobody ended
    def load(self) -> dict[str, int]: ...  # in_flight, limit, waiting; and since the beginning: calls, errors, refused
    def stats(self) -> list[dict[str, Any]]: ...
    def keys(self, provider: str, jwks: bytes | None) -> list[str]: ...  # answers which keys were left out, and why
    def traffic(
        self,
    ) -> tuple[list[dict[str, Any]], int]: ...  # the calls recorded since the last time, and how many found no place
    def edges(self) -> list[dict[str, Any]]: ...

@final
class Entry:
    """One call on its way in. `status` is 0 when it may go on, otherwise the HTTP status of the refusal."""
    @property
    def status(self) -> int: ...
    def spend(self) -> None: ...  # a call that the handler made has failed for good
    @property
    def is_spent(self) -> bool: ...
    @property
    def identity(self) -> str: ...  # our own
    @property
    def custom(self) -> str: ...  # the authorizer to ask before the call goes on; "" for none
    def veto(self) -> list[int]: ...  # it said no: the call is refused, and over; the tickets that are called by that
    @property
    def todo(self) -> int: ...  # what is left to do, as bits (TODO_…); 0 as a rule
    @property
    def ticket(self) -> int: ...  # 0: it has a place. Else it waits until its ticket is called, or `patience` is over
    @property
    def is_called(self) -> bool: ...  # its ticket was called before anybody waited for it
    @property
    def patience(self) -> float: ...
    def resume(self, now: float) -> bool: ...  # asked then. True: it has a place; False: it is refused
    def outrun(self, wait: float) -> list[int]: ...  # a rate that all processes share has no room for so many seconds
    def stand_in(self, now: float) -> list[int] | None: ...  # its store is away, and we count ourselves: None if it fits
    @property
    def priority(self) -> str: ...
    @property
    def load_format(self) -> str: ...  # "text" or "json": how the caller wants to be told our load; "" if not
    @property
    def is_over(self) -> bool: ...
    @property
    def peer(self) -> str: ...
    @property
    def claims(self) -> str | None: ...  # the payload of a good token, as JSON
    @property
    def principal(self) -> str: ...  # iss/sub
    @property
    def token_header(self) -> str: ...  # the header of a token that was for us alone
    @property
    def wants_keys(self) -> str: ...  # the provider whose keys don't know a token's
    @property
    def client(self) -> str: ...
    @property
    def is_from_proxy(self) -> bool: ...  # of an identity that the configuration names as a proxy
    @property
    def is_believed(self) -> bool: ...  # what its connection says about where the call comes from counts
    @property
    def xfcc(self) -> str: ...
    @property
    def location(self) -> str: ...  # where `paths: redirect` sends the caller
    @property
    def retry_after(self) -> float | None: ...
    @property
    def method(self) -> str: ...
    @property
    def layer(self) -> int: ...  # in which attempt of a caller we run: 0 in the first
    @property
    def reason(self) -> str: ...
    @property
    def rule(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def raw_path(self) -> bytes: ...
    @property
    def route(self) -> str: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def would_deny(self) -> bool: ...
    def finish(self, status: int, now: float) -> list[int] | None: ...  # the tickets whose turn it is now: None as a rule
    def record(self) -> dict[str, Any]: ...

@final
class Tally:
    """Two numbers to which many threads add."""
    def __new__(cls) -> Tally: ...
    def add(self, sent: int, received: int) -> None: ...
    def read(self) -> tuple[int, int]: ...

def canonical_path(target: bytes, strict: bool = False) -> tuple[str, bytes]: ...
def normalized_path(
    target: str, profile: str = "NONE", escaped_slashes: str = "KEEP_UNCHANGED", is_grpc: bool = False
) -> tuple[str, str]: ...
def parse_spiffe_id(text: str) -> tuple[str, str]: ...

# ---------------------------------------------------------------- bytes (binding/src/wire.rs)

# (kind,): the handshake is done and the peer is who it must be. Without TLS HTTP/1.1 is open after open(), without event, and
# HTTP/2 when the peer's SETTINGS have come.
EVENT_OPEN: int
EVENT_HEAD: (
    int  # (kind, status, http_minor, reason, headers): names in lower case; the minor is 20 for HTTP/2, which has no reason
)
EVENT_BODY: int  # (kind, data)
EVENT_END: int  # (kind, is_reusable, trailers)
EVENT_RESPONSE: int  # (kind, status, http_minor, reason, headers, body, is_reusable): a whole answer within one call
EVENT_CLOSED: int  # (kind,): the idle connection was closed by the peer, or got bytes that nobody asked for
EVENT_WRITABLE: int  # (kind,): HTTP/2: what the peer's window held up is out, and more may be sent
EVENT_RESET: (
    int  # (kind, error): HTTP/2: a stream ended without a whole answer; reason send.unwritten means that it was not processed
)

crypto_provider: str  # whose cryptography it is: "ring", or "aws-lc-rs" where the library was built with it

def verify_chain(
    chain: Sequence[bytes],  # DER, the leaf first
    bundles: Mapping[str, bytes],
    expected: str,  # a SPIFFE ID, or empty for any
    now: float,  # Unix seconds
    side: str,  # whom the chain is to prove: "servers" or "clients"
    crls: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """{id, not_before, not_after}: what a handshake makes of this chain. Raises PeerIdentityError where it would end."""

def verify_path(chain: Sequence[bytes], roots: Sequence[bytes], now: float, side: str) -> None:
    """The step of that which finds a path to a root (all DER), whoever the leaf is. ValueError for what can't be a root."""

# Why `HttpConnection.converse` came back
CONVERSE_DONE: int  # there are events, or everything is written
CONVERSE_EARLY: int  # there are events, but the peer spoke before it had taken everything
CONVERSE_LATE: int  # the time is over
CONVERSE_CLOSED: int  # the peer ended the connection
CONVERSE_INTERRUPTED: int  # a signal: call again after Python has handled it

@final
class TlsClient:
    """The client side of one generation of identity: our SVID, the bundles, and the session tickets won with them."""
    def __new__(
        cls,
        chain: bytes | None,
        key: bytes | None,
        bundles: Mapping[str, bytes],
        generation: int,
        before: TlsClient | None = None,  # whose counters go on; nothing else is taken over
        crls: Mapping[str, bytes] | None = None,  # X509 CRLs as PEM, by trust domain
    ) -> TlsClient: ...
    @property
    def generation(self) -> int: ...
    @property
    def crls_until(self) -> float: ...  # when the first of the lists should have been replaced, Unix seconds; inf without lists
    @property
    def not_after(self) -> float: ...  # the end of our own chain, Unix seconds; inf where we are anonymous
    def stats(self) -> dict[str, int]:
        """full, resumed, failed, failed_{identity,refused,protocol,lost}, tickets_{stored,used,expired,evicted,held}."""

@final
class TlsServer:
    """The server side of one generation of identity."""
    def __new__(
        cls,
        chain: bytes,
        key: bytes,
        bundles: Mapping[str, bytes],
        generation: int,
        require_client: bool,
        alpn: Sequence[bytes] = ...,
        before: TlsServer | None = None,  # whose counters go on; nothing else is taken over
        crls: Mapping[str, bytes] | None = None,  # X509 CRLs as PEM, by trust domain
    ) -> TlsServer: ...
    @property
    def generation(self) -> int: ...
    @property
    def crls_until(self) -> float: ...  # when the first of the lists should have been replaced, Unix seconds; inf without lists
    def accepts(self, chain: Sequence[bytes]) -> bool:
        """Would the client of this chain (DER, leaf first; empty for none) be taken in a handshake now?"""
    def stats(self) -> dict[str, int]:
        """full, resumed, failed, failed_{identity,refused,protocol,lost}."""

@final
class HttpConnection:
    """The client side of one connection: TLS (or none) and HTTP framing.

    `protocols` is "http/1.1", "h2" or "h2,http/1.1" (as ALPN agrees; without TLS HTTP/1.1). `send` and `receive` carry one exchange
    at a time with either version. `open_stream` and `receive_streams` carry many, if `protocol` is "h2"; one connection is used in
    one of the two ways.
    """
    def __new__(cls, tls: TlsClient | None, expected: str, address: str, protocols: str = "http/1.1") -> HttpConnection: ...
    def open(self) -> bytes: ...
    def send(self, method: str, target: str, headers: _Headers, body: bytes | None, streaming: bool) -> bytes: ...
    def send_body(self, data: ReadableBuffer, is_last: bool) -> bytes: ...
    def receive(self, buffer: ReadableBuffer, size: int) -> tuple[bytes, list[tuple[Any, ...]]]:
        """(bytes to write, events). After an exception `pending` has the alert to write."""
    def converse(self, fd: int, data: bytes, seconds: float, is_reading: bool) -> tuple[int, list[tuple[Any, ...]]]:
        """(CONVERSE_*, events): write `data` to a socket that doesn't block, wait at most `seconds`, read until there is an event.

        The interpreter is released meanwhile. What could not be written goes out with the next call. Raises OSError, too. With
        HTTP/2 a peer that only talks is heard and never EARLY; while `is_blocked`, read until EVENT_WRITABLE.
        """
    def is_quiet(self, fd: int) -> bool:
        """Whether nothing has come on a kept-alive socket, nor its end. HTTP/2 takes in what came, and says whether it goes on."""
    def receive_eof(self) -> list[tuple[Any, ...]]: ...
    def pending(self) -> bytes: ...
    def close(self) -> bytes: ...
    def open_stream(self, method: str, target: str, headers: _Headers, body: bytes | None, streaming: bool) -> tuple[int, bytes]:
        """(stream, bytes to write). Only while there are `streams_left`."""
    def send_stream(self, stream: int, data: ReadableBuffer, is_last: bool) -> bytes:
        """The next piece of a body. What the peer's window has no room for waits inside: see `is_stream_blocked`."""
    def reset_stream(self, stream: int) -> bytes:
        """Give up on an exchange: nothing more is told of it."""
    def consume(self, stream: int, size: int) -> bytes:
        """So much of an answer's body has been taken, and the peer may send as much again."""
    def is_stream_blocked(self, stream: int) -> bool: ...
    def receive_streams(self, buffer: ReadableBuffer, size: int) -> tuple[bytes, list[tuple[int, tuple[Any, ...]]]]:
        """(bytes to write, [(stream, event), ...]). Stream 0 is the connection: EVENT_CLOSED there means no new streams.

        An error ends all streams. After it `pending` has the alert to write.
        """
    def receive_streams_eof(self) -> list[tuple[int, tuple[Any, ...]]]: ...
    @property
    def streams_left(self) -> int: ...  # that may be begun now
    @property
    def protocol(self) -> str | None: ...  # "http/1.1" or "h2"; None until it is agreed
    @property
    def is_blocked(self) -> bool: ...  # with `send`: the peer's window is used up, so that it must be read from
    @property
    def is_open(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...
    @property
    def has_written(self) -> bool: ...
    @property
    def has_received(self) -> bool: ...
    @property
    def peer(self) -> str | None: ...
    @property
    def peer_chain(self) -> list[bytes]: ...
    @property
    def peer_not_after(self) -> float: ...  # Unix seconds; 0.0 without a proof
    @property
    def tls_version(self) -> str | None: ...
    @property
    def tls_resumed(self) -> bool: ...

@final
class TlsConnection:
    """The server side of one TLS connection: records in, plain text out, and back. Knows nothing of HTTP."""
    def __new__(cls, tls: TlsServer) -> TlsConnection: ...
    @property
    def server(self) -> TlsServer: ...  # whose handshake it was
    @property
    def generation(self) -> int: ...  # that of `server`
    def receive(self, data: ReadableBuffer) -> tuple[bytes, bytes, bool]:
        """(plain text, bytes to write, is_eof). After an exception `pending` has the alert to write."""
    def send(self, data: ReadableBuffer) -> bytes: ...
    def close(self) -> bytes: ...
    def pending(self) -> bytes: ...
    @property
    def is_handshaking(self) -> bool: ...
    @property
    def peer(self) -> str | None: ...
    @property
    def peer_chain(self) -> list[bytes]: ...
    @property
    def peer_not_after(self) -> float: ...  # Unix seconds; 0.0 without a proof
    @property
    def tls_version(self) -> str | None: ...
    @property
    def tls_cipher(self) -> str | None: ...
    @property
    def tls_resumed(self) -> bool: ...
    @property
    def alpn(self) -> bytes | None: ...
    @property
    def server_name(self) -> str | None: ...

@final
class TlsTunnel:
    """The client side of one TLS connection: records in, plain text out, and back. HTTP/2 (ALPN h2) is spoken by somebody else.

    The peer must prove to be `expected`; sessions are resumed as in every other connection of this `TlsClient`.
    """
    def __new__(cls, tls: TlsClient, expected: str, address: str) -> TlsTunnel: ...
    def open(self) -> bytes: ...  # the first message of the handshake
    def receive(self, data: ReadableBuffer) -> tuple[bytes, bytes, bool]:
        """(plain text, bytes to write, is_eof). After an exception `pending` has the alert to write."""
    def send(self, data: ReadableBuffer) -> bytes:
        """Only when it `is_handshaking` no more."""
    def close(self) -> bytes: ...
    def pending(self) -> bytes: ...
    @property
    def is_handshaking(self) -> bool: ...
    @property
    def peer(self) -> str | None: ...
    @property
    def peer_not_after(self) -> float: ...  # Unix seconds; 0.0 without a proof
    @property
    def tls_resumed(self) -> bool: ...

# --- tokens and keys by hand; a request's token is verified by its gate

def parse_jwks(
    jwks: bytes,
) -> tuple[list[str], list[str]]: ...  # names of the usable keys ("" for none), and why others are left out
def verify_jwt(token: bytes, jwks: bytes, provider: bytes, wall: float) -> dict[str, Any]: ...  # a provider as in the server plan
def verify_jws(token: bytes, jwks: bytes, algorithms: Sequence[str]) -> bytes: ...  # the payload; no claims are judged

# --- the node agent's data path; nothing of it runs before a Proxy is made

@final
class Proxy:
    """Moves the bytes of delegated calls and of handed-over ones, on native threads of its own. After a fork only a new one works."""
    def __new__(cls, workers: int = 1) -> Proxy: ...
    def identify(
        self, spiffe_id: str, chain: bytes, key: bytes, bundles: Mapping[str, bytes], crls: Mapping[str, bytes], secret: str
    ) -> None:
        """Puts an identity in force, or a new generation: what was opened under the old one ends when it is idle, and callers whom the new
        bundles and lists don't know any more are cut.
        """
    def forget(self, spiffe_id: str) -> None: ...  # withdrawn: its connections close
    def readmit(self, spiffe_id: str) -> None: ...  # its callers' connections end when idle: who comes again is attested anew
    def adopt(self, fd: int, *spiffe_ids: str) -> None:
        """A connection to the data socket, attested for these identities: a request says as which. The descriptor becomes the proxy's."""
    def listen(self, name: str, fd: int, spiffe_id: str, to: str, mode: str, owners: Sequence[int] = ...) -> None:
        """A listening TCP socket, of which a copy is made; `to` is the path of the application's UNIX socket.

        Where `owners` names users, nobody else's process may listen there.
        """
    def unlisten(self, name: str) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def connections(self) -> list[dict[str, Any]]: ...
    def drain(self) -> None: ...  # accepts no more; GOAWAY, connection: close
    def stop(self, seconds: float) -> bool: ...  # ends all within; True if nothing was cut
