"""Is the caller the process that connected, and all that is said about it true of that one? Real processes of other users."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib.agent import attest as attest_module
from meshlib.agent.attest import Attestor, Caller, Digests, Kernel, groups_of
from meshlib.agent.entries import Entries
from meshlib.agent.sockets import open_socket
from meshlib.config.agent_policy import EntryPolicy
from meshlib.errors import Denied
from tests.agent.workload_world import PATIENCE, until

# One that other users may run as well.
PYTHON = os.path.realpath("/usr/bin/python3")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="to be other users, and to look into their processes, takes root"),
    pytest.mark.skipif(not os.path.exists(PYTHON), reason="needs /usr/bin/python3, which other users may run"),
]

OTHER = 12345


class Old(Kernel):
    """A kernel before 6.5."""

    def handle(self, sock: socket.socket) -> int | None:
        return None


@pytest.fixture(params=[Kernel, Old], ids=["handle", "by number"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    made: Kernel = request.param()
    return made


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """One that other users can reach."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    made = open_socket(tmp_path / "agent.sock", 0o666)
    made.sock.setblocking(True)
    made.sock.settimeout(PATIENCE)
    yield made.sock
    made.close()


CONNECT = """
    import socket, sys
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
"""
STAY = "\n    sys.stdin.read()\n"


