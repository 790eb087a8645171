"""index.json of a checkpoint: what it holds, in which files, and everything that is no tensor."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.json_values import list_of, object_of, readable, shown, text_of, whole_of
from checkpoints.matrices import WEIGHT, MatrixShape, Shard
from checkpoints.shard_file import DamagedError, FileFacts, read_whole

INDEX = "index.json"
FORMAT = 1  # of this program; a later one has a higher number
MOST_INDEX_BYTES = 1 << 30
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*\.safetensors")  # nothing of another folder


class NewerFormatError(Exception):
    """A checkpoint of a later version of this program; the text says so."""


@dataclass(frozen=True)
class ShardFile:
    """A file of a checkpoint.

    Attributes:
        name: its name in the checkpoint's folder.
        facts: its size and checksum.
        shards: the rows that it holds.
    """

    name: str
    facts: FileFacts
    shards: tuple[Shard, ...]

    def to_json(self) -> dict[str, Any]:
        """The file as JSON."""
        shards = [[shard.key, shard.begin, shard.end] for shard in self.shards]
        facts = {"bytes": self.facts.num_bytes, "crc32": self.facts.crc32}
        return {"name": self.name, **facts, "shards": shards}

    @classmethod
    def from_json(cls, value: Any) -> "ShardFile":
        """The file that JSON describes.

        Raises:
            ValueError: it describes none.
        """
        name = text_of(value, "name")
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"name is {shown(name)}, expected that of a .safetensors file")
        facts = FileFacts(whole_of(value, "bytes"), whole_of(value, "crc32", (1 << 32) - 1))
        shards = []
        for entry in list_of(value, "shards"):
            if not isinstance(entry, list) or len(entry) != 3:
                raise ValueError(f"a shard is {shown(entry)}, expected [name, begin, end]")
            named = dict(zip(("key", "begin", "end"), entry, strict=True))
            begin = whole_of(named, "begin")
            end = whole_of(named, "end", lowest=begin)
            shards.append(Shard(text_of(named, "key"), begin, end))
        return cls(name, facts, tuple(shards))


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        flags: the flags of the run that decide what is trained, as --name: value.
        data: facts about the training data.
        matrices: the model's matrices, by name.
        files: the files with their rows.
        state: what else the run needs to go on; run_state.py knows it.
    """

    flags: Mapping[str, Any]
    data: Mapping[str, Any]
    matrices: Mapping[str, MatrixShape]
    files: Sequence[ShardFile]
    state: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files but the index itself."""
        return sum(file.facts.num_bytes for file in self.files)

    def to_text(self) -> str:
        """The index as the text of index.json, with its own checksum."""
        content = {
            "flags": dict(self.flags),
            "data": dict(self.data),
            "matrices": {
                key: {"rows": shape.num_rows, "row_shapes": _lists(shape.row_shapes)}
                for key, shape in self.matrices.items()
            },
            "files": [file.to_json() for file in self.files],
            "state": dict(self.state),
        }
        whole = {"format": FORMAT, "crc32": _checksum(content), "content": content}
        return json.dumps(whole, indent=1, allow_nan=False)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """The index of a checkpoint's folder.

        Raises:
            DamagedError: there is none, or it is not what was written.
            NewerFormatError: a later version of this program wrote it.
        """
        path = folder / INDEX
        text = read_whole(path, MOST_INDEX_BYTES)
        try:
            whole = json.loads(text)
            if whole_of(whole, "format", lowest=1) > FORMAT:
                raise NewerFormatError(
                    f"{path} has format {whole['format']}, this program knows {FORMAT}:"
                    " continue with the version that wrote it, or a later one"
                )
            content = object_of(whole, "content")
            if _checksum(content) != whole_of(whole, "crc32"):
                raise ValueError("its checksum is another one")
            found = cls(
                object_of(content, "flags"),
                object_of(content, "data"),
                {key: _shape_of(value) for key, value in object_of(content, "matrices").items()},
                tuple(ShardFile.from_json(value) for value in list_of(content, "files")),
                object_of(content, "state"),
            )
            found._check_rows()
        except (ValueError, RecursionError) as error:
            raise damaged_index(folder, error) from error
        return found

    def _check_rows(self) -> None:
        """Raise a ValueError unless the files hold each row of each matrix once."""
        ranges: dict[str, list[tuple[int, int]]] = {key: [] for key in self.matrices}
        for file in self.files:
            for shard in file.shards:
                if shard.key not in ranges:
                    raise ValueError(
                        f"{file.name} has rows of {shown(shard.key)}, an unknown matrix"
                    )
                ranges[shard.key].append((shard.begin, shard.end))
        for key, shape in self.matrices.items():
            end = 0
            for begin, next_end in sorted(ranges[key]):
                if begin != end:
                    raise ValueError(f"row {end} of {readable(key)} is in no file, or in two")
                end = next_end
            if end != shape.num_rows:
                raise ValueError(f"{readable(key)} has {shape.num_rows} rows, the files have {end}")


def damaged_index(folder: Path, error: Exception) -> DamagedError:
    """The error about an index whose values make no sense."""
    return DamagedError(f"{folder / INDEX} is damaged ({error})")


def _lists(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}


def _shape_of(value: Any) -> MatrixShape:
    shapes = {}
    for name, lengths in object_of(value, "row_shapes").items():
        if not isinstance(lengths, list) or len(lengths) > 8:
            raise ValueError(
                f"row_shapes.{readable(name)} is {shown(lengths)}, expected a list of lengths"
            )
        shapes[name] = tuple(whole_of({"length": length}, "length") for length in lengths)
    if WEIGHT not in shapes:
        raise ValueError(f"row_shapes has no {WEIGHT}")
    return MatrixShape(whole_of(value, "rows"), shapes)


def _checksum(content: Any) -> int:
    """CRC-32 of the content as JSON of one form, however the file is laid out."""
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"it has numbers that JSON does not have ({error})") from error
    return zlib.crc32(text.encode())
