"""Are we who the Workload API says, as long as it says so? A real gRPC server of the API, and the real library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from meshlib_spiffe import WorkloadSource, open_source
from spiffe import X509Svid
from spiffe._proto import workload_pb2 as pb
from spiffe._proto import workload_pb2_grpc as pg

import meshlib
from meshlib.errors import IdentityWithdrawn
from meshlib.secure import CertificateAuthority, Identity, IdentityStore, certificates
from meshlib.secure.sources import open_plugin
from meshlib.secure.workload import watch as source_module
from meshlib.testing import check_identity_source

TD = "shop.internal"
ID = f"spiffe://{TD}/ns/default/sa/orders"
PATIENCE = 10.0


class Api(pg.SpiffeWorkloadAPIServicer):
    """A Workload API that says what a test wants, on every stream, and at once when it changes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "agent.sock"
        self.address = f"unix://{self.path}"
        self.calls: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self.said: pb.X509SVIDResponse | None = None
        self.refusal: grpc.StatusCode | None = None
        self.version = 0
        self.open = 0
        self.are_closed = 0
        self.server: grpc.Server | None = None
        self.start()

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        pg.add_SpiffeWorkloadAPIServicer_to_server(self, self.server)
        self.server.add_insecure_port(self.address)
        self.server.start()

    def stop(self) -> None:
        """The agent dies."""
        assert self.server is not None
        with self.changed:
            self.are_closed += 1
            self.changed.notify_all()
        self.server.stop(0).wait(PATIENCE)
        self.path.unlink(missing_ok=True)

    def say(self, said: pb.X509SVIDResponse | None, refusal: grpc.StatusCode | None = None) -> None:
        with self.changed:
            self.said, self.refusal = said, refusal
            self.version += 1
            self.changed.notify_all()

    def close_streams(self) -> None:
        """As the standard allows at any time."""
        with self.changed:
            self.are_closed += 1
            self.changed.notify_all()

    def FetchX509SVID(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.X509SVIDResponse]:
        with self.changed:
            self.calls.append(dict(context.invocation_metadata()))
            self.open += 1
            closed = self.are_closed
        context.add_callback(self._wake)
        seen = 0
        try:
            while context.is_active():
                with self.changed:
                    self.changed.wait_for(
                        lambda: self.version != seen or self.are_closed != closed or not context.is_active(), 60
                    )
                    if self.are_closed != closed:
                        return
                    fresh, seen, said, refusal = self.version != seen, self.version, self.said, self.refusal
                if refusal is not None:
                    context.abort(refusal, "as the test wants")
                if fresh and said is not None:
                    yield said
        finally:
            with self.changed:
                self.open -= 1
                self.changed.notify_all()

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()


@pytest.fixture
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(None, TD)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def source(api: Api) -> Iterator[WorkloadSource]:
    made = open_source({"socket": api.address, "timeout": PATIENCE}, spiffe_id=ID, trust_domain=TD)
    try:
        yield made
    finally:
        made.close()


def der(pem: bytes) -> bytes:
    return b"".join(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem))


def svid_of(chain: bytes, key: bytes, bundle: bytes, spiffe_id: str = ID, hint: str = "") -> pb.X509SVID:
    raw = load_pem_private_key(key, None).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return pb.X509SVID(spiffe_id=spiffe_id, x509_svid=der(chain), x509_svid_key=raw, bundle=der(bundle), hint=hint)


def svid(authority: CertificateAuthority, service: str = "orders", hint: str = "", ttl: float = 3600.0) -> pb.X509SVID:
    issued = authority.issue(service, ttl=ttl)
    return svid_of(issued.chain, issued.key, issued.bundle, issued.spiffe_id, hint)


def serial_of(made: pb.X509SVID) -> int:
    return X509Svid.parse_raw(made.x509_svid, made.x509_svid_key).leaf.serial_number


def number(identity: Identity) -> int:
    return int(identity.serial, 16)


