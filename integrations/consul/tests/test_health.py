"""Does the mesh know what Consul knows, as soon as it does, and no more than that?"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import Any

import pytest
from meshlib_consul import ConsulError, ConsulRegistry, open_registry
from meshlib_consul import health as health_module
from meshlib_consul.health import ConsulResolver, _elements, query_of
from meshlib_consul.instances import Rules, endpoints_of
from meshlib_consul.place import Place
from meshlib_consul.wire import Answer

from integrations.consul.tests.agents import StandInAgent, Told
from meshlib.discover import Change, EndpointAddress, Snapshot, Watching
from meshlib.discover import open_registry as open_by_name
from tests.support import run_virtually

PATIENCE = 10.0
QUICK = {"wait": "1s", "timeout": "500ms"}


@pytest.fixture
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[ConsulRegistry]:
    name = "agent" if "agent" in request.fixturenames else "standin"
    made = open_registry({"url": request.getfixturevalue(name).url, **QUICK})
    yield made
    await made.close()


class Following:
    """What a directory does: keeps what it was told, and begins anew after an error."""

    def __init__(self, resolver: ConsulResolver) -> None:
        self.resolver = resolver
        self.known: dict[str, EndpointAddress] = {}
        self.answers: list[Snapshot | Change] = []
        self.errors: list[Exception] = []
        self.task = asyncio.ensure_future(self._follow())

    async def _follow(self) -> None:
        while True:
            try:
                async with aclosing(self.resolver.watch()) as stream:  # type: ignore[type-var]
                    async for answer in stream:
                        self._take(answer)
            except Exception as error:
                self.errors.append(error)
                await asyncio.sleep(0.05)

    def _take(self, answer: Snapshot | Change) -> None:
        self.answers.append(answer)
        if isinstance(answer, Snapshot):
            self.known = {each.address: each for each in answer.endpoints}
            return
        before = self.answers[-2]
        assert answer.base == before.version
        for address in answer.gone:
            del self.known[address]
        self.known.update((each.address, each) for each in answer.changed)

    async def until(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"known: {self.known}, last answers {self.answers[-3:]}, errors {self.errors[-3:]}") from None

    async def knows(self, *ports: int) -> None:
        await self.until(lambda: self.known.keys() == {f"127.0.0.1:{port}" for port in ports})

    async def close(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def follow(registry: ConsulRegistry) -> AsyncIterator[Callable[..., Following]]:
    made = list[Following]()

    def begin(service: str = "orders", **settings: Any) -> Following:
        made.append(Following(registry.resolver(service, settings)))
        return made[-1]

    yield begin
    for each in made:
        await each.close()


# ---------------------------------------------------------------- what is there


class Conformance:
    """Consul, as the conformance check fills it."""

    service = "orders"
    carries = frozenset({"weight", "zone", "labels", "identity"})

    def __init__(self, agent: Told) -> None:
        self.agent: Any = agent

    def address(self, n: int) -> str:
        return f"127.0.0.1:{8000 + n}"

    def put(self, *endpoints: EndpointAddress) -> None:
        for each in endpoints:
            meta = {**each.labels, "meshlib-zone": each.zone, "meshlib-identity": each.identity}
            weights = {"Passing": int(each.weight), "Warning": 1}
            self.agent.put(
                "orders", int(each.address.rpartition(":")[2]), Meta={k: v for k, v in meta.items() if v}, Weights=weights
            )

    def remove(self, *addresses: str) -> None:
        for each in addresses:
            self.agent.remove("orders", int(each.rpartition(":")[2]))

    def fail(self) -> None:
        self.agent.pause()

    def mend(self) -> None:
        self.agent.resume()

    async def open(self) -> ConsulResolver:
        self.registry = open_registry({"url": self.agent.url, **QUICK})
        return self.registry.resolver("orders", {"identities": True})

    async def close_resolver(self) -> None:
        await self.registry.close()

    def after_fork(self) -> None:
        self.registry.after_fork()

    def close(self) -> None:
        self.agent.resume()
        for each in self.agent.instances("orders", passing=False):
            self.agent.remove("orders", each["Service"]["Port"])


@pytest.mark.slow
def test_it_conforms_to_what_resolvers_are_asked(agent: Any) -> None:
    """Each rule of the check of resolvers, and none left out."""
    rules = pytest.importorskip("meshlib.testing.resolver", reason="this meshlib has no conformance check of resolvers")
    assert rules.check_resolver(lambda: Conformance(agent)) == [rule.__name__ for rule in rules.RULES]


def test_it_is_found_by_its_name() -> None:
    """The entry point leads to a registry, whose resolvers tell by themselves."""
    found = open_by_name("consul", {"url": "http://127.0.0.1:1"})
    assert isinstance(found, ConsulRegistry)
    assert isinstance(found.resolver("orders", {}), Watching)


async def test_what_comes_goes_and_changes_is_told(agent: Any, follow: Callable[..., Following]) -> None:
    """A whole state first, then changes that fit; an instance that is critical, in maintenance or gone is not there."""
    agent.put("orders", 1)
    following = follow()
    await following.knows(1)
    agent.put("orders", 2)
    await following.knows(1, 2)
    agent.say("fail", "orders", 1)
    await following.knows(2)
    agent.say("pass", "orders", 1)
    await following.knows(1, 2)
    agent.remove("orders", 2)
    await following.knows(1)
    assert isinstance(following.answers[0], Snapshot)
    assert all(isinstance(answer, Change) for answer in following.answers[1:])
    assert (following.errors, following.answers[-1].version >= 5) == ([], True)


async def test_a_service_without_instances_is_an_empty_state_and_fills(agent: Any, follow: Callable[..., Following]) -> None:
    """Nobody there is an answer; the first to come is seen."""
    following = follow()
    await following.until(lambda: bool(following.answers))
    assert following.answers[0] == Snapshot("orders", 0, (), 0.0) or following.answers[0].endpoints == ()
    agent.put("orders", 7)
    await following.knows(7)
    agent.remove("orders", 7)
    await following.knows()


async def test_an_instance_is_read_with_all_that_is_special_about_it(agent: Any, registry: ConsulRegistry) -> None:
    """Meta and tags become labels; weight and zone come from where the documentation says; the identity only where it is asked for."""
    meta = {
        "version": "v2",
        "meshlib-zone": "eu-1",
        "meshlib-weight": "2.5",
        "meshlib-identity": "spiffe://shop.internal/ns/a/sa/b",
    }
    agent.put("orders", 1, Meta=meta, Tags=["canary", "team=red", "version=v1"], Weights={"Passing": 7, "Warning": 1})
    agent.put("orders", 2, Weights={"Passing": 7, "Warning": 1})
    (first, second) = sorted((await registry.resolver("orders", {}).resolve()).endpoints, key=lambda each: each.address)
    assert first == EndpointAddress("127.0.0.1:1", 2.5, "eu-1", {"canary": "true", "team": "red", "version": "v2"})
    assert second == EndpointAddress("127.0.0.1:2", 7.0)
    (first, _) = (await registry.resolver("orders", {"identities": True}).resolve()).endpoints
    assert first.identity == "spiffe://shop.internal/ns/a/sa/b"


async def test_name_tags_and_filter_narrow_what_is_asked_for(agent: Any, registry: ConsulRegistry) -> None:
    """As Consul does it: all tags must be there, and the expression must hold."""
    agent.put("orders-v2", 1, Tags=["a", "b"], Meta={"version": "v1"})
    agent.put("orders-v2", 2, Tags=["a"], Meta={"version": "v2"})

    async def ports(**settings: Any) -> list[str]:
        found = await registry.resolver("orders", {"name": "orders-v2", **settings}).resolve()
        return sorted(each.address.rpartition(":")[2] for each in found.endpoints)

    assert await ports() == ["1", "2"]
    assert await ports(tags="a") == ["1", "2"]
    assert await ports(tags=["a", "b"]) == ["1"]
    assert await ports(filter='Service.Meta.version == "v2"') == ["2"]
    with pytest.raises(ConsulError) as caught:
        await ports(filter="nonsense")
    assert caught.value.status in {400, 500}


async def test_warning_instances_count_where_they_are_asked_for(agent: Any, registry: ConsulRegistry) -> None:
    """With the weight that they have while a check warns; critical ones never."""
    for port, word in ((1, "pass"), (2, "warn"), (3, "fail")):
        agent.put("orders", port, Weights={"Passing": 9, "Warning": 4})
        agent.say(word, "orders", port)
    found = await registry.resolver("orders", {"passing_only": False}).resolve()
    assert sorted((each.address, each.weight) for each in found.endpoints) == [("127.0.0.1:1", 9.0), ("127.0.0.1:2", 4.0)]
    assert [each.address for each in (await registry.resolver("orders", {}).resolve()).endpoints] == ["127.0.0.1:1"]


# ---------------------------------------------------------------- the index


async def test_a_query_that_was_held_in_vain_is_a_sign_of_life(standin: StandInAgent, follow: Callable[..., Following]) -> None:
    """The same index again: nothing is read, nothing changes, and the age begins anew."""
    standin.put("orders", 1)
    following = follow()
    await following.until(lambda: len(following.answers) >= 3)
    first, *rest = following.answers
    assert rest == [Change("orders", first.version, first.version)] * len(rest)
    assert rest[-1].taken > first.taken
    indexes = [query.get("index") for query in standin.standin.asked("/v1/health/service/orders")]
    assert indexes[0] is None and len(set(indexes[1:])) == 1


async def test_an_index_that_goes_back_begins_anew(standin: StandInAgent, follow: Callable[..., Following]) -> None:
    """As after a restored snapshot: a whole state, then a query that isn't held, and changes are seen at once."""
    for port in (1, 2):
        standin.put("orders", port)
    following = follow()
    await following.knows(1, 2)
    standin.standin.restore(5)
    await following.until(lambda: isinstance(following.answers[-1], Snapshot) and len(following.answers) > 1)
    asked = standin.standin.asked("/v1/health/service/orders")
    await following.until(lambda: len(standin.standin.asked("/v1/health/service/orders")) > len(asked))
    assert "index" not in standin.standin.asked("/v1/health/service/orders")[len(asked)]
    standin.put("orders", 3)
    await following.knows(1, 2, 3)
    assert following.errors == []


