"""Is what the README says of serving true today?

As in test_readme.py, whose tools these are: the blocks of the section "Serving" are taken out and run. Each command of the table of servers is
started, the three ports are asked, with the probes of the two orchestrators too, the process is told to end. What is not checked: prose, and
the columns of the table that tests/conformance/server holds for all servers (conversations, ends) and tests/server/test_client_gone.py.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from meshlib import cli
from tests.support import PYTHON, free_port, identities, process, wait_until_listening
from tests.test_readme import README, block, until

SECTION = README.split("\n## Serving\n", 1)[1].split("\n## ", 1)[0]
# The rows of the table of servers: the command, and what it says of mutual TLS.
SERVERS = re.findall(r"^\| `([^`]+)` \|[^|]+\| (yes|no: mode observe)[^|]*\|", SECTION, re.MULTILINE)
PORTS = {"0.0.0.0:8101": "orders", "0.0.0.0:8080": "public", "0.0.0.0:8081": "probe"}
KEYS = ["rule", "path", "route", "listener", "client", "priority", "waited"]

# What stands before the README's lines: an application, and a registry that is told.
API = """
from pathlib import Path
from types import SimpleNamespace
from fastapi import FastAPI
import meshlib

api = FastAPI()
registry = SimpleNamespace(leave=lambda: Path("left").touch())

@api.get("/items/{item}")
@api.get("/prices")
def show():
    call = meshlib.current_call()
    left, claims = meshlib.remaining(), meshlib.claims()
    with meshlib.deadline(0.5):
        less = meshlib.remaining()
    return {"for": meshlib.peer().service, "left": left, "less": less, "claims": claims, "call": {key: call[key] for key in KEYS}}

""".replace("KEYS", repr(KEYS))
# The table's `app:app` and `wsgi:app`.
APP = """
import meshlib
from fastapi import FastAPI

api = FastAPI()

@api.get("/items/{item}")
def show(item: int):
    return meshlib.peer().service

app = meshlib.Mesh.load().asgi(api)
"""
WSGI = """
import meshlib
from flask import Flask

flask = Flask("wsgi")

@flask.get("/items/<int:item>")
def show(item):
    return meshlib.peer().service

app = meshlib.Mesh.load().wsgi(flask)
"""


class World:
    """The service of the section in a folder, on free ports."""

    def __init__(self, folder: Path, mode: str = "enforce") -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in PORTS.values()}
        identities(folder, "storefront", "reports", "orders")
        # Nobody waits for readiness to be seen, but where the end is what the test is about.
        text = block("serving.yaml").replace("mode: enforce", f"mode: {mode}").replace("wait: 5s", "wait: 0s")
        for address, name in PORTS.items():
            text = text.replace(address, f"127.0.0.1:{self.ports[name]}")
        text = text.replace('dns: "orders:8101"', f'static: ["127.0.0.1:{self.ports["orders"]}"]')
        (folder / "mesh.yaml").write_text(text)
        (folder / "serving.py").write_text(API + block("serving.py"))
        (folder / "app.py").write_text(APP)
        (folder / "wsgi.py").write_text(WSGI)

    def ask(self, name: str, target: str, **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.ports[name]}{target}", headers=headers, trust_env=False)

    @contextlib.contextmanager
    def caller(self, service: str) -> Iterator[httpx.Client]:
        """A service of the mesh, without the mesh's client, so that nothing is repeated."""
        context = ssl.create_default_context(cafile=str(self.folder / "identities" / service / "bundle.pem"))
        context.check_hostname = False
        here = self.folder / "identities" / service
        context.load_cert_chain(here / "svid.pem", here / "key.pem")
        with httpx.Client(base_url=f"https://127.0.0.1:{self.ports['orders']}", verify=context, trust_env=False) as http:
            yield http


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("serving"))
    with process(*words("meshlib serve serving:app --service orders"), cwd=world.folder) as child:
        for port in world.ports.values():
            wait_until_listening(port, child)
        until(lambda: world.ask("probe", "/readyz").status_code, 200)
        yield world


def words(command: str) -> list[str]:
    """A command with the programs beside the Python that runs this test."""
    program, *rest = shlex.split(command)
    return [str(Path(sys.executable).with_name(program)), *rest]


# ---------------------------------------------------------------- servers


def test_the_table_names_the_servers() -> None:
    """So that no row is left out below."""
    assert [command.split()[0] for command, _ in SERVERS] == [
        *("meshlib", "uvicorn", "gunicorn", "meshlib", "gunicorn", "gunicorn", "hypercorn", "granian")
    ]


