"""Model files: one file with the original's keys, however many ranks there are.

Six keys are ours: `progress` (batches done and best metrics), `since_best` (evaluations since the
best accuracy, the best AUC), `generators`, `loss_scale`, `joins` (how each table's parts are
joined: the parts of --qr-operation=mult look like those of add) and `serving` (what has to be known
to score rows). A file of the original has none of them: a run continues from its epoch and iter.
The categories of the tables' rows are in a file of their own, `DLRM.vocabulary` beside `DLRM.pth`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from common.errors import RankError, UserError
from common.whole_files import check_place, target_of, write_whole
from criteo.vocabulary import VocabularySource
from engine.model_content import (
    RunFacts,
    Value,
    make_content,
    names_of_state,
    packed_generators,
    state_of_rows,
)
from engine.progress import Progress
from engine.saved_content import SavedContent, reason_of
from engine.serving_facts import ServingFacts
from engine.streamed_file import StreamedTensor, streamed_tensors, write_streamed
from engine.value_checks import Wanted
from model.embedding_tables import EmbeddingTables
from optim.dense import DenseOptimizer
from optim.loss_scale import NoScale
from ranks.collectives import row_blocks_on_first, send_to_first
from ranks.placement import Part
from ranks.process import Process
from ranks.watch import says_that_a_rank_has_gone

FLAG = "--save-model"
ENDINGS = (".pth", ".pt", ".onnx")  # of models; the vocabulary's takes their place


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """The parts of a run that a model file saves and restores, and the lengths that it records.

    Attributes:
        process: this rank.
        model: its parameters are the same on all ranks; tables are not among them.
        tables: the embedding tables, of which each rank holds its parts.
        dense_optimizer: updates the model's parameters.
        optimizer_name: sgd, adagrad or rwsadagrad.
        num_epochs: epochs of the run.
        num_batches: batches of an epoch.
        num_test_batches: batches of an evaluation.
        scale: the scale of the loss.
        serving: what has to be known to score rows; None: it is not saved.
        vocabulary: the categories of the tables' rows; None: they are not known.
    """

    process: Process
    model: nn.Module
    tables: EmbeddingTables
    dense_optimizer: DenseOptimizer
    optimizer_name: str
    num_epochs: int
    num_batches: int
    num_test_batches: int
    scale: NoScale = field(default_factory=NoScale)
    serving: ServingFacts | None = None
    vocabulary: VocabularySource | None = None


def full_state_dict(model_state: ModelState) -> dict[str, torch.Tensor]:
    """The whole model's state dict, on rank 0's host; empty on other ranks. All ranks call it."""
    return dict(gathered_state(model_state))


def gathered_state(model_state: ModelState) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, value) of the whole model's state dict, one after the other; all ranks call it.

    Rank 0 gets all of them, on its host; the others get none.
    """
    for part, value in gathered_parts(model_state, "weight"):
        yield f"emb_l.{part.key}", value
    if model_state.tables.learned_pooling:
        for part, value in gathered_parts(model_state, "pooling"):
            yield f"v_W_l.{part.table}", value
    if model_state.process.is_first:
        yield from _dense_parameters(model_state)


def gathered_parts(model_state: ModelState, name: str) -> Iterator[tuple[Part, torch.Tensor]]:
    """(part, its rows of the tensor of that name), one after the other; all ranks call it.

    Rank 0 gets all parts that have such a tensor, on its host; the others get none.
    """
    for part in model_state.tables.parts:
        value = _gathered(model_state, part, name)
        if value is not None:
            yield part, value


def _gathered(model_state: ModelState, part: Part, name: str) -> torch.Tensor | None:
    view = model_state.tables.part_view(part, name)
    host = None if view is None else view.detach().to("cpu", copy=True)
    shape = (part.num_rows, *model_state.tables.row_shapes(part)[name])
    return send_to_first(model_state.process, host, torch.empty(shape), part.rank)


def save_model_file(path: str, model_state: ModelState, progress: Progress) -> None:
    """Write the model file, on rank 0. All ranks call it.

    Beside the model, memory for one block of a table's rows is needed at a time.

    Raises:
        RankError: the file cannot be written; the one that was there before is kept.
    """
    content = _content(model_state, progress)
    if model_state.process.is_first:
        write_content(Path(path), content, model_state.vocabulary)
        return
    for tensor in streamed_tensors(content):
        for _ in tensor.blocks:  # there are none, but asking for them sends this rank's to rank 0
            pass


