"""Who gets an identity over a UNIX socket, and what does a client make of what it is told? Areas uds_attestation and workload_api.

The agent is real, and so are its callers (`agent_ground.py`). Clients are the library's own and that of the package `meshlib-spiffe`; both
are shown a server of the API that says what the case says.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any
from unittest import mock

import grpc

from meshlib.errors import ConfigError, IdentityWithdrawn, MeshError
from tests.secure.cases.case import Answer, Case, Waits, not_understood

ID = "spiffe://td/ns/default/sa/svc"
HEADER = {"workload.spiffe.io": "true"}


def uds_attestation(case: Case) -> Answer:
    """What the agent makes of who connects, and of where its socket lies."""
    ground, given, words = _ground(), case.given, case.prose
    if "dir_mode" in given:
        mode = int(str(given["dir_mode"]), 8)
        return ground.started(lambda path: path.parent.chmod(mode))
    if "stale_socket" in given or "stale" in words:
        return ground.started(lambda path: _leave(path, words))
    if "grpcio" in words:
        return ground.grpcio_knows_the_caller()
    if case.says("slow"):
        return ground.slow_reader()
    if case.says("scm_rights", "fd passed", "handed to another"):
        return ground.handed_on(is_gone=False)
    if case.says("recycl", "reuse", "exited", "has ended", "exits", "dead"):
        return ground.handed_on(is_gone=True)
    if case.says("replaced", "deleted", "overwritten"):
        return ground.replaced_program()
    if "so_peercred" in given and "registered_uid" in given:
        entry = ground.EntryPolicy("svc", uid=int(given["registered_uid"]))
        return ground.status(entry, HEADER, uid=int(given["so_peercred"]["uid"]))
    if "pid" in given and int(given["pid"]) <= 0:
        return ground.status(ground.EntryPolicy("svc", uid=os.getuid()), HEADER, kernel=ground.NumberZero(int(given["pid"])))
    raise not_understood(case)


def _leave(path: Path, words: str) -> None:
    """What lies in the socket's place."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    if "another" in words or "other" in words:
        if os.geteuid() != 0:
            raise Waits("to give a socket to another user takes root")
        os.chown(path, 4242, -1)


