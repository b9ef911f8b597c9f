"""Does a process say truly how loaded it is, in words that balancers read?"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import uvloop

from meshlib.observe.load import LoadMeter, LoopLag, Machine
from tests.support import PYTHON, Request, Scripted, free_port, mesh_of, ok, process, scripted, wait_until_listening

GIB = 1 << 30


class World:
    """A gate, a machine and a clock of two CPUs and 4 GiB, under the test's hand."""

    def __init__(self, **load: int) -> None:
        self.now = 1000.0
        self.numbers = {"in_flight": 1, "limit": 100, "waiting": 0, "calls": 0, "errors": 0, "refused": 0, **load}
        self.used = 0.0
        self.asked = 0
        self.machine = FakeMachine(self)
        self.meter = LoadMeter(self, self.clock, self.machine)

    def clock(self) -> float:
        return self.now

    def load(self) -> dict[str, Any]:
        self.asked += 1
        return dict(self.numbers)

    def passes(self, seconds: float, *, calls: int = 0, errors: int = 0, cpu: float = 0.0) -> None:
        """Time, with so much work a second."""
        self.now += seconds
        self.numbers["calls"] += round(calls * seconds)
        self.numbers["errors"] += round(errors * seconds)
        self.used += cpu * seconds

    def says(self) -> dict[str, Any]:
        """The report, of which both formats must say the same."""
        text, whole = self.meter.report("text").decode(), self.meter.report("json").decode()
        assert (text[:5], whole[:5]) == ("TEXT ", "JSON ")
        said: dict[str, Any] = json.loads(whole[5:])
        named = {f"named_metrics.{name}": value for name, value in said["named_metrics"].items()}
        pairs = dict(pair.split(":") for pair in text[5:].split(", "))
        flat = {name: value for name, value in said.items() if name != "named_metrics"} | named
        assert {name: float(value) for name, value in pairs.items()} == flat
        return said


class FakeMachine(Machine):
    def __init__(self, world: World) -> None:
        super().__init__("/nowhere")
        self.world = world
        self.resident = GIB

    def cpu_seconds(self) -> float:
        return self.world.used

    def cpus(self) -> float:
        return 2.0

    def memory_limit(self) -> int:
        return 4 * GIB

    def memory(self) -> int:
        return self.resident


# ------------------------------------------------------------------------------------------------------ the numbers


def test_rates_and_shares_are_of_the_last_seconds() -> None:
    """CPU of the CPUs there are, memory of the limit; the interpreter fills one CPU, however many there are."""
    world = World()
    for _ in range(6):
        world.passes(1.0, calls=200, errors=10, cpu=0.5)
        said = world.says()
    assert said == {
        "cpu_utilization": 0.25,
        "rps_fractional": 200.0,
        "eps": 10.0,
        "mem_utilization": 0.25,
        "application_utilization": 0.5,
        "named_metrics": {"in_flight": 1.0, "threads_waiting": 0.0},
    }


def test_what_is_long_ago_does_not_count() -> None:
    """After six seconds of another load, rates are those of this load."""
    world = World()
    for calls, cpu in ((200, 0.5), (50, 0.1)):
        for _ in range(60):
            world.passes(0.1, calls=calls, cpu=cpu)
            said = world.says()
        assert (said["rps_fractional"], said["cpu_utilization"]) == (calls, pytest.approx(cpu / 2))


def test_who_asks_seldom_gets_the_rates_since_the_last_question() -> None:
    """Up to half a minute; after more there is nothing to compare with, and nothing is made up."""
    world = World()
    world.says()
    world.passes(20.0, calls=7)
    assert world.says()["rps_fractional"] == 7.0
    world.passes(31.0, calls=7)
    assert world.says().keys().isdisjoint({"rps_fractional", "eps", "cpu_utilization"})
    world.passes(1.0, calls=5)
    assert world.says()["rps_fractional"] == 5.0


def test_a_report_stands_for_a_tenth_of_a_second() -> None:
    """However many ask: the machine and the gate are read once."""
    world = World()
    first = world.meter.report("text")
    asked = world.asked
    for _ in range(50):
        world.passes(0.0019, calls=1000)
        assert world.meter.report("text") == first
    assert world.asked == asked
    world.passes(0.01)
    world.meter.report("text")
    assert world.asked == asked + 1


