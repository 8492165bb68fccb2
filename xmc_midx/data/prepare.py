"""Layer 2. Raw text -> a dataset directory: TF-IDF features, label ids, names and the vocabulary.

Before it: `raw` (records), `vocabulary` (texts -> features), `labelset` (labels -> ids). After it: `dataset` finds
`train.txt`, `test.txt`, `labels.txt` and `vocabulary.txt` in the directory. Under its name the directory is complete,
or it is not there. The training texts are read once and not kept; what is held are their features.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from scipy.sparse import csr_matrix, vstack

from xmc_midx.crash import crash_point
from xmc_midx.data.files import SUFFIXES, atomic_write, find_variant, sync_directory
from xmc_midx.data.formats import write_xmc
from xmc_midx.data.ignored import ignored_name, read_ignored, write_ignored
from xmc_midx.data.labelset import LabelKind, LabelRows, LabelSet, RawLabels, read_label_names
from xmc_midx.data.raw import TextLayout, TextRecord, read_texts
from xmc_midx.data.vocabulary import Vocabulary
from xmc_midx.errors import DataError, ResourceError, UsageError
from xmc_midx.types import Reporter, SilentReporter

__all__ = ["Preparation", "PreparedSplit", "prepare"]

_SPLITS = "train", "test"
_OURS = {
    f"{name}{suffix}"
    for name in ("labels.txt", "vocabulary.txt", *(f"{split}.txt" for split in _SPLITS), *map(ignored_name, _SPLITS))
    for suffix in SUFFIXES
}
"""All that a directory may hold which is replaced."""

_TEXTS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSplit:
    """Counts of one split."""

    num_instances: int
    num_feature_values: int
    num_positives: int
    """Pairs of an instance and a label."""
    num_empty_texts: int
    """Texts of blanks alone."""
    num_without_features: int
    """Instances whose text has no token of the vocabulary, empty texts among them."""
    num_without_labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """A dataset directory, and what went into it."""

    directory: str
    files: tuple[str, ...]
    train: PreparedSplit
    test: PreparedSplit | None
    num_features: int
    num_labels: int
    label_kind: str
    """`"ids"` or `"names"`: what the labels of the text were."""
    num_unseen_labels: int
    """Labels of the test split that no training instance has; they keep their ids, and count in recall."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `prepare`."""
        return asdict(self) | {"files": list(self.files), "seconds": round(self.seconds, 3)}


