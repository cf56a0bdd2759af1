"""What the steps of gpu_check.py share: device, sizes, deadlines, the report, and how a number is put beside its mark."""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here: a step that an alarm ends must not leave it half imported
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout

from pipeline.config.keys import Config
from pipeline.config.load import load_config
from pipeline.machine.device import device_name
from pipeline.machine.gpus import peak_flops

ROOT = Path(__file__).resolve().parents[1]
GPT2_VOCABULARY, TINY_VOCABULARY = 50257, 250
# Shares of the time, in order of what a failure would cost; together 300.
SHARES = {
    "environment": 10, "prepared": 15, "attention": 10, "logits": 10, "curves": 55, "one_rank_groups": 30,
    "training_speed": 85, "decoding_speed": 20, "profile": 10, "stop_and_resume": 35, "repeats": 20,
}  # fmt: skip
# What a share may be exceeded by while other steps have not used theirs.
PATIENCE = 1.5
# Left for the report and the exit of the process.
RESERVE_S = 3.0


class Late(BaseException):
    """A step has used up its time. Not an Exception: rows that catch those must not catch this."""


class NotMeasured(Exception):
    """What is not there, such as a peer: no failure."""


class Check:
    """The device, the sizes, the deadline and the report that all steps share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
        self.cuda, self.tiny, self.nanogpt = self.device.type == "cuda", bool(options.tiny), options.nanogpt
        self.vocabulary = TINY_VOCABULARY if self.tiny else GPT2_VOCABULARY
        self.out = Path(os.environ.get("OUT") or "gpu_check").resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.data = Path(tempfile.mkdtemp(prefix="gpu_check_"))
        self.ends = self.step_ends = time.monotonic() + options.seconds
        self.report: dict[str, Any] = {
            "argv": sys.argv[1:],
            "torch": torch.__version__,
            "device": device_name(self.device),
        }

    @property
    def peak(self) -> float | None:
        """FLOP/s."""
        return peak_flops(device_name(self.device))

    def step(self, name: str, work: Callable[["Check"], Any], remaining: list[str]) -> None:
        """Run one of the steps that remain, itself included, and record what became of it."""
        left = self.ends - time.monotonic() - RESERVE_S
        share = left * SHARES[name] / sum(SHARES[other] for other in remaining)
        entry = self.report.setdefault(name, {})
        started = time.monotonic()
        try:
            if left < 1:
                raise Late("no time is left for it")
            self.step_ends = started + min(PATIENCE * share, left)
            with alarm(self.step_ends - started):
                entry["result"] = work(self)
        except NotMeasured as reason:
            entry["not measured"] = str(reason)
        except (Late, Exception) as error:
            entry["error"] = described(error)
            entry["traceback"] = traceback.format_exc()[-3000:]
        finally:
            self.clear()
        entry |= {"seconds": round(time.monotonic() - started, 1), "share": round(share, 1)}
        self.write()
        print(
            f"{name} ({entry['seconds']} s): {json.dumps(entry.get('result', entry), default=str)[:1500]}", flush=True
        )

    def rows(self, name: str, plan: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Measure one row after the other; what was measured stays where a later one fails. Those for which the
        step's time is short, by the usual row, are not measured: there is `--only`, and there are more `--seconds`.
        """
        found: dict[str, Any] = {}
        self.report[name]["result"] = found
        took: list[float] = []
        for row, work in plan.items():
            started = time.monotonic()
            try:
                # Not by the longest: a peer that compiles for a minute would leave no row after it.
                if took and self.step_ends - started < statistics.median(took):
                    raise NotMeasured("no time left")
                found[row] = work()
                took.append(time.monotonic() - started)
            except NotMeasured as reason:
                found[row] = {"not measured": str(reason)}
            except (Late, Exception) as error:  # late: the step still says what it has found
                found[row] = {"error": described(error)}
                took.append(time.monotonic() - started)
            finally:
                self.clear()
            self.write()
            print(f"  {row}: {json.dumps(found[row], default=str)[:300]}", flush=True)
        return found

    def write(self) -> None:
        (self.out / "gpu_check.json").write_text(json.dumps(self.report, indent=1, default=str))

    def clear(self) -> None:
        """Graphs and memory of what came before, so that the next one starts as in a new process."""
        torch._dynamo.reset()
        if self.cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            except RuntimeError as error:
                self.report["device lost"] = described(error)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def median_s(self, work: Callable[[], Any], *, warm: int = 3, runs: int = 10) -> float:
        for _ in range(warm):
            work()
        return statistics.median(self.seconds(work) for _ in range(runs))

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def gpt2(self, *overrides: str) -> Config:
        """GPT-2 124M, or a toy of the same kind, with a program's keys changed; NotMeasured where it has them not."""
        toy = (
            "model.n_layer=2",
            "model.n_embd=64",
            "model.n_head=2",
            "model.block_size=64",
            "train.tokens_per_step=8192",
        )
        try:
            return load_config("gpt2-124m", [*(toy if self.tiny else ()), "train.micro_batch_size=2", *overrides])
        except Exception as error:
            raise NotMeasured(described(error)) from error

    def small(self, **keys: Any) -> Any:
        """A model that a CPU computes in seconds, as a reference."""
        n_layer, n_head, n_embd, block_size = (2, 2, 64, 64) if self.tiny else (6, 6, 384, 256)
        shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
        return replace(self.gpt2().model, **(shape | keys))


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Late in the main thread after so many seconds. It cannot end a hang inside CUDA: `timeout` around all of it does."""

    def late(*_: object) -> None:
        raise Late(f"after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def largest_gap(found: list[float], expected: list[float]) -> float:
    """Relative, of two curves; inf where one is not finite."""
    gaps = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def correct(value: float, at_most: float) -> dict[str, Any]:
    """A number beside its mark; past it, the step has failed."""
    return {"value": float(f"{value:.3g}"), "at most": at_most, "passed": value <= at_most}


def target(value: float | None, at_least: float) -> dict[str, Any]:
    """A speed beside its mark, which may be missed."""
    return {"value": value, "target": at_least, "reached": None if value is None else value >= at_least}


def findings(entry: Any, key: str, value: Any, path: str = "") -> Iterator[str]:
    """Where in the report `key` has this value, or any with `value` None."""
    if isinstance(entry, dict):
        if key in entry and (value is None or entry[key] is value):
            yield path.removeprefix(".").replace(".result", "")
        for name, child in entry.items():
            yield from findings(child, key, value, f"{path}.{name}")
