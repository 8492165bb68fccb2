"""Claims about `xmc_midx.metrics`, against napkinXC and a plain Python definition that shares no code with it."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from napkinxc import metrics as napkinxc
from scipy.sparse import csr_array, csr_matrix

from xmc_midx.errors import DataError, UsageError
from xmc_midx.metrics import (
    DEFINITIONS,
    FREQUENCY_GROUPS,
    breakdown_by_frequency,
    evaluate_topk,
    frequency_deciles,
    inverse_propensity,
)
from xmc_midx.types import TopK

NUM_CASES = 1000


def make_top(rows, width=None):
    width = max((len(row) for row in rows), default=0) if width is None else width
    ids = np.full((len(rows), width), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    scores = np.where(ids >= 0, -np.arange(width, dtype=np.float32), -np.inf).astype(np.float32)
    return TopK(label_ids=ids, scores=scores)


def make_labels(rows, num_labels):
    dense = np.zeros((len(rows), num_labels), dtype=np.float32)
    for i, row in enumerate(rows):
        dense[i, row] = 1
    return csr_matrix(dense)


def random_case(seed):
    """Odd sizes; rows without labels, without predictions and with short ones; scores with ties; unseen labels."""
    rng = np.random.default_rng(seed)
    num_instances, num_labels = int(rng.integers(1, 14)), int(rng.integers(1, 18))
    true = [np.flatnonzero(rng.random(num_labels) < rng.choice([0.0, 0.1, 0.5, 1.0])) for _ in range(num_instances)]
    predicted = []
    for _ in range(num_instances):
        scores = rng.integers(0, 3, num_labels)
        ranking = np.lexsort((np.arange(num_labels), -scores))
        predicted.append(ranking[: rng.integers(0, min(num_labels, 7) + 1)].tolist())
    num_train = int(rng.integers(3, 2000))
    frequencies = rng.integers(0, num_train + 1, num_labels) // rng.choice([1, 10, 1000])
    a, b = [(0.55, 1.5), (0.5, 0.4), (0.6, 2.6)][seed % 3]
    return true, predicted, num_labels, frequencies.astype(np.int64), num_train, a, b


def by_definition(true, predicted, q, k):
    """METHOD.md section 7, one instance after the other."""
    n = len(true)
    p = ndcg = r = 0.0
    psp = psp_best = psndcg = psndcg_best = 0.0
    for labels, ranking in zip(true, predicted, strict=True):
        labels = set(map(int, labels))
        if not labels:
            continue
        hits = [rank for rank, label in enumerate(ranking[:k], start=1) if label in labels]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(labels)) + 1))
        p += len(hits) / k
        r += len(hits) / len(labels)
        ndcg += sum(1 / math.log2(rank + 1) for rank in hits) / ideal
        best = sorted((q[label] for label in labels), reverse=True)[:k]
        psp += sum(q[ranking[rank - 1]] for rank in hits)
        psp_best += sum(best)
        psndcg += sum(q[ranking[rank - 1]] / math.log2(rank + 1) for rank in hits) / ideal
        psndcg_best += sum(value / math.log2(rank + 1) for rank, value in enumerate(best, start=1)) / ideal
    return {
        f"P@{k}": p / n,
        f"nDCG@{k}": ndcg / n,
        f"R@{k}": r / n,
        f"PSP@{k}": psp / psp_best if psp_best else 0.0,
        f"PSnDCG@{k}": psndcg / psndcg_best if psndcg_best else 0.0,
    }


@pytest.mark.fault("R16")
@pytest.mark.parametrize("block", range(10))
def test_random_cases_equal_the_plain_definition(block, record_property):
    record_property("count", NUM_CASES // 10)
    for seed in range(block * NUM_CASES // 10, (block + 1) * NUM_CASES // 10):
        true, predicted, num_labels, frequencies, num_train, a, b = random_case(seed)
        report = evaluate_topk(
            make_top(predicted),
            make_labels(true, num_labels),
            ks=(1, 2, 3, 5, 8),
            label_frequencies=frequencies,
            num_train=num_train,
            A=a,
            B=b,
        )
        c = (math.log(num_train) - 1) * (b + 1) ** a
        q = [1 + c * (int(f) + b) ** -a for f in frequencies]
        expected = {}
        for k in (1, 2, 3, 5, 8):
            expected |= by_definition(true, predicted, q, k)
        assert report.metrics == pytest.approx(expected, abs=1e-9), f"case {seed}"
        assert report.num_instances == len(true)
        assert report.num_without_labels == sum(len(row) == 0 for row in true)


@pytest.mark.fault("R16")
@pytest.mark.parametrize("block", range(10))
def test_random_cases_equal_napkinxc(block, record_property):
    record_property("count", NUM_CASES // 10)
    for seed in range(block * NUM_CASES // 10, (block + 1) * NUM_CASES // 10):
        true, predicted, num_labels, frequencies, num_train, a, b = random_case(seed)
        if not any(len(row) for row in true):
            continue  # napkinXC divides 0 by 0; see the test below.
        # napkinXC counts training labels itself: give it a matrix with these column sums.
        train = csr_matrix((np.arange(num_train)[:, None] < frequencies[None, :]).astype(np.int64))
        inverse = napkinxc.Jain_et_al_inverse_propensity(train, a, b)
        np.testing.assert_allclose(inverse_propensity(frequencies, num_train, a, b), inverse, rtol=1e-12)
        y = [row.tolist() for row in true]
        theirs = {
            "P": napkinxc.precision_at_k(y, predicted, k=7),
            "nDCG": napkinxc.ndcg_at_k(y, predicted, k=7),
            "R": napkinxc.recall_at_k(y, predicted, k=7),
            "PSP": napkinxc.psprecision_at_k(y, predicted, inverse, k=7),
            "PSnDCG": napkinxc.psndcg_at_k(y, predicted, inverse, k=7),
        }
        ours = evaluate_topk(
            make_top(predicted),
            make_labels(true, num_labels),
            ks=range(1, 8),
            label_frequencies=frequencies,
            num_train=num_train,
            A=a,
            B=b,
        )
        expected = {f"{family}@{k}": theirs[family][k - 1] for family in theirs for k in range(1, 8)}
        assert ours.metrics == pytest.approx(expected, abs=1e-9), f"case {seed}"


def test_a_case_worked_by_hand():
    """Labels {0, 2} and {1}; rankings 2 1 0 and 0 1. Inverse propensities 1 + C/(n + 1) with C = (ln 100 - 1) 2."""
    report = evaluate_topk(
        make_top([[2, 1, 0], [0, 1]]),
        make_labels([[0, 2], [1]], 3),
        ks=(3, 1),
        label_frequencies=np.array([1, 3, 0]),
        num_train=100,
        A=1.0,
        B=1.0,
    )
    c = 2 * (math.log(100) - 1)
    q0, q1, q2 = 1 + c / 2, 1 + c / 4, 1 + c
    half = 1 / math.log2(3)
    expected = {
        "P@1": 1 / 2,
        "P@3": (2 / 3 + 1 / 3) / 2,
        "R@1": (1 / 2 + 0) / 2,
        "R@3": 1.0,
        "nDCG@1": 1 / 2,
        "nDCG@3": ((1 + 1 / 2) / (1 + half) + half) / 2,
        "PSP@1": q2 / (q2 + q1),
        "PSP@3": 1.0,
        "PSnDCG@1": q2 / (q2 + q1),
        "PSnDCG@3": ((q2 + q0 / 2) / (1 + half) + q1 * half) / ((q2 + q0 * half) / (1 + half) + q1),
    }
    assert report.metrics == pytest.approx(expected, abs=1e-12)
    assert list(report.metrics) == [f"{family}@{k}" for family in DEFINITIONS for k in (1, 3)]
    assert (report.propensity_a, report.propensity_b) == (1.0, 1.0)


def test_a_perfect_ranking_gives_one():
    """Best order: rarest true labels first, so that the propensity-scored figures are at their best as well."""
    true = [[0, 1, 2], [3], [2, 4], [1, 2, 3, 4, 5]]
    frequencies = np.array([9, 7, 5, 3, 2, 0])
    perfect = [sorted(row, key=lambda label: frequencies[label]) for row in true]
    report = evaluate_topk(
        make_top(perfect), make_labels(true, 6), ks=(1, 3, 5), label_frequencies=frequencies, num_train=50
    )
    for name in ("P@1", "nDCG@1", "nDCG@3", "nDCG@5", "R@5", "PSP@1", "PSP@3", "PSP@5", "PSnDCG@3", "PSnDCG@5"):
        assert report.metrics[name] == pytest.approx(1.0, abs=1e-12), name
        assert report.metrics[name] <= 1.0, name
    assert report.metrics["P@5"] == pytest.approx((3 + 1 + 2 + 5) / 20)


def test_no_hit_gives_zero_and_order_inside_k_leaves_precision_alone():
    labels = make_labels([[0], [1]], 5)
    frequencies = np.ones(5, dtype=np.int64)
    nothing = evaluate_topk(make_top([[1, 2], [3, 4]]), labels, label_frequencies=frequencies, num_train=9)
    assert set(nothing.metrics.values()) == {0.0}
    early = evaluate_topk(make_top([[0, 2], [1, 4]]), labels, ks=(2,)).metrics
    late = evaluate_topk(make_top([[2, 0], [4, 1]]), labels, ks=(2,)).metrics
    assert early["P@2"] == late["P@2"] and early["R@2"] == late["R@2"]
    assert early["nDCG@2"] > late["nDCG@2"]


def test_an_instance_without_labels_lowers_means_and_leaves_ratios():
    frequencies = np.array([4, 1, 2])
    options = {"ks": (1, 2), "label_frequencies": frequencies, "num_train": 20}
    before = evaluate_topk(make_top([[0, 1]]), make_labels([[0, 2]], 3), **options)
    after = evaluate_topk(make_top([[0, 1], [1, 2]]), make_labels([[0, 2], []], 3), **options)
    assert (before.num_without_labels, after.num_without_labels) == (0, 1)
    for k in (1, 2):
        for family in ("P", "nDCG", "R"):
            assert after.metrics[f"{family}@{k}"] == pytest.approx(before.metrics[f"{family}@{k}"] / 2)
        for family in ("PSP", "PSnDCG"):
            assert after.metrics[f"{family}@{k}"] == pytest.approx(before.metrics[f"{family}@{k}"])


def test_a_split_without_any_label_gives_zero_where_napkinxc_gives_nan():
    report = evaluate_topk(make_top([[0]]), make_labels([[]], 2), label_frequencies=np.array([1, 1]), num_train=5)
    assert set(report.metrics.values()) == {0.0}
    with np.errstate(invalid="ignore"):
        assert np.isnan(napkinxc.psprecision_at_k([[]], [[0]], np.array([2.0, 2.0]), k=1)).all()


def test_a_pad_is_a_miss_at_its_rank_and_never_the_last_label_of_the_row_before():
    """The pad of row 1 and label L-1 of row 0 are neighbours in the numbering row * L + label."""
    labels = make_labels([[4], [0]], 5)
    report = evaluate_topk(make_top([[1], []], width=1), labels, ks=(1,))
    assert report.metrics["P@1"] == 0.0
    holes = TopK(label_ids=np.array([[-1, 4], [-1, 0]]), scores=np.zeros((2, 2), dtype=np.float32))
    report = evaluate_topk(holes, labels, ks=(1, 2, 9))
    assert report.metrics["P@1"] == 0.0
    assert report.metrics["P@2"] == 0.5
    assert report.metrics["P@9"] == pytest.approx(1 / 9)


def test_labels_of_any_sparse_format_are_the_same():
    labels = csr_matrix(np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1.0]]))
    top = make_top([[0, 1]] * 3)
    expected = evaluate_topk(top, labels, ks=(1, 2)).metrics
    for other in (labels.tocsc(), labels.tocoo(), labels.tolil(), csr_array(labels), labels.toarray()):
        assert evaluate_topk(top, other, ks=(1, 2)).metrics == expected
        assert breakdown_by_frequency(top, other, np.ones(3, dtype=np.int64), k=2)[2].num_hits == 3


def test_predictions_without_columns_are_all_misses():
    report = evaluate_topk(make_top([[], []], width=0), make_labels([[0], [1]], 2))
    assert set(report.metrics.values()) == {0.0}


def test_without_frequencies_there_is_no_propensity_metric():
    report = evaluate_topk(make_top([[0]]), make_labels([[0]], 1), ks=(1,))
    assert list(report.metrics) == ["P@1", "nDCG@1", "R@1"]
    assert report.propensity_a is None and report.propensity_b is None


def test_unordered_repeated_and_zero_entries_of_the_label_matrix_are_understood_and_left_alone():
    indices, data = np.array([3, 1, 3, 0, 2, 2]), np.array([1.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    messy = csr_matrix((data.copy(), indices.copy(), np.array([0, 4, 6])), shape=(2, 4))
    top = make_top([[1, 0, 3], [2, 0]])
    assert evaluate_topk(top, messy).metrics == evaluate_topk(top, make_labels([[1, 3], [2]], 4)).metrics
    np.testing.assert_array_equal(messy.indices, indices)
    np.testing.assert_array_equal(messy.data, data)


def test_chunks_do_not_change_the_figures(monkeypatch):
    true, predicted, num_labels, frequencies, num_train, a, b = random_case(4)
    arguments = make_top(predicted), make_labels(true, num_labels)
    options = {"ks": (1, 5), "label_frequencies": frequencies, "num_train": num_train, "A": a, "B": b}
    whole = evaluate_topk(*arguments, **options)
    monkeypatch.setattr("xmc_midx.metrics._CHUNK_ELEMENTS", 12)
    assert len(true) > 4
    assert evaluate_topk(*arguments, **options).metrics == pytest.approx(whole.metrics, abs=1e-12)


def test_a_hundred_thousand_instances_and_a_million_labels_are_quick():
    rng = np.random.default_rng(0)
    n, num_labels = 100_000, 1_000_000
    labels = csr_matrix(
        (np.ones(5 * n), (np.repeat(np.arange(n), 5), rng.integers(0, num_labels, 5 * n))), shape=(n, num_labels)
    )
    ids = np.sort(rng.integers(0, num_labels - 5, (n, 5)), axis=1) + np.arange(5)
    top = TopK(label_ids=ids, scores=np.zeros((n, 5), dtype=np.float32))
    started = time.process_time()
    evaluate_topk(top, labels, label_frequencies=np.ones(num_labels, dtype=np.int64), num_train=n)
    assert time.process_time() - started < 10  # of the processor: what else it does is not counted; 0.4 s alone


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 0], [1]], "Instance 0: label 0 is predicted twice"),
        ([[0], [1, 7]], "Instance 1, rank 2: predicted label 7 is outside 0..2"),
        ([[0], [-2]], "Instance 1, rank 1: predicted label -2 is outside 0..2"),
        ([[0]], "Predictions for 1 instances, but labels of 2"),
    ],
)
def test_predictions_that_do_not_fit_are_data_errors(rows, message):
    labels = make_labels([[0], [1]], 3)
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        evaluate_topk(make_top(rows), labels)
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        breakdown_by_frequency(make_top(rows), labels, np.ones(3, dtype=np.int64))


def test_arguments_that_cannot_be_used_are_refused():
    top, labels = make_top([[0]]), make_labels([[0]], 2)
    for ks in ((), (0,), (1, -3), (1.5,), np.array([]), 5, iter(())):
        with pytest.raises(UsageError, match="k = "):
            evaluate_topk(top, labels, ks=ks)
    for ks in (np.array([3, 1]), iter([1, 3]), {1, 3}):
        assert list(evaluate_topk(top, labels, ks=ks).metrics)[:2] == ["P@1", "P@3"]
    with pytest.raises(UsageError, match="too large"):
        inverse_propensity(np.ones(2), 100, 1e9, 1.0)
    with pytest.raises(UsageError, match="number of training instances"):
        evaluate_topk(top, labels, label_frequencies=np.array([1, 1]))
    with pytest.raises(DataError, match="Frequencies of 3 labels"):
        evaluate_topk(top, labels, label_frequencies=np.array([1, 1, 1]), num_train=3)
    with pytest.raises(DataError, match="no instance"):
        evaluate_topk(make_top([], width=1), csr_matrix(np.zeros((0, 2))))


def test_inverse_propensity_falls_with_frequency_and_is_never_below_one():
    inverse = inverse_propensity(np.array([0, 1, 10, 1000]), 1000)
    assert np.all(np.diff(inverse) < 0) and np.all(inverse > 1)
    # napkinXC gives 1 + (ln 2 - 1) ... < 1 here.
    np.testing.assert_array_equal(inverse_propensity(np.array([0, 1, 2]), 2), np.ones(3))
    with pytest.raises(DataError, match=r"outside 0\.\.10"):
        inverse_propensity(np.array([3, 11]), 10)
    with pytest.raises(DataError, match="outside"):
        inverse_propensity(np.array([np.nan]), 10)
    with pytest.raises(DataError, match="training instances"):
        inverse_propensity(np.array([0]), 0)
    with pytest.raises(UsageError, match="B > 0"):
        inverse_propensity(np.array([0]), 10, 0.5, 0.0)


def test_breakdown_counts_each_true_label_in_the_group_of_its_training_frequency():
    frequencies = np.array([101, 100, 6, 5, 1, 0])  # head, torso, torso, tail, tail, unseen
    true = [[0, 1, 5], [0, 3], [2, 4], []]
    predicted = [[0, 1, 2], [3, 0], [4], [0]]
    groups = breakdown_by_frequency(make_top(predicted), make_labels(true, 6), frequencies, k=1)
    counts = {g.group: (g.num_labels, g.num_true, g.num_hits) for g in groups}
    assert counts == {"head": (1, 2, 1), "torso": (2, 2, 0), "tail": (2, 2, 2), "unseen": (1, 1, 0)}
    assert [g.recall for g in groups] == [0.5, 0.0, 1.0, 0.0]
    assert [g.share_of_hits for g in groups] == pytest.approx([1 / 3, 0, 2 / 3, 0])
    assert [g.share_of_true for g in groups] == pytest.approx([2 / 7, 2 / 7, 2 / 7, 1 / 7])


def test_breakdown_without_labels_of_a_group_has_no_recall():
    groups = breakdown_by_frequency(make_top([[1]]), make_labels([[0]], 2), np.array([3, 3]), k=5)
    assert {g.group: g.recall for g in groups} == {"head": None, "torso": None, "tail": 0.0, "unseen": None}
    assert all(g.share_of_hits == 0 for g in groups)


def test_the_groups_cover_every_frequency_once():
    for frequency in (0, 1, 5, 6, 100, 101, 10**9):
        inside = [
            name for name, low, high in FREQUENCY_GROUPS if low <= frequency <= (high or (0 if low == 0 else 10**9))
        ]
        assert len(inside) == 1, frequency


def test_deciles_each_hold_about_a_tenth_of_the_positives():
    """Against the definition, a label at a time."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        frequencies = np.minimum(rng.zipf(1.6, int(rng.integers(1, 3000))) - 1, 5000)
        groups = frequency_deciles(frequencies)
        total, before = frequencies.sum(), 0
        expected = {}
        for frequency in sorted(set(frequencies.tolist()) - {0}, reverse=True):
            mass = frequency * int((frequencies == frequency).sum())
            expected.setdefault(int(10 * (before + mass / 2) / total) + 1, []).append(frequency)
            before += mass
        assert groups == [(f"decile {d}", min(f), max(f)) for d, f in expected.items()] + [("unseen", 0, 0)]
    even = frequency_deciles(np.arange(1, 10_001))
    assert len(even) == 11
    mass = [sum(range(low, high + 1)) / sum(range(10_001)) for _, low, high in even[:-1]]
    assert mass == pytest.approx([0.1] * 10, abs=1e-3)


