"""Goes on from the newest checkpoint that is whole."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from checkpoints.folder import CheckpointFolder, Found, newest_in
from checkpoints.index import Index, NewerFormatError
from checkpoints.options import CheckpointOptions
from checkpoints.recipe import Recipe, check_same, check_same_data
from checkpoints.run_state import RunState, check_same_model
from checkpoints.shard_file import DamagedError
from common.errors import UserError
from ranks.collectives import agreed, texts_of_all


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
    damage = ""
    for number, path in enumerate(candidates):
        where = f"--resume={path}"
        damage = _restore(path, where, run, recipe)
        if not damage:
            # if none was whole, they keep their names: the next run must not start anew beside them
            if aside := agreed(process, lambda: _set_aside(options, candidates[:number])):  # noqa: B023
                say(aside)
            say(_where_it_goes_on(path, run))
            return path
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
) -> str:
    """Restore the run; returns what is damaged, on any rank, or nothing."""
    flags, facts = recipe
    process, damage, index = run.model.process, "", None
    try:
        index = Index.read(path)
    except NewerFormatError as error:
        raise UserError(f"{where}: {error}") from error
    except DamagedError as error:
        damage = str(error)
    if damages := list(filter(None, texts_of_all(process, damage))):
        return damages[0]
    assert index is not None
    check_same(where, index.flags, flags)
    check_same_data(where, index.data, facts)
    check_same_model(where, index, run)
    try:
        run.restore(path, index)
    except DamagedError as error:
        damage = str(error)
    return next(filter(None, texts_of_all(process, damage)), "")


def _set_aside(options: CheckpointOptions, damaged: Sequence[Path]) -> str:
    """Rename damaged checkpoints of this run's own folder; says so."""
    names = []
    for path in damaged:
        if options.folder is None or path.parent.resolve() != options.folder.resolve():
            continue
        with contextlib.suppress(OSError):
            names.append(CheckpointFolder(options.folder).set_aside(Found(path, 0, 0)).name)
    return f"checkpoint set aside as damaged: {', '.join(names)}" if names else ""


def _where_it_goes_on(path: Path, run: RunState) -> str:
    progress = run.progress
    return (
        f"resumed from {path}: {progress.iter} of {run.model.num_batches} steps"
        f" of epoch {progress.epoch} are done"
    )