@pytest.mark.parametrize("index", [0, 1])
async def test_an_index_that_never_blocks_makes_no_busy_loop(
    standin: StandInAgent, follow: Callable[..., Following], index: int
) -> None:
    """0 means nothing, and an index that is always new blocks nobody: both are asked again more and more slowly."""
    standin.put("orders", 1)
    following = follow()
    await following.knows(1)
    standin.standin.set_index("service:orders", index)
    if index:  # each answer another one
        restless = asyncio.ensure_future(_touch(standin))
    before = len(standin.standin.requests)
    await asyncio.sleep(1.5)
    assert len(standin.standin.requests) - before < 12
    if index:
        restless.cancel()
    standin.put("orders", 2)
    await following.knows(1, 2)


def test_an_index_of_0_is_slowed_down_also_where_answers_take_their_time() -> None:
    """None of them was held, however long it took."""

    class Slow:
        place = Place()
        asked = 0

        async def ask(self, *_: Any, **__: Any) -> Answer:
            self.asked += 1
            await asyncio.sleep(0.2)
            return Answer(200, {"X-Consul-Index": "0"}, b"[]")

    slow = Slow()

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        resolver = ConsulResolver(slow, "orders", query_of("orders", {}), clock=clock)  # type: ignore[arg-type]
        async for _ in resolver.watch():
            if clock() > 60.0:
                return

    run_virtually(main)
    assert 50 <= slow.asked <= 60


