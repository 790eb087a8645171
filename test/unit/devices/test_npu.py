"""On the emulated npu device the program computes what it does on the CPU, and waits for nothing.

One process runs all cases (npu_program.py); the tests look at its results.
"""

import json
import re
import shutil
import sys
from collections import Counter

import pytest
import torch
from conftest import (
    CRITEO_MODEL,
    GOLDEN,
    PYTHON_FIRST,
    RELEASE,
    ROOT,
    SMALL_MODEL,
    assert_same_losses,
    losses_of,
    metrics_of,
    shell,
    train,
)
from ranks_program import run_cases
from torch.utils import backend_registration

from optim import loss_scale

sys.path.insert(0, str(ROOT / "test"))
from tables_of_torch_npu import read

KINDS = read(ROOT / "test" / "operators.tsv")  # of several versions of torch_npu
EMULATED = {"PYTHONPATH": str(ROOT / "test" / "emulated_npu")}
NPU = "--use-npu"
SELDOM = "--print-freq=1000"  # only the last step prints a line
HIGH_SCALE = 2.0**32  # with this loss scale the first steps overflow in float16
SCALE_ON_RANKS = 2.0**28

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no devices made in Python",
)

# flags of runs on random data that give the CPU's losses
SAME = {
    "sgd": "",
    "adagrad": "--optimizer=adagrad --learning-rate=0.01",
    "rwsadagrad": "--optimizer=rwsadagrad --learning-rate=0.01",
    "accumulation": "--optimizer=adagrad --learning-rate=0.01 --mlperf-grad-accum-iter=3",
    "learned_pooling": "--weighted-pooling=learned --optimizer=rwsadagrad --learning-rate=0.01",
    "cat": "--arch-interaction-op=cat --loss-function=mse",
    "itself": "--arch-interaction-itself --loss-function=wbce --loss-weights=0.5-2",
    "qr": "--qr-flag --qr-threshold=50",
    "qr_concat": "--qr-flag --qr-threshold=150 --qr-operation=concat --arch-mlp-bot=13-64-32",
    "md": "--md-flag --md-threshold=50 --optimizer=adagrad --learning-rate=0.01",
    "clamp": "--loss-threshold=0.1 --num-indices-per-lookup-fixed=true",
}
OF_CRITEO = {
    "criteo": "",
    "criteo_adagrad": "--optimizer=adagrad --learning-rate=0.01",
    "criteo_rwsadagrad": "--optimizer=rwsadagrad --learning-rate=0.01",
    "criteo_accumulation": "--mlperf-grad-accum-iter=4",
    "criteo_in_memory": "--data-randomize=day",
    "criteo_worker": "--num-workers=1 --loss-function=wbce --loss-weights=0.5-2",
    "criteo_cat": "--arch-interaction-op=cat --loss-function=mse",
    "criteo_qr": "--qr-flag",
    "criteo_md": "--md-flag",
    "no_fused_optimizer": "--fused-optimizer=false",
    "no_one_lookup": "--one-lookup=false",
    "no_static_shapes": "--static-shapes=false",
    "no_pin_memory": "--pin-memory=false",
    "no_copy_stream": "--copy-stream=false",
}
RATES = {"sgd": 0.1, "adagrad": 0.01, "rwsadagrad": 0.01}  # Adagrad's steps magnify differences
AMP = {
    f"{amp}_{optimizer}": f"--amp={amp} --optimizer={optimizer} --learning-rate={RATES[optimizer]}"
    for amp in ("bf16", "fp16")
    for optimizer in ("sgd", "adagrad", "rwsadagrad")
} | {
    "fp16_accumulation": "--amp=fp16 --mlperf-grad-accum-iter=4",
    "fp16_md": "--amp=fp16 --md-flag",
    "bf16_qr": "--amp=bf16 --qr-flag",
}
SHORT = "--num-batches=6"  # the CPU is slow in these types
CHIPS = {"910": "fp16", "A2": "bf16", "A3": "fp16", "950": "bf16"}
FAULTS = {
    "embedding_bag": "operators",
    "item": "waits",
    "cpu": "host_copies",
    "table": "host_copies",
    "nonzero": "waits",
    "unique": "waits",
    "synchronize": "waits",
    "host_tensor": "waits",
    "double": "dtypes",
}


