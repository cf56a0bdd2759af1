"""README and docs say what is true: their commands run or parse, their links, paths and config keys exist.

A block after `<!-- run -->` runs for real: all of them in one session, in a folder with some text,
in the order of the README's list of pages. Every other command is parsed to its options by the real
command line: it may need a network, GPUs or a cluster.

`PYTHONPATH=. python tests/test_docs.py` writes the table of config keys into docs/train.md.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import orjson
import pytest
from tree import MODULES, PACKAGES, ROOT

from pipeline.cli.command import Command
from pipeline.cli.main import app
from pipeline.config.faults import expected
from pipeline.config.keys import KEYS, SECTIONS
from pipeline.config.load import config_from_arguments
from pipeline.config.other_names import NANOGPT

README = ROOT / "README.md"
ROWS = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| [docs/")]
LISTED = [page for row in ROWS for page in re.findall(r"\]\((docs/[\w-]+\.md)\)", row)]
PAGES = [README, *(ROOT / name for name in LISTED)]
KEYS_BEGIN, KEYS_END = "<!-- keys -->", "<!-- end of keys -->"
SHELL = ("", "sh", "bash", "console")  # a block without a language is commands, so that none escapes
# What starts `pipeline` with the words that follow its name.
LAUNCHERS = ("torchrun", "srun", "python", "apptainer", "docker")
# Commands of others: only that nothing else is taken for one of them.
OTHERS = (
    "apptainer", "cat", "cd", "docker", "echo", "export", "git", "hf", "pip", "salloc", "scancel", "scontrol", "source",
    "squeue", "tail", "tensorboard", "touch",
)  # fmt: skip
# `train.bin` is a file and no config key.
SUFFIXES = ("bin", "py", "sbatch", "txt", "md", "toml", "json", "jsonl", "safetensors")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `runs`: whether a comment before it asks for that."""

    page: str
    line: int
    language: str
    content: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[Block]:
    text = text_of(page)
    for found in re.finditer(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page.name, line, found[2], found[3], bool(found[1]))


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# ---- commands ----


