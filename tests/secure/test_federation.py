"""Are other trust domains believed by their own latest bundle only, whoever answers for them?"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from meshlib.errors import ConfigError, MeshError
from meshlib.keeper import Keeper
from meshlib.secure import CertificateAuthority, Federation, bundle, certificates, endpoint
from meshlib.secure.bundle import Bundle
from meshlib.secure.fetch import Fetching

PARTNER = "partner.example"
SERVER_ID = f"spiffe://{PARTNER}/ns/default/sa/bundles"


@dataclass(frozen=True)
class Entry:
    """An entry of `federation:`, as the configuration hands it over."""

    trust_domain: str = PARTNER
    file: Path | None = None
    url: str | None = None
    profile: str | None = None
    spiffe_id: str | None = None
    every: float | None = None
    can_be_local: bool = False


@dataclass(frozen=True)
class Config:
    """The part of a configuration that federation reads."""

    federation: tuple[Entry, ...]
    trust_domain: str = "shop.internal"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Callable[..., Federation]:
    """A federation that is looked at by hand, without jitter."""

    def made(*entries: Entry, **more: Any) -> Federation:
        keeper = Keeper(clock=clock, source=random.Random(1))
        return Federation(Config(entries), keeper, **{"clock": clock, "chance": lambda: 0.5, **more})

    return made


async def look(federation: Federation) -> None:
    await federation.look()
    await federation.settled()


def roots(name: str = PARTNER) -> bytes:
    return CertificateAuthority.create(None, name).bundle


def spiffe(pem: bytes, sequence: int | None = None, hint: float | None = None) -> bytes:
    return bundle.format(Bundle(bundle.parse(pem).x509, sequence=sequence, refresh_hint=hint))


# ---------------------------------------------------------------------------------------------------- what may be configured


@pytest.mark.parametrize(
    ("entry", "flaw"),
    [
        (Entry(), "needs a file or a url"),
        (Entry(trust_domain="shop.internal", file=Path("x")), "our own trust domain"),
        (Entry(trust_domain="", file=Path("x")), "1 to 255 characters"),
        (Entry(trust_domain="https://x", file=Path("x")), "neither scheme, port nor path"),
        (Entry(trust_domain="Partner.example", file=Path("x")), "small letters"),
        (Entry(file=Path("x"), every=60.0), "go with a url"),
        (Entry(file=Path("x"), profile="https_web"), "go with a url"),
        (Entry(url="http://x/bundle", profile="https_web"), "must begin with https://"),
        (Entry(url="HTTP://x/bundle", profile="https_web"), "must begin with https://"),
        (Entry(url="file:///etc/passwd", profile="https_web"), "must begin with https://"),
        (Entry(url="//x/b", profile="https_web"), "must begin with https://"),
        (Entry(url="https:///b", profile="https_web"), "names no host"),
        (Entry(url="https://user@x/b", profile="https_web"), "no user or password"),
        (Entry(url="https://user:pw@x/b", profile="https_web"), "no user or password"),
        (Entry(url="https://@x/b", profile="https_web"), "no user or password"),
        (Entry(url="https://x:99999/b", profile="https_web"), "it is no URL"),
        (Entry(url="https://x /b", profile="https_web"), "characters that a URL can't have"),
        (Entry(url="https://x/b\r\nhost: y", profile="https_web"), "characters that a URL can't have"),
        (Entry(url="https://x/b"), "how the endpoint proves who it is, is never guessed"),
        (Entry(url="https://x/b", profile="web"), "profile must be"),
        (Entry(url="https://x/b", profile="https_web", spiffe_id=SERVER_ID), "spiffe_id goes with https_spiffe"),
        (Entry(url="https://x/b", profile="https_spiffe"), "needs the spiffe_id"),
        (
            Entry(url="https://x/b", profile="https_spiffe", spiffe_id="spiffe://partner.example"),
            "not the SPIFFE ID of a workload",
        ),
        (Entry(url="https://x/b", profile="https_spiffe", spiffe_id="https://x"), "not the SPIFFE ID of a workload"),
        (Entry(url="https://x/b", profile="https_spiffe", spiffe_id=SERVER_ID), "needs a file with a first bundle"),
    ],
)
def test_entry_that_leaves_something_to_guess_is_a_mistake(make: Callable[..., Federation], entry: Entry, flaw: str) -> None:
    """Trust domain, URL and profile are configured, never inferred; https only, and no credentials."""
    with pytest.raises(ConfigError, match=r"secure\.federation\.") as caught:
        make(entry)
    assert flaw in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        Entry(url="https://x/b", profile="https_web"),
        Entry(url="https://127.0.0.1:8443/b?x=1", profile="https_web", every=60.0, file=Path("/nowhere/first.json")),
        Entry(url="https://x/b", profile="https_spiffe", spiffe_id="spiffe://other.example/x"),
    ],
)
def test_entry_that_says_all_is_taken(make: Callable[..., Federation], entry: Entry) -> None:
    """And nobody is believed before there is a bundle."""
    federation = make(entry)
    assert (federation.bundles, federation.bundle_of(PARTNER)) == ({}, None)
    assert list(federation.faults()) == [PARTNER]


# ---------------------------------------------------------------------------------------------------- files


async def test_file_is_read_at_once_and_followed(make: Callable[..., Federation], tmp_path: Path) -> None:
    """PEM or a SPIFFE bundle, by content."""
    file = tmp_path / "partner.pem"
    file.write_bytes(first := roots())
    federation = make(Entry(file=file))
    assert (federation.bundles, federation.faults()) == ({PARTNER: first}, {})
    before = federation.bundles
    await look(federation)
    assert federation.bundles is before
    second = roots()
    file.write_bytes(spiffe(second, 3))
    await look(federation)
    assert federation.bundles == {PARTNER: second}


async def test_bundles_of_trust_domains_are_never_merged(make: Callable[..., Federation], tmp_path: Path) -> None:
    """Each stands under its own name; a root that names another trust domain counts under neither."""
    one, two = roots("one.example"), roots("two.example")
    (tmp_path / "one").write_bytes(one + two)
    (tmp_path / "two").write_bytes(two)
    federation = make(Entry("one.example", tmp_path / "one"), Entry("two.example", tmp_path / "two"))
    assert federation.bundles == {"one.example": one, "two.example": two}


async def test_file_that_is_bad_keeps_the_last_good_and_is_told(
    make: Callable[..., Federation], tmp_path: Path, clock: Clock
) -> None:
    """Cut off, open to others, gone: a fault after some looks, until it is good again."""
    file = tmp_path / "partner.pem"
    file.write_bytes(good := roots())
    federation = make(Entry(file=file))
    for spoil in (lambda: file.write_bytes(good[:100]), lambda: file.chmod(0o666), file.unlink):
        spoil()
        clock.now += 10.0
        await look(federation)
        assert (federation.bundles, list(federation.faults())) == ({PARTNER: good}, [PARTNER])
    file.write_bytes(better := roots())
    await look(federation)
    assert (federation.bundles, federation.faults()) == ({PARTNER: better}, {})


async def test_bundle_without_keys_withdraws_the_trust_domain(make: Callable[..., Federation], tmp_path: Path) -> None:
    """Unlike a file that can't be read, that is an answer."""
    file = tmp_path / "partner.json"
    file.write_bytes(spiffe(roots()))
    federation = make(Entry(file=file))
    file.write_bytes(b'{"keys": []}')
    await look(federation)
    assert (federation.bundles, federation.faults()) == ({}, {})


