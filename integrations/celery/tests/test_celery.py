"""Do tasks belong to the mesh, over a real broker and in real workers? Who sent them, in which trace, and what their calls do."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import PYTHON, free_port, identities, process, wait_until_listening, write_config

REDIS = shutil.which("redis-server")
EXAMPLE = Path(__file__).parent.parent / "example.py"
ID = "spiffe://shop.internal/ns/default/sa/"
# What runs in workers, and in those who send.
TASKS = """
import os

import celery
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import meshlib
import meshlib_celery
from meshlib_celery import claimed_sender, sender, sender_required

if os.environ.get("OTLP"):
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Nothing goes by itself, also not at the interpreter's end: only what is flushed arrives.
    provider = TracerProvider(shutdown_on_exit=os.environ["MESHLIB_SERVICE"] != "worker")
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(os.environ["OTLP"]), schedule_delay_millis=600_000))
    trace.set_tracer_provider(provider)
if os.environ.get("WITH_INSTRUMENTOR"):
    from opentelemetry.instrumentation.celery import CeleryInstrumentor

    CeleryInstrumentor().instrument()

app = celery.Celery("tasks", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.update(
    broker_connection_retry_on_startup=True, task_always_eager=False, result_expires=60, worker_hijack_root_logger=False,
    broker_transport_options={"visibility_timeout": 60}, worker_prefetch_multiplier=1,
)
mesh = None
if os.environ.get("MESHLIB_CONFIG"):
    mesh = meshlib.Mesh.load()
    meshlib_celery.install(mesh, window=float(os.environ.get("WINDOW", "3600")))
    http = mesh.sync_client()


def facts(task):
    peer = sender()
    return {
        "sender": peer and peer.spiffe_id, "claimed": claimed_sender(), "pid": os.getpid(), "retries": task.request.retries,
        "left": meshlib.remaining(), "id": task.request.id,
    }


@app.task(bind=True)
def tell(self, *args, **kwargs):
    return facts(self)


@app.task
@sender_required("web")
def for_web():
    return sender().service


@app.task(bind=True, max_retries=3)
def again(self, times):
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return facts(self)


@app.task(bind=True)
def send_on(self, *_):
    return {**facts(self), "child": tell.delay().id}


@app.task(bind=True, max_retries=3)
def call(self):
    try:
        answer = http.get("http://orders/items/7")
    except meshlib.AttemptFailed as error:
        answer = error
    if getattr(answer, "status_code", 0) != 200:
        raise self.retry(countdown=0)
    return {"answer": answer.json(), "pid": os.getpid()}


@app.task
def die(how):
    import time

    os.kill(os.getpid(), 9) if how == "lost" else time.sleep(30)


@app.task
@sender_required()
def called_back(request, error, trace):
    print("the guard was passed", flush=True)


app.conf.worker_redirect_stdouts = False
if os.environ.get("BEAT"):
    app.conf.beat_schedule = {"tell": {"task": "tasks.tell", "schedule": 0.5, "options": {"task_id": "from-beat", "expires": 60}}}


@app.task
def serial():
    return mesh.identity.current.serial


@app.task(bind=True)
def seen(self):
    return {name: self.request.get(name) for name in ("traceparent", "tracestate", "mesh-sender", "mesh-proof")}
"""


class Scene:
    """A broker, workers and those who send, each with an identity of its own or without."""

    def __init__(self, folder: Path, broker: str, backend: str, file: Path) -> None:
        self.folder = folder
        self.file = file
        self.env = {"BROKER": broker, "BACKEND": backend}

    def env_of(self, service: str, **more: str) -> dict[str, str]:
        return (
            {**self.env, "MESHLIB_CONFIG": str(self.file), "MESHLIB_SERVICE": service, **more}
            if service
            else {**self.env, **more}
        )

    @contextmanager
    def worker(self, *options: str, service: str = "worker", **env: str) -> Iterator[subprocess.Popen[str]]:
        command = (
            PYTHON,
            "-m",
            "celery",
            "-A",
            "tasks",
            "worker",
            "--loglevel=INFO",
            "--without-gossip",
            "--without-mingle",
            *options,
        )
        log = (self.folder / "worker.log").open("w")
        child = subprocess.Popen(
            command, env={**os.environ, **self.env_of(service, **env)}, cwd=self.folder, stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(lambda: " ready." in self.log, child, self)
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            log.close()

    @property
    def log(self) -> str:
        return (self.folder / "worker.log").read_text()

    def send(self, code: str, service: str = "web", **env: str) -> Any:
        """Run code in another process, which answers with one value."""
        source = f"import json\nfrom celery import *\nfrom tasks import *\n{code}\nprint('\\nANSWER ' + json.dumps(answer))\n"
        done = subprocess.run(
            [PYTHON, "-c", source], env={**os.environ, **self.env_of(service, **env)}, cwd=self.folder, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + self.log
        return json.loads(done.stdout.rpartition("ANSWER ")[2])


def wait_for(condition: Any, child: Any, scene: Scene, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, f"the worker ended: {scene.log}"
        assert time.monotonic() < end, f"it didn't come: {scene.log}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def redis() -> Iterator[int]:
    if REDIS is None:
        pytest.skip("redis-server is not installed: workers need a real broker")
    port = free_port()
    with process(REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no") as child:
        wait_until_listening(port, child)
        yield port


@pytest.fixture
def scene(tmp_path: Path, redis: int) -> Scene:
    (tmp_path / "tasks.py").write_text(TASKS)
    identities(tmp_path, "web", "worker", "stranger", "orders")
    listening = free_port()
    services = {
        "web": {}, "worker": {}, "stranger": {},
        "orders": {
            "listen": f"127.0.0.1:{listening}", "discover": {"static": [f"127.0.0.1:{listening}"]},
            "secure": {"allow": [{"name": "workers", "from": ["worker"]}]},
        },
    }  # fmt: skip
    file = write_config(tmp_path, services, mode="enforce")
    url = f"redis://127.0.0.1:{redis}/0"
    subprocess.run([PYTHON, "-c", f"import redis; redis.Redis(port={redis}).flushall()"], check=True)
    return Scene(tmp_path, url, url, file)


PREFORK = "--pool=prefork", "--concurrency=2"
POOLS = pytest.mark.parametrize(
    "pool", [PREFORK, ("--pool=solo",), ("--pool=threads", "--concurrency=2")], ids=["prefork", "solo", "threads"]
)


@POOLS
def test_a_task_knows_who_proved_that_they_sent_it(scene: Scene, pool: tuple[str, ...]) -> None:
    """By the signature in the message; who has no identity may claim what they like, and has proved nothing."""
    with scene.worker(*pool):
        found = scene.send("answer = tell.delay(1, {2: (3, 4)}, when=None).get(timeout=20)")
        assert (found["sender"], found["claimed"], found["left"]) == (ID + "web", ID + "web", None)
        assert scene.send("answer = tell.delay().get(timeout=20)", "stranger")["sender"] == ID + "stranger"
        forged = scene.send(f"answer = tell.apply_async(headers={{'mesh-sender': '{ID}web'}}).get(timeout=20)", "")
        assert (forged["sender"], forged["claimed"]) == (None, ID + "web")
        code = "answer = [type(for_web.delay().get(timeout=20, propagate=False)).__name__]"
        assert scene.send("answer = for_web.delay().get(timeout=20)") == "web"
        assert [scene.send(code, "stranger"), scene.send(code, "")] == [["SenderRefused"], ["SenderRefused"]]


def test_a_task_that_is_sent_again_keeps_its_sender(scene: Scene) -> None:
    """`retry` is sent by the worker, on behalf of the sender that it had proof of; and of none, if it had none."""
    with scene.worker(*PREFORK):
        found = scene.send("answer = again.delay(2).get(timeout=20)")
        assert (found["sender"], found["claimed"], found["retries"]) == (ID + "web", ID + "web", 2)
        forged = scene.send("answer = again.delay(2).get(timeout=20)", "")
        assert (forged["sender"], forged["retries"]) == (None, 2)


def test_only_a_proved_message_gets_another_out_of_a_worker(scene: Scene) -> None:
    """Children, callbacks and chains are the worker's where the sender is known, and nobody's where they aren't."""
    children = (
        "def of(result):\n"
        "    return app.AsyncResult(result['child']).get(timeout=20)['sender']\n"
        "answer = [of(send_on.delay().get(timeout=20))]\n"
        "answer.append(chain(tell.si(), tell.si()).apply_async().get(timeout=20)['sender'])\n"
        "first = tell.apply_async(link=tell.si().set(task_id='linked-' + os.environ['MESHLIB_SERVICE_']))\n"
        "first.get(timeout=20)\n"
        "answer.append(app.AsyncResult('linked-' + os.environ['MESHLIB_SERVICE_']).get(timeout=20)['sender'])\n"
        "answer.append(chord([tell.si(), tell.si()])(tell.si()).get(timeout=20)['sender'])\n"
    )
    with scene.worker(*PREFORK):
        assert scene.send(children, MESHLIB_SERVICE_="web") == [ID + "worker"] * 4
        assert scene.send(children, "", MESHLIB_SERVICE_="nobody") == [None] * 4


@pytest.mark.parametrize("how", ["late", "lost"])
@pytest.mark.parametrize("service", ["", "web"])
def test_what_the_main_process_of_a_worker_sends_is_nobodys(scene: Scene, service: str, how: str) -> None:
    """After a hard time limit and for a lost process Celery calls errbacks there: nobody judges the message, so nobody vouches."""
    code = (
        f"from tasks import called_back\n"
        f"for errback in (called_back.s(), tell.si().set(task_id='{service}{how}')):\n"
        f"    die.apply_async(('{how}',), time_limit={1 if how == 'late' else None}, link_error=errback)\n"
        f"answer = app.AsyncResult('{service}{how}').get(timeout=30)['sender']"
    )
    with scene.worker(*PREFORK) as child:
        assert scene.send(code, service) is None
        wait_for(lambda: "outside of tasks, in a worker" in scene.log, child, scene)
    assert "the guard was passed" not in scene.log


def test_the_beat_of_a_worker_proves_what_it_sends(scene: Scene) -> None:
    """It is a process of its own, where no messages come."""
    with scene.worker(*PREFORK, "--beat", f"--schedule={scene.folder / 'schedule'}", BEAT="1"):
        assert scene.send("answer = app.AsyncResult('from-beat').get(timeout=30)['sender']", "") == ID + "worker"


@pytest.mark.parametrize("what", ["args", "task", "id", "chain", "eta", "retries", "timelimit"])
def test_a_message_that_was_changed_on_its_way_has_no_sender(scene: Scene, redis: int, what: str) -> None:
    """By somebody who can write into the broker; the log says what is wrong."""
    task_id = scene.send("answer = tell.delay('one').id")
    broker = __import__("redis").Redis(port=redis)
    message = json.loads(broker.rpop("celery"))
    args, kwargs, follow = json.loads(base64.b64decode(message["body"]))
    headers = message["headers"]
    if what == "args":
        args = ["two"]
    elif what == "task":
        headers["task"] = "tasks.send_on"
    elif what == "id":
        task_id = headers["id"] = message["properties"]["correlation_id"] = "other"
    elif what == "chain":
        follow["chain"] = [
            {"task": "tasks.tell", "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": True}
        ]
    elif what == "eta":
        headers["eta"] = "2020-01-01T00:00:00+00:00"
    elif what == "timelimit":
        headers["timelimit"] = [20, None]
    else:
        headers["retries"] = 1
    message["body"] = base64.b64encode(json.dumps([args, kwargs, follow]).encode()).decode()
    broker.lpush("celery", json.dumps(message))
    with scene.worker("--pool=solo"):
        found = scene.send(f"answer = app.AsyncResult('{task_id}').get(timeout=20)", "")
    assert (found["sender"], found["claimed"]) == (None, ID + "web")
    assert f"is not proved to be from {ID}web" in scene.log


def test_a_worker_without_the_mesh_lets_nobody_in_by_mistake(scene: Scene) -> None:
    """Where nobody judges messages, nobody has proved anything."""
    with scene.worker("--pool=solo", service=""):
        code = "answer = [str(for_web.delay().get(timeout=20, propagate=False)), tell.delay().get(timeout=20)['sender']]"
        refused, nobody = scene.send(code)
    assert "install(mesh) was not called in this worker" in refused
    assert nobody is None


# ------------------------------------------------------------------------------------------------ calls of tasks


@contextmanager
def orders(scene: Scene, source: str) -> Iterator[subprocess.Popen[str]]:
    (scene.folder / "orders.py").write_text(source)
    env = {"MESHLIB_CONFIG": str(scene.file), "MESHLIB_SERVICE": "orders"}
    with process(str(Path(PYTHON).parent / "meshlib"), "serve", "orders:app", env=env, cwd=scene.folder) as child:
        port = json.loads(scene.file.read_text())["services"]["orders"]["listen"].rpartition(":")[2]
        wait_until_listening(int(port), child)
        yield child


ORDERS = """
import base64
import json
import meshlib

seen = []


def app(environ, start_response):
    fails = len(seen) < FAILURES
    seen.append(meshlib.current_call()["layer"] if "layer" in meshlib.current_call() else None)
    start_response("503 Service Unavailable" if fails else "200 OK", [("content-type", "application/json")])
    return [json.dumps({"peer": meshlib.peer().spiffe_id, "calls": len(seen)}).encode()]
"""


@pytest.mark.parametrize("pool", [PREFORK, ("--pool=solo",)], ids=["prefork", "solo"])
def test_tasks_call_services_of_the_mesh(scene: Scene, pool: tuple[str, ...]) -> None:
    """With mutual TLS, from each process of the pool, by a client that was made before the fork; also in later processes."""
    with orders(scene, ORDERS.replace("FAILURES", "0")), scene.worker(*pool, "--max-tasks-per-child=2"):
        found = scene.send("answer = group(call.s() for _ in range(8)).apply_async().get(timeout=40)")
    assert {each["answer"]["peer"] for each in found} == {ID + "worker"}
    if pool is PREFORK:
        assert len({each["pid"] for each in found}) >= 4


class Plain:
    """A service outside of the mesh, which fails as often as it's told. It keeps the headers that came."""

    def __init__(self, failures: int = 0) -> None:
        self.seen: list[dict[str, str]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append({name.lower(): value for name, value in self.headers.items()})
                body = json.dumps(len(seen)).encode()
                self.send_response(503 if len(seen) <= failures else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def use(self, scene: Scene) -> None:
        """Mode observe, and nobody has an identity."""
        services = {"web": {}, "worker": {}, "orders": {"discover": {"static": [self.address]}}}
        shutil.rmtree(scene.folder / "identities")
        write_config(scene.folder, services)


def test_in_a_task_that_celery_repeats_the_mesh_does_not_repeat(scene: Scene) -> None:
    """One call by the mesh and its retry, then one for each retry of the task: the layers add up, and don't multiply."""
    with Plain(failures=4) as service:
        service.use(scene)
        with scene.worker(*PREFORK):
            assert scene.send("answer = call.delay().get(timeout=20)")["answer"] == 5
    # Which attempt it is travels on, so that nobody further down repeats either.
    assert [seen.get("x-mesh-attempt", "0") for seen in service.seen] == ["0", "1", "1", "2", "3"]


def test_a_new_certificate_reaches_the_processes_of_a_pool(scene: Scene) -> None:
    """Each looks for itself, and signs with the new one."""
    from meshlib.secure.ca import CertificateAuthority

    code = "answer = [each.get(timeout=20) for each in [serial.delay() for _ in range(4)]]"
    with scene.worker(*PREFORK) as child:
        old = scene.send(code)
        CertificateAuthority.open(scene.folder / "ca").write("worker", scene.folder / "identities")
        wait_for(lambda: not set(scene.send(code)) & set(old), child, scene)
        assert (
            scene.send("answer = app.AsyncResult(send_on.delay().get(timeout=20)['child']).get(timeout=20)['sender']")
            == ID + "worker"
        )


def test_the_numbers_of_a_worker_are_those_of_its_tasks(scene: Scene) -> None:
    """Its main process calls nobody: the listener of the metrics isn't there, though a client was made before the fork."""
    port = free_port()
    with Plain() as service:
        service.use(scene)
        config = json.loads(scene.file.read_text())
        write_config(scene.folder, config["services"], observe={"metrics": f"127.0.0.1:{port}"})
        with scene.worker("--pool=prefork", "--concurrency=1"):
            scene.send("answer = call.delay().get(timeout=20)['answer']", MESHLIB_METRICS="127.0.0.1:0")
            told = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    counted = [line for line in told.splitlines() if re.match(r"\w+_total{.*orders", line) and not line.endswith(" 0")]
    assert counted


# ---------------------------------------------------------------------------------------------------- telemetry


class Receiver:
    """A real receiver of OTLP over HTTP. It keeps the spans that came."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                import gzip

                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend((scope.scope.name, span) for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def told(self) -> list[tuple[str, int]]:
        return sorted((span.name, span.kind) for _, span in self.spans)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


PRODUCER, CONSUMER = 4, 5


@POOLS
def test_telemetry_is_flushed_when_a_worker_ends(scene: Scene, receiver: Receiver, pool: tuple[str, ...]) -> None:
    """All that its processes hold arrives, of a pool whose processes end without the interpreter's own end, too."""
    with scene.worker(*pool, OTLP=receiver.url) as child:
        scene.send("answer = [each.get(timeout=20)['pid'] for each in [tell.delay() for _ in range(6)]]")
        assert receiver.spans == []
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    assert receiver.told() == [("process tasks.tell", CONSUMER)] * 6


def test_a_trace_goes_through_a_task(scene: Scene, receiver: Receiver) -> None:
    """Of whoever sends, through the worker, to what the task sends on: each with its parent, and no span twice."""
    code = (
        "with trace.get_tracer('test').start_as_current_span('web'):\n"
        "    result = send_on.delay()\n"
        "answer = result.get(timeout=20)\n"
        "app.AsyncResult(answer['child']).get(timeout=20)"
    )
    with scene.worker(*PREFORK, OTLP=receiver.url):
        scene.send(code, OTLP=receiver.url)
    spans = {span.name: span for _, span in receiver.spans}
    path = ["web", "send tasks.send_on", "process tasks.send_on", "send tasks.tell", "process tasks.tell"]
    assert sorted(span.name for _, span in receiver.spans) == sorted(path)
    assert len({span.trace_id for span in spans.values()}) == 1
    assert [spans[name].parent_span_id for name in path] == [b"", *(spans[name].span_id for name in path[:-1])]
    assert {each.key: each.value.string_value for each in spans["process tasks.tell"].attributes}["meshlib.peer"] == ID + "worker"


def test_with_the_instrumentation_there_is_no_span_twice(scene: Scene, receiver: Receiver) -> None:
    """CeleryInstrumentor makes the spans then, in the same trace, and calls of the mesh belong to it."""
    env = {"OTLP": receiver.url, "WITH_INSTRUMENTOR": "1"}
    with orders(scene, ORDERS.replace("FAILURES", "0")), scene.worker(*PREFORK, **env):
        assert scene.send("answer = tell.delay().get(timeout=20)", **env)["sender"] == ID + "web"
        scene.send("answer = call.delay().get(timeout=20)['answer']", **env)
    names = sorted((span.name, span.kind) for _, span in receiver.spans)
    assert names == [
        ("GET", 3),
        ("apply_async/tasks.call", PRODUCER),
        ("apply_async/tasks.tell", PRODUCER),
        ("run/tasks.call", CONSUMER),
        ("run/tasks.tell", CONSUMER),
    ]
    assert len({span.trace_id for _, span in receiver.spans}) == 2


def test_the_sampled_flag_counts_from_proved_senders_only(scene: Scene, receiver: Receiver) -> None:
    """It costs money: of what others send, the worker's own share is recorded, here nothing."""
    write_config(scene.folder, json.loads(scene.file.read_text())["services"], mode="enforce", observe={"sample": 0})
    code = f"answer = tell.apply_async(headers={{'traceparent': '00-{16 * 'ab'}-{8 * 'cd'}-01'}}).get(timeout=20)['sender']"
    with scene.worker(*PREFORK, OTLP=receiver.url):
        assert [scene.send(code, ""), receiver.told()] == [None, []]
        assert scene.send(code) == ID + "web"
    assert receiver.told() == [("process tasks.tell", CONSUMER)]


def test_without_a_recorder_the_trace_goes_through_all_the_same(scene: Scene) -> None:
    """What came in with the message goes out with the calls of the task, and with what it sends on."""
    parent = f"00-{16 * 'ab'}-{8 * 'cd'}-01"
    with Plain() as service:
        service.use(scene)
        with scene.worker(*PREFORK):
            code = (
                f"answer = chain(call.si().set(headers={{'traceparent': '{parent}'}}), seen.si()).apply_async().get(timeout=20)"
            )
            found = scene.send(code)
            nobody = scene.send("answer = seen.delay().get(timeout=20)")
    assert [seen["traceparent"] for seen in service.seen] == [parent]
    assert found == {"traceparent": parent, "tracestate": None, "mesh-sender": "worker", "mesh-proof": None}
    assert nobody == {"traceparent": None, "tracestate": None, "mesh-sender": "web", "mesh-proof": None}


def test_the_example_runs(tmp_path: Path, redis: int) -> None:
    """The shop may send, the visitor may not."""
    port = str(free_port())
    (tmp_path / "mesh.yaml").write_text(EXAMPLE.with_name("mesh.yaml").read_text().replace("8201", port))
    identities(tmp_path, "shop", "visitor", "worker", "prices")
    env = {**os.environ, "MESHLIB_CONFIG": str(tmp_path / "mesh.yaml"), "BROKER": f"redis://127.0.0.1:{redis}/3"}

    def run(service: str) -> str:
        done = subprocess.run(
            [PYTHON, "example.py"], env={**env, "MESHLIB_SERVICE": service}, cwd=EXAMPLE.parent, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    serve = str(Path(PYTHON).parent / "meshlib"), "serve", "example:prices", "--service", "prices"
    worker = PYTHON, "-m", "celery", "-A", "example", "worker", "--concurrency=2"
    with process(*serve, env=env, cwd=EXAMPLE.parent) as prices:
        wait_until_listening(int(port), prices)
        with process(*worker, env={**env, "MESHLIB_SERVICE": "worker"}, cwd=EXAMPLE.parent):
            assert "{'item': 7, 'charged': 12, 'for': 'shop'}" in run("shop")
            assert "SenderRefused" in run("visitor")
