"""Is every failure of a mesh call the right class of httpx, and ours, with the request and the call? Real sockets, scripted peers."""

from __future__ import annotations

import asyncio
import copy
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

import meshlib
from meshlib import errors
from meshlib.client import faults
from meshlib.client.twins import UNWRITABLE, names_of, twins
from tests.support import Request, Scripted, free_port, mesh_of, ok, scripted

MODULES = (httpx, httpx2)


def service(address: str, **more: Any) -> dict[str, Any]:
    return {"orders": {"discover": {"static": [address]}, "retry": {"attempts": 1}, **more}}


@pytest.fixture
def silent() -> Iterator[str]:
    """An address whose backlog is full: a connection is neither refused nor made."""
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        plug.listen(0)
        others = [socket.socket() for _ in range(4)]
        for other in others:
            other.setblocking(False)
            other.connect_ex(plug.getsockname())
        yield f"127.0.0.1:{plug.getsockname()[1]}"
        for other in others:
            other.close()


async def failure(http: Any, **options: Any) -> Any:
    url = options.pop("url", "http://orders/x")
    try:
        if isinstance(http, (httpx.AsyncClient, httpx2.AsyncClient)):
            await http.request(options.pop("method", "POST"), url, **options)
        else:
            await asyncio.to_thread(http.request, options.pop("method", "POST"), url, **options)
    except Exception as error:
        return error
    raise AssertionError("it was answered")


