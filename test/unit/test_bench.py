"""The programs in bench/ run as their READMEs say."""

import re
import sys

import numpy as np
import pytest
from conftest import ROOT, shell

from bench import capacity, evaluation, quality, random_data, ranks, scaling


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
def test_ranks_send_what_is_planned():
    words = "--ranks=1,2 --sharding=table,row --exchange-type=bf16 --batch=64 --steps=8"
    text = bench("ranks.py", *words.split())
    rows = {line[:24].strip(): line[24:].split() for line in text.splitlines()[1:]}
    assert list(rows) == ["1, auto, float32", "2, table, bf16", "2, row, bf16"]
    sent = {name: (float(figures[1]), float(figures[2])) for name, figures in rows.items()}
    assert sent["1, auto, float32"] == (0, 0)
    assert sent["2, table, bf16"][0] == sent["2, table, bf16"][1] > 0
    assert sent["2, row, bf16"][0] == pytest.approx(sent["2, row, bf16"][1], rel=0.05)
    assert all(figures[6].endswith("%") for name, figures in rows.items() if name[0] == "2")


@pytest.mark.slow
def test_quality_is_told_in_pairs():
    text = bench("quality.py", "--device=cpu", "--rows=3000", "--seeds=2", "--fast=--amp=bf16")
    pairs = re.findall(r"^seed \d, AUC +(0\.\d{6}) +(0\.\d{6}) +([-+][\d.e-]+)", text, re.M)
    assert len(pairs) == 2
    differences = [float(fast) - float(plain) for fast, plain, _ in pairs]
    assert [float(told) for *_, told in pairs] == pytest.approx(differences, rel=0.06, abs=2e-6)
    mean = float(re.search(r"mean difference +([-+][\d.e-]+)", text)[1])
    assert mean == pytest.approx(sum(differences) / 2, rel=0.06, abs=2e-6)


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([1e-4, -1e-4, 2e-4], "ok"),
        ([0.0, 0.0, 0.0], "ok"),
        ([9e-5, 9e-5, 9e-5], "ok"),  # alike: their standard error is 0
        ([9e-5, 9.01e-5, 8.99e-5], "ok"),  # alike in all digits that are told
        ([3e-5, 4e-5, 3.5e-5], "ok"),  # as far as float32 is from itself
        ([9e-5, 10e-5, 9.5e-5], "no"),  # small, but there
        ([6e-4, 6e-4, 6e-4], "no"),
        ([9e-4, 8e-4, 9e-4], "no"),
        ([-9e-4, -8e-4, -9e-4], "no"),
        ([3e-3, -1e-3, 1e-3], "open"),  # above the bar, and not told apart from 0
    ],
)
def test_the_bar_of_quality(differences, verdict):
    found = quality.decide(differences)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(sum(differences) / 3)


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


H200, AMP = scaling.MACHINES["H200"], scaling.RUNS[0]


@pytest.mark.parametrize("rows, microseconds", [(32768, 1430), (2048, 350)])
def test_scaling_begins_with_the_estimates_of_one_card(rows, microseconds):
    setting = scaling.Setting(scaling.MODELS["A"], H200, AMP)
    assert scaling.step(setting, 1, rows).total == pytest.approx(microseconds, rel=0.02)


def test_an_exchange_takes_as_long_as_its_slower_link():
    """Of 15 MB to 15 ranks, 7 MB stay in the host, and 8 MB leave it by a port of 50 GB/s."""
    assert scaling.all_to_all(H200, 15e6, 16) == pytest.approx(20 + 8 + 8e6 / 50e3 / 0.8)
    assert scaling.all_to_all(H200, 7e6, 8) == pytest.approx(20 + 7e6 / 450e3 / 0.8)


def test_a_sum_over_hosts_is_of_each_cards_share():
    inside, outside = 2 * 8e6 * 7 / 8 / 450e3, 2 * 1e6 * 3 / 4 / 50e3
    found = scaling.all_reduce(H200, 8e6, 32)
    assert found == pytest.approx(20 + 2 * 2 * 10 + (inside + outside) / 0.8)


def test_scaling_is_told_for_a_fixed_share_and_for_a_fixed_batch(capsys, monkeypatch):
    flags = ["--model=B", "--machine=Ascend 910", "--cards=1,8,16"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    assert scaling.main() == 0
    text = capsys.readouterr().out
    form = r"^(\d+) cards, ([\d,]+) rows +([\d,]+) +([\d.]+) +[\d.]+%  card ([\d.]+) (.*)$"
    lines = re.findall(form, text, re.M)
    assert [(cards, rows) for cards, rows, *_ in lines] == 3 * [
        ("8", "262,144"), ("16", "524,288"), ("8", "65,536"), ("16", "65,536"),
    ]  # fmt: skip
    assert text.count("96 GB of tables") == 6, "one card holds 64 GB"
    for _, rows, speed, ms, card, parts in lines:
        rows, speed = (int(number.replace(",", "")) for number in (rows, speed))
        assert speed == pytest.approx(1e3 * rows / float(ms), rel=0.01)
        *seen, hidden = (float(number) for number in re.findall(r"[\d.]+", parts))
        assert float(ms) == pytest.approx(max(2.9, float(card) + sum(seen)), abs=0.05)
        assert hidden > 0


@pytest.mark.parametrize(
    "program, word, told",
    [
        (scaling, "--cards=8,0", "argument --cards: '0' is not a whole number in [1, 4096]"),
        (scaling, "--cards=", "argument --cards: '' is not a whole number in [1, 4096]"),
        (ranks, "--ranks=1,-2", "argument --ranks: '-2' is not a whole number at least 1"),
        (ranks, "--sharding=rows", "argument --sharding: 'rows' is none of table, auto, row"),
        (ranks, "--exchange-type=", "argument --exchange-type: '' is none of float32, bf16, fp16"),
        (ranks, "--steps=7", "argument --steps: '7' is not a whole number at least 8"),
    ],
)
def test_a_wrong_value_is_one_line(program, word, told, capsys):
    assert program.main([word]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: {told}; {program.__name__[6:]}.py --help lists all flags\n"


def test_a_wrong_flag_of_the_runs_is_one_line_too(capsys):
    assert ranks.main(["--ranks=2", "--batch=1", "--steps=8", "--flags=--bogus"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown flag --bogus")


def test_shares_of_ids_on_the_parts_of_a_table():
    ids = capacity.number_by_first_appearance(np.array([7, 7, 3, 9, 3, 5]))
    assert ids.tolist() == [0, 0, 1, 2, 1, 3]
    found = capacity.shares(ids // 2, 2, batch=3)
    assert found.tolist() == [[1, 0], [pytest.approx(1 / 3), pytest.approx(2 / 3)]]
    (line, *_) = capacity.column_lines("few", np.array([0, 0, 0, 1, 1, 1]), 3)
    assert re.search(r"few, 2 rows, 2 parts .* 100.0% ", line), "in order, a batch has one id"
