"""ONNX files whose weights are written one after the other, so none is in memory a second time.

onnx itself saves a model that is whole in memory, and makes one more copy of it while it does.
Here a weight's bytes go to the file as they come. What precedes them is protobuf's framing: a
message inside another one is a tag, its length and its bytes, and all lengths are known from the
shapes (the encoding is protobuf's public wire format).
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch

from common.whole_files import target_of, write_whole

MOST_IN_ONE_FILE = 2**31 - 1  # bytes of a protobuf message
ALIGNMENT = 1 << 16  # where a runtime can map a weight into memory: Windows asks for the most

Shapes = Mapping[str, tuple[int, ...]]
Weights = Iterable[tuple[str, torch.Tensor]]

_LENGTH_DELIMITED = 2  # protobuf's type of messages, texts and bytes


def data_file_of(path: Path) -> Path:
    """The file beside the model that has its weights if they are too many for one file."""
    return path.with_name(path.name + ".data")


def write_onnx_file(
    path: Path,
    model: onnx.ModelProto,
    shapes: Shapes,
    weights: Weights,
    most_in_one_file: int = MOST_IN_ONE_FILE,
) -> list[Path]:
    """Write a model and its float32 weights; both files are there whole, or as they were before.

    Args:
        path: where the model goes. If it is a link, its target is written.
        model: the model without weights.
        shapes: the shapes of all weights by name.
        weights: (name, weight) of the same names, in any order; each is taken when the one before
            it is written.
        most_in_one_file: bytes; a larger model has its weights in `data_file_of(path)`.

    Returns:
        The files.

    Raises:
        OSError: they cannot be written.
    """
    target = target_of(path)
    whole = _OneFile(model, shapes)
    if whole.num_bytes <= most_in_one_file:
        write_whole([(target, lambda file: whole.write(file, weights))])
        return [path]
    data = data_file_of(target)
    offsets = _offsets(shapes)
    content = _with_external(model, shapes, offsets, data.name).SerializeToString()
    write_whole(
        [
            (data, lambda file: _write_data(file, weights, offsets)),
            (target, lambda file: file.write(content)),
        ]
    )
    return [path, data_file_of(path)]


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _bytes_of(weight: torch.Tensor) -> memoryview:
    """The weight's numbers as ONNX wants them: float32, little-endian. It makes no copy."""
    return np.ascontiguousarray(weight.numpy(), "<f4").data.cast("B")


def _tensor(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)


# ---------------------------------------------------------------- all in one file


class _OneFile:
    """A model's bytes up to its weights, and the number of all its bytes.

    Args:
        model: the model without weights.
        shapes: the shapes of its weights.
    """

    def __init__(self, model: onnx.ModelProto, shapes: Shapes) -> None:
        self._shapes = shapes
        shell = onnx.ModelProto()
        shell.CopyFrom(model)
        shell.ClearField("graph")
        graph = model.graph.SerializeToString()
        of_weights = sum(
            len(self._head(name)) + _num_bytes(shape) for name, shape in shapes.items()
        )
        begin = _frame(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + of_weights)
        self._begin = shell.SerializeToString() + begin + graph
        self.num_bytes = len(self._begin) + of_weights

    def _head(self, name: str) -> bytes:
        """What precedes the numbers of a weight, which is the last thing in its message."""
        shape = self._shapes[name]
        described = _tensor(name, shape).SerializeToString()
        described += _frame(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, _num_bytes(shape))
        length = len(described) + _num_bytes(shape)
        return _frame(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, length) + described

    def write(self, file: BinaryIO, weights: Weights) -> None:
        """Write the model."""
        file.write(self._begin)
        for name, weight in weights:
            assert tuple(weight.shape) == self._shapes[name], name
            file.write(self._head(name))
            file.write(_bytes_of(weight))
        assert file.tell() == self.num_bytes, "other weights than those announced"


def _frame(field: int, length: int) -> bytes:
    """The tag and the length that precede a field of that number and so many bytes."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    """A number in groups of 7 bits, the lowest first; all but the last have the top bit set."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


# ---------------------------------------------------------------- weights in a second file


def _offsets(shapes: Shapes) -> dict[str, int]:
    """Where each weight begins in the data file."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + _num_bytes(shape)
    return offsets


def _with_external(
    model: onnx.ModelProto, shapes: Shapes, offsets: Mapping[str, int], location: str
) -> onnx.ModelProto:
    """The model with all weights, whose numbers are in the file of that name beside it."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for name, shape in shapes.items():
        tensor = _tensor(name, shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": location, "offset": offsets[name], "length": _num_bytes(shape)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        whole.graph.initializer.append(tensor)
    return whole


def _write_data(file: BinaryIO, weights: Weights, offsets: Mapping[str, int]) -> None:
    written = set()
    for name, weight in weights:
        file.seek(offsets[name])
        file.write(_bytes_of(weight))
        written.add(name)
    assert written == set(offsets), "other weights than those announced"
