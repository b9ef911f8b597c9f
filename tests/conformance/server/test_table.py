"""Is the table of behaviours whole: as many as promised, each of them told apart, and none left out without a reason?"""

from __future__ import annotations

from tests.conformance.server.behaviours import ALL
from tests.conformance.server.kinds import KINDS, NEEDS, places


def test_there_are_as_many_behaviours_as_promised() -> None:
    """At least sixty; whoever adds or takes away one says so here."""
    assert len(ALL) == 130
    assert len({each.name for each in ALL}) == len(ALL)


def test_each_behaviour_says_its_rule() -> None:
    """In its docstring."""
    assert [each.name for each in ALL if not each.rule.endswith(".")] == []


def test_each_behaviour_runs_on_more_than_one_server() -> None:
    """One that is about a single server belongs to the tests of that server."""
    where = {each.name: {kind.server for kind, mode in places() if not each.obstacles(kind, mode)} for each in ALL}
    assert {name: servers for name, servers in where.items() if len(servers) < 2} == {}


def test_what_a_kind_lacks_has_a_reason_and_a_behaviour_that_needs_it() -> None:
    """Else it would stand there for nothing."""
    needed = {need for each in ALL for need in each.needs}
    assert needed <= set(NEEDS)
    for kind in KINDS:
        assert set(kind.lacks) <= needed, kind.name
        assert all(len(reason.split()) > 3 for reason in kind.lacks.values()), kind.name


def test_every_server_and_every_framework_is_there() -> None:
    """All that meshlib says it serves, in the modes in which they can be."""
    assert {kind.server for kind in KINDS} == {
        "uvicorn", "uvicorn-h11", "uvicorn-command", "gunicorn-asgi", "gunicorn-threads", "gunicorn-command", "gunicorn-sync",
        "hypercorn", "granian", "waitress",
    }  # fmt: skip
    assert {kind.framework for kind in KINDS} == {"asgi", "wsgi", "starlette", "fastapi", "flask", "django", "django-wsgi"}
    assert {kind.name for kind in KINDS if "tls" in kind.lacks} == {kind.name for kind in KINDS if kind.modes == ("observe",)}
