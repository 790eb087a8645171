"""Two hosts train together as a user starts them; a mistake or a lost host is one line on both.

The hosts are namespaces of this machine that are joined by a cable (two_hosts.py).
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    PYTHON_FIRST,
    ROOT,
    assert_same_losses,
    losses_of,
    metrics_of,
    shell,
    train,
    write_days,
)
from two_hosts import two_hosts, why_no_hosts

from ranks import machines
from ranks.addresses import LOOPBACK, interface_of, is_reachable, own_address
from ranks.machine_connection import SECONDS_OF_SILENCE

PORT = 29500
REASON = why_no_hosts()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


# ---------------------------------------------------------------- machines meet


def options(node_rank, *more, address="10.77.0.1", nnodes=2, seconds=60):
    return [f"--nnodes={nnodes}", f"--node-rank={node_rank}", f"--master-addr={address}",
            f"--master-port={PORT}", f"--seconds={seconds}", *more]  # fmt: skip


MEET = [sys.executable, "-m", "ranks.machines"]


def meet(hosts, *lines):
    """(status, stderr) of `python -m ranks.machines` with each line of options, on host 0, 1, 0."""
    return ends_of(*(begin(hosts, k % 2, *MEET, *line) for k, line in enumerate(lines)))


def ends_of(*running):
    """(status, stderr) of each, once all have ended."""
    ends = [process.communicate(timeout=100)[1] for process in running]
    return [(process.returncode, end) for process, end in zip(running, ends, strict=True)]


def begin(hosts, number, *words, **settings):
    """Start a command on a host."""
    command = hosts[number].command(*words, cwd=ROOT)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **settings)


def processes_with(word):
    """Processes whose command line has it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(word).encode() in (path / "cmdline").read_bytes():
                found.append(path.name)
    return found


def wait_until(is_so):
    deadline = time.monotonic() + 100  # others may be at work on this machine
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_hosts
def test_machines_that_all_come_and_agree_go_on_and_say_nothing(hosts):
    ours = ["--same=--nproc=4", "--same=script=train"]
    assert meet(hosts, options(0, *ours), options(1, *ours)) == [(0, "")] * 2
    hosts[1].pull_the_cable()
    at_once = "from ranks import gathering, machines; gathering.SECONDS_BEFORE_A_LINE = 0.0;"
    impatient = [sys.executable, "-c", f"{at_once} raise SystemExit(machines.main())"]
    alone, other = ends_of(
        *(begin(hosts, number, *impatient, *options(number, seconds=3)) for number in (0, 1))
    )
    assert alone[0] == other[0] == 2
    assert "error: no machine with --node_rank=1 at 10.77.0.1:29501 in " in alone[1]
    assert "Waiting for the machine with --node_rank=0 at 10.77.0.1:29501 (" in other[1]


@needs_hosts
@pytest.mark.parametrize(
    "one, other, line",
    [
        (options(0, "--same=--nproc=4"), options(1, "--same=--nproc=2"),
         "--nproc=2 on the machine with --node_rank=1 (host1), --nproc=4 on the machine with"
         " --node_rank=0 (host0): give both the same"),
        (options(0, nnodes=3), options(1),
         "--nnodes=2 on the machine with --node_rank=1 (host1), --nnodes=3 on the machine with"
         " --node_rank=0 (host0): give both the same"),
    ],
)  # fmt: skip
def test_machines_that_disagree_end_with_one_line_on_each(hosts, one, other, line):
    assert meet(hosts, one, other) == [(2, f"error: {line}\n")] * 2


@needs_hosts
def test_a_number_that_two_machines_have_is_one_line_on_all(hosts):
    lines = [options(0, nnodes=3), options(1, nnodes=3), options(1, nnodes=3)]
    for status, said in meet(hosts, *lines):
        assert status == 2 and re.fullmatch(
            r"error: --node_rank=1 on host[01] and host[01]: give each machine its own number\n",
            said,
        )


