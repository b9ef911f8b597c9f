"""Does every server let calls in by the same rules, and carry them the same way? Real servers, raw sockets, a foreign TLS."""

from __future__ import annotations

import socket
import ssl
import time

import pytest

from tests.conformance.server.servers import Server
from tests.conformance.server.wire import Wire, connection

STOREFRONT = "spiffe://shop.internal/ns/default/sa/storefront"

# ------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "target",
    [
        "/admin", "//admin", "///admin", "/x/../admin", "/x/%2e%2e/admin", "/./admin", "/%61dmin", "/admin%2fx", "/admin/", "/admin;a=b", "/admin?x",
        "/x%2f..%2fadmin", "/x%5c..%5cadmin", "/%2fadmin", "/public/..;/admin", "/public/../admin",
    ],
)  # fmt: skip
def test_another_spelling_of_a_denied_path_is_denied(enforcing: Server, target: str) -> None:
    """Whatever the server makes of the target: the rule is asked about the canonical path."""
    assert enforcing.ask("GET", target).status == 403


@pytest.mark.parametrize(
    "target", ["/admin%0a", "/admin%00", "/%c0%afadmin", "/admin%ff", "/%252fadmin", "/x//../admin", "/%zz", "/a%0d%0ab"]
)
def test_a_path_with_two_readings_is_refused(enforcing: Server, target: str) -> None:
    """400, by the server or by the gate, before any handler."""
    assert enforcing.ask("GET", target).status == 400


@pytest.mark.parametrize("target", ["admin", "/admin\x00", "/admin\x7f", "/caf\xe9"])
def test_a_target_that_is_none_is_refused(enforcing: Server, target: str) -> None:
    """Some servers refuse it themselves, some leave it to the gate; none lets it in."""
    try:
        assert enforcing.ask("GET", target).status in (400, 404)
    except (ConnectionError, ssl.SSLError):
        pass  # closed without an answer


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/x/../public/a", "/public/a"),
        ("//public//a", "/public/a"),
        ("/public%2Fa", "/public/a"),
        ("/public/%61", "/public/a"),
        ("/public/%E2%82%AC", "/public/€"),
        ("/public/a%20b", "/public/a b"),
        ("/public/%2561", "/public/%61"),
        ("/public/a/", "/public/a/"),
    ],
)
def test_the_handler_sees_the_path_that_was_judged(enforcing: Server, target: str, path: str) -> None:
    """In its decoded and in its raw form; and the query as it came."""
    found = enforcing.ask("GET", target + "?q=%2e%2e/&r=1").json
    assert (found["path"], found["query"]) == (path, "q=%2e%2e/&r=1")
    assert enforcing.ask("GET", found["raw"]).json["path"] == path


def test_an_absolute_target_is_its_path(enforcing: Server) -> None:
    """With our own authority; another one is refused or ignored, never judged as another path."""
    answer = enforcing.ask("GET", "http://orders/public/a")
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert answer.json["path"] == "/public/a"
    assert enforcing.ask("GET", "http://evil/admin").status in (400, 403)


# ------------------------------------------------------------------------------------------------ methods and headers


def test_a_deny_for_get_covers_head(enforcing: Server) -> None:
    """A HEAD tells what a GET would."""
    assert enforcing.ask("HEAD", "/admin").status == 403


@pytest.mark.parametrize(("method", "statuses"), [("get", (400, 405)), ("TRACE", (405,)), ("G@T", (400,))])
def test_an_odd_method_is_refused(enforcing: Server, method: str, statuses: tuple[int, ...]) -> None:
    """Upper-case words only, and TRACE never."""
    assert enforcing.ask(method, "/public").status in statuses


def test_two_hosts_are_refused(enforcing: Server) -> None:
    """Which of the two would count?"""
    assert enforcing.ask("GET", "/public", "Host: orders", "Host: evil").status == 400


