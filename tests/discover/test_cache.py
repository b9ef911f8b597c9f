"""What a registry said last is kept for this user only, and taken only if nobody else could have written it."""

from __future__ import annotations

import json
import logging
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.discover import EndpointAddress
from meshlib.discover.cache import OLDEST, Cache

SOME = (
    EndpointAddress("10.0.0.1:80"),
    EndpointAddress("[fd00::1]:80", 2.5, "zone-b", {"version": "v2"}, "spiffe://shop.internal/ns/default/sa/x"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def cache(folder: Path, source: str = "consul (consul)", service: str = "orders") -> Cache:
    return Cache(folder, "shop", service, source)


def kept(folder: Path) -> Path:
    return folder / "shop.orders.json"


def test_what_is_kept_comes_back_with_its_age(folder: Path) -> None:
    """All that is known of an endpoint; in a folder and a file for this user alone."""
    assert cache(folder).write(SOME, 7.0)
    found = cache(folder).read()
    assert found is not None
    assert (found[0], 7.0 <= found[1] < 30.0) == (SOME, True)
    assert (folder.stat().st_mode & 0o777, kept(folder).stat().st_mode & 0o777) == (0o700, 0o600)
    assert [each.name for each in folder.iterdir()] == ["shop.orders.json"]


def test_confirmation_makes_it_young_again(folder: Path) -> None:
    """Without writing all of it."""
    one = cache(folder)
    one.write(SOME, 500.0)
    assert one.confirm(3.0)
    found = one.read()
    assert found is not None
    assert found[1] < 60.0


def test_where_nothing_was_kept_there_is_nothing_and_no_noise(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first start ever."""
    assert cache(folder).read() is None
    assert caplog.records == []


def changed(**change: object) -> Callable[[Path], None]:
    def change_it(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return change_it


def as_link(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def as_old(file: Path) -> None:
    then = time.time() - OLDEST - 60.0
    os.utime(file, (then, then))


def in_an_open_folder(file: Path) -> None:
    file.parent.chmod(0o777)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_bytes(b"\xff\xfe\x00"),
        lambda file: file.write_text("[" * 100_000),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text(file.read_text()[:-8]),
        lambda file: file.chmod(0o666),
        changed(version=2),
        changed(service="stock"),
        changed(source="etcd (etcd)"),
        changed(endpoints=None),
        changed(endpoints=[["10.0.0.1:80"]]),
        changed(endpoints=[["10.0.0.1:80", "heavy", "", {}, ""]]),
        changed(endpoints=[["10.0.0.1:80", -1.0, "", {}, ""]]),
        changed(endpoints=[["10.0.0.1:80", 1.0, "", [], ""]]),
        changed(endpoints=[[1, 1.0, "", {}, ""]]),
        changed(endpoints=[["10.0.0.1:80", 1.0, "", {"a": 1}, ""]]),
        as_link,
        as_pipe,
        as_old,
        in_an_open_folder,
    ],
)
def test_what_is_not_of_our_making_is_left_alone(
    folder: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Broken, of others, linked, too old: not used, with one line that says so; and it can be written again."""
    cache(folder).write(SOME, 0.0)
    spoil(kept(folder))
    with caplog.at_level(logging.WARNING, logger="meshlib.discover"):
        assert cache(folder).read() is None
    assert [("is not used" in record.message, record.levelname) for record in caplog.records] == [(True, "WARNING")]
    folder.chmod(0o700)
    assert cache(folder).write(SOME, 0.0)
    found = cache(folder).read()
    assert found is not None
    assert found[0] == SOME
    assert not kept(folder).is_symlink()


def test_disk_that_takes_nothing_is_an_alarm_and_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R37: told once, counted, what was kept before stays whole, and its end is told."""
    one = cache(folder)
    one.write(SOME[:1], 0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.INFO, logger="meshlib.discover"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        try:
            results = [one.write(SOME, 0.0) for _ in range(3)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (results, one.failures) == ([False] * 3, 3)
        assert [each.name for each in folder.iterdir()] == ["shop.orders.json"]
        assert one.read() is not None
        assert one.write(SOME, 0.0)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_folder_that_can_not_be_made_is_an_alarm_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its place is taken by a file."""
    (tmp_path / "kept").write_text("")
    one = cache(tmp_path / "kept")
    assert one.read() is None
    assert not one.write(SOME, 0.0)
    assert (one.failures, caplog.records[-1].levelname) == (1, "ERROR")


def test_processes_that_share_a_folder_never_see_half_a_file(folder: Path) -> None:
    """A reader among writers finds one or the other."""
    many = tuple(EndpointAddress(f"10.0.{n >> 8}.{n & 255}:80") for n in range(2000))
    cache(folder).write(SOME, 0.0)
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            cache(folder).write(many, 0.0)
            cache(folder).write(SOME, 0.0)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            found = cache(folder).read()
            assert found is not None
            assert found[0] in (SOME, many)
    finally:
        is_over.set()
        for writer in writers:
            writer.join()
