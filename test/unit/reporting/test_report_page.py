"""--report: the page has all of a run, fits two megabytes, and nothing of a run can break it."""

import json
import math
import re
import signal
from html.parser import HTMLParser

import pytest
import torch
from conftest import CRITEO_MODEL, SMALL_MODEL, train

from common.errors import UserError
from reporting import console
from reporting.collected import Collected
from reporting.history import History
from reporting.log_lines import StepPosition
from reporting.metrics import Metrics
from reporting.phase_table import Row
from reporting.records import EvaluationRecord
from reporting.report import ReportFile
from reporting.report_page import best_auc, page
from reporting.run_facts import Flag, RunFacts, TableFacts
from reporting.score_curves import SCORE_BINS, ScoreCurves

SECTIONS = [
    "Curves", "Last evaluation", "Data", "Embedding tables", "Machine and versions", "Flags",
]  # fmt: skip
RUN = [*SMALL_MODEL, "--print-freq=2", "--test-freq=5", "--mlperf-logging", "--data-size=1280"]
VOID = {"meta", "path", "use", "rect"}


class Page(HTMLParser):
    """A page that is read: its text, and what is wrong with its tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.ids, self.links, self.headings = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open = self.open[:-2]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(word for word in self.words if word)


def read(text):
    """The page as people read it, if it is well-formed and needs nothing else."""
    found = Page(text)
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    used = set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(found.ids)
    for word in ("http", "@import", "<script", "src=", "<link", "<image"):
        assert word not in text, word
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pages of a training, of one that goes on from it, and of an evaluation."""
    folder = tmp_path_factory.mktemp("pages")
    lines, model = f"--metrics-file={folder}/m.jsonl", f"{folder}/m.pth"
    runs = {
        "first": [lines, f"--save-model={model}"],
        "goes on": [f"--load-model={model}", "--nepochs=2", lines],
        "evaluated": [f"--load-model={model}", "--inference-only"],
    }
    for name, flags in runs.items():
        result = train(*RUN, *flags, f"--report={folder}/{name}.html")
        assert result.status == 0, result.err
        assert result.out.count(f"report: {folder}/{name}.html\n") == 1
        (folder / f"{name}.log").write_text(result.out)
    return folder


def page_of(folder, name):
    return read((folder / f"{name}.html").read_text())


def test_the_page_has_all_sections_with_the_numbers_of_the_log(folder):
    found, log = page_of(folder, "first"), (folder / "first.log").read_text()
    assert found.headings == SECTIONS
    best = re.search(r"best AUC ([\d.]+) at it (\d+) of epoch 0, saved", log)
    assert f"Best AUC {best[1]} at step {int(best[2])}" in found.text
    loss = re.findall(r"log loss ([\d.]+)", log)[-1]
    assert f"Log loss {loss}" in found.text and "did not end" not in found.text
    assert f"best {best[1]} at step {best[2]}" in found.text  # in the curve
    assert "4 tables, 640 rows, 40.96 kB of weights" in found.text
    assert "--data-size 1280" in found.text and "Rows, train 1,280" in found.text
    assert all(word in found.text for word in ("ROC", "Precision and recall", "Calibration"))
    assert re.search(r"torch \d+\.\d+", found.text) and "Cores" in found.text


def test_flags_that_are_not_the_default_come_first(folder):
    text = (folder / "first.html").read_text()
    flags = text[text.index("<h2>Flags") :]
    given, folded = flags[: flags.index("<details")], flags[flags.index("<details") :]
    assert "--mini-batch-size" in given and "--mini-batch-size" not in folded
    assert "--nepochs" in folded and "--nepochs" not in given


def test_a_run_that_goes_on_shows_what_came_before_if_it_is_known(folder):
    begin = re.search(r"at it (\d+) of epoch 0, saved", (folder / "first.log").read_text())[1]
    text = page_of(folder, "goes on").text
    assert f"This run went on after step {begin}. What came before is from --metrics-file." in text
    assert re.findall(r"Evaluations Step AUC Log loss 5 ", text)  # of the first run
    found = Collected(history=history_of(3), is_training=True, first_step=7)
    text = read(page(found)).text
    assert "This run went on after step 7. The curves begin there: no --metrics-file has" in text