@pytest.mark.parametrize(
    "headers", [("Content-Length: 3", "Transfer-Encoding: chunked"), ("Content-Length: 3", "Content-Length: 4")]
)
def test_two_framings_are_refused(enforcing: Server, headers: tuple[str, ...]) -> None:
    """Two parsers would read two requests."""
    with enforcing.connect() as wire:
        wire.send("\r\n".join(["POST /items/7 HTTP/1.1", "Host: orders", *headers, "", "0\r\n\r\n"]).encode())
        assert wire.answer().status in (400, 501)


@pytest.mark.parametrize(
    "name", ["X-Forwarded-Client-Cert", "Client-Cert", "X-Mesh-Peer", "X-Envoy-Original-Path", "X_Forwarded_Client_Cert", "X_Ok"]
)
@pytest.mark.parametrize("tls", ["storefront", None])
def test_identity_headers_from_outside_never_get_in(permissive: Server, name: str, tls: str | None) -> None:
    """Over TLS and over plain text; other headers do."""
    answer = permissive.ask("GET", "/public", f"{name}: URI=spiffe://shop.internal/ns/default/sa/admin", "X-Other: 1", tls=tls)
    if answer.status == 200:
        assert name.lower().replace("_", "-") not in answer.json["headers"]
        assert answer.json["headers"]["x-other"] == "1"
    else:
        assert answer.status == 400


def test_a_prefix_header_does_not_move_the_application(permissive: Server) -> None:
    """SCRIPT_NAME from a caller would make one path judged and another one routed."""
    answer = permissive.ask("GET", "/public/admin", "SCRIPT_NAME: /public", "SCRIPT-NAME: /public")
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert answer.json["path"] == "/public/admin"


def test_the_scheme_is_the_connections(permissive: Server) -> None:
    """No header makes https of http."""
    lies = ("X-Forwarded-Proto: https", "X-Forwarded-Ssl: on", "Forwarded: proto=https")
    assert permissive.ask("GET", "/public", *lies, tls=None).json["scheme"] == "http"
    assert permissive.ask("GET", "/public", "X-Forwarded-Proto: http").json["scheme"] == "https"


# ------------------------------------------------------------------------------------------------ who


def test_the_handler_knows_its_caller(enforcing: Server) -> None:
    """As the certificate proved it, with its serial number; and where the customs of TLS put it."""
    found = enforcing.ask("GET", "/items/7").json
    assert (found["peer"], found["scheme"]) == (STOREFRONT, "https")
    assert found["serial"]
    if enforcing.is_asgi:
        assert (found["tls"]["tls_version"], found["tls"]["cipher_suite"] in (0x1301, 0x1302, 0x1303)) == (0x0304, True)
    else:
        assert (found["tls"]["SSL_CLIENT_VERIFY"], found["tls"]["SSL_PROTOCOL"]) == ("SUCCESS", "TLSv1.3")
        assert found["tls"]["SSL_CLIENT_CERT"].startswith("-----BEGIN CERTIFICATE-----")


def test_who_is_not_named_is_denied(enforcing: Server) -> None:
    """A certificate of our mesh is an identity, not a permission."""
    answer = enforcing.ask("GET", "/items/7", tls="stranger")
    assert (answer.status, answer.json["reason"], answer.headers["content-type"]) == (
        403,
        "secure.denied",
        "application/problem+json",
    )
    assert enforcing.ask("GET", "/public", tls="stranger").json["peer"].endswith("/stranger")
    assert enforcing.ask("POST", "/public", tls="stranger").status == 403


@pytest.mark.parametrize("tls", ["nobody", "foreign"])
def test_who_proves_nothing_does_not_come_in(enforcing: Server, tls: str) -> None:
    """No certificate, or one of another CA: the handshake fails, and nothing is asked."""
    before = enforcing.numbers()["door"]["failed"]
    with pytest.raises((ssl.SSLError, ConnectionError)):
        enforcing.ask("GET", "/public", tls=tls)
    if enforcing.kind != "gunicorn-uvicorn":  # each of its processes counts for itself
        assert enforcing.numbers()["door"]["failed"] == before + 1


