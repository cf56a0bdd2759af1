"""One training step and the loop around it, each against the same thing written out plainly."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, write_dataset, write_documents
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.checkpoint.folder import to_folder
from pipeline.checkpoint.layout_gpt2 import GPT2Layout
from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.shards import TokenReader, load_manifest
from pipeline.dataset.windows import evaluation_starts, windows_at
from pipeline.errors import Diverged
from pipeline.machine.ranks import World
from pipeline.runs import RunFolder
from train.metrics.record import FileMetrics, Metrics
from train.run import assemble, autocast_type, initialise
from train.spikes import Outcome
from train.stop import StopRequest
from train.trainer import Trainer

# A key's bias moves all scores of a query alike, so its true gradient is 0 and Adam turns pure rounding into full steps.
NOISE = "attn.c_attn.bias"
ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def trainer_of(config: Config) -> Trainer:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer, _ = assemble(config, ALONE, Mixture(config), autocast_type(config, ALONE))
    initialise(trainer)
    return trainer


def trained(config: Config, steps: int) -> tuple[Trainer, list[float]]:
    trainer, losses = trainer_of(config), []
    for _ in range(steps):
        losses.append(trainer.train_step().loss)
        trainer.step += 1
    return trainer, losses


def evaluate(trainer: Trainer) -> float:
    return trainer.evaluation.run(trainer.model).mean


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        if not name.endswith(NOISE):
            torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_accumulating_four_micro_batches_equals_one_big_batch(tiny: Path) -> None:
    accumulated, losses = trained(tiny_config(tiny, train={"micro_batch_size": 2}), steps=5)
    at_once, big_losses = trained(tiny_config(tiny, train={"micro_batch_size": 8}), steps=5)
    assert (accumulated.accumulation, at_once.accumulation) == (4, 1)
    assert losses == pytest.approx(big_losses, rel=1e-5)
    assert_same_weights(weights(accumulated), weights(at_once))


def test_activation_checkpointing_computes_every_block_twice_and_changes_no_bit(tiny: Path) -> None:
    kept, losses = trained(tiny_config(tiny, model={"dropout": 0.1}), steps=5)
    config = tiny_config(tiny, model={"dropout": 0.1, "activation_checkpointing": "block"})
    again, same_losses = trained(config, steps=5)
    assert same_losses == losses
    for name, tensor in weights(kept).items():
        assert torch.equal(weights(again)[name], tensor), name
    calls: list[None] = []
    again.model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    again.train_step()
    assert len(calls) == 2 * again.accumulation
    calls.clear()
    evaluate(again)
    assert len(calls) == 4


def test_logged_loss_is_the_mean_over_the_whole_global_batch(tiny: Path) -> None:
    trainer = trainer_of(tiny_config(tiny))
    windows = torch.from_numpy(trainer.mixture.batch(0, 8))
    with torch.no_grad():
        expected = trainer.model(windows[:, :-1], windows[:, 1:]).item()
    assert trainer.train_step().loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_fifty_steps_equal_an_independent_trainer(tiny: Path) -> None:
    """transformers' GPT-2, torch's plain AdamW, clipping and schedule written out, on the same batches."""
    transformers = pytest.importorskip("transformers")
    config = tiny_config(tiny, train={"max_steps": 50}, optimizer={"grad_clip": 0.5}, schedule={"warmup_steps": 5})
    ours = trainer_of(config)
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2Layout().config_json(ours.model.config, ours.model.vocab_size, 0, "float32"))
    )
    stored = {name: to_folder(ours.model, name, tensor) for name, tensor in weights(ours).items()}
    twin.load_state_dict(stored, strict=False)
    twin.tie_weights()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(50):
        windows = torch.from_numpy(ours.mixture.batch(step * 8, 8))
        cosine = 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * (step - 5) / 45)) / 2
        for group in optimizer.param_groups:
            group["lr"] = cosine if step >= 5 else 1e-2 * (step + 1) / 5
        logits = twin(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
        for parameter in twin.parameters():
            parameter.grad *= min(1.0, 0.5 / (norm.item() + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        result = ours.train_step()
        ours.step += 1
        assert result.loss == pytest.approx(loss.item(), rel=1e-4), step
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-3), step


def test_bfloat16_follows_the_float32_loss_curve(tiny: Path) -> None:
    exact = trained(tiny_config(tiny), steps=20)[1]
    rounded = trained(tiny_config(tiny, run={"dtype": "bfloat16"}), steps=20)[1]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert exact[-1] < exact[0] - 1, "the comparison is only worth something while the loss falls"


def kept_bytes(trainer: Trainer) -> int:
    """Of what the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.loss_of(trainer.blank_windows())
    del loss
    return sum(kept.values())


