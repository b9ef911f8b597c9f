"""What do the tests with Envoy share? The backends, once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.oracle.backends import Backends


@pytest.fixture(scope="session")
def backends() -> Iterator[Backends]:
    made = Backends()
    try:
        yield made
    finally:
        made.close()
