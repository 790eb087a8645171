"""Goes on from the newest checkpoint that is whole."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints.folder import CheckpointFolder, newest_in, set_aside
from checkpoints.index import Index, NewerFormatError
from checkpoints.options import CheckpointOptions
from checkpoints.recipe import Recipe, check_same, check_same_data
from checkpoints.run_state import RunState, check_same_model
from checkpoints.shard_file import DamagedError
from common.errors import UserError
from ranks.collectives import agreed, texts_of_all
from ranks.process import Process


def resume(
    options: CheckpointOptions,
    run: RunState,
    recipe: Recipe,
    say: Callable[[str], None],
) -> Path | None:
    """Restore a run from the newest whole checkpoint that the flags name. All ranks call it.

    Args:
        options: the flags of checkpoints.
        run: the run, whose model has the checkpoint's shape.
        recipe: what the run trains.
        say: prints a line, on the first rank.

    Returns:
        The checkpoint; None if --checkpoint-dir has none yet.

    Raises:
        UserError: there is none at the path, it is of another run, or all are damaged.
    """
    process = run.model.process
    candidates = _candidates(options, run)
    if not candidates:
        say(f"--checkpoint-dir={options.folder} has no checkpoint yet: the run starts anew")
    flag = "--resume" if options.resume_from is None else f"--resume={options.resume_from}"
    damage, damaged = "", list[Path]()
    for path in candidates:
        where = f"--resume={path}"
        damage, is_certain = _restore(path, where, run, recipe)
        if not damage:
            # if none was whole, they keep their names: the next run must not start anew beside them
            if aside := agreed(process, lambda: _set_aside(options, damaged)):
                say(aside)
            say(_where_it_goes_on(path, run))
            return path
        if is_certain:
            damaged.append(path)
        then = "" if path == candidates[-1] else "; the checkpoint before it is used"
        say(f"warning: {damage}{then}")
    if damage:
        raise UserError(
            f"{flag}: no checkpoint is whole ({damage}):"
            " name another one, or start anew with another --checkpoint-dir"
        )
    return None


def _candidates(options: CheckpointOptions, run: RunState) -> list[Path]:
    """The checkpoints to try, the newest first."""

    def find() -> str:
        if options.resume_from is not None:
            try:
                found = newest_in(options.resume_from)
            except UserError as error:
                raise UserError(f"--resume: {error}") from error
        else:
            assert options.folder is not None
            found = CheckpointFolder(options.folder).checkpoints()
        return json.dumps([str(one.path) for one in found])

    return [Path(path) for path in json.loads(agreed(run.model.process, find))]


def _restore(
    path: Path,
    where: str,
    run: RunState,
    recipe: Recipe,
) -> tuple[str, bool]:
    """Restore the run; returns what `_found_by_all` does."""
    flags, facts = recipe
    process, damage, index = run.model.process, None, None
    try:
        index = Index.read(path)
    except NewerFormatError as error:
        raise UserError(f"{where}: {error}") from error
    except DamagedError as error:
        damage = error
    found = _found_by_all(process, damage)
    if found[0]:
        return found
    assert index is not None
    check_same(where, index.flags, flags)
    check_same_data(where, index.data, facts)
    check_same_model(where, index, run)
    try:
        run.restore(path, index)
    except DamagedError as error:
        damage = error
    return _found_by_all(process, damage)


def _found_by_all(process: Process, damage: DamagedError | None) -> tuple[str, bool]:
    """(what is damaged, on any rank, or nothing; whether a rank has read it and not only failed to)

    A folder that another machine does not see, or a disk's fault, says nothing of the checkpoint.
    """
    reason = damage.__cause__ if damage else None
    is_missing = process.is_first and isinstance(reason, FileNotFoundError)  # it sees the folder
    is_certain = is_missing or not isinstance(reason, OSError)
    texts = texts_of_all(process, json.dumps([is_certain, str(damage or "")]))
    found = [(text, is_sure) for is_sure, text in map(json.loads, texts) if text]
    return max(found, key=lambda one: one[1], default=("", False))


def _set_aside(options: CheckpointOptions, damaged: Sequence[Path]) -> str:
    """Rename damaged checkpoints of this run's own folder; says so."""
    names = []
    for path in damaged:
        if options.folder is None or path.parent.resolve() != options.folder.resolve():
            continue
        with contextlib.suppress(OSError):
            names.append(set_aside(path).name)
    return f"checkpoint set aside as damaged: {', '.join(names)}" if names else ""


def _where_it_goes_on(path: Path, run: RunState) -> str:
    progress = run.progress
    return (
        f"resumed from {path}: {progress.iter} of {run.model.num_batches} steps"
        f" of epoch {progress.epoch} are done"
    )
