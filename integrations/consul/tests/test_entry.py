"""Is this process in Consul for as long as it lives, and not longer?"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from meshlib_consul import ConsulError, ConsulRegistry, open_registry
from meshlib_consul.entry import ConsulEntry, terms_of
from meshlib_consul.place import Place
from meshlib_consul.wire import Answer

from integrations.consul.tests.agents import StandInAgent
from meshlib.discover import EndpointAddress, Instance
from meshlib.errors import ConfigError
from tests.support import run_virtually

PATIENCE = 10.0
INSTANCE = Instance(
    service="orders",
    id="orders-1",
    address="127.0.0.1:8301",
    zone="eu-1",
    weight=2.5,
    labels={"version": "v2", "app.kubernetes.io/name": "orders"},
    identity="spiffe://shop.internal/ns/default/sa/orders",
)


@pytest.fixture
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[ConsulRegistry]:
    name = "agent" if "agent" in request.fixturenames else "standin"
    made = open_registry({"url": request.getfixturevalue(name).url, "timeout": "500ms", "wait": "1s"})
    yield made
    await made.close()


class Kept:
    """Who keeps a registration: calls `keep` again when it raises."""

    def __init__(self, entry: ConsulEntry) -> None:
        self.entry = entry
        self.errors: list[Exception] = []
        self.task = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while True:
            try:
                await self.entry.keep()
            except Exception as error:
                self.errors.append(error)
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def keep(registry: ConsulRegistry) -> AsyncIterator[Callable[..., Kept]]:
    made = list[Kept]()

    def begin(instance: Instance = INSTANCE, **settings: Any) -> Kept:
        made.append(Kept(registry.register(instance, settings)))
        return made[-1]

    yield begin
    for each in made:
        await each.stop()


async def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.02)


async def test_an_entry_comes_back_as_it_was_made(agent: Any, keep: Callable[..., Kept], registry: ConsulRegistry) -> None:
    """What the mesh knows of an instance is what a resolver finds, labels that Meta can't hold included; and when it leaves, it is gone."""
    kept = keep(tags=["canary"], meta={"team": "red"})
    await until(lambda: agent.instances("orders"))
    (found,) = (await registry.resolver("orders", {"identities": True}).resolve()).endpoints
    labels = {**INSTANCE.labels, "canary": "true", "team": "red"}
    assert found == EndpointAddress("127.0.0.1:8301", 2.5, "eu-1", labels, INSTANCE.identity)
    (entry,) = agent.instances("orders")
    assert (entry["Service"]["ID"], entry["Service"]["Weights"]["Passing"]) == ("orders-1", 2)
    await kept.stop()
    await kept.entry.leave()
    assert agent.instances("orders", passing=False) == []
    await kept.entry.leave()
    assert kept.errors == []


async def test_the_check_passes_for_as_long_as_it_is_kept_and_not_longer(agent: Any, keep: Callable[..., Kept]) -> None:
    """Passed three times within its time; a process that is killed is critical after it."""
    kept = keep(ttl="600ms")
    await until(lambda: agent.instances("orders"))
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        assert await asyncio.to_thread(agent.instances, "orders")
        await asyncio.sleep(0.05)
    await kept.stop()
    await until(lambda: not agent.instances("orders"))
    assert len(agent.instances("orders", passing=False)) == 1
    assert kept.errors == []


async def test_an_agent_that_forgot_the_entry_gets_it_again(agent: Any, keep: Callable[..., Kept]) -> None:
    """By a command, or because it was restarted without its memory."""
    kept = keep(ttl="600ms")
    await until(lambda: agent.instances("orders"))
    await asyncio.sleep(0.4)
    agent.call("PUT", "/v1/agent/service/deregister/orders-1")
    await until(lambda: agent.instances("orders"))
    assert kept.errors == []
    await asyncio.to_thread(agent.restart)
    await until(lambda: agent.instances("orders"))


async def test_an_older_agent_says_so_with_a_500(standin: StandInAgent, keep: Callable[..., Kept]) -> None:
    """Which is an unknown check, and no trouble of the agent's."""
    kept = keep(ttl="600ms")
    await until(lambda: standin.instances("orders"))
    await asyncio.sleep(0.4)
    standin.standin._on_loop(lambda: standin.standin.checks["service:orders-1"].update(_ttl=0.0))
    await until(lambda: standin.standin.checks["service:orders-1"]["_ttl"] > 0.0)
    assert kept.errors == []


