"""Models from elsewhere, written by transformers: the same logits here, whatever their files; or one line that says why not."""

import errno
import json
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from conftest import overrides, prose, run_program, tiny_config, tokenizer_named, write_template_json
from huggingface_hub.utils import filter_repo_objects

from pipeline.checkpoint.find import HUB_FILES, find_checkpoint, find_model_folder
from pipeline.checkpoint.load import load_initial_weights, load_model
from pipeline.checkpoint.safetensors_files import INDEX
from pipeline.config.keys import ModelConfig
from pipeline.config.load import load_config
from pipeline.errors import UserError, as_failure
from pipeline.files import hash_bytes
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.huggingface_files import tokenizer_files, tokenizer_json
from pipeline.vocabulary.tokenizer_json import JsonTokenizer
from prepare.encoding.vocabulary import open_vocabulary
from sample.choice import Choice
from sample.generate import generate

transformers = pytest.importorskip("transformers")
SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24)


def foreign(folder: Path, shard_size: str = "1GB", **changes: Any) -> Any:
    """A randomly initialised model of transformers' own, saved to `folder`."""
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": 512, "initializer_range": 0.3}
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()
    twin.save_pretrained(folder, max_shard_size=shard_size)
    return twin


def foreign_qwen3(folder: Path, **changes: Any) -> Any:
    """The same for Qwen3, with heads wider than the residual stream's parts, as in Qwen3-0.6B."""
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    sizes |= {"head_dim": 16, "intermediate_size": 72, "max_position_embeddings": 64, "vocab_size": 512}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = transformers.Qwen3Config(**{**sizes, **rope, "initializer_range": 0.3, **changes})
    twin = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    twin.save_pretrained(folder)
    return twin


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen3_folder_gives_its_own_logits_and_text(tmp_path: Path, tied: bool) -> None:
    twin = foreign_qwen3(tmp_path, tie_word_embeddings=tied)
    with_vocabulary(tmp_path)
    model, _ = load_model(tmp_path)
    same_logits(model, twin, 64)
    prompt = list(range(20, 30))
    found = [
        s.ids[0] for s in generate(Decoder(model, 1), prompt, max_new_tokens=20, choice=Choice(temperature=0), seed=0)
    ]
    wanted = twin.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert found == wanted[0, 10:].tolist()
    # As transformers 4 wrote it.
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    del document["rope_parameters"], document["layer_types"]
    path.write_text(json.dumps(document | {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "float32"}))
    same_logits(load_model(tmp_path)[0], twin, 64)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"attention_bias": True}, "attention_bias=True, expected False"),
        ({"use_sliding_window": True}, "use_sliding_window=True, expected False"),
        ({"layer_types": ["sliding_attention"]}, "other layer_types than 'full_attention'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* expected None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type 'default' is implemented"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x', expected a number above 0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05, expected 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4, which is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7: rotary positions expect an even number"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe', expected 'gpt2' or 'qwen3'"),
    ],
)  # fmt: skip
def test_what_qwen3_has_not_here_is_refused_in_a_line(tmp_path: Path, change: dict[str, Any], wanted: str) -> None:
    foreign_qwen3(tmp_path)
    with_vocabulary(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=wanted) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_trains_on_from_a_qwen3_folder_with_what_the_one_line_says_to_paste(tmp_path: Path) -> None:
    twin = foreign_qwen3(tmp_path)
    with_vocabulary(tmp_path)
    spec = open_vocabulary(str(tmp_path)).spec()
    model = LanguageModel(replace(SHAPE, arch="qwen3", n_head=4, tie_weights=True), 512)
    with pytest.raises(UserError) as caught:
        load_initial_weights(model, spec, tmp_path)
    paste = str(caught.value).split(": add ")[1].split()
    assert paste == [
        "model.n_kv_head=2", "model.head_dim=16", "model.n_inner=72", "model.rope_theta=1000000.0", "model.tie_weights=false",
    ]  # fmt: skip
    base = ["model.arch=qwen3", "model.n_layer=2", "model.n_head=4", "model.n_embd=32", "model.block_size=24"]
    model = LanguageModel(load_config("quickstart", [*base, *paste]).model, 512)
    load_initial_weights(model, spec, tmp_path)
    same_logits(model, twin, 24)