@contextmanager
def process(
    listening: socket.socket,
    code: str = CONNECT + STAY,
    *,
    uid: int = 0,
    executable: str = PYTHON,
    name: str | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """One that connects, and its accepted connection."""
    where = listening.getsockname()
    command = [name or executable, "-S", "-E", "-c", textwrap.dedent(code), where]
    with subprocess.Popen(
        command,
        executable=executable,
        user=uid,
        group=uid,
        extra_groups=[],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as made:
        try:
            connection, _ = listening.accept()
            with connection:
                yield made, connection
        finally:
            made.kill()


def attested(connection: socket.socket, kernel: Kernel | None = None) -> Caller:
    attestor = Attestor(kernel=kernel)
    peer = attestor.meet(connection)
    try:
        return attestor.attest(peer)
    finally:
        peer.close()


def rule_of(connection: socket.socket, kernel: Kernel | None = None) -> str:
    with pytest.raises(Denied) as raised:
        attested(connection, kernel)
    return raised.value.rule


def own_python(folder: Path) -> Path:
    """A copy of the interpreter: an executable that may be replaced."""
    made = folder / "program"
    shutil.copy2(PYTHON, made)
    made.chmod(0o755)
    return made


# ---------------------------------------------------------------- who it is


def test_process_of_another_user_is_known_by_all_its_selectors(listening: socket.socket, kernel: Kernel) -> None:
    """As the kernel says: it has said nothing itself."""
    with process(listening, uid=OTHER) as (made, connection):
        caller = attested(connection, kernel)
    assert (caller.pid, caller.uid, caller.gid, caller.executable) == (made.pid, OTHER, OTHER, PYTHON)
    assert caller.digest == hashlib.sha256(Path(PYTHON).read_bytes()).hexdigest()
    assert caller.cgroups == groups_of(Path("/proc/self/cgroup").read_bytes())[0]


def test_nothing_of_a_caller_is_shown(listening: socket.socket) -> None:
    """Not by repr, not by str, and it can't be pickled."""
    import pickle

    with process(listening, uid=OTHER) as (_, connection):
        caller = attested(connection)
    assert (repr(caller), str(caller)) == ("Caller()", "Caller()")
    with pytest.raises(TypeError):
        pickle.dumps(caller)


def test_selectors_are_in_no_error(listening: socket.socket, tmp_path: Path) -> None:
    """A rule's name, and what may be done."""
    program = own_python(tmp_path)
    with process(listening, uid=OTHER, executable=str(program)) as (made, connection):
        program.unlink()
        with pytest.raises(Denied) as raised:
            attested(connection)
    said = f"{raised.value!r} {raised.value} {raised.value.rule} {raised.value.__cause__} {raised.value.__context__}"
    assert [word for word in (str(OTHER), str(made.pid), "program", str(tmp_path)) if word in said] == []


def test_hash_is_taken_only_where_an_entry_asks_for_it(listening: socket.socket) -> None:
    """Else any user could have the agent hash files all day."""
    entries = Entries([EntryPolicy("orders", uid=OTHER, sha256=("ab",)), EntryPolicy("web", uid=0)])
    for uid, has_digest in ((0, False), (OTHER, True)):
        with process(listening, uid=uid) as (_, connection):
            attestor = Attestor(entries.wants_digest)
            peer = attestor.meet(connection)
            assert (attestor.attest(peer).digest != "") is has_digest
            peer.close()


# ---------------------------------------------------------------- who it isn't


def test_process_that_has_ended_is_nobody(listening: socket.socket, kernel: Kernel) -> None:
    """Its connection may live on in another process; who it was can't be found out any more."""
    with process(listening) as (made, connection):
        made.kill()
        made.wait()
        assert rule_of(connection, kernel) == "attest.ended"


def test_process_that_waits_to_be_buried_is_nobody(listening: socket.socket, kernel: Kernel) -> None:
    """A zombie has a number, and nothing else."""
    with process(listening) as (made, connection):
        made.kill()
        os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)
        assert rule_of(connection, kernel) == "attest.ended"


HAND_ON = """
    import array, os, socket, sys
    first = socket.socket(socket.AF_UNIX)
    first.connect(sys.argv[1])
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.setgid(12345)
        os.setuid(12345)
        data, ancillary, *_ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
        taken = socket.socket(fileno=array.array("i", ancillary[0][2])[0])
        first.close()
        ours.close()
        taken.sendall(b"it's me")
        print(os.getpid(), flush=True)
        taken.recv(1)
        os._exit(0)
    socket.send_fds(ours, [b"x"], [first.fileno()])
    first.close()
    {then}
"""


def test_connection_that_is_handed_on_is_of_who_connected(listening: socket.socket, kernel: Kernel) -> None:
    """Whoever has it now: credentials are those of connect()."""
    with process(listening, HAND_ON.format(then="os.waitpid(child, 0)")) as (made, connection):
        assert connection.recv(20) == b"it's me"
        caller = attested(connection, kernel)
        connection.sendall(b"x")
    assert (caller.pid, caller.uid) == (made.pid, 0)


def test_connection_whose_connector_has_ended_is_of_nobody(listening: socket.socket, kernel: Kernel) -> None:
    """A process connects, passes its connection on, and ends before it is attested."""
    with process(listening, HAND_ON.format(then="os._exit(0)")) as (made, connection):
        assert connection.recv(20) == b"it's me"
        made.wait()
        assert rule_of(connection, kernel) == "attest.ended"
        connection.sendall(b"x")


class Recycled(Kernel):
    """The process ends right after accept, and another one gets its number: here, by telling another one's number."""

    def __init__(self, pid: int, *, has_handles: bool) -> None:
        self.pid = pid
        self.has_handles = has_handles

    def credentials(self, sock: socket.socket) -> tuple[int, int, int]:
        return self.pid, 0, 0

    def handle(self, sock: socket.socket) -> int | None:
        return super().handle(sock) if self.has_handles else None


def test_number_that_belongs_to_another_process_by_now_is_found_out_by_the_handle(listening: socket.socket) -> None:
    """The handle is on the process that connected, and not on a number."""
    with process(listening) as (_, connection):
        assert rule_of(connection, Recycled(os.getpid(), has_handles=True)) == "attest.ended"


def test_number_that_belongs_to_another_process_by_now_is_found_out_by_its_start(listening: socket.socket) -> None:
    """Where there is no handle: who began after we accepted hasn't connected."""
    with process(listening) as (_, connection):
        kernel = Recycled(os.getpid(), has_handles=False)
        kernel.now = lambda: 1.0  # type: ignore[method-assign]
        assert rule_of(connection, kernel) == "attest.another_process"


def test_process_that_is_replaced_between_two_looks_is_found_out(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start time, user, group and executable are looked at before and after."""
    users = iter([(0, 0), (0, 1)])
    with process(listening) as (_, connection):
        monkeypatch.setattr(attest_module, "_users", lambda status: next(users))
        assert rule_of(connection) == "attest.changed"


def test_process_that_ends_while_it_is_attested_is_nobody(listening: socket.socket, kernel: Kernel) -> None:
    """Between the last look and the answer, even."""
    with process(listening) as (made, connection):
        attestor = Attestor(kernel=kernel)
        peer = attestor.meet(connection)
        look = attestor._look
        looks = []

        def dying(*args: Any, **named: Any) -> Any:
            looks.append(look(*args, **named))
            if len(looks) == 2:
                made.kill()
                made.wait()
            return looks[-1]

        attestor._look = dying  # type: ignore[method-assign]
        with pytest.raises(Denied, match="ended"):
            attestor.attest(peer)
        peer.close()


def test_user_who_was_dropped_after_connecting_is_no_caller(listening: socket.socket) -> None:
    """Connected as root, and somebody else by now: neither of the two is served."""
    code = CONNECT + "\n    import os; os.setgid(12345); os.setuid(12345); sock.send(b'x')" + STAY
    with process(listening, code) as (_, connection):
        connection.recv(1)
        assert rule_of(connection) == "attest.changed"


def test_no_process_is_nobody(listening: socket.socket) -> None:
    """Number 0 is a process in a namespace that we don't see into; and a user without a number is nobody's."""

    class Told(Kernel):
        def __init__(self, *credentials: int) -> None:
            self.told = credentials

        def credentials(self, sock: socket.socket) -> Any:
            return self.told

    with process(listening) as (made, connection):
        for told in ((0, 0, 0), (-1, 0, 0), (made.pid, 2**32 - 1, 0), (made.pid, 0, 2**32 - 1)):
            assert rule_of(connection, Told(*told)) == "attest.other_namespace"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_connection_over_tcp_is_of_nobody(family: int) -> None:
    """The kernel doesn't say who is there."""
    with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as server:
        with socket.create_connection(server.getsockname()[:2]), server.accept()[0] as connection:
            assert rule_of(connection) == "attest.no_unix_socket"


# ---------------------------------------------------------------- executables


def test_program_that_was_replaced_is_refused(listening: socket.socket, tmp_path: Path) -> None:
    """What runs isn't what lies at its path any more, whichever of the two is the good one."""
    program = own_python(tmp_path)
    with process(listening, executable=str(program)) as (_, connection):
        assert attested(connection).executable == str(program)
        other = tmp_path / "other"
        shutil.copy2("/bin/true", other)
        other.rename(program)
        assert rule_of(connection) == "attest.replaced_executable"


def without_right_to_read(work: Callable[[], Caller]) -> Caller:
    """As the unit's agent: it may look at processes of others, and not into their files. Rights are those of a thread."""

    def run() -> Caller:
        libc = ctypes.CDLL(None, use_errno=True)
        header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, rights) == 0
        rights[0] &= ~(1 << 1 | 1 << 2)  # DAC_OVERRIDE and DAC_READ_SEARCH, of those in effect
        assert libc.capset(header, rights) == 0
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


@pytest.mark.parametrize("mode", [0o750, 0o711])
def test_program_that_may_not_be_read_is_known_by_all_but_its_hash(listening: socket.socket, tmp_path: Path, mode: int) -> None:
    """What asks for no hash fits, and what does never fits: nobody has seen what is in it."""
    program = own_python(tmp_path)
    hashed = hashlib.sha256(program.read_bytes()).hexdigest()
    os.chown(program, OTHER, OTHER)
    program.chmod(mode)
    with process(listening, uid=OTHER, executable=str(program)) as (_, connection):
        caller = without_right_to_read(lambda: attested(connection))
        seen = attested(connection)
    assert (caller.uid, caller.executable, caller.digest, seen.digest) == (OTHER, str(program), "", hashed)
    plain, strict = EntryPolicy("plain", uid=OTHER, path=str(program)), EntryPolicy("strict", uid=OTHER, sha256=(hashed, ""))
    assert [entry.service for entry in Entries([plain, strict]).of(caller)] == ["plain"]
    assert [entry.service for entry in Entries([plain, strict]).of(seen)] == ["plain", "strict"]


def test_program_that_may_not_be_read_and_is_replaced_is_refused(listening: socket.socket, tmp_path: Path) -> None:
    """To look at it is enough for that."""
    program = own_python(tmp_path)
    os.chown(program, OTHER, OTHER)
    program.chmod(0o711)
    with process(listening, uid=OTHER, executable=str(program)) as (_, connection):
        program.unlink()
        with pytest.raises(Denied, match="replaced_executable"):
            without_right_to_read(lambda: attested(connection))


def test_program_is_hashed_as_it_runs_and_not_by_its_path(listening: socket.socket, tmp_path: Path) -> None:
    """Its name says something else, and so does what it calls itself."""
    program = own_python(tmp_path)
    with program.open("ab") as file:
        file.write(b"mine")
    with process(listening, executable=str(program), name="/usr/bin/true") as (_, connection):
        caller = attested(connection)
    assert (caller.executable, caller.digest) == (str(program), hashlib.sha256(program.read_bytes()).hexdigest())


def test_path_in_a_mount_namespace_of_ones_own_is_no_path(listening: socket.socket, tmp_path: Path) -> None:
    """In there, any program can lie at any path: it counts by its hash only."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    program = own_python(tmp_path)
    trusted = tmp_path / "trusted"
    shutil.copy2("/bin/true", trusted)
    where = listening.getsockname()
    script = f"mount --bind {program} {trusted} && exec {trusted} -S -E -c '{textwrap.dedent(CONNECT + STAY)}' {where}"
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as made:
        try:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                pytest.skip("mount namespaces can't be made here")
            with connection:
                caller = attested(connection)
            assert os.readlink(f"/proc/{made.pid}/exe") == str(trusted)
        finally:
            made.kill()
    assert (caller.executable, caller.digest) == ("", hashlib.sha256(program.read_bytes()).hexdigest())


def test_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    """By all that the kernel keeps about it; times can be set back, but not the one of its last change."""
    file = tmp_path / "program"
    file.write_bytes(b"one")
    digests = Digests()

    def digest() -> str:
        with file.open("rb") as opened:
            return digests.of(opened.fileno(), os.fstat(opened.fileno()))

    first, found = digest(), file.stat()
    assert (first, digest(), len(digests._known)) == (hashlib.sha256(b"one").hexdigest(), first, 1)
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert digest() == hashlib.sha256(b"two").hexdigest()
    assert Digests().of(os.open("/dev/zero", os.O_RDONLY), os.stat("/dev/zero")) == ""


# ---------------------------------------------------------------- control groups


def test_groups_and_units_of_both_versions() -> None:
    """Of what is delegated, the unit is who it was delegated to."""
    assert groups_of(b"0::/system.slice/orders.service\n") == (("/system.slice/orders.service",), ("orders.service",))
    delegated = b"0::/user.slice/user-1000.slice/user@1000.service/app.slice/orders.service\n"
    assert groups_of(delegated)[1] == ("user@1000.service",)
    old = b"12:cpu,cpuacct:/a:b/c\n1:name=systemd:/system.slice/web.service/sub\n0::/\n"
    assert groups_of(old) == (("/a:b/c", "/system.slice/web.service/sub", "/"), ("web.service",))
    assert groups_of(b"4:memory:/evil.service\n0::/docker/x.service\n1:name=systemd:/../orders.service\n")[1] == ()
    assert groups_of(b"0::/system.slice/orders.service (deleted)\n") == ((), ())
    assert groups_of(b"0::/init.scope\n")[1] == ("init.scope",)


@pytest.mark.parametrize("text", [b"x\n", b"0:\n", b"a::/x\n", b"0::x\n", b"0::/a\0b\n", b"-1::/\n"])
def test_line_that_is_none_is_refused(text: bytes) -> None:
    """All of it: what else it holds isn't believed either."""
    with pytest.raises(ValueError):
        groups_of(b"1:cpu:/good\n" + text)


@settings(max_examples=500)
@given(st.one_of(st.binary(max_size=80), st.from_regex(rb"([0-9]{1,2}:[a-z=]{0,12}:/[a-z./ ]{0,30}\n){1,3}", fullmatch=True)))
def test_any_bytes_are_refused_or_read(text: bytes) -> None:
    """And a unit is always a part of a path that was there."""
    try:
        cgroups, units = groups_of(text)
    except ValueError:
        return
    assert all(os.fsencode(path) in text for path in cgroups)
    assert all(any(unit in path.split("/") for path in cgroups) for unit in units)
    assert all(unit.endswith((".service", ".scope")) for unit in units)


def test_control_group_of_a_real_process(listening: socket.socket) -> None:
    """In a group that was made for it."""
    home = next((path for path in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if Path(path, "cgroup.procs").exists()), None)
    if home is None:
        pytest.skip("no control groups to make one in")
    group = Path(home) / f"meshlib-test-{os.getpid()}.service"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error.strerror})")
    try:
        with process(listening) as (made, connection):
            (group / "cgroup.procs").write_text(str(made.pid))
            caller = attested(connection)
            made.kill()
            made.wait()
    finally:
        until(lambda: (group / "cgroup.procs").read_text(), "")
        group.rmdir()
    assert f"/{group.name}" in caller.cgroups
    assert group.name in caller.units


