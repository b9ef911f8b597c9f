"""What becomes of gRPC when processes are forked?

gRPC doesn't survive a fork, and says so by hanging. So a mesh that was loaded before works after it, with a channel that was made after it,
or made but not used before; where gRPC was used before, the child is refused at once, by an error that says what to do. Gunicorn with
`preload_app` and three workers, and `multiprocessing` by fork and by spawn. Each case runs in processes of its own, and has a limit of
time: what hangs is told as such.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.grpc_shop import Backend, Shop, backends
from tests.chaos.inbound_load import Crew
from tests.chaos.inbound_server import end
from tests.support import PYTHON, ROOT, free_port, wait_until_listening

WORKERS, REQUESTS, AT_A_TIME = 3, 300, 8

# Seconds in which a worker has to answer, on a machine that has other things to do.
LIMIT = 10.0

# What the error has to speak of.
WORDS = ("fork", "after it", "child", "inventory")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **more}


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Backend]]:
    """The configuration of those who call, and what is called. Nothing is tried again."""
    shop, port = Shop(tmp_path_factory.mktemp("shop"), "inventory"), free_port()
    config = shop.write({"inventory": [f"127.0.0.1:{port}"]}, retry={"attempts": 0}, route=[{"name": "all"}])
    with backends(config, ("inventory", "aio"), ports=[port]) as (backend,):
        yield config, backend


@contextlib.contextmanager
def gunicorn(config: Path, case: str) -> Iterator[tuple[int, Path]]:
    port = free_port()
    log = config.parent / f"gunicorn-{port}.log"
    words = ["-w", str(WORKERS), "-k", "gthread", "--threads", "4", "-b", f"127.0.0.1:{port}", "--preload"]
    env = environment(MESHLIB_CONFIG=str(config), MESHLIB_SERVICE="me", MESHLIB_CHANNEL=case)
    with log.open("wb") as out:
        child = subprocess.Popen(
            [PYTHON, "-m", "gunicorn", *words, "tests.chaos.grpc_prefork:wsgi"], cwd=ROOT, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until_listening(port, child)  # type: ignore[arg-type]
        yield port, log
    finally:
        end(child)


async def asked(port: int, requests: int) -> list[dict[str, Any]]:
    """So many requests, on connections of their own, so that all workers get some. What hangs is told as such."""
    free, found = asyncio.Semaphore(AT_A_TIME), []

    async def one() -> None:
        async with free:
            crew = Crew(port, is_kept=False)
            try:
                answer = await asyncio.wait_for(crew.ask("GET", "/"), LIMIT)
                found.append(json.loads(answer.body))
            except TimeoutError:
                found.append({"pid": 0, "fault": "hangs", "reason": ""})

    await asyncio.gather(*(one() for _ in range(requests)))
    return found


def shown(name: str, found: list[dict[str, Any]]) -> None:
    pids = {each["pid"] for each in found if "pid" in each}
    faults = {each["fault"] for each in found if each["fault"]}
    print(
        f"\n{name}: {len(found)} asked, {sum(bool(each['fault']) for each in found)} failed {sorted(faults)[:2]}; {len(pids)} workers"
    )


@pytest.mark.parametrize("case", ["after", "unused"])
async def test_workers_of_gunicorn_call_by_a_channel_that_was_not_used_before_the_fork(
    called: tuple[Path, Backend], case: str
) -> None:
    """Three hundred requests, each with a call and a stream; the mesh was loaded in the process that forks."""
    config, backend = called
    before = backend.tell()["streams"][1]
    with gunicorn(config, case) as (port, log):
        found = await asked(port, REQUESTS)
        shown(case, found)
        assert [each for each in found if each["fault"]] == [], log.read_text()[-4000:]
        assert len({each["pid"] for each in found}) == WORKERS
        assert backend.tell()["streams"] == [before + REQUESTS] * 2


async def test_workers_of_gunicorn_are_told_of_a_channel_that_was_used_before_the_fork(called: tuple[Path, Backend]) -> None:
    """At once, and again at each request: nothing hangs."""
    with gunicorn(called[0], "used") as (port, _):
        begun = time.monotonic()
        found = await asked(port, 30)
        shown("used", found)
        assert {each["reason"] for each in found} == {"grpc.forked"}, found[:3]
        assert all(word in each["fault"] for each in found for word in WORDS), found[0]
        assert time.monotonic() - begun < LIMIT


def ran(config: Path, method: str, kind: str, case: str) -> Any:
    words = [PYTHON, "-m", "tests.chaos.grpc_forking", str(config), method, kind, case]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


WELL = {"fault": "", "reason": "", "is_meshs": False}


def test_processes_of_multiprocessing_call_by_channels_that_were_not_used_before(called: tuple[Path, Backend]) -> None:
    """By fork, with the parent's mesh, and by spawn, with a mesh of their own."""
    cases = [("fork", "after"), ("fork", "unused"), ("spawn", "after")]
    with ThreadPoolExecutor(2) as pool:
        pairs = [(kind, *case) for kind in ("aio", "sync") for case in cases]
        found = dict(zip(pairs, pool.map(lambda pair: ran(called[0], pair[1], pair[0], pair[2])["children"], pairs), strict=True))
    print("\n", found)
    assert found == {pair: [WELL] * 3 for pair in pairs}


@pytest.mark.parametrize("case", ["closed", "anew"])
@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_a_forked_process_is_told_that_its_parent_has_used_grpc(called: tuple[Path, Backend], kind: str, case: str) -> None:
    """By a channel that is closed or open: a new one in the child works by luck, hangs or crashes, so that it is refused at once."""
    found = ran(called[0], "fork", kind, case)
    print("\n", found)
    for each in found["children"]:
        assert (each["reason"], each["is_meshs"]) == ("grpc.forked", True), each
        assert all(word in each["fault"] for word in WORDS), each
    assert found["parent"]


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_a_forked_process_is_told_of_a_channel_that_was_used_before(called: tuple[Path, Backend], kind: str) -> None:
    """And its parent's channel goes on working."""
    found = ran(called[0], "fork", kind, "used")
    print("\n", found)
    for each in found["children"]:
        assert (each["reason"], each["is_meshs"]) == ("grpc.forked", True), each
        assert all(word in each["fault"] for word in WORDS), each
    assert found["parent"]