def _content(model_state: ModelState, progress: Progress) -> dict[str, Any]:
    """The content of the model file, the same on all ranks but for the blocks of tables' rows."""
    dense = model_state.dense_optimizer.state_dict()
    (group,) = dense["param_groups"]
    facts = RunFacts(
        progress=progress,
        num_epochs=model_state.num_epochs,
        num_batches=model_state.num_batches,
        num_test_batches=model_state.num_test_batches,
        settings={name: value for name, value in group.items() if name != "params"},
        generators=packed_generators(np.random.get_state(legacy=False), torch.get_rng_state()),
        loss_scale=model_state.scale.state(),
        joins=model_state.tables.joins,
        serving=model_state.serving.to_json() if model_state.serving else None,
    )
    states = [
        state_of_rows(
            progress, {key: _streamed(model_state, part, name) for key, name in names.items()}
        )
        for part, names in _row_states(model_state)
    ]
    states += [_on_host(dense["state"].get(number, {})) for number in group["params"]]
    return make_content(facts, _parameters(model_state), states)


def _parameters(model_state: ModelState) -> dict[str, Value]:
    """The model's parameters by their keys; those of tables are streamed."""
    tables = model_state.tables
    values: dict[str, Value] = {
        f"emb_l.{part.key}": _streamed(model_state, part, "weight") for part in tables.parts
    }
    if tables.learned_pooling:
        values |= {
            f"v_W_l.{part.table}": _streamed(model_state, part, "pooling") for part in tables.parts
        }
    return values | dict(_dense_parameters(model_state))


def _dense_parameters(model_state: ModelState) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model_state.model.named_parameters():
        yield name, value.detach().cpu().clone()


def _streamed(model_state: ModelState, part: Part, name: str) -> StreamedTensor:
    """The part's tensor of that name; asking for its blocks sends them from its rank to rank 0."""
    view = model_state.tables.part_view(part, name)
    shape = (part.num_rows, *model_state.tables.row_shapes(part)[name])
    return StreamedTensor(shape, row_blocks_on_first(model_state.process, view, shape, part.rank))


def check_model_paths(load: str, save: str) -> None:
    """Raise a UserError for a bad path before training, not after hours of it.

    Args:
        load: the file of --load-model; empty: none.
        save: the file of --save-model, which need not exist; empty: none. If it is a link, the
            link stays and its target is written.
    """
    flag = f"--load-model={load}"
    try:
        if load and not Path(load).is_file():
            reason = "is not a regular file" if Path(load).exists() else "no such file"
            raise UserError(f"{flag}: {reason}")
    except OSError as error:
        raise UserError(f"{flag}: {reason_of(error)}") from error
    if save:
        check_place(f"{FLAG}={save}", Path(save))


def write_content(path: Path, content: dict[str, Any], vocabulary: VocabularySource | None) -> None:
    """Write what `make_content` returned to --save-model's path; a link's target is written.

    The vocabulary follows when the model is complete but for its name: if the disk is full, the
    model that was there before keeps its own.

    Args:
        path: the model file's.
        content: what it holds.
        vocabulary: what lies beside it; None: nothing.

    Raises:
        RankError: it cannot be written; what was there before is kept.
    """

    def write(file: BinaryIO) -> None:
        write_streamed(file, content)
        if vocabulary is not None:
            write_vocabulary(vocabulary, path)

    try:
        write_whole([(target_of(path), write)])
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and says_that_a_rank_has_gone(error):
            raise  # its rows were to come from there; the file is not at fault
        raise RankError(
            f"--save-model={path}: cannot write it ({reason_of(error)});"
            " what was there before is kept"
        ) from error


def vocabulary_of(path: Path) -> Path:
    """The file beside a model file that has the categories of its tables' rows.

    That of `DLRM.pth` is `DLRM.vocabulary`. Other names stay whole: that of `DLRM.pth.1`, which a
    better model has been moved to, is `DLRM.pth.1.vocabulary`.
    """
    ending = ".vocabulary"
    return path.with_suffix(ending) if path.suffix in ENDINGS else Path(f"{path}{ending}")


def write_vocabulary(vocabulary: VocabularySource, path: Path, flag: str = FLAG) -> None:
    """Write the vocabulary beside a model file, unless it is there already.

    Args:
        vocabulary: the categories of the model's rows.
        path: the model file's.
        flag: the one that names it.

    Raises:
        RankError: it cannot be written.
    """
    beside = vocabulary_of(target_of(path))
    try:
        vocabulary.write_beside(beside)
    except OSError as error:
        raise RankError(
            f"{flag}={path}: cannot write {beside} ({reason_of(error)});"
            " what was there before is kept"
        ) from error


