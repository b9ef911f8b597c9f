"""How does each gRPC client make the same call?

A mode opens a channel, `what` makes of it a list of functions, one for each caller, that give one message. Stubs are made as generated
code makes them. Each channel has one connection to one endpoint, so that all have as much to send at once. `bare` is a channel with
grpcio's own settings: no deadline, no balancing, and retries that could be (they are on where nobody turns them off). Runs in the worker's process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from .grpc_peers import BODY, CALL, CHAT, STREAM
from .machine import clock_of
from .peers import SERVER_NAME
from .worker import drive, drive_beside, drive_in_turn, drive_threads, on_loop

Ask = Callable[[], Awaitable[bytes]]
NO_RETRIES: Final = (("grpc.enable_retries", 0),)
LENGTH: Final = len(BODY)


@dataclass(frozen=True)
class Job:
    """Where to, and as whom. `config` is the mesh's file, `identity` the folder with our SVID, `bootstrap` grpcio's word on its control plane; each may be ""."""

    mode: str
    what: str
    count: int
    address: str
    config: str = ""
    identity: str = ""
    bootstrap: str = ""
    loop: str = "uvloop"


def tasks(seconds: float, **job: Any) -> dict[str, float]:
    made = Job(**job)

    async def main() -> dict[str, float]:
        async with ASYNC[made.mode](made) as channel, WHAT[made.what](channel, made.count) as calls:
            return await drive(calls, seconds, LENGTH)

    return on_loop(made.loop, main)


def added_aio(seconds: float, **job: Any) -> dict[str, float]:
    """The CPU that the mesh's channel takes for a call above grpcio's own, and how many times as much it is."""
    made = Job(**job)

    async def main() -> dict[str, float]:
        async with ASYNC[made.mode](made) as one, bare(made) as other:
            async with unary(one, made.count) as ones, unary(other, made.count) as others:
                return _as_ratio(await drive_in_turn(ones, others, seconds, LENGTH))

    return on_loop(made.loop, main)


def added_sync(seconds: float, **job: Any) -> dict[str, float]:
    """The same for one thread: nobody else wants the loop on which it takes turns."""
    made = Job(**job)

    def caller(channel: Any) -> Ask:
        call = channel.unary_unary(CALL, _registered_method=True)

        async def ask() -> bytes:
            return call(BODY)  # type: ignore[no-any-return]

        return ask

    async def main() -> dict[str, float]:
        with BLOCKING[made.mode](made) as one, bare_sync(made) as other:
            return _as_ratio(await drive_in_turn([caller(one)], [caller(other)], seconds, LENGTH))

    return on_loop(made.loop, main)


def added_served(pid: int, beside: str, core: int | None, seconds: float, **job: Any) -> dict[str, float]:
    """The CPU of a server's process for a call, above that for a call to the bare server `beside` in the same process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    made = Job(**job)

    async def main() -> dict[str, float]:
        async with bare(made) as one, bare(replace(made, address=beside)) as other:
            async with unary(one, made.count) as ones, unary(other, made.count) as others:
                return _as_ratio(await drive_in_turn(ones, others, seconds, LENGTH, lambda: clock_of(pid)))

    return on_loop(made.loop, main)


def _as_ratio(found: dict[str, float]) -> dict[str, float]:
    return {**found, "ratio": found["cpu_us"] / (found["cpu_us"] - found["added_us"])}


