"""What does each server that people use make of a call? Over raw sockets, with the mesh around the application.

Two sets of servers. `KINDS` of `path_host.py` are processes in which the mesh stands as a middleware, and who calls is told beside the
request; all of them start with the first case that asks, and end with this process. The others are ours: uvicorn's two parsers behind
the mesh's own door, with real mutual TLS. There an address can't be told, but it can be had: all of 127.0.0.0/8 is this machine, so
`SOURCES` stand for the addresses of the cases.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.secure.cases import ground, servers
from tests.secure.cases.ground import Request, Seen
from tests.secure.cases.path_host import AT_START, FOLDER, KINDS, WSGI
from tests.support import PYTHON, ROOT, free_port, process, wait_until_listening

OURS = ("uvicorn-httptools", "uvicorn-h11")
SOURCES = {"203.0.113.9": "127.0.0.9", "10.0.0.1": "127.0.0.10", "10.0.0.0/8": "127.0.0.0/8"}


def meant_by(word: str) -> tuple[list[str], list[str]]:
    """The servers that a word of a case may mean, of both sets; all of them where it means none."""
    plain = word.replace("(", "-").replace(")", "")
    if plain == "wsgi":
        return list(WSGI), []
    found = [kind for kind in KINDS if word and kind in plain]
    if "gunicorn" in plain:
        found = ["gunicorn"]
    return (found or list(KINDS)), ([kind for kind in OURS if kind in found] if found else list(OURS))


# ------------------------------------------------------------------------------------------------ the mesh as a middleware


class Houses:
    """One process of each kind, and the policies that they are given."""

    def __init__(self) -> None:
        self._folder = ground.home() / "houses"
        self._folder.mkdir()
        (self._folder / "policy").write_bytes(bytes(4))
        # Whoever is denied everything is told of the start all the same.
        self._write(AT_START, ground.document(own={"deny": [{**ground.ANYONE, "paths": ["/*"]}]}))
        self._numbers: dict[str, int] = {}
        self._stack = contextlib.ExitStack()
        self._ports: dict[str, int] = {}
        children = {}
        for kind in KINDS:
            self._ports[kind] = free_port()
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            command = (PYTHON, "-m", "tests.secure.cases.path_host", kind, str(self._ports[kind]))
            children[kind] = self._stack.enter_context(process(*command, env={FOLDER: str(self._folder), "PYTHONPATH": path}))
        for kind, child in children.items():
            wait_until_listening(self._ports[kind], child, seconds=60)
        self._children = list(children.values())

    def close(self) -> None:
        for child in self._children:
            # Nothing is under way, and some take seconds to end in peace.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        self._stack.close()

    def ask_bare(self, kind: str, request: Request) -> Seen:
        """A call with no mesh in between."""
        return self._asked(kind, 0, request)

    def ask(self, kind: str, content: dict[str, Any], request: Request, **more: Any) -> Seen:
        """A call under a configuration; `more` is what stands between the mesh and the application."""
        beside = {"peer": request.peer, "is_tls": request.is_tls, "source": request.source, **more}
        key = json.dumps([content, beside], sort_keys=True)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers) + 1
            self._write(str(number), content)
            (self._folder / f"{number}.json").write_text(json.dumps(beside))
        return self._asked(kind, number, request)

    def _asked(self, kind: str, number: int, request: Request) -> Seen:
        with (self._folder / "policy").open("r+b") as file:
            os.pwrite(file.fileno(), number.to_bytes(4, "little"), 0)
        with socket.create_connection(("127.0.0.1", self._ports[kind]), 5) as plug:
            return exchanged(plug, request)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        ground.mesh_of(content)  # it can be loaded, or the case fails here
        (self._folder / f"{name}.yaml").write_text(json.dumps(content))


@lru_cache(maxsize=1)
def houses() -> Houses:
    made = Houses()
    atexit.register(made.close)
    return made


def ask_all(content: dict[str, Any], request: Request, server: str = "", **more: Any) -> dict[str, Seen]:
    """The same call at every server that a case may mean, where the mesh is a middleware."""
    return {kind: houses().ask(kind, content, request, **more) for kind in meant_by(server)[0]}


# ------------------------------------------------------------------------------------------------ the mesh with its own door


def ask_ours(content: dict[str, Any], request: Request, server: str = "") -> dict[str, Seen]:
    """The same call at our own servers, over TLS with a certificate of the peer, or in plain text."""
    return {kind: asyncio.run(_ask_ours(kind, content, request)) for kind in meant_by(server)[1]}


async def _ask_ours(kind: str, content: dict[str, Any], request: Request) -> Seen:
    told: dict[str, Any] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        import meshlib

        who = meshlib.peer()
        told.update(
            path=scope["path"],
            raw_path=scope["raw_path"].decode("latin-1"),
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
            peer=who.spiffe_id if who else None,
            client=(meshlib.current_call() or {}).get("client") or scope["client"][0],
        )
        body = json.dumps(told).encode()
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length, (b"x-reached", b"* ''")]})
        await send({"type": "http.response.body", "body": body})

    mesh = ground.mesh_of(json.loads(_here(json.dumps(content))))
    sent = replace(request, headers=[(name, _here(value)) for name, value in request.headers])
    async with servers.running(kind, mesh, application) as port:
        seen = await asyncio.to_thread(_over_loopback, port, sent)
    if seen.client is not None:
        seen.client = next((address for address, stand_in in SOURCES.items() if stand_in == seen.client), seen.client)
    return seen


def _here(text: str) -> str:
    for address, stand_in in SOURCES.items():
        text = text.replace(address, stand_in)
    return text


def _over_loopback(port: int, request: Request) -> Seen:
    source = SOURCES.get(request.source, "127.0.0.1")
    with socket.create_connection(("127.0.0.1", port), 5, (source, 0)) as plug:
        if not request.is_tls:
            return exchanged(plug, request)
        with _certificate(request.peer).wrap_socket(plug) as secure:
            return exchanged(secure, request)


@lru_cache(maxsize=64)
def _certificate(spiffe_id: str) -> ssl.SSLContext:
    name = "".join(letter if letter.isalnum() else "-" for letter in spiffe_id)
    ground.authority().write(name, ground.home() / "peers", spiffe_id=spiffe_id)
    folder: Path = ground.home() / "peers" / name
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(str(folder / "bundle.pem"))
    made.load_cert_chain(str(folder / "svid.pem"), str(folder / "key.pem"))
    return made


# ------------------------------------------------------------------------------------------------ bytes


def exchanged(plug: socket.socket, request: Request) -> Seen:
    """One request as it is, and what its answer says."""
    plug.sendall("".join(_head(request)).encode("latin-1") + request.body)
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError, ssl.SSLError):
        while data := plug.recv(65536):
            answer += data
            if _is_whole(answer, request):
                break
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    status = int(lines[0].split(" ")[1]) if lines[0].startswith("HTTP/") else 0
    seen = Seen(status, headers, body)
    if "x-reached" in headers:
        told = json.loads(body) if body else {}
        seen.path = told.get("path", headers["x-reached"].partition(" ")[2].strip("'"))
        seen.raw_path = told.get("raw_path")
        seen.app_headers = [(name, value) for name, value in told.get("headers", [])]
        seen.peer, seen.client, seen.scope = told.get("peer"), told.get("client"), told
    return seen


def _head(request: Request) -> Iterator[str]:
    yield f"{request.method} {request.target} HTTP/{request.http_version}\r\n"
    if request.host is not None:
        yield f"Host: {request.host}\r\n"
    for name, value in request.headers:
        yield f"{name}: {value}\r\n"
    if not any(name.lower() == "connection" for name, _ in request.headers):
        yield "Connection: close\r\n"
    yield "\r\n"


def _is_whole(answer: bytes, request: Request) -> bool:
    """By its length, since a server may keep the connection."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    if not blank:
        return False
    if request.method == "HEAD":
        return True
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(lengths) and len(body) >= int(lengths[0])
