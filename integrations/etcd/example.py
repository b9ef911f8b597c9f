"""Who serves `orders`, by etcd? Enter two instances, watch what comes and goes, and leave.

etcd &
python example.py http://127.0.0.1:2379

A service does nothing of this by hand: `discover: etcd` and `register: etcd` in mesh.yaml (there is one beside this file), and the mesh looks
services up and enters its own.
"""

import asyncio
import sys

from meshlib_etcd import EtcdRegistry, open_registry

from meshlib.discover import Instance, Snapshot


async def watch(registry: EtcdRegistry) -> None:
    """Tell what etcd tells, until nobody is there any more."""
    was_there = False
    async for told in registry.resolver("orders", {}).watch():
        if isinstance(told, Snapshot):
            print(f"there are {len(told.endpoints)} endpoints", flush=True)
            continue
        for endpoint in told.changed:
            was_there = True
            print(f"{endpoint.address} is there, in zone {endpoint.zone}", flush=True)
        for address in told.gone:
            print(f"{address} is gone", flush=True)
        if was_there and told.gone == ("127.0.0.1:8302",):
            return


async def serve(registry: EtcdRegistry, port: int, seconds: float) -> None:
    """Be there for so long, as a process would that serves."""
    instance = Instance("orders", f"orders-{port}", f"127.0.0.1:{port}", zone="eu-1a")
    registration = registry.register(instance, {"ttl": "5s"})
    keeping = asyncio.create_task(registration.keep())
    await asyncio.sleep(seconds)
    keeping.cancel()
    await registration.leave()


async def main() -> None:
    registry = open_registry({"url": sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:2379"})
    try:
        watching = asyncio.create_task(watch(registry))
        await asyncio.sleep(0.3)
        await asyncio.gather(serve(registry, 8301, 0.5), serve(registry, 8302, 1.0))
        await watching
    finally:
        await registry.close()


if __name__ == "__main__":
    asyncio.run(main())
