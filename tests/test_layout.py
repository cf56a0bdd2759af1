"""The rules about where a line lives, held by reading the syntax trees: nothing here is imported or run."""

import ast
import graphlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "prepare", "train", "sample", "score")
STAGES = PACKAGES[1:]
WITHOUT_TORCH = (
    "errors",
    "launch",
    "log",
    "files",
    "rendezvous",
    "config",
    "byte_pairs",
    "tokenizer",
    "tokenizer_files",
    "foreign",
    "shards",
    "scan",
    "duplicates",
    "places",
    "sbatch",
    "shell",
    "mistakes",
    "doctor",
    "submit",
)
MAPPED = (*PACKAGES, "configs", "slurm", "containers", "benchmarks")
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAX_FUNCTION_LINES = 60

SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
every_source = pytest.mark.parametrize("path", SOURCES, ids=str)


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that every import under `node` names; `from package import module` names the module."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            whole = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else str(child.module) for name in whole)


def imports(path: Path) -> set[str]:
    return set(imported(tree(path)))


def imports_outside_functions(path: Path) -> set[str]:
    inside = [name for function in functions(path) for name in imported(function)]
    everything = list(imported(tree(path)))
    return {name for name in everything if everything.count(name) > inside.count(name)}


def reachable(module: str) -> set[str]:
    """Every module that `module` imports, itself or through modules of ours, at any depth and in any function."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports(MODULES[waiting.pop()]) - seen:
            seen.add(name)
            if name in MODULES:
                waiting.append(name)
    return seen


def package_of(module: str) -> str:
    return module.split(".")[0]


# ---- imports ----


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_the_nouns_and_itself(stage: str) -> None:
    for module, path in MODULES.items():
        if package_of(module) == stage:
            ours = {name for name in imports(path) if package_of(name) in PACKAGES}
            assert {package_of(name) for name in ours} <= {"pipeline", stage}, f"{path} imports {sorted(ours)}"
            assert "pipeline.cli" not in ours, f"{path} imports the front door"


def test_only_the_command_line_knows_the_stages_and_only_inside_its_commands() -> None:
    for module, path in MODULES.items():
        if package_of(module) == "pipeline":
            found = imports_outside_functions(path) if module == "pipeline.cli" else imports(path)
            stages = {name for name in found if package_of(name) in STAGES}
            assert not stages, f"{path} imports {sorted(stages)}"
    assert {f"{stage}.run" for stage in STAGES} <= imports(MODULES["pipeline.cli"])


@pytest.mark.parametrize(
    "module",
    [*(f"pipeline.{name}" for name in WITHOUT_TORCH), *(name for name in MODULES if package_of(name) == "prepare")],
)
def test_what_runs_without_torch_never_imports_it(module: str) -> None:
    with_torch = {name for name in reachable(module) if "torch" in name.split(".")}
    assert not with_torch, f"{module} reaches {sorted(with_torch)}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_nothing_in_its_init(package: str) -> None:
    content = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    if package == "pipeline":
        docstring, version = tree(Path(package, "__init__.py")).body
        assert isinstance(docstring, ast.Expr)
        assert ast.unparse(version).startswith("__version__ = ")
    else:
        assert content == ""


# ---- what no source may do ----


def dangers(path: Path) -> Iterator[str]:
    """Ways in which reading a file could run what is in it."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__" as name)):
                yield f"line {node.lineno}: {name}()"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield f"line {node.lineno}: torch.load"
            case ast.keyword(arg="allow_pickle" | "trust_remote_code" as name):
                yield f"line {node.value.lineno}: {name}="
    yield from (f"imports {name}" for name in imports(path) if package_of(name) in FORBIDDEN_MODULES)


@every_source
def test_no_source_can_run_what_it_reads(path: Path) -> None:
    assert list(dangers(path)) == []


def test_the_search_for_dangers_finds_each_of_them(tmp_path: Path) -> None:
    """The test above passes when nothing is found, so what it can find is shown here."""
    path = tmp_path / "danger.py"
    path.write_text(
        "import pickle\nfrom dill import loads\neval('1')\nexec('1')\n"
        "torch.load(f)\nnp.load(f, allow_pickle=True)\nload_dataset(n, trust_remote_code=True)\nmodel.eval()\n"
    )
    assert sorted(dangers(path)) == [
        "imports dill", "imports pickle",
        "line 3: eval()", "line 4: exec()", "line 5: torch.load", "line 6: allow_pickle=", "line 7: trust_remote_code=",
    ]  # fmt: skip


# ---- form ----


@every_source
def test_a_file_is_named_for_its_subject(path: Path) -> None:
    assert not FORBIDDEN_NAMES & set(re.split(r"[/_]", str(path.with_suffix("")))), f"{path}: what is it about?"


@every_source
def test_a_source_opens_with_what_it_is_about(path: Path) -> None:
    if path.name != "__init__.py":
        assert ast.get_docstring(tree(path)), f"{path} has no docstring"


@every_source
def test_every_function_is_annotated(path: Path) -> None:
    for function in functions(path):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [entry.arg for entry in named if entry and not entry.annotation and entry.arg not in ("self", "cls")]
        assert not bare, f"{path}:{function.lineno} {function.name} leaves {bare} without a type"
        assert function.returns, f"{path}:{function.lineno} {function.name} does not say what it returns"


@every_source
def test_every_function_fits_a_screen(path: Path) -> None:
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{path}:{function.lineno} {function.name} has {lines} lines"


@every_source
def test_nothing_is_left_for_later(path: Path) -> None:
    found = re.findall(r"\b(?:TODO|FIXME|XXX)\b.*", (ROOT / path).read_text(encoding="utf-8"))
    assert not found, f"{path}: {found}"


# ---- the README ----


def readme_map() -> list[str]:
    """The first word of each line in the fenced block under `## File map`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## File map\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block under the heading '## File map'"
    return [line.split()[0] for line in block[1].splitlines() if line.strip()]


def test_the_readmes_file_map_is_the_tree() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing tells the project's files from others")
    listed = subprocess.run(["git", "ls-files", *MAPPED], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if Path(name).name != "__init__.py"}
    told = readme_map()
    assert {name for name in told if not (ROOT / name).exists()} == set(), "the map names files that are not there"
    assert {name for name in told if name.split("/")[0] in MAPPED and not name.endswith("/")} == tracked
    assert len(set(told)) == len(told)
