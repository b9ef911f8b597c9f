"""Which scenarios does grpcio's own xDS client pass? `xds_caller.py GENERATED plain|mtls`, with GRPC_XDS_BOOTSTRAP in its environment.

A process of its own, since gRPC takes its bootstrap once for a whole process. It reads lines `aio NAME` and `sync NAME`, and answers each
with a line: `null`, or what was wrong, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from pathlib import Path

import grpc
import grpc.aio
import grpc.experimental

from tests.interop.protocol import compiled
from tests.interop.scenarios_aio import AioScenarios
from tests.interop.scenarios_sync import SyncScenarios

TARGET = "xds:///interop"


def main(generated: str, security: str) -> None:
    protocol = compiled(Path(generated))
    # What the control plane doesn't secure goes in plain text; what it does, by the bootstrap's certificates.
    fallback = grpc.experimental.insecure_channel_credentials()
    credentials = grpc.xds_channel_credentials(fallback) if security == "mtls" else None

    async def aio(name: str) -> None:
        made = grpc.aio.secure_channel(TARGET, credentials) if credentials else grpc.aio.insecure_channel(TARGET)
        async with made as channel:
            await AioScenarios(channel, protocol).run(name)

    def sync(name: str) -> None:
        made = grpc.secure_channel(TARGET, credentials) if credentials else grpc.insecure_channel(TARGET)
        with made as channel:
            SyncScenarios(channel, protocol).run(name)

    for line in sys.stdin:
        kind, name = line.split()
        wrong = None
        try:
            asyncio.run(aio(name)) if kind == "aio" else sync(name)
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps(wrong), flush=True)


main(*sys.argv[1:])
