"""Makes a model file, one file for people, of a checkpoint; no model is built for it."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints.folder import VOCABULARY, Found, newest_in
from checkpoints.generators import states_of
from checkpoints.index import Index, NewerFormatError, damaged_index
from checkpoints.json_values import list_of, number_of, numbers_of, object_of, text_of, whole_of
from checkpoints.matrices import WEIGHT, MatrixShape, Shard
from checkpoints.run_state import progress_of
from checkpoints.shard_file import DamagedError, problem_of_safetensors, read_tensors
from common.errors import UserError
from common.launch import Launch
from common.whole_files import target_of
from criteo.vocabulary import VocabularySource
from criteo.vocabulary_file import Vocabulary
from engine.model_content import (
    RunFacts,
    Value,
    make_content,
    names_of_state,
    packed_generators,
    state_of_rows,
)
from engine.model_file import write_content
from engine.serving_facts import ServingFacts
from engine.streamed_file import StreamedTensor
from optim.dense import settings_of

FLAG = "--export-checkpoint"
TABLES, POOLING = "emb_l.", "pooling"


def check_export_options(options: argparse.Namespace) -> None:
    """Raise a UserError if the flags do not say where to export to, or say more than that."""
    if not options.export_checkpoint:
        return
    flag = f"{FLAG}={options.export_checkpoint}"
    if not options.save_model:
        raise UserError(f"{flag}: give --save-model=PATH too, the model file that it makes")
    if options.resume or options.checkpoint_dir or options.load_model:
        raise UserError(
            f"{flag} makes a model file and trains nothing: it takes neither --resume,"
            " --checkpoint-dir nor --load-model"
        )
    if problem := problem_of_safetensors():
        raise UserError(f"{flag}: {problem}")


def export_checkpoint(options: argparse.Namespace) -> int:
    """Write the model file; returns the exit status.

    Memory for two files of the checkpoint is needed. Of several ranks the first one writes.

    Raises:
        UserError: there is no whole checkpoint.
        RankError: the model file cannot be written; what was there before is kept.
    """
    if Launch.from_environment().rank:
        return 0
    source, target = Path(options.export_checkpoint), Path(options.save_model)
    try:
        candidates = newest_in(source)
    except UserError as error:
        raise UserError(f"{FLAG}: {error}") from error
    damage = ""
    for found in candidates:
        try:
            _export(found, target)
        except DamagedError as error:
            damage = str(error)
            if found is not candidates[-1]:
                print(f"warning: {damage}; the checkpoint before it is used", flush=True)
        else:
            print(f"model of {found.path} saved in {target}", flush=True)
            return 0
    raise UserError(f"{FLAG}={source}: no checkpoint is whole ({damage})")


def _export(found: Found, target: Path) -> None:
    path = found.path
    try:
        index = Index.read(path)
        serving = _serving_of(index)
        content = _content(_Rows(path, index), index, serving)
    except NewerFormatError as error:
        raise UserError(f"{FLAG}={path}: {error}") from error
    except (ValueError, OverflowError) as error:
        raise damaged_index(path, error) from error
    vocabulary = None
    if serving is not None and serving.vocabulary:
        # the path may be a link or `.`, whose parent is another folder
        vocabulary = _vocabulary_at(target_of(path).parent / VOCABULARY, serving)
    write_content(target, content, vocabulary)


def _serving_of(index: Index) -> ServingFacts | None:
    """What has to be known to score rows; None: an earlier version has not saved it."""
    value = index.state.get("serving")
    return None if value is None else ServingFacts.from_json(value)


def _vocabulary_at(source: Path, serving: ServingFacts) -> VocabularySource | None:
    """The vocabulary of a folder of checkpoints, or None if it is not there."""
    vocabulary = Vocabulary(source, serving.num_rows, serving.vocabulary)
    try:
        vocabulary.check()
    except UserError as error:
        print(f"warning: {error}; the model file will not score rows of text", flush=True)
        return None
    return VocabularySource.of_file(vocabulary)


class _Rows:
    """The rows of a checkpoint's matrices, read a file at a time.

    Args:
        folder: the checkpoint's.
        index: what it holds.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._files = folder, {file.name: file for file in index.files}
        self._shards: dict[str, list[tuple[Shard, str]]] = {}
        for file in index.files:
            for shard in file.shards:
                self._shards.setdefault(shard.key, []).append((shard, file.name))
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def tensor(self, key: str, shape: MatrixShape, name: str) -> StreamedTensor:
        """A matrix's tensor of that name, whose rows are read when they are asked for."""
        whole = (shape.num_rows, *shape.row_shapes[name])
        return StreamedTensor(whole, self._blocks(key, name, whole))

    def _blocks(self, key: str, name: str, whole: tuple[int, ...]) -> Iterator[torch.Tensor]:
        for shard, file in sorted(self._shards[key], key=lambda pair: pair[0].begin):
            try:
                yield shard.rows_in(self._tensors(file), name, whole[1:])
            except ValueError as error:
                raise DamagedError(f"{self._folder / file}: {error}") from error

    def _tensors(self, file: str) -> dict[str, torch.Tensor]:
        if self._last[0] != file:  # small matrices share a file
            self._last = ("", {})
            self._last = (file, read_tensors(self._folder / file, self._files[file].facts))
        return self._last[1]


