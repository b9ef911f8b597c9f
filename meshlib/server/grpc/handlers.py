"""What stands between a gRPC call that arrives and the application's handler?

The interceptors wrap the application's handler, in all four kinds and in the two styles of asyncio's API, with the inbound way of a call
(`visit.py`); a blocking handler in an asyncio server stays one, and runs in the server's threads. One request message is parsed
after the caller was let in; those of a stream are parsed when the handler asks for them.

Messages of streams are counted where gRPC reads and writes them, by (de)serializers, so that handlers keep gRPC's own iterators and
context. gRPC asks the interceptors anew for each call, so that a wrapping is of one call; only that of a method with one message each
way knows nothing of its calls, and is kept.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio

from ..way import shown
from .visit import ATTEND, UNKNOWN_METHOD, Exchange, Reception

log = logging.getLogger("meshlib.server")

UNREADABLE: Final = grpc.StatusCode.INTERNAL, "the request can't be read"
# In the place of a message that can't be read; None may be one.
NOTHING: Final = object()

# Wrapped methods that a server keeps: more than an application has, whatever callers ask for.
METHODS_KEPT: Final = 1024


class _Interceptor:
    """What both have: the reception, and the wrapped methods that are kept, with the handlers that they were made of."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception
        self._kept: dict[str, tuple[Any, Any]] = {}

    def _wrapped(self, method: str, handler: Any, *, is_aio: bool) -> Any:
        kept = self._kept.get(method)
        if kept is not None and kept[0] is handler:
            return kept[1]
        if handler is None or handler.unary_unary is None or (is_aio and not inspect.iscoroutinefunction(handler.unary_unary)):
            return wrap(self._reception, method, handler, is_aio=is_aio)
        passage = _Passage(self._reception, method, handler.unary_unary, handler.request_deserializer, 1, 1)
        outer = passage.respond_aio if is_aio else passage.respond
        made = grpc.unary_unary_rpc_method_handler(outer, None, handler.response_serializer)
        if len(self._kept) >= METHODS_KEPT:
            self._kept.clear()
        self._kept[method] = handler, made
        return made


