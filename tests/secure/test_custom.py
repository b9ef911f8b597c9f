"""Does an authorizer that fails, hangs, lies or is missing ever let a call in? And what does it cost those who ask?"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from meshlib.call import Peer
from meshlib.secure.custom import Authorizers, Inquiry

PEER = Peer("spiffe://shop.internal/ns/default/sa/web", is_tls=True)
ASKED = Inquiry(
    "GET", "/orders/7", "orders", PEER, ((b"x-role", b"admin"), (b"authorization", b"Bearer s3cret")), {"sub": "a"}, "10.0.0.1"
)


def outcomes(authorizers: Authorizers) -> dict[tuple[str, str], int]:
    return {(row["name"], row["outcome"]): row["count"] for row in authorizers.stats()}


async def both(authorizers: Authorizers, name: str, inquiry: Inquiry = ASKED) -> tuple[bool, bool]:
    """The answer on a loop, and in a thread."""
    here = await authorizers.ask(name, inquiry)
    there = await asyncio.to_thread(authorizers.ask_blocking, name, inquiry)
    return here, there


def as_async(function: Callable[[Inquiry], Any]) -> Callable[[Inquiry], Any]:
    async def asked(inquiry: Inquiry) -> Any:
        return function(inquiry)

    return asked


def same(function: Callable[[Inquiry], Any]) -> Callable[[Inquiry], Any]:
    return function


KINDS = pytest.mark.parametrize("kind", [same, as_async], ids=["plain", "async"])


@KINDS
@pytest.mark.parametrize("value", [True, False, None, 1, "yes", "True", object(), [], {"allow": True}])
async def test_only_true_lets_a_call_in(kind: Any, value: object) -> None:
    """Nothing that is merely truthy; only False is an answer beside it, the rest are faults."""
    authorizers = Authorizers()
    authorizers.add("opa", kind(lambda inquiry: value))
    assert await both(authorizers, "opa") == (value is True, value is True)
    word = "allowed" if value is True else "denied" if value is False else "error"
    assert outcomes(authorizers) == {("opa", word): 2}


@KINDS
@pytest.mark.parametrize("error", [ValueError, TimeoutError, asyncio.CancelledError, StopIteration, MemoryError])
async def test_an_exception_denies(kind: Any, error: type[BaseException]) -> None:
    """Whatever it is, and it goes no further."""

    def fail(inquiry: Inquiry) -> bool:
        raise error("no")

    authorizers = Authorizers()
    authorizers.add("opa", kind(fail))
    assert await both(authorizers, "opa") == (False, False)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_not_even_an_exit_ends_a_thread_of_the_pool(error: type[BaseException]) -> None:
    """The next call is answered by the same thread."""

    def fail(inquiry: Inquiry) -> bool:
        if inquiry.method == "GET":
            raise error
        return True

    authorizers = Authorizers(workers=1)
    authorizers.add("opa", fail)
    assert [authorizers.ask_blocking("opa", one) for one in (ASKED, Inquiry("POST", "/"))] == [False, True]


async def test_it_sees_the_call_and_the_context_of_the_one_who_asks() -> None:
    """On both sides: what was checked of the call, and context variables such as the trace."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen: list[Any] = []

    def look(inquiry: Inquiry) -> bool:
        seen.append((inquiry, variable.get()))
        return True

    authorizers = Authorizers()
    authorizers.add("plain", look)
    authorizers.add("async", as_async(look))
    variable.set("trace")
    assert [await both(authorizers, name) for name in ("plain", "async")] == [(True, True), (True, True)]
    assert seen == [(ASKED, "trace")] * 4


async def test_the_timeout_denies_and_doesnt_wait_for_who_ignores_it() -> None:
    """A function on the loop that swallows its cancellation, and one in a thread that nothing can cut."""
    go_on, cut = asyncio.Event(), asyncio.Event()
    hang = threading.Event()

    async def stubborn(inquiry: Inquiry) -> bool:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cut.set()
            await go_on.wait()
        return True

    authorizers = Authorizers()
    authorizers.add("stubborn", stubborn, timeout=0.02)
    authorizers.add("blocking", lambda inquiry: hang.wait(), timeout=0.02)
    begun = time.monotonic()
    assert await authorizers.ask("stubborn", ASKED) is False
    assert await both(authorizers, "blocking") == (False, False)
    assert time.monotonic() - begun < 2
    await cut.wait()
    go_on.set()
    hang.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not authorizers._cut
    assert outcomes(authorizers) == {("stubborn", "timeout"): 1, ("blocking", "timeout"): 2}


