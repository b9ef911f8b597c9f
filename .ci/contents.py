"""Is in the wheel what belongs there, and nothing else? Python, the stub, one library; no Rust. And in the sdist the crates, once."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path


def main(folder: str) -> int:
    (wheel,) = Path(folder).glob("*.whl")
    (sdist,) = Path(folder).glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    allowed = (".py", ".pyi", "py.typed", ".abi3.so")
    odd = [n for n in names if not n.endswith(allowed) and ".dist-info/" not in n]
    libraries = [n for n in names if n.endswith(".so")]
    sources = tarfile.open(sdist).getnames()
    crates = [n for n in sources if n.endswith("/Cargo.toml") and "/_native/" in n]
    problems = [
        *(f"the wheel holds {n}" for n in odd),
        *([] if len(libraries) == 1 and "abi3" in libraries[0] else [f"libraries in the wheel: {libraries}"]),
        *([] if len(crates) == 5 else [f"manifests in the sdist: {crates}"]),
        *(f"the sdist holds {n}" for n in sources if "/target/" in n),
    ]
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(sources)} files")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
