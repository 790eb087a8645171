"""The folders import one another in one direction only, as docs/architecture.md draws it."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDERS = (
    "common", "criteo", "preparation", "devices", "ranks", "optim", "model", "engine", "reporting",
    "checkpoints",
)  # fmt: skip
SCRIPTS = ("data_utils", "dlrm_data_pytorch", "dlrm_s_pytorch")
WITHOUT_TORCH = ("common", "criteo", "preparation", "data_utils")
# what each may import; everything but `preparation` is seen through
DIRECT = {
    "common": (),
    "criteo": ("common",),
    "preparation": ("criteo",),
    "data_utils": ("preparation",),
    "devices": ("common",),
    "ranks": ("devices",),
    "optim": ("devices",),
    "model": ("criteo", "devices", "ranks", "optim"),
    "reporting": ("ranks",),
    "engine": ("model", "reporting", "criteo"),
    "checkpoints": ("engine",),
    "dlrm_data_pytorch": ("criteo", "devices", "ranks", "model"),
    "dlrm_s_pytorch": ("data_utils", "dlrm_data_pytorch", "engine", "checkpoints"),
}


def allowed(name):
    """Every room that `name` may import."""
    found = set()
    for other in DIRECT[name]:
        found |= {other} | allowed(other)
    return found if name == "data_utils" else found - {"preparation"}


def sources(name):
    return [ROOT / f"{name}.py"] if name in SCRIPTS else sorted((ROOT / name).glob("*.py"))


def imported(path):
    """The first names of all modules that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.add(str(getattr(node.args[0], "value", "")).split(".")[0])
    return found


def test_the_top_level_holds_the_three_scripts_and_the_folders():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(FOLDERS)


@pytest.mark.parametrize("name", [*FOLDERS, *SCRIPTS])
def test_imports_go_one_way(name):
    rooms = {*FOLDERS, *SCRIPTS}
    for path in sources(name):
        wrong = (imported(path) & rooms) - allowed(name) - {name}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"
        assert not imported(path) & {"bench", "test", "conftest"}, path.name


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_says_in_one_sentence_what_it_is_for_and_imports_nothing(name):
    """Else importing one module of it would import others, perhaps torch before numba."""
    tree = ast.parse((ROOT / name / "__init__.py").read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree).count(".") == 1


def test_preparing_data_needs_no_torch():
    for name in WITHOUT_TORCH:
        for path in sources(name):
            assert "torch" not in imported(path), path.name
    code = "import sys, data_utils; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_there_are_no_circles_between_modules():
    modules = {
        f"{path.parent.name}.{path.stem}" if path.parent != ROOT else path.stem: path
        for name in (*FOLDERS, *SCRIPTS)
        for path in sources(name)
    }
    arrows = {}
    for module, path in modules.items():
        arrows[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                arrows[module] |= names & set(modules)
    left = dict(arrows)
    while left:
        ends = [module for module, others in left.items() if not others & set(left)]
        assert ends, f"a circle among {', '.join(sorted(left))}"
        for module in ends:
            del left[module]


def test_a_run_imports_neither_torchs_compiler_nor_sympy_nor_onnx():
    """They take two seconds; inside a process group, importing the first may end in SIGABRT."""
    flags = "--mini-batch-size=4 --data-size=16 --test-freq=2 --tensor-board-filename="
    code = (
        "import sys, dlrm_s_pytorch as dlrm\n"
        "for more in (['--optimizer=adagrad'], ['--mlperf-logging', '--round-targets=true'], []):\n"
        f"    assert dlrm.main({flags!r}.split() + more) == 0\n"
        "sys.exit(bool({'torch._dynamo', 'sympy', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
