"""How does wrk ask, and what does it say?

wrk asks on so many connections at once, each again as soon as it has its answer (a closed loop), from all cores but the last, which is the
server's where there are several. It counts whole seconds. An answer that failed is told, and nobody's figures hold then.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Final

from .machine import cores
from .peers import Broken, Peers, program

_SCRIPT: Final = """
done = function(summary, latency, requests)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
  io.write(string.format('\\nRESULT {"calls":%d,"us":%d,"failed":%d,"p50":%f,"p99":%f}\\n',
    summary.requests, summary.duration, failed, latency:percentile(50), latency:percentile(99)))
end
"""


def load(peers: Peers, url: str, connections: int, seconds: float, options: Sequence[str] = ()) -> dict[str, float]:
    """`calls`, `failed`, `us` (how long it took), `p50` and `p99` in microseconds. Raises Absent or Broken."""
    wrk = program("wrk", "Debian: wrk")
    script = peers.folder / "wrk.lua"
    script.write_text(_SCRIPT)
    whole = max(1, round(seconds))
    command = [wrk, "-t1", f"-c{connections}", f"-d{whole}s", "--latency", "-s", str(script), *options, url]
    own = cores()
    beside = set(own[:-1] or own)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=whole + 30,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, beside),  # nothing but this in the child
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise Broken(f"wrk: {(done.stderr or done.stdout)[-500:]}")
    made: dict[str, float] = json.loads(found[0].removeprefix("RESULT "))
    return made
