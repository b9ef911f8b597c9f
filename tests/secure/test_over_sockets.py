"""Can the cases over sockets tell? Each server hands over what is sent, if nothing takes it out; and the mesh takes out no more than that."""

from __future__ import annotations

import pytest

from tests.secure.cases import ground
from tests.secure.cases.ground import ANYONE, CALLER, Request
from tests.secure.cases.over_sockets import OURS, ask_ours, houses
from tests.secure.cases.path_host import KINDS, WSGI

LIES = [
    ("x-envoy-original-path", "/admin"),
    ("x-rewrite-url", "/admin"),
    ("x-mesh-identity", "spiffe://td/admin"),
    ("x-b3-sampled", "1"),
]
OPEN = ground.document(own={"allow": [ANYONE]})


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_mesh_a_spoofed_header_reaches_the_application(kind: str) -> None:
    """On every server; with it none does, and others do."""
    sent = Request(headers=[*LIES, ("x-other", "1")])
    bare, seen = houses().ask_bare(kind, sent), houses().ask(kind, OPEN, sent)
    assert [bare.values(name) for name, _ in LIES] == [[value] for _, value in LIES]
    assert [seen.values(name) for name, _ in LIES] == [[]] * len(LIES)
    assert (seen.values("x-other"), seen.peer) == (["1"], CALLER)


@pytest.mark.parametrize("kind", OURS)
def test_our_own_door_proves_the_peer(kind: str) -> None:
    """By its certificate, and from where it calls."""
    seen = ask_ours(OPEN, Request(headers=[*LIES, ("x-other", "1")], peer="spiffe://td/somebody"))[kind]
    assert (seen.status, seen.peer, seen.values("x-other"), seen.client) == (200, "spiffe://td/somebody", ["1"], "203.0.113.9")
    assert [seen.values(name) for name, _ in LIES] == [[]] * len(LIES)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_mesh_the_application_sees_another_path(kind: str) -> None:
    """Than the one that is judged."""
    sent = Request("/x/../public")
    assert houses().ask(kind, OPEN, sent).path == "/public"
    assert houses().ask_bare(kind, sent).path == "/x/../public"
    if kind in WSGI:
        return
    lost = houses().ask(kind, OPEN, Request("/x/%2e%2e/public"))
    assert (lost.path, lost.raw_path) == ("/public", "/public")
