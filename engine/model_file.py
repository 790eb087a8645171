"""Model files: one file with the original's keys, however many ranks there are.

Three keys are ours, for resuming: `progress` (batches done and best metrics), `generators` and
`loss_scale`. A file of the original has none of them: a run continues from its epoch and iter.
"""

import contextlib
import os
import stat
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
from ranks.placement import Part
from ranks.process import Process

_WEIGHTS = ("weight", "pooling")  # names of row tensors that are parameters, not state
# what reading the content of a damaged or foreign file can raise
_DAMAGES = (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError)


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


def full_state_dict(model_state: ModelState) -> dict[str, torch.Tensor]:
    """The whole model's state dict, on rank 0's host; empty on other ranks. All ranks call it."""
    state = {f"emb_l.{part.key}": value for part, value in _gather(model_state, "weight").items()}
    if model_state.tables.matrix.pooling is not None:
        pooling = _gather(model_state, "pooling")
        state |= {f"v_W_l.{part.table}": value for part, value in pooling.items()}
    if not model_state.process.is_first:
        return {}
    return state | {
        name: value.detach().cpu().clone() for name, value in model_state.model.named_parameters()
    }


def _gather(model_state: ModelState, name: str) -> dict[Part, torch.Tensor]:
    """The rows of each part in one of the tables' `row_tensors`, on rank 0; empty on others."""
    own = model_state.tables.row_tensors()[name]
    gathered = {}
    for part, view in model_state.tables.part_views(name):
        host = None if view is None else view.detach().to("cpu", copy=True)
        like = torch.empty((part.num_rows, *own.shape[1:]), dtype=own.dtype)
        received = send_to_first(model_state.process, host, like, part.rank)
        if received is not None:
            gathered[part] = received
    return gathered


def save_model_file(path: str, model_state: ModelState, progress: Progress) -> None:
    """Write the model file, on rank 0. All ranks call it.

    Raises:
        RankError: the file cannot be written; the one that was there before is kept.
    """
    state = full_state_dict(model_state)
    optimizer_state = _optimizer_state(model_state, progress)
    if not model_state.process.is_first:
        return
    content = {
        "epoch": progress.epoch,
        "iter": progress.iter,
        "nepochs": model_state.num_epochs,
        "nbatches": model_state.num_batches,
        "nbatches_test": model_state.num_test_batches,
        "state_dict": state,
        "train_loss": progress.train_loss,
        "total_loss": 0.0,  # since the last log line, right after which files are written
        "test_acc": progress.accuracy,
        "test_auc": progress.auc,
        "opt_state_dict": optimizer_state,
        "progress": {name: value for name, value in asdict(progress).items() if name != "saved"},
        "generators": _generators(),
        "loss_scale": model_state.scale.state(),
    }
    _write(Path(path), content)


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
        flag = f"--save-model={save}"
        if save:
            _check_place(Path(save))
    except OSError as error:
        raise UserError(f"{flag}: {_reason(error)}") from error