def criteo_flags(folder, flags):
    """13 batches of 500; the last one of an epoch has 3 rows."""
    mapped = [] if "--data-randomize" in flags else ["--memory-map"]
    if not mapped:  # its preparation writes the rows in another order
        folder = folder.with_name("in_memory")
    sizes = ["--mini-batch-size=500", "--test-mini-batch-size=330", "--test-freq=1000"]
    return [*CRITEO_MODEL, *sizes, SELDOM, f"--data_path={folder}", *mapped, *flags.split()]


def make_cases(folder):
    cases = {}
    for name, flags in SAME.items():
        argv = [*SMALL_MODEL, *flags.split()]
        cases[name] = {"argv": [*argv, SELDOM, NPU]}
        cases[f"{name} cpu"] = {"argv": [*argv, SELDOM]}
    short = {name: f"{flags} {SHORT}" for name, flags in AMP.items()}
    for name, flags in {**OF_CRITEO, **short}.items():
        argv = criteo_flags(folder / "data", flags)
        cases[name] = {"argv": [*argv, NPU]}
        cases[f"{name} cpu"] = {"argv": argv}
    for name in ("criteo", "criteo_adagrad", "criteo_rwsadagrad", "criteo_qr", "criteo_md"):
        argv = criteo_flags(folder / "data", f"{OF_CRITEO[name]} {SHORT}")
        cases[f"{name} short cpu"] = {"argv": argv}
    for fault in [*FAULTS, "mixed", "race"]:
        cases[f"fault {fault}"] = {
            "argv": [*criteo_flags(folder / "data", ""), "--num-batches=5", NPU],
            "fault": fault,
        }
    return cases | files_and_chips(folder)


def files_and_chips(folder):
    data = criteo_flags(
        folder / "data", "--optimizer=rwsadagrad --learning-rate=0.01 --test-freq=5 --print-freq=1"
    )
    sgd = [*SMALL_MODEL, "--print-freq=1"]
    saved = f"--save-model={folder / 'npu.pth'}"
    loads = f"--load-model={folder / 'npu.pth'}"
    overflow = [*criteo_flags(folder / "data", "--amp=fp16"), "--nepochs=2", "--print-freq=1"]
    tried = [NPU, "--mini-batch-size=2", "--data-size=6"]
    return {
        "whole": {"argv": [*data, "--nepochs=2", NPU]},
        "whole sgd": {"argv": [*sgd, "--nepochs=2", NPU]},
        "saved sgd": {"argv": [*sgd, f"--save-model={folder / 'sgd.pth'}", NPU]},
        "saved": {"argv": [*data, saved, NPU]},
        "resumed": {"argv": [*data, loads, "--nepochs=2", NPU]},
        "resumed sgd": {"argv": [*sgd, f"--load-model={folder / 'sgd.pth'}", "--nepochs=2", NPU]},
        "loaded on the cpu": {"argv": [*data, loads, "--inference-only"]},
        "overflow": {"argv": [*overflow, NPU], "first_scale": HIGH_SCALE},
        "overflow cpu": {"argv": overflow, "first_scale": HIGH_SCALE},
        "frozen cpu": {"argv": [*overflow, "--learning-rate=0"]},
        "overflow saturates": {
            "argv": [*overflow, NPU],
            "first_scale": HIGH_SCALE,
            "environment": {"EMULATED_NPU_CHIP": "910"},
        },
        "no card": {"argv": tried, "environment": {"EMULATED_NPU_CARDS": "0"}},
        "too few cards": {"argv": [*tried, "--local_rank=9"]},
        "no bf16": {"argv": [*tried, "--amp=bf16"], "environment": {"EMULATED_NPU_CHIP": "910"}},
        "jit": {"argv": [*tried, "--jit-compile=true"]},
        "no jit": {"argv": [*tried, "--jit-compile=false"]},
        "jit refused": {
            "argv": [*tried, "--jit-compile=true"],
            "environment": {"EMULATED_NPU_CHIP": "950"},
        },
        "profile": {"argv": [*SMALL_MODEL, NPU, "--enable-profiling", SELDOM]},
        "self-check": {"argv": [NPU, "--self-check"]},
        "self-check fails": {"argv": [NPU, "--self-check"], "fault": "mixed"},
    }


