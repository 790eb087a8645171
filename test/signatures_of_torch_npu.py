"""Writes columns of signatures_of_torch_npu.tsv: what torch_npu has of the names that we use.

    pip download --no-deps --dest .wheels torch-npu==2.13.0
    python test/signatures_of_torch_npu.py .wheels/torch_npu-*.whl

The wheels' Python source is read and not imported, because an import needs CANN; wheels for another
Python or machine do. A line is a name that the emulation or the program has, and what each version
has under that name: the parameters of a function or class, or the words module, value, outside (of
the Python source) or missing.
"""

import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tables_of_torch_npu import read, text_of, version_of

PACKAGE = "torch_npu"
TABLE = Path(__file__).with_suffix(".tsv")
EMULATION = Path(__file__).with_name("emulated_npu")
MODULES = [PACKAGE, *(f"{PACKAGE}.{name}" for name in "npu npu.utils optim profiler".split())]
ONLY_EMULATED = {f"{PACKAGE}.is_emulated", f"{PACKAGE}.record"}
NOT_LOOKED_AT = "?"
ROOT = Path(__file__).parents[1]
# what the program does with objects that it has got from the names in its text
OF_OBJECTS = """
npu.Event.record npu.Event.synchronize npu.Stream.wait_event npu.Stream.wait_stream
optim.NpuFusedSGD.step optim.NpuFusedSGD.zero_grad profiler.profile.step
""".split()


class Found(NamedTuple):
    """A definition: the module that has it, and its node; None if it is not in the source."""

    module: str
    node: ast.AST | None


