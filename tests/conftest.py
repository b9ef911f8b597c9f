"""What must hold for every test? That signals do what they say.

A shell starts what it puts into the background with SIGINT and SIGQUIT ignored, and children inherit that: a test of Ctrl-C would then
depend on how the suite was started.
"""

from __future__ import annotations

import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
