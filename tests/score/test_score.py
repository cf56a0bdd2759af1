"""Loss over a whole split: against loops that are written out token by token, and as the user of `pipeline eval` meets it."""

import json
import math
import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tokenizer_named, write_dataset, write_documents, write_nanogpt

from pipeline.checkpoint.folder import DESCRIPTION, Description, State, read_description, write_checkpoint, write_model
from pipeline.checkpoint.pointers import pointed_folder
from pipeline.config.keys import ModelConfig
from pipeline.config.load import from_dict, to_dict
from pipeline.dataset.shards import Manifest, Shard, TokenReader, load_manifest
from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer
from pipeline.vocabulary.huggingface_files import open_folder
from pipeline.vocabulary.tokenizer import Tokenizer
from score.loss import Score, Scorer, mean_score, read_windows, split_loss
from score.options import EvalOptions
from score.run import run
from train.run import run as train

BLOCK_SIZE = 8
END = ByteTokenizer.end_of_text
ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def model_with_opinions(vocab_size: int = 257, block_size: int = BLOCK_SIZE) -> LanguageModel:
    """Random weights large enough that a token depends on all tokens before it and on their positions."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size), vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def scorer_of(model: LanguageModel, batch_size: int = 3) -> Scorer:
    return Scorer(model, torch.float32, batch_size, ALONE)


def reader_of(folder: Path, shards: list[list[str]]) -> TokenReader:
    write_documents(folder, {"train": [["t"]], "val": shards})
    return TokenReader(folder, load_manifest(folder), "val")


def plain_loss(model: LanguageModel, ids: list[int], stride: int, end_of_text: int | None = None) -> float:
    """Each token from the first window that reaches it, without batches, masks or padding: its context alone is shown."""
    losses = []
    with torch.inference_mode():
        for target in range(1, len(ids)):
            start = next(at for at in range(0, len(ids), stride) if target <= at + BLOCK_SIZE)
            opened = [at for at in range(start, target) if ids[at] == end_of_text]
            context = ids[max([start, *opened]) : target]
            logits = model.logits(torch.tensor([context]))[:, -1]
            losses.append(F.cross_entropy(logits, torch.tensor([ids[target]])).item())
            wanted = 1 if stride == BLOCK_SIZE else min(target, BLOCK_SIZE - stride)
            assert end_of_text is not None or len(context) >= wanted, "the stride gives less context than it promises"
    return math.fsum(losses) / len(losses)


# 1 to 41 tokens, end-of-text included: below, at and just above whole windows, with documents and shards of odd lengths.
SHARDS = {
    "two tokens": [["a"]],
    "one window and its target": [["abcd", "xyz"]],
    "one token more": [["abcde", "xyz"]],
    "one token less": [["abcd", "xy"]],
    "three shards": [["hello world", "b"], ["c"], ["some more text", "and the end"]],
}


@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("stride", [BLOCK_SIZE, 5, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_every_token_alone(
    tmp_path: Path, shards: list[list[str]], stride: int, masked: bool
) -> None:
    model, reader = model_with_opinions(), reader_of(tmp_path, shards)
    ids = reader.read(0, len(reader)).tolist()
    end_of_text = END if masked else None
    found = split_loss(scorer_of(model), reader, stride, end_of_text)
    assert found == pytest.approx(plain_loss(model, ids, stride, end_of_text), abs=1e-5)


def test_stride_and_document_mask_matter(tmp_path: Path) -> None:
    """The test above would pass if nothing depended on them."""
    model, reader = model_with_opinions(), reader_of(tmp_path, SHARDS["three shards"])
    settings = [(BLOCK_SIZE, None), (BLOCK_SIZE, END), (5, None), (5, END), (1, None)]
    losses = [split_loss(scorer_of(model), reader, stride, end_of_text) for stride, end_of_text in settings]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3


def test_packed_documents_score_as_each_one_alone(tmp_path: Path) -> None:
    """In one window that holds them all, with the mask: each from its end-of-text, which training opens it with."""
    texts = ["first", "the second one", "3"]
    model = model_with_opinions(block_size=64)
    packed = split_loss(scorer_of(model), reader_of(tmp_path / "packed", [texts]), 64, END)
    total = tokens = 0.0
    for number, text in enumerate(texts):
        ids = [END, *text.encode(), END]
        own = ids if number else ids[1:]  # nothing stands before the first
        with torch.inference_mode():
            total += len(own[1:]) * model(torch.tensor([own[:-1]]), torch.tensor([own[1:]])).item()
        tokens += len(own) - 1
    assert packed == pytest.approx(total / tokens, abs=1e-5)


def test_a_damaged_model_has_no_loss(tmp_path: Path) -> None:
    model = model_with_opinions()
    with torch.no_grad():
        model.transformer.wpe.weight[6] = torch.nan
    with pytest.raises(UserError, match="logits are not finite, so its weights are damaged"):
        split_loss(scorer_of(model), reader_of(tmp_path, [["longer than six"]]), BLOCK_SIZE)


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_every_token_but_the_first_is_scored_once(tmp_path: Path, stride: int) -> None:
    """Ids that are their own positions, in two shards, of every length up to four windows."""
    for length in range(2, 4 * BLOCK_SIZE + 3):
        folder = tmp_path / str(length)
        folder.mkdir()
        cut = length // 3 or 1
        shards = []
        for number, ids in enumerate((range(cut), range(cut, length))):
            path = folder / f"val_{number:05d}.bin"
            np.array(ids, dtype="<u2").tofile(path)
            shards.append(Shard(path.name, len(ids), 1, len(ids), hash_file(path)))
        spec = ByteTokenizer().spec()
        reader = TokenReader(folder, Manifest(spec, "uint16", {"val": shards}, [], {}, {}, {}, "test"), "val")
        starts = range(0, max(1, length - 1 - BLOCK_SIZE + stride), stride)
        windows, scored = read_windows(reader, starts, BLOCK_SIZE, stride)
        assert windows[:, 1:][scored].tolist() == list(range(1, length)), f"{length} tokens, stride {stride}"
        assert scored.any(dim=1).all(), "a window that scores nothing is work for nothing"


@pytest.mark.slow
def test_the_loss_is_that_of_transformers_on_the_same_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_with_opinions()
    write_model(tmp_path, model, ByteTokenizer())
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    reader = reader_of(tmp_path / "data", SHARDS["three shards"])
    ids = torch.from_numpy(reader.read(0, len(reader)))
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, BLOCK_SIZE):
            inputs, targets = ids[start : start + BLOCK_SIZE], ids[start + 1 : start + BLOCK_SIZE + 1]
            logits = twin(inputs[None, : len(targets)]).logits[0]
            total += F.cross_entropy(logits, targets, reduction="sum").item()
    assert split_loss(scorer_of(model), reader, BLOCK_SIZE) == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def test_the_figures_of_a_mixture_are_means_by_share() -> None:
    scores = [Score(2.0, 100, 5, 4.0), Score(3.0, 300, 7, 1.0)]
    mean = mean_score(scores, [0.75, 0.25])
    assert (mean.loss, mean.tokens, mean.documents) == (2.25, 400, 12)
    assert mean.perplexity == pytest.approx(math.exp(2.25))
    # Of 4 tokens 3 are from the first source: 3 * 2 + 3 nats for 3 * 4 + 1 bytes.
    assert mean.bits_per_byte == pytest.approx(9 / math.log(2) / 13)
    untold = mean_score([scores[0], Score(3.0, 300, None, None)], [0.75, 0.25])
    assert (untold.loss, untold.documents, untold.bits_per_byte) == (2.25, None, None)


# ---- the command ----


def save(folder: Path, model: LanguageModel, tokenizer: Tokenizer, **data: Any) -> Path:
    """A checkpoint of ours, of step 3, whose config has `data`."""
    config = from_dict({"model": asdict(model.config), "data": data})
    description = Description(3, 300, to_dict(config), tokenizer.spec(), "d")
    state = deepcopy(State.of(model, torch.optim.AdamW(model.parameters())))
    return write_checkpoint(folder, state, model, tokenizer, description=description)


def report(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    run(EvalOptions(**{"device": "cpu", "dtype": "float32", "json": True, **options}))
    (line,) = capsys.readouterr().out.splitlines()
    document: dict[str, Any] = json.loads(line)
    return document


def write_tokens(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    """A dataset of `texts` in a vocabulary of the test's own."""
    folder.mkdir(parents=True)
    ids = np.concatenate([part for text in texts for part in (tokenizer.encode(text), [tokenizer.end_of_text])])
    text_bytes = sum(len(text.encode()) for text in texts)
    splits = {}
    for split in ("train", "val"):
        path = folder / f"{split}_00000.bin"
        ids.astype("<u2").tofile(path)
        splits[split] = [Shard(path.name, len(ids), len(texts), text_bytes, hash_file(path))]
    Manifest(tokenizer.spec(), "uint16", splits, [], {}, {}, {}, "test").save(folder)
    return folder


