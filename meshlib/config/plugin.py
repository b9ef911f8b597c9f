"""What does an installed package offer under a name that the configuration says?

    meshlib.identity   identities     secure.identity: {plugin: spiffe}
    meshlib.resolver   registries     registries: {consul: …}
    meshlib.limit      stores         stores: {redis: …}
    meshlib.config     sources        MESHLIB_CONFIG=etcd://…

A package is loaded only when its name is said, and exactly one may offer it: two would leave it to chance whom we believe. What goes
wrong in it is told by the kind of the error alone, since the text may hold what it was given, and that a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final, TypeVar

from meshlib.errors import ConfigError, MeshError

from .values import near

T = TypeVar("T")

# The packages of this project, each by the name that it has here: meshlib-<name>.
OURS: Final = {
    "meshlib.identity": ("consul", "spiffe"),
    "meshlib.resolver": ("consul", "etcd"),
    "meshlib.limit": ("redis",),
    "meshlib.config": ("consul", "etcd"),
}
_WORD: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\Z")


def opened(group: str, name: str, make: Callable[[Any], T], *, at: str, trusted_with: str) -> tuple[T, str]:
    """What `make` makes of the factory that a package offers, and where it comes from. Raises ConfigError, or what the package raised.

    `at` is the key of mesh.yaml, `trusted_with` what is in the package's hands.
    """
    points = tuple(entry_points(group=group, name=name))
    if not points:
        raise ConfigError(f"{at}: no installed package provides {name!r}.", hint=_install(group, name))
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


def _install(group: str, name: str) -> str:
    """What to do about a package that isn't there. A mistyped name must not send anybody after a package of that name."""
    kind = name.partition("+")[0]  # of a URL with TLS: etcd+https
    ours = OURS.get(group, ())
    close = "" if kind in ours else near(kind, ours)
    if close:
        one = next(each for each in ours if repr(each) in close)
        return f"{close}It comes with: pip install meshlib-{one}. Any other package has an entry point in the group {group}."
    install = f": pip install meshlib-{kind}" if _WORD.match(kind) else ""
    return f"Install the package that does{install}. It has an entry point in the group {group}."
