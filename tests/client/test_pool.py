"""Is a connection used again exactly as long as it is whole, and closed when it isn't?

A virtual clock, and connections that only remember. What sockets do is tested in test_exchange_ends.py.
"""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from meshlib.client import pool as of
from meshlib.client.pool import Pool, keep_seconds

KEY = ("10.0.0.1:80", "spiffe://td/orders", "http/1.1")
OTHER = ("10.0.0.2:80", "spiffe://td/orders", "http/1.1")
WALL = 1_800_000_000.0


class Clock:
    """Both clocks, moved by hand and together."""

    def __init__(self) -> None:
        self.now = 1000.0

    def wall(self) -> float:
        return WALL + self.now


class Identity:
    """Stands for a TlsClient."""

    def __init__(self, not_after: float = inf) -> None:
        self.not_after = not_after


class Connection:
    """What a carrier hands over after an exchange."""

    def __init__(self, key: Any, tls: Any, born: float, keep: float, not_after: float) -> None:
        self.key, self.tls, self.keep, self.not_after = key, tls, keep, not_after
        self.born = self.idle_since = born
        self.until = 0.0
        self.usable = True
        self.is_closed = False
        self.pool: Pool | None = None

    def is_usable(self) -> bool:
        return self.usable

    def close(self) -> None:
        self.is_closed = True
        if self.pool is not None:
            # A transport may say at once that the connection is gone.
            self.pool.forget(self)


class World:
    """A pool with its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.pool = Pool(lambda: self.clock.now, self.clock.wall)

    @property
    def now(self) -> float:
        return self.clock.now

    def pass_(self, seconds: float) -> None:
        self.clock.now += seconds

    def connect(self, key: Any = KEY, tls: Any = None, *, keep: float = 1.8, not_after: float = inf) -> Connection:
        return Connection(key, tls, self.now, keep, not_after)

    def give(self, *connections: Connection) -> None:
        for connection in connections:
            self.pool.give(connection, self.now)

    def given(self, *more: Any, **named: Any) -> Connection:
        connection = self.connect(*more, **named)
        self.give(connection)
        return connection

    def take(self, key: Any = KEY, tls: Any = None) -> Any:
        return self.pool.take(key, tls, self.now, self.clock.wall())

    def sweep(self) -> float | None:
        return self.pool.sweep(self.now)

    @property
    def closed(self) -> dict[str, int]:
        return {reason: count for reason, count in self.pool.closings.items() if count}


@pytest.fixture
def world() -> World:
    return World()


# ------------------------------------------------------------------ which one


def test_youngest_connection_is_used_first(world: World) -> None:
    """So that what a peak left over grows old, and goes."""
    old, young = world.given(), world.given()
    assert [world.take(), world.take(), world.take()] == [young, old, None]
    assert (world.pool.reused, world.closed) == (2, {})


def test_connection_serves_its_own_endpoint_identity_and_protocol_only(world: World) -> None:
    """All three are the key."""
    world.given()
    for key in (OTHER, (KEY[0], "spiffe://td/other", KEY[2]), (KEY[0], KEY[1], "h2"), KEY[:2]):
        assert world.take(key) is None
    assert world.take() is not None


def test_connection_of_another_generation_is_closed(world: World) -> None:
    """It was opened as somebody whom we aren't any more."""
    before, now = Identity(), Identity()
    connection = world.given(tls=before)
    assert world.take(tls=now) is None
    assert (connection.is_closed, world.closed) == (True, {"generation": 1})


def test_broken_connection_is_never_kept(world: World) -> None:
    """An unread body, an error or a cancellation leave one behind."""
    connection = world.connect()
    connection.usable = False
    world.give(connection)
    assert (connection.is_closed, world.closed, len(world.pool), world.take()) == (True, {"unfit": 1}, 0, None)


def test_connection_that_broke_while_it_waited_is_not_taken(world: World) -> None:
    """The next one is."""
    whole, broken = world.given(), world.given()
    broken.usable = False
    assert world.take() is whole
    assert (broken.is_closed, world.closed) == (True, {"peer": 1})


# ------------------------------------------------------------------ how long it waits


def test_idle_connection_is_not_taken_after_its_time(world: World) -> None:
    """Its peer is about to close it."""
    connection = world.given(keep=4.7)
    world.pass_(4.69)
    assert world.take() is connection
    world.give(connection)
    world.pass_(4.7)
    assert world.take() is None
    assert world.closed == {"idle": 1}


