"""Does the library take its identity from the node agent, and only what the agent says now? A real agent, real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("h2", reason="the agent's side needs the extra [agent]")
pytest.importorskip("google.protobuf", reason="the agent's side needs the extra [agent]")

from cryptography.hazmat.primitives.serialization import Encoding

import meshlib
from meshlib.config.agent_policy import EntryPolicy
from meshlib.errors import IdentityWithdrawn
from meshlib.secure import CertificateAuthority, IdentityStore, certificates, identity_source_of
from meshlib.secure.workload import WorkloadSource, channel, watch
from meshlib.secure.workload.address import refuse_foreign_socket
from meshlib.testing import check_identity_source
from tests.agent.workload_world import PATIENCE, TD, Issuer, Node, id_of, node, until

ID = id_of("orders")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Node]:
    with node(tmp_path) as made:
        yield made


@pytest.fixture
def source(agent: Node) -> Iterator[WorkloadSource]:
    made = WorkloadSource(agent.address, ID, timeout=PATIENCE, longest=1.0)
    try:
        yield made
    finally:
        made.close()


def error_of(source: WorkloadSource) -> str:
    try:
        source.load()
    except meshlib.MeshError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_source_conforms(tmp_path: Path) -> None:
    """To all that is asked of every source."""
    from tests.secure.workload_raw import RawWorld

    assert len(check_identity_source(lambda spiffe_id: RawWorld(tmp_path, spiffe_id))) == 11


def test_configuration_names_it_and_nothing_more(agent: Node) -> None:
    """Where the agent listens is in the configuration already."""
    choice = SimpleNamespace(kind="agent", socket=agent.address)
    config: Any = SimpleNamespace(identity_source=choice, own=SimpleNamespace(name="orders", identity=ID), trust_domain=TD)
    made: Any = identity_source_of(config)
    try:
        assert made.load() == agent.issuer.identities["orders"]
    finally:
        made.close()


def test_identity_is_the_agents_to_the_byte(agent: Node, source: WorkloadSource) -> None:
    """And what comes next is in force within a second, as a whole."""
    assert source.load() == agent.issuer.identities["orders"]
    agent.issuer.issue("orders")
    until(source.load, agent.issuer.identities["orders"])


def test_partners_and_revocations_come_along_and_go_again(agent: Node, source: WorkloadSource) -> None:
    """What is absent in a message is not kept."""
    issuer = agent.issuer
    root = issuer.authority._roots.signing
    crl = certificates.new_crl(root.certificate, root.key, [("0a", time.time(), "unspecified")], 3600.0, time.time(), 1)
    issuer.partners["partner.example"] = CertificateAuthority.create(None, "partner.example").bundle
    issuer.revoked[TD] = crl.public_bytes(Encoding.PEM)
    issuer.issue("orders")
    until(lambda: (source.load().bundles, source.load().crls), (dict(issuer.bundles()), issuer.revoked))
    issuer.partners.clear()
    issuer.revoked = {}
    issuer.issue("orders")
    until(lambda: (sorted(source.load().bundles), source.load().crls), ([TD], {}))


def test_entry_that_is_taken_away_withdraws_the_identity(agent: Node, source: WorkloadSource) -> None:
    """The very moment; and when it's back, so are we."""
    store = IdentityStore(source, mode="enforce")
    store.require(0.0)
    agent.entries.replace([EntryPolicy("orders", uid=4321)])
    until(lambda: error_of(source).split(":")[0], "IdentityWithdrawn")
    store.refresh(1.0)
    assert (store.current, isinstance(store.last_error, IdentityWithdrawn)) == (None, True)
    agent.entries.replace([EntryPolicy("orders", uid=0)])
    until(lambda: error_of(source), "")


def test_entry_of_another_service_is_no_identity_for_us(agent: Node, source: WorkloadSource) -> None:
    """The agent knows this process, as somebody else."""
    agent.entries.replace([EntryPolicy("web", uid=0)])
    agent.issuer.issue("web")
    until(lambda: "and none for spiffe://shop.internal/ns/default/sa/orders" in error_of(source))


def test_agent_that_is_killed_changes_nothing_and_is_heard_again_within_two_seconds(agent: Node, source: WorkloadSource) -> None:
    """What we have stays in use to its end."""
    first = source.load()
    agent.stop()
    until(lambda: source._alone_since is not None)
    assert source.load() is first
    time.sleep(1.5)  # long enough for the pauses to have grown
    agent.issuer.issue("orders")
    agent.start()
    began = time.monotonic()
    until(source.load, agent.issuer.identities["orders"])
    assert time.monotonic() - began < 2.5


def test_agent_that_has_no_identity_yet_is_asked_again(tmp_path: Path) -> None:
    """At its start, say: that is no denial."""
    issuer = Issuer()
    with node(tmp_path, issuer=issuer) as agent:
        issuer.withdraw("orders")
        made = WorkloadSource(agent.address, ID, timeout=0.3, longest=1.0)
        try:
            assert error_of(made).startswith("IdentityError: ")
            agent.issuer.issue("orders")
            until(lambda: error_of(made), "")
        finally:
            made.close()


AGENT = """
    import asyncio, sys
    from pathlib import Path
    from tests.agent.workload_world import Node
    node = Node(Path(sys.argv[1]))
    print("up", flush=True)
    sys.stdin.readline()
"""


