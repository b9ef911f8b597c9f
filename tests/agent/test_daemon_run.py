"""Does the daemon begin only when all is right, change when its file does, and end so that nobody is cut off?"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from meshlib.agent import run as run_module
from meshlib.agent.run import configured, distrusted, has_capability, refuse_blind, refuse_open
from meshlib.config import load
from meshlib.errors import ConfigError, MeshError
from meshlib.secure import CertificateAuthority, IdentityStore, identity_source_of
from tests.agent.daemon_world import DOMAIN, NOBODY, ORDERS, STOCK, as_user, ask, mesh_file, place, running, until, x509_svids

COMMAND = "from meshlib.cli import main; raise SystemExit(main())"

is_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to be two users"
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with place() as where:
        yield where


@pytest.fixture
def authority(folder: Path) -> CertificateAuthority:
    return CertificateAuthority.create(folder / "ca", DOMAIN)


# ---------------------------------------------------------------------------------------------------- begin


def test_the_daemon_serves_an_identity_over_the_workload_api(folder: Path, authority: Any) -> None:
    """To grpcio, over a UNIX socket, as soon as it says that it serves."""
    mesh_file(folder)
    with running(folder) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        first = next(iter(x509_svids(channel)))
        assert [svid.spiffe_id for svid in first.svids] == [ORDERS]
        assert f"The agent of {DOMAIN} serves 1 of 1 identities" in daemon.text
        status, health = daemon.ask("/health")
        assert (status, health["status"], health["alarms"]) == (200, "ok", [])


def test_a_client_of_another_make_gets_rotated_certificates(folder: Path, authority: Any) -> None:
    """The `spiffe` package sees another certificate within the life of the first."""
    spiffe = pytest.importorskip("spiffe")
    mesh_file(folder)
    with running(folder, life=6.0) as daemon:
        with spiffe.X509Source(socket_path=daemon.workload, timeout_in_seconds=20) as source:
            first = source.get_x509_context().default_svid
            assert str(first.spiffe_id) == ORDERS
            until(lambda: source.get_x509_context().default_svid.leaf.serial_number != first.leaf.serial_number, 10.0)
        with spiffe.WorkloadApiClient(daemon.workload) as client:
            token = client.fetch_jwt_svid(audience={"stock"})
            assert str(token.spiffe_id) == ORDERS
            assert client.fetch_jwt_bundles().get_bundle_for_trust_domain(spiffe.TrustDomain(DOMAIN)) is not None


def test_a_service_of_meshlib_outlives_its_agent(folder: Path, authority: Any) -> None:
    """By `identity: {agent: true}`. SIGKILL: it keeps what it has, and takes the next agent's certificate within seconds."""
    mesh_file(folder)
    config = load(folder / "mesh.yaml", service="orders")
    store = IdentityStore(identity_source_of(config), mode="enforce")

    def serial() -> str:
        store.refresh(time.monotonic())
        assert store.current is not None
        return store.current.serial

    try:
        with running(folder) as daemon:
            assert store.require(time.monotonic()).spiffe_id == ORDERS
            first = serial()
            daemon.process.kill()
            daemon.process.wait(5)
        for _ in range(20):
            assert serial() == first
            time.sleep(0.05)
        with running(folder):
            until(lambda: serial() != first, 4.0)
    finally:
        store.close()


def test_rotation_every_two_seconds_misses_nothing(folder: Path, authority: Any) -> None:
    """Each certificate on the stream is another one, in force when it comes, and the last one has not ended."""
    mesh_file(folder)
    with running(folder, life=4.0) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        seen: list[int] = []
        end = 0.0
        stream = x509_svids(channel, timeout=30.0)
        for message in stream:
            leaf = _leaf(message)
            assert leaf.not_valid_after_utc.timestamp() > time.time()
            assert not end or time.time() < end
            end = leaf.not_valid_after_utc.timestamp()
            if leaf.serial_number not in seen:
                seen.append(leaf.serial_number)
            if len(seen) == 4:
                break
        stream.cancel()