async def test_file_of_a_configmap_is_followed_through_its_links(make: Callable[..., Federation], tmp_path: Path) -> None:
    """As Kubernetes mounts it."""
    (tmp_path / "..1").mkdir(mode=0o755)
    (tmp_path / "..1" / "partner.pem").write_bytes(good := roots())
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "partner.pem").symlink_to("..data/partner.pem")
    assert make(Entry(file=tmp_path / "partner.pem")).bundles == {PARTNER: good}


# ---------------------------------------------------------------------------------------------------- when it is asked


class Answers:
    """Stands for the network: what the next fetches say."""

    def __init__(self, *said: bytes | Exception) -> None:
        self.said = list(said)
        self.asked: list[tuple[str, str]] = []

    def __call__(self, url: str, spiffe_id: str, roots: bytes, fetching: Any, *, can_be_near: bool) -> bytes:
        self.asked.append((url, spiffe_id))
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return said


WEB = Entry(url="https://partner.example/bundle", profile="https_web")


@pytest.mark.parametrize(
    ("hint", "every", "interval"),
    [
        (None, None, 300.0),
        (600.0, None, 600.0),
        (1.0, None, 60.0),
        (2_419_200.0, None, 86400.0),
        (600.0, 120.0, 120.0),
        (120.0, 600.0, 120.0),
        (None, 600.0, 600.0),
        (None, 20.0, 20.0),
        (None, 5.0, 10.0),
        (600.0, 20.0, 20.0),
    ],
)
async def test_endpoint_is_asked_as_often_as_its_bundle_says(
    make: Callable[..., Federation], clock: Clock, hint: float | None, every: float | None, interval: float
) -> None:
    """Or as the configuration says, whichever is more often; every five minutes if nobody says anything."""
    answers = Answers(spiffe(roots(), 1, hint))
    federation = make(replace(WEB, every=every), ask=answers)
    began, asked = clock.now, list[float]()
    while len(asked) < 3:
        before = len(answers.asked)
        await look(federation)
        if len(answers.asked) > before:
            asked.append(clock.now - began)
        clock.now += interval / 10
    assert asked == pytest.approx([0.0, interval, 2 * interval])


