"""--mlperf-logging writes a log that MLPerf's own checker takes, and that says how a run ended."""

import contextlib
import io
import json
import re
import sys

import pytest
from conftest import CRITEO_MODEL, ROOT, SMALL_MODEL, largest_file, shell, train

import dlrm_s_pytorch as dlrm
from common.errors import UserError
from optim.row_optimizers import EPS
from reporting import results
from reporting.log_lines import StepPosition
from reporting.metrics import Metrics
from reporting.mlperf_log import MLPerfLog
from reporting.records import EvaluationRecord

TOKEN = ":::MLLOG "
PAIRS = ("init", "run", "block", "epoch", "eval")
LOGGED = [*SMALL_MODEL, "--mlperf-logging"]
SCHEDULE = "--lr-num-warmup-steps=5 --lr-decay-start-step=60 --lr-num-decay-steps=100".split()


def events_of(text):
    """The events of a log: time_ms, event_type, key, value, metadata; each on a line of its own."""
    assert text.count(TOKEN) == sum(line.startswith(TOKEN) for line in text.splitlines())
    lines = [line for line in text.splitlines() if line.startswith(TOKEN)]
    return [json.loads(line.removeprefix(TOKEN)) for line in lines]


def values_of(events, key):
    return [event["value"] for event in events if event["key"] == key]


def metadata_of(events, key, name):
    return [event["metadata"][name] for event in events if event["key"] == key]


def end_of(text):
    """(status, reason) of the only run_stop, which is the last event."""
    events = events_of(text)
    assert [event["key"] for event in events].count("run_stop") == 1
    assert events[-1]["key"] == "run_stop"
    return events[-1]["metadata"]["status"], events[-1]["metadata"].get("reason", "")


def without_events(text):
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(TOKEN))


def checked(text, folder):
    """MLPerf's checker on a log: (exit status, what it says)."""
    log = folder / "train_0.log"
    log.write_text(text)
    flags = "-m mlperf_logging.compliance_checker --usage training --ruleset 2.1.0".split()
    done = shell(sys.executable, *flags, log, f"--log_output={folder}/checker.log", cwd=folder)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def flags(kaggle):
    """Those of a short training that reaches its threshold at the end of its second epoch."""
    more = (
        "--nepochs=3 --test-freq=30 --mlperf-auc-threshold=0.62 --learning-rate=0.3"
        " --mlperf-grad-accum-iter=2 --numpy-rand-seed=8"
    ).split()
    found = [*CRITEO_MODEL, f"--data_path={kaggle}", *SCHEDULE, *more]
    assert train(*found, "--dry-run").status == 0  # no test's log has the line of preparation
    return found


@pytest.fixture(scope="module")
def finished(flags):
    result = train(*flags)
    assert result.status == 0, result.err
    return result


def test_the_checker_takes_the_log_of_a_training_that_reached_its_threshold(finished, tmp_path):
    status, said = checked(finished.out, tmp_path)
    assert status == 0 and "SUCCESS" in said, said
    without_end = finished.out.replace("run_stop", "run_stop_")
    assert checked(without_end, tmp_path)[0] == 1, "it can say no"


def test_the_log_says_once_what_was_trained_and_how(finished):
    once = {
        "submission_benchmark": "dlrm",
        "submission_org": "none (this run is no MLPerf submission)",
        "submission_division": "open",
        "submission_status": "onprem",
        "submission_platform": "1 x CPU",
        "cache_clear": False,
        "seed": 8,
        "train_samples": 6003,
        "eval_samples": 500,
        "global_batch_size": 256,
        "gradient_accumulation_steps": 2,
        "opt_name": "sgd",
        "opt_base_learning_rate": 0.3,
        "opt_learning_rate_warmup_steps": 5,
        "lr_decay_start_steps": 60,
        "sgd_opt_base_learning_rate": 0.3,
        "sgd_opt_learning_rate_decay_poly_power": 2,
        "sgd_opt_learning_rate_decay_steps": 100,
    }
    events = events_of(finished.out)
    assert {key: values_of(events, key) for key in once} == {k: [v] for k, v in once.items()}
    assert metadata_of(events, "weights_initialization", "tensor") == [
        "embeddings", "bottom_mlp_dense1", "bottom_mlp_dense2", "top_mlp_dense1", "top_mlp_dense2",
    ]  # fmt: skip
    allowed = {*once, "weights_initialization", "eval_accuracy"}
    allowed |= {f"{name}_{end}" for name in PAIRS for end in ("start", "stop")}
    assert {event["key"] for event in events} == allowed