class MeshInterceptor(_Interceptor, grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The inbound way in a `grpc.aio.server`."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        handler = await continuation(handler_call_details) if method in self._kept or is_exact(method) else None
        return self._wrapped(method, handler, is_aio=True)


class MeshSyncInterceptor(_Interceptor, grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """The inbound way in a `grpc.server`."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        method = handler_call_details.method
        handler = continuation(handler_call_details) if method in self._kept or is_exact(method) else None
        return self._wrapped(method, handler, is_aio=False)


def is_exact(method: str) -> bool:
    """Whether this is `/package.Service/Method`, in letters, digits and underscores of ASCII, and nothing else."""
    service, slash, name = method[1:].partition("/")
    is_ours = method.startswith("/") and bool(slash) and method.isascii()
    return is_ours and service.replace(".", "_").replace("_", "a").isalnum() and name.replace("_", "a").isalnum()


def wrap(reception: Reception, method: str, handler: Any, *, is_aio: bool) -> Any:
    """A handler that takes the call in, hands it to the application's, and sees it out. None stands for an unknown method."""
    if handler is None:
        passage = _Passage(reception, method, None, None)
        return grpc.stream_stream_rpc_method_handler(passage.nobody_aio if is_aio else passage.nobody)
    is_unary_in, is_unary_out = not handler.request_streaming, not handler.response_streaming
    inner = (
        (handler.unary_unary if is_unary_out else handler.unary_stream)
        if is_unary_in
        else (handler.stream_unary if is_unary_out else handler.stream_stream)
    )
    parse = handler.request_deserializer if is_unary_in else None
    passage = _OneCall(reception, method, inner, parse, int(is_unary_in), int(is_unary_out))
    outer: Any
    if not is_aio or not (inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)):
        outer = passage.respond if is_unary_out else passage.stream
        if is_aio and (task := asyncio.current_task()) is not None:
            # gRPC cancels it when the client leaves, and the thread hears nothing: its context there calls nobody back.
            task.add_done_callback(passage.ended)
    elif inspect.isasyncgenfunction(inner):
        outer = passage.stream_aio
    else:
        outer = passage.respond_aio  # one message, or none where it writes them into the context
    make = (
        (grpc.unary_unary_rpc_method_handler if is_unary_out else grpc.unary_stream_rpc_method_handler)
        if is_unary_in
        else (grpc.stream_unary_rpc_method_handler if is_unary_out else grpc.stream_stream_rpc_method_handler)
    )
    return make(
        outer,
        None if is_unary_in else passage.hearing(handler.request_deserializer),
        handler.response_serializer if is_unary_out else passage.saying(handler.response_serializer),
    )


class _Passage:
    """A method's way in and out. The four faces differ in how they wait and in how they hand on messages."""

    __slots__ = ("_inner", "_method", "_parse", "_reception", "received", "sent")

    def __init__(self, reception: Reception, method: str, inner: Any, parse: Any, received: int = 0, sent: int = 0) -> None:
        self._reception = reception
        self._method = method
        self._inner = inner
        self._parse = parse
        # Messages that come and go beside streams: one each, or none.
        self.received, self.sent = received, sent

    async def respond_aio(self, request: Any, context: Any) -> Any:
        exchange = self.enter(context)
        if exchange.refusal is not None or exchange.todo & ATTEND:
            await self._meet_aio(exchange, context)
        with exchange:
            message = self._parsed(request)
            if message is NOTHING:
                await context.abort(*UNREADABLE)
            return await self._inner(message, exchange.shown(context))

    async def stream_aio(self, request: Any, context: Any) -> Any:
        exchange = self.enter(context)
        if exchange.refusal is not None or exchange.todo & ATTEND:
            await self._meet_aio(exchange, context)
        with exchange:
            message = self._parsed(request)
            if message is NOTHING:
                await context.abort(*UNREADABLE)
            async for response in self._inner(message, exchange.shown(context)):
                yield response

    def respond(self, request: Any, context: Any) -> Any:
        with self._met(context) as exchange:
            message = self._parsed(request)
            if message is NOTHING:
                context.abort(*UNREADABLE)
            return self._inner(message, exchange.shown(context))

    def stream(self, request: Any, context: Any) -> Any:
        with self._met(context) as exchange:
            message = self._parsed(request)
            if message is NOTHING:
                context.abort(*UNREADABLE)
            yield from self._inner(message, exchange.shown(context))

    async def nobody_aio(self, request: Any, context: Any) -> None:
        await context.abort(*self._unknown(context))

    def nobody(self, request: Any, context: Any) -> Any:
        _abort(context, *self._unknown(context))
        yield b""

    def enter(self, context: Any) -> Exchange:
        exchange = self._reception.enter(self._method, context)
        exchange.received, exchange.answers = self.received, self.sent
        return exchange

    async def _meet_aio(self, exchange: Exchange, context: Any) -> None:
        """Whatever the call has to wait for; who is refused gets no further."""
        if exchange.refusal is None:
            await exchange.attend()
        if exchange.refusal is not None:
            await context.abort(*exchange.refusal)

    def _met(self, context: Any) -> Exchange:
        """The same for threads, which also hear that the client leaves."""
        exchange = self.enter(context)
        if exchange.refusal is None:
            exchange.listen()
            if exchange.todo & ATTEND:
                exchange.attend_blocking()
        if exchange.refusal is not None:
            _abort(context, *exchange.refusal)
        return exchange

    def _unknown(self, context: Any) -> tuple[Any, ...]:
        """Whether a method exists is told only to who may ask."""
        exchange = self._reception.enter(self._method, context, is_known=False)
        if exchange.refusal is None:
            exchange.close(UNKNOWN_METHOD[0])
        return exchange.refusal or UNKNOWN_METHOD

    def _parsed(self, request: Any) -> Any:
        """The one message of a request, NOTHING if it can't be read; a stream as it is."""
        if self._parse is None:
            return request
        try:
            return self._parse(request)
        except Exception as error:
            log.info("a request to %s can't be parsed", shown(self._method), exc_info=error)
            return NOTHING


class _OneCall(_Passage):
    """The same for one call, where something beside its handler has to find it: what counts its messages, or gRPC's own task."""

    __slots__ = ("_exchange", "_is_ended")

    _exchange: Exchange | None
    _is_ended: bool

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._exchange = None
        self._is_ended = False

    def enter(self, context: Any) -> Exchange:
        exchange = self._exchange = super().enter(context)
        if self._is_ended:
            exchange.gone()
        return exchange

    def ended(self, task: object) -> None:
        """gRPC has done with the call; a thread may still be at it, or come to it later."""
        self._is_ended = True
        if self._exchange is not None:
            self._exchange.gone()

    def hearing(self, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        """What parses the messages of a stream that comes in, and counts them."""

        def heard(data: bytes) -> Any:
            if self._exchange is not None:
                self._exchange.received += 1
            return data if parse is None else parse(data)

        return heard

    def saying(self, write: Callable[[Any], bytes] | None) -> Callable[[Any], Any]:
        """The same for those of a stream that goes out."""

        def said(message: Any) -> Any:
            if self._exchange is not None:
                self._exchange.sent += 1
            return message if write is None else write(message)

        return said


def _abort(context: Any, code: grpc.StatusCode, words: str, metadata: Any = None) -> None:
    if metadata is not None:
        context.set_trailing_metadata(metadata)
    context.abort(code, words)