@pytest.mark.parametrize(("chance", "interval"), [(0.0, 270.0), (1.0, 330.0)])
async def test_processes_of_a_fleet_spread_their_questions(
    make: Callable[..., Federation], clock: Clock, chance: float, interval: float
) -> None:
    """Give or take a tenth."""
    federation = make(WEB, ask=Answers(spiffe(roots())), chance=lambda: chance)
    await look(federation)
    assert federation._known[PARTNER].due - clock.now == pytest.approx(interval)


async def test_failed_fetch_waits_for_the_next_interval_and_the_last_bundle_stays(
    make: Callable[..., Federation], clock: Clock
) -> None:
    """Not sooner: that would keep an endpoint down. Its age is told, and a fault after three intervals."""
    good = roots()
    answers = Answers(spiffe(good, 1, 100.0), OSError("down"))
    federation = make(WEB, ask=answers)
    seen = []
    for _ in range(50):
        await look(federation)
        seen.append((len(answers.asked), list(federation.faults())))
        clock.now += 10.0
    assert [count for count, _ in seen] == [1 + n // 10 for n in range(50)]
    assert federation.bundles == {PARTNER: good}
    assert [faults for _, faults in seen].index([PARTNER]) == 31
    (row,) = federation.stats()
    assert (row["age"], row["fetches"], row["failures"], row["error"], row["sequence"], row["roots"]) == (
        500.0,
        5,
        4,
        "down",
        1,
        1,
    )


async def test_sequence_that_goes_back_is_a_replay(make: Callable[..., Federation], clock: Clock) -> None:
    """The newer bundle stays; one with the same number or a higher one is taken."""
    first, old, same, newer = (roots() for _ in range(4))
    answers = Answers(spiffe(first, 5), spiffe(old, 4), spiffe(same, 5), spiffe(newer, 6))
    federation = make(WEB, ask=answers)
    found = []
    for _ in range(4):
        await look(federation)
        found.append((federation.bundles[PARTNER], "went back from 5 to 4" in federation.stats()[0]["error"]))
        clock.now += 300.0
    assert found == [(first, False), (first, True), (same, False), (newer, False)]


@pytest.mark.parametrize(
    "said", [b"<html>", b"{}", b'{"keys": [], "keys": []}', b"-----BEGIN CERTIFICATE-----", b"{" + b" " * 600_000]
)
async def test_answer_that_is_no_spiffe_bundle_is_refused(make: Callable[..., Federation], clock: Clock, said: bytes) -> None:
    """PEM neither: an endpoint speaks the one format that the standard gives it."""
    good = roots()
    federation = make(WEB, ask=Answers(spiffe(good), said))
    await look(federation)
    clock.now += 300.0
    await look(federation)
    assert (federation.bundles, federation.stats()[0]["failures"]) == ({PARTNER: good}, 1)


async def test_operators_file_begins_and_the_endpoint_goes_on(
    make: Callable[..., Federation], tmp_path: Path, clock: Clock
) -> None:
    """A changed file counts at once, whatever its number; then the endpoint's next one."""
    file = tmp_path / "first.json"
    first, fetched, local = roots(), roots(), roots()
    file.write_bytes(spiffe(first, 1))
    federation = make(replace(WEB, file=file), ask=Answers(spiffe(fetched, 7)))
    assert federation.bundles == {PARTNER: first}
    await look(federation)
    assert federation.bundles == {PARTNER: fetched}
    file.write_bytes(spiffe(local, 2))
    await look(federation)
    assert federation.bundles == {PARTNER: local}
    clock.now += 300.0
    await look(federation)
    assert federation.bundles == {PARTNER: fetched}


async def test_reload_keeps_what_is_known_of_relations_that_are_as_before(make: Callable[..., Federation], clock: Clock) -> None:
    """One that left is not believed any more, at once; one whose endpoint is another begins anew."""
    good = roots()
    answers = Answers(spiffe(good))
    federation = make(WEB, ask=answers)
    await look(federation)
    federation.follow(Config((replace(WEB, every=600.0),)))
    assert federation.bundles == {PARTNER: good}
    federation.follow(Config((replace(WEB, url="https://other.example/"),)))
    assert federation.bundles == {}
    federation.follow(Config((WEB,)))
    await look(federation)
    assert federation.bundles == {PARTNER: good}
    federation.follow(Config(()))
    assert (federation.bundles, federation.faults(), federation.stats()) == ({}, {}, [])
    with pytest.raises(ConfigError):
        federation.follow(Config((Entry(),)))


async def test_slow_endpoint_is_given_up_and_not_asked_twice_at_once(
    make: Callable[..., Federation], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look goes on meanwhile; the fetch is cut off in the end."""
    monkeypatch.setattr(endpoint, "PATIENCE", 0.2)
    gone = threading.Event()
    asked: list[Fetching] = []

    def ask(url: str, spiffe_id: str, roots: bytes, fetching: Fetching, *, can_be_near: bool) -> bytes:
        asked.append(fetching)
        gone.wait(10)
        return b""

    federation = make(WEB, ask=ask)
    await federation.look()
    clock.now += 1000.0
    await asyncio.sleep(0)
    await federation.look()
    await federation.settled()
    gone.set()
    assert (len(asked), asked[0].is_aborted, federation.stats()[0]["error"]) == (1, True, "it took too long")


async def test_lookup_that_hangs_is_not_begun_again(
    make: Callable[..., Federation], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can't be cut off: each interval would leave one more thread behind."""
    monkeypatch.setattr(endpoint, "PATIENCE", 0.05)
    gone = threading.Event()
    threads: list[threading.Thread] = []

    def ask(*_: Any, **__: Any) -> bytes:
        threads.append(threading.current_thread())
        gone.wait(10)
        return spiffe(roots())

    federation = make(WEB, ask=ask)
    for _ in range(3):
        await federation.look()
        await federation.settled()
        clock.now += 1000.0
    assert (len(threads), "still hangs" in federation.stats()[0]["error"]) == (1, True)
    gone.set()
    threads[0].join(10)
    await federation.look()
    await federation.settled()
    assert (len(threads), federation.stats()[0]["error"]) == (2, "")


def test_keeper_does_the_work(clock: Clock) -> None:
    """From `jobs()` to `cancel()`."""
    keeper = Keeper(clock=clock, source=random.Random(1))
    answers = Answers(spiffe(roots()))
    federation = Federation(Config((WEB,)), keeper, clock=clock, ask=answers)
    assert keeper.jobs == ()
    (job,) = federation.jobs()
    assert keeper.tick(clock.now) == 1
    job.cancel()
    assert keeper.jobs == ()


# ---------------------------------------------------------------------------------------------------- real endpoints


@dataclass
class Endpoint:
    """A real https server on loopback, that answers what a test says."""

    chain: bytes
    key: bytes
    folder: Path
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append({":path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
                status, fields, content = outer.answers[self.path]
                self.send_response(status)
                for name, value in {"content-length": str(len(content)), **fields}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A handshake that is refused is what is tested."""

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = self.folder / "pair.pem"
        pair.write_bytes(self.chain + self.key)
        context.load_cert_chain(pair)
        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Endpoint]]:
    started: list[Endpoint] = []

    def start(chain: bytes, key: bytes) -> Endpoint:
        folder = tmp_path / f"endpoint{len(started)}"
        folder.mkdir()
        started.append(Endpoint(chain, key, folder))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bytes, bytes]]:
    """Certificates of a public CA, which is one of the platform's roots for this test."""
    ca_key = certificates.new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "public CA")])
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)

    def builder(subject: x509.Name, key: Any, *, is_ca: bool) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(begin)
        made = made.not_valid_after(begin + datetime.timedelta(days=1))
        return made.add_extension(x509.BasicConstraints(is_ca, None), True)

    authority = builder(name, ca_key, is_ca=True).sign(ca_key, hashes.SHA256())
    (tmp_path / "platform.pem").write_bytes(certificates.pem(authority))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "platform.pem"))

    def issue(*names: x509.GeneralName, common: str = "") -> tuple[bytes, bytes]:
        key = certificates.new_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])
        made = builder(subject, key, is_ca=False)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), False)
        return certificates.pem(made.sign(ca_key, hashes.SHA256())), certificates.key_pem(key)

    return issue


