"""How does a script that is written for requests get the mesh? One line of it changes. The service that it asks is in this file too.

meshlib dev                                            # in a first terminal; it prints what the others export
meshlib serve "example:orders()" --service orders
MESHLIB_SERVICE=reports python example.py              # three items, a report, and what the mesh did about it
"""

from typing import Any

import meshlib_requests
import requests

import meshlib


def orders() -> Any:
    """The service: a WSGI application of nothing but the standard library."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        peer = meshlib.peer()
        if environ["REQUEST_METHOD"] == "POST":
            text = f"{environ['wsgi.input'].read(int(environ['CONTENT_LENGTH'])).decode()} read by orders"
        else:
            text = f"item {environ['PATH_INFO'].rsplit('/', 1)[-1]} for {peer.service if peer else 'nobody'}"
        start_response("200 OK", [("content-type", "text/plain; charset=utf-8")])
        return [text.encode()]

    return app


def report(http: requests.Session) -> list[str]:
    """What a team has had for years. It knows nothing of the mesh."""
    lines = [http.get(f"http://orders/items/{item}", timeout=(1, 5)).text for item in (1, 2, 3)]
    answer = http.post("http://orders/audits", data=f"{len(lines)} lines")
    answer.raise_for_status()
    return [*lines, answer.text]


def main() -> None:
    mesh = meshlib.Mesh.load()
    with meshlib_requests.session(mesh) as http:  # was: requests.Session()
        print("\n".join(report(http)))
        call = meshlib_requests.call_of(http.get("http://orders/items/4"))
        print(call.explain() if call else "")


if __name__ == "__main__":
    main()
