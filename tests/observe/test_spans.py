"""Where the application configured OpenTelemetry's SDK, a trace shows every attempt, and nothing twice."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import grpc, logging
from opentelemetry import trace, context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from meshlib.observe import Observer
memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)
observer = Observer(service="orders")
PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PEER = "spiffe://shop.internal/ns/default/sa/storefront"
def spans():
    return memory.get_finished_spans()
def one():
    (span,) = spans()
    return span
"""


def run(source: str) -> None:
    """Global state of an SDK can't be taken back: each case has an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", PRELUDE + textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_attempt_is_a_client_span_with_its_number() -> None:
    """One CLIENT span per attempt; the headers name it as the parent; from the second send on it has the resend count."""
    run(
        """
        for attempt, status in ((0, 503), (1, 200)):
            span = observer.client_span("GET", "orders", attempt, target="/items/7?token=secret&x=1", endpoint="10.0.0.1:80")
            headers = observer.client_headers()
            span.end(status)
            done = spans()[-1]
            assert headers == [(b"traceparent", b"00-%032x-%016x-01" % (done.context.trace_id, done.context.span_id))]
        first, second = spans()
        assert (first.name, first.kind) == ("GET", SpanKind.CLIENT)
        assert dict(first.attributes) == {
            "http.request.method": "GET", "server.address": "orders", "http.response.status_code": 503, "error.type": "503",
            "url.full": "http://orders/items/7?token=REDACTED&x=REDACTED",
            "network.peer.address": "10.0.0.1", "network.peer.port": 80,
        }, dict(first.attributes)
        assert first.status.status_code is StatusCode.ERROR
        assert second.attributes["http.request.resend_count"] == 1
        assert "error.type" not in second.attributes
        """
    )


def test_failed_attempt_tells_the_kind_of_error_and_not_its_text() -> None:
    """error.type is the exception's full name; what the text holds may be a user's."""
    run(
        """
        from meshlib.errors import ConnectFailed
        span = observer.client_span("FROB", "orders:8080")
        span.end(0, ConnectFailed("secret"))
        span.end(200)                                  # only the first end counts
        done = one()
        assert dict(done.attributes) == {
            "http.request.method": "_OTHER", "http.request.method_original": "FROB", "server.address": "orders",
            "server.port": 8080, "error.type": "meshlib.errors.ConnectFailed"}, dict(done.attributes)
        assert "secret" not in done.to_json()
        """
    )


def test_call_that_came_in_is_a_server_span_under_its_caller() -> None:
    """Remote parent, route, peer; the handler's own spans and calls are its children."""
    run(
        """
        headers = [(b"traceparent", PARENT), (b"tracestate", b"a=b"), (b"baggage", b"role=admin")]
        with observer.server_span("GET", "/items/{id}", headers, PEER, path="/items/7", scheme="https") as span:
            with trace.get_tracer("app").start_as_current_span("work"):
                child = observer.client_span("POST", "inventory")
                sent = dict(observer.client_headers())
                child.end(200)
            span.status = 500
        client, work, server = spans()
        assert (server.name, server.kind) == ("GET /items/{id}", SpanKind.SERVER)
        assert "%032x-%016x" % (server.parent.trace_id, server.parent.span_id) == PARENT[3:52].decode()
        assert server.parent.is_remote
        assert dict(server.attributes) == {
            "http.request.method": "GET", "http.route": "/items/{id}", "url.path": "/items/7", "url.scheme": "https",
            "meshlib.peer": PEER, "http.response.status_code": 500, "error.type": "500"}, dict(server.attributes)
        assert server.status.status_code is StatusCode.ERROR
        assert work.parent.span_id == server.context.span_id
        assert client.parent.span_id == work.context.span_id
        assert sent[b"tracestate"] == b"a=b" and sent[b"baggage"] == b"role=admin"
        assert "admin" not in server.to_json() + client.to_json()      # baggage is no attribute
        assert not trace.get_current_span().get_span_context().is_valid
        """
    )