@pytest.mark.parametrize("command", [command for command, tls in SERVERS if tls == "yes"])
def test_a_server_knows_who_calls_over_mutual_tls(command: str, tmp_path: Path) -> None:
    """In mode enforce, as the command stands there and with the address alone added to it."""
    world = World(tmp_path)
    own = f"127.0.0.1:{world.ports['orders']}"
    added = {
        "uvicorn": ["--port", str(world.ports["orders"])],
        "gunicorn": ["-b", own, "-b", f"127.0.0.1:{world.ports['public']}"],
    }
    first = words(command)
    with process(*first, *added.get(Path(first[0]).name, []), cwd=tmp_path, env={"MESHLIB_SERVICE": "orders"}) as child:
        wait_until_listening(world.ports["orders"], child)
        with world.caller("storefront") as http:
            assert "storefront" in http.get("/items/7").text
        if Path(first[0]).name != "uvicorn":
            assert world.ask("public", "/items/7").status_code == 200
        assert world.ask("orders", "/items/7").status_code == 400


@pytest.mark.parametrize("command", [command for command, tls in SERVERS if tls != "yes"])
def test_a_server_that_shows_no_certificates_serves_in_mode_observe_only(command: str, tmp_path: Path) -> None:
    """In mode enforce it ends, with a word that says why."""
    first = words(command)
    for mode in ("observe", "enforce"):
        (tmp_path / mode).mkdir()
        world = World(tmp_path / mode, mode)
        port = str(world.ports["orders"])
        added = ["--port", port] if "granian" in command else ["-b", f"127.0.0.1:{port}"]
        with process(*first, *added, cwd=world.folder, env={"MESHLIB_SERVICE": "orders"}) as child:
            if mode == "observe":
                wait_until_listening(world.ports["orders"], child)
                assert world.ask("orders", "/items/7").json() == ""
            else:
                told, _ = child.communicate(timeout=30)
                assert "shows the application no certificate of its callers" in told


# ---------------------------------------------------------------- ports and probes


def test_each_port_is_for_whom_the_table_says(world: World) -> None:
    """The mesh at the first, everybody at the second as far as its own rules go, probes at the third and nothing else."""
    with world.caller("reports") as http:
        assert http.get("/items/7").json()["for"] == "reports"
        assert http.get("/healthz").status_code == 403
    assert world.ask("orders", "/items/7").status_code == 400
    stranger = world.ask("public", "/items/7").json()
    assert (stranger["for"], stranger["call"]["listener"]) == ("", "public")
    assert [world.ask("public", target).status_code for target in ("/prices", "/sums", "/healthz")] == [403, 403, 403]
    probes = {
        path: world.ask("probe", path).status_code
        for path in ("/livez", "/healthz", "/readyz", "/metrics", "/items/7", "/status")
    }
    assert probes == {"/livez": 200, "/healthz": 200, "/readyz": 200, "/metrics": 200, "/items/7": 404, "/status": 404}


def test_orchestrators_ask_what_is_there(world: World) -> None:
    """The ports and paths of Kubernetes, and the command of Compose, on the process that is served; both wait for its end."""
    inbound = yaml.safe_load(block("serving.yaml"))["services"]["orders"]["inbound"]
    spec = yaml.safe_load(block("deployment.yaml"))["spec"]
    for probe in ("livenessProbe", "readinessProbe"):
        asked = spec["containers"][0][probe]["httpGet"]
        assert f"0.0.0.0:{asked['port']}" == inbound["probe"]
        assert world.ask("probe", asked["path"]).status_code == 200
    longest = sum(float(seconds.removesuffix("s")) for seconds in inbound["drain"].values())
    assert spec["terminationGracePeriodSeconds"] > longest
    service = yaml.safe_load(block("compose.yaml"))["services"]["orders"]
    assert float(service["stop_grace_period"].removesuffix("s")) > longest
    word, *command = service["healthcheck"]["test"]
    assert (word, command.pop(0)) == ("CMD", "python")
    script = [each.replace("8081", str(world.ports["probe"])) for each in command]
    assert subprocess.run([PYTHON, *script], check=False).returncode == 0
    assert subprocess.run(
        [PYTHON, *[each.replace("readyz", "nothing") for each in script]], check=False, capture_output=True
    ).returncode


# ---------------------------------------------------------------- handlers and limits


def test_a_handler_learns_what_the_table_says(world: World) -> None:
    """Who called, how much time is left, and how it was let in; the time is the caller's."""
    with world.caller("storefront") as http:
        bare = http.get("/items/7").json()
        timed = http.get("/items/7", headers={"x-mesh-deadline-ms": "300"}).json()
        late = http.get("/items/7", headers={"x-mesh-deadline-ms": "0"})
    assert (bare["for"], bare["left"], bare["claims"], list(bare["call"])) == ("storefront", None, None, KEYS)
    assert {f"`{key}`" for key in KEYS} <= set(re.findall(r"`\w+`", SECTION))
    assert 0 < timed["less"] <= timed["left"] < 0.3 < bare["less"] <= 0.5
    assert (late.status_code, late.json()["reason"]) == (504, "deadline.exceeded")