def until(question: Callable[[], Any], answer: Any = True) -> None:
    """Wait for an event of another thread; what it was in the end is what is compared."""
    end = time.monotonic() + PATIENCE
    while (found := question()) != answer and time.monotonic() < end:
        time.sleep(0.01)
    assert found == answer


def error_of(source: WorkloadSource) -> str:
    try:
        source.load()
    except meshlib.MeshError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---------------------------------------------------------------- what it answers


def test_source_conforms(tmp_path: Path) -> None:
    """To all that is asked of every source."""

    class World:
        def __init__(self, spiffe_id: str) -> None:
            self.spiffe_id = spiffe_id
            self.folder = tmp_path / str(len(list(tmp_path.iterdir())))
            self.folder.mkdir()
            self.api = Api(self.folder)

        def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
            try:
                made = svid_of(chain, key, bundle, self.spiffe_id)
            except (ValueError, TypeError):
                # PEM that doesn't hold what it should: what is left of it goes over the wire.
                made = pb.X509SVID(spiffe_id=self.spiffe_id, x509_svid=chain, x509_svid_key=key, bundle=bundle)
            self.api.say(pb.X509SVIDResponse(svids=[made]))

        def source(self) -> WorkloadSource:
            return WorkloadSource(self.api.address, self.spiffe_id, timeout=PATIENCE)

        def close(self) -> None:
            self.api.stop()

    assert len(check_identity_source(World)) == 11


def test_mesh_finds_it_by_its_entry_point(api: Api, authority: CertificateAuthority) -> None:
    """And by nothing else: a plugin is loaded only if the configuration names it."""
    (point,) = entry_points(group="meshlib.identity", name="spiffe")
    assert point.load() is open_source
    made: Any = open_plugin("spiffe", {"socket": api.address}, spiffe_id=ID, trust_domain=TD)
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    assert made.load().spiffe_id == ID
    made.close()


