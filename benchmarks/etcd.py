"""How soon does a call use what etcd has just heard?

A process of its own enters a third instance of a service in a real etcd and takes it out again, and beside it a bare watcher, which does
nothing else, notes when etcd tells of it. The worker makes one call after the other, by turns to all endpoints, and notes the first answer
of the new one. `change` is from the writing to that answer (mode `meshlib`) or to the bare watcher's notice (mode `etcd`); `added` is what
lies between the two for the same change: reading, judging, publishing, balancing, a new connection, and the call itself.
Wanted: p99 of `added` at most 20 ms. It doesn't say how soon an endpoint that is gone is left alone: that is a look at the same list.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import random
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any

from .harness import Comparison, Results, Run, in_process
from .peers import ROOT, Absent, Peers, free_port, program, running
from .worker import on_loop

PRIMARY = "p99_us"
HAS_RATIOS = False
SECONDS = 20.0
# What is wanted of `added`, in microseconds.
WANTED = 20_000.0
PREFIX = "/meshlib/services/orders/"
# Seconds for which the third instance is there, and then is not, by chance; and the fewest changes that a figure is made of.
THERE, AWAY = (0.1, 0.16), (0.04, 0.08)
LEAST = 5


def runs(peers: Peers) -> list[Run]:
    place = cache(lambda: _place(peers))
    made = [("change/plain/c=1", "meshlib"), ("change/plain/c=1", "etcd"), ("added/plain/c=1", "meshlib")]
    return [Run(case, mode, in_process("benchmarks.etcd:work", case=case, mode=mode, place=place)) for case, mode in made]


def compared(results: Results) -> list[Comparison]:
    found = results.median("added/plain/c=1", "meshlib", "p99_us")
    return [] if found is None else [Comparison("added, p99, as a part of what is wanted", found / WANTED, "<= 1")]


def _place(peers: Peers) -> dict[str, Any]:
    """An etcd, three servers, and a configuration that finds two of them there."""
    if not entry_points(group="meshlib.resolver", name="etcd"):
        raise Absent("the package meshlib-etcd is not installed")
    command = program("etcd", "etcd-server")
    port, own = free_port(), free_port()
    url, member = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{own}"
    data = peers.folder / f"etcd-{port}"
    options = [
        *("--data-dir", str(data), "--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", member, "--initial-advertise-peer-urls", member, "--initial-cluster", f"default={member}"),
    ]
    peers.keep(running(peers.folder, command, *options, port=port))
    servers = [free_port() for _ in range(3)]
    ports = [word for each in servers for word in ("--serve", str(each))]
    peers.keep(running(peers.folder, sys.executable, "-m", "benchmarks.etcd", *ports, port=servers[-1]))
    file = peers.folder / "etcd-mesh.yaml"
    content = {
        "mesh": "shop",
        "secure": {"mode": "observe"},
        "registries": {"etcd": {"url": url}},
        "services": {"me": {}, "orders": {"discover": "etcd", "balance": {"policy": "round_robin"}}},
    }
    file.write_text(json.dumps(content))
    return {"etcd": port, "servers": servers, "file": str(file)}


# ------------------------------------------------------------------ in the worker


def work(case: str, mode: str, place: dict[str, Any], *, seconds: float) -> dict[str, float]:
    import meshlib

    for number, server in enumerate(place["servers"][:2]):
        _Etcd(place["etcd"]).put(f"{PREFIX}{number}", server)
    mesh = meshlib.Mesh.load(place["file"], service="me")
    changes = max(LEAST, round(seconds / (sum(THERE + AWAY) / 2)))
    with tempfile.TemporaryFile("w+") as told:
        command = [sys.executable, "-m", "benchmarks.etcd", "--change", str(changes), "--etcd", str(place["etcd"])]
        beside = subprocess.Popen([*command, "--server", str(place["servers"][2])], cwd=ROOT, stdout=told)
        try:
            seen = on_loop("uvloop", partial(_calls, mesh, place["servers"][2], beside))
        finally:
            beside.kill()
            beside.wait()
            mesh.close()
        told.seek(0)
        noted = json.load(told)
    found = []
    for began, notice, end in noted:
        # One that no call saw before it was over took at least that long.
        first = next((at for at in seen if began < at < end), end)
        found.append({"change": first - began, "etcd": notice - began, "added": first - notice}[_what(case, mode)])
    found.sort()
    return {"p50_us": found[len(found) // 2] * 1e6, "p99_us": found[min(len(found) - 1, len(found) * 99 // 100)] * 1e6}


def _what(case: str, mode: str) -> str:
    return "etcd" if mode == "etcd" else case.partition("/")[0]


async def _calls(mesh: Any, third: int, beside: subprocess.Popen[bytes]) -> Any:
    """When an answer of the third server came, by the clock that all processes share."""
    seen: list[float] = []
    wanted = b"%d" % third
    async with mesh.client() as client:
        while beside.poll() is None:
            if (await client.get("http://orders/")).content == wanted:
                seen.append(time.monotonic())
    return seen


# ------------------------------------------------------------------ who changes, and the bare watcher


class _Etcd:
    """Bare questions to the gateway, on one connection."""

    def __init__(self, port: int) -> None:
        self._wire = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def put(self, key: str, server: int) -> None:
        value = json.dumps({"address": f"127.0.0.1:{server}"})
        self._ask("kv/put", {"key": _text(key), "value": _text(value)})

    def delete(self, key: str) -> None:
        self._ask("kv/deleterange", {"key": _text(key)})

    def watch(self, key: str) -> Iterator[dict[str, Any]]:
        """What etcd tells of one key, for ever; the first is that it has begun."""
        self._wire.request("POST", "/v3/watch", json.dumps({"create_request": {"key": _text(key)}}))
        answer = self._wire.getresponse()
        while line := answer.readline():
            if line.strip():
                yield json.loads(line)["result"]

    def _ask(self, path: str, question: dict[str, Any]) -> None:
        self._wire.request("POST", f"/v3/{path}", json.dumps(question))
        answer = self._wire.getresponse()
        if answer.status != http.client.OK:
            raise RuntimeError(f"etcd answered {answer.status}")
        answer.read()


def _text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()


def change(port: int, server: int, changes: int) -> None:
    """So many times: put the third instance there, and take it away. Print when it was written, told, and taken away."""
    key = f"{PREFIX}third"
    has_begun, told = threading.Event(), []

    def watch() -> None:
        for batch in _Etcd(port).watch(key):
            has_begun.set()
            told.extend(time.monotonic() for event in batch.get("events", []) if event.get("type") != "DELETE")

    threading.Thread(target=watch, daemon=True).start()
    has_begun.wait(20)
    etcd, began, ended = _Etcd(port), [], []
    etcd.delete(key)
    time.sleep(1.0)  # the caller has opened what it needs
    for _ in range(changes):
        began.append(time.monotonic())
        etcd.put(key, server)
        time.sleep(random.uniform(*THERE))
        ended.append(time.monotonic())
        etcd.delete(key)
        time.sleep(random.uniform(*AWAY))
    print(json.dumps(list(zip(began, told, ended, strict=True))))


def serve(ports: list[int]) -> None:
    """Answer with the port, on each of them."""

    class Answer(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            body = b"%d" % self.server.server_address[1]
            with contextlib.suppress(OSError):
                while line := self.rfile.readline():
                    if line == b"\r\n":
                        self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    for port in ports:
        threading.Thread(target=Server(("127.0.0.1", port), Answer).serve_forever).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.etcd")
    parser.add_argument("--serve", type=int, action="append")
    parser.add_argument("--change", type=int)
    parser.add_argument("--etcd", type=int)
    parser.add_argument("--server", type=int)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    else:
        change(given.etcd, given.server, given.change)


if __name__ == "__main__":
    main()
