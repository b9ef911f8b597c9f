"""Does development work without a CA of one's own, and does nothing of it count or stay anywhere else?"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import meshlib.config
from meshlib.errors import IdentityError, TrustDomainError
from meshlib.secure import DEV_TRUST_DOMAIN, CertificateAuthority, FolderSource, IdentityStore
from meshlib.secure import dev as development
from meshlib.secure.dev import DevIdentities

SERVICES = {name: f"spiffe://{DEV_TRUST_DOMAIN}/ns/default/sa/{name}" for name in ("orders", "web")}
CONFIG = """
mesh: shop
secure: {mode: enforce, trust_domain: shop.internal, identity: {folder: ./identities}}
services:
  orders: {identity: "spiffe://shop.internal/special", discover: {static: ["127.0.0.1:8101"]}}
  web: {listen: "127.0.0.1:8000"}
"""


@pytest.fixture
def identities(tmp_path: Path) -> Iterator[DevIdentities]:
    with DevIdentities(parent=str(tmp_path)) as made:
        made.issue(SERVICES)
        yield made


@pytest.fixture
def is_on(identities: DevIdentities, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLIB_DEV", str(identities.folder))


def source_of(folder: Path, trust_domain: str = DEV_TRUST_DOMAIN) -> FolderSource:
    return FolderSource(folder, "orders", trust_domain, f"spiffe://{trust_domain}/ns/default/sa/orders")


# ---------------------------------------------------------------------------------------------------- the trust domain


def test_there_is_one_name_for_the_trust_domain_of_development() -> None:
    """The configuration's and the identities' are the same, and it can never be registered."""
    assert (DEV_TRUST_DOMAIN, meshlib.config.DEV_TRUST_DOMAIN) == ("dev.meshlib.invalid", "dev.meshlib.invalid")


@pytest.mark.usefixtures("is_on")
def test_identity_of_development_counts_in_development(identities: DevIdentities) -> None:
    """Under `meshlib dev`, from the folder that it made."""
    assert source_of(identities.folder).load().spiffe_id == SERVICES["orders"]


def test_identity_of_development_is_refused_by_a_normal_configuration(identities: DevIdentities) -> None:
    """Copied into a service's folder by mistake or on purpose, it opens nothing: neither as certificate nor as root."""
    with pytest.raises(TrustDomainError, match="made by `meshlib dev`, and counts nowhere else"):
        source_of(identities.folder, "shop.internal").load()
    authority = CertificateAuthority.create(None, "shop.internal")
    folder = identities.folder / "orders"
    root = (folder / "bundle.pem").read_bytes()
    authority.write("orders", identities.folder)
    source_of(identities.folder, "shop.internal").load()
    with (folder / "bundle.pem").open("ab") as bundle:
        bundle.write(root)
    with pytest.raises(TrustDomainError, match="made by `meshlib dev`"):
        source_of(identities.folder, "shop.internal").load()


def test_nobody_can_configure_the_trust_domain_of_development(
    identities: DevIdentities, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not without `meshlib dev`, and not with another folder than its own."""
    with pytest.raises(TrustDomainError, match="counts only under `meshlib dev`"):
        source_of(identities.folder)
    for other in ("", str(tmp_path), str(tmp_path / "nothing")):
        monkeypatch.setenv("MESHLIB_DEV", other)
        with pytest.raises(TrustDomainError, match="counts only under `meshlib dev`"):
            source_of(identities.folder)


def test_no_lasting_ca_can_be_made_for_it(tmp_path: Path) -> None:
    """A CA in a folder could hand out such identities after the terminal is closed."""
    with pytest.raises(IdentityError, match="meshlib dev"):
        CertificateAuthority.create(tmp_path / "ca", DEV_TRUST_DOMAIN)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- the folder


def test_folder_is_private_holds_no_key_of_the_ca_and_goes_with_the_block(tmp_path: Path) -> None:
    """One subfolder for each service; the CA's key is in memory only. An error takes the folder away, too."""
    with pytest.raises(RuntimeError, match="as usual"), DevIdentities(parent=str(tmp_path)) as made:
        made.issue(SERVICES)
        folder = made.folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert found == [f"{name}/{file}.pem" for name in ("orders", "web") for file in ("bundle", "key", "svid")]
        raise RuntimeError("as usual")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_usable", [True, False])
def test_folder_is_made_in_the_users_own_runtime_directory_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_usable: bool
) -> None:
    """It is in memory and private to the user; otherwise the folder for temporary files."""
    own, common = tmp_path / "run", tmp_path / "tmp"
    common.mkdir()
    if is_usable:
        own.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(own))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(common))
    with DevIdentities() as made:
        assert made.folder.parent == (own if is_usable else common)


