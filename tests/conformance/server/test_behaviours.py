"""Does every server behave the same, whatever it serves? Real servers, raw sockets, a foreign TLS.

The behaviours are in `behaviours/`, each once; the servers are in `kinds.py`. Each behaviour runs wherever it has a meaning.
"""

from __future__ import annotations

import pytest

from tests.conformance.server.behaviours import ALL, Behaviour
from tests.conformance.server.kinds import Kind, places
from tests.conformance.server.servers import Fleet

PAIRS = [
    pytest.param(place, each, id=f"{place[0].name}-{place[1]}-{each.name}")
    for place in places()
    for each in ALL
    if not each.obstacles(*place)
]


@pytest.mark.parametrize(("place", "each"), PAIRS)
def test_server_behaves(fleet: Fleet, place: tuple[Kind, str], each: Behaviour) -> None:
    """As the docstring of the behaviour says."""
    each.check(fleet.server(*place))
