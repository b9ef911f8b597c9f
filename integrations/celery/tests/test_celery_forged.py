"""Can who writes into the broker pass for somebody? In one process, with a broker in memory: every part of a message is hostile."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import meshlib_celery
import pytest
from celery.app.task import Context
from celery.contrib.testing.worker import start_worker
from meshlib_celery import sender, sender_required
from meshlib_celery.install import CLAIM, PROOF
from meshlib_celery.origin import SEAL

import meshlib
from tests.support import identities, write_config

ID = "spiffe://shop.internal/ns/default/sa/"
# Celery warns of errors outside of tasks, which hostile messages cause; it is no error of the test.
pytestmark = pytest.mark.filterwarnings("ignore:Exception raised outside body:RuntimeWarning")
app = celery.Celery("forged", broker="memory://", backend="cache+memory://")
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True, task_default_queue="forged")
app.conf.broker_transport_options = {"polling_interval": 0.01}
ran: list[tuple[str, str]] = []


@app.task(name="forged.guarded")
@sender_required("web")
def guarded(why: str = "-") -> str:
    peer = sender()
    ran.append((why, peer.spiffe_id if peer else ""))
    return "done"


@app.task(name="forged.told")
def told(why: str) -> None:
    """Takes one argument: as an errback it is sent."""
    peer = sender()
    ran.append((why, peer.spiffe_id if peer else ""))


@app.task(name="forged.errback")
@sender_required()
def errback(request: Any, error: Any, trace: Any) -> None:
    """Takes more than one argument: Celery calls it as a function."""
    ran.append(("errback", "called"))


@app.task(name="forged.inner")
def inner() -> None:
    guarded.apply(("an eager run within",), throw=True)


@app.task(name="forged.fail")
def fail(*_: Any) -> None:
    raise ValueError("as asked")


@app.task(name="forged.mark")
def mark() -> str:
    return "here"


def follow(task: str, *args: Any) -> list[dict[str, Any]]:
    return [{"task": task, "args": list(args), "kwargs": {}, "options": {}, "immutable": True, "subtask_type": None}]


def forge(task: str, args: Any = (), embed: Any = None, headers: Any = None) -> None:
    """What anybody can write into a broker."""
    headers = headers or {}
    task_id = headers.get("id", str(uuid.uuid4()))
    plain = {"id": task_id, "task": task, "lang": "py", "root_id": task_id, "retries": 0, "timelimit": [None, None]}
    with app.connection_for_write() as connection:
        connection.Producer(serializer="json").publish(
            [list(args), {}, embed or {}], routing_key="forged", exchange="", headers={**plain, **headers}, correlation_id=task_id
        )


def caught(result: Any) -> Any:
    """The last message of the queue, taken out of it."""
    with app.connection_for_write() as connection:
        message = connection.default_channel.basic_get("forged", no_ack=True)
    assert message.headers["id"] == result.id
    return message


def work() -> list[tuple[str, str]]:
    """A worker, until it has handled what is there, and what that brought on."""
    ran.clear()
    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        for _ in range(2):
            # Behind all that was there; then, behind what that has sent.
            mark.delay().get(timeout=30)
    return list(ran)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    identities(tmp_path, "web")
    made = meshlib.Mesh.load(write_config(tmp_path, {"web": {}}, mode="enforce"), service="web")
    meshlib_celery.install(made)
    app.control.purge()
    yield made
    meshlib_celery.uninstall()
    made.close()


def names() -> list[str]:
    """All that Celery knows of a request, what we write into it, and what its class calls its own."""
    own = [name for name in vars(Context) if not name.startswith("__")]
    return sorted({*own, "__class__", "task", "lang", "argsrepr", CLAIM, PROOF, SEAL, "mesh-run", "sender", "run", "token"})


# As headers, those make Celery's consumer itself fail, before a task runs; `id` and `task` say what runs.
KILLING = "id", "task", "timelimit", "stamped_headers", "stamps", "eta", "expires", "shadow"
HOSTILE = True, 1, "x", [], {"is_eager": True}, ID + "web", None


@pytest.mark.parametrize("part", ["embed", "headers"])
def test_no_word_of_a_message_makes_it_a_proved_one(mesh: meshlib.Mesh, part: str) -> None:
    """Whatever is written over what Celery says of a request: each name alone, and all at once."""
    for value in HOSTILE:
        for name in names():
            if part == "headers" and name in KILLING:
                continue
            told = {"is_eager": True, "delivery_info": {"is_eager": True}, name: value}
            if part == "embed":
                forge("forged.guarded", [name], told)
            else:
                forge("forged.guarded", [name], None, told)
        every = dict.fromkeys(names(), value)
        if part == "embed":
            forge("forged.guarded", ["every"], every)
        else:
            forge("forged.guarded", ["every"], None, {name: every[name] for name in every if name not in KILLING})
    assert guarded.delay("proved")
    assert work() == [("proved", ID + "web")]


def test_what_a_forged_message_brings_on_is_nobodys(mesh: meshlib.Mesh) -> None:
    """Callbacks, errbacks, a chain, an eager run within, and the errbacks of what can't begin: Celery calls those when no task runs."""
    eager = {"is_eager": True}
    forge("forged.mark", embed={"callbacks": follow("forged.guarded", "callback")})
    forge("forged.mark", embed={"callbacks": follow("forged.guarded", "callback of an eager one"), **eager})
    forge("forged.mark", embed={"chain": follow("forged.guarded", "chain")})
    forge("forged.fail", embed={"errbacks": follow("forged.guarded", "errback"), "delivery_info": eager})
    forge("forged.fail", embed={"errbacks": follow("forged.errback")})
    forge("forged.mark", embed={"callbacks": follow("forged.nothing"), "errbacks": follow("forged.guarded", "broken callback")})
    forge("forged.mark", embed={"callbacks": [7], "errbacks": follow("forged.guarded", "broken callback")})
    forge("forged.mark", embed={"callbacks": [7], "errbacks": follow("forged.errback")})
    forge("forged.mark", embed={"callbacks": [7], "errbacks": follow("forged.told", "sent after a broken callback")})
    forge("forged.fail", embed={"errbacks": follow("forged.told", "sent after a failure")})
    forge("forged.inner")
    forge("forged.inner", embed=eager)
    assert work() == [("sent after a broken callback", ""), ("sent after a failure", "")]


