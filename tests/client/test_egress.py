"""May it leave, and as what? Hosts that are listed, redirects that are not, credentials that go nowhere else."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib.client.egress import Credential, Egress, EgressRules, SecretText, check_egress, departure, dressed, plain_host
from tests.support import Request, Scripted, free_port, mesh_of, ok, scripted

KINDS = pytest.mark.parametrize("kind", ["client", "sync_client"])
SECRET = "sk_live_s3cret"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own, and a credential."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("STRIPE_KEY", SECRET)


def stripe(host: str = "localhost", **given: Any) -> Credential:
    return Credential(host, **{"header": "authorization", "prefix": "Bearer ", "env": "STRIPE_KEY"} | given)


# ---------------------------------------------------------------- which hosts


@pytest.mark.parametrize(
    ("host", "is_out"),
    [
        ("api.stripe.com", True),
        ("API.Stripe.COM", True),
        ("api.stripe.com.", True),
        ("stripe.com", False),
        ("evil-api.stripe.com", False),
        ("api.stripe.com.evil.example", False),
        ("x.api.stripe.com", False),
        ("raw.github.com", True),
        ("RAW.GITHUB.COM.", True),
        ("github.com", False),
        ("a.b.github.com", False),
        ("evilgithub.com", False),
        (".github.com", False),
        ("192.0.2.7", True),
        ("::ffff:192.0.2.7", True),
        ("192.0.2.8", False),
        ("2001:db8::1", True),
        ("[2001:DB8:0:0::1]", True),
        ("2001:db8::2", False),
        ("192.0.2.7.github.com", False),
        ("9.2.0.192", False),
        ("0xc0.0.2.7", False),
        ("localhost", True),
    ],
)
def test_under_deny_only_listed_hosts_leave(host: str, is_out: bool) -> None:
    """Exactly, but for case and the dot at the end; a star is one label, and never part of an address."""
    hosts = ["api.stripe.com", "*.github.com", "*.2.0.192", "192.0.2.7", "2001:db8::1", "localhost"]
    assert EgressRules("deny", hosts).lets_out(host) is is_out


def test_a_star_is_no_address() -> None:
    """Nobody means 7.2.0.192 by a name."""
    assert not EgressRules("deny", ["*.2.0.192"]).lets_out("7.2.0.192")
    assert EgressRules("deny", ["*.2.0.example"]).lets_out("7.2.0.example")


@pytest.mark.parametrize("rules", ["deny", "allow", EgressRules("deny", ["intranet"]), EgressRules("allow")])
def test_a_bare_name_is_a_service_that_is_missing(rules: str | EgressRules) -> None:
    """Whatever egress says: a forgotten service must not become a call to somebody's resolver."""
    with pytest.raises(meshlib.UnknownService):
        check_egress("intranet", rules)


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ("deny", 'egress: {policy: deny, hosts: ["api.example.com"]}'),
        (EgressRules("deny"), 'egress: {policy: deny, hosts: ["api.example.com"]}'),
        (EgressRules("deny", ["a.example"]), '"api.example.com", under `hosts` of `egress`'),
    ],
)
def test_a_refusal_names_the_line_to_add(rules: str | EgressRules, line: str) -> None:
    """What happened, and what to do."""
    with pytest.raises(meshlib.Denied) as caught:
        check_egress("API.example.com", rules)
    assert (caught.value.rule, line in caught.value.hint) == ("egress: deny", True)
    check_egress("api.example.com", "allow")


def test_hosts_are_compared_in_one_form() -> None:
    """Of names and of addresses."""
    given = ["A.b.", "[::1]", "::FFFF:10.0.0.1", "0:0:0:0:0:0:0:1", "10.0.0.1", "010.0.0.1"]
    assert [plain_host(host) for host in given] == ["a.b", "::1", "10.0.0.1", "::1", "10.0.0.1", "010.0.0.1"]


# ---------------------------------------------------------------- through httpx


async def ask(mesh: meshlib.Mesh, kind: str, url: str, **options: Any) -> httpx.Response:
    """One GET by a new client; options of the client's, and `headers` of the call's."""
    headers = options.pop("headers", None)
    extensions = options.pop("extensions", None)
    if kind == "client":
        async with mesh.client(**options) as http:
            return await http.get(url, headers=headers, extensions=extensions)

    def blocking() -> httpx.Response:
        with mesh.sync_client(**options) as http:
            return http.get(url, headers=headers, extensions=extensions)

    return await asyncio.to_thread(blocking)


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"here")


