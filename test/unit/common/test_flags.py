"""Flags in either spelling, one-line errors, and what each type of value takes and refuses."""

from argparse import ArgumentTypeError

import pytest

from common.errors import UserError
from common.flags import ArgumentParser, dashed_floats, dashed_ints, number_in, true_or_false

OFF = {"use_npu": False}


def parse(*argv):
    parser = ArgumentParser(prog="program.py")
    parser.add_argument("--mini-batch-size", type=int, default=1, help="rows")
    parser.add_argument("--local_rank", type=number_in(int, 0), default=0, help="card")
    parser.add_argument("--data_path", default="", help="folder")
    parser.add_argument("--use-npu", action="store_true", help="switch")
    return parser.parse_args(argv)


@pytest.mark.parametrize("dash", ["-", "_"])
def test_dashes_and_underscores_are_the_same(dash):
    options = parse(
        f"--mini{dash}batch{dash}size=2", f"--local{dash}rank", "3", f"--data{dash}path=a-b_c"
    )
    assert vars(options) == {"mini_batch_size": 2, "local_rank": 3, "data_path": "a-b_c"} | OFF


@pytest.mark.parametrize(
    "word, message",
    [
        (
            "--mini-batch-sise=3",
            "unknown flag --mini-batch-sise=3, did you mean --mini-batch-size?",
        ),
        ("--zzz", "unknown flag --zzz"),
        ("--mini-batch", "unknown flag --mini-batch, did you mean --mini-batch-size?"),
        ("nonsense", "unexpected argument 'nonsense': all arguments are flags"),
        ("--local-rank=-1", "argument --local_rank: '-1' is not a whole number at least 0"),
        ("--data-path", "argument --data_path: expected one argument"),
        ("--use-npu=maybe", "argument --use-npu: 'maybe' is neither true nor false"),
        ("--use-npu=", "argument --use-npu: '' is neither true nor false"),
        ("--help=true", "argument -h/--help: ignored explicit argument 'true'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(word, message):
    with pytest.raises(UserError) as caught:
        parse(word)
    assert str(caught.value) == f"{message}; program.py --help lists all flags"


@pytest.mark.parametrize(
    "argv, is_on",
    [
        ([], False),
        (["--use-npu"], True),
        (["--use-npu=true"], True),
        (["--use_npu=Yes"], True),
        (["--use-npu=false"], False),
        (["--use-npu", "--use-npu=false"], False),
        (["--use-npu=0", "--local-rank=1", "--use-npu"], True),
    ],
)
def test_a_switch_takes_true_and_false_and_the_last_one_counts(argv, is_on):
    assert parse(*argv).use_npu is is_on


TYPES = {
    true_or_false: {"True": True, "false": False, "0": False, "YES": True, "no": False},
    dashed_ints: {"13-512-64": (13, 512, 64), "7": (7,)},
    dashed_floats: {"1.0-3.5": (1.0, 3.5), "1e-3-2E-1": (0.001, 0.2), "4": (4.0,)},
    number_in(int, 0, 16): {"0": 0, "16": 16},
    number_in(float, 0): {"0": 0.0, "1e9": 1e9},
}
REFUSED = [
    (true_or_false, "maybe", "'maybe' is neither true nor false"),
    (dashed_ints, "4-a-2", "'4-a-2' is not whole numbers joined by '-', as in 13-512-64"),
    (dashed_ints, "4-0", "'4-0' holds a number below 1"),
    (dashed_floats, "1-x", "'1-x' is not numbers joined by '-', as in 1.0-3.5"),
    (number_in(int, 1), "0", "'0' is not a whole number at least 1"),
    (number_in(int, 1), "1.5", "'1.5' is not a whole number at least 1"),
    (number_in(float, 0, 1), "1.5", "'1.5' is not a number in [0, 1]"),
    (number_in(float, 0, 1), "nan", "'nan' is not a number in [0, 1]"),
]


def test_a_type_takes_what_its_help_says():
    for kind, values in TYPES.items():
        for text, value in values.items():
            assert kind(text) == value, text


@pytest.mark.parametrize("kind, text, message", REFUSED)
def test_a_type_refuses_anything_else(kind, text, message):
    with pytest.raises(ArgumentTypeError) as caught:
        kind(text)
    assert str(caught.value) == message


def test_names_given_are_those_of_the_command_line():
    parser = ArgumentParser()
    parser.add_argument("--some-number", type=int, default=3)
    parser.add_argument("--other", default="x")
    parser.add_argument("--switch", action="store_true")
    assert parser.names_given([]) == set()
    assert parser.names_given(["--some_number=3", "--switch"]) == {"some_number", "switch"}
    assert parser.parse_args([]).other == "x"
    with pytest.raises(UserError):
        parser.names_given(["--some-number=x"])
    assert parser.parse_args([]).some_number == 3
