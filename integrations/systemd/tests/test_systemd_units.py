"""Do the units say what systemd understands, close what they claim to close, and leave open what the agent needs?"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from meshlib.secure import CertificateAuthority
from tests.agent.daemon_world import DOMAIN, ORDERS, mesh_file, place, running, until, x509_svids

HERE = Path(__file__).resolve().parents[1]
UNITS = ("meshlib-agent.service", "meshlib-agent.socket", "meshlib-agent-data.socket")
EXPOSURE = 25  # tenths: what systemd calls OK ends at 50

analyzes = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def folder() -> Iterator[Path]:
    with place() as where:
        CertificateAuthority.create(where / "ca", DOMAIN)
        mesh_file(where)
        yield where


@pytest.fixture
def units(tmp_path: Path) -> list[str]:
    """The units with a program that is there."""
    for name in UNITS:
        text = (HERE / name).read_text().replace("/opt/meshlib/bin/meshlib", "/bin/true")
        (tmp_path / name).write_text(text)
    return [str(tmp_path / name) for name in UNITS]


def told(*words: str) -> tuple[int, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def settings(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (HERE / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@analyzes
def test_systemd_understands_every_line(units: list[str]) -> None:
    """An unknown key or a unit that is missing would be told."""
    code, text = told("systemd-analyze", "verify", "--man=no", *units)
    ours = [line for line in text.splitlines() if "meshlib" in line]
    assert (code, ours) == (0, [])


@analyzes
def test_systemd_finds_a_mistake_in_such_a_unit(units: list[str]) -> None:
    """Or the test above could not fail."""
    with Path(units[0]).open("a") as file:
        file.write("\n[Service]\nProtectSytem=strict\n")
    assert "ProtectSytem" in told("systemd-analyze", "verify", "--man=no", *units)[1]


@analyzes
def test_the_exposure_is_small(units: list[str]) -> None:
    """By systemd's own measure, offline."""
    code, text = told("systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE}", units[0])
    if "unrecognized option" in text:
        pytest.skip("this systemd can't judge a unit offline")
    assert code == 0, text


def test_the_service_has_two_rights_and_no_way_to_more() -> None:
    """Those of the README, ambient for its own user."""
    found = settings("meshlib-agent.service")
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == ["CAP_SYS_PTRACE CAP_NET_BIND_SERVICE"]
    assert (found["User"], found["NoNewPrivileges"]) == (["meshlib"], ["yes"])
    assert not {"PrivateUsers", "ProcSubset", "ProtectProc"} & found.keys()  # with these it could attest nobody


def test_sockets_have_the_names_and_places_that_the_agent_expects() -> None:
    """As in its defaults, and by the names by which it tells them apart."""
    from meshlib.agent.sockets import MODES
    from meshlib.config.agent_document import Agent

    for unit, name, path in (
        ("meshlib-agent.socket", "workload", Agent().socket),
        ("meshlib-agent-data.socket", "data", Agent().data),
    ):
        found = settings(unit)
        assert found["ListenStream"] == [path]
        assert found["FileDescriptorName"] == [name]
        assert int(found["SocketMode"][0], 8) == MODES[name]
    assert str(Agent().state) == f"/var/lib/{settings(UNITS[0])['StateDirectory'][0]}"


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
def test_systemd_starts_the_agent_with_its_first_caller(folder: Path) -> None:
    """By `systemd-socket-activate`, which hands over sockets as the socket units do; the caller waits, and is served."""
    words = ["systemd-socket-activate"]
    for name in ("socket", "data"):
        words += ["-l", str(folder / f"{name}.sock")]
    words += ["--fdname=workload:data", "-E", "PYTHONPATH"]
    with running(folder, before=words, wait=False, umask=0o111) as daemon:
        until(lambda: (folder / "socket.sock").exists() and (folder / "data.sock").exists())
        assert not (folder / "admin.sock").exists()
        with grpc.insecure_channel(daemon.workload) as channel:
            assert next(iter(x509_svids(channel, timeout=30.0))).svids[0].spiffe_id == ORDERS
        assert daemon.ready().ask("/health")[1]["status"] == "ok"
        assert daemon.end() == 0
        assert (folder / "socket.sock").exists()  # it is systemd's


# PR_SET_MDWE, and a map that it forbids: the kernel must say no before the agent begins.
NO_NEW_CODE = """
import ctypes, mmap, os, sys
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    os.execv(sys.argv[1], sys.argv[1:])
raise SystemExit("the kernel forbids nothing")
"""


@pytest.mark.skipif(ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0, reason="this kernel can't forbid new code in memory")
def test_the_agent_runs_where_no_memory_is_writable_and_executable(folder: Path) -> None:
    """As under MemoryDenyWriteExecute=: it serves, and ends."""
    with running(folder, before=[sys.executable, "-c", NO_NEW_CODE]) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        assert next(iter(x509_svids(channel))).svids[0].spiffe_id == ORDERS
        with socket.socket(socket.AF_UNIX) as plug:
            plug.connect(str(folder / "data.sock"))
        assert daemon.end() == 0


@analyzes
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_agent_calls_nothing_that_the_filter_forbids(folder: Path, tmp_path: Path) -> None:
    """From the start over an identity, a reload and the admin socket to the end; what the filter allows, systemd itself lists."""
    log = tmp_path / "calls"
    with running(folder, before=["strace", "-f", "-qq", "-o", str(log)]) as daemon:
        with grpc.insecure_channel(daemon.workload) as channel:
            next(iter(x509_svids(channel, timeout=30.0)))
        mesh_file(folder, entries=f"[{{service: orders, uid: {os.geteuid()}}}, {{service: stock, uid: {os.geteuid()}}}]")
        until(lambda: daemon.ask("/health")[1]["reloads"] == 1, 20.0)
        assert daemon.ask("/metrics")[0] == 200
        # strace hands nothing on: the agent is its child.
        child = int(
            subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(daemon.process.pid)], capture_output=True, text=True, check=True
            ).stdout
        )
        os.kill(child, 15)
        daemon.process.wait(30)
    called = {
        line.split(None, 1)[1].split("(")[0] for line in log.read_text().splitlines() if "(" in line and "resumed" not in line
    }
    called = {name for name in called if name.isidentifier()}
    assert {"accept4", "execve", "sendto"} & called
    assert called - allowed() == set()


def allowed() -> set[str]:
    """What the unit's filter leaves: the groups of systemd, resolved."""
    found: set[str] = set()
    for line in settings("meshlib-agent.service")["SystemCallFilter"]:
        names = {name for word in line.removeprefix("~").split() for name in resolved(word)}
        found = found - names if line.startswith("~") else found | names
    # What starts the program is called before the filter counts.
    return found | {"execve"}


def resolved(word: str) -> set[str]:
    if not word.startswith("@"):
        return {word}
    lines = told("systemd-analyze", "syscall-filter", word)[1].splitlines()[1:]
    names = {line.strip() for line in lines if line.strip() and not line.strip().startswith("#")}
    return {each for name in names for each in resolved(name)}
