"""How is one question asked of Consul, so that it always comes to an end?

py-consul has the words of the API (paths, parameters, bodies), and its own client for asyncio isn't used for the way: it sets
options that today's aiohttp warns of, gives blocking queries no time to end by, takes `CONSUL_HTTP_TOKEN` over the token that it
is given, and drops the headers that tell how old an answer is. So `Agent` is py-consul over a wire of ours.

Every question has a time: `timeout`, and for a blocking query its wait and the sixteenth that Consul adds to it at random. An
answer is read whole, up to a limit, and no redirection is followed, since the token would go along. There is one aiohttp session per
event loop, and none after a fork: in the child the parent's connections are neither used nor closed, since closing would
unregister the parent's sockets from a selector that both share.

Nothing is tried again here, and nothing pauses: who asked gets a `ConsulError`, and knows when to ask again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
from consul import base  # type: ignore[import-untyped]
from consul.exceptions import ConsulException  # type: ignore[import-untyped]
from yarl import URL

from .place import ConsulError, Place

T = TypeVar("T")
Params = Iterable[tuple[str, Any]]

# 40 000 instances of a service, about. More is no answer that a process should take.
LIMIT: Final = 64 * 1024 * 1024
# Consul adds up to a sixteenth of the wait, so that those who wait for the same thing don't come back together.
STAGGER: Final = 1 / 16

_left_behind: list[object] = []


@dataclass(frozen=True, slots=True)
class Answer:
    """As py-consul's callbacks want it. `body` is text for them, and `raw` what came."""

    code: int
    headers: Any
    raw: bytes

    @property
    def body(self) -> str:
        return self.raw.decode("utf-8", "replace")

    @property
    def index(self) -> int:
        """X-Consul-Index; raises ConsulError where there is none."""
        found = self.headers.get("X-Consul-Index", "")
        if not (found.isascii() and found.isdigit() and len(found) <= 20):
            raise ConsulError("Consul's answer has no index.", hint="Is there a proxy between that drops X-Consul-Index?")
        return int(found)

    @property
    def age(self) -> float:
        """Seconds since the server that answered heard from its leader."""
        found = self.headers.get("X-Consul-LastContact", "")
        return int(found) / 1000 if found.isascii() and found.isdigit() and len(found) <= 18 else 0.0

    @property
    def has_leader(self) -> bool:
        # What the agent answers from its own stream of changes (the default since 1.10, for queries with an index) always says that it
        # knows none.
        is_streamed = self.headers.get("X-Consul-Query-Backend") == "streaming"
        return is_streamed or bool(self.headers.get("X-Consul-KnownLeader", "true") != "false")

    @property
    def is_filtered(self) -> bool:
        """Whether there is more that our token may not see."""
        return bool(self.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true")


class Wire:
    """The way to one agent. State of the process: a session for each event loop that asks."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    async def ask(
        self, method: str, path: str, params: Params = (), body: bytes = b"", *, index: int = 0, may_lack: bool = False
    ) -> Answer:
        """One answer. With an `index` it may be held for `wait`. Raises ConsulError, also for a 404 unless it `may_lack`."""
        place = self.place
        asked, seconds = [*params, *self._common()], place.timeout
        if index:
            asked += [("index", index), ("wait", f"{round(place.wait * 1000)}ms")]
            seconds += place.wait * (1 + STAGGER)
        headers = {"Accept-Encoding": "identity"}
        if token := place.token.read():
            headers["X-Consul-Token"] = token
        url = URL(f"{place.url}{quote(path, safe='/:')}?{urlencode(asked)}", encoded=True)
        try:
            async with asyncio.timeout(seconds):
                async with self._session().request(
                    method, url, data=body or None, headers=headers, allow_redirects=False
                ) as came:
                    answer = Answer(came.status, came.headers, await self._read(came))
        except TimeoutError:
            raise ConsulError(
                f"{place.name} gave no answer within {seconds:g} s.", hint="Is the agent running, and has its cluster a leader?"
            ) from None
        except ConsulError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise ConsulError(
                f"{place.name} can't be asked: {said[:300]}.", hint="Is the agent running, and is the URL right?"
            ) from None
        if not 200 <= answer.code < 300 and not (answer.code == 404 and may_lack):
            raise self._refused(answer, path)
        return answer

    async def close(self) -> None:
        """Close the connections of the running loop, and forget those of loops that are gone."""
        here = asyncio.get_running_loop()
        session = self._sessions.pop(here, None)
        if session is not None:
            await session.close()
            await asyncio.sleep(0)

    def after_fork(self) -> None:
        _left_behind.append(self._sessions)
        self._sessions = {}

    def _session(self) -> aiohttp.ClientSession:
        here = asyncio.get_running_loop()
        session = self._sessions.get(here)
        if session is None:
            gone = [other for other in self._sessions if other.is_closed()]
            _left_behind.extend(self._sessions.pop(other) for other in gone)
            tls: Any = True if self.place.tls is None else self.place.tls
            # No limit: each service that is watched keeps a connection waiting.
            connector: aiohttp.BaseConnector = (
                aiohttp.UnixConnector(self.place.socket, limit=0) if self.place.socket else aiohttp.TCPConnector(limit=0, ssl=tls)
            )
            session = self._sessions[here] = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.place.timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return session

    def _common(self) -> list[tuple[str, Any]]:
        named = (("ns", self.place.namespace), ("partition", self.place.partition))
        return [(name, value) for name, value in named if value]

    async def _read(self, came: aiohttp.ClientResponse) -> bytes:
        parts, size = list[bytes](), 0
        async for part in came.content.iter_any():
            size += len(part)
            if size > LIMIT:
                raise ConsulError(
                    f"{self.place.name}: an answer is longer than {LIMIT >> 20} MiB.",
                    hint="Narrow it: tags, filter.",
                    is_refusal=True,
                )
            parts.append(part)
        return b"".join(parts)

    def _refused(self, answer: Answer, path: str) -> ConsulError:
        said = answer.body[:200].strip()
        said = said if said.isprintable() and said else f"status {answer.code}"
        hint = "See the agent's log."
        if answer.code in {401, 403}:
            hint = "Which token is used (`token`), and what do its policies allow?"
        elif answer.code == 404:
            hint = "Is that the URL of a Consul agent?"
        elif answer.code >= 500:
            hint = "Has the cluster a leader? See the agent's log."
        return ConsulError(
            f"{self.place.name} refuses {path.split('?')[0]}: {answer.code}, {said}.", hint=hint, status=answer.code
        )


class Agent(base.Consul):  # type: ignore[misc]
    """py-consul's words over our wire: `await agent.kv.get(…)`. A 404 comes as None or False, every other refusal as ConsulError."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        super().__init__(host="agent", port=0, scheme="http", verify=True)
        self.token = None  # the wire's affair; its constructor takes one from the environment

    def http_connect(self, *_: Any, **__: Any) -> _Http:
        return _Http(self.wire)


class _Http(base.HTTPClient):  # type: ignore[misc]
    """Where py-consul hands over: method, path and a callback that reads the answer."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire

    def get(self, callback: Callable[[Any], T], path: str, params: Params | None = None, **_: Any) -> Awaitable[T]:
        asked = list(params or ())
        # Ours to say: they decide about the time that the question has.
        index = next((int(value) for name, value in asked if name == "index"), 0)
        return self._ask("GET", callback, path, [pair for pair in asked if pair[0] not in {"index", "wait"}], b"", index)

    def put(
        self, callback: Callable[[Any], T], path: str, params: Params | None = None, data: str | bytes = b"", **_: Any
    ) -> Awaitable[T]:
        return self._ask("PUT", callback, path, params or (), data)

    def delete(
        self, callback: Callable[[Any], T], path: str, params: Params | None = None, data: str | bytes = b"", **_: Any
    ) -> Awaitable[T]:
        return self._ask("DELETE", callback, path, params or (), data)

    def post(
        self, callback: Callable[[Any], T], path: str, params: Params | None = None, data: str | bytes = b"", **_: Any
    ) -> Awaitable[T]:
        return self._ask("POST", callback, path, params or (), data)

    def close(self) -> Awaitable[None]:
        return self._wire.close()

    async def _ask(
        self, method: str, callback: Callable[[Any], T], path: str, params: Params, data: str | bytes, index: int = 0
    ) -> T:
        body = data.encode() if isinstance(data, str) else data
        answer = await self._wire.ask(method, path, params, body, index=index, may_lack=True)
        try:
            return callback(answer)
        except (ConsulException, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise ConsulError(
                f"{self._wire.place.name}: its answer to {path} can't be read: {type(error).__name__}.",
                hint="Is that the URL of a Consul agent?",
            ) from None
