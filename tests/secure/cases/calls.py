"""When is a call sent again, and when never? Area retry_safety.

The mesh's client calls a service with two endpoints that fail as the case says, over real sockets, and what reached them is counted. An outage
of a minute is played by the engine alone, whose clock is an argument.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx

import meshlib
from meshlib._native import core
from meshlib.errors import MeshError
from tests.secure.cases import ground
from tests.secure.cases.case import Answer, Case, not_understood
from tests.support import free_port

# Seconds for which the budget saves up.
WINDOW = 10
# Nothing is taken out, so that every attempt finds an endpoint.
PATIENT = {"breaker": {"failures": 1000, "minimum_calls": 1000, "max_ejected": 0.5}}
CONDITIONS = {
    "connect-failure": "connect", "connect": "connect", "refused-stream": "refused_stream", "reset": "reset", "timeout": "timeout",
    "protocol": "protocol", "retriable-4xx": "status", "gateway-error": "status", "unavailable": "status",
}  # fmt: skip


def retry_safety(case: Case) -> Answer:
    """By the key that says what happens."""
    given = case.given
    if "outage" in given or "storm" in given:
        return _outage(case)
    if "hedge" in given:
        return asyncio.run(_hedged(case, str(given["hedge"])))
    if "cancel" in given:
        return asyncio.run(_cancelled(case))
    if "grpc" in given:
        return asyncio.run(_by_grpc(case))
    if "header" in given and "fail" not in given:
        return asyncio.run(_inside(case))
    if "mirror" in given:
        return {"no_retry", "not_supported"}
    if ("deadline" in given or "deadline_left" in given) and "fail" not in given:
        # Too late for anything: a server that says nothing in time.
        return asyncio.run(_failing(Case(case.id, case.area, {"fail": "timeout", "deadline": "20ms"}, case.policy)))
    if "budget" in given:
        return _outage(case)
    if "fail" in given or "response" in given:
        return asyncio.run(_failing(case))
    raise not_understood(case)


def _policy(case: Case) -> dict[str, Any]:
    """What a case configures of retries, in words of mesh.yaml."""
    policy = case.policy
    retry: dict[str, Any] = {"backoff": ["1ms", "2ms"]}
    if "max_attempts" in policy:
        retry["attempts"] = int(policy["max_attempts"]) - 1
    on = policy.get("retry_on")
    if on is not None:
        retry["statuses"] = [500, 502, 503, 504] if "5xx" in on else [502, 503, 504]
        wanted = {CONDITIONS[word] for word in on if word in CONDITIONS} | ({"status"} if "5xx" in on else set())
        # What is said to be repeatable is so beside what always is.
        retry["on"] = sorted(wanted | {"connect", "refused_stream"})
    if policy.get("idempotency_key"):
        retry["idempotency_key"] = True
    if "budget" in policy:
        retry["budget"] = {"ratio": policy["budget"], **({"per_second": float(policy["min_rps"])} if "min_rps" in policy else {})}
    if policy.get("hedging"):
        retry |= {"hedge": True, "hedge_quantile": 0.5, "hedge_share": 1.0}
    return retry


def _service(case: Case, *addresses: str, **more: Any) -> dict[str, Any]:
    return {
        "discover": {"static": list(addresses)}, "balance": {"policy": "round_robin", "slow_start": "0s"}, "admit": PATIENT, "retry": _policy(case),
        **more,
    }  # fmt: skip


@contextlib.contextmanager
def _mesh(service: dict[str, Any], mode: str = "observe") -> Any:
    """A mesh of its own: budgets and turns are not shared by cases."""
    content = ground.document({"mode": mode}, services={"other": service})
    mesh = meshlib.Mesh.load(ground.written(content), service=ground.SERVICE)
    try:
        yield mesh
    finally:
        mesh.close()


def _counted(attempts: int) -> set[str]:
    if attempts <= 1:
        return {"no_retry"}
    return {"retry", *({"retry_once"} if attempts == 2 else set())}


# ------------------------------------------------------------------------------------------------ a call that fails


async def _failing(case: Case) -> Answer:
    given = case.given
    words = str(given.get("fail", given.get("response", ""))).lower()
    async with _two(words, given) as (addresses, heard, protocol):
        if protocol is None:
            raise not_understood(case)
        is_about_identity = protocol == "tls"
        service = _service(case, *addresses, protocol="http" if is_about_identity else protocol)
        with _mesh(service, "enforce" if is_about_identity else "observe") as mesh:
            async with mesh.client() as http:
                attempts = await _called(http, given, words)
    return _counted(max(attempts, len(heard)))


async def _called(http: Any, given: dict[str, Any], words: str) -> int:
    """One call; how often it was sent, by its own record."""
    options: dict[str, Any] = {}
    left = re.search(r"([\d.]+)\s*(ms|s)?", str(given.get("deadline_left", given.get("deadline", ""))))
    if left is not None:
        options["timeout"] = max(0.001, float(left[1]) * (0.001 if left[2] == "ms" else 1.0))
    if given.get("idempotent"):
        options["idempotent"] = True
    headers = {str(name): str(value) for name, value in dict(given.get("headers", {})).items()}
    if "idempotency-key" in given:
        headers["idempotency-key"] = str(given["idempotency-key"])
    try:
        reply = await http.request(
            given.get("method", "GET"),
            "http://other/",
            content=_body(given, words),
            headers=headers,
            extensions=meshlib.policy(**options),
        )
    except (MeshError, httpx.HTTPError) as error:
        call = meshlib.call_of(error)
        return call.attempts if call is not None else 1
    return int(reply.extensions["meshlib.call"].attempts)


def _body(given: dict[str, Any], words: str) -> Any:
    body = str(given.get("body", "x" if given.get("method", "GET") not in ("GET", "HEAD", "OPTIONS", "DELETE") else "")).lower()
    size = re.search(r"(\d+)\s*(k|m)i?b", body)
    if any(word in body for word in ("stream", "generator", "iterator")):

        async def pieces() -> Any:
            for _ in range(4):
                yield b"x" * 1024

        return pieces()
    if size:
        return b"x" * (int(size[1]) * (1024 if size[2] == "k" else 1024 * 1024))
    return body.encode() or None


@contextlib.asynccontextmanager
async def _two(words: str, given: dict[str, Any]) -> AsyncIterator[tuple[list[str], list[bytes], str | None]]:
    """Two endpoints that fail in the same way, what they heard of requests, and how they are spoken to."""
    heard: list[bytes] = []
    serve: Any = None
    protocol = "http"
    status = re.search(r"\b([1-5]\d\d)\b", words)
    if "refused_stream" in words or "goaway" in words or "rst_stream" in words:
        serve, protocol = _http2(words, heard), "http2"
    elif "refused" in words or "unreachable" in words or ("connect" in words and "reset" not in words and "timeout" not in words):
        yield [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"], heard, "http"
        return
    elif any(word in words for word in ("identity", "certificate", "svid", "tls")):
        async with _wrong_identity(heard) as addresses:
            yield addresses, heard, "tls"
        return
    elif status is not None:
        extra = "".join(
            f"{name}: {given[name]}\r\n" for name in ("retry-after", "x-mesh-no-retry", "grpc-status") if name in given
        )
        serve = _answering(f"HTTP/1.1 {status[1]} no\r\ncontent-length: 0\r\n{extra}\r\n".encode(), heard)
    elif any(
        word in words
        for word in (
            "mid-response",
            "response started",
            "partial",
            "truncat",
            "after headers",
            "after head",
            "mid-body",
            "started",
        )
    ):
        serve = _answering(b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\nhalf", heard, then="reset")
    elif any(word in words for word in ("reset", "closed", "eof", "disconnect", "hang")):
        serve = _answering(b"", heard, then="close" if "closed" in words or "eof" in words else "reset")
    elif "timeout" in words or "deadline" in words or "slow" in words:
        serve = _answering(None, heard)
    elif any(word in words for word in ("garbage", "protocol", "malformed", "invalid")):
        serve = _answering(b"HTTP/1.1 what\r\n\r\n", heard, then="close")
    if serve is None:
        yield [], heard, None
        return
    servers = [await asyncio.start_server(serve, "127.0.0.1", 0) for _ in range(2)]
    try:
        yield [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers], heard, protocol
    finally:
        for server in servers:
            server.close()


def _answering(answer: bytes | None, heard: list[bytes], then: str = "") -> Any:
    """A server of HTTP/1.1 that says always the same; None: nothing at all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if length:
                    await reader.readexactly(int(length[1]))
                elif b"chunked" in head.lower():
                    await reader.readuntil(b"0\r\n\r\n")
                heard.append(head)
                if answer is None:
                    await asyncio.sleep(1)
                    continue
                writer.write(answer)
                await writer.drain()
                if then:
                    break
        if then == "reset":
            with contextlib.suppress(OSError):
                plug = writer.get_extra_info("socket")
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writer.close()

    return serve


