"""How does the data path begin and end? Threads, forks, drains, certificates that end, and callers that are too slow."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import Any

import h2.events
import httpx
import pytest

from meshlib import errors
from meshlib._native import core
from tests.agent.proxy_support import CALLER, ORDERS, SECRET, Caller2, World, asking, echo, head_of, read_all, until, world
from tests.support import ROOT

__all__ = ["world"]


def fields(port: int, **more: str) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in {**asking(port), **more}.items())


def tls_to(world: World, port: int, protocol: str = "http/1.1") -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    world.issued[CALLER].load_into(context, world.folder)
    plug = context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10))
    world.open.callback(plug.close)
    return plug


def is_refused(port: int) -> bool:
    """Nobody listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return True
    return False


def test_a_forked_child_can_not_use_the_parents_proxy(world: World) -> None:
    """Every method raises there, nothing hangs, and the parent goes on."""
    port = world.listen(world.application(echo))
    assert world.client().get("/", headers=asking(port)).status_code == 200
    code = """if True:
        import os, sys
        from meshlib._native import core
        proxy = core.Proxy(2)
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (proxy.stats, proxy.connections, proxy.drain, lambda: proxy.stop(1.0), lambda: proxy.forget("spiffe://td/x")):
                try:
                    call()
                except RuntimeError:
                    refused += 1
            del proxy
            again = core.Proxy(1)
            again.stats()
            again.stop(1.0)
            sys.exit(refused)
        _, status = os.waitpid(child, 0)
        proxy.stats()
        print(os.waitstatus_to_exitcode(status), proxy.stop(1.0))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["5", "True"], done.stderr


def test_several_workers_share_the_connections(world: World) -> None:
    """Each call is served, whichever worker has it; all threads end with the proxy."""
    before = len(os.listdir("/proc/self/task"))
    other = World(world.folder, workers=3)
    assert before + 3 == len(os.listdir("/proc/self/task"))
    port = other.listen(world.application(echo))
    clients = [other.client() for _ in range(6)]
    for client in clients * 2:
        assert client.get("/", headers=asking(port)).status_code == 200
    assert other.proxy.stats()["inbound"]["orders"]["requests"] == 12
    other.close()
    until(lambda: len(os.listdir("/proc/self/task")) <= before + 2)
    with pytest.raises(BrokenPipeError):
        with socket.create_server(("127.0.0.1", 0)) as plug:
            other.proxy.listen("late", plug.fileno(), ORDERS, "/x", "enforce")


def test_a_drain_finishes_what_is_under_way(world: World) -> None:
    """The answer comes with `connection: close`, HTTP/2 gets GOAWAY, and nothing was cut."""
    begun, go = threading.Event(), threading.Event()

    async def slow(scope: dict[str, Any], receive: Any, send: Any) -> None:
        import asyncio

        begun.set()
        while not go.is_set():
            await asyncio.sleep(0.01)
        await echo(scope, receive, send)

    port = world.listen(world.application(slow))
    one, two = tls_to(world, port), Caller2(tls_to(world, port, "h2"))
    one.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    two.ask({})
    until(begun.is_set)
    until(lambda: world.proxy.stats()["inbound"]["orders"]["requests"] == 2)
    world.proxy.drain()
    until(lambda: is_refused(port))
    go.set()
    answer = head_of(one)
    assert b" 200 " in answer
    assert b"connection: close" in answer.lower()
    # By hand, since the library takes GOAWAY for the end of everything: GOAWAY, and the head and body of stream 1 behind it.
    frames, data = [], b""
    with contextlib.suppress(OSError):
        while piece := two.plug.recv(65536):
            data += piece
            while len(data) >= 9 + (size := int.from_bytes(data[:3], "big")):
                frames.append((data[3], int.from_bytes(data[5:9], "big")))
                if data[3] == 6 and not data[4]:
                    two.plug.sendall(data[:4] + b"\1" + data[5 : 9 + size])
                data = data[9 + size :]
    assert frames.index((7, 0)) < frames.index((1, 1)), frames
    assert world.proxy.stop(5.0)


def test_stopping_says_whether_something_was_cut(world: World) -> None:
    """A caller that waits for an application that never answers is cut when the time is over."""

    async def never(scope: Any, receive: Any, send: Any) -> None:
        import asyncio

        await asyncio.sleep(60)

    port = world.listen(world.application(never))
    plug = tls_to(world, port)
    plug.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    until(lambda: world.proxy.stats()["inbound"]["orders"]["requests"] == 1)
    begin = time.monotonic()
    assert not world.proxy.stop(0.3)
    assert time.monotonic() - begin < 3


def test_a_connection_ends_with_the_certificate_of_its_peer(world: World) -> None:
    """At its end the peer is asked to leave, and no request is served a second later."""
    port = world.listen(world.application(echo))
    world.identify(CALLER, end=3)
    plug = tls_to(world, port)
    end = time.monotonic() + 3
    served = 0.0
    with contextlib.suppress(OSError):
        while time.monotonic() < end + 3:
            plug.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
            if b" 200 " not in plug.recv(65536):
                break
            served = time.monotonic()
            time.sleep(0.05)
    assert end - 2 < served < end + 1
    time.sleep(1.1)
    with pytest.raises(ssl.SSLError, match="EXPIRED"):
        tls_to(world, port).recv(1)


def test_a_caller_whose_certificate_is_taken_back_is_cut(world: World) -> None:
    """A list that names it comes with the next generation: the open connection ends, and no new one is let in."""
    port = world.listen(world.application(echo))
    plug = tls_to(world, port)
    plug.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    assert b" 200 " in head_of(plug)
    world.identify(ORDERS)
    plug.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    assert b" 200 " in head_of(plug)
    issued, revoked = world.issued[ORDERS], world.root.crl(world.issued[CALLER].serial)
    world.proxy.identify(ORDERS, issued.chain, issued.key, {"td": world.root.pem}, {"td": revoked}, SECRET)
    assert read_all(plug, 2) == b""
    with pytest.raises(ssl.SSLError, match="REVOKED"):
        tls_to(world, port).recv(1)


def test_rotations_under_load_fail_nobody(world: World) -> None:
    """Both identities are replaced again and again while calls go through: every one succeeds (R10)."""
    port = world.listen(world.application(echo))
    end = time.monotonic() + 2
    statuses: list[int] = []

    def call(protocol: str) -> None:
        client = world.client(http2=protocol == "http2")
        while time.monotonic() < end:
            statuses.append(client.post("/", content=b"x" * 2000, headers=asking(port, protocol=protocol)).status_code)

    threads = [threading.Thread(target=call, args=(protocol,)) for protocol in ("http1", "http2")]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        for spiffe_id in (CALLER, ORDERS):
            world.identify(spiffe_id)
            time.sleep(0.1)
    for thread in threads:
        thread.join(10)
    assert set(statuses) == {200}
    assert len(statuses) > 20


def test_who_is_nobody_stays_outside(world: World) -> None:
    """In mode enforce plain text is told in words, and TLS without a certificate gets no answer; permissive takes both."""
    app = world.application(echo)
    strict = world.listen(app)
    plug = socket.create_connection(("127.0.0.1", strict), 5)
    plug.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    assert b"400 Bad Request" in (words := read_all(plug, 5))
    assert b"This port speaks mutual TLS." in words
    lenient = world.listen(app, mode="permissive", name="lenient")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(verify=context) as client:
        assert "id=;" in client.get(f"https://127.0.0.1:{lenient}/").headers["x-came-x-mesh-handed"]
        with pytest.raises(httpx.TransportError):
            client.get(f"https://127.0.0.1:{strict}/")
    reply = httpx.get(
        f"http://127.0.0.1:{lenient}/", headers={"x-mesh-handed": f"secret={SECRET}", "x_mesh_handed": "id=spiffe://td/x"}
    )
    told = [value for name, value in reply.headers.multi_items() if "handed" in name]
    assert len(told) == 1
    assert told[0].startswith(f"secret={SECRET};tls=;id=;")


def test_what_is_no_identity_is_refused_and_changes_nothing(world: World) -> None:
    """The old generation stays in force."""
    issued = world.issued[CALLER]
    with pytest.raises(errors.MeshError):
        world.proxy.identify(CALLER, b"no PEM", issued.key, {"td": world.root.pem}, {}, SECRET)
    with pytest.raises(ValueError, match="hexadecimal"):
        world.proxy.identify(CALLER, issued.chain, issued.key, {"td": world.root.pem}, {}, "no hex")
    with pytest.raises(ValueError, match="mode"):
        world.proxy.listen("x", 0, ORDERS, "/x", "open")
    with pytest.raises(ValueError, match="workers"):
        core.Proxy(0)
    assert world.proxy.stats()["identities"][CALLER]["generation"] == 1


def test_an_unlistened_port_closes_and_its_callers_leave(world: World) -> None:
    """What is open finishes; nobody new comes in."""
    port = world.listen(world.application(echo))
    plug = tls_to(world, port)
    plug.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    assert b" 200 " in head_of(plug)
    world.proxy.unlisten("orders")
    assert read_all(plug, 5) == b""
    until(lambda: is_refused(port))


def test_callers_that_are_too_slow_lose_their_place(world: World) -> None:
    """Ten seconds for a handshake, for a head, and between two pieces of a body: one byte a second is not enough. Others go on."""
    port = world.listen(world.application(echo))
    plugs: dict[str, socket.socket] = {}
    plugs["handshake"] = socket.create_connection(("127.0.0.1", port), 10)
    plugs["head"], plugs["body"] = tls_to(world, port), tls_to(world, port)
    plugs["body"].sendall(b"POST / HTTP/1.1\r\nhost: orders\r\ncontent-length: 100000\r\n\r\n")
    plugs["preface"] = tls_to(world, port, "h2")
    plugs["data socket"] = world.caller()
    two = Caller2(tls_to(world, port, "h2"))
    stream = two.ask({}, method="POST", is_end=False)
    text = {name: b"\x16\x03\x01\x02\x00" + bytes(20) for name in plugs}
    text |= {"head": b"GET / HTTP/1.1\r\nhost: orders\r\n", "body": b"x" * 30}
    text |= {"preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "data socket": b"GET /ping HTTP/1.1\r\nx-slow: yes"}
    begin = time.monotonic()
    ended: dict[str, float] = {}
    client = world.client()
    for second in range(13):
        for name, plug in plugs.items():
            if name in ended:
                continue
            plug.settimeout(0.01)
            try:
                plug.send(text[name][second : second + 1])
                while piece := plug.recv(65536):
                    assert b" 200 " not in piece
                ended[name] = time.monotonic() - begin
            except TimeoutError:
                pass
            except OSError:
                ended[name] = time.monotonic() - begin
        assert client.get("/", headers=asking(port)).status_code == 200
        time.sleep(max(0.0, begin + second + 1 - time.monotonic()))
    assert set(plugs) == set(ended), ended
    assert all(9 < seconds < 12.5 for seconds in ended.values()), ended
    event = two.wait(h2.events.ResponseReceived, 2)
    assert event is not None and dict(event.headers)[b":status"] == b"408"
    assert stream == event.stream_id


def test_callers_of_one_identity_are_asked_to_come_again(world: World) -> None:
    """Their connections end when they are idle; those of others stay."""
    theirs, others = world.caller(CALLER), world.caller(ORDERS)
    for plug in (theirs, others):
        plug.sendall(b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b" 204 " in plug.recv(65536)
    world.proxy.readmit(CALLER)
    assert theirs.recv(65536) == b""
    others.sendall(b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n")
    assert b" 204 " in others.recv(65536)
