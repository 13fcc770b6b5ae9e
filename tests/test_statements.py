"""SQL injection is impossible by construction: what is sent to ClickHouse is text of the project's own sources.

Each statement is followed back, through names, parameters and their callers, formats and our own functions, to
literals.  Whatever else goes into a statement goes as a bound parameter, or the test fails.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("agents", "sinks", "streams", "tribill", "web")
#: The server side: it runs what it is sent.
SERVER = "tribill/embedded/clickhouse_server.py"
#: Whose first argument is a statement, and whose second.
SENDERS = {"query": 0, "query_arrow": 0, "stream": 0, "command": 0, "_call": 1}
#: The client's own methods, through which all of it goes.
CLIENT = {*SENDERS, "insert", "insert_arrow"}
#: Only these make text of something else: a name from the settings, checked and quoted.
QUOTING = {"quoted"}
#: What is neither: the statements of sinks/migrations.
READ_FROM_OUR_FILES = {("sinks/clickhouse.py", "migrate", "statement")}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Scope:
    """A function of a module, or (None) the module itself."""

    path: str
    module: ast.Module
    function: Function | None


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project by its path."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


@cache
def calls() -> list[tuple[Scope, ast.Call]]:
    """Every call in the project, with where it stands."""
    found: list[tuple[Scope, ast.Call]] = []

    def walk(node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                found.append((scope, child))
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            walk(child, Scope(scope.path, scope.module, child) if inner else scope)  # type: ignore[arg-type]

    for path, module in modules().items():
        if path != SERVER:
            walk(module, Scope(path, module, None))
    return found


def name_of(call: ast.Call) -> str:
    """The last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def statements() -> Iterator[tuple[Scope, ast.expr]]:
    """What is sent to ClickHouse, all over the project."""
    for scope, call in calls():
        place = SENDERS.get(name_of(call))
        own = scope.path == "sinks/clickhouse.py" and scope.function is not None and scope.function.name in CLIENT
        if place is not None and len(call.args) > place and isinstance(call.func, ast.Attribute) and not own:
            yield scope, call.args[place]


def ours(node: ast.expr | None, scope: Scope, seen: frozenset[str] = frozenset()) -> bool:
    """Whether an expression is text of the sources, or made of nothing else."""
    if node is None or isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.JoinedStr):
        return all(ours(each.value, scope, seen) for each in node.values if isinstance(each, ast.FormattedValue))
    if isinstance(node, ast.BinOp):
        return ours(node.left, scope, seen) and ours(node.right, scope, seen)
    if isinstance(node, ast.IfExp):
        return ours(node.body, scope, seen) and ours(node.orelse, scope, seen)
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(ours(each, scope, seen) for each in node.elts)
    if isinstance(node, ast.Dict):
        return all(ours(each, scope, seen) for each in node.values)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return ours(node.value, scope, seen)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return ours(node.elt, scope, seen)
    if isinstance(node, ast.Call):
        return _call_is_ours(node, scope, seen)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return _class_variable_is_ours(node.attr, seen)
    return isinstance(node, ast.Name) and _name_is_ours(node.id, scope, seen)


def _class_variable_is_ours(name: str, seen: frozenset[str]) -> bool:
    """Whether it stands in classes' bodies alone, and is text of ours in each."""
    bound = []
    for path, module in modules().items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                bound += list(_bound(name, node, Scope(path, module, None), deep=False))
            elif isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store):
                return False
    given = [(scope, value) for scope, value in bound if value is not None]
    return bool(given) and all(ours(value, scope, seen) for scope, value in given)


def _call_is_ours(call: ast.Call, scope: Scope, seen: frozenset[str]) -> bool:
    name = name_of(call)
    if name in QUOTING:
        return True
    given = all(ours(each, scope, seen) for each in (*call.args, *(word.value for word in call.keywords)))
    if isinstance(call.func, ast.Attribute):
        return name in ("format", "join", "strip") and given and ours(call.func.value, scope, seen)
    return all(ours(each, inner, seen | {name}) for inner, each in returned(name, scope)) and name not in seen


def returned(name: str, scope: Scope) -> Iterator[tuple[Scope, ast.expr | None]]:
    """What a function of ours returns; something that is nobody's where there is no such function."""
    path, module = _home(name, scope)
    functions = [each for each in module.body if isinstance(each, ast.FunctionDef) and each.name == name]
    if not functions:
        yield scope, ast.Await(ast.Constant(0))
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Return):
                yield Scope(path, module, function), node.value


