"""What stands between a gRPC call that arrives and the application's handler?

`Reception.enter` is the inbound way of one call. The interceptors wrap the application's handler, in all four kinds and in the two
styles of asyncio's API, with it; a blocking handler in an asyncio server stays one, and runs in the server's threads. A refusal is
told to the caller in words that never change and name nothing; the log of this service has the rule.

Who calls is read from the connection: exactly one URI SAN, a SPIFFE ID of our own trust domain, in a certificate that is still
valid. gRPC judged the chain when the connection was made; a connection may outlive the certificate, so the end of its validity is
looked at for each call.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import grpc
import grpc.aio

from meshlib._native import core
from meshlib.call import ENVOY_ATTEMPT, HEADER_ATTEMPT, STATE, Peer

from .line import PLAIN, PLAIN_TLS
from .way import InboundWay, shown, step_in, step_out, visit_of

log = logging.getLogger("meshlib.server")

EXACT: Final = re.compile(r"/[A-Za-z0-9_.]+/[A-Za-z0-9_]+")
CARRIERS: Final = frozenset({"traceparent", "tracestate", "baggage"})
FOREVER: Final = 10 * 365 * 86400.0  # a blocking server says "no deadline" with a very large number
PEERS_KEPT: Final = 1024

# The gate's status for a refusal, as gRPC's code and the words for the caller.
REFUSALS: Final[dict[int, tuple[grpc.StatusCode, str]]] = {
    401: (grpc.StatusCode.UNAUTHENTICATED, "no identity"),
    429: (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls"),
    403: (grpc.StatusCode.PERMISSION_DENIED, "not allowed"),
    404: (grpc.StatusCode.UNIMPLEMENTED, "no such method"),
    503: (grpc.StatusCode.UNAVAILABLE, "too many calls"),
    504: (grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline is over"),
}
UNKNOWN_METHOD: Final = grpc.StatusCode.UNIMPLEMENTED, "no such method"
UNREADABLE: Final = grpc.StatusCode.INTERNAL, "the request can't be read"
OTHERWISE: Final = grpc.StatusCode.UNAVAILABLE, "refused"


class Reception:
    """The inbound way for gRPC: one for a server."""

    __slots__ = ("_is_revoked", "_trust_domain", "_wall_clock", "way")

    def __init__(
        self,
        way: InboundWay,
        trust_domain: Callable[[], str],
        wall_clock: Callable[[], float] = time.time,
        *,
        is_revoked: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.way = way
        self._is_revoked = is_revoked
        self._trust_domain = trust_domain
        self._wall_clock = wall_clock

    def enter(self, method: str, context: Any) -> Visit:
        """Take one call in. If the visit has a refusal, the call is over; otherwise it must `end`, once."""
        way = self.way
        now = way.clock()
        peer = self.peer_of(context.auth_context())
        left = context.time_remaining()
        end = None if left is None or left > FOREVER else now + left
        metadata = context.invocation_metadata()
        layer, carriers = _read_metadata(metadata)
        # All of it: the gate knows what the policy asks about, by the same plan with which it judges.
        entry = way.gate.begin_grpc(
            method, peer.spiffe_id or None, peer.is_tls, now, end, metadata, way.wall_clock(), address_of(context.peer())
        )
        headers = fields_of(metadata) if entry.custom else carriers
        span = None
        if way.observer is not None:
            span = way.observer.server_span("POST", entry.route, carriers, peer.spiffe_id, rpc=method)
        if not entry.status:
            return Visit(way, entry, span, None, peer, layer, headers)
        way.told(entry, "POST", method.encode("latin-1", "replace"), peer)
        refused = refusal(entry)
        if span is not None:
            span.end(entry.status, _Ended(refused[0]))
        return Visit(way, entry, None, refused, peer, layer, headers)

    def peer_of(self, auth: Any) -> Peer:
        """Who is at the other end of the connection. A certificate that proves nothing to us leaves a caller without identity."""
        if auth.get("transport_security_type") != [b"ssl"]:
            return PLAIN
        names, uris, certificates = auth.get("peer_spiffe_id"), auth.get("peer_uri"), auth.get("x509_pem_cert")
        if not names or names != uris or len(names) != 1 or not certificates:
            return PLAIN_TLS
        peer = _read(names[0], certificates[0])
        if peer is None or peer.trust_domain != self._trust_domain() or peer.not_after <= self._wall_clock():
            return PLAIN_TLS
        if self._is_revoked is not None and self._is_revoked((auth.get("x509_pem_cert_chain") or certificates)[0]):
            return PLAIN_TLS
        return peer


@lru_cache(maxsize=PEERS_KEPT)
def _read(name: bytes, certificate: bytes) -> Peer | None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from meshlib.secure.certificates import serial_of

    try:
        text = name.decode("ascii")
        core.parse_spiffe_id(text)
        leaf = x509.load_pem_x509_certificate(certificate)
        return Peer(
            text,
            is_tls=True,
            serial=serial_of(leaf),
            not_after=leaf.not_valid_after_utc.timestamp(),
            chain=(leaf.public_bytes(Encoding.DER),),
        )
    except Exception:
        return None  # what can't be read proves nothing


def _read_metadata(metadata: Any) -> tuple[int, list[tuple[bytes, bytes]]]:
    """In which attempt of the caller's we run, and what concerns the trace."""
    layer = 0
    carriers: list[tuple[bytes, bytes]] = []
    for key, value in metadata or ():
        if key == HEADER_ATTEMPT:
            layer = max(layer, _attempt(value))
        elif key == ENVOY_ATTEMPT:
            layer = max(layer, _attempt(value) - 1)
        elif key in CARRIERS and isinstance(value, str):
            carriers.append((key.encode(), value.encode("latin-1", "replace")))
            if key == "tracestate":
                members = (member.strip().partition("=") for member in value.split(","))
                layer = max(layer, next((_attempt(said) for name, _, said in members if name == STATE), 0))
    return layer, carriers


