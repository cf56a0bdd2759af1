"""The training loop: what a step does, and what happens between steps."""

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipeline.budget import accumulation_steps, flops_per_token
from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.errors import Diverged
from pipeline.log import ProgressReport, logger
from pipeline.machine.device import autocast, device_name
from pipeline.machine.gpus import peak_flops
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import whole
from pipeline.runs import Position, State, Status
from pipeline.vocabulary.specs import from_spec
from train import parallel
from train.data.batches import Prefetcher, model_inputs
from train.evaluation import Evaluation, ValLoss
from train.metrics import Metrics, Row, Throughput, val_columns
from train.optimizer.groups import build_optimizer
from train.optimizer.schedule import learning_rate
from train.preview import Preview, Previews
from train.replicas import check_replicas
from train.saving import Checkpoints
from train.spikes import Outcome, StepGuard, StepResult
from train.stop import StopRequest


@dataclass(frozen=True)
class Agreement:
    """What all ranks do after this step: stop for a reason, save now, or give up because the last
    save failed.
    """

    reason: str
    save_now: bool
    save_failed: bool


class Trainer:
    """A model on its way through `train.max_steps` optimizer steps; `step` counts the completed
    ones.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        mixture: Mixture,
        *,
        model: LanguageModel,
        dtype: torch.dtype,
        preview: Preview | None,
    ) -> None:
        self.config, self.world, self.mixture, self.model, self.dtype = config, world, mixture, model, dtype
        self.step, train = 0, config.train
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
        tokenizer = from_spec(mixture.tokenizer, mixture.sources[0].folder)
        self.previews = Previews(config, world, tokenizer, dtype=dtype, preview=preview)
        self.checkpoints = Checkpoints(
            config, world, model=model, optimizer=self.optimizer, scaler=self.scaler, guard=self.guard,
            tokenizer=tokenizer, dataset=mixture.fingerprint,
        )  # fmt: skip

    def replicate(self) -> None:
        """From here on the ranks train one model together: each has a replica or a shard, and
        gradients are averaged.
        """
        self.wrapped = parallel.replicate(self.model, self.world)
        if isinstance(self.wrapped, DistributedDataParallel):
            self.settle_buckets()

    def settle_buckets(self) -> None:
        """Two throw-away passes. After its first backward pass DDP sorts gradients into new buckets,
        by the order in which they came, and so adds them up in another order: a resumed run of 3 or
        more ranks would take its first step with other rounding than the run that went through.
        """
        windows = torch.zeros(self.config.train.micro_batch_size, self.config.model.block_size + 1, dtype=torch.long)
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # for dropout
            for _ in range(2):
                with autocast(self.world.device, self.dtype):
                    loss = self.wrapped(*model_inputs(windows, self.config, self.mixture, self.world.device))
                loss.backward()
                self.optimizer.zero_grad(set_to_none=True)

    def train_step(self) -> StepResult:
        """One optimizer step over `tokens_per_step` tokens; one that is not finite, or a spike,
        leaves the weights alone.
        """
        # A function of the step: there is no schedule to save or restore.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        losses = torch.zeros((), device=self.world.device)
        for number in range(self.accumulation):
            inputs, targets, documents = self.micro_batch(number)
            with parallel.reduce_gradients(self.wrapped, now=number == self.accumulation - 1):
                with autocast(self.world.device, self.dtype):
                    loss = self.wrapped(inputs, targets, documents)
                self.scaler.scale(loss / self.accumulation).backward()
            losses += loss.detach()
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.optimizer.grad_clip or float("inf")
        parameters = list(self.model.parameters())
        norm = whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        # Gradients were averaged over the ranks, so the norm is the same on all of them, but for
        # rounding where replicas of a model are sharded each in its own group. Their mean is the
        # same to the bit: so are the clipping and the outcome.
        means = self.world.sum(torch.stack([losses / self.accumulation, norm])) / self.world.size
        clip_grads_with_norm_(parameters, max_norm, means[1])
        loss_value, norm_value = means.tolist()
        outcome = self.guard.judge(loss_value, norm_value)
        if outcome is Outcome.TAKEN:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_value, norm_value, outcome)

    def micro_batch(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and documents of this rank's micro-batch in the step."""
        size = self.config.train.micro_batch_size
        position = number * self.world.size + self.world.rank
        if self.config.model.dropout:
            # By position in the global batch, so that the masks are the same on any number of
            # ranks, and after a resume.
            seed = self.config.run.seed, self.step, position
            torch.manual_seed(xxhash.xxh3_64_intdigest(b"dropout:%d:%d:%d" % seed))
        windows = self.batches.batch(self.first_sample + position * size)
        return model_inputs(windows, self.config, self.mixture, self.world.device)

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

    def fit(self, metrics: Metrics, stop: StopRequest) -> str:
        """Train to the last step, or to a reason to stop, which is returned. Raises Diverged."""
        max_steps, reason = self.config.train.max_steps, ""
        with ProgressReport("train", max_steps, "steps", done=self.step) as progress:
            self.throughput.start()
            while self.step < max_steps and not reason:
                result = self.train_step()
                self.throughput.lap()
                if result.outcome is not Outcome.TAKEN:
                    self.report_bad_step(result, metrics)
                self.checkpoints.reserve()
                self.step += 1
                reason = self.between_steps(result, metrics, stop)
                tokens_per_s = self.config.train.tokens_per_step / self.throughput.last_step_s
                progress.advance(1, f"loss {result.loss:.4f}, {tokens_per_s:,.0f} tokens/s")
        self.checkpoints.wait()
        return reason

    def between_steps(self, result: StepResult, metrics: Metrics, stop: StopRequest) -> str:
        """What the completed step calls for: checks, an evaluation, a row, a checkpoint. Returns a
        reason to stop.
        """
        config = self.config
        agreed = self.agree(stop)
        if agreed.save_failed:
            self.checkpoints.wait()  # raises the error of the save
        if config.parallel.check_every_steps and self.step % config.parallel.check_every_steps == 0:
            check_replicas(self.model, self.world, self.step)
        keep_every_steps = config.checkpoint.keep_every_steps
        permanent = keep_every_steps and self.step % keep_every_steps == 0
        planned = bool(permanent) or self.is_due(config.checkpoint.every_steps)
        evaluating = False
        if config.eval.every_steps and not agreed.reason:  # a run that stops in a hurry is not evaluated
            # Every planned checkpoint is, so that `best` can compare them.
            evaluating = planned or self.is_due(config.eval.every_steps)
        val_loss = None
        if evaluating:
            with self.throughput.paused():
                val_loss = self.evaluation.run(self.model)
        if evaluating or self.is_due(config.log.every_steps):
            metrics.write(self.row(result, val_loss))
        if evaluating:
            with self.throughput.paused():
                self.previews.show(self.model, self.step, metrics)
        # After the row: a crash in between drops nothing, as a resume writes the row again.
        if planned or agreed.reason or agreed.save_now:
            with self.throughput.paused():
                self.checkpoints.save(self.step, None if val_loss is None else val_loss.mean)
        metrics.keep_alive(self.status(State.RUNNING))
        return agreed.reason

    def is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.config.train.max_steps

    def agree(self, stop: StopRequest) -> Agreement:
        """Every rank gets the same answer: what one of them noticed, all of them do."""
        step_s = self.throughput.last_step_s + self.evaluation.last_s + self.previews.last_s
        saver = self.checkpoints.saver
        reason = stop.reason(step_s, saver.last_save_s)
        # One all-reduce per step for all three: a second one would cost as much again in latency.
        flags = [bool(reason), self.checkpoints.requested, saver.failed]
        noticed = torch.tensor(flags, dtype=torch.float, device=self.world.device)
        stopping, saving, failed = self.world.sum(noticed).tolist()
        return Agreement(reason or ("another rank asked for it" if stopping else ""), bool(saving), bool(failed))

    def report_bad_step(self, result: StepResult, metrics: Metrics) -> None:
        """Record the samples of a step that left the weights alone. Raises Diverged after too many
        in a row.
        """
        # As text, since what is worth knowing here is inf or nan.
        why, loss, norm = result.outcome.value, str(result.loss), str(result.grad_norm)
        if self.world.is_first:
            logger.warning("step %d skipped (%s): loss %s, gradient norm %s", self.step, why, loss, norm)
        row = {"step": self.step, "first_sample": self.first_sample, "samples": self.samples_per_step}
        metrics.write_bad_step(row | {"reason": why, "loss": loss, "grad_norm": norm})
        bad_steps = self.guard.bad_steps
        if bad_steps >= self.config.train.max_bad_steps:
            good = self.step - bad_steps + 1
            kept = "no step reached the weights"
            if good:
                kept = f"the weights of step {good} were kept: {self.checkpoints.save_last_good(good)}"
            raise Diverged(
                f"{bad_steps} steps in a row, up to step {self.step}, had a loss or gradient that is not finite, or a spike: "
                f"{kept}; try a lower optimizer.lr or a longer warmup"
            )

    def row(self, result: StepResult, val_loss: ValLoss | None) -> Row:
        """A row of metrics.jsonl; the speeds are those since the last row."""
        lr = self.optimizer.param_groups[0]["lr"]
        tokens = self.position.tokens
        row: Row = {"step": self.step, "tokens": tokens, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
        row |= self.throughput.columns(self.batches.waited_s)
        self.batches.waited_s = 0.0
        if val_loss is not None:
            row |= val_columns(val_loss, self.mixture, self.first_sample)
            logger.info("step %d: loss %.4f, val loss %.4f, lr %.2e", self.step, result.loss, val_loss.mean, lr)
        return row

    def status(self, state: State, reason: str = "") -> Status:
        step_s, last_save_s = self.throughput.last_step_s or None, self.checkpoints.saver.last_save_s
        return Status(state, self.step, reason, step_s=step_s, last_save_s=last_save_s)
