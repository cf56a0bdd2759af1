"""The checkpoint folder: a whole, a Hugging Face model, and refused when it is anything else."""

import contextlib
import json
import os
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tokenizer_named
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import folder as folder_module
from pipeline.checkpoint import safetensors_files
from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.folder import (
    Description,
    State,
    hash_of_description,
    read_description,
    verify_files,
    write_checkpoint,
)
from pipeline.checkpoint.load import load_initial_weights, load_model, load_weights, open_optimizer, read_optimizer
from pipeline.checkpoint.pointers import best_folder, checkpoint_folders, pointed_folder, set_aside, set_pointer
from pipeline.checkpoint.prune import prune_checkpoints
from pipeline.config.keys import Config, ModelConfig
from pipeline.config.load import to_dict
from pipeline.errors import UserError
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer
from pipeline.vocabulary.tokenizer import Tokenizer
from train.optimizer.groups import build_optimizer

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24)
KINDS: list[dict[str, Any]] = [{"bias": True}, {"bias": False}, {"arch": "qwen3", "n_kv_head": 1}, {"arch": "qwen3"}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["biases", "no biases", "qwen3 grouped", "qwen3"])


def trained_model(config: ModelConfig = SMALL, vocab_size: int = 257) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """A model three optimizer steps away from its initial weights."""
    torch.manual_seed(0)
    model = LanguageModel(config, vocab_size)
    optimizer = build_optimizer(model, Config().optimizer)
    for _ in range(3):
        ids = torch.randint(0, vocab_size, (4, 25))
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def description(
    model: LanguageModel, tokenizer: Tokenizer, step: int = 3, val_loss: float | None = None
) -> Description:
    config = to_dict(Config(model=model.config))
    return Description(
        step=step, tokens=step * 100, config=config, tokenizer=tokenizer.spec(), dataset="d", val_loss=val_loss
    )


def saved(
    folder: Path, config: ModelConfig = SMALL, tokenizer: Tokenizer | None = None, step: int = 3
) -> tuple[Path, LanguageModel]:
    tokenizer = tokenizer or ByteTokenizer()
    model, optimizer = trained_model(config, tokenizer.vocab_size)
    state = deepcopy(State.of(model, optimizer))
    about = description(model, tokenizer, step)
    return write_checkpoint(folder, state, model, tokenizer, description=about), model


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_folder_opens_with_transformers_and_gives_the_same_logits(
    tmp_path: Path, kind: dict[str, Any], tie_weights: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(SMALL, **kind, tie_weights=tie_weights)
    folder, model = saved(tmp_path, config)
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(0, 257, (2, 24))
    torch.testing.assert_close(twin.eval()(ids).logits, model.logits(ids), atol=1e-5, rtol=0)


@every_kind
@pytest.mark.parametrize("tie_weights", [True, False])
def test_weights_come_back_bit_for_bit(tmp_path: Path, kind: dict[str, Any], tie_weights: bool) -> None:
    config = replace(SMALL, **kind, tie_weights=tie_weights)
    folder, model = saved(tmp_path, config)
    loaded, tokenizer = load_model(folder)
    assert tokenizer.name == "byte" and loaded.config == config
    for (name, found), (_, wanted) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name
    ids = torch.randint(0, 257, (1, 24))
    assert torch.equal(loaded.eval().logits(ids), model.logits(ids))
    assert (loaded.lm_head.weight is loaded.transformer.token_embedding.weight) == tie_weights


def test_a_foreign_folder_written_by_transformers_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24)).eval()
    twin.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    ids = torch.randint(0, 50257, (2, 24))
    torch.testing.assert_close(model.eval().logits(ids), twin(ids).logits, atol=1e-5, rtol=0)
    assert tokenizer.name == "gpt2"


