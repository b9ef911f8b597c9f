"""Who calls, where the node agent holds the connection: what counts as its word, and what doesn't. In process."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import meshlib
from meshlib import errors
from meshlib.keeper import Keeper
from meshlib.server import handed as module
from meshlib.server.asgi import MeshASGI
from meshlib.server.handed import Handed, parse
from meshlib.server.line import Line
from meshlib.server.wsgi import MeshWSGI
from tests.server.inside import SHOP, Caller, exact, http_scope, rule, way

SECRET = "0123456789abcdef" * 4
SHOPS = rule("shop", callers=exact(SHOP))


def header(secret: str = SECRET, **fields: Any) -> str:
    told = {
        "tls": "TLSv1.3",
        "id": SHOP,
        "not_after": str(int(time.time()) + 3600),
        "serial": "0a1b",
        "sha256": "ff" * 32,
        "address": "10.0.0.7:5000",
        "port": "8443",
        "sni": "orders",
        **fields,
    }
    return ";".join([f"secret={secret}", *(f"{name}={value}" for name, value in told.items() if value is not None)])


async def handed(secret: str = SECRET, clock: Any = time.monotonic) -> Handed:
    async def ask(target: str, budget: float) -> tuple[int, bytes]:
        assert target == "/handover"
        return 200, secret.encode()

    made = Handed(Keeper(), ask, clock=clock)
    await made.look()
    return made


class Seen:
    """An application that notes what it was told."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.peers: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append({**scope})
        self.peers.append(meshlib.peer())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        self.scopes.append({**environ})
        self.peers.append(meshlib.peer())
        start_response("200 OK", [])
        return [b"ok"]


async def ask(agent: Handed, *headers: tuple[str, str], **more: Any) -> tuple[Caller, Seen]:
    inbound = way(SHOPS)
    inbound.agent = agent
    app, caller = Seen(), Caller()
    scope = http_scope("/items/7", *headers, peer=None, client=None, server=("/run/app.sock", None), **more)
    await MeshASGI(app, inbound)(scope, caller.receive, caller.send)
    return caller, app


def ask_wsgi(agent: Handed, value: str | None) -> tuple[str, Seen]:
    inbound = way(SHOPS)
    inbound.agent = agent
    app, status = Seen(), ""

    def start_response(line: str, *_: Any) -> Any:
        nonlocal status
        status = line

    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/items/7",
        "RAW_URI": "/items/7",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "orders",
        "wsgi.url_scheme": "http",
        "SERVER_PORT": "",
        "REMOTE_ADDR": "",
    }
    if value is not None:
        environ["HTTP_X_MESH_HANDED"] = value
    list(MeshWSGI(app.wsgi, inbound)(environ, start_response))
    return status, app


async def test_a_call_that_was_handed_over_is_its_callers() -> None:
    """Identity, certificate, address, port and name as the agent found them; and no trace of the header."""
    caller, app = await ask(await handed(), ("x-mesh-handed", header()), ("x-own", "1"))
    assert caller.status == 200
    (scope,), (peer,) = app.scopes, app.peers
    assert (peer.spiffe_id, peer.is_tls, peer.serial) == (SHOP, True, "0a1b")
    assert peer.not_after > time.time()
    assert scope["client"] == ("10.0.0.7", 5000)
    assert (scope["server"][1], scope["scheme"]) == (8443, "https")
    assert scope["extensions"]["tls"]["tls_version"] == 0x0304
    assert scope["extensions"]["tls"]["client_cert"] is None
    assert [name for name, _ in scope["headers"] if name.startswith(b"x-")] == [b"x-own"] or b"x-request-id" in dict(
        scope["headers"]
    )
    assert SECRET not in repr(scope["headers"])


async def test_the_same_holds_for_wsgi() -> None:
    """In the words of its environ."""
    status, app = ask_wsgi(await handed(), header())
    assert status == "200 OK"
    (environ,), (peer,) = app.scopes, app.peers
    assert peer.spiffe_id == SHOP
    assert (environ["REMOTE_ADDR"], environ["SERVER_PORT"], environ["wsgi.url_scheme"]) == ("10.0.0.7", "8443", "https")
    assert SECRET not in repr(environ)


