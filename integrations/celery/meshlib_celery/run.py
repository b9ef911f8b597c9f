"""Who sent the task that runs now?

The question is answered once, when a task begins, by the clock of that moment: a task that runs for an hour doesn't lose its sender. A
context variable keeps the answer for the code of the task; threads that a task starts by itself don't have it.

A task that nobody sent has no sender: one that is called as a function is a function. One that runs eagerly (`apply`, `task_always_eager`)
was sent by this very process, unless that runs it for a message that nobody has proved. In a worker, whatever happens outside of tasks may
happen for a message, too (Celery calls errbacks as functions): what is guarded refuses there.

Nothing here believes the request: it is only asked whether what is in force is for another task, and then nobody has sent this one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Final, TypeVar, cast

from celery import current_task

from meshlib import Peer

from .origin import in_worker

Function = TypeVar("Function", bound=Callable[..., Any])


class SenderRefused(PermissionError):
    """The task is only for senders who prove who they are, and this one didn't, or is another."""


@dataclass(slots=True)
class Run:
    """One task that runs; at first, nobody's. `own_id` is ours. `may_vouch`: what is sent from here is signed."""

    id: str
    sender: Peer | None = None
    claimed: str = ""
    why: str = "the message has no proof"
    own_id: str = ""
    name: str = ""
    may_vouch: bool = False
    is_eager: bool = False
    retries: int = 0
    outer: Run | None = None
    ends: list[Callable[[Any, Any], object]] = field(default_factory=list)
    token: Token[Run | None] | None = None


current: Final[ContextVar[Run | None]] = ContextVar("meshlib.celery.run", default=None)


def sender() -> Peer | None:
    """Who sent the task that runs now, proved by their signature; None for whoever proved nothing, and outside of tasks."""
    run = _run()
    return None if run is None else run.sender


def claimed_sender() -> str:
    """Who the message of this task says that it is from: a SPIFFE ID, or the name of a service without one. Anybody can write that."""
    run = _run()
    return "" if run is None else run.claimed


def sender_required(*senders: str) -> Callable[[Function], Function]:
    """A task that fails with `SenderRefused`, unless one of these has proved that they sent it; without names, anybody who proves that.

    A sender is a SPIFFE ID, or the name of a service beside our own: same trust domain, same namespace. It stands below `@app.task`.
    """

    def decorate(function: Function) -> Function:
        if not callable(function) or hasattr(function, "apply_async"):
            raise TypeError("sender_required stands below @app.task, and has brackets: @sender_required().")

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            _judge(senders)
            return function(*args, **kwargs)

        return cast("Function", guarded)

    return decorate


def _judge(senders: tuple[str, ...]) -> None:
    run = _run()
    if run is None:
        if in_worker():
            raise SenderRefused(
                "the task is only for senders who prove who they are, and was called as a function outside of tasks, in a worker: "
                "Celery does that for messages, too (errbacks). Send it from a task that was sent by such a sender."
            )
        return
    if run.sender is None:
        raise SenderRefused(
            f"the task is only for senders who prove who they are, and {run.claimed or 'this one'} didn't: {run.why}. "
            "Whoever sends it needs an identity in mesh.yaml and meshlib_celery.install(mesh), as does this worker."
        )
    above = run.own_id.rpartition("/")[0]
    allowed = [each if each.startswith("spiffe://") else f"{above}/{each}" for each in senders]
    if senders and run.sender.spiffe_id not in allowed:
        raise SenderRefused(f"the task is not for {run.sender.spiffe_id}, but for {', '.join(senders)}.")


def _run() -> Run | None:
    """The task that runs now; None where no message has brought us here. What nobody has judged has no sender."""
    run = current.get()
    request = current_task.request if current_task else None
    if request is None or request.called_directly:
        return run
    if run is None or run.id != request.id:
        return Run(str(request.id), why="meshlib_celery.install(mesh) was not called in this worker")
    return run
