"""How is the TLS of others made to talk with ours? Envoy, nginx, haproxy, OpenSSL, Python and gRPC, as servers and as clients.

An `Offer` is what one of them shows and whom it believes. As a server each answers a GET with 200; as a client each calls our own
server, a proxy on behalf of a plain call. One process takes all offers of a test. Who refuses, and how a refusal looks, is said
by the peers in their own ways: an alert, a 400, a 502; so what counts is whether an answer comes.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc.experimental import session_cache

from meshlib import errors
from meshlib._native import core
from tests.support import free_port, process, wait_until_listening
from tests.wire import envoy
from tests.wire.peers import HOST, Issued

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# Without an answer after this time there is none.
PATIENCE = 5.0

Call = Callable[[], bool]


@dataclass(frozen=True)
class Offer:
    """What a foreign peer shows, whom it believes (PEM), and what it holds for revoked (PEM, b"" for not asking)."""

    own: Issued
    roots: bytes
    crls: bytes = b""
    # The DNS name and the trust domain that it demands of us, where it can.
    name: str = "localhost"
    trust_domain: str = "td"


_given: set[int] = set()


def new_port() -> int:
    """A free port that no other peer of this run was given: what was free a moment ago is often offered again."""
    while (port := free_port()) in _given:
        pass
    _given.add(port)
    return port


def files_of(offer: Offer, folder: Path, stem: str) -> dict[str, str]:
    """The offer as files."""
    leaf, *above = offer.own.chain.split(b"-----BEGIN", 2)[1:]
    contents = {
        "chain": offer.own.chain,
        "leaf": b"-----BEGIN" + leaf,
        "above": b"".join(b"-----BEGIN" + each for each in above),
        "key": offer.own.key,
        "both": offer.own.chain + offer.own.key,
        "roots": offer.roots,
        "crls": offer.crls,
        "trust": offer.roots + offer.crls,
    }
    paths = {}
    for kind, content in contents.items():
        path = folder / f"{stem}-{kind}.pem"
        path.write_bytes(content)
        paths[kind] = str(path)
    return paths


# ------------------------------------------------------------------ we


def call(
    tls: core.TlsClient, port: int, expected: str = "", protocol: str = "http/1.1"
) -> core.HttpConnection | errors.MeshError:
    """One GET of ours; the connection if it was answered with 200 (gRPC: answered), else the error."""
    wire = core.HttpConnection(tls, expected, f"127.0.0.1:{port}", protocol)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plug:
            try:
                return _exchange(wire, plug, protocol)
            except errors.MeshError as error:
                with contextlib.suppress(OSError):
                    plug.sendall(wire.pending())
                return error
    except OSError as error:
        return errors.ConnectionLost(str(error))


def _exchange(wire: core.HttpConnection, plug: socket.socket, protocol: str) -> core.HttpConnection | errors.MeshError:
    plug.sendall(wire.open())
    is_grpc = protocol == "h2"
    if not is_grpc:
        assert wire.send("GET", "/", [HOST], None, False) == b""
    while True:
        data = plug.recv(65536)
        if not data:
            wire.receive_eof()
            return errors.ConnectionLost("the connection ended")
        out, events = wire.receive(data, len(data))
        if is_grpc and any(event[0] == core.EVENT_OPEN for event in events):
            headers = [HOST, (b"content-type", b"application/grpc"), (b"te", b"trailers")]
            out += wire.send("POST", "/a.B/C", headers, b"\x00\x00\x00\x00\x00", False)
        plug.sendall(out)
        for event in events:
            if event[0] in {core.EVENT_HEAD, core.EVENT_RESPONSE}:
                status = event[1]
                if status != 200:
                    return errors.ConnectionLost(f"answered {status}")
                with contextlib.suppress(OSError):
                    plug.sendall(wire.close())
                return wire


class OurServer:
    """Answers every request on loopback, and remembers who came and what went wrong."""

    def __init__(self, tls: core.TlsServer) -> None:
        self.tls = tls
        self.peers: list[str | None] = []
        self.resumed: list[bool] = []
        self.errors: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        while True:
            try:
                plug, _ = self._listener.accept()
            except OSError:
                return
            plug.settimeout(PATIENCE)
            thread = threading.Thread(target=self._serve, args=(plug,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, plug: socket.socket) -> None:
        wire, heard = core.TlsConnection(self.tls), b""
        with plug, contextlib.suppress(OSError):
            while data := plug.recv(65536):
                try:
                    plain, out, is_eof = wire.receive(data)
                except errors.MeshError as error:
                    self.errors.append(str(error))
                    plug.sendall(wire.pending())
                    # What is still on its way must not turn the alert into a reset.
                    plug.shutdown(socket.SHUT_WR)
                    while plug.recv(65536):
                        pass
                    return
                heard += plain
                plug.sendall(out)
                if plain and heard.startswith(b"PRI * HTTP/2.0\r\n") and heard == plain:
                    self._note(wire)
                    plug.sendall(wire.send(SETTINGS))
                elif heard.endswith(b"\r\n\r\n") and not heard.startswith(b"PRI"):
                    self._note(wire)
                    plug.sendall(wire.send(ANSWER) + wire.close())
                    heard = b""
                if is_eof:
                    return

    def _note(self, wire: core.TlsConnection) -> None:
        self.peers.append(wire.peer)
        self.resumed.append(wire.tls_resumed)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def our_server(tls: core.TlsServer) -> Iterator[OurServer]:
    running = OurServer(tls)
    try:
        yield running
    finally:
        running.close()


def ask(port: int) -> bool:
    """A plain GET, which a proxy takes further with TLS."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# ------------------------------------------------------------------ they


