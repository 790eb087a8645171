"""The page of a run: its outcome, curves, last evaluation, data, tables, machine and flags."""

import math
import statistics
import time
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from reporting.charts import MUTED, ONE, STEP, Curve, bar_chart, line_chart
from reporting.collected import Collected
from reporting.history import MOST_POINTS, Series, thinned
from reporting.markup import (
    bytes_text,
    facts_table,
    figure,
    grid,
    number_table,
    number_text,
    paragraph,
    section,
    tile,
    tiles,
    time_text,
)
from reporting.metrics import remark
from reporting.plan_table import spans
from reporting.report_style import STYLE
from reporting.run_facts import Flag, TableFacts
from reporting.score_curves import CALIBRATION_BINS, SCORE_BINS, ScoreCurves

MOST_EVALUATIONS = 12  # rows of the table of evaluations


def page(found: Collected) -> str:
    """The whole page as HTML; no other file and no network is needed to read it."""
    kind = "training" if found.is_training else "evaluation"
    parts = (
        _head(found, kind),
        _curves_section(found),
        _evaluation_section(found),
        _time_section(found),
        _data_section(found),
        _tables_section(found.facts.tables, found.facts.num_ranks),
        _run_section(found),
        _flags_section(found.facts.flags),
    )
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>DLRM {kind}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------- headline


class Best(NamedTuple):
    """The best AUC of a run and the step of its evaluation; None: it is not in the history."""

    auc: float
    step: int | None


def best_auc(found: Collected) -> Best:
    """The best AUC, which may be of before this run; nan if there is none."""
    series, last = found.history.evaluations, found.last_evaluation
    pairs = zip(series.columns["auc"], series.steps, strict=True)
    known = [(auc, -step) for auc, step in pairs if math.isfinite(auc)]
    auc, step = max(known, default=(math.nan, 0))
    before = math.nan if last is None else last.best_auc
    return Best(before, None) if before > auc or not known else Best(auc, -step)


def _head(found: Collected, kind: str) -> str:
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.began))
    device = found.facts.machine.get("Device", "")
    ranks = found.facts.num_ranks
    where = f" on {ranks} x {device}" if device else ""
    parts = [f"<header>\n<h1>DLRM {kind}</h1>", paragraph(f"Began {began}{where}", "sub")]
    if found.error:
        parts.append(paragraph(f"This run did not end by itself: {found.error}", "remark"))
    if (last := found.last_evaluation) and (text := remark(last.metrics)):
        parts.append(paragraph(f"Warning: {text}", "remark"))
    parts.append(tiles(_tiles(found)))
    return "\n".join([*parts, "</header>"])


def _tiles(found: Collected) -> list[str]:
    steps, last = found.history.training.steps, found.last_evaluation
    parts = []
    if last is not None:
        best = best_auc(found)
        if found.is_training:
            at = "" if best.step is None else f"at step {best.step:,}"
            before = "" if at or math.isnan(best.auc) else "before this run"
            parts.append(tile("Best AUC", number_text(best.auc), at or before))
        else:
            parts.append(tile("AUC", number_text(last.metrics.auc)))
        more = "of the last evaluation" if found.is_training else ""
        parts.append(tile("Log loss", number_text(last.metrics.log_loss), more))
        parts.append(tile("Accuracy", f"{100 * last.metrics.accuracy:.2f} %", more))
    if steps:
        loss = found.history.training.columns["loss"][-1]
        parts.append(tile("Training loss", number_text(loss), f"after step {steps[-1]:,}"))
    parts.append(_speed_tile(found))
    parts.append(tile("Duration", time_text(found.seconds), "with reading and evaluations"))
    return parts


def _speed_tile(found: Collected) -> str:
    speeds = [s for s in found.history.training.columns["rows_per_second"] if math.isfinite(s)]
    if speeds:
        middle = statistics.median(speeds[1:] or speeds)
        return tile("Rows a second", number_text(middle, 0), "median of the log lines")
    last = found.last_evaluation
    return tile("Rows a second", "none" if last is None else number_text(last.rows_per_second, 0))


# ---------------------------------------------------------------- curves over steps


def _curves_section(found: Collected) -> str:
    if not found.is_training:
        return ""
    training, evaluations = found.history.training, found.history.evaluations
    best = best_auc(found)
    is_known = best.step is not None
    mark = (
        (best.step or 0, best.auc, f"best {best.auc:.4f} at step {best.step:,}")
        if is_known
        else None
    )
    charts = (
        _over_steps("Training loss", "mean since the line before", training, "loss"),
        _over_steps("AUC of evaluations", "AUC", evaluations, "auc", mark),
        _over_steps("Log loss of evaluations", "nats", evaluations, "log_loss"),
        _over_steps("Accuracy of evaluations", "accuracy", evaluations, "accuracy"),
        _over_steps("Learning rate", "learning rate", training, "lr", limits="zero"),
        _over_steps("Rows a second", "rows / s", training, "rows_per_second", limits="zero"),
    )
    note = ""
    if found.first_step:
        begin = f"This run went on after step {found.first_step:,}. "
        known = "What came before is from --metrics-file."
        unknown = "The curves begin there: no --metrics-file has what came before."
        note = begin + (known if found.is_history_known else unknown)
    return section("Curves", paragraph(note) if note else "", grid(charts, "charts"))


