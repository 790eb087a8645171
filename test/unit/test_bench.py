"""The programs in bench/ run as their READMEs say."""

import re
import sys

import pytest
from conftest import ROOT, shell


def test_the_evaluation_is_measured_and_told_in_a_table():
    finished = shell(sys.executable, ROOT / "bench" / "evaluation.py", "--rows", "20000")
    assert finished.returncode == 0, finished.stderr
    found = dict(re.split(r"  +", line, maxsplit=1) for line in finished.stdout.splitlines())
    assert found["rows"] == "20,000"
    assert 0.6 < float(found["AUC"]) < 0.95
    assert found["peak memory"].endswith(" GB") and found["metric work"].endswith(" s")


def bench(name, *flags):
    finished = shell(sys.executable, ROOT / "bench" / name, *flags)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_gpus_table_is_printed_where_there_is_none_too():
    flags = "--device=cpu --rows=20000 --rows-a-line=2000 --most-table-rows=50 --only=2048"
    text = bench("gpu.py", *flags.split(), "--roofline", "--profile")
    (ours, yardstick, ratio) = re.search(
        r"^GPU, batch 2048, D 64, rows/s +([\d,]+) +([\d,]+) +([\d.]+)  4,000,000", text, re.M
    ).groups()
    ours, yardstick = (float(number.replace(",", "")) for number in (ours, yardstick))
    assert ours > 1000 and float(ratio) == pytest.approx(ours / yardstick, rel=0.1)
    assert len(re.findall(r"^  floor of (products|copies) +[\d.]+ ms", text, re.M)) == 2
    assert "kernels, batch 2048" in text


@pytest.mark.slow
def test_quality_is_told_in_pairs():
    text = bench("quality.py", "--device=cpu", "--rows=3000", "--seeds=2", "--fast=--amp=bf16")
    pairs = re.findall(r"^seed \d, AUC +(0\.\d{4}) +(0\.\d{4}) +([-+][\d.e-]+)", text, re.M)
    assert len(pairs) == 2
    differences = [float(fast) - float(plain) for fast, plain, _ in pairs]
    assert [float(told) for *_, told in pairs] == pytest.approx(differences, rel=0.06, abs=2e-6)
    mean = float(re.search(r"mean difference +([-+][\d.e-]+)", text)[1])
    assert mean == pytest.approx(sum(differences) / 2, rel=0.06, abs=2e-6)
