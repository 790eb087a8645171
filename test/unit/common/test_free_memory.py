"""How much memory is free: what the machine has, or what the container leaves, if that is less."""

import sys

import pytest

from common import free_memory as module
from common.free_memory import free_memory

MACHINE = """MemTotal:       64000000 kB
MemFree:         1000000 kB
MemAvailable:    3000 kB
SwapFree:              5 kB
"""
LIMITED = {
    "memory.max": "5000000\n",
    "memory.current": "4000000\n",
    "memory.stat": "anon 17\ninactive_anon 9\ninactive_file 250000\nactive_file 3\n",
}


@pytest.fixture
def say(tmp_path, monkeypatch):
    """Writes what the system says, of the machine and of the container."""

    def write(machine=None, **container):
        monkeypatch.setattr(module, "MACHINE", tmp_path / "meminfo")
        monkeypatch.setattr(module, "CONTAINER", tmp_path)
        files = {"meminfo": machine} | {
            name.replace("_", "."): text for name, text in container.items()
        }
        for name, text in files.items():
            (tmp_path / name).unlink(missing_ok=True)
            if text is not None:
                (tmp_path / name).write_text(text)

    return write


def limits(**more):
    return {name.replace(".", "_"): text for name, text in LIMITED.items()} | more


def test_a_machine_without_a_container_has_what_is_available(say):
    say(MACHINE)
    assert free_memory() == 3000 * 1024


def test_a_container_has_what_its_limit_leaves_and_the_cache_that_can_go(say):
    say(MACHINE, **limits())
    assert free_memory() == 5_000_000 - 4_000_000 + 250_000
    say(MACHINE, **limits(memory_stat="anon 17\n"))
    assert free_memory() == 1_000_000


def test_the_smaller_of_both_counts(say):
    say(MACHINE, **limits(memory_max="9000000000"))
    assert free_memory() == 3000 * 1024


def test_a_container_without_a_limit_has_what_the_machine_has(say):
    say(MACHINE, **limits(memory_max="max\n"))
    assert free_memory() == 3000 * 1024


def test_a_container_beyond_its_limit_has_nothing(say):
    say(MACHINE, **limits(memory_current="6000000"))
    assert free_memory() == 0


@pytest.mark.parametrize("machine", [None, "", "MemTotal: 5 kB\n", "MemAvailable: many kB\n"])
def test_if_nobody_says_all_is_free(say, machine):
    """Some kernels have no such file; a container may have half of its own."""
    say(machine)
    assert free_memory() == sys.maxsize
    say(machine, **limits(memory_current="none of a number"))
    assert free_memory() == sys.maxsize
    say(machine, **limits())
    assert free_memory() == 1_250_000


def test_this_machine_has_some():
    assert 1 << 20 < free_memory()
