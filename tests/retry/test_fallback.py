"""Where every attempt failed a fallback answers: a value, the last good answer, or what a callable makes. It is counted and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from meshlib.client import guarded as guarded_module
from meshlib.client import stand_in
from meshlib.retry.fallback import CALLABLE, LARGEST, LAST_GOOD, MOST, VALUE, Fallbacks, word_of
from tests.support import Request, Scripted, mesh_of, ok, scripted


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- the store


def test_each_kind_has_its_word() -> None:
    """The words that are counted."""
    assert [word_of(each) for each in (None, 7, len, meshlib.last_good())] == [VALUE, VALUE, CALLABLE, LAST_GOOD]


def test_uses_are_counted_by_name_and_word() -> None:
    """What `counts` gives is a copy."""
    fallbacks = Fallbacks()
    for name, word in (("orders", VALUE), ("orders", VALUE), ("guard:ledger", CALLABLE)):
        fallbacks.count(name, word)
    counts = fallbacks.counts()
    fallbacks.count("orders", VALUE)
    assert counts == {("orders", VALUE): 2, ("guard:ledger", CALLABLE): 1}


def test_a_kept_answer_ages() -> None:
    """At `max_age` it is still good; an older one is found by who takes older ones."""
    fallbacks = Fallbacks()
    fallbacks.keep("a", 1, 100.0)
    assert fallbacks.find("a", 60.0, 160.0) is not None
    assert fallbacks.find("a", 60.0, 160.1) is None
    assert fallbacks.find("a", 61.0, 160.1) is not None
    assert fallbacks.find("b", 60.0, 100.0) is None


def test_the_store_is_bounded_and_forgets_what_was_not_used() -> None:
    """The least lately kept or found goes first."""
    fallbacks = Fallbacks()
    for n in range(MOST):
        fallbacks.keep(n, n, 0.0)
    fallbacks.find(0, 60.0, 0.0)
    fallbacks.keep("new", 1, 0.0)
    assert len(fallbacks) == MOST
    assert [fallbacks.find(key, 60.0, 0.0) is not None for key in (0, 1, 2, "new")] == [True, False, True, True]


@pytest.mark.parametrize("age", [0, -1.0, 86401.0, float("nan")])
def test_an_age_out_of_range_is_refused(age: float) -> None:
    """Seconds, at most a day."""
    with pytest.raises(ValueError, match="max_age"):
        meshlib.last_good(age)


def test_a_class_is_no_fallback() -> None:
    """It would be made of the error by mistake."""
    with pytest.raises(ValueError, match="class"):
        meshlib.policy(fallback=dict)


# --- of functions

KINDS = ["async", "sync"]


def booking(mesh: meshlib.Mesh, kind: str, words: list[Any], **options: Any) -> Callable[..., Any]:
    """A guarded function that raises or returns the next word."""

    def next_word() -> Any:
        word = words.pop(0)
        if isinstance(word, BaseException):
            raise word
        return word

    if kind == "sync":
        return mesh.guard("ledger", **options)(lambda *args, **kwargs: next_word())

    async def book(*args: Any, **kwargs: Any) -> Any:
        return next_word()

    function = mesh.guard("ledger", **options)(book)
    return lambda *args, **kwargs: asyncio.run(function(*args, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [None, [], "nothing"])
def test_a_value_stands_in_for_a_function(tmp_path: Path, kind: str, value: Any) -> None:
    """None is a value like another; it is counted, and the record of the failed call says so."""
    with mesh_of(tmp_path, {}) as mesh:
        function = booking(mesh, kind, [1, OSError()], fallback=value)
        assert [function(), function()] == [1, value]
        assert mesh.fallbacks == {("guard:ledger", VALUE): 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_callable_gets_the_error(tmp_path: Path, kind: str) -> None:
    """And its own error comes out."""
    error = OSError("down")
    seen: list[Exception] = []

    def instead(caught: Exception) -> str:
        seen.append(caught)
        if len(seen) > 1:
            raise LookupError
        call = meshlib.call_of(caught)
        assert call is not None
        return "instead"

    with mesh_of(tmp_path, {}) as mesh:
        function = booking(mesh, kind, [error, OSError()], fallback=instead)
        assert function() == "instead"
        assert seen == [error]
        with pytest.raises(LookupError):
            function()
        assert mesh.fallbacks == {("guard:ledger", CALLABLE): 1}


def test_an_async_callable_is_awaited(tmp_path: Path) -> None:
    """By an async function."""

    async def instead(error: Exception) -> str:
        await asyncio.sleep(0)
        return str(error)

    with mesh_of(tmp_path, {}) as mesh:
        assert booking(mesh, "async", [OSError("down")], fallback=instead)() == "down"


@pytest.mark.parametrize("kind", KINDS)
def test_a_fallback_stands_in_for_a_refused_call_too(tmp_path: Path, kind: str) -> None:
    """The function isn't called at all: no time is left."""
    with mesh_of(tmp_path, {}) as mesh, mesh.deadline(-1.0):
        assert booking(mesh, kind, [], fallback=7)() == 7