LOCALHOST = x509.DNSName("localhost")


def get(url: str, spiffe_id: str = "", roots: bytes = b"") -> bytes:
    return endpoint.fetch(url, spiffe_id, roots, Fetching(), can_be_near=True)


def test_bundle_is_fetched_by_the_platforms_roots(serve: Callable[..., Endpoint], web: Any) -> None:
    """https_web: a GET without credentials, of the path and query that are configured."""
    server = serve(*web(LOCALHOST))
    server.answers["/td/bundle?x=1"] = (200, {}, b'{"keys": []}')
    assert get(f"{server.url}/td/bundle?x=1") == b'{"keys": []}'
    (asked,) = server.asked
    assert (asked["host"], "authorization" in asked, "cookie" in asked) == (server.url.removeprefix("https://"), False, False)


def test_address_is_proved_by_an_address(serve: Callable[..., Endpoint], web: Any) -> None:
    """A URL with an address needs a certificate for the address; one for a name won't do."""
    server = serve(*web(x509.IPAddress(ipaddress.ip_address("127.0.0.1"))))
    server.answers["/"] = (200, {}, b"{}")
    assert get(server.url.replace("localhost", "127.0.0.1")) == b"{}"
    with pytest.raises(MeshError, match="did not prove that it is localhost"):
        get(server.url)


