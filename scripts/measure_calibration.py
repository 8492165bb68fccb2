"""Are the probabilities of `predict --scores probabilities` honest? Expected calibration error on a test split.

    python scripts/measure_calibration.py RUN DATA [RUN DATA ...]

Each RUN was trained on the training split of its DATA; the calibration was fitted on instances that it held out. The
errors are over the labels of each test instance at ranks 1 to k: what is stated against how often it is so. Beside
them the softmax over the model's 100 best labels, which is what a score is without a calibration.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import softmax

from xmc_midx.calibration import BACKGROUND, expected_calibration_error, is_positive
from xmc_midx.data.dataset import load_dataset
from xmc_midx.predictor import Predictor
from xmc_midx.types import TopK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="RUN DATA")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.8])
    arguments = parser.parse_args()
    print(
        f"{'run':20} {'instances':>9}  {'k':>3}  {'calibrated':>10}  {'softmax':>8}   (expected calibration error, %)"
    )
    for run, data in zip(arguments.pairs[::2], arguments.pairs[1::2], strict=True):
        predictor, split = Predictor.load(run), load_dataset(data).split("test")
        k = min(BACKGROUND, predictor.index.num_labels)
        stated = predictor.predict(split.features, k=k, scores="probabilities")
        plain = predictor.predict(split.features, k=k)
        plain = TopK(label_ids=plain.label_ids, scores=softmax(plain.scores.astype(float), axis=1).astype(np.float32))
        hits = is_positive(stated, split.labels), is_positive(plain, split.labels)
        for ranks in (1, 5, k):
            errors = [
                100 * expected_calibration_error(top.scores[:, :ranks], hit[:, :ranks])
                for top, hit in zip((stated, plain), hits, strict=True)
            ]
            name = run.rstrip("/").rpartition("/")[2][:20]
            print(f"{name:20} {split.num_instances:9,}  {ranks:3}  {errors[0]:10.2f}  {errors[1]:8.2f}")
        for threshold in arguments.thresholds:
            kept = stated.scores >= threshold
            share = hits[0][kept].mean() if kept.any() else float("nan")
            mean = stated.scores[kept].mean() if kept.any() else float("nan")
            recall = hits[0][kept].sum() / split.labels.nnz
            found = f"{100 * share:.1f}% apply (stated {100 * mean:.1f}%), recall {100 * recall:.1f}%"
            print(f"  at {threshold:g} or more: {found}")


if __name__ == "__main__":
    main()