def _http2(words: str, heard: list[bytes]) -> Any:
    """A server of HTTP/2 that does not take what it is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(65536):
                for event in connection.receive_data(data):
                    if not isinstance(event, h2.events.RequestReceived):
                        continue
                    heard.append(b"")
                    if "goaway" in words:
                        last = event.stream_id if "processed" in words and "not processed" not in words else 0
                        connection.close_connection(h2.errors.ErrorCodes.NO_ERROR, last_stream_id=last)
                    else:
                        name = "REFUSED_STREAM" if "refused" in words else "INTERNAL_ERROR" if "internal" in words else "CANCEL"
                        connection.reset_stream(event.stream_id, h2.errors.ErrorCodes[name])
                writer.write(connection.data_to_send())
                if "goaway" in words and heard:
                    break
        writer.close()

    return serve


@contextlib.asynccontextmanager
async def _wrong_identity(heard: list[bytes]) -> AsyncIterator[list[str]]:
    """One endpoint, which proves to be somebody else of our trust domain."""
    from tests.secure.cases import pki, sessions

    made = ground.authority().issue("somebody-else")
    context = sessions._openssl_server(pki.held(made.chain, made.key))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield [f"127.0.0.1:{server.sockets[0].getsockname()[1]}"]
    finally:
        server.close()


# ------------------------------------------------------------------------------------------------ other ways to fail


async def _by_grpc(case: Case) -> Answer:
    """A gRPC service that ends every call with the same status."""
    word = str(case.given["grpc"]).upper()
    code = next((code for code in grpc.StatusCode if code.name in word), None)
    if code is None:
        raise not_understood(case)
    calls: list[str] = []

    class Failing(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            async def handle(request: bytes, context: Any) -> bytes:
                calls.append(handler_call_details.method)
                if "pushback" in word.lower() or "grpc-retry-pushback-ms" in case.given:
                    context.set_trailing_metadata(
                        (("grpc-retry-pushback-ms", str(case.given.get("grpc-retry-pushback-ms", "-1"))),)
                    )
                await context.abort(code, "no")
                return b""

            return grpc.unary_unary_rpc_method_handler(handle)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Failing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    content = _service(case, f"127.0.0.1:{port}", protocol="grpc")
    metadata = (("x-mesh-idempotent", "1"),) if case.given.get("idempotent") or "retry_on" in case.policy else ()
    try:
        with _mesh(content) as mesh:
            async with mesh.grpc_channel("other") as channel:
                with contextlib.suppress(grpc.RpcError, MeshError):
                    await channel.unary_unary("/a.B/C")(b"", metadata=metadata, timeout=2)
    finally:
        await server.stop(None)
    return _counted(len(calls))


async def _inside(case: Case) -> Answer:
    """A handler whose own caller retries already: its call fails, and is not sent again."""
    name, _, value = str(case.given["header"]).partition(":")
    value = value.strip().split(" ")[0]
    heard: list[bytes] = []
    serve = _answering(b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n", heard)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with _mesh(_service(case, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")) as mesh:
        async with mesh.client() as http:

            async def handler() -> None:
                await http.get("http://other/")

            await ground.ask_async(mesh, ground.Request(headers=[(name, value)]), handler)
    server.close()
    return _counted(len(heard))


async def _hedged(case: Case, method: str) -> Answer:
    """An endpoint that is slow, with hedging on; what is safe to do twice goes to another one meanwhile."""
    heard: list[bytes] = []
    servers = [await asyncio.start_server(_answering(None, heard), "127.0.0.1", 0) for _ in range(2)]
    addresses = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    with _mesh(_service(case, *addresses, deadline="300ms")) as mesh:
        async with mesh.client() as http:
            with contextlib.suppress(MeshError, httpx.HTTPError):
                content = b"x" if method.upper() in ("POST", "PATCH") else None
                await http.request(
                    method.upper().split()[0], "http://other/", content=content, extensions=meshlib.policy(hedge=0.02, retries=0)
                )
    for server in servers:
        server.close()
    return {"no_hedge", "no_retry"} if len(heard) == 1 else {"hedge"}


async def _cancelled(case: Case) -> Answer:
    """The caller goes away while its call waits for the next attempt."""
    heard: list[bytes] = []
    server = await asyncio.start_server(_answering(b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n", heard), "127.0.0.1", 0)
    service = _service(case, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    service["retry"] = {"attempts": 5, "backoff": ["200ms", "200ms"]}
    with _mesh(service) as mesh:
        async with mesh.client() as http:
            task = asyncio.create_task(http.get("http://other/"))
            while not heard:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.01)
            before = len(heard)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeshError, httpx.HTTPError):
                await task
            await asyncio.sleep(0.45)
    server.close()
    return {"no_further_attempts", "no_retry", "cancelled"} if len(heard) == before else {"went_on"}


def _outage(case: Case) -> Answer:
    """Everything fails for a minute at a thousand calls a second, by the engine's own clock."""
    words = str(case.given.get("outage", case.given.get("storm", ""))).lower()
    rate = int(found[1]) if (found := re.search(r"(\d+)\s*rps", words)) else 1000
    seconds = int(found[1]) if (found := re.search(r"(\d+)\s*s\b", words)) else 60
    status = int(found[1]) if (found := re.search(r"\b(5\d\d)\b", words)) else 503
    addresses = [f"127.0.0.1:{port}" for port in (1, 2, 3)]
    with _mesh(_service(case, *addresses)) as mesh:
        engine = mesh.engine
        begun = time.monotonic()
        originals = attempts = 0
        # A tenth of the time with all of the rate says the same, and is quick.
        for number in range(min(rate * seconds, 30_000)):
            now = begun + number / rate
            originals += 1
            attempts += _sent(engine, now, status)
    # What may be retried each second whatever the rate is (for services with few calls) stands beside the share.
    floor = float(case.policy.get("min_rps", 10)) * (originals / rate + WINDOW)
    ratio = (attempts - floor) / originals
    return {"attempts/originals<=1.2", "bounded"} if ratio <= 1.2 else {f"attempts/originals={ratio:.3f}"}


def _sent(engine: core.Engine, now: float, status: int) -> int:
    """One call through the engine; how often it went out."""
    try:
        call = engine.begin("other", "GET", "/", [], now)
    except MeshError:
        return 0
    attempts = 0
    while True:
        try:
            step = call.next(now)
        except MeshError:
            return attempts
        if step[0] == core.WAIT:
            now += step[1]
            continue
        if step[0] != core.SEND:
            return attempts
        attempts += 1
        if call.head(step[1], core.OUTCOME_RESPONSE, status, now) != core.RETRY:
            call.finish(step[1], core.OUTCOME_RESPONSE, now)
            return attempts