def test_the_fullest_part_is_the_utilization_of_the_application() -> None:
    """Places for calls, beside the one that is answered; a queue in which somebody waits is full, and more than full."""
    world = World(in_flight=61)
    assert world.says()["application_utilization"] == 0.6
    world.numbers.update(in_flight=100, waiting=20)
    world.passes(5.0)
    assert world.says()["application_utilization"] == 1.2
    world.numbers.update(in_flight=1, waiting=0)
    queue = [3]
    world.meter.watch_queue("workers", lambda: queue[0])
    world.passes(60.0)
    said = world.says()
    assert (said["application_utilization"], said["named_metrics"]["threads_waiting"]) == (1.0, 3.0)
    queue[0] = 0
    world.passes(60.0)
    assert world.says()["application_utilization"] == 0.0


def test_one_moment_does_not_make_the_utilization() -> None:
    """The calls in flight are averaged over about a second: they are counted when a call is answered, which is by chance."""
    world = World(in_flight=51)
    for _ in range(30):
        world.passes(0.1)
        assert world.says()["application_utilization"] == 0.5
    world.numbers["in_flight"] = 1
    world.passes(0.1)
    assert world.says()["application_utilization"] == pytest.approx(0.45, abs=0.01)


def test_more_work_at_the_same_speed_is_the_same_weight() -> None:
    """rps / utilization must not depend on how much an endpoint gets, or whoever has the most would get ever more."""
    weights = []
    for calls in (20, 200, 800):
        world = World()
        for _ in range(10):
            world.passes(1.0, calls=calls, cpu=calls * 0.001)
            said = world.says()
        weights.append(said["rps_fractional"] / said["application_utilization"])
    assert weights == [pytest.approx(1000)] * 3


def test_nonsense_is_made_sound() -> None:
    """A gate that begins anew, a clock of CPU time that goes back, more memory than there is: no number is negative or beyond reading."""
    world = World()
    world.passes(5.0, calls=100, errors=5, cpu=1.0)
    world.says()
    world.numbers.update(calls=0, errors=0, limit=0)
    world.used, world.machine.resident = -1.0, 9 * GIB
    world.meter.watch_queue("broken", lambda: -5)
    world.passes(1.0)
    said = world.says()
    assert (said["rps_fractional"], said["eps"], said["cpu_utilization"], said["mem_utilization"]) == (0, 0, 0, 1)
    assert said["named_metrics"]["threads_waiting"] == 0


def test_a_load_that_can_not_be_measured_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """And fails no call, tells the log once, and comes back."""
    world = World()
    answers: list[Any] = [KeyError("x")] * 3 + [2]

    def broken() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    world.meter.watch_queue("broken", broken)
    with caplog.at_level(logging.WARNING, "meshlib.observe"):
        for _ in range(3):
            assert world.meter.report("text") == b""
            world.passes(0.2)
    assert len(caplog.messages) == 1
    assert b"threads_waiting:2" in world.meter.report("text")


def test_other_formats_are_not_spoken() -> None:
    """Two, in any case; what is none of them is no answer."""
    meter = World().meter
    assert [meter.report(word)[:5] for word in ("text", "TEXT", "Json")] == [b"TEXT ", b"TEXT ", b"JSON "]
    assert [meter.report(word) for word in ("", "bin", "text/plain")] == [b"", b"", b""]


def test_a_forked_child_begins_anew() -> None:
    """Even if the parent was measuring at that moment: nobody is left who would give the lock back."""
    world = World()
    world.passes(5.0, calls=100)
    world.says()
    assert world.meter._lock.acquire(blocking=False)
    child = os.fork()
    if child == 0:
        is_new = b"rps" not in world.meter.report("text") and world.meter.report("text") != b""
        os._exit(0 if is_new else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --------------------------------------------------------------------------------------------- the loop, and threads


class Loop:
    """A loop whose time is the test's, and whose callbacks come `late`."""

    def __init__(self) -> None:
        self.now = 50.0
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Any) -> object:
        self.timers.append((when, callback))
        return object()

    def turn(self, late: float) -> bool:
        """The next timer, so much too late; False if there is none."""
        if not self.timers:
            return False
        when, callback = self.timers.pop(0)
        self.now = when + late
        callback()
        return True


def test_lag_is_how_late_the_loop_is_on_average() -> None:
    """A second or two after a change it's the new one; a single long silence shows at once, as long as it lasted."""
    loop = Loop()
    lag = LoopLag(loop)
    assert lag.ask() == 0.0
    for late in (0.02, 0.3, 0.0):
        for _ in range(60):
            loop.turn(late)
            lag.ask()
        assert lag.ask() == pytest.approx(late, abs=0.003)
    loop.turn(3.0)
    assert 2.5 < lag.ask() < 3.0