def test_names_without_the_leading_transformer_load_too(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    weights = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    save_file(old, tmp_path / "model.safetensors")
    fresh = LanguageModel(SMALL, 257)
    load_weights(fresh, tmp_path)
    assert torch.equal(fresh.transformer.wte.weight, model.transformer.wte.weight)


def test_no_padding_row_is_saved(tmp_path: Path) -> None:
    folder, model = saved(tmp_path)
    assert model.transformer.wte.weight.shape[0] == 320
    for file in ("model.safetensors", "training_state.safetensors"):
        rows = [tensor.shape[0] for name, tensor in load_file(folder / file).items() if "wte" in name and tensor.ndim]
        assert rows and set(rows) == {257}


def test_optimizer_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained_model()
    state = deepcopy(State.of(model, optimizer))
    about = description(model, ByteTokenizer())
    folder = write_checkpoint(tmp_path, state, model, ByteTokenizer(), description=about)
    twin = LanguageModel(SMALL, 257)
    restored = build_optimizer(twin, Config().optimizer)
    load_weights(twin, folder)
    read_optimizer(restored, twin, open_optimizer(restored, twin, folder))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        for kind, value in optimizer.state[ours].items():
            assert torch.equal(restored.state[theirs][kind], value), kind
            assert restored.state[theirs][kind].stride() == value.stride()


def test_whoever_may_read_one_file_may_read_them_all(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_description_holds_the_contract(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    document = json.loads((folder / "checkpoint.json").read_text())
    assert (
        document["format"] == 1 and document["step"] == 3 and document["tokens"] == 300 and document["dataset"] == "d"
    )
    assert document["config"]["model"]["n_layer"] == 2 and document["tokenizer"]["name"] == "byte"
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert (
        set(document["files"]) == {"config.json", "model.safetensors", "training_state.safetensors"} | tokenizer_files
    )
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl", ".pth")]
    assert asdict(read_description(folder)) == document


@pytest.mark.parametrize("change", [{"hash": ""}, {"hash": "0" * 32}, {"tokens": 301}])
def test_a_description_must_match_its_own_hash(tmp_path: Path, change: dict[str, Any]) -> None:
    path = saved(tmp_path)[0] / "checkpoint.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | change))
    with pytest.raises(UserError, match="does not match its own hash"):
        read_description(path.parent)
    path.write_text(json.dumps({name: value for name, value in document.items() if name != "hash"}))
    with pytest.raises(UserError, match="does not match its own hash"):
        read_description(path.parent)


def test_every_file_of_a_checkpoint_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path)
    opened: list[str] = []
    real = {"safe_open": safetensors_files.safe_open, "read_limited": folder_module.read_limited}

    def counted(name: str) -> Any:
        def call(path: Path, *arguments: Any, **named: Any) -> Any:
            opened.append(path.name)
            return real[name](path, *arguments, **named)

        return call

    monkeypatch.setattr(safetensors_files, "safe_open", counted("safe_open"))
    monkeypatch.setattr(folder_module, "read_limited", counted("read_limited"))
    load_model(folder)
    assert sorted(opened) == ["checkpoint.json", "model.safetensors"]


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "training_state.safetensors"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: Any) -> None:
    folder, _ = saved(tmp_path)
    damage(folder / file)
    refused = pytest.raises(UserError, match=rf"is damaged: {file} (is missing|does not match its hash)")
    with refused:
        verify_files(folder, read_description(folder))
    with contextlib.nullcontext() if file == "training_state.safetensors" else refused:
        load_model(folder)  # which has no use for the optimizer's state


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, step=1)

    def crash(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipeline.checkpoint.folder.write_atomic", crash)
    with pytest.raises(OSError, match="no space"):
        saved(tmp_path, step=2)
    assert not (tmp_path / "step_00000002").exists()
    latest = pointed_folder(tmp_path, "latest")
    assert latest is not None and latest.name == "step_00000001"
    monkeypatch.undo()
    saved(tmp_path, step=2)
    verify_files(tmp_path / "step_00000002", read_description(tmp_path / "step_00000002"))


def test_prune_keeps_the_newest_and_the_best_and_what_is_not_ours(tmp_path: Path) -> None:
    for step in range(1, 6):
        saved(tmp_path, step=step)
    set_pointer(tmp_path, "best", tmp_path / "step_00000001")
    (tmp_path / "step_00000000").mkdir()  # no checkpoint.json: somebody else's
    (tmp_path / ".step_00000009.partial").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "step_00000000", "step_00000001", "step_00000004", "step_00000005"
    ]  # fmt: skip


