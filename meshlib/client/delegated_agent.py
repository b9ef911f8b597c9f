"""Is the agent of this node there, and how is it reached?

`AgentSocket` connects to the agent's data socket: at once or not at all, since a UNIX socket knows no distance, and only if root, we
ourselves or a user who was named for it listens there. The kernel says who that is (SO_PEERCRED), so that nobody can put a
socket of his own in the agent's place; where a platform doesn't tell, the owner of the file has to do.

`AgentWatch` knows how the agent stands. It asks it (`GET /ping`) on the keeper's loop: each `PACE` seconds while calls go that way,
less often otherwise. An agent that stays silent for `BUDGET` seconds is away, since a process that hangs accepts connections as before,
and only its silence tells. What calls find out by themselves (nobody listens) counts at once. Until somebody has asked, calls try it
(`new`); an answer makes it `up`, and anything else `away`: then calls don't try, and lose no time.

It moves no call, and ends none: `delegated.py` is told when the state changes.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import errors
from .connection import Connection
from .loop import LoopCarrier
from .pool import Pool
from .way import Attempt, Headers, Reply

if TYPE_CHECKING:
    from ..keeper import Job, Keeper

log = logging.getLogger("meshlib.client")

# Seconds between two questions: while calls go by the agent, while none do, and while it is away.
PACE: Final = 0.1
IDLE: Final = 2.0
RETURN: Final = 0.5
# Seconds after the last call in which the agent is asked at the first pace.
BUSY: Final = 3.0
# Seconds in which it must answer. A healthy agent takes less than a millisecond; with four busy processes and a load of 9 on two
# processors the slowest of 200 answers took 0.16 s. A wrong guess costs little: calls go by this process for half a second.
BUDGET: Final = 0.25
# The keeper itself came so much too late that the silence may be its own.
LAG: Final = 0.1

NEW: Final = "new"
UP: Final = "up"
AWAY: Final = "away"
ANSWERED: Final = "answered"
GONE: Final = "gone"
SILENT: Final = "silent"
CLOSED: Final = "closed"

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
# Between us and the agent: as whom of those that the kernel may know us by.
AS: Final = b"x-mesh-as"
_HOST: Final[Headers] = [(b"Host", b"agent")]
_MOST_TEXT: Final = 4096


class AgentSocket:
    """The data socket of the agent: where it is, and whose it may be."""

    __slots__ = ("address", "owners", "path")

    def __init__(self, path: str, owners: frozenset[int] = frozenset()) -> None:
        self.path = path
        self.address = f"unix:{path}"
        self.owners = owners | {0, os.geteuid()}

    def open(self) -> socket.socket:
        """A connection that doesn't block. Raises OSError: nobody listens, the queue is full, or it isn't the agent's."""
        plug = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            plug.setblocking(False)
            plug.connect(self.path)
            owner = self._owner(plug)
            if owner not in self.owners:
                raise PermissionError(errno.EPERM, f"{self.path} is served by user {owner}, who is not the agent's")
        except BaseException:
            plug.close()
            raise
        return plug

    def check(self) -> None:
        """The same for a library that connects by itself. Raises OSError."""
        self.open().close()

    def _owner(self, plug: socket.socket) -> int:
        option = getattr(socket, "SO_PEERCRED", None)
        if option is None:
            return Path(self.path).stat().st_uid
        uid: int = _CREDENTIALS.unpack(plug.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size))[1]
        return uid


