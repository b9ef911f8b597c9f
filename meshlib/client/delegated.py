"""How does an attempt go out by the agent of this node, and what if the agent is not there?

For services with `delegate: agent` the attempt is handed to the agent over its UNIX socket: plain HTTP with five headers that say as
whom we call, where to, whom to expect there, what to speak and how long a connection may take. The agent makes exactly one attempt,
with TLS and connections that all processes of the node share. Who is asked, how often, and what an answer means is decided here as
ever: the carriers of `loop.py` and `thread.py` move the bytes, and what the agent says of a failure (`x-mesh-failed`) becomes the very
error that this process would have met itself.

The agent is never needed. If it can't be reached, breaks off or falls silent (`delegated_agent.py`), the same attempt is sent by this
process, within the same deadline: neither the engine nor the caller notices. If something of it may have reached the endpoint already,
that holds for idempotent calls only; any other fails as one that was cut off. An agent that fails says nothing of an endpoint, so that
none of this counts against one.

A body that is streamed is not begun before the agent has a connection to the endpoint: it asks for it then (`upload.py`). HTTP/2 has no
such word here: what the agent takes before is kept (`replay.py`). So an attempt that never had a connection leaves the body whole.

It chooses no endpoint and repeats nothing on its own account.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from .. import errors
from .._native import core
from ..secure.workload.address import agent_uid
from .connection import HTTP1, key_of
from .delegated_agent import AS, AWAY, CLOSED, GONE, SILENT, AgentLoop, AgentSocket, AgentWatch, describe, text_of
from .faults import AGENT_CLOSED, AGENT_SILENT, CONNECT_TIMEOUT, DECLINED, STALE, UNWRITTEN
from .loop import LoopCarrier
from .pool import Key, Ledger
from .replay import Replay
from .thread import Connection, ThreadCarrier
from .way import Attempt, Headers, Incoming, Reply, _whole

if TYPE_CHECKING:
    import socket

    from ..config import Config
    from ..keeper import Keeper

ENDPOINT: Final = b"x-mesh-endpoint"
EXPECT: Final = b"x-mesh-expect"
PROTOCOL: Final = b"x-mesh-protocol"
CONNECT: Final = b"x-mesh-connect"
FAILED: Final = b"x-mesh-failed"
# Between us and the agent only. What an application writes under these names is not passed on: it could choose the endpoint.
RESERVED: Final = frozenset({ENDPOINT, EXPECT, PROTOCOL, CONNECT, AS, FAILED, b"x-mesh-handed"})

# Who carried an attempt, as records and spans tell it.
BY_AGENT: Final = "agent"
# Why it was this process after all: known to be away; nobody listens; its queue is full; silent, broken off; unable by its own word.
REASONS: Final = (AWAY, GONE, "full", SILENT, CLOSED, "unable")

_KINDS: Final[dict[bytes, tuple[type[errors.AttemptFailed], str | None]]] = {
    b"connect": (errors.ConnectFailed, None),
    b"connect_timeout": (errors.ConnectFailed, CONNECT_TIMEOUT),
    b"identity": (errors.PeerIdentityError, None),
    b"tls": (errors.TlsError, None),
    b"unwritten": (errors.ConnectionLost, UNWRITTEN),
    b"stale": (errors.ConnectionLost, STALE),
    b"declined": (errors.ConnectionLost, DECLINED),
    b"closed": (errors.ConnectionLost, None),
    b"protocol": (errors.ProtocolError, None),
    b"caller": (errors.ConnectionLost, "send.client_closed"),  # our own doing, and nobody else's fault
}


class Delegation:
    """What a mesh delegates, and to whom. State of the process. `services` are the delegated ones."""

    def __init__(self, keeper: Keeper, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.ledger = ledger
        self.services: frozenset[str] = frozenset()
        self.identity = ""
        self.agent = AgentSocket("")
        self.watch = AgentWatch(keeper, self.agent, clock)
        self.watch.on_away = self._on_away
        self._sent = core.Tally()
        self._fallbacks = {reason: core.Tally() for reason in REASONS}
        self._delegates: WeakSet[Delegate] = WeakSet()
        self._lock = threading.Lock()

    def follow(self, config: Config) -> None:
        """Take over a configuration."""
        policy = config.agent
        names = () if policy is None else (name for name, service in config.services.items() if service.is_delegated)
        if policy is not None and policy.data != self.agent.path:
            uid = agent_uid()
            self.use(AgentSocket(policy.data, frozenset() if uid is None else frozenset({uid})))
        self.services = frozenset(names)
        self.identity = self.watch.identity = config.own.identity

    def use(self, agent: AgentSocket) -> None:
        """The socket where the agent is from now on. Connections to another one go when they are idle."""
        self.agent = agent
        self.watch.use(agent)
        for delegate in self._all():
            delegate.use(agent)

    def jobs(self) -> list[AgentWatch]:
        """Start the keeper's work."""
        return self.watch.jobs()

    def carrier(self, carrier: Any) -> Any:
        """What carries an attempt of a delegated service in the place of `carrier`."""
        found = getattr(carrier, "delegate", None)
        if found is not None:
            return found
        if isinstance(carrier, LoopCarrier):
            made: Delegate = LoopDelegate(self, carrier)
        elif isinstance(carrier, ThreadCarrier):
            made = ThreadDelegate(self, carrier)
        else:
            return carrier  # of a test, which moves no bytes
        with self._lock:
            if carrier.delegate is None:
                carrier.delegate = made
                self._delegates.add(made)
        return carrier.delegate

    # --- what becomes of attempts

    def reach(self, now: float) -> str:
        """For a library that connects by itself: why the agent can't be had now, "" if it can."""
        if self.watch.is_away:
            return AWAY
        self.watch.used(now)
        return ""

    def sent(self) -> None:
        self._sent.add(1, 0)

    def fell_back(self, reason: str) -> None:
        self._fallbacks[reason].add(1, 0)

    def is_gone(self) -> bool:
        """Right after something broke: is the agent itself gone? Asked where that is the only way to know."""
        if not self.watch.is_away:
            try:
                self.agent.check()
            except BlockingIOError:
                return False
            except OSError as error:
                self.watch.tell(GONE, str(error))
                return True
        return self.watch.is_away

    def stats(self) -> dict[str, Any]:
        """All numbers as plain data: sent by the agent, by this process and why, and how the agent stands."""
        fallbacks = {reason: tally.read()[0] for reason, tally in self._fallbacks.items()}
        return {
            "socket": self.agent.path,
            "services": sorted(self.services),
            "sent": self._sent.read()[0],
            "fallbacks": fallbacks,
            **describe(self.watch, self._clock()),
        }

    def _on_away(self, event: str) -> None:
        """Whoever waits for an agent that is silent would wait in vain. One that is gone closes its connections by itself."""
        if event == SILENT:
            for delegate in self._all():
                delegate.cut()

    def _all(self) -> list[Delegate]:
        with self._lock:
            return list(self._delegates)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._delegates = WeakSet()
        self.watch.after_fork()

    def __repr__(self) -> str:
        return f"<Delegation of {len(self.services)} services to {self.agent.path}: {self.watch.state}>"


