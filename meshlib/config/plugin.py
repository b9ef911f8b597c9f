"""What does an installed package offer under a name that the configuration says?

    meshlib.identity   identities     secure.identity: {plugin: spiffe}
    meshlib.resolver   registries     registries: {consul: …}
    meshlib.limit      stores         stores: {redis: …}
    meshlib.config     sources        MESHLIB_CONFIG=etcd://…

A package is loaded only when its name is said, and exactly one may offer it: two would leave it to chance whom we believe. What goes
wrong in it is told by the kind of the error alone, since the text may hold what it was given, and that a secret.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Final, TypeVar

from meshlib.errors import ConfigError, MeshError

from .text import Path, Text
from .values import near, nearest, some

T = TypeVar("T")

# The packages of this project, each by the name that it has here: meshlib-<name>.
OURS: Final = {
    "meshlib.identity": ("consul", "spiffe"),
    "meshlib.resolver": ("consul", "etcd"),
    "meshlib.limit": ("redis",),
    "meshlib.config": ("consul", "etcd"),
}
# What the mesh itself understands in a section of which a package gets the rest.
_OURS_IN: Final = {
    "registries": ("plugin", "cache"),
    "discover": ("registry",),
    "register": ("registry", "address", "labels", "weight"),
}
# A key of one of these sections, and what parts it from the rest of a message.
_KEY: Final = re.compile(r"(registries|services)(?:((?:\.[A-Za-z0-9_-]+)+)(?:: | )|: )")
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


def note(text: Text, at: Path, error: ConfigError) -> None:
    """Add what a package refuses to the problems of a text: each at the key that it speaks of, or at `at`, the section of its settings."""
    text.problems += error.problems
    known = (*_OURS_IN.get(str(at[0] if len(at) == 2 else at[-1]), ()), *error.known)
    for key in error.unknown:
        text.refuse((*at, key), "unknown key", f"{near(key, known)}allowed: {some(known, 20)}")
    if not error.problems and not error.unknown:
        path, message = _divided(error.message, at)
        text.refuse(path, message.rstrip("."), error.hint.rstrip("."))


@contextlib.contextmanager
def noting(text: Text, at: Path) -> Iterator[None]:
    """What a package refuses in here is noted; and what goes wrong in it, by its kind alone."""
    try:
        yield
    except ConfigError as error:
        note(text, at, error)
    except MeshError as error:
        text.refuse(at, error.message.rstrip("."), error.hint.rstrip("."))
    except Exception as error:
        text.refuse(at, f"its package can't use it: {type(error).__name__}", "correct it, or what is wrong with that package")


def _divided(message: str, at: Path) -> tuple[Path, str]:
    """The key that a message begins with, as far as it is one of a section of the file, and what is left of the message.

    A package calls its section as it is usually called (`registries.etcd`), whatever the name of its entry is.
    """
    message = message.removeprefix(f"{at[-1]}: ")
    match = _KEY.match(message)
    if match is None or match[1] != at[0]:
        return at, message
    keys = tuple(match[2].split(".")[1:]) if match[2] else ()
    inner = keys[len(at) - 1 :]
    return (*at, *inner), message[match.end() :]


def _install(group: str, name: str) -> str:
    """What to do about a package that isn't there. A mistyped name must not send anybody after a package of that name."""
    kind = name.partition("+")[0]  # of a URL with TLS: etcd+https
    ours = OURS.get(group, ())
    close, group = nearest(kind, ours), f"an entry point in the group {group}"
    if close and close != kind:
        return f"did you mean {close!r}? It comes with: pip install meshlib-{close}. Any other package has {group}."
    install = f": pip install meshlib-{kind}" if _WORD.match(kind) else ""
    return f"Install the package that does{install}. It has {group}."
