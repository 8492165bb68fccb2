"""Layer 6. Rows or raw texts -> the best labels of each: `predict` all at once, `predict_stream` batch by batch."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from scipy.sparse import csr_matrix, issparse

from xmc_midx.data.dataset import find_files, load_features
from xmc_midx.errors import DataError, UsageError
from xmc_midx.paths import home_path
from xmc_midx.pipeline.inputs import check_k, open_predictor
from xmc_midx.pipeline.stream import PredictionStream
from xmc_midx.rundir import RunDirectory
from xmc_midx.types import Reporter, SilentReporter, TopK

if TYPE_CHECKING:
    from xmc_midx.predictor import Predictor, Scores

__all__ = ["Prediction", "predict", "predict_stream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The best labels of each instance, with names where the run knows them."""

    top: TopK
    label_names: Sequence[str] | None


def predict(
    run: str | Path,
    *,
    input: str | Path | Sequence[str] | csr_matrix | np.ndarray[Any, Any],
    k: int = 5,
    scores: Scores = "logits",
    threshold: float | None = None,
    allow: str | Path | None = None,
    deny: str | Path | None = None,
    text: bool | None = None,
    exact: bool = False,
    device: str = "auto",
    verify: bool = True,
    reporter: Reporter | None = None,
) -> Prediction:
    """The best labels of each instance of a file, or of raw texts, all at once; `predict_stream` for more than fits.

    Parameters
    ----------
    input : a sparse feature file or a file of raw texts, a sequence of raw texts, or feature rows (N, F).
    The others : as in `predict_stream`.

    Returns
    -------
    Prediction : (N, k) label ids and scores, and the labels' names where the run knows them.

    Raises
    ------
    XmcMidxError : an option, the model or the input is at fault.
    """
    options: dict[str, Any] = {"k": k, "scores": scores, "threshold": threshold, "allow": allow, "deny": deny}
    options |= {"text": text, "exact": exact, "device": device, "verify": verify}
    stream = predict_stream(run, input=input, **options, reporter=reporter)
    return Prediction(top=_concatenate([chunk.top for chunk in stream], k), label_names=stream.label_names)


