"""Sampling while training: where the samples go, that they repeat, and that training takes no notice."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import overrides, run_program, tiny_config
from test_train_run import assert_identical, renamed, rows

from pipeline.checkpoint.load import load_model
from pipeline.config.keys import Config
from pipeline.errors import UserError
from pipeline.log import LAYOUT, printable
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer
from pipeline.vocabulary.tokenizer import Tokenizer
from sample.preview import MAX_NEW_TOKENS, preview
from train import trainer
from train.run import run


@pytest.fixture(autouse=True)
def _logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")


def sampling_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """An evaluation at steps 3, 6 and 9, and with the checkpoints of steps 5 and 10."""
    return tiny_config(folder, eval={"every_steps": 3, "sample_prompt": "ABC"}, **sections)


def logged(config: Config) -> list[tuple[int, str]]:
    """The samples in log.txt, with their steps."""
    log = (config.run_dir / "log.txt").read_text(encoding="utf-8")
    found = re.findall(r"^\S+ \S+ INFO step (\d+): sample\n((?:    .*\n)+)", log, re.MULTILINE)
    return [(int(step), re.sub("^    ", "", text, flags=re.MULTILINE).removesuffix("\n")) for step, text in found]


def of_checkpoint(config: Config, step: int) -> str:
    """What the weights saved at a step write, from the same random numbers."""
    model, tokenizer = load_model(config.run_dir / f"checkpoints/step_{step:08d}")
    seed = xxhash.xxh3_64_intdigest(b"sample:%d:%d" % (config.run.seed, step))
    text = "ABC" + preview(model, torch.float32, tokenizer, [*b"ABC"], seed)
    return printable(text, keep=LAYOUT)


@pytest.mark.slow
def test_every_evaluation_shows_a_sample_in_the_log_and_in_tensorboard(tiny: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = sampling_config(tiny, model={"dropout": 0.1}, log={"tensorboard": True, "every_steps": 5})
    run(config, preview=preview)
    samples = logged(config)
    assert [step for step, _ in samples] == [3, 5, 6, 9, 10]
    assert all(text.startswith("ABC") and len(text) > 20 for _, text in samples)
    assert len({text for _, text in samples}) == 5
    for step in (5, 10):
        assert dict(samples)[step] == of_checkpoint(config, step)

    events = EventAccumulator(str(config.run_dir / "tb"))
    events.Reload()
    shown = [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("sample/text_summary")]
    assert [(step, re.sub("^    ", "", text, flags=re.MULTILINE)) for step, text in shown] == samples
    assert all(line.startswith("    ") for _, text in shown for line in text.split("\n")), "to Markdown it is code"
    assert all("sample" not in row for row in rows(config))
    recorded = map(json.loads, (config.run_dir / "events.jsonl").read_text().splitlines())
    assert [(row["step"], printable(row["text"], LAYOUT)) for row in recorded if row["event"] == "sample"] == samples


@pytest.mark.slow
def test_training_takes_no_notice_of_samples(tiny: Path) -> None:
    without = sampling_config(tiny, model={"dropout": 0.2})
    run(without)
    for name, dtype in (("with", "float32"), ("rounded", "bfloat16")):
        config = renamed(without, name)
        config = replace(config, run=replace(config.run, dtype=dtype))
        run(config, preview=preview)
        assert len(logged(config)) == 5
        if dtype == "float32":
            assert_identical(config, without)
    assert logged(without) == []


@pytest.mark.slow
def test_a_resumed_run_shows_the_same_samples(tiny: Path) -> None:
    straight = sampling_config(tiny)
    run(straight, preview=preview)
    halved = renamed(straight, "halved")
    half = replace(halved, train=replace(halved.train, max_steps=5), schedule=replace(halved.schedule, decay_steps=10))
    run(half, preview=preview)
    run(halved, preview=preview)
    assert logged(halved) == logged(straight)
    reseeded = renamed(straight, "reseeded")
    run(replace(reseeded, run=replace(reseeded.run, seed=1)), preview=preview)
    assert logged(reseeded) != logged(straight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_is_computed_in_the_type_of_training(tiny: Path, dtype: str) -> None:
    seen: list[Any] = []

    def spy(model: LanguageModel, dtype: torch.dtype, tokenizer: Tokenizer, prompt: list[int], seed: int) -> str:
        seen.append((dtype, prompt))
        return preview(model, dtype, tokenizer, prompt, seed)

    run(sampling_config(tiny, run={"dtype": dtype, "device": "cpu"}, train={"max_steps": 3}), preview=spy)
    assert seen == [(getattr(torch, dtype), [*b"ABC"])]


@pytest.mark.parametrize("error", [UserError, torch.OutOfMemoryError])
def test_no_sample_is_a_reason_to_end_a_run(tiny: Path, error: type[Exception]) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error("the GPU is\x1b full")

    config = sampling_config(tiny)
    assert run(config, preview=refuse) == ""
    assert logged(config)[0] == (3, "no sample: the GPU is\\x1b full")
    assert rows(config)[-1]["step"] == 10


def test_a_sample_of_damaged_weights_is_said_to_be_none(tiny: Path) -> None:
    tokenizer = ByteTokenizer()
    model = LanguageModel(tiny_config(tiny).model, tokenizer.vocab_size)
    with torch.no_grad():
        model.transformer.wpe.weight[6] = torch.nan
    with pytest.raises(UserError, match="logits are not finite"):
        preview(model, torch.float32, tokenizer, [65], seed=1)


def test_what_the_terminal_would_obey_is_escaped(tiny: Path) -> None:
    config = sampling_config(tiny)
    run(config, preview=lambda *_, **__: "\x1b[2J\n\tnext")
    assert logged(config)[0] == (3, "ABC\\x1b[2J\n\tnext")


def test_a_sample_is_short(tiny: Path) -> None:
    tokenizer = ByteTokenizer()
    model = LanguageModel(tiny_config(tiny).model, tokenizer.vocab_size)
    text = preview(model, torch.float32, tokenizer, [65], seed=1)
    assert 0 < len(tokenizer.encode(text)) <= 3 * MAX_NEW_TOKENS  # a byte that is no character is shown in three


def test_a_prompt_outside_the_vocabulary_is_refused_at_the_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "from_spec", lambda *_: CharTokenizer("AB"))
    config = sampling_config(tiny)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"eval.sample_prompt: character 'C' \(U\+0043\) at position 2 is not in"):
            run(config, dry_run=dry_run, preview=preview)
    assert not config.run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.campaign), "fsdp"])
def test_two_ranks_show_the_samples_of_the_model_they_share(tiny: Path, strategy: str) -> None:
    config = sampling_config(tiny, parallel={"strategy": strategy}, model={"n_embd": 33, "n_head": 3})
    result = run_program("train", "quickstart", *overrides(config), cwd=tiny, ranks=2)
    assert result.returncode == 0, result.stderr
    samples = logged(config)
    assert [step for step, _ in samples] == [3, 5, 6, 9, 10]
    assert result.stderr.count(": sample\n") == 5
    for step in (5, 10):
        assert dict(samples)[step] == of_checkpoint(config, step)
    if strategy == "ddp":
        return  # rank 0 samples from its own copy, as one alone does
    without = renamed(config, "without")
    without = replace(without, eval=replace(without.eval, sample_prompt=""))
    result = run_program("train", "quickstart", *overrides(without), cwd=tiny, ranks=2)
    assert result.returncode == 0, result.stderr
    assert_identical(config, without)