async def test_one_answer_that_fails_is_in_the_rhythm(standin: StandInAgent, keep: Callable[..., Kept]) -> None:
    """The entry stays; what lasts for longer than the check passes is raised."""
    kept = keep(ttl="900ms")
    await until(lambda: standin.instances("orders"))
    standin.standin.fail("500")
    await asyncio.sleep(0.35)
    standin.standin.fail("")
    await asyncio.sleep(1.0)
    assert (kept.errors, len(standin.instances("orders"))) == ([], 1)
    standin.standin.fail("500")
    await until(lambda: kept.errors)
    assert isinstance(kept.errors[0], ConsulError)


class Agent:
    """What the wire asks, in virtual time: it resets connections from 10 s on, for so long."""

    def __init__(self, away: float) -> None:
        self.away = away
        self.place = Place()
        self.entered = 0
        self.asked: list[float] = []
        self.passed = 0.0

    async def ask(self, method: str, path: str, *_: Any, **__: Any) -> Answer:
        now = asyncio.get_running_loop().time()
        self.asked.append(now)
        if 10.0 <= now < 10.0 + self.away:
            raise ConsulError("reset")
        self.entered += path.endswith("/register")
        self.passed = now
        return Answer(200, {}, b"")


def raised_by(agent: Agent, after: float) -> float:
    """When keeping an entry with a check of 15 s, which began then, came to its end; 0 if it didn't."""

    async def main() -> float:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(after)
        entry = ConsulEntry(agent, INSTANCE, terms_of(INSTANCE, {}), clock=clock)  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(entry.keep(), 60.0 - after)
        except ConsulError:
            return clock()
        except TimeoutError:
            return 0.0

    return float(run_virtually(main))


def test_agent_that_is_away_is_asked_while_the_check_passes() -> None:
    """What ends a fifth of its time before the check does costs nothing; then it is raised, not sooner, and asked about with patience."""
    for n in range(100):
        short, long = Agent(away=6.4), Agent(away=99.0)
        assert raised_by(short, n / 20) == 0.0
        assert (short.entered, short.passed > 50.0) == (1, True)
        end = raised_by(long, n / 20)
        assert long.passed + 15.0 <= end < long.passed + 18.1
        assert sum(time >= 10.0 for time in long.asked) <= 6


def test_question_that_hangs_costs_nothing() -> None:
    """Its answer never comes, and nobody says so: it is given up while there is time to ask again."""

    class Hanging(Agent):
        has_hung = False

        async def ask(self, method: str, path: str, *more: Any, **named: Any) -> Answer:
            if not self.has_hung and asyncio.get_running_loop().time() >= 20.0:
                self.has_hung = True
                await asyncio.sleep(14.0)  # for which the wire waits, where `timeout` says so
                raise ConsulError("no answer")
            return await super().ask(method, path, *more, **named)

    for n in range(50):
        agent = Hanging(away=0.0)
        assert raised_by(agent, n / 10) == 0.0
        assert (agent.entered, agent.has_hung, agent.passed > 50.0) == (1, True, True)
        longest = max(later - sooner for sooner, later in itertools.pairwise(agent.asked))
        assert longest < 15.0


async def test_an_agent_that_never_knows_is_told_of(standin: StandInAgent, registry: ConsulRegistry) -> None:
    """As behind a balancer of several agents, where it would be entered again for ever."""
    entry = registry.register(INSTANCE, {})

    async def refuse(*_: Any) -> bool:
        return False

    entry._pass = refuse  # type: ignore[method-assign]
    with pytest.raises(ConsulError, match="doesn't know it a moment later"):
        async with asyncio.timeout(PATIENCE):
            await entry.keep()


async def test_a_url_may_be_checked_by_the_agent_instead(agent: Any, keep: Callable[..., Kept]) -> None:
    """Then it is only looked whether the entry is still there."""
    kept = keep(http=f"{agent.url}/v1/status/leader", interval="200ms")
    await until(lambda: agent.instances("orders", passing=False))
    await asyncio.sleep(0.3)
    agent.call("PUT", "/v1/agent/service/deregister/orders-1")
    await until(lambda: agent.instances("orders", passing=False))
    assert kept.errors == []


