"""Model files: one file with the original's keys, whatever the ranks; and what resuming needs.

`progress` (ours) holds the place in the data, the best metrics and the generators; a file of the
original has none and continues from its epoch and iter.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import RankError, UserError
from engine.progress import Progress
from model.embedding_tables import EmbeddingTables
from optim.dense import DenseOptimizer
from optim.loss_scale import NoScale
from ranks.collectives import send_to_first
from ranks.process import Process


@dataclass(frozen=True)
class ModelState:
    """What a model file holds: model, optimiser, how long an epoch and an evaluation are."""

    process: Process
    model: nn.Module
    tables: EmbeddingTables
    dense_optimizer: DenseOptimizer
    optimizer_name: str
    num_epochs: int
    num_batches: int
    num_test_batches: int
    scale: NoScale = field(default_factory=NoScale)


def full_state_dict(trained: ModelState) -> dict[str, torch.Tensor]:
    """The whole model's state dict on rank 0's host, empty elsewhere; every rank takes part."""
    state = {f"emb_l.{table}.weight": value for table, value in _gather(trained, "weight").items()}
    if trained.tables.pooling is not None:
        state |= {f"v_W_l.{table}": value for table, value in _gather(trained, "pooling").items()}
    if not trained.process.is_first:
        return {}
    return state | {
        name: value.detach().cpu().clone() for name, value in trained.model.named_parameters()
    }


def _gather(trained: ModelState, name: str) -> dict[int, torch.Tensor]:
    """A tensor with a row for each row of a table, of all tables, on rank 0."""
    whole = trained.tables.tensors()[name]
    gathered = {}
    for shard, view in trained.tables.shard_views(name):
        host = None if view is None else view.detach().to("cpu", copy=True)
        like = torch.empty((shard.end - shard.begin, *whole.shape[1:]), dtype=whole.dtype)
        received = send_to_first(trained.process, host, like, shard.rank)
        if received is not None:
            gathered[shard.table] = received
    return gathered


def save_model_file(path: str, trained: ModelState, progress: Progress) -> None:
    """Write the model file on rank 0: complete or as it was; every rank takes part.

    Raises:
        UserError: it cannot be written.
    """
    state = full_state_dict(trained)
    optimizer_state = _optimizer_state(trained, progress)
    if not trained.process.is_first:
        return
    content = {
        "epoch": progress.epoch,
        "iter": progress.iter,
        "nepochs": trained.num_epochs,
        "nbatches": trained.num_batches,
        "nbatches_test": trained.num_test_batches,
        "state_dict": state,
        "train_loss": progress.train_loss,
        "total_loss": 0.0,  # of the rows since the last line: a file is written right after one
        "test_acc": progress.accuracy,
        "test_auc": progress.auc,
        "opt_state_dict": optimizer_state,
        "progress": {name: value for name, value in asdict(progress).items() if name != "saved"},
        "generators": _generators(),
        "loss_scale": trained.scale.state(),
    }
    _write(Path(path), content)


def _write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        raise RankError(
            f"--save-model={path}: cannot write it ({_reason(error)});"
            " what was there before is kept"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """The system's words, where torch's writer has wrapped them into its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__


def _generators() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    numpy_state = (
        str(state["bit_generator"]),
        torch.from_numpy(state["state"]["key"].astype(np.int64)),
        int(state["state"]["pos"]),
        int(state["has_gauss"]),
        float(state["gauss"]),
    )
    return {"numpy": numpy_state, "torch": torch.get_rng_state()}


def _optimizer_state(trained: ModelState, progress: Progress) -> dict[str, Any]:
    """torch's optimiser state dict on rank 0: tables, pooling weights, dense parameters."""
    dense = trained.dense_optimizer.state_dict()
    states: list[dict[str, Any]] = []
    for prefix, names in _row_states(trained):
        gathered = {name.removeprefix(prefix): _gather(trained, name) for name in names}
        for table in range(len(trained.tables.shards)):
            state = {name: values[table] for name, values in gathered.items() if table in values}
            states.append(
                {"step": torch.tensor(float(progress.num_steps)), **state} if state else {}
            )
    offset = len(states)
    group = dense["param_groups"][0]
    states += [dense["state"].get(number, {}) for number in group["params"]]
    return {
        "state": {number: _on_host(state) for number, state in enumerate(states) if state},
        "param_groups": [group | {"params": list(range(offset + len(group["params"])))}],
    }


_WEIGHTS = ("weight", "pooling")


def _row_states(trained: ModelState) -> list[tuple[str, list[str]]]:
    """Prefix and names of row-wise optimiser state: of tables, then of pooling weights."""
    prefixes = [""] if trained.tables.pooling is None else ["", "pooling."]
    states = [name for name in trained.tables.tensors() if name not in _WEIGHTS]
    return [(prefix, [n for n in states if ("." in n) == bool(prefix)]) for prefix in prefixes]


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


# ---------------------------------------------------------------- loading


def load_model_file(path: str, trained: ModelState, accumulate: int, resume: bool) -> Progress:
    """Load a model file; gives the progress.

    To resume, the optimiser and the generators are loaded too; `accumulate` batches make a step.

    Raises:
        UserError: it is no model file, or does not fit the model, the optimiser or the data.
    """
    content = _read(path)
    try:
        _check_state(path, content["state_dict"], trained)
        progress = _progress(content, accumulate) if resume else _place(content)
        trained.model.load_state_dict(content["state_dict"], strict=False)
        if resume:
            _check_length(path, content, trained)
            _load_optimizer(path, content, trained)
            _restore_generators(content.get("generators"))
            trained.scale.restore(content.get("loss_scale", []))
    except _DAMAGES as error:
        raise UserError(f"--load-model={path} is damaged or foreign ({_reason(error)})") from error
    return progress