def test_a_bfloat16_residual_stream_takes_less_memory_and_follows_the_loss_curve(tiny: Path) -> None:
    """Fifty steps of Shakespeare's characters, 4 x 128, stayed within 1.2e-3 of float32; bfloat16 products alone within 5e-4."""
    low = {"run": {"dtype": "bfloat16"}, "train": {"max_steps": 20}}
    _, exact = trained(tiny_config(tiny, train={"max_steps": 20}), steps=20)
    plain, _ = trained(tiny_config(tiny, **low), steps=1)
    trainer, losses = trained(tiny_config(tiny, **low, model={"residual_dtype": "autocast"}), steps=20)
    assert losses == pytest.approx(exact, rel=0.02) and losses != exact
    model = trainer.config.model
    tokens = trainer.config.train.micro_batch_size * model.block_size
    # Each block's two norms and the last one keep their input in half the bytes.
    assert kept_bytes(plain) - kept_bytes(trainer) >= 2 * (2 * model.n_layer + 1) * tokens * model.n_embd
    # Without autocast there is no other type to take.
    assert (
        trained(tiny_config(tiny, model={"residual_dtype": "autocast"}, train={"max_steps": 20}), steps=3)[1]
        == exact[:3]
    )


def test_weights_stay_float32_under_bfloat16(tiny: Path) -> None:
    trainer, _ = trained(tiny_config(tiny, run={"dtype": "bfloat16"}), steps=1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_dropout_depends_on_the_place_in_the_global_batch_and_not_on_history(tiny: Path) -> None:
    config = tiny_config(tiny, model={"dropout": 0.3})
    losses = trained(config, steps=3)[1]
    torch.manual_seed(999)
    assert trained(config, steps=3)[1] == losses
    again = trainer_of(config)
    torch.rand(100)
    assert again.train_step().loss == losses[0]
    other = trained(replace(config, run=replace(config.run, seed=1)), steps=1)[1]
    assert other != losses[:1]


def test_evaluation_is_the_mean_over_its_windows_and_leaves_training_alone(tiny: Path) -> None:
    config = tiny_config(tiny, eval={"tokens": 320}, train={"micro_batch_size": 4, "tokens_per_step": 128})
    trainer = trainer_of(config)
    reader = TokenReader(tiny / "data/tiny", load_manifest(tiny / "data/tiny"), "val")
    windows = torch.from_numpy(windows_at(reader, evaluation_starts(reader, 16, 20), 16))
    with torch.no_grad():
        expected = trainer.model(windows[:, :-1], windows[:, 1:]).item()
    assert evaluate(trainer) == pytest.approx(expected, rel=1e-5)
    assert evaluate(trainer) == evaluate(trainer)
    assert trainer.model.training
    undisturbed = trained(tiny_config(tiny, model={"dropout": 0.2}), steps=3)[1]
    disturbed = trainer_of(tiny_config(tiny, model={"dropout": 0.2}))
    losses = []
    for _ in range(3):
        evaluate(disturbed)
        losses.append(disturbed.train_step().loss)
        disturbed.step += 1
    assert losses == undisturbed


def test_evaluation_weighs_a_short_last_batch_by_its_windows(tiny: Path) -> None:
    whole = trainer_of(tiny_config(tiny, eval={"tokens": 0}, train={"micro_batch_size": 8}))
    assert len(whole.evaluation.starts[0]) % 8 != 0
    single = trainer_of(tiny_config(tiny, eval={"tokens": 0}, train={"micro_batch_size": 1}))
    assert evaluate(whole) == pytest.approx(evaluate(single), rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, 100, 1000, 10**9])