async def test_what_consul_is_told_of_the_checks(standin: StandInAgent, keep: Callable[..., Kept]) -> None:
    """Their times, and when a critical entry is taken out."""
    keep(ttl="600ms", deregister_after="2m")
    keep(Instance("ledger", "ledger-1", "[::1]:8302"), http="http://127.0.0.1:1/healthz", interval="5s")
    await until(lambda: len(standin.standin.checks) == 2)
    ttl, http = (standin.standin.checks[f"service:{each}"]["_said"] for each in ("orders-1", "ledger-1"))
    assert (ttl["ttl"], ttl["deregistercriticalserviceafter"], ttl["status"]) == ("600ms", "120s", "passing")
    assert (http["http"], http["interval"], http["deregistercriticalserviceafter"]) == ("http://127.0.0.1:1/healthz", "5s", "60s")
    assert standin.standin.services["ledger-1"]["Address"] == "::1"


async def test_who_leaves_is_not_overtaken_by_its_own_registration(standin: StandInAgent, registry: ConsulRegistry) -> None:
    """Cancelled while it is entered: leaving waits for that, so that no entry stays behind."""
    standin.pause()
    entry = registry.register(INSTANCE, {})
    task = asyncio.ensure_future(entry.keep())
    await until(lambda: standin.standin.requests)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    leaving = asyncio.ensure_future(entry.leave())
    await asyncio.sleep(0.05)
    standin.resume()
    await leaving
    assert standin.standin.services == {}
    assert [path for _, path, _, _ in standin.standin.requests][-1] == "/v1/agent/service/deregister/orders-1"


async def test_entry_tells_whether_it_stands(standin: StandInAgent, registry: ConsulRegistry) -> None:
    """From the agent's answer until nobody keeps it any more."""
    entry = registry.register(INSTANCE, {})
    assert not entry.is_entered
    task = asyncio.ensure_future(entry.keep())
    await until(lambda: entry.is_entered)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert not entry.is_entered


async def test_a_token_that_may_not_register_is_an_error(standin: StandInAgent, registry: ConsulRegistry) -> None:
    """It says which right is missing, as Consul does."""
    standin.standin.token = "right"
    with pytest.raises(ConsulError, match="403") as caught:
        await registry.register(INSTANCE, {}).keep()
    assert caught.value.status == 403


@pytest.mark.parametrize(
    ("instance", "settings"),
    [
        (INSTANCE, {"ttl": "100ms"}),
        (INSTANCE, {"ttl": "fast"}),
        (INSTANCE, {"deregister_after": "10s"}),
        (INSTANCE, {"http": "10.0.0.7:80"}),
        (INSTANCE, {"meta": {"a b": "c"}}),
        (INSTANCE, {"meta": {"meshlib-zone": "c"}}),
        (INSTANCE, {"meta": {f"k{number}": "v" for number in range(64)}}),
        (INSTANCE, {"unknown": 1}),
        (Instance("orders", "o", "unix:/run/x.sock"), {}),
        (Instance("orders", "o", "localhost"), {}),
    ],
)
def test_wrong_settings_are_refused(instance: Instance, settings: dict[str, Any]) -> None:
    """Before anything is told to the agent, which would refuse most of them."""
    with pytest.raises(ConfigError):
        open_registry({}).register(instance, settings)


def test_a_weight_that_consul_cannot_hold_is_in_meta() -> None:
    """It has whole numbers from one only."""
    weights = {weight: _terms(weight) for weight in (0.0, 0.5, 1.0, 3.0, 3.4)}
    assert weights == {0.0: (1, "0"), 0.5: (1, "0.5"), 1.0: (1, None), 3.0: (3, None), 3.4: (3, "3.4")}


def _terms(weight: float) -> tuple[int, str | None]:
    entry = open_registry({}).register(Instance("orders", "o", "127.0.0.1:1", weight=weight), {})
    return entry._terms.weight, entry._terms.meta.get("meshlib-weight")