def test_intervals_lie_inside_one_another_in_time(finished):
    """Each that starts is stopped, the last one first, and none overlaps another halfway."""
    events, open_ones, order = events_of(finished.out), [], []
    times = [event["time_ms"] for event in events]
    assert times == sorted(times)
    for event in events:
        name, _, end = event["key"].rpartition("_")
        if event["event_type"] == "INTERVAL_START":
            assert end == "start"
            open_ones.append(name)
            order.append("/".join(open_ones))
        elif event["event_type"] == "INTERVAL_END":
            assert (open_ones.pop(), "stop") == (name, end)
    evaluated = ["run/block", "run/block/epoch", *["run/block/epoch/eval"] * 2]
    assert open_ones == [] and order == ["init", "run", *evaluated, *evaluated]
    for end in ("start", "stop"):
        assert metadata_of(events, f"epoch_{end}", "epoch_num") == [1, 2]
        assert metadata_of(events, f"block_{end}", "first_epoch_num") == [1, 2]
        assert metadata_of(events, f"block_{end}", "epoch_count") == [1, 1]


def test_evaluations_have_the_auc_and_how_many_epochs_are_trained(finished):
    events = events_of(finished.out)
    aucs, tests = values_of(events, "eval_accuracy"), finished.tests
    assert [round(auc, 4) for auc in aucs] == [test["auc"] for test in tests] and len(aucs) == 4
    assert aucs[-1] >= 0.62 > max(aucs[:-1])
    for key in ("eval_start", "eval_accuracy", "eval_stop"):
        assert metadata_of(events, key, "epoch_num") == [30 / 47, 1.0, 1 + 30 / 47, 2.0]
    assert end_of(finished.out) == ("success", "")


def test_files_are_named_from_the_repository_on(finished):
    files = {event["metadata"]["file"] for event in events_of(finished.out)}
    assert files == {"reporting/mlperf_log.py"}


def test_other_lines_are_as_without_events_and_programs_read_them_as_before(
    finished, flags, tmp_path
):
    plain = train(*flags, "--mlperf-events=false").out
    assert without_events(finished.out) == plain and TOKEN not in plain
    assert results.summarise(finished.out) == results.summarise(plain)
    logs = [tmp_path / "with.log", tmp_path / "without.log"]
    for log, text in zip(logs, (finished.out, plain), strict=True):
        log.write_text(text)
    for word, field in (("Finished training it", "-F, '{print $2, $3}'"), ("auc", "'{print $10}'")):
        rules = [f"grep '{word}' {log} | awk {field}" for log in logs]
        found = [shell("bash", "-c", rule).stdout for rule in rules]
        assert found[0] == found[1] and found[0].count("\n") >= 4


