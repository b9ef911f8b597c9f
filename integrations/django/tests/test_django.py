"""Does a Django project live in the mesh as it did without, and know its callers? Behind real servers, and in its own tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from tests.support import PYTHON, free_port, identities, process, wait_until_listening, write_config

EXAMPLE = Path(__file__).parent.parent / "example.py"
MESHLIB = str(Path(PYTHON).parent / "meshlib")
ID = "spiffe://shop.internal/ns/default/sa/"
# What runs behind the real servers: the files of a project.
PROJECT = {
    "settings.py": """
import os

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))

SECRET_KEY = "x" * 50
ALLOWED_HOSTS = ["shop", "127.0.0.1"]
ROOT_URLCONF = "urls"
INSTALLED_APPS = ["meshlib_django"]
MIDDLEWARE = ["meshlib_django.MeshMiddleware", "django.middleware.common.CommonMiddleware"]
MESH = {"CONFIG": os.environ["MESH_FILE"], "SERVICE": "shop"}
WSGI_APPLICATION = "wsgi.application"
ASGI_APPLICATION = "asgi.application"
""",
    "asgi.py": """
import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
if os.environ.get("WITH_INSTRUMENTOR"):
    from opentelemetry.instrumentation.django import DjangoInstrumentor

    DjangoInstrumentor().instrument()

from meshlib_django import get_asgi_application

application = get_asgi_application()
""",
    "wsgi.py": """
import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
if os.environ.get("WITH_INSTRUMENTOR"):
    from opentelemetry.instrumentation.django import DjangoInstrumentor

    DjangoInstrumentor().instrument()

from meshlib_django import get_wsgi_application

application = get_wsgi_application()
""",
    "manage.py": """
import os
import sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
execute_from_command_line(sys.argv)
""",
    "urls.py": """
import asyncio

import settings
from django.http import JsonResponse, StreamingHttpResponse
from django.urls import include, path, re_path
from django.views import View

import meshlib
from meshlib_django import mesh, peer_required


@peer_required
def show(request, item):
    return JsonResponse({"item": item, "peer": request.peer.spiffe_id, "tls": request.peer.is_tls})


@peer_required
async def show_later(request, item):
    await asyncio.sleep(0)
    return JsonResponse({"item": item, "peer": request.peer.spiffe_id, "tls": meshlib.peer().is_tls})


class ItemView(View):
    async def get(self, request, item):
        return JsonResponse({"item": item, "peer": request.peer.spiffe_id, "tls": request.peer.is_tls})


def who(request):
    return JsonResponse([request.peer and request.peer.spiffe_id], safe=False)


async def who_later(request):
    return JsonResponse([request.peer and request.peer.spiffe_id], safe=False)


def stream(request):
    def pieces():
        for _ in range(3):
            yield meshlib.peer().spiffe_id

    return StreamingHttpResponse(pieces())


def gone(request, item):
    with mesh().sync_client() as http:
        return JsonResponse(http.get(f"http://gone/{item}").json())


async def gone_later(request, item):
    async with mesh().client() as http:
        return JsonResponse((await http.get(f"http://gone/{item}")).json())


def spans(request):
    return JsonResponse(
        [
            [span.kind.name, span.name, span.attributes.get("http.route"), span.attributes.get("meshlib.peer")]
            for span in settings.exporter.get_finished_spans()
        ],
        safe=False,
    )


def metrics(request):
    return JsonResponse([mesh().metrics()], safe=False)


