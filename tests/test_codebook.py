"""Codebooks: k-means against faiss and brute force, and what the two codes of a label mean."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from xmc_midx import codebook as codebook_module
from xmc_midx.codebook import Codebook, fit_codebook, kmeans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(num_rows: int, num_centres: int, dim: int, *, spread: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = seeded(seed)
    centres = torch.randn(num_centres, dim, generator=generator)
    which = torch.randint(num_centres, (num_rows,), generator=generator)
    return centres[which] + spread * torch.randn(num_rows, dim, generator=generator)


def nearest(rows: torch.Tensor, words: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Brute force in float64: (N,) nearest codeword and (N, C) squared distances."""
    distances = ((rows.double().numpy()[:, None, :] - words.double().numpy()[None]) ** 2).sum(2)
    return distances.argmin(1), distances


def inertia(rows: torch.Tensor, words: torch.Tensor) -> float:
    return float(nearest(rows, words)[1].min(1).mean())


def assert_nearest(rows: torch.Tensor, words: torch.Tensor, codes: torch.Tensor) -> None:
    """Every row has a nearest codeword, up to float32's error where two are equally near."""
    _, distances = nearest(rows, words)
    chosen = distances[np.arange(rows.shape[0]), codes.numpy()]
    np.testing.assert_array_less(chosen, distances.min(1) + 1e-5 * (1 + distances.max()))


