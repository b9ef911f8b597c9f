"""Which path is judged, and which one does the handler get?"""

from __future__ import annotations

import ssl
from typing import Any
from urllib.parse import unquote

from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server

_DENIED = (
    "/admin", "//admin", "///admin", "/x/../admin", "/x/%2e%2e/admin", "/./admin", "/%61dmin", "/admin%2fx", "/admin/", "/admin;a=b", "/admin?x",
    "/x%2f..%2fadmin", "/x%5c..%5cadmin", "/%2fadmin", "/public/..;/admin", "/public/../admin",
)  # fmt: skip
_TWO_READINGS = ("/admin%0a", "/admin%00", "/%c0%afadmin", "/admin%ff", "/%252fadmin", "/x//../admin", "/%zz", "/a%0d%0ab")
_CANONICAL = (
    ("/x/../public/a", "/public/a"), ("//public//a", "/public/a"), ("/public%2Fa", "/public/a"), ("/public/%61", "/public/a"),
    ("/public/%E2%82%AC", "/public/€"), ("/public/a%20b", "/public/a b"), ("/public/%2561", "/public/%61"), ("/public/a/", "/public/a/"),
    ("/public/./a", "/public/a"), ("/public/a:b@c", "/public/a:b@c"), ("/public/a%3Fb", "/public/a?b"),
)  # fmt: skip


@behaviour(modes=ENFORCE)
def another_spelling_of_a_denied_path_is_denied(server: Server) -> None:
    """Whatever the server makes of the target: the rule is asked about the canonical path."""
    assert {target: server.ask("GET", target).status for target in _DENIED} == dict.fromkeys(_DENIED, 403)


@behaviour("raw")
def a_path_with_two_readings_is_refused(server: Server) -> None:
    """400, by the server or by the gate, before any handler; in every mode."""
    assert {target: server.ask("GET", target).status for target in _TWO_READINGS} == dict.fromkeys(_TWO_READINGS, 400)


@behaviour()
def a_target_that_is_none_is_refused(server: Server) -> None:
    """Some servers refuse it themselves, some leave it to the gate; none lets it in."""
    for target in ("admin", "/admin\x00", "/admin\x7f", "/caf\xe9", "/a b"):
        try:
            answer = server.ask("GET", target)
        except (ConnectionError, ssl.SSLError):
            continue  # closed without an answer
        assert answer.status in (400, 404), (target, answer)


@behaviour("raw")
def the_handler_sees_the_path_that_was_judged(server: Server) -> None:
    """Its canonical form, and so does its router."""
    seen = {target: server.ask("GET", target).json["path"] for target, _ in _CANONICAL}
    assert seen == dict(_CANONICAL)


@behaviour("raw")
def the_path_is_the_same_wherever_a_framework_looks(server: Server) -> None:
    """Decoded or not, in the server's own places and in those that the framework makes of them."""
    for target, path in _CANONICAL:
        found = server.ask("GET", target).json
        assert places(found) == dict.fromkeys(places(found), path)
        assert len(places(found)) >= 2


def places(found: dict[str, Any]) -> dict[str, str]:
    """Every place in which a handler found a path, decoded."""
    return {**found["decoded"], **{name: unquote(text) for name, text in found["quoted"].items()}}


@behaviour()
def a_decoded_path_is_judged_and_seen_as_it_is(server: Server) -> None:
    """Also by servers that hand over nothing else."""
    for target in ("/public/a", "/public/%61", "//public/a", "/x/../public/a"):
        answer = server.ask("GET", target)
        assert answer.status in (200, 400), answer
        if answer.status == 200:
            assert set(places(answer.json).values()) == {"/public/a"}


@behaviour()
def the_router_chooses_by_the_canonical_path(server: Server) -> None:
    """What is counted under a route is what the handler of this route serves."""
    for target in ("/items/7", "//items/7", "/x/../items/7", "/items/%37"):
        found = server.ask("GET", target).json
        assert (found["handler"], found["call"]["route"], found["path"]) == ("items", "items", "/items/7")


@behaviour("raw")
def the_raw_path_leads_to_the_same_handler(server: Server) -> None:
    """Asked for by what the handler was shown of it, the same path is found again."""
    for target, path in _CANONICAL:
        for name, text in server.ask("GET", target).json["quoted"].items():
            assert server.ask("GET", text).json["path"] == path, name


@behaviour()
def the_query_is_untouched(server: Server) -> None:
    """It is the application's: not decoded, not resolved, not sorted."""
    for query in ("q=%2e%2e/&r=1", "a=%zz&a=b", "x=/../admin", "?", "a=b?c=d", "%00"):
        assert server.ask("GET", f"/public?{query}").json["query"] == query


@behaviour()
def an_absolute_target_is_its_path(server: Server) -> None:
    """With our own authority; another one is refused or ignored, never judged as another path."""
    answer = server.ask("GET", "http://orders/public/a")
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert set(places(answer.json).values()) == {"/public/a"}
    assert server.ask("GET", "http://evil/admin").status in ((400, 403) if server.mode == "enforce" else (200, 400))


@behaviour("raw")
def the_asterisk_is_for_options_only(server: Server) -> None:
    """`GET *` has no meaning."""
    try:
        assert server.ask("GET", "*").status in (400, 404)
    except (ConnectionError, ssl.SSLError):
        pass


@behaviour()
def a_target_without_end_is_refused(server: Server) -> None:
    """Nobody's path is longer than 8 KiB."""
    try:
        assert server.ask("GET", "/public/" + "a" * 9000).status in (400, 414, 431)
    except (ConnectionError, ssl.SSLError):
        pass