def _leaf(message: Any) -> Any:
    der = message.svids[0].x509_svid
    # The first certificate of the concatenation: its length stands in its head.
    size = int.from_bytes(der[2:4], "big") + 4
    return x509.load_der_x509_certificate(der[:size])


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    """No CA, a state folder that others may change, a socket that is taken, an address that is taken: four lines, and exit code 2."""
    (folder / "state").mkdir()
    (folder / "state").chmod(0o777)
    (folder / "admin.sock").write_text("a file")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mesh_file(folder, orders=f', listen: "127.0.0.1:{port}", inbound: {{agent: {folder}/app.sock}}')
        found = subprocess.run(
            [sys.executable, "-c", COMMAND, "agent", "run", "--config", str(folder / "mesh.yaml")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    lines = [line for line in found.stderr.splitlines() if "mesh.yaml:" in line]
    assert found.returncode == 2, found.stderr
    told = {
        key: next(line for line in lines if f": {key}: " in line)
        for key in ("agent.ca", "agent.state", "agent.admin", "services.orders.listen")
    }
    assert "holds no CA" in told["agent.ca"]
    assert "meshlib ca init" in told["agent.ca"]
    assert "may be changed by other users" in told["agent.state"]
    assert "not touched" in told["agent.admin"]
    assert "inbound.agent" in told["services.orders.listen"]
    assert len(lines) == 4
    assert not (folder / "socket.sock").exists()  # what was opened is closed again


def test_a_file_without_an_agent_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    """With what to write."""
    file = tmp_path / "mesh.yaml"
    file.write_text("mesh: shop\nsecure: {mode: observe}\nservices: {orders: {}}\n")
    with pytest.raises(ConfigError, match="no section agent"):
        configured(file)


def test_entries_of_other_users_need_a_right_that_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it no such process could be attested, and its entries would never match."""
    config = configured(mesh_file(folder, uid=os.geteuid() + 1))
    monkeypatch.setattr(run_module, "has_capability", lambda number: number != 19)
    with pytest.raises(MeshError, match="CAP_SYS_PTRACE"):
        refuse_blind(config)
    refuse_blind(configured(mesh_file(folder)))


def test_a_configuration_that_others_may_change_is_refused(folder: Path) -> None:
    """At the start and at a reload: whoever writes an entry could be any service."""
    file = mesh_file(folder)
    refuse_open(file)
    file.chmod(0o664)
    with pytest.raises(MeshError, match="any identity of this node"):
        refuse_open(file)
    file.chmod(0o644)
    folder.chmod(0o777)
    with pytest.raises(MeshError, match="chmod go-w"):
        refuse_open(file)
    folder.chmod(0o1777)  # as /tmp: nobody can take ours away
    refuse_open(file)


@is_root
def test_capabilities_are_read_as_the_kernel_has_them() -> None:
    """Root has the one that a plain user lacks."""
    assert has_capability(19)
    code = "from meshlib.agent.run import has_capability; raise SystemExit(has_capability(19))"
    found = subprocess.run([*as_user(NOBODY), sys.executable, "-c", code], check=False)
    assert found.returncode == 0


@is_root
def test_the_daemon_needs_no_root_for_processes_of_its_own_user() -> None:
    """Its folder belongs to it, and its entry is for its own user; root, who is somebody else, gets nothing."""
    with place(NOBODY) as where:
        CertificateAuthority.create(where / "ca", DOMAIN)
        for each in (where / "ca", *(where / "ca").rglob("*")):
            os.chown(each, NOBODY, NOBODY)
        mesh_file(where, uid=NOBODY)
        with running(where, before=as_user(NOBODY)) as daemon:
            assert (where / "socket.sock").stat().st_uid == NOBODY
            assert _fetched_by(NOBODY, daemon.workload) == ORDERS
            with grpc.insecure_channel(daemon.workload) as channel, pytest.raises(grpc.RpcError) as caught:
                next(iter(x509_svids(channel)))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def _fetched_by(uid: int, socket_path: str) -> str:
    """What a process of that user gets as its first identity."""
    code = (
        "import sys, grpc; from tests.agent.daemon_world import x509_svids\n"
        "with grpc.insecure_channel(sys.argv[1]) as channel: print(next(iter(x509_svids(channel))).svids[0].spiffe_id)"
    )
    done = subprocess.run(
        [*as_user(uid), sys.executable, "-c", code, socket_path],
        capture_output=True, text=True, timeout=30, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return done.stdout.strip() or done.stderr


@is_root
def test_each_user_gets_the_identities_of_their_entries(folder: Path, authority: Any) -> None:
    """Two users on one node, two services; a third user is denied."""
    entries = f"[{{service: orders, uid: {NOBODY}}}, {{service: stock, uid: 1}}]"
    mesh_file(folder, entries=entries)
    with running(folder) as daemon:
        assert _fetched_by(NOBODY, daemon.workload) == ORDERS
        assert _fetched_by(1, daemon.workload) == STOCK
        assert "PERMISSION_DENIED" in _fetched_by(2, daemon.workload)


def test_a_thousand_connections_leave_nothing_behind(folder: Path, authority: Any) -> None:
    """To all three sockets, served and hung up on: no descriptor more than before, and a bounded number of threads."""
    mesh_file(folder)

    def flood(count: int) -> None:
        for _ in range(count):
            for name in ("socket", "data"):
                with socket.socket(socket.AF_UNIX) as plug:
                    plug.connect(str(folder / f"{name}.sock"))
                    plug.sendall(b"GET /ping HTTP/1.1\r\n")
            assert daemon.ask("/health")[0] == 200

    def held() -> tuple[int, int]:
        process = Path(f"/proc/{daemon.process.pid}")
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))

    with running(folder) as daemon:
        with grpc.insecure_channel(daemon.workload) as channel:
            next(iter(x509_svids(channel)))
        flood(20)
        time.sleep(0.5)
        fds, _ = held()
        flood(350)
        until(lambda: held()[0] <= fds + 2, 10.0, lambda: str((held(), fds)))
        # Its own, those of the data path, and four each for attesting at two sockets and for issuing.
        assert held()[1] <= 4 + 3 * 4


def test_what_only_a_person_can_mend_is_another_failure_than_what_may_pass(folder: Path, authority: Any) -> None:
    """2 keeps systemd from another start; 1 doesn't. Each of them by itself, and 2 where both are wrong."""

    def code(file: Path) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            words = [sys.executable, "-c", COMMAND, "agent", "run", "--config", str(file)]
            return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode
        return -1

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        passing = f', listen: "127.0.0.1:{port}", inbound: {{agent: {folder}/app.sock}}'
        assert code(mesh_file(folder, orders=passing)) == 1
        assert code(mesh_file(folder, "ca: nowhere", orders=passing)) == 2
    file = mesh_file(folder)
    file.write_text(file.read_text().replace("secure: {mode", "secure: {trust_domain: other.internal, mode"))
    assert code(file) == 2
    mesh_file(folder).chmod(0o666)
    assert code(file) == 2
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    file = mesh_file(folder)
    file.write_text(file.read_text().replace(f"{folder}/data.sock", f"{folder}/open/data.sock"))
    assert code(file) == 2


def test_an_agent_whom_services_will_not_believe_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, the system user `meshlib` and the services' own user are believed; no other, whoever writes them an entry."""
    config = configured(mesh_file(folder, entries="[{service: orders, uid: 4100}, {service: stock, uid: 4101}]"))
    alone = configured(mesh_file(folder, entries="[{service: orders, uid: 4100}]"))
    for us, system, told in ((0, None, ""), (991, 991, ""), (991, None, "(uid 4100, 4101)"), (4100, None, "(uid 4101)")):
        monkeypatch.setattr("os.geteuid", lambda us=us: us)
        monkeypatch.setattr(run_module, "agent_uid", lambda system=system: system)
        found = distrusted(config)
        assert told in found
        assert bool(told) == bool(found)
    assert distrusted(alone) == ""


# ---------------------------------------------------------------------------------------------------- change


def test_a_changed_file_adds_an_entry_and_takes_one_away(folder: Path, authority: Any) -> None:
    """Without a signal, within seconds; the stream of who lost theirs ends, and the next one tells what counts now."""
    mesh_file(folder)
    with running(folder) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        stream = iter(x509_svids(channel, timeout=20.0))
        assert [svid.spiffe_id for svid in next(stream).svids] == [ORDERS]
        mesh_file(folder, entries=f"[{{service: orders, uid: {os.geteuid()}}}, {{service: stock, uid: {os.geteuid()}}}]")
        found: list[str] = []
        while len(found) < 2:
            found = [svid.spiffe_id for svid in next(stream).svids]
        assert found == [ORDERS, STOCK]
        mesh_file(folder, entries=f"[{{service: stock, uid: {os.geteuid()}}}]")
        while len(found) > 1:
            found = [svid.spiffe_id for svid in next(stream).svids]
        assert found == [STOCK]
        assert daemon.ask("/health")[1]["reloads"] == 2


def test_a_broken_file_changes_nothing_and_is_an_alarm(folder: Path, authority: Any) -> None:
    """The last good one stays in force; SIGHUP with a good one takes the alarm away."""
    file = mesh_file(folder)
    good = file.read_text()
    with running(folder) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        file.write_text(good.replace("entries:", "entires:"))
        until(lambda: daemon.ask("/health")[1]["reload_failures"] == 1)
        health = daemon.ask("/health")[1]
        assert health["status"] == "degraded"
        assert "entires" in health["alarms"][0]["message"]
        assert [svid.spiffe_id for svid in next(iter(x509_svids(channel))).svids] == [ORDERS]
        file.write_text(good)
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: daemon.ask("/health")[1]["status"] == "ok")


def test_what_counts_from_the_next_start_is_said(folder: Path, authority: Any) -> None:
    """Another state folder needs a restart; another trust domain is refused."""
    file = mesh_file(folder)
    with running(folder) as daemon:
        file.write_text(file.read_text().replace("state: state", "state: elsewhere"))
        until(lambda: daemon.ask("/health")[1]["reloads"] == 1)
        assert [alarm["message"] for alarm in daemon.ask("/health")[1]["alarms"]] == [
            "agent.state: counts when the agent is restarted"
        ]
        file.write_text(file.read_text().replace("secure: {mode", "secure: {trust_domain: other.internal, mode"))
        until(lambda: daemon.ask("/health")[1]["reload_failures"] == 1)
        assert "trust domain is another one" in daemon.text


# ---------------------------------------------------------------------------------------------------- end


def test_sigterm_ends_streams_and_takes_the_sockets_away(folder: Path, authority: Any) -> None:
    """A stream ends with Unavailable, so that its client comes again; exit code 0, and nothing lies about."""
    mesh_file(folder)
    with running(folder) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        stream = x509_svids(channel, timeout=30.0)
        next(iter(stream))
        begun = time.monotonic()
        assert daemon.end() == 0
        assert time.monotonic() - begun < 5.0
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(stream))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not any((folder / f"{name}.sock").exists() for name in ("socket", "data", "admin"))
    assert (folder / "state" / "handover.key").stat().st_mode & 0o777 == 0o600


