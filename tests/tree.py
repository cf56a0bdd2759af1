"""The source tree, read and never imported: its files, imports, functions and line counts.

`python tests/tree.py` prints what tests/test_layout.py holds: code lines by package, comments, longest file and function.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGES = ("prepare", "train", "sample", "score", "observe", "export", "slurm")
PACKAGES = ("pipeline", *STAGES)
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def package_of(module: str) -> str:
    return module.split(".")[0]


def room_of(module: str) -> str:
    """A module directly in a package, or the sub-package it lies in: `train.run`, `train.optimizer`."""
    return ".".join(module.split(".")[:2])


@cache
def text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def length(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that every import under `node` names; `from package import module` names the module."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            named = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else str(child.module) for name in named)


@cache
def imports(path: Path) -> frozenset[str]:
    return frozenset(imported(tree(path)))


def imports_outside_functions(path: Path) -> set[str]:
    inside = [name for function in functions(path) for name in imported(function)]
    everything = list(imported(tree(path)))
    return {name for name in everything if everything.count(name) > inside.count(name)}


def reachable(module: str) -> set[str]:
    """Every module that `module` imports, itself or through our modules, at any depth and in any function."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports(MODULES[waiting.pop()]) - seen:
            seen.add(name)
            if name in MODULES:
                waiting.append(name)
    return seen


def docstring_lines(path: Path) -> set[int]:
    """The numbers of the lines that docstrings take, attribute docstrings included."""
    found: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return found


@cache
def comment_lines(path: Path) -> dict[int, str]:
    """Comments by the number of their line, behind code or alone."""
    tokens = tokenize.generate_tokens(io.StringIO(text(path)).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


@cache
def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comments alone, nor docstrings."""
    prose = docstring_lines(path)
    lines = enumerate(text(path).splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in prose for number, line in lines
    )


def lines_of(package: str) -> int:
    """Code lines of a package."""
    return sum(code_lines(path) for path in SOURCES if path.parts[0] == package)


def comments_per_100() -> float:
    """Lines with a comment, by 100 code lines."""
    return 100 * sum(len(comment_lines(path)) for path in SOURCES) / sum(map(code_lines, SOURCES))


def figures() -> Iterator[str]:
    for package in PACKAGES:
        yield f"{package:10} {lines_of(package):6,} code lines"
    yield f"{'all':10} {sum(map(lines_of, PACKAGES)):6,} code lines in {len(SOURCES)} files"
    yield f"comment lines per 100 code lines: {comments_per_100():.1f}"
    longest = max(SOURCES, key=lambda path: len(text(path).splitlines()))
    yield f"longest file: {longest}, {len(text(longest).splitlines())} lines"
    size, where = max(
        (length(function), f"{path}:{function.lineno}") for path in SOURCES for function in functions(path)
    )
    yield f"longest function: {where}, {size} lines"
    yield f"README.md: {len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines())} lines"


if __name__ == "__main__":
    print("\n".join(figures()))  # noqa: T201
