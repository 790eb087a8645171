"""Loops are compiled, with a cache on disk or without one."""

from pathlib import Path

import numpy as np

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