def test_the_closed_divisions_keys_of_a_full_size_run(tmp_path):
    """SYNTHETIC: numbers of rows and the AUC are made up, nothing is trained.

    The flags are those of test/train_full_8p.sh on Terabyte, but for the network: MLPerf's own has
    five layers in the top MLP, the scripts' has four.
    """
    full = (
        "--max-ind-range=10000000 --data-sub-sample-rate=0.875 --memory-map --loss-function=bce"
        " --round-targets=true --learning-rate=1 --mini-batch-size=32768 --print-time"
        " --test-mini-batch-size=16384 --test-freq=10240 --print-freq=1024 --mlperf-logging"
        " --arch-sparse-feature-size=128 --arch-mlp-bot=13-512-256-128"
        " --arch-mlp-top=1024-1024-512-256-1 --mlperf-auc-threshold=0.8025 --mlperf-division=closed"
        " --mlperf-org=SYNTHETIC --mlperf-status=research --mlperf-platform=8xCard"
        " --tensor-board-filename="
    ).split()
    status, said = checked(synthetic_log(full), tmp_path)
    assert status == 0, said
    scripts = [*full, "--arch-sparse-feature-size=64", "--arch-mlp-bot=13-512-256-64"]
    log = synthetic_log([*scripts, "--arch-mlp-top=512-512-256-1"])
    assert checked(log, tmp_path)[0] == 1, "the scripts' own network is for the open division"
    assert checked(synthetic_log([*full, "--optimizer=adagrad"]), tmp_path)[0] == 1


def synthetic_log(argv):
    """The log of a run that reaches an AUC of 0.8026 at its first evaluation, if it had been."""
    options = dlrm.parse_options(argv)
    shape = dlrm.Architecture.from_options(options, [1000] * 26, 13)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), MLPerfLog(options, "8 x card", print) as log:
        log.begin_run(4_195_197_692, 89_137_319, shape.bottom, shape.top)
        log.begin_epoch(StepPosition(0, 128_028, 0), 4_195_197_692, 0)
        where = StepPosition(10_240, 128_028, 0)
        log.begin_evaluation(where, 89_137_319)
        found = Metrics(accuracy=0.97, auc=0.8026)
        log.evaluation(EvaluationRecord(where, found, 0.97, 0.8026, 89_137_319, 10.0))
    return out.getvalue()


@pytest.mark.parametrize("optimizer", ["adagrad", "rwsadagrad"])
def test_adagrad_has_mlperfs_keys_for_it_and_none_of_sgd(optimizer):
    events = events_of(train(*LOGGED, *SCHEDULE, f"--optimizer={optimizer}").out)
    once = {
        "opt_name": optimizer,
        "opt_base_learning_rate": 0.1,
        "opt_adagrad_epsilon": EPS,
        "opt_adagrad_initial_accumulator_value": 0,
        "opt_adagrad_learning_rate_decay": 0,
        "opt_weight_decay": 0,
        "opt_learning_rate_warmup_steps": 5,
        "opt_learning_rate_decay_start_step": 60,
        "opt_learning_rate_decay_steps": 100,
        "lr_decay_start_steps": 60,
    }
    assert {key: values_of(events, key) for key in once} == {k: [v] for k, v in once.items()}
    assert not [event for event in events if event["key"].startswith("sgd_")]


@pytest.mark.parametrize(
    "more, rows", [("--data-size=600", 600), ("--num-batches=3", 192), ("--data-size=5", 5)]
)
def test_samples_are_those_of_an_epoch(more, rows):
    events = events_of(train(*LOGGED, *more.split()).out)
    assert values_of(events, "train_samples") == values_of(events, "eval_samples") == [rows]


def test_a_capped_epoch_has_the_rows_of_its_batches(kaggle):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--num-batches=5"]
    events = events_of(train(*flags).out)
    assert values_of(events, "train_samples") == [5 * 128]
    assert values_of(events, "eval_samples") == [500]


NOT_REACHED = {
    "": "no threshold was given",
    "--test-freq=5 --mlperf-auc-threshold=1 --nepochs=2": "no threshold was reached in 2 epoch(s)",
    "--performance --nepochs=9 --mlperf-acc-threshold=0.1": "--performance measures speed only",
}


@pytest.mark.parametrize("more", NOT_REACHED)
def test_a_run_that_reached_no_threshold_is_aborted_and_no_error(more):
    result = train(*LOGGED, *more.split())
    assert (result.status, result.err) == (0, "")
    assert end_of(result.out) == ("aborted", NOT_REACHED[more])
    lines = [line for line in result.out.splitlines() if line.startswith(TOKEN)]
    assert not re.search("Finished|Testing| loss|recall|auc|best", "".join(lines)), "awk's words"


