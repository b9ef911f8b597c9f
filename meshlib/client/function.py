"""How does any function get what a call over HTTP gets: limits, a breaker, a deadline, and retries within a budget?

`mesh.guard("ledger")` stands between a caller and a function that reaches a dependency in its own way: a database driver, an SDK, a
queue. The engine sees a Service ``guard:<name>`` with one endpoint, so that all decisions, words and metrics are those of any
other call. A guard counts per call of the function, and every function under the same name shares one breaker and one budget.

Where nothing fails a call is a handful of operations: one crossing into the engine, the function, one crossing back. For that the
first step of a coroutine is taken by hand: one that never suspends needs no timer. All the rest is in `Story`, which exists from the
first failure on. What it does not do: a blocking function can't be cut, so its deadline holds between attempts and for the calls of
the mesh inside it, and `retry.per_try` does nothing for it; what a function returns is never judged, but that a blocking one must not
return a coroutine or a future, whose work the guard would not see; generators are refused, since a half-eaten one can't be repeated.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextvars import Token
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .. import errors
from ..call import CallPolicy, current_deadline, current_layer, outer_end
from .guarded import NO_TOKEN, UNFINISHED, Guard, Story
from .late import Entry

if TYPE_CHECKING:
    from pybreaker import CircuitBreakerListener

    from ..mesh import Mesh

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("meshlib.retry")
clock = time.monotonic


class Decorator(Protocol):
    """What `mesh.guard(...)` makes: it gives back a function with the same signature."""

    def __call__(self, function: F, /) -> F: ...


def guard(
    mesh: Mesh,
    name: str,
    *,
    idempotent: bool = False,
    timeout: float | None = None,
    retries: int | None = None,
    wait: Callable[[Any], float] | None = None,
    stop: Callable[[Any], bool] | None = None,
    retry_on: type[Exception] | tuple[type[Exception], ...] = (Exception,),
    ignore: type[BaseException] | tuple[type[BaseException], ...] = (),
    fallback: Any = ...,
    listeners: Iterable[CircuitBreakerListener] = (),
) -> Decorator:
    """See `Mesh.guard`."""
    if not isinstance(name, str) or not name or "*" in name:
        raise ValueError(f"mesh.guard({name!r}): a name without '*' is expected, such as mesh.guard('ledger')")
    # The ranges of the one are those of the other.
    policy = CallPolicy(idempotent=bool(idempotent), timeout=timeout, retries=retries, wait=wait, stop=stop, fallback=fallback)
    retried, ignored = _kinds("retry_on", retry_on), _kinds("ignore", ignore)
    told = tuple(listeners)

    def decorate(function: Any) -> Any:
        is_async = _check(function)
        own = Guard(mesh, name, policy, retried, ignored, told, function)
        if is_async:
            return _async_quick(own) if own.is_bare else _async_whole(own)
        if inspect.iscoroutinefunction(fallback):
            raise TypeError(f"the fallback of {own.title} is async, but the function isn't: nobody could await it")
        return _sync_quick(own) if own.is_bare else _sync_whole(own)

    return decorate


def _kinds(option: str, given: Any) -> tuple[type[BaseException], ...]:
    kinds = given if isinstance(given, tuple) else tuple(given) if isinstance(given, (list, set, frozenset)) else (given,)
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            raise TypeError(f"{option}: classes of exceptions are expected, not {kind!r}")
    return kinds


def _check(function: Any) -> bool:
    """Whether it is async. `TypeError` for what can't be guarded."""
    if isinstance(function, (staticmethod, classmethod, property)):
        raise TypeError(f"put @mesh.guard under @{type(function).__name__}, nearer to the function")
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"@mesh.guard is for functions, sync or async, not for {function!r}")
    whole = function if inspect.isroutine(function) or isinstance(function, functools.partial) else type(function).__call__
    if inspect.isgeneratorfunction(whole) or inspect.isasyncgenfunction(whole):
        raise TypeError(
            f"{getattr(function, '__qualname__', function)!r} is a generator: a half-eaten one can't be repeated, and its end is not "
            "its caller's. Guard the functions that it calls."
        )
    return inspect.iscoroutinefunction(whole)


# --- async functions


