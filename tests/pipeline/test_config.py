"""The config: every preset, every key, every way a value gets in, and every message about a wrong one."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tree import SOURCES, text, tree

from pipeline.budget import accumulation_steps
from pipeline.config import other_names
from pipeline.config.keys import KEYS, SECTIONS, Config, ModelConfig, TrainConfig, WeightedDataset
from pipeline.config.load import config_from_arguments, find_config, from_dict, load_config, override, to_dict, to_toml
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))

PINNED = {
    "run.name", "run.dir", "run.seed", "run.device", "run.dtype", "run.compile", "run.branch_from",
    "data.dataset", "data.data_dir", "data.mixture", "data.document_mask",
    "model.arch", "model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.dropout", "model.bias",
    "model.n_kv_head", "model.head_dim", "model.n_inner", "model.rope_theta", "model.residual_dtype",
    "model.tie_weights", "model.activation_checkpointing", "model.init_from",
    "optimizer.name", "optimizer.lr", "optimizer.min_lr", "optimizer.betas", "optimizer.weight_decay",
    "optimizer.grad_clip",
    "schedule.kind", "schedule.warmup_steps", "schedule.decay_steps", "schedule.cooldown_steps",
    "train.max_steps", "train.max_minutes", "train.tokens_per_step", "train.micro_batch_size", "train.max_bad_steps",
    "train.spike_z_score", "train.spike_window",
    "eval.every_steps", "eval.tokens", "eval.sample_prompt",
    "checkpoint.every_steps", "checkpoint.keep", "checkpoint.keep_every_steps", "checkpoint.resume",
    "log.every_steps", "log.tensorboard", "log.also", "log.profile_steps",
    "parallel.strategy", "parallel.check_every_steps", "parallel.timeout_s",
}  # fmt: skip


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def message_of(*overrides: str, config: str = "gpt2-124m") -> str:
    with pytest.raises(UserError) as caught:
        load_config(config, list(overrides))
    return str(caught.value)


# ---- presets ----


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_and_survives_both_written_forms(preset: str) -> None:
    config = load_config(preset, [])
    assert config.run.name == preset
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_opens_with_its_hardware_time_and_expected_loss(preset: str) -> None:
    text = (ROOT / "configs" / f"{preset}.toml").read_text(encoding="utf-8")
    opening = "".join(re.match(r"(#.*\n)*", text)[0]).lower()  # type: ignore[index]
    for word in ("hardware:", "time", "expected", "loss"):
        assert word in opening, f"configs/{preset}.toml: its opening comment does not tell {word!r}"


@pytest.mark.parametrize(
    ("preset", "n_layer", "n_head", "n_embd", "parameters"),
    [
        ("gpt2-124m", 12, 12, 768, 124_439_808),
        ("gpt2-350m", 24, 16, 1024, 354_823_168),
        ("gpt2-774m", 36, 20, 1280, 774_030_080),
        ("gpt2-1558m", 48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_gpt2_presets_have_the_published_shapes(
    preset: str, n_layer: int, n_head: int, n_embd: int, parameters: int
) -> None:
    model = load_config(preset, []).model
    assert model == ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=1024, bias=True, dropout=0.0)
    assert model.tie_weights
    embeddings = (50257 + model.block_size) * n_embd
    assert embeddings + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd == parameters


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("gpt2")])
def test_the_gpt2_presets_take_the_same_steps_on_any_number_of_gpus(preset: str, world_size: int) -> None:
    config = load_config(preset, [])
    tokens = config.train.micro_batch_size * config.model.block_size * world_size
    assert accumulation_steps(config, world_size) * tokens == config.train.tokens_per_step == 524_288


def test_presets_are_found_from_another_working_folder(tmp_path: Path) -> None:
    script = "from pipeline.config.load import load_config; print(load_config('gpt2-350m', []).model.n_embd)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1024\n"


def test_a_preset_is_found_with_its_ending_and_a_file_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart.toml") == ROOT / "configs" / "quickstart.toml"
    write(tmp_path, "", "quickstart.toml")
    assert find_config("quickstart.toml") == Path("quickstart.toml")


# ---- keys and values ----


def test_the_keys_are_the_pinned_ones() -> None:
    assert {f"{section}.{name}" for section, keys in to_dict(Config()).items() for name in keys} == PINNED, (
        "A config key came or went. Other people's files name these keys: change README.md and the contract too, "
        "then the set in this test."
    )


# ---- what a new key needs ----


@pytest.mark.parametrize("key", [key for key, entry in KEYS.items() if entry.type in (int, float, tuple[float, float])])
def test_a_number_has_a_lower_bound(key: str) -> None:
    assert {">=", ">"} & KEYS[key].metadata["bounds"].keys(), (
        f"{key} is a number without bounds, so a wrong one would end in a traceback: give key(...) at_least= or above= "
        "in pipeline/config/keys.py, and below= where there is an end"
    )


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, entry in KEYS.items() if len(entry.metadata["choices"]) != 1])
def test_a_key_is_read_by_somebody(key: str) -> None:
    """As `config.train.max_steps`, as `train.max_steps`, or in a file that takes a TrainConfig, as `config.max_steps`.

    A key with one choice has no effect to be read.
    """
    section, _, name = key.partition(".")
    kind = SECTIONS[section].__name__
    for path in SOURCES:
        if path.parts[:2] == ("pipeline", "config") and path.name != "keys.py":
            continue
        for node in ast.walk(tree(path)):
            match node:
                case ast.Attribute(attr=attr, value=ast.Attribute(attr=owner) | ast.Name(id=owner)) if attr == name:
                    if owner == section or (kind in text(path) and path.name != "keys.py"):
                        return
    pytest.fail(f"no source reads {key}: use it, or remove it from pipeline/config/keys.py")


def test_every_key_is_in_the_docs() -> None:
    page = ROOT / "docs" / "train.md"
    if not page.is_file():
        pytest.skip("docs/train.md does not exist")
    missing = [key for key in KEYS if key not in page.read_text(encoding="utf-8")]
    assert not missing, f"describe {', '.join(missing)} in docs/train.md"


# ---- other programs' names ----


def test_every_other_name_leads_to_a_key_of_ours() -> None:
    for name, key in other_names.OTHER_NAMES.items():
        assert key in KEYS, f"{name}: there is no key {key}"
        assert name not in {known.partition(".")[2] for known in KEYS} or key.endswith(f".{name}")
    assert set(other_names.NOTES) <= other_names.OTHER_NAMES.keys()
    assert set(other_names.PRESETS.values()) <= set(PRESETS)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("train.batch_size", "train.micro_batch_size"),
        ("train.max_iters", "train.max_steps"),
        ("optim.weight_decay", "optimizer.weight_decay"),
        ("train.gradient_accumulation_steps", "train.tokens_per_step: sequences of a step over all ranks x block_size"),
        ("run.out_dir", "run.dir"),
        ("run.dataset", "data.dataset"),
        ("gpt.n_layer", "model.n_layer"),
        ("train.eval_interval", "eval.every_steps"),
        ("model.num_hidden_layers", "model.n_layer"),
        ("train.every_steps", "eval.every_steps or checkpoint.every_steps or log.every_steps"),
        ("optimizer.beta1", "optimizer.betas: [beta1, beta2]"),
    ],
)
def test_a_key_of_another_name_is_answered_with_ours(name: str, meant: str) -> None:
    assert message_of(f"{name}=1") == f"unknown key {name} (did you mean {meant}?)"


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("max_steps=200", "train.max_steps=200"),
        ("learning_rate=1e-3", "optimizer.lr=1e-3"),
        ("lr=1e-3", "optimizer.lr=1e-3"),
        ("--batch-size=8", "train.micro_batch_size=8"),
        ("n_layer=6", "model.n_layer=6"),
        ("dataset=mine", "data.dataset=mine"),
        ("gradient_accumulation_steps=40", "train.tokens_per_step: sequences of a step over all ranks x block_size"),
    ],
)
def test_a_key_without_its_section_is_answered_with_the_whole_argument(argument: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_arguments([argument])
    assert str(caught.value) == f"invalid override {argument!r}: expected section.key=value (did you mean {meant}?)"


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("gpt2", "gpt2-124m"), ("gpt-2", "gpt2-124m"), ("GPT2-XL", "gpt2-1558m"), ("gpt2-124", "gpt2-124m"),
        ("shakespeare_char", "shakespeare-char"), ("config/train_shakespeare_char.py", "shakespeare-char"),
        ("config/train_gpt2.py", "gpt2-124m"), ("quikstart", "quickstart"),
    ],
)  # fmt: skip
def test_a_preset_of_another_name_is_answered_with_ours(name: str, preset: str) -> None:
    assert message_of(config=name).startswith(
        f"no config {name!r} (did you mean {preset}?): expected a TOML file or one"
    )


def test_a_python_config_is_not_run_and_its_names_are_translated(tmp_path: Path) -> None:
    source = "raise SystemExit\nbatch_size = 12\nlearning_rate = 1e-3\nwandb_project = 'owt'\nblock_size = 64\n"
    message = message_of(config=write(tmp_path, source, "train_mine.py"))
    assert message.startswith(
        f"{tmp_path / 'train_mine.py'} is a Python config, as nanoGPT has them, which is not run: "
    )
    assert message.endswith(
        "(batch_size -> train.micro_batch_size, learning_rate -> optimizer.lr, block_size -> model.block_size)"
    )
    assert "max_iters -> train.max_steps" in message_of(config=write(tmp_path, "not (python", "broken.py"))


def test_a_python_config_of_a_recipe_we_have_is_answered_with_our_preset(tmp_path: Path) -> None:
    config = write(tmp_path, "max_iters = 5000", "train_shakespeare_char.py")
    wanted = "is not run (did you mean shakespeare-char?): write its values as section.key=value, or into a TOML file "
    assert message_of(config=config).endswith(f"{wanted}(max_iters -> train.max_steps)")


def test_keys_at_the_top_of_a_file_are_named_with_their_section(tmp_path: Path) -> None:
    assert message_of(config=write(tmp_path, "lr = 3e-4\nmax_iters = 5\nzzz = 1")).split("; ") == [
        "lr = 0.0003 is not under a [section] (did you mean optimizer.lr?)",
        "max_iters = 5 is not under a [section] (did you mean train.max_steps?)",
        "zzz = 1 is not under a [section] (see pipeline train --help)",
    ]


# ---- values ----


def test_a_byte_order_mark_and_spaces_around_the_equals_sign_do_no_harm(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeff[train]\nmax_steps = 5")
    config = load_config(file, ["optimizer.lr = 1e-3"])
    assert (config.train.max_steps, config.optimizer.lr) == (5, 1e-3)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [("train.max_steps", np.int64(5), 5), ("optimizer.lr", np.float32(0.5), 0.5), ("model.bias", np.bool_(False), False),
     ("optimizer.betas", np.array([0.5, 0.75]), (0.5, 0.75)), ("train.max_steps", torch.tensor(5), 5)],
)  # fmt: skip
def test_a_number_of_numpy_or_torch_is_one_of_python(key: str, value: Any, wanted: Any) -> None:
    assert value_of(load_config("gpt2-124m", [override(key, value)]), key) == wanted


@pytest.mark.parametrize("value", [None, {1}, object(), [{}], float("nan"), 1j])
def test_a_python_value_that_no_key_takes_is_refused_in_a_line(value: Any) -> None:
    with pytest.raises(UserError, match=r"^optimizer\.lr=.*: expected a number > 0$"):
        load_config("gpt2-124m", [override("optimizer.lr", value)])


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.max_steps", 5), ("optimizer.betas", (0.9, 0.99)), ("run.name", "a b"), ("run.name", Path("x")), ("model.bias", True),
     ("optimizer.lr", 1e-5)],
)  # fmt: skip
def test_a_python_value_as_an_override(key: str, value: Any) -> None:
    wanted = str(value) if isinstance(value, Path) else value
    if value != "a b":
        assert value_of(load_config("gpt2-124m", [override(key, value), "optimizer.min_lr=0"]), key) == wanted
    assert override(key, value).startswith(f"{key}=")


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    empty, file = write(tmp_path, "", "empty.toml"), write(tmp_path, "[optimizer]\nlr = 3e-4")
    assert load_config(empty, []).optimizer.lr == 6e-4
    assert load_config(file, []).optimizer.lr == 3e-4
    assert load_config(file, ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4
    assert load_config(file, ["optimizer.lr=1e-4", "optimizer.lr=2e-4"]).optimizer.lr == 2e-4
    assert load_config(file, ["optimizer.min_lr=1e-5"]).optimizer.lr == 3e-4  # its neighbour keeps the file's value


def test_a_run_without_a_name_takes_its_files(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), []).run.name == "mine"
    assert load_config(write(tmp_path, "[run]\nname = 'other'"), []).run.name == "other"
    assert load_config(write(tmp_path, ""), ["run.name=third"]).run.name == "third"


def test_a_name_taken_from_the_file_is_held_to_the_same_rule(tmp_path: Path) -> None:
    """A checkpoint carries the config, and reads it back through from_dict."""
    assert "run.name='my recipe'" in message_of(config=write(tmp_path, "", "my recipe.toml"))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.max_steps", "1_000", 1000),
        ("optimizer.lr", "6e-4", 0.0006),
        ("optimizer.lr", "1", 1.0),
        ("model.bias", "false", False),
        ("log.tensorboard", "true", True),
        ("optimizer.betas", "[0.8, 0.99]", (0.8, 0.99)),
        ("optimizer.betas", "[0, 0.5]", (0.0, 0.5)),
        ("run.name", "124", "124"),
        ("run.name", "1e3", "1e3"),
        ("run.name", "true", "true"),
        ("data.dataset", "2024-01-01", "2024-01-01"),
        ("data.data_dir", "/a=b/c d", "/a=b/c d"),
        ("model.init_from", "", ""),
    ],
)
def test_an_override_is_read_as_its_keys_type(key: str, text: str, value: Any) -> None:
    found = value_of(load_config("gpt2-124m", [f"{key}={text}"]), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ['a "quoted" \\ folder', "naïve", "数据", "😀", "tab\there", "del\x7fete"])
def test_any_text_survives_both_written_forms(text: str) -> None:
    config = load_config("gpt2-124m", [f"data.data_dir={text}"])
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(to_dict(config)) == config


def test_zero_decay_steps_stand_for_the_whole_run() -> None:
    assert load_config("gpt2-124m", []).decay_steps == 600_000
    assert load_config("gpt2-124m", ["schedule.decay_steps=5000"]).decay_steps == 5000


def test_a_dataset_is_a_name_under_data_dir_before_it_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("gpt2-124m", ["data.dataset=mine", "run.dir=out", "run.name=first"])
    assert config.dataset_dir("mine") == Path("data/mine")  # where the error will say that it is missing
    Path("mine").mkdir()
    assert config.dataset_dir("mine") == Path("mine")
    Path("data/mine").mkdir(parents=True)
    assert config.dataset_dir("mine") == Path("data/mine")
    assert config.run_dir == Path("out/first")


def test_a_mixture_takes_the_place_of_the_dataset_and_survives_both_written_forms() -> None:
    text = '[{dataset = "a", weight = 0.7}, {weight = 3, dataset = "b \\" {x}"}]'
    config = load_config("gpt2-124m", [f"data.mixture={text}"])
    assert config.datasets == (WeightedDataset("a", 0.7), WeightedDataset('b " {x}', 3.0))
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert from_dict(to_dict(config)) == config
    assert load_config("gpt2-124m", []).datasets == (WeightedDataset("openwebtext", 1.0),)


# ---- errors ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.n_layer=3", "unknown key modle.n_layer (did you mean model.n_layer?)"),
        ("zzz.key=3", "unknown key zzz.key (see pipeline train --help)"),
        (
            "eval.batches=0",
            "unknown key eval.batches (did you mean eval.tokens: micro-batches x train.micro_batch_size x ",
        ),
        ("model.n_layers=3", "unknown key model.n_layers (did you mean model.n_layer?)"),
        (
            "log.unknown=1",
            "unknown key log.unknown (expected one of log.every_steps, log.tensorboard, log.also, log.profile_steps)",
        ),
        ("model.vocab.size=1", "unknown key model.vocab.size"),
        ("model.n_layer=1.5", "model.n_layer=1.5: expected an integer >= 1"),
        ("model.n_layer=true", "model.n_layer=True: expected an integer >= 1"),
        ("model.n_layer=six", "model.n_layer='six': expected an integer >= 1"),
        ("model.n_layer=", "model.n_layer='': expected an integer >= 1"),
        ("optimizer.lr=fast", "optimizer.lr='fast': expected a number > 0"),
        ("optimizer.lr=true", "optimizer.lr=True: expected a number > 0"),
        ("model.bias=1", "model.bias=1: expected true or false"),
        ("model.bias=yes", "model.bias='yes': expected true or false"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: expected two numbers >= 0 and < 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: expected two numbers >= 0 and < 1"),
        ("optimizer.betas=[0.9, 'b']", "optimizer.betas=[0.9, 'b']: expected two numbers >= 0 and < 1"),
        (
            "data.mixture=owt",
            "data.mixture='owt': expected datasets with weights, such as [{dataset = \"a\", weight = 0.7}]",
        ),
        ("data.mixture=[{dataset='a'}]", "data.mixture=[{'dataset': 'a'}]: expected datasets with weights"),
        (
            "data.mixture=[{dataset='a', weight='b'}]",
            "data.mixture=[{'dataset': 'a', 'weight': 'b'}]: expected datasets with",
        ),
        (
            "data.mixture=[{dataset='a', weight=1, wait=1}]",
            "data.mixture=[{'dataset': 'a', 'weight': 1, 'wait': 1}]",
        ),
        (
            "data.mixture=[{dataset='a', weight=0}]",
            "data.mixture gives 'a' the weight 0.0: expected a number > 0",
        ),
        ("data.mixture=[{dataset='a', weight=nan}]", "data.mixture gives 'a' the weight nan: expected a number > 0"),
        ("data.mixture=[{dataset='a', weight=inf}]", "data.mixture gives 'a' the weight inf: expected a number > 0"),
        ("run.dtype=fp16", "run.dtype='fp16': expected one of auto, float32, bfloat16, float16"),
        ("run.compile=true", "run.compile='true': expected one of auto, on, off"),
        ("model.arch=llama", "model.arch='llama': expected one of gpt2, qwen3"),
        ("checkpoint.resume=yes", "checkpoint.resume='yes': expected auto, must, never or a name"),
        ("model.n_head=7", "model.n_embd=768 is not a multiple of model.n_head=7"),
        ("model.n_kv_head=4", "model.n_kv_head=4 needs model.arch=qwen3: gpt2 expects 12, or 0 for it"),
        ("model.n_inner=1024", "model.n_inner=1024 needs model.arch=qwen3: gpt2 expects 3072, or 0 for it"),
        ("model.head_dim=128", "model.head_dim=128 needs model.arch=qwen3: gpt2 expects 64, or 0 for it"),
        ("model.dropout=1", "model.dropout=1.0: expected a number >= 0 and < 1"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas=[0.9, 1.0]: expected two numbers >= 0 and < 1"),
        ("optimizer.betas=[-0.1, 0.9]", "optimizer.betas=[-0.1, 0.9]: expected two numbers >= 0 and < 1"),
        ("optimizer.lr=0", "optimizer.lr=0.0: expected a number > 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: expected a number > 0"),
        ("optimizer.min_lr=1e-3", "optimizer.min_lr=0.001 is above optimizer.lr=0.0006"),
        ("schedule.decay_steps=1999", "schedule.warmup_steps=2000 is above schedule.decay_steps=1999"),
        ("model.n_layer", "invalid override 'model.n_layer': expected section.key=value, such as optimizer.lr=3e-4"),
        ("model.=3", "invalid override 'model.=3': expected section.key=value, such as optimizer.lr=3e-4"),
    ],
)
def test_a_wrong_override_is_named_with_what_was_wanted(override: str, message: str) -> None:
    assert message_of(override).startswith(message)
    assert "\n" not in message_of(override)


@pytest.mark.parametrize(
    ("key", "bound"),
    [
        ("run.seed", 0),
        ("model.n_layer", 1), ("model.n_head", 1), ("model.n_embd", 1), ("model.block_size", 1), ("model.dropout", 0),
        ("optimizer.min_lr", 0), ("optimizer.weight_decay", 0), ("optimizer.grad_clip", 0),
        ("schedule.warmup_steps", 0), ("schedule.decay_steps", 0),
        ("train.max_steps", 1), ("train.tokens_per_step", 1), ("train.micro_batch_size", 1),
        ("train.max_bad_steps", 1),
        ("eval.every_steps", 0), ("eval.tokens", 0),
        ("checkpoint.every_steps", 1), ("checkpoint.keep", 1), ("checkpoint.keep_every_steps", 0), ("log.every_steps", 1),
    ],
)  # fmt: skip
def test_a_number_may_be_its_lower_bound_and_nothing_below(key: str, bound: int) -> None:
    assert f"{key}={type(value_of(Config(), key))(bound - 1)}: expected a" in message_of(f"{key}={bound - 1}")
    width = ["model.n_head=1"] if key == "model.n_embd" else []
    assert value_of(load_config("gpt2-124m", [f"{key}={bound}", *width]), key) == bound


@pytest.mark.parametrize("text", ["inf", "nan", "1e400"])
@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay", "optimizer.grad_clip"])
def test_a_number_that_is_not_finite_is_refused(key: str, text: str) -> None:
    """Neither TOML nor JSON has a form for it that the other one reads."""
    assert key in message_of(f"{key}={text}")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "two words", "x" * 65, "tab\t", "back\\slash"])
def test_a_run_name_that_is_no_folders_name_is_refused(name: str) -> None:
    assert message_of(f"run.name={name}") == (
        f"run.name={name!r}: expected letters, digits, '.', '_' and '-', at most 64 characters"
    )


def test_bounds_that_meet_are_allowed() -> None:
    overrides = ["optimizer.min_lr=6e-4", "schedule.decay_steps=2000", "run.name=" + "x" * 64]
    assert load_config("gpt2-124m", overrides).optimizer.min_lr == 6e-4


def test_all_faults_are_reported_together_in_one_line() -> None:
    message = message_of("oops", "modle.n_layer=3", "model.n_head=-1", "optimizer.lr=fast", "run.dtype=fp16")
    assert message.split("; ") == [
        "invalid override 'oops': expected section.key=value, such as optimizer.lr=3e-4",
        "optimizer.lr='fast': expected a number > 0",
        "unknown key modle.n_layer (did you mean model.n_layer?)",
        "run.dtype='fp16': expected one of auto, float32, bfloat16, float16",
        "model.n_head=-1: expected an integer >= 1",
    ]


def test_a_wrong_type_in_a_file_is_named(tmp_path: Path) -> None:
    assert (
        message_of(config=write(tmp_path, "[run]\ndtype = 16"))
        == "run.dtype=16: expected one of auto, float32, bfloat16, float16"
    )


def test_a_value_in_the_place_of_a_section_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "run = 3")
    wanted = "run=3: expected a section, [run] with keys under it"
    assert message_of(config=file) == wanted
    assert message_of("run.name=x", config=file) == wanted


def test_a_config_that_is_not_there_is_answered_with_the_presets() -> None:
    message = message_of(config="gpt3")
    assert message.startswith("no config 'gpt3': expected a TOML file or one of the presets ")
    assert message.split("presets ")[1].split(", ") == PRESETS


@pytest.mark.parametrize("content", [b"[run\n", b"key", b"\xff\xfe", b"[run]\nname = 'a'\nname = 'b'\n"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    assert message_of(config=str(path)).startswith(f"{path} is not TOML: ")


# ---- accumulation ----


def shaped(tokens_per_step: int, micro_batch_size: int, block_size: int) -> Config:
    train = TrainConfig(tokens_per_step=tokens_per_step, micro_batch_size=micro_batch_size)
    return Config(train=train, model=ModelConfig(block_size=block_size))


@pytest.mark.parametrize(
    ("tokens", "micro", "block", "world", "steps"),
    [(524_288, 16, 1024, 8, 4), (524_288, 16, 1024, 1, 32), (64, 4, 16, 1, 1), (192, 2, 16, 3, 2)],
)
def test_accumulation_makes_up_the_tokens_of_a_step(
    tokens: int, micro: int, block: int, world: int, steps: int
) -> None:
    assert accumulation_steps(shaped(tokens, micro, block), world) == steps


@pytest.mark.parametrize(
    ("tokens", "micro", "block", "world", "nearest"),
    [
        (524_288, 16, 1024, 3, [491_520, 540_672]),
        (100, 4, 16, 1, [64, 128]),
        (10, 4, 16, 2, [128]),  # nothing below one micro-batch
        (96, 4, 16, 1, [64, 128]),
        (1024, 5, 16, 2, [960, 1120]),
    ],
)
def test_tokens_that_do_not_divide_are_answered_with_values_that_do(
    tokens: int, micro: int, block: int, world: int, nearest: list[int]
) -> None:
    with pytest.raises(UserError, match=f"tokens_per_step={tokens} does not divide") as caught:
        accumulation_steps(shaped(tokens, micro, block), world)
    hints = str(caught.value).split("; set ")[1].split(", or ")
    values = [[int(number) for number in hint.split("=")[1].split(" or ")] for hint in hints]
    assert values[0] == nearest
    for value in nearest:
        assert accumulation_steps(shaped(value, micro, block), world) > 0
    assert (len(values) == 2) == (tokens % (block * world) == 0)  # then, and only then, some micro-batch fits
    for size in values[1] if len(values) == 2 else []:
        assert accumulation_steps(shaped(tokens, size, block), world) > 0


def test_the_micro_batches_offered_are_the_nearest_ones() -> None:
    with pytest.raises(UserError, match=r"or train\.micro_batch_size=4 or 8$"):
        accumulation_steps(shaped(1024, 6, 16), 2)
