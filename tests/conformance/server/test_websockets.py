"""Does a conversation take the same way as a call? Real servers; the websockets package is the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.server.host import ASGI
from tests.conformance.server.servers import Server, World, running

client: Any = pytest.importorskip("websockets.sync.client")
exceptions: Any = pytest.importorskip("websockets.exceptions")

STOREFRONT = "spiffe://shop.internal/ns/default/sa/storefront"


def connect(server: Server, target: str, tls: Any, **more: Any) -> Any:
    scheme = "ws" if tls is None else "wss"
    return client.connect(f"{scheme}://127.0.0.1:{server.port}{target}", ssl=tls, proxy=None, **more)


@pytest.fixture(scope="module", params=ASGI)
def enforcing(request: pytest.FixtureRequest, world: World) -> Iterator[Server]:
    with running(request.param, "enforce", world) as server:
        yield server


@pytest.fixture(scope="module", params=ASGI)
def permissive(request: pytest.FixtureRequest, world: World) -> Iterator[Server]:
    with running(request.param, "permissive", world) as server:
        yield server


def test_a_conversation_knows_its_peer(enforcing: Server) -> None:
    """By the same certificate, under the canonical path; messages pass unchanged, text and bytes."""
    with connect(enforcing, "/x/../chat", enforcing.world.storefront) as chat:
        assert json.loads(chat.recv()) == {"path": "/chat", "peer": STOREFRONT}
        for message in ("hello", b"\x00\xff" * 40_000, "ü" * 10):
            chat.send(message)
            assert chat.recv() == message


def test_thousands_of_messages_pass(enforcing: Server) -> None:
    """The policy is asked once, at the beginning."""
    before = calls(enforcing)
    with connect(enforcing, "/chat", enforcing.world.storefront) as chat:
        chat.recv()
        for index in range(2000):
            chat.send(str(index))
        assert [chat.recv() for _ in range(2000)] == [str(index) for index in range(2000)]
    if enforcing.kind != "gunicorn-uvicorn":
        assert calls(enforcing) == before + 1


def calls(server: Server) -> int:
    return sum(row["codes"].get("101", 0) for row in server.numbers()["gate"])


def test_a_conversation_that_is_not_allowed_is_refused_before_it_begins(enforcing: Server) -> None:
    """As a call would be: 403 for who may not, and for a denied path."""
    for target, tls in (("/chat", enforcing.world.stranger), ("/admin", enforcing.world.storefront)):
        with pytest.raises(exceptions.InvalidStatus) as caught, connect(enforcing, target, tls):
            pass
        assert caught.value.response.status_code == 403


def test_a_plain_conversation_is_taken_in_permissive_only(permissive: Server) -> None:
    """And has no peer."""
    with connect(permissive, "/chat", None) as chat:
        assert json.loads(chat.recv())["peer"] == ""