@pytest.mark.parametrize(("num_centres", "codewords"), [(16, 16), (60, 16), (12, 31)])
def test_kmeans_is_as_tight_as_faiss(num_centres: int, codewords: int) -> None:
    ours, theirs = [], []
    for seed in range(6):
        rows = mixture(1500, num_centres, 9, seed=seed)
        words, _ = kmeans(rows, codewords, generator=seeded(seed), num_iterations=10)
        ours.append(inertia(rows, words))
        reference = faiss.Kmeans(9, codewords, niter=10, seed=seed + 1, min_points_per_centroid=1)
        reference.train(rows.numpy())
        theirs.append(inertia(rows, torch.from_numpy(reference.centroids)))
    # Both stop in local minima that depend on the start: the mean of six starts scatters by two or three percent.
    assert np.mean(ours) < 1.05 * np.mean(theirs)


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_assignments_in_bfloat16_lose_next_to_nothing_wherever_the_rows_lie(
    offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row between two codewords may go to either. More rows than are assigned at once."""
    rows = mixture(4096 + 333, 60, 19, spread=0.7) + offset
    words = rows[:50] + 0.0
    exact, distances = nearest(rows, words)
    monkeypatch.setattr(codebook_module, "_ROUGH_FROM", 1)
    monkeypatch.setattr(codebook_module, "multiplies_bfloat16", lambda device: True)
    codes = codebook_module._assign(rows, words).numpy()
    assert (codes == exact).mean() > 0.97
    assert distances[np.arange(len(rows)), codes].mean() < 1.0005 * distances.min(1).mean()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
def test_sums_of_codewords_rows(width: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, codes = torch.randn(501, width, generator=seeded()), torch.randint(5, (501,), generator=seeded()).short()
    expected = torch.zeros(7, width).index_add_(0, codes.long(), rows)
    torch.testing.assert_close(codebook_module._sums(rows, codes, 7), expected)


def test_every_row_has_the_code_of_its_nearest_codeword() -> None:
    rows = mixture(501, 20, 7)
    words, codes = kmeans(rows, 13, generator=seeded())
    assert words.shape == (13, 7) and words.dtype == torch.float32
    assert codes.shape == (501,) and codes.dtype == torch.int16
    assert_nearest(rows, words, codes)


def test_codewords_are_the_means_of_their_rows_once_converged() -> None:
    rows = mixture(300, 5, 4, spread=0.05)
    words, codes = kmeans(rows, 5, generator=seeded(3), num_iterations=60)
    for code in range(5):
        mine = rows[codes == code]
        if mine.shape[0]:
            torch.testing.assert_close(words[code], mine.mean(0), atol=1e-5, rtol=0)


def test_rows_above_the_training_bound_are_all_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebook_module, "_POINTS_PER_CODEWORD", 20)
    monkeypatch.setattr(codebook_module, "_ASSIGN_CHUNK", {"cpu": 64})
    rows = mixture(1003, 6, 5, spread=0.1)
    words, codes = kmeans(rows, 6, generator=seeded())
    assert codes.shape == (1003,)
    assert_nearest(rows, words, codes)
    # 120 of the 1,003 rows are enough to find the clusters.
    everything, _ = kmeans(rows, 6, generator=seeded(), num_iterations=10)
    assert inertia(rows, words) < 1.2 * inertia(rows, everything)


def test_training_reads_no_more_rows_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    assign = codebook_module._assign

    def counting(rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape[0])
        return assign(rows, words)

    monkeypatch.setattr(codebook_module, "_assign", counting)
    kmeans(torch.randn(5000, 3, generator=seeded()), 4, generator=seeded(), num_iterations=5)
    assert sizes == [4096] * 5 + [5000]


def test_a_warm_start_does_not_raise_the_inertia() -> None:
    rows = mixture(700, 30, 6)
    words, _ = kmeans(rows, 16, generator=seeded(), num_iterations=3)
    for iterations in (1, 2, 5):
        warm, _ = kmeans(rows, 16, generator=seeded(1), start=words, num_iterations=iterations)
        assert inertia(rows, warm) <= inertia(rows, words) + 1e-6


def test_a_warm_start_leaves_the_old_codewords_alone() -> None:
    rows = mixture(200, 8, 4)
    words, _ = kmeans(rows, 8, generator=seeded(), num_iterations=2)
    before = words.clone()
    kmeans(rows + 1.0, 8, generator=seeded(), start=words)
    assert torch.equal(words, before)


def test_a_codeword_without_rows_finds_some() -> None:
    rows = mixture(400, 4, 3, spread=0.5)
    far = torch.cat([rows[:7], torch.full((5, 3), 1e3)])
    _, codes = kmeans(rows, 12, generator=seeded(), start=far, num_iterations=10)
    assert codes.unique().shape[0] == 12


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_more_codewords_than_rows_reproduce_the_rows(quantizer: str) -> None:
    table = torch.randn(5, 6, generator=seeded())
    fitted = fit_codebook(table, quantizer=quantizer, num_codewords=9, generator=seeded())
    assert torch.isfinite(fitted.codewords1).all() and torch.isfinite(fitted.codewords2).all()
    torch.testing.assert_close(fitted.reconstruct(torch.arange(5)), table, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_identical_rows_share_one_cell(quantizer: str, value: float) -> None:
    table = torch.full((30, 4), value)
    fitted = fit_codebook(table, quantizer=quantizer, num_codewords=4, generator=seeded())
    assert torch.isfinite(fitted.codewords1).all() and torch.isfinite(fitted.codewords2).all()
    assert fitted.cells().unique().shape[0] == 1
    torch.testing.assert_close(fitted.reconstruct(torch.arange(30)), table, atol=1e-5, rtol=1e-3)


def test_pq_quantises_the_two_halves() -> None:
    table = mixture(90, 10, 7)
    fitted = fit_codebook(table, quantizer="pq", num_codewords=5, generator=seeded())
    assert fitted.codewords1.shape == (5, 3) and fitted.codewords2.shape == (5, 4)
    assert_nearest(table[:, :3], fitted.codewords1, fitted.codes1)
    assert_nearest(table[:, 3:], fitted.codewords2, fitted.codes2)
    expected = torch.cat([fitted.codewords1[fitted.codes1.long()], fitted.codewords2[fitted.codes2.long()]], dim=1)
    assert torch.equal(fitted.reconstruct(torch.arange(90)), expected)


def test_rq_quantises_the_row_and_then_its_residual() -> None:
    table = mixture(90, 10, 7)
    fitted = fit_codebook(table, quantizer="rq", num_codewords=5, generator=seeded())
    assert fitted.codewords1.shape == fitted.codewords2.shape == (5, 7)
    assert_nearest(table, fitted.codewords1, fitted.codes1)
    residual = table - fitted.codewords1[fitted.codes1.long()]
    assert_nearest(residual, fitted.codewords2, fitted.codes2)
    expected = fitted.codewords1[fitted.codes1.long()] + fitted.codewords2[fitted.codes2.long()]
    assert torch.equal(fitted.reconstruct(torch.arange(90)), expected)
    # The second codebook is worth having.
    first_only = (residual**2).sum()
    assert ((table - expected) ** 2).sum() < 0.8 * first_only


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_the_scores_of_a_labels_codes_sum_to_the_logit_of_its_reconstruction(quantizer: str) -> None:
    table, query = mixture(41, 10, 9), torch.randn(3, 9, generator=seeded(1))
    fitted = fit_codebook(table, quantizer=quantizer, num_codewords=4, generator=seeded())
    scores1, scores2 = fitted.scores(query)
    together = scores1[:, fitted.codes1.long()] + scores2[:, fitted.codes2.long()]
    expected = query.double() @ fitted.reconstruct(torch.arange(41)).double().T
    torch.testing.assert_close(together.double(), expected, atol=1e-5, rtol=0)


def test_a_cell_is_a_pair_of_codes() -> None:
    fitted = Codebook(
        quantizer="rq",
        codewords1=torch.zeros(3, 2),
        codewords2=torch.zeros(3, 2),
        codes1=torch.tensor([0, 1, 2, 2], dtype=torch.int32),
        codes2=torch.tensor([0, 0, 1, 2], dtype=torch.int32),
    )
    assert fitted.cells().tolist() == [0, 3, 7, 8]
    assert (fitted.num_codewords, fitted.num_labels) == (3, 4)


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_the_seed_decides_the_codebook(quantizer: str) -> None:
    table = mixture(200, 40, 6)

    def fit(seed: int) -> Codebook:
        return fit_codebook(table, quantizer=quantizer, num_codewords=7, generator=seeded(seed))

    first, again, other = fit(1), fit(1), fit(2)
    assert torch.equal(first.codewords1, again.codewords1) and torch.equal(first.codes2, again.codes2)
    assert not torch.equal(first.codewords1, other.codewords1)


@pytest.mark.parametrize("quantizer", ["pq", "rq"])
def test_a_refresh_starts_from_the_earlier_codewords(quantizer: str) -> None:
    table = mixture(300, 40, 6)
    cold = fit_codebook(table, quantizer=quantizer, num_codewords=8, generator=seeded(0))
    kept = fit_codebook(table, quantizer=quantizer, num_codewords=8, generator=seeded(5), start=cold, num_iterations=0)
    assert torch.equal(kept.codewords1, cold.codewords1) and torch.equal(kept.codewords2, cold.codewords2)
    # A codebook of another size cannot be a start.
    other = fit_codebook(table, quantizer=quantizer, num_codewords=5, generator=seeded(5), start=cold)
    assert other.num_codewords == 5


def test_a_single_label_is_a_codebook() -> None:
    fitted = fit_codebook(torch.ones(1, 2), quantizer="pq", num_codewords=3, generator=seeded())
    torch.testing.assert_close(fitted.reconstruct(torch.tensor([0])), torch.ones(1, 2), atol=1e-4, rtol=0)


def test_an_unknown_quantizer_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'pq' or 'rq'"):
        fit_codebook(torch.ones(3, 2), quantizer="opq", num_codewords=2, generator=seeded())
