"""Is a session on the mesh a session of requests? Everything that requests documents, beside plain requests, from the same server."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import meshlib_requests
import pytest
import requests
from requests.auth import HTTPDigestAuth

from integrations.requests.tests.common import APP
from tests.support import (
    PYTHON,
    free_port,
    mesh_of,
    process,
    wait_until_listening,
)


@pytest.fixture(scope="module")
def uvicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "app.py").write_text(APP)
    port = free_port()
    command = (PYTHON, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning")
    with process(*command, cwd=folder) as child:
        wait_until_listening(port, child)
        yield port


@pytest.fixture
def both(uvicorn: int, tmp_path: Path) -> Iterator[Callable[[Callable[[requests.Session, str], Any]], tuple[Any, Any]]]:
    """Do something with a plain session and with one of the mesh, and give both results."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [f"127.0.0.1:{uvicorn}"]}}}) as mesh:
        plain, ours = requests.Session(), meshlib_requests.session(mesh)
        plain.trust_env = ours.trust_env = False
        with plain, ours:
            yield lambda do: (do(plain, f"http://127.0.0.1:{uvicorn}"), do(ours, "http://orders"))


def seen(answer: requests.Response, base: str) -> dict[str, Any]:
    """All that requests documents of a response, with the host's name taken out."""
    headers = {name.lower(): value for name, value in answer.headers.items() if name.lower() != "date"}
    return {
        "status": answer.status_code,
        "ok": answer.ok,
        "reason": answer.reason,
        "headers": headers,
        "content": answer.content,
        "text": answer.text,
        "encoding": answer.encoding,
        "apparent": answer.apparent_encoding,
        "url": answer.url.removeprefix(base),
        "history": [(old.status_code, old.url.removeprefix(base), old.content) for old in answer.history],
        "cookies": sorted((c.name, c.value, c.path) for c in answer.cookies),
        "links": answer.links,
        "redirect": (
            answer.is_redirect,
            answer.is_permanent_redirect,
            answer.next and (answer.next.url or "").removeprefix(base),
        ),
        "sent": (answer.request.method, answer.request.path_url, answer.request.body),
        "iterated": b"".join(answer.iter_content(100)),
        "lines": list(answer.iter_lines()),
        "repr": repr(answer),
        "elapsed": answer.elapsed.total_seconds() > 0,
        "version": answer.raw.version,
        # What holds a lock, as a digest does, can't be pickled.
        "restored": None if "digest" in answer.url else pickle.loads(pickle.dumps(answer)).content,
    }


REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/items/7", {}),
    ("GET", "/items/7?a=1", {"params": {"q": ["x y", "ü"], "none": None}, "headers": {"X-Mine": "grün", "Accept": "text/plain"}}),
    ("GET", "/odd/%2F%7e;p=1/[x]|{y}'\"?z=%5B^`", {}),
    ("GET", "/a/../b/./c", {}),
    ("HEAD", "/big", {}),
    ("OPTIONS", "/items", {}),
    ("DELETE", "/items/7", {}),
    ("POST", "/items", {}),
    ("POST", "/items", {"json": {"n": [1, 2, None]}}),
    ("POST", "/items", {"data": {"a": "ü", "b": ["1", "2"]}}),
    ("POST", "/items", {"data": "text ü"}),
    ("PUT", "/items", {"data": b"\x00" * 200_000}),
    ("PATCH", "/items", {"data": b"patch", "headers": {"content-type": "x/y"}}),
    ("POST", "/items", {"data": bytearray(b"bytes")}),
    ("GET", "/status/404", {}),
    ("GET", "/status/503", {}),
    ("GET", "/nothing", {}),
    ("GET", "/packed/gzip", {}),
    ("GET", "/packed/deflate", {}),
    ("GET", "/chunks", {}),
    ("GET", "/big", {}),
    ("GET", "/typed/latin-1", {}),
    ("GET", "/typed/utf-16", {}),
    ("GET", "/cookies", {"cookies": {"mine": "1"}}),
    ("GET", "/cookies", {"allow_redirects": False}),
    ("GET", "/go/301?to=/items", {}),
    ("POST", "/go/302?to=/items", {"data": "x"}),
    ("POST", "/go/303?to=/items", {"data": "x"}),
    ("PUT", "/go/307?to=/go/308?to=/items", {"data": b"x" * 1000}),
    ("HEAD", "/go/302?to=/items", {"allow_redirects": True}),
    ("GET", "/items", {"auth": ("me", "secret")}),
    ("GET", "/digest", {"auth": HTTPDigestAuth("me", "secret")}),
    ("GET", "/items", {"timeout": (2, 20)}),
]


@pytest.mark.parametrize(("method", "path", "options"), REQUESTS, ids=lambda value: str(value)[:50])
def test_a_response_is_what_plain_requests_gives(both: Any, method: str, path: str, options: dict[str, Any]) -> None:
    """Every documented attribute, from the same server."""
    plain, ours = both(lambda http, base: seen(http.request(method, base + path, **options), base))
    # A digest is made of the time.
    if path != "/digest":
        assert ours == plain
    assert (ours["status"], ours["content"]) == (plain["status"], plain["content"])


