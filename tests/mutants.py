"""Do the tests fail when the code is wrong? `python -m tests.mutants LOG.jsonl [COUNT [SEED]]`.

Draws COUNT small faults (150) from modules whose lines are worth it: another comparison, sign or
number, a condition turned round, a statement left out. Each is put into a copy of the checkout and
its module's own tests are run. LOG gets a line for each; run again, it goes on from there. What no
test notices is printed at the end.
"""

import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "wanjax/solvers.py": ["tests/test_solvers.py", "tests/parity/test_pipeline.py"],
    "wanjax/flow.py": ["tests/test_training.py"],
    "wanjax/lora.py": ["tests/test_lora.py", "tests/test_convert_infer.py"],
    "wanjax/data/clips.py": ["tests/test_clips.py", "tests/test_report.py"],
    "convert/lora.py": ["tests/test_lora.py", "tests/test_convert_infer.py"],
    "wanjax/training.py": ["tests/test_training.py"],
}
TIMEOUT = 300  # seconds: a fault may make an endless loop, which counts as noticed

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip


def faults(node: ast.AST) -> Iterator[Callable[[], None]]:
    """Ways to spoil one node in place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield lambda: node.ops.__setitem__(0, COMPARISONS[type(node.ops[0])]())
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_type(node):
        yield lambda: setattr(node, "op", ARITHMETIC[type(node.op)]())
    if isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield lambda: setattr(node, "op", other)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda: setattr(node, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        spoilt = not node.value if isinstance(node.value, bool) else node.value + 1
        yield lambda: setattr(node, "value", spoilt)
    if isinstance(node, ast.FunctionDef | ast.For | ast.If | ast.With):
        for i, line in enumerate(node.body):
            if isinstance(line, ast.Expr | ast.AugAssign) and not _is_docstring(line):
                yield lambda i=i: node.body.__setitem__(i, ast.Pass())


def _is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _is_type(node: ast.BinOp) -> bool:
    """`1 - x` is arithmetic; `int | None` was left out before, and so are paths and texts."""
    return any(isinstance(s, ast.Constant) and isinstance(s.value, str) for s in ast.walk(node))


def mutants(module: str) -> Iterator[tuple[int, str, str, str]]:
    """`(line, before, after, source)` of every fault inside the functions of a module."""
    tree = ast.parse((ROOT / module).read_text())
    inside = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    places = {id(node) for function in inside for line in function.body for node in ast.walk(line)}
    nodes = [(i, n) for i, n in enumerate(ast.walk(tree)) if id(n) in places]
    for index, node in nodes:
        for number, _ in enumerate(faults(node)):
            spoilt = copy.deepcopy(tree)
            target = list(ast.walk(spoilt))[index]
            before = ast.unparse(target).splitlines()[0]
            list(faults(target))[number]()
            after = ast.unparse(ast.fix_missing_locations(target)).splitlines()[0]
            yield node.lineno, before, after, ast.unparse(spoilt)


def noticed(checkout: Path, module: str, source: str) -> bool:
    """Whether a test of the module fails with this source in its place."""
    place, true = checkout / module, (ROOT / module).read_text()
    place.write_text(source)
    words = [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", *TESTS[module]]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    try:
        ended = subprocess.run(
            words, cwd=checkout, env=environment, capture_output=True, timeout=TIMEOUT
        )
        return ended.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        place.write_text(true)


def main(log: Path, count: int = 150, seed: int = 0) -> None:
    every = [(module, *mutant) for module in TESTS for mutant in mutants(module)]
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "wanjax"
        files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
        for file in files:
            (checkout / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, checkout / file)
        for module in TESTS:
            if not done and noticed(checkout, module, (ROOT / module).read_text()):
                sys.exit(f"The tests of {module} fail as it is.")
        for module, line, before, after, source in drawn[len(done) :]:
            found = {"module": module, "line": line, "before": before, "after": after}
            done.append(found | {"noticed": noticed(checkout, module, source)})
            with log.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    missed = [m for m in done if not m["noticed"]]
    print(f"{len(missed)} of {len(done)} not noticed (of {len(every)} that there are)")
    for m in missed:
        print(f"{m['module']}:{m['line']}: {m['before']}  ->  {m['after']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