def fields_of(metadata: Any) -> list[tuple[bytes, bytes]]:
    """Metadata as HTTP has them."""
    return [
        (key.encode(), value.encode("latin-1", "replace") if isinstance(value, str) else value) for key, value in metadata or ()
    ]


def address_of(peer: str) -> str:
    """`ipv4:127.0.0.1:50051`, `ipv6:%5B::1%5D:50051`: the address alone; "" for a socket without one."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


def _attempt(value: Any) -> int:
    """What can't be read counts as a retry: then we don't retry too."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 4 else 1


class Visit:
    """One call inside: what its handler sees by context variables, and what is noted at its end."""

    __slots__ = ("_entry", "_headers", "_layer", "_peer", "_seen", "_span", "_tokens", "_way", "refusal")

    def __init__(
        self,
        way: InboundWay,
        entry: core.Entry,
        span: Any,
        refusal: tuple[grpc.StatusCode, str] | None,
        peer: Peer,
        layer: int,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._way = way
        self._entry = entry
        self._span = span
        self._peer = peer
        self._layer = layer
        self._tokens: Any = None
        # As the handler sees it.
        self._seen: Any = None
        self._headers = headers
        self.refusal = refusal

    async def consult(self) -> None:
        """Ask the authorizer of a CUSTOM rule, if there is one; its no is a refusal."""
        if self.refusal is None and self._entry.custom and not await self._way.consent(self._entry, self._peer, self._headers):
            self._refused()

    def consult_blocking(self) -> None:
        """The same for threads."""
        if self.refusal is None and self._entry.custom and not self._way.consent_blocking(self._entry, self._peer, self._headers):
            self._refused()

    def _refused(self) -> None:
        self.refusal = refusal(self._entry)
        if self._span is not None:
            self._span.end(self._entry.status, _Ended(self.refusal[0]))

    def begin(self) -> None:
        """Set the context of the handler."""
        self._seen = visit_of(self._entry, self._peer, self._headers, self._layer)
        self._tokens = step_in(self._seen)
        if self._span is not None:
            self._span.__enter__()

    def end(self, code: grpc.StatusCode) -> None:
        """The handler ended with a code: its place is free for another, and its thread as it was found."""
        number: int = code.value[0]
        self._way.leave(self._entry, number)
        if self._seen is not None:
            self._seen.end = None  # what runs on has time of its own
        if self._span is not None:
            self._span.end(number, None if code is grpc.StatusCode.OK else _Ended(code))
        tokens, self._tokens = self._tokens, None
        if tokens is not None:
            try:
                step_out(tokens)
            except ValueError:
                pass  # a stream that was dropped in another context, which never was the handler's


class _Ended(Exception):  # never raised: a span asks it for a code
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__()
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


class MeshInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The inbound way in a `grpc.aio.server`."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        handler = await continuation(handler_call_details) if EXACT.fullmatch(method) else None
        return wrap(self._reception, method, handler, is_aio=True)


class MeshSyncInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The inbound way in a `grpc.server`."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        handler = continuation(handler_call_details) if EXACT.fullmatch(method) else None
        return wrap(self._reception, method, handler, is_aio=False)


def wrap(reception: Reception, method: str, handler: Any, *, is_aio: bool) -> Any:
    """A handler that takes the call in, hands it to the application's, and sees it out. None stands for an unknown method."""
    if handler is None:
        passage = _Passage(reception, method, None, None)
        nobody = passage.nobody_aio if is_aio else passage.nobody
        return grpc.stream_stream_rpc_method_handler(nobody)
    is_unary_in, is_unary_out = not handler.request_streaming, not handler.response_streaming
    inner = (
        (handler.unary_unary if is_unary_out else handler.unary_stream)
        if is_unary_in
        else (handler.stream_unary if is_unary_out else handler.stream_stream)
    )
    # One request message is parsed after the caller was let in; those of a stream are parsed when the handler asks for them.
    passage = _Passage(reception, method, inner, handler.request_deserializer if is_unary_in else None)
    outer: Any
    if not is_aio or not (inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)):
        outer = passage.respond if is_unary_out else passage.stream
    elif inspect.isasyncgenfunction(inner):
        outer = passage.stream_aio
    else:
        outer = passage.respond_aio  # one message, or none where it writes them into the context
    make = (
        (grpc.unary_unary_rpc_method_handler if is_unary_out else grpc.unary_stream_rpc_method_handler)
        if is_unary_in
        else (grpc.stream_unary_rpc_method_handler if is_unary_out else grpc.stream_stream_rpc_method_handler)
    )
    return make(outer, None if is_unary_in else handler.request_deserializer, handler.response_serializer)