def test_a_threshold_of_the_accuracy_is_one(kaggle):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--test-freq=10", "--nepochs=9"]
    result = train(*flags, "--mlperf-acc-threshold=0.5", "--mlperf-auc-threshold=0.99")
    assert end_of(result.out) == ("success", "") and len(result.tests) == 1


@pytest.mark.parametrize("more", ["--nepochs=2", "", "--mlperf-auc-threshold=0.1"])
def test_a_continued_run_is_aborted(tmp_path, more):
    """Whether it trains, has nothing left to train, or begins beyond its threshold."""
    model = tmp_path / "m.pth"
    assert train(*LOGGED, "--test-freq=10", f"--save-model={model}").status == 0
    result = train(*LOGGED, "--test-freq=10", f"--load-model={model}", *more.split())
    reason = "the run was continued from a model file (--load-model)"
    assert result.status == 0 and end_of(result.out) == ("aborted", reason)


def test_success_is_told_before_the_model_is_saved(flags, tmp_path):
    with largest_file(5000):
        result = train(*flags, f"--save-model={tmp_path}/m.pth", "--mlperf-auc-threshold=0.1")
    assert result.status == 2 and "m.pth: cannot write it (File too large)" in result.err
    assert end_of(result.out) == ("success", "")


# ---------------------------------------------------------------- runs that fail


def test_predictions_that_are_nan_abort_and_stay_an_error():
    result = train(*LOGGED, "--learning-rate=1e38", "--test-freq=1")
    reason = "predictions are nan: the model's parameters are not finite"
    assert (result.status, result.err) == (2, f"error: {reason}\n")
    assert end_of(result.out) == ("aborted", reason)
    keys = [event["key"] for event in events_of(result.out)]
    assert keys[-5:] == ["eval_start", "eval_stop", "epoch_stop", "block_stop", "run_stop"]


def test_an_interrupt_aborts(monkeypatch):
    def train_step(self, batch, it):
        raise KeyboardInterrupt

    monkeypatch.setattr(dlrm.Trainer, "train_step", train_step)
    result = train(*LOGGED)
    assert (result.status, result.err) == (130, "interrupted\n")
    assert end_of(result.out) == ("aborted", "interrupted")


def test_a_lack_of_memory_aborts_with_the_line_that_the_user_sees(monkeypatch):
    def train_step(self, batch, it):
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(dlrm.Trainer, "train_step", train_step)
    result = train(*LOGGED)
    status, reason = end_of(result.out)
    assert (result.status, status) == (2, "aborted") and reason.startswith("out of memory on cpu")
    assert result.err == f"error: {reason}\n"


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("Connection lost\nat a/file"), "RuntimeError: Connection lost"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_a_bug_aborts_and_keeps_its_traceback(error, reason, monkeypatch, capsys):
    def train_step(self, batch, it):
        raise error

    monkeypatch.setattr(dlrm.Trainer, "train_step", train_step)
    with pytest.raises(type(error)):
        dlrm.main([*LOGGED, "--tensor-board-filename="])
    assert end_of(capsys.readouterr().out) == ("aborted", reason)


def test_a_run_that_fails_before_it_begins_has_a_run_stop_too(tmp_path):
    model = tmp_path / "m.pth"
    model.write_text("no model")
    result = train(*LOGGED, f"--load-model={model}")
    assert result.status == 2 and result.err.count("\n") == 1
    status, reason = end_of(result.out)
    assert status == "aborted" and result.err == f"error: {reason}\n"
    keys = [event["key"] for event in events_of(result.out)]
    assert keys[-2:] == ["init_stop", "run_stop"] and "run_start" not in keys