def told(module: Any, error: Any, name: str, ours: type) -> None:
    assert isinstance(error, getattr(module, name)), (type(error).__mro__, name)
    assert isinstance(error, ours)
    assert (error.request.method, str(error.request.url)) == ("POST", "http://orders/x")
    again = pickle.loads(pickle.dumps(error))
    copied = copy.copy(error)
    for other in (again, copied):
        assert type(other) is type(error)
        assert (str(other), other.reason, other.hint) == (str(error), error.reason, error.hint)
        assert str(other.request.url) == "http://orders/x"
    assert copied.call is error.call


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("kind", ["client", "sync_client"])
class TestEach:
    """Both clients, both modules."""

    def client(self, mesh: meshlib.Mesh, module: Any, kind: str, **options: Any) -> Any:
        return getattr(mesh, kind)(httpx=module, **options)

    async def test_nobody_listens(self, tmp_path: Path, module: Any, kind: str) -> None:
        """ConnectError."""
        with mesh_of(tmp_path, service(f"127.0.0.1:{free_port()}")) as mesh:
            error = await failure(self.client(mesh, module, kind))
            told(module, error, "ConnectError", meshlib.ConnectFailed)
            assert error.call.service == "orders"

    async def test_no_connection_in_time(self, tmp_path: Path, module: Any, kind: str, silent: str) -> None:
        """ConnectTimeout, whoever set the time: httpx, the configuration or a deadline."""
        with mesh_of(tmp_path, service(silent, admit={"connect": "50ms"})) as mesh:
            told(module, await failure(self.client(mesh, module, kind)), "ConnectTimeout", meshlib.ConnectFailed)
            error = await failure(self.client(mesh, module, kind), timeout=module.Timeout(5, connect=0.02))
            told(module, error, "ConnectTimeout", meshlib.ConnectFailed)

    async def test_no_answer_in_time(self, tmp_path: Path, module: Any, kind: str) -> None:
        """ReadTimeout: by httpx's timeout, by the deadline."""

        async def never(server: Scripted, request: Request) -> bytes:
            await asyncio.sleep(30)
            return ok()

        async with scripted(never) as server:
            with mesh_of(tmp_path, service(server.address)) as mesh:
                http = self.client(mesh, module, kind)
                told(module, await failure(http, timeout=0.05), "ReadTimeout", meshlib.AttemptTimeout)
                with meshlib.deadline(0.1):
                    told(module, await failure(http), "ReadTimeout", meshlib.DeadlineExceeded)

    async def test_the_peer_takes_no_more(self, tmp_path: Path, module: Any, kind: str) -> None:
        """WriteTimeout."""
        with socket.socket() as plug:
            plug.bind(("127.0.0.1", 0))
            plug.listen(5)
            with mesh_of(tmp_path, service(f"127.0.0.1:{plug.getsockname()[1]}")) as mesh:
                http = self.client(mesh, module, kind)
                error = await failure(http, content=b"x" * 30_000_000, timeout=module.Timeout(5, write=0.1))
                told(module, error, "WriteTimeout", meshlib.AttemptTimeout)

    async def test_the_peer_closes_without_a_word(self, tmp_path: Path, module: Any, kind: str) -> None:
        """RemoteProtocolError, as httpx says it; and a ReadError, as it is one."""

        async def die(server: Scripted, request: Request) -> None:
            return None

        async with scripted(die) as server:
            with mesh_of(tmp_path, service(server.address)) as mesh:
                error = await failure(self.client(mesh, module, kind))
                told(module, error, "RemoteProtocolError", meshlib.ConnectionLost)
                told(module, error, "ReadError", meshlib.ConnectionLost)

    async def test_the_peer_speaks_no_http(self, tmp_path: Path, module: Any, kind: str) -> None:
        """RemoteProtocolError."""

        async def babble(server: Scripted, request: Request) -> bytes:
            return b"SSH-2.0-OpenSSH_9.2\r\n\r\n"

        async with scripted(babble) as server:
            with mesh_of(tmp_path, service(server.address)) as mesh:
                error = await failure(self.client(mesh, module, kind))
                told(module, error, "RemoteProtocolError", meshlib.ProtocolError)

    async def test_the_body_is_cut(self, tmp_path: Path, module: Any, kind: str) -> None:
        """RemoteProtocolError, also while the body is read."""

        async def cut(server: Scripted, request: Request) -> bytes:
            return b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhalf"

        async with scripted(cut) as server:
            with mesh_of(tmp_path, service(server.address)) as mesh:
                error = await failure(self.client(mesh, module, kind))
                told(module, error, "RemoteProtocolError", meshlib.AttemptFailed)

    async def test_a_limit_is_reached(self, tmp_path: Path, module: Any, kind: str) -> None:
        """PoolTimeout: there was no room for the call."""
        release = asyncio.Event()

        async def wait(server: Scripted, request: Request) -> bytes:
            await release.wait()
            return ok()

        async with scripted(wait) as server:
            with mesh_of(tmp_path, service(server.address, admit={"in_flight": 1})) as mesh:
                async with mesh.client() as first:
                    begun = asyncio.create_task(first.get("http://orders/"))
                    while not server.requests:
                        await asyncio.sleep(0.001)
                    error = await failure(self.client(mesh, module, kind))
                    release.set()
                    await begun
        told(module, error, "PoolTimeout", meshlib.LimitExceeded)

    async def test_a_request_that_cannot_be_written(self, tmp_path: Path, module: Any, kind: str) -> None:
        """LocalProtocolError, and its value, which may be a secret, isn't in the text. Nothing was sent."""

        async def answer(server: Scripted, request: Request) -> bytes:
            return ok()

        async with scripted(answer) as server:
            with mesh_of(tmp_path, service(server.address)) as mesh:
                bare = getattr(mesh, "transport" if kind == "client" else "sync_transport")(httpx=module)
                http = getattr(module, "AsyncClient" if kind == "client" else "Client")(transport=bare)
                error = await failure(http, headers={"authorization": "secret\r\nx: y"})
                told(module, error, "LocalProtocolError", errors.MeshError)
                assert error.reason == UNWRITABLE and "secret" not in str(error)
        assert server.requests == []

    async def test_a_body_s_own_value_error_is_left_alone(self, tmp_path: Path, module: Any, kind: str) -> None:
        """It says nothing of the request."""

        async def answer(server: Scripted, request: Request) -> bytes:
            return ok()

        def body() -> Any:
            yield b"1"
            raise ValueError("mine")

        async def abody() -> Any:
            for piece in body():
                yield piece

        async with scripted(answer) as server:
            with mesh_of(tmp_path, service(server.address)) as mesh:
                error = await failure(self.client(mesh, module, kind), content=abody() if kind == "client" else body())
        assert (type(error), str(error)) == (ValueError, "mine")


