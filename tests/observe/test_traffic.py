"""Is what was called written down, once, within bounds, and without what is nobody's to read?"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from meshlib._native import core
from meshlib.observe import traffic
from meshlib.observe.traffic import Recorder, read, templated
from tests.support import mesh_of, server_plan, server_rule

WEB = "spiffe://shop.internal/ns/default/sa/web"
JOBS = "spiffe://shop.internal/ns/default/sa/jobs"
ISSUER = "https://login.example/tenant"


def seen(peer: str = WEB, method: str = "GET", path: str = "/orders", count: int = 1, **more: Any) -> dict[str, Any]:
    """A row as the gate gives it."""
    plain = {"peer": peer, "method": method, "path": path, "route": "", "principal": "", "protocol": "http", "verdict": "allow"}
    return {**plain, "count": count, **more}


class Clock:
    now = 1_778_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(tmp_path: Path, clock: Clock) -> Recorder:
    return Recorder(tmp_path / "traffic", "orders", wall=clock)


def counts(folder: Path, **options: Any) -> dict[tuple[str, str, str, str], int]:
    """What the folder holds: by peer, method, path and verdict."""
    rows = read([folder], **options).rows
    return {(row.kind.peer, row.kind.method, row.kind.path, row.kind.verdict): row.count for row in rows}


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/items/7", "/items/{id}"),
        ("/items/0042", "/items/{id}"),
        ("/items/123e4567-e89b-12d3-a456-426614174000", "/items/{id}"),
        ("/blobs/DEADBEEF01", "/blobs/{id}"),
        ("/items/7/lines/8", "/items/{id}/lines/{id2}"),
        ("/7", "/{id}"),
        ("/items/7/", "/items/{id}/"),
    ],
)
def test_names_of_single_things_become_variables(path: str, template: str) -> None:
    """Numbers, UUIDs, and hex of eight digits or more."""
    assert templated(path) == (template, True)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "*",
        "/orders",
        "/v1/orders",
        "/items/7a",
        "/defaced",
        "/fabaceae",
        "/beef1",
        "/items/-7",
        "/items/7.5",
        "/a{b}/7",
        "/items/٧",
    ],
)
def test_words_stay_as_they_are(path: str) -> None:
    """A version, a word of the letters a to f, a number of another script; and braces that came with the path."""
    assert templated(path) == (path, False)


# ---------------------------------------------------------------- writing


def test_calls_are_added_up_and_written_as_lines(recorder: Recorder, clock: Clock, tmp_path: Path) -> None:
    """Of one kind there is one row, with its first and last time; a file that only we can read, in a folder that only we can."""
    recorder.take([seen(path="/items/7"), seen(path="/items/8", count=3)], 0, "enforce")
    recorder.flush()
    clock.now += 60
    recorder.take([seen(path="/items/9")], 0, "enforce")
    recorder.flush()
    (file,) = recorder.folder.iterdir()
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert (head["version"], head["service"], head["pid"]) == (1, "orders", os.getpid())
    plain = {"peer": WEB, "method": "GET", "template": "/items/{id}", "protocol": "http", "verdict": "allow", "issuer": ""}
    assert lines == [
        {**plain, "count": 4, "first": clock.now - 60, "last": clock.now - 60},
        {**plain, "count": 5, "first": clock.now - 60, "last": clock.now},
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (recorder.folder, file)] == [0o700, 0o600]
    assert counts(recorder.folder) == {(WEB, "GET", "/items/{id}", "allow"): 5}


def test_nothing_is_written_where_nothing_came(recorder: Recorder) -> None:
    """No folder, no file, no line."""
    recorder.flush()
    recorder.take([], 0, "enforce")
    recorder.flush()
    assert not recorder.folder.exists()
    recorder.take([seen()], 0, "enforce")
    recorder.flush()
    (file,) = recorder.folder.iterdir()
    size = file.stat().st_size
    recorder.flush()
    assert file.stat().st_size == size


@pytest.mark.parametrize(
    ("mode", "peer", "verdict", "expected"),
    [
        ("enforce", WEB, "allow", "allow"),
        ("enforce", WEB, "deny", "deny"),
        ("enforce", "", "allow", "deny"),
        ("permissive", WEB, "deny", "would_deny"),
        ("permissive", "", "allow", "allow"),
        ("observe", "", "deny", "would_deny"),
    ],
)
def test_a_verdict_says_what_became_of_the_call(recorder: Recorder, mode: str, peer: str, verdict: str, expected: str) -> None:
    """What the rules said, and whether the mode went by it."""
    recorder.take([seen(peer, verdict=verdict)], 0, mode)
    recorder.flush()
    assert counts(recorder.folder) == {(peer, "GET", "/orders", expected): 1}


def test_routes_give_their_template_and_methods_of_grpc_stay(recorder: Recorder) -> None:
    """A route without variables says nothing about the path."""
    rows = [
        seen(path="/items/blue", route="/items/{colour}"),
        seen(path="/shop/7", route="/shop"),
        seen(path="/pkg.Svc/Get00000000", route="/{x}/{y}", method="POST", protocol="grpc"),
    ]
    recorder.take(rows, 0, "enforce")
    recorder.flush()
    found = {(row.kind.path, row.kind.is_template, row.kind.protocol) for row in read([recorder.folder]).rows}
    assert found == {("/items/{colour}", True, "http"), ("/shop/{id}", True, "http"), ("/pkg.Svc/Get00000000", False, "grpc")}


def test_of_a_token_only_the_issuer_is_kept(tmp_path: Path) -> None:
    """Who the person is isn't in the file; an issuer that isn't configured isn't either."""
    recorder = Recorder(tmp_path, "orders", issuers=["https://login.example", ISSUER])
    principals = [
        f"{ISSUER}/alice",
        f"{ISSUER}/bob/x",
        "https://login.example/carol",
        "https://other.example/dave",
        f"{ISSUER}x/eve",
        "",
    ]
    recorder.take([seen(principal=principal) for principal in principals], 0, "enforce")
    recorder.flush()
    assert {(row.kind.issuer, row.count) for row in read([tmp_path]).rows} == {
        (ISSUER, 2),
        ("https://login.example", 2),
        ("", 2),
    }
    text = "".join(file.read_text() for file in tmp_path.iterdir())
    assert not any(name in text for name in ("alice", "bob", "carol", "dave", "eve"))