WRONG = {
    "no header": [],
    "another secret": [header("f" * 64)],
    "no secret": [header().partition(";")[2]],
    "an empty secret": [header("")],
    "twice": [header(), header()],
    "a right one and a wrong one": [header(), header("f" * 64)],
    "joined": [f"{header()},{header()}"],
    "a name twice": [header() + ";id=spiffe://shop.internal/x"],
    "no name": [header() + ";=x"],
    "a name in capitals": [header() + ";ID=spiffe://shop.internal/x"],
    "no value": [header() + ";x"],
    "no SPIFFE ID": [header(id="shop")],
    "another scheme": [header(id="https://shop.internal/ns/default/sa/storefront")],
    "an identity without TLS": [header(tls="")],
    "another TLS": [header(tls="SSLv3")],
    "an identity without an end": [header(not_after="")],
    "an end that is no number": [header(not_after="soon")],
    "an end beyond all numbers": [header(not_after="9" * 13)],
    "a port beyond all ports": [header(port="70000")],
    "a port that is negative": [header(port="-1")],
    "an address without a port": [header(address="10.0.0.7")],
    "a serial that is none": [header(serial="xyz")],
    "a space": [header(sni="a b")],
    "too much": [header(sni="a" * 5000)],
    "bytes beyond ASCII": [header(sni="\xe9")],
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
async def test_what_is_not_the_agents_word_is_as_if_never_said(values: list[str]) -> None:
    """The caller is one without identity, and the header goes either way."""
    agent = await handed()
    caller, app = await ask(agent, *(("x-mesh-handed", value) for value in values))
    assert (caller.status, app.scopes) == (401, [])
    if len(values) < 2:
        status, app = ask_wsgi(agent, values[0] if values else None)
        assert (status[:3], app.scopes) == ("401", [])
    assert agent.stats()["wrong"] == len(values[:1]) * (2 if len(values) < 2 else 1)


async def test_a_right_secret_is_asked_for_in_any_spelling_of_the_name() -> None:
    """Names have no case; a server that doesn't lower them opens no gap, neither way."""
    caller, app = await ask(await handed(), ("X-Mesh-Handed", header()))
    assert caller.status == 200
    assert SECRET not in repr(app.scopes)


async def test_without_the_secret_nobody_is_believed() -> None:
    """An agent that can't be asked is waited for once, and not for long."""

    async def ask_nobody(target: str, budget: float) -> tuple[int, bytes]:
        raise errors.ConnectFailed("nobody there.")

    agent = Handed(Keeper(), ask_nobody)
    caller, _ = await ask(agent, ("x-mesh-handed", header()))
    assert caller.status == 401
    agent._keeper.stop()


async def test_the_first_call_waits_for_the_secret() -> None:
    """Where a server tells nobody that it starts."""

    async def slowly(target: str, budget: float) -> tuple[int, bytes]:
        await asyncio.sleep(0.05)
        return 200, SECRET.encode()

    agent = Handed(Keeper(), slowly)
    caller, _ = await ask(agent, ("x-mesh-handed", header()))
    assert caller.status == 200
    agent._keeper.stop()
    agent = Handed(Keeper(), slowly)
    status, _ = await asyncio.to_thread(ask_wsgi, agent, header())
    assert status == "200 OK"
    agent._keeper.stop()


@pytest.mark.parametrize("answer", [(200, b"short"), (200, b"x" * 64), (200, b""), (403, SECRET.encode()), (200, b"A" * 64)])
async def test_what_is_no_secret_is_not_taken_for_one(answer: tuple[int, bytes]) -> None:
    """An empty one would be known to everybody."""

    async def say(target: str, budget: float) -> tuple[int, bytes]:
        return answer

    agent = Handed(Keeper(), say)
    await agent.look()
    assert not agent.is_ready


async def test_a_wrong_secret_makes_us_ask_again_once_in_a_while() -> None:
    """The agent may have a new one. Whoever shows wrong ones can't make us ask all the time."""
    now = 100.0
    agent = await handed(clock=lambda: now)
    asked: list[Any] = []
    agent.jobs()
    job = agent._job
    agent._keeper.soon = asked.append  # type: ignore[method-assign]
    for _ in range(5):
        await ask(agent, ("x-mesh-handed", header("f" * 64)))
    assert asked == [job]
    now += module.AGAIN
    await ask(agent, ("x-mesh-handed", header("f" * 64)))
    assert asked == [job, job]


async def test_a_certificate_that_has_ended_proves_nothing() -> None:
    """As on a connection of our own, which is answered 401 and closed."""
    ended = header(not_after=str(int(time.time()) - 1))
    caller, app = await ask(await handed(), ("x-mesh-handed", ended))
    assert (caller.status, app.scopes) == (401, [])
    assert caller.problem["reason"] == "secure.proof_ended"
    status, app = ask_wsgi(await handed(), ended)
    assert (status[:3], app.scopes) == ("401", [])


async def test_a_plain_caller_is_told_by_its_address() -> None:
    """In mode permissive the agent takes plain text, too."""
    told = parse(header(tls="", id="", not_after="", serial="", sha256="").encode())
    assert told is not None
    assert (told[1].peer.is_tls, told[1].peer.spiffe_id, told[1].address) == (False, "", "10.0.0.7")
    told = parse(header(id="", not_after="").encode())
    assert told is not None
    assert (told[1].peer.is_tls, told[1].peer.spiffe_id) == (True, "")


async def test_what_a_newer_agent_says_beside_is_skipped() -> None:
    """The two are not updated at the same moment."""
    told = parse((header() + ";cipher_suite=x;v6=1").encode())
    assert told is not None
    assert told[1].peer.spiffe_id == SHOP
    told = parse(header(address="[2001:db8::1]:5000").encode())
    assert told is not None
    assert (told[1].address, told[1].client_port) == ("2001:db8::1", 5000)


async def test_a_service_without_the_agent_takes_no_word_of_it() -> None:
    """And its handler doesn't see the header either."""
    app, caller = Seen(), Caller()
    await MeshASGI(app, way(rule("all")))(http_scope("/", ("x-mesh-handed", header())), caller.receive, caller.send)
    assert caller.status == 200
    assert b"x-mesh-handed" not in dict(app.scopes[0]["headers"])
    assert app.peers[0].spiffe_id != SHOP


async def test_a_connection_of_ours_still_tells_that_its_client_has_gone() -> None:
    """`meshlib serve` behind the agent: the caller is the agent's word, and the connection is ours."""
    outer = Line(is_ours=True)
    inbound = way(SHOPS)
    inbound.agent = await handed()
    left: list[bool] = []
    is_in, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        is_in.set()
        await go_on.wait()
        left.append(scope["meshlib.visit"].is_left)

    caller = Caller()
    scope = http_scope("/", ("x-mesh-handed", header()), peer=None)
    task = asyncio.create_task(MeshASGI(app, inbound).serve(outer, scope, caller.receive, caller.send))
    await is_in.wait()
    outer.gone()
    go_on.set()
    await task
    assert left == [True]


async def test_a_server_that_tells_nobodys_certificate_will_do() -> None:
    """With the agent before it."""

    class Receive:
        async def __call__(self) -> Any:
            return {"type": "lifespan.startup"}

    Receive.__module__ = "hypercorn.asyncio.lifespan"
    inbound = way(SHOPS)
    inbound.agent = await handed()
    told: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        told.append(scope["type"])

    receive: Any = Receive()
    receive.__module__ = "hypercorn.asyncio.lifespan"
    await MeshASGI(app, inbound)({"type": "lifespan"}, receive, None)  # type: ignore[arg-type]
    assert told == ["lifespan"]
