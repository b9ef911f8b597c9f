"""What does a real agent answer to a real process? The ground of the areas uds_attestation and workload_api.

Processes of other users are made by dropping root's rights after everything is imported; connections are handed on by SCM_RIGHTS;
programs are replaced while they run. Statuses are those that a gRPC client gets.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from meshlib.agent.attest import Attestor, Kernel
from meshlib.agent.entries import Entries
from meshlib.agent.grpc import Limits
from meshlib.agent.sockets import open_socket
from meshlib.config.agent_policy import EntryPolicy
from meshlib.errors import Denied, ListenError
from tests.agent.workload_world import Node
from tests.secure.cases.case import Waits

PATIENCE = 20.0
_STATUSES = {
    "INVALID_ARGUMENT": {"InvalidArgument", "reject"},
    "PERMISSION_DENIED": {"PermissionDenied", "deny", "reject", "no_identity"},
    "UNIMPLEMENTED": {"Unimplemented", "reject"},
    "OK": {"accept", "svid", "OK"},
}

# In the caller's process. All is imported before it becomes the user that it shall be, who may not read it any more.
_CALL = """
    import os, sys
    import grpc, grpc._channel
    address, uid, *metadata = sys.argv[1:]
    if uid:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")
        try:
            next(call(b"", metadata=[tuple(each.split("=", 1)) for each in metadata], timeout=10))
            print("OK")
        except grpc.RpcError as error:
            print(error.code().name)
"""


@contextmanager
def open_folder() -> Iterator[Path]:
    """One that other users can reach."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def status(entry: EntryPolicy, metadata: dict[str, str], *, uid: int | None = None, kernel: Kernel | None = None) -> set[str]:
    """What a process gets that is `uid` (else ours), where one entry is registered."""
    if uid is not None and os.geteuid() != 0:
        raise Waits("to be another user takes root")

    def attestor(entries: Entries) -> Attestor:
        return Attestor(entries.wants_digest, kernel=kernel)

    with open_folder() as folder:
        node = Node(folder, [entry], attestor=attestor)
        try:
            named = [f"{name}={value}" for name, value in metadata.items()]
            command = [sys.executable, "-c", textwrap.dedent(_CALL), node.address, "" if uid is None else str(uid), *named]
            out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        finally:
            node.close()
    assert out.returncode == 0, out.stderr
    return _STATUSES.get(out.stdout.strip(), {out.stdout.strip()})


class NumberZero(Kernel):
    """A caller in another PID namespace."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def credentials(self, sock: socket.socket) -> tuple[int, int, int]:
        return self.pid, *super().credentials(sock)[1:]


def started(prepare: Callable[[Path], object]) -> set[str]:
    """Whether an agent starts where somebody has prepared its folder. `prepare` gets the socket's path."""
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "agent"
        folder.mkdir(mode=0o755)
        prepare(folder / "agent.sock")
        try:
            open_socket(folder / "agent.sock", 0o666).close()
        except ListenError:
            return {"refuse_to_start", "reject"}
        return {"accept", "start", "unlink", "replaced"}


_CONNECT = """
    import os, socket, sys
    first = socket.socket(socket.AF_UNIX)
    first.connect(sys.argv[1])
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.setgid(4242)
        os.setuid(4242)
        taken = socket.socket(fileno=socket.recv_fds(theirs, 1, 1)[1][0])
        taken.sendall(b"mine")
        taken.recv(1)
        os._exit(0)
    socket.send_fds(ours, [b"x"], [first.fileno()])
    first.close()
    {then}
"""