def test_a_proved_task_runs_another_eagerly_as_its_own(mesh: meshlib.Mesh) -> None:
    """It is the worker then that runs it."""
    inner.delay()
    assert work() == [("an eager run within", ID + "web")]


@pytest.mark.parametrize("eta", [None, "2020-01-01T00:00:00+00:00"])
def test_a_proof_does_not_count_where_headers_and_body_differ(mesh: meshlib.Mesh, eta: str | None) -> None:
    """Celery waits for the eta of the headers, and shows tasks that of the body: a signed task would run when it isn't due."""
    whole = caught(guarded.apply_async(("as it was",)))
    message = caught(guarded.apply_async(("early",), countdown=1000))
    args, _, embed = json.loads(message.body)
    signed = message.headers["eta"]
    assert signed is not None
    forge("forged.guarded", args, {**embed, "eta": signed}, {**message.headers, "eta": eta})
    forge("forged.guarded", args, {**embed, "eta": signed, SEAL: "0" * 64}, {**message.headers, "eta": eta, SEAL: "0" * 64})
    args, _, embed = json.loads(whole.body)
    forge("forged.guarded", args, embed, whole.headers)
    assert work() == [("as it was", ID + "web")]


def test_a_seal_does_not_leave_the_worker(mesh: meshlib.Mesh) -> None:
    """Celery copies unknown headers into what is sent again."""
    headers = {SEAL: "0" * 64, PROOF: "old"}
    message = caught(mark.apply_async(headers=headers))
    assert SEAL not in message.headers
    assert message.headers[PROOF] != "old"


def test_apply_is_watched_only_while_installed(mesh: meshlib.Mesh) -> None:
    """And is Celery's own again afterwards."""
    watched = celery.Task.apply
    assert guarded.apply(("eager",)).get() == "done"
    meshlib_celery.uninstall()
    try:
        assert celery.Task.apply is watched.__wrapped__  # type: ignore[attr-defined]
    finally:
        meshlib_celery.install(mesh)