def _row_states(model_state: ModelState) -> list[tuple[Part, dict[str, str]]]:
    """(part, names) of each state of rows: of all parts, then of their pooling weights.

    `names` has the name of each of the part's tensors by the key that it has in the state.
    """
    tables = model_state.tables
    states = []
    for prefix in ("", "pooling.") if tables.learned_pooling else ("",):
        for part in tables.parts:
            states.append((part, names_of_state(tables.row_shapes(part), prefix)))
    return states


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


# ---------------------------------------------------------------- loading


def load_parameters(
    path: str, model: nn.Module, tables: EmbeddingTables, process: Process
) -> Progress:
    """Load a model file's parameters into a model that is not trained.

    Args:
        path: where the file is.
        model: what is loaded into.
        tables: its embedding tables.
        process: this rank.

    Returns:
        Where the run was that saved it.

    Raises:
        UserError: it is no model file, or does not fit the model.
        RankError: numbers of a table that only this rank holds are wrong.
    """
    content = SavedContent(path)
    parameters = content.parameters(_wanted_parameters(model, tables, process))
    content.check_joins(tables.joins)
    model.load_state_dict(parameters, strict=False)
    return Progress(content.epoch, content.iter)


def load_model_file(path: str, model_state: ModelState, accumulate: int) -> Progress:
    """Load a model file into a model that is trained on: optimiser, generators, loss scale too.

    Args:
        path: where the file is.
        model_state: what is loaded into.
        accumulate: batches that make an optimiser step.

    Returns:
        The progress of the run that saved it.

    Raises:
        UserError: it is no model file, or does not fit the model, the optimiser or the data.
        RankError: numbers of a table that only this rank holds are wrong.
    """
    content = SavedContent(path)
    model, tables = model_state.model, model_state.tables
    parameters = content.parameters(_wanted_parameters(model, tables, model_state.process))
    content.check_joins(tables.joins)
    content.check_length(model_state.num_batches)
    progress = content.progress(accumulate)
    scale = content.loss_scale()
    states = content.optimizer_states(model_state.optimizer_name, _wanted_states(model_state))
    content.restore_generators()
    model.load_state_dict(parameters, strict=False)
    _load_states(states, model_state)
    model_state.scale.restore(scale)
    return progress


def _fault_of(part: Part, process: Process) -> type[UserError] | None:
    """The error if numbers of the part are wrong: its rank alone reads them."""
    return RankError if part.rank == process.rank else None


def _wanted_parameters(
    model: nn.Module, tables: EmbeddingTables, process: Process
) -> dict[str, Wanted]:
    wanted = {}
    for part in tables.parts:
        fault = _fault_of(part, process)
        wanted[f"emb_l.{part.key}"] = Wanted((part.num_rows, part.dim), fault)
        if tables.learned_pooling:
            wanted[f"v_W_l.{part.table}"] = Wanted((part.num_rows,), fault)
    return wanted | {name: Wanted(tuple(value.shape)) for name, value in model.named_parameters()}


def _wanted_states(model_state: ModelState) -> dict[int, dict[str, Wanted]]:
    """The tensors of each parameter's optimiser state, by its number in the file."""
    wanted: dict[int, dict[str, Wanted]] = {}
    row_states = _row_states(model_state)
    for number, (part, names) in enumerate(row_states):
        fault, shapes = _fault_of(part, model_state.process), model_state.tables.row_shapes(part)
        of_rows = {
            key: Wanted((part.num_rows, *shapes[name]), fault, lowest=0.0)
            for key, name in names.items()
        }
        if of_rows:
            wanted[number] = of_rows
    for number, of_parameter in enumerate(model_state.dense_optimizer.state, len(row_states)):
        wanted[number] = {
            name: Wanted(tuple(value.shape), lowest=0.0) for name, value in of_parameter.items()
        }
    return wanted


def _load_states(states: dict[int, dict[str, torch.Tensor]], model_state: ModelState) -> None:
    """Copy optimiser states, numbered as in the file, to the optimisers."""
    row_states = _row_states(model_state)
    for number, (part, names) in enumerate(row_states):
        for key, name in names.items():
            view = model_state.tables.part_view(part, name)
            if view is not None:
                view.copy_(states[number][key])
    offset = len(row_states)
    dense = {number - offset: state for number, state in states.items() if number >= offset}
    model_state.dense_optimizer.load_state_dict(dense)
