"""Does a delegated call get through, from a library's connection to the application of the other node, and back?"""

from __future__ import annotations

import hashlib

import pytest

from tests.agent.proxy_support import CALLER, ORDERS, SECRET, World, asking, echo, facts, world

__all__ = ["world"]


@pytest.mark.parametrize("is_http2", [False, True], ids=["h1", "h2"])
@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_a_call_goes_through_both_agents(world: World, protocol: str, is_http2: bool) -> None:
    """Whatever is spoken on either side, path, fields and body arrive, and the caller's proof with them."""
    port = world.listen(world.application(echo))
    client = world.client(http2=is_http2)
    for size in (0, 10, 300_000):
        body = b"x" * size
        reply = client.post("/items/7?q=1", content=body, headers={**asking(port, protocol=protocol), "x-mesh-attempt": "2"})
        assert (200, body) == (reply.status_code, reply.content)
        assert reply.headers["x-target"] == "/items/7?q=1"
        assert reply.headers["x-came-x-mesh-attempt"] == "2"
        assert reply.headers["x-came-host"] == "orders"
        assert "x-came-x-mesh-endpoint" not in reply.headers
    told = facts(reply.headers["x-came-x-mesh-handed"])
    assert (SECRET, CALLER, "TLSv1.3", str(port)) == (told["secret"], told["id"], told["tls"], told["port"])
    leaf = world.issued[CALLER].der[0]
    assert hashlib.sha256(leaf).hexdigest() == told["sha256"]
    assert f"{world.issued[CALLER].serial:x}" == told["serial"].lstrip("0")


def test_connections_are_kept_and_counted(world: World) -> None:
    """A second call goes over the connection of the first, and the lists show it."""
    port = world.listen(world.application(echo))
    client = world.client()
    for _ in range(5):
        assert client.get("/", headers=asking(port)).status_code == 200
    stats = world.proxy.stats()
    assert (stats["outbound"]["requests"], stats["upstream"]["open"]) == (5, 1)
    assert stats["inbound"]["orders"]["requests"] == 5
    assert stats["identities"][CALLER]["client"]["full"] == 1
    rows = {row["direction"]: row for row in world.proxy.connections()}
    assert tuple(rows["inbound"][key] for key in ("peer", "protocol", "requests")) == (CALLER, "http/1.1", 5)
    assert rows["upstream"]["peer"] == ORDERS


def test_the_reserved_paths_answer(world: World) -> None:
    """A ping, the secret of handing over for the caller, and nothing else without an endpoint."""
    client = world.client()
    assert client.get("/ping").status_code == 204
    reply = client.get("/handover")
    assert (reply.status_code, reply.text) == (200, SECRET)
    assert client.get("/other").status_code == 400
    assert client.post("/ping").status_code == 400


def test_plain_text_is_spoken_where_the_library_says_so(world: World) -> None:
    """`-` expects nobody: mode observe."""
    port = world.listen(world.application(echo), mode="observe")
    for protocol in ("http1", "http2"):
        reply = world.client().get("/", headers=asking(port, expect="-", protocol=protocol))
        assert reply.status_code == 200
        told = facts(reply.headers["x-came-x-mesh-handed"])
        assert (told["id"], told["tls"], told["secret"]) == ("", "", SECRET)
