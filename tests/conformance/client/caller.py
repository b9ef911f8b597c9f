"""How does one behaviour run with both kinds of client? It is written for the asynchronous one; the blocking one is put into its shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import uvloop

# How a client is driven: by which loop, or by none.
DRIVERS = ("asyncio", "uvloop", "sync")


class Streamed:
    """An open response of either kind."""

    def __init__(self, response: Any, *, is_async: bool) -> None:
        self.response = response
        self._is_async = is_async

    async def pieces(self, form: str, *given: Any) -> list[Any]:
        """All of `iter_<form>`."""
        if self._is_async:
            return [piece async for piece in getattr(self.response, f"aiter_{form}")(*given)]
        return list(getattr(self.response, f"iter_{form}")(*given))

    async def first(self, form: str) -> Any:
        if self._is_async:
            return await anext(getattr(self.response, f"aiter_{form}")())
        return next(getattr(self.response, f"iter_{form}")())

    async def read(self) -> bytes:
        return await self.response.aread() if self._is_async else self.response.read()

    async def close(self) -> None:
        if self._is_async:
            await self.response.aclose()
        else:
            self.response.close()


class Caller:
    """A client of httpx, asynchronous or not, and the base of the URLs that it calls."""

    def __init__(self, client: Any, base: str, *, is_async: bool, options: Callable[..., Any]) -> None:
        self.client = client
        self.base = base
        self.is_async = is_async
        self._options = options

    async def request(self, method: str, path: str, **options: Any) -> Any:
        asked = self.client.request(method, self.base + path if path.startswith("/") else path, **options)
        return await asked if self.is_async else asked

    async def get(self, path: str, **options: Any) -> Any:
        return await self.request("GET", path, **options)

    async def post(self, path: str, **options: Any) -> Any:
        return await self.request("POST", path, **options)

    async def send(self, request: Any, **options: Any) -> Any:
        sent = self.client.send(request, **options)
        return await sent if self.is_async else sent

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **options: Any) -> AsyncIterator[Streamed]:
        if self.is_async:
            async with self.client.stream(method, self.base + path, **options) as response:
                yield Streamed(response, is_async=True)
        else:
            with self.client.stream(method, self.base + path, **options) as response:
                yield Streamed(response, is_async=False)

    @contextlib.asynccontextmanager
    async def other(self, **options: Any) -> AsyncIterator[Caller]:
        """A client of the same kind with other options."""
        client = self._options(**options)
        try:
            yield Caller(client, self.base, is_async=self.is_async, options=self._options)
        finally:
            if self.is_async:
                await client.aclose()
            else:
                client.close()

    def hook(self, seen: Callable[[Any], Any]) -> Any:
        """An event hook of the client's kind."""
        if not self.is_async:
            return seen

        async def hook(what: Any) -> None:
            seen(what)

        return hook

    def body(self, *pieces: bytes) -> Any:
        """A body in pieces, of the client's kind."""
        if not self.is_async:
            return iter(pieces)

        async def body() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return body()

    async def failure(self, path: str, **options: Any) -> Any:
        """The error of a call that must fail."""
        try:
            await self.request(options.pop("method", "GET"), path, **options)
        except Exception as error:
            return error
        raise AssertionError(f"{path} was answered")


def drive(driver: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a behaviour to its end."""
    factory = uvloop.new_event_loop if driver == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work())
