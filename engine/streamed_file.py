"""torch.save's files, written without having all of their numbers in memory at a time.

torch.save leaves holes where numbers go (`torch.serialization.skip_data`); then the numbers are
written into them, and the checksums of the zip file are put right. The file is the one that
torch.save makes of the whole content, to the byte.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

# a zip file's local header and its entry in the central directory (APPNOTE.TXT, 4.3.7 and 4.3.12)
_HEADER, _HEADER_BYTES = struct.Struct("<HH"), 30
_ENTRY, _ENTRY_BYTES = struct.Struct("<HHH"), 46
_LENGTHS_IN_HEADER, _LENGTHS_IN_ENTRY = 26, 28
_CRC_IN_HEADER, _CRC_IN_ENTRY, _CRC_IN_DESCRIPTOR = 14, 16, 4
_HAS_DESCRIPTOR = 1 << 3  # the checksum stands behind the bytes, not before them
_ID = ".data/serialization_id"
_ID_DIGITS = 20

Blocks = Iterable[torch.Tensor]
# tensors, or what stands for them, with the blocks of their rows; None: it has its numbers itself
_Tensors = list[tuple[Any, Blocks | None]]


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of a content whose rows come one block after the other.

    Attributes:
        shape: its shape, rows first.
        blocks: its rows in their order, as tensors (n, *shape[1:]) on the CPU. A block is used
            before the next one is asked for, so both may lie in the same memory.
        dtype: the type of its numbers.
    """

    shape: tuple[int, ...]
    blocks: Blocks
    dtype: torch.dtype = torch.float32


