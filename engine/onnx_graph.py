"""The model as an ONNX graph without its weights, of operators that every runtime has.

Names of weights are the keys of model files, names of MLP layers those of torch's modules. In the
shapes below B is the rows of a batch, T the tables, D the dimension and L the most ids in a bag.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from engine.served_model import ServedModel
from ranks.placement import LogicalTable, Matrix

OPSET = 17  # and a version of the format that runtimes from 2022 on read
IR_VERSION = 8
_BATCH, _BAG = "batch", "bag"  # names of the dimensions whose size is free


class _Nodes:
    """Nodes and constants of a graph; a node has the name of its only output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        """Add a small constant, a number or an array; returns its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def whole(self, name: str, *numbers: int) -> str:
        """Add a constant (n,) int64; returns its name."""
        return self.constant(name, np.array(numbers, np.int64))


def make_onnx_model(served: ServedModel) -> onnx.ModelProto:
    """The model with all nodes and constants, without the weights that the nodes name.

    Inputs are `dense` (B, features) float32 and `sparse` int64, (B, T) or (B, T, L); the output is
    `pred` (B, 1) float32. What they mean is in their doc_string and in the model's metadata.
    """
    nodes = _Nodes()
    dense = _logarithms(nodes) if served.takes_integers else "dense"
    dense = _add_mlp(nodes, "bot_l", served.bottom, dense)
    joined = _add_interaction(nodes, served, dense, _add_tables(nodes, served))
    logit = _add_mlp(nodes, "top_l", served.top, joined, is_top=True)
    _add_probability(nodes, served, logit)
    meanings = _meanings(served)
    inputs = [
        _value("dense", onnx.TensorProto.FLOAT, [_BATCH, served.bottom[0]], meanings),
        _value("sparse", onnx.TensorProto.INT64, _sparse_shape(served), meanings),
    ]
    outputs = [_value("pred", onnx.TensorProto.FLOAT, [_BATCH, 1], meanings)]
    graph = helper.make_graph(nodes.nodes, "dlrm", inputs, outputs, nodes.constants)
    model = helper.make_model(
        graph,
        producer_name="dlrm_s_pytorch",
        doc_string="DLRM (arXiv 1906.00091): the probability of a click for each row.",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, meanings)
    return model


# ---------------------------------------------------------------- inputs and output


def _sparse_shape(served: ServedModel) -> list[str | int]:
    shape: list[str | int] = [_BATCH, len(served.tables)]
    return shape if served.one_id else [*shape, _BAG]


def _value(
    name: str, kind: int, shape: list[str | int], meanings: dict[str, str]
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape, meanings[name])


def _meanings(served: ServedModel) -> dict[str, str]:
    """The model's metadata: a text for each input and output, and numbers for those who check."""
    integers = "integers x of the data's text, 0 if empty; log(max(x, 0) + 1) is inside the graph"
    one = "one id a table, from 0; -1: no id, a vector of zeros"
    bags = "ids of a table, from 0; a bag shorter than the longest one is padded with -1"
    return {
        "dense": integers if served.takes_integers else "features, as they are",
        "dense_logarithm": "inside the graph" if served.takes_integers else "none",
        "sparse": one if served.one_id else bags,
        "pred": "probability of a click",
        "table_rows": "-".join(str(table.num_rows) for table in served.tables),
        "max_ind_range": str(served.max_ind_range),
    }


def _logarithms(nodes: _Nodes) -> str:
    zero = nodes.constant("dense/zero", np.float32(0))
    one = nodes.constant("dense/one", np.float32(1))
    positive = nodes.add("Max", ["dense", zero], "dense/positive")
    return nodes.add("Log", [nodes.add("Add", [positive, one], "dense/plus_one")], "dense/log")


def _add_probability(nodes: _Nodes, served: ServedModel, logit: str) -> None:
    if not served.clamp:
        nodes.add("Sigmoid", [logit], "pred")
        return
    least = nodes.constant("pred/least", np.float32(served.clamp))
    most = nodes.constant("pred/most", np.float32(1 - served.clamp))
    nodes.add("Clip", [nodes.add("Sigmoid", [logit], "pred/sigmoid"), least, most], "pred")


# ---------------------------------------------------------------- layers


def _add_mlp(
    nodes: _Nodes, mlp: str, widths: tuple[int, ...], outputs: str, is_top: bool = False
) -> str:
    """Linear layers, with ReLU after each; after the last one only if it is not the top MLP."""
    num_layers = len(widths) - 1
    for k in range(num_layers):
        layer = f"{mlp}.{2 * k}"
        weights = [f"{layer}.weight", f"{layer}.bias"]
        outputs = nodes.add("Gemm", [outputs, *weights], layer, transB=1)
        if not (is_top and k == num_layers - 1):
            outputs = nodes.add("Relu", [outputs], f"{mlp}.{2 * k + 1}")
    return outputs


