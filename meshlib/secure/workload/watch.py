"""How do we hear from the Workload API who we are, for as long as we live?

One stream (FetchX509SVID), held open by one thread that begins with the first `load` of a process, and not before: at start that
waits some seconds for the first message; later it answers what the thread has heard, at once. A stream that ends is opened again
after a moment, which grows while nobody answers.

What ends the use of an identity, and what doesn't:

- *A message without our SVID*, or PermissionDenied on a stream that had given it: it was taken back (`IdentityWithdrawn`).
- *PermissionDenied on a new stream*: the agent finds out anew who asks, and may fail at that for a moment (a kubelet that is late).
  It counts when it has been the answer for `GRACE` seconds.
- *Anything else*, the agent's death above all: what we have stays in use to its end, and the store says so. Whoever can stop
  the agent must not be able to stop everybody on its machine within the same second.
- *InvalidArgument*: the request itself is wrong, and asking again would change nothing; so it isn't.
- *A fault of ours or of a library*: logged, and the stream is opened again on another channel; listening never ends by itself.

Channel and messages may be those of another library (`connect`); all that is decided here goes for them too.
"""

from __future__ import annotations

import atexit
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import grpc

from ...errors import IdentityError, IdentityWithdrawn, MeshError
from ..identity import Identity
from ..proof import prove
from .address import checked_socket, refuse_foreign_socket
from .channel import connect as connect_by_grpc
from .parts import Message, NotOurs, parts_of
from .read import response_of

log = logging.getLogger("meshlib.secure")

TIMEOUT: Final = 5.0
# Seconds until a stream is opened again: a tenth, doubled each time up to `LONGEST`. One that lived for `STEADY` begins anew.
SHORTEST, LONGEST, STEADY = 0.1, 5.0, 5.0
# How long the agent may be away before it is told, and how long it may deny us on new streams before that counts.
NOTICE, GRACE = 10.0, 30.0

# Watchers of this process: their streams end before the interpreter does, since gRPC's threads don't survive it.
_watching: weakref.WeakSet[WorkloadSource] = weakref.WeakSet()

# Of a forked process: what is the parent's must neither be used nor collected here, since gRPC would act on it.
_left_behind: list[object] = []


class Stream(Protocol):
    """One call of FetchX509SVID: its messages, as bytes or read already, and its end."""

    def __iter__(self) -> Iterator[Message | bytes]: ...

    def cancel(self) -> object: ...


class Connection(Protocol):
    """What calls FetchX509SVID, as often as it is asked to. It may raise what gRPC raises, OSError and MeshError."""

    def fetch(self) -> Stream: ...

    def close(self) -> object: ...