def test_the_timer_rests_when_nobody_asks() -> None:
    """Ten seconds after the last question, and it begins again with the next: with no memory of what was before."""
    loop = Loop()
    lag = LoopLag(loop)
    lag.ask()
    turns = 0
    while loop.turn(0.05):
        turns += 1
        assert turns < 100
    assert loop.now - 50.0 == pytest.approx(10.0, abs=0.2)
    assert lag.ask() == 0.0
    assert len(loop.timers) == 1
    lag.ask()
    assert len(loop.timers) == 1


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_blocked_loop_says_so(new_loop: Any) -> None:
    """A real one: a handler that holds it shows as utilization. A loop that has ended is kept by nothing."""
    world = World()

    async def main() -> dict[str, Any]:
        world.says()
        await asyncio.sleep(0.05)
        time.sleep(0.4)
        await asyncio.sleep(0.01)
        world.passes(1.0)
        return world.says()

    loop = new_loop()
    try:
        said = loop.run_until_complete(main())
    finally:
        loop.close()
    assert said["named_metrics"]["loop_lag_ms"] > 50
    assert said["application_utilization"] > 0.5
    world.passes(1.0)
    assert "loop_lag_ms" not in world.says()["named_metrics"]
    ended = weakref.ref(loop)
    del loop
    gc.collect()
    assert ended() is None


class Late:
    """Stands for a loop's lag."""

    def __init__(self, lag: float) -> None:
        self.lag = lag

    def ask(self) -> float:
        return self.lag


async def test_a_tenth_of_a_second_late_is_full() -> None:
    """And what a timer is late by nature is nothing: a floor would be a weight of its own."""
    world = World()
    found = []
    for lag in (0.0, 0.004, 0.0525, 0.1, 0.195):
        world.meter._loops[asyncio.get_running_loop()] = Late(lag)  # type: ignore[assignment]
        world.passes(1.0)
        found.append(world.says()["application_utilization"])
    assert found == [0.0, 0.0, 0.5, 1.0, 2.0]


async def in_thread(free: threading.Event) -> None:
    await anyio.to_thread.run_sync(free.wait)


def test_calls_that_wait_for_anyios_threads_are_counted() -> None:
    """Starlette's plain handlers run there; 40 threads are what there is by default, here one."""

    async def main() -> dict[str, Any]:
        world = World()
        world.says()
        free = threading.Event()
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = 1
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(in_thread, free)
            while limiter.statistics().tasks_waiting < 2:
                await asyncio.sleep(0)
            world.passes(1.0)
            said = world.says()
            free.set()
        return said

    said = asyncio.run(main())
    assert (said["named_metrics"]["threads_waiting"], said["application_utilization"]) == (2.0, 1.0)


# ------------------------------------------------------------------------------------------------------ the machine


def machine(folder: Path, files: dict[str, str]) -> Machine:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Machine(folder)


def test_the_cgroup_says_what_may_be_used(tmp_path: Path) -> None:
    """Ours and those above it: the least counts."""
    pod = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kube/pod/main\n",
            "proc/self/statm": "9000 1000 10 1 0 1 0\n",
            "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n",
            "sys/fs/cgroup/kube/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/kube/pod/cpu.max": "25000 100000\n",
            "sys/fs/cgroup/kube/pod/main/cpu.max": "max 100000\n",
            "sys/fs/cgroup/kube/pod/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/kube/pod/main/memory.max": "max\n",
        },
    )
    assert (pod.cpus(), pod.memory_limit()) == (0.25, GIB)
    assert pod.memory() == 1000 * os.sysconf("SC_PAGESIZE")
    (tmp_path / "sys/fs/cgroup/kube/pod/cpu.max").write_text("max 100000\n")
    assert pod.cpus() == 0.5


def test_without_a_cgroup_the_machine_is_what_may_be_used(tmp_path: Path) -> None:
    """The CPUs of the affinity and all memory; and nothing is known where /proc isn't."""
    plain = machine(tmp_path, {"proc/meminfo": "MemTotal:  2048 kB\n", "proc/self/cgroup": "1:cpu:/x\n"})
    assert (plain.cpus(), plain.memory_limit()) == (len(os.sched_getaffinity(0)), 2 << 20)
    nothing = Machine(tmp_path / "nowhere")
    assert (nothing.memory_limit(), nothing.memory()) == (0, 0)
    world = World()
    world.meter = LoadMeter(world, world.clock, nothing)
    assert "mem_utilization" not in world.says()