def test_name_of_a_route_is_not_passed_off_as_a_template() -> None:
    """http.route is a path; a name of our own stands under a name of our own."""
    run(
        """
        with observer.server_span("GET", "orders/0", [], None):
            pass
        assert (one().name, dict(one().attributes)) == ("GET", {"http.request.method": "GET", "meshlib.route": "orders/0"})
        """
    )


def test_answer_4xx_is_an_error_of_the_client_and_not_of_the_server() -> None:
    """As the conventions say."""
    run(
        """
        observer.client_span("GET", "orders").end(404)
        with observer.server_span("GET", "/", [], None) as span:
            span.status = 404
        client, server = spans()
        assert client.attributes["error.type"] == "404" and client.status.status_code is StatusCode.ERROR
        assert "error.type" not in server.attributes and server.status.status_code is StatusCode.UNSET
        assert server.parent is None
        """
    )


def test_exception_of_the_handler_is_the_error_of_the_span() -> None:
    """It goes through, and the span ends with its kind."""
    run(
        """
        try:
            with observer.server_span("GET", "/", [], None):
                raise KeyError("secret")
        except KeyError:
            pass
        assert one().attributes["error.type"] == "builtins.KeyError"
        assert "secret" not in one().to_json()
        """
    )


def test_stranger_does_not_switch_recording_on() -> None:
    """The sampled flag of an unproved caller does not reach the SDK's sampler: our own share decides."""
    run(
        """
        observer = Observer(service="orders", sample=0.0)
        with observer.server_span("GET", "/", [(b"traceparent", PARENT)], None):
            pass
        assert spans() == ()
        with observer.server_span("GET", "/", [(b"traceparent", PARENT)], PEER):
            pass
        assert len(spans()) == 1
        """
    )


def test_rpc_spans_speak_of_rpc() -> None:
    """Method and status as gRPC names them."""
    run(
        """
        class Failed(Exception):
            def code(self):
                return grpc.StatusCode.UNAVAILABLE
        observer.client_span("POST", "inventory", 1, rpc="/shop.Inventory/Reserve").end(503, Failed())
        with observer.server_span("POST", "", [], PEER, rpc="/shop.Inventory/Reserve") as span:
            span.status = 200
        client, server = spans()
        assert client.name == server.name == "shop.Inventory/Reserve"
        assert dict(client.attributes) == {
            "rpc.system.name": "grpc", "rpc.method": "shop.Inventory/Reserve", "server.address": "inventory",
            "http.request.resend_count": 1, "rpc.response.status_code": "UNAVAILABLE", "error.type": "UNAVAILABLE"}, dict(client.attributes)
        assert server.attributes["rpc.response.status_code"] == "OK"
        """
    )


def test_a_recorded_span_tells_how_many_messages_there_were() -> None:
    """On both sides; where nothing is recorded, the same word does nothing."""
    run(
        """
        from meshlib.observe.trace import Trace
        client = observer.client_span("POST", "inventory", rpc="/shop.Inventory/Count")
        client.messages(1, 20)
        client.end(0)
        with observer.server_span("POST", "", [], PEER, rpc="/shop.Inventory/Count") as span:
            span.messages(20, 1)
        assert [(span.attributes["meshlib.messages.sent"], span.attributes["meshlib.messages.received"]) for span in spans()] == [
            (1, 20), (20, 1)]
        quiet = Observer(sample=0.0)
        quiet.server_span("POST", "", [], PEER, rpc="/shop.Inventory/Count").messages(1, 1)
        Trace([], quiet.sampler, is_trusted=True).messages(1, 1)
        assert len(spans()) == 2
        """
    )


def test_at_a_server_only_what_is_its_fault_is_an_error() -> None:
    """As the conventions have it: a client that asks for what isn't there has not broken the server."""
    run(
        """
        class Ended(Exception):
            def __init__(self, code):
                self.code = lambda: code
        for name in ("NOT_FOUND", "PERMISSION_DENIED", "INTERNAL", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"):
            code = grpc.StatusCode[name]
            span = observer.server_span("POST", "", [], PEER, rpc="/shop.Inventory/Count")
            span.end(code.value[0], Ended(code))
        assert [(s.attributes["rpc.response.status_code"], s.attributes.get("error.type"), s.status.status_code.name) for s in spans()] == [
            ("NOT_FOUND", None, "UNSET"),
            ("PERMISSION_DENIED", None, "UNSET"),
            ("INTERNAL", "INTERNAL", "ERROR"),
            ("UNIMPLEMENTED", "UNIMPLEMENTED", "ERROR"),
            ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", "ERROR"),
        ]
        """
    )


