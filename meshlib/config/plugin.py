"""What does an installed package offer under a name that the configuration says?

    meshlib.identity   identities     secure.identity: {plugin: spiffe}
    meshlib.resolver   registries     registries: {consul: …}
    meshlib.limit      stores         stores: {redis: …}
    meshlib.config     sources        MESHLIB_CONFIG=etcd://…

A package is loaded only when its name is said, and exactly one may offer it: two would leave it to chance whom we believe. What goes
wrong in it is told by the kind of the error alone, since the text may hold what it was given, and that a secret.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from meshlib.errors import ConfigError, MeshError

T = TypeVar("T")


def opened(group: str, name: str, make: Callable[[Any], T], *, at: str, example: str, trusted_with: str) -> tuple[T, str]:
    """What `make` makes of the factory that a package offers, and where it comes from. Raises ConfigError, or what the package raised.

    `at` is the key of mesh.yaml, `example` a package that offers such a thing, `trusted_with` what is in its hands.
    """
    points = tuple(entry_points(group=group, name=name))
    if not points:
        plain = example.removeprefix("meshlib-")
        raise ConfigError(
            f"{at}: no installed package provides {name!r}.",
            hint=f"Install the one that does (for {plain}: pip install {example}). It has an entry point in the group {group}.",
        )
    if len(points) > 1:
        offered = ", ".join(sorted(point.value for point in points))
        raise ConfigError(
            f"{at}: {name!r} is offered by {len(points)} packages: {offered}.",
            hint=f"Uninstall all but the one that you trust with your {trusted_with}.",
        )
    try:
        return make(points[0].load()), points[0].value
    except MeshError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{at}: {points[0].value} can't be used: {type(error).__name__}.",
            hint="Correct its settings, or what is wrong with the installation of that package.",
        ) from None