@pytest.mark.parametrize(
    "names", [(), (x509.DNSName("other.example"),), (x509.DNSName("*"),), (x509.UniformResourceIdentifier("https://localhost"),)]
)
def test_server_of_another_name_is_refused(serve: Callable[..., Endpoint], web: Any, names: tuple[Any, ...]) -> None:
    """Nor does the common name count."""
    server = serve(*web(*names, common="localhost"))
    server.answers["/"] = (200, {}, b"{}")
    with pytest.raises(MeshError, match="did not prove that it is localhost"):
        get(server.url)
    assert server.asked == []


def test_server_of_an_unknown_ca_is_refused(
    serve: Callable[..., Endpoint], web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SVID is none of the web's certificates either."""
    server = serve(*web(LOCALHOST))
    other = CertificateAuthority.create(None, PARTNER).issue("localhost")
    svid = serve(other.chain, other.key)
    (tmp_path / "platform.pem").write_bytes(roots())
    for each in (server, svid):
        with pytest.raises(MeshError, match="did not prove that it is localhost"):
            get(each.url)


def test_keys_are_not_logged_for_debuggers(
    serve: Callable[..., Endpoint], web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable of the environment doesn't make this process write its secrets down."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    server = serve(*web(LOCALHOST))
    server.answers["/"] = (200, {}, b"{}")
    assert (get(server.url), (tmp_path / "keys").exists()) == (b"{}", False)


@pytest.fixture
def partner(serve: Callable[..., Endpoint]) -> tuple[CertificateAuthority, Endpoint]:
    """An endpoint that proves itself with an X.509-SVID of its own trust domain."""
    authority = CertificateAuthority.create(None, PARTNER)
    issued = authority.issue("bundles", spiffe_id=SERVER_ID)
    server = serve(issued.chain, issued.key)
    server.answers["/bundle"] = (200, {}, spiffe(authority.bundle, 1))
    return authority, server


def test_bundle_is_fetched_from_who_proves_the_configured_identity(partner: tuple[CertificateAuthority, Endpoint]) -> None:
    """https_spiffe: by the roots of the trust domain; the name of the host says nothing, and we show no certificate."""
    authority, server = partner
    content = server.answers["/bundle"][2]
    assert get(f"{server.url}/bundle", SERVER_ID, authority.bundle) == content
    assert get(f"{server.url}/bundle".replace("localhost", "127.0.0.1"), SERVER_ID, authority.bundle) == content


@pytest.mark.parametrize("size", [0, 1, 100_000, 600_000])
def test_answers_of_all_sizes_are_read_up_to_the_limit(partner: tuple[CertificateAuthority, Endpoint], size: int) -> None:
    """In many records; what is longer than a bundle may be is cut, and then refused by the parser."""
    authority, server = partner
    server.answers["/bundle"] = (200, {}, b"x" * size)
    found = get(f"{server.url}/bundle", SERVER_ID, authority.bundle)
    assert len(found) == size if size < bundle.LIMIT else len(found) > bundle.LIMIT


@pytest.mark.parametrize(
    "case", ["another identity", "another trust domain", "another root", "a certificate of the web", "an expired certificate"]
)
def test_who_does_not_prove_the_configured_identity_is_not_asked(
    partner: tuple[CertificateAuthority, Endpoint], serve: Callable[..., Endpoint], web: Any, case: str
) -> None:
    """Exactly the SPIFFE ID, by a root of its trust domain, now."""
    authority, server = partner
    expected, trusted = SERVER_ID, authority.bundle
    if case == "another identity":
        expected = f"{SERVER_ID}2"
    elif case == "another trust domain":
        expected, trusted = "spiffe://other.example/ns/default/sa/bundles", roots("other.example")
    elif case == "another root":
        trusted = roots()
    elif case == "a certificate of the web":
        server = serve(*web(LOCALHOST))
    else:
        past = CertificateAuthority.create(None, PARTNER, clock=lambda: time.time() - 7200.0)
        issued = past.issue("bundles", 3600.0, spiffe_id=SERVER_ID)
        server, trusted = serve(issued.chain, issued.key), past.bundle
    with pytest.raises(MeshError, match="did not prove its identity"):
        get(f"{server.url}/bundle", expected, trusted)
    assert server.asked == []


async def test_endpoint_is_checked_with_the_latest_bundle(
    make: Callable[..., Federation], partner: tuple[CertificateAuthority, Endpoint], tmp_path: Path, clock: Clock
) -> None:
    """The first one from the file; then each that was fetched: the roots of the partner may turn over without us."""
    authority, server = partner
    file = tmp_path / "first.pem"
    file.write_bytes(authority.bundle)
    entry = Entry(file=file, url=f"{server.url}/bundle", profile="https_spiffe", spiffe_id=SERVER_ID, can_be_local=True)
    federation = make(entry)
    successor = CertificateAuthority.create(None, PARTNER)
    server.answers["/bundle"] = (200, {}, spiffe(successor.bundle, 2))
    await look(federation)
    assert federation.bundles == {PARTNER: successor.bundle}
    clock.now += 300.0
    await look(federation)
    assert "did not prove its identity" in federation.stats()[0]["error"]
    assert federation.bundles == {PARTNER: successor.bundle}


async def test_endpoint_may_prove_itself_in_another_trust_domain(
    make: Callable[..., Federation], partner: tuple[CertificateAuthority, Endpoint]
) -> None:
    """One that is federated, or ours: by the latest bundle of that one. Without any it isn't asked."""
    authority, server = partner
    other = roots("other.example")
    server.answers["/bundle"] = (200, {}, spiffe(other, 1))
    entry = Entry("other.example", None, f"{server.url}/bundle", "https_spiffe", SERVER_ID, can_be_local=True)
    alone = make(entry)
    await look(alone)
    assert (alone.bundles, server.asked) == ({}, [])
    assert f"there is no bundle of {PARTNER}" in alone.faults()["other.example"]
    ours = make(entry, own=lambda: {PARTNER: authority.bundle})
    await look(ours)
    assert ours.bundles == {"other.example": other}


def test_redirect_is_followed_under_the_same_rules(serve: Callable[..., Endpoint], web: Any) -> None:
    """Three times at most, to https and to who proves the name that is written there; where it led is forgotten."""
    server = serve(*web(LOCALHOST))
    for number, status in enumerate((301, 302, 307), 1):
        server.answers[f"/{number}"] = (status, {"location": f"/{number + 1}" if number > 1 else f"{server.url}/2"}, b"")
    server.answers["/4"] = (200, {}, b"{}")
    assert get(f"{server.url}/1") == b"{}"
    server.answers["/0"] = (308, {"location": "/1"}, b"")
    with pytest.raises(MeshError, match="redirects more than 3 times"):
        get(f"{server.url}/0")


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://localhost/", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("https://user@localhost/", "no user or password"),
        ("https://127.0.0.1:{port}/4", "did not prove that it is 127.0.0.1"),
        ("", "answers 302"),
    ],
)
def test_redirect_to_what_is_no_endpoint_is_refused(serve: Callable[..., Endpoint], web: Any, location: str, reason: str) -> None:
    """And the content of a redirect is no bundle."""
    server = serve(*web(LOCALHOST))
    server.answers["/"] = (302, {"location": location.format(port=server.server.server_port)}, b'{"keys": []}')
    server.answers["/4"] = (200, {}, b"{}")
    with pytest.raises(MeshError, match=reason):
        get(server.url)


