"""Whatever lies in a checkpoint's place: nothing is executed, nothing hangs, the error is one line.

Reading ends in a DamagedError, which names the file, or in a UserError.
"""

import json
import os
import pickle
import random
import shutil
import zlib

import pytest
import torch
from written import WRITTEN, ends_soon, read_checkpoint, rewrite_index, write_checkpoint

from checkpoints.folder import CheckpointFolder
from checkpoints.index import INDEX
from checkpoints.shard_file import DamagedError
from common.errors import UserError


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker):
        self._marker = str(marker)

    def __reduce__(self):
        return open, (self._marker, "w")


@pytest.fixture
def marker(tmp_path):
    """A file that appears if a crafted file executes something."""
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "all")
    with folder.opened():
        path = write_checkpoint(folder)
    assert len(list(path.iterdir())) == 4 and read_checkpoint(path) == WRITTEN
    return path


def torch_file(path, marker):
    """A torch file with a bomb in it: whoever loads it as one executes it."""
    torch.save({"state_dict": Bomb(marker)}, path)


def put_pickle(path, marker):
    path.write_bytes(pickle.dumps(Bomb(marker)))


def put_old_pickle(path, marker):
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=0))


def put_random(path, marker):
    path.write_bytes(random.Random(1).randbytes(1000))


def put_random_of_same_size(path, marker):
    path.write_bytes(random.Random(2).randbytes(path.stat().st_size))


def put_nothing(path, marker):
    path.write_bytes(b"")


def put_folder(path, marker):
    path.unlink()
    path.mkdir()


def put_zeros(path, marker):
    path.unlink()
    path.symlink_to("/dev/zero")


def put_device(path, marker):
    path.unlink()
    path.symlink_to("/dev/full")


def put_pipe(path, marker):
    path.unlink()
    os.mkfifo(path)


def put_link_to_itself(path, marker):
    path.unlink()
    path.symlink_to(path)


def put_link_to_nothing(path, marker):
    path.unlink()
    path.symlink_to(path.parent / "nothing")


def remove(path, marker):
    path.unlink()


def put_nested_json(path, marker):
    path.write_bytes(b"[" * 10**6)


def put_nested_json_that_ends(path, marker):
    path.write_bytes(b'{"format": 1, "crc32": 1, "content": ' + b"[" * 900 + b"]" * 900 + b"}")


def put_huge_file(path, marker):
    with open(path, "r+b") as file:
        file.truncate(1 << 42)


def put_other_file(path, marker):
    """One of the same checkpoint."""
    others = sorted(set(path.parent.iterdir()) - {path})
    shutil.copyfile(others[-1], path)


PUTS = (
    torch_file, put_pickle, put_old_pickle, put_random, put_random_of_same_size, put_nothing,
    put_folder, put_zeros, put_device, put_pipe, put_link_to_itself, put_link_to_nothing, remove,
    put_nested_json, put_nested_json_that_ends, put_huge_file, put_other_file,
)  # fmt: skip


def assert_refused(path):
    """Reading is an error of one line, which names what is wrong by its place."""
    with ends_soon(), pytest.raises((DamagedError, UserError)) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert str(path) in text and text.isprintable() and len(text) < 500, text


def test_the_bomb_would_be_seen(marker):
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
def test_another_file_in_the_place_of_any_file_is_refused(checkpoint, marker, put):
    for name in sorted(path.name for path in checkpoint.iterdir()):
        kept = checkpoint.parent.parent / "kept"
        (checkpoint / name).rename(kept)
        shutil.copyfile(kept, checkpoint / name)
        put(checkpoint / name, marker)
        assert_refused(checkpoint)
        if (checkpoint / name).is_dir():
            (checkpoint / name).rmdir()
        kept.replace(checkpoint / name)
    assert not marker.exists()
    assert read_checkpoint(checkpoint) == WRITTEN


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
def test_a_crafted_file_whose_checksum_is_right_is_refused(checkpoint, marker, put):
    """Who crafts a file can compute the index's checksums too."""
    names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    for number, name in enumerate(names):
        path = checkpoint / name
        shutil.copyfile(path, checkpoint.parent.parent / "kept")
        text = (checkpoint / INDEX).read_text()
        put(path, marker)
        is_small = path.is_file() and path.stat().st_size < 1 << 30
        content = path.read_bytes() if is_small else b""
        facts = {"bytes": len(content), "crc32": zlib.crc32(content)}
        rewrite_index(checkpoint, lambda content: content["files"][number].update(facts))  # noqa: B023
        assert_refused(checkpoint)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copyfile(checkpoint.parent.parent / "kept", path)
        (checkpoint / INDEX).write_text(text)
    assert not marker.exists()
    assert read_checkpoint(checkpoint) == WRITTEN


def test_a_pickle_that_the_index_names_is_not_read(checkpoint, marker):
    for name in ("bomb.pkl", "bomb.pt", "bomb", "index.json", "../bomb.safetensors"):
        bomb = pickle.dumps(Bomb(marker))
        if name != INDEX:
            (checkpoint / name).write_bytes(bomb)
        facts = {"name": name, "bytes": len(bomb), "crc32": zlib.crc32(bomb)}
        text = (checkpoint / INDEX).read_text()
        rewrite_index(checkpoint, lambda content: content["files"][0].update(facts))  # noqa: B023
        assert_refused(checkpoint)
        (checkpoint / INDEX).write_text(text)
    assert not marker.exists()


def test_files_that_the_index_does_not_name_are_not_read(checkpoint, marker):
    put_pickle(checkpoint / "more.safetensors", marker)
    put_pickle(checkpoint / "data.pkl", marker)
    (checkpoint / "sitecustomize.py").write_text(f"open({str(marker)!r}, 'w')")
    with ends_soon():
        assert read_checkpoint(checkpoint) == WRITTEN
    assert not marker.exists()


def swap(values, one, other):
    values[one], values[other] = values[other], values[one]


def test_rows_that_the_files_have_under_other_names_are_refused(checkpoint):
    """The index says where each row is, and the file has names for its rows too."""

    def move(content):
        shards = [file["shards"][0] for file in content["files"]]
        assert shards[0][0] == shards[1][0]
        swap(content["files"], 0, 1)
        shards[0][1:], shards[1][1:] = shards[1][1:], shards[0][1:]

    rewrite_index(checkpoint, move)
    assert_refused(checkpoint)


def test_an_index_that_is_changed_without_its_checksum_is_refused(checkpoint):
    rewrite_index(checkpoint, lambda content: content["state"].update(step=4), False)
    assert_refused(checkpoint)


def test_a_newer_format_is_refused(checkpoint):
    whole = json.loads((checkpoint / INDEX).read_text())
    (checkpoint / INDEX).write_text(json.dumps(whole | {"format": 2}))
    with pytest.raises(Exception, match="has format 2, this program knows 1"):
        read_checkpoint(checkpoint)
