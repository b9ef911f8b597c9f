"""Does somebody record spans here, and what do ours say?

Spans are made where the application configured OpenTelemetry's SDK, and only there: nothing of OpenTelemetry is
imported otherwise. A CLIENT span stands for each attempt, with the number of the resend, and a SERVER span for each
call that came in, so that a trace shows the retry that metrics only count. Names and attributes are the semantic
conventions'.

One call is one SERVER span, also where others make such spans. An instrumentation that stands around us has made it: we add
what it can't know, who called and our route. One that stands inside (`is_traced_inside`) gets no span of ours around it, under
which it would make a second; it finds the caller's trace in the headers, as without us. No suppression of OpenTelemetry's is
used for that: it would take the spans of the handler's own calls along. Where instrumentation is suppressed (an exporter at
work), we make none either.

Bodies, headers, baggage and the values of queries are never attributes. Metrics are not made here: see `prometheus.py`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any, Final

from . import names
from .trace import TRACEPARENT, TRACESTATE, Headers, Sampler, Trace, current_trace, here, traceparent

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanContext, Tracer

logger = logging.getLogger("meshlib.observe")

_SDK: Final = "opentelemetry.sdk.trace"
_CONTRIB: Final = "opentelemetry.instrumentation."
_PLAIN_SUPPRESS: Final = "suppress_instrumentation"  # the key of older instrumentations
# Where middleware keeps what it stands around: Starlette's, OpenTelemetry's for WSGI, Flask's, decorators' and bound methods'.
_INNER: Final = ("app", "wsgi", "wsgi_app", "application", "__wrapped__", "__self__")
_MOST_LAYERS: Final = 100
# Of a name that a caller made up.
MOST_NAME: Final = 64

# From which status on HTTP's answer is an error, for who asked and for who was asked.
CLIENT_FAILS: Final = 400
SERVER_FAILS: Final = 500

_provider: Any = None
_tracer: Tracer | None = None
# OpenTelemetry's modules, once there is a tracer: an import in a function costs every call of it.
_context: Any = None
_trace: Any = None


def tracer() -> Tracer | None:
    """The tracer, if the application configured an SDK. Asked for every call, so it is found without an import."""
    global _provider, _tracer, _context, _trace
    if _SDK not in sys.modules:
        return None
    api = sys.modules["opentelemetry.trace"]
    provider = api.get_tracer_provider()
    if provider is not _provider:
        is_real = not isinstance(provider, api.ProxyTracerProvider | api.NoOpTracerProvider)
        _tracer = provider.get_tracer("meshlib") if is_real else None
        _context, _trace = importlib.import_module("opentelemetry.context"), api
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

    def messages(self, sent: int, received: int) -> None:
        """How many messages a gRPC call had. To be told before the end."""
        _note_messages(self._span, sent, received)

    def end(self, status: int, error: BaseException | None = None, resumed: bool | None = None, by: str = "") -> None:
        """The head came with a status, or (0) no answer came. Only the first end counts.

        `resumed` tells of a TLS handshake that was made for this attempt: was a session taken up again? `by` says who carried an
        attempt that was delegated.
        """
        if self._is_over:
            return
        self._is_over = True
        if resumed is not None:
            self._span.set_attribute(names.TLS_RESUMED, resumed)
        if by:
            self._span.set_attribute(names.CARRIED_BY, by)
        _end(self._span, status, error, is_rpc=self._is_rpc, failing=CLIENT_FAILS)


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

    def let_go(self) -> None:
        """It ends when nobody knows what runs by then: only a context that is still ours is given back."""
        from opentelemetry import context

        if context.get_current() is not self._context:
            self._token = None

    def messages(self, sent: int, received: int) -> None:
        """How many messages a gRPC call had. To be told before the end."""
        _note_messages(self._span, sent, received)

    def end(self, status: int, error: BaseException | None = None) -> None:
        if self._is_over:
            return
        self._is_over = True
        _end(self._span, status, error, is_rpc=self._is_rpc, failing=SERVER_FAILS)
        if self._token is not None:
            from opentelemetry import context

            context.detach(self._token)
            self._trace.end(status)


class QuietSpan:
    """A call that came in and isn't recorded: no span is made, and what runs on its behalf is told so, and told of which trace it is.

    `observe.sample` decides before the SDK's sampler does, which costs ten times as much as the answer is worth; what it lets
    through, the SDK's sampler may still leave out.
    """

    __slots__ = ("_token", "_trace", "status")

    def __init__(self, parent: Trace) -> None:
        self.status = 0
        self._trace = parent
        self._token: Any = None

    def __enter__(self) -> QuietSpan:
        self._trace.__enter__()
        self._token = quieten()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(self.status, error)

    def let_go(self) -> None:
        """It ends when nobody knows what runs by then: only a context that is still ours is given back."""
        # OpenTelemetry's context is the same for all quiet calls: whose it is, our own trace tells.
        if current_trace.get() is not self._trace:
            self._token = None

    def messages(self, sent: int, received: int) -> None:
        """Nobody records them here."""

    def end(self, status: int, error: BaseException | None = None) -> None:
        token, self._token = self._token, None
        if token is not None:
            unquieten(token)
            self._trace.end(status)


_quiet: Any = None


def quieten() -> Any:
    """Tell what runs from here on that its call is not recorded; None where something around us has a span.

    All such calls share one context: which trace they are of is found when somebody asks, by the call that runs then. Give back what is
    returned to `unquieten`.
    """
    global _quiet
    if _trace.get_current_span() is not _trace.INVALID_SPAN:
        return None
    if _quiet is None:
        from opentelemetry.trace import NonRecordingSpan

        class Quiet(NonRecordingSpan):
            def __init__(self) -> None:
                pass

            def get_span_context(self) -> SpanContext:
                trace = here(_sampler)
                return _trace.INVALID_SPAN_CONTEXT if trace is None else _context_of(trace)  # type: ignore[no-any-return]

            def __repr__(self) -> str:
                return "<Quiet>"

        _quiet = _trace.set_span_in_context(Quiet(), _context.Context())
    return _context.attach(_quiet)


def unquieten(token: Any) -> None:
    _context.detach(token)


# Of traces that have no name yet; those that a quiet call begins are not recorded, whatever it would say.
_sampler: Final = Sampler(0.0)


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
    maker: Tracer, method: str, route: str, parent: Trace, *, peer: str, path: str, scheme: str, rpc: str, is_known: bool = True
) -> ServerSpan | QuietSpan | None:
    """A span for a call that came in, under the parent that its headers name; None where another instrumentation made
    it.
    """
    context, trace = _context, _trace
    around = trace.get_current_span()
    if around is trace.INVALID_SPAN and not parent.is_sampled:
        return QuietSpan(parent)
    if is_suppressed():
        return None
    if _made_by_contrib(around, trace.SpanKind.SERVER):
        _add_ours(around, route, peer)
        return None
    if isinstance(around, trace.NonRecordingSpan) and _is_local(around):
        return None  # made around us, and not to be recorded
    attributes: dict[str, Any] = {}
    if rpc:
        title = attributes[names.RPC_METHOD] = rpc.removeprefix("/") if is_known else names.OTHER_METHOD
        attributes[names.RPC_SYSTEM] = "grpc"
        if not is_known:
            # Callers choose it: as a name it would be as many names as they like.
            attributes[names.RPC_METHOD_ORIGINAL] = rpc.removeprefix("/")[:MOST_NAME]
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


def is_traced_inside(app: Any) -> bool:
    """Does something make a SERVER span for each call further in: an instrumentation of OpenTelemetry's, or the framework itself?

    Told by the modules of the layers and by the marks that instrumentations leave on applications, which no public interface tells.
    What is mounted somewhere below isn't seen.
    """
    seen: set[int] = set()
    layers = [app]
    try:
        while layers and len(seen) < _MOST_LAYERS:
            layer = layers.pop()
            if layer is None or id(layer) in seen:
                continue
            seen.add(id(layer))
            if _makes_spans(layer):
                return True
            layers += [getattr(layer, name, None) for name in _INNER]
    except Exception:
        logger.debug("an application can't be looked through", exc_info=True)  # a proxy of something that isn't there yet
    return False


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


def _makes_spans(layer: Any) -> bool:
    if _is_contrib(layer) or getattr(layer, "_is_instrumented_by_opentelemetry", False) is True:
        return True
    own = getattr(layer, "_telemetry", None)  # FastAPI's own tracing, in newer versions
    if isinstance(own, dict) and own.get("tracing") is True:
        return True
    added = getattr(layer, "user_middleware", None)  # Starlette's, before its first call
    if isinstance(added, list) and any(_is_contrib(getattr(each, "cls", None)) for each in added):
        return True
    return str(getattr(layer, "__module__", "")).startswith("django.") and _is_django_traced()


def _is_contrib(layer: Any) -> bool:
    return str(getattr(layer, "__module__", None) or "").startswith(_CONTRIB)


def _is_django_traced() -> bool:
    settings = getattr(sys.modules.get("django.conf"), "settings", None)
    try:
        return any(str(name).startswith(_CONTRIB) for name in getattr(settings, "MIDDLEWARE", ()))
    except Exception:
        return False  # not configured


def _is_local(span: Span) -> bool:
    found = span.get_span_context()
    return found.is_valid and not found.is_remote


def _add_ours(span: Any, route: str, peer: str) -> None:
    """To the span that an instrumentation around us has made: who called, and the route, as far as it says none."""
    if not span.is_recording():
        return
    if peer:
        span.set_attribute(names.MESH_PEER, peer)
    if route and not route.startswith("/"):
        span.set_attribute(names.MESH_ROUTE, route)
    elif route and names.HTTP_ROUTE not in (getattr(span, "attributes", None) or ()):
        span.set_attribute(names.HTTP_ROUTE, route)
        span.update_name(f"{str(span.name).partition(' ')[0]} {route}")


def _made_by_contrib(span: Any, kind: Any) -> bool:
    scope = getattr(span, "instrumentation_scope", None)
    return getattr(span, "kind", None) is kind and scope is not None and str(scope.name).startswith(_CONTRIB)


def _method(attributes: dict[str, Any], method: str) -> str:
    """Put the method among the attributes, and give the word for the span's name."""
    if method in names.KNOWN_METHODS:
        attributes[names.HTTP_METHOD] = method
        return method
    attributes[names.HTTP_METHOD] = names.OTHER_METHOD
    attributes[names.HTTP_METHOD_ORIGINAL] = method[:MOST_NAME]
    return "HTTP"


def _end(span: Span, status: int, error: BaseException | None, *, is_rpc: bool, failing: int) -> None:
    """Whatever a span processor of the application does here, the call is over and stands."""
    try:
        if span.is_recording():
            _note_end(span, status, error, is_rpc=is_rpc, failing=failing)
        span.end()
    except Exception:
        logger.warning("a span could not be ended; the call is not touched by it", exc_info=True)


def _note_messages(span: Span, sent: int, received: int) -> None:
    try:
        span.set_attribute(names.MESSAGES_SENT, sent)
        span.set_attribute(names.MESSAGES_RECEIVED, received)
    except Exception:
        logger.warning("a span could not be told of its messages; the call is not touched by it", exc_info=True)


def _note_end(span: Span, status: int, error: BaseException | None, *, is_rpc: bool, failing: int) -> None:
    from opentelemetry.trace import Status, StatusCode

    kind = ""
    if is_rpc:
        code = getattr(error, "code", None)
        word = str(getattr(code(), "name", "")) if callable(code) else ""
        if not error or word:
            span.set_attribute(names.RPC_STATUS, word or "OK")
        if word and failing == SERVER_FAILS and word not in names.GRPC_FAULTS:
            return
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