def test_uploads_arrive_whole_however_they_are_given(both: Any, tmp_path: Path) -> None:
    """Generators (chunked), open files (with their length), text files, and forms with files."""
    (tmp_path / "file.bin").write_bytes(b"\xff" * 300_000)
    (tmp_path / "file.txt").write_text("some text")

    def do(http: requests.Session, base: str) -> list[Any]:
        with (tmp_path / "file.bin").open("rb") as file, (tmp_path / "file.txt").open("rb") as text:
            return [
                http.post(base + "/x", data=(piece for piece in [b"one", b"", b"two" * 50_000])).json(),
                http.post(base + "/x", data=iter(["text", "pieces"])).json(),
                http.put(base + "/x", data=file).json(),
                http.put(base + "/x", data=io.BytesIO(b"in memory")).json(),
                http.post(base + "/form", files={"f": ("n.txt", text, "text/x")}, data={"k": "v"}).text,
                http.put(base + "/go/307?to=/x", data=io.BytesIO(b"twice")).json(),
            ]

    plain, ours = both(do)
    assert ours == plain
    assert [found["size"] for found in (*ours[:4], ours[5])] == [150_003, 10, 300_000, 9, 5]


def test_cookies_of_the_session_come_back(both: Any) -> None:
    """Set by two headers of one answer, kept in the session's jar, and sent where they belong."""

    def do(http: requests.Session, base: str) -> Any:
        http.get(base + "/cookies")
        sent = [dict(http.get(base + path).json()["headers"]).get("cookie", "") for path in ("/echo", "/else")]
        return sorted(c.name for c in http.cookies), [sorted(line.split("; ")) for line in sent]

    plain, ours = both(do)
    assert ours == plain == (["a", "b"], [["a=1", 'b="two words"'], ["a=1"]])


def test_a_body_can_be_read_as_it_comes(both: Any) -> None:
    """`iter_content`, `iter_lines` and `raw` of a streamed answer; what is left unread is given up with the connection."""

    def do(http: requests.Session, base: str) -> list[Any]:
        found: list[Any] = []
        with http.get(base + "/big", stream=True) as answer:
            found.append([len(piece) for piece in answer.iter_content(300_000)])
        with http.get(base + "/big", stream=True) as answer:
            found += [answer.raw.read(10), answer.raw.tell(), answer.raw.headers["content-length"], answer.raw.closed]
        found.append(answer.raw.closed)
        with http.get(base + "/chunks", stream=True) as answer:
            found.append([line for line in answer.iter_lines(chunk_size=4) if line])
        with http.get(base + "/chunks", stream=True) as answer:
            found.append("".join(answer.iter_content(None, decode_unicode=True)))
        with http.get(base + "/packed/gzip", stream=True) as answer:
            found.append(b"".join(answer.iter_content(7)))
            with pytest.raises(requests.exceptions.StreamConsumedError):
                answer.iter_content(7)
        with http.get(base + "/packed/gzip", stream=True) as answer:
            found.append(answer.raw.read(6, decode_content=True))
        with http.get(base + "/packed/gzip", stream=True) as answer:
            found.append(len(answer.raw.read()))
        with http.get(base + "/packed/broken", stream=True) as answer, pytest.raises(requests.exceptions.ContentDecodingError):
            _ = answer.content
        with http.get(base + "/big", stream=True) as answer:
            found.append(len(answer.raw.data))
        with http.get(base + "/status/404", stream=True) as answer, pytest.raises(requests.HTTPError) as caught:
            answer.raise_for_status()
        assert caught.value.response is answer
        return [*found, [line for line in http.get(base + "/chunks", stream=True).raw]]

    plain, ours = both(do)
    assert ours == plain


def test_hooks_see_the_response_and_may_replace_it(both: Any) -> None:
    """Those of the session and those of the call; and an adapter can be asked from within."""

    def do(http: requests.Session, base: str) -> Any:
        names: list[str] = []
        http.hooks["response"].append(lambda answer, **_: names.append(answer.reason))
        http.get(base + "/status/418")

        def another(answer: requests.Response, **options: Any) -> requests.Response:
            return answer.connection.send(http.prepare_request(requests.Request("GET", base + "/status/201")), **options)

        return names, http.get(base + "/status/418", hooks={"response": another}).status_code

    plain, ours = both(do)
    assert ours == plain == (["I'm a Teapot"], 201)


def test_bad_timeouts_are_told_in_the_same_words(both: Any) -> None:
    """Three values, or nothing to wait for."""

    def do(http: requests.Session, base: str) -> list[str]:
        texts = []
        for timeout in ((1, 2, 3), 0, "soon", (1, -1)):
            with pytest.raises(ValueError, match="[Tt]imeout") as caught:
                http.get(base, timeout=timeout)  # type: ignore[arg-type]
            texts.append(str(caught.value))
        return texts

    plain, ours = both(do)
    assert ours == plain
