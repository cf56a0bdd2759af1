"""The Python door: `import pipeline` costs nothing, and what it gives agrees with the command line's."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, ids_of, tiny_config, write_documents, write_llm_c
from test_own_packages import python

import pipeline
from pipeline.checkpoint.find import find_checkpoint
from pipeline.config.load import to_toml
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.errors import UserError

TEXTS = [["a first one", "naïve, 東京"], ["", "the last"]]


def test_importing_it_imports_nothing_heavy_and_shows_what_there_is() -> None:
    code = "import sys, pipeline; print(*({'torch', 'numpy'} & sys.modules.keys()), *sorted({*pipeline.DOOR} & {*dir(pipeline)}))"
    assert python(code).split() == sorted(pipeline.DOOR)


def test_a_dataset_is_opened_without_torch(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", {"train": TEXTS, "val": [["val"]]})
    path = str(tmp_path / "d")
    code = f"import sys, pipeline; d = pipeline.open_dataset({path!r}); print(len(d), d[0], 'torch' in sys.modules)"
    assert python(code) == "4 a first one False"


def test_what_it_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = pipeline.lode


# ---- a model ----


@pytest.fixture
def model(inside: Path) -> "pipeline.Model":
    return pipeline.load("latest", device="cpu")


@pytest.mark.slow
def test_a_checkpoint_is_found_by_every_name(inside: Path) -> None:
    folder = find_checkpoint("latest", None)
    for name in ("latest", folder, str(folder), "runs/run", Path("runs/run")):
        assert pipeline.load(name).folder.resolve() == folder.resolve()
    assert pipeline.load("best", run_dir="runs/run").folder.is_dir()
    with pytest.raises(UserError, match=r"no checkpoint at gpt2 \(did you mean hf:openai-community/gpt2\?\)"):
        pipeline.load("gpt2")


def test_text_is_generated_as_by_sample(model: "pipeline.Model", capsys: pytest.CaptureFixture[str]) -> None:
    from sample.options import SampleOptions
    from sample.run import run

    text = model.generate("AB", max_new_tokens=12, temperature=0.9, top_k=5, seed=3)
    run(SampleOptions(ckpt="latest", prompts=["AB"], max_new_tokens=12, temperature=0.9, top_k=5, seed=3, device="cpu"))
    assert capsys.readouterr().out == f"AB{text}\n"
    assert text == model.generate("AB", max_new_tokens=12, temperature=0.9, top_k=5, seed=3)
    assert len(model.generate(max_new_tokens=3, seed=1)) <= 3
    assert model.generate("A", max_new_tokens=30, seed=1, stop=["C"]).find("C") == -1
    assert model.generate("A", max_new_tokens=30, seed=1, stop="C").find("C") == -1


def test_an_unknown_or_wrong_option_is_named(model: "pipeline.Model") -> None:
    with pytest.raises(UserError, match="unknown option max_tokens: expected some of max_new_tokens, min_p"):
        model.generate("A", max_tokens=3)
    with pytest.raises(UserError, match="invalid dtype 'int8': expected auto, float32"):
        pipeline.load("latest", dtype="int8")
    with pytest.raises(UserError, match="top-k -1"):
        model.generate("A", top_k=-1)


@pytest.mark.slow
def test_the_loss_is_what_eval_measures(model: "pipeline.Model", inside: Path) -> None:
    folder = inside / "data" / "tiny"
    reader = TokenReader(folder, load_manifest(folder), "val")
    loss = model.loss(reader.read(0, len(reader)))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "eval", "--ckpt", "latest", "--device", "cpu", "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert f"{loss:.4f}" == f"{json.loads(done.stdout)['loss']:.4f}"


def test_ids_of_every_kind_are_taken(model: "pipeline.Model") -> None:
    ids = model.encode("ABCDEF")
    losses = [
        model.loss(kind)
        for kind in (
            ids,
            tuple(ids),
            np.array(ids, "<u2"),
            np.array(ids, "<i8"),
            torch.tensor(ids),
            torch.tensor(ids).int(),
        )
    ]
    assert len(set(losses)) == 1
    assert model.decode(np.array(ids, "<u2")) == model.decode(torch.tensor(ids)) == "ABCDEF"
    assert model.decode([]) == ""
    assert model.decode(model.encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "at least two ids"),
        ([], "at least two ids"),
        ([1, 257], "ids from 1 to 257: expected 0 to 256"),
        ([-1, 2], "ids from -1 to 2"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([0.5, 1.0], "type float64"),
        ([[1], [1, 2]], "rows of different lengths"),
        (torch.tensor([1.0, 2.0], requires_grad=True), "type float32"),
    ],
)
def test_what_are_not_ids_is_named(model: "pipeline.Model", ids: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.loss(ids)


# ---- a dataset ----


def test_documents_by_number_across_shards(tmp_path: Path) -> None:
    dataset = pipeline.open_dataset(str(write_documents(tmp_path / "d", {"train": TEXTS, "val": [["val"]]})))
    every = [text for shard in TEXTS for text in shard]
    assert len(dataset) == 4
    assert list(dataset) == every
    assert [dataset[-number] for number in range(1, 5)] == every[::-1]
    assert dataset.tokenizer.name == "byte"
    assert dataset[np.int64(3)] == every[3]
    assert repr(dataset) == f"Dataset(folder={tmp_path / 'd'!r})"
    for other in (slice(2), 1.0, "a"):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            dataset[other]
    for number in (4, -5):
        with pytest.raises(IndexError, match=f"document {number} of 4"):
            dataset[number]


def test_documents_of_llm_c_are_counted_by_their_tokens(tmp_path: Path) -> None:
    dataset = pipeline.open_dataset(write_llm_c(tmp_path / "d"))
    assert len(dataset) == 50  # 30 and 20, end-of-text before each
    ids = ids_of(20, seed=2, before=True)[-39:]
    assert dataset.tokenizer.encode(dataset[49]).size and dataset[49] == dataset.tokenizer.decode_bytes(
        ids.tolist()
    ).decode(errors="replace")


def test_windows_follow_each_other_through_the_split(tmp_path: Path) -> None:
    dataset = pipeline.open_dataset(write_documents(tmp_path / "d", {"train": TEXTS, "val": [["val"]]}))
    windows = list(dataset.windows(8))
    tokens = dataset.manifest.count("train", "tokens")
    assert len(windows) == (tokens - 1) // 8
    assert {(window.dtype, window.shape) for window in windows} == {(np.dtype(np.int64), (9,))}
    assert all(a[-1] == b[0] for a, b in pairwise(windows))
    with pytest.raises(UserError, match="invalid block_size 0"):
        next(dataset.windows(0))


def test_a_name_under_data_is_a_dataset(inside: Path) -> None:
    assert len(pipeline.open_dataset("tiny")) == 1
    with pytest.raises(UserError, match="no dataset at data/other"):
        pipeline.open_dataset("other")


# ---- a run ----


def test_training_returns_the_run_with_its_metrics_as_columns(tiny: Path) -> None:
    (tiny / "mine.toml").write_text(to_toml(tiny_config(tiny)))
    run = pipeline.train(
        tiny / "mine.toml", **{"train.max_steps": 4, "run.name": "short", "optimizer.betas": (0.9, 0.99)}
    )
    assert run.folder == tiny / "runs" / "short"
    assert run.config.optimizer.betas == (0.9, 0.99)
    assert run.metrics["step"] == [1, 2, 3, 4]
    assert run.metrics["val_loss"][:3] == [None, None, None] and run.metrics["val_loss"][3]
    assert run.stopped == ""
    assert pipeline.load(run.folder).folder.name == "step_00000004"
    with pytest.raises(UserError, match=r"unknown key train\.steps"):
        pipeline.train(tiny / "mine.toml", **{"train.steps": 4})


def test_training_in_a_thread_leaves_signals_to_the_program_around_it(tiny: Path) -> None:
    (tiny / "mine.toml").write_text(to_toml(tiny_config(tiny)))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(pipeline.train, tiny / "mine.toml", **{"train.max_steps": np.int64(2)}).result()
    assert run.metrics["step"] == [1, 2]


# ---- its page ----


@pytest.mark.slow
def test_the_examples_of_its_page_run_in_order(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [block.partition("\n") for block in page.split("```")[1::2]]
    program = {"sh": ["bash", "-ec"], "python": [sys.executable, "-c"]}
    (tmp_path / "pipeline").write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    (tmp_path / "pipeline").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    assert [language for language, *_ in blocks] == ["sh", "python", "python", "python"]
    (tmp_path / "session").mkdir()
    for language, _, code in blocks:
        done = subprocess.run(
            [*program[language], code], cwd=tmp_path / "session", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