def test_a_killed_daemon_is_followed_by_another_on_the_same_sockets(folder: Path, authority: Any) -> None:
    """What it left behind is taken away; a client of gRPC gets on with the next one, and the secrets are the same."""
    mesh_file(folder)
    with running(folder) as first:
        first.process.kill()
        first.process.wait(5)
    kept = (folder / "state" / "handover.key").read_bytes()
    with running(folder) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        assert next(iter(x509_svids(channel))).svids[0].spiffe_id == ORDERS
    assert (folder / "state" / "handover.key").read_bytes() == kept


def test_a_second_agent_does_not_take_the_sockets_of_the_first(folder: Path, authority: Any) -> None:
    """It says that somebody listens there, and the first goes on."""
    mesh_file(folder)
    with running(folder) as first, running(folder, wait=False) as second:
        assert second.process.wait(20) != 0
        until(lambda: "somebody listens on" in second.text)
        assert first.ask("/health")[0] == 200


# ---------------------------------------------------------------------------------------------------- whoever started it


class Ear:
    """NOTIFY_SOCKET: what a daemon says to systemd."""

    def __init__(self, where: Path) -> None:
        self.path = where / "notify"
        self.heard: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.heard.append(self._sock.recv(65536).decode())
            except OSError:
                return

    def has(self, state: str) -> bool:
        return any(state in each.split("\n") for each in self.heard)

    def close(self) -> None:
        self._sock.close()