def _over_steps(
    title: str,
    label: str,
    series: Series,
    column: str,
    mark: tuple[float, float, str] | None = None,
    limits: str = "",
) -> str:
    """A chart of one column; empty if it has no finite value."""
    values = series.columns[column]
    steps, kept = thinned(series.steps, values)
    if not steps:
        return ""
    finite = sum(map(math.isfinite, values))
    caption = []
    if finite > MOST_POINTS:
        caption.append(
            f"{finite:,} values, drawn as the lowest and the highest one of each of"
            f" {MOST_POINTS // 2 - 1} stretches."
        )
    if finite < len(values):
        caption.append(f"{len(values) - finite:,} values that are not finite are left out.")
    curve = Curve(steps, kept, has_marks=len(steps) <= 30)
    svg = line_chart(title, (STEP, label), [curve], mark, limits)
    return figure(title, svg, " ".join(caption))


# ---------------------------------------------------------------- the last evaluation


def _evaluation_section(found: Collected) -> str:
    last = found.last_evaluation
    if last is None:
        return ""
    title, where = "Evaluation", ""
    if found.is_training:
        title, where = "Last evaluation", f"After step {last.where.step:,}. "
    text = f"{where}{last.num_rows:,} rows in {time_text(last.seconds)}."
    metrics = last.metrics
    facts = {
        "AUC": number_text(metrics.auc, 6),
        "Average precision": number_text(metrics.ap, 6),
        "Log loss": number_text(metrics.log_loss, 6),
        "Share of label 1": number_text(metrics.base_rate, 6),
        "Accuracy, threshold 0.5": number_text(metrics.accuracy, 6),
        "Recall": number_text(metrics.recall, 6),
        "Precision": number_text(metrics.precision, 6),
        "F1": number_text(metrics.f1, 6),
    }
    tables = grid((facts_table("Metrics", facts), _evaluations_table(found)), "columns")
    return section(title, paragraph(text), _score_charts(found.curves), tables)


def _evaluations_table(found: Collected) -> str:
    """The last evaluations; empty if there is only one."""
    series = found.history.evaluations
    rows = [
        (f"{step:,}", *(number_text(series.columns[name][number]) for name in ("auc", "log_loss")))
        for number, step in enumerate(series.steps)
    ]
    if len(rows) < 2:
        return ""
    left_out = f" (the last {MOST_EVALUATIONS} of {len(rows):,})"
    title = "Evaluations" + (left_out if len(rows) > MOST_EVALUATIONS else "")
    return number_table(title, ("Step", "AUC", "Log loss"), rows[-MOST_EVALUATIONS:])


def _score_charts(curves: ScoreCurves | None) -> str:
    if curves is None:
        return paragraph("There are no curves of scores: labels have to be 0 and 1.")
    charts = (_roc(curves), _precision_recall(curves), _calibration(curves), _histogram(curves))
    return grid(charts, "charts")


def _roc(curves: ScoreCurves) -> str:
    if not curves.has_both_labels:
        return paragraph("All labels are the same: there is no ROC and no precision-recall curve.")
    chance = Curve([0, 1], [0, 1], MUTED, "chance", "--")
    shown = [chance, Curve(*curves.roc(), ONE, "model")]
    svg = line_chart("ROC", ("false positive rate", "true positive rate"), shown, limits="square")
    return figure("ROC", svg, f"Exact at {len(curves.thresholds):,} thresholds.")


def _precision_recall(curves: ScoreCurves) -> str:
    if not curves.has_both_labels:
        return ""
    rate = curves.positives / curves.num_rows
    chance = Curve([0, 1], [rate, rate], MUTED, "chance", "--")
    shown = [chance, Curve(*curves.precision_recall(), ONE, "model")]
    title = "Precision and recall"
    return figure(title, line_chart(title, ("recall", "precision"), shown, limits="square"))


def _calibration(curves: ScoreCurves) -> str:
    bins = curves.calibration()
    perfect = Curve([0, 1], [0, 1], MUTED, "perfect", "--")
    model = Curve([b.score for b in bins], [b.rate for b in bins], ONE, "model", has_marks=True)
    title = "Calibration"
    labels = ("mean prediction of a bin", "share of label 1")
    svg = line_chart(title, labels, [perfect, model], limits="square")
    caption = f"{CALIBRATION_BINS} bins of equal width; the table below has their rows."
    table = number_table(
        "Calibration bins",
        ("Prediction", "Rows", "Mean", "Label 1"),
        [
            (f"{b.low:.2f} to {b.high:.2f}", f"{b.num_rows:,}", f"{b.score:.4f}", f"{b.rate:.4f}")
            for b in bins
        ],
    )
    folded = f"<details><summary>Bins of the calibration</summary>{table}</details>"
    return figure(title, svg, caption).replace("</figure>", f"{folded}</figure>")


