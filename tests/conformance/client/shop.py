"""Which real servers are called, and in which worlds? uvicorn, hypercorn, nginx and Envoy, in plain text and with mutual TLS.

nginx and Envoy stand before the uvicorn of plain text. Each server is started when the first test asks for it, and ends with the session.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import meshlib
from tests.support import PYTHON, free_port, identities, mesh_of, process, wait_until_listening
from tests.wire.envoy import cluster, envoy, listener, tls

SERVERS = ("uvicorn", "hypercorn", "nginx", "envoy")
SECURITY = ("plain", "mtls")
# The options with which a mesh client is made for each version. HTTP/2 joins here: "h2": {"http2": True}
VERSIONS: dict[str, dict[str, Any]] = {"http/1.1": {}, "h2": {"http2": True}}
# Which servers speak it, agreed on in the handshake.
WORLDS = [(server, security, "http/1.1") for server in SERVERS for security in SECURITY]
WORLDS += [(server, "mtls", "h2") for server in ("hypercorn", "nginx", "envoy") if "h2" in VERSIONS]
APPLICATION = "tests.conformance.client.application:app"

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; client_max_body_size 0; client_body_buffer_size 16m; underscores_in_headers on;
  upstream shop {{ server 127.0.0.1:{backend}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{port}{ssl};
    {certificates}
    location / {{
      proxy_pass http://shop; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
      proxy_buffering off; proxy_pass_request_headers on;
    }}
  }}
}}
"""


class Shop:
    """The running servers of one session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._ports: dict[tuple[str, str], int] = {}
        identities(folder, "me", "orders")

    def svid(self, name: str) -> Path:
        return self.folder / "identities" / "orders" / name

    def port(self, server: str, security: str) -> int:
        if (server, security) not in self._ports:
            self._ports[server, security] = getattr(self, "_" + server)(security)
        return self._ports[server, security]

    @property
    def address(self) -> str:
        """The simplest of them."""
        return f"127.0.0.1:{self.port('uvicorn', 'plain')}"

    def close(self) -> None:
        self._stack.close()

    def _start(self, port: int, *command: str) -> int:
        child = self._stack.enter_context(process(*command))
        wait_until_listening(port, child)
        return port

    def _uvicorn(self, security: str) -> int:
        port = free_port()
        files = (
            "--ssl-certfile",
            self.svid("svid.pem"),
            "--ssl-keyfile",
            self.svid("key.pem"),
            "--ssl-ca-certs",
            self.svid("bundle.pem"),
        )
        more = [*map(str, files), "--ssl-cert-reqs", "2"] if security == "mtls" else []
        return self._start(port, PYTHON, "-m", "uvicorn", APPLICATION, "--port", str(port), "--log-level", "critical", *more)

    def _hypercorn(self, security: str) -> int:
        port = free_port()
        files = ("--certfile", self.svid("svid.pem"), "--keyfile", self.svid("key.pem"), "--ca-certs", self.svid("bundle.pem"))
        more = [*map(str, files), "--verify-mode", "CERT_REQUIRED"] if security == "mtls" else []
        return self._start(
            port, PYTHON, "-m", "hypercorn", APPLICATION, "--bind", f"127.0.0.1:{port}", "--log-level", "critical", *more
        )

    def _nginx(self, security: str) -> int:
        binary = shutil.which("nginx") or "/usr/sbin/nginx"
        if not Path(binary).exists():
            pytest.skip("nginx is not installed")
        port, backend = free_port(), self.port("uvicorn", "plain")
        folder = self.folder / f"nginx-{security}"
        folder.mkdir()
        certificates = (
            f"ssl_certificate {self.svid('svid.pem')}; ssl_certificate_key {self.svid('key.pem')};"
            f"ssl_client_certificate {self.svid('bundle.pem')}; ssl_verify_client on; ssl_verify_depth 3;"
        )
        text = NGINX.format(
            folder=folder,
            backend=backend,
            port=port,
            ssl=" ssl http2" if security == "mtls" else "",
            certificates=certificates if security == "mtls" else "",
        )
        (folder / "nginx.conf").write_text(text)
        return self._start(port, binary, "-p", str(folder), "-c", str(folder / "nginx.conf"))

    def _envoy(self, security: str) -> int:
        port, backend = free_port(), self.port("uvicorn", "plain")
        guard = tls(self.folder / "identities", "orders", None, is_server=True) if security == "mtls" else None
        if guard is not None:
            guard["typed_config"]["common_tls_context"]["alpn_protocols"] = ["h2", "http/1.1"]
        route = {"route": {"cluster": "shop", "timeout": "0s"}}
        self._stack.enter_context(envoy(self.folder, [listener(port, route, guard)], [cluster("shop", backend)]))
        wait_until_listening(port)
        return port

    @contextlib.contextmanager
    def mesh(self, folder: Path, server: str, security: str, **more: Any) -> Iterator[meshlib.Mesh]:
        """A mesh whose service `orders` is that server."""
        orders = {"discover": {"static": [f"127.0.0.1:{self.port(server, security)}"]}, **more}
        if security == "mtls":
            shutil.copytree(self.folder / "identities", folder / "identities", dirs_exist_ok=True)
        with mesh_of(folder, {"orders": orders}, mode="enforce" if security == "mtls" else "observe") as mesh:
            yield mesh

    def secured(self, server: str) -> str:
        """Where a plain httpx client finds it behind mutual TLS."""
        return f"https://127.0.0.1:{self.port(server, 'mtls')}"

    def context(self) -> ssl.SSLContext:
        """The client side of mutual TLS, for a client that can't read a SPIFFE ID."""
        folder = self.folder / "identities" / "me"
        context = ssl.create_default_context(cafile=str(folder / "bundle.pem"))
        context.check_hostname = False
        context.load_cert_chain(folder / "svid.pem", folder / "key.pem")
        return context

    def plain(self, server: str) -> str:
        """Where a plain httpx client finds it: under its address, as the host that the mesh's clients say."""
        return f"http://127.0.0.1:{self.port(server, 'plain')}"


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    made = Shop(tmp_path_factory.mktemp("shop"))
    try:
        yield made
    finally:
        made.close()