async def _touch(standin: StandInAgent) -> None:
    while True:
        await asyncio.to_thread(standin.standin._on_loop, lambda: standin.standin._touch("service:orders"))
        await asyncio.sleep(0.002)


async def test_a_blocking_query_has_a_time_to_end_by(standin: StandInAgent) -> None:
    """An agent that is stopped is noticed after the wait, its sixteenth and the time of an answer."""
    standin.put("orders", 1)
    registry = open_registry({"url": standin.url, "wait": 0.3, "timeout": 0.2})
    try:
        async with aclosing(registry.resolver("orders", {}).watch()) as stream:  # type: ignore[type-var]
            await anext(stream)
            standin.pause()
            began = time.monotonic()
            with pytest.raises(ConsulError, match=r"gave no answer within 0\.51875 s"):
                await anext(stream)
            assert 0.4 < time.monotonic() - began < 2.0
    finally:
        standin.resume()
        await registry.close()


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "fault", ["500", "429", "reset", "garbage", "cut", "object", "nonsense", "deep", "no-index", "filtered", "redirect"]
)
async def test_what_is_no_answer_is_an_error_and_changes_nothing(
    standin: StandInAgent, follow: Callable[..., Following], fault: str
) -> None:
    """Never an empty list; and when it is over, what has changed meanwhile is known."""
    standin.put("orders", 1)
    following = follow()
    await following.knows(1)
    answers = len(following.answers)
    standin.standin.fail(fault)
    await following.until(lambda: len(following.errors) >= 3)
    assert {type(error) for error in following.errors} == {ConsulError}
    # What lies in this service's answer keeps no other service waiting.
    lies_in_answer = fault in {"garbage", "object", "nonsense", "deep", "filtered"}
    assert {getattr(error, "is_refusal", None) for error in following.errors[:3]} == {lies_in_answer}
    assert (list(following.known), len(following.answers)) == (["127.0.0.1:1"], answers)
    assert not standin.standin.asked("/elsewhere")
    standin.standin.fail("")
    standin.put("orders", 2)
    await following.knows(1, 2)