class AgentLoop(LoopCarrier):
    """The connections of one event loop to the agent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool, agent: AgentSocket) -> None:
        super().__init__(loop, pool, "http/1.1")
        self.agent = agent

    async def _dial(self, address: str, connection: Connection) -> None:
        plug = self.agent.open()
        try:
            await self.loop.create_unix_connection(lambda: connection, sock=plug)
        except BaseException:
            plug.close()
            raise

    def cut(self, may_end: Callable[[Attempt], bool], error: errors.AttemptFailed) -> None:
        for connection in tuple(self._open):
            # Each its own: who catches one adds to it.
            connection.cut(may_end, copy.copy(error))


class AgentWatch:
    """How the agent stands, for one mesh in one process. Its attributes are read by calls, and `tell` called, from any thread."""

    def __init__(self, keeper: Keeper, agent: AgentSocket, clock: Callable[[], float] = time.monotonic) -> None:
        self._keeper = keeper
        self._clock = clock
        self._agent = agent
        self._lock = threading.Lock()
        self._carrier: AgentLoop | None = None
        self._job: Job | None = None
        self._used = -BUSY
        # As whom we ask.
        self.identity = ""
        # Called with the event, in whichever thread it became known, when the agent has gone away.
        self.on_away: Callable[[str], object] | None = None
        self.state = NEW
        self.why = ""
        self.since = clock()
        self.changes = {UP: 0, AWAY: 0}
        # When it answered last.
        self.answered_at = -1.0

    @property
    def is_away(self) -> bool:
        return self.state is AWAY

    @property
    def is_overdue(self) -> bool:
        """Has it not answered when it should have? It may be silent, and nothing is known yet."""
        return self.state is not UP or self._clock() - self.answered_at > BUDGET

    def jobs(self) -> list[AgentWatch]:
        """Start looking, for those who keep a list of what they have to `cancel`. Harmless to ask again."""
        if self._job is None:
            self._job = self._keeper.every(PACE, self.look, name="agent", first=0.0)
        return [self]

    def cancel(self) -> None:
        """Look no more. How it stood last stays known."""
        job, self._job = self._job, None
        if job is not None:
            job.cancel()

    def use(self, agent: AgentSocket) -> None:
        """The configuration names another socket."""
        self._agent = agent
        carrier, self._carrier = self._carrier, None
        if carrier is not None and not carrier.loop.is_closed():
            carrier.loop.call_soon_threadsafe(carrier.close)

    def used(self, now: float) -> None:
        """A call goes by the agent. The first one after a while wakes the watch."""
        self._used = now
        job = self._job
        if job is not None and job.due > now + 2 * PACE:
            self._keeper.soon(job)

    def soon(self) -> None:
        """Ask at once: a call has met something odd."""
        if (job := self._job) is not None:
            self._keeper.soon(job)

    def tell(self, event: str, why: str = "") -> None:
        """Something was learnt of the agent."""
        with self._lock:
            before, self.state = self.state, UP if event is ANSWERED else AWAY
            if self.state is before:
                return
            self.since, self.why = self._clock(), why
            self.changes[self.state] += 1
        if self.state is UP:
            if before is AWAY:
                log.info("the node agent at %s is back: calls go by it again", self._agent.path)
            return
        log.warning(
            "the node agent at %s is away (%s): calls of delegated services are sent by this process until it is back",
            self._agent.path,
            why,
        )
        if self.on_away is not None:
            self.on_away(event)

    async def look(self) -> None:
        """Ask the agent whether it is there. The keeper's."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            status, _ = await self.ask("/ping", BUDGET)
        except errors.AttemptTimeout:
            if loop.time() - begun < BUDGET + LAG:
                self.tell(SILENT, f"it did not answer within {BUDGET:g} s")
        except errors.ConnectFailed as error:
            self.tell(GONE, str(error.__cause__ or error))
        except errors.AttemptFailed as error:
            self.tell(
                CLOSED, "it closed the connection: does one of its entries fit this process?" if not error.hint else str(error)
            )
        else:
            if status == 204:
                self.answered_at = self._clock()
                self.tell(ANSWERED)
            else:
                self.tell(CLOSED, f"it answered {status} to a ping")
        job = self._job
        if job is not None:
            job.seconds = RETURN if self.is_away else PACE if self._clock() - self._used < BUSY else IDLE

    async def ask(self, target: str, budget: float) -> tuple[int, bytes]:
        """Ask the agent something for ourselves, on the keeper's loop: status and body. Raises AttemptFailed."""
        carrier = self._own_carrier()
        headers = [*_HOST, (AS, self.identity.encode())]
        for is_fresh in (False, True):
            now = carrier.loop.time()
            try:
                reply = await carrier.exchange(
                    Attempt(self._agent.address, "", None, "GET", target, headers, None, now, now + budget, is_fresh)
                )
                return reply[0], await text_of(reply)
            except errors.ConnectionLost:
                # A connection from before the agent's last start.
                if is_fresh:
                    raise
        raise AssertionError

    def _own_carrier(self) -> AgentLoop:
        loop, found = asyncio.get_running_loop(), self._carrier
        if found is None or found.loop is not loop:
            if found is not None and found.loop.is_closed():
                found.bury()
            found = self._carrier = AgentLoop(loop, Pool(), self._agent)
        return found

    def after_fork(self) -> None:
        """The parent's connections are the parent's, and what it knew may be long ago."""
        self._lock = threading.Lock()
        self._carrier = None
        self.state, self.why, self._used = NEW, "", -BUSY


async def text_of(reply: Reply) -> bytes:
    """The body of an answer of the agent's own, which is short."""
    body = reply[4]
    if isinstance(body, bytes):
        return body[:_MOST_TEXT]
    text = b""
    try:
        while len(text) < _MOST_TEXT and (piece := await body.read()):
            text += piece
    finally:
        await body.close()
    return text[:_MOST_TEXT]


def describe(watch: Any, now: float) -> dict[str, Any]:
    """For `meshlib status` and the metrics."""
    return {"state": watch.state, "why": watch.why, "for": now - watch.since, "changes": dict(watch.changes)}