def statements(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, also those inside if, try and with."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []))


def assigned(node: ast.stmt) -> list[str]:
    """The plain names that an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


class Source:
    """The Python source of the package.

    Args:
        texts: by path, as torch_npu/npu/__init__.py.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self._packages = {path[:-12].replace("/", ".") for path in texts if "/__init__.py" in path}
        self._texts = {
            path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text
            for path, text in texts.items()
        }
        self._sought: list[tuple[str, str]] = []
        self._tree = cache(lambda module: ast.parse(self._texts[module]))

    @classmethod
    def of_wheel(cls, path: Path) -> "Source":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            return cls({name: archive.read(name).decode() for name in names})

    @classmethod
    def of_folder(cls, folder: Path) -> "Source":
        paths = folder.rglob("*.py")
        return cls({path.relative_to(folder).as_posix(): path.read_text() for path in paths})

    def public_names(self, module: str) -> Iterator[str]:
        """Names without _ that a module defines or has in `__all__`, and methods of classes."""
        listed, own = set(), set()
        for node in statements(self._tree(module).body):
            if "__all__" in assigned(node):
                listed |= set(ast.literal_eval(node.value))
            own |= {getattr(node, "name", ""), *assigned(node)}
        for name in sorted(name for name in own | listed if name and name[0] != "_"):
            yield f"{module}.{name}"
            node = self._bound(module, name).node
            inner = statements(node.body) if isinstance(node, ast.ClassDef) else ()
            for one in inner:
                names = [*assigned(one), getattr(one, "name", "_")]
                yield from (f"{module}.{name}.{part}" for part in names if part[0] != "_")

    def describe(self, dotted: str) -> str:
        """The second column of the table."""
        owner: Found | None = None
        found: Found | None = Found(PACKAGE, self._tree(PACKAGE))
        for name in dotted.split(".")[1:]:
            owner, found = found, found and self._member(found, name)
        if found is None:
            return self._operator(dotted.removeprefix(f"{PACKAGE}.")) or "missing"
        if isinstance(found.node, ast.ClassDef):
            made_by = (self._member(found, name) for name in ("__init__", "__new__"))
            owner, found = found, next(filter(None, made_by), found)
        if isinstance(found.node, ast.FunctionDef):
            return self._parameters(found, bound=isinstance(owner.node, ast.ClassDef))
        kinds = {ast.Module: "module", type(None): "outside"}
        return kinds.get(type(found.node), "value")

    def _parameters(self, function: Found, bound: bool) -> str:
        """As a call gives them: without `self` of a bound method, constants as numbers."""
        arguments = function.node.args
        for one in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
            if one is not None:
                one.annotation = None
        for k, default in enumerate(arguments.defaults):
            constant = self._resolve(function.module, default)
            if constant and isinstance(constant.node, ast.Constant):
                arguments.defaults[k] = constant.node
        text = ast.unparse(arguments)
        return f"({re.sub(r'^(self|cls)(, |$)', '', text) if bound else text})"

    def _operator(self, name: str) -> str:
        """The parameters of an operator in C++; they are in its documentation only."""
        exposed = self._texts.get(f"{PACKAGE}.utils.exposed_api", "")
        documented = self._texts.get(f"{PACKAGE}._op_plugin_docs", "")
        written = re.search(rf"^{PACKAGE}\.{name}(\([^()]*\)) *->", documented, re.M)
        return written[1] if written and f'"{name}"' in exposed.replace("'", '"') else ""

    # ------------------------------------------------------------ how a name is found

    def _member(self, owner: Found, name: str) -> Found | None:
        inner = f"{owner.module}.{name}"
        if isinstance(owner.node, ast.Module):
            return self._bound(owner.module, name) or self._submodule(owner.module, name)
        if isinstance(owner.node, ast.ClassDef):
            return self._class_member(owner, name)
        if owner.node is None:  # C++ has it: the package's own use says that it is there
            use = re.compile(rf"\b{owner.module.rpartition('.')[2]}\.{name}\b")
            return Found(inner, None) if any(map(use.search, self._texts.values())) else None
        return None

    def _class_member(self, owner: Found, name: str) -> Found | None:
        for node in statements(owner.node.body):
            if getattr(node, "name", None) == name:
                return Found(owner.module, node)
            if name in assigned(node):
                return Found(owner.module, node.value)
        bases = [self._resolve(owner.module, base) for base in owner.node.bases]
        classes = [base for base in bases if base and isinstance(base.node, ast.ClassDef)]
        return next(filter(None, (self._class_member(base, name) for base in classes)), None)

    def _submodule(self, module: str, name: str) -> Found | None:
        """A module of a package, if the start of torch_npu imports it."""
        full = f"{module}.{name}"
        imports = re.compile(
            rf"^\s*(import|from) +{full}\b|^from {module} import .*\b{name}\b", re.M
        )
        start = [one for one in self._texts if one in self._packages or "._init" in one]
        if full in self._texts and any(imports.search(self._texts[one]) for one in start):
            return Found(full, self._tree(full))
        return None

    def _bound(self, module: str, name: str) -> Found | None:
        """What a module's own statements bind to a name; the last of them counts."""
        if (module, name) in self._sought:  # modules that import each other
            return None
        self._sought.append((module, name))
        try:
            return self._last_binding(module, name)
        finally:
            self._sought.pop()

    def _last_binding(self, module: str, name: str) -> Found | None:
        for node in reversed(list(statements(self._tree(module).body))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = self._imported(module, node, name)
            elif name in assigned(node):
                found = self._resolve(module, node.value) or Found(module, node.value)
            else:
                found = Found(module, node) if getattr(node, "name", None) == name else None
            if found:
                return found
        return None

    def _imported(self, module: str, node: ast.Import | ast.ImportFrom, name: str) -> Found | None:
        for alias in node.names:
            whole = alias.name if alias.asname or alias.name == "*" else alias.name.split(".")[0]
            if isinstance(node, ast.ImportFrom):
                origin, own = self._origin(module, node), name if whole == "*" else alias.name
                inner, is_it = f"{origin}.{own}", whole == "*" or name == (alias.asname or own)
            else:
                origin, own, inner = "", "", whole
                is_it = name == (alias.asname or whole)
            if not is_it:
                continue
            if inner in self._texts:
                return Found(inner, self._tree(inner))
            if origin in self._texts and origin != module:
                found = self._bound(origin, own)
            else:
                found = None if whole == "*" else Found(inner, None)
            if found:
                return found
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that a `from ... import` names."""
        if not node.level:
            return node.module or ""
        up = node.level - (module in self._packages)
        parents = module.split(".")[: len(module.split(".")) - up]
        return ".".join([*parents, *filter(None, [node.module])])

    def _resolve(self, module: str, node: ast.AST | None) -> Found | None:
        """What an expression of names and dots at a module's top level is."""
        if isinstance(node, ast.Name):
            return self._bound(module, node.id)
        owner = self._resolve(module, node.value) if isinstance(node, ast.Attribute) else None
        return owner and self._member(owner, node.attr)


def emulated() -> dict[str, str]:
    """Each public name of the emulation that is to be the real one's, and its description."""
    source = Source.of_folder(EMULATION)
    names = [name for module in MODULES for name in source.public_names(module)]
    names.append(f"{PACKAGE}.__version__")
    return {name: source.describe(name) for name in names if name not in ONLY_EMULATED}


def uses_of(text: str) -> dict[str, list[ast.Call]]:
    """{name in torch_npu: the calls of it} of a program's text.

    Variables and attributes are followed from torch.get_device_module and import_module.
    """
    names = {f"importlib.import_module('{PACKAGE}')": PACKAGE}
    found: dict[str, list[ast.Call]] = {}

    def name_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Attribute) and name_of(node.value):
            return f"{name_of(node.value)}.{node.attr}"
        is_module = ast.unparse(node).startswith("torch.get_device_module(")
        own = f"{PACKAGE}.npu" if is_module and isinstance(node, ast.Call) else None
        return names.get(ast.unparse(node), own)

    for _ in range(2):  # a method may use what a later one assigns
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and name_of(node.value):
                names[ast.unparse(node.targets[0])] = name_of(node.value)
            if isinstance(node, ast.Attribute) and name_of(node) not in (None, PACKAGE):
                found.setdefault(name_of(node), [])
            if isinstance(node, ast.Call) and name_of(node.func):
                found.setdefault(name_of(node.func), []).append(node)
    return found


@cache
def program_uses() -> dict[str, list[ast.Call]]:
    """{name in torch_npu: the calls of it} of the whole program."""
    found: dict[str, list[ast.Call]] = {f"{PACKAGE}.{name}": [] for name in OF_OBJECTS}
    for path in sorted(ROOT.rglob("*.py")):
        if not {"test", "bench", ".venv"} & set(path.relative_to(ROOT).parts):
            for name, calls in uses_of(path.read_text()).items():
                found[name] = found.get(name, []) + calls
    return found


@cache
def names_of_lines() -> list[str]:
    return list(dict.fromkeys([*emulated(), *sorted(program_uses())]))


def column_of(wheel: Path) -> dict[str, str]:
    """{name: what the wheel has under it}."""
    source = Source.of_wheel(wheel)
    return {name: source.describe(name) for name in names_of_lines()}


if __name__ == "__main__":
    columns = read(TABLE) | {version_of(path): column_of(path) for path in map(Path, sys.argv[1:])}
    TABLE.write_text(text_of(columns, names_of_lines(), NOT_LOOKED_AT))