def commands_of(script: str) -> Iterator[list[str]]:
    """The words of each command, without redirections and without variables set before it."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter([*lexer, ";"])
        for word in words:
            if word in ("<", ">", ">>"):
                next(words)
            elif set(word) <= set("|&;"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                command.append(word)


def resolve(words: list[str]) -> None:
    """Hold one command against what it names: the real command line, a script, a target. Raises AssertionError or its own."""
    name, *rest = words
    if name == "pipeline":
        resolve_ours(rest)
    elif name in LAUNCHERS and "pipeline" in rest:
        resolve(rest[rest.index("pipeline") :])
    elif name == "sbatch":
        script = next(word for word in rest if word.endswith(".sbatch"))
        assert (ROOT / script).is_file(), f"no file {script}"
        resolve_ours([Path(script).stem, *rest[rest.index(script) + 1 :]])
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    else:
        assert name in OTHERS, f"{name} is no command that this test knows"


def resolve_ours(arguments: list[str]) -> None:
    command: click.Command = app
    names: list[str] = []
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"no command {arguments[0]}"
        command, names, arguments = command.commands[arguments[0]], [*names, arguments[0]], arguments[1:]
    if {"--help", "-h", "--version"} & set(arguments):
        return
    assert isinstance(command, Command)
    # %a is the index of an element of a SLURM array.
    parameters = command.parse(word.replace("%a", "1") for word in arguments)
    if names[0] == "submit":
        resolve_ours([names[1], *parameters["arguments"]])
    elif names == ["train"]:
        config_from_arguments(list(parameters["arguments"]))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in SHELL], ids=str)
def test_a_command_parses(block: Block) -> None:
    for words in commands_of(block.content):
        try:
            resolve(words)
        except Exception as error:
            pytest.fail(f"{block}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("bad", ["pipeline trian", "pipeline sample --best", "pipeline train optimizer.rate=1", "make all",
                                 "sbatch slurm/no.sbatch", "torchrun -m pipeline train no-preset", "rm -rf /"])  # fmt: skip
def test_a_wrong_command_does_not_parse(bad: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  whatever parser it is that refuses
        resolve(*commands_of(bad))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language not in SHELL], ids=str)
def test_a_block_is_of_a_known_language_and_reads_as_such(block: Block) -> None:
    match block.language:
        case "python":
            compile(block.content, str(block), "exec")
        case "toml":
            tomllib.loads(block.content)
        case "json":
            orjson.loads(block.content)
        case language:
            assert language in ("text", "yaml"), f"{block}: mark it as text if it is not a command"


@pytest.mark.slow
def test_the_blocks_to_run_run_in_one_session(tmp_path: Path) -> None:
    session = tmp_path / "session"
    write_texts(session)
    environment = session_environment(tmp_path / "bin")
    for block in BLOCKS:
        if block.runs and block.page != "python.md":  # tests/pipeline/test_api.py runs that page
            program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
            done = subprocess.run(
                [*program, block.content], cwd=session, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{block}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def write_texts(folder: Path) -> None:
    """What the pages say is there: my-texts/, notes.jsonl and prompt.txt."""
    (folder / "my-texts").mkdir(parents=True)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
    for source in sources:
        shutil.copy(source, folder / "my-texts")
    notes = [{"text": source.read_text(encoding="utf-8")[:500]} for source in sources if source.stat().st_size]
    (folder / "notes.jsonl").write_bytes(b"\n".join(map(orjson.dumps, notes)))
    (folder / "prompt.txt").write_text("import ")


def session_environment(bin_folder: Path) -> dict[str, str]:
    """`pipeline` on the path is this checkout, one CPU, no network."""
    bin_folder.mkdir()
    program = bin_folder / "pipeline"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m pipeline "$@"\n')
    program.chmod(0o755)
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | offline | {"PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}:{os.environ['PATH']}"}


# ---- what pages name ----


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE) if anchor else []
        assert anchor in ("", *map(slug, headings)), f"{page.name} links to {target}"


@every_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    roots = "|".join((*PACKAGES, "configs", "containers", "benchmarks", "docs", "tests"))
    for path in re.findall(rf"`((?:{roots})/[\w./-]*)`", prose_of(page)):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@every_page
def test_config_keys_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.\w+)[`=]", prose_of(page)):
        assert name in KEYS or name.endswith(SUFFIXES), f"{page.name} names {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_a_benchmark_imports_modules_that_exist(path: Path) -> None:
    """Also in the programs that it keeps in strings, which no linter reads."""
    named = re.findall(rf"^\s*from ((?:{'|'.join(PACKAGES)})[\w.]*) import", text_of(path), re.MULTILINE)
    assert set(named) <= set(MODULES)


def test_the_readme_lists_every_page() -> None:
    assert {ROOT / name for name in LISTED} >= set((ROOT / "docs").glob("*.md"))


def test_the_readme_draws_every_room() -> None:
    tree = text_of(README).partition("## The tree")[2]
    rooms = {path.parent.name for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    assert not {room for room in rooms if f"{room}/" not in tree}


def test_the_readmes_table_of_nanogpts_names_is_the_command_lines() -> None:
    cells = re.findall(r"([^|\n]+)\|([^|\n]+)(?=\|)", text_of(README))
    shown = {(name, key) for names, keys in cells for name in _quoted(names) for key in _quoted(keys)}
    assert set(NANOGPT.items()) <= shown


def _quoted(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def test_the_readmes_config_is_the_preset() -> None:
    (shown,) = (block for block in BLOCKS if block.page == "README.md" and block.language == "toml")
    assert tomllib.loads(shown.content) == tomllib.loads(text_of(ROOT / "configs" / "shakespeare-char.toml"))


# ---- the table of config keys ----


def keys_table() -> str:
    rows = [
        f"| `{name}` | `{orjson.dumps(entry.default).decode()}` | {expected(entry)} | {entry.metadata['text']} |"
        for name, entry in KEYS.items()
    ]
    return "\n".join(["| key | default | expected | meaning |", "|---|---|---|---|", *rows])


def with_keys(text: str) -> str:
    before, _, after = text.partition(KEYS_BEGIN)
    return f"{before}{KEYS_BEGIN}\n{keys_table()}\n{KEYS_END}{after.partition(KEYS_END)[2]}"


def test_the_table_of_keys_is_the_configs() -> None:
    text = text_of(ROOT / "docs" / "train.md")
    assert text == with_keys(text), "PYTHONPATH=. python tests/test_docs.py writes it anew"


if __name__ == "__main__":
    page = ROOT / "docs" / "train.md"
    page.write_text(with_keys(text_of(page)), encoding="utf-8")