class Peer:
    """A foreign implementation of TLS."""

    program = ""
    has_crls = True
    protocol = "http/1.1"

    def is_here(self) -> bool:
        return not self.program or shutil.which(self.program) is not None

    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> contextlib.AbstractContextManager[dict[str, int]]:
        """The ports on which they answer."""
        raise NotImplementedError

    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> contextlib.AbstractContextManager[dict[str, Call]]:
        """What calls our server once, and says whether it was answered."""
        raise NotImplementedError


class Nginx(Peer):
    program = "nginx"
    _FRAME = """
    daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr;
    events {{}}
    http {{
      access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
      uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; ssl_protocols TLSv1.2 TLSv1.3;
      {servers}
    }}
    """

    @contextlib.contextmanager
    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> Iterator[dict[str, int]]:
        blocks, ports = [], {}
        for number, (name, offer) in enumerate(offers.items()):
            paths, ports[name] = files_of(offer, folder, f"nginx{number}"), new_port()
            revoked = f"ssl_crl {paths['crls']};" if offer.crls else ""
            blocks.append(
                f"server {{ listen 127.0.0.1:{ports[name]} ssl; ssl_certificate {paths['chain']}; ssl_certificate_key {paths['key']};"
                f" ssl_client_certificate {paths['roots']}; ssl_verify_client on; ssl_verify_depth 3; {revoked}"
                f' ssl_session_tickets on; return 200 "ok"; }}'
            )
        with self._running(folder, blocks, ports.values()):
            yield ports

    @contextlib.contextmanager
    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> Iterator[dict[str, Call]]:
        blocks, ports = [], {}
        for number, (name, offer) in enumerate(offers.items()):
            paths, ports[name] = files_of(offer, folder, f"nginx{number}"), new_port()
            revoked = f"proxy_ssl_crl {paths['crls']};" if offer.crls else ""
            # An upstream each: nginx keeps sessions by upstream, whatever certificate they were won with.
            blocks.append(
                f"upstream u{number} {{ server 127.0.0.1:{port}; }}"
                f"server {{ listen 127.0.0.1:{ports[name]}; location / {{ proxy_pass https://u{number};"
                f" proxy_ssl_certificate {paths['chain']}; proxy_ssl_certificate_key {paths['key']}; proxy_ssl_verify on;"
                f" proxy_ssl_verify_depth 3; proxy_ssl_trusted_certificate {paths['roots']}; {revoked}"
                f" proxy_ssl_name {offer.name}; proxy_ssl_server_name on; proxy_ssl_session_reuse on; }} }}"
            )
        with self._running(folder, blocks, ports.values()):
            yield {name: lambda at=at: ask(at) for name, at in ports.items()}

    @contextlib.contextmanager
    def _running(self, folder: Path, blocks: list[str], ports: Any) -> Iterator[None]:
        file = folder / f"nginx-{new_port()}.conf"
        file.write_text(self._FRAME.format(folder=folder, servers="\n".join(blocks)))
        with process("nginx", "-p", str(folder), "-c", str(file), "-e", "stderr") as child:
            for port in ports:
                wait_until_listening(port, child)
            yield


