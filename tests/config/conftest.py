"""What do the tests of the configuration share? A folder with a file in it, and an environment that says nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _silent_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESHLIB_CONFIG", "MESHLIB_SERVICE", "MESHLIB_DEV", "MESHLIB_ZONE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a mesh.yaml (or another file) and give its path."""

    def write(text: str, name: str = "mesh.yaml") -> Path:
        file = tmp_path / name
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    return write
