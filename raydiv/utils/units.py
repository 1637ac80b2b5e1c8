"""Amounts of memory in messages."""

GIB = 2**30

UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}


def size_text(size: float) -> str:
    """Bytes in the largest unit that shows them, such as ``1.5 GiB`` or ``12.3 MiB``."""
    name, unit = next(((name, unit) for name, unit in UNITS.items() if size >= unit), ("bytes", 1))
    return f"{size / unit:.1f} {name}" if unit > 1 else f"{size:.0f} bytes"