def on_chip(chip):
    return {
        "argv": [NPU, "--self-check", f"--amp={CHIPS[chip]}"],
        "environment": {"EMULATED_NPU_CHIP": chip},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("npu")
    for name in ("data", "in_memory"):
        shutil.copytree(GOLDEN / "data" / "kaggle", folder / name)
    return folder


def results_of(cases, folder):
    """What npu_program.py has found."""
    (folder / "cases.json").write_text(json.dumps(cases))
    program = ROOT / "test" / "unit" / "npu_program.py"
    files = ["cases.json", "results.json"]
    done = shell(sys.executable, program, *files, cwd=folder, env=EMULATED, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def found(folder):
    earlier = folder / "dlrm_s_pytorch_npu" / "zzz_9_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    earlier.mkdir(parents=True)
    (earlier / "trace_view.json").write_text("of an earlier run")
    return results_of(make_cases(folder), folder)


@pytest.fixture(scope="module")
def kinds():
    """{operator: kernel, default, composite, or fallback, which runs on the host}."""
    return KINDS["2.13.0"]


def without_kernel(operators, kinds):
    """The operators that an NPU does not have, or runs on the host."""
    names = [name.removeprefix("aten::") for name in operators if not name.startswith("c10d::")]
    return [
        name
        for name in names
        if kinds.get(name, kinds.get(name.removesuffix(".default"), "-")) in ("fallback", "-")
    ]


@pytest.mark.parametrize("name", [*SAME, *OF_CRITEO])
def test_the_losses_and_metrics_are_the_cpus(name, found):
    got, want = found[name], found[f"{name} cpu"]
    assert got["status"] == want["status"] == 0, got["err"]
    assert_same_losses(losses_of(got["out"]), losses_of(want["out"]))
    tests = metrics_of(got["out"])
    assert len(tests) == (name in OF_CRITEO)
    for one, other in zip(tests, metrics_of(want["out"]), strict=True):
        assert one == pytest.approx(other, abs=2e-4)


@pytest.mark.parametrize("name", AMP)
def test_lower_precision_comes_near_float32(name, found):
    optimizer = name.split("_")[1].replace("accumulation", "sgd")
    float32 = "criteo" if optimizer == "sgd" else f"criteo_{optimizer}"
    (got,), (want,) = (losses_of(found[run]["out"]) for run in (name, f"{float32} short cpu"))
    on_cpu = losses_of(found[f"{name} cpu"]["out"])[0]
    if name != "fp16_accumulation":  # the float32 run does not accumulate
        assert got[3] == pytest.approx(want[3], rel=1e-4 if optimizer == "sgd" else 2e-2)
    assert got[3] == pytest.approx(on_cpu[3], rel=1e-4 if optimizer == "sgd" else 2e-2)
    lower = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[name[:4]]
    assert lower in found[name]["steps"]["dtypes"]


IN_A_STEP = [name for name in (*SAME, *OF_CRITEO, *AMP) if name != "no_pin_memory"]


@pytest.mark.parametrize("name", IN_A_STEP)
def test_a_step_has_kernels_for_all_and_waits_for_nothing(name, found, kinds):
    steps = found[name]["steps"]
    assert without_kernel(steps["operators"], kinds) == []
    assert steps["waits"] == {} and steps["host_copies"] == []
    assert "torch.float64" not in steps["dtypes"]
    assert sum(steps["operators"].values()) > 100


def test_evaluating_saving_and_loading_have_kernels_too(found, kinds):
    for name in ("criteo_adagrad", "saved", "resumed", "fp16_rwsadagrad"):
        assert "aten::sort" in found[name]["whole"] or "aten::sort.stable" in found[name]["whole"]
        assert without_kernel(found[name]["whole"], kinds) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_step_may_not_do_is_seen(fault, found, kinds):
    """The test above would fail for each of these faults."""
    steps = found[f"fault {fault}"]["steps"]
    seen = {
        "operators": without_kernel(steps["operators"], kinds) != [],
        "waits": steps["waits"] != {},
        "host_copies": steps["host_copies"] != [],
        "dtypes": "torch.float64" in steps["dtypes"],
    }
    assert seen[FAULTS[fault]], steps
    if fault == "embedding_bag":
        assert without_kernel(steps["operators"], kinds) == ["_embedding_bag_backward"]


def test_tensors_of_two_devices_do_not_mix(found):
    assert "Expected all tensors to be on the same device" in found["fault mixed"]["err"]


def test_a_stream_may_not_use_what_another_is_still_making(found):
    assert "another stream without waiting for it" in found["fault race"]["err"]


def test_memory_that_is_not_pinned_is_waited_for(found):
    assert set(found["no_pin_memory"]["steps"]["waits"]) == {"copy from pageable memory"}


def test_the_flags_turn_off_what_they_say(found):
    def counts(name):
        return Counter(found[name]["steps"]["operators"])

    plain = counts("criteo")
    assert plain["aten::record_stream"] > 0 and counts("no_copy_stream")["aten::record_stream"] == 0
    steps = 11  # of 13
    lookups = counts("no_one_lookup")["aten::embedding"] - plain["aten::embedding"]
    assert lookups == steps * (26 - 1)
    foreach = "aten::_foreach_add_.List"
    assert plain[foreach] == 0 and counts("no_fused_optimizer")[foreach] == steps


BIG = {"aten::addmm", "aten::mm", "aten::bmm", "aten::embedding", "aten::index_add", "aten::cat"}
BIG |= {"aten::index_add_", "aten::index_select"}


def test_a_short_batch_has_the_shapes_of_the_others(found):
    assert not BIG & set(found["criteo"]["last"])
    assert BIG & set(found["no_static_shapes"]["last"]) >= {"aten::addmm", "aten::bmm"}


def test_a_model_goes_from_the_npu_to_the_cpu_and_back(found):
    for name in ("whole", "saved", "resumed", "loaded on the cpu"):
        assert found[name]["status"] == 0, found[name]["err"]
    best = max(metrics_of(found["saved"]["out"]), key=lambda test: test["auc"])
    (loaded,) = metrics_of(found["loaded on the cpu"]["out"])
    assert loaded["auc"] == pytest.approx(best["auc"], abs=1e-4)
    for end in ("", " sgd"):
        whole, resumed = (losses_of(found[name + end]["out"]) for name in ("whole", "resumed"))
        assert len(resumed) >= 10
        assert_same_losses(resumed, whole[-len(resumed) :])


def test_an_overflow_of_float16_skips_steps_until_the_scale_is_low(found):
    inf, saturated, cpu = (
        [line[3] for line in losses_of(found[name]["out"])]
        for name in ("overflow", "overflow saturates", "overflow cpu")
    )
    assert len(inf) == 26
    assert saturated == pytest.approx(inf, rel=1e-3)
    assert cpu == pytest.approx(inf, rel=1e-3)
    frozen = [line[3] for line in losses_of(found["frozen cpu"]["out"])]
    skipped = [one == other for one, other in zip(inf, frozen, strict=True)].index(False) - 1
    assert 5 < skipped < 20  # each skipped step halves the scale
    assert inf[-1] < frozen[-1]


MISTAKES = {
    "no card": ["no npu device found", "npu-smi info", "without --use-npu the CPU trains"],
    "too few cards": ["card 9 is asked for", "found 8, npu:0 to npu:7"],
    "no bf16": ["--amp=bf16", "has no bfloat16", "--amp=fp16"],
    "jit refused": ["--jit-compile=true", "refuses", "leave the flag out"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_card_cannot_do_is_one_line(name, found):
    run = found[name]
    assert run["status"] == 2 and run["err"].count("\n") == 1 and run["out"] == ""
    for words in MISTAKES[name]:
        assert words in run["err"]


def test_operators_are_compiled_as_the_flag_says(found):
    assert [found[name]["settings"]["jit_compile"] for name in ("jit", "no jit")] == [True, False]
    assert found["sgd"]["settings"]["jit_compile"] is None  # the chip's own setting stays


def test_the_profile_is_torch_npus_and_the_table_ours(found, folder):
    out = found["profile"]["out"]
    assert "phases of a training step" in out and re.search(r"^embedding +2\.00", out, re.M)
    assert (folder / "dlrm_s_pytorch.json").read_text() == "[]"
    assert "backward" in (folder / "dlrm_s_pytorch.prof").read_text()
    assert list(folder.glob("dlrm_s_pytorch_npu/*/ASCEND_PROFILER_OUTPUT/kernel_details.csv"))


def test_a_self_check_passes(found):
    assert_passed(found["self-check"])


@pytest.mark.slow
def test_a_self_check_passes_on_every_chip(tmp_path):
    cases = {chip: on_chip(chip) for chip in CHIPS}
    cases["adagrad"] = {"argv": [NPU, "--self_check", "--amp=fp16", "--optimizer=adagrad"]}
    for found in results_of(cases, tmp_path).values():
        assert_passed(found)


def assert_passed(run):
    assert run["status"] == 0, run
    for words in (
        f"torch_npu      {RELEASE}",
        "CANN           emulated",
        "driver",
        "20 steps",
        "load ",
    ):
        assert words in run["out"]
    assert run["out"].endswith("PASS\n")


def test_a_self_check_that_fails_says_what_and_why(found):
    run = found["self-check fails"]
    assert run["status"] == 1 and "PASS" not in run["out"]
    assert re.search(r"^FAIL: 20 steps: Expected all tensors .* same device", run["out"], re.M)
    assert "Traceback" in run["err"]


# ---------------------------------------------------------------- several ranks, and the scripts

ON_RANKS = {
    "sgd": "",
    "rwsadagrad": "--optimizer=rwsadagrad --learning-rate=0.01 --mlperf-grad-accum-iter=2",
    "bf16": "--amp=bf16",
    "fp16": "--amp=fp16",
    "fp16_overflow": "--amp=fp16 --optimizer=adagrad --learning-rate=0.01 --print-freq=1",
    "skipped": "--on-nan=skip --optimizer=adagrad --learning-rate=0.01 --print-freq=3"
    " --mlperf-grad-accum-iter=2",
}


@pytest.fixture(scope="module")
def on_3_ranks(folder):
    """({name: argv without --use-npu}, the results on 3 ranks with it)."""
    cases = {"random": [*SMALL_MODEL, SELDOM, "--tensor-board-filename="]}
    for name, flags in ON_RANKS.items():
        flags += "" if name in ("fp16_overflow", "skipped") else f" {SHORT}"
        cases[name] = [*criteo_flags(folder / "data", flags), "--tensor-board-filename="]
    files = [folder / "ranks.json", folder / "ranks_results.json"]
    files[0].write_text(json.dumps({name: [*argv, NPU] for name, argv in cases.items()}))
    program = ROOT / "test" / "unit" / "ranks_program.py"
    settings = EMULATED | {"FIRST_SCALE": str(SCALE_ON_RANKS)}
    done = shell(sys.executable, program, 3, *files, "cpu:gloo,npu:hccl", env=settings)
    assert done.returncode == 0, done.stderr
    return cases, json.loads(files[1].read_text())


@pytest.mark.parametrize("name", ["random", *ON_RANKS])
def test_three_ranks_give_what_one_on_the_cpu_gives(name, on_3_ranks, monkeypatch):
    """In the case fp16_overflow some steps overflow, on all ranks or on none."""
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", SCALE_ON_RANKS)
    cases, found = on_3_ranks
    want, got = run_cases({name: cases[name]})[name]["out"], found[name]["out"]
    if "--amp" not in str(cases[name]):
        assert_same_losses(losses_of(got), losses_of(want))
    skipped = [text.count("batch(es) was not finite") for text in (got, want)]
    assert skipped == ([2, 2] if name == "skipped" else [0, 0])
    alike = found[name]["alike"]
    assert alike.count(alike[0]) == 3, "ranks have other dense parameters, or scales"
    losses = [line[3] for line in losses_of(got)]
    # a rank's sums over fewer rows overflow a step earlier or later than the whole batch's
    near = 0.15 if "overflow" in name else 3e-2 if "fp16" in name else 1e-3
    assert losses == pytest.approx([line[3] for line in losses_of(want)], rel=near)
    if name == "fp16_overflow":  # nothing changes in the first steps, then it does
        assert 1 < got.count("1 of 1 steps overflowed in float16") < 12 and len(losses) == 13
        assert abs(got.count("overflowed") - want.count("overflowed")) <= 2
    for one, other in zip(metrics_of(got), metrics_of(want), strict=True):
        assert one["auc"] == pytest.approx(other["auc"], abs=0.1 if "fp16" in name else 2e-3)


# what operators of the kind `default` are made of
INSIDE = """
as_strided empty.memory_format empty_like empty_strided fill_.Scalar index_add.out zero_
""".split()


@pytest.mark.parametrize("version", KINDS)
def test_each_version_has_kernels_for_all_that_runs_use(version, found, on_3_ranks):
    """Steps, evaluations, files, and the exchange between ranks, but not the tests' own faults."""
    runs = [run for name, run in found.items() if run["status"] == 0 and "fault" not in name]
    used = {*INSIDE}.union(*(run["whole"] for run in runs))
    for run in on_3_ranks[1].values():
        used = used.union(*run["operators"])
    assert len(used) > 90
    assert without_kernel(used, KINDS[version]) == []


@pytest.mark.slow
def test_the_script_trains_on_two_ranks(copy, tmp_path):
    """It runs as a user runs it, with a small network; losses are those of one rank on the CPU."""
    network = ["--arch-mlp-bot=13-32-16", "--arch-mlp-top=32-1", "--print-freq=10"]
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    options = [f"--data_path={tmp_path / 'data'}", "--device=npu", "--batch_size=256", "--nproc=2"]
    command = ["bash", copy / "test" / "train_full_8p.sh", *options, "--", *network]
    done = shell(*command, cwd=tmp_path, env=PYTHON_FIRST | EMULATED)
    assert done.returncode == 0, done.stdout + done.stderr
    flags = "--memory-map --arch-sparse-feature-size=16 --learning-rate=0.1 --loss-function=bce"
    flags += " --max-ind-range=10000000 --data-sub-sample-rate=0.875 --mini-batch-size=256"
    want = train(f"--data_path={tmp_path / 'data'}", *flags.split(), *network)
    assert_same_losses(losses_of(done.stdout), want.losses)
    assert len(metrics_of(done.stdout)) == 1 and "Final Performance images/sec" in done.stdout
    results = (copy / "test/output/0/DLRM_bs256_2p_acc.log").read_text()
    assert "RankSize = 2" in results and "DeviceType = npu" in results


def test_the_script_refuses_fewer_cards_than_ranks(copy, tmp_path):
    shutil.copytree(GOLDEN / "data" / "kaggle", tmp_path / "data")
    command = ["bash", copy / "test" / "train_full_8p.sh", f"--data_path={tmp_path}/data"]
    settings = PYTHON_FIRST | EMULATED | {"EMULATED_NPU_CARDS": "2"}
    done = shell(*command, "--device=npu", cwd=tmp_path, env=settings)
    assert done.returncode == 2
    assert "8 ranks want 8 cards, found 2 (npu): give --nproc=2 or --device cpu" in done.stderr
