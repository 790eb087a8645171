"""Loops are compiled, with a cache on disk or without one."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from common.compiled import compiled, compiler

SOURCE = "def twice(values):\n    return values * 2\n"


def twice_of(file):
    names = {"__name__": "twice"}  # numba writes the module's name into its cache
    exec(compile(SOURCE, file, "exec"), names)
    return names["twice"]


def test_a_function_is_compiled_and_cached_beside_its_source(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert compiled(twice_of(str(path)))(np.ones(2)).tolist() == [2, 2]
    assert list(Path(tmp_path / "__pycache__").glob("*.nbi"))


def test_a_function_without_a_folder_for_its_cache_is_compiled_all_the_same():
    """Numba raises the same error for a source that is no file and for folders it cannot write."""
    assert compiler(error_model="numpy")(twice_of("<no file>"))(np.ones(2)).tolist() == [2, 2]


def cache_of(tmp_path, kind):
    """The one file of a function's cache: its index (.nbi) or its machine code (.nbc)."""
    (path,) = (tmp_path / "__pycache__").glob(f"*.{kind}")
    return path


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_function_whose_cache_cannot_be_read_or_replaced_is_compiled_all_the_same(tmp_path, kind):
    """A folder is neither read as a file nor replaced by one, even by root."""
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    compiled(twice_of(str(path)))(np.ones(2))
    file = cache_of(tmp_path, kind)
    file.unlink()
    file.mkdir()
    assert compiled(twice_of(str(path)))(np.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80", b"some text", b"\0" * 999])
def test_a_damaged_cache_is_written_anew(tmp_path, kind, content):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    compiled(twice_of(str(path)))(np.ones(2))
    whole = cache_of(tmp_path, kind).read_bytes()
    cache_of(tmp_path, kind).write_bytes(content)
    assert compiled(twice_of(str(path)))(np.ones(2)).tolist() == [2, 2]
    assert len(cache_of(tmp_path, kind).read_bytes()) > len(whole) // 2
    again = compiled(twice_of(str(path)))
    assert again(np.ones(2)).tolist() == [2, 2] and sum(again.stats.cache_hits.values()) == 1


def test_a_folder_that_is_full_leaves_the_function_uncached(tmp_path, monkeypatch):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    function = compiled(twice_of(str(path)))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert function(np.ones(2)).tolist() == [2, 2]
    assert not list((tmp_path / "__pycache__").iterdir())
