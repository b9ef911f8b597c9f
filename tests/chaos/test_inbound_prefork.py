"""Does gunicorn's prefork model break what an application did when it was imported?

Four workers, with and without `preload_app`, of an application whose clients were made and used at its import. Then fifteen hundred
requests, each of which makes a call by those clients, with mutual TLS in and out. None fails, every worker has connections of its own, and no two
calls have a trace in common: what was forked shares neither sockets nor chance.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.elsewhere import listening
from tests.chaos.inbound_load import Crew, Tally
from tests.chaos.inbound_server import RULES, Served, World, started
from tests.support import PYTHON, Request, free_port, ok

CONNECTIONS, EACH, AT_A_TIME = 60, 25, 16

WORKERS = {
    "gthread": ("tests.chaos.inbound_prefork:wsgi", "meshlib.server.gunicorn.ThreadWorker"),
    "uvicorn": ("tests.chaos.inbound_prefork:asgi", "meshlib.server.gunicorn.ASGIWorker"),
}


class Elsewhere:
    """The service that is called, and who called it on which connection."""

    def __init__(self) -> None:
        self.callers: list[set[str]] = []
        self.traces: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers: set[str] = set()
        self.callers.append(callers)
        while (request := await Request.read(reader)) is not None:
            callers.add(request.headers["x-pid"])
            self.traces[request.headers["traceparent"]] += 1
            self.paths[request.target] += 1
            writer.write(ok())
            await writer.drain()


def tls_of(world: World, service: str) -> ssl.SSLContext:
    own = world.folder / "identities" / service
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "svid.pem", own / "key.pem")
    context.load_verify_locations(own / "bundle.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def gunicorn(world: World, config: Path, kind: str, *, is_preloaded: bool) -> Iterator[Served]:
    port = free_port()
    app, worker = WORKERS[kind]
    words = ["-w", "4", "-k", worker, "--threads", "8", "-b", f"127.0.0.1:{port}", *(["--preload"] if is_preloaded else []), app]
    env = {"MESHLIB_CONFIG": str(config), "MESHLIB_SERVICE": "orders"}
    with started(world, [PYTHON, "-m", "gunicorn", *words], port, "gunicorn", env) as served:
        yield served


@pytest.mark.parametrize("is_preloaded", [True, False], ids=["preload", "no-preload"])
@pytest.mark.parametrize("kind", WORKERS)
async def test_no_call_fails_after_a_fork(tmp_path: Path, kind: str, is_preloaded: bool) -> None:
    """Fifteen hundred requests, each with a call of its own."""
    world, other = World(tmp_path, "elsewhere"), Elsewhere()
    with listening(other.serve, tls_of(world, "elsewhere")) as address:
        config = world.write("enforce", services={"elsewhere": {"secure": RULES, "discover": {"static": [address]}}})
        with gunicorn(world, config, kind, is_preloaded=is_preloaded) as served:
            tally, tls, pids = Tally(), world.tls(), Counter[int]()
            free = asyncio.Semaphore(AT_A_TIME)

            async def one() -> None:
                async with free:
                    crew = Crew(served.port, tls)
                    for _ in range(EACH):
                        await tally.count(noted(crew, pids))
                    crew.close()

            # Until all four have booted, which takes its time without `preload_app`.
            for _ in range(400):
                if len(pids) == 4:
                    break
                await tally.count(noted(Crew(served.port, tls, is_kept=False), pids))
                await asyncio.sleep(0.02)
            before = sum(pids.values())
            await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
            workers = set(served.pids())
        print(dict(tally.statuses), dict(pids), len(other.callers), "connections")
        assert (dict(tally.statuses), tally.lost, tally.turned_away) == ({200: before + CONNECTIONS * EACH}, [], 0), served.said()
        assert set(pids) == workers
        assert len(workers) == 4
        assert other.paths == {"/x": before + CONNECTIONS * EACH, "/import": 4 if is_preloaded else 16}
        # Nobody calls on a connection that another process has, too.
        assert [callers for callers in other.callers if len(callers) > 1] == []
        assert [name for name, count in other.traces.items() if count > 1] == []
        assert served.complaints() == []


async def noted(crew: Crew, pids: Counter[int]) -> Any:
    answer = await crew.ask("GET", "/")
    if answer.status == 200:
        found = json.loads(answer.body)
        assert found["status"] == 200
        pids[found["pid"]] += 1
    return answer
