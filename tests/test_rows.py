"""Row-sparse reads of a table against dense autograd and scipy, and the length of feature rows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, vstack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xmc_midx import rows as rows_module
from xmc_midx.config import DataConfig
from xmc_midx.data.features import IDF, FeatureScaling, are_counts, normalize_rows
from xmc_midx.encoder import SparseEncoder
from xmc_midx.rows import bag_rows, gather_rows, sparse_rows
from xmc_midx.types import SparseRows

RowMaker = Callable[..., csr_matrix]


def assert_sparse_gradient(gradient: torch.Tensor | None, rows: list[int], shape: tuple[int, ...]) -> None:
    """Of the table's shape, and holding exactly the given rows, each once, rising."""
    assert gradient is not None and gradient.is_sparse
    assert tuple(gradient.shape) == shape
    assert gradient._indices()[0].tolist() == rows


def rows_with_repeats() -> SparseRows:
    """Four rows over 9 columns: a feature twice in one row, an empty row, a feature in three rows."""
    return SparseRows(
        feature_ids=torch.tensor([5, 2, 2, 8, 2, 5, 2]),
        values=torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, 0.0, 4.0]),
        offsets=torch.tensor([0, 3, 3, 6, 7]),
    )


@pytest.mark.parametrize("density", [0.0, 0.1, 0.7])
def test_a_bag_of_rows_is_the_sparse_product(random_rows: RowMaker, density: float) -> None:
    features = random_rows(13, 29, density=density)
    weight = torch.randn(29, 7, generator=torch.Generator().manual_seed(0))
    result = bag_rows(weight, sparse_rows(features))
    assert result.shape == (13, 7) and result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), features.astype(np.float64) @ weight.double().numpy(), atol=1e-5)
    assert (result[1] == 0).all(), "an empty row gives zeros"