def test_agent_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """A stopped process still accepts connections, as far as the kernel is concerned. Who has an identity is answered from memory."""
    command = [sys.executable, "-c", textwrap.dedent(AGENT), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        address = f"unix://{tmp_path}/agent.sock"
        first, second = (WorkloadSource(address, ID, timeout=seconds, longest=1.0) for seconds in (PATIENCE, 0.5))
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            kept = first.load()
            process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            assert (first.load() is kept, error_of(second).startswith("IdentityError: the Workload API at ")) == (True, True)
            assert time.monotonic() - began < 1.5
            process.send_signal(signal.SIGCONT)
            until(lambda: error_of(second), "")
        finally:
            process.send_signal(signal.SIGCONT)
            first.close()
            second.close()
            process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_socket_of_another_user_is_not_asked(agent: Node, source: WorkloadSource) -> None:
    """Whoever puts one there would be our CA."""
    os.chown(agent.path, 12345, -1)
    assert "belongs to user 12345, who is not the agent's" in error_of(source)
    assert agent.acceptor.accepted == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_way_to_the_socket_is_judged_and_not_its_end_alone(tmp_path: Path) -> None:
    """Whoever can turn it, in a folder or by a link, leads us to their own socket between our look and our connecting."""
    place, sticky, theirs = tmp_path / "a" / "b", tmp_path / "tmp", tmp_path / "theirs"
    for folder in (place, sticky, theirs / "c"):
        folder.mkdir(parents=True)
    sticky.chmod(0o1777)
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(place / "s"))
        path, own, up, into = place / "s", sticky / "own", sticky / "up", theirs / "c" / "in"
        own.symlink_to(path)
        up.symlink_to("../a/./b")
        into.symlink_to(path)
        for good in (path, own, up / "s", up / ".." / "b" / "s"):
            refuse_foreign_socket(f"unix://{good}")

        def flaw(way: Path) -> str:
            with pytest.raises(meshlib.IdentityError) as raised:
                refuse_foreign_socket(f"unix://{way}")
            return raised.value.message

        os.lchown(own, 12345, -1)
        assert flaw(own) == f"the link {own} belongs to user 12345, who is not the agent's."
        os.lchown(up, 12345, -1)
        assert flaw(up / "s") == f"the link {up} belongs to user 12345, who is not the agent's."
        os.chown(theirs, 12345, -1)
        assert flaw(into) == f"the folder {theirs} belongs to user 12345, who is not the agent's."
        (tmp_path / "a").chmod(0o775)
        assert flaw(path) == f"the folder {tmp_path / 'a'} may be changed by other users."
        (sticky / "x").symlink_to("y")
        (sticky / "y").symlink_to("x")
        with pytest.raises(OSError, match="symbolic links"):
            refuse_foreign_socket(f"unix://{sticky / 'x'}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
@pytest.mark.parametrize(("uid", "is_believed"), [(345, True), (1345, False), (None, False)], ids=["system", "person", "nobody"])
def test_agent_has_a_user_of_its_own_where_it_is_installed(
    agent: Node, monkeypatch: pytest.MonkeyPatch, uid: int | None, is_believed: bool
) -> None:
    """The system user `meshlib`: a person who took that name isn't it."""

    def named(name: str) -> Any:
        if name != "meshlib" or uid is None:
            raise KeyError(name)
        return SimpleNamespace(pw_uid=uid)

    monkeypatch.setattr("pwd.getpwnam", named)
    for place in (agent.path, agent.path.parent):
        os.chown(place, uid or 345, -1)
    choice = SimpleNamespace(kind="agent", socket=agent.address)
    config: Any = SimpleNamespace(identity_source=choice, own=SimpleNamespace(name="orders", identity=ID), trust_domain=TD)
    made: Any = identity_source_of(config)
    try:
        assert (error_of(made) == "") is is_believed
    finally:
        made.close()


@pytest.mark.parametrize("socket", ["unix:relative", "unix://host/x", "tcp://127.0.0.1:1", "unix:@abstract", ""])
def test_address_that_is_no_absolute_path_is_a_mistake(socket: str) -> None:
    """As for every Workload API."""
    with pytest.raises(meshlib.ConfigError, match=r"secure\.identity"):
        WorkloadSource(socket, ID)


def test_forked_child_has_a_stream_of_its_own(agent: Node) -> None:
    """With the parent's identity at once; and both end by themselves."""
    code = f"""
        import os, sys, time
        from meshlib.secure import IdentityStore
        from meshlib.secure.workload import WorkloadSource
        source = WorkloadSource({agent.address!r}, {ID!r}, longest=1.0)
        store = IdentityStore(source, mode="enforce")
        first = store.require(0.0).serial
        child = os.fork()
        if child == 0:
            store.after_fork()
            assert store.current.serial == first
        def tell(*words):
            os.write(1, (" ".join(map(str, words)) + "\\n").encode())
        tell("ready")
        end = time.monotonic() + 20
        while store.current.serial == first and time.monotonic() < end:
            store.refresh(0.0)
            time.sleep(0.01)
        tell("parent" if child else "child", store.current.serial)
        source.close()
        if child == 0:
            os._exit(0)
        tell("exit", os.waitpid(child, 0)[1])
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
            until(lambda: agent.api.connections, 2)
            issued = agent.issuer.issue("orders")
            rest = sorted(line.strip() for line in process.stdout)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert rest == [f"child {issued.serial}", "exit 0", f"parent {issued.serial}"]


def test_asking_needs_no_protobuf_and_starts_nothing_at_import() -> None:
    """The library reads its one message by itself; a thread begins with the first look."""
    code = (
        "import sys, threading, meshlib.secure.workload as w; print('google.protobuf' in sys.modules, threading.active_count())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False 1"


def test_bounds_are_those_that_are_promised() -> None:
    """Back within two seconds after the agent is: our pause and gRPC's, at their longest."""
    assert dict(channel._OPTIONS)["grpc.max_reconnect_backoff_ms"] / 1000 + 1.0 <= 2.0
    assert watch.LONGEST == 5.0
