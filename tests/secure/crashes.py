"""What if the process ends between two changes of the disk? Each of them in turn."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


class Crash(BaseException):
    """The end of the process, as far as a test can have it."""


def is_done(monkeypatch: pytest.MonkeyPatch, crashes: int, step: Callable[[], object]) -> bool:
    """Take a step that crashes after so many renames and removals; True if it came through."""
    done = 0

    def counted(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def run(*args: object, **more: object) -> None:
            nonlocal done
            if done >= crashes:
                raise Crash
            done += 1
            real(*args, **more)

        return run

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink"):
            patch.setattr(os, name, counted(name))
        try:
            step()
        except Crash:
            return False
    return True
