"""Model files: one file with the original's keys, however many ranks there are.

Seven keys are ours: `progress` (batches done and best metrics), `since_best` (evaluations since the
best accuracy, the best AUC), `generators`, `loss_scale`, `joins` (how each table's matrices are
joined: those of --qr-operation=mult look like those of add), `initial_values` (the flag of that
name, when tables were drawn) and `serving` (what has to be known to score rows). A file of the
original has none of them: a run continues from its epoch and iter.
The categories of the tables' rows are in a file of their own, `DLRM.vocabulary` beside `DLRM.pth`.
"""

import itertools
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
from engine.value_checks import LARGEST, Wanted
from model.embedding_tables import EmbeddingTables
from optim.dense import DenseOptimizer
from optim.loss_scale import NoScale
from ranks.collectives import row_blocks_on_first
from ranks.placement import Matrix
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
    for key, value in _table_parameters(model_state).items():
        gathered = _gathered(value)
        if gathered is not None:
            yield key, gathered
    if model_state.process.is_first:
        yield from _dense_parameters(model_state)


def _gathered(tensor: StreamedTensor) -> torch.Tensor | None:
    """The tensor on rank 0's host, None on other ranks. All ranks call it."""
    whole, begin = None, 0
    for block in tensor.blocks:
        whole = torch.empty(tensor.shape) if whole is None else whole
        whole[begin : begin + len(block)] = block
        begin += len(block)
    return whole


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
            progress, {key: _streamed(model_state, matrix, name) for key, name in names.items()}
        )
        for matrix, names in _row_states(model_state)
    ]
    parameters: dict[str, Value] = {**_table_parameters(model_state)}
    parameters |= _dense_parameters(model_state)
    states += [_on_host(dense["state"].get(number, {})) for number in group["params"]]
    return make_content(facts, parameters, states)


def _table_parameters(model_state: ModelState) -> dict[str, StreamedTensor]:
    """The parameters of tables by their keys."""
    tables = model_state.tables
    values = {
        f"emb_l.{matrix.key}": _streamed(model_state, matrix, "weight")
        for matrix in tables.all_matrices
    }
    if tables.learned_pooling:
        values |= {
            f"v_W_l.{matrix.table}": _streamed(model_state, matrix, "pooling")
            for matrix in tables.all_matrices
        }
    return values


def _dense_parameters(model_state: ModelState) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model_state.model.named_parameters():
        yield name, value.detach().cpu().clone()


def _streamed(model_state: ModelState, matrix: Matrix, name: str) -> StreamedTensor:
    """A matrix's tensor of that name; asking for its blocks sends them to rank 0."""
    tables = model_state.tables
    of_row = tables.row_shapes(matrix)[name]
    blocks = (
        row_blocks_on_first(
            model_state.process,
            tables.part_view(part, name),
            (part.num_rows, *of_row),
            0 if part.is_shared else part.rank,
        )
        for part in tables.parts_of(matrix)
    )
    return StreamedTensor((matrix.num_rows, *of_row), itertools.chain.from_iterable(blocks))


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


def _row_states(model_state: ModelState) -> list[tuple[Matrix, dict[str, str]]]:
    """(matrix, names) of each state of rows: of all matrices, then of their pooling weights.

    `names` has the name of each of the matrix's tensors by the key that it has in the state.
    """
    tables = model_state.tables
    states = []
    for prefix in ("", "pooling.") if tables.learned_pooling else ("",):
        for matrix in tables.all_matrices:
            states.append((matrix, names_of_state(tables.row_shapes(matrix), prefix)))
    return states


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    """The state in memory of its own: files have the whole memory that a tensor is a part of."""
    return {
        name: value.cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


# ---------------------------------------------------------------- loading


def load_parameters(path: str, model: nn.Module, tables: EmbeddingTables) -> Progress:
    """Load a model file's parameters into a model that is not trained.

    Args:
        path: where the file is.
        model: what is loaded into.
        tables: its embedding tables.

    Returns:
        Where the run was that saved it.

    Raises:
        UserError: it is no model file, or does not fit the model.
        RankError: numbers of a table that only this rank holds are wrong.
    """
    content = SavedContent(path)
    parameters = content.parameters(_wanted_parameters(model, tables))
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
    parameters = content.parameters(_wanted_parameters(model, tables))
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


def _wanted(
    tables: EmbeddingTables, matrix: Matrix, of_row: tuple[int, ...], lowest: float = -LARGEST
) -> Wanted:
    """A matrix's tensor with rows of that shape, of which this rank reads those that it holds."""
    rank, shape = tables.exchange.process.rank, (matrix.num_rows, *of_row)
    own = [part for part in tables.parts_of(matrix) if part.is_on(rank)]
    if not own:
        return Wanted(shape, None, lowest)
    (part,) = own
    fault = UserError if part.is_shared else RankError
    return Wanted(shape, fault, lowest, range(part.begin, part.end))


def _wanted_parameters(model: nn.Module, tables: EmbeddingTables) -> dict[str, Wanted]:
    wanted = {}
    for matrix in tables.all_matrices:
        wanted[f"emb_l.{matrix.key}"] = _wanted(tables, matrix, (matrix.dim,))
        if tables.learned_pooling:
            wanted[f"v_W_l.{matrix.table}"] = _wanted(tables, matrix, ())
    return wanted | {name: Wanted(tuple(value.shape)) for name, value in model.named_parameters()}


def _wanted_states(model_state: ModelState) -> dict[int, dict[str, Wanted]]:
    """The tensors of each parameter's optimiser state, by its number in the file."""
    wanted: dict[int, dict[str, Wanted]] = {}
    tables, row_states = model_state.tables, _row_states(model_state)
    for number, (matrix, names) in enumerate(row_states):
        shapes = tables.row_shapes(matrix)
        of_rows = {
            key: _wanted(tables, matrix, shapes[name], lowest=0.0) for key, name in names.items()
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
    tables, row_states = model_state.tables, _row_states(model_state)
    for number, (matrix, names) in enumerate(row_states):
        for part, (key, name) in itertools.product(tables.parts_of(matrix), names.items()):
            view = tables.part_view(part, name)
            if view is not None:
                view.copy_(states[number][key][part.begin : part.end])
    offset = len(row_states)
    dense = {number - offset: state for number, state in states.items() if number >= offset}
    model_state.dense_optimizer.load_state_dict(dense)
