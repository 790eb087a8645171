"""What a run takes from a model file: every value is checked here, before anything uses it."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from engine.model_content import (
    INITIAL_VALUES,
    ORIGINAL,
    PROGRESS_NAMES,
    SEEDED,
    SERVING,
    SINCE_BEST,
)
from engine.progress import Progress
from engine.serving_facts import ServingFacts
from engine.value_checks import LARGEST, ValueChecks, Wanted, is_number, is_plain, shown
from optim.loss_scale import GROWTH_INTERVAL, HIGHEST_SCALE, LOWEST_SCALE

MOST = 10**12  # no run has more epochs, or batches in one of them
NUM_KEYS = 624  # numbers in the state of numpy's generator, MT19937


class SavedContent:
    """The content of a model file, whose values are checked as they are taken.

    Args:
        path: where the file is.

    Attributes:
        epoch: number of the epoch in which it was saved, from 0.
        iter: batches of this epoch that were done.
        num_batches: batches of an epoch.
        serving: what the file tells those who score rows, not checked yet; None: nothing.

    Raises:
        UserError: there is no model file, or its counts make no sense.
    """

    def __init__(self, path: str) -> None:
        self._path, self._check = path, ValueChecks(path)
        self._content = _read(path)
        for key in ("state_dict", "epoch", "iter", "nbatches"):
            if key not in self._content:
                raise UserError(
                    f"--load-model={path} is not a model file of this program: it lacks {key}"
                )
        self.serving: Any = self._content.get(SERVING)
        self.num_batches = self._check.whole("nbatches", self._content["nbatches"], MOST, 1)
        self.epoch = self._check.whole("epoch", self._content["epoch"], MOST)
        self.iter = self._check.whole("iter", self._content["iter"], self.num_batches)

    def parameters(self, wanted: Mapping[str, Wanted]) -> dict[str, torch.Tensor]:
        """The tensors of the state dict, of which it must have the wanted ones and no others.

        Raises:
            UserError: one is missing, or is no tensor of that shape.
            RankError: one of this rank's tables has numbers that are not finite.
        """
        state = self._check.dict_of("state_dict", self._content["state_dict"])
        for name, tensor in wanted.items():
            if name not in state:
                raise UserError(f"--load-model={self._path}{_what_lacks(name, state, wanted)}")
            self._check.tensor(name, state[name], tensor.shape)
        if extra := sorted(set(state) - set(wanted), key=shown):
            raise UserError(
                f"--load-model={self._path} has {shown(extra[0])}, which this model lacks:"
                " give the flags it had"
            )
        for name, tensor in wanted.items():
            self._check.numbers(name, state[name], tensor)
        return {name: state[name].detach() for name in wanted}

    def check_joins(self, joins: Sequence[str]) -> None:
        """Raise a UserError if a table's parts are joined in another way, as far as is known."""
        saved = self._content.get("joins", list(joins))
        if not isinstance(saved, list) or len(saved) != len(joins):
            raise self._check.fault("joins", shown(saved), f"a list of {len(joins)} words")
        for table, (there, here) in enumerate(zip(saved, joins, strict=True)):
            if there != here:
                raise UserError(
                    f"--load-model={self._path}: the parts of table {table} are joined by"
                    f" {shown(there)} there, by {here!r} in this model:"
                    " give the --qr-operation it was made with"
                )

    def check_length(self, num_batches: int) -> None:
        """Raise a UserError if an epoch of this run has another number of batches."""
        if self.num_batches != num_batches:
            raise UserError(
                f"--load-model={self._path} was made with {self.num_batches} batches an epoch,"
                f" this run has {num_batches}:"
                " continue with the same data and --mini-batch-size"
            )

    def progress(self, accumulate: int) -> Progress:
        """How far training was; a file of the original knows its epoch and iter only.

        Args:
            accumulate: batches that make an optimiser step, for a file of the original.
        """
        if "progress" not in self._content:
            steps = -(-self.num_batches // accumulate), -(-self.iter // accumulate)
            num_steps = self.epoch * steps[0] + steps[1]
            return Progress(self.epoch, self.iter, num_steps=num_steps, resume_iter=self.iter)
        found = self._check.dict_of("progress", self._content["progress"])
        self._check.names_of_numbers("progress", found, PROGRESS_NAMES)

        def count(name: str, most: int) -> int:
            return self._check.whole(f"progress.{name}", found[name], most)

        def number_or_nan(name: str, lowest: float, highest: float) -> float:
            return self._check.number(f"progress.{name}", found[name], lowest, highest, or_nan=True)

        epoch, it = count("epoch", MOST), count("iter", self.num_batches)
        if (epoch, it) != (self.epoch, self.iter):
            expected = f"{self.epoch} and {self.iter}, as the file's epoch and iter"
            raise self._check.fault("progress.epoch and .iter", f"{epoch} and {it}", expected)
        since_best = self._since_best()
        initial = self._content.get(INITIAL_VALUES, ORIGINAL)
        self._check.one_of(INITIAL_VALUES, initial, (ORIGINAL, SEEDED))
        return Progress(
            epoch=epoch,
            iter=it,
            num_steps=count("num_steps", epoch * self.num_batches + it),
            resume_iter=count("resume_iter", it),
            train_loss=number_or_nan("train_loss", -LARGEST, LARGEST),
            best_accuracy=number_or_nan("best_accuracy", 0, 1),
            best_auc=number_or_nan("best_auc", 0, 1),
            accuracy=number_or_nan("accuracy", 0, 1),
            auc=number_or_nan("auc", 0, 1),
            since_best_accuracy=since_best[0],
            since_best_auc=since_best[1],
            is_seeded=initial == SEEDED,
        )

    def _since_best(self) -> list[int]:
        """Evaluations since the best accuracy and the best AUC; files of before have none."""
        saved = self._content.get(SINCE_BEST, [0, 0])
        if not isinstance(saved, list) or len(saved) != 2:
            raise self._check.fault(SINCE_BEST, shown(saved), "a list of two numbers")
        return [
            self._check.whole(f"{SINCE_BEST}.{k}", count, MOST) for k, count in enumerate(saved)
        ]

    def optimizer_states(
        self, name: str, wanted: Mapping[int, Mapping[str, Wanted]]
    ) -> dict[int, dict[str, torch.Tensor]]:
        """The optimiser's state of each parameter, by the parameter's number.

        Args:
            name: sgd, adagrad or rwsadagrad, the optimiser of this run.
            wanted: the tensors that it needs of each parameter.

        Raises:
            UserError: the file was made with another optimiser, or a tensor is none of that shape.
            RankError: the state of one of this rank's tables has numbers that make no sense.
        """
        saved = self._check.dict_of("opt_state_dict", self._content.get("opt_state_dict", {}))
        saved = self._check.dict_of("opt_state_dict.state", saved.get("state", {}))
        of_each = {
            number: self._check.dict_of(f"opt_state_dict.state.{shown(number)}", state)
            for number, state in saved.items()
        }
        # torch 1's SGD remembers None of each parameter
        if name == "sgd" and any(
            value is not None for state in of_each.values() for value in state.values()
        ):
            raise UserError(
                f"--load-model={self._path} was trained with adagrad or rwsadagrad:"
                " give that --optimizer"
            )
        found: dict[int, dict[str, torch.Tensor]] = {}
        for number, tensors in wanted.items():
            state = of_each.get(number, {})
            found[number] = {
                key: self._state(name, (number, key), state, tensor)
                for key, tensor in tensors.items()
            }
        for number, tensors in wanted.items():
            for key, tensor in tensors.items():
                where = f"opt_state_dict.state.{number}.{key}"
                self._check.numbers(where, found[number][key], tensor)
        return found

    def _state(
        self, optimizer: str, which: tuple[int, str], state: dict[str, Any], wanted: Wanted
    ) -> torch.Tensor:
        number, key = which
        if key not in state:
            raise UserError(
                f"--load-model={self._path} was not trained with --optimizer={optimizer}"
                f" (its optimiser state {number} has no {key}): give the one it was trained with"
            )
        value = state[key]
        if is_number(value) and abs(value) <= LARGEST:  # older torch counts steps as numbers
            value = torch.tensor(float(value))
        self._check.tensor(f"opt_state_dict.state.{number}.{key}", value, wanted.shape)
        return value.detach()

    def restore_generators(self) -> None:
        """Set numpy's and torch's global generators to what they were; the original saves none."""
        if "generators" not in self._content:
            return
        saved = self._check.dict_of("generators", self._content["generators"])
        state = saved.get("numpy")
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != "MT19937":
            raise self._check.fault("generators.numpy", shown(state), "the 5 values of an MT19937")
        keys = state[1]
        if not is_plain(keys) or keys.dtype != torch.int64 or keys.shape != (NUM_KEYS,):
            raise self._check.fault("generators.numpy.1", shown(keys), f"{NUM_KEYS} int64 numbers")
        if not 0 <= int(keys.min()) <= int(keys.max()) < 1 << 32:
            raise self._check.fault("generators.numpy.1", "out of range", "numbers of 32 bits")
        position = self._check.whole("generators.numpy.2", state[2], NUM_KEYS)
        has_gauss = self._check.whole("generators.numpy.3", state[3], 1)
        gauss = self._check.number("generators.numpy.4", state[4], -LARGEST, LARGEST)
        words = keys.numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, position, has_gauss, gauss))
        self._restore_torch(saved.get("torch"))

    def _restore_torch(self, state: Any) -> None:
        own = torch.get_rng_state()
        if not is_plain(state) or state.dtype != own.dtype or state.shape != own.shape:
            raise self._check.fault("generators.torch", shown(state), f"{len(own)} bytes")
        try:
            torch.set_rng_state(state)
        except RuntimeError as error:
            text = f"refused ({reason_of(error)})"
            raise self._check.fault("generators.torch", text, "a generator's state") from error

    def loss_scale(self) -> list[float]:
        """[scale, steps since it last changed]; [] if the run had none, as with the original."""
        saved = self._content.get("loss_scale", [])
        if not isinstance(saved, list) or len(saved) not in (0, 2):
            raise self._check.fault("loss_scale", shown(saved), "a list of two numbers or of none")
        highest = (HIGHEST_SCALE, GROWTH_INTERVAL)
        lowest = (LOWEST_SCALE, 0)
        limits = zip(saved, lowest, highest, strict=False)
        return [
            self._check.number(f"loss_scale.{k}", value, low, high)
            for k, (value, low, high) in enumerate(limits)
        ]


