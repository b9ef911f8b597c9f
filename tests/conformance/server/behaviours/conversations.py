"""Does a conversation take the same way as a call? The websockets package is the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.conformance.server.behaviours.limits import in_flight
from tests.conformance.server.behaviours.observed import counted
from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.world import STOREFRONT


@contextmanager
def chat(server: Server, target: str, *headers: tuple[str, str], tls: Any = "usual", **more: Any) -> Iterator[Any]:
    """A conversation, and what the handler says of itself first."""
    caller = ("storefront" if server.has_tls else None) if tls == "usual" else tls
    url = f"{'wss' if caller else 'ws'}://127.0.0.1:{server.port}{target}"
    context = server.world.caller(caller) if caller else None
    listed = [("X-Tenant", server.new_name()), *headers]
    with connect(url, ssl=context, proxy=None, additional_headers=listed, compression=None, **more) as conversation:
        yield conversation


@behaviour("websocket")
def a_conversation_knows_its_peer_and_path(server: Server) -> None:
    """By the same certificate, under the canonical path, with its query."""
    with chat(server, "/x/../chat?a=%2f") as conversation:
        told = json.loads(conversation.recv())
    assert (told["path"], told["query"], told["peer"]) == ("/chat", "a=%2f", server.usual_peer)
    assert (told["call"]["path"], told["call"]["route"]) == ("/chat", "rest")


@behaviour("websocket")
def messages_pass_as_they_are(server: Server) -> None:
    """Text and bytes, large and small, both ways."""
    with chat(server, "/chat") as conversation:
        conversation.recv()
        for message in ("hello", "", b"\x00\xff" * 40_000, "ü" * 10_000):
            conversation.send(message)
            assert conversation.recv() == message


@behaviour("websocket")
def a_conversation_is_judged_once(server: Server) -> None:
    """At its beginning; its messages are nobody's calls."""
    before = counted(server, "101")
    with chat(server, "/chat") as conversation:
        conversation.recv()
        for index in range(500):
            conversation.send(str(index))
        assert [conversation.recv() for _ in range(500)] == [str(index) for index in range(500)]
    server.until(lambda: counted(server, "101") == before + 1)


@behaviour("websocket", modes=ENFORCE)
def a_conversation_that_is_not_allowed_does_not_begin(server: Server) -> None:
    """It is refused as a call would be: who may not, and where nobody may."""
    for target, caller in (("/chat", "stranger"), ("/admin", "storefront")):
        with pytest.raises(InvalidStatus) as caught, chat(server, target, tls=caller):
            pass
        assert caught.value.response.status_code == 403


@behaviour("websocket")
def identity_headers_do_not_get_into_a_conversation(server: Server) -> None:
    """Nor does what another proxy found out; others do."""
    lie = "URI=spiffe://shop.internal/ns/default/sa/admin"
    with chat(server, "/chat", ("X-Forwarded-Client-Cert", lie), ("X-Mesh-Peer", lie), ("X-Other", "1")) as conversation:
        headers = dict(json.loads(conversation.recv())["headers"])
    assert {"x-forwarded-client-cert", "x-mesh-peer"} & set(headers) == set()
    assert headers["x-other"] == "1"


@behaviour("websocket")
def a_subprotocol_is_agreed_on(server: Server) -> None:
    """Between the caller and the handler."""
    with chat(server, "/chat", subprotocols=["graphql-ws", "mqtt"]) as conversation:
        conversation.recv()
        assert conversation.subprotocol == "graphql-ws"


@behaviour("websocket")
def the_handler_may_end_a_conversation(server: Server) -> None:
    """With a code and a reason that arrive."""
    with chat(server, "/chat") as conversation:
        conversation.recv()
        conversation.send("bye")
        with pytest.raises(ConnectionClosed) as caught:
            conversation.recv()
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4001, "as you wish")


@behaviour("websocket")
def the_handler_may_decline_a_conversation(server: Server) -> None:
    """Before it begins: 403, counted as such."""
    before = counted(server, "403")
    with pytest.raises(InvalidStatus) as caught, chat(server, "/denied"):
        pass
    assert caught.value.response.status_code == 403
    server.until(lambda: counted(server, "403") == before + 1)


@behaviour("websocket", "denial")
def the_handler_may_decline_with_an_answer_of_its_own(server: Server) -> None:
    """The denial response of ASGI passes."""
    with pytest.raises(InvalidStatus) as caught, chat(server, "/denial"):
        pass
    response = caught.value.response
    assert (response.status_code, response.headers["x-why"], response.body) == (418, "teapot", b"no")


@behaviour("websocket")
def a_conversation_has_no_deadline(server: Server) -> None:
    """That of its beginning was for the beginning."""
    with chat(server, "/chat", ("X-Mesh-Deadline-Ms", "5000")) as conversation:
        assert json.loads(conversation.recv())["left"] is None


@behaviour("websocket")
def a_late_conversation_does_not_begin(server: Server) -> None:
    """504, as for a call."""
    with pytest.raises(InvalidStatus) as caught, chat(server, "/chat", ("X-Mesh-Deadline-Ms", "0")):
        pass
    assert caught.value.response.status_code in (403, 504)


@behaviour("websocket")
def a_conversation_that_fails_gives_its_place_back(server: Server) -> None:
    """And the caller learns that it failed; also one whose caller goes away."""
    with chat(server, "/chat") as conversation:
        conversation.recv()
        conversation.send("boom")
        with pytest.raises(ConnectionClosed):
            conversation.recv()
    with chat(server, "/chat") as conversation:
        conversation.recv()
        conversation.socket.close()
    server.until(lambda: in_flight(server) == 0)


@behaviour("websocket", "tls", modes=("permissive",))
def a_conversation_over_tls_has_a_peer_in_permissive_too(server: Server) -> None:
    """On the same port as the plain ones."""
    with chat(server, "/chat", tls="storefront") as conversation:
        assert json.loads(conversation.recv())["peer"] == STOREFRONT
