"""How does a Django service know who calls, and what does it say when a call of its own fails? Two services in one file.

meshlib dev                                            # in a first terminal; it prints what the others export
meshlib serve "example:orders()" --service orders              # ASGI
meshlib serve "example:storefront()" --service storefront      # WSGI
curl http://127.0.0.1:8200/buy/7                       # asks orders; stop orders, and ask again

A project has its settings, views and applications in files of their own; what is in them is the same.
"""

from functools import cache
from typing import Any

from django.conf import settings
from django.http import HttpRequest, JsonResponse
from django.urls import path
from meshlib_django import get_asgi_application, get_wsgi_application, mesh, peer_required

settings.configure(
    SECRET_KEY="only for this example, which signs nothing",
    ALLOWED_HOSTS=["orders", "storefront", "127.0.0.1", "localhost"],
    INSTALLED_APPS=["meshlib_django"],
    MIDDLEWARE=["meshlib_django.MeshMiddleware"],
    ROOT_URLCONF="example",
)


@peer_required
async def show(request: HttpRequest, item: int) -> JsonResponse:
    return JsonResponse({"item": item, "price": 5 + item, "for": request.peer.service})


def buy(request: HttpRequest, item: int) -> JsonResponse:
    answer = http().get(f"http://orders/items/{item}")
    return JsonResponse({"customer": request.peer.service if request.peer else "somebody", "order": answer.json()})


@cache
def http() -> Any:
    return mesh().sync_client()  # an httpx.Client


urlpatterns = [path("items/<int:item>", show), path("buy/<int:item>", buy)]


def orders() -> Any:
    return get_asgi_application()


def storefront() -> Any:
    return get_wsgi_application()