class AgentAttempt(Attempt):
    """An attempt on its way to the agent. `is_repeatable`: it may be sent again after it may have been processed.

    `is_answered`: its answer is the application's, maybe while it still comes. `is_on_demand`: see `upload.py`.
    """

    __slots__ = ("is_answered", "is_on_demand", "is_repeatable")
    is_answered: bool
    is_on_demand: bool
    is_repeatable: bool


def may_end(attempt: Attempt) -> bool:
    """Is this attempt to be given up when the agent is silent? What can't be sent again may still be answered."""
    return isinstance(attempt, AgentAttempt) and attempt.is_repeatable and not attempt.is_answered


class Delegate:
    """A carrier that has attempts carried by the agent, and carries them itself where that fails. Belongs to the carrier beside it."""

    def __init__(self, delegation: Delegation, beside: Any, own: Any) -> None:
        self._delegation = delegation
        self._watch = delegation.watch
        self._beside = beside
        self._own = own
        self.can_overlap: bool = beside.can_overlap

    async def sleep(self, seconds: float) -> None:
        await self._beside.sleep(seconds)

    def exchange(self, attempt: Attempt) -> Awaitable[Reply]:
        if self._watch.state is AWAY:
            attempt.by = AWAY
            self._delegation.fell_back(AWAY)
            return self._by_us(attempt)
        if is_here(attempt.address) or expects(attempt):
            return self._by_us(attempt)
        self._watch.used(attempt.now)
        return self._by_agent(attempt)

    def _by_us(self, attempt: Attempt) -> Awaitable[Reply]:
        if isinstance(attempt.body, Replay):
            attempt.body.is_held = False
        return self._beside.exchange(attempt)  # type: ignore[no-any-return]

    async def _by_agent(self, attempt: Attempt) -> Reply:
        delegation = self._delegation
        sent = handed_over(attempt, delegation.agent.address, delegation.identity)
        attempt.by = BY_AGENT
        delegation.sent()
        try:
            reply: Reply = await self._own.exchange(sent)
            if not isinstance(reply[4], bytes) and sent.is_repeatable:
                # What breaks off while a short body comes can still be asked for again.
                reply = await _whole(reply)
            self._answered(sent)
        except errors.AttemptFailed as error:
            attempt.by = why = self._judged(error, attempt, sent)
        else:
            failed = next((value for name, value in reply[3] if name == FAILED), None)
            if failed is None:
                if isinstance(attempt.body, Replay):
                    await attempt.body.release()
                return reply if isinstance(reply[4], bytes) else (*reply[:4], _Body(reply[4], delegation, attempt.address))
            failure = failure_of(failed, await text_of(reply))
            if failure is not None:
                raise failure
            if isinstance(attempt.body, Replay) and attempt.body.is_lost:
                # What is left of it would go out as if it were the whole.
                raise agent_lost(is_written=False)
            attempt.by = why = "unable"
        delegation.fell_back(why)
        attempt.now = self._now()
        return await self._by_us(attempt)

    def _judged(self, error: errors.AttemptFailed, attempt: Attempt, sent: AgentAttempt) -> str:
        """The agent has failed under an attempt. Why this process may send it again, or the error that its caller gets."""
        watch, reason = self._watch, error.reason
        if isinstance(error, errors.ConnectFailed):
            if isinstance(error.__cause__, BlockingIOError):
                watch.soon()
                return "full"
            watch.tell(GONE, str(error.__cause__ or error))
            return GONE
        if reason == "send.client_closed":
            raise error
        has_time = self._now() < attempt.head_end
        if isinstance(error, errors.AttemptTimeout) and reason != AGENT_SILENT and not watch.is_overdue:
            # It answers, and so it is the endpoint that is slow.
            raise named(error, sent.address, attempt.address)
        watch.soon()
        is_lost = isinstance(attempt.body, Replay) and attempt.body.is_lost
        if has_time and not is_lost and (sent.is_repeatable or reason in (UNWRITTEN, DECLINED)):
            return SILENT if isinstance(error, errors.AttemptTimeout) else CLOSED
        if isinstance(error, errors.ProtocolError) and not sent.is_repeatable:
            # It asked for the body, and broke off without an answer.
            raise agent_lost(is_written=True)
        raise of_agent(named(error, sent.address, attempt.address))

    def _now(self) -> float:
        raise NotImplementedError

    def _answered(self, sent: AgentAttempt) -> None:
        """What still comes of the answer is the application's."""
        sent.is_answered = True

    def use(self, agent: AgentSocket) -> None:
        self._own.agent = agent

    def cut(self) -> None:
        """The agent is silent: what may be sent again is given up there. From any thread."""
        raise NotImplementedError

    def close(self) -> None:
        self._own.close()
        self._delegation.ledger.retire(self._own.pool)