def _check_place(path: Path) -> None:
    kind = path.stat().st_mode if path.exists() else stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise UserError(f"--save-model={path} is a folder: name a file")
    if not stat.S_ISREG(kind):
        raise UserError(
            f"--save-model={path} is a device, pipe or socket, which a model file cannot replace:"
            " name a regular file or a new one"
        )
    target = _target(path)
    if target.is_symlink():
        raise UserError(f"--save-model={path} is a link that leads to itself: name a file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "is not writable" if target.parent.is_dir() else "does not exist"
        raise UserError(f"--save-model={path}: its folder {reason}")
    partial = _partial(target)
    with contextlib.suppress(FileNotFoundError):  # its name may be too long where path's is not
        if not stat.S_ISREG(partial.lstat().st_mode):
            raise UserError(
                f"--save-model={path} is written to {partial} first, and {partial.name} is not a"
                " regular file: remove it or name another file"
            )


def _target(path: Path) -> Path:
    """The path itself or, if it is a link, the file that it leads to, which need not exist."""
    return Path(os.path.realpath(path))


def _partial(path: Path) -> Path:
    """The file that becomes `path` by a rename as soon as it is complete."""
    return path.with_name(path.name + ".partial")


def _write(path: Path, content: dict[str, Any]) -> None:
    target = _target(path)
    partial = _partial(target)
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:
        raise RankError(
            f"--save-model={path}: cannot write it ({_reason(error)});"
            " what was there before is kept"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What went wrong, in the system's own words if torch has wrapped them into others."""
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


def _optimizer_state(model_state: ModelState, progress: Progress) -> dict[str, Any]:
    """torch's optimiser state dict, on rank 0.

    Parameters are numbered in the order tables, pooling weights, dense parameters.
    """
    dense = model_state.dense_optimizer.state_dict()
    states: list[dict[str, Any]] = []
    for prefix, names in _row_states(model_state):
        gathered = {name.removeprefix(prefix): _gather(model_state, name) for name in names}
        for part in model_state.tables.parts:
            state = {name: values[part] for name, values in gathered.items() if part in values}
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


def _row_states(model_state: ModelState) -> list[tuple[str, list[str]]]:
    """(prefix, names) of the optimiser's row tensors: for the tables, then for pooling weights."""
    prefixes = [""] if model_state.tables.matrix.pooling is None else ["", "pooling."]
    states = [name for name in model_state.tables.row_tensors() if name not in _WEIGHTS]
    return [(prefix, [n for n in states if ("." in n) == bool(prefix)]) for prefix in prefixes]


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


# ---------------------------------------------------------------- loading


def load_model_file(path: str, model_state: ModelState, accumulate: int, resume: bool) -> Progress:
    """Load a model file into the model.

    Args:
        path: where the file is.
        model_state: what is loaded into.
        accumulate: batches that make an optimiser step.
        resume: optimiser, generators and loss scale are loaded too.

    Returns:
        The progress of the run that saved it.

    Raises:
        UserError: it is no model file, or does not fit the model, the optimiser or the data.
    """
    content = _read(path)
    try:
        _check_state(path, content["state_dict"], model_state)
        if resume:
            progress = _progress_to_resume(content, accumulate)
        else:  # an evaluation only, which has best metrics of its own
            progress = Progress(content["epoch"], content["iter"])
        model_state.model.load_state_dict(content["state_dict"], strict=False)
        if resume:
            _check_length(path, content, model_state)
            _load_optimizer(path, content, model_state)
            _restore_generators(content.get("generators"))
            model_state.scale.restore(content.get("loss_scale", []))
    except _DAMAGES as error:
        raise UserError(f"--load-model={path} is damaged or foreign ({_reason(error)})") from error
    return progress


@contextlib.contextmanager
def _numpy_scalars_allowed() -> Iterator[None]:
    """Let torch read numpy's scalars, which the metrics in the original's files are."""
    # numpy has moved the function that makes a scalar, so a file may name either module
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
            warnings.simplefilter("ignore")  # torch's, about the pickle protocol of foreign files
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


def _expected_shapes(model_state: ModelState) -> dict[str, tuple[int, ...]]:
    parts = model_state.tables.parts
    shapes: dict[str, tuple[int, ...]] = {
        f"emb_l.{part.key}": (part.num_rows, part.dim) for part in parts
    }
    if model_state.tables.matrix.pooling is not None:
        shapes |= {f"v_W_l.{part.table}": (part.num_rows,) for part in parts}
    return shapes | {
        name: tuple(value.shape) for name, value in model_state.model.named_parameters()
    }


def _check_state(path: str, state: dict[str, Any], model_state: ModelState) -> None:
    wanted = _expected_shapes(model_state)
    for name, shape in wanted.items():
        if name not in state:
            raise UserError(
                f"--load-model={path} has no {name}:"
                " it was made with other widths, tables or pooling"
            )
        got = tuple(getattr(state[name], "shape", ()))
        if got != shape:
            raise UserError(
                f"--load-model={path}: {name} has shape {got} there, {shape} in this model"
            )
    if extra := sorted(set(state) - set(wanted), key=str):
        raise UserError(
            f"--load-model={path} has {extra[0]}, which this model lacks: give the flags it had"
        )


def _check_length(path: str, content: dict[str, Any], model_state: ModelState) -> None:
    if content["nbatches"] != model_state.num_batches:
        raise UserError(
            f"--load-model={path} was made with {content['nbatches']} batches an epoch,"
            f" this run has {model_state.num_batches}:"
            " continue with the same data and --mini-batch-size"
        )


def _progress_to_resume(content: dict[str, Any], accumulate: int) -> Progress:
    if "progress" in content:
        return Progress(**content["progress"])
    epoch, it, num_batches = content["epoch"], content["iter"], content["nbatches"]
    steps = epoch * -(-num_batches // accumulate) + -(-it // accumulate)
    return Progress(epoch, it, num_steps=steps, resume_iter=it)


def _load_optimizer(path: str, content: dict[str, Any], model_state: ModelState) -> None:
    states = content.get("opt_state_dict", {}).get("state", {})
    num_parts = len(model_state.tables.parts)
    row_states = _row_states(model_state)
    for k, (prefix, names) in enumerate(row_states):
        of_parts = [states.get(k * num_parts + number, {}) for number in range(num_parts)]
        for name in names:
            _load_rows(path, of_parts, (prefix, name), model_state)
    _load_dense(path, states, len(row_states) * num_parts, model_state)


def _load_rows(
    path: str, states: list[dict[str, Any]], names: tuple[str, str], model_state: ModelState
) -> None:
    """Copy optimiser state to the tables' row tensors.

    Args:
        path: where the file is.
        states: the optimiser's state of each part.
        names: (prefix, name) of the row tensor; in the states its name has no prefix.
        model_state: what is loaded into.
    """
    prefix, name = names
    for state, (_, view) in zip(states, model_state.tables.part_views(name), strict=True):
        value = _state_of(path, state, name.removeprefix(prefix), model_state)
        if view is not None:
            view.copy_(value.reshape(view.shape))


def _load_dense(path: str, states: dict[int, Any], offset: int, model_state: ModelState) -> None:
    """Load the optimiser state of the dense parameters, whose numbers begin at `offset`."""
    if model_state.optimizer_name == "sgd":
        if states:
            raise UserError(
                f"--load-model={path} was trained with adagrad or rwsadagrad: give that --optimizer"
            )
        return
    dense = {number - offset: state for number, state in states.items() if number >= offset}
    model_state.dense_optimizer.load_state_dict(dense)


def _state_of(path: str, state: dict[str, Any], name: str, model_state: ModelState) -> torch.Tensor:
    if name not in state:
        raise UserError(
            f"--load-model={path} was not trained with --optimizer={model_state.optimizer_name}"
            f" (it has no {name} of the tables): give the one it was trained with"
        )
    value: torch.Tensor = state[name]
    return value


def _restore_generators(generators: dict[str, Any] | None) -> None:
    if generators:
        name, keys, position, has_gauss, gauss = generators["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(generators["torch"])