def test_an_evaluation_has_no_curves_over_steps_but_all_else(folder):
    found = page_of(folder, "evaluated")
    assert found.headings == ["Evaluation", *SECTIONS[2:]]
    assert "DLRM evaluation" in found.text and "Best AUC" not in found.text
    auc = re.search(r", auc ([\d.]+)", (folder / "evaluated.log").read_text())[1]
    assert f"AUC {auc}" in found.text


def test_criteo_data_is_told_of_as_its_preparation_has_counted_it(kaggle, tmp_path):
    names = (f"--data_path={kaggle}", f"--processed-data-file={tmp_path}/p")
    assert train(*CRITEO_MODEL, *names, "--num-batches=1", f"--report={tmp_path}/r").status == 0
    text = read((tmp_path / "r").read_text()).text
    report = json.loads(next(tmp_path.glob("*/report.json")).read_text())
    assert f"Lines of text {report['lines']:,}, " in text
    assert f"Label 1, of the lines {100 * report['label_rate']:.3f} %" in text
    assert f"C26 {report['missing_rate']['C26']:.2%}" in text
    assert f"Rows, train {report['rows']['train']:,}" in text


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, UserError("loss is <nan>"), None])
def test_a_run_that_is_ended_leaves_a_page_that_says_why(ended_by, tmp_path, monkeypatch):
    def training(self, record):
        if record.where.it == 6 and isinstance(ended_by, UserError):
            raise ended_by
        if record.where.it == 6:
            signal.raise_signal(ended_by)

    path = tmp_path / "r.html"
    if ended_by is None:  # before there is a line
        result = train(*RUN, f"--report={path}", f"--load-model={tmp_path}/none")
        assert result.status == 2 and not list(tmp_path.iterdir())
        return
    monkeypatch.setattr(console.Console, "training", training)
    result = train(*RUN, "--test-freq=-1", f"--report={path}")
    assert result.status == (143 if ended_by is signal.SIGTERM else 2)
    why = "ended by SIGTERM" if ended_by is signal.SIGTERM else "loss is <nan>"
    found = read(path.read_text())
    assert f"This run did not end by itself: {why}" in found.text
    assert found.headings == [one for one in SECTIONS if one != "Last evaluation"]


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path):
    said, path = [], tmp_path / "folder" / "r.html"
    with ReportFile(path, None, torch.device("cpu"), said.append) as report:
        report.evaluation(evaluated(Metrics(0.5)))
    assert said == [f"warning: --report={path} cannot be written (No such file or directory)"]


def evaluated(metrics, best=math.nan):
    return EvaluationRecord(StepPosition(5, 10, 0), metrics, metrics.accuracy, best, 100, 2.0)


def history_of(num_lines):
    history = History()
    for step in range(1, num_lines + 1):
        loss = math.nan if step % 97 == 0 else math.sin(step) + 1000 / step
        history.training.add(step, {"loss": loss, "lr": 0.1, "rows_per_second": step * 31 % 999})
        if step % 10 == 0:
            history.evaluations.add(step, {"auc": math.sin(step), "log_loss": 0.4})
    return history