class LoopDelegate(Delegate):
    """For the attempts of one event loop."""

    def __init__(self, delegation: Delegation, beside: LoopCarrier) -> None:
        own = AgentLoop(beside.loop, delegation.ledger.open(), delegation.agent)
        super().__init__(delegation, beside, own)

    def _now(self) -> float:
        now: float = self._own.loop.time()
        return now

    def cut(self) -> None:
        with suppress(RuntimeError):  # its loop is closed
            self._own.loop.call_soon_threadsafe(self._own.cut, may_end, _silent())

    def bury(self) -> None:
        self._own.bury()
        self._delegation.ledger.retire(self._own.pool)


class ThreadDelegate(Delegate):
    """For those of threads."""

    def __init__(self, delegation: Delegation, beside: ThreadCarrier) -> None:
        super().__init__(delegation, beside, AgentThreads(delegation.ledger, delegation.agent))

    def _now(self) -> float:
        return time.monotonic()

    def _answered(self, sent: AgentAttempt) -> None:
        super()._answered(sent)
        self._own.end(sent)

    def cut(self) -> None:
        self._own.cut()

    def sweep(self) -> None:
        self._own.sweep()


class AgentThreads(ThreadCarrier):
    """The connections of all threads to the agent."""

    def __init__(self, ledger: Ledger, agent: AgentSocket) -> None:
        super().__init__(ledger)
        self.agent = agent
        # What can be cut: until its answer is whole, or the application's.
        self._busy: dict[AgentAttempt, AgentConnection] = {}

    def connect(self, attempt: Attempt, key: Key) -> Connection:
        return AgentConnection(self, attempt, key)

    def begin(self, connection: AgentConnection, attempt: AgentAttempt) -> None:
        self._busy[attempt] = connection

    def end(self, attempt: AgentAttempt) -> None:
        connection = self._busy.get(attempt)
        if connection is not None:
            connection.spare(attempt)

    def drop(self, attempt: Any) -> None:
        self._busy.pop(attempt, None)

    def is_busy(self, attempt: AgentAttempt) -> bool:
        return attempt in self._busy

    def cut(self) -> None:
        for attempt, connection in list(self._busy.items()):
            if may_end(attempt):
                connection.cut(attempt)


