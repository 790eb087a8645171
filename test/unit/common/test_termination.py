"""SIGTERM and Ctrl-C end a run in order: it unwinds, or it is ended in a few seconds."""

import contextlib
import os
import signal
import threading
import time

import pytest
from signalled import running

from common.errors import TerminatedError
from common.termination import (
    acts_last,
    end_as_asked,
    ends_on_signals,
    finishes_first,
    held_back,
    is_asked,
    show_life,
    waits_for_others,
)


def ended(run, *signals):
    """Send the signals; returns (status, lines after `ready`, stderr) at the program's end."""
    status, out, err = run.end(*signals)
    assert out.startswith("ready\n")
    return status, out.splitlines()[1:], err


UNWINDING = """
try:
    say("ready")
    while True:
        time.sleep(0.01)
finally:
    time.sleep(0.3)
    say("unwound")
"""


@pytest.mark.parametrize(
    "number, status, told, err",
    [(signal.SIGTERM, 143, "ended by SIGTERM", ""), (signal.SIGINT, 130, "", "interrupted\n")],
)
def test_a_signal_unwinds_and_the_last_act_is_done_once(number, status, told, err):
    with running(UNWINDING) as run:
        found = ended(run, number)
    assert found == (status, ["unwound", f"told {told!r}", f"status {status}"], err)


@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM] * 3, [signal.SIGINT, signal.SIGINT, signal.SIGTERM]]
)
def test_signals_of_one_request_do_not_disturb_the_unwinding(signals):
    """A scheduler and torchrun both send SIGTERM; a terminal and torchrun both send SIGINT."""
    with running(UNWINDING) as run:
        run.process.send_signal(signals[0])
        time.sleep(0.1)
        status, lines, _ = ended(run, *signals[1:])
    assert status == (143 if signals[0] == signal.SIGTERM else 130)
    assert lines[0] == "unwound" and [line.split()[0] for line in lines[1:]] == ["told", "status"]


# held back, because the signal may come just before the main thread hangs
HANGING = """
with termination.acts_last(lambda error: say("removed")), termination.held_back():
    say("ready")
    hang()
"""


def test_a_main_thread_that_hangs_is_ended_and_the_last_acts_are_done():
    with running(HANGING, SECONDS_TO_UNWIND=0.5) as run:
        began = time.monotonic()
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["removed", "told 'ended by SIGTERM'"], "")
    assert time.monotonic() - began >= 0.5


def test_a_second_sigterm_ends_it_at_once():
    with running(HANGING, SECONDS_TO_UNWIND=50, SECONDS_OF_A_REQUEST=0.1) as run:
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert run.process.poll() is None
        began = time.monotonic()
        assert ended(run, signal.SIGTERM)[0] == 143
    assert time.monotonic() - began < 10


def test_a_last_act_that_hangs_too_or_fails_keeps_nothing_alive():
    block = HANGING.replace('say("removed")', "1 / 0 if hung.append(1) else hang()")
    block = f"hung = []\n{block.strip()}"
    with running(block, SECONDS_TO_UNWIND=0.1, SECONDS_FOR_LAST_ACTS=0.2) as run:
        status, lines, err = ended(run, signal.SIGTERM)
    assert (status, lines, err) == (143, [], "")
    block = HANGING.replace('say("removed")', "1 / 0")
    with running(block, SECONDS_TO_UNWIND=0.1) as run:
        assert ended(run, signal.SIGTERM) == (143, ["told 'ended by SIGTERM'"], "")


def test_pythons_own_clean_up_keeps_nothing_alive():
    """It would wait for a thread, such as one of a process group that waits for another rank."""
    block = f"threading.Thread(target=time.sleep, args=[100]).start(){UNWINDING}"
    with running(block) as run:
        began = time.monotonic()
        assert ended(run, signal.SIGTERM)[0] == 143
    assert time.monotonic() - began < 50


def test_an_error_that_the_signal_causes_is_not_the_one_that_is_told():
    """As torch's: it raises one when a loader has died, which torchrun's signal has reached too."""
    block = """
try:
    say("ready")
    while True:
        time.sleep(0.01)
finally:
    raise RuntimeError("a loader has died")
"""
    with running(block) as run:
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["told 'ended by SIGTERM'", "status 143"], "")


def test_a_handler_of_dead_children_does_not_disturb_the_unwinding():
    block = """
def raise_error(*_):
    raise RuntimeError("a child has died")
signal.signal(signal.SIGCHLD, raise_error)
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
try:
    say("ready")
    while True:
        time.sleep(0.01)
finally:
    os.kill(child, signal.SIGTERM)
    time.sleep(0.3)
    say("unwound")
"""
    with running(block) as run:
        found = ended(run, signal.SIGTERM)
    lines = ["unwound", "told 'ended by SIGTERM'", "status 143"]
    assert found == (143, lines, "")


