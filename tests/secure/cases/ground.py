"""On what ground do the cases stand? A mesh from a policy, made by the real configuration, with calls that come in over its real way.

One folder with one CA of the trust domain `td`, in which the service `svc` (the host `svc.local`) is attacked. A mesh is made for each
policy and kept, since many cases share one. The call comes in as a server would hand it over (ASGI or WSGI), so that what is seen is what
the middleware does and not what one of its parts would do.
"""

from __future__ import annotations

import asyncio
import atexit
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import meshlib
from meshlib.call import Peer
from meshlib.server.door import PEER
from meshlib.server.line import LINE, Line
from tests.support import identities as _issue

TRUST_DOMAIN = "td"
SERVICE = "svc"
HOST = "svc.local"
CALLER = "spiffe://td/caller"
PROXY = "spiffe://td/proxy"
ANYONE = {"from": ["*"]}

Headers = list[tuple[str, str]]


@lru_cache(maxsize=1)
def home() -> Path:
    """A folder for this process, with the identities of its services."""
    folder = Path(tempfile.mkdtemp(prefix="attack-cases-"))
    atexit.register(shutil.rmtree, folder, True)
    from unittest import mock

    with mock.patch("tests.support.TRUST_DOMAIN", TRUST_DOMAIN):
        _issue(folder, SERVICE, "caller", "proxy")
    return folder


def authority() -> Any:
    """The CA of that folder."""
    from meshlib.secure.ca import CertificateAuthority

    return CertificateAuthority.open(home() / "ca")


# ------------------------------------------------------------------------------------------------ configuration


def document(secure: dict[str, Any] | None = None, own: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A mesh.yaml: `secure` is the system's, `own` the service's section `secure`; the rest as it is."""
    services = {SERVICE: {"secure": own or {}, **top.pop("service", {})}, "caller": {}, **top.pop("services", {})}
    base = {"mode": "enforce", "trust_domain": TRUST_DOMAIN, "identity": {"folder": str(home() / "identities")}}
    return {"mesh": "cases", "secure": {**base, **(secure or {})}, "services": services, **top}


def written(content: dict[str, Any] | str, folder: Path | None = None) -> Path:
    """The file of a configuration; a text is written as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    folder = folder or Path(tempfile.mkdtemp(dir=home()))
    file = folder / "mesh.yaml"
    file.write_text(text)
    return file


def mesh_of(content: dict[str, Any]) -> meshlib.Mesh:
    """A mesh of this configuration, kept for the next case that has the same. Raises ConfigError."""
    return _mesh_of(json.dumps(content, sort_keys=True))


@lru_cache(maxsize=256)
def _mesh_of(content: str) -> meshlib.Mesh:
    # Nobody allows anything in many of these, and the warning is right.
    level = logging.getLogger("meshlib").level
    logging.getLogger("meshlib").setLevel(logging.ERROR)
    try:
        mesh = meshlib.Mesh.load(written(content), service=SERVICE)
    finally:
        logging.getLogger("meshlib").setLevel(level)
    atexit.register(mesh.close)
    return mesh


# ------------------------------------------------------------------------------------------------ one call


@dataclass(frozen=True)
class Request:
    """What comes in. `peer` is the identity that the connection proved; "" is a connection without one."""

    target: str = "/x"
    method: str = "GET"
    headers: Headers = field(default_factory=list)
    host: str | None = HOST
    peer: str = CALLER
    is_tls: bool = True
    source: str = "203.0.113.9"
    http_version: str = "1.1"
    kind: str = "http"
    body: bytes = b""


@dataclass
class Seen:
    """What became of a call: the answer's status and body, and what the application saw of it (None: it was not reached)."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    path: str | None = None
    raw_path: str | None = None
    app_headers: list[tuple[str, str]] | None = None
    scope: dict[str, Any] | None = None
    peer: str | None = None
    client: str | None = None

    @property
    def reached(self) -> bool:
        return self.path is not None

    @property
    def reason(self) -> str:
        try:
            found = json.loads(self.body)
        except ValueError:
            return ""
        return str(found.get("reason", "")) if isinstance(found, dict) else ""

    def values(self, name: str) -> list[str]:
        """What the application sees under a header's name, in any spelling."""
        wanted = name.lower().replace("_", "-")
        return [value for key, value in self.app_headers or [] if key.lower().replace("_", "-") == wanted]


def ask(mesh: meshlib.Mesh, request: Request) -> Seen:
    """One call over ASGI."""
    return asyncio.run(ask_async(mesh, request))


async def ask_async(mesh: meshlib.Mesh, request: Request, handler: Callable[[], Awaitable[object]] | None = None) -> Seen:
    """The same in a running loop; `handler` is what the application does with the call."""
    seen = Seen(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.path, seen.raw_path, seen.scope = scope["path"], scope["raw_path"].decode("latin-1"), scope
        seen.app_headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        who = meshlib.peer()
        seen.peer = who.spiffe_id if who else None
        record = meshlib.current_call() or {}
        seen.client = record.get("client") or (scope.get("client") or ("",))[0]
        if handler is not None:
            await handler()
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1000})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    messages = [{"type": "http.request", "body": request.body, "more_body": False}]
    if request.kind == "websocket":
        messages = [{"type": "websocket.connect"}]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"].endswith("response.start"):
            seen.status = message["status"]
            seen.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif message["type"].endswith("response.body"):
            seen.body += message.get("body", b"")
        elif message["type"] == "websocket.accept":
            seen.status = 101
        elif message["type"] == "websocket.close" and not seen.status:
            seen.status = 403

    await mesh.asgi(app)(asgi_scope(request), receive, send)
    return seen


