"""What torch_npu's Python source defines, read without importing it.

`Sources` finds names in a wheel, or in a folder of sources; `disagreements` compares an emulation
with it; `Uses` finds what a program takes from it, and whether that is there.
"""

import ast
import inspect
import re
import zipfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT_MODULE = "torch_npu"
C_EXTENSION = "torch_npu._C"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NESTED = (ast.If, ast.Try, ast.With)
NO_DEFAULT = inspect.Parameter.empty


@dataclass(frozen=True)
class Found:
    """What a name stands for.

    Attributes:
        path: how it was reached, as torch_npu.npu.Stream.
        kind: module, class, instance (of the class), function, operator, value, or outside: not
            written in this Python.
        module: where it is defined; of what is outside, its name there.
        node: its definition; a value's expression.
        bound: it is a method of a class, whose first parameter the caller does not give.
    """

    path: str
    kind: str
    module: str
    node: ast.AST | None = None
    bound: bool = False


def wheel_sources(wheel):
    """The sources of the package in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.match(rf"{ROOT_MODULE}/.*\.py$", name)]
        return Sources({name: archive.read(name).decode() for name in names})


def folder_sources(folder):
    paths = sorted(Path(folder).glob(f"{ROOT_MODULE}/**/*.py"))
    return Sources({path.relative_to(folder).as_posix(): path.read_text() for path in paths})


def flat(statements):
    """Statements of a module, also those inside of if, try and with."""
    for statement in statements:
        yield statement
        if isinstance(statement, NESTED):
            handlers = [part for one in getattr(statement, "handlers", []) for part in one.body]
            rest = getattr(statement, "orelse", []), getattr(statement, "finalbody", [])
            yield from flat([*statement.body, *handlers, *rest[0], *rest[1]])


def targets(statement):
    """Expressions that an assignment, annotated or not, gives its value to."""
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign | ast.AugAssign) else []


def decorated(node, name):
    return any(isinstance(one, ast.Name) and one.id == name for one in node.decorator_list)


class Sources:
    """A package's sources, by their paths; parsed when they are asked for."""

    def __init__(self, texts):
        self._texts = {}
        self._packages = set()
        for path, text in texts.items():
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            self._texts[module] = text
            if path.endswith("/__init__.py"):
                self._packages.add(module)
        self.tree = cache(self._tree)
        self.bindings = cache(self._bindings)
        self.operators = cache(self._operators)
        self._loaded_at_start = cache(self._modules_loaded_at_start)

    def find(self, dotted):
        """What `dotted`, as torch_npu.npu.Stream.query, stands for; None where it is not there."""
        names = dotted.split(".")
        found = self._module(names[0])
        for name in names[1:]:
            found = found and self.member(found, name)
        return found

    def member(self, owner, name):
        """The attribute `name` of what is found; None where it has none."""
        of = {
            "module": self._module_member,
            "class": self._class_member,
            "instance": self._class_member,
            "outside": self._outside_member,
        }
        found = of[owner.kind](owner, name) if owner.kind in of else None
        return found and replace(found, path=f"{owner.path}.{name}")

    # -------------------------------------------------------- modules

    def _tree(self, module):
        return ast.parse(self._texts[module])

    def _module(self, name):
        return Found(name, "module", name) if name in self._texts else None

    def _module_member(self, owner, name):
        found = self._bound(owner.module, name)
        inner = f"{owner.module}.{name}"
        if found is None and inner == C_EXTENSION:
            return Found(inner, "outside", inner)
        if found is None and inner in self._texts and inner in self._loaded_at_start():
            return self._module(inner)
        if found is None and owner.module == ROOT_MODULE and name in self.operators():
            return Found(inner, "operator", ROOT_MODULE, self.operators()[name])
        return found

    def _bindings(self, module):
        """{name: statement} of what a module's own statements bind, stars followed."""
        found = {}
        for statement in flat(self.tree(module).body):
            if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
                found[statement.name] = statement
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                for alias in statement.names:
                    names = self._names_of_star(module, statement) if alias.name == "*" else []
                    own = alias.asname or alias.name.split(".")[0]
                    found |= dict.fromkeys(names or ([] if alias.name == "*" else [own]), statement)
            for target in targets(statement):
                if isinstance(target, ast.Name):
                    found[target.id] = statement
        return found

    def _names_of_star(self, module, statement):
        source = self._origin(module, statement)
        if source not in self._texts:
            return []
        listed = self.listed(source)
        public = [name for name in self.bindings(source) if not name.startswith("_")]
        return public if listed is None else listed

    def listed(self, module):
        """What `__all__` has; None where there is none."""
        found = None
        for statement in flat(self.tree(module).body):
            if any(isinstance(one, ast.Name) and one.id == "__all__" for one in targets(statement)):
                found = (found or []) + ast.literal_eval(statement.value)
        return found

    def _origin(self, module, statement):
        """The module that a `from ... import` names."""
        if not statement.level:
            return statement.module
        parts = module.split(".")
        up = statement.level - (module in self._packages)
        return ".".join([*parts[: len(parts) - up], *filter(None, [statement.module])])

    def _bound(self, module, name):
        statement = self.bindings(module).get(name)
        if isinstance(statement, FUNCTIONS):
            return Found(name, "function", module, statement)
        if isinstance(statement, ast.ClassDef):
            return Found(name, "class", module, statement)
        if isinstance(statement, ast.Import):
            return self._imported(statement, name)
        if isinstance(statement, ast.ImportFrom):
            return self._imported_from(module, statement, name)
        if statement is None:
            return None
        value = Found(name, "value", module, statement.value)
        return self.resolve(module, statement.value) or value

    def _imported(self, statement, name):
        for alias in statement.names:
            full = alias.name if alias.asname else alias.name.split(".")[0]
            if name == (alias.asname or full):
                return self._module(full) or Found(name, "outside", full)
        return None

    def _imported_from(self, module, statement, name):
        source = self._origin(module, statement)
        names = {alias.asname or alias.name: alias.name for alias in statement.names}
        name = names.get(name, name)
        if source not in self._texts:
            return Found(name, "outside", f"{source}.{name}")
        inner = self._module(f"{source}.{name}")
        if source == module:  # a package that names itself
            return inner
        return self._module_member(self._module(source), name) or inner

    def _modules_loaded_at_start(self):
        """Modules that `import torch_npu` imports, as far as its own start and packages say."""
        start = {name for name in self._texts if name.startswith(f"{ROOT_MODULE}._init")}
        found = set()
        for module in start | self._packages:
            for node in ast.walk(self.tree(module)):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    source = self._origin(module, node)
                    found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        parts = [name.split(".") for name in found]
        return {".".join(names[:num]) for names in parts for num in range(1, len(names) + 1)}

    # -------------------------------------------------------- classes, and what is not Python

    def _class_member(self, owner, name):
        for statement in flat(owner.node.body):
            if isinstance(statement, FUNCTIONS) and statement.name == name:
                kind = "value" if decorated(statement, "property") else "function"
                bound = not decorated(statement, "staticmethod")
                return Found(name, kind, owner.module, statement, bound)
            for target in targets(statement):
                if isinstance(target, ast.Name) and target.id == name:
                    return Found(name, "value", owner.module, statement.value)
        for base in owner.node.bases:
            found = self.resolve(owner.module, base)
            found = found and found.kind == "class" and self._class_member(found, name)
            if found:
                return found
        return None

    def _outside_member(self, owner, name):
        """Attributes of the C extension's objects: those that the package itself uses."""
        inner = f"{owner.module}.{name}"
        if not owner.module.startswith(f"{C_EXTENSION}."):
            return Found(name, "outside", inner)
        short = re.compile(rf"\b{owner.module.rpartition('.')[2]}\.{name}\b")
        used = any(
            isinstance(node, ast.Attribute) and node.attr == name and self._is(module, node, owner)
            for module, text in self._texts.items()
            if short.search(text)
            for node in ast.walk(self.tree(module))
        )
        return Found(name, "outside", inner) if used else None

    def _is(self, module, node, owner):
        if not isinstance(node.value, ast.Name):
            return False
        found = self._bound(module, node.value.id)
        return found is not None and (found.kind, found.module) == ("outside", owner.module)

    def _operators(self):
        """{name: a function with its parameters} of the C++ operators that are made public.

        They are those of a list; their parameters are in their documentation, where it is there.
        """
        exported = f"{ROOT_MODULE}.utils.exposed_api"
        if exported not in self._texts:
            return {}
        names = ast.literal_eval(self.bindings(exported)["public_npu_functions"].value)
        docs = self._texts.get(f"{ROOT_MODULE}._op_plugin_docs", "")
        pattern = rf"^{ROOT_MODULE}\.(\w+)\(([^()]*)\) *->"
        written = {one[1]: one[2] for one in re.finditer(pattern, docs, re.M)}
        return {name: self._operator(written.get(name)) for name in names}

    @staticmethod
    def _operator(parameters):
        try:
            return parameters and ast.parse(f"def operator({parameters}): ...").body[0]
        except SyntaxError:  # a schema of C++
            return None

    # -------------------------------------------------------- expressions and signatures

    def resolve(self, module, node):
        """What an expression of names and dots at a module's top stands for."""
        if isinstance(node, ast.Name):
            return self._bound(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(module, node.value)
            return owner and self.member(owner, node.attr)
        return None

    def signature(self, found):
        """The parameters that a caller gives; None where no Python says them."""
        if found.kind == "class":
            made_by = self._class_member(found, "__init__") or self._class_member(found, "__new__")
            return made_by and self.signature(made_by)
        if found.kind not in ("function", "operator") or found.node is None:
            return None
        parameters = list(self._parameters(found.module, found.node.args))
        return inspect.Signature(parameters[found.bound :])

    def _parameters(self, module, args):
        kinds = inspect.Parameter
        plain = [*args.posonlyargs, *args.args]
        defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
        for number, (arg, default) in enumerate(zip(plain, defaults, strict=True)):
            only = number < len(args.posonlyargs)
            kind = kinds.POSITIONAL_ONLY if only else kinds.POSITIONAL_OR_KEYWORD
            yield kinds(arg.arg, kind, default=self._value(module, default))
        if args.vararg:
            yield kinds(args.vararg.arg, kinds.VAR_POSITIONAL)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
            yield kinds(arg.arg, kinds.KEYWORD_ONLY, default=self._value(module, default))
        if args.kwarg:
            yield kinds(args.kwarg.arg, kinds.VAR_KEYWORD)

    def _value(self, module, node):
        """A default as text: the literal, or the name of what lies outside."""
        if node is None:
            return NO_DEFAULT
        try:
            return repr(ast.literal_eval(node))
        except ValueError:
            found = self.resolve(module, node)
        if found is None or found.kind == "outside":
            return found.module if found else ast.unparse(node)
        return self._value(found.module, found.node) if found.kind == "value" else found.path

    def gives(self, function):
        """An instance, where a function of the package returns a new object of a class of it."""
        for node in ast.walk(function.node) if function.node else ():
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                made = self.resolve(function.module, node.value.func)
                if made and made.kind == "class":
                    path = made.path if "." in made.path else f"{made.module}.{made.path}"
                    return replace(made, kind="instance", path=path)
        return None


# ---------------------------------------------------------------- an emulation


def public_names(sources, module):
    """Names without _ that a module defines, or lists in `__all__`; of its classes their own."""
    listed = sources.listed(module) or []
    for name, statement in sources.bindings(module).items():
        imported = isinstance(statement, ast.Import | ast.ImportFrom)
        if name.startswith("_") or (imported and name not in listed):
            continue
        yield f"{module}.{name}"
        found = sources.find(f"{module}.{name}")
        if found.kind == "class":
            yield from (f"{module}.{name}.{inner}" for inner in _class_names(found.node))


def _class_names(node):
    for statement in flat(node.body):
        own = [statement.name] if isinstance(statement, FUNCTIONS) else []
        own += [one.id for one in targets(statement) if isinstance(one, ast.Name)]
        yield from (name for name in own if not name.startswith("_"))


def disagreements(emulated, real, names):
    """What the names of an emulation have that the real ones do not, a line each."""
    found = []
    for name in names:
        ours, theirs = emulated.find(name), real.find(name)
        if theirs is None:
            found.append(f"{name}: not in the wheel")
            continue
        pair = emulated.signature(ours), real.signature(theirs)
        if None not in pair:
            found += [f"{name}: {text}" for text in _differences(*pair)]
    return found


def _given(signature):
    """The parameters but for **kwargs."""
    kwargs = inspect.Parameter.VAR_KEYWORD
    return [one for one in signature.parameters.values() if one.kind != kwargs]


def _differences(ours, theirs):
    """Nothing where every call that the emulation takes is one that the wheel takes alike.

    It may leave out the last parameters, take **kwargs for them, and ask for what has a default.
    """
    mine, real = _given(ours), _given(theirs)
    for one, other in zip(mine, real, strict=False):
        if one.name != other.name:
            yield f"parameter {one.name}: the wheel has {other.name} there"
            return  # the others are shifted
        if one.kind != other.kind and one.kind != inspect.Parameter.KEYWORD_ONLY:
            yield f"parameter {one.name} is {one.kind.description}: {other.kind.description}"
        elif one.default not in (NO_DEFAULT, other.default):
            has = "none" if other.default is NO_DEFAULT else other.default
            yield f"parameter {one.name}: default {one.default}, the wheel has {has}"
    for one in mine[len(real) :]:
        yield f"parameter {one.name}: the wheel has none there"
    for other in real[len(mine) :]:
        starred = other.kind == inspect.Parameter.VAR_POSITIONAL
        if other.default is NO_DEFAULT and not starred:
            yield f"parameter {other.name} of the wheel is left out and has no default"


# ---------------------------------------------------------------- a program


def _is_torch_npu(node):
    return node.attr == "npu" and isinstance(node.value, ast.Name) and node.value.id == "torch"


class Uses(ast.NodeVisitor):
    """What program files take from torch_npu: {(file, line, name): what is wrong with it, or ""}.

    Followed: torch.npu, torch_npu imported or by importlib.import_module, torch.get_device_module
    (taken for torch_npu.npu), variables and attributes of self assigned from these, objects of
    classes, and what a program's own context manager yields of them.
    """

    def __init__(self, real, paths):
        self.found = {}
        self._real, self._scopes, self._yielded = real, [], {}
        self._file = self._function = ""
        texts = {path.name: path.read_text() for path in paths}
        for _ in range(2):  # a context manager may be used before it is defined
            for self._file, text in texts.items():
                if re.search(r"npu|get_device_module", text):
                    self._visit_scope(ast.parse(text), ())

    @property
    def problems(self):
        return [
            f"{file}:{line}: {name}: {why}" for (file, line, name), why in self.found.items() if why
        ]

    @property
    def names(self):
        return {name for _, _, name in self.found}

    def _visit_scope(self, node, parameters):
        """Twice: a nested function may use what is assigned after it."""
        self._scopes.append(dict.fromkeys(parameters))
        for _ in range(2):
            self.generic_visit(node)
        self._scopes.pop()

    def visit_FunctionDef(self, node):  # noqa: N802 (ast's name)
        before, self._function = self._function, node.name
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        self._visit_scope(node, [one.arg for one in every])
        self._function = before

    def visit_ClassDef(self, node):  # noqa: N802
        self._visit_scope(node, ())

    def visit_Import(self, node):  # noqa: N802
        for alias in node.names:
            full = alias.name if alias.asname else alias.name.split(".")[0]
            if full.split(".")[0] == ROOT_MODULE:
                self._note(node, alias.name, self._real.find(alias.name))
                self._scopes[-1][alias.asname or full] = self._real.find(full)

    def visit_ImportFrom(self, node):  # noqa: N802
        for alias in node.names if (node.module or "").split(".")[0] == ROOT_MODULE else ():
            found = self._real.find(f"{node.module}.{alias.name}")
            self._note(node, f"{node.module}.{alias.name}", found)
            self._scopes[-1][alias.asname or alias.name] = found

    def visit_Assign(self, node):  # noqa: N802
        self.generic_visit(node)
        value = self._value(node.value) if node.value else None
        for target in targets(node):
            self._bind(target, value)

    visit_AnnAssign = visit_Assign  # noqa: N815

    def visit_With(self, node):  # noqa: N802
        for item in node.items:
            self._bind(item.optional_vars, self._entered(item.context_expr))
        self.generic_visit(node)

    def visit_Yield(self, node):  # noqa: N802
        self.generic_visit(node)
        if node.value and self._value(node.value):
            self._yielded[self._function] = self._value(node.value)

    def visit_Attribute(self, node):  # noqa: N802
        self.generic_visit(node)
        owner = self._value(node.value)
        if owner:
            self._note(node, f"{owner.path}.{node.attr}", self._real.member(owner, node.attr))
        elif _is_torch_npu(node):
            self._note(node, f"{ROOT_MODULE}.npu", self._value(node))

    def visit_Call(self, node):  # noqa: N802
        self.generic_visit(node)
        called = self._value(node.func)
        signature = called and self._real.signature(called)
        if not signature:
            return
        starred = [one for one in node.args if isinstance(one, ast.Starred)]
        open_ended = starred or any(one.arg is None for one in node.keywords)
        values = [None for one in node.args if not isinstance(one, ast.Starred)]
        keywords = {one.arg: None for one in node.keywords if one.arg}
        try:
            (signature.bind_partial if open_ended else signature.bind)(*values, **keywords)
        except TypeError as error:
            self.found[self._file, node.lineno, called.path] = str(error)

    def _note(self, node, name, found):
        self.found.setdefault((self._file, node.lineno, name), "")
        if found is None:
            self.found[self._file, node.lineno, name] = "not in the wheel"

    def _bind(self, target, value):
        if isinstance(target, ast.Name) and (value or target.id not in self._scopes[-1]):
            self._scopes[-1][target.id] = value
        is_own = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
        if is_own and value:
            self._scopes[-2][f"self.{target.attr}"] = value  # the class's

    def _look_up(self, name):
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _entered(self, context):
        """What `with` gives: the object itself, or what the program's own function yields."""
        if isinstance(context, ast.Call) and isinstance(context.func, ast.Name | ast.Attribute):
            name = context.func.attr if isinstance(context.func, ast.Attribute) else context.func.id
            return self._value(context) or self._yielded.get(name)
        return self._value(context)

    def _value(self, node):
        """What an expression stands for; None where it is not torch_npu's."""
        if isinstance(node, ast.Name):
            return self._look_up(node.id)
        if isinstance(node, ast.Attribute):
            if _is_torch_npu(node):
                return self._real.find(f"{ROOT_MODULE}.npu")
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self._look_up(f"self.{node.attr}")
            owner = self._value(node.value)
            return owner and self._real.member(owner, node.attr)
        return self._result(node) if isinstance(node, ast.Call) else None

    def _result(self, node):
        function = ast.unparse(node.func)
        if function.rpartition(".")[2] == "get_device_module":
            return self._real.find(f"{ROOT_MODULE}.npu")
        if function.rpartition(".")[2] == "import_module":
            name = getattr(node.args[0], "value", "") if node.args else ""
            named = isinstance(name, str) and name.split(".")[0] == ROOT_MODULE
            return self._real.find(name) if named else None
        called = self._value(node.func)
        if called and called.kind == "class":
            return replace(called, kind="instance")
        return self._real.gives(called) if called and called.kind == "function" else None
