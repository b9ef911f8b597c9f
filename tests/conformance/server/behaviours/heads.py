"""What of a request's head gets in: methods, framing, headers?"""

from __future__ import annotations

import ssl

from tests.conformance.server.behaviours.table import ENFORCE, PLAIN, behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import head

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# They say who somebody is, or what another proxy found out; and the mesh's own.
_IDENTITY = (
    "X-Forwarded-Client-Cert", "Client-Cert", "X-Mesh-Peer", "X-Envoy-Original-Path", "X-SSL-Client-Cert", "X-Forwarded-User", "Remote-User",
    "X-Real-Role", "X-Client-Verify", "L5d-Client-Id", "X-Original-URL", "X-Rewrite-URL", "X-Auth-Request-User",
)  # fmt: skip
_LIE = "URI=spiffe://shop.internal/ns/default/sa/admin"


# ------------------------------------------------------------------------------------------------ methods


@behaviour()
def every_usual_method_gets_in(server: Server) -> None:
    """As it is."""
    for method in _METHODS:
        assert server.ask(method, "/items/7").json["method"] == method


@behaviour(modes=ENFORCE)
def a_deny_for_get_covers_head(server: Server) -> None:
    """A HEAD tells what a GET would."""
    assert server.ask("HEAD", "/admin").status == 403


@behaviour("method")
def an_odd_method_is_refused(server: Server) -> None:
    """Upper-case words only."""
    for method in ("get", "G@T", "Get"):
        assert refused(server, method, "/public") in (400, 405, 501), method


@behaviour()
def trace_and_connect_are_refused(server: Server) -> None:
    """TRACE gives back what proxies added; nobody means a tunnel by CONNECT."""
    answer = server.ask("TRACE", "/public")
    assert answer.status in (400, 405, 501)
    if answer.reason:
        assert (answer.status, "GET" in answer.headers["allow"].split(", ")) == (405, True)
    assert refused(server, "CONNECT", "orders:443") in (400, 404, 405, 501)


@behaviour()
def no_header_makes_another_method(server: Server) -> None:
    """What was judged is what runs, whatever a framework may obey."""
    lies = ("X-HTTP-Method-Override: DELETE", "X-HTTP-Method: DELETE", "X-Method-Override: DELETE")
    found = server.ask("POST", "/items/7", *lies)
    assert found.json["method"] == "POST"
    assert [found.seen(lie.partition(":")[0].lower()) for lie in lies] == [[], [], []]


# ------------------------------------------------------------------------------------------------ framing


@behaviour()
def two_hosts_are_refused(server: Server) -> None:
    """Nobody could say which of the two counts."""
    assert refused(server, "GET", "/public", "Host: orders", "Host: evil") == 400


@behaviour()
def two_framings_are_refused(server: Server) -> None:
    """Two parsers would read two requests."""
    for headers in (("Content-Length: 3", "Transfer-Encoding: chunked"), ("Content-Length: 3", "Content-Length: 4")):
        with server.connect() as wire:
            wire.send(head("POST", "/items/7", *headers) + b"0\r\n\r\n")
            try:
                answer = wire.answer()
            except (ConnectionError, ssl.SSLError):
                continue
            if answer.status == 200 and not server.has("door"):
                # RFC 9112 section 6.3: chunks alone count, and the length that was told is gone.
                assert (answer.json["size"], headers[1]) == (0, "Transfer-Encoding: chunked")
                assert answer.seen("content-length") in ([], ["0"])
            else:
                assert answer.status in (400, 501), (headers, answer)


@behaviour()
def a_head_that_never_ends_is_not_gathered(server: Server) -> None:
    """Neither in one field nor in many."""
    for more in (["X-Long: " + "x" * 300_000], [f"X-{number}: 1" for number in range(5000)]):
        assert refused(server, "GET", "/public", *more) in (0, 400, 431), len(more)


