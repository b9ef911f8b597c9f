"""What does an HTTP client get where the mesh has no answer?

The `fallback` of a call's policy, in the form of a response: of a value (text, bytes, anything that JSON can say, or a response of the
same library), of the last good answer, or of what a callable makes of the error. It is used after all attempts, for an error of
the mesh or an answer of 5xx, is counted, and says so in `response.extensions["meshlib.fallback"]`. A call without a fallback never
comes here. It decides nothing about attempts.

It stands in for an outage only: a request that can't be written, a service that nobody knows or a denial is a mistake, or somebody's
will, and comes out as it is.

The last good answer is kept for the same service, method, URL *and* headers (but those that belong to one call only), so that
nobody gets what was said to somebody else, and not where the answer itself forbids it (`Cache-Control: no-store`) or opens a session
(`Set-Cookie`). It also stands in for an answer whose body breaks off. What has since got another answer, such as a 404, is forgotten.
"""

from __future__ import annotations

import inspect
import json
import time
import weakref
from collections.abc import Hashable
from hashlib import blake2b
from types import ModuleType, SimpleNamespace
from typing import Any

from .. import errors
from ..call import Call, CallPolicy
from ..retry.fallback import LARGEST, Fallbacks, LastGood, word_of
from .twins import UNWRITABLE

clock = time.monotonic
# Methods that only ask.
_SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
# Headers that are different for each call, and say nothing of what is asked. (Baggage may: a user, a tenant.)
_PASSING = frozenset(
    (
        b"traceparent",
        b"tracestate",
        b"b3",
        b"x-request-id",
        b"x-correlation-id",
        b"x-mesh-attempt",
        b"x-mesh-deadline-ms",
    )
)
# Too early or too much: such an answer says nothing of what was asked.
_BUSY = frozenset((408, 425, 429))
_FRAMING = frozenset((b"content-encoding", b"transfer-encoding", b"content-length"))
_PASSING_PREFIXES = (b"x-b3-", b"x-stainless-")

_stores: weakref.WeakKeyDictionary[Any, Fallbacks] = weakref.WeakKeyDictionary()


def fallbacks_of(way: Any) -> Fallbacks:
    """The counts and the good answers of one mesh."""
    found = _stores.get(way.ledger)
    if found is None:
        found = _stores.setdefault(way.ledger, Fallbacks())
    return found


def is_outage(error: errors.MeshError) -> bool:
    """Does it say that nobody can answer now? All else is a mistake or a decision, which a fallback would hide."""
    if isinstance(error, errors.Refused):
        return not isinstance(error, (errors.Denied, errors.UnknownService, errors.NoRoute)) and error.reason != UNWRITABLE
    return isinstance(error, (errors.AttemptFailed, errors.DeadlineExceeded))


def policy_of(request: Any) -> CallPolicy | None:
    """The request's policy if it has a fallback."""
    policy = request.extensions.get("meshlib.policy")
    if policy is None:
        return None
    if not isinstance(policy, CallPolicy):
        policy = CallPolicy(**policy)
    return policy if policy.has_fallback else None


def key_of(service: str, request: Any) -> Hashable | None:
    """What makes two requests the same question; None for one whose answer is not kept."""
    if request.method not in _SAFE or "meshlib.stream" in request.extensions:
        return None
    headers = sorted(
        (lower, value)
        for lower, value in ((name.lower(), value) for name, value in request.headers.raw)
        if lower not in _PASSING and not lower.startswith(_PASSING_PREFIXES)
    )
    # A digest, since tokens and cookies are among them: they aren't kept in memory for as long as an answer is.
    return (service, request.method, str(request.url), blake2b(repr(headers).encode(), digest_size=32).digest())