class _Passage:
    """One method's way in and out. The four faces differ in how they wait and in how they hand on messages."""

    __slots__ = ("_inner", "_method", "_parse", "_reception")

    def __init__(self, reception: Reception, method: str, inner: Any, parse: Any) -> None:
        self._reception = reception
        self._method = method
        self._inner = inner
        self._parse = parse

    async def respond_aio(self, request: Any, context: Any) -> Any:
        visit = self._reception.enter(self._method, context)
        await visit.consult()
        if visit.refusal is not None:
            await context.abort(*visit.refusal)
        try:
            visit.begin()
            response = await self._inner(await self._parsed_aio(request, context), context)
        except BaseException as error:
            visit.end(code_of(context, error))
            raise
        visit.end(code_of(context, None))
        return response

    async def stream_aio(self, request: Any, context: Any) -> Any:
        visit = self._reception.enter(self._method, context)
        await visit.consult()
        if visit.refusal is not None:
            await context.abort(*visit.refusal)
        try:
            visit.begin()
            async for response in self._inner(await self._parsed_aio(request, context), context):
                yield response
        except BaseException as error:
            visit.end(code_of(context, error))
            raise
        visit.end(code_of(context, None))

    async def nobody_aio(self, request: Any, context: Any) -> None:
        visit = self._reception.enter(self._method, context)
        if visit.refusal is None:
            visit.end(UNKNOWN_METHOD[0])
        await context.abort(*(visit.refusal or UNKNOWN_METHOD))

    def respond(self, request: Any, context: Any) -> Any:
        visit = self._reception.enter(self._method, context)
        visit.consult_blocking()
        if visit.refusal is not None:
            context.abort(*visit.refusal)
        try:
            visit.begin()
            response = self._inner(self._parsed(request, context), context)
        except BaseException as error:
            visit.end(code_of(context, error))
            raise
        visit.end(code_of(context, None))
        return response

    def stream(self, request: Any, context: Any) -> Any:
        visit = self._reception.enter(self._method, context)
        visit.consult_blocking()
        if visit.refusal is not None:
            context.abort(*visit.refusal)
        try:
            visit.begin()
            yield from self._inner(self._parsed(request, context), context)
        except BaseException as error:
            visit.end(code_of(context, error))
            raise
        visit.end(code_of(context, None))

    def nobody(self, request: Any, context: Any) -> Any:
        visit = self._reception.enter(self._method, context)
        if visit.refusal is None:
            visit.end(UNKNOWN_METHOD[0])
        context.abort(*(visit.refusal or UNKNOWN_METHOD))
        yield b""

    def _parsed(self, request: Any, context: Any) -> Any:
        if self._parse is None:
            return request
        try:
            return self._parse(request)
        except Exception:
            log.info("a request to %s can't be parsed", shown(self._method), exc_info=True)
        context.abort(*UNREADABLE)

    async def _parsed_aio(self, request: Any, context: Any) -> Any:
        if self._parse is None:
            return request
        try:
            return self._parse(request)
        except Exception:
            log.info("a request to %s can't be parsed", shown(self._method), exc_info=True)
        await context.abort(*UNREADABLE)


def refusal(entry: core.Entry) -> tuple[grpc.StatusCode, str]:
    """What a caller is told of a refusal: words that never change, so that they tell nothing."""
    if entry.reason.startswith("secure.") and entry.status not in (401, 403):
        return UNKNOWN_METHOD
    return REFUSALS.get(entry.status, OTHERWISE)


def code_of(context: Any, error: BaseException | None) -> grpc.StatusCode:
    """How a handler ended: by the code that it set, or by what it raised."""
    # In an asyncio server, a blocking handler's context does not tell the code.
    told: Any = context.code() if hasattr(context, "code") else None
    code: grpc.StatusCode | None = _CODES.get(told) if isinstance(told, int) else told
    if error is None:
        return code or grpc.StatusCode.OK
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        is_late = context.time_remaining() == 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
    return code or grpc.StatusCode.UNKNOWN


_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
