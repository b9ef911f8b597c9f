"""Who gets in at which listener? The public one is for callers without identity, the one for probes is for nothing else."""

from __future__ import annotations

import time

from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server


@behaviour("listeners", modes=ENFORCE)
def the_public_listener_lets_in_by_its_own_rules(server: Server) -> None:
    """Nobody needs an identity there; and what is allowed in the mesh is not allowed to the world."""
    answer = server.ask_at("public", "GET", "/x/../window/7")
    assert (answer.status, answer.json["peer"], answer.json["path"], answer.json["scheme"]) == (200, "", "/window/7", "http")
    assert answer.json["call"]["listener"] == "public"
    for method, target in (("GET", "/items/7"), ("GET", "/public"), ("POST", "/window"), ("GET", "/numbers")):
        refused = server.ask_at("public", method, target)
        assert (refused.status, refused.reason) == (403, "secure.denied"), target


@behaviour("listeners", modes=ENFORCE)
def what_is_denied_to_everybody_is_denied_at_the_public_listener(server: Server) -> None:
    """Whatever is allowed there."""
    for target in ("/admin/x", "//admin/x", "/window/../admin/x"):
        assert server.ask_at("public", "GET", target).status == 403


@behaviour("listeners")
def the_public_listener_believes_nobody(server: Server) -> None:
    """No header, and no proxy that was not named."""
    lies = (
        "X-Forwarded-Client-Cert: URI=spiffe://shop.internal/admin",
        "X-Forwarded-For: 203.0.113.7",
        "X-Mesh-Peer: admin",
        "X-Other: 1",
    )
    answer = server.ask_at("public", "GET", "/window", *lies)
    assert (answer.json["peer"], answer.seen("x-forwarded-client-cert"), answer.seen("x-mesh-peer")) == ("", [], [])
    assert (answer.json["call"]["client"], answer.seen("x-other")) == ("127.0.0.1", ["1"])


@behaviour("listeners", "tls")
def the_public_listener_speaks_tls_too(server: Server) -> None:
    """Who proves an identity has it there, and is let in by the rules of this listener all the same."""
    answer = server.ask_at("public", "GET", "/window", tls="storefront")
    assert (answer.status, answer.json["peer"].rpartition("/")[2], answer.json["scheme"]) == (200, "storefront", "https")
    assert server.ask_at("public", "GET", "/window", tls="nobody").json["peer"] == ""
    if server.mode == "enforce":
        assert server.ask_at("public", "GET", "/items/7", tls="storefront").status == 403


@behaviour("listeners")
def probes_are_answered_without_a_certificate(server: Server) -> None:
    """At a listener of their own, which serves nothing else."""
    for path in ("/healthz", "/livez"):
        assert server.ask_at("probe", "GET", path).status == 200
    end = time.monotonic() + 10
    while (ready := server.ask_at("probe", "GET", "/readyz")).status != 200:
        assert (ready.status, ready.body, time.monotonic() < end) == (503, b"starting\n", True)
        time.sleep(0.05)
    by_address = server.ask_at("probe", "GET", "/metrics", "Host: 127.0.0.1")
    assert b"meshlib_observe_info" in by_address.body
    for path in ("/items/7", "/status", "/admin", "/"):
        assert server.ask_at("probe", "GET", path).status == 404
