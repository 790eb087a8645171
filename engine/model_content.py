"""What stands in a model file, made of plain values and of tensors wherever they come from.

A run makes it of its model; what has no model, but its values and its tables' rows, can do so too.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from engine.progress import Progress
from engine.streamed_file import StreamedTensor

# of Progress; the loading side takes these and no others, so that is what all versions write.
# Counts for --patience have a key of their own, SINCE_BEST: versions before it read past that key,
# and their files, which lack it, are read as if the best had just been found.
PROGRESS_NAMES = (
    "epoch", "iter", "num_steps", "resume_iter", "train_loss", "best_accuracy", "best_auc",
    "accuracy", "auc",
)  # fmt: skip

SINCE_BEST = "since_best"
WEIGHTS = ("weight", "pooling")  # names of row tensors that are parameters, not state
SERVING = "serving"  # the key of the serving facts
INITIAL_VALUES = "initial_values"
SEEDED, ORIGINAL = "seeded", "original"  # what it may be; files without it are the original's
Value = torch.Tensor | StreamedTensor


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a model file tells about its run, beside the model's tensors.

    Attributes:
        progress: how far training is.
        num_epochs: epochs of the run.
        num_batches: batches of an epoch.
        num_test_batches: batches of an evaluation.
        settings: the optimiser's, with its learning rate as `lr`: torch's parameter group without
            its parameters.
        generators: what `packed_generators` returns.
        loss_scale: [scale, steps since it last changed]; [] without a scale.
        joins: how each table's parts are joined.
        serving: what `ServingFacts.to_json` returns; None: it is not known.
    """

    progress: Progress
    num_epochs: int
    num_batches: int
    num_test_batches: int
    settings: Mapping[str, Any]
    generators: Mapping[str, Any]
    loss_scale: Sequence[float]
    joins: Sequence[str]
    serving: Mapping[str, Any] | None = None


def make_content(
    facts: RunFacts, parameters: Mapping[str, Value], states: Sequence[Mapping[str, Value]]
) -> dict[str, Any]:
    """The content of a model file, whose keys are the original's and seven of ours.

    Args:
        facts: what it tells beside tensors.
        parameters: all parameters by their keys: parts of tables, pooling weights, the MLPs'.
        states: the optimiser's state of each parameter, in the same order; empty: it has none.
    """
    progress = facts.progress
    numbers = list(range(len(states)))
    return {
        "epoch": progress.epoch,
        "iter": progress.iter,
        "nepochs": facts.num_epochs,
        "nbatches": facts.num_batches,
        "nbatches_test": facts.num_test_batches,
        "state_dict": dict(parameters),
        "train_loss": progress.train_loss,
        "total_loss": 0.0,  # since the last log line, right after which files are written
        "test_acc": progress.accuracy,
        "test_auc": progress.auc,
        "opt_state_dict": {
            "state": {number: dict(states[number]) for number in numbers if states[number]},
            "param_groups": [{**facts.settings, "params": numbers}],
        },
        "progress": {name: asdict(progress)[name] for name in PROGRESS_NAMES},
        SINCE_BEST: [progress.since_best_accuracy, progress.since_best_auc],
        "generators": dict(facts.generators),
        "loss_scale": list(facts.loss_scale),
        "joins": list(facts.joins),
        INITIAL_VALUES: SEEDED if progress.is_seeded else ORIGINAL,
        **({SERVING: dict(facts.serving)} if facts.serving is not None else {}),
    }


def names_of_state(names: Iterable[str], prefix: str) -> dict[str, str]:
    """{key in the optimiser's state: name of the row tensor}.

    Keys are interned: a pickle tells equal texts from the same one.

    Args:
        names: those of a part's row tensors.
        prefix: empty: the part's state; `pooling.`: that of its pooling weights.
    """
    return {
        sys.intern(name.removeprefix(prefix)): name
        for name in names
        if name not in WEIGHTS and name.startswith(prefix) and ("." in name) == bool(prefix)
    }


def state_of_rows(progress: Progress, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The optimiser's state of a part or of its pooling weights; empty if it has no tensors."""
    return {"step": torch.tensor(float(progress.num_steps)), **tensors} if tensors else {}


def packed_generators(numpy_state: Mapping[str, Any], torch_state: torch.Tensor) -> dict[str, Any]:
    """The states of the global generators as torch can load them.

    Args:
        numpy_state: what `np.random.get_state(legacy=False)` returns; a list of 624 numbers serves
            as the key.
        torch_state: what `torch.get_rng_state()` returns, bytes.
    """
    keys = np.asarray(numpy_state["state"]["key"]).astype(np.int64)
    packed = (
        str(numpy_state["bit_generator"]),
        torch.from_numpy(keys),
        int(numpy_state["state"]["pos"]),
        int(numpy_state["has_gauss"]),
        float(numpy_state["gauss"]),
    )
    return {"numpy": packed, "torch": torch_state}
