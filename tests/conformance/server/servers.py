"""Which servers are tested, in which world? One running server of a kind and mode, and the certificates around it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conformance.server.wire import Answer, Wire, connection, context
from tests.support import PYTHON, ROOT, free_port, identities, process, wait_until_listening, write_config

RULES: dict[str, Any] = {
    "allow": [
        {"name": "everything", "from": ["storefront"]},
        {"name": "numbers", "from": ["*"], "methods": ["GET"], "paths": ["/numbers"]},
        {"name": "public", "from": ["*"], "methods": ["GET"], "paths": ["/public", "/public/*"]},
    ],
    "deny": [{"name": "no-admin", "from": ["*"], "paths": ["/admin", "/admin/*"]}],
}


class World:
    """An embedded CA, its SVIDs, and where they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = identities(folder, "orders", "storefront", "stranger")
        foreign = folder / "foreign"
        foreign.mkdir()
        identities(foreign, "storefront")
        self.storefront = context(self.svid("storefront"))
        self.stranger = context(self.svid("stranger"))
        self.foreign = context(foreign / "identities" / "storefront", bundle=self.svid("storefront") / "bundle.pem")
        self.nobody = context(None, bundle=self.svid("storefront") / "bundle.pem")

    def svid(self, service: str) -> Path:
        return self.folder / "identities" / service

    def config(self, mode: str) -> Path:
        home = self.folder / mode
        if not home.exists():
            home.mkdir()
            shutil.copytree(self.folder / "identities", home / "identities")
        orders = {"secure": RULES, "route": [{"name": "items", "match": {"path": {"template": "/items/{id}"}}}, {"name": "rest"}]}
        return write_config(home, {"orders": orders, "storefront": {}, "stranger": {}}, mode=mode)


class Server:
    """One running server."""

    def __init__(self, kind: str, mode: str, port: int, child: Any, world: World) -> None:
        self.kind = kind
        self.mode = mode
        self.port = port
        self.child = child
        self.world = world

    @property
    def is_asgi(self) -> bool:
        return "uvicorn" in self.kind

    @property
    def is_kept_alive(self) -> bool:
        return self.kind != "gunicorn-sync"

    def connect(self, tls: Any = "storefront") -> contextlib.AbstractContextManager[Wire]:
        return connection(self.port, getattr(self.world, tls) if isinstance(tls, str) else tls)

    def ask(self, method: str, target: str, *headers: str, body: bytes = b"", tls: Any = "storefront") -> Answer:
        """One request on a connection of its own."""
        with self.connect(tls) as wire:
            return wire.ask(method, target, *headers, body=body, is_last=True)

    def numbers(self) -> Any:
        return self.ask("GET", "/numbers").json


@contextlib.contextmanager
def running(kind: str, mode: str, world: World) -> Iterator[Server]:
    port = free_port()
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = (PYTHON, "-m", "tests.conformance.server.host", kind, str(world.config(mode)), f"127.0.0.1:{port}")
    with process(*command, env=env) as child:
        wait_until_listening(port, child)
        yield Server(kind, mode, port, child, world)