def test_connection_that_may_not_wait_at_all_is_closed(world: World) -> None:
    """`Keep-Alive: timeout=0`."""
    connection = world.given(keep=keep_seconds([(b"keep-alive", b"timeout=0")]))
    assert (connection.is_closed, len(world.pool), world.closed) == (True, 0, {"idle": 1})


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (b"timeout=5", 4.7),
        (b"timeout=5, max=100", 4.7),
        (b"max=100, Timeout=75", 74.7),
        (b"timeout=0", 0.0),
        (b"timeout=never", of.IDLE),
        (b"timeout=-1", of.IDLE),
        (b"timeout=1234567", of.IDLE),
        (b"", of.IDLE),
    ],
)
def test_peer_says_how_long_it_waits(header: bytes, seconds: float) -> None:
    """Less a margin, since its clock starts before ours; nonsense says nothing."""
    assert keep_seconds([(b"server", b"x"), (b"keep-alive", header)]) == pytest.approx(seconds)
    assert keep_seconds([]) == of.IDLE


def test_pool_learns_from_a_peer_that_closes_earlier_than_expected(world: World) -> None:
    """Seen twice, it's a habit: from then on we go before it does."""
    for _ in range(2):
        connection = world.given(keep=74.7)
        world.pass_(5.0)
        world.pool.forget(connection, world.now)
    late = world.given(keep=74.7)
    world.pass_(4.6)
    assert world.take() is late
    world.give(late)
    world.pass_(4.9)
    assert world.take() is None
    assert world.closed == {"peer": 2, "idle": 1}
    # Nothing is said about others.
    world.given(OTHER, keep=74.7)
    world.pass_(70.0)
    assert world.take(OTHER) is not None


def test_peer_that_stops_says_nothing_about_its_habits(world: World) -> None:
    """It closes all at once, whether they waited for long or not."""
    waiting = []
    for _ in range(5):
        waiting.append(world.given(keep=74.7))
        world.pass_(0.1)
    for connection in waiting:
        world.pool.forget(connection, world.now)
    connection = world.given(keep=74.7)
    world.pass_(74.0)
    assert world.take() is connection


def test_closings_after_different_times_are_no_habit(world: World) -> None:
    """Two deployments, say."""
    for idle in (3.0, 40.0, 11.0):
        connection = world.given(keep=74.7)
        world.pass_(idle)
        world.pool.forget(connection, world.now)
    connection = world.given(keep=74.7)
    world.pass_(74.0)
    assert world.take() is connection


def test_what_was_learned_is_forgotten_slowly_and_has_a_least(world: World) -> None:
    """The time doubles every five minutes; below a quarter of a second no connection would be of use."""
    for _ in range(2):
        connection = world.given(keep=74.7)
        world.pass_(0.3)
        world.pool.forget(connection, world.now)
    learned_at = world.now

    def kept() -> float:
        connection = world.given(keep=74.7)
        return world.pool._idle[KEY].pop(connection) - world.now

    assert kept() == pytest.approx(of.LEAST)
    world.pass_(of.DOUBLES_AFTER)
    assert kept() == pytest.approx(2 * of.LEAST)
    world.pass_(3 * of.DOUBLES_AFTER)
    assert kept() == pytest.approx(16 * of.LEAST)
    world.clock.now = learned_at + 12 * of.DOUBLES_AFTER
    assert kept() == pytest.approx(74.7)
    assert world.pool._seen == {}


def test_closing_found_out_when_a_connection_is_taken_teaches_too(world: World) -> None:
    """Blocking sockets tell of it only when they are looked at: it came then or before."""
    for _ in range(2):
        connection = world.given(keep=74.7)
        world.pass_(10.0)
        connection.usable = False
        assert world.take() is None
    connection = world.given(keep=74.7)
    world.pass_(9.8)
    assert world.take() is None
    assert world.closed == {"peer": 2, "idle": 1}


def test_what_is_known_of_peers_stays_bounded(world: World) -> None:
    """Addresses come and go."""
    for n in range(of.MAX_SEEN + 10):
        world.pool.learn((str(n), "", ""), 1.0, world.now)
    assert len(world.pool._seen) == of.MAX_SEEN
    assert ("0", "", "") not in world.pool._seen


# ------------------------------------------------------------------ how long it lives


def test_connection_in_constant_use_ends_at_its_age_limit(world: World) -> None:
    """So that a fleet that grew is used, and a change of DNS is seen."""
    connection = world.connect(keep=75.0)
    limit, _ = world.pool._ends(connection, world.now)
    world.clock.now = limit - 1.0
    world.give(connection)
    world.clock.now = limit - 0.1
    assert world.take() is connection
    world.give(connection)
    world.clock.now = limit
    assert world.take() is None
    assert (connection.is_closed, world.closed) == (True, {"age": 1})


