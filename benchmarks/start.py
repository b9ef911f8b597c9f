"""What does `import meshlib` add to a process that uses httpx and grpc anyway?

Each measurement is an interpreter of its own, so that nothing is warm but the file system. `meshlib` is the import on top of httpx and
grpc, `bare` is those two. Heavy packages of the mesh (pydantic, cryptography) come with the first `Mesh.load`, which is not measured here.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from .harness import Comparison, Results, Run, in_process
from .peers import Peers

PRIMARY = "ms"
HAS_RATIOS = False
WANTED = 150.0

CODE = (
    "import time; a = time.perf_counter(); import httpx, grpc; b = time.perf_counter(); import meshlib; c = time.perf_counter(); "
    "import threading; assert threading.active_count() == 1; print((b - a) * 1000, (c - b) * 1000)"
)


def runs(peers: Peers) -> list[Run]:
    return [Run("import", mode, in_process("benchmarks.start:work", mode=mode)) for mode in ("meshlib", "bare")]


def compared(results: Results) -> list[Comparison]:
    return []


def work(mode: str, *, seconds: float) -> dict[str, float]:
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not took:
        out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
        took.append(float(out[mode == "meshlib"]))
    return {"ms": statistics.median(took)}
