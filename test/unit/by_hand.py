"""The rows that preparation must make, with dictionaries and loops, and how tests call it."""

import numpy as np
from conftest import rows_of, train

from common.errors import reports_errors
from common.flags import ArgumentParser
from criteo.spec import DataSpec, add_data_options
from data_utils import run
from preparation.sizes import DEFAULT_SIZES


def spec(*argv):
    parser = ArgumentParser()
    add_data_options(parser)
    return DataSpec.from_options(parser.parse_args([str(word) for word in argv]))


def prepare(*argv, sizes=DEFAULT_SIZES):
    """Run data_utils.py in this process; returns a Result."""
    return train(*argv, program=reports_errors(lambda words: run(words, sizes)))


def by_hand(days, max_ind_range=-1):
    """(the int32 rows (n, 40) of each day, rows of each table) for days of fields as text."""
    parts, ids = number_by_hand(days, max_ind_range)
    return parts, [len(table) for table in ids]


def number_by_hand(days, max_ind_range=-1):
    """(the int32 rows (n, 40) of each day, a dictionary from value to id for each table)."""
    ids = [{} for _ in range(26)]
    parts = []
    for day in days:
        rows = []
        for fields in day:
            integers = [max(int(word or 0), 0) for word in fields[1:14]]
            categories = []
            for table, word in enumerate(fields[14:]):
                value = int(word or "0", 16)
                value = value % max_ind_range if max_ind_range > 0 else value
                categories.append(ids[table].setdefault(value, len(ids[table])))
            rows.append([int(fields[0]), *integers, *categories])
        parts.append(np.array(rows, np.int32))
    return parts, ids


def assert_vocabulary_by_hand(vocabulary, days, max_ind_range=-1):
    """Check that each id's value is the one that a dictionary gave this id."""
    _, ids = number_by_hand(days, max_ind_range)
    vocabulary.check()
    assert vocabulary.counts == tuple(len(table) for table in ids)
    for table, of_table in enumerate(ids):
        assert vocabulary.values(table).view(np.uint32).tolist() == list(of_table)


def assert_equals_by_hand(prepared, days, max_ind_range=-1):
    """Check data that was prepared in the order of the files, with nothing dropped."""
    parts, counts = by_hand(days, max_ind_range)
    half = (len(parts[-1]) + 1) // 2
    np.testing.assert_array_equal(rows_of(prepared, "train"), np.concatenate(parts[:-1]))
    np.testing.assert_array_equal(rows_of(prepared, "test"), parts[-1][:half])
    np.testing.assert_array_equal(rows_of(prepared, "val"), parts[-1][half:])
    assert list(prepared.counts) == counts
    assert_vocabulary_by_hand(prepared.vocabulary, days, max_ind_range)
    assert prepared.rows_per_part == tuple(len(part) for part in parts)