def with_vocabulary(folder: Path, name: str = "bpe:512") -> None:
    for file, content in tokenizer_files(tokenizer_named(name), 64).items():
        (folder / file).write_bytes(content)


def same_logits(model: LanguageModel, twin: Any, length: int) -> None:
    ids = torch.randint(0, model.vocab_size, (2, length))
    theirs = twin(ids).logits[..., : model.vocab_size]
    torch.testing.assert_close(model.eval().logits(ids), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
def test_a_foreign_model_gives_its_own_logits(tmp_path: Path, tied: bool, shard_size: str) -> None:
    twin = foreign(tmp_path, shard_size, tie_word_embeddings=tied)
    with_vocabulary(tmp_path)
    assert (tmp_path / INDEX).is_file() == (shard_size == "40KB")
    model, tokenizer = load_model(tmp_path)
    same_logits(model, twin, 24)
    assert tokenizer.encode("the calendar").tolist() == tokenizer_named("bpe:512").encode("the calendar").tolist()
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    twin = foreign(tmp_path)
    twin.to(dtype).save_pretrained(tmp_path)
    with_vocabulary(tmp_path)
    same_logits(load_model(tmp_path)[0], twin.float(), 24)


def test_a_new_run_starts_from_foreign_weights_with_fewer_positions(tmp_path: Path) -> None:
    twin = foreign(tmp_path)
    with_vocabulary(tmp_path)
    spec = open_vocabulary(str(tmp_path)).spec()
    for block_size in (24, 16):
        model = LanguageModel(replace(SHAPE, block_size=block_size), 512)
        load_initial_weights(model, spec, tmp_path)
        assert model.transformer.wpe.weight.shape == (block_size, 32)
        same_logits(model, twin, block_size)


def test_data_of_the_file_as_it_lies_is_of_the_folders_vocabulary_and_of_another_end_is_not(tmp_path: Path) -> None:
    """The first datasets kept what a tokenizer.json adds around a text, and took <|endoftext|> wherever there was one."""
    write_template_json(tmp_path)
    opened = tokenizer_named("template.json")
    foreign(tmp_path, vocab_size=opened.vocab_size)
    model = LanguageModel(SHAPE, opened.vocab_size)
    content = (tmp_path / "tokenizer.json").read_bytes()
    for spec in (opened.spec(), JsonTokenizer("tokenizer.json", content, opened.end_of_text).spec()):
        load_initial_weights(model, spec, tmp_path)
    other_end = json.loads(content)["model"]["vocab"]["<|endoftext|>"]
    size = f"{opened.vocab_size} tokens, end-of-text token"
    wanted = f"vocabulary tokenizer.json .{size} {other_end}., but .* tokenizer.json .{size} {opened.end_of_text}."
    with pytest.raises(UserError, match=wanted):
        load_initial_weights(model, JsonTokenizer("tokenizer.json", content, other_end).spec(), tmp_path)


def test_every_key_that_differs_is_told_with_what_to_paste(tmp_path: Path) -> None:
    foreign(tmp_path)
    with_vocabulary(tmp_path)
    spec = open_vocabulary(str(tmp_path)).spec()
    model = LanguageModel(
        ModelConfig(n_layer=1, n_head=4, n_embd=16, block_size=32, bias=False, tie_weights=False), 512
    )
    wanted = (
        "add model.n_layer=2 model.n_head=2 model.n_embd=32 model.bias=true model.tie_weights=true model.block_size=24"
    )
    with pytest.raises(UserError, match=wanted):
        load_initial_weights(model, spec, tmp_path)


def test_rows_past_the_vocabulary_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twin = foreign(tmp_path, vocab_size=576)
    with_vocabulary(tmp_path)
    with caplog.at_level("INFO", "pipeline"):
        model, _ = load_model(tmp_path)
    assert model.vocab_size == 512 and "64 rows beyond its vocabulary of 512 tokens" in caplog.text
    same_logits(model, twin, 24)


@pytest.mark.parametrize("rows", [511, 512 + 1024])
def test_rows_of_another_vocabulary_are_refused(tmp_path: Path, rows: int) -> None:
    foreign(tmp_path, vocab_size=rows)
    with_vocabulary(tmp_path)
    with pytest.raises(UserError, match=f"has {rows} rows for the 512 tokens of its vocabulary"):
        load_model(tmp_path)


def test_vocab_and_merges_say_the_same_as_a_tokenizer_json(tmp_path: Path) -> None:
    foreign(tmp_path)
    document = json.loads(tokenizer_json(tokenizer_named("bpe:512")))
    (tmp_path / "vocab.json").write_text(json.dumps(document["model"]["vocab"] | {"<|endoftext|>": 511}))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    _, tokenizer = load_model(tmp_path)
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.merges is not None and tokenizer.end_of_text == 511
    for text in ("the calendar\n", "naïve 東京 <|endoftext|>"):
        assert tokenizer.encode(text).tolist() == tokenizer_named("bpe:512").encode(text).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json", "none"])
def test_gpt2s_vocabulary_is_known_by_its_content(tmp_path: Path, files: str) -> None:
    foreign(tmp_path, vocab_size=50257 if files == "none" else 50304, n_layer=1)
    with_vocabulary(tmp_path, "gpt2")
    content = (tmp_path / "tokenizer.json").read_bytes()
    if files != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    if files == "vocab.json":
        model = json.loads(content)["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    model, tokenizer = load_model(tmp_path)
    assert model.vocab_size == 50257 and isinstance(tokenizer, BytePairTokenizer) and tokenizer.name == "gpt2"
    fresh = LanguageModel(replace(SHAPE, n_layer=1), 50257)
    load_initial_weights(fresh, BytePairTokenizer("gpt2").spec(), tmp_path)
    if files != "none":  # data that was prepared with the folder's own files is of the same vocabulary
        load_initial_weights(fresh, open_vocabulary(str(tmp_path)).spec(), tmp_path)
    with pytest.raises(
        UserError, match=r"the dataset has .*, but .* has gpt2 \(50,257 tokens, end-of-text token 50256\): .* gpt2"
    ):
        load_initial_weights(fresh, tokenizer_named("bpe:512").spec(), tmp_path)


def test_positions_are_n_positions_as_transformers_has_it(tmp_path: Path) -> None:
    twin = foreign(tmp_path)
    with_vocabulary(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": 12}))
    same_logits(load_model(tmp_path)[0], twin, 24)
    del config["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": 24}))
    with pytest.raises(UserError, match="has no n_positions"):
        load_model(tmp_path)


# ---- the Hub ----


def cached(home: Path, repository: str = "org/small", **changes: Any) -> Any:
    """A model in the Hub's cache, as a download leaves it."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    twin = foreign(snapshot, **changes)
    with_vocabulary(snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return twin


def test_the_hubs_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = cached(tmp_path)
    fetch = huggingface_hub.snapshot_download

    def no_network(*arguments: Any, local_files_only: bool, **named: Any) -> str:
        if not local_files_only:
            raise ConnectionError("no route to host")
        return str(fetch(*arguments, cache_dir=tmp_path / "hub", local_files_only=True, **named))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    for name in ("hf:org/small", "hf:org/small@main", f"hf:org/small@{'0' * 40}"):
        same_logits(load_model(find_checkpoint(name, None, tmp_path))[0], twin, 24)
    with pytest.raises(UserError, match=r"model org/other is not in the cache .*ConnectionError: no route to host"):
        find_model_folder("hf:org/other")


def broken_download(monkeypatch: pytest.MonkeyPatch, folder: Path, error: Exception) -> None:
    """The network's edge: a download ends so, and what it left is in the cache."""

    def fetch(*_: Any, local_files_only: bool, **__: Any) -> str:
        if not local_files_only:
            raise error
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_told_as_the_hubs_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    foreign(tmp_path)
    broken_download(monkeypatch, tmp_path, OSError(number, "full"))
    with pytest.raises(OSError, match="full") as caught:
        find_model_folder("hf:org/small")
    assert caught.value.errno == number and isinstance(as_failure(caught.value), UserError)


def test_what_a_broken_download_left_is_used_where_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken_download(monkeypatch, tmp_path, ConnectionError("no route\nto host"))
    said = r"ConnectionError: no route to host"
    with pytest.raises(
        UserError, match=rf"the download of org/small is incomplete, its weights are missing \({said}\)"
    ):
        find_model_folder("hf:org/small")
    foreign(tmp_path)
    with caplog.at_level("INFO", "pipeline"):
        assert find_model_folder("hf:org/small") == tmp_path
    assert f"hf:org/small could not be downloaded ({said}); using the cached files" in caplog.text


def test_only_what_is_read_crosses_from_the_hub() -> None:
    there = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
        "pytorch_model.bin", "modeling_gpt2.py", "tf_model.h5", "onnx/model.safetensors", "README.md", "training_args.bin",
    ]  # fmt: skip
    assert list(filter_repo_objects(there, allow_patterns=list(HUB_FILES))) == there[:8]