def test_prune_keeps_permanent_ones_and_what_the_pointers_name(tmp_path: Path) -> None:
    for step in range(1, 10):
        saved(tmp_path, step=step)
    for pointer, step in (("best", 2), ("latest", 7)):
        set_pointer(tmp_path, pointer, tmp_path / f"step_{step:08d}")
    prune_checkpoints(tmp_path, keep=1, keep_every_steps=4)
    assert [int(path.name[5:]) for path in checkpoint_folders(tmp_path)] == [2, 4, 7, 8, 9]


@pytest.mark.parametrize(
    "began_at", [{"step": "1"}, {"step": True}, {"steps": 1}, {"sample": 1.5}, {"tokens": None}, [], 7]
)
def test_a_beginning_that_is_none_is_damage(tmp_path: Path, began_at: object) -> None:
    path = saved(tmp_path)[0] / "checkpoint.json"
    document = json.loads(path.read_text()) | {"began_at": began_at}
    path.write_text(json.dumps(document | {"hash": hash_of_description(document)}))
    with pytest.raises(UserError, match="is damaged"):
        read_description(path.parent)


@pytest.mark.parametrize("content", ["../../elsewhere", "/etc", "step_1", "", "step_00000001/.."])
def test_a_pointer_cannot_lead_elsewhere(tmp_path: Path, content: str) -> None:
    (tmp_path / "latest").write_text(content)
    with pytest.raises(UserError, match="expected the name of a folder"):
        pointed_folder(tmp_path, "latest")


def test_resolve_finds_the_newest_run_and_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no checkpoint latest in {tmp_path}: train first"):
        find_checkpoint("latest", None, tmp_path)
    for name, time in (("old", 100), ("new", 200)):
        folder, _ = saved(tmp_path / name / "checkpoints")
        pointer = tmp_path / name / "checkpoints" / "latest"
        os.utime(pointer, (time, time))
    assert find_checkpoint("latest", None, tmp_path) == tmp_path / "new" / "checkpoints" / folder.name
    assert find_checkpoint("latest", tmp_path / "old", tmp_path).parts[-3] == "old"
    assert find_checkpoint("latest", tmp_path, tmp_path / "elsewhere").parts[-3] == "new"
    with pytest.raises(UserError, match="no checkpoint best in .*old: train first"):
        find_checkpoint("best", tmp_path / "old", tmp_path)
    with pytest.raises(UserError, match="no checkpoint at nowhere"):
        find_checkpoint("nowhere", None, tmp_path)


def test_weights_of_another_shape_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    wider = LanguageModel(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=24), 257)
    before = wider.transformer.wte.weight.clone()
    with pytest.raises(UserError, match=r"does not fit the model: of another shape: .* expected \(257, 64\)"):
        load_weights(wider, folder)
    assert torch.equal(wider.transformer.wte.weight, before)
    deeper = LanguageModel(ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=24), 257)
    with pytest.raises(UserError, match=r"missing: transformer.h.2.attn.c_attn.bias.*\.\.\."):
        load_weights(deeper, folder)