def to(place: Callable[[], str]) -> Any:
    async def redirect(server: Scripted, request: Request) -> bytes:
        return f"HTTP/1.1 302 Found\r\nlocation: {place()}\r\ncontent-length: 0\r\n\r\n".encode()

    return redirect


@KINDS
async def test_a_redirect_to_a_host_that_is_not_listed_is_refused(tmp_path: Path, kind: str) -> None:
    """Each call that leaves is asked about, whoever led there."""
    async with scripted(hello) as target, scripted(to(lambda: f"http://localhost:{target.port}/")) as first:
        with mesh_of(tmp_path, {}) as mesh:
            mesh.outbound.egress = EgressRules("deny", ["127.0.0.1"])
            with pytest.raises(meshlib.Denied) as caught:
                await ask(mesh, kind, f"http://{first.address}/", follow_redirects=True)
            assert isinstance(caught.value, httpx.HTTPError)
            assert '"localhost"' in caught.value.hint
            assert target.requests == []
            mesh.outbound.egress = EgressRules("deny", ["127.0.0.1", "localhost"])
            assert (await ask(mesh, kind, f"http://{first.address}/", follow_redirects=True)).text == "here"


@KINDS
async def test_a_service_s_redirect_outside_is_refused_too(tmp_path: Path, kind: str) -> None:
    """A service that was taken over leads nobody out."""
    async with scripted(hello) as target, scripted(to(lambda: f"http://{target.address}/")) as orders:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [orders.address]}}}, egress="deny") as mesh:
            with pytest.raises(meshlib.Denied):
                await ask(mesh, kind, "http://orders/", follow_redirects=True)
    assert target.requests == []


@KINDS
async def test_headers_of_the_mesh_stay_in_the_mesh(tmp_path: Path, kind: str) -> None:
    """Baggage, deadlines, and our member of tracestate; the rest of a trace goes along."""
    given = {
        "Baggage": "userid=alice,token=secret",
        "X-Mesh-Deadline-Ms": "100",
        "x-mesh-anything": "1",
        "tracestate": "meshlib=attempt:2,vendor=1",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "x-own": "kept",
    }
    async with scripted(hello) as server:
        with mesh_of(tmp_path, {}) as mesh:
            answer = await ask(mesh, kind, f"http://{server.address}/", headers=given)
    sent = server.requests[0].headers
    assert {name for name in sent if name == "baggage" or name.startswith("x-mesh-")} == set()
    assert (sent["tracestate"], sent["traceparent"], sent["x-own"]) == ("vendor=1", given["traceparent"], "kept")
    assert answer.request.headers["baggage"] == given["Baggage"]


@KINDS
async def test_a_body_goes_along_with_a_call_that_is_dressed(tmp_path: Path, kind: str) -> None:
    """Bytes and streams; the length is the one that was computed for it."""

    def pieces() -> Iterator[bytes]:
        yield b"one"
        yield b"two"

    async def apieces() -> Any:
        for piece in pieces():
            yield piece

    async with scripted(hello) as server:
        with mesh_of(tmp_path, {}) as mesh:
            url, headers = f"http://{server.address}/", {"baggage": "a=b"}
            if kind == "client":
                async with mesh.client() as http:
                    await http.post(url, content=b"bytes", headers=headers)
                    await http.post(url, content=apieces(), headers=headers)
            else:

                def blocking() -> None:
                    with mesh.sync_client() as http:
                        http.post(url, content=b"bytes", headers=headers)
                        http.post(url, content=pieces(), headers=headers)

                await asyncio.to_thread(blocking)
    assert [(one.body, one.headers.get("content-length")) for one in server.requests] == [(b"bytes", "5"), (b"onetwo", None)]