def streamed_tensors(content: Any) -> Iterator[StreamedTensor]:
    """The content's streamed tensors, in the order in which `write_streamed` asks for their rows.

    Args:
        content: dicts, lists and tuples of anything.
    """
    if isinstance(content, StreamedTensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from streamed_tensors(value)


def write_streamed(file: BinaryIO, content: Any) -> None:
    """Write what torch.save writes if each streamed tensor is the tensor that it stands for.

    Beside the content, memory and addresses (ulimit -v) for one block are needed. A torch without
    `skip_data`, which is a prototype, needs memory for all streamed tensors.

    Args:
        file: an empty file, open for reading and writing.
        content: dicts, lists and tuples of anything that torch.save takes. Tensors are on the CPU
            and share no memory.

    Raises:
        OSError, RuntimeError: the file cannot be written.
    """
    tensors: _Tensors = []
    if not hasattr(torch.serialization, "skip_data"):
        whole = _outlined(content, tensors, _with_memory)
        for tensor, blocks in tensors:
            _fill_in_memory(tensor, blocks or ())
        torch.save(whole, file)
        return
    outline = _outlined(content, tensors, _Outline)
    with torch.serialization.skip_data():
        torch.save(outline, file)
    records = _records(file)
    identity = _identity(records)
    by_name = {record.name: record for record in records}
    for number, (tensor, blocks) in enumerate(tensors):  # the order in which torch counts them
        record = by_name.pop(f"data/{number}")
        _fill(file, record, [_whole_storage(tensor)] if blocks is None else blocks)
    assert not any(name.startswith("data/") for name in by_name), "more tensors than were found"
    if _ID in by_name:
        _renew_identity(file, by_name[_ID], identity, _identity(records))


def _outlined(value: Any, tensors: _Tensors, stand_in: Callable[[StreamedTensor], Any]) -> Any:
    """The content with others in place of its streamed tensors.

    Args:
        value: the content, or a part of it.
        tensors: all tensors are appended to it, in pickle's order.
        stand_in: makes what takes a streamed tensor's place.
    """
    if isinstance(value, StreamedTensor):
        tensors.append((stand_in(value), value.blocks))
        return tensors[-1][0]
    if isinstance(value, torch.Tensor):
        tensors.append((value, None))
    elif isinstance(value, dict):
        return {key: _outlined(of_key, tensors, stand_in) for key, of_key in value.items()}
    elif isinstance(value, list | tuple):
        return type(value)(_outlined(item, tensors, stand_in) for item in value)
    return value


class _Outline:
    """What is pickled as a tensor on the CPU, and has neither memory nor addresses.

    torch pickles its own fake tensors so; these would take a second of each save for the import of
    torch's symbolic shapes.

    Args:
        tensor: the tensor that it stands for.
    """

    def __init__(self, tensor: StreamedTensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        rebuild, given = torch.empty(0, dtype=self._dtype).__reduce_ex__(protocol)
        shape = torch.empty(self._shape, dtype=self._dtype, device="meta")
        storage: Any = shape.untyped_storage()
        if isinstance(given[0], torch.TypedStorage):
            typed = torch.storage.TypedStorage
            storage = typed(wrap_storage=storage, dtype=self._dtype, _internal=True)
        storage._fake_device = "cpu"  # where the file says that the numbers were
        return rebuild, (storage, 0, tuple(shape.shape), shape.stride(), *given[4:])


def _with_memory(tensor: StreamedTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _fill_in_memory(tensor: torch.Tensor, blocks: Blocks) -> None:
    begin = 0
    for block in blocks:
        tensor[begin : begin + len(block)].copy_(block)
        begin += len(block)


def _whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the tensor's memory, which is what torch.save writes even if it is a view."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


# ---------------------------------------------------------------- zip files


@dataclass
class _Record:
    """A file in a zip file.

    Attributes:
        name: its name, without the name of the folder that all are in.
        begin: where its bytes begin.
        num_bytes: how many they are.
        crc: their checksum.
        crc_places: the two places where the checksum stands.
    """

    name: str
    begin: int
    num_bytes: int
    crc: int
    crc_places: tuple[int, int]


def _records(file: BinaryIO) -> list[_Record]:
    """The files in a zip file, in its order."""
    records = []
    with zipfile.ZipFile(file) as archive:
        entry = archive.start_dir
        for info in archive.infolist():
            header, num_bytes = info.header_offset, info.file_size
            begin = header + _HEADER_BYTES + _sum_at(file, header + _LENGTHS_IN_HEADER, _HEADER)
            crc_place = header + _CRC_IN_HEADER
            if info.flag_bits & _HAS_DESCRIPTOR:
                crc_place = begin + num_bytes + _CRC_IN_DESCRIPTOR
            name = info.filename.partition("/")[2]
            places = (crc_place, entry + _CRC_IN_ENTRY)
            records.append(_Record(name, begin, num_bytes, info.CRC, places))
            entry += _ENTRY_BYTES + _sum_at(file, entry + _LENGTHS_IN_ENTRY, _ENTRY)
    return records


def _sum_at(file: BinaryIO, place: int, numbers: struct.Struct) -> int:
    """The sum of the numbers at a place of the file: lengths of the parts that follow."""
    file.seek(place)
    return sum(numbers.unpack(file.read(numbers.size)))


def _fill(file: BinaryIO, record: _Record, blocks: Blocks) -> None:
    """Write the record's bytes, one block after the other, and their checksum."""
    crc, place = 0, record.begin
    for block in blocks:
        content = _bytes_of(block)
        file.seek(place)
        file.write(content)
        crc = zlib.crc32(content, crc)
        place += len(content)
        del block, content  # the next one may come from another rank, into memory of its own
    assert place == record.begin + record.num_bytes, f"{record.name} gets other rows than it has"
    _note_crc(file, record, crc)


def _bytes_of(block: torch.Tensor) -> memoryview:
    """The block's bytes, which are copied only if they do not lie side by side."""
    flat = block.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _note_crc(file: BinaryIO, record: _Record, crc: int) -> None:
    record.crc = crc
    for place in record.crc_places:
        file.seek(place)
        file.write(struct.pack("<I", crc))


def _identity(records: Iterable[_Record]) -> bytes:
    """The end of the identity that torch gives a file: all checksums in one number of 64 bits."""
    combined = 0
    for record in records:
        if record.num_bytes and record.name != _ID:
            mixed = record.crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)
            combined = (combined ^ mixed) % (1 << 64)
    return b"%0*d" % (_ID_DIGITS, combined)


def _renew_identity(file: BinaryIO, record: _Record, before: bytes, now: bytes) -> None:
    """Let the file's identity follow from the checksums, unless this torch makes it otherwise.

    Args:
        file: the zip file.
        record: that of the identity.
        before: the end that the identity has if it is made as it is known here.
        now: the end that it is to have.
    """
    file.seek(record.begin)
    identity = file.read(record.num_bytes)
    if identity.endswith(before):
        identity = identity[: -len(before)] + now
        file.seek(record.begin)
        file.write(identity)
        _note_crc(file, record, zlib.crc32(identity))