def test_a_forked_child_dies_of_its_signal_and_the_run_goes_on():
    block = """
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
say("ready")
os.kill(child, signal.SIGTERM)
say(os.waitpid(child, 0)[1])
time.sleep(0.5)  # longer than the run would have to unwind
"""
    with running(block, SECONDS_TO_UNWIND=0.1) as run:
        found = ended(run)
    assert found == (0, [f"{signal.SIGTERM:d}", "status 0"], "")


def test_a_forked_child_that_leaves_the_block_does_no_last_act():
    block = """
say("ready")
child = os.fork()
if child:
    say(os.waitpid(child, 0)[1])
"""
    with running(block) as run:
        status, lines, err = ended(run)
    assert (status, lines, err) == (0, ["status 0", "0", "status 0"], "")


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "lambda *_: None"])
def test_a_signal_that_is_ignored_or_handled_stays_so(handler):
    """As one that who started the program ignores; Ctrl-C is taken nevertheless."""
    block = "say('ready')\ntime.sleep(0.5)"
    before = f"signal.signal(signal.SIGTERM, {handler})"
    with running(block, before, SECONDS_TO_UNWIND=0.1) as run:
        found = ended(run, signal.SIGTERM)
    assert found == (0, ["status 0"], "")


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_handlers_are_those_of_before_after_the_block():
    """The program's main can be called several times in a process, and in any thread."""
    before, threads, told = handlers(), threading.active_count(), []
    for _ in range(2):
        with ends_on_signals(told.append):
            assert handlers() != before
            with ends_on_signals(told.append), held_back():
                pass
        with pytest.raises(TerminatedError), ends_on_signals(told.append):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        assert handlers() == before and threading.active_count() == threads
        assert signal.set_wakeup_fd(-1) == -1
    assert len(told) == 2


def test_in_another_thread_nothing_happens():
    before, found = handlers(), []

    def run():
        with ends_on_signals(found.append), acts_last(found.append), held_back():
            found.append(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_block_that_is_held_back_is_done_whole():
    done = []
    with pytest.raises(TerminatedError), ends_on_signals(done.append):
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("whole")
        done.append("not done")
    assert done[0] == "whole" and len(done) == 2 and isinstance(done[1], TerminatedError)


# ---------------------------------------------------------------- blocks that finish first

# it works until a signal comes, and then for a while longer
SAVING = """
def work(seconds):
    for _ in range(int(seconds / 0.05)):
        time.sleep(0.05)
        termination.show_life()

with termination.finishes_first():
    say("ready")
    while not termination.is_asked():
        work(0.05)
    work({seconds})
    say("saved")
    termination.end_as_asked()
say("not done")
"""


@pytest.mark.parametrize(
    "number, status, told, err",
    [(signal.SIGTERM, 143, "ended by SIGTERM", ""), (signal.SIGINT, 130, "", "interrupted\n")],
)
def test_a_block_that_finishes_first_ends_itself(number, status, told, err):
    """Although it takes longer than a run has to unwind."""
    with running(SAVING.format(seconds=1), SECONDS_TO_UNWIND=0.1) as run:
        found = ended(run, number)
    assert found == (status, ["saved", f"told {told!r}", f"status {status}"], err)


def test_a_block_that_shows_no_life_is_ended():
    """It has worked for a while after the signal, and waits for something then."""
    block = SAVING.format(seconds=1).replace('say("saved")', 'say("worked")\n    hang()')
    with running(block, SECONDS_TO_UNWIND=0.1, SECONDS_BETWEEN_SIGNS=0.5) as run:
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["worked", "told 'ended by SIGTERM'"], "")


def test_a_second_request_ends_a_block_that_is_at_work_at_once():
    with running(SAVING.format(seconds=90), SECONDS_OF_A_REQUEST=0.1) as run:
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert run.process.poll() is None
        began = time.monotonic()
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["told 'ended by SIGTERM'"], "")
    assert time.monotonic() - began < 50


def test_signals_of_one_request_do_not_end_a_block_that_is_at_work():
    """A scheduler and torchrun send theirs within a second; it works on for longer than that."""
    settings = {"SECONDS_TO_UNWIND": 0.1, "SECONDS_OF_A_REQUEST": 1.0}
    with running(SAVING.format(seconds=2), **settings) as run:
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        status, lines, _ = ended(run, signal.SIGTERM, signal.SIGTERM)
    assert (status, lines[0]) == (143, "saved")