def test_instrumentation_of_others_leaves_nothing_for_us_to_make() -> None:
    """No CLIENT span under the contrib client's, no SERVER span under the contrib server's; its trace is carried on."""
    run(
        """
        contrib = trace.get_tracer("opentelemetry.instrumentation.httpx")
        with contrib.start_as_current_span("GET", kind=SpanKind.CLIENT):
            assert observer.client_span("GET", "orders") is None
            assert observer.client_headers() == []     # it has written them
        contrib = trace.get_tracer("opentelemetry.instrumentation.asgi")
        with contrib.start_as_current_span("GET /", kind=SpanKind.SERVER) as theirs:
            with observer.server_span("GET", "/", [(b"traceparent", PARENT)], PEER):
                span = observer.client_span("GET", "orders")
                span.end(200)
        client = spans()[1]
        assert client.parent.span_id == theirs.get_span_context().span_id
        assert [s.kind for s in spans()] == [SpanKind.CLIENT, SpanKind.CLIENT, SpanKind.SERVER]
        """
    )


def test_span_that_was_made_around_us_and_is_not_recorded_is_not_made_again() -> None:
    """The application's sampler has said no; only a caller's context that somebody put in place is a parent and no answer."""
    run(
        """
        def around(is_remote):
            found = trace.SpanContext(int(PARENT[3:35], 16), int(PARENT[36:52], 16), is_remote, trace.TraceFlags(not is_remote))
            return trace.use_span(trace.NonRecordingSpan(found))
        with around(False), observer.server_span("GET", "/", [], PEER):
            assert dict(observer.client_headers())[b"traceparent"] == PARENT
        assert spans() == ()
        with around(True), observer.server_span("GET", "/", [(b"traceparent", PARENT)], PEER):
            pass
        assert one().parent.span_id == int(PARENT[36:52], 16)
        """
    )


def test_span_that_was_made_around_us_is_told_what_we_know() -> None:
    """Who called, and the template if it says none; what it says already stays."""
    run(
        """
        contrib = trace.get_tracer("opentelemetry.instrumentation.asgi")
        with contrib.start_as_current_span("GET /items/7", kind=SpanKind.SERVER):
            with observer.server_span("GET", "/items/{id}", [], PEER):
                pass
        theirs = {"http.route": "/theirs/{id}"}
        with contrib.start_as_current_span("GET /theirs/{id}", kind=SpanKind.SERVER, attributes=theirs):
            with observer.server_span("GET", "/items/{id}", [], None):
                pass
        with contrib.start_as_current_span("GET", kind=SpanKind.SERVER):
            with observer.server_span("GET", "orders/0", [], None):
                pass
        assert [(span.name, dict(span.attributes)) for span in spans()] == [
            ("GET /items/{id}", {"meshlib.peer": PEER, "http.route": "/items/{id}"}),
            ("GET /theirs/{id}", theirs),
            ("GET", {"meshlib.route": "orders/0"}),
        ]
        """
    )


def test_span_of_a_call_that_was_forgotten_leaves_the_context_of_others_alone() -> None:
    """A body that nobody closed is ended by the collector, perhaps in the middle of somebody else's call; and perhaps not."""
    run(
        """
        import contextvars
        from meshlib.observe.trace import current_trace
        def case(share):
            observer = Observer(service="orders", sample=share)
            forgotten = observer.server_span("GET", "/forgotten", [], None).__enter__()
            other = observer.server_span("GET", "/other", [], None).__enter__()
            here = trace.get_current_span(), current_trace.get()
            forgotten.let_go()
            forgotten.end(200)
            assert (trace.get_current_span(), current_trace.get()) == here
            other.end(200)
        def alone(share):
            forgotten = Observer(service="orders", sample=share).server_span("GET", "/alone", [], None).__enter__()
            forgotten.let_go()
            forgotten.end(200)
            assert (trace.get_current_span(), current_trace.get()) == (trace.INVALID_SPAN, None)
        for share in (1.0, 0.0):
            contextvars.copy_context().run(case, share)
            contextvars.copy_context().run(alone, share)
        assert [span.name for span in spans()] == ["GET /forgotten", "GET /other", "GET /alone"]
        """
    )


