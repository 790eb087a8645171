"""--self-check on the CPU prints its checks and names the one that fails."""

import os
import re
import signal
import sys
import tempfile

import pytest
import torch
from conftest import ROOT, shell, train

import dlrm_s_pytorch as dlrm
from engine.self_check import SelfCheck
from ranks.process import Process


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.glob("dlrm_self_check_*")), "its folder is removed"


def test_it_says_what_it_runs_on_and_passes():
    result = train("--self-check")
    assert result.status == 0 and result.err == ""
    assert result.out.endswith("PASS\n") and f"torch          {torch.__version__}" in result.out
    found = re.findall(r"^(.+?) +ok ", result.out, re.M)
    assert found == ["data", "20 steps", "evaluation", "save", "load", "as on the CPU"]


def test_it_needs_neither_mlperfs_package_nor_its_environment(monkeypatch):
    """As on a machine that is no submitter's: the check writes none of MLPerf's events."""
    for name in [name for name in sys.modules if name.startswith("mlperf_logging")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlperf_logging", None)
    monkeypatch.setenv("MLPERF_DIVISION", "lab")
    for more in ([], ["--mlperf-logging"]):
        result = train("--self-check", *more)
        assert (result.status, result.err) == (0, "") and result.out.endswith("PASS\n")
        assert ":::MLLOG" not in result.out


@pytest.mark.parametrize("flags", ["--amp=bf16", "--amp fp16 --optimizer=rwsadagrad"])
def test_lower_precision_is_held_against_float32(flags):
    result = train("--self-check", *flags.split())
    assert result.status == 0, result.out
    assert re.search(r"as on the CPU +ok +losses differ by at most [1-9]", result.out)


def test_files_and_flags_of_a_run_are_none_of_its_own(temporary, monkeypatch):
    monkeypatch.chdir(temporary)
    model = temporary / "mine.pth"
    model.write_text("mine")
    flags = [f"--save-model={model}", f"--load-model={model}", "--performance", "--inference-only"]
    flags += ["--amp=bf16", "--enable-profiling", "--mlperf-grad-accum-iter=2", "--nepochs=3"]
    result = train("--self-check", *flags)
    assert result.status == 0, result.out + result.err
    assert model.read_text() == "mine"
    assert [path.name for path in temporary.iterdir()] == ["mine.pth"]


FAULTS = {
    "20 steps": ("train_step", lambda *_: torch.tensor(0.5)),
    "evaluation": ("evaluate_and_save", lambda self: None),
    "save": ("_save", lambda self: None),
    "load": ("load", lambda self, path: None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_is_named(name, monkeypatch):
    monkeypatch.setattr(dlrm.Trainer, *FAULTS[name])
    result = train("--self-check")
    assert result.status == 1 and "PASS" not in result.out
    assert re.search(rf"^FAIL: {name}: \S", result.out, re.M), result.out


def test_a_device_that_computes_something_else_is_found(monkeypatch):
    plain = SelfCheck._run

    def differs(self, *flags, on_cpu=False):
        summary = plain(self, *flags, on_cpu=on_cpu)
        if on_cpu:
            summary.losses[7] *= 1.1
        return summary

    monkeypatch.setattr(SelfCheck, "_run", differs)
    result = train("--self-check", "--amp=bf16")
    assert result.status == 1 and "FAIL: as on the CPU: losses differ by" in result.out


def test_nothing_that_only_a_gpu_does_is_asked_of_the_cpu(tmp_path):
    flags = ["--self-check", "--use-gpu", "--cuda-graphs", "--tf32", "--amp=bf16"]
    asked = []

    def program(words):
        asked.append(dlrm.parse_options(words))
        dlrm.make_process(asked[-1])  # refuses what the device cannot
        return 0

    process = Process(0, 1, 0, torch.device("cuda"), "nccl")
    job = SelfCheck(program, process, dlrm.parse_options(flags), tmp_path)
    job._run(on_cpu=True)
    assert not asked[0].use_gpu and asked[0].amp == "off"


def test_an_error_is_told_in_its_own_words(monkeypatch):
    def run_out(*_):
        raise RuntimeError("out of device memory")

    monkeypatch.setattr(dlrm.Trainer, "train_step", run_out)
    result = train("--self-check")
    assert result.status == 1 and "FAIL: 20 steps: out of device memory" in result.out
    assert "Traceback" in result.err


def test_sigterm_ends_the_check_as_it_ends_a_run(monkeypatch):
    """The check has not failed, and its folder is removed."""

    def train_step(self, batch, it):
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(0.5)

    monkeypatch.setattr(dlrm.Trainer, "train_step", train_step)
    result = train("--self-check")
    assert (result.status, result.err) == (143, "") and "FAIL" not in result.out


RANK_PROGRAM = """
import dlrm_s_pytorch
from forked_ranks import run_ranks

def work():
    assert dlrm_s_pytorch.main(["--self-check"]) == 0

run_ranks(2, work)
"""


def test_several_ranks_check_themselves_together(tmp_path):
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    settings |= {"TMPDIR": str(tmp_path)}
    done = shell(sys.executable, "-c", RANK_PROGRAM, cwd=tmp_path, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PASS") == 1 and "ranks          2, gloo" in done.stdout