class Haproxy(Peer):
    program = "haproxy"
    _FRAME = "global\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 2s\n  timeout client 5s\n  timeout server 5s\n  retries 0\n"

    @contextlib.contextmanager
    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> Iterator[dict[str, int]]:
        blocks, ports = [self._FRAME], {}
        for number, (name, offer) in enumerate(offers.items()):
            paths, ports[name] = files_of(offer, folder, f"haproxy{number}"), new_port()
            revoked = f" crl-file {paths['crls']}" if offer.crls else ""
            blocks.append(
                f"frontend f{number}\n  bind 127.0.0.1:{ports[name]} ssl crt {paths['both']} ca-file {paths['roots']} verify required"
                f"{revoked}\n  http-request return status 200 content-type text/plain string ok\n"
            )
        with self._running(folder, blocks, ports.values()):
            yield ports

    @contextlib.contextmanager
    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> Iterator[dict[str, Call]]:
        blocks, ports = [self._FRAME], {}
        for number, (name, offer) in enumerate(offers.items()):
            paths, ports[name] = files_of(offer, folder, f"haproxy{number}"), new_port()
            revoked = f" crl-file {paths['crls']}" if offer.crls else ""
            blocks.append(
                f"listen l{number}\n  bind 127.0.0.1:{ports[name]}\n  http-reuse never\n  server s 127.0.0.1:{port} ssl verify required"
                f" ca-file {paths['roots']} crt {paths['both']} sni str({offer.name}) verifyhost {offer.name}{revoked}\n"
            )
        with self._running(folder, blocks, ports.values()):
            yield {name: lambda at=at: ask(at) for name, at in ports.items()}

    @contextlib.contextmanager
    def _running(self, folder: Path, blocks: list[str], ports: Any) -> Iterator[None]:
        file = folder / f"haproxy-{new_port()}.cfg"
        file.write_text("".join(blocks))
        with process("haproxy", "-db", "-f", str(file)) as child:
            for port in ports:
                wait_until_listening(port, child)
            yield


class Envoy(Peer):
    """With its validator for SPIFFE, which wants one URI name and the right trust domain; with a CRL, its usual one."""

    def is_here(self) -> bool:
        return envoy.BINARY.exists()

    @contextlib.contextmanager
    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> Iterator[dict[str, int]]:
        listeners, ports = [], {}
        answer = {"direct_response": {"status": 200, "body": {"inline_string": "ok"}}}
        for number, (name, offer) in enumerate(offers.items()):
            ports[name] = new_port()
            socket_of_tls = self._tls(files_of(offer, folder, f"envoy{number}"), offer, is_server=True)
            listeners.append(envoy.listener(ports[name], answer, socket_of_tls))
        with envoy.envoy(folder, listeners, []):
            yield ports

    @contextlib.contextmanager
    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> Iterator[dict[str, Call]]:
        listeners, clusters, ports = [], [], {}
        for number, (name, offer) in enumerate(offers.items()):
            ports[name] = new_port()
            transport = self._tls(files_of(offer, folder, f"envoy{number}"), offer, is_server=False)
            clusters.append(envoy.cluster(f"c{number}", port, transport))
            listeners.append(envoy.listener(ports[name], {"route": {"cluster": f"c{number}"}}))
        with envoy.envoy(folder, listeners, clusters):
            yield {name: lambda at=at: ask(at) for name, at in ports.items()}

    @staticmethod
    def _tls(paths: dict[str, str], offer: Offer, *, is_server: bool) -> dict[str, Any]:
        kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
        if offer.crls:
            validation: dict[str, Any] = {"trusted_ca": {"filename": paths["roots"]}, "crl": {"filename": paths["crls"]}}
        else:
            spiffe = {
                "@type": kind + "SPIFFECertValidatorConfig",
                "trust_domains": [{"name": offer.trust_domain, "trust_bundle": {"filename": paths["roots"]}}],
            }
            validation = {"custom_validator_config": {"name": "envoy.tls.cert_validator.spiffe", "typed_config": spiffe}}
        common = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{"certificate_chain": {"filename": paths["chain"]}, "private_key": {"filename": paths["key"]}}],
            "validation_context": validation,
            "alpn_protocols": ["http/1.1"],
        }
        config: dict[str, Any] = {"@type": kind + ("DownstreamTlsContext" if is_server else "UpstreamTlsContext")}
        config |= {"common_tls_context": common, **({"require_client_certificate": True} if is_server else {})}
        return {"name": "envoy.transport_sockets.tls", "typed_config": config}


