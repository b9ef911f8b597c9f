"""Is this process alive, and does it want work? For orchestrators, which have no certificate.

A plain listener beside the mesh's own: kubelet, Compose and load balancers ask it, and it knows nothing that is worth asking for.
`GET /healthz` and `/livez`: the process lives, that is, its keeper answers and no event loop of a server of ours has been silent for
`SILENT` seconds. `GET /readyz`: it has started, and does not drain. `GET /metrics`: the numbers. Nothing else: `/status` names peers, and
is told by the metrics listener alone. The keeper answers, so that a probe is not in the queue behind the calls that it is to judge.

The socket is bound before the workers of a service fork. All of them accept on it, and each answers for itself.

It is reachable by whoever reaches the port, so that a flood must not make a process look dead: where there are too many connections,
the one that has waited longest without a request goes, and a probe, which asks at once, is answered.

It does not ask what the application depends on. A process whose database is away is alive; to restart it, or to take all of its kind out
of the rotation at once, mends nothing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

from meshlib.keeper import Keeper

from .exporter import MOST, Listener, is_asked_by_address, rendered, response

# Seconds without a sign of life after which an event loop counts as stuck. Some handlers do block it, for seconds; an orchestrator asks
# three times by default before it restarts.
SILENT: Final = 30.0


class Pulse:
    """The sign of life of one server. Its event loop is expected to beat from its first beat on, until `rest`."""

    __slots__ = ("_clock", "_last", "has_begun")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        # It serves.
        self.has_begun = False

    def begin(self) -> None:
        """It serves, and has no loop that would beat."""
        self.has_begun = True

    def beat(self) -> None:
        self.has_begun = True
        self._last = self._clock()

    def rest(self) -> None:
        """The server ends; what it does by then isn't judged."""
        self._last = None

    @property
    def silence(self) -> float:
        """Seconds since the last beat; 0 where none is expected."""
        return 0.0 if self._last is None else self._clock() - self._last


class ProbeListener(Listener):
    """Answers probes on a socket that was bound by others. `render` gives the metrics, `why_not_ready` is "" when it is."""

    def __init__(self, render: Callable[[], str], *, why_not_ready: Callable[[], str], pulse: Pulse) -> None:
        super().__init__()
        self._render = render
        self._why_not_ready = why_not_ready
        self._pulse = pulse
        self._own = ""

    def start(self, keeper: Keeper, listening: socket.socket) -> None:
        """From now on; the listener owns the socket."""
        self._own = str(listening.getsockname()[0])
        self.open(keeper, listening)

    def has_room(self) -> bool:
        if not super().has_room() and self._waiting:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()
            return True
        return self._open <= 2 * MOST

    def response_to(self, request: bytes, *, is_from_here: bool) -> bytes:
        method, _, rest = request.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return response(400, "this is not HTTP/1.1\n")
        path = target.split(b"?", 1)[0]
        if path == b"/metrics" and not is_asked_by_address(request.partition(b"\r\n")[2], self._own):
            # A name that suddenly leads here may be a web page's; probes are asked by address anyway, and say nothing worth reading.
            return response(403, "ask by the address, or as localhost\n")
        answer = self._answer_to(path) if method in (b"GET", b"HEAD") else None
        if answer is None:
            return response(404, "GET /livez, /readyz, /healthz or /metrics\n")
        return answer if method == b"GET" else answer[: answer.index(b"\r\n\r\n") + 4]

    def _answer_to(self, path: bytes) -> bytes | None:
        if path in (b"/healthz", b"/livez"):
            silence = self._pulse.silence
            return (
                response(200, "ok\n") if silence <= SILENT else response(503, f"the event loop is silent for {silence:.0f} s\n")
            )
        if path == b"/readyz":
            reason = self._why_not_ready()
            return response(503, f"{reason}\n") if reason else response(200, "ok\n")
        return rendered(self._render) if path == b"/metrics" else None
