"""The flags of scoring rows, and what the model file says in the place of all others."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.launch import Launch
from common.whole_files import partial_of, target_of
from criteo.prepared import Prepared, find_prepared
from criteo.scored_text import STDIN, check_text
from criteo.spec import DataSpec
from criteo.vocabulary_file import Vocabulary
from engine.model_file import check_model_paths, vocabulary_of
from engine.saved_content import SavedContent, serving_facts_of
from engine.score_files import FLAG as SCORES_FLAG
from engine.score_files import STDOUT, check_scores_file
from engine.serving_facts import ServingFacts, flag_text, model_flags

FLAG = "--predict-file"
BATCH_SIZE = 16384  # rows that are scored at a time, over all ranks; the scripts' evaluations too
_NEEDED = ("arch_sparse_feature_size", "arch_mlp_bot", "arch_mlp_top")  # have no useful defaults
_DATA = ("data_path", "raw_data_file", "processed_data_file")
_NOT_WITH = (
    *("save_model", "save_onnx", "checkpoint_dir", "resume", "export_checkpoint", "self_check"),
    *("dry_run", "plot_compute_graph", "performance", "debug_mode", "enable_profiling"),
)


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of scoring rows."""
    flag = parser.add_argument_group("Scores of rows").add_argument
    flag(
        FLAG,
        default="",
        metavar="IN",
        help="score the rows of this Criteo text, with or without labels, plain or .gz, with the"
        " model of --load-model; - is stdin",
    )
    flag(
        SCORES_FLAG,
        default="",
        metavar="OUT",
        help="where --predict-file writes a score a line: text, .npy or .parquet; - is stdout",
    )
    flag(
        "--vocabulary-file",
        default="",
        metavar="PATH",
        help="with --predict-file: the categories of the model's rows; default: beside the model",
    )


def take_model_flags(options: argparse.Namespace, given: set[str]) -> None:
    """With --predict-file, set the model's flags to what the model file says.

    Args:
        options: the parsed command line.
        given: names of the flags that the command line has.

    Raises:
        UserError: a given flag contradicts the file, or flags are missing that it does not have.
    """
    if not options.predict_file:
        if options.scores_file or options.vocabulary_file:
            flag = SCORES_FLAG if options.scores_file else "--vocabulary-file"
            raise UserError(f"{flag} is for {FLAG}: give it too, the rows to score")
        return
    _check_flags(options)
    if options.test_mini_batch_size == -1:  # as in training: nothing is trained
        options.test_mini_batch_size = BATCH_SIZE
    options.inference_only = True
    facts = _facts_of(options.load_model)
    if facts is None:
        _check_given(options, given)
        options.data_generation = "dataset"
        return
    if not facts.is_criteo:
        raise UserError(
            f"{FLAG}: {options.load_model} was trained with random data, not with Criteo's columns:"
            " only engine.scorer takes its ids"
        )
    of_file = model_flags(facts.options()) | {"max_ind_range": facts.max_ind_range}
    for name, value in of_file.items():
        now = getattr(options, name)
        if name in given and now != value:
            was = "without it" if value is None else f"with {flag_text(name, value)}"
            raise UserError(
                f"{flag_text(name, now)}: {options.load_model} was trained {was}: leave the flag"
                " out"
            )
        setattr(options, name, value)


def _facts_of(path: str) -> ServingFacts | None:
    return serving_facts_of(path, SavedContent(path))


