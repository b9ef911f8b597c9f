"""Do the same endpoints get the same share of the calls as behind a real Envoy?

What is exact in Envoy (turns, hashes) is compared call by call; what is drawn is compared by chi-square, against the share that it
should have and against Envoy's counts.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tests.oracle.backends import Backends
from tests.oracle.chance import LIMIT, likeness, probability
from tests.oracle.envoy_side import Client, until
from tests.oracle.our_side import Ours
from tests.support import free_port
from tests.wire.envoy import envoy, fleet, listener, locality

CALLS = 3000
KEYS = [f"user-{n}" for n in range(400)]
RING = {"ring_hash_lb_config": {"minimum_ring_size": 1024}}
ROUTE = {"route": {"cluster_header": "x-cluster", "hash_policy": [{"header": {"header_name": "x-key"}}]}}


class World:
    def __init__(self, client: Client, seven: list[str]) -> None:
        self.client, self.seven, self.three = client, seven, seven[:3]
        self.left = seven[4]
        self.six = [address for address in seven if address != self.left]


@pytest.fixture(scope="module")
def world(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    seven = backends.addresses(0, 7)
    # No sorted order, so that neither side can live on one.
    seven = [seven[n] for n in (3, 0, 6, 2, 5, 1, 4)]
    three, six = locality(seven[:3]), locality([address for address in seven if address != seven[4]])
    heavy, mixed = locality(seven[:3], weights=[5, 1, 1]), locality(seven, weights=[1, 2, 4, 1, 3, 1, 1])
    clusters = [
        fleet("turns", "ROUND_ROBIN", three),
        fleet("heavy-turns", "ROUND_ROBIN", heavy),
        fleet("random", "RANDOM", locality(seven)),
        fleet("least", "LEAST_REQUEST", locality(seven)),
        fleet("least-held", "LEAST_REQUEST", three),
        fleet("heavy-least", "LEAST_REQUEST", heavy),
    ]
    bound = {"common_lb_config": {"consistent_hashing_lb_config": {"hash_balance_factor": 150}}}
    for policy, name, more in (("RING_HASH", "ring", RING), ("MAGLEV", "maglev", {})):
        clusters += [
            fleet(f"{name}-bound", policy, locality(seven), **more, **bound),
            fleet(name, policy, locality(seven), **more),
            fleet(f"{name}-six", policy, six, **more),
            fleet(f"{name}-mixed", policy, mixed, **more),
        ]
    port = free_port()
    with envoy(tmp_path_factory.mktemp("envoy"), [listener(port, ROUTE)], clusters):
        with contextlib.closing(Client(port)) as client:
            yield World(client, seven)


def keyed(world: World, cluster: str) -> list[str]:
    """Where Envoy sends each key."""
    return [body for _, body in world.client.all(cluster, [{"x-key": key} for key in KEYS])]


def keyed_by_us(engine: Ours) -> list[str]:
    return [engine.call(x_key=key)[0][0] for key in KEYS]


def shares(order: Sequence[str], names: Sequence[str]) -> list[int]:
    counts = Counter(order)
    assert set(counts) <= set(names)
    return [counts[name] for name in names]


# ---------------------------------------------------------------------- turns


def test_round_robin_of_equals_is_exact_in_every_period(world: World) -> None:
    """Each endpoint has one turn of three, in both; only where it begins is chance."""
    for order in (world.client.order("turns", 30), Ours("round_robin", world.three).order(30)):
        assert all(set(order[at : at + 3]) == set(world.three) for at in range(28))


def test_weighted_round_robin_is_exact_in_every_period(world: World) -> None:
    """5:1:1 gives 5, 1 and 1 of any seven calls in a row, in both."""
    for order in (world.client.order("heavy-turns", 70), Ours("round_robin", world.three, weights=[5, 1, 1]).order(70)):
        periods = {tuple(shares(order[at : at + 7], world.three)) for at in range(0, 70, 7)}
        assert periods == {(5, 1, 1)}


def test_weighted_round_robin_spreads_the_light_ones(world: World) -> None:
    """Smooth, in both: the heavy one has no more than five turns in a row, and the two light ones share the gap as they may."""
    envoys = world.client.order("heavy-turns", 70)
    ours = Ours("round_robin", world.three, weights=[5, 1, 1]).order(70)
    assert longest_row(envoys, world.three[0]) <= 5
    # By choice smoother than Envoy, whose deadlines put both light ones side by side: 5 in a row there, at most 3 here.
    assert longest_row(ours, world.three[0]) <= 3


def longest_row(order: Sequence[str], name: str) -> int:
    longest = row = 0
    for at in order:
        row = row + 1 if at == name else 0
        longest = max(longest, row)
    return longest


# ---------------------------------------------------------------------- chance


@pytest.mark.parametrize(("cluster", "policy"), [("random", "random"), ("least", "least_request")])
def test_drawn_endpoints_share_evenly(world: World, cluster: str, policy: str) -> None:
    """Random, and two choices among idle endpoints: a seventh each, and no difference from Envoy that chance would not make."""
    theirs, ours = world.client.order(cluster, CALLS), Ours(policy, world.seven).order(CALLS)
    for order in (theirs, ours):
        assert probability(shares(order, world.seven), [1] * 7) > LIMIT
    assert likeness(Counter(theirs), Counter(ours)) > LIMIT


def test_weights_of_idle_endpoints_are_kept_by_least_request(world: World) -> None:
    """5:1:1 while nothing is in flight. Envoy goes in turns there; we draw, so that its counts are exact and ours a sample."""
    theirs = shares(world.client.order("heavy-least", 700), world.three)
    ours = shares(Ours("least_request", world.three, weights=[5, 1, 1]).order(CALLS), world.three)
    assert theirs == [500, 100, 100]
    assert probability(ours, [5, 1, 1]) > LIMIT


def test_random_keeps_weights(world: World) -> None:
    """Ours only: Envoy's random policy knows no weights of endpoints."""
    ours = Ours("random", world.three, weights=[5, 1, 1]).order(CALLS)
    assert probability(shares(ours, world.three), [5, 1, 1]) > LIMIT