def test_request_carries_the_header_that_the_standard_demands(api: Api, source: WorkloadSource, authority: Any) -> None:
    """A server refuses a request without it: it might have been made by a browser."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    source.load()
    assert api.calls[0]["workload.spiffe.io"] == "true"


def test_message_that_says_the_same_changes_nothing(api: Api, source: WorkloadSource, authority: Any) -> None:
    """Agents repeat themselves, and after a reconnect they must."""
    said = pb.X509SVIDResponse(svids=[svid(authority)])
    api.say(said)
    first = source.load()
    api.close_streams()
    until(lambda: len(api.calls), 2)
    api.say(said)
    heard = threading.Event()
    source._take, real = lambda message: (real(message), heard.set())[0], source._take  # type: ignore[method-assign]
    api.say(said)
    assert (heard.wait(PATIENCE), source.load() is first) == (True, True)


def test_bundles_of_other_trust_domains_come_along_and_go_again(api: Api, source: WorkloadSource, authority: Any) -> None:
    """Each under its own name; what is not in a message any more is not believed any more."""
    other = CertificateAuthority.create(None, "partner.example").bundle
    api.say(pb.X509SVIDResponse(svids=[svid(authority)], federated_bundles={"spiffe://partner.example": der(other)}))
    assert source.load().bundles == {TD: authority.bundle, "partner.example": other}
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    until(lambda: sorted(source.load().bundles), [TD])


def test_revocations_come_along_and_go_again(api: Api, source: WorkloadSource, authority: CertificateAuthority) -> None:
    """Absent data is withdrawn data."""
    root = authority._roots.signing
    crl = certificates.new_crl(root.certificate, root.key, [("0a", time.time(), "unspecified")], 3600.0, time.time(), 1)
    api.say(pb.X509SVIDResponse(svids=[svid(authority)], crl=[crl.public_bytes(Encoding.DER)]))
    assert source.load().crls == {TD: crl.public_bytes(Encoding.PEM)}
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    until(lambda: source.load().crls, {})


def test_of_svids_with_one_hint_the_first_counts(api: Api, authority: CertificateAuthority) -> None:
    """And the hint that the configuration names says which one is ours."""
    first, second, third = svid(authority, hint="internal"), svid(authority, hint="internal"), svid(authority, hint="external")
    api.say(pb.X509SVIDResponse(svids=[svid(authority, "web"), first, second, third]))
    for hint, expected in (("internal", first), ("external", third), ("", first)):
        made = WorkloadSource(api.address, ID, hint=hint, timeout=PATIENCE)
        assert number(made.load()) == serial_of(expected)
        made.close()
    # Which of two with one hint is meant can't be told by their IDs.
    api.say(pb.X509SVIDResponse(svids=[svid(authority, "web", hint="internal"), first]))
    for hint in ("internal", ""):
        made = WorkloadSource(api.address, ID, hint=hint, timeout=PATIENCE)
        with pytest.raises(meshlib.IdentityError):
            made.load()
        made.close()
    made = WorkloadSource(api.address, ID, hint="elsewhere", timeout=PATIENCE)
    with pytest.raises(meshlib.IdentityError, match="none for"):
        made.load()
    made.close()


# ---------------------------------------------------------------- what ends it, and what doesn't


def test_svid_that_is_not_in_a_message_any_more_is_not_used_any_more(api: Api, source: WorkloadSource, authority: Any) -> None:
    """Nothing is served or called with it, which is an alarm, until there is a new one."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    store = IdentityStore(source, mode="enforce")
    told: list[str] = []
    store.on_alarm(lambda alarm: told.append(alarm.kind))
    store.require(0.0)
    assert (store.client_tls is not None, store.server_tls(True) is not None) == (True, True)
    api.say(pb.X509SVIDResponse(svids=[svid(authority, "web")]))
    until(lambda: (store.refresh(1.0), store.client_tls)[1] is None)
    with pytest.raises(meshlib.IdentityError, match="no identity to serve TLS with"):
        store.server_tls(True)
    assert (store.current, told, isinstance(store.last_error, IdentityWithdrawn)) == (None, ["withdrawn"], True)
    assert "identities for spiffe://shop.internal/ns/default/sa/web" in str(store.last_error)
    again = svid(authority)
    api.say(pb.X509SVIDResponse(svids=[again]))
    until(lambda: store.refresh(2.0))
    current = store.current
    assert current is not None
    assert (number(current), store.alarms, store.last_error) == (serial_of(again), (), None)


def test_denial_on_an_open_stream_withdraws_at_once(api: Api, source: WorkloadSource, authority: Any) -> None:
    """All SVIDs were redacted, says the standard."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    source.load()
    api.say(None, grpc.StatusCode.PERMISSION_DENIED)
    until(lambda: error_of(source).split(":")[0], "IdentityWithdrawn")


def test_denial_on_a_new_stream_counts_when_it_lasts(
    api: Api, source: WorkloadSource, authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent attests anew for each stream, and that may fail for a moment."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    store = IdentityStore(source, mode="enforce")
    first = store.require(0.0)
    with api.changed:
        api.said, api.refusal = None, grpc.StatusCode.PERMISSION_DENIED
    api.close_streams()
    until(lambda: "stays in use for the moment" in error_of(source))
    assert (store.refresh(1.0), store.current) == (False, first)
    monkeypatch.setattr(source_module, "GRACE", 0.0)
    until(lambda: error_of(source).split(":")[0], "IdentityWithdrawn")


def test_denial_from_the_start_is_no_withdrawal(api: Api, source: WorkloadSource) -> None:
    """There was nothing to withdraw; and it goes on asking."""
    api.say(None, grpc.StatusCode.PERMISSION_DENIED)
    assert error_of(source).startswith("IdentityError: the Workload API at unix:///")
    until(lambda: len(api.calls) >= 3)


def test_message_without_svids_is_discarded(api: Api, source: WorkloadSource, authority: Any) -> None:
    """It is told, what was good stays in use, and the next good message ends it."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    store = IdentityStore(source, mode="enforce")
    first = store.require(0.0)
    api.say(pb.X509SVIDResponse())
    until(lambda: "holds no SVID, and was discarded" in error_of(source))
    assert (store.refresh(1.0), store.current, store.alarms) == (False, first, ())
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    until(lambda: error_of(source), "")
    assert len(api.calls) == 1


