"""Is this a source of endpoints that a mesh can go by?

`check_resolver(make)` asks a resolver of yours what those of meshlib are asked: that it tells all that is there and what is special about
it, that its versions rise, that its changes fit together, that not to know is an error and never an empty list, that it leaves nothing
behind when it is cancelled, doesn't block its loop, and works in a forked child. `make()` gives a `Stage`: the outside system as a test
fills it, and the resolver that looks at it.

    class Mine:
        service = "orders"
        carries = {"weight", "zone"}                     # of weight, zone, labels, identity: what the system can say
        def address(self, n): return f"127.0.0.{n}:80"   # of the endpoint number n (1 to 9), as it comes back
        def put(self, *endpoints): ...                   # these are there now, beside the others or in place of their own address
        def remove(self, *addresses): ...
        def fail(self): ...                              # from now on the system doesn't answer, or nothing that makes sense
        def mend(self): ...
        async def open(self): return MyResolver(...)     # a new one; called on the loop that it will run on
        async def close_resolver(self): ...              # what `open` made is not used any more (connections, registry)
        def after_fork(self): ...                        # what the mesh would call in a child (Registry.after_fork)
        def close(self): ...                             # the rule is over

    def test_my_resolver_conforms():
        check_resolver(Mine)

Each rule is a function below and has a stage of its own. `put`, `remove`, `fail` and `mend` run on a thread, so they may block, and what
they do may be seen a little later (`patience`). What a system can't do raises NotImplementedError, and the rules that need it are left
out; the names of those that were checked are returned, so that a test can insist on them. It does not check what becomes of errors,
losses and age: that is the directory's, whatever the resolver does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, Protocol

from ..discover import Change, EndpointAddress, Resolver, Snapshot, Watching

EVERYTHING: Final = ("weight", "zone", "labels", "identity")
# Seconds between two looks at a resolver that has to be asked.
LOOK: Final = 0.05
# A loop that doesn't turn for so long was blocked; a machine that is busy with other things stays below.
STALL: Final = 0.25
CANCELLED: Final = 6


class Stage(Protocol):
    """An outside system that lists the endpoints of one service, and the resolver under test that looks at it."""

    @property
    def service(self) -> str: ...
    @property
    def carries(self) -> AbstractSet[str]: ...
    def address(self, n: int) -> str: ...
    def put(self, *endpoints: EndpointAddress) -> None: ...
    def remove(self, *addresses: str) -> None: ...
    def fail(self) -> None: ...
    def mend(self) -> None: ...
    async def open(self) -> Resolver: ...
    async def close_resolver(self) -> None: ...
    def after_fork(self) -> None: ...
    def close(self) -> None: ...


def check_resolver(make: Callable[[], Stage], *, patience: float = 15.0, stall: float = STALL) -> list[str]:
    """Check a resolver by all rules; the names of those that were checked. Raises AssertionError with the rule that is broken."""
    if not __debug__:
        raise RuntimeError("rules are checked by `assert`, which python -O leaves out: run it without -O")
    checked = []
    for rule in RULES:
        stage = make()
        try:
            asyncio.run(_checked(rule, Bench(stage, patience, stall)))
        except NotImplementedError:
            continue
        except AssertionError as error:
            raise AssertionError(f"{rule.__name__}: {error}\n    {rule.__doc__}") from error
        finally:
            stage.close()
        checked.append(rule.__name__)
    assert checked, "no rule could be checked: does `put` raise NotImplementedError?"
    return checked


class Bench:
    """A stage for one rule."""

    def __init__(self, stage: Stage, patience: float, stall: float) -> None:
        self.stage = stage
        self.patience = patience
        self.stall = stall

    def endpoint(self, n: int, **special: Any) -> EndpointAddress:
        return EndpointAddress(self.stage.address(n), **special)

    def some(self, *numbers: int) -> tuple[EndpointAddress, ...]:
        return tuple(self.endpoint(n) for n in numbers)

    async def put(self, *endpoints: EndpointAddress) -> None:
        await asyncio.to_thread(self.stage.put, *endpoints)

    async def remove(self, *numbers: int) -> None:
        await asyncio.to_thread(self.stage.remove, *(self.stage.address(n) for n in numbers))

    async def fail(self) -> None:
        await asyncio.to_thread(self.stage.fail)

    async def mend(self) -> None:
        await asyncio.to_thread(self.stage.mend)

    async def view(self) -> View:
        return View(self, await self.stage.open())

    def is_same(self, found: EndpointAddress, wanted: EndpointAddress) -> bool:
        """In all that the system can say."""
        return all(getattr(found, what) == getattr(wanted, what) for what in ("address", *EVERYTHING) if what in self._said)

    @property
    def _said(self) -> AbstractSet[str]:
        return {"address", *self.stage.carries}


class View:
    """What one resolver has told so far, put together as the directory does it; every answer is checked on the way."""

    def __init__(self, bench: Bench, resolver: Resolver) -> None:
        self.bench = bench
        self.resolver = resolver
        self.known: dict[str, EndpointAddress] = {}
        self.version: int | None = None
        self.answers = 0
        self._stream: AsyncIterator[Snapshot | Change] | None = None

    async def once(self) -> None:
        """One more answer. Raises what the resolver raises."""
        if not isinstance(self.resolver, Watching):
            self.take(await self.resolver.resolve())
            return
        if self._stream is None:
            self._stream = self.resolver.watch()
            self.version = None  # versions are those of one stream
        try:
            self.take(await anext(self._stream))
        except StopAsyncIteration:
            await self.close()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()  # type: ignore[attr-defined]

    async def until(self, wanted: Iterable[EndpointAddress], *, may_fail: bool = False) -> None:
        """Go on until exactly these are known."""
        expected = {endpoint.address: endpoint for endpoint in wanted}
        try:
            async with asyncio.timeout(self.bench.patience):
                while not self._has(expected):
                    try:
                        await self.once()
                    except Exception:
                        if not may_fail:
                            raise
                    if not self._has(expected) and (may_fail or self._stream is None):
                        await asyncio.sleep(LOOK)
        except TimeoutError:
            raise AssertionError(
                f"{self.bench.patience:g} s after a change it knows {sorted(self.known.values(), key=str)} instead of "
                f"{sorted(expected.values(), key=str)}"
            ) from None

    def _has(self, expected: dict[str, EndpointAddress]) -> bool:
        return self.known.keys() == expected.keys() and all(
            self.bench.is_same(self.known[address], wanted) for address, wanted in expected.items()
        )

    def take(self, answer: Snapshot | Change) -> None:
        now = time.monotonic()
        self.answers += 1
        assert isinstance(answer, Snapshot | Change), f"it answered {type(answer).__name__}"
        assert answer.service == self.bench.stage.service, f"it answered for the service {answer.service!r}"
        assert answer.taken <= now + 0.1, f"it was taken in {answer.taken - now:g} s: `taken` is by time.monotonic()"
        is_unsaid = isinstance(answer, Change) and not answer.taken
        assert is_unsaid or now - answer.taken < self.bench.patience, (
            f"it was taken {now - answer.taken:g} s ago: `taken` is when it was learned"
        )
        if isinstance(answer, Snapshot):
            addresses = [endpoint.address for endpoint in answer.endpoints]
            assert isinstance(answer.endpoints, tuple)
            assert len(set(addresses)) == len(addresses), f"it answered an address twice: {addresses}"
            fresh = {endpoint.address: endpoint for endpoint in answer.endpoints}
            if self.version is not None:
                assert answer.version >= self.version, f"version {answer.version} came after {self.version}"
                assert answer.version > self.version or fresh == self.known, f"version {answer.version} stands for two states"
            self.known = fresh
        else:
            self.take_change(answer)
        self.version = answer.version

    def take_change(self, change: Change) -> None:
        assert isinstance(self.resolver, Watching), "only `watch` may answer a Change"
        assert self.version is not None, "a stream begins with a Snapshot"
        assert change.base == self.version, f"a change of version {change.base} came when {self.version} was known"
        addresses = [endpoint.address for endpoint in change.changed]
        both = set(addresses) & set(change.gone)
        assert not both, f"{both} are changed and gone at once"
        assert len(set(addresses)) == len(addresses), f"a change names an address twice: {addresses}"
        unknown = [address for address in change.gone if address not in self.known]
        assert not unknown, f"{unknown} are gone, and were never there"
        if addresses or change.gone:
            assert change.version > change.base, f"version {change.version} changes version {change.base}"
        for address in change.gone:
            del self.known[address]
        self.known.update((endpoint.address, endpoint) for endpoint in change.changed)


Rule = Callable[[Bench], Coroutine[Any, Any, None]]


async def _checked(rule: Rule, bench: Bench) -> None:
    try:
        await rule(bench)
    finally:
        await bench.stage.close_resolver()


# ---------------------------------------------------------------------- the rules


async def it_tells_all_that_is_there(bench: Bench) -> None:
    """The first answer is the whole state, and says of which service it is."""
    await bench.put(*bench.some(1, 2, 3))
    view = await bench.view()
    assert isinstance(view.resolver, Resolver), "a resolver has `service`, `interval` and `resolve`"
    assert view.resolver.service == bench.stage.service
    await view.until(bench.some(1, 2, 3))
    await view.close()
    look = await view.resolver.resolve()
    assert {endpoint.address for endpoint in look.endpoints} == {bench.stage.address(n) for n in (1, 2, 3)}, (
        "`resolve` tells another state"
    )


async def it_says_when_to_ask_again(bench: Bench) -> None:
    """Who is asked says after how many seconds; who tells by itself is not asked again."""
    await bench.put(*bench.some(1))
    view = await bench.view()
    interval = view.resolver.interval
    if isinstance(view.resolver, Watching):
        assert interval is None, f"it tells by itself, and wants to be asked every {interval} s"
    else:
        assert interval is None or interval > 0.0, f"it wants to be asked every {interval} s"


async def it_tells_what_is_special_about_an_endpoint(bench: Bench) -> None:
    """Weight, zone, labels and identity come back as they were entered, as far as the system can carry them."""
    special: dict[str, Any] = {
        "weight": 3.0,
        "zone": "zone-b",
        "labels": {"version": "v2", "tier": "gold"},
        "identity": "spiffe://conformance.internal/ns/default/sa/other",
    }
    carried = {what: value for what, value in special.items() if what in bench.stage.carries}
    if not carried:
        raise NotImplementedError
    first = bench.endpoint(1, **({"weight": 1.0} if "weight" in carried else {}))
    await bench.put(first, bench.endpoint(2, **carried))
    view = await bench.view()
    await view.until((first, bench.endpoint(2, **carried)))
    if "labels" in carried:
        labels = view.known[bench.stage.address(2)].labels
        assert dict(labels) == carried["labels"]
    carried = {**carried, **({"weight": 7.0} if "weight" in carried else {"zone": "zone-c"} if "zone" in carried else {})}
    await bench.put(bench.endpoint(2, **carried))
    await view.until((first, bench.endpoint(2, **carried)))
    await view.close()


async def it_tells_what_comes_and_what_goes(bench: Bench) -> None:
    """Each state is reached, and versions rise on the way."""
    await bench.put(*bench.some(1, 2, 3, 4))
    view = await bench.view()
    await view.until(bench.some(1, 2, 3, 4))
    await bench.put(*bench.some(5))
    await view.until(bench.some(1, 2, 3, 4, 5))
    await bench.remove(2)
    await view.until(bench.some(1, 3, 4, 5))
    await bench.put(*bench.some(2, 6, 7))
    await bench.remove(1, 3)
    await view.until(bench.some(2, 4, 5, 6, 7))
    await view.close()


async def it_misses_nothing_of_a_burst(bench: Bench) -> None:
    """Many changes in a row end in the state that is there; those before the stream began are in its first answer."""
    await bench.put(*bench.some(1))
    view = await bench.view()
    await view.until(bench.some(1))
    for n in range(2, 10):
        await bench.put(*bench.some(n))
        if n % 2:
            await bench.remove(n - 1)
    await view.until(bench.some(1, 3, 5, 7, 9))
    await view.close()
    late = await bench.view()
    await late.until(bench.some(1, 3, 5, 7, 9))
    await late.close()


async def it_raises_when_it_does_not_know(bench: Bench) -> None:
    """A system that fails is an error, never an empty list; when it is mended, asking anew tells the state as it is then."""
    await bench.put(*bench.some(1, 2))
    view = await bench.view()
    await view.until(bench.some(1, 2))
    await bench.fail()
    failing = asyncio.ensure_future(_error_of(view))
    await asyncio.wait({failing}, timeout=bench.patience)
    has_raised = failing.done()
    failing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await failing
    assert has_raised, f"{bench.patience:g} s after the system failed it has raised nothing"
    await view.close()
    has_answered = False
    with contextlib.suppress(Exception):  # raised by it, or by the timeout: it has not answered
        async with asyncio.timeout(bench.patience):
            await view.resolver.resolve()
            has_answered = True
    assert not has_answered, "`resolve` answered while the system failed"
    await bench.mend()
    await bench.put(*bench.some(3))
    await view.until(bench.some(1, 2, 3), may_fail=True)
    await view.close()


async def it_leaves_nothing_behind_when_it_is_cancelled(bench: Bench) -> None:
    """However often it is cancelled: no task, thread or descriptor more than before."""
    await bench.put(*bench.some(1, 2))
    resolver = await bench.stage.open()
    before = await _cancelled(bench, resolver, 2)
    after = await _cancelled(bench, resolver, CANCELLED)
    end = time.monotonic() + bench.patience
    while after > before and time.monotonic() < end:
        await asyncio.sleep(LOOK)
        after = _left()
    assert after <= before, (
        f"after {CANCELLED} more cancellations there are {after} tasks, threads and descriptors instead of {before}"
    )


async def it_does_not_block_its_loop(bench: Bench) -> None:
    """Whatever the system does, other tasks of the loop go on."""
    beat = asyncio.ensure_future(_longest_pause())
    await asyncio.sleep(0.01)
    await bench.put(*bench.some(1, 2))
    view = await bench.view()
    await view.until(bench.some(1, 2))
    await bench.put(*bench.some(3, 4))
    await view.until(bench.some(1, 2, 3, 4))
    with contextlib.suppress(NotImplementedError):
        await bench.fail()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                while True:
                    await view.once()
                    await asyncio.sleep(LOOK)
        await bench.mend()
    await view.close()
    beat.cancel()
    longest = await beat
    assert longest <= bench.stall, f"the loop stood still for {longest:.3f} s"


async def it_works_in_a_forked_child(bench: Bench) -> None:
    """What a parent has used, a child uses anew, and the parent's own goes on."""
    if not hasattr(os, "fork"):
        raise NotImplementedError
    await bench.put(*bench.some(1, 2))
    view = await bench.view()
    await view.until(bench.some(1, 2))
    status = await asyncio.to_thread(_fork, bench, view.resolver)
    assert status == 0, f"the child ended with status {status}: its errors are on stderr"
    await bench.put(*bench.some(3))
    await view.until(bench.some(1, 2, 3))
    await view.close()


