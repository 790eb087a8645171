"""The model as an ONNX file, for --save-onnx.

onnx is an optional package, so the modules that import it are imported here when they are needed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from common.errors import RankError, UserError
from common.versions import problem_of_import
from common.whole_files import check_place, target_of
from engine.model_file import ModelState, gathered_state, write_vocabulary
from engine.saved_content import reason_of
from engine.served_model import ServedModel
from ranks.model_shape import ModelShape

ONNX_FILE = "dlrm_s_pytorch.onnx"  # the original's name
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-onnx.txt"
FLAG = "--onnx-file"


def check_onnx_options(options: argparse.Namespace) -> None:
    """Raise a UserError before training if the ONNX file cannot be written after it."""
    if not options.save_onnx:
        if options.onnx_file != ONNX_FILE:
            raise UserError(
                f"{FLAG}={options.onnx_file} without --save-onnx writes nothing: add --save-onnx"
            )
        return
    if problem := problem_of_import("onnx", _import_onnx, REQUIREMENTS):
        raise UserError(f"--save-onnx: {problem}")
    if not options.onnx_file:
        raise UserError(f"{FLAG}= is empty: name a file")
    _check_paths(options)


def _import_onnx() -> None:
    import engine.onnx_file
    import engine.onnx_graph  # noqa: F401


def _check_paths(options: argparse.Namespace) -> None:
    from engine.onnx_file import data_file_of

    path = Path(options.onnx_file)
    check_place(f"{FLAG}={path}", path)
    data = data_file_of(target_of(path))
    check_place(f"{FLAG}={path}: {data} (for weights above 2 GB)", data)
    for flag in ("save_model", "load_model"):
        other = getattr(options, flag)
        if other and target_of(Path(other)) in (target_of(path), data):
            name = f"--{flag.replace('_', '-')}"
            raise UserError(f"{FLAG}={path} and {name}={other}: expected two files, name another")


def export_if_asked(
    options: argparse.Namespace,
    model_state: ModelState,
    shape: ModelShape,
    say: Callable[[str], None],
) -> None:
    """Write the model as it is now as ONNX, with --save-onnx. All ranks call it.

    Args:
        options: the parsed command line.
        model_state: has the weights.
        shape: the model's.
        say: prints a line, on rank 0.
    """
    if not options.save_onnx:
        return
    is_criteo = options.data_generation == "dataset"
    one_id = is_criteo or options.num_indices_per_lookup == 1
    served = ServedModel(
        **vars(shape),
        takes_integers=is_criteo,
        one_id=one_id,
        max_ind_range=options.max_ind_range if is_criteo else -1,
    )
    files = save_onnx(options.onnx_file, model_state, served)
    if model_state.vocabulary is not None and model_state.process.is_first:
        write_vocabulary(model_state.vocabulary, Path(options.onnx_file), FLAG)
    say(f"ONNX model: {', '.join(str(file) for file in files)}")


def save_onnx(
    path: str, model_state: ModelState, served: ServedModel, most_in_one_file: int | None = None
) -> list[Path]:
    """Write the model as it is now, on rank 0. All ranks call it.

    Beside the model, memory for one or two parts of tables is needed at a time.

    Args:
        path: where it goes.
        model_state: has the weights.
        served: the model's shape.
        most_in_one_file: bytes; a larger model has its weights in a second file. None: as many as
            ONNX's format allows.

    Returns:
        The files; on other ranks none.

    Raises:
        RankError: they cannot be written; those that were there before are kept.
    """
    from engine.onnx_file import MOST_IN_ONE_FILE, write_onnx_file
    from engine.onnx_graph import make_onnx_model

    weights = gathered_state(model_state)
    if not model_state.process.is_first:
        for _ in weights:  # there are none, but asking for them sends this rank's to rank 0
            pass
        return []
    most = MOST_IN_ONE_FILE if most_in_one_file is None else most_in_one_file
    shapes = served.parameter_shapes
    try:
        return write_onnx_file(Path(path), make_onnx_model(served), shapes, weights, most)
    except OSError as error:
        raise RankError(
            f"{FLAG}={path}: cannot write it ({reason_of(error)}); what was there before is kept"
        ) from error
