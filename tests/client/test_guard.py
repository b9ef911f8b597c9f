"""A function under `mesh.guard` is called as before, and fails as a call over HTTP does: within a deadline, a breaker and a budget.

The functions are scripted: each call takes the next word of a list, an exception to raise or a value to return. Waits are those of the
test (0 seconds), so that nothing depends on a clock but what is about one.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pybreaker
import pytest
import tenacity

import meshlib
from meshlib.call import current_deadline, current_layer
from tests.support import Request, Scripted, mesh_of, ok, scripted

AT_ONCE = tenacity.wait_none()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    with mesh_of(tmp_path, {}) as made:
        yield made


class Ledger:
    """A dependency whose answers are written down: exceptions are raised, the rest is returned. The last one stays."""

    def __init__(self, *words: Any) -> None:
        self.words = list(words)
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        word = self.words.pop(0) if len(self.words) > 1 else self.words[0]
        if isinstance(word, BaseException):
            raise word
        return word


KINDS = ["async", "async-suspended", "sync"]


def guarded(mesh: meshlib.Mesh, kind: str, ledger: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A guarded function of a kind, as something to call from a test: coroutines are run to their end."""
    if kind == "sync":

        def book(*args: Any) -> Any:
            return ledger(*args)

        return mesh.guard("ledger", **options)(book)

    async def abook(*args: Any) -> Any:
        if kind == "async-suspended":
            await asyncio.sleep(0)
        return ledger(*args)

    function = mesh.guard("ledger", **options)(abook)
    return lambda *args: asyncio.run(function(*args))


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_function_returns_what_it_returns(mesh: meshlib.Mesh, kind: str) -> None:
    """Arguments and result are untouched."""
    ledger = Ledger("booked")
    assert guarded(mesh, kind, ledger)(7, "x") == "booked"
    assert ledger.calls == [(7, "x")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_exception_comes_out_as_it_was(mesh: meshlib.Mesh, kind: str) -> None:
    """The same object, no context added, the traceback down to where it was raised; its record is found from it."""
    error = KeyError("no such account")
    with pytest.raises(KeyError) as caught:
        guarded(mesh, kind, Ledger(error))()
    assert caught.value is error
    assert (error.__context__, error.__cause__, getattr(error, "__notes__", [])) == (None, None, [])
    assert caught.traceback[-1].name == "__call__"
    call = meshlib.call_of(error)
    assert call is not None
    assert call.attempts == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_was_not_declared_idempotent_is_never_repeated(mesh: meshlib.Mesh, kind: str) -> None:
    """Whatever `retries` says."""
    ledger = Ledger(OSError(), "booked")
    with pytest.raises(OSError):
        guarded(mesh, kind, ledger, retries=3, wait=AT_ONCE)()
    assert len(ledger.calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_idempotent_function_is_repeated_until_it_succeeds(mesh: meshlib.Mesh, kind: str) -> None:
    """With the same arguments, at most `retries` times."""
    ledger = Ledger(OSError(1), OSError(2), "booked")
    assert guarded(mesh, kind, ledger, idempotent=True, retries=2, wait=AT_ONCE)(7) == "booked"
    assert ledger.calls == [(7,)] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_exception_is_raised_when_retries_are_over(mesh: meshlib.Mesh, kind: str) -> None:
    """Not the first, and the record tells of all attempts."""
    last = OSError("last")
    ledger = Ledger(OSError("first"), last)
    with pytest.raises(OSError) as caught:
        guarded(mesh, kind, ledger, idempotent=True, retries=1, wait=AT_ONCE)()
    assert caught.value is last
    call = meshlib.call_of(last)
    assert call is not None
    assert (call.attempts, len(ledger.calls)) == (2, 2)
    assert "ledger" in call.explain()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_outside_retry_on_is_a_failure_that_is_not_repeated(mesh: meshlib.Mesh, kind: str) -> None:
    """It counts against the dependency nevertheless: its status in the record is a failure's."""
    error = ValueError()
    ledger = Ledger(error, "booked")
    with pytest.raises(ValueError):
        guarded(mesh, kind, ledger, idempotent=True, retries=3, wait=AT_ONCE, retry_on=(OSError,))()
    assert len(ledger.calls) == 1
    assert statuses(error) == [500]


@pytest.mark.parametrize("kind", KINDS)
def test_an_ignored_exception_says_nothing_about_the_dependency(mesh: meshlib.Mesh, kind: str) -> None:
    """It is neither repeated nor counted."""
    error = LookupError()
    with pytest.raises(LookupError):
        guarded(mesh, kind, Ledger(error), idempotent=True, retries=3, wait=AT_ONCE, ignore=LookupError)()
    assert statuses(error) == []


def statuses(error: BaseException) -> list[int]:
    """What the engine was told of each attempt."""
    call = meshlib.call_of(error)
    assert call is not None
    return [
        event["detail"]["status"] for event in call.record()["events"] if event["phase"] == "send" and "status" in event["detail"]
    ]


async def test_a_cancellation_goes_through_and_gives_the_permit_back(mesh: meshlib.Mesh) -> None:
    """No retry, no failure, nothing left in flight."""
    begun = asyncio.Event()
    runs: list[int] = []

    @mesh.guard("ledger", idempotent=True, retries=3, wait=AT_ONCE, fallback="nobody wants it")
    async def book() -> None:
        runs.append(1)
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(book())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert runs == [1]
    assert statuses(caught.value) == []


async def test_an_async_function_is_cut_at_its_timeout(mesh: meshlib.Mesh) -> None:
    """It is cancelled inside, and its caller gets DeadlineExceeded, not a cancellation."""
    inside: list[str] = []

    @mesh.guard("ledger", timeout=0.02)
    async def book() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            inside.append("cancelled")
            raise

    with pytest.raises(meshlib.DeadlineExceeded, match="book"):
        await book()
    assert inside == ["cancelled"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_the_earlier_of_two_ends_counts(mesh: meshlib.Mesh) -> None:
    """`mesh.deadline` outside cuts a guard that would have more time, and one loop has many ends."""

    @mesh.guard("ledger", timeout=30.0)
    async def book() -> None:
        await asyncio.Event().wait()

    async def within(seconds: float) -> float:
        begun = time.monotonic()
        with mesh.deadline(seconds), pytest.raises(meshlib.DeadlineExceeded):
            await book()
        return time.monotonic() - begun

    took = await asyncio.gather(within(0.2), within(0.02), within(0.1))
    assert took[1] < took[2] < took[0]
    assert took[1] >= 0.02
    assert took[2] >= 0.1


async def test_somebody_elses_cancellation_is_not_taken_for_the_deadline(mesh: meshlib.Mesh) -> None:
    """An outer asyncio.timeout keeps its own TimeoutError."""

    @mesh.guard("ledger", timeout=30.0)
    async def book() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await book()
    assert not isinstance(caught.value, meshlib.MeshError)


async def test_a_cancellation_that_comes_with_the_deadline_wins(mesh: meshlib.Mesh) -> None:
    """Who cancelled the task is told of that; the deadline is counted off, so that the task is as cancelled as it was asked to be."""

    @mesh.guard("ledger", timeout=0.01)
    async def book() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            task.cancel()
            raise

    task = asyncio.create_task(book())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_deadline_holds_inside_and_is_gone_afterwards(mesh: meshlib.Mesh, kind: str) -> None:
    """Calls of the mesh that the function makes are cut by the guard's timeout."""
    left: list[float | None] = []

    def look() -> None:
        left.append(meshlib.remaining())

    def run() -> float | None:
        guarded(mesh, kind, look, timeout=5.0)()
        return current_deadline.get()

    assert contextvars.copy_context().run(run) is None
    assert left[0] is not None
    assert 4.0 < left[0] <= 5.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_that_has_passed_calls_nothing(mesh: meshlib.Mesh, kind: str) -> None:
    """Refused before the function is called."""
    ledger = Ledger("booked")
    function = guarded(mesh, kind, ledger)
    function()
    with mesh.deadline(-1.0), pytest.raises(meshlib.DeadlineExceeded):
        function()
    assert len(ledger.calls) == 1


def test_a_blocking_function_is_not_repeated_after_the_deadline(mesh: meshlib.Mesh) -> None:
    """It can't be cut, but what comes after it can."""
    ledger = Ledger(OSError())

    @mesh.guard("ledger", idempotent=True, retries=5, timeout=0.01, wait=AT_ONCE)
    def book() -> Any:
        time.sleep(0.02)
        return ledger()

    with pytest.raises(OSError):
        book()
    assert len(ledger.calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_longer_than_the_deadline_is_not_begun(mesh: meshlib.Mesh, kind: str) -> None:
    """The error comes now rather than then."""
    ledger = Ledger(OSError())
    begun = time.monotonic()
    with pytest.raises(OSError):
        guarded(mesh, kind, ledger, idempotent=True, retries=5, timeout=3.0, wait=tenacity.wait_fixed(60))()
    assert len(ledger.calls) == 1
    assert time.monotonic() - begun < 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_stop_ends_the_attempts(mesh: meshlib.Mesh, kind: str) -> None:
    """tenacity's stop_after_attempt counts attempts, not retries; wait and stop see the same state."""
    seen: list[tuple[int, str, float]] = []

    def wait(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        seen.append((state.attempt_number, str(state.outcome.exception()), state.idle_for))
        return 0.0

    ledger = Ledger(OSError("a"), OSError("b"), OSError("c"), OSError("d"))
    with pytest.raises(OSError):
        guarded(mesh, kind, ledger, idempotent=True, retries=9, wait=wait, stop=tenacity.stop_after_attempt(3))()
    assert [(number, text) for number, text, _ in seen] == [(1, "a"), (2, "b"), (3, "c")]
    assert len(ledger.calls) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_strategies_are_not_asked_where_nothing_can_be_repeated(mesh: meshlib.Mesh, kind: str) -> None:
    """Neither of a function that isn't idempotent, nor after the last attempt, nor where nothing failed."""

    def never(state: tenacity.RetryCallState) -> float:
        raise AssertionError(state)

    with pytest.raises(OSError):
        guarded(mesh, kind, Ledger(OSError()), wait=never, stop=never)()
    with pytest.raises(OSError):
        guarded(mesh, kind, Ledger(OSError()), idempotent=True, retries=0, wait=never, stop=never)()
    assert guarded(mesh, kind, Ledger(1), idempotent=True, wait=never, stop=never)() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_that_fails_gives_the_permit_back(mesh: meshlib.Mesh, kind: str) -> None:
    """Its error is the application's."""

    def broken(state: tenacity.RetryCallState) -> float:
        raise ZeroDivisionError

    function = guarded(mesh, kind, Ledger(OSError(), "booked"), idempotent=True, wait=broken)
    with pytest.raises(ZeroDivisionError):
        function()
    assert function() == "booked"


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_function_does_not_repeat_its_own_calls(mesh: meshlib.Mesh, kind: str) -> None:
    """From the second attempt on, the layers below know that somebody above is repeating; afterwards nobody is."""
    layers: list[int] = []
    ledger = Ledger(OSError(), OSError(), 1)

    def look() -> Any:
        layers.append(current_layer.get())
        return ledger()

    guarded(mesh, kind, look, idempotent=True, retries=3, wait=AT_ONCE)()
    assert (layers, current_layer.get()) == ([0, 1, 1], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_under_a_caller_that_repeats_a_guard_does_not(mesh: meshlib.Mesh, kind: str) -> None:
    """One layer repeats, the outermost."""
    ledger = Ledger(OSError(), 1)
    mark = current_layer.set(1)
    try:
        with pytest.raises(OSError):
            guarded(mesh, kind, ledger, idempotent=True, retries=3, wait=AT_ONCE)()
    finally:
        current_layer.reset(mark)
    assert len(ledger.calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_shared_by_the_functions_of_a_name(tmp_path: Path, kind: str) -> None:
    """10 a second and 20 % are the default; with a budget of one nothing else is repeated."""
    with mesh_of(tmp_path, {}, retry={"budget": {"ratio": 0, "per_second": 0.1, "window": "10s"}}) as mesh:
        ledgers = [Ledger(OSError()), Ledger(OSError())]
        for ledger in ledgers:
            with pytest.raises(OSError):
                guarded(mesh, kind, ledger, idempotent=True, retries=5, wait=AT_ONCE)()
    assert [len(ledger.calls) for ledger in ledgers] == [2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_five_failures_in_a_row_open_the_breaker(mesh: meshlib.Mesh, kind: str) -> None:
    """Then the function isn't called, for whoever guards under the name, and both libraries' names catch it."""
    ledger = Ledger(OSError())
    function = guarded(mesh, kind, ledger)
    for _ in range(5):
        with pytest.raises(OSError):
            function()
    with pytest.raises(meshlib.CircuitOpen):
        function()
    with pytest.raises(pybreaker.CircuitBreakerError):
        guarded(mesh, "sync", ledger)()
    assert len(ledger.calls) == 5
    assert mesh.guard("another")(lambda: 1)() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_that_the_open_breaker_forbids_leaves_the_own_exception(mesh: meshlib.Mesh, kind: str) -> None:
    """What the function said is worth more than that it may not be asked again."""
    ledger = Ledger(OSError())
    with pytest.raises(OSError):
        guarded(mesh, kind, ledger, idempotent=True, retries=10, wait=AT_ONCE)()
    assert len(ledger.calls) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_can_be_taken_out_by_hand(mesh: meshlib.Mesh, kind: str) -> None:
    """As an endpoint: nothing is called until it is let in again, and listeners hear of it in their words."""
    told, ledger = Told(), Ledger(1)
    function = guarded(mesh, kind, ledger, listeners=[told])
    function()
    assert mesh.engine.isolate("guard:ledger", "ledger", True, time.monotonic())
    with pytest.raises(pybreaker.CircuitBreakerError) as caught:
        function()
    assert isinstance(caught.value, meshlib.CircuitOpen)
    mesh.engine.isolate("guard:ledger", "ledger", False, time.monotonic())
    assert (function(), len(ledger.calls)) == (1, 2)
    changes = [word for word in told.heard if word[0] == "state"]
    assert changes == [("state", "closed", "open", "open"), ("state", "open", "closed", "closed")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_waits_for_a_permit_where_it_may(tmp_path: Path, kind: str) -> None:
    """`pending`: without a place to wait it is refused, with one it goes when the other has ended."""
    with mesh_of(tmp_path, {}, admit={"in_flight": 1, "pending": 1}) as mesh:
        free, entered = threading.Event(), threading.Event()

        @mesh.guard("ledger")
        def hold() -> None:
            entered.set()
            free.wait(10)

        holder = threading.Thread(target=hold)
        holder.start()
        entered.wait(10)
        threading.Timer(0.05, free.set).start()
        assert guarded(mesh, kind, Ledger("booked"))() == "booked"
        assert free.is_set()
        holder.join()


@pytest.mark.parametrize("kind", KINDS)
def test_in_flight_is_limited(tmp_path: Path, kind: str) -> None:
    """A guard holds a permit while its function runs, and none afterwards."""
    with mesh_of(tmp_path, {}, admit={"in_flight": 1}) as mesh:
        ledger = Ledger(1)
        inner = guarded(mesh, "sync", ledger)
        outer = guarded(mesh, kind, inner)
        with pytest.raises(meshlib.LimitExceeded):
            outer()
        assert (inner(), inner()) == (1, 1)


# --- listeners


class Told(pybreaker.CircuitBreakerListener):
    """What a listener of pybreaker hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        self.heard.append(("before", cb.name, func.__name__, args, kwargs))

    def success(self, cb: Any) -> None:
        self.heard.append(("success", cb.fail_counter))

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.heard.append(("failure", cb.fail_counter, exc))

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.heard.append(("state", old_state.name, new_state.name, cb.current_state))


@pytest.mark.parametrize("kind", KINDS)
def test_listeners_hear_of_every_attempt(mesh: meshlib.Mesh, kind: str) -> None:
    """In pybreaker's words; an ignored exception is not told."""
    told, error = Told(), OSError()
    name = "book" if kind == "sync" else "abook"
    ledger = Ledger(error, 1, LookupError())
    function = guarded(mesh, kind, ledger, idempotent=True, retries=1, wait=AT_ONCE, ignore=LookupError, listeners=[told])
    assert function(7) == 1
    before = ("before", "guard:ledger", name, (7,), {})
    assert told.heard == [before, ("failure", 1, error), before, ("success", 0)]
    told.heard.clear()
    with pytest.raises(LookupError):
        function(7)
    assert told.heard == [before]


@pytest.mark.parametrize("kind", KINDS)
def test_listeners_hear_that_the_breaker_turned(mesh: meshlib.Mesh, kind: str) -> None:
    """Once, at the failure that opened it; a refused call is not an attempt."""
    told = Told()
    function = guarded(mesh, kind, Ledger(OSError()), listeners=[told])
    for _ in range(5):
        with pytest.raises(OSError):
            function()
    with pytest.raises(meshlib.CircuitOpen):
        function()
    assert [word for word in told.heard if word[0] == "state"] == [("state", "closed", "open", "open")]
    assert sum(word[0] == "before" for word in told.heard) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_listener_that_fails_changes_nothing(mesh: meshlib.Mesh, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged."""

    class Broken(pybreaker.CircuitBreakerListener):
        def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    assert guarded(mesh, kind, Ledger(1), listeners=[Broken()])() == 1
    assert "before_call" in caplog.text


# --- what can be guarded


def test_methods_partials_and_callables_are_guarded_as_they_are(mesh: meshlib.Mesh) -> None:
    """Also what only says that it is a coroutine function."""

    class Books:
        @mesh.guard("ledger")
        def sync(self, x: int) -> tuple[Any, int]:
            return self, x

        @mesh.guard("ledger")
        async def later(self, x: int) -> tuple[Any, int]:
            return self, x

        @staticmethod
        @mesh.guard("ledger")
        def static(x: int) -> int:
            return x

        async def __call__(self, x: int) -> int:
            return x

    books = Books()
    assert books.sync(1) == (books, 1)
    assert asyncio.run(books.later(2)) == (books, 2)
    assert Books.static(3) == 3
    assert asyncio.run(mesh.guard("ledger")(functools.partial(books.later, 4))()) == (books, 4)
    assert asyncio.run(mesh.guard("ledger")(books)(5)) == 5


def test_the_signature_stays(mesh: meshlib.Mesh) -> None:
    """For frameworks that look at it."""

    async def book(account: int, *, amount: float = 1.0) -> str:
        """Books."""
        return ""

    made = mesh.guard("ledger")(book)
    assert inspect.signature(made) == inspect.signature(book)
    assert (made.__name__, made.__doc__, inspect.iscoroutinefunction(made)) == ("book", "Books.", True)


def test_what_can_not_be_guarded_is_refused_at_once(mesh: meshlib.Mesh) -> None:
    """At the decorator, with the reason."""

    def generator() -> Iterator[int]:
        yield 1

    async def agenerator() -> Any:
        yield 1

    async def afallback(error: Exception) -> int:
        return 1

    for wrong in (generator, agenerator):
        with pytest.raises(TypeError, match="generator"):
            mesh.guard("ledger")(wrong)
    with pytest.raises(TypeError, match="under @staticmethod"):
        mesh.guard("ledger")(staticmethod(generator))
    with pytest.raises(TypeError, match="not for"):
        mesh.guard("ledger")(Ledger)
    with pytest.raises(TypeError, match="async"):
        mesh.guard("ledger", fallback=afallback)(lambda: 1)
    for option in ({"timeout": 0}, {"retries": 11}, {"wait": 3}, {"stop": int}):
        with pytest.raises(ValueError, match=next(iter(option))):
            mesh.guard("ledger", **option)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="retry_on"):
        mesh.guard("ledger", retry_on="OSError")  # type: ignore[arg-type]
    for name in ("", "led*er", 7):
        with pytest.raises(ValueError, match="name"):
            mesh.guard(name)  # type: ignore[arg-type]


async def test_a_guarded_call_that_nobody_finishes_gives_its_permit_back(tmp_path: Path) -> None:
    """Its coroutine is closed by the collector, and the next call goes."""
    with mesh_of(tmp_path, {}, admit={"in_flight": 1}) as mesh:

        @mesh.guard("ledger")
        async def book(wait: bool) -> int:
            if wait:
                await asyncio.sleep(0)
            return 1

        left = book(True)
        left.send(None)
        left.close()
        del left
        gc.collect()
        assert await book(False) == 1


async def test_a_guard_around_a_call_over_http(tmp_path: Path) -> None:
    """The inner call knows the guard's deadline, and its error's own record stays its own."""

    async def answer(server: Scripted, request: Request) -> bytes:
        return ok(request.headers["x-mesh-deadline-ms"].encode())

    async with scripted(answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}}}) as mesh:
            async with mesh.client() as http:

                @mesh.guard("ledger", timeout=2.0)
                async def book(host: str) -> httpx.Response:
                    return await http.get(f"http://{host}/")

                assert 0 < int((await book("orders")).text) <= 2000
                with pytest.raises(meshlib.UnknownService) as caught:
                    await book("nobody")
    call = meshlib.call_of(caught.value)
    assert call is not None
    assert call.method == "CALL"