@types.coroutine
def _rest(work: Coroutine[Any, Any, Any], first: Any) -> Generator[Any, Any, Any]:
    """Go on with a coroutine whose first step was taken by hand, and gave `first` for the loop."""
    while True:
        try:
            given = yield first
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:
            try:
                first = work.throw(error)
            except StopIteration as end:
                return end.value
            continue
        if given is None:
            # As asyncio and uvloop do.
            return (yield from work)
        try:
            first = work.send(given)
        except StopIteration as end:
            return end.value


def _async_quick(guard: Guard) -> Callable[..., Any]:
    function: Any = guard.function
    code = getattr(function, "__code__", None)
    if code is None or not code.co_flags & inspect.CO_COROUTINE:
        # Something that is marked as one, and may return any awaitable.
        async def function(*args: Any, **kwargs: Any) -> Any:
            return await guard.function(*args, **kwargs)

    name, idempotent, retries = guard.label, guard.idempotent, guard.retries
    outer, enforce, release = outer_end, current_deadline.set, current_deadline.reset

    @functools.wraps(guard.function)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        begun = clock()
        try:
            call, token, end = guard.enter(name, begun, outer(), idempotent, retries)
        except errors.MeshError as refusal:
            return await _refused(guard, refusal, args, kwargs)
        if token == NO_TOKEN:
            return await _carried(guard, args, kwargs, Story(guard, call, token, begun, args, kwargs))
        mark = enforce(end)
        try:
            work = function(*args, **kwargs) if kwargs else function(*args)
            first = work.send(None)
        except StopIteration as done:
            release(mark)
            call.good(token, clock())
            return done.value
        except BaseException as caught:
            error: BaseException = caught
        else:
            # It waits for something: from here on it can be cut.
            per_try = call.per_try
            try:
                entry = Entry(min(end, begun + per_try) if per_try else end)
            except BaseException:
                # No task of asyncio: nothing can wait here.
                release(mark)
                call.abandon(clock())
                work.close()
                raise
            try:
                result = await _rest(work, first)
            except BaseException as caught:
                error = guard.cut(caught, entry.end, end) if entry.is_cut(caught) else caught
            else:
                entry.drop()
                release(mark)
                call.good(token, clock())
                return result
        try:
            return await _carried(guard, args, kwargs, Story(guard, call, token, begun, args, kwargs), error, mark)
        finally:
            # Its traceback holds this frame.
            del error

    return guarded


def _async_whole(guard: Guard) -> Callable[..., Any]:
    @functools.wraps(guard.function)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        begun = clock()
        try:
            call, token, _ = guard.enter(guard.label, begun, outer_end(), guard.idempotent, guard.retries)
        except errors.MeshError as refusal:
            return await _refused(guard, refusal, args, kwargs)
        return await _carried(guard, args, kwargs, Story(guard, call, token, begun, args, kwargs))

    return guarded