@pytest.mark.usefixtures("is_on")
def test_renewal_reaches_a_running_process(identities: DevIdentities) -> None:
    """Certificates live an hour and are renewed at half of it; the store takes the new one."""

    def tls(*_: Any, **__: Any) -> Any:
        return object()

    store = IdentityStore(source_of(identities.folder), mode="enforce", tls_client=tls, tls_server=tls)
    first = store.require(0.0)
    identities.renew()
    assert store.refresh(1.0) is True
    current = store.current
    assert current is not None
    assert (current.serial != first.serial, current.bundles == first.bundles) == (True, True)
    assert (identities.renew_every, round(first.not_after - first.not_before)) == (1800.0, 3630)


def test_what_a_killed_run_left_behind_is_swept_away(tmp_path: Path) -> None:
    """Only what is ours, older than its certificates, and held by nobody; links are not followed."""
    old = time.time() - 3 * development.LIFE
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "meshlib-dev-link").symlink_to(kept)
    for name in ("meshlib-dev-dead", "meshlib-dev-young", "other-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key.pem").touch()
    with DevIdentities(parent=str(tmp_path)) as alive:
        names = {"meshlib-dev-link", "meshlib-dev-young", "other-dead", "kept", alive.folder.name}
        for path in (tmp_path / "meshlib-dev-dead", tmp_path / "other-dead", alive.folder, kept):
            os.utime(path, (old, old))
        with DevIdentities(parent=str(tmp_path)) as second:
            assert {path.name for path in tmp_path.iterdir()} == names | {second.folder.name}


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`meshlib dev …` in a process group of its own, with its folder under `tmp_path`/run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mesh.yaml").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHLIB")}
    started = []

    def call(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from meshlib.cli import main; sys.exit(main())", "dev", *words],
            cwd=tmp_path,
            env=environment | {"XDG_RUNTIME_DIR": str(tmp_path / "run")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, str, str]:
    """Exit code and output, after it was seen that no folder is left."""
    printed, complained = process.communicate(timeout=30)
    assert list((tmp_path / "run").iterdir()) == []
    return process.returncode, printed, complained


SHOW = """
import os
from meshlib.config import load
from meshlib.secure import FolderSource
config = load(service="orders")
source = FolderSource(config.identity_folder, "orders", config.trust_domain, config.own.identity)
print(source.load().spiffe_id, config.file, os.environ["MESHLIB_DEV"] == str(config.identity_folder), flush=True)
"""


def test_command_finds_its_configuration_and_identity(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """The same mesh.yaml, carried over into the trust domain of development, without a line of code for it."""
    code, printed, complained = ended(start("--", sys.executable, "-c", SHOW), tmp_path)
    assert (code, printed.split()) == (
        0,
        [f"spiffe://{DEV_TRUST_DOMAIN}/ns/default/sa/orders", str(tmp_path / "mesh.yaml"), "True"],
    ), complained


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_exit_code_of_the_command_comes_back(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, script: str, code: int
) -> None:
    """As a shell tells it: 128 and the number of the signal."""
    assert ended(start("--", "sh", "-c", script), tmp_path)[0] == code


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2"])
def test_signals_go_on_to_the_command(start: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str) -> None:
    """It decides what they mean: here it tidies up and ends by itself."""
    loop = f"trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.05; done"
    process = start("--", "sh", "-c", loop)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert ended(process, tmp_path)[:2] == (5, f"got {name}\n")


@pytest.mark.skipif(shutil.which("script") is None, reason="the program `script`, which makes a terminal, is not installed")
def test_ctrl_c_in_a_terminal_reaches_the_command_once(tmp_path: Path) -> None:
    """The terminal sends it to the whole group; passing it on would make it two, and the second often means "at once"."""
    (tmp_path / "mesh.yaml").write_text(CONFIG)
    count = """
import signal, sys, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", flush=True)
while not seen: time.sleep(0.02)
time.sleep(0.5)
print("seen", len(seen), flush=True)
"""
    (tmp_path / "count.py").write_text(count)
    run = "import sys; from meshlib.cli import main; sys.exit(main())"
    inner = shlex.join([sys.executable, "-c", run, "dev", "--", sys.executable, str(tmp_path / "count.py")])
    process = subprocess.Popen(
        ["script", "-qec", inner, "/dev/null"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    process.stdin.write("\x03")
    process.stdin.flush()
    printed, _ = process.communicate(timeout=30)
    assert "seen 1" in printed


def test_command_starts_with_no_signal_blocked(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """What `meshlib dev` needs for itself must not reach the application."""
    script = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    assert ended(start("--", sys.executable, "-c", script), tmp_path)[:2] == (0, "[]\n")


def test_without_a_command_it_prints_what_to_export_and_waits(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Until Ctrl-C; what it printed works in another shell meanwhile."""
    process = start()
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]
    exports = "".join(line for line in lines if line.startswith(("export MESHLIB_DEV", "export MESHLIB_CONFIG")))
    shown = subprocess.run(
        ["sh", "-c", f'{exports}\nexec "$0" -c "$1"', sys.executable, SHOW], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith(f"spiffe://{DEV_TRUST_DOMAIN}/ns/default/sa/orders {tmp_path / 'mesh.yaml'} True")
    assert "orders, web" in lines[3]
    process.send_signal(signal.SIGINT)
    assert ended(process, tmp_path)[0] == 0


def test_command_that_can_not_be_started_is_told(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """With the likely cause, and without a traceback."""
    code, _, complained = ended(start("--", "no-such-command-here"), tmp_path)
    assert (code, "no-such-command-here can't be started: No such file" in complained) == (1, True)
    assert "Traceback" not in complained


def test_mistakes_in_the_configuration_stop_it(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """Exit code 2, and the command never runs: an address that others can reach is one, in development."""
    (tmp_path / "mesh.yaml").write_text(CONFIG.replace("127.0.0.1:8000", "0.0.0.0:8000"))
    code, printed, complained = ended(start("--", "echo", "ran"), tmp_path)
    assert (code, printed, "mesh.yaml:6" in complained) == (2, "", True)


def test_certificates_are_renewed_while_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At half of their life; a renewal that fails is told, tried again, and ends nothing."""
    import argparse

    from meshlib.cli import dev as command

    (tmp_path / "mesh.yaml").write_text(CONFIG)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("MESHLIB_DEV", raising=False)
    monkeypatch.setattr(command, "_AGAIN", 0.01)
    monkeypatch.setattr(command, "DevIdentities", lambda: DevIdentities(life=2.0))
    real, calls = DevIdentities.renew, []

    def renew(self: DevIdentities) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(DevIdentities, "renew", renew)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    watch = """
        cd "$MESHLIB_DEV"; cp orders/svid.pem first
        while cmp -s first orders/svid.pem; do sleep 0.02; done; echo renewed
    """
    args = argparse.Namespace(config=str(tmp_path / "mesh.yaml"), words=["--", "sh", "-c", watch])
    assert command.run(args) == 0
    printed = capfd.readouterr()
    assert (printed.out, "can't be renewed: [Errno 28]" in printed.err, len(calls) >= 3) == ("renewed\n", True, True)
    assert "MESHLIB_DEV" not in os.environ
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mesh.yaml"]
