"""How are the results shown? A table for each peer: scenarios down, ways across; or JSON for programs."""

from __future__ import annotations

import dataclasses
import json

from tests.interop.expected import SCENARIOS
from tests.interop.matrix import Result, Told


def as_text(told: Told) -> str:
    return "\n\n".join(_peer(told, name) for name in told.versions)


def as_json(told: Told) -> str:
    content = {
        "peers": [
            {
                "name": name,
                "version": version,
                "skipped": told.skipped.get(name),
                "broken": told.broken.get(name),
                "notes": told.notes.get(name, ()),
            }
            for name, version in told.versions.items()
        ],
        "results": [{**dataclasses.asdict(result), "passed": not result.failure} for result in told.results],
    }
    return json.dumps(content, indent=1) + "\n"


def _peer(told: Told, name: str) -> str:
    lines = [f"{name} {told.versions[name]}"]
    if name in told.skipped:
        return f"{lines[0]}: skipped, {told.skipped[name]}"
    results = [result for result in told.results if result.peer == name]
    for direction in dict.fromkeys(result.direction for result in results):
        lines += ["", *_direction(direction, [result for result in results if result.direction == direction])]
    lines += [f"note: {note}" for note in told.notes.get(name, ())]
    lines += [
        f"FAILED {result.direction}, {result.way}, {result.scenario}: {result.failure}" for result in results if result.failure
    ]
    if name in told.broken:
        lines.append(f"FAILED: could not be run: {told.broken[name]}")
    lines.append(f"{sum(not result.failure for result in results)} of {len(results)} passed")
    return "\n".join(lines)


def _direction(direction: str, results: list[Result]) -> list[str]:
    ways = list(dict.fromkeys(result.way for result in results))
    seen = {(result.scenario, result.way): "FAIL" if result.failure else "pass" for result in results}
    first = max(len(direction), *(len(scenario) for scenario in SCENARIOS))
    rows = [(direction, ways), *((scenario, [seen.get((scenario, way), "-") for way in ways]) for scenario in SCENARIOS)]
    return ["  ".join([name.ljust(first), *(cell.ljust(10) for cell in cells)]).rstrip() for name, cells in rows]
