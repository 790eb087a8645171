"""Writes docs/flags.md and docs/flags.zh.md from the parsers of the two programs.

    python test/flags_pages.py

What a flag does is its help text; the Chinese page takes its sentences from docs/flags.zh.tsv,
which has a line for each flag and each group.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dlrm_s_pytorch as dlrm
from common.flags import true_or_false
from criteo.demo import add_demo_options

SENTENCES = ROOT / "docs" / "flags.zh.tsv"
ENGLISH = {
    "head": """# Flags

English | [简体中文](flags.zh.md)

`python test/flags_pages.py` writes this page from the parsers; `--help` prints the same. Dashes
and underscores in flags are alike. A **switch** takes no value and is off unless it is given. A
flag of **true or false** takes one: `--triton=false`. `data_utils.py` takes the groups *Criteo
data* and *Demo data*, `dlrm_s_pytorch.py` all but the last.
""",
    "columns": "| Flag | Value | Default | Meaning |",
    "switch": "switch",
    "true or false": "true or false",
    "whole number": "whole number",
    "number": "number",
    "text": "text",
    "whole numbers": "whole numbers joined by `-`",
    "numbers": "numbers joined by `-`",
    "or": " or ",
    "off": "off",
    "none": "none",
    "empty": "empty",
}
CHINESE = {
    "head": """# 参数

[English](flags.md) | 简体中文

本页由 `python test/flags_pages.py` 根据两个程序的解析器生成；`--help` 打印相同的内容（英文）。
参数名中的连字符与下划线等价。**开关**不带值，不给出即为关。
**true 或 false** 类参数需要给出值：`--triton=false`。
`data_utils.py` 接受“Criteo 数据”和“演示数据”两组，
`dlrm_s_pytorch.py` 接受除最后一组之外的全部参数。
""",
    "columns": "| 参数 | 取值 | 默认值 | 含义 |",
    "switch": "开关",
    "true or false": "true 或 false",
    "whole number": "整数",
    "number": "数",
    "text": "文本",
    "whole numbers": "以 `-` 连接的整数",
    "numbers": "以 `-` 连接的数",
    "or": " 或 ",
    "off": "关",
    "none": "无",
    "empty": "空",
}


def groups() -> list[argparse._ArgumentGroup]:
    """The groups of flags of both programs, in the order of the page."""
    demo = argparse.ArgumentParser()
    add_demo_options(demo)
    found = [*dlrm.make_parser()._action_groups, *demo._action_groups]
    return [group for group in found if flags_of(group)]


def flags_of(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """The flags of a group, without --help."""
    return [one for one in group._group_actions if one.option_strings and one.dest != "help"]


def value_of(flag: argparse.Action, words: dict[str, str]) -> str:
    """What kind of value a flag takes."""
    if flag.nargs == 0:
        return words["switch"]
    if flag.choices:
        return words["or"].join(f"`{choice}`" for choice in flag.choices)
    if flag.type is true_or_false:
        return words["true or false"]
    kinds = {"dashed_ints": "whole numbers", "dashed_floats": "numbers", "int": "whole number"}
    name = getattr(flag.type, "kind", flag.type)
    return words[kinds.get(getattr(name, "__name__", ""), "text" if name is None else "number")]


def default_of(flag: argparse.Action, words: dict[str, str]) -> str:
    """A flag's default as one would type it."""
    if flag.nargs == 0:
        return words["off"]
    if flag.default is None or flag.default == "":
        return words["none" if flag.default is None else "empty"]
    if isinstance(flag.default, bool):
        return f"`{str(flag.default).lower()}`"
    return f"`{flag.default}`"


def english(flag: argparse.Action) -> str:
    """What a flag does, by its help text."""
    return (flag.help or "").replace("|", "\\|")


def sentences() -> dict[str, str]:
    """{flag or title of a group: its Chinese sentence}."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def page(words: dict[str, str], meanings: dict[str, str]) -> str:
    """The text of a page.

    Args:
        words: ENGLISH or CHINESE.
        meanings: of flags and titles; where one is missing, the parser's own words are taken.
    """
    parts = [words["head"]]
    for group in groups():
        parts.append(f"## {meanings.get(group.title or '', group.title)}\n")
        lines = [words["columns"], "|---|---|---|---|"]
        for flag in flags_of(group):
            name = flag.option_strings[0]
            cells = [f"`{name}`", value_of(flag, words), default_of(flag, words)]
            lines.append(f"| {' | '.join([*cells, meanings.get(name, english(flag))])} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


PAGES = {
    "flags.md": lambda: page(ENGLISH, {}),
    "flags.zh.md": lambda: page(CHINESE, sentences()),
}

if __name__ == "__main__":
    for file, make in PAGES.items():
        (ROOT / "docs" / file).write_text(make(), encoding="utf-8")