def loaded(pid: int, core: int | None, seconds: float, **job: Any) -> dict[str, float]:
    """For a server's sake. `core` is our own; None where there is but one."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    made = Job(**job)

    async def main() -> dict[str, float]:
        async with ASYNC[made.mode](made) as channel, unary(channel, made.count) as calls:
            return await drive_beside(calls, pid, seconds, LENGTH)

    return on_loop(made.loop, main)


def threads(seconds: float, **job: Any) -> dict[str, float]:
    made = Job(**job)
    with BLOCKING[made.mode](made) as channel:
        call = channel.unary_unary(CALL, _registered_method=True)
        return drive_threads([lambda: call(BODY)] * made.count, seconds, LENGTH)


# --- what is asked


@contextlib.asynccontextmanager
async def unary(channel: Any, count: int) -> AsyncIterator[list[Ask]]:
    call = channel.unary_unary(CALL, _registered_method=True)

    async def ask() -> bytes:
        return await call(BODY)  # type: ignore[no-any-return]

    yield [ask] * count


@contextlib.asynccontextmanager
async def stream(channel: Any, count: int) -> AsyncIterator[list[Ask]]:
    """Read as `async for` does it. A response of very many messages that is at its end is asked for again."""
    method = channel.unary_stream(STREAM, _registered_method=True)
    under_way: list[Any] = []

    def caller() -> Ask:
        call: Any = None
        messages: Any = None

        async def ask() -> bytes:
            nonlocal call, messages
            while True:
                if messages is None:
                    call = method(BODY)
                    under_way[:] = [call]
                    messages = aiter(call)
                try:
                    return await anext(messages)  # type: ignore[no-any-return]
                except StopAsyncIteration:
                    messages = None

        return ask

    yield [caller() for _ in range(count)]
    for call in under_way:
        call.cancel()


@contextlib.asynccontextmanager
async def chat(channel: Any, count: int) -> AsyncIterator[list[Ask]]:
    """One message there, one back, on a stream of its own for each caller."""
    method = channel.stream_stream(CHAT, _registered_method=True)
    calls = [method() for _ in range(count)]

    def caller(call: Any) -> Ask:
        async def ask() -> bytes:
            await call.write(BODY)
            return await call.read()  # type: ignore[no-any-return]

        return ask

    yield [caller(call) for call in calls]
    for call in calls:
        call.cancel()


WHAT: Final = {"unary": unary, "stream": stream, "chat": chat}


# --- who asks


@contextlib.contextmanager
def _mesh(job: Job) -> Iterator[Any]:
    import meshlib

    mesh = meshlib.Mesh.load(job.config, service="me")
    try:
        yield mesh
    finally:
        mesh.close()


@contextlib.asynccontextmanager
async def meshlib_channel(job: Job) -> AsyncIterator[grpc.aio.Channel]:
    with _mesh(job) as mesh:
        async with mesh.grpc_channel("orders") as channel:
            yield channel


@contextlib.contextmanager
def meshlib_sync(job: Job) -> Iterator[grpc.Channel]:
    with _mesh(job) as mesh, mesh.sync_grpc_channel("orders") as channel:
        yield channel


def _credentials(job: Job) -> grpc.ChannelCredentials:
    own = Path(job.identity)
    files = [(own / name).read_bytes() for name in ("bundle.pem", "key.pem", "svid.pem")]
    return grpc.ssl_channel_credentials(*files)


@contextlib.asynccontextmanager
async def bare(job: Job) -> AsyncIterator[grpc.aio.Channel]:
    if job.identity:
        options = [("grpc.ssl_target_name_override", SERVER_NAME)]
        async with grpc.aio.secure_channel(job.address, _credentials(job), options=options) as channel:
            yield channel
        return
    async with grpc.aio.insecure_channel(job.address) as channel:
        yield channel


@contextlib.asynccontextmanager
async def bare_no_retries(job: Job) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(job.address, options=NO_RETRIES) as channel:
        yield channel


@contextlib.asynccontextmanager
async def grpc_xds(job: Job) -> AsyncIterator[grpc.aio.Channel]:
    # Read when the first channel of this kind is made.
    os.environ["GRPC_XDS_BOOTSTRAP"] = job.bootstrap
    async with grpc.aio.insecure_channel("xds:///orders") as channel:
        yield channel


@contextlib.contextmanager
def bare_sync(job: Job) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(job.address) as channel:
        yield channel


@contextlib.contextmanager
def bare_sync_no_retries(job: Job) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(job.address, options=NO_RETRIES) as channel:
        yield channel


ASYNC: Final = {
    "meshlib": meshlib_channel,
    "meshlib-relay": meshlib_channel,
    "bare": bare,
    "bare-no-retries": bare_no_retries,
    "grpc-xds": grpc_xds,
    "envoy-pair": bare,
}
BLOCKING: Final[dict[str, Any]] = {"meshlib": meshlib_sync, "bare": bare_sync, "bare-no-retries": bare_sync_no_retries}
