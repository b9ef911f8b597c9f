"""How do two processes keep to one limit? Both ask as fast as they can, and Redis grants ten calls to them together.

redis-server --port 6379 --save "" &
python example.py redis://127.0.0.1:6379/0

A service does nothing of this by hand: `store: redis` at a rate in mesh.yaml (there is one beside this file), and the mesh asks before
each call.
"""

import asyncio
import multiprocessing
import os
import sys
import time

from meshlib_redis import open_limiter


async def work(url: str, run: int) -> int:
    """Ask for two seconds, and count what is granted."""
    limiter = open_limiter({"url": url})
    end = time.monotonic() + 2
    granted = 0
    while time.monotonic() < end:
        seconds = await limiter.take_async(f"example:{run}", calls=10, per=60.0, burst=10, timeout=1.0)
        if seconds:
            await asyncio.sleep(0.05)
        else:
            granted += 1
    return granted


def process(job: tuple[str, int]) -> int:
    granted = asyncio.run(work(*job))
    print(f"process {os.getpid()}: {granted} granted", flush=True)
    return granted


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "redis://127.0.0.1:6379/0"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(f"together: {sum(pool.map(process, [(url, os.getpid())] * 2))} granted")


if __name__ == "__main__":
    main()
