"""What is known of a guarded function, and what becomes of a call of it that does not simply succeed?

`Guard` is made once, by the decorator; `Story` from the first failure of a call on, or from its beginning where somebody wants to be
told. Neither waits: the drivers in `function.py` do, one for coroutines and one for threads, so that what is decided stands once.

An exception is an answer of the dependency that says "failed", and is told to the engine as one: a response, whose status says whether it
may be repeated. As a response it is a failure in the breaker's row, so that five of them open it, while the outcome of a dead
connection would eject at once; and the wait that a strategy of tenacity wants goes along as what the answer itself asks for.

What says nothing of the dependency is not told to the engine as a failure: exceptions of `ignore`, a call with arguments that don't fit
(nothing was called), and the end of a caller's deadline that came before the guard's own. Callers in a hurry must not take the
dependency from the patient ones; so a guard whose callers all bring short deadlines learns of a hanging dependency from its
`timeout`, its `per_try` or `breaker.slow`, not from them.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import types
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from .. import errors
from .._native import core
from ..call import MARK, Call, CallPolicy, outer_layer, peer
from ..retry.fallback import LAST_GOOD, Fallbacks, Kept, LastGood, word_of
from .listeners import Listened
from .stand_in import fallbacks_of, is_outage

if TYPE_CHECKING:
    from ..mesh import Mesh

Enter = Callable[[str, float, "float | None", bool, "int | None"], "tuple[core.Call, int, float]"]

log = logging.getLogger("meshlib.retry")
clock = time.monotonic
# A failure in the row of the breaker, in the engine's words: one that may be repeated, and one that may not. Neither ejects at once, as a
# dead connection would. A guard's route has the first among its `statuses`, never the second.
REPEATABLE, FINAL = 503, 500
# No attempt yet: the call waits for a permit.
NO_TOKEN = 2**32 - 1
_GOOD = core.OUTCOME_RESPONSE
# The reason of an attempt that was cut before the call's end.
PER_TRY = "retry.per_try"
# The moment of the engine goes through a whole number of nanoseconds.
_SAME = 1e-6
# What a blocking function returns where its work has only begun.
UNFINISHED = frozenset((types.CoroutineType, asyncio.Future, asyncio.Task))


class Guard:
    """One guarded function with its settings: all that is known before the first call."""

    __slots__ = (
        "__weakref__", "counted", "enter", "fallback", "function", "idempotent", "ignore", "is_bare", "kept", "label",
        "listened", "mesh", "name", "retries", "retry_on", "stop", "timeout", "title", "wait",
    )  # fmt: skip

    def __init__(
        self,
        mesh: Mesh,
        name: str,
        policy: CallPolicy,
        retry_on: tuple[type[BaseException], ...],
        ignore: tuple[type[BaseException], ...],
        listeners: tuple[Any, ...],
        function: Callable[..., Any],
    ) -> None:
        self.mesh, self.name, self.function = mesh, name, function
        self.label = f"guard:{name}"
        self.title = getattr(function, "__qualname__", None) or repr(function)
        self.idempotent, self.retries, self.timeout = bool(policy.idempotent), policy.retries, policy.timeout
        self.wait, self.stop, self.fallback = policy.wait, policy.stop, policy.fallback
        self.retry_on, self.ignore = retry_on, ignore
        self.listened = Listened(self.label, listeners) if listeners else None
        self.kept = Fallbacks() if isinstance(policy.fallback, LastGood) else None
        self.counted = fallbacks_of(mesh.outbound)
        # Nobody has to be told of a good end.
        self.is_bare = self.listened is None and self.kept is None
        self.enter: Enter = self._first
        mesh.guards.add(self)

    def _first(self, name: str, now: float, end: float | None, idempotent: bool, retries: int | None) -> Any:
        """The first call starts what the mesh needs beside it; a decorator must not, it runs at import."""
        self.mesh.start()
        if not inspect.iscoroutinefunction(self.function) and self.mesh.config.guard(self.name).retry.per_try:
            log.warning("retry.per_try of the guard %r doesn't cut %s: a blocking function can't be cut", self.name, self.title)
        return self._again(name, now, end, idempotent, retries)

    def _again(self, name: str, now: float, end: float | None, idempotent: bool, retries: int | None) -> Any:
        wake = self.mesh.outbound.wake
        if wake is not None:
            wake()
        self.enter = entrance(self.mesh, self.name, self.timeout)
        return self.enter(name, now, end, idempotent, retries)

    def renew(self) -> None:
        """Something is new: the process, after a fork, or the configuration. The next call looks."""
        if self.enter != self._first:
            self.enter = self._again

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A good answer, which may stand in for a later one."""
        if self.kept is not None:
            try:
                self.kept.keep(key_of(args, kwargs), result, clock())
            except Exception:
                # Whatever an argument's own __hash__ says: the answer is good.
                log.debug("an answer of %s isn't kept: its arguments can't be hashed", self.title)

    def drop(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """There is another answer now, in the form of an exception."""
        if self.kept is not None:
            try:
                self.kept.drop(key_of(args, kwargs))
            except Exception:
                log.debug("nothing is kept for these arguments of %s: they can't be hashed", self.title)

    def found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kept | None:
        """The last good answer, if it is young enough."""
        assert self.kept is not None
        try:
            return self.kept.find(key_of(args, kwargs), self.fallback.max_age, clock())
        except Exception:
            return None

    def is_misused(self, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Is it that the arguments don't fit, so that nothing was called?"""
        if type(error) is not TypeError:
            return False
        try:
            # Not what a decorator further in claims to be: its own arguments are those that came.
            signature = inspect.signature(self.function, follow_wrapped=False)
        except (TypeError, ValueError):
            return False
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return True
        return False

    def unfinished(self, result: Any) -> TypeError:
        """A blocking function has returned what somebody else would have to await: a guard that only looks like one is a trap."""
        if isinstance(result, types.CoroutineType):
            result.close()
        else:
            result.cancel()
        return TypeError(
            f"the guarded {self.title} is no async function, but returned a {type(result).__name__}: its work would be done outside "
            "the guard. Write `async def` and await it inside."
        )

    def late(self, error: BaseException) -> errors.DeadlineExceeded:
        made = errors.DeadlineExceeded(
            f"the guarded {self.title} did not end within its deadline.",
            hint=f"Raise `timeout` of the guard {self.name!r} or the caller's deadline.",
        )
        made.__cause__ = error
        return made

    def cut(self, error: BaseException, at: float, end: float) -> errors.MeshError:
        """It was cancelled by us: at the call's end, or before, since there may be another attempt."""
        if at >= end:
            return self.late(error)
        made = errors.AttemptTimeout(
            f"an attempt of the guarded {self.title} took longer than `retry.per_try`.",
            hint=f"Raise `per_try` of the guard {self.name!r}, or look what the function waits for.",
            reason=PER_TRY,
        )
        made.__cause__ = error
        return made

    def has_stand_in(self, error: BaseException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a fallback is meant for this error: an outage, and no mistake in the program or the configuration."""
        if self.fallback is ... or not isinstance(error, Exception) or isinstance(error, self.ignore):
            return False
        if isinstance(error, errors.MeshError):
            return is_outage(error)
        return not self.is_misused(error, args, kwargs)

    def stand_in(self, error: Any, args: tuple[Any, ...], kwargs: dict[str, Any], story: Story | None) -> Any:
        """What the fallback answers, maybe an awaitable. Raises the error where it has no answer."""
        fallback = self.fallback
        word = word_of(fallback)
        answer = fallback
        if word == LAST_GOOD:
            found = self.found(args, kwargs)
            if found is None:
                raise error
            answer = found.answer
        elif callable(fallback):
            answer = fallback(error)
        self.counted.count(self.label, word)
        if story is not None and story.record is not None:
            story.record.fallback = word
        return answer


def key_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What makes two calls of a function the same question: equal arguments of the same types, on behalf of the same peer."""
    caller = peer()
    return (
        None if caller is None else caller.spiffe_id,
        _typed(args),
        tuple((name, _typed(kwargs[name])) for name in sorted(kwargs)),
    )


def _typed(value: Any) -> Hashable:
    # 1, 1.0 and True are the same key otherwise.
    kind = type(value)
    return (kind, *map(_typed, value)) if kind is tuple else (kind, value)


class Story:
    """A call from its first failure on (or from its beginning, where somebody wants to be told): asks the engine, and never waits."""

    __slots__ = ("args", "attempt", "begun", "call", "guard", "idle", "kwargs", "layer", "outer", "record", "token")

    def __init__(
        self, guard: Guard, call: core.Call, token: int, begun: float, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.guard, self.call, self.token, self.begun = guard, call, token, begun
        self.args, self.kwargs = args, kwargs
        self.attempt = 1
        self.idle = 0.0
        # Above 0 somebody further up is repeating already, and isn't multiplied.
        self.layer = outer_layer()
        # The caller's own end, if it has one; and what is told of the call once it has failed.
        self.outer: float | None = None
        self.record: Call | None = None

    def began(self) -> None:
        if self.guard.listened is not None:
            self.guard.listened.before(self.call, self.guard.function, self.args, self.kwargs)

    def good(self, result: Any) -> None:
        self.call.head(self.token, _GOOD, 200, clock(), -1.0, True)
        self.guard.keep(self.args, self.kwargs, result)
        if self.guard.listened is not None:
            self.guard.listened.good(self.call)

    def failed(self, error: BaseException) -> bool:
        """Tell the engine what became of the attempt; True if another one is due."""
        guard, call, now = self.guard, self.call, clock()
        if self._is_no_news(error, now):
            call.abandon(now)
            return self._told(error, is_failure=False)
        # One that has a call was cut in a guard further in, and is an error like another.
        is_cut = isinstance(error, errors.AttemptTimeout) and error.reason == PER_TRY and error.call is None
        is_due = guard.idempotent and (is_cut or isinstance(error, guard.retry_on)) and self.layer == 0
        seconds = -1.0
        if is_due and (guard.wait is not None or guard.stop is not None) and call.has_attempts_left:
            try:
                seconds, is_due = self._asked(error, now)
            except BaseException:
                call.abandon(now)
                raise
        outcome, status = core.OUTCOME_RESPONSE, REPEATABLE if is_due else FINAL
        if (is_cut or isinstance(error, errors.DeadlineExceeded)) and (is_due or not guard.idempotent):
            outcome, status = core.OUTCOME_TIMEOUT, 0
        verdict = call.head(self.token, outcome, status, now, seconds, True)
        if verdict != core.DELIVER and not is_due:
            # Only where `statuses` of this guard names what is no status of its own.
            call.abandon(now)
        return self._told(error, is_failure=True) and is_due and verdict != core.DELIVER

    def _is_no_news(self, error: BaseException, now: float) -> bool:
        """Does it say nothing of the dependency?"""
        guard = self.guard
        if not isinstance(error, Exception):
            # The caller gave up.
            return True
        if isinstance(error, guard.ignore):
            # An answer in the form of an exception.
            guard.drop(self.args, self.kwargs)
            return True
        if isinstance(error, errors.DeadlineExceeded):
            # The guard itself would have had more time.
            return self.outer is not None and now >= self.outer and self.outer <= self.call.deadline + _SAME
        return guard.is_misused(error, self.args, self.kwargs)

    def _told(self, error: BaseException, *, is_failure: bool) -> bool:
        if is_failure and self.guard.listened is not None:
            self.guard.listened.failed(self.call, error)
        return is_failure

    def _asked(self, error: BaseException, now: float) -> tuple[float, bool]:
        """tenacity's word: seconds until the next attempt (-1.0: ours), and whether there is one."""
        from ..retry.tenacity import should_stop, state_of, wait_of

        guard, seconds = self.guard, -1.0
        state = state_of(
            self.attempt, self.begun, now, self.idle, error, function=guard.function, args=self.args, kwargs=self.kwargs
        )
        if guard.wait is not None:
            seconds = wait_of(guard.wait, state)
        return seconds, guard.stop is None or not should_stop(guard.stop, state)

    def pause(self) -> float:
        """Seconds to wait before the attempt; 0.0: it goes now. Raises `MeshError` if the engine lets none go."""
        step = self.call.next(clock())
        if step[0] == core.SEND:
            self.token = step[1]
            return 0.0
        seconds = max(float(step[1]), 1e-4) if step[0] == core.WAIT else 1e-3
        self.idle += seconds
        return seconds

    def refused(self, error: BaseException | None, refusal: errors.MeshError) -> BaseException:
        """The engine lets no attempt go: which error is the call's?"""
        if self.guard.listened is not None:
            self.guard.listened.refused(refusal)
        return refusal if error is None else error

    def ended(self, error: BaseException) -> None:
        """Attempts are over. The record can be found from the error, which is otherwise left as it is."""
        self.record = call = Call(self.call, "CALL", self.guard.title)
        if isinstance(error, errors.MeshError) and error.call is None:
            error.call = call
        try:
            setattr(error, MARK, call)
        except AttributeError:
            log.debug("the record of a call doesn't hang on a %s: it takes no attributes", type(error).__name__)


def entrance(mesh: Mesh, name: str, timeout: float | None) -> Enter:
    """`begin` and `next` of a guard's call in one crossing."""
    enter: Any = mesh.engine.guard
    if any(part.kind == "peer" for rate in mesh.config.guard(name).rates for part in rate.by):

        def personal(label: str, now: float, end: float | None, idempotent: bool, retries: int | None) -> Any:
            caller = peer()
            return enter(label, now, end, idempotent, retries, timeout, None if caller is None else caller.spiffe_id)

        return personal
    if timeout is None:
        return enter  # type: ignore[no-any-return]

    def timed(label: str, now: float, end: float | None, idempotent: bool, retries: int | None) -> Any:
        return enter(label, now, end, idempotent, retries, timeout)

    return timed