def test_a_status_says_whether_the_agent_refuses_or_cannot_answer() -> None:
    """No right and a wrong question lie in the question; no leader and too many questions don't."""
    told = {status: ConsulError("x", status=status).is_refusal for status in (0, 302, 400, 401, 403, 404, 408, 429, 500, 503)}
    assert {status for status, is_refusal in told.items() if is_refusal} == {400, 401, 403, 404}


async def test_an_agent_that_is_gone_is_an_error_until_it_is_back(agent: Any, follow: Callable[..., Following]) -> None:
    """Killed, then restarted without its memory: what is registered then is known."""
    agent.put("orders", 1)
    following = follow()
    await following.knows(1)
    agent.kill()
    await following.until(lambda: len(following.errors) >= 2)
    assert list(following.known) == ["127.0.0.1:1"]
    agent.restart()
    agent.put("orders", 2)
    await following.knows(2)


async def test_an_answer_without_a_leader_counts_only_where_stale_is_asked_for(standin: StandInAgent) -> None:
    """And then it is as old as the server's last word from its leader."""
    standin.put("orders", 1)
    standin.standin.has_leader, standin.standin.last_contact = False, 5000
    plain, stale = (open_registry({"url": standin.url, "stale": each}) for each in (False, True))
    with pytest.raises(ConsulError, match="no leader"):
        await plain.resolver("orders", {}).resolve()
    found = await stale.resolver("orders", {}).resolve()
    assert 4.9 < found.age(time.monotonic()) < 6.0
    assert ["stale" in query for query in standin.standin.asked("/v1/health")] == [False, True]
    await plain.close()
    await stale.close()


def test_an_instance_that_cannot_be_called_is_left_out() -> None:
    """It is told, and the others count; if none is left, the answer is wrong as a whole."""
    good = entry("10.0.0.1", 80)
    bad = [
        entry("10.0.0.2", 0), entry("0.0.0.0", 80), entry("169.254.169.254", 80), entry("::ffff:169.254.169.254", 80),
        entry("a b", 80), entry("2130706433", 80), entry("0x7f.1", 80), entry("10.0.0.2", 80, Meta={"meshlib-weight": "-1"}),
        entry("10.0.0.2", 80, Meta={"meshlib-weight": "nan"}), entry("10.0.0.2", True), entry("fe80::1%eth0", 80), {"Service": 7}, None,
        entry("evil.example/path?", 80), entry("host:1", 80), entry("10.0.0.2", 80, Meta={"meshlib-identity": "https://x"}),
    ]  # fmt: skip
    rules = Rules(takes_identities=True)
    assert list(endpoints_of([*bad, good], "orders", rules)) == ["10.0.0.1:80"]
    for each in bad:
        with pytest.raises(ConsulError):
            endpoints_of([each], "orders", rules)
    assert endpoints_of([], "orders", rules) == {}


