"""Small changes of the code, one at a time: each should make a test of its module fail.

    python scripts/mutation_trial.py --each 40 --out mutants.md

Changed are comparisons, arithmetic, constants, conditions, and pairs of functions such as min and max; names, strings
and annotations are not. Each change is written to a copy of the repository, in which a fork of this process, which has
imported what takes long, runs the module's nearest tests. A change that no test sees is printed with its line.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# Modules, and the tests that are theirs; whatever else pytest takes may follow.
NEAREST = {
    "arguments.py": ["tests/test_arguments.py"],
    "calibration/settings.py": ["tests/calibration/test_settings.py"],
    "calibration/statistics.py": ["tests/calibration/test_statistics.py"],
    "files/reading.py": ["tests/files/test_reading.py"],
    "inference/sampling.py": ["tests/inference/test_sampling.py"],
    "models/rules.py": ["tests/models/test_rules.py"],
    "search/allocators/second_order.py": ["tests/search/allocators/test_allocators.py", "-k", "second or cheapest"],
    "search/greedy_path.py": ["tests/search/test_greedy_and_exponents.py"],
    "sparsity/budget.py": ["tests/sparsity/test_budget.py"],
    "sparsity/methods.py": ["tests/sparsity/test_methods.py"],
    "sparsity/plan.py": ["tests/sparsity/test_plan.py", "tests/sparsity/test_formats.py"],
    "sparsity/score.py": ["tests/sparsity/test_score.py"],
}
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
CALCULATED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
PAIRS = [("min", "max"), ("argmin", "argmax"), ("minimum", "maximum"), ("any", "all"), ("zeros", "ones")]
EXCHANGED = {**dict(PAIRS), **{b: a for a, b in PAIRS}}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A changed module: the line of the change, what was there and what stands there now."""

    line: int
    before: str
    after: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every change of a module, one at a time."""
    tree = ast.parse(source)
    skipped = {id(inner) for node in ast.walk(tree) for inner in _left_alone(node)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for which in range(len(_changed(node))):
            made = copy.deepcopy(tree)
            target = next(other for i, other in enumerate(ast.walk(made)) if i == number)
            after = _changed(target)[which]
            text = ast.unparse(_Replace(target, after).visit(made))
            yield Mutant(getattr(node, "lineno", 0), ast.unparse(node), ast.unparse(after), text)


def _left_alone(node: ast.AST) -> Iterator[ast.AST]:
    """Annotations and decorators: what they say is for readers and checkers."""
    parts = [getattr(node, name, None) for name in ("annotation", "returns")]
    for part in [*parts, *getattr(node, "decorator_list", ())]:
        if part is not None:
            yield from ast.walk(part)


def _changed(node: ast.AST) -> list[ast.expr | ast.stmt]:
    """What may stand in place of a node."""
    out: list[ast.expr | ast.stmt] = []
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            out.append(
                ast.Compare(
                    node.left, [*node.ops[:i], COMPARED[type(operator)](), *node.ops[i + 1 :]], node.comparators
                )
            )
    elif isinstance(node, ast.BinOp):
        out.append(ast.BinOp(node.left, CALCULATED[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        out.append(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        out.append(node.operand)
    elif isinstance(node, ast.IfExp):
        out += [node.body, node.orelse]
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            out.append(ast.Constant(not node.value))
        elif isinstance(node.value, int | float):
            out.append(ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.125))
    elif isinstance(node, ast.Name) and node.id in EXCHANGED and isinstance(node.ctx, ast.Load):
        out.append(ast.Name(EXCHANGED[node.id], node.ctx))
    elif isinstance(node, ast.Attribute) and node.attr in EXCHANGED:
        out.append(ast.Attribute(node.value, EXCHANGED[node.attr], node.ctx))
    elif (
        isinstance(node, ast.AugAssign)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or isinstance(node, ast.Continue | ast.Break)
    ):
        out.append(ast.Pass())
    return [ast.fix_missing_locations(ast.copy_location(other, node)) for other in out]


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, other: ast.AST):
        self._target, self._other = target, other

    def visit(self, node: ast.AST) -> ast.AST:
        return self._other if node is self._target else self.generic_visit(node)


def fails(folder: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests fail, or do not end, in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        import pytest

        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os._exit(
            int(
                pytest.main(
                    [
                        "-x",
                        "-q",
                        "-p",
                        "no:cacheprovider",
                        "-p",
                        "no:xdist",
                        "-W",
                        "ignore::pytest.PytestAssertRewriteWarning",
                        *tests,
                    ]
                )
            )
        )
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2, 3) and code >= 0:
                raise RuntimeError(f"{' '.join(tests)}: pytest ended with {code}")
            return code != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    """Try, print what survives and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=NEAREST, default=list(NEAREST))
    parser.add_argument(
        "--each", type=int, default=40, help="changes of a module, drawn at random where there are more"
    )
    parser.add_argument("--longest", type=float, default=120, help="seconds after which tests count as failing")
    parser.add_argument("--out", type=Path, help="file for what survives and the counts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # Nothing that starts threads, which a fork would wait for: no test framework and no backend of JAX.
    import flax.nnx  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
    import pydantic  # noqa: F401
    import yaml  # noqa: F401

    lines: list[str] = []
    totals: collections.Counter[str] = collections.Counter()

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if args.out:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(
            HERE, folder, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", "runs"), symlinks=False
        )
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{name}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for module in args.modules:
            file, began = folder / "wisparse_jax" / module, time.perf_counter()
            original = file.read_text(encoding="utf-8")
            if fails(folder, NEAREST[module], args.longest):
                raise SystemExit(f"{module}: its tests fail as they are")
            found = list(mutants(original))
            tried = sorted(random.Random(args.seed).sample(range(len(found)), min(args.each, len(found))))
            counts: collections.Counter[str] = collections.Counter()
            for number in tried:
                mutant = found[number]
                file.write_text(mutant.source, encoding="utf-8")
                killed = fails(folder, NEAREST[module], args.longest)
                counts["killed" if killed else "survived"] += 1
                if not killed:
                    before, after = (" ".join(text.split())[:100] for text in (mutant.before, mutant.after))
                    say(f"- `{module}:{mutant.line}` `{before}` -> `{after}`")
            file.write_text(original, encoding="utf-8")
            totals += counts
            took = time.perf_counter() - began
            say(f"{module}: {len(found)} possible, {len(tried)} made, {counts['killed']} killed, "
                f"{counts['survived']} survived; {took:.0f} s")  # fmt: skip
    say(f"all: {totals.total()} made, {totals['killed']} killed, {totals['survived']} survived")


if __name__ == "__main__":
    main()
