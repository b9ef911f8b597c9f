"""Some calls with OpenTelemetry's SDK, in a process of their own since the SDK is set up once: prints the spans as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

sys.path.insert(0, str(Path(__file__).parent))
from grpc_world import COUNT, ECHO, FAIL, Shop, yaml_of

from meshlib.client.grpc import open_channel

memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)


async def main(folder: Path) -> None:
    shop = Shop(folder, yaml_of(more="retry: {attempts: 1, backoff: [0.001, 0.002]}"))
    backends = [await shop.start("a"), await shop.start("b")]
    party = shop.party("storefront").knows([backend.address for backend in backends])
    async with open_channel(party, "inventory", idempotent=["/shop.Inventory/*"]) as channel:
        await channel.unary_unary(ECHO)(b"")
        with contextlib.suppress(grpc.RpcError):
            await channel.unary_unary(FAIL)(b"UNAVAILABLE")
        async for _ in channel.unary_stream(COUNT)(b"2"):
            pass
    await shop.stop()
    print(json.dumps([told(span) for span in sorted(memory.get_finished_spans(), key=lambda span: span.start_time or 0)]))


def told(span: object) -> dict[str, str]:
    parent = span.parent
    return {
        "name": span.name,
        "kind": span.kind.name,
        "trace": f"{span.context.trace_id:032x}",
        "id": f"{span.context.span_id:016x}",
        "parent": f"{parent.span_id:016x}" if parent else "",
        "code": str(span.attributes.get("rpc.response.status_code", "")),
    }


asyncio.run(main(Path(sys.argv[1])))