CASES: list[tuple[errors.MeshError, BaseException | None, tuple[str, ...]]] = [
    (errors.ConnectFailed(), None, ("ConnectError",)),
    (errors.ConnectFailed(reason=faults.CONNECT_TIMEOUT), None, ("ConnectTimeout",)),
    (errors.PeerIdentityError(), None, ("ConnectError",)),
    (errors.TlsError(), None, ("ConnectError",)),
    (errors.TlsError(is_written=True), None, ("ReadError",)),
    (errors.AttemptTimeout(), None, ("ReadTimeout",)),
    (errors.AttemptTimeout(reason=faults.IDLE_TIMEOUT), None, ("ReadTimeout",)),
    (errors.AttemptTimeout(reason=faults.WRITE_TIMEOUT), None, ("WriteTimeout",)),
    (errors.DeadlineExceeded(), None, ("ReadTimeout",)),
    (errors.DeadlineExceeded(), errors.ConnectFailed(reason=faults.CONNECT_TIMEOUT), ("ConnectTimeout",)),
    (errors.DeadlineExceeded(), errors.AttemptTimeout(reason=faults.WRITE_TIMEOUT), ("WriteTimeout",)),
    (errors.ConnectionLost(reason="send.unwritten"), None, ("WriteError",)),
    (errors.ConnectionLost(), None, ("ReadError", "RemoteProtocolError")),
    (errors.ConnectionLost(), ConnectionResetError(), ("ReadError",)),
    (errors.ProtocolError(), None, ("RemoteProtocolError",)),
    (errors.AttemptFailed(), None, ("TransportError",)),
    (errors.UnknownService(), None, ("ConnectError",)),
    (errors.NoRoute(), None, ("ConnectError",)),
    (errors.NoEndpoint(), None, ("ConnectError",)),
    (errors.CircuitOpen(), None, ("ConnectError",)),
    (errors.Denied(), None, ("ConnectError",)),
    (errors.IdentityError(), None, ("ConnectError",)),
    (errors.LimitExceeded(), None, ("PoolTimeout",)),
    (errors.RateLimited(), None, ("PoolTimeout",)),
    (errors.ConfigError("x"), None, ()),
]


@pytest.mark.parametrize(("error", "cause", "names"), CASES, ids=lambda case: type(case).__name__)
def test_the_table_of_classes(error: errors.MeshError, cause: BaseException | None, names: tuple[str, ...]) -> None:
    """Each of ours, by class, reason and cause."""
    error.__cause__ = cause
    assert names_of(error) == names
    for module in MODULES:
        request = module.Request("GET", "http://orders/")
        made = twins(module)(error, request)
        assert [isinstance(made, getattr(module, name)) for name in names] == [True] * len(names)
        assert isinstance(made, type(error))
        if names:
            assert (made.request, made.__cause__, str(made)) == (request, cause, str(error))  # type: ignore[attr-defined]
        else:
            assert made is error


def test_every_error_of_a_call_has_a_class_of_httpx_s() -> None:
    """Whatever is added to the tree of errors is one of httpx's, too."""

    def leaves(kind: type) -> Iterator[type]:
        yield kind
        for sub in kind.__subclasses__():
            # Not those that are made from them, by faces and integrations.
            if getattr(errors, sub.__name__, None) is sub:
                yield from leaves(sub)

    for base in (errors.Refused, errors.AttemptFailed, errors.DeadlineExceeded, errors.IdentityError):
        for kind in leaves(base):
            assert names_of(kind()), kind


def test_trio_is_told_what_runs_where(tmp_path: Path) -> None:
    """An asynchronous client needs asyncio; anyio on asyncio is asyncio."""
    import anyio
    import trio

    with mesh_of(tmp_path, service(f"127.0.0.1:{free_port()}")) as mesh:

        async def main() -> None:
            await httpx.AsyncClient(transport=mesh.transport()).get("http://orders/")

        with pytest.raises(meshlib.ConfigError, match="runs on asyncio"):
            trio.run(main)
        with pytest.raises(meshlib.ConnectFailed):
            anyio.run(main, backend="asyncio")


def test_trio_is_told_by_the_short_path_too(tmp_path: Path) -> None:
    """The same error, whichever path is taken."""
    import trio

    with mesh_of(tmp_path, service(f"127.0.0.1:{free_port()}")) as mesh:

        async def main() -> None:
            await mesh.client().get("http://orders/")

        with pytest.raises(meshlib.ConfigError, match="runs on asyncio"):
            trio.run(main)
