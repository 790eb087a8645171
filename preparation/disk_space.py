"""Whether the disk has room for a preparation, and what a user can do if the disk refuses."""

import contextlib
import errno
import shutil
from collections.abc import Sequence

from common.errors import UserError
from criteo.columns import NUM_SPARSE
from criteo.original_files import Original
from criteo.raw_files import RawFile
from criteo.row_layout import FLAT
from criteo.spec import DataSpec
from criteo.vocabulary_file import VALUE_BYTES

# approximate bytes of a row of Criteo's data on disk
PARSED_ROW = 100
IDS_ROW = 12
PREPARED_ROW = 100
VOCABULARY_ROW = 4  # for Kaggle's rows, which have one new category each; Terabyte's have fewer
SAMPLE_BYTES = 1 << 16  # bytes of a file's text from which its number of rows is estimated


def check_space(spec: DataSpec, raw: Sequence[RawFile], original: Original | None) -> None:
    """Check that the disk has room for the most that preparation takes at any time.

    Args:
        spec: what to prepare.
        raw: files of text, if there is no `original`.
        original: arrays of the original program.

    Raises:
        UserError: free space and finished files together are too small.
    """
    folder = spec.directory.parent
    while not folder.is_dir():
        folder = folder.parent
    rows = sum(original.rows_per_part) if original else _estimate_rows(spec, raw)
    prepared = FLAT.row_bytes if spec.flat else PREPARED_ROW
    shuffled = prepared if spec.order != "file" else 0
    vocabulary = VOCABULARY_ROW * rows
    if spec.max_ind_range > 0:
        vocabulary = min(vocabulary, VALUE_BYTES * NUM_SPARSE * spec.max_ind_range)
    parsed_and_numbered = (PARSED_ROW + 2 * IDS_ROW) * rows + vocabulary
    at_the_end = (IDS_ROW + shuffled + prepared) * rows + 2 * vocabulary  # one is in the ids' files
    needed = int(max(parsed_and_numbered, at_the_end))
    there = 0
    for path in spec.work_folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # other ranks are at work there
            there += path.stat().st_blocks * 512
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise UserError(
            f"preparation needs {_size(needed - there)} at {folder}, {_size(free)} free:"
            " --processed-data-file can name another disk"
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.0f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:.0f} MB"


def _estimate_rows(spec: DataSpec, raw: Sequence[RawFile]) -> float:
    """Rows that will be kept, estimated from the first lines of each file."""
    rows = 0.0
    for file in raw:
        text, unpacked = file.sample(SAMPLE_BYTES)
        lines = text.count(b"\n") or 1
        clicks = (text.startswith(b"1") + text.count(b"\n1\t")) / lines
        kept = clicks + (1 - clicks) * (1 - spec.sub_sample_rate)
        rows += kept * unpacked * file.size / max(len(text) / lines, 1)
    return rows


def disk_trouble(spec: DataSpec, error: OSError) -> str:
    """One line that says what the disk refused and what the user can do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for the prepared data in {spec.directory.parent}; what is finished is"
            " kept: make room and start again, or name another --processed-data-file"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write to {spec.directory.parent}: name a writable --processed-data-file"
    what_to_do = f"delete {spec.work_folder} to begin anew, or name another --processed-data-file"
    return f"cannot prepare data ({error}): {what_to_do}"