class WorkloadSource:
    """An `IdentitySource`. State of the process: what the Workload API said last. Any thread may load.

    `hint` chooses among several SVIDs; without it ours is the one of our SPIFFE ID. `uid` is the agent's user, if it is neither root
    nor ours. `timeout`: how long the start waits for a first answer; `longest`: the longest pause between two streams.
    """

    def __init__(
        self,
        socket: str,
        spiffe_id: str,
        *,
        hint: str = "",
        uid: int | None = None,
        timeout: float = TIMEOUT,
        longest: float = LONGEST,
        connect: Callable[[str], Connection] = connect_by_grpc,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.socket = checked_socket(socket)
        self.spiffe_id = spiffe_id
        self._hint = hint
        self._uid = uid
        self._timeout = timeout
        self._longest = longest
        self._connect = connect
        self._wall_clock = wall_clock
        self._clock = clock
        self._identity: Identity | None = None
        self._error: MeshError | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._heard = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: Connection | None = None
        self._stream: Stream | None = None
        self._alone_since: float | None = None
        self._denied_since: float | None = None
        self._is_useless = False  # to ask again
        self._fault = ""

    def __repr__(self) -> str:
        state = f"error: {self._error}" if self._error else "well" if self._identity else "no identity yet"
        return f"<WorkloadSource of {self.spiffe_id} at {self.socket}, {state}>"

    # ------------------------------------------------------------------ as the store asks

    def load(self) -> Identity:
        """The identity of the last good message. Raises what is wrong since then."""
        self._start()
        if self._identity is None and not self._heard.is_set():
            self._heard.wait(self._timeout)
        error, identity, since = self._error, self._identity, self._alone_since
        if error is None and identity is not None:
            if since is not None and self._clock() - since > NOTICE:
                raise self._away("it has been away for some time, and the last identity stays in use")
            return identity
        error = error or self._away("it did not answer in time")
        # Each time another object: who catches one adds to it.
        raise type(error)(error.message, hint=error.hint)

    def after_fork(self) -> None:
        """In a forked child: the same identity, a stream of its own."""
        _left_behind.extend([self._client, self._stream])
        self._begin_anew()

    def close(self) -> None:
        """End the stream, and the thread with it. Who loads after that begins anew."""
        with self._lock:
            thread, client, stream = self._thread, self._client, self._stream
            self._ended.set()
        if stream is not None:
            stream.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)
        if client is not None:
            client.close()
        self._identity = self._error = None
        self._begin_anew()

    # ------------------------------------------------------------------ the thread

    def _start(self) -> None:
        if not self._is_watched:
            with self._lock:
                if not self._is_watched:
                    _watching.add(self)
                    # It knows its own end only: after `close` there may be another one.
                    self._thread = threading.Thread(target=self._watch, args=(self._ended,), name="meshlib-workload", daemon=True)
                    self._thread.start()

    @property
    def _is_watched(self) -> bool:
        return self._thread is not None and (self._is_useless or self._thread.is_alive())

    def _watch(self, ended: threading.Event) -> None:
        tries = 0
        while not ended.is_set():
            began = self._clock()
            try:
                is_wanted = self._listen(ended)
            except Exception as error:
                if ended.is_set():
                    break
                is_wanted = True
                self._stumble(error)
            if not is_wanted or ended.is_set():
                self._is_useless = not is_wanted and not ended.is_set()
                break
            if self._alone_since is None:
                self._alone_since = self._clock()
            tries = 0 if self._clock() - began > STEADY else tries + 1
            pause = min(self._longest, SHORTEST * 2.0 ** min(tries, 10))
            ended.wait(pause * random.uniform(0.5, 1.0))

    def _listen(self, ended: threading.Event) -> bool:
        """Hold one stream until it ends; False if there is no use in another."""
        has_answered = False
        try:
            refuse_foreign_socket(self.socket, self._uid)
            if self._client is None:
                self._client = self._connect(self.socket)
            stream = self._client.fetch()
            with self._lock:
                self._stream = stream
                if ended.is_set():
                    stream.cancel()
            for message in stream:
                if ended.is_set():
                    return False
                self._take(message)
                has_answered = True
            self._trouble("the stream was closed by the agent")
        except grpc.RpcError as error:
            if ended.is_set():
                return False
            return self._refused(error.code() if isinstance(error, grpc.Call) else None, has_answered=has_answered)
        except MeshError as error:
            self._fail(error)
        except OSError as error:
            self._trouble(f"its socket can't be reached ({error.strerror})")
        return True

    def _take(self, message: Message | bytes) -> None:
        """Judge a message, and put what it says in force. A bad one changes nothing but the error."""
        self._alone_since = self._denied_since = None
        try:
            said = response_of(message) if isinstance(message, bytes) else message
            parts = parts_of(said, self.spiffe_id, self._hint)
            # Revocations that are not in a message any more are revoked themselves: here, what is absent must not be kept.
            last = self._identity if parts.crl else None
            made = prove(parts, self.spiffe_id, self._wall_clock(), last=last)
        except NotOurs as error:
            entitled = ", ".join(error.entitled) or "nobody"
            hinted = f" with the hint {self._hint!r}" if self._hint else ""
            self._withdraw(
                f"the Workload API at {self.socket} gives identities for {entitled}, and none for {self.spiffe_id}{hinted}"
            )
        except MeshError as error:
            self._fail(error)
        except Exception as error:
            self._fail(
                IdentityError(f"a message of the Workload API can't be used: {type(error).__name__}.", hint="See the log.")
            )
            log.exception("a message of the Workload API can't be used")
        else:
            kept = self._identity
            if kept is None or _content(kept) != _content(made):
                self._identity = made
            self._error = None
            self._heard.set()

    def _refused(self, code: grpc.StatusCode | None, *, has_answered: bool) -> bool:
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            self._fail(self._away("it refuses our request as invalid, so it is not asked again"))
            return False
        if code is not grpc.StatusCode.PERMISSION_DENIED:
            self._trouble(f"it can't be reached ({code.name if code is not None else 'unknown'})")
            return True
        now = self._clock()
        self._denied_since = self._denied_since if self._denied_since is not None else now
        if has_answered or self._identity is None or now - self._denied_since >= GRACE:
            self._withdraw(f"the Workload API at {self.socket} has no identity for this process")
        else:
            self._fail(self._away("it denies us an identity; the last one stays in use for the moment"))
        return True

    def _withdraw(self, what: str) -> None:
        """Not entitled: a withdrawal, if we were before."""
        kind = IdentityError if self._identity is None and not isinstance(self._error, IdentityWithdrawn) else IdentityWithdrawn
        self._identity = None
        self._fail(kind(f"{what}.", hint="Is there a registration entry for it, and does this process have its selectors?"))

    def _trouble(self, what: str) -> None:
        """Nothing is heard. It is told when it lasts, or if nothing was ever heard."""
        if self._identity is None and not isinstance(self._error, IdentityWithdrawn):
            # Not `_heard`: at start, the agent may come while we wait.
            self._error = self._away(what)

    def _stumble(self, error: Exception) -> None:
        """What nobody expected. It is told once, and the channel isn't used again: it may be what is broken."""
        text = f"{type(error).__name__}: {error}"
        if text != self._fault:
            log.error("the Workload API at %s can't be listened to; it is tried again", self.socket, exc_info=error)
        self._fault = text
        client, self._client = self._client, None
        if client is not None:
            try:
                client.close()
            except Exception:
                log.debug("a channel can't be closed", exc_info=True)
        self._trouble(f"it can't be listened to ({type(error).__name__}, see the log)")

    def _fail(self, error: MeshError) -> None:
        # Without its frames, which hold keys.
        self._error = error.with_traceback(None)
        self._heard.set()

    def _away(self, what: str) -> IdentityError:
        return IdentityError(
            f"the Workload API at {self.socket}: {what}.", hint="Is the agent running, and is the socket's path right?"
        )


@atexit.register
def _end_all() -> None:
    for source in list(_watching):
        source.close()


def _content(identity: Identity) -> tuple[object, ...]:
    return identity.chain, identity.key, identity.bundles, identity.crls, identity.notes
