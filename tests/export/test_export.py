"""`pipeline export`: lean copies that transformers, GGUF readers and this program open to the same model, each with its card."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prose, run_program, tiny_config, tokenizer_named, write_dataset
from huggingface_hub import ModelCard
from test_checkpoint import SMALL, saved
from test_models_in import foreign, with_vocabulary

from export.gguf import vocabulary_of
from export.model_card import model_card
from export.run import ExportOptions, run
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import read_description, verify_files, write_model
from pipeline.checkpoint.load import load_initial_weights, load_model
from pipeline.config.keys import WeightedDataset
from pipeline.config.load import to_dict
from pipeline.dataset.shards import load_manifest, read_manifest
from pipeline.errors import UserError
from pipeline.model.language_model import LanguageModel
from train.run import run as train

transformers = pytest.importorskip("transformers")
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.003}


def logits_of(twin: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = twin.eval()(ids).logits
    return logits.float()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", [{"bias": True}, {"bias": False}, {"arch": "qwen3", "n_kv_head": 1}], ids=str)
def test_the_lean_copy_is_the_same_model_here_and_in_transformers(
    tmp_path: Path, dtype: str, kind: dict[str, Any]
) -> None:
    folder, model = saved(tmp_path / "run", replace(SMALL, **kind))
    run(ExportOptions(tmp_path / "out", str(folder), dtype))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "checkpoint.json", "README.md",
    }  # fmt: skip
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(twin.dtype) == f"torch.{dtype}" and twin.generation_config.pad_token_id == 256
    ids = torch.randint(0, 257, (2, 24))
    torch.testing.assert_close(logits_of(twin, ids), model.logits(ids), atol=TOLERANCE[dtype], rtol=0)
    again, tokenizer = load_model(tmp_path / "out")
    assert again.config == model.config and tokenizer.name == "byte"
    torch.testing.assert_close(again.eval().logits(ids), logits_of(twin.float(), ids), atol=1e-5, rtol=0)
    verify_files(tmp_path / "out", read_description(tmp_path / "out"))
    (tmp_path / "out" / "README.md").write_text("my own words")
    load_model(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_card_tells_data_tokens_loss_and_config_and_the_hub_reads_it(tiny: Path) -> None:
    config = tiny_config(tiny)
    train(config)
    folder = find_checkpoint("latest", config.run_dir, tiny)
    run(ExportOptions(tiny / "out", "latest", run_dir=config.run_dir))
    card = ModelCard.load(tiny / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2"]
    }  # fmt: skip
    described = read_description(folder)
    manifest = load_manifest(tiny / "data" / "tiny")
    for told in (
        "# out", "`tiny`", f"{manifest.count('train', 'tokens'):,} training tokens", manifest.fingerprint,
        "| tokens seen | 1,280 |", "| steps | 10 of 10 |", f"| validation loss | {described.val_loss:.4f} nats per token |",
        "trained from random weights", "`byte`, 257 tokens", "n_layer = 2", "pipeline sample --ckpt out",
    ):  # fmt: skip
        assert told in card.text, told
    assert str(tiny) not in card.text  # where it lay is nobody's business
    (tiny / "data").rename(tiny / "gone")
    run(ExportOptions(tiny / "later", str(folder)))
    text = (tiny / "later" / "README.md").read_text()
    assert "training tokens" not in text and f"The fingerprint of the dataset is `{manifest.fingerprint}`" in text


def test_the_card_names_no_place_of_the_machine(tiny: Path) -> None:
    config = tiny_config(tiny)
    train(config)
    folder = find_checkpoint("latest", config.run_dir, tiny)
    run(ExportOptions(tiny / "first", str(folder)))
    mixture = tuple(WeightedDataset(str(tiny / "data" / "tiny"), weight) for weight in (1.0, 3.0))
    manifest_file = tiny / "data" / "tiny" / "manifest.json"
    manifest_file.write_text(
        json.dumps(json.loads(manifest_file.read_text()) | {"sources": [{"path": str(tiny / "a.txt")}]})
    )
    described = read_description(folder)
    for dataset in (mixture, ()):
        moved = replace(
            config,
            data=replace(config.data, mixture=dataset, dataset=str(tiny / "data" / "tiny")),
            model=replace(config.model, init_from=str(tiny / "first")),
        )
        model, tokenizer = load_model(folder)
        fingerprint = read_manifest(tiny / "data" / "tiny").fingerprint
        saved_as = replace(described, config=to_dict(moved), dataset=fingerprint)
        card = model_card("name", model, tokenizer, dtype="float32", saved=saved_as, file="")
        assert str(tiny) not in card
        assert "from the weights of `first`" in card and 'init_from = "first"' in card and "- `path a.txt`" in card


def test_text_from_files_is_shown_in_the_card_and_never_interpreted(tiny: Path) -> None:
    """Neither as Markdown nor as a Jinja template; of many sources the first 20 are listed."""
    config = tiny_config(tiny)
    train(config)
    folder = find_checkpoint("latest", config.run_dir, tiny)
    hostile = "`[x](javascript:1)`|<script>{{ 7 * 6 }}\x1b[2J\n# title"
    manifest_file = tiny / "data" / "tiny" / "manifest.json"
    sources = [{"path": hostile}, *({"path": f"{number}.txt"} for number in range(30))]
    manifest_file.write_text(json.dumps(json.loads(manifest_file.read_text()) | {"sources": sources}))
    described = replace(
        read_description(folder), dataset=read_manifest(tiny / "data" / "tiny").fingerprint, program=hostile
    )
    model, tokenizer = load_model(folder)
    card = model_card("name", model, tokenizer, dtype="float32", saved=described, file="")
    assert r"- `path '[x](javascript:1)'/<script>{{ 7 * 6 }}\x1b[2J\n# title`" in card
    assert card.count("javascript") == card.count("'[x](javascript:1)'/<script>") == 2
    assert "\n# title" not in card and "\x1b" not in card and "42" not in card
    assert "- `path 18.txt`" in card and "19.txt" not in card and "- and 11 more" in card


def test_whoever_may_read_the_card_may_read_the_weights(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "run")
    run(ExportOptions(tmp_path / "out", str(folder)))
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        UserError, match=r"--to .*/file/out cannot be written .*: free some space, or choose another --to"
    ):
        run(ExportOptions(tmp_path / "file" / "out", str(folder)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_new_run_starts_from_an_export(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "run")
    run(ExportOptions(tmp_path / "out", str(folder)))
    spec = load_manifest(write_dataset(tmp_path / "data")).tokenizer
    fresh = LanguageModel(SMALL, 257)
    load_initial_weights(fresh, spec, tmp_path / "out")
    assert torch.equal(fresh.transformer.wte.weight, model.transformer.wte.weight)


def test_a_foreign_folder_is_exported_too(tmp_path: Path) -> None:
    twin = foreign(tmp_path / "theirs", vocab_size=576)
    with_vocabulary(tmp_path / "theirs")
    run(ExportOptions(tmp_path / "out", str(tmp_path / "theirs"), "bfloat16"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 512, (2, 24))
    wanted = logits_of(twin.to(torch.bfloat16), ids)[..., :512]
    torch.testing.assert_close(logits_of(again, ids), wanted, atol=1e-4, rtol=0)
    assert "## Training" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("to", ["full", "file", "link", "full.gguf"])
def test_nothing_that_is_there_is_overwritten(tmp_path: Path, to: str) -> None:
    folder, _ = saved(tmp_path / "run")
    for name in ("full", "full.gguf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists and is not overwritten"):
        run(ExportOptions(tmp_path / to, str(folder), format="gguf"))
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "run")
    for options, reason in (
        (
            ExportOptions(tmp_path / "out", str(folder), format="gguf"),
            "GGUF has no name for the pre-tokenizer of the vocabulary byte",
        ),
        (
            ExportOptions(tmp_path / "out", str(folder), dtype="int8"),
            "invalid --dtype 'int8': expected float32, bfloat16, float16",
        ),
        (
            ExportOptions(tmp_path / "out", str(folder), format="onnx"),
            "invalid --format 'onnx': expected safetensors, gguf",
        ),
        (ExportOptions(tmp_path / "out.gguf", str(folder)), "add --format gguf"),
    ):
        with pytest.raises(UserError, match=reason):
            run(options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_numbers_past_float16_are_refused(tmp_path: Path) -> None:
    model = LanguageModel(SMALL, 512)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = 1e5
    write_model(tmp_path, model, tokenizer_named("bpe:512"))
    with pytest.raises(UserError, match=r"transformer.wpe.weight has values that are not finite in float16"):
        run(ExportOptions(tmp_path / "out", str(tmp_path), "float16"))


def test_weights_that_are_damaged_are_not_said_to_be_out_of_range(tmp_path: Path) -> None:
    model = LanguageModel(SMALL, 512)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = torch.nan
    write_model(tmp_path, model, tokenizer_named("bpe:512"))
    with pytest.raises(UserError, match=r"transformer.wpe.weight has values that are not finite, so it is damaged"):
        run(ExportOptions(tmp_path / "out", str(tmp_path), "float16"))


# ---- GGUF ----


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("plain", "block_size"), [(True, 1024), (False, 24)])
def test_transformers_own_gguf_reader_gives_the_same_logits(
    tmp_path: Path, dtype: str, plain: bool, block_size: int
) -> None:
    tokenizer = tokenizer_named("bpe:512")
    shape = replace(SMALL, bias=plain, tie_weights=plain, block_size=block_size)
    folder, model = saved(tmp_path / "run", shape, tokenizer)
    run(ExportOptions(tmp_path / "out", str(folder), dtype, "gguf"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "README.md"}
    # Its reader knows no context length for this architecture; the card says what to add.
    more = {} if block_size == 1024 else {"n_positions": block_size}
    assert (f'"model.gguf", n_positions={block_size})' in (tmp_path / "out" / "README.md").read_text()) == bool(more)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", **more)
    ids = torch.randint(0, tokenizer.vocab_size, (2, 24))
    torch.testing.assert_close(logits_of(twin, ids), model.logits(ids), atol=TOLERANCE[dtype], rtol=0)
    assert (twin.config.n_layer, twin.config.n_head, twin.config.eos_token_id) == (2, 2, tokenizer.end_of_text)
    run(ExportOptions(tmp_path / "alone.gguf", str(folder), dtype, "gguf"))
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "gguf"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bpe:512"])
def test_the_ggufs_tokenizer_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_named(name)
    write_model(tmp_path, LanguageModel(SMALL, tokenizer.vocab_size), tokenizer)
    run(ExportOptions(tmp_path / "out", str(tmp_path), format="gguf"))
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in prose():
        text = text.replace("<|endoftext|>", "")
        assert twin.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    assert twin.eos_token_id == tokenizer.end_of_text


@pytest.mark.parametrize("name", ["own.tiktoken", "merges.json", "unigram.json", "char", "byte", "word"])
def test_vocabularies_that_gguf_cannot_name_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="GGUF has no name for"):
        vocabulary_of(tokenizer_named(name))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing here needs a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_the_command_exports_what_transformers_and_sample_continue_alike(tiny: Path) -> None:
    config = tiny_config(tiny, model={"block_size": 64})
    train(config)
    exported = run_program("export", "--ckpt", "latest", "--to", "out", cwd=tiny)
    assert exported.returncode == 0, exported.stderr
    refused = run_program("export", "--ckpt", "latest", "--to", "out", cwd=tiny)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert json.loads((tiny / "out" / "checkpoint.json").read_text())["config"] == to_dict(config)
    for folder in ("out", str(find_checkpoint("latest", config.run_dir, tiny))):
        greedy = ("--prompt", "ABDF", "--temperature", "0", "--max-new-tokens", "30", "--dtype", "float32", "--json")
        sampled = run_program("sample", "--ckpt", folder, *greedy, cwd=tiny)
        text = json.loads(sampled.stdout)["text"]
        assert len(text) == 30 and text.isascii()
        generate = transformers.pipeline("text-generation", model=str(tiny / folder), device="cpu")
        (answer,) = generate("ABDF", max_new_tokens=30, do_sample=False, return_full_text=False)
        assert answer["generated_text"] == text
