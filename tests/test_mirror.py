"""Every module is short and has its own test module, and every test module its module."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
# Plain data and protocols: used by every other test.
UNTESTED = {
    "__main__",
    "ports",
    "core/effects",
    "core/errors",
    "core/events",
    "core/objects",
    "core/units",
}
# Tests of the project itself, not of a module.
OF_THE_PROJECT = {"dist", "layers", "mirror"}
# Folders of tests/ that mirror nothing: tests across modules, and what tests are made of.
ACROSS = {"e2e", "fakes", "fault", "reference"}


def modules() -> dict[str, Path]:
    package = ROOT / "cached"
    return {
        path.relative_to(package).with_suffix("").as_posix(): path
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }


def modules_with_tests() -> set[str]:
    tests = ROOT / "tests"
    return {
        (path.parent / path.stem.removeprefix("test_")).relative_to(tests).as_posix()
        for path in tests.rglob("test_*.py")
        if path.relative_to(tests).parts[0] not in ACROSS
    }


def test_every_module_has_its_test_module():
    assert modules().keys() - UNTESTED - modules_with_tests() == set()


def test_every_test_module_has_its_module():
    assert modules_with_tests() - OF_THE_PROJECT - modules().keys() == set()


def test_no_module_is_too_long():
    lengths = {name: path.read_text().count("\n") for name, path in modules().items()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_no_function_is_too_long():
    too_long = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long[f"{name}:{node.name}"] = lines
    assert too_long == {}


def test_every_module_says_in_its_first_line_what_it_is_for():
    silent = [
        name
        for name, path in modules().items()
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