def prepare(
    text: str | Path,
    *,
    output: str | Path,
    test: str | Path | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    layout: TextLayout | None = None,
    label_kind: LabelKind = "auto",
    label_names: str | Path | None = None,
    min_document_frequency: int = 2,
    max_features: int | None = None,
    max_ngram: int = 1,
    compress: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Preparation:
    """Make a dataset directory of raw text.

    Parameters
    ----------
    text : TSV, CSV or JSON lines, see `xmc_midx.data.raw`.
    output : the directory to make; one that is there must be empty.
    test : a file of the same layout: its texts become features with the vocabulary of `text`.
    test_fraction : share of `text` that becomes the test split, in (0, 1), by a hash of seed and text: about that
        many, the same ones in any order of the file, and equal texts always on one side.
    seed : of `test_fraction`.
    layout : None goes by the file's name.
    label_kind, label_names : whether labels are ids or names, and a file of all names; see `xmc_midx.data.labelset`.
    min_document_frequency, max_features, max_ngram : as in `Vocabulary.fit_transform`.
    compress : write `.txt.gz`.
    force : replace a directory that is there, if it holds a dataset and nothing else.

    Raises
    ------
    UsageError : the directory holds something, or options contradict each other.
    DataError : a file is not what it should be, with file and line; no text has a token; no instance has a label.
    ResourceError : the directory cannot be written, or another process is preparing it.
    """
    began = time.monotonic()
    reporter = reporter or SilentReporter()
    if test is not None and test_fraction is not None:
        raise UsageError("A test file and a test fraction were given; expected one of them.")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise UsageError(f"Test fraction {test_fraction:g}: expected a share between 0 and 1.")
    layout = layout or TextLayout()
    for given in (text, test, label_names):
        if given is not None and Path(output).resolve() in Path(given).resolve().parents:
            hint = "Choose a directory that holds none of the inputs."
            raise UsageError(f"{given}: lies in {output}, which is made or replaced as a whole.", hint=hint)
    with _place_for(Path(output).resolve(), force=force) as staging:
        names = None if label_names is None else read_label_names(label_names)
        found = RawLabels()
        train, held_out = _Split(Path(text), found), None
        reporter.start("read", None)
        records = train.records(layout)
        waiting: Iterable[str] = ()
        if test is not None:
            held_out = _Split(Path(test), found)
            waiting = held_out.texts(held_out.records(layout), reporter)
        elif test_fraction is not None:
            held_out, waiting = _Split(train.path, found), []
            records = _hold_out(records, held_out, waiting, test_fraction, seed)
        vocabulary, train.features = Vocabulary.fit_transform(
            train.texts(records, reporter),
            min_document_frequency=min_document_frequency,
            max_features=max_features,
            max_ngram=max_ngram,
        )
        if not train.labels.numbers:
            fact = f"{train.path}: no instance has a label, so there is nothing to learn."
            raise DataError(fact, hint="Is the label column the right one?")
        splits = {"train": train}
        if held_out is not None:
            splits["test"] = held_out
            held_out.transform(waiting, vocabulary)
        labels = found.assign(train.labels, kind=label_kind, names=names)
        for remark in found.remarks(labels, train.labels):
            reporter.message(f"warning: {remark}")
        reporter.start("write", None)
        is_kept = labels.kind == "ids" and test_fraction is None
        for name, split in splits.items():
            source = find_variant(split.path.parent, ignored_name(name))
            if source is not None and is_kept:
                ignored = read_ignored(source, len(split.labels.counts), labels.num_labels)
                write_ignored(staging / f"{ignored_name(name)}{'.gz' if compress else ''}", ignored)
            elif source is not None:
                reporter.message(f"warning: {source} is left out: it is of other ids or rows than these splits.")
        files = _write(staging, splits, labels, vocabulary, compress=compress)
    unseen = set() if held_out is None else set(held_out.labels.numbers) - set(train.labels.numbers)
    return Preparation(
        directory=str(output),
        files=files,
        train=train.counts(),
        test=None if held_out is None else held_out.counts(),
        num_features=vocabulary.num_features,
        num_labels=labels.num_labels,
        label_kind=labels.kind,
        num_unseen_labels=len(unseen),
        seconds=time.monotonic() - began,
    )


@dataclass(slots=True, eq=False)
class _Split:
    """A split that is being read."""

    path: Path
    found: RawLabels
    labels: LabelRows = field(default_factory=LabelRows)
    features: csr_matrix[Any] | None = None
    num_empty_texts: int = 0

    def records(self, layout: TextLayout) -> Iterator[TextRecord]:
        """The records of the file, at least one; the first is read at once, and with it most faults are found."""
        records = read_texts(self.path, layout)
        first = next(records, None)
        if first is None:
            raise DataError(f"{self.path}: holds no instance, expected at least one.")
        return chain([first], records)

    def take(self, record: TextRecord) -> str:
        """Note the labels, pass the text on."""
        self.found.add(self.labels, record.labels, self.path, record.line)
        self.num_empty_texts += not record.text.strip()
        return record.text

    def texts(self, records: Iterable[TextRecord], reporter: Reporter) -> Iterator[str]:
        for record in records:
            reporter.step()
            yield self.take(record)

    def transform(self, texts: Iterable[str], vocabulary: Vocabulary) -> None:
        """Features, some texts at a time."""
        texts = iter(texts)
        parts = [vocabulary.transform([])]
        while chunk := list(islice(texts, _TEXTS_AT_ONCE)):
            parts.append(vocabulary.transform(chunk))
        self.features = csr_matrix(vstack(parts, format="csr", dtype=np.float32))

    def counts(self) -> PreparedSplit:
        assert self.features is not None, "counted when it is read"
        return PreparedSplit(
            num_instances=len(self.labels.counts),
            num_feature_values=int(self.features.nnz),
            num_positives=len(self.labels.numbers),
            num_empty_texts=self.num_empty_texts,
            num_without_features=int((np.diff(self.features.indptr) == 0).sum()),
            num_without_labels=sum(count == 0 for count in self.labels.counts),
        )


def _hold_out(
    records: Iterator[TextRecord], held_out: _Split, texts: list[str], fraction: float, seed: int
) -> Iterator[TextRecord]:
    """Pass the training records on, put the texts of the others into `texts`."""
    num_kept = 0
    for record in records:
        digest = hashlib.blake2b(f"{seed}\n{record.text}".encode(errors="surrogatepass"), digest_size=8).digest()
        if int.from_bytes(digest, "big") < fraction * 2**64:
            texts.append(held_out.take(record))
        else:
            num_kept += 1
            yield record
    if not num_kept:
        fact = f"{held_out.path}: no instance is left to train on when {fraction:g} of them are the test split"
        raise DataError(f"{fact}.", hint="Lower --test-fraction.")
    if not texts:
        fact = f"{held_out.path}: no instance was held out as the test split ({fraction:g} of them)"
        raise DataError(f"{fact}, expected some.", hint="Raise --test-fraction, or try another --seed.")


# -------------------------------------------------------------------- the directory


def _write(
    directory: Path, splits: dict[str, _Split], labels: LabelSet, vocabulary: Vocabulary, *, compress: bool
) -> tuple[str, ...]:
    suffix = ".gz" if compress else ""
    for name, split in splits.items():
        assert split.features is not None, "written when it is read"
        write_xmc(directory / f"{name}.txt{suffix}", split.features, split.labels.matrix(labels))
    vocabulary.save(directory / f"vocabulary.txt{suffix}")
    if labels.names is not None:
        with atomic_write(directory / f"labels.txt{suffix}") as file:
            file.writelines(f"{name}\n".encode() for name in labels.names)
    return tuple(sorted(entry.name for entry in directory.iterdir()))


@contextmanager
def _place_for(target: Path, *, force: bool) -> Iterator[Path]:
    """A directory beside `target` to write into, which takes its name when the block ends without an exception."""
    _refuse_what_is_there(target, force=force)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.preparing")
    aside = target.with_name(f".{target.name}.replaced")
    missing = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass  # a lock that cannot be made would look like one that is held
        with _alone(target):
            _clean(target, aside)
            _refuse_what_is_there(target, force=force)
            staging.mkdir()
            try:
                yield staging
                sync_directory(staging)
                crash_point("directory.written")
                if target.exists():
                    target.rename(aside)
                    crash_point("directory.aside")
                staging.rename(target)
                sync_directory(target.parent)
                crash_point("directory.renamed")
            finally:
                _clean(target, aside)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"{target}: cannot be written: {reason}.") from error
    finally:
        if not target.exists():
            with suppress(OSError):
                for path in missing:
                    path.rmdir()


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, which the system drops when the process ends, however it ends."""
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResourceError(
            f"{target}: another process is preparing it.", hint="Wait for it, or choose another directory."
        ) from None
    try:
        yield
    finally:
        lock.release()
        path.unlink(missing_ok=True)


def _clean(target: Path, aside: Path) -> None:
    """Remove what a call that ended early has left; nobody else is here."""
    if aside.exists() and not target.exists():
        aside.rename(target)  # killed between the two renames: the old one is the one to keep
    for stray in chain([aside], target.parent.glob(f".{glob.escape(target.name)}.*.preparing")):
        if stray.exists():
            shutil.rmtree(stray)


def _refuse_what_is_there(target: Path, *, force: bool) -> None:
    if not target.exists():
        return
    if target == Path.cwd():
        raise UsageError(f"{target}: is the directory you are in.", hint="Name one to make in it.")
    if not target.is_dir():
        raise UsageError(f"{target}: is a file, expected a directory to make.")
    names = sorted(entry.name for entry in target.iterdir())
    strangers = [name for name in names if name not in _OURS]
    if strangers and force:
        raise UsageError(
            f"{target}: holds {strangers[0]}, which is no part of a dataset; --force replaces a dataset alone.",
            hint="Choose another directory.",
        )
    if names and not force:
        hint = "Choose another directory, or --force to replace it." if not strangers else "Choose another directory."
        raise UsageError(f"{target}: is not empty ({names[0]}{', ...' if names[1:] else ''}).", hint=hint)