@pytest.mark.parametrize("apart", [0.0, 0.000_05, 0.001, 0.01])
def test_what_was_opened_together_is_not_renewed_together(world: World, apart: float) -> None:
    """The limits are spread over a fifth, even of what was opened at the very same moment by the loop's clock."""
    found = []
    connections = []
    for _ in range(200):
        world.pass_(apart)
        connections.append(world.connect())
        found.append(world.pool._ends(connections[-1], world.now)[0] - world.now)
    assert min(found) >= of.MAX_AGE * (1 - of.JITTER)
    assert max(found) <= of.MAX_AGE
    tenth = of.MAX_AGE * of.JITTER / 10
    assert len({int((of.MAX_AGE - seconds) / tenth) for seconds in found}) > 5


@pytest.mark.parametrize(("ours", "theirs"), [(3600.0, inf), (inf, 3600.0), (3600.0, 9000.0), (9000.0, 3600.0)])
def test_connection_is_not_taken_shortly_before_a_certificate_ends(
    world: World, ours: float, theirs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours or the peer's, whichever is first; an hour's certificate leaves a minute."""
    monkeypatch.setattr(of, "MAX_AGE", 100_000.0)
    start = world.clock.wall()
    tls = Identity(start + ours)
    connection = world.given(tls=tls, keep=75.0, not_after=start + theirs)
    # The margin is settled by what was left at the opening, however often the connection comes back.
    for _ in range(50):
        world.pass_(70.0)
        assert world.take(tls=tls) is connection
        world.give(connection)
    world.pass_(39.9)
    assert world.take(tls=tls) is connection
    world.give(connection)
    world.pass_(0.1)
    assert world.take(tls=tls) is None
    assert (connection.is_closed, world.closed) == (True, {"certificate": 1})


def test_margin_of_a_short_lived_certificate_is_a_share_of_its_rest(world: World) -> None:
    """Of 100 seconds that were left at the opening, 5 are kept away; afterwards nothing is kept at all."""
    tls = Identity(world.clock.wall() + 100.0)
    connection = world.given(tls=tls, keep=75.0)
    world.pass_(50.0)
    world.give(world.take(tls=tls))
    world.pass_(44.9)
    assert world.take(tls=tls) is connection
    world.pass_(0.1)
    world.give(connection)
    assert (connection.is_closed, world.closed) == (True, {"certificate": 1})


def test_wall_clock_that_jumps_over_the_end_is_noticed(world: World) -> None:
    """The moment was settled by another clock."""
    connection = world.given(tls=(tls := Identity()), keep=75.0, not_after=world.clock.wall() + 1000.0)
    assert world.pool.take(KEY, tls, world.now, world.clock.wall() + 1000.0) is None  # type: ignore[arg-type]
    assert connection.is_closed


def test_connection_that_can_not_remember_its_end_has_the_same(world: World) -> None:
    """Its end is found out anew each time."""
    connection = world.connect(keep=75.0)
    del connection.until
    limit, _ = world.pool._ends(connection, world.now)
    for now in (limit - 60.0, limit - 0.1):
        world.clock.now = now
        world.give(connection)
        assert world.take() is connection
    world.clock.now = limit
    world.give(connection)
    assert (connection.is_closed, world.closed) == (True, {"age": 1})


# ------------------------------------------------------------------ how many


def test_idle_connections_of_a_key_are_bounded(world: World) -> None:
    """The oldest goes."""
    connections = [world.given() for _ in range(of.MAX_IDLE + 1)]
    assert [connection.is_closed for connection in connections] == [True] + [False] * of.MAX_IDLE
    assert (len(world.pool), world.closed) == (of.MAX_IDLE, {"full": 1})


def test_idle_connections_of_a_pool_are_bounded(world: World) -> None:
    """Keys give one up in turn, and no key loses what another has too many of."""
    of_key = [[world.given((str(n), "", "")) for _ in range(64)] for n in range(8)]
    assert len(world.pool) == of.MAX_ALL
    for _ in range(16):
        world.given(OTHER)
    assert (len(world.pool), world.closed) == (of.MAX_ALL, {"full": 16})
    assert [[c.is_closed for c in connections].count(True) for connections in of_key] == [2, 2, 2, 2, 2, 2, 2, 1]
    assert all(connections[0].is_closed for connections in of_key)


def test_no_key_is_left_without_a_connection(world: World) -> None:
    """Whatever way the last one went: a fleet's addresses would pile up."""
    taken = world.given()
    assert world.take() is taken
    assert world.pool._idle == {}
    dead = world.given()
    dead.usable = False
    world.take()
    assert world.pool._idle == {}
    world.pool.forget(world.given(), world.now)
    assert world.pool._idle == {}
    world.given()
    world.pass_(10.0)
    world.sweep()
    assert (world.pool._idle, len(world.pool)) == ({}, 0)


# ------------------------------------------------------------------ the sweep


def test_sweep_closes_what_waited_too_long_and_says_when_to_come_again(world: World) -> None:
    """A loop can sleep until then."""
    assert world.sweep() is None
    short, long = world.given(keep=2.0), world.given(OTHER, keep=10.0)
    due = world.sweep()
    assert due == world.now + 2.0 == world.pool.due
    world.pass_(2.0)
    assert world.sweep() == world.now + 8.0
    assert (short.is_closed, long.is_closed) == (True, False)
    world.pass_(8.0)
    assert world.sweep() is None
    assert (long.is_closed, world.closed, world.pool.due) == (True, {"idle": 2}, inf)


def test_sweep_passes_over_all_only_now_and_then(world: World) -> None:
    """However often it's called: what lies between is a comparison."""
    world.given(keep=1.0)
    world.pass_(1.0)
    world.given(keep=0.1)
    world.sweep()
    passed = world.pool._swept
    for _ in range(4):
        world.pass_(of.PAUSE / 5)
        assert world.sweep() == passed + of.PAUSE
    assert len(world.pool) == 1
    assert world.take() is None  # its time is over, although no pass has come by
    world.given(keep=of.PAUSE / 5)
    world.pass_(of.PAUSE / 5)
    assert (world.sweep(), len(world.pool)) == (None, 0)
    world.given(keep=of.PAUSE / 5)
    assert world.pool.due == world.now + of.PAUSE


def test_connection_with_less_time_than_all_others_makes_the_sweep_come_earlier(world: World) -> None:
    """The next pass is due with the first to end."""
    world.given(keep=60.0)
    assert world.sweep() == world.now + 60.0
    world.given(OTHER, keep=3.0)
    assert world.sweep() == world.now + 3.0


def test_closing_may_call_the_pool_back(world: World) -> None:
    """A transport may tell of its end before `close` has returned."""
    for _ in range(3):
        world.given(keep=1.0).pool = world.pool
    world.pass_(1.0)
    assert world.sweep() is None
    assert (world.closed, len(world.pool)) == ({"idle": 3}, 0)


# ------------------------------------------------------------------ the end, and what is counted


def test_connection_that_was_closed_by_us_teaches_nothing(world: World) -> None:
    """Its end is told by the transport afterwards, and nobody knows it any more."""
    for _ in range(3):
        connection = world.given(keep=1.0)
        world.pass_(1.0)
        world.sweep()
        world.pool.forget(connection, world.now)
    assert (world.closed, world.pool._seen) == ({"idle": 3}, {})


def test_connection_that_is_in_use_is_unknown_to_the_pool(world: World) -> None:
    """Whoever uses it hears of its end; others of its key wait on."""
    waiting, used = world.given(), world.given()
    assert world.take() is used
    world.pool.forget(used, world.now)
    assert (len(world.pool), world.closed, world.take()) == (1, {}, waiting)


def test_all_that_waits_is_closed_at_the_end(world: World) -> None:
    """And the pool can be used again."""
    connections = [world.given(), world.given(OTHER)]
    world.pool.clear()
    assert [connection.is_closed for connection in connections] == [True, True]
    assert (len(world.pool), world.sweep(), world.closed) == (0, None, {"shutdown": 2})
    assert world.take() is None
    again = world.given()
    assert world.take() is again


def test_every_end_is_counted_once_under_its_reason(world: World) -> None:
    """The sum is what was closed."""
    world.given()
    world.pool.opened += 3
    world.take()
    world.given(tls=Identity())
    world.take()
    world.given(keep=0.0)
    assert world.pool.stats() == {
        "idle": 0,
        "opened": 3,
        "reused": 1,
        "closed": dict.fromkeys(of.REASONS, 0) | {"generation": 1, "idle": 1},
    }
    assert (world.pool.closed, repr(world.pool)) == (2, "<Pool idle=0 opened=3 reused=1 closed=2>")
