"""Do the keys of a provider come from where they should, as often as they should, and go when nobody confirms them?

Real https servers on loopback with certificates of throw-away roots; time is a number that the tests move, except inside a
fetch.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import logging
import os
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm

from meshlib._native import core
from meshlib.errors import ConfigError, MeshError
from meshlib.keeper import Keeper
from meshlib.secure import fetch, jwks
from meshlib.secure.fetch import is_near
from meshlib.secure.jwks import KeySource, KeyStore
from tests.support import server_plan, server_rule

EMPTY = b'{"keys":[]}'


def key_set(*names: str) -> bytes:
    return json.dumps({"keys": [public_jwk(name) for name in names]}).encode()


def public_jwk(name: str) -> dict[str, Any]:
    plain = json.loads(ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key()))
    return {"kty": "EC", "crv": "P-256", "x": plain["x"], "y": plain["y"], "kid": name, "use": "sig"}


class Gate:
    """What the gate would know: the names of the keys in force; None: the provider's tokens are refused."""

    def __init__(self) -> None:
        self.known: dict[str, list[str] | None] = {}
        self.told = 0

    def keys(self, provider: str, document: bytes | None) -> list[str]:
        self.told += 1
        names, ignored = core.parse_jwks(document) if document is not None else (None, [])
        self.known[provider] = names
        return ignored


# --- a server