def test_the_real_machine_has_something_to_say() -> None:
    """Of this very process."""
    here = Machine()
    assert 0 < here.cpus() <= (os.cpu_count() or 1)
    assert 1 << 20 < here.memory() < here.memory_limit()
    assert here.cpu_seconds() > 0


# ------------------------------------------------------------------------------------------------- who reads it


class Reporting:
    """A server that answers with what a meter says."""

    def __init__(self, calls: int, format: str) -> None:
        self.world = World()
        self.format = format
        for _ in range(6):
            self.world.passes(1.0, calls=calls, cpu=0.5)
            self.world.says()

    async def __call__(self, server: Scripted, request: Request) -> bytes:
        value = self.world.meter.report(self.format).decode()
        return ok(server.address.encode(), f"endpoint-load-metrics: {value}")


@pytest.mark.parametrize("format", ["text", "json"])
async def test_our_own_balancer_weighs_by_it(tmp_path: Path, format: str) -> None:
    """Three times the calls a second at the same utilization: three times the calls."""
    async with scripted(Reporting(300, format)) as strong, scripted(Reporting(100, format)) as weak:
        balance = {"policy": "round_robin", "weights": "orca", "slow_start": "0s", "orca": {"blackout": "0s", "expiry": "1h"}}
        static = [strong.address, weak.address]
        with mesh_of(tmp_path, {"orders": {"discover": {"static": static}, "balance": balance}}) as mesh:
            async with mesh.client() as http:
                for _ in range(8):
                    await http.get("http://orders/")
                mesh.engine.tend(time.monotonic())
                hits = Counter([(await http.get("http://orders/")).text for _ in range(80)])
    assert hits[strong.address] == pytest.approx(60, abs=2)


def test_envoy_finds_only_names_that_it_knows() -> None:
    """It refuses the whole report for another one, or for `=` in the place of `:` (source/common/orca/orca_parser.cc)."""
    world = World()
    world.passes(5.0, calls=100, errors=1, cpu=0.3)
    text = world.meter.report("text").decode().removeprefix("TEXT ")
    known = (
        r"(cpu_utilization|mem_utilization|application_utilization|eps|rps_fractional|named_metrics\.\w+):\d+(\.\d+)?(e[+-]\d+)?"
    )
    assert all(re.fullmatch(known, entry) for entry in text.split(", "))


SERVICE = """
import os, time
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
import meshlib

name, cost, port = os.environ["NAME"], float(os.environ["COST"]), int(os.environ["PORT"])

async def work(request):
    end = time.process_time() + cost
    while time.process_time() < end:
        pass
    return PlainTextResponse(name)

mesh = meshlib.Mesh.load()
uvicorn.run(mesh.asgi(Starlette(routes=[Route("/", work)])), port=port, log_level="warning")
"""


async def test_a_real_service_that_is_slower_is_called_less(tmp_path: Path) -> None:
    """Nobody configured anything but `weights: orca`: caller and services agree by themselves. Its calls cost four times as much."""
    ports = {"quick": free_port(), "slow": free_port()}
    static = [f"127.0.0.1:{port}" for port in ports.values()]
    balance = {"policy": "round_robin", "weights": "orca", "slow_start": "0s", "orca": {"blackout": "0s", "expiry": "1h"}}
    (tmp_path / "service.py").write_text(SERVICE)
    with (
        mesh_of(tmp_path, {"orders": {"discover": {"static": static}, "balance": balance}}) as mesh,
        contextlib.ExitStack() as stack,
    ):
        for name, cost in (("quick", "0.002"), ("slow", "0.008")):
            env = {"MESHLIB_CONFIG": str(tmp_path / "mesh.yaml"), "MESHLIB_SERVICE": "orders"}
            env |= {"NAME": name, "COST": cost, "PORT": str(ports[name])}
            child = stack.enter_context(process(PYTHON, "service.py", env=env, cwd=tmp_path))
            wait_until_listening(ports[name], child)
        async with mesh.client() as http:
            first = Counter([(await http.get("http://orders/")).text for _ in range(20)])
            assert set(first) == {"quick", "slow"}
            # Reports have rates after a second, and weights are put together once a second.
            end, last = time.monotonic() + 30, Counter[str]()
            while last["quick"] < 28:
                assert time.monotonic() < end, f"the last forty calls went to {dict(last)}"
                last = Counter([(await http.get("http://orders/")).text for _ in range(40)])
