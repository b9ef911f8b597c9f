"""How is etcd asked, and what if one of its members doesn't answer?

By its v3 JSON gateway, with httpx: there is no maintained client for Python, and the few calls that a registry needs are a few
lines each. Members are tried in their order, beginning with the one that answered last. That is failover, no retry: each is
asked once, and who asked decides what comes then. Every question has an end: a limit in time and a limit in bytes.

A token of etcd's lives for minutes, and not over a restart: when it isn't taken any more, a new one is fetched, once. It does
nothing by itself, and belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from itertools import pairwise
from typing import Any, Final

import httpx

from .messages import (
    INVALID,
    NOT_FOUND,
    PRECONDITION,
    UNAUTHENTICATED,
    UNAVAILABLE,
    EtcdError,
    Page,
    TooLarge,
    end_of,
    number,
    read_error,
    read_object,
    read_page,
    read_result,
    revision_of,
    text_of,
)
from .settings import Settings

# Entries that are asked for at once. So many are read in about a millisecond, and the interpreter is free again.
PAGE: Final = 250
# Bytes of one answer, and of one line of a watch.
LARGEST_ANSWER: Final = 16 << 20
# Entries of one range altogether: what answers without end is no registry.
MOST_ENTRIES: Final = 500_000
# Bytes of its keys and values altogether: half a kilobyte for each of them.
MOST_BYTES: Final = 256 << 20
_DEADLINE: Final = 4  # gRPC's DeadlineExceeded: this member has no leader that it reaches


class Client:
    """A cluster of etcd, for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._http: httpx.AsyncClient | None = None
        self._context: ssl.SSLContext | None = None
        self._stamps: tuple[int, ...] = ()
        self._token: str | None = None  # "" where etcd wants none
        self._signing_in = asyncio.Lock()
        self._first = 0

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    def after_fork(self) -> None:
        """In a forked child: what is open is the parent's."""
        self._http, self._context, self._token = None, None, None
        self._signing_in = asyncio.Lock()

    # ------------------------------------------------------------------ keys

    async def range(self, start: bytes, end: bytes) -> AsyncGenerator[Page, None]:
        """All entries from `start` up to `end`, as of one revision, a page at a time."""
        revision, count, bulk, size = 0, 0, 0, PAGE
        while True:
            question = {"key": text_of(start), "range_end": text_of(end), "limit": size, "revision": revision}
            try:
                page = read_page(await self.ask("kv/range", question))
            except TooLarge:
                if size == 1:
                    raise
                size = max(1, size // 16)
                continue
            keys = [entry.key for entry in page.entries]
            if not (all(a < b for a, b in pairwise(keys)) and all(start <= key < end for key in keys)):
                raise EtcdError("etcd answered with keys that were not asked for, or out of order.")
            count += len(keys)
            bulk += sum(len(entry.key) + len(entry.value) for entry in page.entries)
            if (page.has_more and not keys) or count > MOST_ENTRIES or bulk > MOST_BYTES:
                raise EtcdError(
                    f"etcd's answer doesn't come to an end: {count} entries, {bulk >> 20} MiB so far.", is_refusal=True
                )
            revision = revision or page.revision
            yield Page(revision, page.entries, page.has_more)
            if not page.has_more:
                return
            start = keys[-1] + b"\0"

    async def at(self, key: bytes) -> Page:
        """What stands at one key."""
        return read_page(await self.ask("kv/range", {"key": text_of(key), "limit": 1}))

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> int:
        """Write, for as long as the lease lives. The revision since when it holds."""
        said = await self.ask("kv/put", {"key": text_of(key), "value": text_of(value), "lease": lease})
        return revision_of(read_object(said))

    async def delete(self, prefix: bytes, *, is_prefix: bool = False) -> int:
        """Delete a key, or all that begin so. The revision since when they are gone."""
        question = {"key": text_of(prefix), **({"range_end": text_of(end_of(prefix))} if is_prefix else {})}
        return revision_of(read_object(await self.ask("kv/deleterange", question)))

    async def ping(self, key: bytes, url: str = "") -> str:
        """Whether a member answers, and a majority of the cluster with it; whose answer it was."""
        question = {"key": text_of(key), "limit": 1, "count_only": True}
        body, answered = await self._ask_any("kv/range", question, (url,) if url else self._members())
        read_page(body)
        return answered

    # ------------------------------------------------------------------ leases

    async def grant(self, ttl: float) -> tuple[int, float]:
        """A lease, and the seconds for which it was given."""
        said = read_object(await self.ask("lease/grant", {"TTL": max(1, round(ttl))}))
        revision_of(said)
        lease, given = number(said, "ID"), number(said, "TTL")
        if not lease or not given:
            raise EtcdError("etcd granted no lease.")
        return lease, float(given)

    async def keep_alive(self, lease: int) -> float:
        """Seconds for which the lease lives from now on; 0.0 if there is none any more."""
        try:
            body = await self.ask("lease/keepalive", {"ID": lease})
        except EtcdError as error:
            if error.code == NOT_FOUND:
                return 0.0
            raise
        said = read_result(body)
        revision_of(said)
        return float(number(said, "TTL"))

    async def revoke(self, lease: int) -> None:
        """End a lease, and delete what lives by it. Harmless if there is none."""
        try:
            await self.ask("lease/revoke", {"ID": lease})
        except EtcdError as error:
            if error.code != NOT_FOUND:
                raise

    # ------------------------------------------------------------------ one question

    async def ask(self, path: str, question: Mapping[str, Any]) -> bytes:
        """The answer of the first member that has one. Raises EtcdError."""
        return (await self._ask_any(path, question, self._members()))[0]

    def _members(self) -> tuple[str, ...]:
        urls = self.settings.urls
        return urls[self._first :] + urls[: self._first]

    async def _ask_any(self, path: str, question: Mapping[str, Any], urls: tuple[str, ...]) -> tuple[bytes, str]:
        failure: EtcdError | None = None
        for url in urls:
            try:
                body = await self._with_token(url, path, question)
            except asyncio.CancelledError:
                # Who asked had less time than this member was given: the next question begins with another.
                self._first = (self.settings.urls.index(url) + 1) % len(self.settings.urls)
                raise
            except EtcdError as error:
                if error.code not in (UNAVAILABLE, _DEADLINE):
                    raise
                failure = error
            else:
                self._first = self.settings.urls.index(url)
                return body, url
        assert failure is not None
        raise failure

    async def _with_token(self, url: str, path: str, question: Mapping[str, Any]) -> bytes:
        token = await self._signed_in(url)
        try:
            return await self._post(url, path, question, token)
        except EtcdError as error:
            if not _is_about_token(error) or self.settings.password is None:
                raise
        self.forget_token(token)
        return await self._post(url, path, question, await self._signed_in(url))

    async def _signed_in(self, url: str) -> str:
        """A token, or "" where none is needed. One asks for it, and those who come meanwhile wait: it costs etcd a tenth of a second."""
        async with self._signing_in:
            if self._token is None:
                credentials = self.settings.credentials()
                if credentials is None:
                    return ""
                try:
                    body = await self._post(url, "auth/authenticate", {"name": credentials[0], "password": credentials[1]}, "")
                except EtcdError as error:
                    if error.code != PRECONDITION:  # authentication is switched off there
                        raise
                    self._token = ""
                else:
                    self._token = token_of(body)
            return self._token

    def forget_token(self, token: str) -> None:
        """It isn't taken any more."""
        if self._token == token:
            self._token = None

    async def _post(self, url: str, path: str, question: Mapping[str, Any], token: str) -> bytes:
        try:
            async with asyncio.timeout(self.settings.timeout), self._sent(url, path, question, token) as answer:
                body = bytearray()
                async for part in answer.aiter_raw():
                    body += part
                    if len(body) > LARGEST_ANSWER:
                        raise TooLarge(f"etcd's answer is longer than {LARGEST_ANSWER >> 20} MiB.", is_refusal=True)
        except TimeoutError:
            raise EtcdError(f"etcd at {url} gave no answer within {self.settings.timeout:g} s.", code=UNAVAILABLE) from None
        if answer.status_code != httpx.codes.OK:
            raise read_error(answer.status_code, bytes(body))
        return bytes(body)

    # ------------------------------------------------------------------ a stream

    @contextlib.asynccontextmanager
    async def lines(self, url: str, path: str, question: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of an answer that doesn't end. Nothing of it has a limit in time: that is the caller's."""
        token = await self._signed_in(url)
        async with self._sent(url, path, question, token) as answer:
            if answer.status_code != httpx.codes.OK:
                self.forget_token(token)
                raise EtcdError(f"etcd's gateway answered with HTTP status {answer.status_code}.", code=UNAVAILABLE)
            yield lines_of(answer.aiter_raw(), url)

    @contextlib.asynccontextmanager
    async def _sent(self, url: str, path: str, question: Mapping[str, Any], token: str) -> AsyncIterator[httpx.Response]:
        headers = {"authorization": token} if token else {}
        content = json.dumps(question).encode()
        try:
            async with self._client().stream("POST", f"{url}/v3/{path}", content=content, headers=headers) as answer:
                yield answer
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, ssl.SSLError) as error:
            raise _lost(url, error) from None
        except EtcdError:
            raise
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise _lost(url, error) from None

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            self._context = context_of(self.settings)
            limits = httpx.Limits(max_connections=64, max_keepalive_connections=8, keepalive_expiry=60.0)
            transport = httpx.AsyncHTTPTransport(
                verify=True if self._context is None else self._context,
                trust_env=False,
                limits=limits,
                socket_options=_socket_options(),
            )
            timeout = httpx.Timeout(self.settings.timeout, read=None)
            self._http = httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False, follow_redirects=False)
            self._stamps = self._written()
        elif self._context is not None and (stamps := self._written()) != self._stamps:
            # New connections are made with the new certificate; those that are open were proved with the old one.
            with contextlib.suppress(OSError, ValueError):  # half written: the next look finds it whole
                self.settings.load_certificate(self._context)
                self._stamps = stamps
        return self._http

    def _written(self) -> tuple[int, ...]:
        paths = [path for path in (self.settings.cert, self.settings.key) if path]
        try:
            return tuple(os.stat(path).st_mtime_ns for path in paths)
        except OSError:
            return ()


def context_of(settings: Settings) -> ssl.SSLContext | None:
    return settings.context() if any(url.startswith("https:") for url in settings.urls) else None


async def lines_of(parts: AsyncIterator[bytes], url: str) -> AsyncIterator[bytes]:
    """Lines of bounded length; it ends where the answer ends."""
    pending = bytearray()
    async for part in parts:
        pending += part
        if b"\n" in part:
            *whole, rest = pending.split(b"\n")
            pending = bytearray(rest)
            for line in whole:
                if line.strip():
                    yield bytes(line)
        if len(pending) > LARGEST_ANSWER:
            raise TooLarge(f"a line of etcd at {url} is longer than {LARGEST_ANSWER >> 20} MiB.")


def token_of(body: bytes) -> str:
    """The token in an answer, if it is one: it goes into a header."""
    token = read_object(body).get("token")
    if (
        not isinstance(token, str)
        or not 1 <= len(token) <= 8192
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise EtcdError("etcd gave no token.")
    return token


def _is_about_token(error: EtcdError) -> bool:
    if error.code == UNAUTHENTICATED:
        return True
    words = ("user name is empty", "auth token", "auth store is old")
    return error.code == INVALID and any(word in error.message for word in words)


def _lost(url: str, error: Exception) -> EtcdError:
    said = str(error).splitlines()
    return EtcdError(
        f"etcd at {url} can't be reached: {said[0][:200] if said and said[0] else type(error).__name__}.", code=UNAVAILABLE
    )


def _socket_options() -> list[tuple[int, int, int]]:
    """A watch may be silent for long: the kernel asks whether the other end is still there."""
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
    options = [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in wanted.items() if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *options]
