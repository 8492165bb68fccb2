"""Layer 6. The whole chain, a function a command: the only place that knows all stages.

The stages that compute with torch are imported by the functions that need them, so that predictions of another tool are
evaluated without it.
"""

from __future__ import annotations

from xmc_midx.pipeline.demonstration import DemoResult, demo
from xmc_midx.pipeline.diagnosis import Diagnosis, diagnose
from xmc_midx.pipeline.evaluation import Evaluation, evaluate
from xmc_midx.pipeline.exports import ExportResult, export
from xmc_midx.pipeline.planning import Plan, plan
from xmc_midx.pipeline.prediction import Prediction, predict, predict_stream
from xmc_midx.pipeline.stream import PredictionChunk, PredictionStream
from xmc_midx.pipeline.training import TrainResult, resume, train

__all__ = [
    "DemoResult",
    "Diagnosis",
    "Evaluation",
    "ExportResult",
    "Plan",
    "Prediction",
    "PredictionChunk",
    "PredictionStream",
    "TrainResult",
    "demo",
    "diagnose",
    "evaluate",
    "export",
    "plan",
    "predict",
    "predict_stream",
    "resume",
    "train",
]