# ---------------------------------------------------------------- credentials


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server for localhost whose root everybody trusts who looks into the environment."""
    return outside_tls(tmp_path, monkeypatch)


def outside_tls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "outside")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(hours=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    file = folder / "outside.pem"
    file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "outside.key").write_bytes(key.private_bytes(*form))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, folder / "outside.key")
    return context


@KINDS
@pytest.mark.parametrize("policy", ["allow", "deny"])
async def test_a_credential_is_added_and_the_application_never_sees_it(
    tmp_path: Path, tls: ssl.SSLContext, kind: str, policy: str
) -> None:
    """On the wire it is; in the request that the application holds, the response's, and its hooks, it isn't."""
    async with scripted(hello, ssl=tls) as server:
        with mesh_of(tmp_path, {}) as mesh:
            mesh.outbound.egress = EgressRules(policy, ["localhost"], [stripe()])
            answer = await ask(mesh, kind, f"https://LOCALHOST:{server.port}/", headers={"x-own": "1"})
    assert (answer.text, server.requests[0].headers["authorization"]) == ("here", f"Bearer {SECRET}")
    assert "authorization" not in answer.request.headers


@KINDS
async def test_a_credential_goes_only_over_tls_to_exactly_its_host(tmp_path: Path, tls: ssl.SSLContext, kind: str) -> None:
    """Not over http, not to another name of the same machine, not where nothing proves who it is, not over what was written."""
    async with scripted(hello, ssl=tls) as server, scripted(hello) as plain:
        with mesh_of(tmp_path, {}) as mesh:
            mesh.outbound.egress = EgressRules("allow", (), [stripe()])
            there = f"https://localhost:{server.port}/"
            await ask(mesh, kind, f"http://localhost:{plain.port}/")
            await ask(mesh, kind, f"https://127.0.0.1:{server.port}/")
            await ask(mesh, kind, there, verify=False)
            await ask(mesh, kind, there, extensions={"sni_hostname": "127.0.0.1"})
            await ask(mesh, kind, there, headers={"Authorization": "mine"})
            await ask(mesh, kind, there)
    assert [request.headers.get("authorization") for request in [*plain.requests, *server.requests]] == [
        *(None, None, None, None, "mine"),
        f"Bearer {SECRET}",
    ]


@KINDS
async def test_a_redirect_doesnt_carry_a_credential_along(tmp_path: Path, tls: ssl.SSLContext, kind: str) -> None:
    """Neither to another host, nor down to http; a header of another name than authorization neither."""
    places: list[str] = []
    async with (
        scripted(hello) as plain,
        scripted(hello, ssl=tls) as other,
        scripted(to(lambda: places[0]), ssl=tls) as first,
    ):
        with mesh_of(tmp_path, {}) as mesh:
            mesh.outbound.egress = EgressRules("allow", (), [stripe(header="x-api-key", prefix="")])
            for place in (f"http://localhost:{plain.port}/", f"https://127.0.0.1:{other.port}/"):
                places[:] = [place]
                await ask(mesh, kind, f"https://localhost:{first.port}/", follow_redirects=True)
    assert [request.headers.get("x-api-key") for request in first.requests] == [SECRET, SECRET]
    assert [request.headers.get("x-api-key") for request in [*plain.requests, *other.requests]] == [None, None]


@KINDS
async def test_a_service_never_gets_a_credential(tmp_path: Path, kind: str) -> None:
    """Not even one whose name is that of the host, nor over a URL that says https."""
    async with scripted(hello) as orders:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [orders.address]}}}) as mesh:
            mesh.outbound.egress = EgressRules("allow", (), [stripe("orders")])
            await ask(mesh, kind, "http://orders/")
            with pytest.raises(meshlib.Denied):
                await ask(mesh, kind, "https://orders/")
    assert [request.headers.get("authorization") for request in orders.requests] == [None]


@KINDS
@pytest.mark.parametrize("value", [None, "", "  ", "a\nx-evil: 1", "a\x00b"])
async def test_a_credential_that_is_missing_or_cant_be_sent_stops_the_call(
    tmp_path: Path, kind: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is sent, without the value."""
    if value is None or "\x00" in value:
        monkeypatch.delenv("STRIPE_KEY")
    else:
        monkeypatch.setenv("STRIPE_KEY", value)
    credential = stripe()
    if value is not None and "\x00" in value:
        file = tmp_path / "stripe.key"
        file.write_text(value)
        file.chmod(0o600)
        credential = Credential("localhost", "authorization", file=file, folders=[tmp_path])
    with mesh_of(tmp_path, {}) as mesh:
        mesh.outbound.egress = EgressRules("allow", (), [credential])
        with pytest.raises(meshlib.Refused) as caught:
            await ask(mesh, kind, f"https://localhost:{free_port()}/")
    assert caught.value.reason == "egress.credential"
    assert "Nothing was sent" in str(caught.value) and "evil" not in str(caught.value)