WAITING = SAVING.replace(
    '    say("saved")',
    """    with termination.waits_for_others():
        time.sleep({waiting})
    {then}
    say("saved")""",
)


def test_a_block_that_waits_for_other_ranks_shows_no_life():
    """They have more to save; this one has done its share, and waits in a collective."""
    block = WAITING.format(seconds=0, waiting=2, then="")
    with running(block, SECONDS_TO_UNWIND=0.1, SECONDS_BETWEEN_SIGNS=0.5) as run:
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["saved", "told 'ended by SIGTERM'", "status 143"], "")


def test_a_second_request_ends_a_block_that_waits_for_other_ranks():
    with running(WAITING.format(seconds=0, waiting=90, then=""), SECONDS_OF_A_REQUEST=0.1) as run:
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert run.process.poll() is None
        began = time.monotonic()
        assert ended(run, signal.SIGTERM)[:2] == (143, ["told 'ended by SIGTERM'"])
    assert time.monotonic() - began < 50


def test_a_block_that_hangs_after_it_has_waited_is_ended():
    block = WAITING.format(seconds=0, waiting=0.5, then='say("waited")\n    hang()')
    with running(block, SECONDS_TO_UNWIND=0.1, SECONDS_BETWEEN_SIGNS=0.5) as run:
        assert ended(run, signal.SIGTERM)[:2] == (143, ["waited", "told 'ended by SIGTERM'"])


def test_to_wait_for_other_ranks_is_no_excuse_for_other_blocks():
    block = "with termination.waits_for_others():\n    say('ready')\n    hang()"
    with running(block, SECONDS_TO_UNWIND=0.5) as run:
        assert ended(run, signal.SIGTERM)[0] == 143
    with waits_for_others():  # nor is it an error without a run
        pass


def test_after_such_a_block_a_run_has_all_the_time_to_unwind():
    """However long the block has worked: here nearly twice as long as a run has to unwind."""
    block = SAVING.format(seconds=3.5).strip().replace("\n", "\n    ")
    block = f"try:\n    {block}\nfinally:\n    time.sleep(1)\n    say('unwound')"
    with running(block, SECONDS_TO_UNWIND=2.0) as run:
        status, lines, _ = ended(run, signal.SIGTERM)
    assert (status, lines[:2]) == (143, ["saved", "unwound"])


def test_after_such_a_block_a_run_that_hangs_is_ended_soon():
    block = SAVING.format(seconds=1).strip().replace("\n", "\n    ")
    block = f"try:\n    {block}\nfinally:\n    termination.show_life()\n    hang()"
    with running(block, SECONDS_TO_UNWIND=0.5, SECONDS_BETWEEN_SIGNS=90) as run:
        began = time.monotonic()
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["saved", "told 'ended by SIGTERM'"], "")
    assert time.monotonic() - began < 50


def test_other_blocks_are_ended_however_alive_they_are():
    block = """
with termination.held_back():
    say("ready")
    while True:
        time.sleep(0.01)
        termination.show_life()
"""
    with running(block, SECONDS_TO_UNWIND=0.5) as run:
        found = ended(run, signal.SIGTERM)
    assert found == (143, ["told 'ended by SIGTERM'"], "")


def test_a_loader_of_such_a_block_outlives_the_signal_that_its_parent_gets_too():
    block = """
with termination.finishes_first():
    child = os.fork()
    if not child:
        time.sleep(1)
        os._exit(7)
    say("ready")
    os.kill(child, signal.SIGTERM)
    say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    with running(block) as run:
        assert ended(run) == (0, ["7", "status 0"], "")


def test_a_signal_that_such_a_block_did_not_ask_for_ends_the_run_after_it():
    done = []
    with pytest.raises(TerminatedError), ends_on_signals(done.append):
        with finishes_first():
            assert not is_asked()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert is_asked()
            done.append("whole")
        done.append("not done")
    assert done[0] == "whole" and len(done) == 2 and isinstance(done[1], TerminatedError)
    assert not is_asked()


def test_a_rank_that_got_no_signal_ends_as_one_that_got_sigterm():
    """Another rank got one, and all have saved together."""
    for outside in (False, True):
        with pytest.raises(TerminatedError), contextlib.ExitStack() as stack:
            if not outside:
                stack.enter_context(ends_on_signals(lambda error: None))
            with finishes_first():
                show_life()
                assert not is_asked()
                end_as_asked()