def _ground() -> Any:
    for name in ("h2", "google.protobuf"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise Waits("the node agent needs the extra [agent]") from None
    from tests.secure.cases import agent_ground

    return agent_ground


def workload_api(case: Case) -> Answer:
    """What a client meets, and what the agent answers."""
    given, words = case.given, case.prose
    if "metadata" in given:
        ground = _ground()
        is_known = "no matching" not in str(given.get("peer", "")) and "unknown" not in str(given.get("peer", ""))
        entry = ground.EntryPolicy("svc", uid=os.getuid() if is_known else os.getuid() + 1)
        return ground.status(entry, given["metadata"])
    client = ("response", "stream", "SPIFFE_ENDPOINT_SOCKET", "socket", "message", "bundle")
    if not given.keys() & set(client):
        raise not_understood(case)
    for name in ("SPIFFE_ENDPOINT_SOCKET", "socket"):
        if name in given:
            return _socket(str(given[name]))
    if "stream" in given or "reconnect" in words or "unavailable" in words:
        return [_streams(kind) for kind in _clients()]
    return [_answered(words, kind) for kind in _clients()]


def _own(address: str) -> Any:
    from meshlib.secure.workload import WorkloadSource

    return WorkloadSource(address, ID, timeout=3)


def _spiffe(address: str) -> Any:
    from meshlib_spiffe import open_source

    return open_source({"socket": address, "timeout": 3}, spiffe_id=ID, trust_domain="td")


def _clients() -> list[Callable[[str], Any]]:
    """Those that are installed. The messages that they are shown are the library's."""
    try:
        import meshlib_spiffe  # noqa: F401
    except ImportError:
        raise Waits("what clients are shown is made by meshlib-spiffe's library, which is not installed") from None
    return [_own, _spiffe]


def _socket(address: str) -> Answer:
    """The address of the API, from the environment and from the configuration."""
    _clients()
    from meshlib_spiffe import open_source

    outcomes = set()
    for settings, environment in (({}, {"SPIFFE_ENDPOINT_SOCKET": address}), ({"socket": address}, {})):
        with mock.patch.dict(os.environ, environment):
            try:
                open_source(settings, spiffe_id=ID, trust_domain="td").close()
                outcomes.add("accept")
            except ConfigError:
                outcomes.add("config_error")
    try:
        _own(address).close()
        outcomes.add("accept")
    except ConfigError:
        outcomes.add("config_error")
    return {"config_error", "reject"} if outcomes == {"config_error"} else outcomes


@contextlib.contextmanager
def _api(says: Any, kind: Callable[[str], Any]) -> Any:
    """A server of the Workload API over a Unix socket. `says` is asked for each stream what it gets, message by message."""
    from spiffe._proto import workload_pb2_grpc as pg

    class Api(pg.SpiffeWorkloadAPIServicer):
        streams = 0

        def FetchX509SVID(self, request: Any, context: Any) -> Any:
            Api.streams += 1
            yield from says(Api.streams, context)

    with tempfile.TemporaryDirectory() as folder:
        address = f"unix://{Path(folder) / 'agent.sock'}"
        server = grpc.server(futures.ThreadPoolExecutor(4))
        pg.add_SpiffeWorkloadAPIServicer_to_server(Api(), server)
        server.add_insecure_port(address)
        server.start()
        source = kind(address)
        try:
            yield source, Api
        finally:
            source.close()
            server.stop(0).wait(3)


def _message(*, whole: bool = True, spiffe_id: str = ID, hint: str = "") -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from spiffe._proto import workload_pb2 as pb

    from meshlib.secure.ca import CertificateAuthority

    authority = CertificateAuthority.create(None, "td")
    made = authority.issue("svc")
    key = serialization.load_pem_private_key(bytes(made.key), None)
    der = serialization.Encoding.DER
    roots = b"".join(root.public_bytes(der) for root in x509.load_pem_x509_certificates(authority.bundle))
    chain = b"".join(cert.public_bytes(der) for cert in x509.load_pem_x509_certificates(made.chain))
    private = key.private_bytes(der, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    svid = pb.X509SVID(spiffe_id=spiffe_id, x509_svid=chain if whole else b"", x509_svid_key=private, bundle=roots, hint=hint)
    return pb.X509SVIDResponse(svids=[svid])


def _answered(words: str, kind: Callable[[str], Any]) -> set[str]:
    """A good message first, then the one of the case."""
    from spiffe._proto import workload_pb2 as pb

    good = _message()
    if "removed" in words or "redact" in words or "another" in words:
        then = _message(spiffe_id="spiffe://td/ns/default/sa/other")
    elif "empty" in words or "no svids" in words:
        then = pb.X509SVIDResponse()
    elif any(word in words for word in ("mandatory", "default", "without", "missing", "garbage", "malformed")):
        then = _message(whole=False)
    elif "permissiondenied" in words or "permission_denied" in words or "denied" in words:
        then = None
    else:
        then = _message(whole=False)
    import threading

    go = threading.Event()

    def says(stream: int, context: Any) -> Any:
        yield good
        go.wait(5)
        if then is None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        yield then
        time.sleep(0.5)

    with _api(says, kind) as (source, _):
        first = source.load()
        go.set()
        found: set[str] = set()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            try:
                source.load()
            except IdentityWithdrawn:
                found = {"stop_using", "error_and_discard", "withdraw", "reject"}
                break
            except MeshError:
                found = {"error_and_discard", "keep_last_good", "reject", "discard"}
                break
            time.sleep(0.01)
    assert first.spiffe_id == ID
    return found or {"accept"}


def _streams(kind: Callable[[str], Any]) -> set[str]:
    """The server ends each stream: the client comes again, and less and less often."""
    good = _message()
    times: list[float] = []

    def says(stream: int, context: Any) -> Any:
        times.append(time.monotonic())
        yield good

    with _api(says, kind) as (source, api):
        identity = source.load()
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            source.load()
            time.sleep(0.02)
        streams = api.streams
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    is_slower = len(pauses) >= 2 and pauses[-1] > pauses[0] and all(pause > 0.02 for pause in pauses)
    return (
        {"reconnect_with_backoff", "reconnect", "keep_last_good"}
        if 2 <= streams <= 12 and is_slower and identity.spiffe_id == ID
        else {f"{streams} streams"}
    )