def test_least_request_avoids_the_endpoint_that_is_busy(world: World, backends: Backends) -> None:
    """Four calls hang at one of three endpoints: which share of the next ones goes there?

    Envoy draws its two choices with replacement, so that the busy one is taken where both draws name it: 1/9. Ours are always two
    different ones, and the busy one loses to either.
    """
    busy, rest = world.three[0], world.three[1:]
    port = world.client.socket.getpeername()[1]
    with contextlib.ExitStack() as stack:
        while (before := backends.held()) < 4:
            other = stack.enter_context(contextlib.closing(Client(port)))
            other.send("least-held", x_hold=busy)
            until(lambda other=other, before=before: backends.held() > before or other.has_answer())
        theirs = shares(world.client.order("least-held", CALLS), world.three)
        backends.release()
    assert probability(theirs, [1 / 9, 4 / 9, 4 / 9]) > LIMIT

    engine, held = Ours("least_request", world.three), []
    while sum(at == busy for _, at in held) < 4:
        held.append(engine.hold())
    held = [(call, at) for call, at in held if at == busy or call.abandon(engine.now)]
    ours = shares(engine.order(CALLS), world.three)
    assert ours[0] == 0
    assert probability(ours[1:], [1] * len(rest)) > LIMIT


# ---------------------------------------------------------------------- hashes


@pytest.mark.parametrize(("cluster", "policy"), [("ring", "ring_hash"), ("maglev", "maglev")])
def test_key_goes_to_the_same_endpoint_as_in_envoy(world: World, cluster: str, policy: str) -> None:
    """Key by key: a fleet may have both in front of it, and caches stay warm when one takes the other's place."""
    assert keyed_by_us(Ours(policy, world.seven)) == keyed(world, cluster)


