"""A backend of the inventory in a process of its own, to be killed: `grpc_backend.py MESH_YAML NAME`. Prints its address."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from grpc_world import Backend, Party


async def main(file: str, name: str) -> None:
    backend = Backend(Party(Path(file), "inventory"), name)
    await backend.listen("127.0.0.1:0")
    print(backend.address, flush=True)
    await backend.server.wait_for_termination()


asyncio.run(main(sys.argv[1], sys.argv[2]))
