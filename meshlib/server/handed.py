"""Who is at the other end of a connection that the node agent holds for us?

Where `inbound.agent` is configured the agent accepts the connections of our callers, proves who they are by mutual TLS, and hands each
request over to a UNIX socket of ours, with one header more that says whom it has found. Any server may serve there, since the
connection tells nothing: uvicorn, hypercorn, granian, gunicorn, grpcio.

What makes the header true is its secret, which the agent tells only to the process that may have this service's identity (`GET
/handover` at its data socket, where it knows by the kernel who asks). A header without it is none, and neither is one that stands twice
or that can't be read to its end: the call is then that of a caller without identity, and the rules decide. The handler never sees the
header. Whether the peer's certificate has ended is asked anew for each request, as for connections of our own.

The keeper fetches the secret at the start, and again when somebody shows another one, at most once in `AGAIN` seconds: only if the agent's
state was lost does it change. It judges nobody: that is the gate's.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from .. import errors
from .._native import core
from ..call import Peer
from .door import PEER, PORT, PUBLIC, SNI, VERSIONS, Standing
from .line import PLAIN, PLAIN_TLS, Line

if TYPE_CHECKING:
    from ..keeper import Job, Keeper
    from .door import Door

log = logging.getLogger("meshlib.server")

HEADER: Final = "x-mesh-handed"
_HEADER: Final = HEADER.encode()
_KEY: Final = "HTTP_X_MESH_HANDED"

# Seconds between two looks for a secret that isn't there yet, and between two that a wrong one may cause.
AGAIN: Final = 1.0
# Once it is there, it stays: a look now and then is for a change that nobody has met.
SELDOM: Final = 60.0
# Seconds for the agent's answer, and that a first call waits for it.
BUDGET: Final = 1.0
# Callers whose header is kept in its parts: one for each connection that the agent holds.
KEPT: Final = 1024
LONGEST: Final = 4096
LEAST_SECRET: Final = 32

_TLS: Final = ("TLSv1.2", "TLSv1.3")


@dataclass(frozen=True, slots=True)
class Told:
    """What a header says, once its secret was found to be right. `ends_at` is the end of the peer's certificate, 0.0 for none."""

    peer: Peer
    version: str
    address: str
    client_port: int
    port: int
    sni: str
    ends_at: float