def test_redirect_of_a_spiffe_endpoint_leads_to_the_same_identity(
    partner: tuple[CertificateAuthority, Endpoint], serve: Callable[..., Endpoint]
) -> None:
    """On another host, maybe; but who answers there must be who was configured."""
    authority, server = partner
    issued = authority.issue("bundles", spiffe_id=SERVER_ID)
    same = serve(issued.chain, issued.key)
    same.answers["/b"] = (200, {}, b"{}")
    server.answers["/bundle"] = (307, {"location": f"{same.url}/b"}, b"")
    assert get(f"{server.url}/bundle", SERVER_ID, authority.bundle) == b"{}"
    issued = authority.issue("thief")
    other = serve(issued.chain, issued.key)
    server.answers["/bundle"] = (307, {"location": f"{other.url}/b"}, b"")
    with pytest.raises(MeshError, match="did not prove its identity"):
        get(f"{server.url}/bundle", SERVER_ID, authority.bundle)
    assert other.asked == []


@pytest.mark.parametrize("spiffe_id", ["", SERVER_ID])
def test_address_of_this_machine_is_asked_only_where_the_configuration_says_so(
    partner: tuple[CertificateAuthority, Endpoint], spiffe_id: str
) -> None:
    """Nor by a redirect: who answers for an endpoint must not choose whom we call in here."""
    authority, server = partner
    for url in (server.url, "https://169.254.169.254/latest", "https://[::1]/"):
        with pytest.raises(MeshError, match="an address of this machine, its link or a metadata service"):
            endpoint.fetch(f"{url}/bundle", spiffe_id, authority.bundle, Fetching())
    assert server.asked == []