def predict_stream(
    run: str | Path,
    *,
    input: str | Path | BinaryIO | Sequence[str] | csr_matrix | np.ndarray[Any, Any],
    k: int = 5,
    scores: Scores = "logits",
    threshold: float | None = None,
    allow: str | Path | None = None,
    deny: str | Path | None = None,
    text: bool | None = None,
    shard: tuple[int, int] = (1, 1),
    live: bool = False,
    exact: bool = False,
    device: str = "auto",
    verify: bool = True,
    reporter: Reporter | None = None,
) -> PredictionStream:
    """The best labels of each instance, batch by batch, in constant memory. The model is loaded at once, the input read
    as it is asked for.

    Parameters
    ----------
    run : run directory.
    input : a file of feature rows, with or without header and labels (which are not looked at), or of raw texts, a line
        each; a binary stream of the same; or what is in memory already: raw texts, or feature rows (N, F), a SciPy
        matrix of any format or a NumPy array.
    k : labels an instance, 1 to L.
    scores : `"logits"`: what the ranking is made by; `"probabilities"`: calibrated, that the label applies.
    threshold : labels with a lower score are left out.
    allow, deny : files of label ids or names, one a line, that alone may, or may not, be predicted.
    text : whether the input is raw text; None looks at it, where the run has a vocabulary.
    shard : (i, n): the i-th of n parts of a file, from 1; the parts' results, one after the other, are the whole's.
    live : answer the lines of a stream as they come, in batches of what is at hand.
    exact : score all labels in float32, where label cells or a scan in bfloat16 would be faster.
    device : where the model runs.
    verify : whether the hashes of the model's files are computed.

    Raises
    ------
    XmcMidxError : an option or the model is at fault; faults of the input are raised when the stream comes to them.
    """
    from xmc_midx.data.sources import is_named
    from xmc_midx.predictor import held_rows

    index, num_shards = shard
    if not 1 <= index <= num_shards:
        raise UsageError(f"shard {index}/{num_shards}: expected 1/{max(num_shards, 1)} to {num_shards}/{num_shards}.")
    reporter = reporter or SilentReporter()
    predictor = open_predictor(run, reporter, device=device, verify=verify, exact=exact)
    check_k(k, predictor.num_labels)
    if scores == "probabilities":
        predictor.require_calibration()
    source: Any = home_path(input) if isinstance(input, str | Path) else held_rows(input)
    if issparse(input):
        source = csr_matrix(input)
    if isinstance(source, str | Path) and Path(source).is_dir():
        found = find_files(source)
        split = found.test or found.train
        hint = f"Its {'test' if found.test else 'training'} split is {split.features}." if split else None
        raise DataError(f"{source}: is a directory, expected a file.", hint=hint)
    if not text and isinstance(source, str | Path) and is_named(Path(source)):
        # Formats that are read whole: svmlight, npz, the halves of a pair.
        source = load_features(source, predictor.num_features)
    if text is None and predictor.vocabulary is None:
        text = False
    if text:
        predictor.require_vocabulary()
    if live and not isinstance(source, str | Path | Sequence | csr_matrix):
        # Someone may wait for the first answer: what is loaded at first use is loaded before it.
        predictor.warm_up()
    allowed = None if allow is None else _read_label_ids(home_path(allow), predictor)
    if allowed:
        lacking = len(allowed) - len(predictor.known_labels.rows_of(np.array(allowed)))
        if lacking:
            reporter.message(
                f"{allow}: {lacking:,} of its {len(allowed):,} labels have no training instance: the model never "
                "predicts them"
            )
    options = {
        "k": min(k, predictor.num_labels),
        "scores": scores,
        "threshold": threshold,
        "allow": allowed,
        "deny": None if deny is None else _read_label_ids(home_path(deny), predictor),
    }
    return PredictionStream(
        predictor,
        source,
        options,
        exact=exact,
        text=text,
        shard=shard,
        live=live,
        reporter=reporter,
        model=_model_digest(home_path(run)),
    )


def _concatenate(parts: list[TopK], k: int) -> TopK:
    from xmc_midx.topk import concatenate_topk

    return concatenate_topk(parts) if parts else TopK.empty(0, k)


def _model_digest(run: Path) -> str:
    """sha256 of what names the model: the manifest of its best checkpoint, which has the hashes of its files, and what
    is added to it."""
    from xmc_midx.checkpoint import CheckpointStore

    digest = hashlib.sha256()
    manifest = run / "model.json"
    if not manifest.exists():
        manifest = CheckpointStore(run / "checkpoints").path_of("best") / "manifest.json"
    for path in (manifest, run / "interpolation.json", run / "vocabulary.txt"):
        digest.update(path.read_bytes() if path.exists() else b"-")
    for member in RunDirectory.open(run).finished_members if manifest.name == "model.json" else ():
        digest.update(_model_digest(member).encode())
    return digest.hexdigest()


def _read_label_ids(path: Path, predictor: Predictor) -> list[int]:
    """The labels of a list: an id or a name a line. Digits are an id, and a name may belong to several labels."""
    try:
        # As `labels.txt` is read: a name may hold what else Python takes for the end of a line.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}.") from None
    num_labels, names = predictor.num_labels, predictor.label_names
    ids_of: dict[str, list[int]] = {}
    for label, name in enumerate(names or ()):
        ids_of.setdefault(name, []).append(label)
    ids: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if text.isascii() and text.isdigit() and int(text[:20]) < num_labels and len(text) < 20:
            ids.append(int(text))
        elif text in ids_of:
            ids += ids_of[text]
        elif names is None or re.fullmatch(r"[+-]?[\d.]+", text):
            raise DataError(f"{path}:{number}: {text[:60]!r} is no label id; expected 0 to {num_labels - 1}.")
        else:
            near = difflib.get_close_matches(text, ids_of, n=1)
            hint = f"Did you mean {near[0]}?" if near else None
            raise DataError(
                f"{path}:{number}: {text[:60]!r} is no label; expected a name or an id, 0 to {num_labels - 1}.",
                hint=hint,
            )
    return ids