def _home(name: str, scope: Scope) -> tuple[str, ast.Module]:
    """The module that a name of another is imported from."""
    for node in scope.module.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(each.name == name for each in node.names):
            path = node.module.replace(".", "/") + ".py"
            if path in modules():
                return path, modules()[path]
    return scope.path, scope.module


def _name_is_ours(name: str, scope: Scope, seen: frozenset[str]) -> bool:
    function = scope.function
    key = f"{scope.path}:{function.name if function else ''}:{name}"
    if key in seen:
        return True  # a name that is added to: what else it is made of is looked at
    seen |= {key}
    if function is not None:
        if (scope.path, function.name, name) in READ_FROM_OUR_FILES:
            return True
        arguments = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        if name in arguments:
            return _argument_is_ours(name, arguments, function, scope, seen)
        bound = list(_bound(name, function, scope))
        if bound:
            return all(ours(each, inner, seen) for inner, each in bound)
    path, module = _home(name, scope)
    bound = list(_bound(name, module, Scope(path, module, None), deep=False))
    return bool(bound) and all(ours(each, inner, seen) for inner, each in bound)


def _bound(name: str, node: ast.AST, scope: Scope, *, deep: bool = True) -> Iterator[tuple[Scope, ast.expr | None]]:
    """Everything that a name is bound to in a function or on the level of a module."""
    for each in ast.walk(node) if deep else ast.iter_child_nodes(node):
        if isinstance(each, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets: list[ast.expr] = each.targets if isinstance(each, ast.Assign) else [each.target]
        elif isinstance(each, (ast.For, ast.comprehension)):
            targets = [each.target]
        else:
            continue
        value = each.iter if isinstance(each, (ast.For, ast.comprehension)) else each.value
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield scope, value
            elif isinstance(target, ast.Tuple):
                for place, part in enumerate(target.elts):
                    if isinstance(part, ast.Name) and part.id == name:
                        yield from _part(value, place, scope)


def _part(value: ast.expr | None, place: int, scope: Scope) -> Iterator[tuple[Scope, ast.expr | None]]:
    """One of the values that are unpacked; of a function's, that one of what it returns."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        for inner, found in returned(value.func.id, scope):
            yield inner, found.elts[place] if isinstance(found, ast.Tuple) else found
    else:
        yield scope, value


def _argument_is_ours(name: str, arguments: list[str], function: Function, scope: Scope, seen: frozenset[str]) -> bool:
    """Whether every caller in the project gives text of ours."""
    defaults = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
    if not all(ours(value, scope, seen) for each, value in defaults.items() if each.arg == name):
        return False
    place = arguments.index(name) - (arguments[0] in ("self", "cls"))
    given = []
    for caller, call in calls():
        if name_of(call) == function.name and (caller.path == scope.path or function.name[0] != "_"):
            words = [word.value for word in call.keywords if word.arg == name]
            given += [(caller, each) for each in words or call.args[place : place + 1]]
    return bool(given) and all(ours(each, caller, seen) for caller, each in given)


def test_every_statement_is_ours() -> None:
    """A value of a user's could become part of a statement."""
    found = list(statements())
    assert len(found) > 60, "the test has lost sight of the statements"
    foreign = [
        f"{scope.path}:{node.lineno}: {ast.unparse(node)[:100]}" for scope, node in found if not ours(node, scope)
    ]
    assert not foreign, "\n".join(foreign)


@pytest.mark.parametrize(
    "source",
    [
        "def find(store, code):\n    return store.query(f'SELECT 1 FROM usage WHERE id = {code}')",
        "def find(store, code):\n    return store.query('SELECT 1 WHERE id = ' + code)",
        "def find(store, code):\n    return store.query('SELECT 1 WHERE id = %s' % code)",
        "def find(store, code):\n    return store.query('SELECT 1 WHERE id = {}'.format(code))",
        "def find(store, line):\n    statement = 'SELECT 1'\n    statement += line.text\n    store.query(statement)",
        "def find(store):\n    for row in store.rows():\n        store.command(f'DROP TABLE {row}')",
        "import os\ndef find(store):\n    store.command(os.environ['STATEMENT'])",
        "def made(code):\n    return f'SELECT {code}'\ndef find(store, code):\n    store.query(made(code))",
    ],
)
def test_a_statement_made_of_a_value_is_found(source: str) -> None:
    """The test above would pass whatever the code does."""
    module = ast.parse(source)
    function = [each for each in module.body if isinstance(each, ast.FunctionDef)][-1]
    sent = [call for call in ast.walk(function) if isinstance(call, ast.Call) and name_of(call) in SENDERS]
    assert [ours(call.args[0], Scope("example.py", module, function)) for call in sent] == [False]
