"""The snippets of docs/serving.md, run as a reader would, beside a model of Criteo data."""

import re
import shutil
import sys

import numpy as np
import pytest
from conftest import CRITEO_MODEL, ROOT, shell, train

PAGE = (ROOT / "docs" / "serving.md").read_text()
COMMAND = re.search(r"```bash\n(python dlrm_s_pytorch.py .*)\n```", PAGE)[1]
SCORER, ONNX, EXPORT = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kaggle):
    """The files that the page speaks of, and the scores that its first command made."""
    pytest.importorskip("onnx")
    where = tmp_path_factory.mktemp("serving")
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--num-batches=20", "--max-ind-range=300"]
    flags += [f"--processed-data-file={where / 'data'}", "--memory-map", "--save-onnx"]
    onnx = f"--onnx-file={where / 'dlrm_s_pytorch.onnx'}"
    result = train(*flags, onnx, f"--save-model={where / 'DLRM.pth'}")
    assert result.status == 0, result.err
    lines = (kaggle / "train.txt").read_text().splitlines(keepends=True)[-200:]
    fields = [line.split("\t") for line in lines]
    for row in fields[:50]:
        row[20] = "ffffff07"  # which may be unknown
    (where / "rows.txt").write_text("".join("\t".join(row) for row in fields))
    words = COMMAND.split()[2:]
    scored = shell(sys.executable, ROOT / "dlrm_s_pytorch.py", *words, cwd=where)
    assert scored.returncode == 0, scored.stderr
    return where


def printed(text):
    """The numbers of arrays that were printed whole."""
    return np.array(re.findall(r"\d[\d.e-]*", text.replace("dtype=float32", "")), np.float32)


def run(code, folder, path=()):
    first = "import sys, numpy; numpy.set_printoptions(threshold=10**9, precision=9)\n"
    return shell(sys.executable, "-c", first + code, cwd=folder, env={"PYTHONPATH": ":".join(path)})


def test_the_scorer_scores_as_the_command_does(folder):
    finished = run(SCORER, folder, [str(ROOT)])
    assert finished.returncode == 0, finished.stderr
    found = printed(finished.stdout)
    expected = np.loadtxt(folder / "scores.txt", dtype=np.float32)
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-5)
    assert 0 < found[-1] < 1


def test_onnxruntime_alone_scores_as_the_command_does(folder):
    pytest.importorskip("onnxruntime")
    alone = "\nassert not {'torch', 'numba', 'onnx'} & set(sys.modules)"
    finished = run(ONNX + alone, folder)
    assert finished.returncode == 0, finished.stderr
    expected = np.loadtxt(folder / "scores.txt", dtype=np.float32)
    np.testing.assert_allclose(printed(finished.stdout), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor wants a C++ compiler")
def test_aotinductor_compiles_the_network(folder):
    finished = run(EXPORT, folder, [str(ROOT)])
    assert finished.returncode == 0, finished.stderr
    assert len(printed(finished.stdout.partition("tensor")[2])) == 2
