"""Does a process end as it should while calls are in flight, and does its client outlive a loop and a fork?

No native thread holds a lock or a socket at exit, which is a promise of the design; here it is counted: fifty exits of each kind, with
mutual TLS, exit code 0 and not a word on stderr. The interpreters are forked from one that has only imported the mesh, so that
fifty cost little more than one; each loads a mesh of its own and is finalized as any other. A kind is what runs when the end comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.elsewhere import at, in_flight, listening, sockets, tls_of
from tests.support import PYTHON, ROOT, mesh_of, write_config

EXITS = 50
WORKERS = 2

# argv: the kind, mesh.yaml, how many. The parent counts; each child runs the kind and falls off the end of this file.
SCRIPT = """
import asyncio, os, signal, sys, threading, time
import httpx, meshlib

PIECE = b"x" * 1000
kind, file, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

async def upload():
    while True:
        yield PIECE
        await asyncio.sleep(0.001)

def slow_upload():
    while True:
        yield PIECE
        time.sleep(0.001)

async def calls(mesh, begun):
    http = mesh.client()
    async def download():
        async with http.stream("GET", "http://orders/endless") as answer:
            async for _ in answer.aiter_raw():
                begun()
    made = [http.get("http://orders/never") for _ in range(3)]
    made += [http.post("http://orders/never", content=upload()), download(), download()]
    return http, [asyncio.ensure_future(call) for call in made]

def in_main_thread(mesh, number):
    async def main():
        begun = asyncio.Event()
        http, tasks = await calls(mesh, begun.set)
        await begun.wait()
        await asyncio.sleep(0.001 * (number % 5))
    asyncio.run(main())

def in_main_thread_on_uvloop(mesh, number):
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    in_main_thread(mesh, number)

def by_sys_exit(mesh, number):
    async def main():
        begun = asyncio.Event()
        http, tasks = await calls(mesh, begun.set)
        await begun.wait()
        sys.exit(0)
    asyncio.run(main())

def in_daemon_thread(mesh, number):
    begun = threading.Event()
    kept = []
    def work():
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        kept.append(loop.run_until_complete(calls(mesh, begun.set)))
        loop.run_forever()
    threading.Thread(target=work, daemon=True).start()
    begun.wait()
    time.sleep(0.001 * (number % 5))

def in_daemon_thread_on_uvloop(mesh, number):
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    in_daemon_thread(mesh, number)

def in_blocking_threads(mesh, number):
    begun = threading.Event()
    http = mesh.sync_client()
    def download():
        with http.stream("GET", "http://orders/endless") as answer:
            for _ in answer.iter_raw():
                begun.set()
    for work in (
        lambda: http.get("http://orders/never"),
        lambda: http.get("http://orders/never"),
        lambda: http.post("http://orders/never", content=slow_upload()),
        download,
        download,
    ):
        threading.Thread(target=work, daemon=True).start()
    begun.wait()
    time.sleep(0.001 * (number % 5))

def nothing_closed(mesh, number):
    # Both clients used, connections idle, no client, mesh or stream closed.
    http = mesh.sync_client()
    assert http.get("http://orders/").status_code == 200
    answer = http.send(http.build_request("GET", "http://orders/endless"), stream=True)
    next(answer.iter_raw())
    globals().update(kept=(http, answer))

if file != "-":
    meshlib.Mesh.load(file, service="me")  # what this imports is there for all