@pytest.mark.parametrize("kind", KINDS)
def test_an_ignored_exception_has_no_fallback(tmp_path: Path, kind: str) -> None:
    """It is an answer."""
    with mesh_of(tmp_path, {}) as mesh, pytest.raises(KeyError):
        booking(mesh, kind, [KeyError()], fallback=7, ignore=KeyError)()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_good_answer_is_that_to_the_same_arguments(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its age; where there is none the error comes out."""
    clock = Clock()
    monkeypatch.setattr(guarded_module, "clock", lambda: clock.now)
    down = [OSError(str(n)) for n in range(4)]
    clock.now = time.monotonic()
    with mesh_of(tmp_path, {}) as mesh:
        function = booking(mesh, kind, ["one", *down], fallback=meshlib.last_good(30.0))
        assert function(1, x=2) == "one"
        clock.now += 30.0
        assert function(1, x=2) == "one"
        with pytest.raises(OSError, match="1"):
            function(1, x=3)
        clock.now += 0.5
        with pytest.raises(OSError, match="2"):
            function(1, x=2)
        assert mesh.fallbacks == {("guard:ledger", LAST_GOOD): 1}


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_can_not_be_hashed_have_no_last_answer(tmp_path: Path, kind: str) -> None:
    """The call itself is as ever."""
    with mesh_of(tmp_path, {}) as mesh:
        function = booking(mesh, kind, ["one", OSError()], fallback=meshlib.last_good())
        assert function([]) == "one"
        with pytest.raises(OSError):
            function([])


# --- over HTTP


@asynccontextmanager
async def orders(tmp_path: Path, *answers: bytes | None) -> AsyncIterator[tuple[meshlib.Mesh, Scripted]]:
    """A service that gives these answers in turn; None closes the connection. The last one stays."""
    left = list(answers)

    async def answer(server: Scripted, request: Request) -> bytes | None:
        return left.pop(0) if len(left) > 1 else left[0]

    async with scripted(answer) as server:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [server.address]}, "retry": {"attempts": 0}}}) as mesh:
            yield mesh, server


DOWN = b"HTTP/1.1 503 Down\r\ncontent-length: 4\r\n\r\ndown"
URL = "http://orders/items/7"
KEPT = meshlib.policy(fallback=meshlib.last_good(30.0))


async def ask(mesh: meshlib.Mesh, kind: str, *, times: int = 1, method: str = "GET", **options: Any) -> list[httpx.Response]:
    """The answers of a client, one after the other."""
    if kind == "async":
        async with mesh.client() as http:
            return [await http.request(method, URL, **options) for _ in range(times)]

    def run() -> list[httpx.Response]:
        with mesh.sync_client() as http:
            return [http.request(method, URL, **options) for _ in range(times)]

    return await asyncio.to_thread(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "status", "kind_of_text", "text"),
    [
        ({"items": []}, 200, "application/json", '{"items": []}'),
        ("none", 200, "text/plain; charset=utf-8", "none"),
        (b"none", 200, None, "none"),
        (None, 200, "application/json", "null"),
        (httpx.Response(404, json={"no": 1}), 404, "application/json", '{"no":1}'),
    ],
)
@pytest.mark.parametrize("failure", [None, DOWN])
async def test_a_value_becomes_a_response(
    tmp_path: Path, kind: str, value: Any, status: int, kind_of_text: str | None, text: str, failure: bytes | None
) -> None:
    """For a connection that broke and for a 5xx; again and again; visible and counted, with the failed call's record."""
    async with orders(tmp_path, failure) as (mesh, _):
        for response in await ask(mesh, kind, times=2, extensions=meshlib.policy(fallback=value)):
            assert (response.status_code, response.headers.get("content-type"), response.text) == (status, kind_of_text, text)
            assert response.extensions["meshlib.fallback"] == VALUE
            assert response.extensions["meshlib.call"].attempts == 1
            assert str(response.request.url) == URL
        assert mesh.fallbacks == {("orders", VALUE): 2}


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_below_500_needs_no_fallback(tmp_path: Path, kind: str) -> None:
    """A 404 is an answer."""
    async with orders(tmp_path, b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\nno") as (mesh, _):
        (response,) = await ask(mesh, kind, extensions=meshlib.policy(fallback="none"))
        assert (response.status_code, response.text) == (404, "no")
        assert "meshlib.fallback" not in response.extensions
        assert mesh.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_callable_is_given_the_error_or_the_5xx(tmp_path: Path, kind: str) -> None:
    """As httpx's own HTTPStatusError with the response."""
    seen: list[Exception] = []

    def instead(error: Exception) -> dict[str, str]:
        seen.append(error)
        return {"instead": type(error).__name__}

    async with orders(tmp_path, None, DOWN) as (mesh, _):
        lost, down = await ask(mesh, kind, times=2, extensions=meshlib.policy(fallback=instead))
    assert (lost.json(), down.json()) == ({"instead": "ConnectionLost"}, {"instead": "HTTPStatusError"})
    assert isinstance(seen[1], httpx.HTTPStatusError)
    assert seen[1].response.status_code == 503
    assert down.extensions["meshlib.fallback"] == CALLABLE


async def test_an_async_callable_is_for_async_clients(tmp_path: Path) -> None:
    """A blocking client says so."""

    async def instead(error: Exception) -> str:
        return "instead"

    async with orders(tmp_path, DOWN) as (mesh, _):
        (response,) = await ask(mesh, "async", extensions=meshlib.policy(fallback=instead))
        assert response.text == "instead"
        with pytest.raises(TypeError, match="async"):
            await ask(mesh, "sync", extensions=meshlib.policy(fallback=instead))


@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_good_answer_comes_back_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status, headers and body, up to its age; then the failure itself."""
    clock = Clock()
    monkeypatch.setattr(stand_in, "clock", clock)
    async with orders(tmp_path, ok(b"seven", "x-version: 3"), DOWN) as (mesh, server):
        (good,) = await ask(mesh, kind, extensions=KEPT)
        clock.now += 30.0
        (kept,) = await ask(mesh, kind, extensions=KEPT)
        clock.now += 0.1
        (down,) = await ask(mesh, kind, extensions=KEPT)
        assert len(server.requests) == 3
    assert (good.text, "meshlib.fallback" in good.extensions) == ("seven", False)
    assert (kept.status_code, kept.text, kept.headers["x-version"]) == (200, "seven", "3")
    assert kept.extensions["meshlib.fallback"] == LAST_GOOD
    assert (down.status_code, down.text) == (503, "down")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"headers": {"authorization": "a"}}, {"headers": {"authorization": "b"}}),
        ({"headers": {"x-tenant": "a"}}, {}),
        ({"headers": {"baggage": "userId=alice"}}, {"headers": {"baggage": "userId=bob"}}),
        ({"params": {"q": "1"}}, {"params": {"q": "2"}}),
        ({}, {"method": "HEAD"}),
        ({"method": "POST"}, {"method": "POST"}),
        ({"method": "PUT"}, {"method": "PUT"}),
    ],
)
async def test_nobody_gets_what_was_said_to_somebody_else(
    tmp_path: Path, kind: str, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """Another user, tenant, query or method is another question; and what changes something is never answered from a store."""
    async with orders(tmp_path, ok(b"secret"), DOWN) as (mesh, _):
        await ask(mesh, kind, extensions=KEPT, **first)
        (response,) = await ask(mesh, kind, extensions=KEPT, **then)
        assert response.status_code == 503
        assert mesh.fallbacks == {}


@pytest.mark.parametrize("kind", KINDS)
async def test_headers_of_one_call_do_not_make_another_question(tmp_path: Path, kind: str) -> None:
    """Traces and request ids are different each time."""
    async with orders(tmp_path, ok(b"seven"), DOWN) as (mesh, _):
        await ask(
            mesh, kind, extensions=KEPT, headers={"x-request-id": "1", "traceparent": "00-" + "1" * 32 + "-" + "1" * 16 + "-01"}
        )
        (response,) = await ask(mesh, kind, extensions=KEPT, headers={"x-request-id": "2"})
    assert response.text == "seven"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x", "cache-control: private, no-store"),
        ok(b"x", "vary: *"),
        ok(b"x", "set-cookie: session=alice"),
        ok(b"x" * (LARGEST + 1)),
        b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\nno",
    ],
    ids=["no-store", "vary", "cookie", "large", "not-good"],
)
async def test_what_must_not_or_can_not_be_kept_is_not(tmp_path: Path, kind: str, answer: bytes) -> None:
    """The answer itself arrives as ever."""
    async with orders(tmp_path, answer, DOWN) as (mesh, _):
        # By two clients: a cookie that one has got makes another question.
        (first,), (then,) = [await ask(mesh, kind, extensions=KEPT) for _ in range(2)]
        assert first.content == answer.partition(b"\r\n\r\n")[2]
        assert then.status_code == 503


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_in_pieces_is_kept_too(tmp_path: Path, kind: str) -> None:
    """Up to 64 KiB, it is read as a whole."""
    async with orders(tmp_path, ok(b"y" * LARGEST), DOWN) as (mesh, _):
        first, then = await ask(mesh, kind, times=2, extensions=KEPT)
    assert (len(first.content), first.content == then.content) == (LARGEST, True)
    assert then.extensions["meshlib.fallback"] == LAST_GOOD


async def test_a_refused_call_has_a_fallback(tmp_path: Path) -> None:
    """There is no time left to send it."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": ["127.0.0.1:9"]}}}) as mesh, mesh.deadline(-1.0):
        (response,) = await ask(mesh, "async", extensions=meshlib.policy(fallback="none"))
        assert (response.text, response.extensions["meshlib.fallback"]) == ("none", VALUE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "header", "is_forgotten"),
    [
        (404, "x-a: b", True),
        (403, "x-a: b", True),
        (200, "cache-control: no-store", True),
        (301, "location: /elsewhere", True),
        (408, "x-a: b", False),
        (429, "x-a: b", False),
    ],
)
async def test_what_has_another_answer_now_is_forgotten(
    tmp_path: Path, kind: str, status: int, header: str, is_forgotten: bool
) -> None:
    """What is gone, forbidden or not to be kept any more isn't told again; "too many" or "too early" says nothing of it."""
    other = f"HTTP/1.1 {status} X\r\n{header}\r\ncontent-length: 0\r\n\r\n".encode()
    async with orders(tmp_path, ok(b"secret"), other, DOWN) as (mesh, _):
        _, now, then = await ask(mesh, kind, times=3, extensions=KEPT)
    assert (now.status_code, then.text) == (status, "down" if is_forgotten else "secret")