def _content(rows: _Rows, index: Index, serving: ServingFacts | None) -> dict[str, Any]:
    """What the model file holds. Names are interned: a pickle tells equal texts from the same one.

    Raises:
        ValueError: the index's state is none of a run.
    """
    values = dict(index.state)
    optimizer = text_of(values, "optimizer")
    progress = progress_of(object_of(values, "progress"))
    facts = RunFacts(
        progress=progress,
        num_epochs=whole_of(values, "num_epochs"),
        num_batches=whole_of(values, "num_batches", lowest=1),
        num_test_batches=whole_of(values, "num_test_batches"),
        settings={"lr": number_of(values, "dense_lr"), **settings_of(optimizer)},
        generators=packed_generators(*states_of(object_of(values, "generators"))),
        loss_scale=numbers_of(values, "loss_scale")[:2],
        joins=[sys.intern(text_of({"join": join}, "join")) for join in list_of(values, "joins")],
        serving=serving.to_json() if serving is not None else None,
    )
    tables = {key: shape for key, shape in index.matrices.items() if key.startswith(TABLES)}
    dense = {key: shape for key, shape in index.matrices.items() if key not in tables}
    parameters: dict[str, Value] = {
        key: rows.tensor(key, shape, WEIGHT) for key, shape in tables.items()
    }
    for key, shape in tables.items():
        if POOLING in shape.row_shapes:
            table = key.removeprefix(TABLES).partition(".")[0]
            parameters[f"v_W_l.{table}"] = rows.tensor(key, shape, POOLING)
    parameters |= {key: rows.tensor(key, shape, WEIGHT) for key, shape in dense.items()}
    states = [
        state_of_rows(progress, _state(rows, key, shape, prefix))
        for prefix in ("", f"{POOLING}.")
        for key, shape in tables.items()
        if not prefix or POOLING in shape.row_shapes
    ]
    scalars = list_of(values, "dense_scalars")
    if len(scalars) not in (0, len(dense)):
        raise ValueError(f"dense_scalars are {len(scalars)}, expected {len(dense)}")
    for number, (key, shape) in enumerate(dense.items()):
        own = object_of({"dense_scalars": scalars[number]}, "dense_scalars") if scalars else {}
        of_parameter = {sys.intern(name): torch.tensor(number_of(own, name)) for name in own}
        states.append({**of_parameter, **_state(rows, key, shape, "")})
    return make_content(facts, parameters, states)


def _state(rows: _Rows, key: str, shape: MatrixShape, prefix: str) -> dict[str, Value]:
    """The optimiser's state of a matrix, or with a prefix that of its pooling weights."""
    names = names_of_state(shape.row_shapes, prefix)
    return {of_state: rows.tensor(key, shape, name) for of_state, name in names.items()}