def test_bits_per_byte_are_of_the_text_whatever_the_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of zeros gives each of V tokens 1/V: log2 V bits for each, end-of-text too, none for its bytes."""
    texts = ["éàü", "aé", "üüüü"] * 30
    text_bytes, characters = (sum(map(len, each)) for each in ([text.encode() for text in texts], texts))
    found = {}
    for tokenizer, tokens in ((ByteTokenizer(), text_bytes), (CharTokenizer("éàüa"), characters)):
        model = LanguageModel(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16), tokenizer.vocab_size)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        data = write_tokens(tmp_path / tokenizer.name / "data", tokenizer, texts)
        folder = save(tmp_path / tokenizer.name, model, tokenizer, dataset=str(data))
        found[tokenizer.name] = report(capsys, ckpt=str(folder))["bits_per_byte"]
        scored = tokens + len(texts) - 1
        assert found[tokenizer.name] == pytest.approx(scored * math.log2(tokenizer.vocab_size) / text_bytes)
    # To spread 257 ways for each byte is worse than 5 ways for each character: per token it would look the same.
    assert found["byte"] > 5 * found["char"]


def test_a_checkpoint_is_scored_on_what_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path / "a", {"train": [["tt"]], "val": [["hello world", "b"], ["c"]]})
    write_documents(tmp_path / "b", {"train": [["uu"]], "val": [["another text of some length"]]})
    mixture = [{"dataset": "a", "weight": 3.0}, {"dataset": "b", "weight": 1.0}]
    model = model_with_opinions()
    folder = save(tmp_path, model, ByteTokenizer(), mixture=mixture, data_dir=str(tmp_path), document_mask=True)
    mean = report(capsys, ckpt=str(folder), stride=3)
    alone = [report(capsys, ckpt=str(folder), stride=3, data=name) for name in ("a", "b")]
    assert [entry["dataset"] for entry in mean["datasets"]] == ["a", "b"] and mean["dataset"] == "a + b"
    for part, entry in zip(alone, mean["datasets"], strict=True):
        assert {name: part[name] for name in ("loss", "perplexity", "bits_per_byte", "tokens", "documents")} == {
            name: entry[name] for name in ("loss", "perplexity", "bits_per_byte", "tokens", "documents")
        }
    assert mean["loss"] == pytest.approx(0.75 * alone[0]["loss"] + 0.25 * alone[1]["loss"])
    assert (mean["tokens"], mean["documents"]) == (15 + 27, 4)
    keys = {name: mean[name] for name in ("ckpt", "step", "split", "stride", "block_size")}
    assert keys == {"ckpt": str(folder), "step": 3, "split": "val", "stride": 3, "block_size": BLOCK_SIZE}
    reader = TokenReader(tmp_path / "a", load_manifest(tmp_path / "a"), "val")
    assert alone[0]["loss"] == pytest.approx(split_loss(scorer_of(model), reader, 3, END)), "the mask was left out"
    train_split = report(capsys, ckpt=str(folder), data="b", split="train")
    assert (train_split["tokens"], train_split["split"]) == (2, "train")


def test_the_loss_is_training_s_own_where_that_took_whole_windows_only(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    write_dataset(tmp_path / "data" / "tiny", val_tokens=16 * 9 + 1)
    config = tiny_config(tmp_path, eval={"tokens": 0, "every_steps": 2}, train={"max_steps": 2})
    train(config)
    caplog.set_level("INFO", logger="pipeline")
    found = report(capsys, ckpt="latest", run_dir=config.run_dir)
    folder = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert folder is not None
    assert found["loss"] == pytest.approx(read_description(folder).val_loss, abs=1e-5)
    assert found["ckpt"] == str(folder) and found["tokens"] == 16 * 9
    assert found == report(capsys, ckpt=str(folder), data=str(tmp_path / "data" / "tiny")) | {
        "dataset": "tiny",
        "datasets": found["datasets"],
    }
    assert "has changed" not in caplog.text
    write_dataset(tmp_path / "data" / "tiny", val_tokens=40)
    report(capsys, ckpt=str(folder))
    assert "data/tiny has changed since the checkpoint was trained on it" in caplog.text


def test_the_table_is_all_that_stdout_gets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path / "a", {"train": [["tt"]], "val": [["hello world", "b"], ["c"]]})
    folder = save(tmp_path, model_with_opinions(), ByteTokenizer(), dataset="a", data_dir=str(tmp_path))
    found = report(capsys, ckpt=str(folder))
    run(EvalOptions(str(folder), device="cpu", dtype="float32"))
    about, _, windows, titles, row = capsys.readouterr().out.splitlines()
    assert about == f"{folder}, step 3, block_size 8"
    assert windows == "val split, stride 8"
    assert titles.split("  ") and titles.startswith("dataset") and titles.endswith("bits per byte")
    figures = [f"{found[name]:,.4f}" for name in ("loss", "perplexity", "bits_per_byte")]
    assert row.split() == ["a", "15", "3", *figures]


@pytest.mark.slow
def test_shards_of_another_program_have_no_bits_per_byte_and_a_foreign_model_needs_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_nanogpt(tmp_path / "data")
    model = model_with_opinions(vocab_size=50257)
    folder = tmp_path / "model"
    folder.mkdir()
    write_model(folder, model, BytePairTokenizer("gpt2"))
    found = report(capsys, ckpt=str(folder), data=str(data))
    reader = TokenReader(data, load_manifest(data), "val")
    assert found["loss"] == pytest.approx(split_loss(scorer_of(model), reader, BLOCK_SIZE), abs=1e-5)
    assert (found["step"], found["documents"], found["bits_per_byte"], found["tokens"]) == (None, None, None, 199)
    with pytest.raises(UserError, match="does not record what it was trained on: name a dataset with --data"):
        run(EvalOptions(str(folder), device="cpu"))


def test_one_vocabulary_under_two_names_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bpe:512` learnt by prepare, and the tokenizer.json that lies beside the weights: as a fine-tuned model has it."""
    learnt = tokenizer_named("bpe:512")
    ours = save(tmp_path, model_with_opinions(learnt.vocab_size), learnt, dataset="learnt", data_dir=str(tmp_path))
    theirs = tmp_path / "theirs"
    shutil.copytree(ours, theirs, ignore=shutil.ignore_patterns(DESCRIPTION))
    from_file = open_folder(theirs)
    assert from_file is not None and from_file.spec() != learnt.spec()
    for name, tokenizer in (("learnt", learnt), ("file", from_file)):
        write_tokens(tmp_path / name, tokenizer, ["the calendar of a year"])
    losses = set()
    for folder in (ours, theirs):
        for name in ("learnt", "file"):
            losses.add(report(capsys, ckpt=str(folder), data=str(tmp_path / name))["loss"])
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "test"}, "invalid --split 'test': expected train or val"),
        ({"stride": 0}, "invalid --stride 0: expected 1 to 8"),
        ({"stride": 9}, "invalid --stride 9: expected 1 to 8"),
        ({"batch_size": 0}, "invalid --batch-size 0: expected 1 or more"),
        ({"dtype": "int8"}, "invalid --dtype 'int8': expected auto, float32"),
        ({"tasks": ("x",), "task_dir": Path("nowhere")}, "invalid --task-dir nowhere: not a folder"),
        ({"limit": 5}, "--task-dir and --limit apply to tasks only"),
        ({"tasks": ("x",), "limit": 0}, "invalid --limit 0: expected 1 or more"),
        ({"data": "nowhere"}, "no dataset at .*nowhere"),
        ({"data": "one"}, "val split has 1 token"),
        (
            {"data": "chars"},
            r"chars has the vocabulary char \(3 tokens, .* has byte \(257 tokens, end-of-text token 256\): prepare",
        ),
        ({"ckpt": "nowhere"}, "no checkpoint at nowhere"),
    ],
)
def test_a_mistake_costs_one_line(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    write_documents(tmp_path / "a", {"train": [["tt"]], "val": [["hello"]]})
    write_documents(tmp_path / "one", {"train": [["tt"]], "val": [[""]]})
    write_tokens(tmp_path / "chars", CharTokenizer("ab"), ["abab"])
    folder = save(tmp_path, model_with_opinions(), ByteTokenizer(), dataset="a", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=said) as caught:
        run(EvalOptions(**{"ckpt": str(folder), "device": "cpu", "dtype": "float32", **options}))
    assert "\n" not in str(caught.value)