class Authority:
    """A root, and a certificate of it for names."""

    def __init__(self, folder: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throw-away root")])
        self._folder, self._key, self._name = folder, key, name
        self._root = self._certificate(name, key, name, x509.BasicConstraints(ca=True, path_length=0), [])
        self.pem = self._root.public_bytes(serialization.Encoding.PEM).decode()

    def _certificate(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Name,
        basic: x509.BasicConstraints,
        names: list[Any],
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(basic, critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def server(self, *names: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        entries = [x509.IPAddress(ipaddress.ip_address(each)) if each[0].isdigit() else x509.DNSName(each) for each in names]
        leaf = self._certificate(x509.Name([]), key, self._name, x509.BasicConstraints(ca=False, path_length=None), entries)
        file = self._folder / f"{names[0]}.pem"
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file.write_bytes(leaf.public_bytes(serialization.Encoding.PEM) + private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def client(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.pem)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Server:
    """An https server that gives one answer, and counts requests and connections."""

    def __init__(self) -> None:
        self.answer: bytes | Reply = reply(EMPTY)
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0

    def url(self, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}/jwks.json"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if callable(self.answer):
                await self.answer(writer)
            else:
                writer.write(self.answer)
            await writer.drain()
        with contextlib.suppress(Exception):
            writer.close()
            await writer.wait_closed()


def reply(body: bytes, status: str = "200 OK", *fields: str) -> bytes:
    head = "\r\n".join((f"HTTP/1.1 {status}", f"content-length: {len(body)}", *fields))
    return head.encode() + b"\r\n\r\n" + body


@pytest.fixture
async def server(authority: Authority) -> AsyncIterator[Server]:
    found = Server()
    listener = await asyncio.start_server(found.serve, "127.0.0.1", 0, ssl=authority.server("localhost", "127.0.0.1"))
    found.port = listener.sockets[0].getsockname()[1]
    yield found
    listener.close()


def at(server: Server, issuer: str = "") -> KeySource:
    return KeySource("auth", url=server.url(), issuer=issuer)


class World:
    """A store with a gate and a clock of its own. `look` is what the keeper does each second."""

    def __init__(self, authority: Authority, *sources: KeySource, **options: Any) -> None:
        self.now = 1000.0
        self.gate = Gate()
        self.keeper = Keeper(clock=lambda: self.now, source=random.Random(1))
        usual = {"allowed": frozenset({"localhost", "127.0.0.1"}), "context": authority.client, "chance": lambda: 0.5}
        self.store = KeyStore(sources, self.gate, self.keeper, clock=lambda: self.now, **{**usual, **options})

    @property
    def names(self) -> list[str] | None:
        return self.gate.known.get("auth")

    async def at(self, now: float) -> list[str] | None:
        """The keys in force after the keeper's look at this time."""
        self.now = 1000.0 + now
        await self.store.first()
        return self.names

    def row(self) -> dict[str, Any]:
        return self.store.stats()[0]


# --- what may be asked


@pytest.mark.parametrize(
    ("url", "flaw"),
    [
        ("https://issuer.example/jwks.json", ""),
        ("https://10.1.2.3:8443/jwks.json", ""),
        ("http://issuer.example/jwks.json", "https"),
        ("file:///etc/passwd", "https"),
        ("https://", "no host"),
        ("https://ada:secret@issuer.example/", "user or password"),
        ("https://issuer.example:99999/", "no URL"),
        ("https://issuer.example/a b", "characters"),
        ("https://issuer.example/a\r\nhost: x", "characters"),
    ],
)
def test_only_plain_https_urls_are_sources(url: str, flaw: str) -> None:
    """Anything else doesn't load."""
    assert flaw in fetch.flaw_of(url)
    assert bool(fetch.flaw_of(url)) == bool(flaw)
    if flaw:
        with pytest.raises(ConfigError, match="secure.jwt.auth.jwks"):
            KeyStore([KeySource("auth", url=url)], Gate(), Keeper())


@pytest.mark.parametrize("source", [KeySource("auth"), KeySource("auth", url="https://x/", file=Path("x"))])
def test_a_provider_has_one_source(source: KeySource) -> None:
    """None, or two, is a mistake."""
    with pytest.raises(ConfigError, match="one source"):
        KeyStore([source], Gate(), Keeper())


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1", "100.100.100.200", "192.0.0.192"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "ff02::1", "fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
        *("::127.0.0.1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_this_machine_its_link_and_metadata_services_are_near(address: str) -> None:
    """In every notation that leads there."""
    assert is_near(address)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "192.168.1.1", "172.16.0.1", "8.8.8.8", "100.64.0.1", "2001:4860::8888", "fd00::1"]
)
def test_private_networks_are_not_near(address: str) -> None:
    """The provider of a company is there."""
    assert not is_near(address)


# --- fetching


async def test_keys_come_over_verified_tls(authority: Authority, server: Server) -> None:
    """And the request says no more than it must."""
    server.answer = reply(key_set("k1", "k2"))
    world = World(authority, at(server))
    assert await world.at(0) == ["k1", "k2"]
    head = server.requests[0].decode().lower()
    assert head.startswith(f"get /jwks.json http/1.1\r\nhost: localhost:{server.port}\r\n")
    assert "accept-encoding: identity" in head
    assert "cookie" not in head
    assert world.row() == {
        "provider": "auth", "source": "url", "keys": 2, "age": 0.0, "fetches": 1, "failures": 0, "stale": 3600.0,
        "error": "",
    }  # fmt: skip


async def test_an_untrusted_certificate_is_no_provider(authority: Authority, server: Server, tmp_path: Path) -> None:
    """Another root, another name: nothing is taken."""
    server.answer = reply(key_set("k1"))
    (tmp_path / "other").mkdir()
    stranger = World(authority, at(server), context=Authority(tmp_path / "other").client)
    assert await stranger.at(0) is None
    assert "did not prove who it is" in stranger.row()["error"]
    lookup = lambda host, port: socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
    renamed = World(
        authority, KeySource("auth", url=server.url("issuer.example")), lookup=lookup, allowed=frozenset({"issuer.example"})
    )
    assert await renamed.at(0) is None
    assert "Hostname mismatch" in renamed.row()["error"]
    assert server.requests == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (reply(b"", "302 Found", "location: http://169.254.169.254/"), "redirects (302)"),
        (reply(b"", "301 Moved", "location: https://localhost/"), "redirects (301)"),
        (reply(key_set("k1"), "500 Broken"), "answers 500"),
        (reply(key_set("k1"), "404 Not Found"), "answers 404"),
        (reply(key_set("k1"), "200 OK", "content-encoding: gzip"), "compressed"),
        (reply(b" " * (512 * 1024 + 1)), "more than 512 KiB"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (5 << 20), "more than 512 KiB"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + key_set("k1"), "broke off"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{}", "HTTP as it should"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP as it should"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", "HTTP as it should"),
        (b"", "HTTP as it should"),
        (reply(b"{}"), 'no list "keys"'),
        (reply(b"<html>"), "not JSON"),
        (reply(b'{"keys":[],"keys":[]}'), "twice"),
    ],
)
async def test_an_answer_that_is_no_key_set_changes_nothing(
    authority: Authority, server: Server, answer: bytes, error: str
) -> None:
    """At the start everything is refused; later the last good keys stay."""
    world = World(authority, at(server))
    server.answer = answer
    assert await world.at(0) is None
    assert error in world.row()["error"]
    server.answer = reply(key_set("k1"))
    assert await world.at(40) == ["k1"]
    server.answer = answer
    assert await world.at(400) == ["k1"]
    assert error in world.row()["error"]
    assert world.row()["failures"] == 2


async def test_a_redirect_is_never_followed(authority: Authority, server: Server) -> None:
    """Not even to the same host."""
    server.answer = reply(b"", "307 Elsewhere", f"location: {server.url()}")
    await World(authority, at(server)).at(0)
    assert server.connections == 1


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_this_machine_is_asked_only_where_that_is_listed(authority: Authority, server: Server, host: str) -> None:
    """No connection is made, so that not even a port can be felt."""
    world = World(authority, KeySource("auth", url=server.url(host)), allowed=frozenset({"other.host"}))
    assert await world.at(0) is None
    assert "leads to this machine" in world.row()["error"]
    assert server.connections == 0


async def test_the_address_that_was_judged_is_the_one_that_is_called(authority: Authority, server: Server) -> None:
    """A name that leads elsewhere at its second lookup has no second one; one bad address spoils them all."""
    calls: list[str] = []

    def lookup(host: str, port: int) -> Any:
        calls.append(host)
        first = "192.0.2.1" if len(calls) > 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (first, port))]

    server.answer = reply(key_set("k1"))
    world = World(authority, at(server), lookup=lookup)
    assert await world.at(0) == ["k1"]
    assert calls == ["localhost"]

    mixed = lambda host, port: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("192.0.2.1", "127.0.0.1")
    ]
    rebound = World(authority, at(server), lookup=mixed, allowed=frozenset())
    assert await rebound.at(0) is None
    assert "leads to this machine" in rebound.row()["error"]
    assert server.connections == 1


