"""Does somebody record spans here, and what do ours say?

Spans are made where the application configured OpenTelemetry's SDK, and only there: nothing of OpenTelemetry is
imported otherwise. A CLIENT span stands for each attempt, with the number of the resend, and a SERVER span for each
call that came in, so that a trace shows the retry that metrics only count. Names and attributes are the semantic
conventions'.

Where one of OpenTelemetry's own instrumentations has made the span already, or instrumentation is suppressed (an
exporter at work), we make none. Bodies, headers, baggage and the values of queries are never attributes. Metrics are
not made here: see `prometheus.py`.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final

from . import names
from .trace import TRACEPARENT, TRACESTATE, Headers, Trace, traceparent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger("meshlib.observe")

_SDK: Final = "opentelemetry.sdk.trace"
_CONTRIB: Final = "opentelemetry.instrumentation."
_PLAIN_SUPPRESS: Final = "suppress_instrumentation"  # the key of older instrumentations

_provider: Any = None
_tracer: Tracer | None = None


def tracer() -> Tracer | None:
    """The tracer, if the application configured an SDK. Asked for every call, so it is found without an import."""
    global _provider, _tracer
    if _SDK not in sys.modules:
        return None
    api = sys.modules["opentelemetry.trace"]
    provider = api.get_tracer_provider()
    if provider is not _provider:
        is_real = not isinstance(provider, api.ProxyTracerProvider | api.NoOpTracerProvider)
        _tracer = provider.get_tracer("meshlib") if is_real else None
        _provider = provider
    return _tracer


class ClientSpan:
    """One attempt. `headers` name it as the parent of what the other side does."""

    __slots__ = ("_is_over", "_is_rpc", "_span", "headers")

    def __init__(self, span: Span, is_rpc: bool, baggage: Headers) -> None:
        self._span = span
        self._is_rpc = is_rpc
        self._is_over = False
        self.headers = [*_headers_of(span), *baggage]

    def end(self, status: int, error: BaseException | None = None, resumed: bool | None = None) -> None:
        """The head came with a status, or (0) no answer came. Only the first end counts.

        `resumed` tells of a TLS handshake that was made for this attempt: was a session taken up again?
        """
        if self._is_over:
            return
        self._is_over = True
        if resumed is not None:
            self._span.set_attribute(names.TLS_RESUMED, resumed)
        _end(self._span, status, error, is_rpc=self._is_rpc, failing=400)


class ServerSpan:
    """One call that came in, as a context manager; the handler's spans and calls are its children.

    Tell the `status` before the end, or call `end`. An exception that goes through is the error.
    """

    __slots__ = ("_context", "_is_over", "_is_rpc", "_span", "_token", "_trace", "status")

    def __init__(self, span: Span, context: Context, is_rpc: bool, trace: Trace) -> None:
        self.status = 0
        self._trace = trace
        self._span = span
        self._context = context
        self._is_rpc = is_rpc
        self._token: Any = None
        self._is_over = False

    def __enter__(self) -> ServerSpan:
        from opentelemetry import context

        self._trace.__enter__()
        self._token = context.attach(self._context)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(self.status, error)

    def end(self, status: int, error: BaseException | None = None) -> None:
        if self._is_over:
            return
        self._is_over = True
        _end(self._span, status, error, is_rpc=self._is_rpc, failing=500)
        if self._token is not None:
            from opentelemetry import context

            context.detach(self._token)
            self._trace.end(status)


def client_span(
    maker: Tracer,
    method: str,
    authority: str,
    resend_count: int,
    *,
    target: str,
    endpoint: str,
    rpc: str,
    baggage: Headers,
) -> ClientSpan | None:
    """A span for one attempt; None where another instrumentation speaks for it."""
    from opentelemetry import trace

    if is_suppressed() or _made_by_contrib(trace.get_current_span(), trace.SpanKind.CLIENT):
        return None
    host, port = _split(authority)
    attributes: dict[str, Any] = {names.SERVER_ADDRESS: host}
    if port:
        attributes[names.SERVER_PORT] = port
    if rpc:
        title = attributes[names.RPC_METHOD] = rpc.removeprefix("/")
        attributes[names.RPC_SYSTEM] = "grpc"
    else:
        title = _method(attributes, method)
        if target:
            attributes[names.URL_FULL] = f"http://{authority}{redacted(target)}"
    if resend_count:
        attributes[names.HTTP_RESEND_COUNT] = resend_count
    if endpoint:
        address, peer_port = _split(endpoint)
        attributes[names.PEER_ADDRESS] = address
        if peer_port:
            attributes[names.PEER_PORT] = peer_port
    span = maker.start_span(title, kind=trace.SpanKind.CLIENT, attributes=attributes)
    return ClientSpan(span, bool(rpc), baggage)


def server_span(
    maker: Tracer, method: str, route: str, parent: Trace, *, peer: str, path: str, scheme: str, rpc: str
) -> ServerSpan | None:
    """A span for a call that came in, under the parent that its headers name; None where another instrumentation made
    it.
    """
    from opentelemetry import context, trace

    if is_suppressed() or _made_by_contrib(trace.get_current_span(), trace.SpanKind.SERVER):
        return None
    attributes: dict[str, Any] = {}
    if rpc:
        title = attributes[names.RPC_METHOD] = rpc.removeprefix("/")
        attributes[names.RPC_SYSTEM] = "grpc"
    else:
        title = _method(attributes, method)
        if route.startswith("/"):
            attributes[names.HTTP_ROUTE] = route
            title = f"{title} {route}"
        elif route:  # the name of a route of ours is no template
            attributes[names.MESH_ROUTE] = route
        if path:
            attributes[names.URL_PATH] = path
        if scheme:
            attributes[names.URL_SCHEME] = scheme
    if peer:
        attributes[names.MESH_PEER] = peer
    above = context.get_current()
    if not parent.found.is_new:
        above = trace.set_span_in_context(trace.NonRecordingSpan(_context_of(parent)), above)
    span = maker.start_span(title, context=above, kind=trace.SpanKind.SERVER, attributes=attributes)
    return ServerSpan(span, trace.set_span_in_context(span, above), bool(rpc), parent)


def current_headers() -> Headers | None:
    """The headers that name the application's current span; none where instrumentation is suppressed, None without a
    span.
    """
    from opentelemetry import trace

    span = trace.get_current_span()
    # An instrumentation that made the client's span has written its headers, too.
    if is_suppressed() or _made_by_contrib(span, trace.SpanKind.CLIENT):
        return []
    return _headers_of(span) if span.get_span_context().is_valid else None


def is_suppressed() -> bool:
    """Whether somebody asked for no spans in this context, as exporters do for their own calls."""
    from opentelemetry import context

    value = context.get_value
    return bool(
        value(context._SUPPRESS_INSTRUMENTATION_KEY)
        or value(context._SUPPRESS_HTTP_INSTRUMENTATION_KEY)
        or value(_PLAIN_SUPPRESS)
    )


def redacted(target: str) -> str:
    """A request target whose query tells the names of its parameters, and no value."""
    path, mark, query = target.partition("?")
    if not mark:
        return path
    return path + mark + "&".join(f"{part.partition('=')[0]}=REDACTED" for part in query.split("&") if part)


# ---------------------------------------------------------------------- pieces


def _made_by_contrib(span: Any, kind: Any) -> bool:
    scope = getattr(span, "instrumentation_scope", None)
    return getattr(span, "kind", None) is kind and scope is not None and str(scope.name).startswith(_CONTRIB)


def _method(attributes: dict[str, Any], method: str) -> str:
    """Put the method among the attributes, and give the word for the span's name."""
    if method in names.KNOWN_METHODS:
        attributes[names.HTTP_METHOD] = method
        return method
    attributes[names.HTTP_METHOD] = names.OTHER_METHOD
    attributes[names.HTTP_METHOD_ORIGINAL] = method[:64]
    return "HTTP"