def handed_on(*, is_gone: bool) -> set[str]:
    """A connection in the hands of another user; whose is it, if who connected is there, or is gone?"""
    if os.geteuid() != 0:
        raise Waits("to be another user takes root")
    with open_folder() as folder:
        listening = open_socket(folder / "x.sock", 0o666)
        listening.sock.settimeout(PATIENCE)
        code = textwrap.dedent(_CONNECT.replace("{then}", "os._exit(0)" if is_gone else "os.waitpid(child, 0)"))
        with subprocess.Popen([sys.executable, "-c", code, str(listening.path)]) as process:
            connection, _ = listening.sock.accept()
            with connection:
                connection.settimeout(PATIENCE)
                assert connection.recv(10) == b"mine"
                if is_gone:
                    process.wait(PATIENCE)
                found = _judged(connection)
                connection.sendall(b"x")
            listening.close()
    if isinstance(found, set):
        return found
    return {"identity_of_connector", "accept"} if found == (process.pid, 0) else {f"{found}"}


def replaced_program() -> set[str]:
    """A program that another one has replaced while it runs."""
    python = os.path.realpath("/usr/bin/python3")
    if not os.path.exists(python) or os.geteuid() != 0:
        raise Waits("needs /usr/bin/python3, and root")
    with open_folder() as folder:
        listening = open_socket(folder / "x.sock", 0o666)
        listening.sock.settimeout(PATIENCE)
        program = folder / "program"
        shutil.copy2(python, program)
        code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()"
        with subprocess.Popen([str(program), "-S", "-E", "-c", code, str(listening.path)], stdin=subprocess.PIPE) as process:
            try:
                connection, _ = listening.sock.accept()
                with connection:
                    shutil.copy2("/bin/true", folder / "other")
                    (folder / "other").rename(program)
                    found = _judged(connection)
            finally:
                process.kill()
                listening.close()
    return found if isinstance(found, set) else {"accept"}


def _judged(connection: socket.socket) -> set[str] | tuple[int, int]:
    attestor = Attestor()
    try:
        peer = attestor.meet(connection)
    except Denied:
        return _STATUSES["PERMISSION_DENIED"]
    try:
        caller = attestor.attest(peer)
    except Denied:
        return _STATUSES["PERMISSION_DENIED"]
    finally:
        peer.close()
    return caller.pid, caller.uid


def slow_reader(pause: float = 0.05) -> set[str]:
    """A client that opens a stream, and reads a byte now and then. Seconds are shorter here than in the agent: half of one for ten."""
    from tests.agent.test_workload import Raw

    with open_folder() as folder:
        node = Node(folder, limits=Limits(write=0.5))
        try:
            raw = Raw(node.path)
            raw.call()
            end = time.monotonic() + PATIENCE
            while not node.api.connections and time.monotonic() < end:
                time.sleep(0.01)
            raw.sock.settimeout(pause)
            while node.api.connections and time.monotonic() < end:
                try:
                    raw.sock.recv(1)
                except TimeoutError:
                    continue
                time.sleep(pause)
            is_open = node.api.connections
            raw.sock.close()
        finally:
            node.close()
    return {"accept"} if is_open else {"disconnect", "close"}


def grpcio_knows_the_caller() -> set[str]:
    """Does the gRPC library tell who is at the other end of a UNIX socket?"""
    told: list[Any] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        told.append((context.peer(), context.auth_context()))
        return b""

    handler = grpc.method_handlers_generic_handler("a.B", {"C": grpc.unary_unary_rpc_method_handler(answer)})
    with tempfile.TemporaryDirectory() as folder:
        server = grpc.server(futures.ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(f"unix://{folder}/x.sock")
        server.start()
        try:
            with grpc.insecure_channel(f"unix://{folder}/x.sock") as channel:
                channel.unary_unary("/a.B/C")(b"", timeout=PATIENCE)
        finally:
            server.stop(0).wait(PATIENCE)
    ((peer, context),) = told
    says = f"{peer} {context}"
    is_told = any(word in says for word in ("uid", "pid", str(os.getpid())))
    # So the agent doesn't use it to accept.
    import meshlib.agent.acceptor
    import meshlib.agent.grpc

    is_used = any(getattr(module, "grpc", None) is grpc for module in (meshlib.agent.acceptor, meshlib.agent.grpc))
    return {"usable"} if is_told or is_used else {"not_usable_for_attestation"}