for number in range(count):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        globals()[kind](meshlib.Mesh.load(file, service="me"), number)
        break
    _, status = os.waitpid(child, 0)
    if status:
        print(f"exit {number}: {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
else:
    print("counted", count)
"""


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers at once, never, or for ever; reads whatever comes."""
    while line := await reader.readline():
        await reader.readuntil(b"\r\n\r\n")
        if b"/endless" in line:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.002)
        elif b"/never" in line:
            while await reader.read(1 << 16):
                pass
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with identities, and the address of a server that wants mutual TLS."""
    folder = tmp_path_factory.mktemp("private")
    with listening(serve, tls_of(folder)) as address:
        yield folder, address


def ended(*command: str) -> tuple[int, str, str]:
    done = subprocess.run([PYTHON, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


KINDS = {
    "in_main_thread": EXITS,
    "in_daemon_thread": EXITS,
    "in_blocking_threads": EXITS,
    # The same from other doors; fewer, since each costs its handshakes.
    "in_main_thread_on_uvloop": 20,
    "in_daemon_thread_on_uvloop": 20,
    "by_sys_exit": 20,
    "nothing_closed": 20,
}


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_exits_of_fifty_are_clean(private: tuple[Path, str], kind: str) -> None:
    """With calls waiting, uploading and downloading: code 0, and nothing on stderr."""
    if "uvloop" in kind:
        pytest.importorskip("uvloop")
    folder, address = private
    file = write_config(folder, {"me": {"secure": {"allow": [{"from": ["me"]}]}}, **at(address)}, mode="enforce")
    command = [PYTHON, "-c", SCRIPT, kind, str(file), str(KINDS[kind] // WORKERS)]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(WORKERS)
    ]
    try:
        found = [(*worker.communicate(timeout=60), worker.returncode) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert found == [(f"counted {KINDS[kind] // WORKERS}\n", "", 0)] * WORKERS


def test_a_fresh_interpreter_ends_as_cleanly(private: tuple[Path, str]) -> None:
    """The forked ones stand for it: once without a fork."""
    folder, address = private
    file = write_config(folder, {"me": {"secure": {"allow": [{"from": ["me"]}]}}, **at(address)}, mode="enforce")
    alone = SCRIPT[: SCRIPT.index("if file !=")] + "globals()[kind](meshlib.Mesh.load(file, service='me'), 0)\n"
    for kind in ("in_main_thread", "in_daemon_thread", "in_blocking_threads"):
        assert ended("-c", alone, kind, str(file), "1") == (0, "", ""), kind


def test_an_exit_that_is_not_clean_is_seen(tmp_path: Path) -> None:
    """The count itself: a child that fails, or says something, fails the count."""
    script = SCRIPT.replace('meshlib.Mesh.load(file, service="me")', "None") + textwrap.dedent("""
        if child == 0 and number == 1:
            os._exit(3)
        """)
    script = script.replace("kind, file, count", "nothing = lambda *_: None\nkind, file, count", 1)
    code, out, err = ended("-c", script, "nothing", "-", "3")
    assert (code, out, err) == (0, "counted 3\n", "exit 1: 3\n")


# ------------------------------------------------------------------ a loop that is gone, and the next one


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("phase", ["connecting", "answering"])
def test_a_client_goes_on_after_its_loop_was_closed_under_its_calls(private: tuple[Path, str], phase: str, loop: str) -> None:
    """`asyncio.run` cancels what is in flight; a loop that is simply closed can't. Either way the next loop finds a client that works."""
    factory: Any = asyncio.new_event_loop if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    folder, address = private
    complaints: list[str] = []

    def complain(found: Any) -> None:
        complaints.append("".join(traceback.format_exception(found.exc_value)))

    previous, sys.unraisablehook = sys.unraisablehook, complain
    try:
        with mesh_of(folder, at(address), mode="enforce") as mesh:
            http = mesh.client()

            async def download(begun: asyncio.Event) -> None:
                async with http.stream("GET", "http://orders/endless") as answer:
                    async for _ in answer.aiter_raw():
                        begun.set()

            async def begin() -> list[asyncio.Task[Any]]:
                begun = [asyncio.Event() for _ in range(3)]
                tasks = [asyncio.ensure_future(download(event)) for event in begun]
                if phase == "answering":
                    for event in begun:
                        await event.wait()
                else:
                    while in_flight(mesh) < 6:
                        await asyncio.sleep(0)
                return tasks

            for _ in range(3):
                with asyncio.Runner(loop_factory=factory) as runner:
                    runner.run(begin())
                assert in_flight(mesh) == 0
            abandoned = factory()
            with warnings.catch_warnings():
                # Python itself complains of transports and tasks that nobody awaits.
                warnings.simplefilter("ignore", ResourceWarning)
                tasks = abandoned.run_until_complete(begin())
                abandoned.close()
                with asyncio.Runner(loop_factory=factory) as runner:
                    answer = runner.run(http.get("http://orders/"))
                    assert answer.status_code == 200
                    runner.run(http.aclose())
                for task in tasks:
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                del tasks, task
                gc.collect()
            assert (sockets(), in_flight(mesh)) == (0, 0)
        assert complaints == []
    finally:
        sys.unraisablehook = previous


# ------------------------------------------------------------------ fork

FORK = """
import asyncio, os, signal, sys, meshlib
mesh = meshlib.Mesh.load(sys.argv[1], service="me")
http, blocking = mesh.client(), mesh.sync_client()

def both():
    async def three():
        return [(await http.get("http://orders/")).status_code for _ in range(3)]
    assert asyncio.run(three()) == [200] * 3
    assert [blocking.get("http://orders/").status_code for _ in range(3)] == [200] * 3
    return sum(row["in_flight"] for row in mesh.engine.stats(0.0))

assert both() == 0
with blocking.stream("GET", "http://orders/endless") as answer:   # in flight while the children are made
    pieces = answer.iter_raw()
    next(pieces)
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            assert both() == 0, "the parent's permits are not ours"
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    next(pieces)   # nobody closed the parent's connection on the wire
assert both() == 0
print("parent and children")
"""


@pytest.mark.parametrize("is_private", [False, True], ids=["plain", "mtls"])
def test_clients_made_before_a_fork_serve_parent_and_children(
    tmp_path: Path, private: tuple[Path, str], is_private: bool
) -> None:
    """As with gunicorn's preload: no shared connection, no lost permit, and a stream of the parent goes on."""
    with contextlib.ExitStack() as stack:
        folder, address = private if is_private else (tmp_path, stack.enter_context(listening(serve)))
        services = {"me": {"secure": {"allow": [{"from": ["me"]}]}} if is_private else {}, **at(address)}
        file = write_config(folder, services, mode="enforce" if is_private else "observe")
        code, out, err = ended("-c", FORK, str(file))
    assert (code, out) == (0, "parent and children\n"), err