@needs_hosts
def test_a_machine_that_starts_again_counts_once_and_a_stranger_does_not(hosts):
    first = begin(hosts, 0, *MEET, *options(0, nnodes=3, seconds=200))
    both, second = ("--node_rank=1, --node_rank=2 at", "machine with --node_rank=2 at")
    assert both in first.stderr.readline()
    leaves = begin(hosts, 1, "bash", "-c", '"$@" & read -r; kill -9 $!', "x", *MEET,
                   *options(1, nnodes=3), stdin=subprocess.PIPE)  # fmt: skip
    assert second in first.stderr.readline()
    leaves.communicate("\n", timeout=100)
    assert both in first.stderr.readline()
    calls = f"import socket; socket.create_connection(('10.77.0.1', {PORT + 1})).send(b'GET\\n')"
    assert begin(hosts, 1, sys.executable, "-c", calls).wait(timeout=100) == 0
    assert first.poll() is None
    others = [begin(hosts, 1, *MEET, *options(number, nnodes=3)) for number in (1, 2)]
    assert [end[0] for end in ends_of(first, *others)] == [0, 0, 0]


AT_WORK = ["bash", "-c", 'touch "$0"; sleep 1000; true']  # with the file that says so


@needs_hosts
@pytest.mark.parametrize("fails", [0, 1])
def test_a_machine_that_fails_at_its_work_ends_the_others_and_their_work(fails, hosts, tmp_path):
    """As one does that cannot prepare its data; its own words are its work's alone."""
    busy = [*AT_WORK, tmp_path / "busy"]
    wait = 'while [ ! -e "$0" ]; do sleep 0.1; done; exit 7'
    work = {1 - fails: busy, fails: ["bash", "-c", wait, tmp_path / "busy"]}
    running = [begin(hosts, k, *MEET, *options(k), "--", *work[k]) for k in range(2)]
    found = ends_of(*running)
    line = (
        f"error: the machine with --node_rank={fails} (host{fails}) has ended before all were"
        " ready: its script says why; start the same command on all machines\n"
    )
    assert found[fails] == (7, "") and found[1 - fails] == (2, line)
    assert not processes_with(tmp_path)


@needs_hosts
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_is_killed_at_its_work_ends_the_others(killed, hosts, tmp_path):
    running = [
        begin(hosts, k, *MEET, *options(k), "--", *AT_WORK, tmp_path / f"{k}") for k in range(2)
    ]
    wait_until(lambda: all((tmp_path / f"{k}").exists() for k in range(2)))
    hosts[killed].kill()
    status, said = ends_of(*running)[1 - killed]
    assert (
        status == 2 and f"--node_rank={killed} (" in said and " has ended before all were" in said
    )


@needs_hosts
@pytest.mark.slow
def test_a_machine_that_loses_its_network_at_its_work_is_missed_in_a_minute(hosts, tmp_path):
    running = [
        begin(hosts, k, *MEET, *options(k), "--", *AT_WORK, tmp_path / f"{k}") for k in range(2)
    ]
    wait_until(lambda: all((tmp_path / f"{k}").exists() for k in range(2)))
    hosts[1].pull_the_cable()
    start = time.monotonic()
    assert [status for status, _ in ends_of(*running)] == [2, 2]
    assert time.monotonic() - start < SECONDS_OF_SILENCE + 15


@needs_hosts
def test_a_machine_that_starts_again_while_others_work_ends_all_with_one_line(hosts, tmp_path):
    """It would wait for work that the others have begun without it, and they for its ranks."""
    running = [
        begin(hosts, k, *MEET, *options(k), "--", *AT_WORK, tmp_path / f"{k}") for k in range(2)
    ]
    wait_until(lambda: all((tmp_path / f"{k}").exists() for k in range(2)))
    running.append(begin(hosts, 1, *MEET, *options(1), "--", "true"))
    line = (
        "error: the machine with --node_rank=1 (host1) has started again while the others"
        " prepared: start the same command on all machines\n"
    )
    assert ends_of(*running) == [(2, line)] * 3


