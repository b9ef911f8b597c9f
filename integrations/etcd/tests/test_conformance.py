"""Does etcd's resolver keep to what is asked of every resolver? A real etcd, and meshlib's own check."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from meshlib_etcd import EtcdRegistry

from integrations.etcd.tests.cluster import Etcd
from meshlib.discover import EndpointAddress, Resolver
from meshlib.testing import check_resolver

pytestmark = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed")


class Stage:
    """One etcd for a rule; it fails by being killed, or by being stopped."""

    service = "orders"
    carries = {"weight", "zone", "labels", "identity"}
    is_killed = True

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="meshlib-etcd-")
        self.etcd = Etcd(Path(self._folder.name))
        self.etcd.start()
        self.registry: EtcdRegistry | None = None

    def address(self, n: int) -> str:
        return f"10.0.0.{n}:8443"

    def put(self, *endpoints: EndpointAddress) -> None:
        for each in endpoints:
            more: dict[str, Any] = {
                "weight": each.weight,
                "zone": each.zone,
                "labels": dict(each.labels),
                "identity": each.identity,
            }
            self.etcd.instance(self.service, each.address, each.address, **more)

    def remove(self, *addresses: str) -> None:
        for address in addresses:
            self.etcd.delete(f"/meshlib/services/{self.service}/{address}")

    def fail(self) -> None:
        self.etcd.kill() if self.is_killed else self.etcd.send(signal.SIGSTOP)

    def mend(self) -> None:
        self.etcd.start() if self.is_killed else self.etcd.send(signal.SIGCONT)

    async def open(self) -> Resolver:
        if self.registry is None:
            self.registry = self.etcd.registry(identities=True, timeout="1s")
        return self.registry.resolver(self.service, {})

    async def close_resolver(self) -> None:
        if self.registry is not None:
            await self.registry.close()

    def after_fork(self) -> None:
        assert self.registry is not None
        self.registry.after_fork()

    def close(self) -> None:
        self.etcd.kill()
        self._folder.cleanup()


class Stopped(Stage):
    is_killed = False


@pytest.mark.parametrize("stage", [Stage, Stopped])
def test_resolver_conforms(stage: type[Stage]) -> None:
    """To all nine rules, whether etcd is killed or stands still."""
    assert len(check_resolver(stage, patience=30.0)) == 9


def test_forked_child_says_no_word_on_the_parents_connections(tmp_path: Path) -> None:
    """It forgets them; the parent's watch and lease go on."""
    import asyncio

    from integrations.etcd.tests.cluster import until, watching
    from meshlib.discover import Instance

    etcd = Etcd(tmp_path)
    etcd.start()

    async def main() -> None:
        registry = etcd.registry(timeout="2s")
        registration = registry.register(Instance("orders", "one", "10.0.0.1:80"), {"ttl": "5s"})
        keeping = asyncio.create_task(registration.keep())
        async with watching(registry.resolver("orders", {})) as (seen,):
            await until(lambda: seen.addresses, ["10.0.0.1:80"])
            leases = etcd.ask("lease/leases", {})["leases"]
            status = await asyncio.to_thread(child, registry, registration)
            assert (status, etcd.ask("lease/leases", {}).get("leases")) == (0, leases)
            etcd.instance("orders", "two", "10.0.0.2:80")
            await until(lambda: seen.addresses, ["10.0.0.1:80", "10.0.0.2:80"])
            assert seen.errors == [] and not keeping.done()
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        await registry.close()

    def child(registry: EtcdRegistry, registration: Any) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                registry.after_fork()
                # Leaving in the child takes nothing of the parent's out.
                asyncio.run(registration.leave())
                status = 0 if threading.active_count() == 1 else 2
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    try:
        asyncio.run(main())
    finally:
        with contextlib.suppress(urllib.error.URLError):
            etcd.kill()