class OneModel(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for: a revision, its files, and each of them."""

    folder: Path
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        place, _, _ = self.path.partition("?")
        self.asked.append(place)
        if place.startswith("/api/models/org/small/tree/"):
            files = sorted(path.name for path in self.folder.iterdir())
            entries = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": f"{i:040}"}
                for i, name in enumerate(files)
            ]
            self.answer(json.dumps(entries).encode())
        elif place.startswith("/api/models/org/small"):
            self.answer(json.dumps({"id": "org/small", "sha": "1" * 40, "siblings": []}).encode())
        else:
            self.answer((self.folder / Path(place).name).read_bytes())

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        about = {"Content-Length": len(content), "X-Repo-Commit": "1" * 40, "ETag": f'"{hash_bytes(content)}"'}
        for name, value in about.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_a_download_brings_what_is_read_and_is_enough_without_a_network(tmp_path: Path) -> None:
    OneModel.folder = tmp_path / "served"
    foreign(OneModel.folder, "40KB")
    with_vocabulary(OneModel.folder)
    for name in ("pytorch_model.bin", "modeling_evil.py"):
        (OneModel.folder / name).write_bytes(b"raise SystemExit")
    server = ThreadingHTTPServer(("127.0.0.1", 0), OneModel)
    Thread(target=server.serve_forever, daemon=True).start()
    hub_at = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "*",
    }
    arguments = ("sample", "--ckpt", "hf:org/small", "--max-new-tokens", "5", "--seed", "1")
    online = run_program(*arguments, cwd=tmp_path, **hub_at)
    server.shutdown()
    server.server_close()
    assert online.returncode == 0, online.stderr
    fetched = {Path(place).name for place in OneModel.asked if "/resolve/" in place}
    assert {"config.json", INDEX, "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling_evil.py"}
    offline = run_program(*arguments, cwd=tmp_path, **hub_at)
    assert offline.returncode == 0 and offline.stdout == online.stdout, offline.stderr


@pytest.mark.parametrize("name", ["hf:", "hf:../x", "hf:a/b/c", "hf:a/b@../../x", "hf:a b", "hf:/etc", "hf:a/..@b"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="invalid Hub model"):
        find_model_folder(name)


@pytest.mark.slow
def test_a_run_starts_from_a_model_of_the_hub_offline(tmp_path: Path) -> None:
    """The whole program, on a dataset with the model's vocabulary, with what the one line says to paste."""
    twin = cached(tmp_path)
    snapshot = tmp_path / "hub" / "models--org--small" / "snapshots" / ("0" * 40)
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prose()))
    prepared = run_program("prepare", str(text), "--name", "tiny", "--tokenizer", str(snapshot), cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    config = overrides(tiny_config(tmp_path, model={"n_head": 4, "n_layer": 1}, train={"max_steps": 1}))
    arguments = [
        "train",
        "quickstart",
        *config,
        "model.init_from=hf:org/small",
        "optimizer.lr=1e-9",
        "optimizer.min_lr=0",
    ]
    refused = run_program(*arguments, cwd=tmp_path, **offline)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()[-1:]) == 1
    paste = refused.stderr.split(": add ")[1].split()
    assert paste == ["model.n_layer=2", "model.n_head=2"]
    trained = run_program(*arguments, *paste, cwd=tmp_path, **offline)
    assert trained.returncode == 0, trained.stderr
    model, _ = load_model(find_checkpoint("latest", None, tmp_path / "runs"))
    same_logits(model, twin, 16)
    sampled = run_program("sample", "--ckpt", "hf:org/small", "--max-new-tokens", "5", cwd=tmp_path, **offline)
    assert sampled.returncode == 0, sampled.stderr
