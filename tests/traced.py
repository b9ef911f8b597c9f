"""What does one call look like in a trace, when the mesh and OpenTelemetry's instrumentations are around the same application?

`stories(source)` runs, in an interpreter of its own (an SDK can't be taken back), every nesting that the source defines: functions that
are marked `@nesting` and answer an application. Each is called once with the trace of a caller, and once so that the mesh refuses it. The
handler makes a span of its own and calls the next service.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

from tests.support import ROOT

_BEGIN = """
import asyncio, inspect, json, logging, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)

import meshlib
from meshlib.testing import as_peer

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
WEB = "spiffe://shop.internal/ns/default/sa/web"
heard = []


class Next(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        heard.append(self.headers["traceparent"])
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Next)
threading.Thread(target=server.serve_forever, daemon=True).start()
folder = TemporaryDirectory()
file = Path(folder.name) / "mesh.yaml"
file.write_text(json.dumps({
    "mesh": "shop",
    "secure": {"mode": "observe", "trust_domain": "shop.internal"},
    "services": {
        "me": {"route": [{"name": "wares", "match": {"path": {"template": "/wares/{ware}"}}}]},
        "next": {"discover": {"static": [f"127.0.0.1:{server.server_port}"]}},
    },
}))
mesh = meshlib.Mesh.load(file, service="me")
tracer = trace.get_tracer("the application")
nestings = {}


def nesting(make):
    nestings[make.__name__] = make
    return make


async def handle_later():
    with tracer.start_as_current_span("work"):
        async with mesh.client() as http:
            await http.get("http://next/")
    return {}


def handle_now():
    with tracer.start_as_current_span("work"), mesh.sync_client() as http:
        http.get("http://next/")
    return {}
"""
_END = """
def call(app, path):
    headers = {"traceparent": CALLER, "tracestate": "a=b"}
    if not hasattr(app, "wsgi_app") and inspect.iscoroutinefunction(getattr(app, "__call__", app)):
        async def get():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://me") as http:
                return await http.get(path, headers=headers)
        return asyncio.run(get()).status_code
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://me") as http:
        return http.get(path, headers=headers).status_code


def story(app, path):
    memory.clear()
    heard.clear()
    with as_peer(WEB):
        status = call(app, path)
    spans = memory.get_finished_spans()
    names = {f"{span.context.span_id:016x}": span.name for span in spans} | {CALLER[36:52]: "the caller"}
    assert {f"{span.context.trace_id:032x}" for span in spans} <= {CALLER[3:35]}, "another trace"
    return {
        "status": status,
        "next": names.get(heard[0][36:52]) if heard else None,
        "spans": [
            {
                "kind": span.kind.name,
                "name": span.name,
                "by": span.instrumentation_scope.name,
                "under": names.get(f"{span.parent.span_id:016x}") if span.parent else None,
                "route": span.attributes.get("http.route"),
                "peer": span.attributes.get("meshlib.peer"),
            }
            for span in spans
        ],
    }


class Logged(logging.Handler):
    def emit(self, record):
        complaints.append(f"{record.name}: {record.getMessage()}")


complaints = []
found = {}
for name, make in nestings.items():
    handler = Logged(logging.WARNING)
    for source in ("opentelemetry", "meshlib"):
        logging.getLogger(source).addHandler(handler)
    app = make()
    complaints.clear()
    found[name] = {"allowed": story(app, PATH), "refused": story(app, "/wares/%00"), "complaints": list(complaints)}
    for source in ("opentelemetry", "meshlib"):
        logging.getLogger(source).removeHandler(handler)
print(json.dumps(found))
server.shutdown()
"""


def stories(source: str, path: str) -> dict[str, Any]:
    """How each nesting went: `allowed` and `refused`, with all spans, and what was logged."""
    code = f"{_BEGIN}\nPATH = {path!r}\n{textwrap.dedent(source)}\n{_END}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_one_span(story: dict[str, Any], *, by: str, name: str, route: str | None) -> None:
    """One SERVER span, of `by`, and nothing else that stands for the call; the handler's work, its call and the next hop are under it."""
    allowed = story["allowed"]
    # What an instrumentation tells of single messages is no span of the call.
    spans = [span for span in allowed["spans"] if not span["name"].endswith((" http send", " http receive"))]
    spans = [span for span in spans if not span["name"].startswith("fastapi.")]
    assert [(span["kind"], span["name"]) for span in spans] == [("CLIENT", "GET"), ("INTERNAL", "work"), ("SERVER", name)]
    client, work, server = spans
    assert (server["by"], server["under"], server["route"]) == (by, "the caller", route)
    assert work["under"] in (name, "fastapi.endpoint")
    assert (client["by"], client["under"], allowed["next"]) == ("meshlib", "work", "GET")
    refused = [span for span in story["refused"]["spans"] if span["kind"] == "SERVER"]
    assert (allowed["status"], story["refused"]["status"]) == (200, 400)
    assert [span["under"] for span in refused] == ["the caller"]
    assert story["complaints"] == []