def _end(span: Span, status: int, error: BaseException | None, *, is_rpc: bool, failing: int) -> None:
    """Whatever a span processor of the application does here, the call is over and stands."""
    try:
        if span.is_recording():
            _note_end(span, status, error, is_rpc=is_rpc, failing=failing)
        span.end()
    except Exception:
        logger.warning("a span could not be ended; the call is not touched by it", exc_info=True)


def _note_end(span: Span, status: int, error: BaseException | None, *, is_rpc: bool, failing: int) -> None:
    from opentelemetry.trace import Status, StatusCode

    kind = ""
    if is_rpc:
        code = getattr(error, "code", None)
        word = str(getattr(code(), "name", "")) if callable(code) else ""
        if not error or word:
            span.set_attribute(names.RPC_STATUS, word or "OK")
        kind = word
    elif status:
        span.set_attribute(names.HTTP_STATUS, status)
        kind = str(status) if status >= failing else ""
    if error is not None and not kind:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
    if kind:
        span.set_attribute(names.ERROR_TYPE, kind)
        # The message may hold what a user sent: the type is enough, and the application's log has the rest.
        span.set_status(Status(StatusCode.ERROR))


def _headers_of(span: Span) -> Headers:
    found = span.get_span_context()
    headers = [(TRACEPARENT, traceparent(b"%032x" % found.trace_id, b"%016x" % found.span_id, found.trace_flags.sampled))]
    if found.trace_state:
        headers.append((TRACESTATE, found.trace_state.to_header().encode("latin-1", "replace")))
    return headers


def _context_of(trace: Trace) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    found = trace.found
    return SpanContext(
        int(found.trace_id, 16),
        int(found.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED if found.is_sampled else TraceFlags.DEFAULT),
        trace_state=TraceState.from_header([found.state.decode("latin-1")]) if found.state else None,
    )


def _split(address: str) -> tuple[str, int]:
    """Host and port; 0 without one."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return address, 0
    return host.removeprefix("[").removesuffix("]"), int(port)
