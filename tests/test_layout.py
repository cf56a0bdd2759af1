"""The law about where a line lives, held by reading the syntax trees: nothing here is imported or run.

A package's rooms stand in `ORDER` from the ground up, and imports go down only; so there are no cycles, and a new room is put
where what it needs is below it. Ceilings keep rooms small: raise one by saying why beside it.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tree import (
    MODULES,
    PACKAGES,
    ROOT,
    SOURCES,
    STAGES,
    comments_per_100,
    functions,
    imports,
    imports_outside_functions,
    length,
    lines_of,
    package_of,
    reachable,
    room_of,
    text,
    tree,
)

# From the ground up: a room imports those before it.
ORDER = {
    "pipeline": (
        "errors", "launch", "log", "files", "config", "vocabulary", "dataset", "runs", "machine", "model", "checkpoint",
        "budget", "api", "cli", "__main__",
    ),
    "prepare": (
        "formats", "units", "workers", "storage", "documents", "sources", "unfinished", "encoding", "assembly", "fetch",
        "options", "preparation", "run",
    ),
    "train": (
        "data", "checks", "optimizer", "parallel", "resume", "spikes", "evaluation", "metrics", "preview", "stop",
        "saving", "trainer", "memory", "run",
    ),
    "sample": ("options", "choice", "generate", "continuation", "interactive", "preview", "run"),
    "score": ("options", "loss", "harness", "tables", "run", "follow"),
    "observe": (
        "tables", "doctor", "sample", "quality", "inspect", "steps", "verify", "config", "runs", "watch",
        "plan", "report",
    ),
    "export": ("options", "model_card", "gguf", "run"),
    "slurm": ("site", "sbatch", "doctor", "job", "starts", "checks", "submit"),
}  # fmt: skip
# Code lines a package may hold: without blanks, comments and docstrings. Of pipeline, 270 are what a step takes of memory and
# time, by formula and device: plan, train --dry-run and submit share them. Of prepare a quarter more than it was given (3,300):
# twice as many formats, listings that count what they pass over, a journal by file that survives sources which change.
# Pipeline was given 4,200 and observe 1,400, before either had what is known of a run before, while and after it trains:
# of pipeline 210 are the panel, which train and watch draw, and 130 sweeps and new commands at the front door; of observe
# 460 are plan, 340 report and 520 doctor. Of train 170 are Muon, over ranks and shards; of pipeline 330 a second
# architecture, 110 averaged checkpoints, 120 a GPU's ways: documents by offset, decoding in one graph; 110 a trial of bfloat16,
# cores and memory of a busy CPU. Slurm's 800, and 45 of the site's file: nobody else reads it.
CEILINGS = {
    "pipeline": 6020, "prepare": 4450, "train": 2180, "observe": 2135, "slurm": 845, "sample": 500, "score": 500, "export": 500,
}  # fmt: skip
# Rooms of `pipeline` that answer before torch is there; and the whole of prepare.
WITHOUT_TORCH = (
    "pipeline.errors", "pipeline.log", "pipeline.files", "pipeline.config", "pipeline.launch", "pipeline.budget",
    "pipeline.runs", "pipeline.vocabulary", "pipeline.dataset", "pipeline.machine.gpus", "pipeline.machine.meeting", "prepare",
    "slurm",
)  # fmt: skip
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MOST_ENTRIES = 14  # modules and packages at one level
MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 60
MOST_POSITIONAL = 4
CALLS_BY_POSITION = {
    "F.layer_norm",
    "torch.ops.aten.native_layer_norm_backward",
    "multiply",
    "ask",
}  # torch's own, and a command line of words
LEAST_COMMENTS_PER_100 = 6.0  # lines with a comment, by 100 code lines

# What only an architecture's own files may name, and where else it may stand: the registries, the export formats.
ARCHITECTURE_FILES = (
    "pipeline/model/gpt2.py", "pipeline/checkpoint/layout_gpt2.py", "pipeline/model/qwen3.py",
    "pipeline/checkpoint/layout_qwen3.py", "export/",
)  # fmt: skip
ONE_ARCHITECTURE = {
    r"\b(wte|wpe|c_attn|c_proj|c_fc|ln_1|ln_2|ln_f)\b|transformer\.h\b": ARCHITECTURE_FILES,
    r"\b(self_attn|[qkvo]_proj|[qk]_norm|(gate|up|down)_proj|embed_tokens|input_layernorm)\b": ARCHITECTURE_FILES,
    r"\blm_head\b|\.transformer\b": (*ARCHITECTURE_FILES, "pipeline/model/"),
    r"\b(GPT2|GPT2Layout|layout_gpt2|Qwen3Layout|layout_qwen3)\b|\bimport Qwen3\b": (
        *ARCHITECTURE_FILES, "pipeline/model/language_model.py", "pipeline/checkpoint/layouts.py",
    ),
}  # fmt: skip

every_source = pytest.mark.parametrize("path", SOURCES, ids=str)


# ---- who imports whom ----


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_pipeline_and_itself(stage: str) -> None:
    for module, path in MODULES.items():
        if package_of(module) == stage:
            ours = {name for name in imports(path) if package_of(name) in PACKAGES}
            assert {package_of(name) for name in ours} <= {"pipeline", stage}, f"{path} imports {sorted(ours)}"
            assert not any(room_of(name) == "pipeline.cli" for name in ours), f"{path} imports the front door"


def test_only_the_front_doors_know_the_stages_and_only_inside_functions() -> None:
    for module, path in MODULES.items():
        if package_of(module) == "pipeline":
            found = (
                imports_outside_functions(path)
                if room_of(module) in ("pipeline.cli", "pipeline.api")
                else imports(path)
            )
            stages = {name for name in found if package_of(name) in STAGES}
            assert not stages, f"{path} imports {sorted(stages)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down_and_never_up(package: str) -> None:
    rooms = {
        room_of(module).rpartition(".")[2] for module in MODULES if package_of(module) == package and module != package
    }
    new, gone = rooms - set(ORDER[package]), set(ORDER[package]) - rooms
    assert not new, (
        f"add {sorted(new)} to ORDER in tests/test_layout.py, behind every room of {package} that it imports"
    )
    assert not gone, f"remove {sorted(gone)} from ORDER in tests/test_layout.py: {package} no longer has it"
    level = {f"{package}.{room}": number for number, room in enumerate(ORDER[package])}
    for module, path in MODULES.items():
        if package_of(module) == package and module != package:
            up = [name for name in imports(path) if level.get(room_of(name), -1) > level[room_of(module)]]
            assert not up, f"{path} imports {up}, which stand behind it in ORDER: move what it needs before it"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_answers_without_torch_never_imports_it(room: str) -> None:
    for module in MODULES:
        if module == room or module.startswith(f"{room}."):
            with_torch = {name for name in reachable(module) if "torch" in name.split(".")}
            assert not with_torch, f"{module} reaches {sorted(with_torch)}"


def test_no_module_imports_itself_through_others() -> None:
    for module in MODULES:
        assert module not in reachable(module), f"{module} is in an import cycle"


# ---- what no source may do ----


def dangers(path: Path) -> Iterator[str]:
    """Ways in which reading a file could run what is in it."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__" as name)):
                yield f"line {node.lineno}: {name}()"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield f"line {node.lineno}: torch.load"
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=False)):
                pass
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


