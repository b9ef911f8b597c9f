"""A guard says no to what it can't guard, learns nothing from what isn't the dependency's doing, and follows its process and its file.

The functions are scripted as in the tests of the guard itself. What would open a breaker is done more often than the five times that do.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

import meshlib
from meshlib.call import Peer, Visit, current_deadline, current_visit
from tests.support import mesh_of, write_config

KINDS = ["async", "sync"]
OFTEN = 7


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    with mesh_of(tmp_path, {}) as made:
        yield made


def of_kind(mesh: meshlib.Mesh, kind: str, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A guarded function of a kind, as something to call from a test."""
    if kind == "sync":
        return mesh.guard("ledger", **options)(function)

    @functools.wraps(function)
    async def later(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # What binds the arguments is the function itself, as in a program.
    later.__dict__.pop("__wrapped__")
    made = mesh.guard("ledger", **options)(later)
    return lambda *args, **kwargs: asyncio.run(made(*args, **kwargs))


def booked() -> str:
    return "booked"


def unattended(function: Callable[..., Any]) -> Any:
    return function()


def in_flight(mesh: meshlib.Mesh) -> int:
    return max(int(row["in_flight"]) for row in mesh.engine.stats(time.monotonic()))


def on_behalf_of(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call it as a handler would that serves this caller."""

    def run() -> Any:
        current_visit.set(Visit(Peer(f"spiffe://shop.internal/ns/default/sa/{name}")))
        return function(*args)

    return contextvars.copy_context().run(run)


# --- what says nothing of the dependency


@pytest.mark.parametrize("idempotent", [False, True])
async def test_impatient_callers_open_no_breaker(mesh: meshlib.Mesh, idempotent: bool) -> None:
    """A deadline of the caller's own that ends before the guard's is the caller's word, and others are served."""

    @mesh.guard("ledger", idempotent=idempotent)
    async def book(wait: bool) -> str:
        if wait:
            await asyncio.Event().wait()
        return "booked"

    for _ in range(OFTEN):
        with mesh.deadline(0.005), pytest.raises(meshlib.DeadlineExceeded):
            await book(True)
    assert (await book(False), in_flight(mesh)) == ("booked", 0)


async def test_the_guards_own_timeout_does_open_the_breaker(mesh: meshlib.Mesh) -> None:
    """Also under a caller who has more time: the dependency has had what it was given."""

    @mesh.guard("ledger", timeout=0.005)
    async def book() -> None:
        await asyncio.Event().wait()

    with mesh.deadline(60.0):
        for _ in range(5):
            with pytest.raises(meshlib.DeadlineExceeded):
                await book()
        with pytest.raises(meshlib.CircuitOpen):
            await book()


def test_a_call_inside_that_ran_into_the_callers_deadline_is_no_failure(mesh: meshlib.Mesh) -> None:
    """A blocking function is told by what it calls; before that moment the same error is the dependency's."""
    waits = [True]

    @mesh.guard("ledger")
    def book() -> None:
        if waits[0]:
            time.sleep(max(meshlib.remaining() or 0.0, 0.0))
        raise meshlib.DeadlineExceeded("inside")

    for _ in range(OFTEN):
        with mesh.deadline(0.003), pytest.raises(meshlib.DeadlineExceeded, match="inside"):
            book()
    waits[0] = False
    for _ in range(5):
        with mesh.deadline(60.0), pytest.raises(meshlib.DeadlineExceeded, match="inside"):
            book()
    with pytest.raises(meshlib.CircuitOpen):
        book()


async def test_wrong_arguments_of_an_async_function_come_out(mesh: meshlib.Mesh) -> None:
    """No fallback, no retry, no failure of the dependency; a TypeError from inside is one like any other."""
    calls: list[int] = []

    @mesh.guard("ledger", idempotent=True, retries=1, wait=tenacity.wait_none(), fallback="stand-in")
    async def book(account: int) -> str:
        calls.append(account)
        raise TypeError("inside")

    wrong: Any = book
    for _ in range(OFTEN):
        with pytest.raises(TypeError, match="account"):
            await wrong()
    assert await book(1) == "stand-in"
    assert calls == [1, 1]


def test_wrong_arguments_of_a_blocking_function_come_out(mesh: meshlib.Mesh) -> None:
    """As of an async one, by `mesh.guard` of a method too."""

    class Books:
        @mesh.guard("ledger", fallback="stand-in")
        def book(self, account: int) -> int:
            return account

    wrong: Any = Books().book
    for args in [(), (1, 2), (), (1, 2), (), (1, 2)]:
        with pytest.raises(TypeError, match="book"):
            wrong(*args)
    assert Books().book(3) == 3


def test_arguments_are_judged_by_what_is_called(mesh: meshlib.Mesh) -> None:
    """A decorator further in that gives an argument by itself has arguments of its own."""

    def inner(session: str, account: int) -> None:
        raise TypeError(session)

    @functools.wraps(inner)
    def injected(account: int) -> None:
        inner("s", account)

    assert mesh.guard("ledger", fallback="stand-in")(injected)(1) == "stand-in"


# --- what a fallback is for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [
        meshlib.ConfigError("no"),
        meshlib.IdentityError("no"),
        meshlib.Denied("no"),
        meshlib.UnknownService("no"),
        meshlib.Refused("no", reason="send.request"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_has_no_stand_in(mesh: meshlib.Mesh, kind: str, error: Exception) -> None:
    """A configuration that can't be used, a name that nobody knows or a denial must be seen."""

    def book() -> None:
        raise error

    with pytest.raises(type(error)):
        of_kind(mesh, kind, book, fallback="stand-in")()
    assert mesh.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [meshlib.NoEndpoint("no"), meshlib.ConnectionLost("no"), OSError()])
def test_an_outage_has_one(mesh: meshlib.Mesh, kind: str, error: Exception) -> None:
    """The mesh's own words for it, and the function's."""

    def book() -> None:
        raise error

    assert of_kind(mesh, kind, book, fallback="stand-in")() == "stand-in"


@pytest.mark.parametrize("kind", KINDS)
def test_a_fallback_is_told_in_the_record_of_its_own_call(mesh: meshlib.Mesh, kind: str) -> None:
    """Not in that of another call of the same function, which failed in between without one."""
    seen: list[Any] = []

    def instead(error: Exception) -> str:
        seen.append(error)
        if error.args == ("first",):
            with pytest.raises(LookupError):
                book("second")
            return "stand-in"
        raise LookupError

    @mesh.guard("ledger", fallback=instead)
    def book(account: str) -> str:
        raise OSError(account)

    assert book("first") == "stand-in"
    calls = [meshlib.call_of(error) for error in seen]
    assert [call.record().get("fallback") for call in calls if call is not None] == ["callable", None]


# --- the last good answer


def remembering(mesh: meshlib.Mesh, kind: str, **options: Any) -> tuple[Callable[..., Any], list[BaseException]]:
    """A function that tells its argument, or raises what is in the list."""
    down: list[BaseException] = []

    def tell(value: Any) -> str:
        if down:
            raise down[0]
        return repr(value)

    return of_kind(mesh, kind, tell, fallback=meshlib.last_good(), **options), down


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("known", "asked"), [(1, True), (1, 1.0), ((1,), (True,)), (((0,),), ((False,),))])
def test_equal_arguments_of_other_types_are_another_question(mesh: meshlib.Mesh, kind: str, known: Any, asked: Any) -> None:
    """Also inside of tuples."""
    tell, down = remembering(mesh, kind)
    tell(known)
    down.append(OSError())
    assert tell(known) == repr(known)
    with pytest.raises(OSError):
        tell(asked)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_gets_the_last_good_answer_of_another_peer(mesh: meshlib.Mesh, kind: str) -> None:
    """A function may look who calls."""
    tell, down = remembering(mesh, kind)
    on_behalf_of("alice", tell, 1)
    down.append(OSError())
    assert on_behalf_of("alice", tell, 1) == "1"
    for ask in (functools.partial(on_behalf_of, "bob", tell), tell):
        with pytest.raises(OSError):
            ask(1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_that_fails_to_be_hashed_spoils_no_answer(mesh: meshlib.Mesh, kind: str) -> None:
    """Whatever its __hash__ raises: the answer is not kept."""

    class Odd:
        def __hash__(self) -> int:
            raise RuntimeError

        def __repr__(self) -> str:
            return "odd"

    tell, down = remembering(mesh, kind)
    assert tell(Odd()) == "odd"
    down.append(OSError())
    with pytest.raises(OSError):
        tell(Odd())


@pytest.mark.parametrize("kind", KINDS)
def test_an_ignored_exception_ends_the_last_good_answer(mesh: meshlib.Mesh, kind: str) -> None:
    """It is an answer: what was there isn't any more."""
    tell, down = remembering(mesh, kind, ignore=LookupError)
    tell(1)
    down.append(LookupError())
    with pytest.raises(LookupError):
        tell(1)
    down[0] = OSError()
    with pytest.raises(OSError):
        tell(1)


# --- what can be guarded


@pytest.mark.parametrize("options", [{}, {"fallback": meshlib.last_good()}, {"fallback": "stand-in"}])
def test_a_blocking_function_that_returns_a_coroutine_is_refused(mesh: meshlib.Mesh, options: dict[str, Any]) -> None:
    """Its work would be done outside the guard. The coroutine is closed, and nothing is counted."""
    made: list[Any] = []

    async def work() -> None: ...

    @mesh.guard("ledger", **options)
    def book() -> Any:
        made.append(work())
        return made[-1]

    for _ in range(OFTEN):
        with pytest.raises(TypeError, match="async def"):
            book()
    assert {inspect.getcoroutinestate(each) for each in made} == {inspect.CORO_CLOSED}
    assert in_flight(mesh) == 0


async def test_a_blocking_function_that_returns_a_task_is_refused(mesh: meshlib.Mesh) -> None:
    """The task is cancelled: nobody would get it."""
    tasks = []

    @mesh.guard("ledger")
    def book() -> Any:
        tasks.append(asyncio.ensure_future(asyncio.sleep(60)))
        return tasks[0]

    with pytest.raises(TypeError, match="async def"):
        book()
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()


@pytest.mark.parametrize("options", [{}, {"fallback": meshlib.last_good()}])
def test_without_a_task_of_asyncio_nothing_is_left_behind(mesh: meshlib.Mesh, options: dict[str, Any]) -> None:
    """Under another event loop it says so: no deadline stays in force, no permit stays taken, the coroutine is closed."""

    class Other:
        def __await__(self) -> Generator[None, None, None]:
            yield None

    ends: list[str] = []

    @mesh.guard("ledger", **options)
    async def book() -> None:
        try:
            await Other()
        finally:
            ends.append("closed")

    def run() -> float | None:
        with pytest.raises(RuntimeError, match="asyncio task"):
            book().send(None)
        return current_deadline.get()

    assert contextvars.copy_context().run(run) is None
    # The other way to the task doesn't begin it at all.
    assert (in_flight(mesh), ends) == (0, [] if options else ["closed"])


# --- an end for each attempt


@pytest.mark.parametrize("options", [{}, {"fallback": meshlib.last_good()}], ids=["quick", "whole"])
async def test_an_attempt_is_cut_and_repeated(tmp_path: Path, options: dict[str, Any]) -> None:
    """`retry.per_try` ends an attempt, and there is time for another one, whatever `retry_on` says; the record tells."""
    with mesh_of(tmp_path, {}, guards={"ledger": {"retry": {"per_try": "10ms", "attempts": 2}}}) as mesh:
        runs: list[int] = []

        @mesh.guard("ledger", idempotent=True, wait=tenacity.wait_none(), retry_on=LookupError, **options)
        async def book() -> str:
            runs.append(1)
            if len(runs) < 3:
                await asyncio.Event().wait()
            return "booked"

        assert await book() == "booked"
        assert (len(runs), in_flight(mesh)) == (3, 0)


@pytest.mark.parametrize("idempotent", [False, True])
async def test_an_attempt_that_was_cut_at_last_is_a_failure(tmp_path: Path, idempotent: bool) -> None:
    """With a word of its own, before the deadline; five of them open the breaker."""
    with mesh_of(tmp_path, {}, guards={"ledger": {"retry": {"per_try": "5ms", "attempts": 0}}}) as mesh:

        @mesh.guard("ledger", idempotent=idempotent)
        async def book() -> None:
            await asyncio.Event().wait()

        for _ in range(5):
            with pytest.raises(meshlib.AttemptTimeout) as caught:
                await book()
            assert caught.value.reason == "retry.per_try"
        with pytest.raises(meshlib.CircuitOpen):
            await book()


def test_that_a_blocking_function_is_not_cut_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At its first call."""
    with mesh_of(tmp_path, {}, guards={"ledger": {"retry": {"per_try": "5ms"}}}) as mesh, caplog.at_level(logging.WARNING):
        book = mesh.guard("ledger")(booked)
        caplog.clear()
        assert (book(), book()) == ("booked", "booked")
    assert [record.name for record in caplog.records if "per_try" in record.getMessage()] == ["meshlib.retry"]


# --- limits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"timeout": 5.0}])
def test_a_rate_by_peer_counts_each_peer(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """On whose behalf the function is called; calls on nobody's are one more."""
    rate = {"calls": 1, "per": "60s", "by": [{"peer": True}]}
    with mesh_of(tmp_path, {}, guards={"ledger": {"admit": {"rate": [rate]}}}) as mesh:
        book = of_kind(mesh, kind, booked, **options)
        for ask in (functools.partial(on_behalf_of, "alice"), functools.partial(on_behalf_of, "bob"), unattended):
            assert ask(book) == "booked"
            with pytest.raises(meshlib.RateLimited):
                ask(book)


def test_a_new_configuration_may_count_by_peer(tmp_path: Path) -> None:
    """A guard that has been called follows a reload."""
    with mesh_of(tmp_path, {}) as mesh:
        book = mesh.guard("ledger")(booked)
        book()
        rate = {"calls": 1, "per": "60s", "by": [{"peer": True}]}
        write_config(tmp_path, {"me": {}}, guards={"ledger": {"admit": {"rate": [rate]}}})
        mesh.reload()
        assert [on_behalf_of(name, book) for name in ("alice", "bob")] == ["booked"] * 2
        with pytest.raises(meshlib.RateLimited):
            on_behalf_of("alice", book)


def test_a_limit_of_the_system_by_header_is_not_for_functions(tmp_path: Path) -> None:
    """They have no headers, and would all be one tenant; its other limits hold."""
    rates = [{"calls": 1, "per": "60s", "by": [{"header": "x-tenant"}]}, {"calls": 3, "per": "60s"}]
    with mesh_of(tmp_path, {}, admit={"rate": rates}) as mesh:
        book = mesh.guard("ledger")(booked)
        assert [book() for _ in range(3)] == ["booked"] * 3
        with pytest.raises(meshlib.RateLimited):
            book()


# --- a forked process


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_is_woken_by_a_guard(mesh: meshlib.Mesh, kind: str) -> None:
    """One that was called before the fork: reload, rotation and metrics go on in the child without any call over HTTP."""
    book = of_kind(mesh, kind, booked)
    book()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = mesh.keeper.is_running
            os.write(write, json.dumps([before, book(), mesh.keeper.is_running, book()]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    try:
        assert json.loads(os.read(read, 1000)) == [False, "booked", True, "booked"]
    finally:
        os.close(read)
        os.close(write)