def _what_lacks(name: str, state: Mapping[Any, Any], wanted: Mapping[str, Wanted]) -> str:
    """The rest of the sentence about a file without a tensor of that name.

    A table of another kind has other tensors, so both kinds are shown.
    """
    table = ".".join(name.split(".")[:2]) + "."
    there = {
        key: tuple(value.shape) if is_plain(value) else shown(value)
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(table)
    }
    if not name.startswith("emb_l.") or not there:
        return f" has no {name}: it was made with other widths, tables or pooling"
    here = {key: tensor.shape for key, tensor in wanted.items() if key.startswith(table)}
    texts = [
        " and ".join(f"{key} {shape}" for key, shape in shapes.items()) for shapes in (there, here)
    ]
    return (
        f": a table is {texts[0]} there, {texts[1]} in this model:"
        " give the --qr-... or --md-... flags it was made with"
    )


def reason_of(error: BaseException) -> str:
    """What went wrong, in the system's own words if torch has wrapped them into others."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__


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


def serving_facts_of(path: str, content: SavedContent) -> ServingFacts | None:
    """What has to be known to score rows with a model; None: its file does not tell.

    Args:
        path: where the file is.
        content: what it holds.

    Raises:
        UserError: a value of the facts is wrong.
    """
    if content.serving is None:
        return None
    try:
        return ServingFacts.from_json(content.serving)
    except ValueError as error:
        raise UserError(
            f"--load-model={path}: what it tells about scoring rows is wrong ({error}):"
            " the file is damaged or foreign; load another one"
        ) from error


def read_content(path: str) -> Any:
    """What torch reads from a file, whose tensors are mapped where its format allows it.

    Raises:
        Exception: it cannot be read; a damaged file can raise any.
    """
    with _numpy_scalars_allowed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the pickle protocol of foreign files
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's old format cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: str) -> dict[str, Any]:
    try:
        content = read_content(path)
    except OSError as error:
        raise UserError(f"--load-model={path}: cannot read it ({reason_of(error)})") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(
            f"--load-model={path} is not a readable model file ({reason_of(error)})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"--load-model={path} is not a model file of this program: it lacks state_dict"
        )
    return content