def test_a_plain_caller_is_told_what_the_port_speaks(enforcing: Server) -> None:
    """In words, with 400; not a byte of the request is taken for one."""
    with enforcing.connect(None) as wire:
        answer = wire.ask("GET", "/public")
        assert (answer.status, b"mutual TLS" in answer.body, answer.headers["connection"]) == (400, True, "close")
        assert wire.is_closed


def test_a_plain_request_behind_a_refused_one_is_not_served(enforcing: Server) -> None:
    """One answer, then nothing."""
    with enforcing.connect(None) as wire:
        wire.send(b"GET /public HTTP/1.1\r\nHost: orders\r\n\r\n" * 3)
        assert wire.answer().status == 400
        assert wire.is_closed


def test_permissive_takes_both_on_one_port(permissive: Server) -> None:
    """And knows who can prove themselves, and who can't."""
    assert permissive.ask("GET", "/items/7").json["peer"] == STOREFRONT
    assert permissive.ask("GET", "/items/7", tls=None).json["peer"] == ""
    assert permissive.ask("GET", "/items/7", tls="nobody").json["peer"] == ""


def test_permissive_refuses_nobody_by_rule_but_reports_it(permissive: Server) -> None:
    """The step before enforce: what would be refused is counted."""
    assert permissive.ask("GET", "/admin", tls=None).status == 200
    if permissive.kind != "gunicorn-uvicorn":
        assert sum(row["would_deny"] for row in permissive.numbers()["gate"]) >= 1


