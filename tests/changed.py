"""The test files that a change can touch: `python -m tests.changed [REVISION]` prints them.

What changed is what git sees between REVISION (HEAD when left out) and the working tree. A test
file is touched if it changed itself, or anything that it imports, directly or not. What tests and
examples name in a string counts as imported ("train.py", "convert" of "-m convert", a program in
quotes), and so does what makes a fixture that is asked for: processes hide nothing. A file whose
use cannot be seen (settings, data) touches every test, a page of documentation none.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "configs", "convert", "examples", "tests", "wanjax")
SCRIPTS = ("encode.py", "train.py", "sample.py", "evaluate.py")
CONFTEST = Path("tests/conftest.py")
EVERY_TEST = {CONFTEST, Path("tests/environment.py"), Path("tests/__init__.py")}
ANY_CODE = {Path("tests/test_structure.py")}  # reads every file
NO_TEST = re.compile(r".*\.md|docs/.*|LICENSE|Makefile|\.gitignore|\.ci/.*")
_CODE = rf"(?:{'|'.join(PACKAGES)})"
_IN_TEXT = re.compile(rf"\b{_CODE}(?:\.\w+)+")
_FROM_IN_TEXT = re.compile(rf"from ({_CODE}(?:\.\w+)*) import (\w+)")


def touched(changed: Iterable[Path]) -> list[Path]:
    """The test files that a change of these files can touch, as paths below ROOT."""
    changed = {path for path in changed if not NO_TEST.fullmatch(str(path))}
    tests = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    if not changed:
        return []
    if changed & EVERY_TEST or any(path.suffix != ".py" for path in changed):
        return tests
    return [test for test in tests if test in ANY_CODE or changed & reached(test)]


def reached(start: Path) -> set[Path]:
    """A file and all that it imports, directly or not."""
    found, todo = set(), [(start, True)]
    while todo:
        path, whole = node = todo.pop()
        if node not in found:
            found.add(node)
            todo += imports(path, whole)
    return {path for path, _ in found}


@cache
def imports(path: Path, whole: bool) -> frozenset[tuple[Path, bool]]:
    """The project's files that one imports, each with whether all of it is meant: of a package on
    the way to a module only what runs at once counts, not what it would import when asked."""
    if not (ROOT / path).exists():
        return frozenset()  # deleted: who imported it is touched, and it imports nothing
    tree = ast.parse((ROOT / path).read_text())
    nodes = list(ast.walk(tree)) if whole else tree.body
    names = {name for node in nodes for name in _named(node)}
    if path.parts[0] in ("tests", "examples"):
        names |= {name for node in nodes for name in _named_in_text(node)}
    found = {file for name in names for file in _files(name)}
    if path.name.startswith("test_") and _asks_for_fixtures(nodes):
        found.add((CONFTEST, True))
    return frozenset(found)


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _named_in_text(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _IN_TEXT.findall(node.value)
        yield from map(".".join, _FROM_IN_TEXT.findall(node.value))
        if node.value in PACKAGES:
            yield f"{node.value}.__main__"
        if node.value in SCRIPTS:
            yield node.value.removesuffix(".py")


def _files(name: str) -> Iterator[tuple[Path, bool]]:
    """The file of a dotted name, whose end may be something in it, and the packages above it."""
    parts = name.split(".")
    if parts[0] not in PACKAGES and f"{parts[0]}.py" not in SCRIPTS:
        return
    for count in range(1, len(parts) + 1):
        module = Path(*parts[:count])
        if (ROOT / module).is_dir():
            yield module / "__init__.py", count == len(parts) - 1 and not _is_module(Path(*parts))
        else:
            yield module.with_suffix(".py"), True


def _is_module(path: Path) -> bool:
    return (ROOT / path).is_dir() or (ROOT / path).with_suffix(".py").exists()


def _asks_for_fixtures(nodes: list[ast.AST]) -> bool:
    """Whether a test's file asks for something that the conftest makes, and not for its own."""
    asked = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    shared = ast.parse((ROOT / CONFTEST).read_text()).body
    return bool({n.name for n in shared if isinstance(n, ast.FunctionDef)} & asked - own)


def changed_since(revision: str) -> set[Path]:
    """What differs from a revision in the working tree, new files too."""
    commands = (
        ("git", "diff", "--name-only", "--no-renames", revision, "--"),
        ("git", "ls-files", "--others", "--exclude-standard"),
    )
    run = lambda words: subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: E731
    return {Path(line) for words in commands for line in run(words).stdout.splitlines()}


if __name__ == "__main__":
    found = touched(changed_since(sys.argv[1] if len(sys.argv) > 1 else "HEAD"))
    sys.stdout.write("".join(f"{path}\n" for path in found))
