"""What is served with Django and `meshlib_django`? One project, as ASGI and as WSGI; with ASGI its views are coroutines."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from typing import Any

from django.conf import settings

settings.configure(
    DEBUG=False,
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["meshlib_django.MeshMiddleware"],
    INSTALLED_APPS=["meshlib_django"],
    SECRET_KEY="none",
    APPEND_SLASH=False,
    DATA_UPLOAD_MAX_MEMORY_SIZE=None,
)

import meshlib_django  # noqa: E402
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse  # noqa: E402
from django.urls import path, re_path  # noqa: E402

import meshlib  # noqa: E402
from tests.conformance.server.served import common  # noqa: E402
from tests.conformance.server.served.bare_wsgi import in_thread  # noqa: E402
from tests.conformance.server.served.common import Body  # noqa: E402


def made_asgi() -> Any:
    return _made(meshlib_django.get_asgi_application, is_async=True)


def made_wsgi() -> Any:
    return _made(meshlib_django.get_wsgi_application, is_async=False)


def _made(application: Callable[[], Any], *, is_async: bool) -> Any:
    urlpatterns[:] = _routes(is_async=is_async)
    # Its mesh is that of the settings, which is that of the environment.
    common.MESH = meshlib_django.mesh()
    return application()


def seen(request: HttpRequest, handler: str, body: Body | None = None) -> dict[str, Any]:
    scope, environ = getattr(request, "scope", None), getattr(request, "environ", None)
    decoded = {"request.path": request.path, "request.path_info": request.path_info}
    quoted = {"get_full_path": request.get_full_path(), "build_absolute_uri": request.build_absolute_uri()}
    if scope is not None:
        decoded["scope.path"] = scope["path"]
        quoted["scope.raw_path"] = scope["raw_path"].decode()
    if environ is not None:
        # Django puts the decoded one into the environ.
        decoded["PATH_INFO"] = environ["PATH_INFO"]
        quoted |= {key: environ[key] for key in ("RAW_URI", "REQUEST_URI") if key in environ}
    peer = request.peer  # type: ignore[attr-defined]
    return common.seen(
        handler=handler,
        path=request.path,
        decoded=decoded,
        quoted=quoted,
        query=request.META["QUERY_STRING"],
        method=str(request.method),
        scheme=str(request.scheme),
        headers=list(request.headers.items()),
        body=body or Body(request.body),
        tls=common.tls_extension(scope) if scope is not None else common.tls_keys(environ or {}),
        own=peer.spiffe_id if peer else "",
    )


# ------------------------------------------------------------------------------------------------ alike in both


def items(request: HttpRequest, number: str) -> HttpResponse:
    return JsonResponse(seen(request, "items"))


def rest(request: HttpRequest) -> HttpResponse:
    return JsonResponse(seen(request, "rest"))


def boom(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("boom")


def big(request: HttpRequest) -> HttpResponse:
    return HttpResponse(common.BIG)


def numbers(request: HttpRequest) -> HttpResponse:
    return JsonResponse(common.numbers())


def note(request: HttpRequest) -> HttpResponse:
    return JsonResponse(common.NOTES.pop() if common.NOTES else None, safe=False)


def late(request: HttpRequest) -> HttpResponse:
    return _Late(common.dumped({"left": meshlib.remaining()}))


class _Late(HttpResponse):
    def close(self) -> None:
        super().close()
        common.NOTES.append(common.known())


def ignore(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"is_ignored": True})


def empty(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status=204)


@meshlib_django.peer_required
def mine(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.peer.spiffe_id)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ as coroutines, and as functions


async def half(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(common.half())  # type: ignore[return-value]


def half_blocking(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(common.half_blocking())  # type: ignore[return-value]


async def stream(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(common.each(common.PIECES))  # type: ignore[return-value]


def stream_blocking(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(iter(common.PIECES))  # type: ignore[return-value]


async def paced(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(common.paced(request.META["QUERY_STRING"]))  # type: ignore[return-value]


def paced_blocking(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(common.paced_blocking(request.META["QUERY_STRING"]))  # type: ignore[return-value]


def pieces(request: HttpRequest) -> HttpResponse:
    body = Body()
    while piece := request.read(1024):
        body.add(piece)
        if body.pieces == 1:
            common.mark(request.META["QUERY_STRING"])
    return JsonResponse({"size": body.size, "pieces": body.pieces})


async def thread(request: HttpRequest) -> HttpResponse:
    run = contextvars.copy_context().run
    return JsonResponse(await asyncio.get_running_loop().run_in_executor(None, run, common.known))


def thread_blocking(request: HttpRequest) -> HttpResponse:
    return JsonResponse(in_thread(common.known))


async def slow(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(float(request.META["QUERY_STRING"] or 1))
    return rest(request)


def slow_blocking(request: HttpRequest) -> HttpResponse:
    time.sleep(float(request.META["QUERY_STRING"] or 1))
    return rest(request)


async def hold(request: HttpRequest) -> HttpResponse:
    await common.until_let_go(request.META["QUERY_STRING"])
    return rest(request)


def hold_blocking(request: HttpRequest) -> HttpResponse:
    common.until_let_go_blocking(request.META["QUERY_STRING"])
    return rest(request)


def _as_coroutine(view: Callable[..., HttpResponse]) -> Any:
    async def wrapped(request: HttpRequest, **parts: str) -> HttpResponse:
        return view(request, **parts)

    return wrapped


def _routes(*, is_async: bool) -> list[Any]:
    colour = _as_coroutine if is_async else lambda view: view
    other = (lambda view: view) if is_async else _as_coroutine
    both = {
        "items/<number>": items,
        "boom": boom,
        "big": big,
        "numbers": numbers,
        "note": note,
        "late": late,
        "ignore": ignore,
        "empty": empty,
    }
    found = [path(route, colour(view)) for route, view in both.items()]
    found += [path("mine", mine), path("pieces", pieces), path("sync", other(rest))]
    views = (half, stream, paced, thread, slow, hold)
    blocking = (half_blocking, stream_blocking, paced_blocking, thread_blocking, slow_blocking, hold_blocking)
    found += [path(view.__name__.removesuffix("_blocking"), view) for view in (views if is_async else blocking)]
    return [*found, re_path(r"^(?s:.*)$", colour(rest))]


urlpatterns: list[Any] = []
