"""Would this project be in the mesh, as its settings are?

`manage.py check` tells what would otherwise be noticed in production: by 401 for everybody, by 400 for callers of the mesh, or never.

    meshlib.E001   MESH can't be used
    meshlib.W001   the middleware is there, and nothing puts the mesh around the application
    meshlib.W002   a header that any caller can set decides whether a call is secure
    meshlib.W003   a header that any caller can set decides who the user is
    meshlib.W004   ALLOWED_HOSTS refuses what callers of the mesh send
    meshlib.W005   MESH and the environment contradict one another
    meshlib.I001   a header of proxies counts only from those that mesh.yaml names

No mesh is loaded for it, and no application is imported: commands such as `migrate` run these checks too, where there is no identity. So
asgi.py and wsgi.py are read, not run, and what is built elsewhere isn't seen: silence W001 then (SILENCED_SYSTEM_CHECKS).
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from django.conf import settings
from django.core.checks import CheckMessage, Error, Info, Warning  # noqa: A004 - so they are called
from django.core.exceptions import ImproperlyConfigured
from django.http.request import validate_host
from django.utils.module_loading import import_string

from .process import wanted

# Of headers that say where a call comes from, the mesh takes out these, unless a proxy sends them that it was told to believe.
_TAKEN_OUT: Final = frozenset({"HTTP_FORWARDED", "HTTP_X_FORWARDED_PROTO", "HTTP_X_FORWARDED_HOST", "HTTP_X_FORWARDED_PORT"})
_PROXIES: Final = "It counts from the proxies under secure.proxies in mesh.yaml, and is taken out of all other calls."
_ENVIRONMENT: Final = {"CONFIG": "MESHLIB_CONFIG", "SERVICE": "MESHLIB_SERVICE", "ZONE": "MESHLIB_ZONE"}


def check_settings(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    try:
        said = wanted()
    except ImproperlyConfigured as error:
        return [Error(str(error), id="meshlib.E001")]
    return [*_around(), *_headers(), *_users(), *_hosts(said), *_contradictions(said)]


def _around() -> Iterator[CheckMessage]:
    """Is the mesh around what the middleware is inside of?"""
    if not any(name.startswith("meshlib_django.") for name in settings.MIDDLEWARE):
        return
    for setting, function in (("WSGI_APPLICATION", "get_wsgi_application"), ("ASGI_APPLICATION", "get_asgi_application")):
        module = str(getattr(settings, setting, None) or "").rpartition(".")[0]
        if module and not _mentions_the_mesh(module):
            yield Warning(
                f"MIDDLEWARE has meshlib_django.MeshMiddleware, and {module} ({setting}) doesn't put the mesh around the application: "
                "calls are not judged, and request.peer is always None.",
                hint=f"There: from meshlib_django import {function}; application = {function}()",
                id="meshlib.W001",
            )


def _mentions_the_mesh(module: str) -> bool:
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(spec.origin).read_bytes()) if spec is not None and spec.origin else None
    except (ImportError, OSError, SyntaxError, ValueError):
        tree = None
    if tree is None:
        # Django says itself what is wrong with it.
        return True
    named = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom)
            else []
        )
    }  # fmt: skip
    return not named.isdisjoint({"meshlib", "meshlib_django"})


def _headers() -> Iterator[CheckMessage]:
    """Does Django believe what a caller says about where a call comes from?"""
    told = settings.SECURE_PROXY_SSL_HEADER
    if told is not None:
        if told[0] in _TAKEN_OUT:
            yield Info(f"SECURE_PROXY_SSL_HEADER names {told[0]}.", hint=_PROXIES, id="meshlib.I001")
        else:
            yield Warning(
                f"SECURE_PROXY_SSL_HEADER names {told[0]}, which the mesh doesn't know: any caller can send it, and make a plain call "
                "look secure.",
                hint="Take it out: the scheme of the connection is known. Behind a proxy of yours take HTTP_X_FORWARDED_PROTO, and name "
                "the proxy in mesh.yaml (secure.proxies).",
                id="meshlib.W002",
            )
    for setting in ("USE_X_FORWARDED_HOST", "USE_X_FORWARDED_PORT"):
        if getattr(settings, setting):
            yield Info(f"{setting} is on.", hint=_PROXIES, id="meshlib.I001")


def _users() -> Iterator[CheckMessage]:
    """Does a header log somebody in?"""
    for name in settings.MIDDLEWARE:
        try:
            kind = import_string(name)
        except Exception:
            # Django says itself what is wrong with it.
            continue
        if _is_by_remote_user(kind) and str(kind.header).startswith("HTTP_"):
            yield Warning(
                f"{name} logs in whoever the header {kind.header} names, and any caller can send it.",
                hint="Who calls is request.peer, and a person is in a token: secure.jwt in mesh.yaml, meshlib.claims() in the view.",
                id="meshlib.W003",
            )


def _is_by_remote_user(kind: Any) -> bool:
    # By name: a project without django.contrib.auth couldn't import the class itself.
    return any(
        base.__name__ == "RemoteUserMiddleware" and base.__module__.startswith("django.") for base in getattr(kind, "__mro__", ())
    )


def _hosts(said: dict[str, Any]) -> Iterator[CheckMessage]:
    """Will Django take the Host header of a call that came by the name of the service?"""
    service = said.get("SERVICE") or os.environ.get("MESHLIB_SERVICE")
    allowed: Sequence[str] = settings.ALLOWED_HOSTS
    if service and not validate_host(service, allowed):
        yield Warning(
            f"ALLOWED_HOSTS doesn't have {service!r}, the name by which callers of the mesh ask for this service: they get 400.",
            hint=f"ALLOWED_HOSTS = {[*allowed, service]!r}",
            id="meshlib.W004",
        )


def _contradictions(said: dict[str, Any]) -> Iterator[CheckMessage]:
    for key, variable in _ENVIRONMENT.items():
        here, there = said.get(key), os.environ.get(variable)
        if here is not None and there and str(here) != there:
            yield Warning(
                f"MESH[{key!r}] is {str(here)!r} and {variable} is {there!r}: the setting counts.",
                hint="Say it in one place; to decide it per deployment, leave it out of the settings.",
                id="meshlib.W005",
            )