def test_observer_knows_the_templates_of_our_routes() -> None:
    """The gate names the route; its span tells what the route matches, unless it matches no path."""
    run(
        """
        from types import SimpleNamespace as N
        def route(name, **path):
            return N(name=name, match=N(path=N(**{"exact": "", "template": "", "prefix": "", **path}) if path else None))
        routes = [route("ware", template="/wares/{ware}"), route("all", prefix="/static/"), route("batch")]
        observer.use(N(own=N(routes=routes)))
        for name in ("ware", "all", "batch", "-"):
            observer.server_span("GET", name, [], None).__enter__().end(200)
        assert [(span.name, span.attributes.get("http.route")) for span in spans()] == [
            ("GET /wares/{ware}", "/wares/{ware}"), ("GET /static/*", "/static/*"), ("GET", None), ("GET", None)]
        """
    )


@pytest.mark.parametrize("key", ["context._SUPPRESS_INSTRUMENTATION_KEY", "'suppress_instrumentation'"])
def test_suppressed_instrumentation_is_respected(key: str) -> None:
    """An exporter that sends through the mesh makes no spans about its own sending."""
    run(
        f"""
        token = context.attach(context.set_value({key}, True))
        assert observer.client_span("POST", "collector") is None
        assert observer.client_headers() == []
        with observer.server_span("GET", "/", [], None):
            pass
        context.detach(token)
        assert spans() == ()
        """
    )


def test_broken_processor_of_the_application_breaks_no_call() -> None:
    """What it raises at the end of a span is logged; the call's own outcome stands, and the context is given back."""
    run(
        """
        from opentelemetry.sdk.trace import SpanProcessor
        class Broken(SpanProcessor):
            def on_end(self, span):
                raise RuntimeError("broken")
        lines = []
        class Lines(logging.Handler):
            def emit(self, record):
                lines.append(record.getMessage())
        logging.getLogger("meshlib.observe").addHandler(Lines())
        provider.add_span_processor(Broken())
        observer.client_span("GET", "orders").end(200)
        with observer.server_span("GET", "/", [], None) as span:
            span.status = 200
        assert not trace.get_current_span().get_span_context().is_valid
        assert lines == ["a span could not be ended; the call is not touched by it"] * 2, lines
        """
    )


def test_sdk_that_is_only_imported_makes_no_spans() -> None:
    """Configured means that a provider was set; an import alone is nothing."""
    source = """
import opentelemetry.sdk.trace
from meshlib.observe import Observer
observer = Observer()
print(observer.client_span("GET", "orders"), len(observer.client_headers()))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "None 1\n"


def test_broken_sampler_of_the_application_breaks_no_call() -> None:
    """A failure to observe is logged, and the call goes on without a span."""
    run(
        """
        from opentelemetry.sdk.trace.sampling import Sampler
        class Broken(Sampler):
            def should_sample(self, *a, **k):
                raise RuntimeError("broken")
            def get_description(self):
                return "broken"
        lines = []
        class Lines(logging.Handler):
            def emit(self, record):
                lines.append(record.getMessage())
        logging.getLogger("meshlib.observe").addHandler(Lines())
        provider.sampler = Broken()
        trace._TRACER_PROVIDER = broken = TracerProvider(sampler=Broken())
        assert observer.client_span("GET", "orders") is None
        assert len(observer.client_headers()) == 1
        with observer.server_span("GET", "/", [], None) as span:
            span.status = 200
        assert lines == ["a span could not be made; the call goes on without it"] * 2, lines
        """
    )
