"""What a model file tells those who score rows with it, beside its parameters."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import UserError
from common.flags import ArgumentParser
from criteo.columns import NUM_DENSE, NUM_SPARSE
from criteo.prepared import Prepared
from criteo.spec import DataSpec
from criteo.vocabulary import VocabularySource, find_vocabulary
from engine.architecture import Architecture, add_clamp_option, add_model_options
from engine.value_checks import shown
from model.compression import add_compression_options

MOST_ROWS = 2**31  # of a table


def _model_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="dlrm_s_pytorch.py", add_help=False)
    add_model_options(parser)
    add_compression_options(parser)
    add_clamp_option(parser.add_argument)
    return parser


def model_flags(options: argparse.Namespace) -> dict[str, Any]:
    """{name: value} of the flags that decide what a model computes from its parameters."""
    names = vars(_model_parser().parse_args([])).keys()
    return {name: getattr(options, name) for name in sorted(names)}


def vocabulary_to_keep(options: argparse.Namespace, prepared: Prepared) -> VocabularySource | None:
    """The vocabulary that is written beside models and checkpoints; None: there are none, or it.

    Raises:
        UserError: dictionaries of the original are there and do not fit the data.
    """
    if not (options.save_model or options.checkpoint_dir or options.save_onnx):
        return None
    return find_vocabulary(DataSpec.from_options(options), prepared)


def lacks_vocabulary(options: argparse.Namespace, vocabulary: VocabularySource | None) -> str:
    """A line about Criteo data with which no model learns what its ids mean; empty if it does."""
    if options.data_generation != "dataset" or not options.save_model or vocabulary is not None:
        return ""
    return (
        f"note: the prepared data has no vocabulary (it is of format 2, or the original's), so"
        f" {options.save_model} will not score rows of text; data that is prepared anew has one"
    )


def flag_text(name: str, value: Any) -> str:
    """A flag as the command line takes it: `--arch-mlp-bot=13-512-64`."""
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, tuple):
        value = "-".join(str(number) for number in value)
    return f"--{name.replace('_', '-')}={value}"


@dataclass(frozen=True)
class ServingFacts:
    """What has to be known to score rows with a model's parameters.

    Attributes:
        flags: the model's flags, as the command line takes them; those not given are left out.
        num_rows: rows of each table.
        num_dense: number of dense features.
        max_ind_range: categories are taken modulo this before they are looked up; -1: they are not.
        vocabulary: digest of the vocabulary that has the categories of the tables' rows; empty: it
            is not known.
        is_criteo: the model has learned from Criteo's columns: from log(x + 1) of integers x.
    """

    flags: tuple[str, ...]
    num_rows: tuple[int, ...]
    num_dense: int
    max_ind_range: int
    vocabulary: str
    is_criteo: bool

    @classmethod
    def from_options(
        cls,
        options: argparse.Namespace,
        num_rows: Sequence[int],
        num_dense: int,
        vocabulary: VocabularySource | None,
    ) -> "ServingFacts":
        """The facts about a model that is trained with these flags and data.

        Args:
            options: the parsed command line.
            num_rows: rows of each table.
            num_dense: number of dense features.
            vocabulary: the categories of the tables' rows; None: they are not known.
        """
        flags = model_flags(options)
        return cls(
            flags=tuple(flag_text(name, flags[name]) for name in flags if flags[name] is not None),
            num_rows=tuple(num_rows),
            num_dense=num_dense,
            max_ind_range=options.max_ind_range,
            vocabulary=vocabulary.digest if vocabulary is not None else "",
            is_criteo=options.data_generation == "dataset",
        )

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        values = asdict(self)
        return values | {"flags": list(self.flags), "num_rows": list(self.num_rows)}

    @classmethod
    def from_json(cls, value: Any) -> "ServingFacts":
        """The facts that `to_json` returned.

        Raises:
            ValueError: these are none; it names the value.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"they are {shown(value)}, expected a dict")
        facts = cls(
            flags=tuple(_list_of(value, "flags", str)),
            num_rows=tuple(_list_of(value, "num_rows", int)),
            num_dense=_one(value, "num_dense", int),
            max_ind_range=_one(value, "max_ind_range", int),
            vocabulary=_one(value, "vocabulary", str),
            is_criteo=_one(value, "is_criteo", bool),
        )
        facts._check()
        return facts

    def _check(self) -> None:
        expected = (
            (all(1 <= rows <= MOST_ROWS for rows in self.num_rows), "num_rows", self.num_rows),
            (len(self.num_rows) > 0, "num_rows", self.num_rows),
            (self.num_dense >= 1, "num_dense", self.num_dense),
            (-1 <= self.max_ind_range <= 2**32, "max_ind_range", self.max_ind_range),
            (not self.is_criteo or len(self.num_rows) == NUM_SPARSE, "num_rows", self.num_rows),
            (not self.is_criteo or self.num_dense == NUM_DENSE, "num_dense", self.num_dense),
        )
        for is_right, name, got in expected:
            if not is_right:
                raise ValueError(f"{name} is {shown(got)}, which no model has")
        try:
            self.architecture()
        except UserError as error:
            raise ValueError(f"flags are {shown(self.flags)}: {error}") from error

    def options(self) -> argparse.Namespace:
        """The flags as the command line's parser returns them.

        Raises:
            UserError: one of them is no flag, or its value is wrong.
        """
        parsed: argparse.Namespace = _model_parser().parse_args(list(self.flags))
        return parsed

    def architecture(self) -> Architecture:
        """The model's shape.

        Raises:
            UserError: the flags do not fit one another.
        """
        return Architecture.from_options(self.options(), self.num_rows, self.num_dense)


def _one(value: Mapping[str, Any], name: str, kind: type) -> Any:
    found = value.get(name)
    if type(found) is not kind:
        raise ValueError(f"{name} is {shown(found)}, expected {kind.__name__}")
    return found


def _list_of(value: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    found = _one(value, name, list)
    for entry in found:
        if type(entry) is not kind:
            raise ValueError(f"{name} has {shown(entry)}, expected {kind.__name__}")
    return list(found)
