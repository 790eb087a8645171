"""Quantized inference: the original's numbers, sizes, ranks and mistakes."""

import shutil

import pytest
from conftest import GOLDEN, golden, train

CASES = golden("quantization.json")


@pytest.fixture(scope="module")
def golden_flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization") / "kaggle"
    shutil.copytree(GOLDEN / "data" / CASES["dataset"], folder)
    argv = CASES["argv"].replace("DATA", str(folder))
    return argv.replace("MODEL", str(GOLDEN / CASES["model"])).split()


@pytest.mark.parametrize("case", CASES["tests"], ids=lambda case: case["flags"] or "float32")
def test_the_originals_metrics(case, golden_flags):
    result = train(*golden_flags, *case["flags"].split())
    assert result.status == 0, result.err
    print(result.out)
    (found,) = result.tests
    for name in ("recall", "precision", "ap", "auc"):
        assert abs(found[name] - case[name]) <= 2e-4, (name, found)
    assert abs(found["accuracy"] - case["accuracy"]) <= 0.02
