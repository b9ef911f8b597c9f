"""Under which licences are the Python packages that meshlib depends on? Only under those named here.

Read from the metadata of what is installed; a package that says nothing that we understand fails.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

ALLOWED = re.compile(r"apache|bsd|mit|psf|python software foundation|mpl|mozilla|isc|unlicense", re.IGNORECASE)


def names(root: str) -> set[str]:
    """Everything that `root` needs, itself included; extras and other platforms left out."""
    seen: set[str] = set()
    todo = [root]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        seen.add(name)
        todo += [re.split(r"[\s;\[<>=!~(]", need, maxsplit=1)[0] for need in needs if "extra ==" not in need]
    return seen


def licence(name: str) -> str:
    meta = distribution(name).metadata
    classifiers = [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    return " ".join(filter(None, [meta.get("License-Expression"), *classifiers, (meta.get("License") or "")[:60]]))


def main() -> int:
    bad = [(name, licence(name)) for name in sorted(names("meshlib-servicemesh")) if not ALLOWED.search(licence(name))]
    for name, words in bad:
        print(f"{name}: licence {words!r} is not on the list")
    print(f"python licences: {len(names('meshlib-servicemesh'))} packages, {len(bad)} not allowed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