def test_the_val_loss_does_not_depend_on_what_the_memory_has_room_for(tiny: Path, tokens: int) -> None:
    """Fewer tokens than a window are one window, more than the split are all of it."""
    losses, starts = [], []
    for size in (1, 2, 8):
        trainer = trainer_of(tiny_config(tiny, eval={"tokens": tokens}, train={"micro_batch_size": size}))
        losses.append(evaluate(trainer))
        starts.append(trainer.evaluation.starts)
    assert starts[0] == starts[1] == starts[2]
    assert len(starts[0][0]) == min(max(1, math.ceil(tokens / 16)), 1999 // 16)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_an_optimizer_that_takes_its_time_is_in_the_tokens_per_second(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what takes its time between steps; an evaluation and a save are not."""
    config = tiny_config(tiny, train={"max_steps": 6}, eval={"every_steps": 2}, checkpoint={"every_steps": 2})
    trainer, clock = trainer_of(config), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(of: Any, name: str, seconds: float) -> None:
        real = getattr(of, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            clock[0] += seconds
            return real(*arguments, **named)

        monkeypatch.setattr(of, name, slow)

    for outside in ((trainer.evaluation, "run"), (trainer.checkpoints, "save")):
        takes(*outside, seconds=3.0)
    for inside in ((trainer.optimizer, "step"), (trainer, "agree")):
        takes(*inside, seconds=0.5)
    metrics = FileMetrics(RunFolder(config.run_dir))
    trainer.fit(metrics, StopRequest())
    rows = [json.loads(row) for row in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens_per_s"] for row in rows[1:]] == [pytest.approx(128)] * 5


def mixed(folder: Path, **sections: dict[str, Any]) -> Config:
    """data/tiny and data/other, of which evaluation has windows in numbers that neither batches nor ranks divide."""
    write_dataset(folder / "data" / "other", val_tokens=500, seed=5)
    mixture = [{"dataset": "tiny", "weight": 0.7}, {"dataset": "other", "weight": 0.3}]
    return tiny_config(folder, data={"mixture": mixture}, **sections)


def test_val_loss_of_a_mixture_is_the_mean_of_its_sources_by_share(tiny: Path) -> None:
    trainer = trainer_of(mixed(tiny, eval={"tokens": 0}, train={"micro_batch_size": 8}))
    expected = []
    for source in trainer.mixture.sources:
        reader = TokenReader(source.folder, source.manifest, "val")
        windows = torch.from_numpy(windows_at(reader, evaluation_starts(reader, 16, 0), 16))
        assert len(windows) % 8 != 0, "the last batch of each source should be a short one"
        with torch.no_grad():
            expected.append(trainer.model(windows[:, :-1], windows[:, 1:]).item())
    assert evaluate(trainer) == pytest.approx(0.7 * expected[0] + 0.3 * expected[1], rel=1e-5)
    assert trainer.evaluation.run(trainer.model).by_source == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)


def test_a_document_mask_reaches_training_and_evaluation(tiny: Path) -> None:
    """Where end-of-text stands it opens a document: the loss is that of the documents taken one by one."""
    texts = ["abcabc", "xyz", "hello there", "a" * 30, "bcd" * 9]
    write_documents(tiny / "data" / "packed", {"train": [texts], "val": [texts]})
    data = {"dataset": "packed", "document_mask": True}
    trainer = trainer_of(tiny_config(tiny, data=data, eval={"tokens": 0}))
    end = trainer.mixture.tokenizer["end_of_text"]

    def loss_one_by_one(windows: torch.Tensor) -> float:
        losses = []
        for window in windows.tolist():
            borders = [0, *(at for at, token in enumerate(window[:-1]) if token == end and at), len(window) - 1]
            for start, stop in pairwise(borders):
                part = torch.tensor([window[start : stop + 1]])
                logits = trainer.model.logits(part[:, :-1])[0]
                losses += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none").tolist()
        return sum(losses) / len(losses)

    train_windows = torch.from_numpy(trainer.mixture.batch(0, 8))
    val_windows = torch.from_numpy(windows_at(trainer.evaluation.readers[0], trainer.evaluation.starts[0], 16))
    assert (train_windows[:, 1:-1] == end).any() and (val_windows[:, 1:-1] == end).any()
    assert evaluate(trainer) == pytest.approx(loss_one_by_one(val_windows), rel=1e-5)
    expected = loss_one_by_one(train_windows)
    assert trainer.train_step().loss == pytest.approx(expected, rel=1e-5)
    crossing = trainer_of(tiny_config(tiny, data=data | {"document_mask": False}))
    assert crossing.train_step().loss != pytest.approx(expected, rel=1e-5)


def poisoned(trainer: Trainer, steps: set[int], value: float) -> Trainer:
    """The trainer with a model whose loss is `value` times itself at the given steps."""

    def spoil(module: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * value if trainer.step in steps and module.training else loss

    trainer.model.register_forward_hook(spoil)
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_never_reaches_the_weights(tiny: Path, value: float) -> None:
    trainer = poisoned(trainer_of(tiny_config(tiny)), {1}, value)
    trainer.train_step()
    trainer.step += 1
    before = weights(trainer)
    moments = {id(p): state["exp_avg"].clone() for p, state in trainer.optimizer.state.items()}
    result = trainer.train_step()
    assert result.outcome is Outcome.NOT_FINITE
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), name
    for parameter, state in trainer.optimizer.state.items():
        assert torch.equal(state["exp_avg"], moments[id(parameter)])
    trainer.step += 1
    assert trainer.train_step().outcome is Outcome.TAKEN


def test_bad_steps_are_written_down_with_their_samples_and_training_goes_on(tiny: Path) -> None:
    config = tiny_config(tiny, train={"max_bad_steps": 2})
    trainer = poisoned(trainer_of(config), {3, 6}, math.nan)
    metrics = FileMetrics(RunFolder(config.run_dir))
    assert trainer.fit(metrics, StopRequest()) == ""
    metrics.close()
    rows = [json.loads(line) for line in (config.run_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["first_sample"], row["samples"]) for row in rows] == [(3, 24, 8), (6, 48, 8)]
    assert {row["reason"] for row in rows} == {"not finite"}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_too_many_bad_steps_in_a_row_are_a_divergence(tiny: Path) -> None:
    trainer = poisoned(trainer_of(tiny_config(tiny, train={"max_bad_steps": 3})), {4, 5, 6, 7}, math.nan)
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 6.*weights of step 4 were kept"):
        trainer.fit(Metrics(), StopRequest())


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.campaign), "aot_eager"])
def test_the_compiled_model_follows_the_eager_one(tiny: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Generating C++ takes 20 s: by default what is captured runs as it is."""
    graphs = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    eager = trained(tiny_config(tiny, run={"compile": "off"}), steps=5)[1]
    trainer, compiled = trained(tiny_config(tiny, run={"compile": "on"}), steps=5)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert len(trainer.model.blocks) > 1 and graphs.frame_count == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_scales_its_loss_and_halves_the_scale_at_an_overflow(tiny: Path, optimizer: str) -> None:
    """On a GPU only; the scaler itself also runs on a CPU, so that its part of the step can be seen here."""
    config = tiny_config(tiny, optimizer={"name": optimizer})
    exact = trained(config, steps=3)[1]
    trainer = Trainer(config, ALONE, Mixture(config), model=trainer_of(config).model, dtype=torch.float16, preview=None)
    torch.manual_seed(0)
    assert trainer.train_step().loss == pytest.approx(exact[0], rel=1e-2)
    assert trainer.scaler.get_scale() == 65536
    trainer.scaler.update(2.0**60)
    before = weights(trainer)
    assert trainer.train_step().outcome is Outcome.RESCALED
    assert trainer.scaler.get_scale() == 2.0**59
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_overflows_of_scaled_gradients_are_no_bad_steps_while_the_scale_can_fall(tiny: Path) -> None:
    """More of them in a row than train.max_bad_steps; a loss that is not finite, or a scale below 1, still counts."""
    config = tiny_config(tiny, train={"max_bad_steps": 2})
    trainer = Trainer(config, ALONE, Mixture(config), model=trainer_of(config).model, dtype=torch.float16, preview=None)
    trainer.scaler.scale(torch.zeros(()))  # which makes the scale
    trainer.scaler.update(2.0**40)
    before = weights(trainer)
    for count in range(1, 6):
        assert trainer.train_step().outcome is Outcome.RESCALED
        assert trainer.scaler.get_scale() == 2.0 ** (40 - count) and trainer.guard.bad_steps == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    trainer.scaler.update(1024.0)
    assert trainer.train_step().outcome is Outcome.TAKEN
    assert trainer.guard.judge(math.nan, math.nan, trainer.scaler) is Outcome.NOT_FINITE
    trainer.scaler.update(0.5)
    assert trainer.guard.judge(2.0, math.inf, trainer.scaler) is Outcome.NOT_FINITE
    assert trainer.guard.bad_steps == 2
