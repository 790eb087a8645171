"""The original's recorded numbers, reproduced by the flags with which they were recorded."""

import shutil

import numpy as np
import pytest
from conftest import GOLDEN, assert_same_losses, golden, rows_of, train

from common.flags import ArgumentParser
from criteo.prepared import find_prepared
from criteo.spec import DataSpec, add_data_options

RANDOM = golden("random_data.json") + golden("compressed_tables.json")
CRITEO = golden("criteo_data.json")
TOLERANCE = 2e-4
METRICS = ("recall", "precision", "f1", "ap", "auc")


def recorded(case):
    return [(line["it"], line["of"], line["epoch"], line["loss"]) for line in case["train"]]


def assert_same_metrics(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        for name in METRICS:
            assert abs(one[name] - other[name]) <= TOLERANCE, (name, one, other)
        assert abs(one["accuracy"] - other["accuracy"]) <= 0.02


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case["name"])
@pytest.mark.filterwarnings("ignore:the trace of table")
def test_random_and_synthetic_losses(case):
    result = train(*case["argv"].replace("DATA", str(GOLDEN / "data")).split())
    assert result.status == 0, result.err
    assert_same_losses(result.losses, recorded(case))


@pytest.mark.parametrize("case", CRITEO, ids=lambda case: case["name"])
def test_criteo_losses_metrics_counts_and_sums(case, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(GOLDEN / "data" / case["dataset"], folder)
    argv = case["argv"].replace("DATA", str(folder)).split()
    result = train(*argv)
    assert result.status == 0, result.err
    assert_same_losses(result.losses, recorded(case))
    assert_same_metrics(result.tests, case["test"])
    assert train(*argv).losses == result.losses, "a run that finds the data prepared differs"

    parser = ArgumentParser()
    add_data_options(parser)
    prepared = find_prepared(DataSpec.from_options(parser.parse_known_args(argv)[0]))
    assert list(prepared.counts) == case["counts"]
    assert list(prepared.rows_per_part) == case["rows_per_split"]
    first = rows_of(prepared, "train")[: prepared.rows_per_part[0]]
    last = np.concatenate([rows_of(prepared, "test"), rows_of(prepared, "val")])
    for rows, want in ((first, case["split_first"]), (last, case["split_last"])):
        assert len(rows) == want["rows"]
        assert rows[:, 0].sum() == want["y"]
        assert rows[:, 1:14].sum() == want["x_int"]
        assert rows[:, 14:].sum(0).tolist() == want["x_cat"]
