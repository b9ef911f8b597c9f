"""Does an agent with a user of its own reach the applications of others, and does it say so where it can't?

Its units let it run as a system user without any right to the files of others, and to connect to a UNIX socket is to write to it.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import socket
import socketserver
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlib.agent.reach import trouble_with
from tests.agent.daemon_world import DOMAIN, NOBODY, ROOT, as_user, mesh_file, place, running, until
from tests.agent.test_daemon_data import Caller, free_port

needs_users = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to be two users"
)
THEIRS = 1

# A server of another user, which opens its socket as most do. Its words: path, umask.
SERVER = """
import os, sys
sys.path.insert(0, sys.argv[3])
from tests.agent.test_daemon_foreign import Application, Listening
os.umask(int(sys.argv[2], 8))
server = Listening(sys.argv[1], Application)
print("ready", flush=True)
server.serve_forever()
"""


class Application(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def address_string(self) -> str:
        return "-"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Listening(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def served(path: Path, umask: str, uid: int = THEIRS) -> Iterator[None]:
    words = [*as_user(uid), sys.executable, "-c", SERVER, str(path), umask, str(ROOT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.terminate()
            process.wait(10)
            path.unlink(missing_ok=True)


@pytest.fixture
def node() -> Iterator[tuple[Path, int]]:
    """The agent is one user, the application behind it another, and we call."""
    with place(NOBODY) as folder:
        port = free_port()
        words = [*as_user(NOBODY), sys.executable, "-c", CREATE, str(folder / "ca"), DOMAIN]
        subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        file = mesh_file(folder, entries=f"[{{service: orders, uid: 0}}, {{service: stock, uid: {THEIRS}}}]")
        stock = f'stock: {{listen: "127.0.0.1:{port}", inbound: {{agent: {folder}/run/app.sock}}, '
        file.write_text(file.read_text().replace("stock: {", stock, 1))
        os.chown(file, 0, 0)
        (folder / "run").mkdir()
        os.chown(folder / "run", THEIRS, THEIRS)
        yield folder, port


CREATE = "import sys; from meshlib.secure import CertificateAuthority as A; A.create(sys.argv[1], sys.argv[2])"
# The one right of its units that this needs.
BEFORE = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]  # fmt: skip


@needs_users
def test_an_application_that_lets_nobody_connect_is_an_alarm_until_it_does(node: tuple[Path, int]) -> None:
    """Before anybody calls: which socket, why, and what to do; once in the log. With another mode it is served, and all is well."""
    folder, port = node
    path = folder / "run" / "app.sock"
    with running(folder, before=BEFORE) as daemon:
        distrust = f"the agent is user {NOBODY}, whom services of other users (uid 0, {THEIRS}) don't believe"
        until(lambda: distrust in daemon.text, why=lambda: daemon.text)
        assert daemon.ask("/health")[1]["status"] == "ok"  # nobody has called a server that isn't there yet
        with served(path, "022"):
            until(lambda: daemon.ask("/health")[1]["status"] == "degraded")
            assert Caller(folder, port).ask()[0] == 503
            (alarm,) = daemon.ask("/health")[1]["alarms"]
            assert alarm["about"] == "stock"
            assert f"permission denied on {path} (mode 0755, user {THEIRS}) for user {NOBODY}" in alarm["message"]
            assert "hypercorn --umask 0" in alarm["message"]
            (row,) = daemon.ask("/connections")[1]["listeners"]
            assert (row["is_open"], row["error"]) == (True, alarm["message"])
            until(lambda: "its application can't be reached" in daemon.text)
            assert daemon.text.count("its application can't be reached") == 1
        with served(path, "000"):
            until(lambda: daemon.ask("/health")[1]["status"] == "ok")
            assert Caller(folder, port).ask()[0] == 204


@needs_users
def test_an_application_that_was_called_and_is_not_there_is_an_alarm(node: tuple[Path, int]) -> None:
    """Nobody has to look for the reason of a 503: it isn't there; or a user without an entry listens in its place."""
    folder, port = node
    path = folder / "run" / "app.sock"
    with running(folder, before=BEFORE) as daemon:
        assert Caller(folder, port).ask()[0] == 503
        until(lambda: f"nothing to connect to at {path}" in str(daemon.ask("/health")[1]["alarms"]))
        path.parent.chmod(0o777)
        with served(path, "000", uid=2):
            until(lambda: f"user 2 listens at {path}" in str(daemon.ask("/health")[1]["alarms"]))
            assert Caller(folder, port).ask()[0] == 503
        with served(path, "000"):
            until(lambda: daemon.ask("/health")[1]["status"] == "ok")


def test_what_has_no_fault_that_shows_is_not_connected_to() -> None:
    """Unless a call has failed: a server isn't bothered by looks, and one that doesn't run yet is no trouble."""
    with place() as folder:
        path = str(folder / "app.sock")
        assert trouble_with(path, [], is_asked=False) == ""
        assert "No such file" in trouble_with(path, [], is_asked=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            assert trouble_with(path, [], is_asked=False) == ""
            assert "nobody listens" in trouble_with(path, [], is_asked=True)
            listening.listen(0)
            listening.setblocking(False)
            assert trouble_with(path, [os.geteuid()], is_asked=False) == ""
            with pytest.raises(BlockingIOError):
                listening.accept()
            assert trouble_with(path, [os.geteuid()], is_asked=True) == ""
            listening.accept()[0].close()
            assert "has no entry" in trouble_with(path, [os.geteuid() + 1], is_asked=True)
            assert "is full. The application doesn't accept" in trouble_with(path, [], is_asked=True)
