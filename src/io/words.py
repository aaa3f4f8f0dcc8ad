"""Counts and sizes as a reader expects them: `1 image`, `2 images`, `3.1 MB`, never `1 images` or `0.00 GB`."""

from __future__ import annotations

DECIMAL, BINARY = ("B", "KB", "MB", "GB", "TB"), ("B", "KiB", "MiB", "GiB", "TiB")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `1,200 images`. plural: of a noun that takes more than an s"""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def data_size(num_bytes: float, *, units: tuple[str, ...] = DECIMAL, digits: int = 1) -> str:
    """Bytes in the largest unit of which there is at least one: `0 B`, `4 B`, `3.1 MB`."""
    base, unit = (1000 if units is DECIMAL else 1024), 0
    while round(num_bytes, digits) >= base and unit < len(units) - 1:
        num_bytes, unit = num_bytes / base, unit + 1
    return f"{num_bytes:.{digits if unit else 0}f} {units[unit]}"