def test_a_large_file_is_written_anew(tmp_path: Path) -> None:
    """With a line for each kind; nothing is lost or counted twice."""
    recorder = Recorder(tmp_path, "orders", largest=2000)
    sizes = []
    for number in range(100):
        recorder.take([seen(path=f"/{'abc'[number % 3]}")], 0, "enforce")
        recorder.flush()
        (file,) = tmp_path.iterdir()
        sizes.append(file.stat().st_size)
    assert max(sizes) < 3000
    assert sum(counts(tmp_path).values()) == 100


def test_kinds_have_a_bound_and_what_is_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recorder, and by the gate before it."""
    monkeypatch.setattr(traffic, "MOST_KINDS", 3)
    recorder = Recorder(tmp_path, "orders")
    recorder.take([seen(path=f"/{letter}", count=2) for letter in "abcde"], 7, "enforce")
    recorder.flush()
    record = read([tmp_path])
    assert (len(record.rows), record.lost) == (3, 11)
    recorder.take([seen(path="/f")], 0, "enforce")
    recorder.flush()
    assert read([tmp_path]).lost == 12


def test_a_folder_that_cant_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Told once; when it can be written again, everything is there."""
    (tmp_path / "traffic").write_text("in the way")
    recorder = Recorder(tmp_path / "traffic", "orders")
    for _ in range(3):
        recorder.take([seen()], 0, "enforce")
        recorder.flush()
    assert len(caplog.records) == 1 and "can't be written" in caplog.text and recorder.error
    (tmp_path / "traffic").unlink()
    recorder.flush()
    assert (recorder.error, counts(tmp_path / "traffic")) == ("", {(WEB, "GET", "/orders", "allow"): 3})


def test_a_file_that_was_tidied_away_is_written_again(recorder: Recorder) -> None:
    """Whole, with what was counted before."""
    recorder.take([seen()], 0, "enforce")
    recorder.flush()
    (file,) = recorder.folder.iterdir()
    file.unlink()
    recorder.take([seen(path="/new")], 0, "enforce")
    recorder.flush()
    recorder.flush()
    assert set(counts(recorder.folder).values()) == {1}
    assert len(counts(recorder.folder)) == 2


def test_the_oldest_files_of_a_service_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of others stay."""
    monkeypatch.setattr(traffic, "MOST_FILES", 3)
    Recorder(tmp_path, "web").take([], 0, "enforce")
    other = Recorder(tmp_path, "order")
    other.take([seen()], 0, "enforce")
    other.flush()
    for number in range(5):
        recorder = Recorder(tmp_path, "orders")
        recorder.take([seen(path=f"/{'abcde'[number]}")], 0, "enforce")
        recorder.flush()
    assert {path for _, _, path, _ in counts(tmp_path)} == {"/orders", "/c", "/d", "/e"}


def test_a_link_in_the_folder_is_not_followed(recorder: Recorder, tmp_path: Path) -> None:
    """Who can write there leads us nowhere else."""
    recorder.take([seen()], 0, "enforce")
    recorder.flush()
    (file,) = recorder.folder.iterdir()
    target = tmp_path / "precious"
    target.write_text("mine")
    file.unlink()
    file.symlink_to(target)
    recorder.take([seen()], 0, "enforce")
    recorder.flush()
    assert target.read_text() == "mine"


def test_a_forked_child_has_a_file_of_its_own(recorder: Recorder) -> None:
    """And begins at zero: what the parent saw is in the parent's."""
    recorder.take([seen(count=5)], 0, "enforce")
    recorder.flush()
    child = os.fork()
    if child == 0:
        recorder.take([seen(path="/child")], 0, "enforce")
        recorder.flush()
        os._exit(0)
    os.waitpid(child, 0)
    assert counts(recorder.folder) == {(WEB, "GET", "/orders", "allow"): 5, (WEB, "GET", "/child", "allow"): 1}
    assert len(list(recorder.folder.iterdir())) == 2


