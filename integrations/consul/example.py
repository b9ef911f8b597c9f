"""What becomes of a service in Consul? Watch it for a while, as the mesh does.

consul agent -dev &
python example.py http://127.0.0.1:8500 orders

An instance enters, is seen, and leaves. A service does nothing of this by hand: `discover` and `register` in mesh.yaml (there is one
beside this file), and the mesh does it.
"""

import asyncio
import sys

from meshlib_consul import ConsulRegistry, open_registry

from meshlib.discover import Change, Instance


async def watch(registry: ConsulRegistry, service: str) -> None:
    async for told in registry.resolver(service, {}).watch():
        if isinstance(told, Change):
            for endpoint in told.changed:
                print(f"+ {endpoint.address} weight {endpoint.weight:g} {dict(endpoint.labels)}", flush=True)
            for address in told.gone:
                print(f"- {address}", flush=True)
        else:
            print(f"{service}: {len(told.endpoints)} instances", flush=True)


async def main() -> None:
    url, service = sys.argv[1], sys.argv[2]
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 5.0
    registry = open_registry({"url": url})
    watching = asyncio.create_task(watch(registry, service))
    await asyncio.sleep(seconds / 5)
    entry = registry.register(Instance(service, f"{service}-example", "127.0.0.1:8301", labels={"version": "v2"}), {})
    keeping = asyncio.create_task(entry.keep())
    await asyncio.sleep(seconds * 2 / 5)
    keeping.cancel()
    await entry.leave()
    await asyncio.sleep(seconds * 2 / 5)
    watching.cancel()
    await asyncio.gather(watching, keeping, return_exceptions=True)
    await registry.close()


if __name__ == "__main__":
    asyncio.run(main())
