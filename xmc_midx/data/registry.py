"""Layer 2. `datasets.yaml` -> `DatasetSpec`: what is known of the published data sets.

Before it: nothing. After it: `dataset` finds a set by its name or its sizes, `download` fetches it. The
file lies beside this module in a wheel, and at the top of the repository in a source checkout.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xmc_midx.errors import DataError, UsageError
from xmc_midx.types import DEFAULT_PROPENSITY

__all__ = [
    "ArchiveFormat",
    "DatasetSpec",
    "DriveIds",
    "Mirror",
    "PublishedResult",
    "cache_directory",
    "find_spec",
    "load_registry",
    "match_spec",
]

ArchiveFormat = Literal["bow", "bow-v1", "raw"]
"""Bag-of-words features, their first release, raw text."""

Size = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DriveIds(_Record):
    """Ids of the repository's own files on Google Drive."""

    bow: str
    """Archive with bag-of-words features in XMC text."""
    raw: str | None = None
    """Archive with the raw text."""


class Mirror(_Record):
    """An archive elsewhere, and the files to expect in it."""

    format: ArchiveFormat
    """`bow-v1`: the first release of the features, the one of older publications."""
    drive: str | None = None
    """Google Drive id; either this or `url`."""
    url: str | None = None
    """Address of the archive itself."""
    sha256: str | None = None
    """Of the archive, where it is known; else the first download's is recorded on the user's machine."""
    folder: str = ""
    """Folder inside the archive."""
    train: tuple[str, ...] = ()
    """One file, or two: features, labels. Empty: not known, recognised by their names."""
    test: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_one_place(self) -> Mirror:
        if (self.drive is None) == (self.url is None):
            raise ValueError("expected one of drive and url")
        return self

    @property
    def key(self) -> str:
        """What the archive is known by on the user's machine."""
        return f"drive:{self.drive}" if self.drive else str(self.url)


class PublishedResult(_Record):
    """A row of the repository's tables, in percent; the marks in a method's name are the repository's."""

    method: str
    P: tuple[float | None, float | None, float | None]
    """P@1, P@3, P@5; None where the table has no figure."""
    PSP: tuple[float | None, float | None, float | None]


class DatasetSpec(_Record):
    """One entry of the registry. The sizes are those that its publisher states; None where nobody does."""

    name: str
    description: str
    num_features: Size | None = None
    num_labels: Size | None = None
    num_train: Size | None = None
    num_test: Size | None = None
    labels_per_instance: float | None = None
    instances_per_label: float | None = None
    propensity_a: float = Field(default=DEFAULT_PROPENSITY[0], gt=0)
    propensity_b: float = Field(default=DEFAULT_PROPENSITY[1], gt=0)
    embedded: bool = False
    """Whether the data is part of this package."""
    drive: DriveIds | None = None
    mirrors: tuple[Mirror, ...] = ()
    homepage: str
    licence: str
    citation: str
    """Of the published split; cite it with the original source."""
    original_citation: str | None = None
    """Of the original source, where it is known for certain."""
    results: tuple[PublishedResult, ...] = ()
    """What the repository states of other methods on this split."""

    def sources(self, kind: ArchiveFormat = "bow") -> tuple[Mirror, ...]:
        """Where an archive is, in the order to try: the repository, then its mirrors.

        `bow` ends with the first release of the features: where the sizes are equal, it is the same set.
        """
        wanted = ("bow", "bow-v1") if kind == "bow" else (kind,)
        mirrors = [mirror for format in wanted for mirror in self.mirrors if mirror.format == format]
        own = getattr(self.drive, kind, None) if self.drive else None
        if own is None:
            return tuple(mirrors)
        # A mirror of the same archive knows its files.
        first = next((m for m in mirrors if m.drive == own), None) or Mirror(format=kind, drive=own)
        return (first, *(mirror for mirror in mirrors if mirror is not first))

    @property
    def directory(self) -> Path:
        """Where the data is, or would be after a download."""
        if self.embedded:
            return Path(__file__).parent / "embedded" / self.name
        return cache_directory() / self.name


class _Registry(_Record):
    defaults: dict[str, Any]
    datasets: tuple[DatasetSpec, ...]

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Each entry gets the defaults for what it does not state."""
        return {**tree, "datasets": [{**tree["defaults"], **entry} for entry in tree["datasets"]]}


@cache
def load_registry() -> tuple[DatasetSpec, ...]:
    """All entries of `datasets.yaml`, in its order.

    Raises
    ------
    DataError : the file is missing or is not as it should be: the installation is damaged.
    """
    here = Path(__file__).parent
    path = next((p for p in (here / "datasets.yaml", here.parents[1] / "datasets.yaml") if p.is_file()), None)
    if path is None:
        raise DataError("datasets.yaml: not found in the package.", hint="Install xmc-midx again.")
    try:
        return _Registry.model_validate(_read_yaml(path.read_text(encoding="utf-8"))).datasets
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: is not a registry of data sets: {reason}.") from None


def _read_yaml(text: str) -> Any:
    """`yaml.safe_load`, in a tenth of the time where PyYAML was built with libyaml: `load_dataset` waits for it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def find_spec(name: str) -> DatasetSpec:
    """The entry of that name, upper or lower case.

    Raises
    ------
    UsageError : there is none; the hint names the nearest ones.
    """
    for spec in load_registry():
        if spec.name.lower() == name.lower():
            return spec
    names = {spec.name.lower(): spec.name for spec in load_registry()}
    near = [names[match] for match in difflib.get_close_matches(name.lower(), names, n=3)]
    hint = f"Did you mean {' or '.join(near)}?" if near else "`xmc-midx datasets` lists the names."
    raise UsageError(f"{name}: no such data set in the registry.", hint=hint)


def match_spec(num_features: int | None, num_labels: int, num_train: int | None = None) -> DatasetSpec | None:
    """The entry with exactly these sizes, to choose A and B for a directory; None if there is none.

    Parameters
    ----------
    num_features : None leaves them out of the comparison, as those of raw text are ours; the rows must then be given.
    num_train : rows of the training split; None (no training split) leaves it out of the comparison.
    """
    for spec in load_registry():
        known = spec.num_labels == num_labels and num_features in (None, spec.num_features)
        if known and num_train in ((spec.num_train,) if num_features is None else (None, spec.num_train)):
            return spec
    return None


def cache_directory() -> Path:
    """Where downloaded sets live: `$XMC_MIDX_CACHE`, else `xmc-midx` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises
    ------
    UsageError : no variable is set and there is no home directory.
    """
    if own := os.environ.get("XMC_MIDX_CACHE"):
        return Path(own)
    if common := os.environ.get("XDG_CACHE_HOME"):
        return Path(common) / "xmc-midx"
    try:
        return Path.home() / ".cache" / "xmc-midx"
    except RuntimeError:
        raise UsageError("There is no home directory for the cache.", hint="Set XMC_MIDX_CACHE.") from None