def asgi_scope(request: Request) -> dict[str, Any]:
    """As uvicorn makes it: everything decoded in `path`, the wire's bytes in `raw_path`."""
    raw, _, query = request.target.partition("?")
    fields = [*([("host", request.host)] if request.host is not None else []), *request.headers]
    scope: dict[str, Any] = {
        "type": request.kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version,
        "scheme": "https" if request.is_tls else "http",
        "path": unquote_to_bytes(raw.encode("latin-1")).decode("utf-8", "replace"),
        "raw_path": raw.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields],
        "client": (request.source, 40000),
        "server": ("127.0.0.1", 8443),
    }
    if request.kind == "http":
        scope["method"] = request.method
    # As a server of ours says who is there.
    scope[LINE] = Line(Peer(request.peer, is_tls=request.is_tls), request.source, 8443)
    return scope


def ask_wsgi(mesh: meshlib.Mesh, request: Request, environ: dict[str, str] | None = None, *, has_raw: bool = True) -> Seen:
    """One call over WSGI; `environ` is what the server puts there beside. Without `has_raw` as a server that only tells the decoded path."""
    seen = Seen(0)

    def app(env: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        seen.path = env["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
        seen.raw_path = str(env.get("RAW_URI", "")).partition("?")[0]
        seen.app_headers = [(key[5:].lower(), value) for key, value in env.items() if key.startswith("HTTP_")]
        who = meshlib.peer()
        seen.peer = who.spiffe_id if who else None
        seen.client = (meshlib.current_call() or {}).get("client") or env.get("REMOTE_ADDR")
        start_response("200 OK", [])
        return [b""]

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        seen.status = int(status[:3])
        seen.headers = {name.lower(): value for name, value in headers}

    raw, _, query = request.target.partition("?")
    env: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(raw.encode("latin-1")).decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8443",
        "SERVER_PROTOCOL": f"HTTP/{request.http_version}",
        "REMOTE_ADDR": request.source,
        "wsgi.url_scheme": "https" if request.is_tls else "http",
        "wsgi.input": io.BytesIO(request.body),
    }
    if has_raw:
        env["RAW_URI"] = request.target
    for name, value in [*([("host", request.host)] if request.host is not None else []), *request.headers]:
        key = "HTTP_" + name.upper().replace("-", "_")
        # As WSGI servers do: one key for one name, values joined.
        env[key] = f"{env[key]},{value}" if key in env else value
    if request.is_tls:
        env[PEER] = Peer(request.peer, is_tls=True)
    env.update(environ or {})
    answer = mesh.wsgi(app)(env, start_response)
    seen.body = b"".join(answer)
    close = getattr(answer, "close", None)
    if close is not None:
        close()
    return seen


# ------------------------------------------------------------------------------------------------ words


def verdict(seen: Seen) -> set[str]:
    """The words of an answer to a call: its status, and what it means."""
    if seen.reached:
        return {"allow", "accept", str(seen.status)}
    if seen.status == 401 and seen.reason == "secure.no_identity":
        # Nobody is let in without proving who they are.
        return {"401", "deny", "reject"}
    meanings = {
        400: {"reject"},
        401: {"reject", "401"},
        403: {"deny"},
        405: {"reject"},
        429: {"limited"},
        431: {"reject"},
        414: {"reject"},
    }
    return {str(seen.status), *meanings.get(seen.status, set())}