WAITS = """
source "{root}/test/common.sh"
PYTHON={python} OUTPUT={here} KIND=train DEVICE=cpu NPROC=1 NNODES=2 NODE_RANK=1
MEET_ADDR=10.77.0.1 MEET_PORT=29500
keep_others_out
echo $$ >{here}/script
meet_machines {work}
"""


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock there is no lock")
@needs_hosts
@pytest.mark.parametrize("when", ["waits", "works"])
@pytest.mark.parametrize("name", ["TERM", "KILL", "HUP"])
def test_a_script_that_is_ended_leaves_no_process_and_no_lock(name, when, hosts, tmp_path):
    work = f"{shlex.join(AT_WORK)} {tmp_path}/at_work"
    text = WAITS.format(root=ROOT, python=sys.executable, here=tmp_path, work=work)
    script = begin(hosts, 1, "bash", "-c", text)
    if when == "works":
        own = [f"--same={word}" for word in ("--nproc=1", "--device=cpu")]
        own += ["--same=--demo=no", "--same=script=train"]
        first = begin(hosts, 0, *MEET, *options(0, *own), "--", "sleep", "100")
        wait_until((tmp_path / "at_work").exists)
    else:
        wait_until(lambda: len(processes_with(f"--same=script=train\0--\0{AT_WORK[0]}")) > 0)
    kill = hosts[1].command("kill", f"-{name}", (tmp_path / "script").read_text().strip(), cwd="/")
    subprocess.run(kill, check=True)
    said = script.communicate(timeout=60)[1]
    wait_until(lambda: not processes_with(tmp_path))
    assert shell("flock", "-n", tmp_path / "train.lock", "true").returncode == 0
    if name != "KILL":
        assert script.returncode == {"TERM": 143, "HUP": 129}[name]
        assert said == f"stopped by SIG{name} before any rank has started\n"
    if when == "works":
        assert ends_of(first)[0][0] == 2