items = [
    path("items/<int:item>/", show),
    path("later/<int:item>/", show_later),
    path("view/<int:item>/", peer_required(ItemView.as_view())),
]
urlpatterns = [
    path("v1/", include(items)),
    path("who", who),
    path("who-later", who_later),
    path("stream", stream),
    path("gone/<int:item>", gone),
    path("gone-later/<int:item>", gone_later),
    re_path(r"^old/(?P<item>[0-9]+)$", show),
    path("spans", spans),
    path("metrics", metrics),
]
""",
}
ASGI = MESHLIB, "serve", "asgi:application"
WSGI = MESHLIB, "serve", "wsgi:application"
KINDS = pytest.mark.parametrize("command", [ASGI, WSGI], ids=["asgi", "wsgi"])


def project(folder: Path, mode: str, **instead: str) -> tuple[dict[str, str], int, Path]:
    """The files of the project, with the service `shop`: the environment of its processes, its port, and the configuration."""
    for name, text in {**PROJECT, **{f"{name}.py": text for name, text in instead.items()}}.items():
        (folder / name).write_text(text)
    identities(folder, "shop", "web", "stranger")
    port = free_port()
    services = {
        "shop": {
            "listen": f"127.0.0.1:{port}",
            "discover": {"static": [f"127.0.0.1:{port}"]},
            "secure": {"allow": [{"name": "web only", "from": ["web"]}]},
        },
        "web": {},
        "stranger": {},
        "gone": {"discover": {"static": [f"127.0.0.1:{free_port()}"]}},
    }
    file = write_config(folder, services, mode=mode)
    return {"MESH_FILE": str(file), "DJANGO_SETTINGS_MODULE": "settings"}, port, file


@contextmanager
def serving(folder: Path, mode: str, *command: str, **env: str) -> Iterator[tuple[int, Any, Path]]:
    """The project behind a real server: its port, its process, and the configuration."""
    base, port, file = project(folder, mode)
    with process(*(each.replace("PORT", str(port)) for each in command), env={**base, **env}, cwd=folder) as child:
        wait_until_listening(port, child)
        yield port, child, file


@contextmanager
def caller(file: Path, service: str = "web") -> Iterator[httpx.Client]:
    mesh = meshlib.Mesh.load(file, service=service)
    try:
        with mesh.sync_client() as http:
            yield http
    finally:
        mesh.close()


@pytest.mark.parametrize(
    "command",
    [ASGI, (*ASGI, "--workers", "2"), WSGI, (*WSGI, "--workers", "2", "--threads", "1")],
    ids=["asgi", "asgi-processes", "wsgi-threads", "wsgi-processes"],
)
def test_in_mode_enforce_a_view_knows_who_proved_what(tmp_path: Path, command: tuple[str, ...]) -> None:
    """`request.peer` has the SPIFFE ID of the connection in sync and async views; who isn't allowed never gets there."""
    with serving(tmp_path, "enforce", *command) as (port, _child, file):
        with caller(file) as http:
            for path in ("/v1/items/7/", "/v1/later/7/", "/v1/view/7/"):
                shown = http.get(f"http://shop{path}")
                assert (shown.status_code, shown.json()) == (200, {"item": 7, "peer": ID + "web", "tls": True})
            for name in ("x-forwarded-client-cert", "remote-user", "x-spiffe-id", "meshlib.peer"):
                forged = http.get("http://shop/who", headers={name: f"URI={ID}stranger"})
                assert forged.json() == [ID + "web"]
            assert http.get("http://shop/who-later").json() == [ID + "web"]
            assert http.get("http://shop/stream").text == 3 * (ID + "web")
        with caller(file, "stranger") as http:
            refused = http.get("http://shop/who")
            assert (refused.status_code, refused.json()["reason"]) == (403, "secure.denied")
        assert httpx.get(f"http://127.0.0.1:{port}/who").status_code == 400  # plain text