# ---------------------------------------------------------------- reading


def test_processes_and_folders_are_added_up(tmp_path: Path, clock: Clock) -> None:
    """In an order that depends on nothing but what they hold."""
    for folder, count in (("a", 2), ("b", 3), ("b", 4)):
        recorder = Recorder(tmp_path / folder, "orders", wall=clock)
        recorder.take([seen(count=count), seen(JOBS, "POST")], 0, "enforce")
        recorder.flush()
        clock.now += 100
    record = read([tmp_path / "a", tmp_path / "b"])
    assert [(row.kind.peer, row.count, row.last - row.first) for row in record.rows] == [(JOBS, 3, 200.0), (WEB, 9, 200.0)]
    assert record.files == 3
    assert read([tmp_path / "b", tmp_path / "a"]).rows == record.rows


def test_what_was_last_seen_long_ago_can_be_left_out(recorder: Recorder, clock: Clock) -> None:
    """By when it was last seen."""
    recorder.take([seen(path="/old")], 0, "enforce")
    clock.now += 100
    recorder.take([seen(path="/new")], 0, "enforce")
    recorder.flush()
    assert [path for _, _, path, _ in counts(recorder.folder, since=clock.now - 50)] == ["/new"]


def test_a_line_that_was_torn_loses_nothing_else(recorder: Recorder) -> None:
    """A crash cuts the last line; a full disk one in the middle."""
    for path in ("/a", "/b"):
        recorder.take([seen(path=path)], 0, "enforce")
        recorder.flush()
    (file,) = recorder.folder.iterdir()
    whole = file.read_bytes()
    torn = json.dumps({"peer": WEB}).encode()
    file.write_bytes(whole + whole.splitlines()[-1][:40])
    assert len(counts(recorder.folder)) == 2
    head, first, second = whole.splitlines()
    file.write_bytes(b"\n".join([head, first[:30], torn, b"[]", b"null", second, b""]))
    assert [path for _, _, path, _ in counts(recorder.folder)] == ["/b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "doesn't begin"),
        ("{}\n", "doesn't begin"),
        ('{"version": 9, "service": "x"}\n', "version 9"),
        ("\x00\xff\n", "doesn't begin"),
    ],
)
def test_a_file_that_is_no_record_is_left_out_and_told(recorder: Recorder, content: str, words: str) -> None:
    """The others count."""
    recorder.take([seen()], 0, "enforce")
    recorder.flush()
    (recorder.folder / "zzz.jsonl").write_text(content)
    (recorder.folder / "notes.txt").write_text("not looked at")
    record = read([recorder.folder])
    assert (len(record.rows), len(record.flaws)) == (1, 1)
    assert words in record.flaws[0] and "zzz.jsonl" in record.flaws[0]


# ---------------------------------------------------------------- with the gate


def test_what_the_gate_records_has_no_query_header_or_body(tmp_path: Path) -> None:
    """Only caller, method, path and verdict come through, and only where the plan says `record`."""
    gate = core.Gate()
    routes = [{"name": "items", "path": {"kind": "template", "value": "/items/{item}"}, "on_disconnect": "calls"}]
    recorder = Recorder(tmp_path, "orders")
    for is_on in (False, True):
        gate.publish(server_plan(server_rule("a", callers=[{"kind": "any"}]), record=is_on, routes=routes), 0.0)
        headers = [(b"host", b"orders"), (b"authorization", b"Bearer s3cret"), (b"cookie", b"s3cret")]
        gate.begin("GET", b"/items/s3cret?token=s3cret", headers, WEB, True, 0.0).finish(200, 0.0)
        rows, lost = gate.traffic()
        recorder.take(rows, lost, "enforce")
        assert (len(rows), lost) == (int(is_on), 0)
    recorder.flush()
    assert counts(tmp_path) == {(WEB, "GET", "/items/{item}", "allow"): 1}
    assert "s3cret" not in "".join(file.read_text() for file in tmp_path.iterdir())


def test_a_mesh_writes_down_what_was_called_at_the_latest_when_it_closes(tmp_path: Path) -> None:
    """Into the folder of the configuration, beside mesh.yaml by default."""
    secure = {"mode": "observe", "trust_domain": "shop.internal", "record": True}
    with mesh_of(tmp_path, {}, secure=secure) as mesh:
        mesh.gate.begin("GET", b"/hello", [(b"host", b"me")], "", False, 0.0).finish(200, 0.0)
    assert counts(tmp_path / ".meshlib" / "traffic") == {("", "GET", "/hello", "would_deny"): 1}