CUT = b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\nhalf"


@asynccontextmanager
async def breaking(tmp_path: Path, *answers: tuple[bytes, str]) -> AsyncIterator[meshlib.Mesh]:
    """A service whose answers in turn end as told: "whole", by a broken connection ("cut"), or not at all ("hang")."""
    left = list(answers)
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                data, end = left.pop(0) if len(left) > 1 else left[0]
                writer.write(data)
                await writer.drain()
                if end == "hang":
                    await reader.read()
                if end != "whole":
                    return
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        services = {"orders": {"discover": {"static": [address]}, "retry": {"attempts": 0}}}
        with mesh_of(tmp_path, services) as mesh:
            yield mesh
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def in_flight(mesh: meshlib.Mesh) -> int:
    return max(int(row["in_flight"]) for row in mesh.engine.stats(time.monotonic()))


@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_good_answer_stands_in_for_a_body_that_breaks_off(tmp_path: Path, kind: str) -> None:
    """After its head, too; where there is none the error comes out."""
    async with breaking(tmp_path, (ok(b"seven"), "whole"), (CUT, "cut")) as mesh:
        good, kept = await ask(mesh, kind, times=2, extensions=KEPT)
        assert (good.text, kept.text, kept.extensions["meshlib.fallback"]) == ("seven", "seven", LAST_GOOD)
        assert kept.extensions["meshlib.call"].attempts == 1
        with pytest.raises(meshlib.AttemptFailed):
            await ask(mesh, kind, extensions=KEPT, params={"q": "1"})
        assert in_flight(mesh) == 0