def test_a_model_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file may be as large as it says and take no room on the disk: whatever is not written is a hole."""
    folder, _ = saved(tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 100}.__getitem__)
    with pytest.raises(UserError, match=f"the weights of {folder} need 0 GB of memory, cpu has 0 GB"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda moment: moment.to(torch.int8), "exp_avg.transformer.wpe.weight is I8"),
        (lambda moment: moment.t().contiguous(), r"exp_avg.transformer.wpe.weight is \(32, 24\), expected \(24, 32\)"),
    ],
)
def test_optimizer_state_of_another_kind_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    folder, model = saved(tmp_path)
    state = load_file(folder / "training_state.safetensors")
    key = "exp_avg.transformer.wpe.weight"
    save_file(state | {key: change(state[key])}, folder / "training_state.safetensors")
    with pytest.raises(UserError, match=reason):
        open_optimizer(build_optimizer(model, Config().optimizer), model, folder)


def test_foreign_folders_are_refused_for_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither checkpoint.json nor a Hugging Face config.json"):
        load_model(tmp_path)
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 50257}
    for change, reason in (
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"vocab_size": 1000}, "its vocabulary is unknown"),
        ({"vocab_size": 50304}, "its vocabulary is unknown"),
        ({"n_embd": "x"}, "has n_embd='x', expected an integer"),
        ({"n_head": 3}, "n_embd=8, which is not a multiple of n_head=3"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, expected 1e-05"),
        ({"n_inner": 7}, "n_inner=7"),
        ({}, "only safetensors are read"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(gpt2 | change))
        with pytest.raises(UserError, match=reason):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only safetensors are read, pickled weights .* never"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["own.tiktoken", "word", "merges.json"])
def test_a_vocabulary_travels_in_the_folder_under_its_hash(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_named(name)
    folder, _ = saved(tmp_path, tokenizer=tokenizer)
    ((file, content),) = tokenizer.files().items()
    assert (folder / file).read_bytes() == content
    assert {file, "tokenizer.json", "tokenizer_config.json"} <= set(read_description(folder).files)
    _, loaded = load_model(folder)
    assert loaded.spec() == tokenizer.spec()
    assert loaded.encode("the calendar").tolist() == tokenizer.encode("the calendar").tolist()
    (folder / file).write_bytes(content + b"\n")
    with pytest.raises(UserError, match=f"is damaged: {file} does not match its hash"):
        load_model(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"is damaged: {file} is missing"):
        load_model(folder)


@pytest.mark.parametrize(("key", "value"), [("n_head", 4), ("block_size", 48), ("bias", False), ("tie_weights", False)])
def test_initial_weights_must_mean_the_same(tmp_path: Path, key: str, value: Any) -> None:
    folder, model = saved(tmp_path)
    fresh = LanguageModel(SMALL, 257)
    load_initial_weights(fresh, ByteTokenizer().spec(), folder)
    assert torch.equal(fresh.transformer.wte.weight, model.transformer.wte.weight)
    with pytest.raises(UserError, match=f"has {key}=.*: add model.{key}="):
        load_initial_weights(LanguageModel(replace(SMALL, **{key: value}), 257), ByteTokenizer().spec(), folder)
    with pytest.raises(UserError, match=r"the dataset has the vocabulary char \(4 tokens, .* has byte \(257 tokens,"):
        load_initial_weights(fresh, CharTokenizer("abc").spec(), folder)


def test_the_same_step_again_replaces_it_any_number_of_times(tmp_path: Path) -> None:
    for _ in range(3):
        folder, _model = saved(tmp_path)
    verify_files(folder, read_description(folder))


def test_a_missing_best_is_a_warning(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    (tmp_path / "best").write_text("step_00000001\n")
    assert best_folder(tmp_path) is None
    prune_checkpoints(tmp_path, keep=1)
    assert folder.is_dir()


def test_checkpoints_set_aside_keep_their_content_and_are_no_longer_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step=step)
    set_pointer(tmp_path, "best", tmp_path / "step_00000003")
    set_pointer(tmp_path, "latest", tmp_path / "step_00000001")
    for step in (2, 3):
        set_aside(tmp_path / f"step_{step:08d}", "left_behind")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest", "left_behind_step_00000002", "left_behind_step_00000003", "step_00000001"
    ]  # fmt: skip
    prune_checkpoints(tmp_path, keep=1)
    assert (tmp_path / "left_behind_step_00000003").is_dir()


def test_an_optimizer_that_never_stepped_comes_back(tmp_path: Path) -> None:
    model = LanguageModel(SMALL, 257)
    optimizer = build_optimizer(model, Config().optimizer)
    state = deepcopy(State.of(model, optimizer))
    about = description(model, ByteTokenizer())
    folder = write_checkpoint(tmp_path, state, model, ByteTokenizer(), description=about)
    assert open_optimizer(optimizer, model, folder) == {}
