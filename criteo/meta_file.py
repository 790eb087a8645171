"""meta.json of prepared data: what it says, and a check of every value before it is used."""

import json
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from criteo.columns import NAMES, NUM_SPARSE
from criteo.row_layout import TYPES, Layout
from criteo.spec import DataSpec
from criteo.vocabulary_file import begins_of

FORMAT_VERSION = 3
WITHOUT_VOCABULARY = 2  # the version before, whose data can be trained with
SPLITS = ("train", "test", "val")
MOST_ROWS = 2**48  # of a file: more than any disk holds
MOST_IDS = 2**31  # of a table: ids are signed numbers of 32 bits


def recipe(spec: DataSpec) -> dict[str, Any]:
    """The flags that decide the prepared bytes; the seed is among them only if something is drawn.

    The keys are frozen: meta.json keeps them, and a run compares them with its own.
    """
    drawn = spec.sub_sample_rate > 0 or spec.order != "file"
    return {
        "--data-set": spec.data_set,
        "--max-ind-range": spec.max_ind_range,
        "--data-sub-sample-rate": spec.sub_sample_rate,
        "order on disk (--memory-map with --data-randomize)": spec.order,
        "--numpy-rand-seed": spec.seed if drawn else None,
    }


def how_to_rebuild(spec: DataSpec) -> str:
    """What a user can do about prepared data that this run cannot use."""
    name = f"{spec.stem}_train.bin" if spec.flat else spec.directory
    return f"delete {name} to have it made again, or name another --processed-data-file"


def read_meta(spec: DataSpec, path: Path) -> dict[str, Any]:
    """The values of a meta.json, which docs/preparation.md lists; each has its type and range.

    `vocabulary` is None if the data has none.

    Raises:
        UserError: the file cannot be read, is of another format, or a value in it is wrong.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        meta = json.loads(path.read_bytes())
        _expect("it", meta, isinstance(meta, dict), "an object")
        _expect("it", sorted(meta), "format" in meta, "the key 'format'")
        version = meta["format"] if type(meta["format"]) is int else None
        if version in (WITHOUT_VOCABULARY, FORMAT_VERSION):
            _check_values(meta, list(recipe(spec)))
            if version == WITHOUT_VOCABULARY:
                return {**meta, "vocabulary": None}
            _check_vocabulary(meta)
            return dict(meta)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {how_to_rebuild(spec)}") from error
    got = f"format {reprlib.repr(meta['format'])}"
    expected = f"this program reads {WITHOUT_VOCABULARY} and {FORMAT_VERSION}"
    raise UserError(f"{path}: {got}, {expected}; {how_to_rebuild(spec)}")


def _check_values(meta: dict[str, Any], recipe_keys: Sequence[str]) -> None:
    """Raise a ValueError that names the first key whose value is not what preparation writes."""
    wanted = ("columns", "rows", "rows_per_part", "counts", "recipe", "sources")
    for key in wanted:
        _expect("it", sorted(meta), key in meta, f"the key {key!r}")
    _check_columns(meta["columns"])
    _check_keys("rows", meta["rows"], SPLITS)
    for split in SPLITS:
        _check_number(f"rows.{split}", meta["rows"][split], 0 if split == "val" else 1, MOST_ROWS)
    _check_list("rows_per_part", meta["rows_per_part"], 2, False, (0, MOST_ROWS))
    _check_list("counts", meta["counts"], NUM_SPARSE, True, (1, MOST_IDS))
    *train, evaluation = meta["rows_per_part"]
    rows = meta["rows"]["train"], meta["rows"]["test"] + meta["rows"]["val"]
    expected = f"parts that add up to {rows[0]} training rows, and a last one of {rows[1]}"
    _expect("rows_per_part", meta["rows_per_part"], (sum(train), evaluation) == rows, expected)
    _check_keys("recipe", meta["recipe"], recipe_keys)
    for key in recipe_keys:
        value = meta["recipe"][key]
        is_plain = value is None or isinstance(value, (str, int, float))
        _expect(f"recipe.{key}", value, is_plain, "a text, a number or null")
    imported = meta.get("imported", False)
    _expect("imported", imported, isinstance(imported, bool), "true or false")
    _check_sources(meta["sources"])


def _expect(key: str, got: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{key} is {reprlib.repr(got)}, expected {expected}")


def _check_keys(key: str, value: Any, keys: Sequence[str]) -> None:
    _expect(key, value, isinstance(value, dict), "an object")
    for each in keys:
        _expect(key, value, each in value, f"the key {each!r}")


def _check_number(key: str, value: Any, least: int, most: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    expected = f"a whole number from {least} to {most}"
    _expect(key, value, is_whole and least <= value <= most, expected)


def _check_list(key: str, value: Any, size: int, exact: bool, bounds: tuple[int, int]) -> None:
    """Check a list of `size` whole numbers, or of more if the size is not exact."""
    is_list = isinstance(value, list) and len(value) >= size
    is_list = is_list and not (exact and len(value) > size)
    expected = str(size) if exact else f"{size} or more"
    _expect(key, value, is_list, f"a list of {expected} numbers")
    for at, number in enumerate(value):
        _check_number(f"{key}[{at}]", number, *bounds)


def _check_columns(columns: Any) -> None:
    size = len(NAMES)
    is_list = isinstance(columns, list) and len(columns) == size
    _expect("columns", columns, is_list, f"a list of {size} pairs")
    kinds = tuple(TYPES.values())
    for at, column in enumerate(columns):
        is_pair = isinstance(column, list) and len(column) == 2
        is_pair = is_pair and column[0] in NAMES and column[1] in kinds
        expected = f"[name, type], a type of {', '.join(kinds)}"
        _expect(f"columns[{at}]", column, is_pair, expected)
    names = [name for name, _ in columns]
    _expect("columns", names, set(names) == set(NAMES), "each of the 40 columns once")
    Layout.from_columns(columns)


def _check_sources(sources: Any) -> None:
    _expect("sources", sources, isinstance(sources, list), "a list")
    for at, source in enumerate(sources):
        key = f"sources[{at}]"
        _check_keys(key, source, ("name", "size", "mtime_ns"))
        name = source["name"]
        is_name = isinstance(name, str) and _is_name(name)
        _expect(f"{key}.name", name, is_name, "the name of a file")
        _check_number(f"{key}.size", source["size"], 0, 2**63)
        _check_number(f"{key}.mtime_ns", source["mtime_ns"], -(2**63), 2**63)


def _check_vocabulary(meta: dict[str, Any]) -> None:
    """Only the original's data, when it was imported, may have lacked it."""
    _expect("it", sorted(meta), "vocabulary" in meta, "the key 'vocabulary'")
    vocabulary = meta["vocabulary"]
    if vocabulary is None and meta.get("imported"):
        return
    _check_keys("vocabulary", vocabulary, ("begins", "digest"))
    begins, digest = vocabulary["begins"], vocabulary["digest"]
    _check_list("vocabulary.begins", begins, NUM_SPARSE, True, (0, NUM_SPARSE * MOST_IDS))
    is_sum = begins == begins_of(meta["counts"])
    _expect("vocabulary.begins", begins, is_sum, "the sums of the counts before each column")
    is_digest = isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) is not None
    _expect("vocabulary.digest", digest, is_digest, "32 hexadecimal digits")


def _is_name(name: str) -> bool:
    """Whether a file of this name could be in a folder."""
    try:
        as_bytes = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(as_bytes) <= 255 and b"/" not in as_bytes and b"\0" not in as_bytes
