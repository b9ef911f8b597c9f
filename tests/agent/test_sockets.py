"""Can anybody but the agent's user and root have a say about its sockets? Real folders, real users, real descriptors."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.agent.sockets import MODES, inherited, open_socket
from meshlib.errors import ListenError

OTHER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that nobody else can write to, all the way down."""
    with tempfile.TemporaryDirectory() as made:
        place = Path(made) / "agent"
        place.mkdir(mode=0o755)
        yield place


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(path: Path, mode: int = 0o666) -> str:
    with pytest.raises(ListenError) as raised:
        open_socket(path, mode)
    return str(raised.value)


@pytest.mark.parametrize("name", ["workload", "data", "admin"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_socket_has_the_mode_of_its_kind(folder: Path, name: str, umask: int) -> None:
    """Whatever the umask; and it is gone when it is closed."""
    before = os.umask(umask)
    try:
        made = open_socket(folder / "x.sock", MODES[name])
    finally:
        os.umask(before)
    assert (mode_of(made.path), made.sock.getblocking()) == (MODES[name], False)
    made.close()
    assert not made.path.exists()


def test_nobody_can_connect_before_the_mode_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first moment it is for its owner alone."""
    seen: list[int] = []
    real = Path.chmod

    def chmod(self: Path, mode: int, **named: Any) -> None:
        seen.append(mode_of(self))
        real(self, mode, **named)

    monkeypatch.setattr(Path, "chmod", chmod)
    before = os.umask(0)
    try:
        open_socket(folder / "x.sock", 0o666).close()
    finally:
        os.umask(before)
    assert seen == [0o600]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o722])
def test_folder_that_others_can_write_to_stops_the_start(folder: Path, mode: int) -> None:
    """They could put theirs in its place."""
    folder.chmod(mode)
    assert "may be changed by other users" in refusal(folder / "x.sock")
    assert list(folder.iterdir()) == []


def test_sticky_folder_is_none_of_these(folder: Path) -> None:
    """In there, everybody can take away only their own."""
    folder.chmod(0o1777)
    open_socket(folder / "x.sock", 0o666).close()


def test_folder_above_counts_too(folder: Path) -> None:
    """Whoever can rename the folder can put another one there."""
    folder.parent.chmod(0o777)
    assert f"the folder {folder.parent} may be changed" in refusal(folder / "x.sock")


def test_folder_is_made_where_only_it_is_missing(folder: Path) -> None:
    """/run is empty after a start of the machine."""
    made = open_socket(folder / "new" / "x.sock", 0o666)
    assert mode_of(folder / "new") == 0o755
    made.close()
    assert "can't be opened" in refusal(folder / "far" / "away" / "x.sock")


@needs_root
def test_folder_of_another_user_stops_the_start(folder: Path) -> None:
    """Whatever its mode: its owner can change it."""
    os.chown(folder, OTHER, -1)
    assert "belongs to another user" in refusal(folder / "x.sock")


def test_link_leads_to_the_folder_that_is_judged(folder: Path) -> None:
    """The way there may be a link, as /var/run is; what it leads to is what counts."""
    (folder.parent / "link").symlink_to(folder)
    made = open_socket(folder.parent / "link" / "x.sock", 0o666)
    assert made.path == folder.resolve() / "x.sock"
    made.close()
    folder.chmod(0o777)
    assert "may be changed by other users" in refusal(folder.parent / "link" / "x.sock")


def left_behind(path: Path) -> None:
    """A socket on which nobody listens any more, as a crash leaves it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_socket_that_was_left_behind_is_replaced(folder: Path) -> None:
    """By the same user, after a crash."""
    left_behind(folder / "x.sock")
    made = open_socket(folder / "x.sock", 0o666)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(made.path))
    made.close()


@needs_root
def test_socket_that_another_user_left_behind_stops_the_start(folder: Path) -> None:
    """It isn't ours to take away, though we could."""
    left_behind(folder / "x.sock")
    os.chown(folder / "x.sock", OTHER, -1)
    assert "is no socket of user" in refusal(folder / "x.sock")
    assert (folder / "x.sock").is_socket()


def test_socket_with_a_listener_stops_the_start(folder: Path) -> None:
    """Two agents would answer in turns; even if the queue of the first is full."""
    first = open_socket(folder / "x.sock", 0o666)
    assert "somebody listens" in refusal(folder / "x.sock")
    first.sock.listen(0)
    clients = []
    for _ in range(3):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        client.connect_ex(str(first.path))
        clients.append(client)
    assert "somebody listens" in refusal(folder / "x.sock")
    for client in clients:
        client.close()
    first.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling"])
def test_whatever_else_is_there_stays_and_stops_the_start(folder: Path, kind: str) -> None:
    """A link, above all: it could lead to somebody else's file."""
    place, other = folder / "x.sock", folder / "other"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("x")
    else:
        if kind == "link":
            left_behind(other)
        place.symlink_to(other)
    assert "is not touched" in refusal(place)
    assert (place.is_symlink() or place.exists(), other.exists()) == (True, kind == "link")


def test_path_that_is_not_absolute_or_too_long_is_a_mistake(folder: Path) -> None:
    """What a relative one means would depend on where the agent was started."""
    assert "no absolute path" in refusal(Path("x.sock"))
    assert "too long" in refusal(folder / ("x" * 120))


def test_closing_leaves_what_somebody_else_put_there(folder: Path) -> None:
    """Our successor, say, who took over the path."""
    made = open_socket(folder / "x.sock", 0o666)
    made.path.unlink()
    left_behind(made.path)
    made.close()
    assert made.path.is_socket()


# ---------------------------------------------------------------- what systemd hands over


HANDED = """
    import os, socket, sys
    folder, count, names, mode = sys.argv[1:5]
    made = []
    for number, name in enumerate(names.split(":")):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if name == "dgram" else socket.SOCK_STREAM)
        path = f"{folder}/{number}.sock"
        sock.bind(path)
        os.chmod(path, int(mode, 8))
        if name != "deaf" and name != "dgram":
            sock.listen()
        made.append(os.dup(sock.fileno()))
    for fd, sock in enumerate(made, 3):
        os.dup2(sock, fd + 50)
    for fd in range(3, 3 + len(made)):
        os.dup2(fd + 50, fd)
        os.set_inheritable(fd, True)
    pid = os.getpid() if count.isdigit() or count == "x" else 1
    os.environ |= {"LISTEN_PID": str(pid), "LISTEN_FDS": count.strip("!"), "LISTEN_FDNAMES": names}
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[5]])
"""


TAKE = """
    import os
    from meshlib.agent.sockets import inherited
    from meshlib.errors import ListenError
    try:
        found = inherited()
        print(sorted((name, each.path.name, each.is_inherited, each.sock.fileno(), os.get_inheritable(each.sock.fileno())) for name, each in found.items()))
        print([name for name in os.environ if name.startswith("LISTEN_")], inherited())
        for each in found.values():
            each.close()
            assert each.path.exists()
    except ListenError as error:
        print("refused:", error)
"""


def handed(folder: Path, names: str, *, count: str | None = None, mode: str = "600") -> str:
    given = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    count = str(len(names.split(":"))) if count is None else count
    command = [sys.executable, "-c", textwrap.dedent(HANDED), str(folder), count, names, mode, textwrap.dedent(TAKE)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=given)
    assert (out.returncode, out.stderr) == (0, "")
    return out.stdout


def test_sockets_of_systemd_are_taken_by_name(folder: Path) -> None:
    """In whatever order; they aren't for programs that we start; and closing leaves the file to systemd."""
    first, second = handed(folder, "admin:workload").splitlines()
    assert first == "[('admin', '0.sock', True, 3, False), ('workload', '1.sock', True, 4, False)]"
    assert second == "[] {}"


@pytest.mark.parametrize(
    ("names", "given"),
    [
        ("other", {}),
        ("workload:workload", {}),
        ("workload", {"count": "2"}),
        ("workload", {"count": "x"}),
        ("admin", {"mode": "666"}),
    ],
    ids=["unknown", "twice", "too few", "no number", "admin for all"],
)
def test_sockets_that_systemd_hands_over_wrongly_stop_the_start(folder: Path, names: str, given: dict[str, str]) -> None:
    """A guess would let a data socket be an admin socket."""
    assert handed(folder, names, **given).startswith("refused: ")


def test_sockets_for_another_process_are_not_ours(folder: Path) -> None:
    """A parent's variables that were not taken away."""
    assert handed(folder, "workload", count="1!").splitlines() == ["[]", "[] {}"]
    assert inherited({}) == {}


def test_socket_of_systemd_in_an_open_folder_stops_the_start(folder: Path) -> None:
    """Who made it doesn't matter to who replaces it."""
    folder.chmod(0o777)
    assert handed(folder, "workload").startswith("refused: the folder")
