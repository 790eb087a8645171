"""A file of tensors is what the library reads, on the disk when written, checked when read."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from conftest import break_package, largest_file
from safetensors.torch import load_file
from written import ends_soon, write_one

from checkpoints import shard_file
from checkpoints.shard_file import (
    DamagedError,
    FileFacts,
    problem_of_safetensors,
    read_tensors,
    read_whole,
    write_all,
)

TENSORS = {
    "emb_l.0.weight/0-7/weight": torch.arange(21.0).view(7, 3),
    "scalars": torch.tensor([0.1, float("nan"), float("inf")], dtype=torch.float64),
    "half": torch.arange(5, dtype=torch.float16),
    "brain": torch.arange(3, dtype=torch.bfloat16),
    "long": torch.tensor([[-(2**63), 2**63 - 1]]),
    "int": torch.arange(4, dtype=torch.int32),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "no rows": torch.empty(0, 4),
    "no columns": torch.empty(4, 0),
    "one number": torch.tensor(2.5),
}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bytes_of(found[name]), bytes_of(tensor)), name


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def facts_of(content):
    return FileFacts(len(content), zlib.crc32(content))


def test_the_library_and_the_reader_read_what_was_written(tmp_path):
    path = tmp_path / "a.safetensors"
    facts = write_one(path, TENSORS)
    assert facts == facts_of(path.read_bytes())
    assert_same(load_file(path), TENSORS)
    assert_same(read_tensors(path, facts), TENSORS)


def test_tensors_begin_at_a_multiple_of_eight_bytes(tmp_path):
    """Other readers map the file into memory."""
    for letters in range(1, 9):
        path = tmp_path / str(letters)
        write_one(path, {"x" * letters: torch.ones(2)})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_rows_of_a_larger_tensor_are_written_from_where_they_lie(tmp_path):
    table = torch.arange(40.0).view(10, 4)
    facts = write_one(tmp_path / "a", {"rows": table[3:7]})
    assert_same(read_tensors(tmp_path / "a", facts), {"rows": table[3:7]})


def test_what_the_system_takes_in_pieces_is_written_whole(tmp_path, monkeypatch):
    write = os.write
    facts = write_one(tmp_path / "at once", TENSORS)
    monkeypatch.setattr(shard_file, "BYTES_PER_WRITE", 16)
    monkeypatch.setattr(os, "write", lambda file, block: write(file, block[:5]))
    assert write_one(tmp_path / "in pieces", TENSORS) == facts
    monkeypatch.undo()
    assert (tmp_path / "in pieces").read_bytes() == (tmp_path / "at once").read_bytes()


def test_write_all_writes_all(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, block: write(file, block[:2]))
    with open(tmp_path / "a", "wb") as file:
        write_all(file.fileno(), b"seven!!")
    assert (tmp_path / "a").read_bytes() == b"seven!!"


def test_the_disk_has_the_whole_file_when_it_is_written(tmp_path, monkeypatch):
    """The file is synced once it has all its bytes."""
    fsync, sizes = os.fsync, []

    def note(file):
        sizes.append(os.fstat(file).st_size)
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    facts = write_one(tmp_path / "a", TENSORS)
    assert sizes == [facts.num_bytes]


def test_a_name_that_is_taken_is_no_place(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("a", "link"):
        with pytest.raises(FileExistsError):
            write_one(tmp_path / name, TENSORS)
    assert (tmp_path / "a").read_text() == "mine"


def test_a_full_disk_is_the_systems_error(tmp_path):
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        write_one(tmp_path / "a", TENSORS)


def test_every_bit_and_every_byte_is_checked(tmp_path):
    path = tmp_path / "a.safetensors"
    facts = write_one(path, {"x": torch.ones(2)})
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match="a.safetensors has changed since it was written"):
            read_tensors(path, facts)
    for size in [*range(len(content)), len(content) + 1]:
        path.write_bytes((content + b" ")[:size])
        with pytest.raises(DamagedError, match=f"a.safetensors has {size} bytes"):
            read_tensors(path, facts)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(DamagedError, match="a.safetensors: No such file or directory"):
        read_tensors(tmp_path / "a.safetensors", FileFacts(1, 1))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
CRAFTED = {
    "no header": b"",
    "half a length": b"\x10\0\0",
    "length beyond the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "length of all bits": b"\xff" * 16,
    "no JSON": b"not JSON",
    "no object": b"[]",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "no offsets": {"x": {"dtype": "F32", "shape": [2]}},
    "unknown type": {"x": ENTRY | {"dtype": "PICKLE"}},
    "negative length": {"x": ENTRY | {"shape": [-2]}},
    "huge shape": {"x": ENTRY | {"shape": [1 << 62, 1 << 62]}},
    "product beyond 64 bits": {"x": ENTRY | {"shape": [1 << 32, 1 << 32, 2]}},
    "huge number": {"x": ENTRY | {"shape": [10**300]}},
    "shape of texts": {"x": ENTRY | {"shape": ["2"]}},
    "another size": {"x": ENTRY | {"shape": [3]}},
    "offsets outside": {"x": ENTRY | {"data_offsets": [0, 1 << 40]}},
    "offsets backwards": {"x": ENTRY | {"data_offsets": [8, 0]}},
    "overlap": {"x": ENTRY, "y": ENTRY},
    "null": {"x": None},
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_with_a_right_checksum_is_no_safetensors_file(name, tmp_path):
    header = CRAFTED[name]
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    if header and header[:1] in b'{["nN':
        header = len(header).to_bytes(8, "little") + header + bytes(8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(header)
    with ends_soon(), pytest.raises(DamagedError, match="a.safetensors is no safetensors file"):
        read_tensors(path, facts_of(header))


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zeros", tmp_path):
        for facts in (FileFacts(0, 0), FileFacts(1 << 40, 0)):
            with ends_soon(), pytest.raises(DamagedError, match="is no regular file"):
                read_tensors(path, facts)


def test_a_file_of_the_system_is_not_read_beyond_its_size():
    """It says that it has 0 bytes, and may block whoever reads it."""
    assert Path("/proc/self/maps").read_bytes()
    with ends_soon():
        assert read_whole(Path("/proc/self/maps"), 1 << 30) == b""


def test_a_file_that_is_larger_than_it_may_be_is_not_read(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)  # it takes no room on the disk
    with ends_soon(), pytest.raises(DamagedError, match="a has 1099511627776 bytes, expected 9 at"):
        read_whole(tmp_path / "a", 9)
    (tmp_path / "b").write_bytes(b"nine more")
    assert read_whole(tmp_path / "b", 9) == b"nine more"


def test_a_missing_library_is_told(tmp_path, monkeypatch):
    assert problem_of_safetensors() == ""
    break_package(tmp_path, monkeypatch, "safetensors", "OSError('no such library')")
    assert "safetensors" in problem_of_safetensors()