_DAMAGES = (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError)


@contextlib.contextmanager
def _numpy_scalars_allowed() -> Iterator[None]:
    """The original's files hold metrics as numpy scalars; nothing else of numpy is let in."""
    # numpy moved it between versions, files name either place
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    names = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
    ]
    with torch.serialization.safe_globals([*names, *dtypes]):  # type: ignore[list-item]
        yield


def _read(path: str) -> dict[str, Any]:
    try:
        with _numpy_scalars_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols of files that are none
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # torch's old format cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--load-model={path}: cannot read it ({_reason(error)})") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"--load-model={path} is not a readable model file ({_reason(error)})"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(
            f"--load-model={path} is not a model file of this program: it has no state_dict"
        )
    missing = [
        key for key in ("epoch", "iter", "nbatches") if not isinstance(content.get(key), int)
    ]
    if missing:
        raise UserError(
            f"--load-model={path} is not a model file of this program: it lacks {missing[0]}"
        )
    return content


def _expected_shapes(trained: ModelState) -> dict[str, tuple[int, ...]]:
    shards, dim = trained.tables.shards, trained.tables.dim
    shapes: dict[str, tuple[int, ...]] = {
        f"emb_l.{s.table}.weight": (s.end - s.begin, dim) for s in shards
    }
    if trained.tables.pooling is not None:
        shapes |= {f"v_W_l.{s.table}": (s.end - s.begin,) for s in shards}
    return shapes | {name: tuple(value.shape) for name, value in trained.model.named_parameters()}


def _check_state(path: str, state: dict[str, Any], trained: ModelState) -> None:
    wanted = _expected_shapes(trained)
    for name, shape in wanted.items():
        if name not in state:
            raise UserError(
                f"--load-model={path} has no {name}:"
                " it was made with other widths, tables or pooling",
            )
        got = tuple(getattr(state[name], "shape", ()))
        if got != shape:
            raise UserError(
                f"--load-model={path}: {name} has shape {got} there, {shape} in this model"
            )
    if extra := sorted(set(state) - set(wanted), key=str):
        raise UserError(
            f"--load-model={path} has {extra[0]}, which this model lacks: give the flags it had",
        )


def _check_length(path: str, content: dict[str, Any], trained: ModelState) -> None:
    if content["nbatches"] != trained.num_batches:
        raise UserError(
            f"--load-model={path} was made with {content['nbatches']} batches an epoch,"
            f" this run has {trained.num_batches}:"
            " continue with the same data and --mini-batch-size",
        )


def _place(content: dict[str, Any]) -> Progress:
    """Of a model that is only evaluated: where it was saved, and no best metrics but its own."""
    return Progress(content["epoch"], content["iter"])


def _progress(content: dict[str, Any], accumulate: int) -> Progress:
    if "progress" in content:
        return Progress(**content["progress"])
    epoch, it, num_batches = content["epoch"], content["iter"], content["nbatches"]
    steps = epoch * -(-num_batches // accumulate) + -(-it // accumulate)
    return Progress(epoch, it, num_steps=steps, resume_iter=it)


def _load_optimizer(path: str, content: dict[str, Any], trained: ModelState) -> None:
    states = content.get("opt_state_dict", {}).get("state", {})
    num_tables = len(trained.tables.shards)
    row_states = _row_states(trained)
    for position, (prefix, names) in enumerate(row_states):
        of_tables = [states.get(position * num_tables + table, {}) for table in range(num_tables)]
        for name in names:
            _load_rows(path, of_tables, (prefix, name), trained)
    _load_dense(path, states, len(row_states) * num_tables, trained)


def _load_rows(
    path: str, states: list[dict[str, Any]], tensor: tuple[str, str], trained: ModelState
) -> None:
    """Optimiser state by table into the tensor of that (prefix, name)."""
    prefix, name = tensor
    for shard, view in trained.tables.shard_views(name):
        value = _state_of(path, states[shard.table], name.removeprefix(prefix), trained)
        if view is not None:
            view.copy_(value.reshape(view.shape))


def _load_dense(path: str, states: dict[int, Any], offset: int, trained: ModelState) -> None:
    """Optimiser state of the dense parameters, whose numbers begin at `offset`."""
    if trained.optimizer_name == "sgd":
        if states:
            raise UserError(
                f"--load-model={path} was trained with adagrad or rwsadagrad:"
                " give that --optimizer",
            )
        return
    dense = {number - offset: state for number, state in states.items() if number >= offset}
    trained.dense_optimizer.load_state_dict(dense)


def _state_of(path: str, state: dict[str, Any], name: str, trained: ModelState) -> torch.Tensor:
    if name not in state:
        raise UserError(
            f"--load-model={path} was not trained with --optimizer={trained.optimizer_name}"
            f" (it has no {name} of the tables): give the one it was trained with",
        )
    value: torch.Tensor = state[name]
    return value


def _restore_generators(generators: dict[str, Any] | None) -> None:
    if generators:
        name, keys, position, has_gauss, gauss = generators["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(generators["torch"])
