"""The programs in bench/ run as their READMEs say."""

import re
import sys

import pytest
from conftest import ROOT, shell

from bench import evaluation, gpu, random_data
from bench.training import Case


def bench(name, *flags):
    finished = shell(sys.executable, ROOT / "bench" / name, *flags)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_evaluation_is_measured_and_told_in_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluation.py", "--rows", "50000"])
    assert evaluation.main() == 0
    printed = capsys.readouterr().out.splitlines()
    found = dict(re.split(r"  +", line, maxsplit=1) for line in printed)
    assert found["rows"] == "50,000"
    assert 0.6 < float(found["AUC"]) < 0.95
    assert float(found["from scikit-learn"].split()[0]) < 1e-9
    assert found["peak memory"].endswith(" GB") and found["metric work"].endswith(" s")


def test_the_gpus_table_is_printed_without_a_gpu_too(capsys, monkeypatch):
    """With a small model in place of the published ones."""
    case = Case("64, D 8", 64, 8, "13-16-8", "16-1", 0, 0)
    monkeypatch.setattr(gpu, "TARGETS", (gpu.Target(case, 4e6, 8e6),))
    flags = "--device=cpu --rows=640 --rows-a-line=128 --most-table-rows=50 --roofline --profile"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags.split()])
    assert gpu.main() == 0
    text = capsys.readouterr().out
    (ours, yardstick, ratio) = re.search(
        r"^GPU, batch 64, D 8, rows/s +([\d,]+) +([\d,]+) +([\d.]+)  4,000,000", text, re.M
    ).groups()
    ours, yardstick = (float(number.replace(",", "")) for number in (ours, yardstick))
    assert ours > 100 and float(ratio) == pytest.approx(ours / yardstick, rel=0.1, abs=0.06)
    assert len(re.findall(r"^  floor of (products|copies) +[\d.]+ ms", text, re.M)) == 2
    assert "kernels, batch 64" in text


def test_steps_that_load_random_data_are_told_beside_those_that_do_not(tmp_path):
    """With a small model in place of the published one."""
    model = "--arch-sparse-feature-size=8 --arch-mlp-bot=13-8 --arch-mlp-top=4-1"
    model += " --mini-batch-size=16"
    lines = list(random_data.lines(tmp_path, steps=2, pairs=1, model=model, tables=2))
    kinds = [(kind, ids) for ids in ("1", "10") for kind in ("uniform", "gaussian", "trace")]
    form = r"step, (\w+) data, ids a bag: (\d+) +([\d.]+) ms +([\d.]+) ms +([\d.]+)  at most 1.20; "
    for line, want in zip(lines, kinds, strict=True):
        kind, ids, loaded, bare, ratio = re.match(form + r"[\d.]+ ms a batch alone$", line).groups()
        assert (kind, ids) == want
        assert float(ratio) == pytest.approx(float(loaded) / float(bare), rel=0.2)


@pytest.mark.slow
def test_quality_is_told_in_pairs():
    text = bench("quality.py", "--device=cpu", "--rows=3000", "--seeds=2", "--fast=--amp=bf16")
    pairs = re.findall(r"^seed \d, AUC +(0\.\d{4}) +(0\.\d{4}) +([-+][\d.e-]+)", text, re.M)
    assert len(pairs) == 2
    differences = [float(fast) - float(plain) for fast, plain, _ in pairs]
    assert [float(told) for *_, told in pairs] == pytest.approx(differences, rel=0.06, abs=2e-6)
    mean = float(re.search(r"mean difference +([-+][\d.e-]+)", text)[1])
    assert mean == pytest.approx(sum(differences) / 2, rel=0.06, abs=2e-6)


@pytest.mark.slow
def test_compressed_tables_stand_beside_plain_ones():
    text = bench("compressed.py", "--rows=30000", "--flags=--print-freq=1")
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()[1:]}
    share = {name: float(figures[2]) for name, figures in rows.items()}
    assert share["plain"] == 1 and share["qr mult"] == share["qr add"] < 0.5
    assert share["qr concat, D 32"] < share["qr mult"] and share["md"] < 1
    assert all(0 < float(figures[4]) < 1 for figures in rows.values())


def test_a_checkout_is_measured_against_another():
    text = bench("against.py", ROOT, "--pairs=1", "--only=data_utils.py --help")
    (line,) = text.splitlines()[1:]
    other, this, ratio = (float(word) for word in line.split()[-3:])
    assert 0.05 < other < 60 and ratio == pytest.approx(this / other, rel=0.05)


@pytest.mark.slow
def test_quantization_is_told_in_a_table():
    text = bench("quantization.py", "--rows=3000", "--dim=8", "--repeats=1")
    rows = {line[:18].strip(): line[18:].split() for line in text.splitlines()[1:]}
    assert list(rows)[0] == "float32" and len(rows) == 7
    megabytes = {kind: float(found[2]) for kind, found in rows.items()}
    assert megabytes["tables 4, MLPs 8"] < megabytes["tables 8"] < megabytes["float32"]
    assert all(0 < float(auc) < 1 for auc, *_ in rows.values())
    assert all(float(found[3].replace(",", "")) > 10 for found in rows.values())


def test_a_checkpoints_costs_are_told_beside_torchs(tmp_path):
    printed = bench("checkpoints.py", "--gb=0.002", "--pairs=1", f"--folder={tmp_path}")
    found = re.findall(
        r"^(save 0.002 GB|read 0.002 GB|first copy|later copies).* [\d.]+$", printed, re.M
    )
    assert found == ["save 0.002 GB", "read 0.002 GB", "first copy", "later copies"], printed
    assert list(tmp_path.iterdir()) == []
