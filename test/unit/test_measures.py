"""What ruff cannot ask of the code: sizes, nesting, parameters."""

import argparse
import ast
import re
import statistics

import pytest
from conftest import ROOT

import dlrm_s_pytorch as dlrm
from criteo.demo import add_demo_options

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
SOURCES = sorted(
    path
    for path in ROOT.glob("**/*.py")
    if not {"test", "bench", ".venv"} & set(path.relative_to(ROOT).parts)
)


def depth(statements, level=0):
    deepest = level
    for statement in statements:
        if not isinstance(statement, BLOCKS):
            continue
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, [])
            is_elif = field == "orelse" and isinstance(statement, ast.If) and len(inner) == 1
            is_elif = is_elif and isinstance(inner[0], ast.If)
            if inner:
                deepest = max(deepest, depth(inner, level if is_elif else level + 1))
        for handler in getattr(statement, "handlers", []):
            deepest = max(deepest, depth(handler.body, level + 1))
    return deepest


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node, lines


MOST_LINES = {"dlrm_s_pytorch.py": 750, "dlrm_data_pytorch.py": 600, "data_utils.py": 400}


def test_files_and_classes_are_short():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= MOST_LINES.get(path.name, 450), path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 220, f"{path.name}:{node.name}"


def test_functions_are_short_flat_and_of_few_parameters():
    lengths = []
    for path in SOURCES:
        for node, lines in functions(path):
            where = f"{path.name}:{node.name}"
            lengths.append(lines)
            assert lines <= 60, where
            assert depth(node.body) <= 3, where
            own = node.args.args[:1]
            parameters = node.args.args + node.args.kwonlyargs
            is_kernel = any(ast.unparse(by) == "triton.jit" for by in node.decorator_list)
            most = 25 if is_kernel else 6  # a kernel has no other way to be told something
            assert len(parameters) - bool(own and own[0].arg in ("self", "cls")) <= most, where
    assert statistics.median(lengths) <= 12
    assert sorted(lengths)[int(len(lengths) * 0.9)] <= 35


def test_main_is_about_forty_lines_and_nothing_below_it_exits():
    lengths = {node.name: lines for node, lines in functions(ROOT / "dlrm_s_pytorch.py")}
    assert lengths["main"] <= 40
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), path.name
        for node, _ in functions(path):
            if (path.name, node.name) == ("versions.py", "demand"):  # it comes before main
                continue
            assert "sys.exit" not in ast.unparse(node), f"{path.name}:{node.name}"


def all_parsers():
    data = argparse.ArgumentParser()
    add_demo_options(data)
    return dlrm.make_parser(), data


def all_flags():
    return {
        flag
        for parser in all_parsers()
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag != "--help"
    }


def test_every_flag_has_help_and_a_group():
    for parser in all_parsers():
        for action in parser._actions:
            assert action.help, action
        plain = [action for action in parser._optionals._group_actions if action.dest != "help"]
        assert not plain


def test_defaults_are_shown_as_they_are_typed():
    for parser in all_parsers():
        text = " ".join(parser.format_help().split())
        assert not re.search(r"default: [(\[]", text)
    text = " ".join(dlrm.make_parser().format_help().split())
    assert "(default: 4-3-2)" in text and "(default: 1.0-1.0)" in text


CONTRACT = """
--arch-sparse-feature-size --arch-embedding-size --arch-mlp-bot --arch-mlp-top --arch-interaction-op
--arch-interaction-itself --weighted-pooling --md-flag --md-threshold --md-temperature
--md-round-dims --qr-flag --qr-threshold --qr-operation --qr-collisions --activation-function
--loss-function --loss-weights --loss-threshold --round-targets --data-generation --data-set
--data_path --raw-data-file --processed-data-file --data-randomize --max-ind-range
--data-sub-sample-rate --memory-map --dataset-multiprocessing --num-workers --test-num-workers
--data-size --num-batches --num-indices-per-lookup --num-indices-per-lookup-fixed --rand-data-dist
--rand-data-min --rand-data-max --rand-data-mu --rand-data-sigma --data-trace-file
--data-trace-enable-padding --mini-batch-size --test-mini-batch-size --nepochs --learning-rate
--optimizer --lr-num-warmup-steps --lr-decay-start-step --lr-num-decay-steps
--mlperf-grad-accum-iter --sync-dense-params --numpy-rand-seed --print-precision --use-npu --use-gpu
--local_rank --dist-backend --world_size --print-freq --test-freq --print-time --print-wall-time
--debug-mode --enable-profiling --plot-compute-graph --tensor-board-filename --performance
--save-model --load-model --inference-only --quantize-mlp-with-bit --quantize-emb-with-bit
--save-onnx --mlperf-logging --mlperf-acc-threshold --mlperf-auc-threshold --mlperf-bin-loader
--mlperf-bin-shuffle
""".split()
DEFAULTS = {
    "arch_sparse_feature_size": 2, "arch_embedding_size": (4, 3, 2), "arch_mlp_bot": (4, 3, 2),
    "arch_mlp_top": (4, 2, 1), "arch_interaction_op": "dot", "weighted_pooling": None,
    "loss_function": "mse", "loss_weights": (1.0, 1.0), "loss_threshold": 0.0,
    "round_targets": False, "data_generation": "random", "data_randomize": "total",
    "max_ind_range": -1, "data_sub_sample_rate": 0.0, "num_workers": 0, "test_num_workers": -1,
    "data_size": 1, "num_batches": 0, "num_indices_per_lookup": 10,
    "num_indices_per_lookup_fixed": False, "rand_data_dist": "uniform", "rand_data_mu": -1,
    "data_trace_file": "./input/dist_emb_j.log", "mini_batch_size": 1, "test_mini_batch_size": -1,
    "nepochs": 1, "learning_rate": 0.01, "optimizer": "sgd", "mlperf_grad_accum_iter": 1,
    "numpy_rand_seed": 123, "print_precision": 5, "local_rank": -1, "print_freq": 1,
    "test_freq": -1, "tensor_board_filename": "run_kaggle_pt", "md_threshold": 200,
    "md_temperature": 0.3, "qr_threshold": 200, "qr_operation": "mult", "qr_collisions": 4,
}  # fmt: skip


def test_the_command_line_is_the_contracts():
    assert set(CONTRACT) <= all_flags()
    options = vars(dlrm.parse_options([]))
    assert {name: options[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", ["npu.md", "npu.zh.md"])
def test_the_npus_page_tells_of_all_its_flags_and_of_no_other(name):
    told = set(re.findall(r"`(--[a-zA-Z][\w-]*)", (ROOT / "docs" / name).read_text()))
    (group,) = [g for g in all_parsers()[0]._action_groups if (g.title or "").startswith("NPU")]
    flags = {flag for action in group._group_actions for flag in action.option_strings}
    assert flags and flags - told == set()
    assert told - all_flags() - {"--device", "--device_id", "--nproc", "--demo"} == set()


def test_the_repository_speaks_of_itself_alone():
    """No absolute paths, and nothing that points outside of it."""
    for path in [
        *SOURCES,
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "test").glob("*.sh"),
    ]:
        text = path.read_text()
        assert "../shared" not in text and "/work/" not in text and "/root/" not in text, path.name
