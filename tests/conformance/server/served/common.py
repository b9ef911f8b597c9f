"""What do all applications of the conformance tests answer, whatever they are written in?

Each has the same routes, and answers with what its own framework told it: the path in every place where one may look, the headers by its own
API, who calls by its own means. Two routes show which handler was chosen: `/items/{number}` and everything else. What has to happen in the
middle of a call is done through files of a folder that the tests share with the server, so that nothing depends on time: a handler says
that it is in, and waits until it is let go.

    /items/7, anything    what was seen, as JSON            /sync     the same from a handler of the other colour (async or not)
    /numbers              what the mesh has counted         /thread   what a thread sees that the handler started
    /stream /paced /big   answers in pieces, or large       /slow     answers after some time          /hold  when it is let go
    /boom /half           fails before or in the answer     /late     leaves work behind the answer    /note  what that saw
    /pieces /ignore       reads a body by pieces, or not    /empty    204                              /chat  a conversation
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import meshlib
from meshlib.server.door import door_of

HOME = Path(os.environ.get("CONFORMANCE_HOME", "."))
PIECES = [b"%02d" % index * 500 for index in range(50)]
BIG = bytes(range(256)) * 4096
# Seconds between two looks for a file; and until somebody else has failed.
LOOK, PATIENCE = 0.005, 15.0

MESH: Any = None
# How often the application was started and ended, and how often each of its handlers ran.
LIFE: Counter[str] = Counter()
REACHED: Counter[str] = Counter()
# What was seen behind an answer.
NOTES: list[Any] = []
# Where spans go, if they are recorded.
SPANS: Any = None


def seen(
    *,
    handler: str,
    path: str,
    decoded: dict[str, str],
    quoted: dict[str, str],
    query: str,
    method: str,
    scheme: str,
    headers: list[tuple[str, str]],
    body: Body,
    tls: Any = None,
    own: str | None = None,
) -> dict[str, Any]:
    """What a handler knows. `decoded` and `quoted` are the places where it found a path, `own` is the peer as its framework tells it."""
    REACHED[handler] += 1
    return {
        "handler": handler,
        "path": path,
        "decoded": decoded,
        "quoted": {name: path_in(text) for name, text in quoted.items()},
        "query": query,
        "method": method,
        "scheme": scheme,
        "headers": [[name.lower().replace("_", "-"), value] for name, value in headers],
        "tls": tls,
        "own": own,
        "size": body.size,
        "digest": body.digest,
        **known(),
    }


def known() -> dict[str, Any]:
    """What the mesh tells a handler, or whatever runs for it."""
    peer, call = meshlib.peer(), meshlib.current_call()
    return {
        "peer": peer.spiffe_id if peer is not None else None,
        "serial": peer.serial if peer is not None else None,
        "call": dict(call) if call is not None else None,
        "claims": meshlib.claims(),
        "left": meshlib.remaining(),
        "trace": trace_of_calls(),
    }


def trace_of_calls() -> str | None:
    """To which trace calls that are made here would belong."""
    carried = dict(MESH.observer.carried(SPANS is not None) or ())
    return carried[b"traceparent"].split(b"-")[1].decode() if b"traceparent" in carried else None


def numbers() -> dict[str, Any]:
    """What was counted."""
    door = door_of(MESH)
    load = MESH.gate.load()
    return {
        "gate": MESH.gate.stats(),
        "load": {name: load[name] for name in ("in_flight", "limit", "waiting")},
        "door": {name: getattr(door, name) for name in ("handshakes", "resumed", "failed", "plain", "refused")},
        "life": dict(LIFE),
        "reached": dict(REACHED),
        "metrics": MESH.metrics(),
        "spans": SPANS.taken() if SPANS is not None else None,
    }


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode()


def path_in(url: str) -> str:
    """The path of a URL or of a target, as it is written there."""
    return urlsplit(url).path if "://" in url[:8] else url.partition("?")[0]


def key_headers(environ: dict[str, Any]) -> list[tuple[str, str]]:
    """The headers that a WSGI application finds."""
    keys = [key for key in environ if key.startswith("HTTP_") or key in ("CONTENT_TYPE", "CONTENT_LENGTH")]
    return [(key.removeprefix("HTTP_"), str(environ[key])) for key in keys]


def tls_keys(environ: dict[str, Any]) -> dict[str, Any]:
    # Some servers put the environment of their process in, too.
    return {
        key: value
        for key, value in environ.items()
        if key.startswith(("SSL_CLIENT", "SSL_PROTOCOL", "SSL_CIPHER")) or key == "HTTPS"
    }


def tls_extension(scope: Any) -> dict[str, Any]:
    extension = (scope.get("extensions") or {}).get("tls", {})
    return {name: value for name, value in extension.items() if isinstance(value, str | int | list | tuple)}


def trace_calls() -> None:
    """Record spans, as an application does that has OpenTelemetry's SDK."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    class Spans(InMemorySpanExporter):
        def taken(self) -> list[dict[str, Any]]:
            """Those that ended since the last time."""
            ended = self.get_finished_spans()
            self.clear()
            return [
                {
                    "name": span.name,
                    "kind": span.kind.name,
                    "route": (span.attributes or {}).get("http.route"),
                    "status": (span.attributes or {}).get("http.response.status_code"),
                    "trace": f"{span.context.trace_id:032x}",
                    "parent": f"{span.parent.span_id:016x}" if span.parent else None,
                }
                for span in ended
            ]

    global SPANS
    SPANS = Spans()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(SPANS))
    trace.set_tracer_provider(provider)


class Body:
    """A body that passes by."""

    def __init__(self, whole: bytes = b"") -> None:
        self.size = self.pieces = 0
        self._hash = hashlib.sha256()
        if whole:
            self.add(whole)

    def add(self, piece: bytes) -> None:
        if piece:
            self.size += len(piece)
            self.pieces += 1
            self._hash.update(piece)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


# What happens in the middle of a call. `name` is one of the test.


def rise() -> None:
    LIFE["startup"] += 1


def set_down() -> None:
    """The application ends; nobody can be asked about it any more, so that a file says it."""
    LIFE["shutdown"] += 1
    with (HOME / "ended").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {LIFE['startup']} {LIFE['shutdown']}\n")


def mark(name: str) -> None:
    """Tell the test that this place has been reached."""
    with (HOME / f"{name}.in").open("a", encoding="utf-8") as file:
        file.write("x")


def is_let_go(name: str) -> bool:
    return (HOME / f"{name}.go").exists()


async def until_let_go(name: str) -> None:
    mark(name)
    end = time.monotonic() + PATIENCE
    while not is_let_go(name) and time.monotonic() < end:
        await asyncio.sleep(LOOK)


def until_let_go_blocking(name: str) -> None:
    mark(name)
    end = time.monotonic() + PATIENCE
    while not is_let_go(name) and time.monotonic() < end:
        time.sleep(LOOK)


async def paced(name: str) -> AsyncIterator[bytes]:
    """Two pieces; the second one when the test has the first."""
    yield b"first"
    await until_let_go(name)
    yield b"second"


def paced_blocking(name: str) -> Iterator[bytes]:
    yield b"first"
    until_let_go_blocking(name)
    yield b"second"


async def each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def half() -> AsyncIterator[bytes]:
    yield b"half"
    raise RuntimeError("boom")


def half_blocking() -> Iterator[bytes]:
    yield b"half"
    raise RuntimeError("boom")