def test_systemd_hears_when_it_is_ready_reloads_lives_and_stops(folder: Path, authority: Any) -> None:
    """In this order, and a status line in words."""
    mesh_file(folder)
    ear = Ear(folder)
    try:
        with running(folder, env={"NOTIFY_SOCKET": str(ear.path), "WATCHDOG_USEC": "400000"}) as daemon:
            until(lambda: ear.has("READY=1"))
            assert any("STATUS=1 of 1 identities" in each for each in ear.heard)
            until(lambda: sum("WATCHDOG=1" in each for each in ear.heard) >= 3)
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda: ear.has("RELOADING=1"))
            assert any("MONOTONIC_USEC=" in each for each in ear.heard)
            daemon.end()
            until(lambda: ear.has("STOPPING=1"))
    finally:
        ear.close()


# As systemd starts a service with sockets: the descriptors from 3 on, their names, and whom they are for.
ACTIVATOR = """
import os, socket, sys
count = int(sys.argv[1])
socks = []
for index in range(count):
    sock = socket.socket(fileno=int(sys.argv[2 + index]))
    socks.append(sock.detach())
for index, fd in enumerate(socks):
    os.dup2(fd, 100 + index)
for index in range(count):
    os.dup2(100 + index, 3 + index, inheritable=True)
    os.close(100 + index)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": sys.argv[2 + count]}
os.execv(sys.argv[3 + count], sys.argv[3 + count:])
"""


