"""Numbers -> texts with a unit, for people."""

from __future__ import annotations


def in_bytes(count: int) -> str:
    """Bytes in the largest unit of which there is at least one: "3 KiB", "1.5 GiB"."""
    scaled, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if scaled < 1024:
            break
        scaled, unit = scaled / 1024, larger
    return f"{scaled:.0f} {unit}" if scaled == int(scaled) else f"{scaled:.1f} {unit}"


def in_seconds(seconds: float) -> str:
    """A time in s, ms or µs, with three digits: "1.25 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
