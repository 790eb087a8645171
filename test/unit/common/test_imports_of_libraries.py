"""Large libraries are imported without looking for garbage, which is collected as before then."""

import gc

import pytest

from common.imports import garbage_left_alone


@pytest.fixture(autouse=True)
def collecting():
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_behind_the_block(enabled):
    (gc.enable if enabled else gc.disable)()
    with garbage_left_alone():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_the_collector_is_as_before_if_the_import_fails():
    with pytest.raises(ImportError), garbage_left_alone():
        raise ImportError
    assert gc.isenabled()


def test_later_collections_do_not_look_at_what_was_made():
    before = gc.get_freeze_count()
    with garbage_left_alone():
        made = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= before + len(made)
