"""Do `meshlib agent run` and `meshlib agent status` say what is, in words, tables and exit codes?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from meshlib.cli import main
from meshlib.cli.agent import show
from meshlib.secure import CertificateAuthority
from tests.agent.daemon_world import DOMAIN, NOBODY, ORDERS, as_user, mesh_file, place, running, until, x509_svids

COMMAND = [sys.executable, "-c", "from meshlib.cli import main; raise SystemExit(main())"]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESHLIB_CONFIG", "MESHLIB_SERVICE", "MESHLIB_DEV"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder() -> Iterator[Path]:
    with place() as where:
        yield where


def status(folder: Path, *words: str) -> int:
    return main(["agent", "status", "--config", str(folder / "mesh.yaml"), *words])


def test_status_shows_tables_and_is_content(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Health, identities with what is left of them, entries; exit code 0."""
    CertificateAuthority.create(folder / "ca", DOMAIN)
    mesh_file(folder)
    with running(folder):
        assert status(folder) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"ok: agent of {DOMAIN}, process ")
        row = next(line.split() for line in told.splitlines() if ORDERS in line)
        assert row[0] == "orders"
        assert "1 of 1 identities in force" in told
        assert status(folder, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["certificates"][0]["spiffe_id"] == ORDERS
        assert told["health"]["status"] == "ok"


def test_what_is_not_well_is_told_and_is_a_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and the alarm."""
    authority = CertificateAuthority.create(folder / "ca", DOMAIN)
    authority.issue("orders")
    authority.revoke("orders")
    mesh_file(folder)
    with running(folder):
        assert status(folder) == 1
        told = capsys.readouterr().out
        assert "degraded" in told
        assert "alarm (orders): " in told
        assert "meshlib ca issue" in told


def test_an_agent_that_is_away_is_told_with_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No socket; a socket without a listener; something that is no agent; something that hangs."""
    mesh_file(folder)
    assert status(folder) == 1
    assert "meshlib agent run" in capsys.readouterr().err
    place_of = folder / "admin.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place_of))
    assert status(folder) == 1
    assert "no agent answers" in capsys.readouterr().err
    place_of.unlink()

    def nonsense(listening: socket.socket) -> None:
        plug, _ = listening.accept()
        plug.recv(4096)
        plug.sendall(b"SSH-2.0-no\r\n")
        plug.close()

    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place_of))
        other.listen()
        thread = threading.Thread(target=nonsense, args=(other,))
        thread.start()
        assert status(folder) == 1
        assert "is no agent" in capsys.readouterr().err
        thread.join()


def test_a_mistake_in_the_file_hides_no_agent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is asked where the file says, mistake or not; both are told, and it is a failure."""
    CertificateAuthority.create(folder / "ca", DOMAIN)
    file = mesh_file(folder)
    good = file.read_text()
    with running(folder):
        file.write_text(good.replace("entries:", "colour: red\n, entires:"))
        assert status(folder) == 1
        told = capsys.readouterr().out
        assert f"agent of {DOMAIN}, process " in told
        assert "the configuration can't be used as it is now: " in told
        assert "agent.colour" in told
        assert "more: `meshlib vet`)" in told
        assert status(folder, "--json") == 1
        told = json.loads(capsys.readouterr().out)
        assert "agent.entires" in told["config"]["error"]
        assert told["health"]["identities"] == {"in_force": 1, "wanted": 1}
        file.write_text(good)
        until(lambda: status(folder) == 0)
    file.write_text(good.replace("entries:", "entires:"))
    capsys.readouterr()
    assert status(folder) == 1
    told = capsys.readouterr().err
    assert "agent.entires" in told
    assert f"no agent answers at {folder}/admin.sock" in told


def test_an_agent_that_is_away_is_told_as_json_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that asks gets an object, and not nothing."""
    mesh_file(folder)
    assert status(folder, "--json") == 1
    found = capsys.readouterr()
    told = json.loads(found.out)
    assert told["health"]["status"] == "away"
    assert "no agent answers" in told["health"]["alarms"][0]["message"]
    assert "no agent answers" in found.err


def test_callers_without_an_entry_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """With a word about where their names are."""
    health: dict[str, Any] = {"status": "away", "alarms": [], "strangers": {"count": 3, "since": 12.2}}
    show({"health": health})
    assert "callers without an entry: 3, the last one 12 s ago" in capsys.readouterr().out


def test_an_agent_that_hangs_is_not_waited_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP: three seconds, and it says so."""
    monkeypatch.setattr("meshlib.cli.agent.PATIENCE", 1.0)
    CertificateAuthority.create(folder / "ca", DOMAIN)
    mesh_file(folder)
    with running(folder) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            assert status(folder) == 1
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert "doesn't answer within" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to be two users")
def test_who_may_not_ask_is_told_how_to(folder: Path) -> None:
    """By another user: the socket's mode, or the agent's word."""
    CertificateAuthority.create(folder / "ca", DOMAIN)
    for admins in ("", ", admins: [1]"):
        mesh_file(folder, agent=f"ca: ca{admins}")
        with running(folder):
            words = [*as_user(NOBODY), *COMMAND, "agent", "status", "--config", str(folder / "mesh.yaml")]
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 1
            assert f"user {NOBODY} may not ask" in done.stderr
            assert "agent.admins" in done.stderr


def test_what_the_agent_says_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Control bytes of another process are shown, not obeyed."""
    health: dict[str, Any] = {"status": "away", "alarms": [{"about": "", "message": "a\x1b[2Jb\nc"}]}
    show({"health": health, "connections": {"connections": [{"peer": "\x1b]0;x\x07"}]}})
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\x07" not in told


def test_a_configuration_without_an_agent_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, by which systemd knows that another start is no use."""
    file = tmp_path / "mesh.yaml"
    file.write_text("mesh: shop\nsecure: {mode: observe}\nservices: {orders: {}}\n")
    assert main(["agent", "run", "--config", str(file)]) == 2
    assert "no section agent" in capsys.readouterr().err
    assert main(["agent"]) == 2
    assert main(["agent", "run", "--help"]) == 0


def test_the_commands_serve_an_enrolled_node_from_end_to_end(folder: Path) -> None:
    """`meshlib ca init`, `ca serve`, `ca token`, `agent run`, `agent status`: as an operator types them, in processes of their own."""

    def done(*words: str) -> str:
        found = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60, check=True, cwd=folder)
        return found.stdout

    done("ca", "init", "ca", "--trust-domain", DOMAIN)
    serving = subprocess.Popen(
        [*COMMAND, "ca", "serve", "ca", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )  # fmt: skip
    agent = None
    try:
        assert serving.stdout is not None
        first = serving.stdout.readline()
        url = f"https://127.0.0.1:{first.rsplit(':', 1)[1].strip().rstrip('.')}"
        done("ca", "token", "ca", "orders", "--address", url, "--out", "orders.token")
        mesh_file(folder, f'enrol: "{url}"', f"[{{service: orders, uid: {os.geteuid()}, token: orders.token}}]")
        agent = subprocess.Popen([*COMMAND, "agent", "run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        until(lambda: (folder / "admin.sock").exists() and not (folder / "orders.token").exists(), 20.0)
        with grpc.insecure_channel(f"unix://{folder}/socket.sock") as channel:
            assert next(iter(x509_svids(channel, timeout=20.0))).svids[0].spiffe_id == ORDERS
        assert "1 of 1 identities in force" in done("agent", "status")
        agent.terminate()
        assert agent.wait(10) == 0
    finally:
        for process in (serving, agent):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(10)
        if serving.stdout is not None:
            serving.stdout.close()