RULES: Final[tuple[Rule, ...]] = (
    it_tells_all_that_is_there,
    it_says_when_to_ask_again,
    it_tells_what_is_special_about_an_endpoint,
    it_tells_what_comes_and_what_goes,
    it_misses_nothing_of_a_burst,
    it_raises_when_it_does_not_know,
    it_leaves_nothing_behind_when_it_is_cancelled,
    it_does_not_block_its_loop,
    it_works_in_a_forked_child,
)


# ---------------------------------------------------------------------- how


async def _error_of(view: View) -> Exception:
    """What it raises, some time."""
    while True:
        try:
            await view.once()
        except AssertionError:
            raise
        except Exception as error:
            return error
        assert view.known, "it answered an empty list when the system failed"
        if view._stream is None:
            await asyncio.sleep(LOOK)


async def _cancelled(bench: Bench, resolver: Resolver, times: int) -> int:
    """Cancel it in mid-wait so many times; what is left then."""
    for _ in range(times):
        view = View(bench, resolver)
        has_begun = asyncio.Event()

        async def follow(view: View = view, has_begun: asyncio.Event = has_begun) -> None:
            try:
                while True:
                    await view.once()
                    has_begun.set()
                    await asyncio.sleep(0.0 if isinstance(resolver, Watching) else LOOK)
            finally:
                await view.close()

        task = asyncio.ensure_future(follow())
        await asyncio.wait(
            {asyncio.ensure_future(has_begun.wait()), task}, timeout=bench.patience, return_when=asyncio.FIRST_COMPLETED
        )
        assert has_begun.is_set(), "it answered nothing"
        await asyncio.sleep(0.02)
        task.cancel()
        await _ended(task, bench.patience)
    await asyncio.sleep(0.1)
    return _left()


async def _ended(task: asyncio.Future[None], patience: float) -> None:
    _, late = await asyncio.wait({task}, timeout=patience)
    assert not late, "it goes on after it was cancelled"
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _left() -> int:
    tasks = len(asyncio.all_tasks())
    try:
        descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        descriptors = 0
    return tasks + threading.active_count() + descriptors


async def _longest_pause() -> float:
    longest, last = 0.0, time.monotonic()
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last - 0.005), now
    return longest


def _fork(bench: Bench, resolver: Resolver) -> int:
    """Look once in a child; 0 if it saw what is there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            bench.stage.after_fork()
            asyncio.run(_look_in_a_child(bench, resolver))
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    end = time.monotonic() + 2 * bench.patience
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


async def _look_in_a_child(bench: Bench, resolver: Resolver) -> None:
    view = View(bench, resolver)
    wanted: Awaitable[None] = view.until(bench.some(1, 2))
    await wanted
    await view.close()
