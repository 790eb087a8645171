"""Flags in a file are checked as those of the command line, which win; mistakes name the key."""

import json

import pytest

import dlrm_s_pytorch as dlrm
from common.errors import UserError
from common.flags_file import flags_as_json


@pytest.fixture
def parse(tmp_path):
    """Parses a command line behind a file with this content, an object or a text."""

    def parse(content, *argv):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "f.json").write_text(text)
        return dlrm.parse_options([f"--flags-file={tmp_path}/f.json", *argv])

    return parse


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_kind_of_value_is_what_the_command_line_makes_of_it(parse, wrapped):
    flags = {
        "--mini-batch-size": 128, "--learning_rate": 1e-05, "--arch-mlp-bot": "13-512-16",
        "--print-time": True, "--debug-mode": False, "--round-targets": True, "--triton": False,
        "--optimizer": None, "--data-size": "640", "--rand-data-mu": -1.5, "--mlperf-org": "-x",
    }  # fmt: skip
    content = {"flags": flags, "defaults": {"--nepochs": 9}} if wrapped else flags
    line = (
        "--mini-batch-size=128 --learning-rate=1e-05 --arch-mlp-bot=13-512-16 --print-time"
        " --round-targets=true --triton=false --data-size=640 --rand-data-mu=-1.5"
    ).split()
    found = vars(parse(content)) | {"flags_file": "", "mlperf_org": None}
    assert found == vars(dlrm.parse_options(line))


def test_the_command_line_wins(parse):
    content = {"--mini-batch-size": 128, "--print-time": True, "--resume": True,
               "--checkpoint-dir": "saved"}  # fmt: skip
    options = parse(content)
    assert options.resume == "newest in --checkpoint-dir" and options.print_time
    options = parse(content, "--mini_batch_size", "2", "--print-time=false", "--resume=mine")
    assert (options.mini_batch_size, options.print_time, options.resume) == (2, False, "mine")
    assert parse({"--resume": False}).resume == ""


def test_of_two_files_the_last_one_is_read(parse, tmp_path):
    (tmp_path / "other.json").write_text('{"--print-freq": 7}')
    options = parse({"--nepochs": 9}, f"--flags-file={tmp_path}/other.json")
    assert (options.nepochs, options.print_freq) == (1, 7)


WRONG = {
    '{"--mini-batch-sice": 1}': "'--mini-batch-sice', did you mean --mini-batch-size?",
    '{"mini-batch-size": 1}': "'mini-batch-size', did you mean --mini-batch-size?",
    '{"--mini-batch-size": 0}': "argument --mini-batch-size: '0' is not a whole number at least 1",
    '{"--mini-batch-size": 1.0}': "--mini-batch-size: '1.0' is not a whole number",
    '{"--mini-batch-size": true}': "--mini-batch-size: 'true' is not",
    '{"--mini-batch-size": [1]}': "--mini-batch-size is a list: expected a text, a number,",
    '{"--print-time": {"a": 1}}': "--print-time is a dict: expected",
    '{"--print-time": "often"}': "--print-time: 'often' is neither true nor false",
    '{"--optimizer": "adam"}': "--optimizer: invalid choice: 'adam'",
    '{"--flags-file": "f.json"}': "--flags-file cannot stand in a file",
    '{"--flags_file": null}': "--flags_file cannot stand in a file",
    '{"--help": true}': "--help cannot stand in a file",
    '{"-h": true}': "unknown flag '-h'",
    '{"--nepochs": 1, "--nepochs": 2}': "--nepochs stands there twice",
    '{"--print-freq": null, "--print_freq": 2}': "--print-freq stands there twice",
    '{"flags": {"--nepochs": 1}, "--print-freq": 2}': "--print-freq beside `flags`",
    '{"flags": [1]}': "expected an object of flags",
    "[]": "expected an object of flags",
    "{": "is not JSON of flags: ",
    "": "is not JSON of flags: ",
    "[" * 10**5: "is nested too deeply",
    "\udcff": "is not JSON of flags: ",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_each_mistake_is_one_line_that_names_file_and_key(tmp_path, text):
    path = tmp_path / "f.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        dlrm.parse_options([f"--flags-file={path}"])
    said = str(error.value)
    assert said.startswith(f"--flags-file={path}") and WRONG[text] in said and "\n" not in said


def test_a_file_that_is_not_there_is_told(tmp_path):
    for path, why in ((tmp_path / "no.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"--flags-file={path}: cannot read it .{why}"):
            dlrm.parse_options([f"--flags-file={path}"])
    with pytest.raises(UserError, match="argument --flags-file: expected one argument"):
        dlrm.parse_options(["--flags-file"])


ALL_KINDS = (
    "--arch-mlp-bot=13-16-2 --loss-weights=nan-1e-05 --learning-rate=inf --print-time --resume"
    " --checkpoint-dir=saved --triton=false --jit-compile=true --weighted-pooling=fixed"
    " --save-minutes=0.1 --mini-batch-size=7 --rand-data-mu=3 --save-model=ä-b"
).split()


@pytest.mark.parametrize("line", [[], ALL_KINDS, ["--resume=a b", "--data-set=kaggle"]])
def test_flags_that_were_written_are_the_same_options_again(parse, line):
    parser = dlrm.make_parser()
    options = dlrm.parse_options(line)
    content = flags_as_json(parser, options, ["--run-dir"])
    again = parse(json.dumps(content, allow_nan=False))
    assert repr(vars(again) | {"flags_file": ""}) == repr(vars(options)), "nan is not itself"
    assert len(content["flags"]) == len(line), "the defaults are apart"
    names = {action.option_strings[-1] for action in parser._actions}
    assert names - {*content["flags"], *content["defaults"]} == {
        "--help", "--flags-file", "--run-dir",
    }  # fmt: skip
