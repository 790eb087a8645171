"""Flags that change what is trained have to stay, and each flag is known to be one or not."""

import dlrm_s_pytorch as dlrm

# isort: split
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CRITEO_MODEL

from checkpoints.recipe import FREE, check_same, check_same_data, facts_of, flags_of
from common.errors import UserError

# Each flag is in this table or in FREE. Whoever adds one decides: does a run that goes on with
# another value train something else than the run that is continued?
HAVE_TO_STAY = """
arch_sparse_feature_size arch_embedding_size arch_mlp_bot arch_mlp_top arch_interaction_op
arch_interaction_itself weighted_pooling activation_function qr_flag qr_threshold qr_operation
qr_collisions md_flag md_threshold md_temperature md_round_dims loss_function loss_weights
loss_threshold round_targets data_generation eval_split data_size num_batches
num_indices_per_lookup num_indices_per_lookup_fixed rand_data_dist rand_data_min rand_data_max
rand_data_mu rand_data_sigma data_trace_file data_trace_enable_padding data_randomize
max_ind_range data_sub_sample_rate memory_map mlperf_bin_loader mlperf_bin_shuffle numpy_rand_seed
mini_batch_size learning_rate optimizer lr_num_warmup_steps lr_decay_start_step lr_num_decay_steps
mlperf_grad_accum_iter amp exchange_type initial_values
""".split()


def flags_of_parser():
    return {action.dest for action in dlrm.make_parser()._actions} - {"help"}


def test_each_flag_has_to_stay_or_is_free():
    flags = flags_of_parser()
    assert not FREE & set(HAVE_TO_STAY)
    assert len(HAVE_TO_STAY) == len(set(HAVE_TO_STAY))
    assert flags - FREE == set(HAVE_TO_STAY), "decide which of both a new flag is"
    assert FREE <= flags, "of no flag"


def test_the_flags_that_stay_are_written_as_json():
    options = dlrm.parse_options(
        ["--arch-mlp-bot=13-16-2", "--loss-weights=nan-1.5", "--learning-rate=inf", "--nepochs=7"]
    )
    found = flags_of(options)
    assert set(found) == set(HAVE_TO_STAY)
    assert found["arch_mlp_bot"] == [13, 16, 2] and found["loss_weights"] == [None, 1.5]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_same_flags_are_the_same_after_they_were_a_file():
    line = ["--arch-mlp-bot=13-16-2", "--loss-weights=nan-1.5", "--loss-threshold=0.1"]
    then = json.loads(json.dumps(flags_of(dlrm.parse_options(line))))
    check_same("here", then, flags_of(dlrm.parse_options(line)))


def changed(*line):
    """What is said if a run goes on with these flags."""
    then = json.loads(json.dumps(flags_of(dlrm.parse_options([]))))
    with pytest.raises(UserError) as error:
        check_same("--resume=7", then, flags_of(dlrm.parse_options(line)))
    return str(error.value)


def test_each_flag_that_was_changed_is_named_with_both_values():
    line = "--optimizer=adagrad --arch-mlp-bot=4-8-2 --round-targets=true --weighted-pooling=fixed"
    assert changed(*line.split(), "--nepochs=9", "--print-freq=7") == (
        "--resume=7: --arch-mlp-bot was 4-3-2, is 4-8-2; --optimizer was sgd, is adagrad;"
        " --round-targets was False, is True; --weighted-pooling was not given, is fixed:"
        " flags that change what is trained have to stay; give those it had, or start anew with"
        " another --checkpoint-dir"
    )


@pytest.mark.parametrize("name", HAVE_TO_STAY)
def test_each_of_them_is_compared(name):
    now = flags_of(dlrm.parse_options([]))
    other = "other" if isinstance(now[name], str) else 77
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} was .*, is "):
        check_same("here", now | {name: other}, now)


def test_a_free_flag_may_change_even_if_an_earlier_version_compared_it():
    check_same("here", {"seed": 1, "nepochs": 3, "save_every": 5}, {"seed": 1, "nepochs": 4})


