"""Where do the peers meet? A folder with a CA, its certificates, configurations of a mesh of four services, and processes of ours.

`interop` is who serves, `caller` who calls, `envoy` the proxy in front of either, and `stranger` somebody whom no rule allows anything.
Everything listens on loopback, on free ports.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

import meshlib
from meshlib.secure.ca import CertificateAuthority
from tests.interop.protocol import Protocol, compiled
from tests.support import PYTHON, process

SERVICE, TRUST_DOMAIN = "interop", "interop.internal"
# The DNS SAN that the mesh's CA writes beside the SPIFFE ID, and the only one that gRPC compares.
DNS_NAME = f"{SERVICE}.default.{TRUST_DOMAIN}"
# What a process of ours says when it does.
LISTENING = "listening on port "
RULE = {
    "name": "interop",
    "from": ["caller", "envoy"],
    "paths": ["/grpc.testing.TestService/*", "/grpc.testing.UnimplementedService/*"],
}


def spiffe_id(service: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}"


class Town:
    """The folder, and what was issued into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generated = folder / "generated"
        generated.mkdir()
        self.protocol: Protocol = compiled(generated)
        self.identities = folder / "identities"
        authority = CertificateAuthority.create(None, TRUST_DOMAIN)
        for service in (SERVICE, "caller", "envoy", "stranger"):
            authority.write(service, self.identities)
        self._numbers = itertools.count()

    def config(self, mode: str, *addresses: str) -> Path:
        """A mesh.yaml, for either side: those are the endpoints of `interop`."""
        secure: dict[str, Any] = {"mode": mode, "trust_domain": TRUST_DOMAIN}
        if mode != "observe":
            secure["identity"] = {"folder": str(self.identities)}
        interop = {
            "protocol": "grpc",
            "discover": {"static": list(addresses) or ["127.0.0.1:1"]},
            "secure": {"allow": [RULE]},
        }
        services = {SERVICE: interop, "caller": {}, "envoy": {}, "stranger": {}}
        file = self.folder / f"mesh-{next(self._numbers)}.yaml"
        file.write_text(json.dumps({"mesh": "interop", "secure": secure, "services": services}))
        return file

    @contextlib.contextmanager
    def mesh(self, mode: str, address: str) -> Iterator[meshlib.Mesh]:
        """The caller's side of the mesh, which knows one endpoint of `interop`."""
        mesh = meshlib.Mesh.load(self.config(mode, address), service="caller")
        try:
            yield mesh
        finally:
            mesh.close()

    @contextlib.contextmanager
    def server(self, kind: str, mode: str = "") -> Iterator[int]:
        """A server of ours in a process of its own (serve.py), ready; gives its port. Without a mode it is grpcio alone."""
        command = (PYTHON, "-m", "tests.interop.serve", kind, str(self.protocol.folder))
        with process(*command, *([str(self.config(mode))] if mode else [])) as child:
            yield port_of(child)

    def pem(self, service: str, name: str) -> Path:
        return self.identities / service / f"{name}.pem"

    def credentials(self, service: str = "caller") -> grpc.ChannelCredentials:
        """A service's, for a client that knows nothing of the mesh."""
        own = [self.pem(service, name).read_bytes() for name in ("bundle", "key", "svid")]
        return grpc.ssl_channel_credentials(*own)


def port_of(child: subprocess.Popen[str], seconds: float = 60.0) -> int:
    """The port that a process of ours says it listens on; AssertionError with its words if it ends before, or takes too long."""
    assert child.stdout is not None
    said = []
    # A reader can't be told to wait no longer, but its writer can be ended.
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        for line in child.stdout:
            if line.startswith(LISTENING):
                return int(line.removeprefix(LISTENING))
            said.append(line)
    finally:
        timer.cancel()
    raise AssertionError(f"{child.args} did not listen within {seconds:g} s: {''.join(said)}")
