"""A registry that comes back is not run over, and one that is gone is not pestered."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from meshlib.discover import Snapshot
from meshlib.discover.follow import follow
from meshlib.discover.pace import Delays, Pace
from meshlib.errors import ConfigError
from tests.support import run_virtually


class Client:
    """A process with some watches of one registry, in virtual time."""

    def __init__(self, source: random.Random, watches: int = 1, *, is_live: bool = True) -> None:
        self.pace = Pace(source)
        self.delays = [Delays(source) for _ in range(watches)]
        self.live = [False] * watches
        if is_live:
            for n in range(watches):
                self.pace.begin(0.0)
                self.succeed(n)

    def succeed(self, n: int) -> None:
        self.pace.answered()
        self.delays[n].answered()
        self.live[n] = True

    def fail(self, n: int, now: float) -> float:
        is_everybodys = self.pace.failed(now, was_live=self.live[n])
        self.live[n] = False
        own = self.delays[n].failed()
        return 0.0 if is_everybodys else own


def story(clients: list[Client], down: float, until: float) -> tuple[list[float], float]:
    """All are lost at 0, and the registry is back at `down`: the times of all tries, and when the last was well."""
    ticket = itertools.count()
    queue: list[tuple[float, int, Client, int]] = []
    for client in clients:
        for n, is_live in enumerate(client.live):
            queue.append((client.fail(n, 0.0) if is_live else 0.0, next(ticket), client, n))
    heapq.heapify(queue)
    tries, well = [], 0.0
    while queue:
        now, _, client, n = heapq.heappop(queue)
        if now > until:
            break
        wait = client.pace.wait(now)
        if wait > 0.0:
            heapq.heappush(queue, (now + wait, next(ticket), client, n))
            continue
        client.pace.begin(now)
        tries.append(now)
        if now >= down:
            client.succeed(n)
            well = now
        else:
            heapq.heappush(queue, (now + client.fail(n, now), next(ticket), client, n))
    return tries, well


def densest(times: list[float]) -> int:
    """The most within any second that begins at a whole one."""
    return max(Counter(int(time) for time in times).values())


@pytest.mark.parametrize("down", [0.0, 1.0, 3.0, 5.0, 8.0, 15.0, 20.0, 28.0, 600.0])
def test_restart_of_a_registry_is_no_stampede(down: float) -> None:
    """R15: 200 clients make at most 50 tries in any second, and all are back 10 s after the registry is."""
    for seed in range(40 if down < 60.0 else 4):
        source = random.Random(seed)
        tries, well = story([Client(source) for _ in range(200)], down, down + 60.0)
        assert densest(tries) <= 50
        assert well <= down + 10.0


def test_long_outage_is_asked_about_rarely() -> None:
    """R13: ten minutes; each process waits at least a second and at most 30, and is back within ten."""
    for seed in range(20):
        tries, well = story([Client(random.Random(seed))], 600.0, 700.0)
        gaps = [after - before for before, after in itertools.pairwise(tries)]
        assert min(gaps) >= 1.0
        assert max(gaps) <= 30.0
        assert len(tries) <= 70
        assert 600.0 <= well <= 610.0


def test_one_watch_tries_for_all_of_its_process() -> None:
    """Fifty services of a registry that is down are one try at a time, and all are back at once after it."""
    source = random.Random(5)
    tries, well = story([Client(source, watches=50)], 100.0, 200.0)
    before = [time for time in tries if time < 100.0]
    assert min(after - earlier for earlier, after in itertools.pairwise(before)) >= 1.0
    assert len(tries) - len(before) == 50
    assert well <= 110.0


def test_first_answer_is_asked_for_eagerly_and_then_patiently() -> None:
    """Who starts while the registry is down tries four times within 1.5 s, then not more often than each second."""
    for seed in range(20):
        tries, _ = story([Client(random.Random(seed), is_live=False)], 300.0, 300.0)
        assert tries[3] <= 0.7
        assert tries[4] <= 1.5
        assert min(after - before for before, after in itertools.pairwise(tries[5:])) >= 1.0


def test_service_with_a_trouble_of_its_own_does_not_stop_the_others() -> None:
    """One is refused for ever, another lives: a third need not wait for the first one's turn."""
    source = random.Random(1)
    client = Client(source, watches=2)
    assert client.fail(0, 10.0) > 0.0
    assert (client.pace.is_down, client.pace.wait(10.0)) == (False, 0.0)


