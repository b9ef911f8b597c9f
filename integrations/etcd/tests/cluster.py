"""What do tests of etcd need? An etcd of their own that they can stop, kill, empty and start again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from meshlib_etcd import EtcdRegistry, open_registry

from meshlib.discover import Change, Snapshot
from tests.support import free_port

# Generous, since a busy machine is no fault of the code.
PATIENCE = 20.0


class Etcd:
    """A member of its own cluster, in a folder of its own."""

    def __init__(self, folder: Path, *options: str, scheme: str = "http") -> None:
        self.folder = folder
        self.port, self._peers = free_port(), free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._options = options
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        peers = f"http://127.0.0.1:{self._peers}"
        command = [
            *("etcd", "--data-dir", str(self.folder / "data")),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"),
            *("--heartbeat-interval", "20", "--election-timeout", "200", *self._options),
        ]
        with (self.folder / "etcd.log").open("ab") as log:
            self.child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        if self.url.startswith("http:"):
            end = time.monotonic() + PATIENCE
            while not self.is_ready():
                assert time.monotonic() < end and self.child.poll() is None, (self.folder / "etcd.log").read_text()[-2000:]
                time.sleep(0.02)

    def is_ready(self) -> bool:
        try:
            self.ask("kv/range", {"key": text("x")})
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False
        return True

    def ask(self, path: str, question: dict[str, Any], token: str = "") -> dict[str, Any]:
        headers = {"authorization": token} if token else {}
        request = urllib.request.Request(f"{self.url}/v3/{path}", json.dumps(question).encode(), headers)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def put(self, key: str, value: str | dict[str, Any]) -> None:
        self.ask("kv/put", {"key": text(key), "value": text(value if isinstance(value, str) else json.dumps(value))})

    def instance(self, service: str, name: str, address: str, **more: Any) -> None:
        self.put(f"/meshlib/services/{service}/{name}", {"address": address, **more})

    def delete(self, key: str, end: str = "") -> None:
        self.ask("kv/deleterange", {"key": text(key), **({"range_end": text(end)} if end else {})})

    def all_keys(self) -> list[str]:
        from base64 import b64decode

        found = self.ask("kv/range", {"key": text("/"), "range_end": text("0"), "keys_only": True}).get("kvs", [])
        return [b64decode(each["key"]).decode() for each in found]

    def compact(self) -> None:
        revision = self.ask("kv/range", {"key": text("x")})["header"]["revision"]
        self.ask("kv/compaction", {"revision": revision, "physical": True})

    def send(self, what: signal.Signals) -> None:
        assert self.child is not None
        self.child.send_signal(what)

    def kill(self) -> None:
        if self.child is not None:
            self.child.send_signal(signal.SIGCONT)
            self.child.kill()
            self.child.wait()
            self.child = None

    def empty(self) -> None:
        """Start again, with nothing."""
        self.kill()
        shutil.rmtree(self.folder / "data")
        self.start()

    def registry(self, **more: Any) -> EtcdRegistry:
        return open_registry({"url": self.url, **more})


def text(value: str) -> str:
    return b64encode(value.encode()).decode()


class Watcher:
    """What one resolver tells, as a Directory sees it: versions must fit, and a watch that broke is begun again."""

    def __init__(self, resolver: Any, pause: float = 0.05) -> None:
        self.resolver = resolver
        self.pause = pause
        self.endpoints: dict[str, Any] | None = None
        self.version = 0
        self.said: list[Snapshot | Change] = []
        self.errors: list[Exception] = []
        self.confirmed = 0

    async def follow(self) -> None:
        while True:
            try:
                async with contextlib.aclosing(self.resolver.watch()) as told:
                    async for each in told:
                        self.take(each)
            except OSError as error:
                self.errors.append(error)
                await asyncio.sleep(self.pause)

    def take(self, told: Snapshot | Change) -> None:
        if isinstance(told, Snapshot):
            assert told.version > self.version
            assert len({e.address for e in told.endpoints}) == len(told.endpoints)
            self.endpoints = {e.address: e for e in told.endpoints}
        else:
            assert self.endpoints is not None and told.base == self.version
            assert (told.version > told.base) == bool(told.changed or told.gone)
            if not (told.changed or told.gone):
                self.confirmed += 1
            assert set(told.gone) <= self.endpoints.keys() and not set(told.gone) & {e.address for e in told.changed}
            for address in told.gone:
                del self.endpoints[address]
            for endpoint in told.changed:
                assert self.endpoints.get(endpoint.address) != endpoint
                self.endpoints[endpoint.address] = endpoint
        self.version = told.version
        self.said.append(told)

    @property
    def addresses(self) -> list[str] | None:
        return None if self.endpoints is None else sorted(self.endpoints)


@contextlib.asynccontextmanager
async def watching(*resolvers: Any, pause: float = 0.05) -> AsyncIterator[Sequence[Watcher]]:
    watchers = [Watcher(resolver, pause) for resolver in resolvers]
    tasks = [asyncio.create_task(watcher.follow()) for watcher in watchers]
    try:
        yield watchers
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(question: Callable[[], Any], answer: Any = True, patience: float = PATIENCE) -> None:
    """Wait for an event; what it was in the end is what is compared."""
    end = time.monotonic() + patience
    while (found := question()) != answer and time.monotonic() < end:
        await asyncio.sleep(0.01)
    assert found == answer