def written(file: Path, text: str, mode: int = 0o600) -> Path:
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(mode)
    fresh.rename(file)
    return file


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At most once a second; while it can't be read, what was good stays in use, and that is told once."""
    now = [0.0]
    file = written(tmp_path / "stripe.key", "one\n")
    credential = Credential("api.example.com", "x-api-key", file=file, folders=[tmp_path], clock=lambda: now[0])
    assert credential.value() == b"one"
    written(file, "two")
    assert credential.value() == b"one"
    now[0] = 1.0
    assert credential.value() == b"two"
    file.unlink()
    for moment in (2.0, 3.0):
        now[0] = moment
        assert credential.value() == b"two"
    assert len(caplog.records) == 1 and "two" not in caplog.text
    written(file, "three")
    now[0] = 4.0
    assert credential.value() == b"three"


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """As a key's; and one outside of the folders for it is not read at all."""
    file = written(tmp_path / "stripe.key", SECRET, 0o644)
    with pytest.raises(meshlib.Refused, match="other users"):
        Credential("a.example", "x-api-key", file=file, folders=[tmp_path]).value()
    with pytest.raises(meshlib.Refused, match="in no folder"):
        Credential("a.example", "x-api-key", file=Path("/etc/passwd"), folders=[tmp_path]).value()


def test_a_credential_shows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not in its repr, its value's, a pickle or a copy; and a log of the headers shows none either."""
    file = written(tmp_path / "stripe.key", SECRET)
    for credential in (stripe(), Credential("a.example", "x-api-key", file=file, folders=[tmp_path])):
        value = credential.value()
        assert SECRET not in f"{credential!r} {credential} {value!r} {value} {[value]}"
        assert credential.host in repr(credential)
        for act in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                act(credential)
    with caplog.at_level(logging.DEBUG):
        sent = dressed(EgressRules("allow", (), [stripe()]), "https", "localhost", [])
    assert sent == [(b"authorization", f"Bearer {SECRET}".encode())]
    assert SECRET not in f"{sent}{caplog.text}"


def test_a_list_without_anything_to_do_is_left_alone() -> None:
    """The common case makes no copy, and no new request."""
    headers = [(b"host", b"a.example"), (b"tracestate", b"vendor=1")]
    for rules in ("allow", "deny", EgressRules("deny", ["a.example"], [stripe()])):
        assert dressed(rules, "https", "a.example", headers) is headers
    request = httpx.Request("GET", "https://a.example/")
    egress = Egress(httpx, is_async=False)
    assert egress.dressed("allow", request) is request


@pytest.mark.parametrize(
    ("verify", "is_verifying"),
    [(True, True), (False, False), (ssl.create_default_context(), True), (ssl._create_unverified_context(), False)],
)
def test_egress_knows_whether_it_verifies(verify: Any, is_verifying: bool) -> None:
    """Also of a context that somebody made."""
    assert Egress(httpx, is_async=False, verify=verify).is_verifying is is_verifying


def test_others_get_their_headers_as_text(tmp_path: Path) -> None:
    """What stands in for httpx: asked, counted and dressed in one; a secret shows itself on the wire only."""
    with mesh_of(tmp_path, {}) as mesh:
        way = mesh.outbound
        way.egress = EgressRules("deny", ["localhost"], [stripe()])
        sent = departure(way, "https", "localhost", [("accept", "*/*"), ("baggage", "a=b")])
        assert sent == [("accept", "*/*"), ("authorization", f"Bearer {SECRET}")]
        assert type(sent[1][1]) is SecretText and SECRET not in repr(sent)
        assert departure(way, "https", "localhost", [("accept", "*/*")], is_verified=False) == [("accept", "*/*")]
        with pytest.raises(meshlib.Denied):
            departure(way, "https", "a.example", [])
        assert 'meshlib_route_egress_total{host="localhost"} 2' in mesh.metrics()


def test_rules_come_from_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts, credentials from the environment and from a file beside mesh.yaml."""
    written(tmp_path / "stripe.key", SECRET)
    monkeypatch.setenv("HUB", "t0ken")
    egress = {
        "policy": "deny",
        "hosts": ["api.stripe.com", "*.github.com"],
        "credentials": [
            {"host": "api.stripe.com", "header": "x-api-key", "file": "stripe.key"},
            {"host": "api.github.com", "env": "HUB"},
        ],
    }
    with mesh_of(tmp_path, {}, egress=egress) as mesh:
        rules = EgressRules.of(mesh.config)
    assert [rules.lets_out(host) for host in ("api.stripe.com", "api.github.com", "stripe.com")] == [True, True, False]
    assert dressed(rules, "https", "api.stripe.com", []) == [(b"x-api-key", SECRET.encode())]
    assert dressed(rules, "https", "api.github.com", []) == [(b"authorization", b"Bearer t0ken")]
