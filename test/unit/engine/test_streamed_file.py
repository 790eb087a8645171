"""A file whose numbers come in blocks is the file that torch.save writes of all of them."""

import io
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from engine.streamed_file import StreamedTensor, streamed_tensors, write_streamed

TABLE = torch.arange(7000.0).reshape(1000, 7)
STATE = torch.rand(1000, generator=torch.Generator().manual_seed(1))


def content_with(stream):
    """Tensors of several kinds, some of them streamed, in an order that is not their names'."""
    return {
        "b": {"table": stream(TABLE, 300), "one": torch.tensor(1.5)},
        "a": [(stream(STATE, 1000), "text", None), {"bytes": torch.arange(5, dtype=torch.uint8)}],
        "half": torch.ones(3, 5).bfloat16(),
        "view": torch.arange(20)[5:10],
        "none": stream(torch.zeros(0, 4), 1),
        "ids": stream(torch.arange(9), 2),
        3: float("nan"),
    }


def streamed(tensor, rows):
    return StreamedTensor(tuple(tensor.shape), iter(tensor.split(rows)), tensor.dtype)


def saved_by_torch():
    file = io.BytesIO()
    torch.save(content_with(lambda tensor, rows: tensor), file)
    return file.getvalue()


@pytest.fixture
def path(tmp_path):
    with open(tmp_path / "m.pth", "w+b") as file:
        write_streamed(file, content_with(streamed))
    return tmp_path / "m.pth"


def test_it_is_torchs_file_to_the_byte(path):
    assert path.read_bytes() == saved_by_torch()


def test_its_checksums_are_those_of_the_numbers(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(path, mmap):
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert torch.equal(found["b"]["table"], TABLE) and torch.equal(found["a"][0][0], STATE)
    assert torch.equal(found["view"], torch.arange(5, 10)) and found["b"]["one"] == 1.5


def test_a_torch_that_leaves_no_holes_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.serialization, "skip_data")
    with open(tmp_path / "m.pth", "w+b") as file:
        write_streamed(file, content_with(streamed))
    assert (tmp_path / "m.pth").read_bytes() == saved_by_torch()


def test_blocks_may_all_lie_in_the_same_memory(tmp_path):
    """A block is used before the next one is asked for."""

    def blocks():
        buffer = torch.empty(10, 7)
        for rows in TABLE.split(10):
            yield buffer.copy_(rows)

    with open(tmp_path / "m.pth", "w+b") as file:
        write_streamed(file, [StreamedTensor((1000, 7), blocks())])
    assert torch.equal(torch.load(tmp_path / "m.pth", weights_only=True)[0], TABLE)


def test_rows_are_asked_for_in_the_order_of_the_streamed_tensors(tmp_path):
    asked, content = [], content_with(streamed)
    tensors = list(streamed_tensors(content))
    assert [tensor.shape for tensor in tensors] == [(1000, 7), (1000,), (0, 4), (9,)]

    def noted(number, blocks):
        asked.append(number)
        yield from blocks

    for number, tensor in enumerate(tensors):
        object.__setattr__(tensor, "blocks", noted(number, tensor.blocks))
    with open(tmp_path / "m.pth", "w+b") as file:
        write_streamed(file, content)
    assert asked == [0, 1, 2, 3]


class AskedForError(Exception):
    """Rows were asked for."""


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="reads /proc")
def test_streamed_tensors_take_no_addresses(tmp_path):
    """A limit of addresses (ulimit -v) that training keeps does not make the save after it fail."""

    def blocks():
        raise AskedForError
        yield

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20), limits[1]))
    try:
        with open(tmp_path / "m.pth", "w+b") as file, pytest.raises(AskedForError):
            write_streamed(file, StreamedTensor((1 << 22, 64), blocks()))  # 1 GB, of holes
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("num_rows", [999, 1001])
def test_another_number_of_rows_than_announced_is_no_file(tmp_path, num_rows):
    rows = torch.zeros(num_rows, 7)
    with open(tmp_path / "m.pth", "w+b") as file, pytest.raises(AssertionError, match="other rows"):
        write_streamed(file, StreamedTensor((1000, 7), rows.split(100)))