class AgentConnection(Connection):
    """One of them. Another thread may end it, while its own waits."""

    __slots__ = ("_agents", "_ending", "_is_cut")

    def __init__(self, carrier: AgentThreads, attempt: Attempt, key: Key) -> None:
        self._agents = carrier
        self._ending = threading.Lock()
        self._is_cut = False
        super().__init__(carrier, attempt, key)

    def dial(self, attempt: Attempt) -> socket.socket:
        return self._agents.agent.open()

    def exchange(self, attempt: Attempt) -> Reply:
        assert isinstance(attempt, AgentAttempt)
        self._agents.begin(self, attempt)
        try:
            return super().exchange(attempt)
        except errors.AttemptFailed:
            if self._is_cut:
                raise _silent() from None
            raise

    def read(self) -> bytes:
        try:
            return super().read()
        except errors.AttemptFailed:
            if self._is_cut:
                raise _silent() from None
            raise

    def cut(self, attempt: AgentAttempt) -> None:
        with self._ending:
            # Never a number that has gone to another file, nor the next attempt over the same connection.
            if self._agents.is_busy(attempt) and not self.is_closed():
                self._is_cut = True
                self.hang_up()

    def spare(self, attempt: Attempt | None) -> None:
        """From now on it isn't cut."""
        with self._ending:
            self._agents.drop(attempt)

    def _over(self, is_reusable: bool) -> None:
        # Once it is given back it may be another thread's.
        self.spare(self._attempt)
        super()._over(is_reusable)

    def close(self) -> None:
        self.spare(self._attempt)
        with self._ending:
            super().close()


class _Body:
    """The rest of an answer that came by the agent, as `way.Incoming`. It knows whether endpoint or agent broke off."""

    __slots__ = ("_address", "_body", "_delegation")

    def __init__(self, body: Incoming, delegation: Delegation, address: str) -> None:
        self._address = address
        self._body = body
        self._delegation = delegation

    async def read(self) -> bytes:
        try:
            return await self._body.read()
        except errors.AttemptFailed as error:
            delegation = self._delegation
            is_broken = isinstance(error, errors.ConnectionLost | errors.ProtocolError) and error.reason != "send.client_closed"
            told = named(error, delegation.agent.address, self._address)
            raise of_agent(told) if is_broken and delegation.is_gone() else told from error.__cause__

    async def write(self, data: bytes) -> None:
        await self._body.write(data)

    async def close(self) -> None:
        await self._body.close()

    def info(self, name: str) -> Any:
        return self._body.info(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)  # what one kind of carrier has beside these