def test_a_checkpoint_from_before_a_flag_did_what_is_its_default():
    now = flags_of(dlrm.parse_options([]))
    then = {name: now[name] for name in now if name not in ("exchange_type", "initial_values")}
    check_same("here", then, now)
    with pytest.raises(UserError, match="--exchange-type was float32, is bf16"):
        check_same("here", then, now | {"exchange_type": "bf16"})


def test_a_flag_that_one_version_does_not_have_is_named():
    for then, now, told in [
        ({"later": 3}, {}, "--later was 3, is not given"),
        ({}, {"new_one": [1, 2]}, "--new-one was not given, is 1-2"),
        ({"text": "a"}, {"text": ""}, "--text was a, is not given"),
    ]:
        with pytest.raises(UserError, match=told):
            check_same("here", then, now)


@pytest.mark.parametrize(
    "value", ["\x1b[2J" * 99, "\ud800", [["\x1b"]] * 5, {"a": "\x1b"}, [1] * 10**6, 10**400, ["\r"]]
)
def test_values_that_nobody_has_written_are_told_in_a_readable_line(value):
    for then in ({"seed": value}, {str(value)[:1000]: 1}):
        with pytest.raises(UserError) as error:
            check_same("here", then, {"seed": 1})
        assert str(error.value).isprintable() and len(str(error.value)) < 400
        with pytest.raises(UserError) as error:
            check_same_data("here", then, {"seed": 1})
        assert str(error.value).isprintable() and len(str(error.value)) < 400


# ---------------------------------------------------------------- the data


class RowsPacked:
    """Stands for a layout: rows are packed as they are."""

    def unpack(self, rows):
        return np.asarray(rows)


def prepared_of(rows, counts=(5, 6)):
    return SimpleNamespace(
        rows=lambda split: rows, rows_per_part=(len(rows), 3), counts=counts, layout=RowsPacked()
    )


ROWS = np.arange(5000 * 4, dtype=np.int32).reshape(5000, 4)


def test_data_of_no_file_has_no_facts():
    """Flags decide it."""
    assert facts_of(None) == {}


def test_the_same_rows_are_the_same_data_wherever_they_lie():
    then = json.loads(json.dumps(facts_of(prepared_of(ROWS))))
    check_same_data("here", then, facts_of(prepared_of(ROWS.copy())))


def test_few_rows_are_data_too():
    check_same_data("here", facts_of(prepared_of(ROWS[:3])), facts_of(prepared_of(ROWS[:3])))


def one_changed(row):
    rows = ROWS.copy()
    rows[row, 2] += 1
    return rows


@pytest.mark.parametrize(
    "rows, counts, told",
    [
        (one_changed(0), (5, 6), "checksum of the first and last rows: "),
        (one_changed(-1), (5, 6), "checksum of the first and last rows: "),
        (ROWS[::-1], (5, 6), "checksum of the first and last rows: "),
        (ROWS[:-1], (5, 6), "rows of each part: 5000-3 then, 4999-3 now"),
        (ROWS, (5, 7), "rows of each table: 5-6 then, 5-7 now"),
    ],
)
def test_other_data_is_told(rows, counts, told):
    match = f"here was made with other training data .*{told}.*: give the data it had"
    then, now = facts_of(prepared_of(ROWS)), facts_of(prepared_of(rows, counts))
    if "checksum" not in told:  # it differs too, and the first difference is told
        then = {name: value for name, value in then.items() if "checksum" not in name}
        now = {name: value for name, value in now.items() if "checksum" not in name}
    with pytest.raises(UserError, match=match):
        check_same_data("here", then, now)


def test_data_in_place_of_none_is_told():
    with pytest.raises(UserError, match="not given then, .* now"):
        check_same_data("here", {}, facts_of(prepared_of(ROWS)))


def test_criteo_data_is_known_again_in_another_folder(kaggle_copy):
    """Its rows are packed on the disk."""
    moved = kaggle_copy.with_name("moved")

    def facts(folder):
        options = dlrm.parse_options([*CRITEO_MODEL, f"--data_path={folder}"])
        return facts_of(dlrm.prepare_data(options))

    then = json.loads(json.dumps(facts(kaggle_copy)))
    kaggle_copy.rename(moved)
    check_same_data("here", then, facts(moved))
    assert len(then["rows of each table"]) == 26
