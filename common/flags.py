"""Flags of the command line: a parser with one-line errors, and types for argparse's `type=`."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from common.errors import UserError
from common.flags_file import FLAGS_FILE, words_of_file


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that takes dashes and underscores in flags as the same.

    A switch may be followed by `=true` or `=false`. Errors are one line each, and for an unknown
    flag they name the nearest one. If the parser has --flags-file, the flags of that file stand
    before those of the command line, which win.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **settings
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The values of all flags in `args` (default: the process's own arguments).

        Raises:
            UserError: a flag is unknown or its value is wrong.
        """
        spelling = {_dashed(flag): flag for flag in self._option_string_actions}
        words = [_canonical(word, spelling) for word in (sys.argv[1:] if args is None else args)]
        if FLAGS_FILE in self._option_string_actions:
            words = [*self._words_of_file(words), *words]
        return self._parse(words, namespace)

    def _parse(self, words: list[str], namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(self._plain_switches(words), namespace)
        if unknown:
            self.error(_unknown_flag(unknown[0], list(self._option_string_actions)))
        return parsed

    def names_given(self, args: Any = None) -> set[str]:
        """Names of the flags that stand in `args`, as the parsed values have them.

        Raises:
            UserError: as `parse_args` does.
        """
        defaults = [(action, action.default) for action in self._actions]
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            return set(vars(self.parse_args(args)))
        finally:
            for action, default in defaults:
                action.default = default

    def _words_of_file(self, words: list[str]) -> list[str]:
        """The words of the file that the command line names last."""
        finder = ArgumentParser(prog=self.prog, add_help=False)
        finder.add_argument(FLAGS_FILE, dest="path", default="")
        path = finder.parse_known_args(words)[0].path
        if not path:
            return []
        return words_of_file(path, self._actions, lambda word: self._parse([word]))

    def _plain_switches(self, words: list[str]) -> list[str]:
        """`--use-npu` for `--use-npu=true`; for `=false` neither that nor an earlier one."""
        kept: list[str] = []
        for word in words:
            flag, equals, value = word.partition("=")
            if not (equals and self._is_switch(flag)):
                kept.append(word)
                continue
            try:
                is_on = true_or_false(value)
            except argparse.ArgumentTypeError as error:
                self.error(f"argument {flag}: {error}")
            kept = [*(other for other in kept if other != flag), *[flag] * is_on]
        return kept

    def _is_switch(self, flag: str) -> bool:
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs == 0 and action.const is True

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse itself would say nothing if the output cannot be written."""
        print(self.format_help(), end="", file=file or sys.stdout, flush=True)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError; argparse itself would print the message and exit."""
        raise UserError(f"{message}; {self.prog} --help lists all flags")


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def _canonical(word: str, spelling: dict[str, str]) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return spelling.get(_dashed(flag), flag) + equals + value


def _unknown_flag(word: str, flags: list[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: all arguments are flags"
    near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    return f"unknown flag {word}" + (f", did you mean {near[0]}?" if near else "")


def true_or_false(text: str) -> bool:
    """Parse `true`, `yes`, `1` as True and `false`, `no`, `0` as False, in any case of letters."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def dashed_ints(text: str) -> tuple[int, ...]:
    """Parse `13-512-64` as (13, 512, 64); every number must be at least 1."""
    try:
        numbers = tuple(int(word) for word in text.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not whole numbers joined by '-', as in 13-512-64"
        ) from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return numbers


def dashed_floats(text: str) -> tuple[float, ...]:
    """Parse `1.0-3.5` as (1.0, 3.5)."""
    try:
        return tuple(float(word) for word in re.split(r"(?<![eE])-", text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not numbers joined by '-', as in 1.0-3.5"
        ) from None


def number_in(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """A type that takes numbers of `kind` (int or float) in [low, high]."""

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            whole = "a whole number" if kind is int else "a number"
            bounds = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} {bounds}")
        return number

    parse.kind = kind  # type: ignore[attr-defined]  # test/flags_pages.py says it
    return parse