@pytest.mark.parametrize("field", ["spiffe_id", "x509_svid", "x509_svid_key", "bundle"])
def test_message_that_lacks_a_field_is_discarded(api: Api, source: WorkloadSource, authority: Any, field: str) -> None:
    """Each is mandatory."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    first = source.load()
    broken = svid(authority)
    broken.ClearField(field)  # type: ignore[arg-type]
    api.say(pb.X509SVIDResponse(svids=[broken]))
    until(lambda: f"lacks {field}, and the message was discarded" in error_of(source))
    assert source._identity is first


@pytest.mark.parametrize("field", ["x509_svid", "x509_svid_key", "bundle"])
def test_message_that_cannot_be_read_is_discarded(api: Api, source: WorkloadSource, authority: Any, field: str) -> None:
    """And its content is not quoted."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    first = source.load()
    broken = svid(authority)
    setattr(broken, field, getattr(broken, field)[:-20])
    api.say(pb.X509SVIDResponse(svids=[broken]))
    until(lambda: "can't be read, and was discarded" in error_of(source))
    assert source._identity is first


def test_stream_that_is_closed_is_opened_again_after_a_moment(api: Api, source: WorkloadSource, authority: Any) -> None:
    """The identity stays, no failure is told, and what changed meanwhile is heard."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    source.load()
    again = svid(authority)
    with api.changed:
        api.said = pb.X509SVIDResponse(svids=[again])
    api.close_streams()
    until(lambda: (error_of(source), number(source.load())), ("", serial_of(again)))
    assert len(api.calls) == 2


def test_pause_grows_while_streams_are_closed_at_once(api: Api, source: WorkloadSource, authority: Any) -> None:
    """A server that answers and hangs up is not asked as fast as it hangs up."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    source.load()
    pauses: list[float] = []
    real = source._ended.wait

    def wait(seconds: float | None = None) -> bool:
        pauses.append(seconds or 0.0)
        return real(0.0)

    source._ended.wait = wait  # type: ignore[method-assign]
    while len(pauses) < 7:
        until(lambda: api.open, 1)
        api.close_streams()
        until(lambda count=len(pauses): len(pauses) > count)
    # Each twice the one before, up to five seconds; and jittered: from half of it to all of it.
    longest = [min(5.0, 0.1 * 2**n) for n in range(1, 8)]
    assert [0.5 * most <= pause <= most for pause, most in zip(pauses, longest, strict=False)] == [True] * 7


