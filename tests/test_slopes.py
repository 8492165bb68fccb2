"""Claims about `xmc_midx.slopes`: rounding without bias, what stays exact, and the products against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from xmc_midx.slopes import multiply, round_slopes, rounds_slopes

B, P = 9, 23
THRESHOLD = 0.125


def slopes() -> torch.Tensor:
    """Shares of a softmax, most of them below the threshold; a positive's slope in five rows, a row of zeros, a row
    with one entry."""
    generator = torch.Generator().manual_seed(0)
    found = torch.softmax(3 * torch.randn(B, P, generator=generator), 1) * torch.rand(B, 1, generator=generator)
    found[:5, 7] = -0.75
    found[6] = 0.0
    found[7] = 0.0
    found[7, P - 1] = 0.01
    return found


def dense(matrix: csr_matrix) -> np.ndarray:
    return matrix.toarray().astype(np.float64)


def test_losses_in_float32_on_a_cpu_are_rounded() -> None:
    assert rounds_slopes(torch.device("cpu"))
    assert not rounds_slopes(torch.device("cuda")) and not rounds_slopes(torch.device("cpu"), torch.float64)


def test_small_slopes_are_rounded_without_bias_and_others_kept() -> None:
    given = slopes()
    small = ((given >= 0) & (given < THRESHOLD)).numpy()
    num_offsets = 2000
    mean = np.zeros((B, P))
    for i in range(num_offsets):
        found = dense(round_slopes(given, THRESHOLD, torch.full((B,), (i + 0.5) / num_offsets)))
        np.testing.assert_array_equal(found[~small], given.numpy()[~small])
        assert set(np.unique(found[small])) <= {0.0, THRESHOLD}
        assert (np.abs(found.sum(1) - given.double().sum(1).numpy()) < THRESHOLD).all()
        mean += found / num_offsets
    assert small.sum() > B * P / 2 and (~small).sum() > 10
    # Equally spaced offsets: an entry's share of them is its chance, to one offset at each end.
    np.testing.assert_allclose(mean, given.double().numpy(), atol=2 * THRESHOLD / num_offsets)


def test_each_row_has_an_offset_of_its_own() -> None:
    given = torch.full((4, 8), THRESHOLD / 8)
    found = dense(round_slopes(given, THRESHOLD, torch.tensor([0.0, 0.5, 0.8125, 0.9375])))
    assert [row.nonzero()[0].tolist() for row in found] == [[7], [3], [1], [0]]


def test_a_threshold_of_zero_keeps_all_and_a_slope_that_is_not_finite_stays_visible() -> None:
    given = slopes()
    np.testing.assert_array_equal(dense(round_slopes(given, 0.0, torch.rand(B))), given.double().numpy())
    given[2, 3] = torch.nan
    for threshold in (THRESHOLD, float("nan")):
        rounded = round_slopes(given, threshold, torch.rand(B))
        assert torch.isnan(multiply(rounded, torch.ones(P, 2))[2]).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 23, 5), (40, 7, 33), (3, 200, 8)])
def test_products_are_those_of_the_dense_matrix(shape: tuple[int, int, int], num_threads: int) -> None:
    num_rows, num_columns, dim = shape
    generator = torch.Generator().manual_seed(1)
    given = torch.rand(num_rows, num_columns, generator=generator) ** 4
    rows, queries = (torch.randn(n, dim, generator=generator) for n in (num_columns, num_rows))
    rounded = round_slopes(given, 0.3, torch.rand(num_rows, generator=generator))
    expected = torch.from_numpy(dense(rounded))
    for found, reference in (
        (multiply(rounded, rows), expected @ rows.double()),
        (multiply(rounded.T.tocsr(), queries), expected.T @ queries.double()),
        (multiply(rounded, rows.double()), expected @ rows.double()),
    ):
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)


def test_the_rounding_does_not_depend_on_threads_or_on_the_place_in_memory(num_threads: int) -> None:
    """The products of `xmc_midx.products.linear` are parts of wider tensors."""
    offsets = torch.linspace(0, 0.95, B)
    wide = torch.full((B, P + 5), 0.5)
    wide[:, :P] = slopes()
    expected = slopes().double().numpy()
    small = (expected >= 0) & (expected < THRESHOLD)
    sums = np.cumsum(np.where(small, expected, 0.0), axis=1) + THRESHOLD * offsets.double().numpy()[:, None]
    passed = np.diff(np.floor(sums / THRESHOLD), axis=1, prepend=0.0)
    expected[small] = THRESHOLD * passed[small]
    np.testing.assert_array_equal(dense(round_slopes(wide[:, :P], THRESHOLD, offsets)), expected)