def test_deciles_of_few_frequencies_and_of_none():
    assert frequency_deciles(np.array([3, 3, 3])) == [("decile 6", 3, 3), ("unseen", 0, 0)]
    assert frequency_deciles(np.array([0, 0])) == [("unseen", 0, 0)]
    # A label of half of the positives is the middle of the first half: deciles 1 and 2 are not there.
    assert frequency_deciles(np.array([50, 25, 25, 0])) == [
        ("decile 3", 50, 50),
        ("decile 8", 25, 25),
        ("unseen", 0, 0),
    ]


def test_a_breakdown_by_deciles_covers_every_true_label_once():
    true, predicted, num_labels, frequencies, *_ = random_case(4)
    groups = breakdown_by_frequency(
        make_top(predicted), make_labels(true, num_labels), frequencies, groups=frequency_deciles(frequencies)
    )
    assert sum(group.num_true for group in groups) == sum(map(len, true)) > 0
    assert sum(group.num_labels for group in groups) == num_labels
    assert sum(group.share_of_true for group in groups) == pytest.approx(1)


def test_metrics_and_propensities_equal_pyxclib():
    """Where pyxclib is installed; its nDCG is float32."""
    xclib = pytest.importorskip("xclib.evaluation.xc_metrics")
    k, num_compared = 5, 0
    for seed in range(NUM_CASES // 4):
        true, predicted, num_labels, frequencies, num_train, a, b = random_case(seed)
        # It wants k predictions of every instance, and as many labels.
        ids = [row + [label for label in range(num_labels) if label not in row][: k - len(row)] for row in predicted]
        if num_labels < k or not any(len(row) for row in true):
            continue
        train = csr_matrix((np.arange(num_train)[:, None] < frequencies[None, :]).astype(np.float64))
        inverse = xclib.compute_inv_propesity(train, a, b)
        np.testing.assert_allclose(inverse_propensity(frequencies, num_train, a, b), inverse, rtol=1e-12)
        top, labels = np.array([row[:k] for row in ids]), make_labels(true, num_labels).astype(np.float64)
        theirs = {
            "P": xclib.precision(top, labels, k=k, sorted=True),
            "nDCG": xclib.ndcg(top, labels, k=k, sorted=True),
            "R": xclib.recall(top, labels, k=k, sorted=True),
            "PSP": xclib.psprecision(top, labels, inverse, k=k, sorted=True),
            "PSnDCG": xclib.psndcg(top, labels, inverse, k=k, sorted=True),
        }
        ours = evaluate_topk(
            make_top(top.tolist()),
            labels,
            ks=range(1, k + 1),
            label_frequencies=frequencies,
            num_train=num_train,
            A=a,
            B=b,
        )
        for family, values in theirs.items():
            tolerance = 1e-6 if "nDCG" in family else 1e-9
            mine = [ours.metrics[f"{family}@{rank}"] for rank in range(1, k + 1)]
            np.testing.assert_allclose(mine, values, rtol=0, atol=tolerance, err_msg=f"case {seed}: {family}")
        num_compared += 1
    assert num_compared > 100