def curves_of(positives, num_rows=80):
    share = [positives // SCORE_BINS] * SCORE_BINS
    rest = [num_rows // SCORE_BINS - one for one in share]
    return ScoreCurves(num_rows, positives, [0.2], [positives], [num_rows - positives],
                       share, rest, [0.5] * SCORE_BINS)  # fmt: skip


def test_a_long_run_makes_a_small_page():
    phases = [Row("MLPs", 1.0, 3.0, 0.0), Row("other", None, 1.0, 0.0), Row("step", None, 4.0, 0.0)]
    size = 256 * 10**7
    of_one = [tuple(size if rank == k % 8 else 0 for rank in range(8)) for k in range(26)]
    tables = [TableFacts(10**7, 64, size, on_ranks) for on_ranks in of_one]
    facts = RunFacts(tables=tables, num_ranks=8, missing={"I1": 0.25, "C1": 0.5})
    metrics = Metrics(0.9, auc=0.75, log_loss=0.3, base_rate=0.5)
    text = page(
        Collected(
            facts, history_of(100_000), is_training=True, phases=phases, curves=curves_of(40),
            last_evaluation=evaluated(metrics, 0.75),
        )
    )  # fmt: skip
    assert len(text.encode()) < 2_000_000
    found = read(text)
    assert "98,970 values, drawn as the lowest and the highest one" in found.text
    assert "1,030 values that are not finite are left out" in found.text
    assert "Evaluations (the last 12 of 10,000)" in found.text
    assert "MLPs 1.00 3.000 75.0%" in found.text
    assert "Missing values by column (most: C1, 50.0%)" in found.text
    assert "26 tables, 260,000,000 rows, 66.56 GB of weights" in found.text
    assert "0 4 10.24 GB" in found.text and "7 3 7.68 GB" in found.text
    assert "25 10,000,000 64 2.56 GB 1" in found.text


def test_tables_that_several_ranks_hold_are_told_with_all_of_them():
    """A cut table counts on each rank with its rows; one on every rank counts on each of them."""
    on_ranks = {"every": (8e6,) * 4, "cut": (0, 3e8, 0, 1e8), "one": (0, 0, 5e6, 0)}
    tables = [TableFacts(9, 2, max(on_ranks[one]), on_ranks[one]) for one in on_ranks]
    text = read(page(Collected(RunFacts(tables=tables, num_ranks=4)))).text
    assert "0 9 2 8.00 MB 0-3 1 9 2 300.00 MB 1, 3 2 9 2 5.00 MB 2" in text
    assert "Weights 0 1 8.00 MB 1 2 308.00 MB 2 2 13.00 MB 3 2 108.00 MB" in text


def test_what_comes_from_a_run_is_escaped():
    evil = '"><b>&amp;</td>$x^2$'
    facts = RunFacts(
        flags=[Flag("--data_path", evil, "none"), Flag("--x", evil, evil)],
        machine={"Device": evil}, versions={"torch": evil}, data={evil: evil}, missing={evil: 0.5},
    )  # fmt: skip
    text = page(Collected(facts, history_of(3), is_training=True, error=evil))
    assert "<b>" not in text
    assert read(text).text.count(evil) >= 8


def test_losses_that_are_all_nan_and_labels_of_one_class_have_no_chart_but_a_sentence():
    history = History()
    history.training.add(1, {"loss": math.nan})
    metrics = Metrics(0.5, log_loss=0.1, base_rate=0.0)
    last = evaluated(metrics)
    found = Collected(history=history, is_training=True, last_evaluation=last, curves=curves_of(0))
    text = read(page(found)).text
    assert "Training loss none" in text and "Best AUC none" in text
    assert "there is no ROC and no precision-recall curve" in text and "Calibration" in text
    assert "all labels are 0: auc and ap do not exist" in text
    found.curves = None
    assert "labels have to be 0 and 1" in read(page(found)).text


def test_the_best_auc_is_of_the_first_of_equals_or_of_before_the_run():
    found = Collected(is_training=True, last_evaluation=evaluated(Metrics(0.5, auc=0.7), 0.7))
    for step, auc in ((5, 0.6), (10, 0.7), (15, math.nan), (20, 0.7)):
        found.history.evaluations.add(step, {"auc": auc})
    assert best_auc(found) == (0.7, 10)
    found.last_evaluation = evaluated(Metrics(0.5, auc=0.7), 0.8)
    assert best_auc(found) == (0.8, None) and "0.8000 before this run" in read(page(found)).text