def test_sockets_of_systemd_outlive_the_daemon(folder: Path, authority: Any) -> None:
    """Who connects between two of them waits, and is served by the second; nobody is refused."""
    mesh_file(folder)
    socks = []
    for name in ("socket", "data"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(folder / f"{name}.sock"))
        (folder / f"{name}.sock").chmod(0o666)
        sock.listen(64)
        socks.append(sock)
    fds = [str(sock.fileno()) for sock in socks]
    before = [sys.executable, "-c", ACTIVATOR, "2", *fds, "workload:data"]
    kept = tuple(sock.fileno() for sock in socks)
    with running(folder, before=before, pass_fds=kept) as first, grpc.insecure_channel(first.workload) as channel:
        assert next(iter(x509_svids(channel))).svids[0].spiffe_id == ORDERS
        assert first.end() == 0
    assert (folder / "socket.sock").exists()
    with grpc.insecure_channel(f"unix://{folder}/socket.sock") as channel:
        stream = iter(x509_svids(channel, timeout=30.0))
        with running(folder, before=before, pass_fds=kept):
            assert next(stream).svids[0].spiffe_id == ORDERS
    for sock in socks:
        sock.close()


# ---------------------------------------------------------------------------------------------------- the admin socket


@is_root
def test_only_root_the_agents_user_and_admins_may_ask(folder: Path, authority: Any) -> None:
    """Without admins others don't get past the socket's mode; with some, everybody else is refused in words."""
    code = (
        "import sys; from pathlib import Path; from tests.agent.daemon_world import ask\n"
        "try: print(ask(Path(sys.argv[1]), '/health'))\n"
        "except PermissionError: print('no way in')"
    )

    def asked_by(uid: int) -> str:
        words = [*as_user(uid), sys.executable, "-c", code, str(folder / "admin.sock")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, cwd=Path(__file__).parents[2])
        return done.stdout + done.stderr

    mesh_file(folder)
    with running(folder):
        assert "no way in" in asked_by(NOBODY)
        assert ask(folder / "admin.sock", "/health")[0] == 200
    mesh_file(folder, agent="ca: ca, admins: [1]")
    with running(folder):
        assert asked_by(1).startswith("(200")
        assert asked_by(NOBODY).startswith("(403")


