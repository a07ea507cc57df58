"""Model weights in shared memory, mapped before they are asked for.

``import cached`` is nearly free: everything else is imported when it is first used.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cached.client.model import Model
    from cached.client.opening import open  # noqa: A004 - cached.open, as in gzip.open
    from cached.core.errors import (
        BadRequest,
        CachedError,
        DaemonUnavailable,
        FormatError,
        InvalidConfig,
        LoadFailed,
        MissingPackage,
        ModelClosed,
        ModelUnknown,
        NotPermitted,
        OutOfSpace,
        OverBudget,
        ProtocolMismatch,
        Stale,
        StoreError,
        TensorUnknown,
        TimedOut,
        VersionUnknown,
    )

_HOMES = {"open": "cached.client.opening", "Model": "cached.client.model"}

__all__ = [
    "BadRequest",
    "CachedError",
    "DaemonUnavailable",
    "FormatError",
    "InvalidConfig",
    "LoadFailed",
    "MissingPackage",
    "Model",
    "ModelClosed",
    "ModelUnknown",
    "NotPermitted",
    "OutOfSpace",
    "OverBudget",
    "ProtocolMismatch",
    "Stale",
    "StoreError",
    "TensorUnknown",
    "TimedOut",
    "VersionUnknown",
    "__version__",
    "open",
]


def __getattr__(name: str) -> object:
    """Import what is asked for, and keep it (PEP 562)."""
    if name not in __all__:
        message = f"module 'cached' has no attribute {name!r}"
        raise AttributeError(message)
    import importlib

    found = getattr(importlib.import_module(_HOMES.get(name, "cached.core.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
