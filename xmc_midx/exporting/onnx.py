"""Layer 5. The encoder as an ONNX graph that stock onnxruntime runs: sparse rows -> queries.

Inputs, of any number of rows B and entries nnz: `feature_ids` (nnz,) int64, `values` (nnz,) float32 as they are in the
data, `offsets` (B + 1,) int64; row i owns `offsets[i]:offsets[i+1]`. Output: `queries` (B, D) float32. Where the model
was trained on rows of length 1, the graph scales them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.errors import DataError, UsageError
from xmc_midx.exporting.midx import FORMAT, VERSION
from xmc_midx.exporting.source import MEASURED_K, ExportSource, Measurement, Queries, seconds_each
from xmc_midx.topk import exact_topk

__all__ = ["export_onnx", "require_onnx"]

_OPSET, _IR_VERSION = 17, 8
"""Of 2022: ScatterND and ScatterElements that add came with opset 16."""
_EXTERNAL_BYTES = 2**30
"""From this size on, the tables lie in a file beside the graph: a protobuf message ends at 2 GiB."""
_TOLERANCE = 1e-4
"""Of a query's coordinates, relative to the longest: more is a fault, not rounding."""


def require_onnx() -> tuple[Any, Any]:
    """onnx and onnxruntime, or what to install."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs onnx and onnxruntime: {error}.", hint="pip install 'xmc-midx[export]'."
        ) from None
    return onnx, onnxruntime


def export_onnx(source: ExportSource, queries: Queries | None, target: Path) -> Sequence[Measurement]:
    """Write `encoder.onnx` and `export.json` into `target`, an empty directory; compare onnxruntime's queries with
    torch's, and the labels that they find.

    Raises
    ------
    DataError : onnxruntime computes something else.
    """
    onnx, onnxruntime = require_onnx()
    path = target / "encoder.onnx"
    model = _build(onnx, source)
    if source.model.encoder.embedding.nbytes < _EXTERNAL_BYTES:
        onnx.save_model(model, str(path))
    else:
        onnx.save_model(model, str(path), save_as_external_data=True, location="encoder.data", size_threshold=1024)
    source.copy_names(target)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    measured, largest = _measure(session, source, queries)
    is_scaled = source.model.scaling.idf is not None or source.model.scaling.normalize != "none"
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "onnx",
        "model": source.facts(),
        "inputs": {
            "feature_ids": "(nnz,) int64",
            "values": f"(nnz,) float32{', scaled by the graph' if is_scaled else ''}",
            "offsets": "(B + 1,) int64: row i owns offsets[i]:offsets[i+1]",
        },
        "outputs": {"queries": "(B, dim) float32"},
        "largest_difference": largest,
        "measured": [one.as_dict() for one in measured],
    }
    (target / "export.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return measured


def _measure(session: Any, source: ExportSource, queries: Queries | None) -> tuple[list[Measurement], float | None]:
    if queries is None:
        return [Measurement.missing("onnx encoder", {})], None
    table, bias = source.model.label_table, source.model.bias

    def run(features: csr_matrix) -> NDArray[np.float32]:
        inputs = {
            "feature_ids": features.indices.astype(np.int64),
            "values": features.data.astype(np.float32),
            "offsets": features.indptr.astype(np.int64),
        }
        found: NDArray[np.float32] = session.run(["queries"], inputs)[0]
        return found

    query_ND = run(queries.features)
    largest = float(np.abs(query_ND - queries.vectors).max(initial=0.0))
    if largest > _TOLERANCE * max(float(np.abs(queries.vectors).max(initial=0.0)), 1.0):
        raise DataError(f"onnxruntime's queries differ from torch's by {largest:.2g}; expected rounding alone.")
    found = exact_topk(torch.from_numpy(query_ND), table, bias, MEASURED_K).label_ids
    seconds = seconds_each(lambda rows: run(queries.features[rows]), len(query_ND))
    scaling = source.model.scaling
    torch_seconds = seconds_each(lambda rows: source.model.encode(scaling(queries.features[rows])), len(query_ND))
    ours = Measurement(
        name="onnx encoder",
        recall_1=queries.recall(found, 1),
        recall_5=queries.recall(found, MEASURED_K),
        microseconds=1e6 * seconds,
        settings={},
    )
    theirs = Measurement(
        name="torch encoder", recall_1=1.0, recall_5=1.0, microseconds=1e6 * torch_seconds, settings={}
    )
    return [ours, theirs], largest


def _build(onnx: Any, source: ExportSource) -> Any:
    """The graph. A row's sum is a scatter that adds: entry j goes to the row that owns it, found by counting the rows
    that begin at or before j."""
    helper, kind = onnx.helper, onnx.TensorProto
    nodes: list[Any] = []
    constants: list[Any] = []

    def node(operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(name: str, value: NDArray[Any]) -> str:
        constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def integers(name: str, *values: int) -> str:
        return constant(name, np.array(values, dtype=np.int64))

    def filled(shape: str, value: Any, dtype: Any) -> str:
        return node("ConstantOfShape", shape, value=helper.make_tensor("value", dtype, [1], [value]))

    encoder = source.model.encoder
    zero, one, minus_one, axis = (integers(*x) for x in (("zero", 0), ("one", 1), ("minus_one", -1), ("axis_1", 1)))
    num_entries = node("Shape", "feature_ids")
    num_rows = node("Sub", node("Shape", "offsets"), one)
    starts = node("Slice", "offsets", one, minus_one)
    ones = filled(node("Shape", starts), 1, kind.INT64)
    zeros = filled(node("Add", num_entries, one), 0, kind.INT64)
    marks = node("ScatterElements", zeros, starts, ones, axis=0, reduction="add")
    counted = node("CumSum", marks, constant("axis_0", np.array(0, dtype=np.int64)))
    row_of = node("Slice", counted, zero, num_entries)

    values, scaling = "values", source.model.scaling
    if scaling.idf is not None:
        size, one_float = node("Abs", values), constant("one_float", np.array(1.0, dtype=np.float32))
        damped = node("Add", node("Min", size, one_float), node("Log", node("Max", size, one_float)))
        weight = node("Gather", constant("idf", scaling.idf), "feature_ids")
        values = node("Mul", node("Mul", node("Sign", values), damped), weight)
    if scaling.normalize == "l2":
        wide = node("Cast", values, to=kind.DOUBLE)
        empty = filled(num_rows, 0.0, kind.DOUBLE)
        squares = node("ScatterElements", empty, row_of, node("Mul", wide, wide), axis=0, reduction="add")
        is_zero = node("Equal", squares, constant("zero_double", np.array(0.0)))
        length = node("Sqrt", node("Where", is_zero, constant("one_double", np.array(1.0)), squares))
        values = node("Cast", node("Div", wide, node("Gather", length, row_of)), to=kind.FLOAT)

    table = constant("embedding", encoder.embedding.detach().float().numpy())
    weighted = node("Mul", node("Gather", table, "feature_ids"), node("Unsqueeze", values, axis))
    shape = node("Concat", num_rows, integers("dim", source.dim), axis=0)
    empty = filled(shape, 0.0, kind.FLOAT)
    summed = node("ScatterND", empty, node("Unsqueeze", row_of, axis), weighted, reduction="add")
    is_relu = source.model.config.model.activation == "relu"

    def activate(name: str) -> str:
        return node("Relu", name) if is_relu else name

    query = activate(node("Add", summed, constant("bias", encoder.bias.detach().float().numpy())))
    for number, layer in enumerate(encoder.hidden):
        assert isinstance(layer, torch.nn.Linear)
        weight = constant(f"hidden.{number}.weight", layer.weight.detach().float().numpy())
        bias = constant(f"hidden.{number}.bias", layer.bias.detach().float().numpy())
        update = activate(node("Gemm", query, weight, bias, transB=1))
        query = node("Add", query, update) if encoder.residual else update
    nodes.append(helper.make_node("Identity", [query], ["queries"]))
    graph = helper.make_graph(
        nodes,
        "encoder",
        [
            helper.make_tensor_value_info("feature_ids", kind.INT64, ["entries"]),
            helper.make_tensor_value_info("values", kind.FLOAT, ["entries"]),
            helper.make_tensor_value_info("offsets", kind.INT64, ["rows + 1"]),
        ],
        [helper.make_tensor_value_info("queries", kind.FLOAT, ["rows", source.dim])],
        constants,
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="xmc-midx",
    )
