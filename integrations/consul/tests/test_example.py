"""Do the example and the configuration beside it do what they say, and does the README name every setting?"""

from __future__ import annotations

import os
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

from meshlib_consul import ConsulRegistry, open_registry
from meshlib_consul.entry import terms_of
from meshlib_consul.health import query_of
from meshlib_consul.place import Reader, place_of

import meshlib
from meshlib.discover import Instance
from tests.support import PYTHON

FOLDER = Path(__file__).parent.parent
README = (FOLDER / "README.md").read_text()


def test_the_example_shows_an_instance_come_and_go(agent: Any) -> None:
    """Its output is what it says it is."""
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [PYTHON, str(FOLDER / "example.py"), agent.url, "orders", "3"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == ["orders: 0 instances", "+ 127.0.0.1:8301 weight 1 {'version': 'v2'}", "- 127.0.0.1:8301"]


def test_the_configuration_beside_it_is_whole() -> None:
    """And its registry's settings are taken by the package."""
    mesh = meshlib.Mesh.load(FOLDER / "mesh.yaml", service="orders")
    config = mesh.config
    registry = open_registry(config.registries["consul"].settings)
    assert isinstance(registry, ConsulRegistry)
    own = config.services["orders"]
    assert own.discover is not None and own.register is not None
    assert query_of("orders", own.discover.settings).tags == ("v2",)
    assert terms_of(Instance("orders", "orders-1", "127.0.0.1:8301"), own.register.settings).ttl == 15.0
    mesh.close()


def test_the_readme_names_every_setting() -> None:
    """Each that a reader takes, and no other list to forget."""
    readers = [Reader("registries.consul", {}), Reader("discover", {}), Reader("register", {})]
    place_of(readers[0])
    known = set(readers[0]._known)
    for module in ("health", "entry", "connect"):
        text = (FOLDER / "meshlib_consul" / f"{module}.py").read_text()
        known |= {
            part.partition('"')[0]
            for method in ("text", "texts", "flag", "seconds", "pairs")
            for part in text.split(f'reader.{method}("')[1:]
        }
    assert len(known) > 20 and len(fields(Instance)) > 5
    assert [name for name in sorted(known) if f"`{name}`" not in README] == []
