"""The training loop: what a step does, and what happens between steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline.budget import accumulation_steps, flops_per_token
from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.errors import Diverged
from pipeline.log import logger
from pipeline.machine.device import autocast, device_name, to_host
from pipeline.machine.gpus import peak_flops
from pipeline.machine.ranks import World
from pipeline.machine.terminal import RunDisplay
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import whole
from pipeline.runs import Position, Row, RunFolder
from pipeline.vocabulary.specs import from_spec
from train import parallel
from train.checks.replicas import check_replicas
from train.data.batches import Prefetcher, model_inputs
from train.evaluation import Evaluation, ValLoss
from train.metrics.layers import LayerNorms
from train.metrics.live import LiveStatus, Throughput, peak_memory_bytes
from train.metrics.profiler import profiling
from train.metrics.record import Metrics, val_columns
from train.optimizer.groups import build_optimizer
from train.optimizer.schedule import learning_rate
from train.preview import Preview, Previews
from train.saving import Checkpoints
from train.spikes import Outcome, StepGuard
from train.stop import MAX_MINUTES, StopRequest


@dataclass(frozen=True)
class StepResult:
    """What every rank knows of a step: `loss`, the mean over all tokens of the global batch,
    `grad_norm`, before clipping, and what became of it; and what all do after it: stop for a reason,
    save now, evaluate nothing as time is short.
    """

    loss: float
    grad_norm: float
    outcome: Outcome
    reason: str
    save_now: bool
    in_haste: bool


class Trainer:
    """A model on its way through `train.max_steps` optimizer steps; `step` counts the completed
    ones, and `last_step` is an earlier one where train.max_minutes is used up before.
    """

    def __init__(
        self, config: Config, world: World, mixture: Mixture, *,
        model: LanguageModel, dtype: torch.dtype, preview: Preview | None,
    ) -> None:  # fmt: skip
        self.config, self.world, self.mixture, self.model, self.dtype = config, world, mixture, model, dtype
        self.step, self.last_step, train = 0, config.train.max_steps, config.train
        self.accumulation = accumulation_steps(config, world.size)
        # The model as training calls it: `replicate` wraps it, to average gradients over the ranks.
        self.wrapped: torch.nn.Module = model
        self.batches = Prefetcher(mixture, train.micro_batch_size, train.micro_batch_size * world.size, world.device)
        self.optimizer = build_optimizer(model, config.optimizer)
        # Disabled, it passes everything through: only float16 needs its gradients scaled to stay
        # above underflow.
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.guard = StepGuard(train)
        peak = peak_flops(device_name(world.device))
        flops = flops_per_token(config.model, model.vocab_size)
        self.throughput = Throughput(train.tokens_per_step, flops, peak and peak * world.size)
        self.evaluation = Evaluation(config, world, mixture, dtype)
        self.layers = LayerNorms(model, config.log.every_steps)
        self.status = LiveStatus(RunFolder(config.run_dir))
        # The first error of this rank that the others may not have: they learn of it in the next step.
        self.fault: Exception | None = None
        self.stop: StopRequest | None = None  # while `fit` runs
        # False while an update is under way: then a checkpoint would be of no step.
        self.is_consistent = True
        tokenizer = from_spec(mixture.tokenizer, mixture.sources[0].folder)
        self.previews = Previews(config, world, tokenizer, dtype=dtype, preview=preview)
        self.checkpoints = Checkpoints(
            config, world, model=model, optimizer=self.optimizer, scaler=self.scaler, guard=self.guard,
            tokenizer=tokenizer, dataset=mixture.fingerprint,
        )  # fmt: skip
        # The last start's, as all other times in the status, until this one has saved.
        self.checkpoints.saver.last_save_s = self.status.now.last_save_s

    def replicate(self) -> None:
        """From here on the ranks train one model together: each has a replica or a shard, and
        gradients are averaged.
        """
        self.wrapped = parallel.replicate(self.model, self.world)

    def train_step(self) -> StepResult:
        """One optimizer step over `tokens_per_step` tokens; one that is not finite, or a spike,
        leaves the weights alone.

        Where a rank has a fault, all ranks raise together, and the step is not taken.
        """
        with self.noticing():
            self.checkpoints.saver.check()
            self.status.check()
        # A function of the step: there is no schedule to save or restore.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        loss = self.compute_gradients()
        parameters = list(self.model.parameters())
        norm = whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        means, reason = self.agree(loss, norm)
        read = to_host(means)
        self.layers.before_update(self.step)
        clip_grads_with_norm_(parameters, self.config.optimizer.grad_clip or float("inf"), means[1])
        self.is_consistent = False
        # Decided on the device, so that a GPU goes on without the host; that hears of it meanwhile.
        self.optimizer.step_unless(self.guard.rejects(means[0], means[1]) | (means[2] > 0))
        self.layers.after_update()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss_value, norm_value, faulty, stopping, save_now, in_haste = read()
        self.world.watch.check()
        if faulty:
            self.end_together()
        if stopping:
            reason = next(filter(None, self.world.gather(reason)))
        if reason == MAX_MINUTES:  # evaluated and saved as the last step is
            self.last_step, reason = self.step + 1, ""
        outcome = self.guard.judge(loss_value, norm_value, self.scaler)
        return StepResult(loss_value, norm_value, outcome, reason=reason, save_now=save_now > 0, in_haste=in_haste > 0)

    def agree(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, str]:
        """(6,) on the device, the same on every rank: means of loss and gradient norm, and of what a
        rank has noticed, which is 0 where none has. Also this rank's reason to stop.

        All of it takes one all-reduce and one transfer a step.
        """
        reason = hasty = ""
        if self.stop is not None:
            needed_s = self.throughput.step_s + self.checkpoints.save_s
            used_up = self.world.is_first and self.checkpoints.left_s <= 0  # one rank's clock decides
            reason = self.stop.reason(needed_s) or (MAX_MINUTES if used_up else "")
            hasty = self.stop.deadline_reason(needed_s + (self.status.now.eval_s or 0.0))
        noticed = [self.fault is not None, bool(reason), self.checkpoints.requested, bool(hasty)]
        flags = torch.tensor(noticed, dtype=loss.dtype).to(loss.device, non_blocking=True)
        # Gradients were averaged over the ranks, so the norm is the same on all of them, but for
        # rounding where replicas of a model are sharded each in its own group. Their mean is the
        # same to the bit: so are the clipping and the outcome.
        return self.world.sum(torch.cat([torch.stack([loss, norm]), flags])) / self.world.size, reason

    def compute_gradients(self) -> Tensor:
        """Those of the step's batch, averaged over the ranks. Returns the mean loss of this rank's
        part of it.
        """
        losses = torch.zeros((), device=self.world.device)
        for number in range(self.accumulation):
            windows = self.micro_batch(number)
            with parallel.reduce_gradients(self.wrapped, now=number == self.accumulation - 1):
                loss = self.loss_of(windows)
                torch.autograd.backward(self.scaler.scale(loss / self.accumulation))
            losses += loss.detach()
        self.scaler.unscale_(self.optimizer)
        return losses / self.accumulation

    def loss_of(self, windows: Tensor) -> Tensor:
        """Of (micro_batch_size, block_size + 1) ids, with gradients."""
        with autocast(self.world.device, self.dtype):
            loss: Tensor = self.wrapped(*model_inputs(windows, self.config, self.mixture, self.world.device))
        return loss

    def blank_windows(self) -> Tensor:
        return torch.zeros(self.config.train.micro_batch_size, self.config.model.block_size + 1, dtype=torch.long)

    def micro_batch(self, number: int) -> Tensor:
        """The windows of ids of this rank's micro-batch in the step."""
        position = number * self.world.size + self.world.rank
        if self.config.model.dropout:
            # By position in the global batch, so that the masks are the same on any number of
            # ranks, and after a resume.
            seed = self.config.run.seed, self.step, position
            torch.manual_seed(xxhash.xxh3_64_intdigest(b"dropout:%d:%d:%d" % seed))
        brief = self.throughput.last_step_s > 0  # the first step of a start compiles
        self.world.watch.enter(f"reading the data of step {self.step}", waits=False, brief=brief)
        # For a batch that cannot be made, as the other ranks expect this one in their collectives.
        windows = self.blank_windows()
        with self.noticing():
            windows = self.batches.batch(self.first_sample + position * self.config.train.micro_batch_size)
        self.world.watch.enter(f"step {self.step}", brief=brief)
        return windows

    @property
    def position(self) -> Position:
        """How far the run is, the trunk included where it is a branch."""
        return self.checkpoints.began_at.at(self.step, self.config)

    @property
    def samples_per_step(self) -> int:
        return self.config.train.tokens_per_step // self.config.model.block_size

    @property
    def first_sample(self) -> int:
        """The global sample at which the current step's batch begins."""
        return self.position.sample

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Around what this rank does by itself, from which an error must not keep it from the
        collectives of the others: it ends all of them together in the next step.
        """
        try:
            yield
        except Exception as error:
            self.fault = self.fault or error

    def end_together(self) -> None:
        """Save, and raise the fault that a rank has noticed. All ranks call it together."""
        self.optimizer.zero_grad(set_to_none=True)
        self.checkpoints.save_rest(self.step)
        self.raise_fault()

    def raise_fault(self) -> None:
        """Where a rank has noticed a fault, end all of them. All ranks call it together."""
        with self.world.fail_together():
            if self.fault is not None:
                raise self.fault

    def save_alone(self) -> None:
        """On rank 0, where another rank has failed and takes part in no collective: save what it has,
        unless that is a shard, or half updated.
        """
        if self.is_consistent and not parallel.is_sharded(self.model):
            self.checkpoints.save_rest(self.step)

    def fit(self, metrics: Metrics, stop: StopRequest) -> str:
        """Train to the last step, or to a reason to stop, which is returned. Raises Diverged."""
        self.stop, reason = stop, ""
        if self.checkpoints.left_s <= 0:
            self.last_step = self.step
        if first_step_s := self.status.now.first_step_s:  # else a step is taken: nobody knows yet how long it is
            reason = stop.deadline_reason(first_step_s + self.checkpoints.save_s)
        reason = self.world.gather(reason)[0]  # the clock of one rank decides
        with RunDisplay(self.status.summary) as display, profiling(self.config, self.world.is_first) as profiled_step:
            self.throughput.start()
            if self.step < self.last_step:  # the first lap has it, as it compiles
                parallel.settle_buckets(self.wrapped, lambda: self.loss_of(self.blank_windows()), self.world.device)
            while self.step < self.last_step and not reason:
                result = self.train_step()
                self.throughput.lap()
                self.checkpoints.trained_s += self.throughput.last_step_s
                if result.outcome.is_bad:
                    self.report_bad_step(result, metrics)
                self.checkpoints.reserve()
                self.step += 1
                self.is_consistent = True
                self.between_steps(result, metrics)
                reason = result.reason
                profiled_step()
                with self.noticing():
                    display.step_ended(is_last=self.step == self.last_step)
        self.world.watch.enter("the last save")
        self.checkpoints.wait()
        self.status.update(last_save_s=self.checkpoints.saver.last_save_s)
        self.raise_fault()
        return reason

    def between_steps(self, result: StepResult, metrics: Metrics) -> None:
        """What the completed step calls for: checks, an evaluation, a row, a checkpoint."""
        config, eval_every = self.config, self.config.eval.every_steps
        self.world.watch.enter(f"what follows step {self.step}", waits=False)
        if config.parallel.check_every_steps and self.step % config.parallel.check_every_steps == 0:
            check_replicas(self.model, self.world, self.step)
        planned = self.is_due(config.checkpoint.every_steps) or self.is_due(config.checkpoint.keep_every_steps)
        # Every planned checkpoint is, so that `best` can compare them; a run that stops is in a hurry.
        evaluating = eval_every > 0 and not result.reason and (planned or self.is_due(eval_every))
        if evaluating and result.in_haste:
            evaluating = False
            logger.warning("step %d is not evaluated: the deadline is near", self.step)
        began, val_loss = time.monotonic(), None
        if evaluating:
            with self.throughput.paused():
                val_loss = self.evaluation.run(self.model)
            self.fault = self.fault or self.evaluation.fault
        with self.noticing():
            if evaluating or self.is_due(config.log.every_steps):
                metrics.write(self.row(result, val_loss))
        if val_loss is not None:
            # Even if the row failed: of a sharded model, all ranks take part.
            with self.noticing(), self.throughput.paused():
                self.previews.show(self.model, self.step, metrics)
            self.status.evaluated(val_loss.mean, self.mixture, eval_s=time.monotonic() - began)
        self.report(result)
        # After the row: a crash in between drops nothing, as a resume writes the row again.
        if planned or result.reason or result.save_now:
            with self.throughput.paused():
                self.checkpoints.save(self.step, None if val_loss is None else val_loss.mean)
            with self.noticing():
                metrics.write_event("save", self.step)

    def report(self, result: StepResult) -> None:
        """Bring what status.json says up to date."""
        step_s, lr = self.throughput.last_step_s, self.optimizer.param_groups[0]["lr"]
        self.status.step_ended(self.step, self.last_step, step_s, self.checkpoints.left_s)
        speed, save_s = self.config.train.tokens_per_step / step_s, self.checkpoints.saver.last_save_s
        now = {"loss": result.loss, "lr": lr, "tokens": self.position.tokens, "tokens_per_s": speed}
        self.status.update(**now, last_save_s=save_s, trained_s=self.checkpoints.trained_s)

    def is_due(self, every_steps: int) -> bool:
        """At the last step too; 0 is never."""
        return every_steps > 0 and (self.step % every_steps == 0 or self.step == self.last_step)

    def report_bad_step(self, result: StepResult, metrics: Metrics) -> None:
        """Record the samples of a step that left the weights alone. Raises Diverged after too many
        in a row.
        """
        # As text, since what is worth knowing here is inf or nan.
        why, loss, norm = result.outcome.value, str(result.loss), str(result.grad_norm)
        row = {"step": self.step, "first_sample": self.first_sample, "samples": self.samples_per_step}
        with self.noticing():
            metrics.write_bad_step(row | {"reason": why, "loss": loss, "grad_norm": norm})
        bad_steps = self.guard.bad_steps
        if bad_steps >= self.config.train.max_bad_steps:
            good = self.step - bad_steps + 1
            kept = "no step reached the weights"
            if good:
                kept = f"the weights of step {good} were kept: {self.checkpoints.save_last_good(good)}"
            with self.world.fail_together():
                raise Diverged(
                    f"{bad_steps} steps in a row, up to step {self.step}, had a loss or gradient that is not finite, or a "
                    f"spike: {kept}; try a lower optimizer.lr or a longer warmup"
                )

    def row(self, result: StepResult, val_loss: ValLoss | None) -> Row:
        """A row of metrics.jsonl; the speeds are those since the last row."""
        lr, tokens = self.optimizer.param_groups[0]["lr"], self.position.tokens
        row: Row = {"step": self.step, "tokens": tokens, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
        memory = {"memory_bytes": peak_memory_bytes(self.world.device)}
        row |= self.throughput.columns(self.batches.waited_s) | memory | self.layers.columns
        self.batches.waited_s = 0.0
        if val_loss is not None:
            row |= val_columns(val_loss, self.mixture, self.first_sample)
            logger.info("step %d: loss %.4f, val loss %.4f, lr %.2e", self.step, result.loss, val_loss.mean, lr)
        self.status.rows.append(row)
        return row