def stand_ins(httpx: ModuleType) -> SimpleNamespace:
    """`.fetch` and `.fetch_async` for one module of the httpx family: a delivery with a fallback behind it."""

    def made(value: Any, request: Any) -> Any:
        """A response from what a fallback says."""
        if isinstance(value, httpx.Response):
            # A copy: the client makes the one that it gets its own, and the value serves many.
            headers = [(name, field) for name, field in value.headers.raw if name.lower() not in _FRAMING]
            return httpx.Response(value.status_code, headers=headers, content=value.content)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return httpx.Response(200, content=bytes(value))
        if isinstance(value, str):
            return httpx.Response(200, text=value)
        return httpx.Response(
            200,
            headers={"content-type": "application/json"},
            content=json.dumps(value, ensure_ascii=False, allow_nan=False).encode(),
        )

    def signed(response: Any, word: str, call: Call | None) -> Any:
        response.extensions = {**response.extensions, "http_version": b"HTTP/1.1", "meshlib.fallback": word}
        if call is not None:
            call.fallback = word
            response.extensions["meshlib.call"] = call
        return response

    def again(kept: tuple[int, list[tuple[bytes, bytes]], bytes]) -> Any:
        status, headers, body = kept
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

    def is_kept(response: Any) -> bool:
        if not 200 <= response.status_code < 300 or "set-cookie" in response.headers:
            return False
        if "no-store" in response.headers.get("cache-control", "").lower() or response.headers.get("vary", "").strip() == "*":
            return False
        size = response.headers.get("content-length", "")
        return isinstance(response.stream, httpx.ByteStream) or (size.isdigit() and int(size) <= LARGEST)

    def learns(way: Any, policy: CallPolicy, key: Hashable | None, response: Any) -> bool:
        """An answer below 500: is it kept? What isn't takes the place of what was."""
        if key is None or not isinstance(policy.fallback, LastGood):
            return False
        if is_kept(response):
            return True
        if response.status_code not in _BUSY:
            fallbacks_of(way).drop(key)
        return False

    def learned(way: Any, key: Hashable | None, response: Any, body: bytes) -> Any:
        if len(body) <= LARGEST:
            fallbacks_of(way).keep(key, (response.status_code, list(response.headers.raw), body), clock())
        else:
            fallbacks_of(way).drop(key)
        return whole(response, body)

    def failure(response: Any, request: Any) -> Exception:
        """An answer of 5xx as an error that a callable can look at."""
        made: Exception = httpx.HTTPStatusError(
            f"Server error '{response.status_code}' for url '{request.url}', after every attempt",
            request=request,
            response=response,
        )
        return made

    def stand_in(way: Any, policy: CallPolicy, key: Hashable | None, error: Exception) -> Any:
        """What the fallback answers: a value, or an awaitable of one. `_NONE` where it has none."""
        if isinstance(policy.fallback, LastGood):
            found = None if key is None else fallbacks_of(way).find(key, policy.fallback.max_age, clock())
            return _NONE if found is None else again(found.answer)
        return policy.fallback(error) if callable(policy.fallback) else policy.fallback

    def ended(way: Any, service: str, policy: CallPolicy, answer: Any, call: Call | None, request: Any) -> Any:
        word = word_of(policy.fallback)
        response = answer if isinstance(policy.fallback, LastGood) else made(answer, request)
        fallbacks_of(way).count(service, word)
        return signed(response, word, call)

    async def fetch_async(way: Any, service: str, policy: CallPolicy, request: Any, deliver: Any) -> Any:
        key = key_of(service, request)
        response = None
        try:
            response = await deliver(request)
            if response.status_code < 500:
                if not learns(way, policy, key, response):
                    return response
                return learned(way, key, response, b"".join([piece async for piece in response.stream]))
        except errors.MeshError as caught:
            # Maybe while the body of an answer was on its way.
            if response is not None:
                await response.stream.aclose()
            if not is_outage(caught) or (answer := stand_in(way, policy, key, caught)) is _NONE:
                raise
            if callable(policy.fallback) and inspect.isawaitable(answer):
                answer = await answer
            return ended(way, service, policy, answer, caught.call, request)
        except BaseException:
            if response is not None:
                await response.stream.aclose()
            raise
        call = response.extensions.get("meshlib.call")
        try:
            answer = stand_in(way, policy, key, failure(response, request))
        except BaseException:
            await response.stream.aclose()
            raise
        if answer is _NONE:
            return response
        await response.stream.aclose()
        if callable(policy.fallback) and inspect.isawaitable(answer):
            answer = await answer
        return ended(way, service, policy, answer, call, request)

    def fetch(way: Any, service: str, policy: CallPolicy, request: Any, deliver: Any) -> Any:
        key = key_of(service, request)
        response = None
        try:
            response = deliver(request)
            if response.status_code < 500:
                if not learns(way, policy, key, response):
                    return response
                return learned(way, key, response, b"".join(response.stream))
        except errors.MeshError as caught:
            if response is not None:
                response.stream.close()
            if not is_outage(caught) or (answer := stand_in(way, policy, key, caught)) is _NONE:
                raise
            return ended(way, service, policy, unawaited(answer, policy), caught.call, request)
        except BaseException:
            if response is not None:
                response.stream.close()
            raise
        call = response.extensions.get("meshlib.call")
        try:
            answer = unawaited(stand_in(way, policy, key, failure(response, request)), policy)
        except BaseException:
            response.stream.close()
            raise
        if answer is _NONE:
            return response
        response.stream.close()
        return ended(way, service, policy, answer, call, request)

    def whole(response: Any, body: bytes) -> Any:
        """The same answer, whose body has been read from its stream."""
        if isinstance(response.stream, httpx.ByteStream):
            return response
        extensions = {name: value for name, value in response.extensions.items() if name != "network_stream"}
        return httpx.Response(
            response.status_code, headers=response.headers.raw, stream=httpx.ByteStream(body), extensions=extensions
        )

    return SimpleNamespace(fetch=fetch, fetch_async=fetch_async)


# No fallback: not even None.
_NONE: Any = object()


def unawaited(answer: Any, policy: CallPolicy) -> Any:
    """The answer of a fallback to a blocking client, which can't await one."""
    if callable(policy.fallback) and inspect.iscoroutine(answer):
        answer.close()
        raise TypeError("the fallback of a call by a blocking client is async: nobody could await it. Give it a plain function.")
    return answer