def _add_interaction(nodes: _Nodes, served: ServedModel, dense: str, pooled: str) -> str:
    """(B, D) and (B, T, D) -> what the top MLP takes, in the order of model/interaction.py."""
    if served.interaction == "cat":
        flat = nodes.add("Flatten", [pooled], "interact/tables")
        return nodes.add("Concat", [dense, flat], "interact", axis=1)
    num_vectors = len(served.tables) + 1
    first = nodes.add("Unsqueeze", [dense, nodes.whole("interact/axis", 1)], "interact/dense")
    vectors = nodes.add("Concat", [first, pooled], "interact/vectors", axis=1)
    turned = nodes.add("Transpose", [vectors], "interact/transposed", perm=[0, 2, 1])
    products = nodes.add("MatMul", [vectors, turned], "interact/products")
    flat = nodes.add("Flatten", [products], "interact/flat_products")
    row, column = np.tril_indices(num_vectors, 0 if served.itself else -1)
    pairs = nodes.constant("interact/pairs", (row * num_vectors + column).astype(np.int64))
    chosen = nodes.add("Gather", [flat, pairs], "interact/chosen_products", axis=1)
    return nodes.add("Concat", [dense, chosen], "interact", axis=1)


# ---------------------------------------------------------------- tables


def _add_tables(nodes: _Nodes, served: ServedModel) -> str:
    """The vectors (B, T, D) of all tables.

    Ids below 0 are looked up as id 0, and what they find counts 0 times: runtimes take -1 for a
    table's last row.
    """
    zero = nodes.constant("sparse/zero", np.int64(0))
    known = nodes.add("GreaterOrEqual", ["sparse", zero], "sparse/known")
    nodes.add("Where", [known, "sparse", zero], "sparse/ids")
    counts = nodes.add("Cast", [known], "sparse/known_as_float", to=onnx.TensorProto.FLOAT)
    nodes.add("Unsqueeze", [counts, nodes.whole("sparse/last_axis", -1)], "sparse/counts")
    vectors = [_add_table(nodes, served, number) for number in range(len(served.tables))]
    pooled = nodes.add("Concat", vectors, "emb_l", axis=1)
    if not served.one_id:  # each bag has been summed with its counts
        return pooled
    return nodes.add("Mul", [pooled, "sparse/counts"], "emb_l/known")


def _add_table(nodes: _Nodes, served: ServedModel, number: int) -> str:
    """The vectors (B, 1, D) of one table."""
    table, name = served.tables[number], f"emb_l.{number}"
    column = nodes.whole(f"{name}/number", number)
    ids = nodes.add("Gather", ["sparse/ids", column], f"{name}/ids", axis=1)
    weights = _bag_weights(nodes, served, number, ids)
    vectors = [
        _pooled(nodes, matrix, ids, weights, served.one_id)
        for matrix in table.matrices
        if matrix.is_looked_up
    ]
    return _joined(nodes, table, vectors, f"{name}/vector")


def _bag_weights(nodes: _Nodes, served: ServedModel, number: int, ids: str) -> str:
    """How often each id's vector counts, (B, 1, 1) or (B, 1, L, 1); empty: once."""
    name, weights = f"emb_l.{number}", ""
    if not served.one_id:
        weights = nodes.add("Gather", ["sparse/counts", f"{name}/number"], f"{name}/counts", axis=1)
    if served.learned_pooling:
        pooling = nodes.add("Gather", [f"v_W_l.{number}", ids], f"v_W_l.{number}/of_ids")
        learned = nodes.add("Unsqueeze", [pooling, "sparse/last_axis"], f"v_W_l.{number}/column")
        weights = nodes.add("Mul", [learned, weights], f"{name}/weights") if weights else learned
    return weights


def _pooled(nodes: _Nodes, matrix: Matrix, ids: str, weights: str, one_id: bool) -> str:
    """The vectors (B, 1, d) of a matrix: those of ids (B, 1), or sums over those of (B, 1, L)."""
    name = f"emb_l.{matrix.key}"
    if matrix.divisor > 1:
        divisor = nodes.constant(f"{name}/divisor", np.int64(matrix.divisor))
        ids = nodes.add("Div", [ids, divisor], f"{name}/quotients")
    if matrix.modulus:
        modulus = nodes.constant(f"{name}/modulus", np.int64(matrix.modulus))
        ids = nodes.add("Mod", [ids, modulus], f"{name}/remainders")
    vectors = nodes.add("Gather", [name, ids], f"{name}/rows")
    if weights:
        vectors = nodes.add("Mul", [vectors, weights], f"{name}/weighted_rows")
    if one_id:
        return vectors
    axis = nodes.whole(f"{name}/bag_axis", 2)
    return nodes.add("ReduceSum", [vectors, axis], f"{name}/sum", keepdims=0)


def _joined(nodes: _Nodes, table: LogicalTable, vectors: list[str], name: str) -> str:
    if table.join == "project":
        projection = f"emb_l.{table.matrices[1].key}"
        turned = nodes.add("Transpose", [projection], f"{projection}/transposed", perm=[1, 0])
        return nodes.add("MatMul", [*vectors, turned], name)
    if table.join == "concat":
        return nodes.add("Concat", vectors, name, axis=2)
    if table.join in ("mult", "add"):
        return nodes.add({"mult": "Mul", "add": "Add"}[table.join], vectors, name)
    return vectors[0]
