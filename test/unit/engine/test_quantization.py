"""Quantized inference: the original's numbers, sizes, ranks, and what it does not go with."""

import json
import re
import shutil
import sys
import weakref

import pytest
from conftest import GOLDEN, ROOT, SMALL_MODEL, golden, shell, train, trained

import dlrm_s_pytorch as dlrm
from common.errors import UserError
from devices import older_torch
from engine import quantization, step
from engine.quantization import check_quantization

CASES = golden("quantization.json")
QUANTIZED = [case for case in CASES["tests"] if case["flags"]]
SIZES = re.compile(r"^(embeddings|MLPs): ([\d,]+) bytes, ([\d,]+) with (\d+) bits, ([\d.]+) ", re.M)
LOG_LOSS = re.compile(r"^log loss ([\d.]+), base rate ([\d.]+)$", re.M)
EMBEDDINGS, MLPS = "--quantize-emb-with-bit=", "--quantize-mlp-with-bit="
# bags of one to ten ids
BAGS = [*SMALL_MODEL, "--mlperf-logging", "--inference-only", "--test-mini-batch-size=100"]


@pytest.fixture(scope="module")
def golden_flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization") / "kaggle"
    shutil.copytree(GOLDEN / "data" / CASES["dataset"], folder)
    argv = CASES["argv"].replace("DATA", str(folder))
    return argv.replace("MODEL", str(GOLDEN / CASES["model"])).split()


@pytest.mark.parametrize("case", CASES["tests"], ids=lambda case: case["flags"] or "float32")
def test_the_originals_metrics(case, golden_flags):
    result = train(*golden_flags, *case["flags"].split())
    assert result.status == 0 and result.err == ""
    (found,) = result.tests
    for name in ("recall", "precision", "ap", "auc"):
        assert abs(found[name] - case[name]) <= 2e-4, (name, found)
    assert abs(found["accuracy"] - case["accuracy"]) <= 0.02


def test_an_evaluation_without_quantization_prints_nothing_of_it(golden_flags):
    out = train(*golden_flags).out
    assert "bytes" not in out and "rows/s" not in out.partition("Testing")[2]


def test_sizes_and_speed_have_lines_of_their_own():
    """Tables of 640 rows at D 64: 4 bits take 36 bytes a row, 8 bits 72, float32 256."""
    flags = [*BAGS, "--arch-sparse-feature-size=64", "--arch-mlp-bot=13-64"]
    out = train(*flags, f"{EMBEDDINGS}4", f"{MLPS}8").out
    (tables, mlps) = SIZES.findall(out)
    assert tables == ("embeddings", f"{640 * 256:,}", f"{640 * 36:,}", "4", "7.11")
    weights, biases, layers = 13 * 64 + 74 * 64 + 64 * 32 + 32, 64 + 64 + 32 + 1, 4
    before, after = 4 * (weights + biases), weights + 4 * (biases + layers)
    assert mlps == ("MLPs", f"{before:,}", f"{after:,}", "8", f"{before / after:.2f}")
    assert float(re.search(r"\nevaluated 640 rows in [\d.]+ s, (\d+) rows/s\n$", out)[1]) > 100
    out = train(*flags, f"{EMBEDDINGS}8").out
    assert SIZES.findall(out) == [("embeddings", f"{640 * 256:,}", f"{640 * 72:,}", "8", "3.56")]
    assert f"\nMLPs: {before:,} bytes, not quantized\n" in out


def test_the_model_in_memory_has_the_sizes_that_are_told_and_no_float32_table(monkeypatch):
    tables = []

    def quantize(model, *args):
        tables.append(weakref.ref(model.emb_l.matrices[0]))
        quantization.quantize(model, *args)

    monkeypatch.setattr(dlrm, "quantize", quantize)
    trainer, result = trained(*BAGS, f"{EMBEDDINGS}4", f"{MLPS}16")
    (of_tables, of_mlps) = SIZES.findall(result.out)
    model = trainer.model
    assert f"{model.emb_l.lookups[0].weight.nbytes:,}" == of_tables[2]
    assert f"{model.bot_l.num_bytes + model.top_l.num_bytes:,}" == of_mlps[2]
    assert tables[0]() is None, "something still holds the float32 matrix"


@pytest.mark.parametrize("flags", [case["flags"] for case in QUANTIZED])
def test_random_weights_and_bags_of_several_ids_come_near_float32(flags):
    """With the warning that such weights are random."""
    plain, result = train(*BAGS), train(*BAGS, *flags.split())
    assert result.status == 0 and result.err == ""
    assert "warning: --inference-only without --load-model evaluates random" in result.out
    (want, got) = (float(LOG_LOSS.search(run.out)[1]) for run in (plain, result))
    assert abs(got - want) < 2e-3


def test_mlps_of_8_bits_see_whole_batches_whatever_the_chunks(golden_flags, monkeypatch):
    flags = [*golden_flags, "--test-mini-batch-size=500", f"{MLPS}8"]
    whole = train(*flags).out
    monkeypatch.setattr(step, "CPU_CHUNK_ROWS", 30)
    assert LOG_LOSS.findall(train(*flags).out) == LOG_LOSS.findall(whole)
    small = train(*flags, "--test-mini-batch-size=30").out
    assert LOG_LOSS.findall(small) != LOG_LOSS.findall(whole), "batches must matter here"


def test_predictions_are_clamped(golden_flags):
    out = train(*golden_flags, f"{MLPS}8", "--loss-threshold=0.49").out
    assert 0.673 < float(LOG_LOSS.search(out)[1]) < 0.714