def test_an_output_that_is_gone_hides_no_error():
    """The log cannot be ended, and the error that ended the run is the one to be seen."""

    class Gone(io.StringIO):
        is_gone = False

        def write(self, text):
            if self.is_gone:
                raise BrokenPipeError
            return super().write(text)

    out = Gone()
    with (
        contextlib.redirect_stdout(out),
        pytest.raises(UserError, match="the cause"),
        MLPerfLog(dlrm.parse_options(LOGGED), "1 x CPU", print),
    ):
        out.is_gone = True
        raise UserError("the cause")


def test_a_reader_that_goes_ends_the_run_quietly(tmp_path):
    flags = [*LOGGED, "--nepochs=100", "--tensor-board-filename="]
    words = " ".join(["-u", f"{ROOT}/dlrm_s_pytorch.py", *flags])
    line = f"'{sys.executable}' {words} | head -1; echo ${{PIPESTATUS[0]}}"
    done = shell("bash", "-c", line, cwd=tmp_path)
    first, status = done.stdout.splitlines()
    assert first.startswith(TOKEN) and status == "141" and done.stderr == ""


# ---------------------------------------------------------------- where events are, and are not


def test_lines_stand_above_the_progress_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert dlrm.main([*LOGGED, "--test-freq=2", "--tensor-board-filename="]) == 0
    lines = [line for line in terminal.getvalue().split("\n") if TOKEN in line]
    # the cursor may go up a line, from the bar of an evaluation to that of its epoch
    shown = [line.rpartition("\r")[2].replace("\x1b[A", "") for line in lines]
    assert "epoch 0:" in terminal.getvalue() and any("\r" in line for line in lines)
    assert all(line.startswith(TOKEN) and json.loads(line.removeprefix(TOKEN)) for line in shown)


@pytest.mark.parametrize("flag", ["--inference-only", "--dry-run", "--mlperf-events=false"])
def test_what_trains_nothing_or_is_asked_for_none_writes_no_events(flag):
    result = train(*LOGGED, flag)
    assert result.status == 0 and TOKEN not in result.out
    assert TOKEN not in train(*SMALL_MODEL).out


def test_an_evaluation_without_an_auc_has_no_value():
    """Labels between 0 and 1 have none, and nan is no JSON."""
    result = train("--data-size=20", "--mini-batch-size=5", "--test-freq=4", "--mlperf-logging")
    keys = [event["key"] for event in events_of(result.out)]
    assert "eval_stop" in keys and "eval_accuracy" not in keys and "NaN" not in result.out


TWO_RANKS = """
import contextlib, os, pathlib, sys

sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
from common.errors import RankError
from forked_ranks import run_ranks


def fail(self, batch, it):
    raise RankError("a card is hot")


def work():
    if {fails} and os.environ["RANK"] == "1":
        dlrm.Trainer.train_step = fail
    with open(pathlib.Path({folder}, os.environ["RANK"]), "w") as file:
        with contextlib.redirect_stdout(file):
            assert dlrm.main({flags}) == (2 if {fails} else 0)


run_ranks(2, work)
"""


@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_several_ranks_the_first_writes(fails, tmp_path):
    """If the other one fails, the reason sends the reader to its log."""
    program, paths = tmp_path / "two_ranks.py", [str(ROOT), str(ROOT / "test" / "unit")]
    flags = [*LOGGED, "--tensor-board-filename="]
    program.write_text(
        TWO_RANKS.format(paths=paths, fails=fails, folder=repr(str(tmp_path)), flags=flags)
    )
    done = shell(sys.executable, program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "0").read_text()
    assert values_of(events_of(log), "submission_platform") == ["2 x CPU"]
    assert values_of(events_of(log), "train_samples") == [640]
    reason = r"rank 1 has ended \(process \d+\): its own log says why"
    status, said = end_of(log)
    assert status == "aborted"
    assert re.fullmatch(reason if fails else "no threshold was given", said)
    assert (tmp_path / "1").read_text() == ""
