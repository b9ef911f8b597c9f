"""The seam between Python and Rust. Rust returns data and never calls Python; checked against the library by stubtest.

Times named `now` and deadlines are monotonic seconds (`time.monotonic()`, or a virtual clock in tests). Header lists hold
lower- or mixed-case names as bytes. Nothing here does I/O. Failures raise the exceptions of `meshlib.errors`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, final

from _typeshed import ReadableBuffer

_Headers: TypeAlias = list[tuple[bytes, bytes]]

__all__ = [
    "DELIVER",
    "EVENT_BODY",
    "EVENT_CLOSED",
    "EVENT_END",
    "EVENT_HEAD",
    "EVENT_OPEN",
    "EVENT_RESPONSE",
    "OUTCOME_CANCELLED",
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
    "VERSION",
    "WAIT",
    "Call",
    "Engine",
    "Entry",
    "Gate",
    "HttpConnection",
    "TlsClient",
    "TlsConnection",
    "TlsServer",
    "canonical_path",
    "is_plain_target",
    "parse_spiffe_id",
]
VERSION: str

# ---------------------------------------------------------------- outbound decisions (binding/src/engine.rs)

WAIT: int
SEND: int
DELIVER: int
RETRY: int

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

def is_plain_target(target: str) -> bool: ...

@final
class Engine:
    """All outbound decisions of one process: routes, balancers, breakers, budgets. State of Services, Backends and Endpoints."""
    def __new__(cls, seed: int) -> Engine: ...
    def publish(self, plan: bytes, now: float) -> None: ...
    def resolve(
        self, service: str, version: int, endpoints: Sequence[tuple[str, float, str, Mapping[str, str], str]], now: float
    ) -> None: ...
    def service_of(self, authority: str) -> str | None: ...
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
    ) -> Call: ...
    def isolate(self, service: str, address: str, isolated: bool, now: float) -> bool: ...
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
    def is_idempotent(self) -> bool: ...
    @property
    def attempt(self) -> int: ...
    @property
    def has_attempts_left(self) -> bool: ...
    def next(self, now: float) -> tuple[Any, ...]: ...  # (WAIT, seconds) or (SEND, token, address, identity)
    def head(self, token: int, outcome: int, status: int, now: float, retry_after: float = ...) -> int: ...
    def finish(self, token: int, outcome: int, now: float) -> None: ...
    def abandon(self, now: float) -> None: ...
    def record(self) -> dict[str, Any]: ...

# ---------------------------------------------------------------- inbound decisions (binding/src/gate.rs)

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
    ) -> Entry: ...
    def begin_grpc(self, method: str, peer: str | None, is_tls: bool, now: float, deadline: float | None = None) -> Entry: ...
    def reset(self) -> None: ...
    def stats(self) -> list[dict[str, Any]]: ...

@final
class Entry:
    """One call on its way in. `status` is 0 when it may go on, otherwise the HTTP status of the refusal."""
    @property
    def status(self) -> int: ...
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
    def finish(self, status: int, now: float) -> None: ...
    def record(self) -> dict[str, Any]: ...

def canonical_path(target: bytes, strict: bool = False) -> tuple[str, bytes]: ...
def parse_spiffe_id(text: str) -> tuple[str, str]: ...

# ---------------------------------------------------------------- bytes (binding/src/wire.rs)

EVENT_OPEN: int  # (kind,): the handshake is done and the peer is who it must be; without TLS open() opens at once, without event
EVENT_HEAD: int  # (kind, status, http_minor, reason, headers): names in lower case
EVENT_BODY: int  # (kind, data)
EVENT_END: int  # (kind, is_reusable, trailers)
EVENT_RESPONSE: int  # (kind, status, http_minor, reason, headers, body, is_reusable): a whole answer within one call
EVENT_CLOSED: int  # (kind,): the idle connection was closed by the peer, or got bytes that nobody asked for

@final
class TlsClient:
    """The client side of one generation of identity: our SVID, the bundles, and the session tickets won with them."""
    def __new__(cls, chain: bytes | None, key: bytes | None, bundles: Mapping[str, bytes], generation: int) -> TlsClient: ...
    @property
    def generation(self) -> int: ...
    def stats(self) -> dict[str, int]: ...

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
    ) -> TlsServer: ...
    @property
    def generation(self) -> int: ...
    def accepts(self, chain: Sequence[bytes]) -> bool:
        """Would the client of this chain (DER, leaf first; empty for none) be taken in a handshake now?"""
    def stats(self) -> dict[str, int]: ...

@final
class HttpConnection:
    """The client side of one connection: TLS (or none) and HTTP/1.1 framing. One exchange at a time."""
    def __new__(cls, tls: TlsClient | None, expected: str, address: str) -> HttpConnection: ...
    def open(self) -> bytes: ...
    def send(self, method: str, target: str, headers: _Headers, body: bytes | None, streaming: bool) -> bytes: ...
    def send_body(self, data: ReadableBuffer, is_last: bool) -> bytes: ...
    def receive(self, buffer: ReadableBuffer, size: int) -> tuple[bytes, list[tuple[Any, ...]]]:
        """(bytes to write, events). After an exception `pending` has the alert to write."""
    def receive_eof(self) -> list[tuple[Any, ...]]: ...
    def pending(self) -> bytes: ...
    def close(self) -> bytes: ...
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