def test_agent_that_dies_is_told_when_it_lasts_and_the_identity_stays(
    api: Api, source: WorkloadSource, authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when it is back, it is heard again."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    store = IdentityStore(source, mode="enforce")
    first = store.require(0.0)
    api.stop()
    until(lambda: source._alone_since is not None)
    assert (store.refresh(1.0), store.last_error) == (False, None)
    monkeypatch.setattr(source_module, "NOTICE", 0.0)
    until(lambda: "has been away for some time" in error_of(source))
    assert (store.refresh(2.0), store.current) == (False, first)
    api.start()
    until(lambda: error_of(source), "")


def test_agent_may_come_after_us(tmp_path: Path, authority: CertificateAuthority) -> None:
    """The start waits for it, and the next look asks again."""
    made = WorkloadSource(f"unix://{tmp_path}/agent.sock", ID, timeout=0.2)
    assert "its socket can't be reached" in error_of(made)
    api = Api(tmp_path)
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    until(lambda: error_of(made), "")
    made.close()
    api.stop()


def test_fault_that_nobody_expected_ends_no_watching(
    api: Api,
    source: WorkloadSource,
    authority: CertificateAuthority,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A channel that a library has closed, say: it is told once, and the next channel is listened to."""
    listen, left = source._listen, [2]

    def stumble(ended: threading.Event) -> bool:
        if left[0]:
            left[0] -= 1
            raise ValueError("Cannot invoke RPC on closed channel!")
        return listen(ended)

    monkeypatch.setattr(source, "_listen", stumble)
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    until(lambda: error_of(source), "")
    assert (left, [record.message.count("can't be listened to") for record in caplog.records]) == ([0], [1])


def test_watcher_that_died_is_begun_anew(api: Api, source: WorkloadSource, authority: CertificateAuthority) -> None:
    """Whatever ended it: who loads must not hear the past for ever."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    dead = threading.Thread(target=int)
    dead.start()
    dead.join()
    source._thread = dead
    assert error_of(source) == ""


def test_request_that_is_called_invalid_is_not_repeated(api: Api, source: WorkloadSource) -> None:
    """Asking again would change nothing, says the standard."""
    api.say(None, grpc.StatusCode.INVALID_ARGUMENT)
    assert "it is not asked again" in error_of(source)
    thread = source._thread
    assert thread is not None
    thread.join(PATIENCE)
    assert (thread.is_alive(), len(api.calls)) == (False, 1)
    assert "it is not asked again" in error_of(source)
    assert (source._thread, len(api.calls)) == (thread, 1)


def test_mesh_stands_up_with_it_and_a_reload_leaves_nothing_behind(api: Api, authority: Any, tmp_path: Path) -> None:
    """By the configuration alone; another one closes the stream of the first."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority, hint="a")]))
    file = tmp_path / "mesh.yaml"

    def write(hint: str) -> None:
        identity = {"plugin": "spiffe", "socket": api.address, "hint": hint, "timeout": PATIENCE}
        secure = {"mode": "enforce", "trust_domain": TD, "identity": identity}
        file.write_text(json.dumps({"mesh": "shop", "secure": secure, "services": {"orders": {}}}))

    write("a")
    mesh = meshlib.Mesh.load(file, service="orders")
    try:
        assert mesh.identity.require(0.0).spiffe_id == ID
        write("b")
        with pytest.raises(meshlib.IdentityError, match="none for"):
            mesh.reload()
        until(lambda: api.open, 1)
        api.say(pb.X509SVIDResponse(svids=[svid(authority, hint="b")]))
        mesh.reload()
        until(lambda: api.open, 1)
        assert mesh.identity.require(0.0).spiffe_id == ID
    finally:
        mesh.close()
    until(lambda: api.open, 0)


# ---------------------------------------------------------------- the socket


@pytest.mark.parametrize(
    "socket",
    [
        "unix:relative",
        "unix:./agent.sock",
        "unix://relative/agent.sock",
        "unix:",
        "unix:@abstract",
        "unix:///run/agent.sock?x",
        "unix:///run/",
        "tcp://127.0.0.1:8081",
        "http://127.0.0.1",
        "/run/agent.sock",
        "",
    ],
)
@pytest.mark.parametrize("by_variable", [True, False])
def test_address_that_is_no_absolute_path_is_a_mistake(socket: str, by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands: what a relative path means would depend on the folder in which the process was started."""
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    if by_variable:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", socket)
    with pytest.raises(meshlib.ConfigError, match=r"secure\.identity"):
        open_source({} if by_variable else {"socket": socket}, spiffe_id=ID, trust_domain=TD)


@pytest.mark.parametrize("form", ["unix:{}", "unix://{}"])
def test_address_comes_from_the_environment_where_the_configuration_has_none(
    api: Api, authority: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """As the standard says; in both forms of an absolute path."""
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", form.format(api.path))
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    made = open_source({}, spiffe_id=ID, trust_domain=TD)
    assert made.load().spiffe_id == ID
    made.close()


@pytest.mark.parametrize(
    "settings",
    [{"socket": 7}, {"sockets": "unix:///a"}, {"uid": "root"}, {"uid": True}, {"hint": 1}, {"timeout": 0}, {"timeout": "5s"}],
)
def test_settings_that_are_wrong_are_told(settings: dict[str, Any]) -> None:
    """At the start, by name."""
    with pytest.raises(meshlib.ConfigError, match=r"secure\.identity"):
        open_source({"socket": "unix:///run/x", **settings}, spiffe_id=ID, trust_domain=TD)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_socket_of_another_user_is_not_asked(api: Api, source: WorkloadSource, authority: Any) -> None:
    """Whoever puts one there would be our CA. The agent's user is named by `uid`."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    os.chown(api.path, 12345, -1)
    assert "belongs to user 12345, who is not the agent's" in error_of(source)
    assert api.calls == []
    named = WorkloadSource(api.address, ID, uid=12345, timeout=PATIENCE)
    assert named.load().spiffe_id == ID
    named.close()


def test_socket_in_a_folder_that_others_can_change_is_not_asked(api: Api, source: WorkloadSource) -> None:
    """They could put theirs in its place; where a sticky bit keeps them from it, that is fine."""
    api.path.parent.chmod(0o777)
    assert "may be changed by other users" in error_of(source)
    api.path.parent.chmod(0o1777)
    api.say(pb.X509SVIDResponse(svids=[svid(CertificateAuthority.create(None, TD))]))
    until(lambda: error_of(source), "")


# ---------------------------------------------------------------- a process and its end


def test_nothing_starts_before_the_first_load(api: Api, source: WorkloadSource) -> None:
    """Neither with the import nor with the configuration."""
    assert (source._thread, api.calls) == (None, [])
    code = "import threading, meshlib_spiffe; print(threading.active_count())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"


def test_closing_ends_stream_and_thread(api: Api, source: WorkloadSource, authority: Any) -> None:
    """A reload with other settings leaves nothing behind."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    store = IdentityStore(source, mode="enforce")
    store.require(0.0)
    thread = source._thread
    assert thread is not None
    store.close()
    assert thread.is_alive() is False
    until(lambda: api.open, 0)
    assert (store.refresh(1.0), source._thread, store.current is not None) == (False, None, True)
    # By itself, it begins anew.
    assert source.load().spiffe_id == ID


def test_process_that_just_ends_ends(api: Api, authority: CertificateAuthority) -> None:
    """Nobody has to close anything."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    code = f"""
        from meshlib_spiffe import open_source
        source = open_source({{"socket": {api.address!r}}}, spiffe_id={ID!r}, trust_domain={TD!r})
        print(source.load().spiffe_id)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (out.returncode, out.stdout, out.stderr) == (0, f"{ID}\n", "")
    until(lambda: api.open, 0)


def test_forked_child_has_a_stream_of_its_own(api: Api, authority: CertificateAuthority) -> None:
    """It goes on with the parent's identity, hears what is new by itself, and both end."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    code = f"""
        import os, sys, time
        from meshlib_spiffe import open_source
        from meshlib.secure import IdentityStore
        source = open_source({{"socket": {api.address!r}}}, spiffe_id={ID!r}, trust_domain={TD!r})
        store = IdentityStore(source, mode="enforce")
        first = store.require(0.0).serial
        child = os.fork()
        if child == 0:
            store.after_fork()
            assert store.current.serial == first
        def tell(*words):
            os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece, whoever else writes
        tell("parent" if child else "child", first)
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
            first = sorted(process.stdout.readline().split()[0] for _ in range(2))
            until(lambda: api.open, 2)
            again = svid(authority)
            api.say(pb.X509SVIDResponse(svids=[again]))
            rest = sorted(line.strip() for line in process.stdout)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    serial = certificates.serial_text(serial_of(again))
    assert (first, rest) == (["child", "parent"], [f"child {serial}", "exit 0", f"parent {serial}"])


def test_the_example_runs(api: Api, authority: CertificateAuthority) -> None:
    """As its README says."""
    api.say(pb.X509SVIDResponse(svids=[svid(authority)]))
    example = Path(__file__).parent.parent / "example.py"
    out = subprocess.run(
        [sys.executable, str(example), api.address, ID, "1"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (out.returncode, out.stderr) == (0, "")
    assert out.stdout.startswith(f"{ID}, serial ")