def test_the_gradient_of_a_bag_is_the_dense_one_on_the_rows_that_were_read(random_rows: RowMaker) -> None:
    features = random_rows(13, 29, density=0.1)
    weight = torch.randn(29, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factor = torch.randn(13, 7, generator=torch.Generator().manual_seed(1))
    (bag_rows(weight, sparse_rows(features)).tanh() * factor).sum().backward()
    dense = weight.detach().double().requires_grad_()
    ((torch.from_numpy(features.toarray()).double() @ dense).tanh() * factor).sum().backward()
    assert_sparse_gradient(weight.grad, sorted(set(features.indices.tolist())), (29, 7))
    assert weight.grad is not None and dense.grad is not None
    torch.testing.assert_close(weight.grad.to_dense().double(), dense.grad, atol=1e-5, rtol=0)


def test_a_feature_that_repeats_within_and_across_rows_adds_up() -> None:
    rows = rows_with_repeats()
    weight = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    dense = np.zeros((4, 9))
    for i in range(4):
        for position in range(int(rows.offsets[i]), int(rows.offsets[i + 1])):
            dense[i, rows.feature_ids[position]] += float(rows.values[position])
    result = bag_rows(weight, rows)
    np.testing.assert_allclose(result.detach().numpy(), dense @ weight.detach().double().numpy(), atol=1e-6)
    factor = torch.arange(12.0).view(4, 3)
    (result * factor).sum().backward()
    # A stored zero is still a row that was read.
    assert_sparse_gradient(weight.grad, [2, 5, 8], (9, 3))
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.to_dense().numpy(), dense.T @ factor.double().numpy(), atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_batch_without_features_has_an_empty_gradient(num_rows: int) -> None:
    rows = sparse_rows(csr_matrix((num_rows, 9), dtype=np.float32))
    weight = torch.ones(9, 3, requires_grad=True)
    result = bag_rows(weight, rows)
    assert result.shape == (num_rows, 3) and (result == 0).all()
    result.sum().backward()
    assert_sparse_gradient(weight.grad, [], (9, 3))


@pytest.mark.parametrize("shape", [(11, 4), (11,)])
def test_gathered_rows_are_the_rows_and_so_is_their_gradient(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([0, 3, 10])
    rows = gather_rows(weight, [ids])[0]
    assert torch.equal(rows, weight[ids])
    factor = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (rows * factor).sum().backward()
    assert_sparse_gradient(weight.grad, [0, 3, 10], shape)
    assert weight.grad is not None
    assert torch.equal(weight.grad.to_dense()[ids], factor)


@pytest.mark.parametrize("apart", [False, True], ids=["here", "by way of the host"])
@pytest.mark.parametrize("shape", [(11, 4), (11,)])
def test_parts_may_share_rows_whose_gradient_is_the_sum(
    shape: tuple[int, ...], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_lies_apart", lambda weight, row_ids: apart)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = [torch.tensor(ids, dtype=torch.int64) for ids in ([0, 3, 10], [], [3, 4, 10])]
    gathered = gather_rows(weight, parts)
    factors = [torch.randn(len(part), *shape[1:], generator=torch.Generator().manual_seed(len(part))) for part in parts]
    expected = torch.zeros(shape)
    for rows, part, factor in zip(gathered, parts, factors, strict=True):
        assert torch.equal(rows, weight[part])
        expected[part] += factor
    torch.stack([(rows * factor).sum() for rows, factor in zip(gathered, factors, strict=True)]).sum().backward()
    assert_sparse_gradient(weight.grad, [0, 3, 4, 10], shape)
    assert weight.grad is not None
    assert torch.allclose(weight.grad.to_dense(), expected)


def test_rows_of_a_table_in_the_hosts_memory_move_to_the_device_and_their_gradient_comes_back() -> None:
    """Where tensors are, as a machine with a GPU would have them: torch's fake tensors compute nothing."""
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        weight = torch.empty(11, 4)
        parts = [torch.zeros(count, dtype=torch.int64, device="cuda") for count in (3, 5)]
        gathered = gather_rows(weight, parts)
        assert [rows.device.type for rows in gathered] == ["cuda", "cuda"]
        assert [tuple(rows.shape) for rows in gathered] == [(3, 4), (5, 4)]
        # Autograd's own thread for the device would look for a GPU.
        for some in (parts, parts[:1]):
            context = SimpleNamespace(saved_tensors=some, shape=weight.shape, device=weight.device)
            gradient, *others = rows_module._GatherRows.backward(context, *gathered[: len(some)])
            assert gradient is not None and others == [None] * len(some)
            assert gradient.is_sparse and gradient.device.type == "cpu" and gradient.shape == (11, 4)


def test_a_csr_matrix_becomes_rows_of_the_stated_types(random_rows: RowMaker) -> None:
    features = random_rows(5, 8, density=0.4)
    rows = sparse_rows(features.astype(np.float64))
    assert rows.feature_ids.dtype == rows.offsets.dtype == torch.int64 and rows.values.dtype == torch.float32
    assert rows.num_rows == 5
    assert rows.feature_ids.tolist() == features.indices.tolist()
    assert rows.offsets.tolist() == features.indptr.tolist()


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
def test_normalised_rows_have_length_one_and_empty_rows_stay_empty(random_rows: RowMaker, density: float) -> None:
    features = random_rows(17, 23, density=density)
    features = vstack([features, csr_matrix((1, 23), dtype=np.float32)], format="csr")
    lengths = np.linalg.norm(features.toarray().astype(np.float64), axis=1)
    expected = features.toarray() / np.where(lengths > 0, lengths, 1)[:, None]
    result = normalize_rows(features)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.toarray(), expected, atol=1e-6)


def test_a_row_of_stored_zeros_stays_as_it_is() -> None:
    features = csr_matrix((np.array([0.0, 0.0, 3.0], np.float32), [0, 1, 1], [0, 2, 2, 3]), shape=(3, 2))
    assert normalize_rows(features).toarray().tolist() == [[0, 0], [0, 0], [0, 1]]


class TestEncoder:
    """Sparse rows -> queries."""

    def make(self, **options: object) -> SparseEncoder:
        encoder = SparseEncoder(29, 6, **options)  # type: ignore[arg-type]
        encoder.reset_parameters(torch.Generator().manual_seed(0))
        return encoder

    @pytest.mark.parametrize("activation", ["relu", "none"])
    @pytest.mark.parametrize("residual", [True, False])
    def test_it_is_the_stated_formula(self, random_rows: RowMaker, activation: str, residual: bool) -> None:
        encoder = self.make(num_hidden_layers=2, activation=activation, residual=residual)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.normal_(generator=generator)
        features = random_rows(9, 29)

        def act(values: np.ndarray) -> np.ndarray:
            return np.maximum(values, 0) if activation == "relu" else values

        tables = {name: tensor.double().numpy() for name, tensor in encoder.state_dict().items()}
        query = act(features.astype(np.float64) @ tables["embedding"] + tables["bias"])
        for layer in range(2):
            update = act(query @ tables[f"hidden.{layer}.weight"].T + tables[f"hidden.{layer}.bias"])
            query = query + update if residual else update
        np.testing.assert_allclose(encoder(sparse_rows(features)).detach().numpy(), query, rtol=1e-4, atol=1e-4)

    def test_a_residual_layer_starts_at_the_identity(self, random_rows: RowMaker) -> None:
        rows = sparse_rows(random_rows(9, 29))
        assert torch.equal(self.make(num_hidden_layers=3)(rows), self.make()(rows))

    def test_encoding_is_without_dropout_in_chunks_and_leaves_the_mode(
        self, random_rows: RowMaker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("xmc_midx.encoder._ENCODE_CHUNK", 4)
        encoder, features = self.make(dropout=0.9).train(), random_rows(9, 29)
        parts = list(encoder.encode(features))
        assert [(part.start, part.stop) for part, _ in parts] == [(0, 4), (4, 8), (8, 9)]
        together = torch.cat([query for _, query in parts])
        assert encoder.training and not together.requires_grad
        torch.testing.assert_close(together, encoder.eval()(sparse_rows(features)).detach())

    def test_dropout_keeps_the_mean_and_follows_its_own_generator(self, random_rows: RowMaker) -> None:
        encoder, rows = self.make(dropout=0.75).train(), sparse_rows(random_rows(9, 29))
        before = torch.get_rng_state()
        encoder.dropout.generator = torch.Generator().manual_seed(3)
        drawn = torch.stack([encoder(rows).detach() for _ in range(4000)])
        assert torch.equal(torch.get_rng_state(), before)
        whole = encoder.eval()(rows).detach()
        # A kept coordinate is four times itself: standard error of the mean is sqrt(3 / 4000) of it.
        assert ((drawn.mean(0) - whole).abs() <= 4.5 * (3 / 4000) ** 0.5 * whole.abs() + 1e-6).all()
        assert set((drawn / whole)[..., whole[0] > 0][:, 0].round().unique().tolist()) <= {0.0, 4.0}


@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_weighted_values_are_damped_counts_times_idf(random_rows: RowMaker, normalize: str) -> None:
    features = random_rows(17, 23, density=0.2)
    features.data[:] = np.ceil(9 * np.abs(features.data))
    features.data[0] *= -1
    features.data[1] = 0.25
    config = DataConfig(weighting="tf-idf", normalize=normalize)
    scaling = FeatureScaling.fit(config, features)
    dense = features.toarray().astype(np.float64)
    idf = np.log(18 / ((dense != 0).sum(0) + 1)) + 1
    size = np.abs(dense)
    damped = np.where(size >= 1, 1 + np.log(np.maximum(size, 1)), size)
    expected = np.sign(dense) * damped * idf
    if normalize == "l2":
        expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(scaling(features).toarray(), expected, rtol=1e-5)
    assert scaling(features).dtype == np.float32
    # Of other rows, with the idf that the model keeps.
    known = FeatureScaling.of(config, {IDF: scaling.idf}, 23)
    assert (known(features[3:5]) != scaling(features)[3:5]).nnz == 0
    assert scaling.idf is not None
    for broken in ({}, {IDF: idf}, {IDF: scaling.idf[1:]}, {IDF: np.full(23, np.nan, np.float32)}):
        with pytest.raises((LookupError, ValueError)):
            FeatureScaling.of(config, broken, 23)


def test_counts_are_whole_numbers_in_sparse_rows(random_rows: RowMaker) -> None:
    features = random_rows(40, 60, density=0.1)
    features.data[:] = 1
    assert not are_counts(features), "whether a word occurs is no count"
    features.data[::3] = 4
    assert are_counts(features)
    for value in (0, -2, 1.5, np.nan):
        others = features.copy()
        others.data[-1] = value
        assert not are_counts(others)
    assert not are_counts(features[:0])
    pixels = csr_matrix(np.full((9, 16), 3, dtype=np.float32))
    assert not are_counts(pixels)
