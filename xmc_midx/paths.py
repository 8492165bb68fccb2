"""Layer 1. Paths as people write them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["home_path"]


def home_path(path: str | Path) -> Path:
    """The path, below the home directory where it begins with `~/`; as it is where there is none."""
    path = Path(path)
    if path.parts[:1] != ("~",):
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        return path
