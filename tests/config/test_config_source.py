"""Can a configuration live in a registry, and does a process start while that is down?"""

from __future__ import annotations

import argparse
import asyncio
import logging
import stat
import threading
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import meshlib
from meshlib.cli import main, suggest
from meshlib.config import load, source
from meshlib.errors import ConfigError, MeshError

URL = "shelf://user:geheim@127.0.0.1:1/shop/mesh.yaml"
DOCUMENT = b"mesh: shop\nsecure: {mode: observe}\nservices: {orders: {discover: {static: ['127.0.0.1:%d']}}}\n"


class Shelf:
    """A source in memory, which can be away."""

    content = DOCUMENT % 1
    error: OSError | None = None
    turned = threading.Event()
    opened: list[str] = []
    waiting = 0

    def __init__(self, url: str) -> None:
        self.opened.append(url)

    def read(self) -> bytes:
        if self.error is not None:
            raise self.error
        return self.content

    async def changed(self) -> None:
        Shelf.waiting += 1
        try:
            while not Shelf.turned.is_set():
                await asyncio.sleep(0.01)
        finally:
            Shelf.waiting -= 1
        Shelf.turned.clear()
        if self.error is not None:
            raise self.error


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Shelf]:
    """A fresh shelf, offered as a package would, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("content", DOCUMENT % 1),
        ("read", Shelf.read),
        ("error", None),
        ("turned", threading.Event()),
        ("opened", []),
        ("waiting", 0),
    ):
        monkeypatch.setattr(Shelf, name, value)

    def entry_points(*, group: str, name: str) -> list[EntryPoint]:
        made = EntryPoint("shelf", f"{__name__}:Shelf", source.GROUP)
        monkeypatch.setattr(EntryPoint, "load", lambda self: Shelf)
        return [made] if (group, name) == (source.GROUP, "shelf") else []

    monkeypatch.setattr("meshlib.config.plugin.entry_points", entry_points)
    monkeypatch.setattr(source, "_unkept", set(), raising=False)
    return Shelf


def kept() -> list[Path]:
    return list(Path(".meshlib/config").glob("*.yaml"))


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_document_is_read_from_its_source_and_kept_for_this_user_only(shelf: type[Shelf]) -> None:
    """As a file would be; a copy is there for the day on which the source is down."""
    config = load(URL)
    assert (config.service, config.url, shelf.opened, kept()) == ("orders", URL, [URL], [])
    meshlib.Mesh(config)
    (copy,) = kept()
    assert (copy.read_bytes(), stat.S_IMODE(copy.stat().st_mode)) == (shelf.content, 0o600)


def test_last_good_document_is_used_while_the_source_is_down(shelf: type[Shelf], caplog: pytest.LogCaptureFixture) -> None:
    """And its age is told, without the password of the URL."""
    meshlib.Mesh.load(URL)
    shelf.error = ConnectionRefusedError(111, "Connection refused")
    with caplog.at_level(logging.WARNING):
        assert load(URL).name == "shop"
    assert "its last good one is used" in caplog.text
    assert "geheim" not in caplog.text


def test_source_that_is_down_at_the_first_start_is_an_error(shelf: type[Shelf]) -> None:
    """Nothing was kept: what to do stands in the hint."""
    shelf.error = TimeoutError("timed out")
    with pytest.raises(ConfigError, match="can't be read: timed out") as caught:
        load(URL)
    assert "geheim" not in str(caught.value)


def test_copy_that_others_may_change_is_not_used(shelf: type[Shelf]) -> None:
    """Whoever can write it would be the operator."""
    meshlib.Mesh.load(URL)
    kept()[0].chmod(0o666)
    shelf.error = OSError("away")
    with pytest.raises(ConfigError, match="can't be read"):
        load(URL)


def test_mistakes_are_told_with_the_sources_name_and_are_not_kept(shelf: type[Shelf]) -> None:
    """The place is the URL, the line is the document's."""
    shelf.content = b"mesh: shop\nsecure: {mode: observ}\nservices: {orders: {}}\n"
    with pytest.raises(ConfigError) as caught:
        load(URL)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, kept()) == ("shelf://127.0.0.1:1/shop/mesh.yaml", 2, [])


