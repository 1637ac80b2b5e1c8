"""Amounts of memory in messages."""

GIB = 2**30


def gib(size: float) -> str:
    """Bytes as text, such as ``1.5 GiB``."""
    return f"{size / GIB:.1f} GiB"