@pytest.mark.parametrize(("cluster", "policy"), [("ring-mixed", "ring_hash"), ("maglev-mixed", "maglev")])
def test_weights_change_hash_tables_as_in_envoy(world: World, cluster: str, policy: str) -> None:
    """The weights 1, 2, 4, 1, 3, 1, 1 give the same table."""
    assert keyed_by_us(Ours(policy, world.seven, weights=[1, 2, 4, 1, 3, 1, 1])) == keyed(world, cluster)


@pytest.mark.parametrize("policy", ["ring_hash", "maglev"])
def test_order_of_endpoints_does_not_matter_to_a_hash(world: World, policy: str) -> None:
    """Every process finds the same endpoint, however its resolver sorts."""
    assert keyed_by_us(Ours(policy, world.seven)) == keyed_by_us(Ours(policy, sorted(world.seven)))


@pytest.mark.parametrize(("cluster", "policy", "most"), [("ring", "ring_hash", 0.25), ("maglev", "maglev", 0.05)])
def test_few_other_keys_move_when_an_endpoint_leaves(world: World, cluster: str, policy: str, most: float) -> None:
    """Of the keys of the six that stay, a ring of 1024 moves a seventh, and Maglev next to none; the same ones in Envoy and in ours.

    The ring moves more than it had to, since it is filled up again to its least size: 171 points for each of six instead of 147 for
    each of seven, and keys move to the new points (24 of 171). That is Envoy's arithmetic, and ours on purpose: the same key in the
    same place beside an Envoy is worth more.
    """
    engine = Ours(policy, world.seven)
    ours_before = keyed_by_us(engine)
    engine.resolve(world.six)
    ours, theirs = (ours_before, keyed_by_us(engine)), (keyed(world, cluster), keyed(world, f"{cluster}-six"))
    for before, after in (ours, theirs):
        stayed = [(a, b) for a, b in zip(before, after, strict=True) if a != world.left]
        assert len(stayed) > len(KEYS) * 0.7
        assert sum(a != b for a, b in stayed) <= most * len(stayed)
        assert world.left not in after
    assert ours == theirs


@pytest.mark.parametrize(("cluster", "policy"), [("ring-bound", "ring_hash"), ("maglev-bound", "maglev")])
def test_bound_keeps_a_popular_key_from_overloading_its_home(world: World, backends: Backends, cluster: str, policy: str) -> None:
    """24 calls of one key hang: nobody holds more than 1.5 times the mean of 24/7, which is 6; in Envoy one more.

    By choice the bound is that of the paper, which counts the call that is about to start, and Envoy's test is one call looser. The
    home is the same; who stands in for it is not (Envoy jumps at random on both, we walk clockwise on a ring, as the paper does).
    """
    theirs: list[str] = []
    with contextlib.ExitStack() as stack:
        for n in range(24):
            client = stack.enter_context(contextlib.closing(Client(world.client.socket.getpeername()[1])))
            client.send(cluster, x_key=KEYS[0], x_call=f"{cluster}-{n}", x_hold=" ".join(world.seven))
            until(lambda n=n: backends.held() == n + 1)
            theirs += backends.seen[f"{cluster}-{n}"]
        backends.release()

    hash_plan = {"on": [{"kind": "header", "name": "x-key"}], "bound": 1.5, "ring": 1024, "table": 65537}
    engine = Ours(policy, world.seven, balance={"hash": hash_plan})
    held = [engine.hold(x_key=KEYS[0]) for _ in range(24)]
    ours = [address for _, address in held]
    assert ours[0] == theirs[0]
    assert (max(shares(theirs, world.seven)), max(shares(ours, world.seven))) == (7, 6)
    assert Counter(ours)[ours[0]] == 6  # the home has all that it may have
