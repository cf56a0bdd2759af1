"""A checkout that nothing was installed for but torch and what it comes with: heavy and optional libraries are imported
where they are used.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tree import SOURCES, imports_outside_functions

ABSENT = ("datasets", "orjson", "ijson", "zstandard", "gigatoken", "fastokens")
PROGRAM = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it now raises ImportError
from pipeline.cli.main import main
main()
"""


@pytest.mark.slow
def test_text_is_prepared_trained_on_sampled_and_scored_without_optional_libraries(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a line of text, and another one"}\n' * 200)
    run = ["run.dir=runs", "run.name=bare", "data.dataset=bare", "model.n_layer=1", "model.n_head=2", "model.n_embd=32"]
    run += ["model.block_size=32", "train.max_steps=2", "train.tokens_per_step=128", "train.micro_batch_size=4"]
    for command in (
        ["prepare", "a.jsonl", "--name", "bare", "--tokenizer", "byte", "--workers", "2", "--val-fraction", "0.1"],
        ["train", *run, "eval.tokens=64", "log.tensorboard=false"],
        ["sample", "--prompt", "a line", "--max-new-tokens", "4"],
        ["eval", "--json"],
        ["inspect", "data/bare"],
        ["verify", "data/bare"],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, *command],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, (command, ended.stderr[-2000:])


@pytest.mark.slow
def test_no_module_imports_an_optional_library_at_its_top() -> None:
    """Also those that no command of the test above reaches, such as what `eval --follow` runs."""
    found = {str(path): sorted(imports_outside_functions(path) & set(ABSENT)) for path in SOURCES}
    assert not {path: names for path, names in found.items() if names}
