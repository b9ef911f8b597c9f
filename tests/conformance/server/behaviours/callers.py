"""Who is at the other end, and who learns of it?"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509

from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import Answer, head
from tests.conformance.server.world import ISSUER, STOREFRONT, STRANGER

PERMISSIVE = ("permissive",)


# ------------------------------------------------------------------------------------------------ by the connection


@behaviour("tls", modes=ENFORCE)
def the_handler_knows_its_caller(server: Server) -> None:
    """As the certificate proved it, with its serial number."""
    found = server.ask("GET", "/items/7").json
    assert (found["peer"], found["scheme"], found["call"]["peer"], found["call"]["tls"]) == (
        STOREFRONT,
        "https",
        STOREFRONT,
        True,
    )
    svid = server.world.svid("storefront") / "svid.pem"
    assert int(found["serial"], 16) == x509.load_pem_x509_certificate(svid.read_bytes()).serial_number


@behaviour()
def a_caller_without_identity_is_nobody(server: Server) -> None:
    """Where plain text comes in, the peer has no name; over mutual TLS it has its own."""
    found = server.ask("GET", "/items/7").json
    assert (found["peer"], bool(found["serial"])) == (server.usual_peer, server.has_tls)


@behaviour("own")
def the_framework_tells_the_caller_by_its_own_means(server: Server) -> None:
    """A dependency, `g`, or an attribute of the request."""
    assert server.ask("GET", "/items/7").json["own"] == server.usual_peer
    mine = server.ask("GET", "/mine")
    if server.has_tls:
        assert (mine.status, STOREFRONT.encode() in mine.body) == (200, True)
    else:
        assert (mine.status, mine.reason, mine.headers["www-authenticate"]) == (401, "secure.no_identity", "mTLS")


@behaviour("tls", modes=ENFORCE)
def tls_is_described_where_custom_puts_it(server: Server) -> None:
    """The TLS extension of ASGI; the keys of mod_ssl in WSGI."""
    tls = server.ask("GET", "/items/7").json["tls"]
    if server.kind.is_asgi:
        assert (tls["tls_version"], tls["cipher_suite"] in (0x1301, 0x1302, 0x1303)) == (0x0304, True)
        assert tls["client_cert_chain"][0].startswith("-----BEGIN CERTIFICATE-----")
    else:
        assert (tls["SSL_CLIENT_VERIFY"], tls["SSL_PROTOCOL"], tls["HTTPS"]) == ("SUCCESS", "TLSv1.3", "on")
        assert tls["SSL_CLIENT_CERT"].startswith("-----BEGIN CERTIFICATE-----")


@behaviour()
def no_caller_writes_the_keys_of_the_connection(server: Server) -> None:
    """Headers that would become such keys are headers, or nothing."""
    found = server.ask(
        "GET", "/items/7", "Meshlib.Peer: x", "SSL-Client-Verify: SUCCESS", "HTTPS: on", "SSL-Client-S-DN: admin"
    ).json
    if not server.has_tls:
        assert found["tls"] == {}
    assert (found["peer"], found["scheme"]) == (server.usual_peer, "https" if server.has_tls else "http")


@behaviour("tls", modes=ENFORCE)
def who_is_not_named_is_denied(server: Server) -> None:
    """A certificate of our mesh is an identity, not a permission."""
    answer = server.ask("GET", "/items/7", tls="stranger")
    assert (answer.status, answer.reason) == (403, "secure.denied")
    assert server.ask("GET", "/public", tls="stranger").json["peer"] == STRANGER
    assert server.ask("POST", "/public", tls="stranger").status == 403


@behaviour("tls", modes=ENFORCE)
def who_proves_nothing_does_not_come_in(server: Server) -> None:
    """No certificate, or one of another CA: the handshake fails, and nothing is asked."""
    for caller in ("nobody", "foreign"):
        before = server.numbers()["door"]["failed"]
        with pytest.raises((ssl.SSLError, ConnectionError)):
            server.ask("GET", "/public", tls=caller)
        assert server.numbers()["door"]["failed"] == before + 1


@behaviour("tls", modes=ENFORCE)
def a_plain_caller_is_told_what_the_port_speaks(server: Server) -> None:
    """In words, with 400; not a byte of the request is taken for one."""
    with server.connect(None) as wire:
        answer = wire.ask("GET", "/public")
        assert (answer.status, b"mutual TLS" in answer.body, answer.headers["connection"]) == (400, True, "close")
        assert wire.is_closed


@behaviour("tls", modes=ENFORCE)
def a_plain_request_behind_a_refused_one_is_not_served(server: Server) -> None:
    """One answer, then nothing."""
    with server.connect(None) as wire:
        wire.send(head("GET", "/public") * 3)
        assert wire.answer().status == 400
        assert wire.is_closed


@behaviour("tls", modes=PERMISSIVE)
def permissive_takes_both_on_one_port(server: Server) -> None:
    """And knows who can prove themselves, and who can't."""
    callers: dict[Any, str] = {"storefront": STOREFRONT, "nobody": "", None: ""}
    assert {caller: server.ask("GET", "/items/7", tls=caller).json["peer"] for caller in callers} == callers


@behaviour("tls", modes=PERMISSIVE)
def permissive_takes_no_certificate_of_a_stranger(server: Server) -> None:
    """Whoever shows one must be who it says: one of another CA is no identity."""
    try:
        found = server.ask("GET", "/items/7", tls="foreign").json["peer"]
    except (ssl.SSLError, ConnectionError):
        return
    assert found == ""


@behaviour(modes=("permissive", "observe"))
def what_would_be_denied_is_served_and_reported(server: Server) -> None:
    """The steps before enforce: nobody is refused by a rule."""
    before = would_deny(server)
    assert server.ask("GET", "/admin").status == 200
    assert would_deny(server) == before + 1