class Handed:
    """What is handed over to one mesh. State of the process; used by any thread. `ask` is how the agent is asked, on the keeper's loop."""

    def __init__(
        self,
        keeper: Keeper,
        ask: Callable[[str, float], Awaitable[tuple[int, bytes]]],
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper = keeper
        self._ask = ask
        self._wall_clock = wall_clock
        self._clock = clock
        self._secret: bytes | None = None
        self._job: Job | None = None
        self._nudged_at = -AGAIN
        self._is_told = False
        self._lock = threading.Lock()
        # Told of each connection that proved who it is: address and identity.
        self.on_proved: Callable[[str, str], object] | None = None
        # Calls that the agent has handed over, and headers that it can't have written.
        self._taken, self._wrong = core.Tally(), core.Tally()

    # --- the secret

    @property
    def is_ready(self) -> bool:
        return self._secret is not None

    def jobs(self) -> list[Handed]:
        """Start asking, for those who keep a list of what they have to `cancel`. Harmless to ask again."""
        if self._job is None:
            self._job = self._keeper.every(AGAIN, self.look, name="handover", first=0.0)
        return [self]

    def cancel(self) -> None:
        """Ask no more. What was told stays known."""
        job, self._job = self._job, None
        if job is not None:
            job.cancel()

    async def look(self) -> None:
        """Ask the agent for the secret. The keeper's."""
        try:
            status, body = await self._ask("/handover", BUDGET)
        except errors.AttemptFailed as error:
            self._miss(str(error))
            return
        secret = body.strip()
        if status != 200 or not LEAST_SECRET <= len(secret) <= LONGEST or not all(byte in b"0123456789abcdef" for byte in secret):
            self._miss(f"it answered {status}: is there an entry of this service that fits this process?")
            return
        if self._secret != secret:
            log.info("the node agent hands over the calls of this service from now on")
        self._secret, self._is_told = secret, False
        if (job := self._job) is not None:
            job.seconds = SELDOM

    def _miss(self, why: str) -> None:
        if (job := self._job) is not None:
            job.seconds = AGAIN
        if not self._is_told:
            self._is_told = True
            old = (
                "calls that it hands over count as before"
                if self.is_ready
                else "callers that it hands over are nobody until then"
            )
            log.warning("the node agent did not tell the secret of handing over (%s); %s", why, old)

    def _doubt(self) -> None:
        """Somebody shows a secret that isn't ours: the agent, if it has another one by now."""
        self._wrong.add(1, 0)
        now = self._clock()
        if self._job is not None and now - self._nudged_at >= AGAIN:
            self._nudged_at = now
            self._keeper.soon(self._job)

    def _fetching(self) -> Future[None]:
        return self._keeper.run(self.look())

    async def ready(self) -> None:
        """Before the first call: wait for the secret, but not for long."""
        if self._secret is None and self._may_ask():
            await asyncio.wait({asyncio.wrap_future(self._fetching())}, timeout=BUDGET)

    def ready_blocking(self) -> None:
        if self._secret is None and self._may_ask():
            try:
                self._fetching().result(BUDGET)
            except TimeoutError:
                pass

    def _may_ask(self) -> bool:
        now = self._clock()
        with self._lock:
            may = now - self._nudged_at >= AGAIN
            if may:
                self._nudged_at = now
            return may

    # --- one call

    def told(self, values: Iterable[bytes]) -> Told | None:
        """What the one header of a request says. None where there is none that counts."""
        found = tuple(values)
        if not found:
            return None
        parts = parse(found[0]) if len(found) == 1 else None
        if parts is None or self._secret is None or not hmac.compare_digest(parts[0], self._secret):
            self._doubt()
            return None
        self._taken.add(1, 0)
        told = parts[1]
        if told.peer.spiffe_id and told.address and self.on_proved is not None:
            self.on_proved(told.address, told.peer.spiffe_id)
        return told

    def is_over(self, told: Told) -> bool:
        """Has the certificate of its caller ended?"""
        return bool(told.ends_at) and self._wall_clock() >= told.ends_at

    def line(self, scope: dict[str, Any], line: Line, door: Door | None) -> Line:
        """The line of a call by ASGI: as the agent tells it, or `line`. The scope is ours to write into."""
        headers = scope["headers"]
        values = [value for name, value in headers if len(name) == len(_HEADER) and name.lower() == _HEADER]
        if not values:
            return line
        scope["headers"] = [pair for pair in headers if pair[0].lower() != _HEADER]
        told = self.told(values)
        if told is None:
            return line
        is_tls = told.peer.is_tls
        scope["client"] = (told.address, told.client_port)
        scope["server"] = ((scope.get("server") or ("",))[0], told.port)
        scope["scheme"] = _scheme(scope["type"], is_tls=is_tls)
        return HandedLine(
            told,
            line,
            is_public=door is not None and door.is_public(told.port),
            judge=(lambda: Standing.OVER if self.is_over(told) else Standing.GOOD) if is_tls else None,
        )

    def environ(self, environ: dict[str, Any], door: Door | None) -> dict[str, Any]:
        """The environ of a call by WSGI: as the agent tells it, or as if it had told nothing."""
        value = environ.get(_KEY)
        if value is None:
            return environ
        fresh = {key: told for key, told in environ.items() if key != _KEY}
        told = self.told([value.encode("latin-1", "replace")])
        if told is None:
            return fresh
        peer = PLAIN_TLS if self.is_over(told) else told.peer
        return {
            **fresh,
            PEER: peer,
            PORT: told.port,
            PUBLIC: door is not None and door.is_public(told.port),
            SNI: told.sni,
            "REMOTE_ADDR": told.address,
            "REMOTE_PORT": str(told.client_port),
            "SERVER_PORT": str(told.port),
            "wsgi.url_scheme": _scheme("http", is_tls=peer.is_tls),
        }

    def stats(self) -> dict[str, Any]:
        """All numbers as plain data."""
        return {"is_ready": self.is_ready, "taken": self._taken.read()[0], "wrong": self._wrong.read()[0]}

    def after_fork(self) -> None:
        """The keeper asks anew; what is known holds."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Handed {'ready' if self.is_ready else 'without its secret'}>"


class HandedLine(Line):
    """The line of one call that was handed over. The connection that it came on, if it is ours, still tells when it is lost."""

    __slots__ = ("_outer",)

    def __init__(self, told: Told, outer: Line, *, is_public: bool, judge: Callable[[], Standing] | None) -> None:
        self._outer = outer
        super().__init__(
            told.peer,
            told.address,
            told.port,
            told.sni,
            _extension(told) if told.peer.is_tls else None,
            is_public=is_public,
            judge=judge,
            is_ours=outer.is_ours,
        )

    @property
    def visit(self) -> Any:
        return self._outer.visit

    @visit.setter
    def visit(self, visit: Any) -> None:
        self._outer.visit = visit


def _scheme(kind: str, *, is_tls: bool) -> str:
    return ("ws" if kind == "websocket" else "http") + "s" * is_tls


def _extension(told: Told) -> Mapping[str, Any]:
    """ASGI's TLS extension, as far as the agent tells: that there was a certificate, and not all that is in it."""
    return {
        "server_cert": None,
        "client_cert_chain": (),
        "client_cert_name": None,
        "client_cert_error": None,
        "tls_version": VERSIONS.get(told.version),
        "cipher_suite": None,
        "client_cert": None,
        PEER: told.peer,
        SNI: told.sni,
    }


@lru_cache(maxsize=KEPT)
def parse(value: bytes) -> tuple[bytes, Told] | None:
    """The secret and what the header says; None for whatever isn't written as the agent writes it. What is new in it is skipped."""
    if len(value) > LONGEST or not all(32 < byte < 127 for byte in value):
        return None
    fields: dict[str, str] = {}
    for part in value.decode("ascii").split(";"):
        name, sign, text = part.partition("=")
        if not sign or not name.replace("_", "a").isalnum() or name != name.lower() or name in fields:
            return None
        fields[name] = text
    if not fields.get("secret"):
        return None
    told = _told(fields)
    return None if told is None else (fields["secret"].encode(), told)


def _told(fields: Mapping[str, str]) -> Told | None:
    name, version, serial = fields.get("id", ""), fields.get("tls", ""), fields.get("serial", "")
    ends_at, port = _number(fields.get("not_after", "") or "0", 12), _number(fields.get("port", "") or "0", 5)
    host, client_port = _place(fields.get("address", ""))
    sni = fields.get("sni", "")
    if version not in ("", *_TLS) or ends_at is None or port is None or client_port is None or port > 65535:
        return None
    if not all(letter in "0123456789abcdef" for letter in serial):
        return None
    if not name:
        return Told(PLAIN_TLS if version else PLAIN, version, host, client_port, port, sni, 0.0)
    if not version or not ends_at:
        return None
    try:
        core.parse_spiffe_id(name)
    except ValueError:
        return None
    return Told(Peer(name, True, serial, float(ends_at)), version, host, client_port, port, sni, float(ends_at))


def _number(text: str, digits: int) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= digits else None


def _place(text: str) -> tuple[str, int | None]:
    """Host and port of "10.0.0.7:5000" or "[v6]:5000"; nothing of nothing."""
    if not text:
        return "", 0
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), _number(port, 5)