@behaviour()
def a_header_that_is_none_is_refused(server: Server) -> None:
    """A control character, a name with a space, a line that continues another."""
    for line in ("X-Odd: a\x00b", "X Odd: 1", "X-Odd : 1", ": 1"):
        answer = refused(server, "GET", "/public", line)
        assert answer in (0, 400), (line, answer)


# ------------------------------------------------------------------------------------------------ headers


@behaviour()
def other_headers_pass_as_they_are(server: Server) -> None:
    """Found by the framework's own means, in full length."""
    values = {
        "x-plain": "one",
        "x-list": "a, b;q=0.1",
        "x-long": "x" * 4000,
        "user-agent": "tests/1",
        "accept": "*/*",
        "x-some.odd~name": "1",
    }
    found = server.ask("GET", "/items/7", *(f"{name}: {value}" for name, value in values.items()))
    assert {name: found.seen(name) for name in values} == {name: [value] for name, value in values.items()}


@behaviour("headers")
def a_header_beyond_ascii_passes(server: Server) -> None:
    """A byte is a byte."""
    assert server.ask("GET", "/items/7", "X-Latin: caf\xe9").seen("x-latin") == ["caf\xe9"]


@behaviour()
def headers_that_stand_twice_are_all_seen(server: Server) -> None:
    """As two or as one with a comma, in their order: that is the interface's custom."""
    found = server.ask("GET", "/items/7", "X-Twice: a", "X-Other: c", "X-Twice: b").seen("x-twice")
    assert [value.strip() for text in found for value in text.split(",")] == ["a", "b"]


@behaviour()
def cookies_and_credentials_pass(server: Server) -> None:
    """They are the application's."""
    found = server.ask("GET", "/items/7", "Cookie: a=1; b=2", "Authorization: Basic abc")
    assert (found.seen("cookie"), found.seen("authorization")) == (["a=1; b=2"], ["Basic abc"])


@behaviour()
def the_content_type_passes(server: Server) -> None:
    """It has a key of its own in WSGI."""
    found = server.ask("POST", "/items/7", "Content-Type: text/x-odd; charset=utf-8", body=b"abc")
    assert (found.seen("content-type"), found.seen("content-length")) == (["text/x-odd; charset=utf-8"], ["3"])


@behaviour()
def identity_headers_from_outside_never_get_in(server: Server) -> None:
    """Over TLS and over plain text; others do."""
    for name in _IDENTITY:
        answer = server.ask("GET", "/public", f"{name}: {_LIE}", "X-Other: 1")
        assert answer.status in (200, 400), answer
        if answer.status == 200:
            # X-Real-Role stands for a name of the application's own.
            assert answer.seen(name.lower()) == ([_LIE] if name == "X-Real-Role" else []), name
            assert answer.seen("x-other") == ["1"]


@behaviour()
def an_underscore_makes_no_other_name(server: Server) -> None:
    """To a WSGI application it is the name with a dash: it says no more about identity."""
    underscored(server, "X_Forwarded_Client_Cert", "X_Mesh_Peer", "x-Forwarded_client-Cert")


@behaviour("headers")
def a_name_with_an_underscore_does_not_get_in(server: Server) -> None:
    """Whatever it stands for."""
    underscored(server, "X_Ok")


def underscored(server: Server, *names: str) -> None:
    for name in names:
        answer = server.ask("GET", "/public", f"{name}: {_LIE}", "X-Other: 1")
        assert answer.status in (200, 400), answer
        if answer.status == 200:
            assert answer.seen(name.lower().replace("_", "-")) == []
            assert answer.seen("x-other") == ["1"]


@behaviour()
def the_meshs_own_headers_are_for_nobody_else(server: Server) -> None:
    """A deadline and an attempt are read, and not handed on as headers."""
    found = server.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 5000", "X-Mesh-Attempt: 1", "X-Envoy-Attempt-Count: 2")
    assert [found.seen(name) for name in ("x-mesh-deadline-ms", "x-mesh-attempt", "x-envoy-attempt-count")] == [[], [], []]


