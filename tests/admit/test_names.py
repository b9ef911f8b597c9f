"""How many threads does it take to look names up? The system's resolver is a function that hangs until it is told to go on."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from meshlib.admit.names import MOST, Busy, Names

ROW = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))


class Resolver:
    """Answers all that is asked only when `go` is set. A name that begins with "bad" has no address."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()

    def __call__(self, host: str, port: int | None, **options: Any) -> Any:
        self.asked.append(host)
        assert self.go.wait(20)
        if host.startswith("bad"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [ROW]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    yield made
    made.go.set()


async def test_a_name_is_looked_up_once_at_a_time(resolver: Resolver) -> None:
    """Whoever comes meanwhile shares the answer, also of a lookup on which somebody has given up."""
    names = Names()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await names.look_up("orders", 1.0)
    waiting = [asyncio.create_task(names.look_up("orders", 1.0)) for _ in range(5)]
    await asyncio.sleep(0)
    resolver.go.set()
    assert (await asyncio.gather(*waiting), resolver.asked) == ([[ROW]] * 5, ["orders"])
    assert (await names.look_up("orders", 1.0), resolver.asked) == ([ROW], ["orders", "orders"])


async def test_names_that_hang_have_so_many_threads_and_no_more(resolver: Resolver) -> None:
    """One more name waits for a thread as long as it may; one that is being looked up needs none."""
    names = Names()
    waiting = [asyncio.create_task(names.look_up(f"dead{index}", 1.0)) for index in range(MOST)]
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="no thread is free to look orders up: 8 other lookups hang"):
        await names.look_up("orders", 0.001)
    late = asyncio.create_task(names.look_up("orders", 20.0))
    waiting.append(asyncio.create_task(names.look_up("dead0", 0.0)))
    await asyncio.sleep(0)
    resolver.go.set()
    assert (await late, await asyncio.gather(*waiting)) == ([ROW], [[ROW]] * (MOST + 1))
    assert sorted(resolver.asked) == [*(f"dead{index}" for index in range(MOST)), "orders"]


async def test_a_failure_goes_to_all_who_wait_and_is_missed_by_nobody(resolver: Resolver) -> None:
    """Also when all have given up: then asyncio has nothing to complain of, and the next one asks anew."""
    names, complaints = Names(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    asking = [asyncio.create_task(names.look_up("bad", 1.0)) for _ in range(2)]
    forgotten = asyncio.create_task(names.look_up("bad2", 1.0))
    await asyncio.sleep(0)
    forgotten.cancel()
    resolver.go.set()
    said = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in said] == [socket.gaierror] * 2
    while names._pending:
        await asyncio.sleep(0.001)
    del forgotten
    gc.collect()  # asyncio complains when such a task goes
    with pytest.raises(socket.gaierror):
        await names.look_up("bad", 1.0)
    assert (resolver.asked.count("bad"), complaints) == (2, [])


def test_another_loop_begins_anew(resolver: Resolver) -> None:
    """The lookups of a parent, or of a loop that was stopped, are answered to nobody."""
    names = Names()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await names.look_up("orders", 1.0)

    stopped = asyncio.new_event_loop()
    stopped.run_until_complete(give_up())
    resolver.go.set()
    assert asyncio.run(names.look_up("orders", 1.0)) == [ROW]
    stopped.run_until_complete(asyncio.gather(*asyncio.all_tasks(stopped)))
    stopped.close()