class OpenSsl(Peer):
    """The commands s_server and s_client."""

    program = "openssl"

    @contextlib.contextmanager
    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> Iterator[dict[str, int]]:
        ports = {}
        with contextlib.ExitStack() as stack:
            for number, (name, offer) in enumerate(offers.items()):
                paths, port = files_of(offer, folder, f"openssl{number}"), new_port()
                command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-www", "-quiet", "-Verify", "5"]
                child = stack.enter_context(process(*command, *self._options(offer, paths)))
                wait_until_listening(port, child)
                ports[name] = port
            yield ports

    @contextlib.contextmanager
    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> Iterator[dict[str, Call]]:
        def caller(offer: Offer, stem: str) -> Call:
            paths, kept = files_of(offer, folder, stem), folder / f"{stem}.session"
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-quiet", "-sess_out", str(kept)]
            command += ["-servername", offer.name, "-verify_hostname", offer.name, *self._options(offer, paths)]

            def once() -> bool:
                resuming = ["-sess_in", str(kept)] if kept.exists() else []
                asked = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    done = subprocess.run([*command, *resuming], input=asked, capture_output=True, timeout=PATIENCE)
                    return done.stdout.startswith(b"HTTP/1.1 200")
                return False

            return once

        yield {name: caller(offer, f"openssl{number}") for number, (name, offer) in enumerate(offers.items())}

    @staticmethod
    def _options(offer: Offer, paths: dict[str, str]) -> list[str]:
        more = ["-cert_chain", paths["above"]] if Path(paths["above"]).read_bytes() else []
        more += ["-crl_check_all"] if offer.crls else []
        return ["-cert", paths["leaf"], "-key", paths["key"], *more, "-CAfile", paths["trust"], "-verify_return_error"]


class Python(Peer):
    """The module ssl."""

    @contextlib.contextmanager
    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> Iterator[dict[str, int]]:
        with contextlib.ExitStack() as stack:
            ports = {}
            for number, (name, offer) in enumerate(offers.items()):
                context = self._context(ssl.PROTOCOL_TLS_SERVER, offer, files_of(offer, folder, f"python{number}"))
                context.verify_mode = ssl.CERT_REQUIRED
                ports[name] = stack.enter_context(_serving(context))
            yield ports

    @contextlib.contextmanager
    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> Iterator[dict[str, Call]]:
        def caller(offer: Offer, stem: str) -> Call:
            context = self._context(ssl.PROTOCOL_TLS_CLIENT, offer, files_of(offer, folder, stem))
            kept: list[ssl.SSLSession | None] = [None]

            def once() -> bool:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plug:
                    with context.wrap_socket(plug, server_hostname=offer.name, session=kept[0]) as tls:
                        tls.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
                        answer = tls.recv(1000)
                        kept[0] = tls.session
                        return answer.startswith(b"HTTP/1.1 200")
                return False

            return once

        yield {name: caller(offer, f"python{number}") for number, (name, offer) in enumerate(offers.items())}

    @staticmethod
    def _context(protocol: int, offer: Offer, paths: dict[str, str]) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(paths["both"])
        context.load_verify_locations(paths["trust"])
        if offer.crls:
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
        return context


@contextlib.contextmanager
def _serving(context: ssl.SSLContext) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                plug, _ = listener.accept()
            except OSError:
                return
            plug.settimeout(PATIENCE)
            with contextlib.suppress(OSError), context.wrap_socket(plug, server_side=True) as tls:
                tls.recv(65536)
                tls.sendall(ANSWER)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


class Grpc(Peer):
    """gRPC's own TLS (BoringSSL). Its Python side knows no lists of revoked certificates."""

    has_crls = False
    protocol = "h2"

    @contextlib.contextmanager
    def servers(self, folder: Path, offers: Mapping[str, Offer]) -> Iterator[dict[str, int]]:
        started, ports = [], {}
        for name, offer in offers.items():
            server = grpc.server(futures.ThreadPoolExecutor(1))
            credentials = grpc.ssl_server_credentials([(offer.own.key, offer.own.chain)], offer.roots, True)
            ports[name] = server.add_secure_port("127.0.0.1:0", credentials)
            server.start()
            started.append(server)
        try:
            yield ports
        finally:
            for server in started:
                server.stop(0).wait()

    @contextlib.contextmanager
    def clients(self, folder: Path, offers: Mapping[str, Offer], port: int) -> Iterator[dict[str, Call]]:
        def caller(offer: Offer) -> Call:
            kept = session_cache.ssl_session_cache_lru(1)

            def once() -> bool:
                credentials = grpc.ssl_channel_credentials(offer.roots, offer.own.key, offer.own.chain)
                options = [
                    ("grpc.ssl_target_name_override", offer.name),
                    ("grpc.use_local_subchannel_pool", 1),
                    ("grpc.ssl_session_cache", kept),
                ]
                with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
                    return is_ready(channel)

            return once

        yield {name: caller(offer) for name, offer in offers.items()}


def is_ready(channel: grpc.Channel) -> bool:
    """Whether its first attempt to connect ends well."""
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    channel.subscribe(states.put, try_to_connect=True)
    while True:
        state = states.get(timeout=PATIENCE)
        if state in {grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE}:
            channel.unsubscribe(states.put)
            return state is grpc.ChannelConnectivity.READY


PEERS: dict[str, Peer] = {
    "envoy": Envoy(),
    "grpcio": Grpc(),
    "haproxy": Haproxy(),
    "nginx": Nginx(),
    "openssl": OpenSsl(),
    "python": Python(),
}