async def test_a_body_whose_reading_is_cancelled_is_given_up(tmp_path: Path) -> None:
    """At once, not when the collector comes by: its permit and its connection go back."""
    has_head = asyncio.Event()

    async def trace(event: str, info: Any) -> None:
        if event == "http11.receive_response_headers.complete":
            has_head.set()

    async with breaking(tmp_path, (CUT, "hang")) as mesh, mesh.client() as http:
        task = asyncio.create_task(http.get(URL, extensions={**KEPT, "trace": trace}))
        await has_head.wait()
        assert in_flight(mesh) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        # Its traceback is held, and with it all that was under way.
        assert (in_flight(mesh), caught.value.__traceback__ is None) == (0, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_fallback_that_fails_leaves_no_answer_open(tmp_path: Path, kind: str, is_async: bool) -> None:
    """Of a 5xx whose body is still on its way; its own error comes out."""
    errors: list[BaseException] = []

    def instead(error: Exception) -> None:
        raise KeyError("x")

    async def instead_async(error: Exception) -> None:
        raise KeyError("x")

    down = b"HTTP/1.1 500 X\r\ncontent-length: 200000\r\n\r\nhalf"
    async with breaking(tmp_path, (down, "hang")) as mesh:
        for _ in range(3):
            # A blocking client refuses a fallback that is async.
            with pytest.raises(TypeError if is_async and kind == "sync" else KeyError) as caught:
                await ask(mesh, kind, extensions=meshlib.policy(fallback=instead_async if is_async else instead))
            errors.append(caught.value)
        assert in_flight(mesh) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("url", "headers", "error"),
    [(URL, {"x-a": "bad\x01value"}, meshlib.Refused), (URL.replace("http:", "https:"), {}, meshlib.Denied)],
    ids=["unwritable", "denied"],
)
async def test_a_mistake_of_the_caller_has_no_stand_in(
    tmp_path: Path, kind: str, url: str, headers: dict[str, str], error: type[Exception]
) -> None:
    """It would never be found."""
    async with orders(tmp_path, ok(b"x")) as (mesh, _):

        def run() -> None:
            with mesh.sync_client() as http:
                http.get(url, headers=headers, extensions=meshlib.policy(fallback="stand-in"))

        with pytest.raises(error):
            if kind == "sync":
                await asyncio.to_thread(run)
            else:
                async with mesh.client() as http:
                    await http.get(url, headers=headers, extensions=meshlib.policy(fallback="stand-in"))
        assert mesh.fallbacks == {}


async def test_a_service_without_route_for_the_call_has_no_stand_in(tmp_path: Path) -> None:
    """The mesh's configuration says that there is nothing."""
    services = {"orders": {"discover": {"static": ["127.0.0.1:9"]}, "route": [{"match": {"methods": ["POST"]}}]}}
    with mesh_of(tmp_path, services) as mesh, pytest.raises(meshlib.NoRoute):
        await ask(mesh, "async", extensions=meshlib.policy(fallback="stand-in"))
