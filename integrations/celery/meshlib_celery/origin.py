"""Has a message begun this, or our own code?

A message must not answer that itself. Celery builds `task.request` from the headers of the message and from the third part of its body,
each over the other: `is_eager`, `id`, `eta`, `called_directly` are whatever a stranger wrote there. So the answer is taken from where no
message comes to:

    an eager run        `Task.apply` was called here, in this context: it leaves a mark that the run takes away. Celery has no signal for that,
                        so `apply` is wrapped while `install` is in force. A class with an `apply` of its own isn't vouched for
    a message           the process that received it has seen it whole (`task_received`), before the parts were mixed, and leaves a seal
                        in what it hands to its pool. A message whose third part holds more than what follows gets none: it would contradict
                        its own headers. A seal is made with a secret of this process, which those that it forks have, too
    a worker            each process that receives messages or runs what others have received, from then on. Celery does things there
                        for a message while no task runs: errbacks after a hard time limit or a lost process, callbacks of what can't begin.
                        That can't be told from code of the application. So in a worker, nothing is ours that doesn't say so

Of a request, these are believed: `id`, `eta`, `expires`, `retries`, `timelimit`, `callbacks`, `errbacks`, `chain`, `chord`, if the seal is
right and the proof is for just these. Never: `is_eager`, `headers`, `delivery_info`, `origin`, `group`, `root_id`, `parent_id`, `reply_to`,
`shadow`, `stamps`. Name, arguments and `called_directly` are the tracer's, which sets them last. Unproved are, and only for what harms nobody:
`mesh-sender` (told as a claim), `retries` (our calls are repeated less), the trace (checked, and its sampled flag doesn't count).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

from celery import Task, signals

FOLLOW: Final = frozenset({"callbacks", "errbacks", "chain", "chord"})
SEAL: Final = "mesh-seal"

_is_worker = False
_begun: ContextVar[list[str] | None] = ContextVar("meshlib.celery.begun", default=None)


def in_worker() -> bool:
    """Whether this process handles messages: in doubt, what happens here happens for one of them."""
    return _is_worker


def enter_worker(**_: Any) -> None:
    global _is_worker
    _is_worker = True


def leave_worker(**_: Any) -> None:
    global _is_worker
    _is_worker = False


# Also where nobody calls `install`: what is guarded is guarded.
for _signal in (signals.celeryd_init, signals.worker_init, signals.worker_process_init, signals.task_received):
    _signal.connect(enter_worker, weak=False)
# A worker's beat (-B) is a process of its own, and no messages come there.
signals.beat_embedded_init.connect(leave_worker, weak=False)


class Seals:
    """Says in one process of a worker, and knows in another, that a message was seen whole."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def put(self, request: Any, proof_name: str) -> None:
        """`request` is that of the worker: what it hands on are the headers, and our seal among them."""
        handed = request.request_dict
        handed.pop(SEAL, None)
        payload = request.message.payload
        if not isinstance(payload, list | tuple) or len(payload) != 3:
            return
        follow = payload[2] or {}
        if isinstance(follow, Mapping) and FOLLOW.issuperset(follow) and isinstance(proof := handed.get(proof_name), str):
            handed[SEAL] = self._of(str(request.id), proof)

    def is_whole(self, task_id: str, told: Mapping[str, Any], proof: Any) -> bool:
        """`told` is what the request holds in the process that runs the task."""
        seal = told.get(SEAL)
        if not isinstance(seal, str) or not isinstance(proof, str) or told.get("id") != task_id:
            return False
        return hmac.compare_digest(seal.encode(), self._of(task_id, proof).encode())

    def _of(self, task_id: str, proof: str) -> str:
        return hmac.new(self._secret, f"{task_id}\n{proof}".encode(), hashlib.sha256).hexdigest()


class Applied:
    """Watches `Task.apply`, so that an eager run is known by its call."""

    def __init__(self) -> None:
        self._original: Any = None
        self._watched: Any = None

    def watch(self) -> None:
        original = self._original = Task.apply

        @wraps(original)
        def apply(task: Any, *args: Any, **kwargs: Any) -> Any:
            token = _begun.set([task.name])
            try:
                return original(task, *args, **kwargs)
            finally:
                _begun.reset(token)

        self._watched = Task.apply = apply

    def unwatch(self) -> None:
        # Whoever has wrapped it after us keeps ours below: it only leaves marks that nobody takes.
        if Task.apply is self._watched:
            Task.apply = self._original

    @staticmethod
    def take(name: str) -> bool:
        """Whether the run that begins now is that of an `apply`. Once for each."""
        mark = _begun.get()
        if not mark or mark[0] != name:
            return False
        mark.clear()
        return True
