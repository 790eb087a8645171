"""Flags as JSON: what --flags-file reads, and what a run folder's flags.json holds.

{"flags": {"--mini-batch-size": 128, "--use-npu": true}}, or the inner object alone.
"""

import argparse
import difflib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import UserError

FLAGS_FILE = "--flags-file"
NOT_OF_A_FILE = ("--help", FLAGS_FILE)


def words_of_file(
    path: str, actions: Sequence[argparse.Action], check: Callable[[str], object]
) -> list[str]:
    """The words of a command line that say what a file of flags does.

    Args:
        path: the file.
        actions: argparse's actions of all flags.
        check: raises a UserError if a word of the command line is wrong.

    Raises:
        UserError: the file cannot be read, is no JSON, or has an unknown flag or a wrong value.
    """
    where = f"{FLAGS_FILE}={path}"
    known = {
        _dashed(flag): action
        for action in actions
        if (flag := action.option_strings[-1]) not in NOT_OF_A_FILE
    }
    words: dict[str, str] = {}
    for name, value in _object_of(where, _content(where, path)).items():
        action = known.get(_dashed(name))
        if action is None:
            raise UserError(f"{where}: {_why_no_flag(name, list(known))}")
        flag = action.option_strings[-1]
        if flag in words:
            raise UserError(f"{where}: {flag} stands there twice: leave one out")
        words[flag] = _word(f"{where}: {flag}", action, value)
        if words[flag]:
            _check(where, words[flag], check)
    return [word for word in words.values() if word]


def _check(where: str, word: str, check: Callable[[str], object]) -> None:
    try:
        check(word)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _content(where: str, path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=_without_twins)
    except OSError as error:
        raise UserError(f"{where}: cannot read it ({error.strerror or error})") from error
    except RecursionError as error:
        raise UserError(f"{where} is not JSON of flags: it is nested too deeply") from error
    except ValueError as error:  # neither UTF-8 nor JSON, or a key twice
        raise UserError(f"{where} is not JSON of flags: {error}") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin} stands there twice: leave one out")
    return found


def _object_of(where: str, content: Any) -> dict[str, Any]:
    """The flags in what was read: beside `flags` there may be `defaults`, which nobody reads."""
    if isinstance(content, dict) and "flags" in content:
        if others := sorted(set(content) - {"flags", "defaults"}):
            raise UserError(f"{where}: {others[0]} beside `flags`: put it into `flags`")
        content = content["flags"]
    if not isinstance(content, dict):
        raise UserError(f'{where}: expected an object of flags, as in {{"--print-freq": 10}}')
    return content


def _why_no_flag(name: str, flags: list[str]) -> str:
    if _dashed(name) in NOT_OF_A_FILE:
        return f"{name} cannot stand in a file of flags: leave it out"
    near = difflib.get_close_matches(name, flags, n=1)
    return f"unknown flag {name!r}" + (f", did you mean {near[0]}?" if near else "")


def _word(where: str, action: argparse.Action, value: Any) -> str:
    """The word for a flag with its value; empty: the default is meant."""
    flag, may_be_bare = action.option_strings[-1], action.nargs == "?"
    if value is None or (may_be_bare and value is False):
        return ""
    if may_be_bare and value is True:
        return flag
    if isinstance(value, bool):
        return f"{flag}={str(value).lower()}"
    if isinstance(value, int | float | str):
        return f"{flag}={value}"
    raise UserError(
        f"{where} is a {type(value).__name__}: expected a text, a number, true, false or null"
    )


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def flags_as_json(
    parser: argparse.ArgumentParser, options: argparse.Namespace, left_out: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What a file of flags holds so that it makes the same options: flags, and all defaults.

    Args:
        parser: has all flags.
        options: what it has parsed.
        left_out: flags that do not belong there, beside --flags-file.
    """
    defaults = parser.parse_args([])
    found: dict[str, dict[str, Any]] = {"flags": {}, "defaults": {}}
    for action in parser._actions:
        flag = action.option_strings[-1]
        if flag in (*NOT_OF_A_FILE, *left_out):
            continue
        value = getattr(options, action.dest)
        part = "defaults" if value == getattr(defaults, action.dest) else "flags"
        is_bare = action.nargs == "?" and value == action.const
        found[part][flag] = True if is_bare else _json_value(value)
    return found


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value
