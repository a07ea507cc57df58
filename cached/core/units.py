"""Sizes and durations between text and numbers, at the border only.

Inside, every size is in bytes and every duration in seconds.
"""

from __future__ import annotations

import re

from cached.core.errors import InvalidConfig

_BINARY: dict[str, int] = {
    unit: 1024**power for power, unit in enumerate(("", "ki", "mi", "gi", "ti"))
}
_DECIMAL: dict[str, int] = {
    unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))
}
_BYTES = (
    {f"{prefix}b": factor for prefix, factor in _DECIMAL.items()}
    | {f"{prefix}b": factor for prefix, factor in _BINARY.items()}
    # as in Kubernetes; "8G" is left out: it means 8 * 10^9 there and 8 * 2^30 in docker
    | _BINARY
)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = r"(\d{1,18})(?:\.(\d{1,18}))?"


def parse_bytes(value: str | float) -> int:
    """Return a size in bytes.

    Args:
        value: ``"512MiB"``, ``"8GB"``, ``"1.5 GiB"``, ``"8Gi"``; a bare number is in bytes.
            A fraction of a byte is dropped.

    Raises:
        InvalidConfig: it is something else, or negative.
    """
    if isinstance(value, str):
        found = re.fullmatch(rf"{_NUMBER}\s*([a-z]*)", value.strip().lower(), re.ASCII)
        if found and found[3] in _BYTES:
            fraction = found[2] or ""
            denominator: int = 10 ** len(fraction)
            return int(found[1] + fraction) * _BYTES[found[3]] // denominator
    elif not isinstance(value, bool) and value >= 0 and value % 1 == 0:
        return int(value)
    message = f"a size must be a number with a unit, such as 512MiB, 8GiB or 8GB, was {value!r}"
    raise InvalidConfig(message)


def parse_seconds(value: str | float) -> float:
    """Return a duration in seconds.

    Args:
        value: ``"1m30s"``, ``"250ms"``, ``"1.5h"``; a bare number is in seconds.

    Raises:
        InvalidConfig: it is something else, negative, or not finite.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if re.fullmatch(_NUMBER, text, re.ASCII):
            return float(text)
        units = "|".join(sorted(_SECONDS, key=len, reverse=True))
        step = rf"{_NUMBER}\s*({units})\s*"
        if text and re.fullmatch(rf"(?:{step})+", text, re.ASCII):
            return sum(
                float(f"{whole}.{fraction or 0}") * _SECONDS[unit]
                for whole, fraction, unit in re.findall(step, text, re.ASCII)
            )
    elif not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    message = f"a duration must be a number with a unit, such as 1m30s or 250ms, was {value!r}"
    raise InvalidConfig(message)


def format_bytes(size_bytes: float) -> str:
    """Return a size for people: ``512 B``, ``64 MiB``, ``3.1 GiB``; one decimal at most."""
    return _scaled(size_bytes, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def format_bytes_up(size_bytes: int) -> str:
    """Return a size for people that is enough: as ``format_bytes``, never less."""
    return format_bytes(_whole_tenths(size_bytes, is_up=True))


def format_bytes_down(size_bytes: int) -> str:
    """Return a size for people that is there: as ``format_bytes``, never more."""
    return format_bytes(_whole_tenths(size_bytes, is_up=False))


def _whole_tenths(size_bytes: int, *, is_up: bool) -> float:
    """Return the next size, up or down, that one decimal shows exactly."""
    scale = 1
    while scale < 1024**4 and scale * 1024 <= size_bytes:
        scale *= 1024
    if scale == 1:
        return size_bytes
    tenths = -(-size_bytes * 10 // scale) if is_up else size_bytes * 10 // scale
    return tenths * scale / 10


def format_seconds(seconds: float) -> str:
    """Return a duration for people: ``250 ms``, ``2.5 s``, ``1m30s``, ``2h``."""
    if 0 < seconds < 0.9995:
        return _scaled(seconds * 1e6, ("us", "ms"), 1000)
    if seconds < 59.95:
        return _scaled(seconds, ("s",), 1)
    whole = round(seconds)
    parts = {"d": whole // 86400, "h": whole // 3600 % 24, "m": whole // 60 % 60, "s": whole % 60}
    return "".join(f"{count}{unit}" for unit, count in parts.items() if count)


def _scaled(number: float, units: tuple[str, ...], step: int) -> str:
    """Return a number in the largest unit of which there is at least one."""
    *smaller, largest = units
    scale = 1
    unit = largest
    for smaller_unit in smaller:
        if round(number / scale, 1) < step:
            unit = smaller_unit
            break
        scale *= step
    if number % scale == 0:
        return f"{number // scale:.0f} {unit}"
    return f"{number / scale:.1f} {unit}"
