"""Does the demo prove what it says, and could it fail?

It is run as a person runs it, only shorter: once as it is, once with the retries switched off, where calls must be
lost, and once with Ctrl-C in the middle. Each time nothing may be left: no process, no file. These tests use real
processes and real time, so their bounds are generous.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MARK = "MESHLIB_TEST_DEMO"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The demo, without a terminal, with its temporary files in `folder` and its processes marked by it."""
    return subprocess.Popen(
        [sys.executable, "-m", "examples.shop"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), MARK: str(folder), "DEMO_SECONDS": "5", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(demo: subprocess.Popen[str], folder: Path) -> tuple[int, str, dict[str, Any]]:
    """Exit status, everything printed with the last line first, and that line as JSON; nothing may be left."""
    printed, _ = demo.communicate(timeout=150)
    # How it ended stands in its last lines, and the beginning is what is left of a long message.
    text = "\n".join(["", *reversed(printed.splitlines())])
    assert list(folder.iterdir()) == [], text
    assert processes_of(folder) == [], text
    try:
        return demo.returncode, text, json.loads(text.split("\n", 2)[1])
    except (ValueError, IndexError):
        pytest.fail(f"the last line is no JSON:{text}")


def processes_of(folder: Path) -> list[str]:
    mark = f"{MARK}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone, or not ours
            continue
    return found


def test_no_call_of_the_mesh_is_lost_or_done_twice_while_a_process_is_killed(tmp_path: Path) -> None:
    """A killed process, a refused identity and a new root cost no call, and each of them is seen to have happened."""
    status, text, result = ended(start(tmp_path), tmp_path)
    assert {name: result[name] for name in ("failed", "duplicates", "lost")} == {
        "failed": 0,
        "duplicates": 0,
        "lost": 0,
    }, text
    assert status == 0, text
    assert result["mtls_share"] == 1.0
    assert min(result[name] for name in ("ejections", "rotations", "refused_as_intended", "retries", "peer_calls")) >= 1
    assert result["calls"] >= 500
    for told in ("+import meshlib", "SIGKILL", "newsletter-never-orders", "the old root leaves", "POST"):
        assert told in text


def test_by_a_node_agent_the_result_is_the_same(tmp_path: Path) -> None:
    """It issues the identities, makes the calls, and is restarted under them."""
    status, text, result = ended(start(tmp_path, DEMO_AGENT="1"), tmp_path)
    assert (status, result["failed"], result["lost"], result["duplicates"]) == (0, 0, 0, 0), text
    assert (result["mtls_share"], result["rotations"], result["ejections"] >= 1) == (1.0, 1, True), text
    # Two of three attempts at least: meanwhile it is away for some seconds.
    assert result["by_agent"] >= result["calls"], text


def test_with_retries_switched_off_calls_are_lost(tmp_path: Path) -> None:
    """The same demo with `retry: {attempts: 0}`: if this passed without a failure, the demo would prove nothing."""
    status, text, result = ended(start(tmp_path, DEMO_RETRY="0"), tmp_path)
    assert (status, result["retries"]) == (1, 0), text
    assert result["failed"] >= 1, text
    assert result["duplicates"] == 0, text


def test_interrupted_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C in the middle ends every process, removes every file, and still prints what was measured."""
    demo = start(tmp_path)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "SIGKILL" in line:
            break
    demo.send_signal(signal.SIGINT)
    begun = time.monotonic()
    status, _, result = ended(demo, tmp_path)
    assert (status, result["failed"]) == (1, 0)
    assert time.monotonic() - begun < 30


def test_orders_without_its_two_lines_is_a_whole_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo shows as "before" runs, and executes a key once."""
    from examples.shop.demo import two_lines, without_mesh

    source = (ROOT / "examples/shop/orders.py").read_text().splitlines()
    added = [line for line in two_lines(source) if line.startswith("+") and not line.startswith("+++")]
    assert len(added) == 2
    (tmp_path / "orders_before.py").write_text("\n".join(without_mesh(source)))
    monkeypatch.setenv("ORDERS_DATABASE", str(tmp_path / "orders.sqlite"))
    client = runpy.run_path(str(tmp_path / "orders_before.py"))["app"].test_client()
    answers = [client.post("/orders", json={"purchase": "p-1", "item": 7}, headers={"Idempotency-Key": "p-1"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].data == answers[1].data