# ---------------------------------------------------------------- the rest


def test_nothing_stays_open(listening: socket.socket, tmp_path: Path) -> None:
    """Neither of those who are served nor of those who are refused."""
    program = own_python(tmp_path)
    attested_once = Attestor()

    def both() -> None:
        with process(listening, executable=str(program)) as (made, connection):
            peer = attested_once.meet(connection)
            attested_once.attest(peer)
            peer.close()
            made.kill()
            made.wait()
            with pytest.raises(Denied):
                attested_once.meet(connection)

    both()
    before = len(os.listdir("/proc/self/fd"))
    both()
    both()
    assert len(os.listdir("/proc/self/fd")) == before


def test_kernel_without_handles_is_recognised() -> None:
    """And any other answer is not taken for that."""

    class Sock:
        def __init__(self, number: int) -> None:
            self.number = number

        def getsockopt(self, *args: Any) -> bytes:
            raise OSError(self.number, "no")

    assert Kernel().handle(Sock(errno.ENOPROTOOPT)) is None  # type: ignore[arg-type]
    with pytest.raises(OSError):
        Kernel().handle(Sock(errno.ESRCH))  # type: ignore[arg-type]


def test_handle_of_the_kernel_is_closed_on_exec() -> None:
    """It isn't for programs that we start."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = Attestor().meet(ours)
        assert (peer.pid, os.get_inheritable(peer.fileno()), peer.has_ended) == (os.getpid(), False, False)
        moved = peer.moved()
        peer.close()
        peer.close()
        assert moved.read("stat").startswith(str(os.getpid()).encode())
        moved.close()