def test_tls_that_comes_in_drops_is_tls(enforcing: Server) -> None:
    """The first byte alone decides; the rest of the handshake may take its time."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = enforcing.world.storefront.wrap_bio(incoming, outgoing)
    with enforcing.connect(None) as wire:
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def step(data: bytes) -> None:
            for index in range(0, len(data), 97):
                wire.send(data[index : index + 97])
            if data[:1] == b"\x16" and len(data) > 1:
                wire.send(b"")

        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                step(outgoing.read())
                incoming.write(wire.sock.recv(65536))
        tls.write(b"GET /public HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n")
        step(outgoing.read())
        answer = b""
        while b"}" not in answer:
            incoming.write(wire.sock.recv(65536))
            try:
                answer += tls.read(65536)
            except ssl.SSLWantReadError:
                continue
    assert answer.startswith(b"HTTP/1.1 200")


def test_garbage_after_the_first_byte_is_no_tls(enforcing: Server) -> None:
    """The connection ends; the server goes on."""
    with enforcing.connect(None) as wire:
        wire.send(b"\x16" + b"GET / HTTP/1.1\r\n\r\n")
        while wire.sock.recv(4096):
            pass
    assert enforcing.ask("GET", "/public").status == 200


# ------------------------------------------------------------------------------------------------ bodies and connections


@pytest.mark.parametrize("tls", ["storefront", None])
def test_bodies_pass_whole_both_ways(permissive: Server, tls: str | None) -> None:
    """A large upload by length, one in chunks, and a streamed answer."""
    big = b"0123456789abcdef" * 200_000
    assert permissive.ask("POST", "/items/7", body=big, tls=tls).json["size"] == len(big)
    with permissive.connect(tls) as wire:
        wire.send(b"POST /items/7 HTTP/1.1\r\nHost: orders\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for _ in range(20):
            wire.send(b"2710\r\n" + b"x" * 10000 + b"\r\n")
        wire.send(b"0\r\n\r\n")
        assert wire.answer().json["size"] == 200_000
    assert permissive.ask("GET", "/stream", tls=tls).body == b"".join(b"%02d" % index * 500 for index in range(50))


@pytest.mark.parametrize("tls", ["storefront", None])
def test_a_connection_is_used_again(permissive: Server, tls: str | None) -> None:
    """Request after request, each judged by itself, also after a refusal and after a body that nobody read."""
    with permissive.connect(tls) as wire:
        assert wire.ask("GET", "/items/1").json["path"] == "/items/1"
        if not permissive.is_kept_alive:  # gunicorn's sync worker answers once
            assert wire.is_closed
            return
        assert wire.ask("GET", "/%zz").status == 400
        assert wire.ask("POST", "/items/2", body=b"x" * 1000).json["size"] == 1000
        assert wire.ask("POST", "/a%0a", body=b"x" * 1000).status == 400
        assert wire.ask("GET", "/items/3", is_last=True).json["path"] == "/items/3"
        assert wire.is_closed


@pytest.mark.parametrize("tls", ["storefront", None])
def test_pipelined_requests_are_answered_in_order(permissive: Server, tls: str | None) -> None:
    """More than fits into one read: what is decrypted already must not be forgotten."""
    filler = "X-Filler: " + "x" * 3000
    with permissive.connect(tls) as wire:
        wire.send(b"".join(f"GET /items/{n} HTTP/1.1\r\nHost: orders\r\n{filler}\r\n\r\n".encode() for n in range(12)))
        count = 12 if permissive.is_kept_alive else 1  # gunicorn's sync worker answers once
        assert [wire.answer().json["path"] for _ in range(count)] == [f"/items/{n}" for n in range(count)]


def test_a_head_has_no_body(enforcing: Server) -> None:
    """Neither when it is answered nor when it is refused."""
    for target, status in (("/items/7", 200), ("/admin", 403)):
        with enforcing.connect() as wire:
            assert wire.ask("HEAD", target, is_last=True).status == status
            assert wire.is_closed


def test_the_callers_deadline_reaches_the_handler(enforcing: Server) -> None:
    """As what is left of it; without one there is none; spent on arrival, the handler does not run."""
    left = enforcing.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 5000").json["left"]
    assert 3.0 < left <= 5.0
    assert enforcing.ask("GET", "/items/7").json["left"] is None
    answer = enforcing.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 0")
    assert (answer.status, answer.json["reason"]) == (504, "deadline.exceeded")


# ------------------------------------------------------------------------------------------------ what goes wrong


def in_flight(server: Server) -> int:
    """How many calls hold a place; the one that asks is one of them."""
    return sum(row["in_flight"] for row in server.numbers()["gate"]) - 1


def test_a_handler_that_raises_is_500_and_gives_its_place_back(permissive: Server) -> None:
    """Before the answer, and in the middle of it."""
    for _ in range(3):
        assert permissive.ask("GET", "/boom").status == 500
    with permissive.connect() as wire, pytest.raises((ConnectionError, ValueError)):
        raise ValueError(wire.ask("GET", "/half").body)  # cut off: no end of the chunks
    assert in_flight(permissive) == 0


@pytest.mark.parametrize("tls", ["storefront", None])
def test_callers_that_go_away_leave_nothing_behind(permissive: Server, tls: str | None) -> None:
    """In the handshake, in the head, in the body, before the answer, in the middle of it."""
    port = permissive.port
    context = permissive.world.storefront if tls else None
    beginnings = [
        b"GET /slow?0.1 HTT",
        b"POST /items/7 HTTP/1.1\r\nHost: orders\r\nContent-Length: 100000\r\n\r\nxxx",
        b"GET /slow?0.1 HTTP/1.1\r\nHost: orders\r\n\r\n",
        b"GET /stream HTTP/1.1\r\nHost: orders\r\n\r\n",
    ]
    for beginning in beginnings * 3:
        with connection(port, context) as wire:
            wire.send(beginning)
            abort(wire)
    with connection(port) as wire:
        wire.send(b"\x16\x03\x01\x02\x00\x01")
        abort(wire)
    readings: list[int] = []
    end = time.monotonic() + 10
    # Of several processes each answers for itself: all have to be seen.
    while readings[-6:] != [0] * 6 and time.monotonic() < end:
        readings.append(in_flight(permissive))
        time.sleep(0.03)
    assert readings[-6:] == [0] * 6


def abort(wire: Wire) -> None:
    """Close with a reset, as a killed process does."""
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    wire.close()