def test_what_is_told_of_importance_counts_for_whom_it_is_trusted(world: World) -> None:
    """The storefront's word, and of reports what the configuration says; a stranger's word is none."""
    told = {"x-mesh-priority": "critical_plus"}
    found = [world.ask("public", "/items/7", **told).json()["call"]["priority"]]
    for service in ("storefront", "reports"):
        with world.caller(service) as http:
            found.append(http.get("/items/7", headers=told).json()["call"]["priority"])
    assert found == ["critical", "critical_plus", "sheddable"]


def test_load_is_told_to_callers_of_the_mesh_that_ask(world: World) -> None:
    """And to no stranger."""
    asks = {"endpoint-load-metrics-format": "text"}
    with world.caller("storefront") as http:
        until(
            lambda: "cpu_utilization" in http.get("/items/7", headers=asks).headers.get("endpoint-load-metrics", ""),
            expected=True,
        )
    assert "endpoint-load-metrics" not in world.ask("public", "/items/7", **asks).headers


def test_who_is_refused_gets_what_the_readme_shows(tmp_path: Path) -> None:
    """The rate of the configuration, used up: the same head and the same body."""
    world = World(tmp_path)
    with process(*words("meshlib serve serving:app --service orders"), cwd=tmp_path) as child:
        wait_until_listening(world.ports["public"], child)
        with httpx.Client(base_url=f"http://127.0.0.1:{world.ports['public']}", trust_env=False) as http:
            refused = next(answer for _ in range(400) if (answer := http.get("/items/7")).status_code != 200)
    head, _, body = block("refused").partition("\n\n")
    first, *fields = head.splitlines()
    assert f"HTTP/1.1 {refused.status_code} {refused.reason_phrase}" == first
    assert refused.text == body.strip()
    shown = dict(field.split(": ") for field in fields)
    assert {name: refused.headers[name] for name in shown} == shown
    assert {name for name in refused.headers} - set(shown) == {"date", "keep-alive"}


def test_the_reasons_of_the_table_are_those_of_refusals() -> None:
    """Each that is named is one; and each limit that is named can be configured."""
    from meshlib.config.inbound_document import Inbound
    from meshlib.server.way import _TITLES

    assert {reason for reason in re.findall(r"`((?:admit|deadline)\.\w+)`", SECTION) if reason in _TITLES} == {
        *("admit.limit", "admit.shed", "admit.rate", "deadline.exceeded")
    }
    named = set(re.findall(r"`(\w+)", SECTION.split("| `inbound` |")[1].split("```")[0]))
    assert {"in_flight", "adaptive", "queue", "codel", "priority", "shares", "rate", "probes"} <= named & set(
        Inbound.model_fields
    )


# ---------------------------------------------------------------- its end, and tests


def test_it_ends_by_the_table(tmp_path: Path) -> None:
    """Not ready at once, registries told, and served as before; after the wait it is gone, with exit code 0."""
    world = World(tmp_path)
    file = tmp_path / "mesh.yaml"
    file.write_text(file.read_text().replace("wait: 0s", "wait: 2s"))
    with process(*words("meshlib serve serving:app --service orders"), cwd=tmp_path) as child:
        wait_until_listening(world.ports["orders"], child)
        until(lambda: world.ask("probe", "/readyz").status_code, 200)
        child.send_signal(signal.SIGTERM)
        until(lambda: world.ask("probe", "/readyz").status_code, 503)
        until((tmp_path / "left").exists, expected=True)
        assert world.ask("probe", "/livez").status_code == 200
        assert world.ask("public", "/items/7").status_code == 200
        assert child.wait(15) == 0


def test_a_test_says_who_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's test, on its application, whose rules judge."""
    World(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_serving.py").write_text(block("test_serving.py"))
    for name in ("serving", "test_serving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        importlib.import_module("test_serving").test_the_storefront_sees_items_and_no_prices()
    finally:
        sys.modules["serving"].mesh.close()
    for name in ("serving", "test_serving"):
        monkeypatch.delitem(sys.modules, name)


def test_the_configuration_passes_vet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in it is without effect; that the callers let nobody in is what they are."""
    monkeypatch.chdir(tmp_path)
    Path("mesh.yaml").write_text(block("serving.yaml"))
    assert cli.main(["vet"]) == 0
    told = capsys.readouterr()
    assert [line for line in (told.out + told.err).splitlines() if line.startswith("warning") and "orders" in line] == []