def test_an_address_or_port_that_cannot_be_this_machines_is_one_line():
    for address, line in [
        ("no.such.invalid", "--master_addr=no.such.invalid: "),
        (
            "192.0.2.77",
            "cannot listen at 192.0.2.77:29500: this machine does not have that address:"
            " --node_rank=0 is for the machine that --master_addr names",
        ),
    ]:
        found = train(*options(0, address=address), program=machines.main)
        assert found.status == 2 and line in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "address, meant",
    [("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("224.0.0.1",) * 2, ("::", "::")],
)
def test_an_address_that_no_other_machine_reaches_is_one_line_on_all(address, meant, number):
    found = train(*options(number, address=address), program=machines.main)
    assert (found.status, found.out, found.err) == (2, "",
        f"error: --master_addr={address} is {meant} here, and no other machine reaches that: give"
        " the name or number in the network of the machine with --node_rank=0\n"
    )  # fmt: skip


def test_addresses_that_lead_from_one_machine_to_another_are_known():
    assert all(map(is_reachable, ["10.77.0.1", "2001:db8::1", "fe80::1%eth0", "169.254.3.4"]))
    assert not any(map(is_reachable, ["127.0.1.1", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1"]))


@pytest.mark.parametrize(
    "words, line",
    [
        (options(7), "error: --node_rank=7: expected a number from 0 to 1\n"),
        (options(0, "--same=foo"), "error: argument --same: 'foo' is not NAME=VALUE; python -m"
         " ranks.machines --help lists all flags\n"),
        (options(0, "foo"), "error: unexpected argument 'foo': all arguments are flags; python -m"
         " ranks.machines --help lists all flags\n"),
    ],
)  # fmt: skip
def test_words_that_are_none_are_one_line(words, line):
    found = train(*words, program=machines.main)
    assert (found.status, found.err) == (2, line)


@needs_hosts
@pytest.mark.parametrize("number", [PORT, PORT + 1])
def test_a_port_that_is_taken_is_one_line(hosts, number):
    taken = f"""
import socket, subprocess, sys
with socket.create_server(("10.77.0.1", {number})):
    sys.exit(subprocess.run([sys.executable, "-m", "ranks.machines", *sys.argv[1:]]).returncode)
"""
    command = hosts[0].command(sys.executable, "-c", taken, *options(0), cwd=ROOT)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = f"cannot listen at 10.77.0.1:{number}: the port is taken: give all machines another"
    line += " --master_port\n"
    assert done.returncode == 2 and done.stderr.endswith(line) and done.stderr.count("\n") == 1


FRIENDS = "--node_rank=0 --master_addr=10.77.0.1 --master_port=29500".split()


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--nnodes=2"], "--nnodes=2: give --node_rank=R (0 to 1, another one on each machine),"
         " --master_addr=ADDR (the machine with --node_rank=0), --master_port=PORT (the same on"
         " all) too"),
        (["--nnodes=2", *FRIENDS[:2]], "--nnodes=2: give --master_port=PORT (the same on all) too"),
        (FRIENDS, "--node_rank, --master_addr and --master_port are for several machines:"
         " give --nnodes=N too"),
        (["--nnodes=x", *FRIENDS], "--nnodes=x: expected a whole number from 1 to 99999"),
        (["--nnodes=0", *FRIENDS], "--nnodes=0: expected a whole number from 1 to 99999"),
        (["--nnodes=100000", *FRIENDS], "--nnodes=100000: expected a whole number from 1 to 99999"),
        (["--nnodes=1", *FRIENDS, "--node_rank=1"],
         "--node_rank=1: expected a whole number from 0 to 0, as --nnodes is 1"),
        (["--nnodes=2", *FRIENDS, "--node-rank=2"],
         "--node_rank=2: expected a whole number from 0 to 1, as --nnodes is 2"),
        (["--nnodes=2", *FRIENDS, "--node_rank", "-1"],
         "--node_rank=-1: expected a whole number from 0 to 1, as --nnodes is 2"),
        (["--nnodes=2", *FRIENDS, "--master-port=65535"],
         "--master_port=65535: expected a port from 1 to 65534; the one after it is used too"),
        (["--nnodes=2", *FRIENDS, "--master_port=http"],
         "--master_port=http: expected a port from 1 to 65534; the one after it is used too"),
    ],
)  # fmt: skip
def test_machines_without_all_that_they_need_are_one_line_and_status_2(argv, line, tmp_path):
    script = ROOT / "test" / "train_full_8p.sh"
    done = shell("bash", script, f"--data_path={tmp_path}", "--device=cpu", *argv, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")


def test_a_script_of_several_machines_answers_without_the_others(tmp_path):
    """Nobody is at the address; a plan is one for the ranks of all machines."""
    script = ROOT / "test" / "train_full_8p.sh"
    given = [f"--data_path={tmp_path}", "--device=cpu", "--nnodes=2", "--nproc=2", *FRIENDS]
    given += ["--node_rank=1", "--device_id=77", "--"]
    plan = [*given, "--arch-embedding-size=9-9", "--print_plan"]
    done = shell("bash", script, *plan, cwd=tmp_path, env=PYTHON_FIRST)
    assert done.returncode == 0 and len(re.findall(r"^plan: 4 ranks ", done.stdout, re.M)) == 1
    assert "error" not in done.stderr and list(tmp_path.iterdir()) == []
    done = shell("bash", script, *given, "--nepochs=0", cwd=tmp_path, env=PYTHON_FIRST)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("No checkpoints: ")]
    assert done.returncode == 2 and len(lines) == 1 and "--nepochs" in lines[0]


GOES_ON = """
source "{root}/test/common.sh"
NNODES={nnodes} CHECKPOINTS={own} EXTRA=({extra})
goes_on_by_itself
"""


@pytest.mark.parametrize(
    "extra, goes_on",
    [
        ("", False),
        ("--checkpoint-dir=a", False),
        ("--resume", False),
        ("--checkpoint-dir=a --save-minutes=5 --resume", True),
        ("--resume --checkpoint_dir a", True),
        ("--checkpoint-dir=a --resume=a", True),
        ("--resume=a/000001-step-5 --checkpoint-dir=a", False),
        ("--checkpoint-dir=a --resume true", False),
    ],
)
def test_ranks_start_again_if_they_go_on_from_the_newest_checkpoint(extra, goes_on):
    """In whatever order the flags stand; another attempt must not begin at one path for ever."""
    done = shell("bash", "-c", GOES_ON.format(root=ROOT, nnodes=2, own="", extra=extra))
    assert (done.returncode == 0) == goes_on
    path = re.search(r"--resume[= ](\S+)", extra) and not goes_on
    said = re.match(r"No restarts: --resume=\S+ begins there each time", done.stderr)
    assert bool(path) == bool(said), done.stderr
    alone = shell("bash", "-c", GOES_ON.format(root=ROOT, nnodes=1, own="", extra=extra))
    assert alone.returncode == 1 and alone.stderr == ""
    own = shell("bash", "-c", GOES_ON.format(root=ROOT, nnodes=1, own="a", extra=extra))
    assert own.returncode == 0


MAKE = """
source "{root}/test/common.sh"
PYTHON={root}/makes_demo DEMO_DATA={root}/test/demo_data
mkdir -p "$ROOT/test/output"
make_demo_data
echo "$DATA_PATH"
"""
MAKES_DEMO = """#!/bin/sh
echo call >>"$0.calls"
sleep 1
mkdir "${2#--make-demo=}" && touch "${2#--make-demo=}/day_0" && echo "Bayes AUC 0.8"
"""


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock nobody waits")
def test_machines_that_share_a_folder_make_its_demo_once(tmp_path):
    (tmp_path / "test").mkdir()
    for path in (ROOT / "test").glob("*.sh"):
        shutil.copy(path, tmp_path / "test")
    stub = tmp_path / "makes_demo"
    stub.write_text(MAKES_DEMO)
    stub.chmod(0o755)
    command = ["bash", "-c", MAKE.format(root=tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "".join(said).count("Bayes AUC 0.8\n") == 1
    assert all(text.endswith(f"{tmp_path}/test/demo_data\n") for text in said)
    assert (tmp_path / "makes_demo.calls").read_text() == "call\n"


# ---------------------------------------------------------------- ranks meet

RANKS = r"""
import os, signal, sys, time
import dlrm_s_pytorch as dlrm
from common.errors import PassingError
from forked_ranks import run_ranks
from ranks.collectives import any_rank
from ranks.process import joined, this_process

where = dict(word.split("=") for word in sys.argv[2:])


def work():
    process = this_process("cpu")
    try:
        with joined(process, timeout=5):
            any_rank(process, [True])
            print("joined\n", end="", flush=True)  # in one write
            while True:
                any_rank(process, [True])
                time.sleep(0.01)
    except PassingError as error:
        print(f"rank {process.rank} ends: {error}\n", end="", flush=True)


run_ranks(2, work, int(sys.argv[1]), **where)
"""
TOGETHER = ("MASTER_ADDR=10.77.0.1", f"MASTER_PORT={PORT + 1}", "WORLD_SIZE=4")


@contextlib.contextmanager
def ranks_on(hosts, *where):
    """Two ranks on each host; the processes, once all ranks have met."""
    paths = f"PYTHONPATH={ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"
    with contextlib.ExitStack() as stack:
        running = []
        for number, host in enumerate(hosts):
            words = ["env", paths, "OMP_NUM_THREADS=1", sys.executable, "-c", RANKS, 2 * number]
            process = subprocess.Popen(
                host.command(*words, *where, cwd=ROOT), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            running.append(stack.enter_context(process))
        stack.callback(lambda: [host.kill() for host in hosts])
        for process in running:
            assert [process.stdout.readline() for _ in range(2)] == ["joined\n"] * 2
        yield running


def addresses(found):
    return {address.rpartition(":")[0] for address in found}


@needs_hosts
@pytest.mark.parametrize(
    "how, lost",
    [
        ("killed", 1),
        pytest.param("cable", 0, marks=pytest.mark.slow),
        pytest.param("killed", 0, marks=pytest.mark.slow),
        pytest.param("cable", 1, marks=pytest.mark.slow),
    ],
)
def test_a_lost_host_ends_the_other_one_within_the_timeout_and_is_named(hosts, how, lost):
    with ranks_on(hosts, *TOGETHER) as running:
        for host in hosts:
            assert addresses(host.listening()) == {host.address}
        begin = time.monotonic()
        if how == "killed":
            hosts[lost].kill()
        else:
            hosts[lost].pull_the_cable()
        out, err = running[1 - lost].communicate(timeout=60)
        took = time.monotonic() - begin
        if how == "cable":
            out_of_lost = running[lost].communicate(timeout=60)[0]
            assert f"on host{1 - lost})" in out_of_lost
    assert took < 5 + 6, "the timeout, and the end of a process"
    ends = dict(re.findall(r"^rank (\d) ends: (.*)$", out, re.M))
    assert set(ends) == ({"2", "3"} if lost == 0 else {"0", "1"}), out + err
    gone = rf"rank {2 * lost}[^:]*\b(process \d+ )?on host{lost}\b"
    late = rf"ranks {2 * lost}, {2 * lost + 1} \(on host{lost}\) hang: "
    beside = r"rank \d has ended \(process \d+\): "  # it has said so, and ended before this one
    assert any(re.match(f"{gone}|{late}", line) for line in ends.values()), out
    for line in ends.values():
        assert re.match(f"{gone}|{late}|{beside}", line), out


@needs_hosts
def test_ranks_of_one_host_listen_at_the_loopback_address_alone(hosts):
    with ranks_on(hosts[:1]) as running:
        assert addresses(hosts[0].listening()) == {LOOPBACK}
        hosts[0].kill()
        running[0].communicate(timeout=60)


def test_the_interface_of_an_address_is_found():
    assert interface_of(own_address(LOOPBACK)) == "lo"
    assert interface_of("192.0.2.77") == "", "nobody's"


@needs_hosts
@pytest.mark.parametrize("label", [[], ["label", "veth0:1"]])
def test_the_interface_of_an_address_that_is_not_its_first_is_found(label, hosts):
    """gloo looks for a label as for an interface, and takes its address."""
    for host, address in zip(hosts, ("10.78.0.1", "10.78.0.2"), strict=True):
        host.ip("address", "add", f"{address}/24", "dev", "veth0", *label)
    asks = "from ranks.addresses import *; print(interface_of(own_address('10.78.0.1')))"
    command = hosts[1].command(sys.executable, "-c", asks, cwd=ROOT)
    assert subprocess.check_output(command, text=True) == ["veth0", "veth0:1"][bool(label)] + "\n"


@pytest.mark.slow
@needs_hosts
def test_ranks_meet_at_an_address_that_is_not_the_first_one(hosts):
    for host, address in zip(hosts, ("10.78.0.1", "10.78.0.2"), strict=True):
        host.ip("address", "add", f"{address}/24", "dev", "veth0")
    with ranks_on(hosts, "MASTER_ADDR=10.78.0.1", *TOGETHER[1:]) as running:
        hosts[0].kill()
        running[1].communicate(timeout=60)


# ---------------------------------------------------------------- as a user starts them

MODEL = (
    "--arch-mlp-bot=13-32-16 --arch-mlp-top=32-1 --arch-sparse-feature-size=16"
    " --max-ind-range=1000 --data-sub-sample-rate=0 --mlperf-events=false --print-freq=2"
    " --test-freq=5 --dist-timeout=20"
).split()


@contextlib.contextmanager
def script_on(host, copy, here, data, *flags, options=(), name="train_full_8p.sh"):
    """A training script on a host, with 4 ranks; its output goes to here/out and here/err."""
    here.mkdir(exist_ok=True)
    number = host.name.removeprefix("host")
    meeting = f"--nnodes=2 --node_rank={number} --master_addr=10.77.0.1 --master-port={PORT}"
    words = ["bash", copy / "test" / name, f"--data_path={data}", "--device=cpu", "--nproc=4"]
    words += [*(options or meeting.split()), "--batch_size=128", "--", *MODEL, *flags]
    settings = os.environ | PYTHON_FIRST | {"OMP_NUM_THREADS": "1"}
    with (
        open(here / "out", "w") as out,
        open(here / "err", "w") as err,
        subprocess.Popen(host.command(*words, cwd=here), stdout=out, stderr=err, env=settings)
        as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                host.kill()


def wait_for(text, file, *processes):
    deadline = time.monotonic() + 200  # others may be at work on this machine
    while text not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        assert all(process.poll() is None for process in processes), file.read_text()
        time.sleep(0.05)


ONE_MACHINE = """
import os, sys
import dlrm_s_pytorch as dlrm
from forked_ranks import run_ranks

run_ranks(8, lambda: dlrm.main(sys.argv[1:]))
"""


def losses_of_one_machine(flags_file, folder):
    """What 8 ranks on this machine print with the same flags."""
    folder.mkdir()
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    own = [f"--flags-file={flags_file}", "--run-dir=", "--save-model=", "--report="]
    own += ["--metrics-file=", "--tensor-board-filename="]
    done = shell(sys.executable, "-c", ONE_MACHINE, *own, cwd=folder, env=paths)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@needs_hosts
def test_two_hosts_train_what_one_machine_trains_and_listen_where_they_say(hosts, copy, tmp_path):
    """They share a folder with the data, which they prepare together, and that of the program."""
    data, (first, second) = tmp_path / "data", (tmp_path / host.name for host in hosts)
    write_days(data, 2, 900)
    with (
        script_on(hosts[0], copy, first, data) as one,
        script_on(hosts[1], copy, second, data) as other,
    ):
        wait_for("Finished training it 2/", first / "out", one, other)
        found, elsewhere = (host.listening() for host in hosts)
        assert other.wait(timeout=100) == one.wait(timeout=100) == 0, (first / "err").read_text()
    everywhere = {address for address in found if not address.startswith("10.77.0.1:")}
    assert {address.rpartition(":")[2] for address in everywhere} == {str(PORT)}, "torchrun's"
    assert f"10.77.0.1:{PORT + 1}" in found, "the ranks' store"
    assert addresses(elsewhere) == {"10.77.0.2"}
    out, said = (first / "out").read_text(), (second / "out").read_text()
    assert (out + said).count("Prepared 1800 rows") == 1, "by whoever came first"
    assert "Ranks 4 to 7 have ended well. Results are on the machine with --node_rank=0" in said
    assert "Finished training" not in said and "Final result" not in said
    assert {"DLRM.pth", "DLRM.png"} <= {path.name for path in first.iterdir()}
    assert {path.name for path in second.iterdir()} == {"out", "err"}
    output = copy / "test" / "output" / "0"
    assert "RankSize = 8" in (output / "DLRM_bs128_8p_acc.log").read_text()
    logs = {
        path.name for folder in (output, output / "node1") for path in folder.glob("train_*.log")
    }
    assert logs == {f"train_{rank}.log" for rank in range(8)}
    whole = losses_of_one_machine((output / "train_0.log").resolve().parent / "flags.json",
                                  tmp_path / "alone")  # fmt: skip
    assert len(losses_of(whole)) == 5
    assert_same_losses(losses_of(out), losses_of(whole))
    assert [one["auc"] for one in metrics_of(out)] == [one["auc"] for one in metrics_of(whole)]


@pytest.mark.slow
@needs_hosts
def test_each_host_may_prepare_a_copy_of_its_own_but_no_other_data(hosts, copy, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for seeds, status in ((1, 1), 0), ((1, 2), 1):
        for folder, seed in zip(folders, seeds, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            write_days(folder / "data", 2, 900, seed=seed)
        with (
            script_on(hosts[0], copy, folders[0], folders[0] / "data") as one,
            script_on(hosts[1], copy, folders[1], folders[1] / "data") as other,
        ):
            ends = one.wait(timeout=200), other.wait(timeout=200)
        assert ends == (status, status)
        for folder in folders:
            assert "Prepared 1800 rows" in (folder / "out").read_text()
    for folder in folders:
        assert re.search(
            r"^error: train_[04].log: ranks 4 to 7 have .*, rank 0 has .*: give all machines the"
            r" same prepared data$",
            (folder / "err").read_text(),
            re.M,
        )


@pytest.mark.slow
@needs_hosts
def test_the_script_of_the_other_host_ends_if_one_cannot_prepare(hosts, copy, tmp_path):
    write_days(tmp_path / "data", 2, 900)
    folders = [tmp_path / host.name for host in hosts]
    folders[1].mkdir()
    with (
        script_on(hosts[0], copy, folders[0], tmp_path / "data") as one,
        script_on(hosts[1], copy, folders[1], folders[1]) as other,
    ):
        ends = one.wait(timeout=100), other.wait(timeout=100)
    said, own = ((folder / "err").read_text() for folder in folders)
    assert ends == (2, 2) and "neither day_0" in own and "--node_rank" not in own
    line = "error: the machine with --node_rank=1 (host1) has ended before all were ready: its"
    assert line in said and said.count("error: ") == 1


@pytest.mark.slow
@needs_hosts
def test_a_script_on_one_host_listens_at_the_loopback_address_alone(hosts, copy, tmp_path):
    write_days(tmp_path / "data", 2, 900)
    one_machine = ["--nnodes=1"]
    data, here = tmp_path / "data", tmp_path / "here"
    with script_on(hosts[0], copy, here, data, options=one_machine) as script:
        wait_for("Finished training it 2/", here / "out", script)
        assert addresses(hosts[0].listening()) == {LOOPBACK}
        assert script.wait(timeout=100) == 0
    assert "Final result" in (here / "out").read_text()


def rank_of(output, rank):
    """The process that is a rank of a script's run, by its number outside."""
    ours = {f"RANK={rank}".encode(), f"LOGS={output}/train".encode(), b"GROUP_WORLD_SIZE=2"}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if ours <= set((path / "environ").read_bytes().split(b"\0")):
                return int(path.name)
    raise AssertionError("no such rank")


@pytest.mark.slow
@needs_hosts
@pytest.mark.parametrize("rank", [0, 6])
def test_ranks_of_both_hosts_go_on_from_a_checkpoint_when_one_is_killed(
    rank, hosts, copy, tmp_path
):
    data, (first, second) = tmp_path / "data", (tmp_path / host.name for host in hosts)
    write_days(data, 2, 900)
    flags = [f"--checkpoint-dir={tmp_path}/saved", "--save-every=5", "--resume", "--nepochs=9"]
    output = copy / "test" / "output" / "0"
    with (
        script_on(hosts[0], copy, first, data, *flags) as one,
        script_on(hosts[1], copy, second, data, *flags) as other,
    ):
        wait_for("of epoch 2,", first / "out", one, other)
        os.kill(rank_of(output if rank < 4 else output / "node1", rank), signal.SIGKILL)
        ends = one.wait(timeout=300), other.wait(timeout=300)
    out = (first / "out").read_text()
    assert ends == (0, 0), out + (first / "err").read_text()
    assert out.count("resumed from ") == 1 and "it 8/8 of epoch 8," in out
    assert "have ended well" in (second / "out").read_text()


@pytest.mark.slow
@needs_hosts
@pytest.mark.parametrize("lost", [0, 1])
def test_the_script_of_the_other_host_names_a_lost_host_and_ends(lost, hosts, copy, tmp_path):
    data, folders = tmp_path / "data", [tmp_path / host.name for host in hosts]
    write_days(data, 2, 900)
    with (
        script_on(hosts[0], copy, folders[0], data, "--nepochs=500") as one,
        script_on(hosts[1], copy, folders[1], data, "--nepochs=500") as other,
    ):
        wait_for("of epoch 1,", folders[0] / "out", one, other)
        hosts[lost].kill()
        left = (one, other)[1 - lost]
        begin = time.monotonic()
        status = left.wait(timeout=100)
        took = time.monotonic() - begin
    said = (folders[1 - lost] / "err").read_text()
    line = rf"error: train_\d.log: rank {4 * lost} gives no sign of life .* on host{lost}\): "
    assert status == 1 and re.search(f"^{line}", said, re.M), said
    assert took < 20 + 15, "--dist-timeout, and the end of all processes"
