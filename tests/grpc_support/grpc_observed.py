"""Calls of all four kinds to a server with OpenTelemetry's SDK, in a process of its own: prints the server's spans as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

sys.path.insert(0, str(Path(__file__).parent))
from grpc_world import CHAT, COUNT, ECHO, FAIL, SUM, Shop, until, yaml_of

memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)


async def main(folder: Path) -> None:
    shop = Shop(folder, yaml_of("observe"))
    backend = await shop.start("a")
    async with grpc.aio.insecure_channel(backend.address) as channel:
        await channel.unary_unary(ECHO)(b"")
        _ = [each async for each in channel.unary_stream(COUNT)(b"3")]
        await channel.stream_unary(SUM)(iter([b"1", b"2"]))
        _ = [each async for each in channel.stream_stream(CHAT)(iter([b"a", b"b"]))]
        for code in (b"NOT_FOUND", b"INTERNAL"):
            with contextlib.suppress(grpc.RpcError):
                await channel.unary_unary(FAIL)(code)
        with contextlib.suppress(grpc.RpcError):
            await channel.unary_unary("/shop.Inventory/Nothing")(b"")
    await until(lambda: len(memory.get_finished_spans()) == 7)
    await shop.stop()
    spans = sorted(memory.get_finished_spans(), key=lambda span: span.start_time or 0)
    print(json.dumps([{"name": span.name, "attributes": dict(span.attributes or {})} for span in spans]))


asyncio.run(main(Path(sys.argv[1])))