@is_root
def test_admins_of_a_changed_file_may_ask(folder: Path, authority: Any) -> None:
    """Its socket is opened for them, and closed again when nobody else may ask any more."""
    path = folder / "admin.sock"
    mesh_file(folder)
    with running(folder) as daemon:
        assert path.stat().st_mode & 0o777 == 0o600
        mesh_file(folder, agent="ca: ca, admins: [1]")
        until(lambda: daemon.ask("/health")[1]["reloads"] == 1)
        assert path.stat().st_mode & 0o777 == 0o666
        mesh_file(folder)
        until(lambda: daemon.ask("/health")[1]["reloads"] == 2)
        assert path.stat().st_mode & 0o777 == 0o600


@is_root
def test_who_fits_no_entry_is_named_in_the_log_and_counted(folder: Path, authority: Any) -> None:
    """Process and user, at both sockets, and once for a user; nothing of what the entries ask for."""
    mesh_file(folder, entries="[{service: orders, uid: 0, path: /opt/odd/program}, {service: stock, uid: 4242}]")
    with running(folder) as daemon:
        for _ in range(3):
            assert "PERMISSION_DENIED" in _fetched_by(NOBODY, daemon.workload)
        with socket.socket(socket.AF_UNIX) as plug:
            plug.connect(str(folder / "data.sock"))
            assert plug.recv(1) == b""
        strangers = daemon.ask("/health")[1]["strangers"]
        assert strangers["count"] == 4
        assert 0 <= strangers["since"] < 60
        assert daemon.ask("/health")[1]["status"] == "ok"  # anybody could make it another
        metrics = daemon.ask("/metrics")[1]
        assert 'meshlib_agent_callers_total{socket="workload",result="no_entry"} 3' in metrics
        assert 'meshlib_agent_callers_total{socket="data",result="no_entry"} 1' in metrics
        until(lambda: daemon.text.count("fits no entry") == 2, why=lambda: daemon.text)  # a thread reads what it says
        told = [line for line in daemon.lines if "fits no entry" in line]
        assert f"of user {NOBODY} at the workload socket" in told[0]
        assert f"process {os.getpid()} of user 0 at the data socket" in told[1]
        assert "4242" not in daemon.text
        assert "odd" not in daemon.text


def test_the_log_level_is_told_and_changed(folder: Path, authority: Any) -> None:
    """To one of four; and nothing else is changed from there."""
    mesh_file(folder)
    with running(folder) as daemon:
        assert daemon.ask("/log-level") == (200, {"level": "info"})
        assert daemon.ask("/log-level", "PUT", '{"level": "debug"}') == (200, {"level": "debug"})
        assert daemon.ask("/log-level", "PUT", "loud")[0] == 400
        assert daemon.ask("/log-level") == (200, {"level": "debug"})
        assert daemon.ask("/shutdown", "POST")[0] == 404
        assert daemon.ask("/health", "PUT")[0] == 405


def test_nothing_that_is_told_is_secret(folder: Path, authority: Any) -> None:
    """No key, no selector, not the key of handed-over calls: neither in the answers nor in the log."""
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    entries = (
        f"[{{service: orders, uid: {os.geteuid()}}}, {{service: stock, uid: 4242, path: /opt/odd/program, sha256: [{digest}]}}]"
    )
    mesh_file(folder, entries=entries)
    with running(folder) as daemon, grpc.insecure_channel(daemon.workload) as channel:
        next(iter(x509_svids(channel)))
        daemon.ask("/log-level", "PUT", "debug")
        told = [str(daemon.ask(f"/{part}")) for part in ("health", "certificates", "connections", "entries", "metrics")]
        assert "meshlib_agent_identity_left_seconds" in told[-1]
        assert len(daemon.ask("/entries")[1]) == 2
        key = (folder / "state" / "handover.key").read_text().strip()
        daemon.end()
        everything = "\n".join([*told, daemon.text])
    for secret in ("PRIVATE", key, "4242", "/opt/odd", digest):
        assert secret not in everything
