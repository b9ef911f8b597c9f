"""What if an agent says something that no agent would? A Workload API that sends any bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshlib.agent import messages
from meshlib.agent.acceptor import Acceptor
from meshlib.agent.attest import Attestor
from meshlib.agent.grpc import Code, Connection, Ended, Method
from meshlib.agent.sockets import open_socket
from meshlib.secure.workload import WorkloadSource
from tests.agent.workload_world import PATIENCE, Loop


def der(pem: bytes) -> bytes:
    return b"".join(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem))


def svid_of(chain: bytes, key: bytes, bundle: bytes, spiffe_id: str) -> Any:
    raw = load_pem_private_key(key, None).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return messages.X509SVID(spiffe_id=spiffe_id, x509_svid=der(chain), x509_svid_key=raw, bundle=der(bundle))


class RawApi:
    """Says to everybody what a test wants, on every stream, and at once when it changes."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix://{folder}/agent.sock"
        self.streams = 0
        self.said: bytes | Code | None = None
        self.loop = Loop()
        self.listening = open_socket(folder / "agent.sock", 0o666)
        self.loop.run(self._start())

    async def _start(self) -> None:
        self.changed = asyncio.Event()

        async def serve(connection: Any, caller: Any) -> None:
            await Connection(connection, {b"/SpiffeWorkloadAPI/FetchX509SVID": Method(self._fetch, is_streaming=True)}).serve()

        self.acceptor = Acceptor(self.listening.sock, Attestor(), serve)
        await self.acceptor.start()

    async def _fetch(self, request: bytes) -> AsyncGenerator[bytes, None]:
        self.streams += 1
        while True:
            changed = self.changed
            if isinstance(self.said, Code):
                raise Ended(self.said, "as the test wants")
            if self.said is not None:
                yield self.said
            await changed.wait()

    def say(self, said: bytes | Code) -> None:
        def change() -> None:
            self.said = said
            changed, self.changed = self.changed, asyncio.Event()
            changed.set()

        self.loop.loop.call_soon_threadsafe(change)

    def close(self) -> None:
        self.loop.run(self.acceptor.close())
        self.listening.close()
        self.loop.close()


class RawWorld:
    """For the conformance check of sources."""

    def __init__(self, folder: Path, spiffe_id: str) -> None:
        self.spiffe_id = spiffe_id
        self.folder = folder / str(len(list(folder.iterdir())))
        self.folder.mkdir()
        self.api = RawApi(self.folder)

    def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
        try:
            made = svid_of(chain, key, bundle, self.spiffe_id)
        except (ValueError, TypeError):
            # PEM that doesn't hold what it should: what is left of it goes over the wire.
            made = messages.X509SVID(spiffe_id=self.spiffe_id, x509_svid=chain, x509_svid_key=key, bundle=bundle)
        self.api.say(messages.X509SVIDResponse(svids=[made]).SerializeToString())

    def source(self) -> WorkloadSource:
        return WorkloadSource(self.api.address, self.spiffe_id, timeout=PATIENCE)

    def close(self) -> None:
        self.api.close()
