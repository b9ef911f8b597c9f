"""Which native library is this, and is it the right one?

The one door to the Rust core. It stands here so that a missing or stale extension fails at once and says what to do: without
this file `import meshlib._native` would succeed as an empty namespace package.
"""

from __future__ import annotations

try:
    from . import _core
except ImportError as error:
    raise ImportError(
        "meshlib's native core could not be loaded: the wheel does not fit this interpreter, or the extension was never built. "
        "Install meshlib-servicemesh again; in a checkout run `make build`. "
        f"({error})"
    ) from error

EXPECTED = "0.1.0"

if _core.VERSION != EXPECTED:
    raise ImportError(
        f"meshlib's native core has version {_core.VERSION}, the Python part expects {EXPECTED}: two installs got mixed. "
        "Uninstall meshlib-servicemesh and install it again; in a checkout run `make build`."
    )

core = _core

__all__ = ["EXPECTED", "core"]