async def _refused(guard: Guard, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if guard.listened is not None:
        guard.listened.refused(error)
    if not guard.has_stand_in(error, args, kwargs):
        raise error
    answer = guard.stand_in(error, args, kwargs, None)
    return await answer if inspect.isawaitable(answer) and callable(guard.fallback) else answer


async def _carried(
    guard: Guard,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    story: Story,
    error: BaseException | None = None,
    mark: Any = None,
) -> Any:
    """Every attempt from here on; with an `error`, from the end of the first one on."""
    call = story.call
    end = call.deadline
    if mark is None:
        mark = current_deadline.set(end)
    story.outer = _outer(mark)
    repeating = None
    try:
        try:
            while True:
                if error is not None:
                    if not story.failed(error):
                        break
                    story.token = NO_TOKEN
                    story.attempt += 1
                try:
                    while story.token == NO_TOKEN and (seconds := story.pause()):  # noqa: ASYNC110  # it is the engine's time
                        await asyncio.sleep(min(seconds, max(end - clock(), 0.0)))
                except errors.MeshError as refusal:
                    # No further attempt: what the function itself said is what the caller wants to know.
                    error = story.refused(error, refusal)
                    break
                if repeating is None and story.attempt > 1:
                    # What the function calls over the mesh isn't repeated there as well.
                    repeating = current_layer.set(max(story.layer, 1))
                story.began()
                per_try = call.per_try
                entry = Entry(min(end, clock() + per_try) if per_try else end)
                try:
                    result = await guard.function(*args, **kwargs)
                except BaseException as caught:
                    error = guard.cut(caught, entry.end, end) if entry.is_cut(caught) else caught
                else:
                    entry.drop()
                    story.good(result)
                    return result
        except BaseException:
            # Cancelled while it waited: the permit goes back before anybody else runs.
            call.abandon(clock())
            raise
        finally:
            _release(current_deadline, mark)
            if repeating is not None:
                _release(current_layer, repeating)
        story.ended(error)
        if not guard.has_stand_in(error, args, kwargs):
            raise error
        answer = guard.stand_in(error, args, kwargs, story)
        return await answer if inspect.isawaitable(answer) and callable(guard.fallback) else answer
    finally:
        # The error's traceback holds this frame.
        del error


def _outer(mark: Token[float | None]) -> float | None:
    """The end that was in force before."""
    return None if mark.old_value is Token.MISSING else mark.old_value


def _release(variable: Any, mark: Any) -> None:
    try:
        variable.reset(mark)
    except ValueError:
        # A coroutine that nobody awaited to its end is closed in whatever context the collector runs.
        log.debug("a guarded call was closed in another context than its own")


# --- blocking functions


def _sync_quick(guard: Guard) -> Callable[..., Any]:
    function = guard.function
    name, idempotent, retries = guard.label, guard.idempotent, guard.retries
    outer, enforce, release = outer_end, current_deadline.set, current_deadline.reset

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        begun = clock()
        try:
            call, token, end = guard.enter(name, begun, outer(), idempotent, retries)
        except errors.MeshError as refusal:
            return _refused_here(guard, refusal, args, kwargs)
        if token == NO_TOKEN:
            return _driven(guard, args, kwargs, Story(guard, call, token, begun, args, kwargs))
        mark = enforce(end)
        try:
            result = function(*args, **kwargs) if kwargs else function(*args)
        except BaseException as caught:
            error = caught
        else:
            release(mark)
            if type(result) in UNFINISHED:
                call.abandon(clock())
                raise guard.unfinished(result)
            call.good(token, clock())
            return result
        try:
            return _driven(guard, args, kwargs, Story(guard, call, token, begun, args, kwargs), error, mark)
        finally:
            del error

    return guarded


def _sync_whole(guard: Guard) -> Callable[..., Any]:
    @functools.wraps(guard.function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        begun = clock()
        try:
            call, token, _ = guard.enter(guard.label, begun, outer_end(), guard.idempotent, guard.retries)
        except errors.MeshError as refusal:
            return _refused_here(guard, refusal, args, kwargs)
        return _driven(guard, args, kwargs, Story(guard, call, token, begun, args, kwargs))

    return guarded


def _refused_here(guard: Guard, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if guard.listened is not None:
        guard.listened.refused(error)
    if not guard.has_stand_in(error, args, kwargs):
        raise error
    return guard.stand_in(error, args, kwargs, None)


def _driven(
    guard: Guard,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    story: Story,
    error: BaseException | None = None,
    mark: Any = None,
) -> Any:
    """As `_carried`, in the calling thread."""
    call = story.call
    end = call.deadline
    if mark is None:
        mark = current_deadline.set(end)
    story.outer = _outer(mark)
    repeating = None
    try:
        try:
            while True:
                if error is not None:
                    if not story.failed(error):
                        break
                    story.token = NO_TOKEN
                    story.attempt += 1
                try:
                    while story.token == NO_TOKEN and (seconds := story.pause()):
                        time.sleep(min(seconds, max(end - clock(), 0.0)))
                except errors.MeshError as refusal:
                    error = story.refused(error, refusal)
                    break
                if repeating is None and story.attempt > 1:
                    repeating = current_layer.set(max(story.layer, 1))
                story.began()
                try:
                    result = guard.function(*args, **kwargs)
                except BaseException as caught:
                    error = caught
                else:
                    if type(result) in UNFINISHED:
                        raise guard.unfinished(result)
                    story.good(result)
                    return result
        except BaseException:
            call.abandon(clock())
            raise
        finally:
            _release(current_deadline, mark)
            if repeating is not None:
                _release(current_layer, repeating)
        story.ended(error)
        if not guard.has_stand_in(error, args, kwargs):
            raise error
        return guard.stand_in(error, args, kwargs, story)
    finally:
        del error