def is_here(address: str) -> bool:
    """A UNIX socket is ours to connect to: whoever listens there asks the kernel who comes, and the agent opens none for its callers."""
    return address.startswith("unix:")


def expects(attempt: Attempt) -> bool:
    """Does the application ask the endpoint before it sends a body (Expect)? The agent would keep that for itself."""
    return attempt.body is not None and any(name.lower() == b"expect" for name, _ in attempt.headers)


def handed_over(attempt: Attempt, address: str, own: str) -> AgentAttempt:
    """The attempt as the agent gets it."""
    native = attempt.native
    headers = [pair for pair in attempt.headers if pair[0].lower() not in RESERVED]
    is_http2 = attempt.is_http2 and key_of(attempt, HTTP1)[2] != HTTP1
    headers += directions(attempt.address, attempt.identity, own, is_http2=is_http2, connect=attempt.connect_end - attempt.now)
    sent = AgentAttempt(
        address, "", None, attempt.method, attempt.target, headers, attempt.body, attempt.now, attempt.end, attempt.is_fresh,
        attempt.terms, attempt.hard_end, native, attempt.is_http2, attempt.head_end,
    )  # fmt: skip
    sent.is_repeatable = native is not None and native.is_idempotent
    sent.is_answered = sent.is_on_demand = False
    if isinstance(attempt.body, Replay):
        if is_http2:
            attempt.body.hold()
        elif not any(name.lower() == b"content-length" and not value.strip(b"0") for name, value in headers):
            # A request without a body is never asked for one.
            headers.append((b"expect", b"100-continue"))
            sent.is_on_demand = True
    return sent


def directions(address: str, identity: str, own: str, *, is_http2: bool, connect: float) -> Headers:
    """What the agent is told beside the request. `own`: as whom we call, since the kernel may know this process by several names."""
    return [
        (ENDPOINT, address.encode()),
        (EXPECT, identity.encode() or b"-"),
        (PROTOCOL, b"http2" if is_http2 else b"http1"),
        (CONNECT, b"%d" % max(1, min(round(connect * 1000), 3_600_000))),
        (AS, own.encode()),
    ]


def failure_of(value: bytes, text: bytes) -> errors.AttemptFailed | None:
    """What the agent met, as the error that we would have met. None where it says that it can't, or what we don't know."""
    reason, _, rest = value.partition(b";")
    kind = _KINDS.get(reason.strip())
    if kind is None:
        return None
    told = text.decode("utf-8", "replace").strip() or f"the attempt failed ({reason.decode('latin-1')})."
    return kind[0](told, reason=kind[1], is_written=rest.strip() != b"written=0")


def error_of(value: bytes, text: bytes) -> errors.AttemptFailed:
    """The same, with an error of its own where the agent can't: then nothing was sent."""
    return failure_of(value, text) or agent_lost(is_written=False)


def agent_lost(*, is_written: bool) -> errors.ConnectionLost:
    """The agent, or the connection to it, is gone."""
    return errors.ConnectionLost(
        "the node agent went away under the attempt.",
        hint="Is it being started anew? `meshlib status` tells how it stands.",
        reason=AGENT_CLOSED,
        is_written=is_written,
    )


def named(error: errors.AttemptFailed, socket: str, address: str) -> errors.AttemptFailed:
    """The same error, told of the endpoint: the agent's socket is not what somebody looks for."""
    error.message = error.message.replace(socket, f"{address} (by the node agent)")
    error.args = (error.message,)
    return error


def of_agent(error: errors.AttemptFailed) -> errors.AttemptFailed:
    """An error that says nothing of the endpoint."""
    if error.reason in (AGENT_CLOSED, AGENT_SILENT):
        return error
    made = copy.copy(error)
    made.reason = AGENT_SILENT if isinstance(error, errors.AttemptTimeout) else AGENT_CLOSED
    made.hint = "The node agent went away under it, and the call is not one that may be repeated."
    return made


def _silent() -> errors.AttemptTimeout:
    return errors.AttemptTimeout(
        "the node agent fell silent.",
        hint="Is its process stopped, or the node overloaded?",
        reason=AGENT_SILENT,
        is_written=True,
    )
