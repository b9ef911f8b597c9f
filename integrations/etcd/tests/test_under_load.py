"""Does any call feel what becomes of etcd? A real mesh under load, three real servers, and etcd killed, paused, emptied, garbled."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import meshlib
from integrations.etcd.tests.cluster import Etcd, until
from integrations.etcd.tests.test_edges import CREATED, STREAM
from meshlib.discover import Instance
from tests.support import Scripted, ok, scripted, write_config

pytestmark = [pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed"), pytest.mark.slow]
CALLERS = 4


class Load:
    """Callers without end. A call that fails is kept with its error."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.calls = 0
        self.failed: list[str] = []
        self.served: dict[bytes, int] = {}

    async def drive(self) -> None:
        while True:
            try:
                answer = await self.client.get("http://orders/")
                assert answer.status_code == 200
                self.served[answer.content] = self.served.get(answer.content, 0) + 1
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")
            self.calls += 1
            await asyncio.sleep(0.002)

    async def goes_on(self, seconds: float) -> None:
        before, end = self.calls, time.monotonic() + seconds
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        assert self.calls > before + 50 * seconds


@contextlib.asynccontextmanager
async def garbage(port: int) -> AsyncIterator[None]:
    """Something at etcd's port that says what can't be: no JSON, no base64, a watch that ends in the middle, nothing at all."""
    answers = iter(range(1 << 30))

    async def answer(server: Scripted, request: Any) -> bytes | None:
        bad = (b"<html>", b'{"header": {"revision": "9"}, "kvs": [{"key": "?", "value": 5}]}', b"[" * 1000, b'{"header": {}}')
        if request.line.split()[1] == "/v3/watch":
            return STREAM + CREATED + b'{"result": {"eve'
        return ok(bad[next(answers) % len(bad)])

    async with scripted(answer) as first:
        await first.stop()
        await first.start(port)
        yield


async def test_no_call_fails_whatever_becomes_of_etcd(tmp_path: Path, monkeypatch: Any) -> None:
    """Killed, paused, emptied, restarted, compacted, and replaced by something that talks nonsense; and afterwards a change counts again."""
    monkeypatch.chdir(tmp_path)
    etcd = Etcd(tmp_path)
    etcd.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(etcd.kill)
        servers = []
        for number in range(4):

            async def answer(server: Scripted, request: Any, number: int = number) -> bytes:
                return ok(b"%d" % number)

            servers.append(await stack.enter_async_context(scripted(answer)))
        # What the processes of `orders` do, each for itself.
        registry = etcd.registry(timeout="1s")
        stack.push_async_callback(registry.close)

        async def keep(number: int) -> None:
            instance = Instance("orders", f"o{number}", servers[number].address)
            registration = registry.register(instance, {"ttl": "2s"})
            while True:
                with contextlib.suppress(OSError):
                    await registration.keep()
                await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(keep(number)) for number in range(3)]
        stack.callback(lambda: [task.cancel() for task in tasks])
        await until(lambda: len(etcd.all_keys()), 3)
        registries = {"etcd": {"url": etcd.url, "timeout": "1s", "cache": False}}
        services = {"me": {}, "orders": {"discover": "etcd", "balance": {"policy": "round_robin"}}}
        mesh = meshlib.Mesh.load(write_config(tmp_path, services, registries=registries), service="me")
        stack.callback(mesh.close)
        load = Load(await stack.enter_async_context(mesh.client()))
        tasks += [asyncio.create_task(load.drive()) for _ in range(CALLERS)]
        await until(lambda: len(load.served), 3)

        etcd.kill()
        await load.goes_on(3)
        etcd.start()
        await load.goes_on(2)
        etcd.send(signal.SIGSTOP)
        await load.goes_on(4)
        etcd.send(signal.SIGCONT)
        await load.goes_on(2)
        etcd.empty()
        await load.goes_on(3)
        etcd.compact()
        etcd.put("/meshlib/services/orders/bad", "{")
        await load.goes_on(1)
        etcd.kill()
        async with garbage(etcd.port):
            await load.goes_on(3)
        etcd.start()
        await until(lambda: len([key for key in etcd.all_keys() if key.endswith(("o0", "o1", "o2"))]), 3)
        assert (load.failed, sorted(load.served)) == ([], [b"0", b"1", b"2"])
        (row,) = (row for row in mesh.directory.stats(time.monotonic()) if row["service"] == "orders")
        assert row["failures"] >= 3  # it was noticed

        # As soon as the directory has asked again, a new endpoint has its part.
        etcd.instance("orders", "o3", servers[3].address)
        await until(lambda: b"3" in load.served, patience=45)
        assert load.failed == []
