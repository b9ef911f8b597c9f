"""How does a call leave for a host outside? As a plain httpx client's does: proxies, roots, options; and no variable captures a Service."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import meshlib
from meshlib.client import egress as outside
from meshlib.client.egress import Egress, roots
from tests.support import Request, Scripted, free_port, mesh_of, ok, scripted

MODULES = pytest.mark.parametrize("module", [httpx, httpx2], ids=lambda m: m.__name__)
KINDS = pytest.mark.parametrize("kind", ["client", "sync_client"])
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(f"{request.method} {request.target}".encode())


class Proxy:
    """An HTTP proxy that answers absolute requests by itself and tunnels CONNECT."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                line = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode()
                self.asked.append(line)
                method, target, _ = line.split(" ")
                if method != "CONNECT":
                    writer.write(ok(b"by proxy"))
                    continue
                port = target.rpartition(":")[2]
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(port))
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
                break
        writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def proxy() -> AsyncIterator[Proxy]:
    made = Proxy()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that nobody else trusts, and a certificate of it for localhost and 127.0.0.1."""
    folder = tmp_path_factory.mktemp("authority")
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, key: Any, issuer: Any, issuer_key: Any, *, is_ca: bool) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        if not is_ca:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(issuer_key or key, hashes.SHA256())

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = build("a root", root_key, None, None, is_ca=True)
    leaf = build("localhost", key, root.subject, root_key, is_ca=False)
    (folder / "root.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "leaf.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    return folder


def server_side(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "leaf.pem", folder / "key.pem")
    return context


async def ask(mesh: meshlib.Mesh, kind: str, module: Any, url: str, **options: Any) -> Any:
    """One call by a new client."""
    if kind == "client":
        async with mesh.client(httpx=module, **options) as http:
            return await http.get(url)

    def blocking() -> Any:
        with mesh.sync_client(httpx=module, **options) as http:
            return http.get(url)

    return await asyncio.to_thread(blocking)


@MODULES
@KINDS
class TestBoth:
    """Both modules, both kinds of client."""

    async def test_answers_and_errors_are_httpx_s_own(self, tmp_path: Path, module: Any, kind: str) -> None:
        """No class of ours, no record of a call."""
        async with scripted(hello) as server:
            with mesh_of(tmp_path, {}) as mesh:
                answer = await ask(mesh, kind, module, f"http://{server.address}/x?y")
                assert (type(answer), answer.text) == (module.Response, "GET /x?y")
                assert "meshlib.call" not in answer.extensions and "network_stream" in answer.extensions
                with pytest.raises(module.ConnectError) as caught:
                    await ask(mesh, kind, module, f"http://127.0.0.1:{free_port()}/")
                assert not isinstance(caught.value, meshlib.MeshError)

    async def test_a_proxy_takes_what_leaves_and_never_a_service(
        self, tmp_path: Path, module: Any, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By variable and by argument; NO_PROXY and trust_env as httpx has them."""
        async with scripted(hello) as server, proxy() as middle:
            with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
                there = f"http://127.0.0.1:{middle.port}"
                for name in ("HTTP_PROXY", "ALL_PROXY"):
                    with monkeypatch.context() as patch:
                        patch.setenv(name, there)
                        assert (await ask(mesh, kind, module, "http://outside.example/x")).text == "by proxy"
                        assert (await ask(mesh, kind, module, "http://orders/x")).text == "GET /x"
                        patch.setenv("NO_PROXY", "127.0.0.1")
                        assert (await ask(mesh, kind, module, f"http://{server.address}/y")).text == "GET /y"
                        assert (await ask(mesh, kind, module, "http://orders/x", trust_env=False)).text == "GET /x"
                        with pytest.raises(module.ConnectError):
                            await ask(mesh, kind, module, "http://outside.invalid/", trust_env=False)
                assert (await ask(mesh, kind, module, "http://outside.example/z", proxy=there)).text == "by proxy"
                assert (await ask(mesh, kind, module, "http://orders/x", proxy=there)).text == "GET /x"
        assert middle.asked == ["GET http://outside.example/x HTTP/1.1"] * 2 + ["GET http://outside.example/z HTTP/1.1"]

    async def test_a_tunnel_and_the_roots_of_a_variable(
        self, tmp_path: Path, module: Any, kind: str, authority: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SSL_CERT_FILE is trusted, without it nobody knows the root; HTTPS_PROXY tunnels."""
        async with scripted(hello, ssl=server_side(authority)) as server, proxy() as middle:
            url = f"https://localhost:{server.port}/"
            with mesh_of(tmp_path, {}) as mesh:
                with pytest.raises(module.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await ask(mesh, kind, module, url)
                monkeypatch.setenv("SSL_CERT_FILE", str(authority / "root.pem"))
                assert (await ask(mesh, kind, module, url)).status_code == 200
                with pytest.raises(module.ConnectError):
                    await ask(mesh, kind, module, url, trust_env=False)
                monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{middle.port}")
                assert (await ask(mesh, kind, module, url)).status_code == 200
        assert middle.asked == [f"CONNECT localhost:{server.port} HTTP/1.1"]

    async def test_verify_is_obeyed(self, tmp_path: Path, module: Any, kind: str, authority: Path) -> None:
        """A context, and none."""
        async with scripted(hello, ssl=server_side(authority)) as server:
            url = f"https://localhost:{server.port}/"
            context = ssl.create_default_context(cafile=str(authority / "root.pem"))
            with mesh_of(tmp_path, {}) as mesh:
                for verify in (context, False):
                    assert (await ask(mesh, kind, module, url, verify=verify)).status_code == 200
                with pytest.warns(DeprecationWarning, match="verify"), pytest.raises(FileNotFoundError):
                    await ask(mesh, kind, module, url, verify=str(authority / "missing.pem"))

    async def test_mounts_win(self, tmp_path: Path, module: Any, kind: str) -> None:
        """As httpx documents: for services and for hosts outside; None means the client's own transport."""

        def handler(request: Any) -> Any:
            return module.Response(200, text="mounted")

        mounts = {
            "http://orders": module.MockTransport(handler),
            "all://*.example": module.MockTransport(handler),
            "http://orders:81": None,
        }
        async with scripted(hello) as server:
            with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
                for url, text in (
                    ("http://orders/x", "mounted"),
                    ("http://a.example/", "mounted"),
                    ("http://orders:81/x", "GET /x"),
                ):
                    assert (await ask(mesh, kind, module, url, mounts=mounts)).text == text

    async def test_wrong_options_are_told_at_once(self, tmp_path: Path, module: Any, kind: str) -> None:
        """Not by the first call."""
        with mesh_of(tmp_path, {}) as mesh:
            client = getattr(mesh, kind)
            with pytest.raises(ValueError, match="scheme"):
                client(httpx=module, proxy="gopher://x")
            with pytest.raises(TypeError):
                client(httpx=module, nonsense=1)
            with pytest.raises(TypeError):
                mesh.transport(nonsense=1)
            with pytest.raises(ValueError, match="http1"):
                client(httpx=module, http1=False)

    async def test_what_may_be_spoken_reaches_the_transport(self, tmp_path: Path, module: Any, kind: str) -> None:
        """`http1` and `http2` are about the mesh too."""
        with mesh_of(tmp_path, {}) as mesh:
            client = getattr(mesh, kind)
            given: list[dict[str, Any]] = [{}, {"http2": True}, {"http1": False, "http2": True}]
            spoken = [client(httpx=module, **options)._transport.protocols for options in given]
        assert spoken == ["http/1.1", "h2,http/1.1", "h2"]

    async def test_outside_httpx_s_own_timeouts_apply(self, tmp_path: Path, module: Any, kind: str) -> None:
        """There is no route's deadline there; a timeout that was given is the caller's word, also None."""
        told: list[Any] = []

        class Spy(module.BaseTransport, module.AsyncBaseTransport):  # type: ignore[name-defined,misc]
            def handle_request(self, request: Any) -> Any:
                told.append(request.extensions["timeout"]["read"])
                return module.Response(200)

            async def handle_async_request(self, request: Any) -> Any:
                return self.handle_request(request)

        with mesh_of(tmp_path, {}) as mesh:
            for options in ({}, {"timeout": None}, {"timeout": 3}):
                http = getattr(mesh, kind)(httpx=module, **options)
                http._transport._outside.transport_for = lambda url: Spy()  # type: ignore[method-assign]
                await http.get("http://a.example/") if kind == "client" else http.get("http://a.example/")
        assert told == [5.0, None, 3]


@MODULES
def test_nothing_is_made_before_the_first_call_outside(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SSL context costs milliseconds, and many processes never call outside. One serves the direct way and all proxies."""
    made: list[ssl.SSLContext] = []
    real = outside.roots

    def counted(*given: Any, **options: Any) -> ssl.SSLContext:
        made.append(real(*given, **options))
        return made[-1]

    monkeypatch.setattr(outside, "roots", counted)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    egress = Egress(module, is_async=False)
    assert made == []
    first = egress.transport_for(module.URL("https://a.example/"))
    assert egress.transport_for(module.URL("https://b.example/")) is first
    assert egress.transport_for(module.URL("http://b.example/")) is not first
    assert len(made) == 1


def test_the_choice_is_that_of_a_stock_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the forms of variables and URLs: the same kind of transport, to the same proxy."""

    def way(transport: Any) -> Any:
        pool = transport._pool
        return (type(pool).__name__, str(getattr(getattr(pool, "_proxy", None), "url", None)))

    worlds = [
        {},
        {"HTTP_PROXY": "http://p:1"},
        {"HTTPS_PROXY": "p:2", "HTTP_PROXY": "http://u:x@p:1"},
        {"ALL_PROXY": "socks5://p:3"},
        {"ALL_PROXY": "http://p:4", "NO_PROXY": ".example,10.0.0.1,localhost"},
        {"ALL_PROXY": "http://p:4", "NO_PROXY": "*"},
        {"all_proxy": "http://p:5", "no_proxy": "http://a.example"},
    ]
    urls = [
        "http://a.example/",
        "https://a.example/",
        "https://example/",
        "http://10.0.0.1/",
        "http://localhost:1/",
        "https://b.test:9/",
    ]
    for world in worlds:
        with monkeypatch.context() as patch:
            for name, value in world.items():
                patch.setenv(name, value)
            for module in (httpx, httpx2):
                stock, egress = module.Client(), Egress(module, is_async=False)
                for url in map(module.URL, urls):
                    assert way(stock._transport_for_url(url)) == way(egress.transport_for(url)), (world, url)


def test_the_platform_s_roots_come_before_certifi_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: Path) -> None:
    """The store that OpenSSL was built for, if there is anything in it; variables only where they are to be trusted."""
    paths = ssl.get_default_verify_paths()

    def platform(file: Path, folder: Path) -> None:
        told = paths._replace(openssl_cafile=str(file), openssl_capath=str(folder))
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: told)

    def names() -> set[str]:
        return {
            dict(field[0] for field in found["subject"]).get("commonName", "")
            for found in roots(httpx, trust_env=False).get_ca_certs()
        }

    platform(authority / "root.pem", tmp_path / "missing")
    assert names() == {"a root"}
    (tmp_path / "empty.pem").write_text("")
    platform(tmp_path / "missing", tmp_path)
    assert len(names()) > 50  # certifi's
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "root.pem"))
    assert len(names()) > 50
    assert [dict(f[0] for f in c["subject"])["commonName"] for c in roots(httpx).get_ca_certs()] == ["a root"]


def test_one_client_goes_outside_from_loop_after_loop(tmp_path: Path) -> None:
    """A connection that belongs to a closed loop isn't tried again."""
    with mesh_of(tmp_path, {}) as mesh:
        http = mesh.client()

        async def once() -> str:
            async with scripted(hello) as server:
                return (await http.get(f"http://{server.address}/")).text

        assert [asyncio.run(once()) for _ in range(3)] == ["GET /"] * 3
        assert len(http._transport._outside._clients) == 1


def test_a_forked_child_uses_no_connection_of_its_parent(tmp_path: Path) -> None:
    """Two processes on one connection would read each other's answers."""
    with mesh_of(tmp_path, {}) as mesh:
        http = mesh.sync_client()
        mine = http._transport._outside.transport_for(httpx.URL("http://a.example/"))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            theirs = http._transport._outside.transport_for(httpx.URL("http://a.example/"))
            os.write(writer, b"other" if theirs is not mine else b"same!")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 5) == b"other"
        os.close(reader)
        os.close(writer)