def test_tables_go_with_amp():
    plain, result = (train(*BAGS, "--amp=bf16", *more) for more in ([], [f"{EMBEDDINGS}8"]))
    (want, got) = (float(LOG_LOSS.search(run.out)[1]) for run in (plain, result))
    assert abs(got - want) < 2e-3


def cases_of_ranks(golden_flags):
    one_id = [*golden_flags, "--tensor-board-filename="]
    bags = [*BAGS, "--tensor-board-filename="]
    return {
        "tables": [*one_id, f"{EMBEDDINGS}8"],
        "tables and MLPs": [*one_id, f"{EMBEDDINGS}4", f"{MLPS}8", "--test-mini-batch-size=499"],
        "bags": [*bags, f"{EMBEDDINGS}4", f"{MLPS}8"],
        "float16": [*bags, f"{EMBEDDINGS}8", f"{MLPS}16"],
        "fewer tables than ranks": [
            "--mini-batch-size=2", "--data-size=9", "--inference-only", "--mlperf-logging",
            "--round-targets=true", "--tensor-board-filename=", f"{EMBEDDINGS}8", f"{MLPS}8",
            "--arch-embedding-size=4-3",
        ],
    }  # fmt: skip


def test_three_ranks_predict_what_one_does(golden_flags, tmp_path):
    """Also with fewer tables or rows than ranks, and where ranks cut batches into chunks."""
    cases = cases_of_ranks(golden_flags)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = ROOT / "test" / "unit" / "ranks_program.py"
    finished = shell(sys.executable, program, 3, tmp_path / "cases.json", tmp_path / "results.json")
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    for name, flags in cases.items():
        alone, together = train(*flags).out, found[name]["out"]
        assert SIZES.findall(together) == SIZES.findall(alone), name
        for one, other in zip(LOG_LOSS.findall(together), LOG_LOSS.findall(alone), strict=True):
            assert abs(float(one[0]) - float(other[0])) <= 2e-6, name
        assert len(LOG_LOSS.findall(together)) == 1, name


MISTAKES = {
    "": "is no training: add --inference-only",
    "--inference-only --use-gpu": "is for the CPU: leave --use-gpu out",
    "--inference-only --use-npu": "is for the CPU: leave --use-npu out",
    "--inference-only --save-model=x.pth": "does not change model files: leave --save-model out",
    "--use-gpu": "leave --use-gpu out",
}
MISTAKES_OF_TABLES = {}


@pytest.mark.parametrize("bits", [f"{EMBEDDINGS}8", f"{EMBEDDINGS}4", f"{MLPS}8", f"{MLPS}16"])
@pytest.mark.parametrize("flags", MISTAKES | MISTAKES_OF_TABLES)
def test_what_quantization_does_not_go_with(flags, bits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if flags in MISTAKES_OF_TABLES and bits.startswith(MLPS):
        assert train(bits, *flags.split()).status == 0
        return
    result = train(bits, *flags.split())
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith(f"error: {bits} ")
    assert (MISTAKES | MISTAKES_OF_TABLES)[flags] in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            f"{EMBEDDINGS}8 --qr-flag",
            f"{EMBEDDINGS}8 does not go with compressed tables.*--qr-flag",
        ),
        (
            f"{EMBEDDINGS}4 --md-flag",
            f"{EMBEDDINGS}4 does not go with compressed tables.*--md-flag",
        ),
        (f"{EMBEDDINGS}4 --save-onnx", f"{EMBEDDINGS}4 does not go with --save-onnx"),
        (f"{MLPS}8 --save-onnx", f"{MLPS}8 does not go with --save-onnx"),
        (f"{MLPS}8 --amp=bf16", f"{MLPS}8 does not go with --amp=bf16"),
    ],
)
def test_flags_that_contradict_quantization(flags, words):
    options = dlrm.make_parser().parse_args([*flags.split(), "--inference-only"])
    with pytest.raises(UserError, match=words):
        check_quantization(options)


def test_mlps_may_be_quantized_beside_compressed_tables():
    flags = [f"{MLPS}8", "--inference-only", "--qr-flag"]
    check_quantization(dlrm.make_parser().parse_args(flags))


@pytest.mark.parametrize("flag", [f"{EMBEDDINGS}4", f"{MLPS}8"])
def test_a_torch_without_the_operators_is_one_line(flag, monkeypatch):
    monkeypatch.setattr(quantization, "int8_product", None)
    monkeypatch.setattr(quantization, "quantized_operators", lambda bits: None)
    result = train(flag, "--inference-only")
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith(f"error: {flag}: torch ") and "leave the flag out" in result.err
    assert train(f"{MLPS}16", "--inference-only").status == 0, "it takes common operators only"


def test_operators_are_found_by_their_names(monkeypatch):
    assert older_torch.quantized_operators(8) and older_torch.quantized_operators(4)
    lacking = type("Namespace", (), {"embedding_bag_byte_prepack": 1})()
    monkeypatch.setattr(older_torch.torch.ops, "quantized", lacking)
    assert older_torch.quantized_operators(8) is None


def test_tables_that_4_bits_cannot_hold_are_one_line(tmp_path):
    path = tmp_path / "m.pth"
    assert train(*SMALL_MODEL, "--num-batches=1", f"--save-model={path}").status == 0
    saved = dlrm.torch.load(path)
    saved["state_dict"]["emb_l.2.weight"][5, 3] = 1e5
    dlrm.torch.save(saved, path)
    result = train(*BAGS, f"--load-model={path}", f"{EMBEDDINGS}4")
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"error: {EMBEDDINGS}4: table 2 has numbers from" in result.err
    assert train(*BAGS, f"--load-model={path}", f"{EMBEDDINGS}8").status == 0
