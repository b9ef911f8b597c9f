"""What does a node look like to whoever asks its agent? A CA, entries, and an agent's sockets on a loop of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meshlib.agent.acceptor import Acceptor
from meshlib.agent.attest import Attestor
from meshlib.agent.entries import Entries
from meshlib.agent.grpc import Limits
from meshlib.agent.sockets import open_socket
from meshlib.agent.workload import WorkloadApi
from meshlib.config.agent_policy import EntryPolicy
from meshlib.errors import IdentityError
from meshlib.secure import CertificateAuthority, Identity, Parts, Secret, prove
from meshlib.secure.jwt_svid import TokenKey, jwks

TD = "shop.internal"
PATIENCE = 10.0


def id_of(service: str) -> str:
    return f"spiffe://{TD}/ns/default/sa/{service}"


class Issuer:
    """Identities of a CA in memory, for the entries that a test names; they change when a test says so."""

    def __init__(self, authority: CertificateAuthority | None = None) -> None:
        self.authority = authority or CertificateAuthority.create(None, TD)
        self.identities: dict[str, Identity] = {}
        self.partners: dict[str, bytes] = {}
        self.revoked: dict[str, bytes] = {}
        self.keys = [TokenKey.make()]
        self.coming: set[str] = set()
        self.callbacks: list[Callable[[], None]] = []

    def issue(self, service: str, ttl: float = 3600.0) -> Identity:
        made = self.authority.issue(service, ttl=ttl)
        parts = Parts(made.chain, Secret(made.key), made.bundle, self.revoked.get(TD, b""), self.partners)
        self.identities[service] = prove(parts, made.spiffe_id, time.time())
        self.tell()
        return self.identities[service]

    def withdraw(self, service: str) -> None:
        del self.identities[service]
        self.tell()

    def tell(self) -> None:
        for callback in list(self.callbacks):
            callback()

    def identity_of(self, entry: Any) -> Identity | None:
        return self.identities.get(entry.service)

    def bundles(self) -> Mapping[str, bytes]:
        return {TD: self.authority.bundle, **self.partners}

    def crls(self) -> Mapping[str, bytes]:
        return self.revoked

    async def jwt(self, entry: Any, audiences: Sequence[str]) -> tuple[str, str]:
        if "unavailable" in audiences:
            raise IdentityError("the CA is away")
        return self.keys[-1].issue(id_of(entry.service), audiences), entry.service

    def jwt_bundles(self) -> Mapping[str, bytes]:
        return {TD: jwks([key.jwk for key in self.keys])}

    def may_hear_of(self, trust_domain: str, kid: str) -> bool:
        return trust_domain == TD and kid in self.coming

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)


class Loop:
    """An asyncio loop on a thread of its own, as the agent has one in a process of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(PATIENCE * 2)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()


class Node:
    """An agent with the Workload API alone. By default user `uid` (ours) is `orders`."""

    def __init__(
        self,
        folder: Path,
        entries: Iterable[EntryPolicy] | None = None,
        *,
        issuer: Issuer | None = None,
        limits: Limits | None = None,
        attestor: Callable[[Entries], Attestor] | None = None,
        **bounds: int,
    ) -> None:
        self.folder = folder
        self.path = folder / "agent.sock"
        self.address = f"unix://{self.path}"
        self.issuer = issuer or Issuer()
        given = [EntryPolicy("orders", uid=os.getuid())] if entries is None else list(entries)
        self.entries = Entries(given)
        for entry in given:
            self.issuer.issue(entry.service)
        self.attestor = attestor(self.entries) if attestor else Attestor(self.entries.wants_digest)
        self.limits = limits
        self.bounds = bounds
        self.loop = Loop()
        self.start()

    def start(self) -> None:
        self.listening = open_socket(self.path, 0o666)
        self.loop.run(self._start())

    async def _start(self) -> None:
        self.api = WorkloadApi(self.entries, self.issuer, limits=self.limits)

        async def refused(connection: Any) -> None:
            await self.api.serve(connection, None)

        self.acceptor = Acceptor(
            self.listening.sock,
            self.attestor,
            self.api.serve,
            on_refused=refused,
            knows=self.entries.knows,
            fits=self.entries.of,
            bars=self.api.bars,
            name="workload",
            **self.bounds,
        )
        await self.acceptor.start()

    def stop(self) -> None:
        self.loop.run(self.acceptor.close())
        self.listening.close()

    def close(self) -> None:
        self.stop()
        self.loop.close()


@contextmanager
def node(folder: Path, *args: Any, **kwargs: Any) -> Iterator[Node]:
    made = Node(folder, *args, **kwargs)
    try:
        yield made
    finally:
        made.close()


def until(question: Callable[[], Any], answer: Any = True) -> None:
    """Wait for an event of another thread; what it was in the end is what is compared."""
    end = time.monotonic() + PATIENCE
    while (found := question()) != answer and time.monotonic() < end:
        time.sleep(0.01)
    assert found == answer


def run_as(uid: int, code: str, *arguments: str, executable: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Python code in a process of another user, with our path."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [executable, "-c", textwrap.dedent(code), *arguments],
        user=uid,
        group=uid,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        env=given,
        cwd="/",
        check=False,
    )
