"""The training loop: one page for a step, one for what happens between steps."""

import json
import math
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline.budget import accumulation_steps
from pipeline.checkpoint.folder import (
    Description,
    State,
    best_val_loss,
    prune_checkpoints,
    read_description,
    verify_files,
    write_checkpoint,
)
from pipeline.checkpoint.load import load_optimizer, load_weights
from pipeline.checkpoint.pointers import checkpoint_folders, set_aside_after, set_pointer, step_of
from pipeline.config.keys import Config
from pipeline.config.load import to_dict
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.shards import TokenReader
from pipeline.dataset.windows import evaluation_starts, windows_at
from pipeline.errors import Diverged, UserError
from pipeline.log import LAYOUT, ProgressReport, logger, printable
from pipeline.machine.device import autocast, device_name
from pipeline.machine.gpus import peak_flops
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel, document_numbers
from pipeline.model.sharding import whole
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import Tokenizer, encode_prompt
from train import parallel
from train.data.prefetch import Prefetcher
from train.metrics import Metrics, Throughput
from train.optimizer.groups import build_optimizer
from train.optimizer.schedule import learning_rate
from train.replicas import check_replicas
from train.saving import Saver
from train.spikes import SkippedSamples, SpikeGuard
from train.stop import StopRequest


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over every token of the global batch; `grad_norm`: before clipping. The same on every rank.

    `taken`: whether the step reached the weights; else it was a spike, or not finite.
    """

    loss: float
    grad_norm: float
    taken: bool
    spike: bool = False


@dataclass(frozen=True)
class Agreement:
    """What all ranks do after this step: stop for a reason, save at once, or give up since the last save failed."""

    reason: str
    save_now: bool
    save_failed: bool


class Preview(Protocol):
    """Text with which a model goes on after a prompt. Stages do not know each other: who calls `run` brings it."""

    def __call__(
        self, model: LanguageModel, dtype: torch.dtype, tokenizer: Tokenizer, prompt: list[int], seed: int
    ) -> str: ...


class Trainer:
    """A model on its way through `train.max_steps` optimizer steps; `step` counts the completed ones."""

    def __init__(
        self,
        config: Config,
        world: World,
        model: LanguageModel,
        mixture: Mixture,
        dtype: torch.dtype,
        preview: Preview | None = None,
    ) -> None:
        self.config, self.world, self.model, self.mixture, self.dtype = config, world, model, mixture, dtype
        train = config.train
        self.accumulation = accumulation_steps(config, world.size)
        self.tokenizer = from_spec(mixture.tokenizer, mixture.sources[0].folder)
        self.preview = preview if config.eval.sample_prompt else None
        self.prompt = self.encoded_prompt() if self.preview else []
        self.batches = Prefetcher(mixture, train.micro_batch_size, train.micro_batch_size * world.size, world.device)
        self.val = [TokenReader(source.folder, source.manifest, "val") for source in mixture.sources]
        val_windows = config.eval.batches * train.micro_batch_size
        self.val_starts = [
            evaluation_starts(val, config.model.block_size, val_windows) if config.eval.every_steps else []
            for val in self.val
        ]
        self.val_losses: list[float] = []
        self.optimizer = build_optimizer(model, config.optimizer)
        # Disabled, it passes everything through: only float16 needs its gradients scaled to stay above underflow.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.parallel: torch.nn.Module = model
        peak = peak_flops(device_name(world.device))
        self.throughput = Throughput(train.tokens_per_step, model.flops_per_token(), peak and peak * world.size)
        self.checkpoints = config.run_dir / "checkpoints"
        self.save_now = config.run_dir / "save-now"
        self.saver = Saver()
        self.spikes = SpikeGuard(train.spike_z_score, train.spike_window)
        self.skipped = SkippedSamples(config.run_dir)
        self.step = 0
        self.bad_steps = 0
        self.best_val_loss = float("inf")
        self.last_evaluation_s = 0.0

    def replicate(self) -> None:
        """From here on the ranks train one model together: each has its copy or part, and gradients are averaged."""
        self.parallel = parallel.replicate(self.model, self.world)

    def train_step(self) -> StepResult:
        """One optimizer step over `tokens_per_step` tokens; one that is not finite, or a spike, leaves the weights alone."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        losses = torch.zeros((), device=self.world.device)
        for turn in range(self.accumulation):
            inputs, targets = self.micro_batch(turn)
            with parallel.reduce_gradients(self.parallel, now=turn == self.accumulation - 1):
                with self.autocast():
                    loss = self.parallel(inputs, targets, self.documents(inputs))
                self.scaler.scale(loss / self.accumulation).backward()
            losses += loss.detach()
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.optimizer.grad_clip or float("inf")
        parameters = list(self.model.parameters())
        norm = whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        # Gradients were averaged over the ranks, so the norm is the same on all of them, but for rounding where copies of
        # a model are sharded each in its own group. Their mean is the same to the bit: so are the clipping and the verdict.
        means = self.world.sum(torch.stack([losses / self.accumulation, norm])) / self.world.size
        clip_grads_with_norm_(parameters, max_norm, means[1])
        loss_value, norm_value = means.tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        spike = finite and self.spikes.is_spike(norm_value)
        if finite and not spike:
            self.scaler.step(self.optimizer)
            self.spikes.observe(norm_value)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_value, norm_value, finite and not spike, spike)

    def micro_batch(self, turn: int) -> tuple[Tensor, Tensor]:
        """This rank's `turn`-th micro-batch of the step; its dropout masks depend on its place in the global batch only."""
        size = self.config.train.micro_batch_size
        place = turn * self.world.size + self.world.rank
        if self.config.model.dropout:
            torch.manual_seed(xxhash.xxh3_64_intdigest(b"dropout:%d:%d:%d" % (self.config.run.seed, self.step, place)))
        return self._to_device(self.batches.batch(self.first_sample + place * size))

    def documents(self, inputs: Tensor) -> Tensor | None:
        """The number of each token's document in its window, or None where attention may cross documents."""
        if not self.config.data.document_mask:
            return None
        return document_numbers(inputs, self.tokenizer.end_of_text)

    def autocast(self) -> torch.autocast:
        return autocast(self.world.device, self.dtype)

    @property
    def first_sample(self) -> int:
        """The global sample at which the current step's batch begins."""
        return self.step * self.samples_per_step + self.skipped.before(self.step)

    @property
    def samples_per_step(self) -> int:
        return self.config.train.tokens_per_step // self.config.model.block_size

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the fixed windows of the val split; the ranks share them, and all get the result.

        Of a mixture it is the mean of its sources' losses by their share; `val_losses` keeps each.
        """
        started = time.monotonic()
        self.model.eval()
        size = self.config.train.micro_batch_size
        batches = [
            (source, starts[at : at + size])
            for source, starts in enumerate(self.val_starts)
            for at in range(0, len(starts), size)
        ]
        totals = torch.zeros(len(self.val), dtype=torch.float64)
        for first in range(0, len(batches), self.world.size):
            place = first + self.world.rank
            # All ranks gather sharded weights in each turn: one that has no batch left repeats another, and counts it 0.
            source, starts = batches[place % len(batches)]
            inputs, targets = self._to_device(
                torch.from_numpy(windows_at(self.val[source], starts, self.config.model.block_size))
            )
            with self.autocast():
                loss = self.model(inputs, targets, self.documents(inputs)).cpu()
            totals[source] += loss * len(starts) if place < len(batches) else 0
        self.model.train()
        parallel.reshard(self.model)
        totals = totals.to(self.world.device, torch.float32 if self.world.device.type == "mps" else None)
        sums = self.world.sum(totals).tolist()
        self.val_losses = [total / len(starts) for total, starts in zip(sums, self.val_starts, strict=True)]
        self.last_evaluation_s = time.monotonic() - started
        return sum(source.share * loss for source, loss in zip(self.mixture.sources, self.val_losses, strict=True))

    def encoded_prompt(self) -> list[int]:
        """The ids of eval.sample_prompt. Raises UserError, now and not at the first evaluation."""
        try:
            return encode_prompt(self.config.eval.sample_prompt, self.tokenizer)
        except UserError as error:
            raise UserError(f"eval.sample_prompt: {error}") from None

    def show_sample(self, metrics: Metrics | None) -> None:
        """Let rank 0 go on from eval.sample_prompt, for TensorBoard and the log. Training takes no notice: the random numbers
        follow from the seed and the step, and are nobody else's.
        """
        if self.preview is None:
            return
        started = time.monotonic()
        model = parallel.whole_model(self.model, self.world)
        if model and metrics:
            seed = xxhash.xxh3_64_intdigest(b"sample:%d:%d" % (self.config.run.seed, self.step))
            # A copy is on the CPU, which may compute in nothing less.
            dtype = self.dtype if model is self.model else torch.float32
            try:
                more = self.preview(model, dtype, self.tokenizer, self.prompt, seed)
                text = self.config.eval.sample_prompt + more
            except (UserError, torch.OutOfMemoryError) as error:  # no reason to end a run
                text = f"no sample: {error}"
            shown = printable(text, keep=LAYOUT)
            metrics.write_text("sample", shown, self.step)
            logger.info("step %d: sample\n%s", self.step, textwrap.indent(shown, "    "))
        self.last_evaluation_s += time.monotonic() - started

    def fit(self, metrics: Metrics | None, stop: StopRequest) -> str:
        """Train to the last step, or to a reason to stop, which is returned. Raises Diverged. `metrics`: rank 0 only."""
        config, reason = self.config, ""
        with ProgressReport("train", config.train.max_steps, "steps", done=self.step) as progress:
            while self.step < config.train.max_steps and not reason:
                with self.throughput.timed():
                    result = self.train_step()
                if result.spike and self.rewind(result, metrics):
                    progress.advance(self.step - progress.done)
                    continue
                self.judge(result)
                if self.world.is_first and self.saver.unused:
                    self.saver.reserve(State.of(self.model, self.optimizer))
                self.step += 1
                reason = self.between_steps(result, metrics, stop)
                tokens_per_s = config.train.tokens_per_step / self.throughput.last_step_s
                progress.advance(1, f"loss {result.loss:.4f}, {tokens_per_s:,.0f} tokens/s")
        with self.world.fail_together():
            self.saver.wait()
        return reason

    def between_steps(self, result: StepResult, metrics: Metrics | None, stop: StopRequest) -> str:
        """What the step just completed calls for: checks, an evaluation, a row, a checkpoint. Returns a reason to stop."""
        config = self.config
        agreed = self.agree(stop)
        if agreed.save_failed:
            with self.world.fail_together():
                self.saver.wait()
        if config.parallel.check_every_steps and self.step % config.parallel.check_every_steps == 0:
            check_replicas(self.model, self.world, self.step)
        planned = self.is_due(config.checkpoint.every_steps)
        # Every planned checkpoint is evaluated, so that `best` can compare; one made in a hurry is not.
        evaluating = (
            bool(config.eval.every_steps) and not agreed.reason and (planned or self.is_due(config.eval.every_steps))
        )
        val_loss = self.evaluate() if evaluating else None
        if metrics and (evaluating or self.is_due(config.log.every_steps)):
            metrics.write(self.row(result, val_loss))
        if evaluating:
            self.show_sample(metrics)
        if planned or agreed.reason or agreed.save_now:
            self.save(val_loss)
        return agreed.reason

    def is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.config.train.max_steps

    def judge(self, result: StepResult) -> None:
        """Count a step that left the weights alone and write down its samples. Raises Diverged after too many in a row."""
        if result.taken:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        bad = {"step": self.step, "first_sample": self.first_sample, "samples": self.samples_per_step}
        if self.world.is_first:
            logger.warning("step %d skipped: loss %s, gradient norm %s", self.step, result.loss, result.grad_norm)
            with (self.config.run_dir / "bad_steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(bad | {"loss": str(result.loss), "grad_norm": str(result.grad_norm)}) + "\n")
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise Diverged(
                f"{self.bad_steps} steps in a row, up to step {self.step}, had no finite loss and gradient, or a spike: "
                f"the weights of step {self.step - self.bad_steps + 1} were kept; try a lower optimizer.lr or a longer warmup"
            )

    def rewind(self, result: StepResult, metrics: Metrics | None) -> bool:
        """Back to the last planned checkpoint, past the samples taken since then; False where there is none to go to."""
        with self.world.fail_together():
            self.saver.wait()
            target = self.rewind_target() if self.world.is_first else None
        target = self.world.gather(target)[0]
        if target is None:
            return False
        spike_step, next_sample = self.step, self.first_sample + self.samples_per_step
        self.restore(target)
        row = {"step": self.step, "first_sample": self.first_sample, "samples": next_sample - self.first_sample}
        if self.world.is_first:  # before the row: a start from a later checkpoint would misread it
            set_pointer(self.checkpoints, "latest", target)
        self.skipped.add(row | {"spike_at": spike_step, "grad_norm": result.grad_norm}, on_disk=self.world.is_first)
        if metrics:
            set_aside_after(self.checkpoints, self.step)
            metrics.rewind(self.step)
            logger.warning(
                "step %d: gradient norm %.3g is a spike; back to step %d, past the %d samples from %d on",
                spike_step, result.grad_norm, self.step, row["samples"], row["first_sample"],
            )  # fmt: skip
        if self.skipped.rewinds_to(self.step) >= self.config.train.max_bad_steps:
            raise Diverged(
                f"{self.config.train.max_bad_steps} spikes of the gradient norm sent the run back to step {self.step}: "
                "try a lower optimizer.lr, or a higher train.spike_z_score"
            )
        return True

    def rewind_target(self) -> Path | None:
        """The newest checkpoint that every_steps called for, verified: one of a stop would lead elsewhere than without it."""
        every_steps = self.config.checkpoint.every_steps
        planned = [path for path in checkpoint_folders(self.checkpoints) if step_of(path) % every_steps == 0]
        if not planned:
            return None
        verify_files(planned[-1], read_description(planned[-1]))
        return planned[-1]

    def agree(self, stop: StopRequest) -> Agreement:
        """Every rank gets the same answer: what one of them noticed, all of them do."""
        own = stop.reason(self.throughput.last_step_s + self.last_evaluation_s, self.saver.last_save_s)
        # While a save is in flight the file may be the one it is about to remove.
        save_now = self.world.is_first and not self.saver.busy and self.save_now.exists()
        noticed = torch.tensor([bool(own), save_now, self.saver.failed], dtype=torch.float, device=self.world.device)
        stopping, saving, failed = self.world.sum(noticed).tolist()
        return Agreement(own or ("another rank asked for it" if stopping else ""), bool(saving), bool(failed))

    def save(self, val_loss: float | None) -> None:
        """Have rank 0 write a checkpoint while training goes on, and let `latest`, and `best` where it is, name it."""
        measured = float("inf") if val_loss is None else val_loss
        best = measured < self.best_val_loss
        self.best_val_loss = min(measured, self.best_val_loss)
        state = State.of(self.model, self.optimizer)
        if not self.world.is_first:
            state.hand_in()
            return
        description = Description(
            step=self.step,
            tokens=self.step * self.config.train.tokens_per_step,
            config=to_dict(self.config),
            tokenizer=self.tokenizer.spec(),
            dataset=self.mixture.fingerprint,
            val_loss=val_loss,
            scaler=self.scaler.state_dict(),
            bad_steps=self.bad_steps,
            grad_norms=self.spikes.norms,
        )
        asked_for = self.save_now.exists()

        def write(state: State) -> Path:
            folder = write_checkpoint(
                self.checkpoints, state, self.model, self.tokenizer, description=description, best=best
            )
            if asked_for:
                self.save_now.unlink(missing_ok=True)
            prune_checkpoints(self.checkpoints, self.config.checkpoint.keep, self.config.checkpoint.every_steps)
            return folder

        self.saver.start(state, write)

    def restore(self, folder: Path) -> None:
        """Go on from a verified checkpoint: what is not in it follows from the seed and the step."""
        description = read_description(folder)
        load_weights(self.model, folder)
        load_optimizer(self.optimizer, self.model, folder)
        if description.scaler:  # empty where the run was not in float16
            self.scaler.load_state_dict(description.scaler)
        self.step, self.bad_steps = description.step, description.bad_steps
        self.spikes.restore(description.grad_norms)
        self.best_val_loss = best_val_loss(self.checkpoints)

    def row(self, result: StepResult, val_loss: float | None) -> dict[str, Any]:
        """A row of metrics.jsonl; the speeds are those since the last row."""
        lr = self.optimizer.param_groups[0]["lr"]
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.config.train.tokens_per_step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": self.throughput.tokens_per_s,
            "mfu": self.throughput.mfu,
            "data_wait": self.batches.waited_s / max(self.throughput.seconds, 1e-9),  # part of the steps' time
        }
        self.throughput.restart()
        self.batches.waited_s = 0.0
        if val_loss is not None:
            row |= {"val_loss": val_loss} | self.source_columns()
            logger.info("step %d: loss %.4f, val loss %.4f, lr %.2e", self.step, result.loss, val_loss, lr)
        return row

    def source_columns(self) -> dict[str, float]:
        """Of a mixture, each source's part in a row with a val_loss."""
        if len(self.mixture.sources) == 1:
            return {}
        columns: dict[str, float] = {}
        progress = self.mixture.progress(self.first_sample)
        for (name, (tokens, epochs)), loss in zip(progress.items(), self.val_losses, strict=True):
            columns |= {f"val_loss_{name}": loss, f"tokens_{name}": tokens, f"epochs_{name}": epochs}
        return columns

    def _to_device(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of windows (B, T + 1): the targets are the inputs one token further on."""
        windows = windows.to(self.world.device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]
