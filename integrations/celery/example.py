"""How does a worker know who sent a task, and how do its own calls go through the mesh? Three services in one file.

redis-server --port 6379                                                        # any broker of Celery's, somewhere
meshlib dev                                            # in a first terminal; it prints what the others export
meshlib serve "example:prices" --service prices
MESHLIB_SERVICE=worker celery -A example worker
MESHLIB_SERVICE=shop python example.py                 # sends; as another service (MESHLIB_SERVICE=visitor) it is refused
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import meshlib_celery
from celery import Celery
from meshlib_celery import sender, sender_required

import meshlib

mesh = meshlib.Mesh.load()  # mesh.yaml, and MESHLIB_SERVICE says who this process is
meshlib_celery.install(mesh)
http = mesh.sync_client()  # an httpx.Client; each process of the pool has connections of its own

broker = os.environ.get("BROKER", "redis://127.0.0.1:6379/0")
app = Celery("example", broker=broker, backend=broker)


@app.task
@sender_required("shop")
def charge(item: int) -> dict[str, Any]:
    price = http.get(f"http://prices/{item}").json()
    return {"item": item, "charged": price["price"], "for": sender().service}


def prices(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("content-type", "application/json")])
    return [json.dumps({"price": 5 + int(environ["PATH_INFO"].strip("/")), "for": meshlib.peer().service}).encode()]


if __name__ == "__main__":
    print(charge.delay(7).get(timeout=20))