def _check_flags(options: argparse.Namespace) -> None:
    flag = f"{FLAG}={options.predict_file}"
    others = [name for name in _NOT_WITH if getattr(options, name)]
    from_stdin = options.predict_file == STDIN
    problems = (
        (not options.load_model, f"{flag}: give --load-model=PATH too, the model"),
        (not options.scores_file, f"{flag}: give {SCORES_FLAG}=PATH too, where scores go"),
        (
            bool(others),
            f"{flag} scores rows and trains nothing: leave"
            f" --{''.join(others[:1]).replace('_', '-')} out",
        ),
        (
            from_stdin and Launch.from_environment().world_size > 1,
            f"{flag}: only one rank can read stdin, {Launch.from_environment().world_size} ranks"
            " read a file: name one, or start one rank",
        ),
    )
    for is_problem, message in problems:
        if is_problem:
            raise UserError(message)
    check_model_paths(options.load_model, "")
    check_text(options.predict_file)
    check_scores_file(options.scores_file)
    _check_not_read(options)


def _check_not_read(options: argparse.Namespace) -> None:
    """Raise a UserError if the scores, or the file that becomes them, replace what is read."""
    if options.scores_file == STDOUT:
        return
    model = Path(options.load_model)
    named = {options.predict_file, options.vocabulary_file} - {"", STDIN}
    read = {model, vocabulary_of(model), vocabulary_of(target_of(model)), *map(Path, named)}
    target = target_of(Path(options.scores_file))
    if {target, partial_of(target)}.intersection(map(target_of, read)):
        raise UserError(
            f"{SCORES_FLAG}={options.scores_file} would replace a file that is read: name another"
            " file"
        )


def _check_given(options: argparse.Namespace, given: set[str]) -> None:
    """The file is of a version before, or the original's: the command line has to say it all."""
    flags = [f"--{name.replace('_', '-')}" for name in _NEEDED if name not in given]
    if not given.intersection(_DATA):
        flags.append("--data_path (prepared data that has a vocabulary, with --max-ind-range)")
    if flags:
        raise UserError(
            f"{FLAG}: {options.load_model} does not say how it was trained, as it is of an earlier"
            f" version or of the original: give the flags that it was trained with, first"
            f" {', '.join(flags)}"
        )


@dataclass(frozen=True)
class ServedData:
    """What is known of the data that a model was trained with.

    Attributes:
        num_rows: rows of each table.
        vocabulary: the categories of these rows.
    """

    num_rows: tuple[int, ...]
    vocabulary: Vocabulary

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "ServedData":
        """What the model file says or, if it does not, the prepared data that the flags name.

        Raises:
            UserError: there is no such data, or the vocabulary is not that of the model.
        """
        path = Path(options.load_model)
        facts = _facts_of(options.load_model)
        if facts is None:
            prepared = _prepared_of(options)
            assert prepared.vocabulary is not None
            prepared.vocabulary.check()
            return cls(prepared.counts, prepared.vocabulary)
        return cls(facts.num_rows, vocabulary_of_model(path, facts, options.vocabulary_file))


def vocabulary_of_model(path: Path, facts: ServingFacts, named: str = "") -> Vocabulary:
    """The vocabulary with which a model was trained.

    Args:
        path: the model file's.
        facts: what it tells.
        named: the vocabulary's file; empty: it is beside the model file.

    Raises:
        UserError: there is none, or it is another one.
    """
    if not facts.vocabulary:
        raise UserError(
            f"{path} was trained with data without a vocabulary, so nobody knows the categories of"
            " its tables' rows: prepare the data anew, which makes one, and train again"
        )
    beside = Path(named) if named else vocabulary_of(path)
    if not named and path.is_symlink() and not beside.exists():
        beside = vocabulary_of(target_of(path))  # --save-model writes it beside a link's target
    vocabulary = Vocabulary(beside, facts.num_rows, facts.vocabulary)
    vocabulary.check()
    return vocabulary


def _prepared_of(options: argparse.Namespace) -> Prepared:
    spec = DataSpec.from_options(options)
    prepared = find_prepared(spec)
    if prepared is None or prepared.vocabulary is None:
        what = "there is none" if prepared is None else "this one has no vocabulary"
        raise UserError(
            f"{FLAG}: {options.load_model} was trained with prepared data, which says what its ids"
            f" mean; at {spec.directory} {what}: prepare it with this version and the flags of then"
        )
    return prepared