def test_an_async_one_is_cut_in_a_thread_too_and_the_thread_is_free_again() -> None:
    """One worker: the second question is answered."""
    authorizers = Authorizers(workers=1)

    async def slow(inquiry: Inquiry) -> bool:
        await asyncio.sleep(0 if inquiry.method == "POST" else 3600)
        return True

    authorizers.add("slow", slow, timeout=0.05)
    assert authorizers.ask_blocking("slow", ASKED) is False
    authorizers._known["slow"] = type(authorizers._known["slow"])(slow, 10.0, True)
    assert authorizers.ask_blocking("slow", Inquiry("POST", "/")) is True


def test_threads_are_few_and_made_when_they_are_needed() -> None:
    """None by making or registering; no more than calls at once; at most as many as there may be; and they end with the process."""
    before = set(threading.enumerate())
    gate, running = threading.Event(), threading.Semaphore(0)

    def wait(inquiry: Inquiry) -> bool:
        running.release()
        return gate.wait(10)

    authorizers = Authorizers(workers=2, waiting=3)
    authorizers.add("quick", lambda inquiry: True)
    authorizers.add("slow", wait, timeout=10)
    assert set(threading.enumerate()) == before
    assert [authorizers.ask_blocking("quick", ASKED) for _ in range(5)] == [True] * 5
    assert len(set(threading.enumerate()) - before) == 1
    answers: list[bool] = []
    askers = [threading.Thread(target=lambda: answers.append(authorizers.ask_blocking("slow", ASKED))) for _ in range(5)]
    for asker in askers:
        asker.start()
    for _ in range(2):
        running.acquire()
    pool = authorizers._pool
    assert pool is not None
    while len(pool._jobs) < 3:
        time.sleep(0.001)
    # Two run and three wait: the sixth is denied at once.
    assert authorizers.ask_blocking("slow", ASKED) is False
    own = [thread for thread in threading.enumerate() if thread not in before and thread not in askers]
    assert (len(own), all(thread.daemon for thread in own)) == (2, True)
    gate.set()
    for asker in askers:
        asker.join()
    assert (answers, outcomes(authorizers)) == (
        [True] * 5,
        {("quick", "allowed"): 5, ("slow", "allowed"): 5, ("slow", "full"): 1},
    )


def test_questions_that_nobody_waits_for_take_no_place() -> None:
    """Calls that were denied for their time leave room for the next, and are never put."""
    hang, asked = threading.Event(), []

    def wait(inquiry: Inquiry) -> bool:
        asked.append(inquiry.path)
        return hang.wait(10)

    authorizers = Authorizers(workers=1, waiting=2)
    authorizers.add("slow", wait, timeout=0.01)
    assert [authorizers.ask_blocking("slow", Inquiry("GET", f"/{number}")) for number in range(6)] == [False] * 6
    assert outcomes(authorizers) == {("slow", "timeout"): 6}
    hang.set()
    authorizers.add("last", lambda inquiry: True, timeout=10)
    assert authorizers.ask_blocking("last", ASKED) is True
    assert asked == ["/0"]


async def test_a_name_that_nobody_registered_denies_and_says_how(caplog: pytest.LogCaptureFixture) -> None:
    """Told once in a while, not for each call."""
    now = [0.0]
    authorizers = Authorizers(clock=lambda: now[0])
    authorizers.add("opa", lambda inquiry: True)
    with caplog.at_level(logging.ERROR, "meshlib.secure"):
        assert await both(authorizers, "oap") == (False, False)
        assert caplog.text.count("@mesh.authorizer('oap')") == 1
        assert "'opa'" in caplog.text and "GET '/orders/7'" in caplog.text
        now[0] = 11.0
        assert await authorizers.ask("oap", ASKED) is False
    assert len(caplog.records) == 2
    assert authorizers.missing(["opa", "oap", "oap"]) == ["oap"]


