"""Inspect: the figures are those a plain count gives, beginnings are the texts, and no text commands the terminal."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from conftest import (
    GPT2_END,
    ids_of,
    llm_c,
    run_program,
    tiny_config,
    write_documents,
    write_llm_c,
    write_nanogpt,
)

from observe.inspect import describe_lengths, run
from pipeline.budget import parameters
from pipeline.checkpoint.folder import read_description, write_model
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer

TEXTS = [["Once upon a time", "there", "was"], ["a second shard", "ü"]]
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e [red]plain[/red]"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data", {"train": TEXTS, "val": [[HOSTILE]]})


def described(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    run(path, as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run(path, as_json=False)
    return capsys.readouterr().out


@pytest.mark.slow
def test_figures_are_those_of_a_plain_count(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = described(dataset, capsys)["splits"]["train"]
    contents = [text.encode() for shard in TEXTS for text in shard]
    counts = Counter(i for content in contents for i in [*content, 256])
    total = counts.total()
    assert (train["tokens"], train["documents"], train["shards"]) == (total, 5, 2)
    assert train["bytes"] == total - 5 and train["bytes_per_token"] == (total - 5) / total
    assert train["distinct_ids"] == len(counts) and train["highest_id"] == 256
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert train["unigram_entropy_nats"] == pytest.approx(entropy)
    lengths = sorted(map(len, contents))
    assert train["document_lengths"] == {
        "min": lengths[0], "median": lengths[2], "p90": lengths[4], "p99": lengths[4], "max": lengths[4],
        "mean": sum(lengths) / 5,
    }  # fmt: skip
    top = train["frequent_tokens"][0]
    most = min(counts, key=lambda i: (-counts[i], i))
    assert (top["id"], top["text"], top["share"]) == (most, chr(most), counts[most] / total)


def test_quantiles_of_lengths_are_those_of_the_documents() -> None:
    lengths = np.random.default_rng(0).integers(0, 50, size=1000)
    found = describe_lengths(Counter(lengths.tolist()))
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] == np.quantile(lengths, share, method="inverted_cdf")
    assert found["mean"] == pytest.approx(lengths.mean())
    assert describe_lengths(Counter()) == {}


@pytest.mark.slow
def test_beginnings_are_the_first_documents_with_their_places(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = described(dataset, capsys)["splits"]
    assert [entry["text"] for entry in found["train"]["beginnings"]] == TEXTS[0]
    assert [entry["position"] for entry in found["train"]["beginnings"]] == [0, 17, 23]
    assert [entry["text"] for entry in found["val"]["beginnings"]] == [HOSTILE]


@pytest.mark.slow
def test_a_long_document_is_cut_between_two_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path, {"train": [["x" + "ü" * 1000]], "val": [["y" * 1000]]})
    found = described(tmp_path, capsys)["splits"]
    assert found["train"]["beginnings"][0]["text"] == "x" + "ü" * 99
    assert found["train"]["beginnings"][0]["tokens"] == 2001


@pytest.mark.slow
def test_what_the_manifest_tells_is_shown(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(dataset, capsys)
    manifest = orjson.loads((dataset / "manifest.json").read_bytes())
    for name in ("sources", "options", "val_rule", "skipped", "statistics", "dtype", "program"):
        assert found[name] == manifest[name]
    assert found["kind"] == "dataset" and found["tokenizer"]["name"] == "byte"
    text = shown(dataset, capsys)
    assert "empty count 2, example texts/a.jsonl line 7" in text and "bigram_entropy_nats 1.25" in text


@pytest.mark.slow
def test_no_control_character_of_a_text_or_manifest_is_printed(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = orjson.loads((dataset / "manifest.json").read_bytes())
    manifest["sources"], manifest["options"] = [{"path": HOSTILE}], {HOSTILE: "[blink]"}
    (dataset / "manifest.json").write_bytes(orjson.dumps(manifest))
    out = shown(dataset, capsys)
    assert [c for c in out if not c.isprintable() and c != "\n"] == []
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e [red]plain[/red]" in out and "[blink]" in out
    capsys.readouterr()
    run(dataset, as_json=True)
    out = capsys.readouterr().out
    assert out.isascii() and [c for c in out if not c.isprintable()] == ["\n"]
    assert json.loads(out)["sources"] == [{"path": HOSTILE}]


def test_a_single_shard_is_described_with_its_manifest(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(dataset / "train_00001.bin", capsys)
    assert found["kind"] == "shard" and list(found["splits"]) == ["train"] and "fingerprint" not in found
    assert [entry["text"] for entry in found["splits"]["train"]["beginnings"]] == TEXTS[1]


def test_a_damaged_dataset_is_one_line(dataset: Path) -> None:
    (dataset / "val_00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="val_00000.bin has 0 bytes, expected "):
        run(dataset, as_json=True)
    with pytest.raises(UserError, match="no dataset at"):
        run(dataset / "nowhere", as_json=True)
    with pytest.raises(UserError, match="manifest.json is not listed in"):
        run(dataset / "manifest.json", as_json=True)


# ---- shards of others ----


@pytest.mark.parametrize("before", [False, True], ids=["nanoGPT", "llm.c"])
def test_a_bare_shard_is_decoded_as_gpt2s(tmp_path: Path, before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = BytePairTokenizer("gpt2")
    texts = ["Hello there, général", "a second document"]
    parts = [[GPT2_END, *tokenizer.encode(t)] if before else [*tokenizer.encode(t), GPT2_END] for t in texts]
    ids = np.concatenate(parts).astype("<u2")
    path = tmp_path / "part.bin"
    path.write_bytes(llm_c(ids) if before else ids.tobytes())
    found = described(path, capsys)
    (split,) = found["splits"].values()
    assert found["program"] == ("llm.c" if before else "nanoGPT") and "assumed to be GPT-2's" in found["note"]
    assert [entry["text"] for entry in split["beginnings"]] == texts
    assert (split["documents"], split["bytes"]) == (2, len("".join(texts).encode()))
    assert split["document_lengths"]["max"] == max(len(part) - 1 for part in parts)


@pytest.mark.parametrize("write", [write_nanogpt, write_llm_c])
def test_a_folder_of_others_is_described(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(write(tmp_path), capsys)["splits"]
    assert (found["train"]["tokens"], found["train"]["documents"]) == (2000, 50)
    assert (found["val"]["tokens"], found["val"]["documents"]) == (200, 5)
    assert found["train"]["document_lengths"]["min"] == found["train"]["document_lengths"]["max"] == 39


@pytest.mark.slow
def test_ids_that_are_no_text_are_shown_as_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ids_of(2)
    ids[1] = 60_000
    ids.tofile(tmp_path / "part.bin")
    found = described(tmp_path / "part.bin", capsys)["splits"]["shard"]
    assert found["ids_outside_vocabulary"] == 1
    assert found["beginnings"][0]["text"] is None and found["beginnings"][0]["ids"][:2] == [ids[0], 60_000]
    assert f"{ids[0]}; 60,000; {ids[2]} and 7 more" in shown(tmp_path / "part.bin", capsys)


def test_other_files_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(UserError, match="notes.txt is not a shard: expected a dataset folder or a .bin file"):
        run(tmp_path / "notes.txt", as_json=False)


# ---- checkpoints ----


@pytest.mark.slow
def test_a_checkpoint_is_described(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.run import run as train

    config = tiny_config(tiny)
    train(config)
    folder = config.run_dir / "checkpoints" / "step_00000010"
    found = described(folder, capsys)
    saved = read_description(folder)
    assert (found["kind"], found["step"], found["tokens"]) == ("checkpoint", 10, 1280)
    assert (found["val_loss"], found["dataset"], found["config"]) == (saved.val_loss, saved.dataset, saved.config)
    assert found["parameters"] == parameters(config.model, 257)
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    text = shown(folder, capsys)
    assert "step" in text and "n_layer 2, n_head 2" in text and f"{found['parameters']:,}" in text


@pytest.mark.slow
def test_a_hugging_face_folder_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=16)
    model = LanguageModel(config, 50257)
    write_model(tmp_path, model, BytePairTokenizer("gpt2"))
    found = described(tmp_path, capsys)
    assert found["kind"] == "Hugging Face folder" and found["parameters"] == parameters(config, 50257)
    assert found["config"]["model"]["n_embd"] == 8 and found["tokenizer"]["name"] == "gpt2"


# ---- the command ----


@pytest.mark.slow
def test_the_command_prints_tables_or_one_json_object_without_torch(dataset: Path) -> None:
    done = run_program("inspect", "data", cwd=dataset.parent)
    assert (done.returncode, done.stderr) == (0, "") and "Once upon a time" in done.stdout
    done = run_program("inspect", "data", "--json", cwd=dataset.parent, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and json.loads(done.stdout)["path"] == "data"
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "observe.inspect" in imported and "torch" not in imported