def test_stream_that_ends_by_itself_begins_soon_and_not_in_circles() -> None:
    """The first time within 0.1 s; again and again, less and less often; after it has lived for long, as the first time."""
    delays = Delays(random.Random(2))
    delays.answered()
    assert delays.ended(100.0) <= 0.1
    for _ in range(12):
        last = delays.ended(0.0)
    assert max(delays.ended(0.0) for _ in range(50)) > 10.0
    assert last <= 30.0
    assert delays.ended(100.0) <= 0.1


# ---------------------------------------------------------------------- who is refused


class Refused(Exception):
    is_refusal = True


class Scene:
    """Processes that follow some services each, in virtual time. `word` is what the registry says to a service then: an error, or None
    while it lives.
    """

    def __init__(self, seed: int, word: Callable[[float, int], Exception | None]) -> None:
        self.random = random.Random(seed)
        self.word = word
        self.tries: list[float] = []
        self.well: dict[int, float] = {}  # by service, when it was begun last

    def play(self, until: float, *, processes: int = 1, services: int) -> Scene:
        async def main() -> None:
            clock = asyncio.get_running_loop().time
            tasks = []
            for _ in range(processes):
                pace = Pace(self.random)
                for n in range(services):
                    work = follow(Asked(self, n), Deaf(), pace, Delays(self.random), clock=clock)
                    tasks.append(asyncio.ensure_future(work))
            await asyncio.sleep(until)

        run_virtually(main)
        return self


class Deaf:
    def told(self, answer: object) -> bool:
        return True

    def lost(self, error: Exception) -> None: ...


class Asked:
    interval: float | None = None
    service = "orders"

    def __init__(self, scene: Scene, number: int) -> None:
        self.scene, self.number = scene, number

    async def resolve(self) -> Snapshot:
        raise NotImplementedError

    async def watch(self) -> AsyncIterator[Snapshot]:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(self.scene.random.uniform(0.002, 0.004))
        begun = clock()
        self.scene.tries.append(begun)
        while True:
            if (error := self.scene.word(clock(), self.number)) is not None:
                raise error
            self.scene.well[self.number] = begun
            yield Snapshot("orders", 1, (), 0.0)
            await asyncio.sleep(0.5)


@pytest.mark.parametrize("refused", [1, 10, 30])
@pytest.mark.parametrize("kind", [Refused, PermissionError, ConfigError])
def test_services_that_are_refused_keep_no_other_from_coming_back(refused: int, kind: type[Exception]) -> None:
    """The registry is away for 5 s, and refuses all but the first for ever: that one is back as if it were alone."""
    for seed in range(10):
        scene = Scene(seed, lambda now, n: ConnectionError("down") if 100.0 <= now < 105.0 else kind("no") if n else None)
        assert 105.0 <= scene.play(130.0, services=refused + 1).well[0] <= 116.0


@pytest.mark.parametrize("refused", [1, 10, 30])
def test_service_that_is_refused_in_passing_is_first_in_line(refused: int) -> None:
    """After its restart the registry refuses all for 10 s, since it has not loaded its rights yet; the others, for ever."""

    def word(now: float, n: int) -> Exception | None:
        if 100.0 <= now < 105.0:
            return ConnectionError("down")
        return Refused("no") if n or 105.0 <= now < 115.0 else None

    for seed in range(10):
        assert 115.0 <= Scene(seed, word).play(160.0, services=refused + 1).well[0] <= 145.0


def test_two_hundred_whose_token_has_ended_ask_as_seldom_as_if_it_were_down() -> None:
    """R13: all of their ten services are refused from then on; when the token is renewed, all come back."""
    scene = Scene(3, lambda now, n: Refused("no") if 20.0 <= now < 90.0 else None)
    scene.play(140.0, processes=200, services=10)
    assert densest([time for time in scene.tries if 20.0 <= time < 90.0]) <= 50
    assert len(scene.well) == 10
    assert all(begun > 90.0 for begun in scene.well.values())


def test_service_that_is_refused_waits_by_itself_while_others_live() -> None:
    """A minute of it is some tries, not one a second and not none."""
    scene = Scene(4, lambda now, n: Refused("no") if n else None)
    scene.play(300.0, services=2)
    assert scene.well[0] < 1.0
    assert 12 <= len(scene.tries) <= 40
