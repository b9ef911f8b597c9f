"""Which mesh is that of this Django process?

One, made from `settings.MESH` when it is first asked for, and kept: the application, the views and the management commands share it. What
the settings say counts; what they leave out comes from the environment (MESHLIB_CONFIG, MESHLIB_SERVICE, MESHLIB_ZONE), as everywhere.
Nothing is loaded at import: Django's settings may not be there yet.

A test that changes `settings.MESH` gets another mesh, and the old one is closed.
"""

from __future__ import annotations

import threading
from typing import Any, Final

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from meshlib import Mesh

SETTING: Final = "MESH"
KEYS: Final = ("CONFIG", "SERVICE", "ZONE")

_lock = threading.Lock()
_mesh: Mesh | None = None


def mesh() -> Mesh:
    """The mesh of this process. Raises `ImproperlyConfigured` for settings that can't be used, and what `Mesh.load` raises."""
    global _mesh
    if _mesh is None:
        with _lock:
            if _mesh is None:
                said = wanted()
                _mesh = Mesh.load(said.get("CONFIG"), service=said.get("SERVICE"), zone=said.get("ZONE"))
    return _mesh


def wanted() -> dict[str, Any]:
    """What the settings say about the mesh; {} if they say nothing."""
    said = getattr(settings, SETTING, None) or {}
    if not isinstance(said, dict):
        raise ImproperlyConfigured(f'MESH is {said!r}; a dictionary is expected, such as {{"CONFIG": BASE_DIR / "mesh.yaml"}}.')
    if unknown := sorted(set(map(str, said)) - set(KEYS)):
        raise ImproperlyConfigured(
            f"MESH has {', '.join(unknown)}; it may have {', '.join(KEYS)}. All else belongs into mesh.yaml."
        )
    return said


def _forget(*, setting: str, **_: Any) -> None:
    global _mesh
    if setting == SETTING:
        with _lock:
            old, _mesh = _mesh, None
        if old is not None:
            old.close()


setting_changed.connect(_forget, dispatch_uid="meshlib_django")
