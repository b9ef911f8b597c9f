"""Does a proof prove what it says, and nothing else? Without a broker, and with one in memory."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import celery
import jwt
import meshlib_celery
import pytest
from celery.contrib.testing.worker import start_worker
from kombu.utils import json as kombu_json
from meshlib_celery import SenderRefused, claimed_sender, sender, sender_required
from meshlib_celery.proof import SKEW, Facts, Prover, Unproved, claimed_in

import meshlib
from tests.support import identities, mesh_of, write_config

ID = "spiffe://shop.internal/ns/default/sa/"
NOW = 1_000_000_000.0


def facts(**instead: Any) -> Facts:
    found: dict[str, Any] = {
        "args": (1, "two"),
        "kwargs": {"three": None},
        "chain": None,
        "eta": None,
        "id": "7",
        "retries": 0,
        **instead,
    }
    return Facts.of(found, found.get("name", "shop.charge"), found["args"], found["kwargs"], found)


@pytest.fixture
def meshes(tmp_path: Path) -> Iterator[dict[str, meshlib.Mesh]]:
    """One for each service; `other` has another CA, and the same name as web."""
    authority = identities(tmp_path, "web", "worker", "stranger")
    (tmp_path / "elsewhere").mkdir()
    identities(tmp_path / "elsewhere", "web")
    services: dict[str, Any] = {"web": {}, "worker": {}, "stranger": {}}
    made = {name: meshlib.Mesh.load(write_config(tmp_path, services, mode="enforce"), service=name) for name in services}
    made["other"] = meshlib.Mesh.load(write_config(tmp_path / "elsewhere", {"web": {}}, mode="enforce"), service="web")
    made["authority"] = authority
    yield made
    for name, mesh in made.items():
        if name != "authority":
            mesh.close()


def prover(mesh: meshlib.Mesh, at: float = NOW, window: float = 600.0) -> Prover:
    return Prover(mesh, window, wall_clock=lambda: at)


def proof_of(mesh: meshlib.Mesh, told: Facts, sent_by: str = "") -> str:
    made = prover(mesh).sign(told, sent_by)
    assert made is not None
    return made


def test_a_proof_names_its_signer(meshes: dict[str, meshlib.Mesh]) -> None:
    """By the certificate that came with it, under our own roots."""
    peer = prover(meshes["worker"]).judge(proof_of(meshes["web"], facts()), facts())
    current = meshes["web"].identity.current
    assert (peer.spiffe_id, peer.service, peer.trust_domain) == (ID + "web", "web", "shop.internal")
    assert (int(peer.serial, 16), peer.not_after, len(peer.chain)) == (int(current.serial, 16), current.not_after, 2)
    assert claimed_in(proof_of(meshes["web"], facts())) == ID + "web"


@pytest.mark.parametrize(
    ("instead", "why"),
    [
        ({"id": "8"}, "another task"),
        ({"name": "shop.refund"}, "another task"),
        ({"args": (1, "three")}, "changed"),
        ({"kwargs": {}}, "changed"),
        ({"retries": 1}, "changed"),
        ({"eta": "2001-09-09T01:46:40+00:00"}, "changed"),
        ({"expires": "2001-09-09T01:46:40+00:00"}, "changed"),
        ({"timelimit": [1, None]}, "changed"),
        *(({word: [{"task": "shop.refund"}]}, "changed") for word in ("callbacks", "errbacks", "chain", "chord")),
    ],
)
def test_a_proof_is_for_one_task(meshes: dict[str, meshlib.Mesh], instead: dict[str, Any], why: str) -> None:
    """Each part of it counts."""
    with pytest.raises(Unproved, match=why):
        prover(meshes["worker"]).judge(proof_of(meshes["web"], facts()), facts(**instead))


@pytest.mark.parametrize(
    ("at", "eta", "is_good"),
    [
        (NOW, None, True),
        (NOW - SKEW, None, True),
        (NOW - SKEW - 1, None, False),
        (NOW + 600 + SKEW, None, True),
        (NOW + 600 + SKEW + 1, None, False),
        (NOW + 1600, NOW + 1000, True),
        (NOW + 1600 + SKEW + 1, NOW + 1000, False),
        # The past is no time to count from.
        (NOW + 600 + SKEW + 1, NOW - 1000, False),
    ],
)
def test_a_proof_lasts_for_the_window(meshes: dict[str, meshlib.Mesh], at: float, eta: float | None, is_good: bool) -> None:
    """From the moment when it was made, or when the task is due; clocks may differ by half a minute."""
    told = facts(eta=datetime.datetime.fromtimestamp(eta, datetime.UTC).isoformat() if eta else None)
    proof = proof_of(meshes["web"], told)
    if is_good:
        assert prover(meshes["worker"], at).judge(proof, told).service == "web"
    else:
        with pytest.raises(Unproved, match=r"600 s is what it lasts|in the future"):
            prover(meshes["worker"], at).judge(proof, told)


def test_the_certificate_is_judged_as_that_of_a_connection(meshes: dict[str, meshlib.Mesh], tmp_path: Path) -> None:
    """Another CA's, also one with the same names, is nobody's; nor is one that was revoked."""
    with pytest.raises(Unproved, match="isn't good here"):
        prover(meshes["worker"]).judge(proof_of(meshes["other"], facts()), facts())
    proof = proof_of(meshes["stranger"], facts())
    assert prover(meshes["worker"]).judge(proof, facts()).service == "stranger"
    meshes["authority"].revoke(meshes["stranger"].identity.current.serial)  # type: ignore[attr-defined]
    meshes["authority"].write("worker", tmp_path / "identities")  # type: ignore[attr-defined]
    meshes["worker"].identity.refresh(0.0)
    with pytest.raises(Unproved, match="isn't good here"):
        prover(meshes["worker"]).judge(proof, facts())
    assert prover(meshes["worker"]).judge(proof_of(meshes["web"], facts()), facts()).service == "web"


def test_only_our_own_service_may_vouch_for_another(meshes: dict[str, meshlib.Mesh]) -> None:
    """A worker that sends a task again names its first sender. Another who does that is lying, or is not for us to believe."""
    vouched = proof_of(meshes["worker"], facts(), ID + "web")
    assert prover(meshes["worker"]).judge(vouched, facts()) == meshlib.Peer(ID + "web")
    with pytest.raises(Unproved, match="only our own service may say so"):
        prover(meshes["worker"]).judge(proof_of(meshes["stranger"], facts(), ID + "web"), facts())


def parts_of(proof: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    head, body, signature = proof.split(".")
    return *(json.loads(base64.urlsafe_b64decode(part + "==")) for part in (head, body)), signature  # type: ignore[return-value]


def joined(head: dict[str, Any], body: dict[str, Any], signature: str) -> str:
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (head, body)]
    return ".".join([*encoded, signature])


def test_what_is_no_good_proof_proves_nothing(meshes: dict[str, meshlib.Mesh]) -> None:
    """Whatever stands there; with the reason, and never with another error."""
    good = proof_of(meshes["web"], facts())
    head, body, signature = parts_of(good)
    own = parts_of(proof_of(meshes["stranger"], facts()))
    wrong: list[Any] = [
        None, 7, "", "a.b.c", b"bytes", good[:-2], good + "x" * 40_000,
        joined(head, {**body, "sub": ID + "admin"}, signature),
        joined({**head, "alg": "none"}, body, ""),
        joined({**head, "alg": "HS256"}, body, signature),
        joined({**head, "typ": "JWT"}, body, signature),
        joined({**head, "x5c": []}, body, signature),
        joined({**head, "x5c": "AAAA"}, body, signature),
        joined({**head, "x5c": ["AAAA"]}, body, signature),
        joined({**head, "x5c": [7]}, body, signature),
        joined({**head, "x5c": ["%"]}, body, signature),
        joined({**head, "x5c": head["x5c"][:1]}, body, signature),
        joined({**head, "x5c": head["x5c"][1:]}, body, signature),
        joined({**head, "x5c": head["x5c"] * 5}, body, signature),
        # Somebody else's signature below these certificates, and these claims below somebody else's.
        joined(head, body, own[2]),
        joined({**own[0], "x5c": head["x5c"]}, own[1], own[2]),
        joined(own[0], body, own[2]),
        jwt.encode(body, "secret" * 8, "HS256", headers={"typ": head["typ"], "x5c": head["x5c"]}),
    ]  # fmt: skip
    judge = prover(meshes["worker"])
    assert judge.judge(joined(head, body, signature), facts()) if joined(head, body, signature) == good else True
    for proof in wrong:
        with pytest.raises(Unproved):
            judge.judge(proof, facts())
        claimed_in(proof)


def test_claims_of_the_wrong_kind_prove_nothing(meshes: dict[str, meshlib.Mesh]) -> None:
    """Signed by a member of the mesh, all the same."""
    signer = prover(meshes["web"])
    good = parts_of(proof_of(meshes["web"], facts()))[1]
    _, key, algorithm, chain = signer._signing or (signer.sign(facts()), *signer._signing[1:])  # type: ignore[index]
    for instead in (
        {"iat": None},
        {"iat": "now"},
        {"digest": None},
        {"jti": None},
        {"task": 7},
        {"sub": None},
        {"sub": ["x"]},
        {"sub": 7},
    ):
        proof = jwt.encode({**good, **instead}, key, algorithm, headers={"typ": "meshlib-task+jwt", "x5c": chain})
        with pytest.raises(Unproved):
            prover(meshes["worker"]).judge(proof, facts())


def test_without_an_identity_nothing_is_signed_and_nothing_is_believed(meshes: dict[str, meshlib.Mesh], tmp_path: Path) -> None:
    """In mode observe, before there are certificates."""
    (tmp_path / "plain").mkdir()
    with mesh_of(tmp_path / "plain", {}) as plain:
        assert (prover(plain).sign(facts()), prover(plain).own_id) == (None, "")
        with pytest.raises(Unproved, match="no identity"):
            prover(plain).judge(proof_of(meshes["web"], facts()), facts())


@pytest.mark.parametrize(
    "args",
    [
        (), (1, 2.5, "ü", None, True), ((1, (2, 3)), [4]), ({1: "a", "b": {2: 3}, None: 0},),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC), datetime.date(2026, 1, 2), datetime.time(1, 2)),
        (decimal.Decimal("1.10"), uuid.UUID(int=7), b"\x00\xff", b"text"), (float("inf"), 10**30),
    ],
)  # fmt: skip
def test_arguments_have_one_digest_on_both_sides(args: tuple[Any, ...]) -> None:
    """Before they are put into a message, and after they have come out of it."""
    arrived = kombu_json.loads(kombu_json.dumps(args))
    assert facts(args=args).digest == facts(args=arrived).digest


def test_arguments_that_json_cannot_say_are_not_signed() -> None:
    """Pickled objects. Who takes those from a broker, lets its writers run code anyway."""
    with pytest.raises(Unproved, match="can't be said in JSON"):
        facts(args=(object(),))


# ---------------------------------------------------------------------------------------- in this process, without a broker


app = celery.Celery("quick", broker="memory://", backend="cache+memory://")
app.conf.update(task_always_eager=False, worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)


@app.task(name="quick.tell")
def tell() -> dict[str, Any]:
    peer = sender()
    return {"sender": peer and peer.spiffe_id, "claimed": claimed_sender(), "left": meshlib.remaining()}


@app.task(name="quick.outer")
def outer() -> Any:
    return tell.apply().get()


@app.task(name="quick.guarded", bind=True)
@sender_required()
def guarded(self: Any) -> str:
    """Does something."""
    return "done"


@app.task(name="quick.only")
@sender_required("web", "spiffe://other.internal/job")
def only() -> str:
    return "done"


@contextmanager
def installed(mesh: meshlib.Mesh) -> Iterator[None]:
    meshlib_celery.install(mesh)
    try:
        yield
    finally:
        meshlib_celery.uninstall()


def test_a_worker_in_this_process_knows_the_sender(meshes: dict[str, meshlib.Mesh]) -> None:
    """As one of its own does; when the task is over, so is what was known."""
    with installed(meshes["web"]):
        sent = [task.delay() for task in (tell, guarded, only, outer)]
        with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
            told, *done, within = [each.get(timeout=20) for each in sent]
            # From now on this is a process that handles messages: what is sent here, outside of tasks, may be for one of them.
            assert tell.delay().get(timeout=20)["sender"] is None
            with pytest.raises(SenderRefused, match="outside of tasks, in a worker"):
                guarded()
            with pytest.raises(SenderRefused, match="what runs it has no proof"):
                guarded.apply().get()
        assert told == {"sender": ID + "web", "claimed": ID + "web", "left": None}
        assert (done, within["sender"]) == (["done", "done"], ID + "web")
    assert (sender(), claimed_sender()) == (None, "")


def test_an_eager_task_was_sent_by_this_very_process(meshes: dict[str, meshlib.Mesh]) -> None:
    """It is a part of whatever called it, whose deadline it has."""
    with installed(meshes["stranger"]):
        with meshlib.deadline(5):
            found = tell.apply().get()
        assert (found["sender"], found["claimed"], found["left"] is not None) == (ID + "stranger", ID + "stranger", True)
        assert guarded.apply().get() == "done"
        with pytest.raises(SenderRefused, match=r"not for spiffe://shop.internal/ns/default/sa/stranger, but for web"):
            only.apply().get()
    # Nobody judges: nobody is known.
    with pytest.raises(SenderRefused, match="was not called"):
        guarded.apply().get()


def test_a_task_that_is_called_as_a_function_is_a_function() -> None:
    """Nobody sent it."""
    assert [guarded(), only(), tell()["sender"]] == ["done", "done", None]
    assert (guarded.__name__, guarded.__doc__) == ("guarded", "Does something.")


def test_a_service_of_the_same_name_elsewhere_is_another(
    meshes: dict[str, meshlib.Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare name means the same trust domain and the same namespace as our own."""
    from meshlib_celery.run import Run, current

    for spiffe_id, is_allowed in (
        (ID + "web", True),
        ("spiffe://shop.internal/ns/dev/sa/web", False),
        ("spiffe://other.internal/ns/default/sa/web", False),
        ("spiffe://other.internal/job", True),
    ):
        token = current.set(Run("7", meshlib.Peer(spiffe_id), own_id=ID + "worker"))
        try:
            if is_allowed:
                assert only() == "done"
            else:
                with pytest.raises(SenderRefused):
                    only()
        finally:
            current.reset(token)


def test_what_is_said_wrongly_is_refused_at_once(meshes: dict[str, meshlib.Mesh]) -> None:
    """Twice, above @app.task, without brackets, with a window that is none."""
    with installed(meshes["web"]), pytest.raises(RuntimeError, match="twice"):
        meshlib_celery.install(meshes["web"])
    for wrong in (0, -1, float("nan"), 10**9):
        with pytest.raises(ValueError, match="window"):
            meshlib_celery.install(meshes["web"], window=wrong)
    with pytest.raises(TypeError, match="below @app.task"):
        sender_required()(tell)


def test_a_rotated_identity_signs_from_then_on(meshes: dict[str, meshlib.Mesh], tmp_path: Path) -> None:
    """And what the one before has signed is still good."""
    signer = prover(meshes["web"])
    before = signer.sign(facts())
    meshes["authority"].write("web", tmp_path / "identities")  # type: ignore[attr-defined]
    meshes["web"].identity.refresh(0.0)
    after = signer.sign(facts())
    judged = [prover(meshes["worker"]).judge(each, facts()) for each in (before, after)]
    assert judged[0].serial != judged[1].serial
    assert replace(judged[0], serial="", not_after=0.0, chain=()) == replace(judged[1], serial="", not_after=0.0, chain=())
