"""What has to happen around the tasks of a process?

    task_received              a message is sealed as it came, for the process that runs it
    before_task_publish        the claim, the proof and the trace become headers of the message
    task_prerun                they are judged, and in force until task_postrun
    worker_init                what ran in the process that only watches its pool is stopped: it would run twice after the fork
    worker_process_init        the mesh starts in the process that runs tasks
    worker_process_shutdown    telemetry is flushed, and the mesh ends; worker_shutdown where tasks run in the worker itself

Signals of Celery can't refuse a task, and what a receiver raises is only logged: `sender_required` refuses.

A message that isn't proved can't get a proved one out of a worker: what a task sends is signed only if the task itself was proved.
Otherwise whoever can write into the broker would have any task sent in our name, as the callback of another. For the same reason a worker
signs nothing outside of tasks: what Celery sends there for a message (after a hard time limit, a lost process, a task that couldn't begin)
looks like what an application sends there, as from `worker_ready`. A task that is sent again (`retry`) keeps its sender: the worker vouches
for what it has seen, and is believed by workers of its own service.

A run is nobody's until it is judged: if anything fails here (Celery logs that, and goes on), it stays so. What is believed of a request,
and why, says origin.py.

In a task that Celery repeats, calls of the mesh are sent once. Celery is the layer that retries there, and two that multiply are an
attack on whoever is in trouble; those further down are told so, too. In the first run of a task the mesh retries as ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from celery import signals

from meshlib import Mesh, Peer
from meshlib.call import current_layer

from . import trace
from .origin import FOLLOW, SEAL, Applied, Seals, enter_worker, in_worker, leave_worker
from .proof import Facts, Prover, Unproved, claimed_in
from .run import Run, current

log = logging.getLogger("meshlib_celery")

CLAIM: Final = "mesh-sender"
PROOF: Final = "mesh-proof"
# More than that is no count of retries.
MOST_RETRIES: Final = 10**6
# Seconds for which a proof is good, from the moment when the task is due. What waits longer in a queue has no sender any more.
WINDOW: Final = 3600.0

_installed: _Installed | None = None
_sending: ContextVar[tuple[str, Any] | None] = ContextVar("meshlib.celery.sending", default=None)


def install(mesh: Mesh, *, window: float = WINDOW) -> None:
    """Put the tasks of this process into the mesh; once. `window` is how many seconds a proof lasts, for those who judge it here."""
    global _installed
    if _installed is not None:
        raise RuntimeError("The tasks of this process are in the mesh already: meshlib_celery.install was called twice.")
    if not 0 < window <= 7 * 86400:
        raise ValueError(f"window={window!r}: seconds above 0 are expected, at most a week")
    _installed = _Installed(mesh, window)
    _installed.connect()


def uninstall() -> None:
    """Take it back. For tests."""
    global _installed
    installed, _installed = _installed, None
    if installed is not None:
        installed.disconnect()
    leave_worker()


class _Installed:
    def __init__(self, mesh: Mesh, window: float) -> None:
        self.mesh = mesh
        self.prover = Prover(mesh, window)
        self.seals = Seals()
        self.applied = Applied()
        self._receivers: list[tuple[Any, Callable[..., Any]]] = [
            (signals.before_task_publish, self._send),
            (signals.after_task_publish, self._sent),
            (signals.task_received, self._seal),
            (signals.task_prerun, self._begin),
            (signals.task_postrun, self._end),
            (signals.worker_init, self._rest),
            (signals.worker_process_init, self._start),
            (signals.worker_process_shutdown, self._stop),
            (signals.worker_shutdown, self._stop),
        ]

    def connect(self) -> None:
        self.applied.watch()
        for signal, receiver in self._receivers:
            signal.connect(receiver, weak=False)

    def disconnect(self) -> None:
        self.applied.unwatch()
        for signal, receiver in self._receivers:
            signal.disconnect(receiver)

    # ------------------------------------------------------------------------------------------------ those who send

    def _send(
        self, sender: Any = None, headers: Any = None, body: Any = None, routing_key: Any = None, exchange: Any = None, **_: Any
    ) -> None:
        if not isinstance(headers, dict) or "id" not in headers or not isinstance(body, tuple | list):
            return  # a message of the protocol before Celery 4, which has no headers
        # Those of a task that is sent again are those that it came with.
        headers.pop(PROOF, None)
        headers.pop(SEAL, None)
        self.mesh.start()
        name = str(headers.get("task") or sender)
        run = current.get()
        is_same = run is not None and run.id == headers["id"] and not run.is_eager
        span = trace.send(self.mesh, name, headers, str(routing_key or exchange or ""), is_again=is_same)
        _sending.set((headers["id"], span))
        # By `retry`; what `replace` sends is another task.
        is_again = is_same and run is not None and name == run.name and (headers.get("retries") or 0) > run.retries
        if not is_again:
            headers[CLAIM] = self.prover.own_id or self.mesh.service
        if not (run.may_vouch if run is not None else not in_worker()):
            return
        sent_by = run.sender.spiffe_id if is_again and run is not None and run.sender is not None else ""
        args, kwargs, follow = body
        try:
            proof = self.prover.sign(Facts.of(headers, name, args, kwargs, follow or {}), sent_by)
        except Unproved as error:
            log.warning("task %s is sent without a proof of its sender: %s", name, error)
            return
        if proof is not None:
            headers[PROOF] = proof

    def _sent(self, headers: Any = None, **_: Any) -> None:
        sending = _sending.get()
        if sending is not None and isinstance(headers, dict) and headers.get("id") == sending[0]:
            _sending.set(None)
            if sending[1] is not None:
                sending[1].end()

    # ------------------------------------------------------------------------------------------------ those who work

    def _seal(self, request: Any = None, **_: Any) -> None:
        self.seals.put(request, PROOF)

    def _begin(self, task_id: Any = None, task: Any = None, args: Any = None, kwargs: Any = None, **_: Any) -> None:
        outer = current.get()
        run = Run(str(task_id), name=str(task.name), is_eager=self.applied.take(task.name), outer=outer)
        run.token = current.set(run)
        told = vars(task.request)
        retries = told.get("retries")
        run.retries = retries if type(retries) is int and 0 < retries <= MOST_RETRIES else 0
        self.mesh.start()
        run.own_id = own = self.prover.own_id
        if run.is_eager:
            # A part of whatever called it, in its trace and with its deadline; that may be a stranger's message.
            run.may_vouch = outer.may_vouch if outer is not None else not in_worker()
            run.claimed = own or self.mesh.service
            run.sender = Peer(own) if own and run.may_vouch else None
            run.why = "what runs it has no proof" if own else "this service has no identity"
        else:
            enter_worker()
            self._judge(run, told, args, kwargs)
            end = trace.begin(self.mesh, task, run.sender)
            if end is not None:
                run.ends.append(end)
        if run.retries:
            layer = current_layer.set(run.retries)
            run.ends.append(lambda state, result: current_layer.reset(layer))

    def _judge(self, run: Run, told: Mapping[str, Any], args: Any, kwargs: Any) -> None:
        claim, proof = told.get(CLAIM), told.get(PROOF)
        run.claimed = claim[:2048] if isinstance(claim, str) else ""
        if proof is None:
            return
        try:
            if not self.seals.is_whole(run.id, told, proof):
                raise Unproved(
                    "the message contradicts itself, or was not received where meshlib_celery.install(mesh) was called"
                )
            follow = {word: told.get(word) for word in FOLLOW}
            run.sender = self.prover.judge(proof, Facts.of(told, run.name, args, kwargs, follow))
            run.may_vouch = True
        except Unproved as error:
            run.why = f"its proof doesn't count, {error}"
            log.warning("task %s[%s] is not proved to be from %s: %s", run.name, run.id, claimed_in(proof) or "anybody", error)

    def _end(self, task_id: Any = None, retval: Any = None, state: Any = None, **_: Any) -> None:
        run = current.get()
        if run is None or run.id != str(task_id) or run.token is None:
            return
        for end in reversed(run.ends):
            # Another context than that of the beginning (some pools): nothing of ours is in force there.
            with contextlib.suppress(ValueError):
                end(state, retval)
        try:
            current.reset(run.token)
        except ValueError:
            current.set(run.outer)

    # ------------------------------------------------------------------------------------------------ the processes

    def _rest(self, **_: Any) -> None:
        self.mesh.close()

    def _start(self, **_: Any) -> None:
        self.mesh.start()

    def _stop(self, **_: Any) -> None:
        trace.flush()
        self.mesh.close()
