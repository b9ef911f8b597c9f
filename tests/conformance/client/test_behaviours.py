"""Does a mesh client do what httpx documents? Every behaviour, on every server, in plain text and mutual TLS, by both loops and none.

What is right comes from httpx: the same behaviour is run with a plain client against the same server, and must have seen the same.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.conformance.client.behaviours import BEHAVIOURS
from tests.conformance.client.caller import DRIVERS, Caller, drive
from tests.conformance.client.shop import VERSIONS, WORLDS, Shop

NAMES = [behaviour.__name__ for behaviour in BEHAVIOURS]
# Where httpx does over HTTP/2 what nobody can want, so that what it does over HTTP/1.1 is right for both.
BETTER_OVER_HTTP1 = {
    # It never gives back the window of a stream that was left, so that the connection stands still after the second.
    "early_close",
    # It sends what h11 would refuse: a line break within a header, a length that isn't the body's.
    "unwritable",
}
_expected: dict[tuple[str, str, str, bool], Any] = {}


def expected(shop: Shop, server: str, version: str, behaviour: Any, is_async: bool) -> Any:
    """What a plain client of httpx sees, which knows nothing of the mesh's identities but how to show one."""
    if behaviour.__name__ in BETTER_OVER_HTTP1:
        version = "http/1.1"
    key = (server, version, behaviour.__name__, is_async)
    base = shop.plain(server)
    network: dict[str, Any] = {}
    if version == "h2":
        base, network = shop.secured(server), {"http2": True, "verify": shop.context()}
    if key not in _expected:
        kind = httpx.AsyncClient if is_async else httpx.Client
        made = lambda **options: kind(trust_env=False, **network, **options)

        async def work() -> Any:
            whole = Caller(made(), base, is_async=is_async, options=made)
            try:
                return await behaviour(whole)
            finally:
                await (whole.client.aclose() if is_async else _nothing(whole.client.close()))

        _expected[key] = drive("asyncio", work)
    return _expected[key]


async def _nothing(_: Any) -> None: ...


@pytest.fixture(scope="module", params=WORLDS, ids="-".join)
def world(request: pytest.FixtureRequest, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Any:
    server, security, version = request.param
    with shop.mesh(tmp_path_factory.mktemp("world"), server, security, retry={"attempts": 1}) as mesh:
        yield server, mesh, version


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_client_sees_what_a_plain_one_sees(world: Any, shop: Shop, name: str, driver: str) -> None:
    """And leaves no permit behind."""
    server, mesh, version = world
    behaviour = BEHAVIOURS[NAMES.index(name)]
    is_async = driver != "sync"

    def made(**more: Any) -> Any:
        return (mesh.client if is_async else mesh.sync_client)(trust_env=False, **VERSIONS[version], **more)

    async def work() -> Any:
        call = Caller(made(), "http://orders", is_async=is_async, options=made)
        try:
            return await behaviour(call)
        finally:
            await (call.client.aclose() if is_async else _nothing(call.client.close()))

    actual = drive(driver, work)
    assert expected(shop, server, version, behaviour, is_async) == actual
    assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0
