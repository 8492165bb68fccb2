"""Layer 6. The whole chain on the embedded dataset: `demo` trains, evaluates, and predicts for raw text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xmc_midx.config import GivenConfig
from xmc_midx.pipeline.evaluation import Evaluation, evaluate
from xmc_midx.pipeline.prediction import predict
from xmc_midx.pipeline.training import TrainResult, train
from xmc_midx.types import Reporter

__all__ = ["DemoResult", "demo"]

_DEMO_DATASET = "debtags"
_DEMO_TEXTS = (
    "a small web server written in Python, with TLS and virtual hosts",
    "puzzle game with 3D graphics for children",
    "command line tool that converts audio files between formats",
    "header files for developing programs with the OpenGL library",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The whole chain on the embedded dataset."""

    training: TrainResult
    evaluation: Evaluation
    examples: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    """Raw text -> its best labels: (name, logit)."""


def demo(
    *,
    output: str | Path,
    config: GivenConfig | None = None,
    reporter: Reporter | None = None,
) -> DemoResult:
    """Train on the embedded dataset, evaluate, and predict for a few sentences typed as raw text."""
    training = train(_DEMO_DATASET, output=output, config=config, reporter=reporter)
    evaluation = evaluate(output, data=_DEMO_DATASET, reporter=reporter)
    prediction = predict(output, input=_DEMO_TEXTS, k=5, reporter=reporter)
    names = prediction.label_names
    assert names is not None, "the embedded dataset has label names"
    rows = zip(_DEMO_TEXTS, prediction.top.label_ids.tolist(), prediction.top.scores.tolist(), strict=True)
    examples = [
        (text, [(names[label], score) for label, score in zip(labels, scores, strict=True)])
        for text, labels, scores in rows
    ]
    return DemoResult(training=training, evaluation=evaluation, examples=examples)