@behaviour()
def a_prefix_header_does_not_move_the_application(server: Server) -> None:
    """SCRIPT_NAME from a caller would make one path judged and another one routed."""
    for name in ("SCRIPT_NAME", "SCRIPT-NAME", "X-Forwarded-Prefix", "X-Script-Name", "PATH-INFO"):
        answer = server.ask("GET", "/public/admin", f"{name}: /public")
        assert answer.status in (200, 400)
        if answer.status == 200:
            assert answer.json["path"] == "/public/admin", name


@behaviour()
def the_scheme_is_the_connections(server: Server) -> None:
    """No header makes https of http, or the other way round."""
    usual, other = ("https", "http") if server.has_tls else ("http", "https")
    lies = (f"X-Forwarded-Proto: {other}", "X-Forwarded-Ssl: on", f"Forwarded: proto={other}", "X-Forwarded-Protocol: ssl")
    answer = server.ask("GET", "/public", *lies)
    # gunicorn refuses what contradicts itself.
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert answer.json["scheme"] == usual
    for lie in lies:
        assert server.ask("GET", "/public", lie).json["scheme"] == usual, lie


@behaviour("tls", modes=ENFORCE)
def where_a_call_comes_from_is_told_by_trusted_proxies_only(server: Server) -> None:
    """By the identity that the configuration names; from others it is no header and no address."""
    told = ("X-Forwarded-For: 203.0.113.7", "X-Forwarded-Host: shop.example", "X-Forwarded-Proto: http", "X-Real-IP: 203.0.113.7")
    for caller, is_trusted in (("storefront", False), ("gateway", True)):
        found = server.ask("GET", "/items/7", *told, tls=caller)
        seen = [found.seen(line.partition(":")[0].lower()) for line in told]
        assert seen == ([[line.partition(": ")[2]] for line in told] if is_trusted else [[]] * 4)
        assert found.json["call"]["client"] == ("203.0.113.7" if is_trusted else "127.0.0.1")
        assert found.seen("x-forwarded-client-cert") == []


@behaviour(modes=PLAIN)
def where_the_rules_do_not_bind_a_proxy_is_believed_as_before(server: Server) -> None:
    """An application behind a proxy goes on as it did; but nothing is decided by it."""
    found = server.ask("GET", "/items/7", "X-Forwarded-For: 203.0.113.7", "X-Forwarded-Host: shop.example")
    if server.kind.server != "waitress":  # it takes them out itself, unless it is told of a proxy
        assert (found.seen("x-forwarded-for"), found.seen("x-forwarded-host")) == (["203.0.113.7"], ["shop.example"])
    assert found.json["call"]["client"] in ("127.0.0.1", "")


@behaviour()
def a_request_id_that_is_no_word_is_replaced(server: Server) -> None:
    """It ends up in logs and in other systems."""
    good, odd = (
        server.ask("GET", "/items/7", f"X-Request-Id: {text}").seen("x-request-id") for text in ("abc-123", "a b<script>")
    )
    assert good == ["abc-123"]
    assert len(odd) == 1
    assert odd[0].isalnum()


@behaviour()
def a_range_that_costs_more_than_it_says_is_left_out(server: Server) -> None:
    """A server may ignore it; a modest one passes."""
    many = ",".join(f"{number}-{number}" for number in range(50))
    assert server.ask("GET", "/items/7", "Range: bytes=0-5").seen("range") == ["bytes=0-5"]
    assert server.ask("GET", "/items/7", f"Range: bytes={many}").seen("range") == []


def refused(server: Server, method: str, target: str, *headers: str, body: bytes = b"") -> int:
    """The status of a refusal; 0 for a connection that was closed without one."""
    try:
        with server.connect() as wire:
            wire.send(head(method, target, *headers, "Connection: close") + body)
            return wire.answer().status
    except (ConnectionError, ssl.SSLError):
        return 0
