"""A server that forks, and is entered in a registry which writes down who enters. Run by test_registration_fork.

`python -m tests.discover.forked_server CONFIG FOLDER grpc` serves gRPC by a port of the mesh and forks a child that only calls others;
`… served ADDRESS` serves an application at another address than the configuration's, with two workers; `… command ADDRESS` does so with
`meshlib serve`, and `… grpc ADDRESS` serves gRPC there, without a child. For each process that is entered
there is a file in FOLDER, by its number, with the address.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import meshlib
from meshlib.discover import Directory, Instance
from tests.discover.memory import Entered, System


class Noted(Entered):
    def __init__(self, registry: Any, instance: Instance, folder: Path) -> None:
        super().__init__(registry, instance)
        self.folder = folder

    async def keep(self) -> None:
        (self.folder / str(os.getpid())).write_text(self.instance.address)
        await super().keep()


class Written(System):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def open_one(self, plugin: str, settings: Any) -> Any:
        registry = super().open_one(plugin, settings)

        def register(instance: Instance, settings: Any) -> Entered:
            return Noted(registry, instance, self.folder)

        registry.register = register  # type: ignore[method-assign]
        return registry


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def main(config: str, folder: str, what: str, address: str = "") -> None:
    Directory.__init__.__kwdefaults__["open_one"] = Written(Path(folder)).open_one  # type: ignore[attr-defined, index]
    if what == "command":
        from meshlib.cli import main as command

        told = ["--config", config, "--service", "orders", "--listen", address]
        raise SystemExit(command(["serve", "tests.discover.forked_server:app", *told]))
    mesh = meshlib.Mesh.load(config, service="orders")
    if what == "served":
        mesh.serve(app, listen=address, workers=2)
        return
    import grpc

    server = grpc.server(ThreadPoolExecutor(2), interceptors=list(mesh.sync_grpc_server_interceptors()))
    mesh.add_grpc_port(server, address or "127.0.0.1:0")
    server.start()
    if address:
        signal.sigwait({signal.SIGTERM})
        mesh.close()
        return
    while not (Path(folder) / str(os.getpid())).exists():
        time.sleep(0.05)
    if not os.fork():
        with mesh.sync_client() as client:
            try:
                client.get("http://stock/")
            except meshlib.MeshError:
                pass
            # Longer than the time between two looks at whether we serve.
            time.sleep(2.5)
            print("called", flush=True)
        os._exit(0)
    os.wait()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