def test_place_of_a_document_is_its_url(
    shelf: type[Shelf], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is fine and the process is not, and when it comes into force: there is no file of its name in this folder."""
    monkeypatch.delenv("MESHLIB_SERVICE", raising=False)
    where = "shelf://127.0.0.1:1/shop/mesh.yaml"
    with pytest.raises(ConfigError) as caught:
        load(URL, service="oders")
    assert [(problem.file, problem.line) for problem in caught.value.problems] == [(where, 3)]
    with pytest.raises(ConfigError) as caught:
        load(URL, zone="a\nb")
    assert [problem.file for problem in caught.value.problems] == [where]
    mesh = meshlib.Mesh.load(URL)
    shelf.content = DOCUMENT % 2
    with caplog.at_level(logging.INFO, logger="meshlib"):
        assert mesh.reload()
    assert f"configuration {where} is in force" in caplog.messages
    assert (mesh.config.label, "geheim" in caplog.text) == (where, False)


def test_commands_read_a_document_where_it_is(shelf: type[Shelf], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`meshlib suggest` again for each service, and what `meshlib dev` starts: by the URL, as there is no file."""
    monkeypatch.setenv("MESHLIB_CONFIG", URL)
    monkeypatch.delenv("MESHLIB_DEV", raising=False)
    with pytest.raises(MeshError, match="no calls are recorded"):
        suggest.run(argparse.Namespace(config=None, folders=(), since=0.0, distinct=4))
    assert main(["dev", "--", "sh", "-c", 'printf %s "$MESHLIB_CONFIG" > told']) == 0
    assert (tmp_path / "told").read_text() == URL


def test_what_a_source_refuses_is_told_with_its_url(shelf: type[Shelf]) -> None:
    """A key that isn't there is a mistake like any other, in the form that editors and pipelines read."""

    def read(self: Shelf) -> bytes:
        raise ConfigError("the shelf has no such key.", hint="Put it there.")

    shelf.read = read  # type: ignore[method-assign]
    with pytest.raises(ConfigError) as caught:
        load(URL)
    assert str(caught.value) == "shelf://127.0.0.1:1/shop/mesh.yaml:1: (source): the shelf has no such key (Put it there)"


def test_document_that_can_not_be_kept_is_told_once(shelf: type[Shelf], caplog: pytest.LogCaptureFixture) -> None:
    """As a warning: nobody misses the copy before the day on which it is needed."""
    Path(".meshlib").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="meshlib.config"):
        mesh = meshlib.Mesh.load(URL)
        shelf.content = DOCUMENT % 2
        assert mesh.reload()
    (message,) = (record.getMessage() for record in caplog.records if record.name == "meshlib.config")
    assert "shelf://127.0.0.1:1/shop/mesh.yaml can't be kept" in message
    assert "will not start" in message
    assert "geheim" not in message
    caplog.clear()
    Path(".meshlib").unlink()
    with caplog.at_level(logging.WARNING, logger="meshlib.config"):
        shelf.content = DOCUMENT % 3
        assert mesh.reload()
        assert ("kept" in caplog.text, len(kept())) == (False, 1)


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        ("ectd", "did you mean 'etcd'? It comes with: pip install meshlib-etcd"),
        ("etcd+https", "pip install meshlib-etcd."),
        ("zoo", "pip install meshlib-zoo."),
        ("z.o", "Install the package that does."),
    ],
)
def test_unknown_scheme_names_the_package_to_install(scheme: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the likely cause; and for a mistyped word nobody is sent after a package of that name."""
    monkeypatch.setattr("meshlib.config.plugin.entry_points", lambda **_: ())
    with pytest.raises(ConfigError) as caught:
        load(f"{scheme}://127.0.0.1/x")
    (problem,) = caught.value.problems
    assert (problem.file, problem.message) == (f"{scheme}://127.0.0.1/x", f"no installed package provides {scheme!r}")
    assert told in problem.hint
    assert f"meshlib-{scheme}" not in problem.hint or scheme in ("etcd", "zoo")


def test_mesh_takes_a_document_that_changed_and_keeps_the_good_one(shelf: type[Shelf]) -> None:
    """As with a file: what can't be used changes nothing."""
    mesh = meshlib.Mesh.load(URL).start()
    try:
        shelf.content = DOCUMENT % 2
        shelf.turned.set()
        until(lambda: mesh.reloads == 1)
        assert [endpoint.address for endpoint in mesh.directory.endpoints("orders")] == ["127.0.0.1:2"]
        shelf.content = b"mesh: [\n"
        shelf.turned.set()
        until(lambda: mesh.reload_failures == 1)
        assert [endpoint.address for endpoint in mesh.directory.endpoints("orders")] == ["127.0.0.1:2"]
        shelf.error = OSError("away")
        shelf.turned.set()
        until(lambda: mesh._reload.source_failures == 1)
        shelf.error, shelf.content = None, DOCUMENT % 3
        until(lambda: shelf.turned.set() or mesh.reloads == 2)  # type: ignore[func-returns-value]
        assert shelf.opened == [URL]
    finally:
        mesh.close()


@pytest.mark.parametrize(
    "rest",
    [
        "secure: {mode: observe}\nregistries: {shelfless: {}}\nservices: {orders: {discover: shelfless}}\n",
        "secure: {mode: observe}\nservices: {orders: {discover: {file: list.yaml}}}\n",
        "secure: {mode: permissive, trust_domain: shop.internal, identity: {folder: nowhere}}\nservices: {orders: {}}\n",
    ],
)
def test_document_that_could_not_be_put_in_force_is_not_kept(shelf: type[Shelf], rest: str, tmp_path: Path) -> None:
    """It reads well, and what it needs isn't here: neither a start nor a reload replaces the last one that could be used."""
    (tmp_path / "list.yaml").write_text("{}")
    mesh = meshlib.Mesh.load(URL)
    shelf.content = b"mesh: shop\n" + rest.encode()
    load(URL)
    for attempt in (mesh.reload, lambda: meshlib.Mesh.load(URL)):
        with pytest.raises(MeshError):
            attempt()
    assert [copy.read_bytes() for copy in kept()] == [DOCUMENT % 1]
    shelf.error = OSError("away")
    assert len(meshlib.Mesh.load(URL).directory.endpoints("orders")) == 1


def test_document_that_could_not_be_taken_is_tried_again(
    shelf: type[Shelf], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it needs beside it may come about, and of that no source tells."""
    monkeypatch.setattr("meshlib.reload.RETRY", 0.2)
    mesh = meshlib.Mesh.load(URL).start()
    try:
        shelf.content = b"mesh: shop\nsecure: {mode: observe}\nservices: {orders: {discover: {file: orders.yaml}}}\n"
        (tmp_path / "orders.yaml").write_text("[")
        shelf.turned.set()
        until(lambda: mesh.reload_failures >= 1)
        (tmp_path / "orders.yaml").write_text("- 127.0.0.1:4\n")
        until(lambda: mesh.reloads == 1)
        assert [endpoint.address for endpoint in mesh.directory.endpoints("orders")] == ["127.0.0.1:4"]
    finally:
        mesh.close()


def test_closed_mesh_waits_for_no_document(shelf: type[Shelf]) -> None:
    """The wait is a task of the keeper's, with a connection; and a document that comes later is not taken."""
    mesh = meshlib.Mesh.load(URL).start()
    until(lambda: shelf.waiting == 1)
    mesh.close()
    until(lambda: shelf.waiting == 0, 3.0)