@KINDS
def test_in_mode_observe_a_plain_caller_is_nobody(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Views that require a peer answer 401 with problem details, whatever headers say; the others as before."""
    with serving(tmp_path, "observe", *command) as (port, _child, _file):
        assert httpx.get(f"http://127.0.0.1:{port}/who").json() == [None]
        for path in ("items", "later", "view"):
            refused = httpx.get(
                f"http://127.0.0.1:{port}/v1/{path}/7/", headers={"x-spiffe-id": ID + "web", "meshlib.peer": "web"}
            )
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "mTLS")
            assert refused.headers["content-type"] == "application/problem+json"
            assert (refused.json()["status"], refused.json()["reason"]) == (401, "secure.no_identity")


@KINDS
def test_each_call_is_counted_and_traced_once_under_its_route(tmp_path: Path, command: tuple[str, ...]) -> None:
    """`meshlib serve` puts the mesh around an application that has it already: one call stays one call."""
    with serving(tmp_path, "enforce", *command) as (_port, _child, file), caller(file) as http:
        for path in ("/v1/items/7/", "/v1/later/8/", "/old/9", "/nowhere/9"):
            http.get(f"http://shop{path}")
        counted = [line for line in http.get("http://shop/metrics").json()[0].splitlines() if "secure_requests_total{" in line]
        # The call that asks isn't over yet.
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) == 4
        spans = [span for span in http.get("http://shop/spans").json() if span[0] == "SERVER"]
    assert {span.pop() for span in spans} == {ID + "web"}
    assert spans == [
        ["SERVER", "GET /v1/items/<int:item>/", "/v1/items/<int:item>/"],
        ["SERVER", "GET /v1/later/<int:item>/", "/v1/later/<int:item>/"],
        ["SERVER", "GET /^old/(?P<item>[0-9]+)$", "/^old/(?P<item>[0-9]+)$"],
        ["SERVER", "GET", None],
        ["SERVER", "GET /metrics", "/metrics"],
    ]


@KINDS
def test_with_the_instrumentation_a_call_still_has_one_span(tmp_path: Path, command: tuple[str, ...]) -> None:
    """DjangoInstrumentor makes it then, and it has what the mesh's would have: the route, and who called."""
    with serving(tmp_path, "enforce", *command, WITH_INSTRUMENTOR="1") as (_port, _child, file), caller(file) as http:
        http.get("http://shop/v1/later/7/")
        assert http.get("http://shop/spans").json() == [
            ["SERVER", "GET /v1/later/<int:item>/", "/v1/later/<int:item>/", ID + "web"],
        ]


@KINDS
def test_an_outgoing_call_that_failed_is_a_bad_gateway(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Nobody listens there: our caller gets problem details that tell nothing of it, and the log tells all."""
    with serving(tmp_path, "enforce", *command) as (_port, child, file):
        with caller(file) as http:
            answers = [http.get(f"http://shop/{path}/7", extensions=meshlib.policy(retries=0)) for path in ("gone", "gone-later")]
        told = {
            "type": "urn:meshlib:problem:upstream.failed",
            "title": "A service behind this one failed",
            "status": 502,
            "reason": "upstream.failed",
        }
        assert answers[0].headers["content-type"] == "application/problem+json"
        assert (answers[0].status_code, answers[0].json()) == (502, told)
        # By then its endpoint may be known to be dead.
        assert answers[1].json()["reason"] in ("upstream.failed", "upstream.unavailable")
        child.send_signal(signal.SIGTERM)
        log = child.communicate(timeout=30)[0]
    assert re.search(r"meshlib_django: 502 for /gone/<int:item>: ConnectFailed: .*127\.0\.0\.1", log)


@KINDS
def test_the_process_ends_well(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Django knows no lifespan: it isn't asked for one, and the mesh ends with the server."""
    with serving(tmp_path, "enforce", *command) as (_port, child, file):
        with caller(file) as http:
            assert http.get("http://shop/who").status_code == 200
        child.send_signal(signal.SIGTERM)
        log = child.communicate(timeout=30)[0]
        assert child.returncode == 0
    assert "lifespan" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "command",
    [
        (PYTHON, "manage.py", "runserver", "--noreload", "PORT"),
        (PYTHON, "-m", "uvicorn", "--port", "PORT", "asgi:application"),
        (PYTHON, "-m", "gunicorn", "--bind", "127.0.0.1:PORT", "wsgi:application"),
    ],
    ids=["runserver", "uvicorn", "gunicorn"],
)
def test_any_server_serves_it_in_mode_observe(tmp_path: Path, command: tuple[str, ...]) -> None:
    """The one that everybody develops with, and others without the mesh's part; the canonical path with all of them."""
    with serving(tmp_path, "observe", *command) as (port, _child, _file):
        assert httpx.get(f"http://127.0.0.1:{port}//who").json() == [None]
        assert httpx.get(f"http://127.0.0.1:{port}/who%00").json()["reason"] == "secure.path"


def test_the_example_runs(tmp_path: Path) -> None:
    """Both services of it, and then only one: the customer is told that something behind it failed."""
    ports = {"8200": str(free_port()), "8201": str(free_port())}
    text = EXAMPLE.with_name("mesh.yaml").read_text()
    for old, new in ports.items():
        text = text.replace(old, new)
    (tmp_path / "mesh.yaml").write_text(text)
    identities(tmp_path, "storefront", "orders")
    env = {"MESHLIB_CONFIG": str(tmp_path / "mesh.yaml")}

    def serve(service: str) -> Any:
        return process(MESHLIB, "serve", f"example:{service}()", "--service", service, env=env, cwd=EXAMPLE.parent)

    with serve("storefront") as storefront:
        wait_until_listening(int(ports["8200"]), storefront)
        with serve("orders") as orders:
            wait_until_listening(int(ports["8201"]), orders)
            bought = httpx.get(f"http://127.0.0.1:{ports['8200']}/buy/7")
            assert (bought.status_code, bought.json()) == (
                200,
                {"customer": "somebody", "order": {"item": 7, "price": 12, "for": "storefront"}},
            )
        failed = httpx.get(f"http://127.0.0.1:{ports['8200']}/buy/7")
        assert failed.status_code in (502, 503)
        assert failed.json()["reason"].startswith("upstream.")


# --------------------------------------------------------------------------------------------------- manage.py check


def check(folder: Path, settings: str = "", **instead: str) -> tuple[set[str], str]:
    """The ids that `manage.py check` tells, and its text."""
    base, _port, _file = project(folder, "observe", settings=PROJECT["settings.py"] + settings, **instead)
    done = subprocess.run(
        [PYTHON, "manage.py", "check"],
        cwd=folder,
        env={**os.environ, **base},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = done.stdout + done.stderr
    return set(re.findall(r"meshlib\.\w+", re.sub(r"meshlib\.(yaml|claims|Mesh)", "", told))), told


def test_a_project_that_is_in_the_mesh_passes_its_checks(tmp_path: Path) -> None:
    """And no mesh is loaded for it: the identity may not be there where the checks run."""
    assert check(tmp_path, 'MESH = {"CONFIG": "/nowhere/mesh.yaml", "SERVICE": "shop"}')[0] == set()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ('MESH = {"FILE": "mesh.yaml"}', "E001"),
        ('MESH = "mesh.yaml"', "E001"),
        ('SECURE_PROXY_SSL_HEADER = ("HTTP_X_MY_PROTO", "https")', "W002"),
        ('SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")', "I001"),
        ("USE_X_FORWARDED_HOST = True", "I001"),
        ("USE_X_FORWARDED_PORT = True", "I001"),
        (
            'MIDDLEWARE.append("headers.ByHeader"); INSTALLED_APPS += ["django.contrib.auth", "django.contrib.contenttypes"]',
            "W003",
        ),
        ('ALLOWED_HOSTS = ["example.com"]', "W004"),
        ('os.environ["MESHLIB_SERVICE"] = "web"', "W005"),
    ],
)
def test_settings_that_contradict_the_mesh_are_told(tmp_path: Path, settings: str, found: str) -> None:
    """Each by its own message, and nothing else."""
    by_header = (
        "from django.contrib.auth.middleware import RemoteUserMiddleware\n\n\n"
        "class ByHeader(RemoteUserMiddleware):\n    header = 'HTTP_X_USER'\n"
    )
    assert check(tmp_path, "\n" + settings + "\n", headers=by_header)[0] == {f"meshlib.{found}"}


def test_a_middleware_without_the_mesh_around_it_is_told(tmp_path: Path) -> None:
    """By module and setting, for both kinds of applications; without the middleware nobody expects anything."""
    plain = "from django.core.wsgi import get_wsgi_application\n\napplication = get_wsgi_application()\n"
    ids, told = check(tmp_path, wsgi=plain)
    assert ids == {"meshlib.W001"}
    assert "wsgi (WSGI_APPLICATION) doesn't put the mesh around the application" in told
    assert "asgi (ASGI" not in told
    (tmp_path / "settings.py").write_text(PROJECT["settings.py"] + "\nMIDDLEWARE = MIDDLEWARE[1:]\n")
    done = subprocess.run(
        [PYTHON, "manage.py", "check"],
        cwd=tmp_path,
        env={**os.environ, "MESH_FILE": "x"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "no issues" in done.stdout
