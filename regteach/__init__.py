"""Deep-learning image registration: a course that builds it and a package that does it.

Importing `regteach` needs the standard library only; a name below is looked up in its module when it is first used.
Modules inside the package never import from here.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Affine": "affine",
    "Compose": "transforms",
    "Dense": "transforms",
    "FreeForm": "transforms",
    "Grid": "grid",
    "Identity": "transforms",
    "Lesson": "lesson",
    "Velocity": "transforms",
    "dice": "metrics",
    "displacement": "transforms",
    "grid_points": "sampling",
    "jacobian_determinant": "transforms",
    "load": "checkpoints",
    "register": "registration",
    "resample": "sampling",
    "sample": "sampling",
    "target_registration_error": "metrics",
    "warp": "sampling",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"regteach has no {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"regteach.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
