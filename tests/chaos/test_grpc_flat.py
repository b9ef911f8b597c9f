"""Does a process that makes gRPC calls all day grow?

A process of its own makes thousands of calls, most of them unary, with streams, streams that are left, cancelled calls and failing ones
among them, over mutual TLS. What it holds after a warm-up and what it holds at the end must be the same: memory, descriptors, threads,
tasks, and objects that the garbage collector knows.

What gRPC itself leaves behind is not counted: its asyncio channel, without the mesh, keeps about a kilobyte for each call that is cancelled.

By default ten thousand calls with each kind of channel, with `MESHLIB_CHAOS=long` a hundred thousand.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.grpc_shop import IS_LONG, Shop, backends
from tests.support import PYTHON, ROOT, free_port

CALLS, SECONDS = (100_000, 300.0) if IS_LONG else (10_000, 30.0)

# MiB, and Python objects. A hundred bytes that stay behind for each call would be 1 MiB for ten thousand, an object 10,000.
MEMORY, OBJECTS = (6.0, 500) if IS_LONG else (2.5, 500)

# MiB that gRPC keeps for each cancelled call.
KEPT = 1.5 / 1024

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 90)]


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_thousands_of_calls_leave_nothing_behind(tmp_path: Path, kind: str) -> None:
    shop, port = Shop(tmp_path, "inventory"), free_port()
    more: dict[str, Any] = {"route": [{"name": "all"}]}
    config = shop.write({"inventory": [f"127.0.0.1:{port}"]}, **more)
    words = [PYTHON, "-m", "tests.chaos.grpc_flat", str(config), kind, str(CALLS), str(SECONDS)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with backends(config, ("inventory", "aio"), ports=[port]):
        ran = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS + 60, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    said = json.loads(ran.stdout)
    before, after = said["before"], said["after"]
    more_than = {name: after[name] - before[name] for name in before}
    print(f"\n{kind}: {said['done']} calls in {said['seconds']:.0f} s {said['kinds']}; before {before}, more after: {more_than}")
    assert said["wrong"] == []
    assert said["done"] == CALLS
    # Of each kind enough to be seen, if one were left behind.
    assert min(said["kinds"].values()) >= 0.03 * said["done"]
    assert said["in_flight"] == 0
    cancelled = sum(count for name, count in said["kinds"].items() if name.startswith("cancelled"))
    assert more_than["rss"] <= MEMORY + KEPT * cancelled
    assert more_than["objects"] <= OBJECTS
    # One or two may be on their way out at that moment.
    assert max(more_than["descriptors"], more_than["threads"], more_than["tasks"]) <= 2
    assert "Traceback" not in ran.stderr, ran.stderr[-4000:]
