"""The pages for users: READMEs that one can follow, and flags as the parsers have them."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "test"))
import flags_pages

READMES = ("README.md", "README.zh.md")
SCRIPTS_OWN = {
    "--demo", "--device", "--device_id", "--nproc", "--batch_size", "--fresh", "--help",
    "--nnodes", "--node_rank", "--master_addr", "--master_port",
}  # fmt: skip
OTHER_PROGRAMS = {
    "--nproc_per_node", "--logdir", "--only", "--rows", "--usage", "--ruleset",
    "--max-restarts",
}  # fmt: skip


def all_flags():
    found = (flags_pages.flags_of(group) for group in flags_pages.groups())
    return {name for flags in found for flag in flags for name in flag.option_strings}


@pytest.mark.parametrize("name", flags_pages.PAGES)
def test_the_pages_of_flags_are_the_parsers(name):
    """`python test/flags_pages.py` writes them."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == flags_pages.PAGES[name]()


def test_every_flag_and_group_has_a_chinese_sentence_and_none_is_left_over():
    titles = {group.title for group in flags_pages.groups()}
    assert set(flags_pages.sentences()) == all_flags() | titles


def test_switches_and_flags_of_true_or_false_are_told_apart():
    text = (ROOT / "docs" / "flags.md").read_text()
    assert "| `--memory-map` | switch | off |" in text
    assert "| `--triton` | true or false | `true` |" in text
    assert "| `--arch-mlp-bot` | whole numbers joined by `-` | `4-3-2` |" in text
    assert text.count("\n| `--") == len(all_flags())


def prose(text):
    """Lines that are not of a table."""
    return [line for line in text.splitlines() if not line.startswith("|")]


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short_and_names_no_flag_that_does_not_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(prose(text)) <= 170
    told = set(re.findall(r"(?<![\w-])(--[a-zA-Z][\w-]*)", text))
    dashed = {flag.replace("_", "-") for flag in all_flags() | SCRIPTS_OWN | OTHER_PROGRAMS}
    assert {flag for flag in told if flag.replace("_", "-") not in dashed} == set()
    head = "\n".join(text.splitlines()[:30])
    assert "bash test/train_full_8p.sh --demo" in head and "bash test/run_tests.sh" in head


def test_the_readmes_lines_fit_into_120_columns():

    lines = prose((ROOT / "README.md").read_text())
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_links_to_is_here(name):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    here = [link for link in links if not link.startswith("http")]
    assert here and [link for link in here if not (ROOT / link).exists()] == []


def test_the_chinese_readme_has_the_headings_that_its_readers_know():
    text = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)", text, re.M)
    assert headings == [
        "概述", "准备训练环境", "准备数据集", "开始训练", "使用模型",
        "训练结果展示", "版本说明", "FAQ",
    ]  # fmt: skip
    assert "| NAME | AUC | FPS | Epoch | Torch_Version |" in text
