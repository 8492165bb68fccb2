"""Layer 2. What a download put into a directory, so that it is verified before it is used.

Before it: `download` writes the record when everything is in place. After it: `dataset` has it verified whenever it
reads the directory. A directory that a person filled by hand has no record and is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from xmc_midx.data.files import atomic_write, sha256_of
from xmc_midx.errors import DataError

__all__ = ["MANIFEST", "read_manifest", "verify_directory", "write_manifest"]

MANIFEST = ".xmc-midx.json"
_VERSION = 1


def write_manifest(directory: Path, hashes: Mapping[str, str], facts: Mapping[str, str]) -> None:
    """Record the files of `directory`.

    Parameters
    ----------
    hashes : sha256 of each file by its path in `directory`.
    facts : where they came from.
    """
    files = {}
    for name, sha256 in sorted(hashes.items()):
        found = (directory / name).stat()
        files[name] = {"size": found.st_size, "sha256": sha256, "mtime_ns": found.st_mtime_ns}
    document = {"version": _VERSION, **facts, "files": files}
    with atomic_write(directory / MANIFEST) as file:
        file.write(json.dumps(document, indent=1).encode())


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The record; None if there is none.

    Raises
    ------
    DataError : it is damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] == _VERSION and all(_is_sound(*item) for item in document["files"].items()):
            return dict(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"{path}: is damaged, expected the record of a download.", hint="Remove the directory.")


def _is_sound(name: str, entry: Mapping[str, Any]) -> bool:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and {key: type(value) for key, value in entry.items()} == {
        "size": int,
        "sha256": str,
        "mtime_ns": int,
    }


def verify_directory(directory: Path, *, all_bytes: bool = False) -> None:
    """Compare the files of `directory` with its record.

    Parameters
    ----------
    all_bytes : hash every file; else those alone whose time of change differs from the record's.

    Raises
    ------
    DataError : a file is missing or is not what was downloaded.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items() if manifest else ():
        path = directory / name
        if not path.is_file():
            raise DataError(f"{path}: is missing, the download had it.")
        found = path.stat()
        if found.st_size != entry["size"]:
            raise DataError(f"{path}: has {found.st_size:,} bytes, the download had {entry['size']:,}.")
        suspect = all_bytes or found.st_mtime_ns != entry["mtime_ns"]
        if suspect and sha256_of(path) != entry["sha256"]:
            raise DataError(f"{path}: is not what was downloaded, its sha256 differs from the record's.")