async def test_whoever_answers_drop_by_drop_is_cut_off(
    authority: Authority, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is for the whole fetch, and the thread ends with it."""
    monkeypatch.setattr(fetch, "PATIENCE", 0.3)
    is_cut = asyncio.Event()

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx: ")
        try:
            while True:
                writer.write(b"y")
                await writer.drain()
                await asyncio.sleep(0.02)
        except (ConnectionError, ssl.SSLError):
            is_cut.set()

    server.answer = drip
    world = World(authority, at(server))
    assert await world.at(0) is None
    assert world.row()["error"].startswith("localhost did not answer within 0.3 s.")
    await asyncio.wait_for(is_cut.wait(), 10)
    server.answer = reply(key_set("k1"))
    assert await world.at(60) == ["k1"]


async def test_a_lookup_that_hangs_is_not_begun_twice(
    authority: Authority, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for a name server don't pile up."""
    monkeypatch.setattr(fetch, "PATIENCE", 0.1)
    may_go, begun = threading.Event(), []

    def lookup(host: str, port: int) -> Any:
        begun.append(host)
        may_go.wait(30)
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    world = World(authority, at(server), lookup=lookup)
    for now in (0, 60, 120):
        await world.at(now)
    assert (len(begun), world.row()["fetches"]) == (1, 3)
    assert "still hangs" in world.row()["error"]
    may_go.set()
    while world.store._known["auth"].is_hanging:
        await asyncio.sleep(0.01)
    server.answer = reply(key_set("k1"))
    monkeypatch.setattr(fetch, "PATIENCE", 5.0)
    assert await world.at(180) == ["k1"]


# --- when


async def test_keys_are_asked_for_every_five_minutes_or_as_the_server_says(authority: Authority, server: Server) -> None:
    """max-age counts between one minute and half an hour."""
    for field, every in (("x: y", 300), ("cache-control: public, max-age=600", 600), ("cache-control: max-age=1", 60),
                         ("cache-control: max-age=86400", 1800), ("cache-control: s-maxage=9", 300)):  # fmt: skip
        server.answer, server.requests = reply(key_set("k1"), "200 OK", field), []
        world = World(authority, at(server))
        counts = []
        for now in (0, every - 1, every):
            await world.at(now)
            counts.append(len(server.requests))
        assert counts == [1, 1, 2], field


async def test_fetches_are_spread(authority: Authority, server: Server) -> None:
    """The processes of a fleet don't come together."""
    for chance, first in ((0.0, 270), (1.0, 330)):
        server.answer, server.requests = reply(key_set("k1")), []
        world = World(authority, at(server), chance=lambda chance=chance: chance)
        await world.at(0)
        assert (await world.at(first - 1), len(server.requests)) == (["k1"], 1)
        assert (await world.at(first), len(server.requests)) == (["k1"], 2)


async def test_unknown_keys_are_asked_for_once_in_thirty_seconds(authority: Authority, server: Server) -> None:
    """However many tokens name one: 1000 a second for two minutes are five fetches."""
    server.answer = reply(key_set("k1"))
    world = World(authority, at(server))
    for second in range(121):
        await world.at(second)
        for _ in range(1000):
            world.store.nudge("auth")
    assert len(server.requests) == 5


async def test_a_new_key_is_found_when_a_token_names_it(authority: Authority, server: Server) -> None:
    """A nudge within the rest isn't lost, it waits."""
    server.answer = reply(key_set("k1"))
    world = World(authority, at(server))
    await world.at(0)
    server.answer = reply(key_set("k1", "k2"))
    world.now = 1010.0
    world.store.nudge("auth")
    world.store.nudge("nobody")
    assert [await world.at(now) for now in (10, 29, 30)] == [["k1"], ["k1"], ["k1", "k2"]]


async def test_a_failure_is_tried_again_after_thirty_seconds(authority: Authority, server: Server) -> None:
    """Not sooner: who is down isn't helped by more requests."""
    server.answer = reply(b"", "503 Down")
    world = World(authority, at(server))
    counts = []
    for now in (0, 1, 30, 32, 33, 65):
        await world.at(now)
        counts.append(len(server.requests))
    assert counts == [1, 1, 1, 2, 2, 3]


# --- what becomes of keys


async def test_keys_that_nobody_confirms_are_withdrawn_after_an_hour(authority: Authority, server: Server) -> None:
    """Stale on error at most that long; there is no default key; and the next good answer brings them back."""
    server.answer = reply(key_set("k1"))
    world = World(authority, at(server))
    await world.at(0)
    server.answer = reply(b"{}")
    assert [await world.at(now) for now in (300, 600, 3600)] == [["k1"]] * 3
    assert [await world.at(now) for now in (3601, 25 * 3600)] == [None, None]
    assert (world.row()["keys"], world.row()["age"]) == (0, -1.0)
    server.answer = reply(key_set("k1"))
    assert await world.at(26 * 3600) == ["k1"]


async def test_an_empty_set_takes_all_keys_back_at_once(authority: Authority, server: Server) -> None:
    """It is an answer, not a failure."""
    server.answer = reply(key_set("k1"))
    world = World(authority, at(server))
    await world.at(0)
    server.answer = reply(EMPTY)
    assert await world.at(300) == []
    assert world.row()["error"] == ""


async def test_the_same_set_is_told_once(authority: Authority, server: Server) -> None:
    """The gate forgets verified tokens when keys change: so it is told of changes only."""
    server.answer = reply(key_set("k1"))
    world = World(authority, at(server))
    for now in (0, 300, 600):
        await world.at(now)
    assert (len(server.requests), world.gate.told) == (3, 1)


async def test_a_failure_is_logged_once_and_the_end_of_it_too(
    authority: Authority, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Another kind of failure is another line."""
    caplog.set_level(logging.INFO, "meshlib.secure")
    world = World(authority, KeySource("auth", url=server.url() + "?secret=1"))
    for now, answer in ((0, 503), (40, 503), (80, 404), (120, 200)):
        server.answer = reply(key_set("k1"), f"{answer} x")
        await world.at(now)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "no new keys of the provider auth (its tokens are refused)",
        "no new keys of the provider auth (its tokens are refused)",
        "the provider auth has 1 keys",
        "the keys of the provider auth can be had again",
    ]
    assert "secret" not in "".join(lines)


async def test_what_is_left_out_of_a_set_is_logged(
    authority: Authority, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """With its name and the reason."""
    server.answer = reply(json.dumps({"keys": [public_jwk("k1"), {"kty": "oct", "k": "AAAA", "kid": "k2"}]}).encode())
    world = World(authority, at(server))
    assert await world.at(0) == ["k1"]
    assert 'the key "k2" is a shared secret, and is left out' in caplog.text
    assert "AAAA" not in caplog.text


# --- other sources


async def test_a_file_is_watched_by_its_content(authority: Authority, tmp_path: Path) -> None:
    """Also behind the links of a mount; a broken one changes nothing for an hour, and then takes the keys away."""
    folder = tmp_path / "mount"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "keys.json").write_bytes(key_set(name))
    (folder / "..data").symlink_to("one")
    (folder / "keys.json").symlink_to("..data/keys.json")
    for path in (folder, folder / "one", folder / "two"):
        path.chmod(0o755)
    world = World(authority, KeySource("auth", file=folder / "keys.json"))
    assert world.names == ["one"]
    os.symlink("two", folder / "..new")
    (folder / "..new").rename(folder / "..data")
    assert await world.at(1) == ["two"]
    (folder / "two" / "keys.json").write_bytes(b'{"keys":')
    assert [await world.at(2), await world.at(3600), await world.at(3603)] == [["two"], ["two"], None]
    assert world.row()["failures"] == 1
    (folder / "two" / "keys.json").write_bytes(key_set("three"))
    assert await world.at(3604) == ["three"]


async def test_a_file_that_others_may_change_is_no_source(authority: Authority, tmp_path: Path) -> None:
    """Who writes the keys decides who is believed."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set("k1"))
    file.chmod(0o666)
    world = World(authority, KeySource("auth", file=file))
    assert world.names is None
    assert "may be changed by other users" in world.row()["error"]


async def test_inline_keys_are_there_from_the_start_and_stay(authority: Authority) -> None:
    """Nobody needs to confirm what the configuration says."""
    world = World(authority, KeySource("auth", keys=[public_jwk("k1")]))
    assert world.names == ["k1"]
    assert await world.at(7200) == ["k1"]
    assert world.gate.told == 1
    assert world.store.jobs() == [world.store]
    assert world.keeper.jobs == ()


async def test_inline_keys_that_are_none_stop_the_start() -> None:
    """A configuration is loaded whole or not at all."""
    gate = Gate()
    keys = [public_jwk(f"k{number}") for number in range(257)]
    with pytest.raises(ConfigError):
        KeyStore([KeySource("auth", keys=keys)], gate, Keeper())
    assert gate.known == {}


async def test_keys_that_somebody_else_keeps_are_read_from_there(authority: Authority) -> None:
    """Such as the keys for tokens in a bundle: None means that nothing is known."""
    holder: dict[str, bytes] = {}
    world = World(authority, KeySource("auth", read=lambda: holder.get("jwks")))
    assert await world.at(0) is None
    holder["jwks"] = key_set("k1")
    assert await world.at(1) == ["k1"]
    holder["jwks"] = EMPTY
    assert await world.at(2) == []


# --- through the gate


async def test_the_gate_believes_exactly_the_keys_in_force(authority: Authority, server: Server) -> None:
    """From the first fetch to the withdrawal, with tokens in requests; who hasn't the key is told to fetch."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("k1", "k2")}
    claims = {"iss": "https://issuer", "aud": "orders", "sub": "ada", "exp": 1060}
    tokens = {name: jwt.encode(claims, key, "ES256", headers={"kid": name}) for name, key in keys.items()}
    provider = {
        "name": "auth",
        "issuer": "https://issuer",
        "audiences": ["orders"],
        "algorithms": ["ES256"],
        "leeway": 30.0,
        "longest": 86400.0,
        "forward": False,
        "is_svid": False,
        "from": [{"kind": "header", "name": "authorization", "prefix": "Bearer "}],
    }
    gate = core.Gate()
    world = World(authority, at(server))
    world.store._gate = gate
    gate.publish(server_plan(server_rule("all", callers=[{"kind": "any"}]), providers=[provider]), 0.0)

    def verdict(name: str) -> tuple[int, str, str]:
        headers = [(b"host", b"orders"), (b"authorization", f"Bearer {tokens[name]}".encode())]
        peer = "spiffe://shop.internal/ns/default/sa/web"
        entry = gate.begin("GET", b"/", headers, peer, True, world.now, wall=1000.0)
        found = entry.status, entry.principal, entry.wants_keys
        entry.finish(200, world.now)
        return found

    def served(*names: str) -> bytes:
        public = [json.loads(ECAlgorithm.to_jwk(keys[name].public_key())) for name in names]
        return reply(json.dumps({"keys": [{**key, "kid": name} for name, key in zip(names, public, strict=True)]}).encode())

    refused, taken = (401, "", "auth"), (0, "https://issuer/ada", "")
    server.answer = reply(b"", "500 Down")
    await world.at(0)
    assert (verdict("k1"), verdict("k2")) == (refused, refused)
    server.answer = served("k1")
    await world.at(40)
    assert (verdict("k1"), verdict("k2")) == (taken, refused)
    world.store.nudge(verdict("k2")[2])
    server.answer = served("k1", "k2")
    await world.at(70)
    assert (verdict("k1"), verdict("k2")) == (taken, taken)
    server.answer = reply(EMPTY)
    await world.at(400)
    assert (verdict("k1"), verdict("k2")) == (refused, refused)
    server.answer = served("k2")
    await world.at(800)
    server.answer = reply(b"{}")
    await world.at(4400)
    assert (verdict("k1"), verdict("k2")) == (refused, taken)
    await world.at(4401)
    assert (verdict("k1"), verdict("k2")) == (refused, refused)


# --- another configuration, another process


async def test_a_source_that_stays_keeps_its_keys_and_another_begins_without(authority: Authority, server: Server) -> None:
    """Keys of an issuer are never those of the next one under the same name."""
    server.answer = reply(key_set("k1"))
    sources = [at(server, "a"), KeySource("other", keys=[public_jwk("o1")])]
    world = World(authority, *sources)
    await world.at(0)
    world.store.update(sources, allowed=frozenset({"localhost"}))
    assert (world.names, world.gate.known["other"]) == (["k1"], ["o1"])
    world.store.update([at(server, "b")], allowed=frozenset({"localhost"}))
    assert (world.names, world.gate.known["other"]) == (None, None)
    assert await world.at(1) == ["k1"]
    with pytest.raises(ConfigError):
        world.store.update([KeySource("auth", url="http://x/")])
    assert world.names == ["k1"]


async def test_the_function_of_the_present_configuration_is_asked(authority: Authority) -> None:
    """The same source, told anew: the keys stay, and the next look asks the new one."""
    world = World(authority, KeySource("auth", read=lambda: key_set("k1")))
    world.store.update([KeySource("auth", read=lambda: key_set("k2"))])
    assert (world.names, world.gate.told) == (["k2"], 2)


async def test_an_answer_for_a_source_that_is_gone_is_dropped(authority: Authority, server: Server) -> None:
    """The configuration changed while it was fetched."""
    world = World(authority, at(server, "a"))

    async def meanwhile(writer: asyncio.StreamWriter) -> None:
        world.store.update([])
        writer.write(reply(key_set("k1")))

    server.answer = meanwhile
    assert await world.at(0) is None


def test_the_keeper_does_the_work_and_a_nudge_wakes_it(authority: Authority, keeper: Keeper) -> None:
    """On its own thread and clock: the first keys, a nudge, the end."""
    is_known = threading.Event()

    class Told(Gate):
        def keys(self, provider: str, document: bytes | None) -> list[str]:
            found = super().keys(provider, document)
            is_known.set()
            return found

    gate = Told()
    store = KeyStore([KeySource("auth", read=lambda: key_set("k1"))], gate, keeper, context=authority.client)
    assert is_known.wait(1)
    is_known.clear()
    assert store.jobs() == [store]
    assert is_known.wait(10)
    store.cancel()
    assert [job.name for job in keeper.jobs] == []


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    found = Keeper()
    found.start()
    yield found
    found.stop()


def test_a_forked_child_asks_for_itself(authority: Authority) -> None:
    """What was under way in the parent is not under way in the child."""
    world = World(authority, KeySource("auth", url="https://issuer.example/"))
    known = world.store._known["auth"]
    known.is_asking = known.is_hanging = True
    world.store._after_fork()
    assert (known.is_asking, known.is_hanging) == (False, False)


def test_an_error_says_what_to_do_and_nothing_secret() -> None:
    """The query of a URL may be a key."""
    assert fetch.shown("https://ada:pw@issuer.example/jwks?key=1#f") == "https://issuer.example/jwks"
    with pytest.raises(MeshError) as caught:
        fetch.fetch("http://issuer.example/jwks?key=1", ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    assert (caught.value.reason, "key=1" in str(caught.value)) == ("secure.fetch", False)
    assert caught.value.hint


def test_limits_are_those_of_the_reference() -> None:
    """A change here is a change of the security rules."""
    limits = (fetch.LIMIT, fetch.PATIENCE, jwks.REST, jwks.STALE, jwks.SHORTEST)
    assert limits == (524288, 5.0, 30.0, 3600.0, 60.0)