def test_an_address_may_be_the_node_s_a_name_or_ipv6() -> None:
    """And of two entries with one address, as after a crash, the newer one counts."""
    found = endpoints_of([entry("", 80), entry("db-1.internal", 80), entry("2001:db8::1", 80)], "orders", Rules())
    assert list(found) == ["10.9.9.9:80", "db-1.internal:80", "[2001:db8::1]:80"]
    twice = [entry("10.0.0.1", 80, Meta={"v": "new"}, ModifyIndex=9), entry("10.0.0.1", 80, Meta={"v": "old"}, ModifyIndex=8)]
    (one,) = endpoints_of(twice, "orders", Rules()).values()
    assert dict(one.labels) == {"v": "new"}


def test_a_zone_is_found_wherever_consul_keeps_it() -> None:
    """The service's own word first, then its locality, then the node's."""
    locality = {"Locality": {"Region": "eu", "Zone": "b"}}
    node = {"Address": "10.9.9.9", "Meta": {"meshlib-zone": "d"}}
    cases = [
        entry("10.0.0.1", 1, Meta={"meshlib-zone": "a"}, **locality),
        entry("10.0.0.1", 2, **locality),
        {**entry("10.0.0.1", 3), "Node": {**node, "Locality": {"Zone": "c"}}},
        {**entry("10.0.0.1", 4), "Node": node},
        entry("10.0.0.1", 5),
    ]
    assert [each.zone for each in endpoints_of(cases, "orders", Rules()).values()] == ["a", "b", "c", "d", ""]


def entry(host: str, port: Any, **service: Any) -> dict[str, Any]:
    return {"Node": {"Address": "10.9.9.9"}, "Service": {"ID": "x", "Address": host, "Port": port, **service}, "Checks": []}


@pytest.mark.parametrize("text", ["", "{}", "[1", "[1,", "[1,]", "[1 2]", "[1] x", "[", "[{]}", "nul", "[1]]"])
def test_a_list_that_is_none_is_never_half_read(text: str) -> None:
    """Element by element it is as strict as in one."""
    with pytest.raises(ValueError):
        list(_elements(text))
    assert list(_elements(' [ {"a": [1, 2]} ,3,\n"x" ] ')) == [{"a": [1, 2]}, 3, "x"]
    assert list(_elements("[]")) == []


async def test_an_answer_has_a_limit(standin: StandInAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a process should take is an error before it is read."""
    from meshlib_consul import wire

    monkeypatch.setattr(wire, "LIMIT", 100)
    standin.put("orders", 1)
    registry = open_registry({"url": standin.url})
    with pytest.raises(ConsulError, match="longer than"):
        await registry.resolver("orders", {}).resolve()
    await registry.close()


async def test_a_large_answer_lets_others_have_their_turn(registry: ConsulRegistry, standin: StandInAgent) -> None:
    """Five thousand instances are read while the loop goes on."""
    from meshlib_consul.wire import Answer

    listed = [entry("10.0.0.1", 1 + number, Meta={"version": "v1", "filler": "x" * 500}) for number in range(5000)]
    raw = json.dumps(listed).encode()
    beats, longest = 0, 0.0

    async def beat() -> None:
        nonlocal beats, longest
        while True:
            began = time.monotonic()
            await asyncio.sleep(0)
            beats, longest = beats + 1, max(longest, time.monotonic() - began)

    beating = asyncio.ensure_future(beat())
    found = await registry.resolver("orders", {})._read(Answer(200, {}, raw))
    beating.cancel()
    assert (len(found), beats >= 5000 // health_module.TURN - 5) == (5000, True)
    assert os.environ.get("MESHLIB_SLOW_MACHINE") or longest < 0.5
