"""All ranks have the same flags and data, which is found before they train, not by a wrong model.

Ranks on several machines are started by several commands, and may read several copies of the data.
"""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from checkpoints.json_values import as_json
from checkpoints.recipe import as_text, facts_of
from common.errors import UserError
from criteo.prepared import Prepared
from ranks.collectives import texts_of_all
from ranks.process import Process, joined

# A rank, or a machine, may have values of its own: which card, how many loaders, where data lies.
OF_A_RANK = frozenset(
    {
        "local_rank", "num_workers", "test_num_workers",
        "data_path", "raw_data_file", "processed_data_file", "flags_file",
    }
)  # fmt: skip
# Paths may differ by machine. Whether one is given must not, as all ranks do what it asks for.
PATHS = frozenset(
    {
        "save_model", "load_model", "onnx_file", "checkpoint_dir", "resume", "run_dir",
        "tensor_board_filename", "metrics_file", "report", "predict_file", "scores_file",
        "vocabulary_file", "data_trace_file", "export_checkpoint",
    }
)  # fmt: skip
MOST_SHOWN = 3  # flags or facts in a message
_DIGEST_BYTES = 16
Told = dict[str, Any]


@contextlib.contextmanager
def joined_in_agreement(
    options: argparse.Namespace, prepared: Prepared | None, process: Process
) -> Iterator[None]:
    """Join the ranks in a process group during the block, as `joined` does, if they agree.

    Args:
        options: this rank's flags.
        prepared: its data, if that is Criteo's.
        process: this rank.

    Raises:
        UserError: a rank has other flags or other data; all ranks raise it.
    """
    with joined(process, options.enable_profiling, options.dist_timeout):
        if process.world_size > 1:
            _check(process, flags_told(options), data_told(prepared))
        yield


def flags_told(options: argparse.Namespace) -> dict[str, Any]:
    """What a rank tells of its flags, as JSON."""
    values = {name: value for name, value in sorted(vars(options).items()) if name not in OF_A_RANK}
    return {
        name: "a path" if name in PATHS and value else as_json(value)
        for name, value in values.items()
    }


def data_told(prepared: Prepared | None) -> dict[str, Any]:
    """What a rank tells of Criteo data, as JSON."""
    told: dict[str, Any] = {}
    for name, value in facts_of(prepared).items():
        values = value if isinstance(value, list) else [value]
        one = name.replace("each ", "")  # rows of each table: rows of table 0, of table 1, ...
        names = [f"{one} {k}" for k in range(len(values))] if isinstance(value, list) else [name]
        told |= zip(names, values, strict=True)
    return told


def _check(process: Process, flags: Told, data: Told) -> None:
    text = json.dumps([flags, data])
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    if len(set(texts_of_all(process, digest))) == 1:  # a few bytes a rank, while all agree
        return
    told = [json.loads(other) for other in texts_of_all(process, text)]
    raise UserError(disagreement(told))


def disagreement(told: Sequence[tuple[Told, Told]]) -> str:
    """The line for ranks that have told different things; of flags first, of data if those agree.

    Args:
        told: of each rank its flags and the facts of its data.
    """
    flags, data = zip(*told, strict=True)
    if any(one != flags[0] for one in flags):
        return f"{_both(flags, _flag)}: give all ranks the same flags"
    return f"{_both(data, _fact)}: give all machines the same prepared data"


def _both(told: Sequence[Told], show: Callable[[str, Any], str]) -> str:
    """What the first rank that differs from rank 0 has, and rank 0; with all ranks like it."""
    first = told[0]
    other = next(one for one in told if one != first)
    ranks = [rank for rank, one in enumerate(told) if one == other]
    names = [name for name in first | other if first.get(name) != other.get(name)]
    theirs, ours = (
        ", ".join(show(name, one.get(name)) for name in names[:MOST_SHOWN])
        for one in (other, first)
    )
    have = f"ranks {_numbers(ranks)} have" if len(ranks) > 1 else f"rank {ranks[0]} has"
    more = f" (and {len(names) - MOST_SHOWN} more differ)" if len(names) > MOST_SHOWN else ""
    return f"{have} {theirs}, rank 0 has {ours}{more}"


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return f"no {flag}" if value in (None, "") else f"{flag}={as_text(value)}"


def _fact(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name} = {value}"


def _numbers(ranks: Sequence[int]) -> str:
    """The numbers of several ranks in few words."""
    is_range = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"{ranks[0]} to {ranks[-1]}" if is_range else ", ".join(map(str, ranks))