def test_redirect_into_this_machine_is_refused(partner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint is outside; what it redirects to isn't."""
    authority, server = partner
    server.answers["/bundle"] = (302, {"location": f"{server.url}/4"}, b"")
    near = [False, True]
    monkeypatch.setattr(endpoint, "is_near", lambda host: near.pop(0))
    monkeypatch.setattr(
        endpoint.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", server.server.server_port))]
    )
    with pytest.raises(MeshError, match="an address of this machine"):
        endpoint.fetch(f"{server.url}/bundle", SERVER_ID, authority.bundle, Fetching())
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [204, 401, 404, 500])
def test_other_answers_are_no_bundle(partner: tuple[CertificateAuthority, Endpoint], status: int) -> None:
    """Whatever stands in them."""
    authority, server = partner
    server.answers["/bundle"] = (status, {}, b"" if status == 204 else b'{"keys": []}')
    with pytest.raises(MeshError, match=f"answers {status}"):
        get(f"{server.url}/bundle", SERVER_ID, authority.bundle)


async def test_fetched_bundle_lets_the_partner_in(
    make: Callable[..., Federation], partner: tuple[CertificateAuthority, Endpoint], tmp_path: Path
) -> None:
    """The whole way: from the endpoint into the next generation of our identity."""
    from meshlib.secure import FolderSource, IdentityStore

    authority, server = partner
    (tmp_path / "first.json").write_bytes(spiffe(authority.bundle, 1))
    entry = Entry(PARTNER, tmp_path / "first.json", f"{server.url}/bundle", "https_spiffe", SERVER_ID, can_be_local=True)
    federation = make(entry)
    ours = CertificateAuthority.create(None, "shop.internal")
    ours.write("orders", tmp_path)
    source = FolderSource(tmp_path, "orders", "shop.internal", ours.id_of("orders"))
    store = IdentityStore(source, mode="enforce", federation=federation)
    store.require(0.0)
    theirs = authority.issue("web")
    chain = [each.public_bytes(certificates.serialization.Encoding.DER) for each in x509.load_pem_x509_certificates(theirs.chain)]
    assert store.server_tls(True).accepts(chain) is True
    server.answers["/bundle"] = (200, {}, b'{"keys": [], "spiffe_sequence": 2}')
    await look(federation)
    assert store.refresh(1.0) is True
    assert store.server_tls(True).accepts(chain) is False


def test_entry_is_json_in_a_map_too() -> None:
    """What partners exchange by hand."""
    pem = roots()
    content = json.dumps({"trust_domains": {PARTNER: json.loads(spiffe(pem, 1))}}).encode()
    assert bundle.parse_map(content).bundles[PARTNER].pem == pem