def _histogram(curves: ScoreCurves) -> str:
    negatives = curves.num_rows - curves.positives
    edges = [number / SCORE_BINS for number in range(SCORE_BINS + 1)]
    kinds = (("label 0", curves.zeros, negatives), ("label 1", curves.ones, curves.positives))
    bars = [
        (f"{name}, {total:,} rows", [100 * count / total for count in counts])
        for name, counts, total in kinds
        if total
    ]
    title = "Predictions by label"
    svg = bar_chart(title, ("prediction", "% of the label's rows"), edges, bars)
    return figure(title, svg)


# ---------------------------------------------------------------- time, data, tables, machine


def _time_section(found: Collected) -> str:
    if not found.phases:
        return ""
    whole = found.phases[-1].ms
    shares = [row.ms / whole if whole else 0.0 for row in found.phases]
    rows = [
        (row.name, "" if row.calls is None else f"{row.calls:.2f}", f"{row.ms:.3f}", f"{share:.1%}")
        for row, share in zip(found.phases, shares, strict=True)
    ]
    head = ("Phase", "Calls a step", "ms a step", "Share")
    return section("Time of a step", number_table("Mean of the profiled steps", head, rows, shares))


def _data_section(found: Collected) -> str:
    facts = found.facts
    missing = list(facts.missing.items())
    table = ""
    if missing:
        rows = [(name, f"{share:.2%}") for name, share in missing]
        shares = [share for _, share in missing]
        body = number_table("Lines without a value", ("Column", "Share"), rows, shares)
        most = max(missing, key=lambda one: one[1])
        text = f"Missing values by column (most: {most[0]}, {most[1]:.1%})"
        table = f"<details><summary>{escape(text)}</summary>{body}</details>"
    return section("Data", facts_table("Rows and labels", facts.data), table)


def _tables_section(tables: Sequence[TableFacts], num_ranks: int) -> str:
    if not tables:
        return ""
    total = sum(table.num_bytes for table in tables)
    rows = sum(table.num_rows for table in tables)
    text = f"{len(tables)} tables, {rows:,} rows, {bytes_text(total)} of weights in float32."
    of_rank = [[t.bytes_on[rank] for t in tables if t.bytes_on[rank]] for rank in range(num_ranks)]
    sizes = [sum(sizes) for sizes in of_rank]
    by_rank = number_table(
        "Weights by rank",
        ("Rank", "Tables", "Weights"),
        [(str(rank), str(len(of_rank[rank])), bytes_text(size)) for rank, size in enumerate(sizes)],
        [size / max(sizes) for size in sizes],
    )
    by_table = number_table(
        "Tables",
        ("Table", "Rows", "D", "Weights", "Ranks"),
        [
            (str(k), f"{t.num_rows:,}", str(t.dim), bytes_text(t.num_bytes), _ranks_of(t))
            for k, t in enumerate(tables)
        ],
    )
    folded = f"<details><summary>All {len(tables)} tables</summary>{by_table}</details>"
    return section("Embedding tables", paragraph(text), by_rank, folded)


def _ranks_of(table: TableFacts) -> str:
    """The ranks that hold rows of a table."""
    return spans(rank for rank, size in enumerate(table.bytes_on) if size)


def _run_section(found: Collected) -> str:
    memory, facts = found.memory, {}
    if memory is not None:
        facts["Host, at most"] = bytes_text(memory.host_peak)
        if memory.host is not None:
            facts["Host, at the end"] = bytes_text(memory.host)
        if memory.device is not None and memory.device_peak is not None:
            facts["Device, at most"] = bytes_text(memory.device_peak)
            facts["Device, at the end"] = bytes_text(memory.device)
    tables = (
        facts_table("Machine", found.facts.machine),
        facts_table("Versions", found.facts.versions),
        facts_table("Memory of rank 0", facts),
    )
    return section("Machine and versions", grid(tables, "columns"))


def _flags_section(flags: Sequence[Flag]) -> str:
    if not flags:
        return ""
    given = [flag for flag in flags if not flag.is_default]
    rest = [flag for flag in flags if flag.is_default]
    first = _flags_table("Flags that are not the default", given)
    all_flags = _flags_table("Flags with their default", rest)
    folded = f"<details><summary>The other {len(rest)} flags</summary>{all_flags}</details>"
    return section("Flags", first, folded)


def _flags_table(title: str, flags: Sequence[Flag]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row"><code>{escape(flag.name)}</code></th>'
        f"<td><code>{escape(flag.value)}</code></td></tr>"
        for flag in flags
    )
    return (
        f'<div class="card"><table class="facts"><caption>{escape(title)}</caption>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
