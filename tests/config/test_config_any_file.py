"""Does every file become a configuration or a list of problems, and nothing else?

Files that have every section between them are damaged at one to three places at random. Whatever comes of it, the
loader may answer in two ways only; and what it accepts, the core accepts too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshlib._native import core
from meshlib.config import json_schema, load
from meshlib.config.text import parse
from meshlib.errors import ConfigError, Problem


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


# Read as meshlib reads it: for PyYAML the words `on` and `off` would be true and false.
GOLDEN = {
    file.stem: _plain(parse(file.read_text(), "golden").value)
    for file in sorted((Path(__file__).parent / "golden").glob("*.yaml"))
}


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from _places(item, (*path, key))


PLACES = [(name, path) for name, document in GOLDEN.items() for path in _places(document)]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2000),
    st.floats(-1, 100),
    st.sampled_from(
        [
            "",
            "*",
            "/",
            "/a/*",
            "/{x}",
            "observe",
            "enforce",
            "orders",
            "1s",
            "a:1",
            "[::1]:1",
            "spiffe://a/b",
            "GET",
            "x",
            "off",
            "gradient",
            "ring_hash",
            "redis",
            "local",
            "route",
            "*/ns/a",
            "spiffe://a/*",
            "*x",
            "bearer",
            "HS256",
            "10.0.0.0/8",
            "10.0.0.1/8",
            "https://a.test/k",
            "https://localhost/k",
            "a.test",
            "*.a.test",
            "source.ip",
            "request.headers[x]",
            "(",
            "/a(b",
            "/{**}",
            "insensitive",
        ]
    ),
    st.sampled_from(
        [
            [],
            {},
            [[]],
            [{}],
            {"a": 1},
            {"labels": {"version": "v1"}},
            ["*"],
            ["127.0.0.1:1"],
            [1, 2],
            [{"path": "id"}],
            [443],
            ["/x"],
        ]
    ),
)


def test_every_section_of_the_schema_is_in_a_golden_file() -> None:
    """What no file holds, nothing below could damage."""
    schema = json_schema()
    used: set[str] = set()
    for _, path in PLACES:
        used |= {part for part in path if isinstance(part, str)}
    keys = {key for item in schema["$defs"].values() for key in item.get("properties", {})} | set(schema["properties"])
    assert keys - used == set()


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(st.tuples(st.sampled_from(PLACES), VALUES, st.booleans()), min_size=1, max_size=3))
def test_a_damaged_file_is_refused_with_lines_or_makes_plans(
    damages: list[tuple[tuple[str, tuple[Any, ...]], Any, bool]], tmp_path: Path
) -> None:
    """Problems have a line, a key and a message; a configuration makes plans that Rust takes."""
    document = copy.deepcopy(GOLDEN[damages[0][0][0]])
    for (_, path), value, is_deleted in damages:
        place = document
        for part in path[:-1]:
            is_there = part in place if isinstance(place, dict) else isinstance(place, list) and part in range(len(place))
            if not is_there:
                break
            place = place[part]
        else:
            if isinstance(place, dict):
                place[path[-1]] = value
                if is_deleted:
                    del place[path[-1]]
            elif isinstance(place, list) and path[-1] in range(len(place)):
                place[path[-1]] = value
    file = tmp_path / "mesh.yaml"
    file.write_text(yaml.safe_dump(document))
    lines = len(file.read_text().splitlines())
    problems: list[Problem] = []
    try:
        config = load(file, service="orders")
    except ConfigError as error:
        problems = error.problems
    else:
        core.Engine(1).publish(config.client_plan(), 0.0)
        core.Gate().publish(config.server_plan(), 0.0)
        return
    assert problems
    assert all(1 <= problem.line <= lines and problem.key and problem.message for problem in problems)
    assert len(problems) == len(set(problems))