def would_deny(server: Server) -> int:
    return sum(row["would_deny"] for row in server.numbers()["gate"])


@behaviour("tls", modes=ENFORCE)
def tls_that_comes_in_drops_is_tls(server: Server) -> None:
    """The first byte alone decides; the rest of the handshake may take its time."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = server.world.caller("storefront").wrap_bio(incoming, outgoing)
    with server.connect(None) as wire:

        def step(data: bytes) -> None:
            for index in range(0, len(data), 97):
                wire.send(data[index : index + 97])

        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                step(outgoing.read())
                incoming.write(wire.sock.recv(65536))
        tls.write(head("GET", "/public", "Connection: close"))
        step(outgoing.read())
        answer = b""
        while b"\r\n\r\n" not in answer:
            incoming.write(wire.sock.recv(65536))
            try:
                answer += tls.read(65536)
            except ssl.SSLWantReadError:
                continue
    assert answer.startswith(b"HTTP/1.1 200")


@behaviour("door", modes=("enforce", "permissive"))
def garbage_after_the_first_byte_is_no_tls(server: Server) -> None:
    """The connection ends; the server goes on."""
    with server.connect(None) as wire:
        wire.send(b"\x16" + b"GET / HTTP/1.1\r\n\r\n")
        while wire.sock.recv(4096):
            pass
    assert server.ask("GET", "/public").status == 200


# ------------------------------------------------------------------------------------------------ in the handler


@behaviour()
def a_handler_of_the_other_colour_knows_the_same(server: Server) -> None:
    """A plain function where handlers are coroutines, a coroutine where they are functions."""
    found = server.ask("GET", "/sync?a=b", "X-Mesh-Deadline-Ms: 5000").json
    assert (found["peer"], found["call"]["path"], found["query"]) == (server.usual_peer, "/sync", "a=b")
    assert 0 < found["left"] <= 5


@behaviour()
def a_thread_of_the_handler_knows_the_same(server: Server) -> None:
    """One that it starts with its context, or in an executor."""
    found = server.ask("GET", "/thread", "X-Mesh-Deadline-Ms: 5000").json
    assert (found["peer"], found["call"]["path"], found["call"]["method"]) == (server.usual_peer, "/thread", "GET")
    assert 0 < found["left"] <= 5


@behaviour()
def the_handler_is_told_what_was_decided(server: Server) -> None:
    """The service, the route, the path, and which rule let the call in."""
    call = server.ask("GET", "/x/../items/7").json["call"]
    assert (call["service"], call["mode"], call["protocol"], call["status"]) == ("orders", server.mode, "http", 0)
    assert (call["method"], call["path"], call["route"]) == ("GET", "/items/7", "items")
    assert call["rule"] == ("everything" if server.has_tls else "")


@behaviour("together")
def callers_at_the_same_time_are_not_mixed_up(server: Server) -> None:
    """Each handler knows its own caller, path and deadline, however they overlap."""
    callers = ["storefront", "gateway", "storefront", "gateway"] if server.has("tls") else [None] * 4
    names = [server.new_name() for _ in callers]
    found: dict[int, Answer] = {}

    def ask(index: int) -> None:
        deadline = f"X-Mesh-Deadline-Ms: {(index + 1) * 20_000}"
        found[index] = server.ask("GET", f"/hold?{names[index]}", f"X-Mine: {index}", deadline, tls=callers[index])

    with together(*(lambda index=index: ask(index) for index in range(4))):  # type: ignore[misc]
        server.until(lambda: all(server.waits(name) for name in names))
        for name in reversed(names):
            server.let_go(name)
    for index, caller in enumerate(callers):
        seen = found[index].json
        assert (found[index].seen("x-mine"), seen["query"]) == ([str(index)], names[index])
        assert seen["peer"].rpartition("/")[2] == (caller or "")
        assert 0 < seen["left"] <= (index + 1) * 20
        assert seen["left"] > index * 20


class together:
    """Run these beside one another; at the end of the block all are done."""

    def __init__(self, *works: Callable[[], object]) -> None:
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in self._threads)


# ------------------------------------------------------------------------------------------------ by a token


@behaviour()
def the_claims_of_a_good_token_are_known(server: Server) -> None:
    """And the token, which was for the mesh, is taken out."""
    answer = server.ask("GET", "/token", f"Authorization: Bearer {server.world.token(role='cook')}")
    assert (answer.json["claims"]["sub"], answer.json["claims"]["role"]) == ("alice", "cook")
    assert (answer.json["call"]["principal"], answer.seen("authorization")) == (f"{ISSUER}/alice", [])
    assert server.ask("GET", "/public").json["claims"] is None


@behaviour(modes=ENFORCE)
def a_bad_token_is_refused(server: Server) -> None:
    """Of another time, for another service, changed, or missing where one is needed; with what to do about it."""
    good = server.world.token()
    bad = [server.world.token(exp=1000), server.world.token(aud="other"), good[:-8] + "AAAAAAAA", "x.y.z"]
    answers = [server.ask("GET", "/token", f"Authorization: Bearer {token}") for token in bad] + [server.ask("GET", "/token")]
    assert [(each.status, each.reason, each.headers["www-authenticate"]) for each in answers] == [
        (401, "secure.jwt", "Bearer")
    ] * 5
    assert server.ask("GET", "/token", f"Authorization: Bearer {good}").status == 200


@behaviour(modes=("permissive", "observe"))
def a_bad_token_is_none_where_the_rules_do_not_bind(server: Server) -> None:
    """The call is served, and nothing of the token is believed."""
    answer = server.ask("GET", "/token", f"Authorization: Bearer {server.world.token(aud='other')}")
    assert (answer.status, answer.json["claims"]) == (200, None)