@every_source
def test_only_an_architectures_own_files_know_it(path: Path) -> None:
    for pattern, allowed in ONE_ARCHITECTURE.items():
        if not str(path).startswith(allowed):
            found = {match.group() for match in re.finditer(pattern, text(path))}
            assert not found, (
                f"{path} names {sorted(found)}: ask the model (`blocks`, `logits`) or its layout (`layout_of`) instead, "
                "so that it works with every architecture"
            )


# ---- size and form ----


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_stays_under_its_ceiling(package: str) -> None:
    assert lines_of(package) <= CEILINGS[package], "move or delete lines, or raise the ceiling and say why beside it"


def test_a_level_holds_few_entries() -> None:
    entries: Counter[str] = Counter()
    for module in MODULES:
        parent, _, leaf = module.rpartition(".")
        if parent and leaf != "__main__":
            entries[parent] += 1
    crowded = {package: count for package, count in entries.items() if count > MOST_ENTRIES}
    assert not crowded, f"more than {MOST_ENTRIES} modules and packages at one level: {crowded}"


@every_source
def test_a_file_fits_a_sitting(path: Path) -> None:
    lines = len(text(path).splitlines())
    assert lines <= MOST_FILE_LINES, f"{path} has {lines} lines"


@every_source
def test_a_file_is_named_for_its_subject(path: Path) -> None:
    assert not FORBIDDEN_NAMES & set(re.split(r"[/_]", str(path.with_suffix("")))), f"{path}: what is it about?"


@every_source
def test_a_source_opens_with_what_it_is_about(path: Path) -> None:
    if path.name != "__init__.py":
        assert ast.get_docstring(tree(path)), f"{path} has no docstring"


def test_only_the_front_package_says_something_in_its_init() -> None:
    for path in SOURCES:
        if path.name == "__init__.py" and path != Path("pipeline/__init__.py"):
            assert text(path) == "", f"{path} is not empty"


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
        assert length(function) <= MOST_FUNCTION_LINES, f"{path}:{function.lineno} has {length(function)} lines"


@every_source
def test_a_call_passes_few_positional_arguments(path: Path) -> None:
    """Beyond four nobody knows which is which: options travel by name. Sequences of things alike are no options."""
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if not name.startswith("logger.") and name not in CALLS_BY_POSITION:
            found = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
            assert len(found) <= MOST_POSITIONAL, f"{path}:{call.lineno} {name}: pass the options by name"


def test_the_code_says_why() -> None:
    assert comments_per_100() >= LEAST_COMMENTS_PER_100, (
        "say why where the next line is not obvious, with a number or a source"
    )


@every_source
def test_nothing_is_left_for_later(path: Path) -> None:
    found = re.findall(r"\b(?:TODO|FIXME|XXX)\b.*", text(path))
    assert not found, f"{path}: {found}"


# ---- the README ----


def test_the_readme_fits_a_newcomers_patience() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
