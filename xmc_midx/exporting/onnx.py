"""Layer 5. The encoder as an ONNX graph that stock onnxruntime runs: sparse rows -> queries.

Inputs, of any number of rows B and entries nnz: `feature_ids` (nnz,) int64, `values` (nnz,) float32 as they are in the
data, `offsets` (B + 1,) int64; row i owns `offsets[i]:offsets[i+1]`. Output: `queries` (B, D) float32. Where the model
was trained on rows of length 1, the graph scales them. It holds B W D numbers, W the entries of the longest row.
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

__all__ = ["export_onnx", "require_onnx"]

_OPSET, _IR_VERSION = 17, 8
"""Of 2022."""
_TOGETHER = 64
"""Rows that are asked at once: the graph holds the vectors of as many entries for each as the longest has."""
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
    if 4 * source.num_features * source.dim < _EXTERNAL_BYTES:
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

    def run(features: csr_matrix) -> NDArray[np.float32]:
        inputs = {
            "feature_ids": features.indices.astype(np.int64),
            "values": features.data.astype(np.float32),
            "offsets": features.indptr.astype(np.int64),
        }
        found: NDArray[np.float32] = session.run(["queries"], inputs)[0]
        return found

    begins = range(0, max(queries.features.shape[0], 1), _TOGETHER)
    query_ND = np.concatenate([run(queries.features[begin : begin + _TOGETHER]) for begin in begins])
    largest = float(np.abs(query_ND - queries.vectors).max(initial=0.0))
    if largest > _TOLERANCE * max(float(np.abs(queries.vectors).max(initial=0.0)), 1.0):
        raise DataError(f"onnxruntime's queries differ from torch's by {largest:.2g}; expected rounding alone.")
    found = source.exact_ids(torch.from_numpy(query_ND))
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
    """The graph. A row's sum is a product of its values with their vectors, (1, W) by (W, D), W the entries of the
    batch's longest row: a scatter that adds into rows would be less to hold, but onnxruntime's threads lose some of
    what they add to one row side by side."""
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

    encoder = source.model.encoder
    zero, one, last, axis = (integers(*x) for x in (("zero", 0), ("one", 1), ("last", -1), ("axis_1", 1)))
    starts, ends = node("Slice", "offsets", zero, last), node("Slice", "offsets", one, integers("end", 2**62))
    lengths = node("Sub", ends, starts)
    longest = node("ReduceMax", node("Concat", lengths, one, axis=0), axes=[0], keepdims=0)
    first, step = (constant(name, np.array(value)) for name, value in (("first", 0), ("step", 1)))
    columns = node("Range", first, longest, step)
    is_there = node("Less", columns, node("Unsqueeze", lengths, axis))
    # Of a row that is shorter than the longest, the rest is one entry more, a value of 0.
    places = node(
        "Where", is_there, node("Add", node("Unsqueeze", starts, axis), columns), node("Shape", "feature_ids")
    )
    ids = node("Gather", node("Concat", "feature_ids", zero, axis=0), places)
    nothing = constant("nothing", np.zeros(1, dtype=np.float32))
    values = node("Gather", node("Concat", "values", nothing, axis=0), places)

    scaling = source.model.scaling
    if scaling.idf is not None:
        size, one_float = node("Abs", values), constant("one_float", np.array(1.0, dtype=np.float32))
        damped = node("Add", node("Min", size, one_float), node("Log", node("Max", size, one_float)))
        weight = node("Gather", constant("idf", scaling.idf), ids)
        values = node("Mul", node("Mul", node("Sign", values), damped), weight)
    if scaling.normalize == "l2":
        wide = node("Cast", values, to=kind.DOUBLE)
        squares = node("ReduceSum", node("Mul", wide, wide), axis, keepdims=1)
        is_zero = node("Equal", squares, constant("zero_double", np.array(0.0)))
        length = node("Sqrt", node("Where", is_zero, constant("one_double", np.array(1.0)), squares))
        values = node("Cast", node("Div", wide, length), to=kind.FLOAT)

    table = constant("embedding", source.feature_table())
    summed = node("Squeeze", node("MatMul", node("Unsqueeze", values, axis), node("Gather", table, ids)), axis)
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