async def test_a_plain_function_that_returns_a_coroutine_is_told_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    """It would be forgotten, and no coroutine is left without an end."""

    async def decide(inquiry: Inquiry) -> bool:
        return True

    authorizers = Authorizers()
    authorizers.add("opa", lambda inquiry: decide(inquiry))
    assert await both(authorizers, "opa") == (False, False)
    assert "async def" in caplog.text


async def test_an_object_with_an_async_call_is_async() -> None:
    """Policies with a state of their own."""

    class Policy:
        async def __call__(self, inquiry: Inquiry) -> bool:
            await asyncio.sleep(0)
            return True

    authorizers = Authorizers()
    authorizers.add("opa", Policy())
    assert await both(authorizers, "opa") == (True, True)


async def test_who_goes_away_takes_the_question_along() -> None:
    """A client that disconnects: the cancellation reaches the function, and is not swallowed."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def wait(inquiry: Inquiry) -> bool:
        asked.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()
        return True

    authorizers = Authorizers()
    authorizers.add("opa", wait, timeout=60)
    asker = asyncio.ensure_future(authorizers.ask("opa", ASKED))
    await asked.wait()
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    await ended.wait()
    assert outcomes(authorizers) == {}


def test_one_loop_of_a_thread_serves_many_questions() -> None:
    """Connections that an authorizer keeps belong to a loop, so the loop stays."""
    loops: list[Any] = []

    async def note(inquiry: Inquiry) -> bool:
        loops.append(asyncio.get_running_loop())
        return True

    authorizers = Authorizers(workers=1)
    authorizers.add("opa", note)
    assert [authorizers.ask_blocking("opa", ASKED) for _ in range(3)] == [True] * 3
    assert loops[0] is loops[1] is loops[2]


@pytest.mark.parametrize(
    ("name", "function", "timeout", "words"),
    [
        ("", print, 0.5, "name="),
        ("opa", None, 0.5, "a function of one Inquiry"),
        ("opa", print, 0.0, "timeout=0.0"),
        ("opa", print, 61, "timeout=61"),
        ("known", print, 0.5, "registered already"),
    ],
)
def test_mistakes_are_told_at_registration(name: Any, function: Any, timeout: float, words: str) -> None:
    """Not by the first call that is denied."""
    authorizers = Authorizers()
    authorizers.add("known", lambda inquiry: False)
    with pytest.raises(ValueError, match=words):
        authorizers.add(name, function, timeout)


async def test_registering_by_decorator_gives_the_function_back() -> None:
    """It can still be called and tested."""
    authorizers = Authorizers()

    @authorizers.register("opa", timeout=0.2)
    def decide(inquiry: Inquiry) -> bool:
        return inquiry.header("X-Role") == "admin"

    assert decide(ASKED) is True
    assert await both(authorizers, "opa") == (True, True)


def test_an_inquiry_shows_neither_headers_nor_claims() -> None:
    """It gets into logs and tracebacks. A header that is there twice is none."""
    assert "s3cret" not in repr(ASKED) and "sub" not in repr(ASKED) and "/orders/7" in repr(ASKED)
    twice = Inquiry("GET", "/", headers=((b"x-role", b"user"), (b"x-role", b"admin")))
    assert (twice.header("x-role"), ASKED.header("x-none")) == (None, None)
    assert pickle.loads(pickle.dumps(ASKED)) == ASKED


def test_after_a_fork_the_child_has_a_pool_of_its_own() -> None:
    """The threads stay with the parent, even if all of them hang, and so does what they counted."""
    hang = threading.Event()
    authorizers = Authorizers(workers=1, waiting=1)
    authorizers.add("slow", lambda inquiry: hang.wait(10), timeout=0.01)
    authorizers.add("quick", lambda inquiry: True, timeout=10)
    assert authorizers.ask_blocking("slow", ASKED) is False
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = authorizers.ask_blocking("quick", ASKED)
        os.write(writer, f"{answer} {outcomes(authorizers)}".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 200).decode() == "True {('quick', 'allowed'): 1}"
    os.close(reader)
    hang.set()
