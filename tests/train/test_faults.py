"""Faults of the machine, the data and other ranks: one true line, the exit code, and what is left on disk."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, overrides, tiny_config
from test_kills import last_row, ranks_of
from test_train_run import status

from pipeline.checkpoint.folder import read_description, verify_files
from pipeline.checkpoint.pointers import pointed_folder, step_of
from pipeline.config.keys import Config

pytestmark = pytest.mark.slow
STARTED: list[subprocess.Popen[str]] = []
RANK = "import os, pathlib, sys, time\nRANK = os.environ.get('RANK', '0')\n"


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A test that fails midway leaves no training behind, which would take the machine's cores for ever."""
    yield
    for process in STARTED:
        if process.poll() is None:
            for pid in (*ranks_of(process), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.communicate()
    STARTED.clear()


def launch(config: Config, folder: Path, ranks: int = 1, inject: str = "", **popen: Any) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    (folder / "sitecustomize.py").write_text(inject and IN_PIPELINE.format(text=RANK + inject))
    variables = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"} | popen.pop("env", {})
    command = [*launcher, "pipeline", "train", "quickstart", *overrides(config)]
    STARTED.append(subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True, **popen))
    return STARTED[-1]


# torchrun itself starts Python too, and is not to be hit.
IN_PIPELINE = """
import sys
if 'pipeline' in sys.orig_argv and 'torch.distributed.run' not in sys.orig_argv:
    exec({text!r})
"""


def ended(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    _, log = process.communicate(timeout=timeout)
    return process.returncode, log


def error_lines(log: str) -> list[str]:
    """What the ranks say, without torchrun's own report."""
    return [
        line
        for line in log.splitlines()
        if line.startswith(("error:", "[rank")) and "error:" in line and "ChildF" not in line
    ]


def saved_step(config: Config) -> int:
    """Of `latest`, every byte of which is as it was written."""
    folder = pointed_folder(config.run_dir / "checkpoints", "latest")
    assert folder is not None
    verify_files(folder, read_description(folder))
    return step_of(folder)


def assert_failed(config: Config, reason: str, code: int = 2) -> dict[str, Any]:
    found = status(config)
    assert (found["state"], found["exit_code"]) == ("failed", code), found
    assert reason in found["reason"], found
    assert f"error: {found['reason']}" in (config.run_dir / "log.txt").read_text(), "the log says the same"
    return found


# ---- one rank's fault, told by all ----


def faulty(folder: Path, **sections: dict[str, Any]) -> Config:
    train = {"max_steps": 60, "tokens_per_step": 256, "micro_batch_size": 2}
    return tiny_config(
        folder, train=train | sections.pop("train", {}), checkpoint={"every_steps": 5} | sections.pop("checkpoint", {}),
        eval={"every_steps": 0} | sections.pop("eval", {}), **sections,
    )  # fmt: skip


DATA = """
from train.data import batches
from pipeline.errors import UserError
real = batches.Prefetcher._make
def make(self, first):
    if RANK == '{rank}' and first >= 17 * 16: raise {error}
    return real(self, first)
batches.Prefetcher._make = make
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.campaign)])
def test_an_id_beyond_the_vocabulary_on_one_rank_of_four_is_saved_and_told(tiny: Path, strategy: str) -> None:
    """The damaged id is in the shard itself; which rank reads it first follows from the seed."""
    ids = np.fromfile(tiny / "data/tiny/train_00000.bin", dtype="<u2")
    ids[12_000] = 60_000
    ids.tofile(tiny / "data/tiny/train_00000.bin")
    config = faulty(tiny, parallel={"strategy": strategy}, train={"max_steps": 200})
    code, log = ended(launch(config, tiny, ranks=4))
    assert code != 0
    assert len(error_lines(log)) == 1 and "holds id 60000, but its vocabulary has" in error_lines(log)[0], log
    assert "Traceback (most recent call last)" not in log.split("torch/distributed")[0], log
    found = assert_failed(config, "holds id 60000")
    assert found["step"] == saved_step(config) > 0


@pytest.mark.parametrize("error", ["OSError(116, 'Stale file handle', 'shard')", "KeyError('ours')"])
def test_a_data_error_of_rank_2_is_saved_and_told_by_all(tiny: Path, error: str) -> None:
    config = faulty(tiny)
    code, log = ended(launch(config, tiny, 4, DATA.format(rank=2, error=error)))
    assert code != 0
    ours = "KeyError" in error
    assert_failed(
        config, "rank 2: " + ("KeyError: 'ours'" if ours else "Stale file handle: shard"), code=1 if ours else 2
    )
    assert saved_step(config) == 17
    assert ours or (len(error_lines(log)) == 1 and "[rank 2] error: Stale file handle" in log), log
    assert "Connection closed" not in log


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.campaign), "fsdp"])
def test_a_shard_that_is_truncated_while_training_is_saved_and_told_by_all(tiny: Path, strategy: str) -> None:
    """Every rank reads it, most of them at the same step; none is ended by SIGBUS."""
    config = faulty(
        tiny, train={"max_steps": 100_000}, checkpoint={"every_steps": 100_000}, parallel={"strategy": strategy}
    )
    process = launch(config, tiny, 4)
    wait_for_step(config, process, 5)
    os.truncate(tiny / "data/tiny/train_00000.bin", 4000)
    code, log = ended(process)
    assert code != 0 and "SIGBUS" not in log
    assert len(error_lines(log)) == 1 and "was truncated while it was in use, to 4,000 bytes" in log, log
    found = assert_failed(config, "train_00000.bin was truncated while it was in use")
    assert saved_step(config) == found["step"] >= 5


OOM = """
import torch
from pipeline.model import language_model
real = language_model.LanguageModel.forward
def forward(self, *args, **kwargs):
    if RANK == '{rank}' and self.training and len(args[0]) > 2 and pathlib.Path('full').exists():
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB')
    return real(self, *args, **kwargs)
language_model.LanguageModel.forward = forward
from train import trainer
step = trainer.Trainer.train_step
def train_step(self):
    if self.step == 7: pathlib.Path('full').touch()
    return step(self)
trainer.Trainer.train_step = train_step
"""


@pytest.mark.parametrize("ranks", [1, 4])
def test_out_of_memory_says_which_micro_batch_fits_and_all_ranks_leave_with_it(tiny: Path, ranks: int) -> None:
    """A stand-in for a GPU, on the last rank alone: it has room for two sequences, of four."""
    config = faulty(tiny, train={"micro_batch_size": 4})
    code, log = ended(launch(config, tiny, ranks, OOM.format(rank=ranks - 1)))
    assert code == (2 if ranks == 1 else 1), log
    line = error_lines(log)
    assert len(line) == 1 and "train.micro_batch_size=2, the largest that fits" in line[0], log
    assert "or set model.activation_checkpointing=block" in line[0]
    assert_failed(config, "step 7 with train.micro_batch_size=4")
    assert saved_step(config) == 7
    assert "(exitcode: 1)" not in log and "SIGKILL" not in log, "every rank exits with 2"


@pytest.mark.parametrize("number", ["SIGHUP", "SIGQUIT", "SIGXCPU"])
def test_a_closed_terminal_and_its_like_save_and_exit(tiny: Path, number: str) -> None:
    config = faulty(tiny, train={"max_steps": 100_000}, checkpoint={"every_steps": 100_000})
    process = launch(config, tiny)
    wait_for_step(config, process, 3)
    process.send_signal(getattr(signal, number))
    code, log = ended(process)
    assert code == 0, log
    assert (status(config)["state"], status(config)["reason"], status(config)["exit_code"]) == ("stopped", number, 0)
    assert saved_step(config) == status(config)["step"]


def wait_for_step(config: Config, process: subprocess.Popen[str], step: int) -> None:
    while last_row(config) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_what_nohup_ignores_stays_ignored(tiny: Path) -> None:
    config = faulty(tiny, train={"max_steps": 100_000})
    process = launch(config, tiny, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(config, process, 3)
    process.send_signal(signal.SIGHUP)
    wait_for_step(config, process, last_row(config) + 20)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0 and status(config)["reason"] == "SIGTERM"


def test_nohup_torchrun_saves_when_its_terminal_closes(tiny: Path) -> None:
    """torchrun heeds the signal itself in spite of nohup, and passes it on."""
    config = faulty(tiny, train={"max_steps": 100_000}, checkpoint={"every_steps": 100_000})
    process = launch(config, tiny, 2, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(config, process, 3)
    process.send_signal(signal.SIGHUP)
    _, log = ended(process)
    assert (status(config)["state"], status(config)["reason"]) == ("stopped", "SIGHUP"), log
    assert saved_step(config) == status(config)["step"]


# ---- disks ----


@pytest.fixture
def small_disk(tiny: Path) -> Iterator[Path]:
    """`runs` on a disk of 1 MiB."""
    disk = tiny / "runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


FILL = """
from train import trainer
step = trainer.Trainer.train_step
def train_step(self):
    if self.step == 12 and RANK == '0':
        with open('runs/filler', 'wb', buffering=0) as file:
            try:
                while True: file.write(b'0' * 512)
            except OSError: pass
    return step(self)
trainer.Trainer.train_step = train_step
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_too_small_for_the_weights_is_one_line_and_leaves_the_step_before(small_disk: Path, ranks: int) -> None:
    config = faulty(small_disk.parent, checkpoint={"keep": 100})
    code, log = ended(launch(config, small_disk.parent, ranks))
    assert code == (2 if ranks == 1 else 1), log
    assert "Traceback" not in log or ranks > 1, log
    line = error_lines(log)
    assert len(line) == 1 and "could not be written, the one before is intact: No space left on device" in line[0], log
    assert_failed(config, "No space left on device")
    assert saved_step(config) >= 5 and not list((config.run_dir / "checkpoints").glob(".*"))
    assert "SIGKILL" not in log


@pytest.mark.parametrize("log_", [{"tensorboard": False}, {"tensorboard": True}])
def test_a_disk_that_fills_up_is_one_line_whatever_is_written_first(small_disk: Path, log_: dict[str, bool]) -> None:
    config = faulty(small_disk.parent, log=log_, checkpoint={"every_steps": 10})
    code, log = ended(launch(config, small_disk.parent, 1, FILL))
    assert code == 2 and "Traceback" not in log, log
    assert len(error_lines(log)) == 1 and "No space left on device" in error_lines(log)[0], log
    found = status(config)
    assert (found["state"], found["exit_code"]) == ("failed", 2)
    assert "No space left on device" in found["reason"]
    assert saved_step(config) == 10


@pytest.mark.parametrize("limit", [3_000, 60_000], ids=["metrics.jsonl", "weights"])
def test_a_file_size_limit_is_one_line(tiny: Path, limit: int) -> None:
    config = faulty(tiny, checkpoint={"every_steps": 30})
    process = launch(config, tiny, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    code, log = ended(process)
    assert code == 2 and "Traceback" not in log, log
    assert len(error_lines(log)) == 1 and "File too large" in error_lines(log)[0] and "ulimit -f" in log, log
    assert status(config)["state"] == "failed" and "File too large" in status(config)["reason"]


@pytest.mark.parametrize(
    "name",
    ["status.json", "log.txt", "metrics.jsonl", "config.toml", "tb", "checkpoints", "bad_steps.jsonl", "events.jsonl"],
)
def test_a_run_folder_in_which_something_else_has_a_files_name_is_one_line(tiny: Path, name: str) -> None:
    config = faulty(tiny, log={"tensorboard": True}, train={"max_steps": 6, "max_bad_steps": 100})
    if name in ("tb", "checkpoints"):
        config.run_dir.mkdir(parents=True)
        (config.run_dir / name).write_text("a file")
    else:
        (config.run_dir / name).mkdir(parents=True)
    inject = (
        "from train.spikes import StepGuard, Outcome\nStepGuard.judge = lambda *_: Outcome.SPIKE\n"
        * name.startswith("bad")
    )
    code, log = ended(launch(config, tiny, 1, inject))
    assert code == 2 and "Traceback" not in log, log
    assert len(error_lines(log)) == 1, log


def test_a_run_folder_on_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    config = faulty(small_disk.parent)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, log = ended(launch(config, small_disk.parent, 2))
    assert code != 0 and len(error_lines(log)) == 1 and "Read-only file system" in log, log


# ---- ranks that hang or are gone ----

SLEEP = """
from train.data import batches
real = batches.Prefetcher._make
def make(self, first):
    while RANK == '2' and first >= 20 * 16: time.sleep(0.1)
    return real(self, first)
batches.Prefetcher._make = make
"""


def hanging(folder: Path) -> Config:
    return faulty(
        folder, train={"max_steps": 100_000}, checkpoint={"every_steps": 100_000}, parallel={"timeout_s": 6.0}
    )


def test_a_rank_that_sleeps_in_its_data_is_named_with_every_ranks_stack(tiny: Path) -> None:
    config = hanging(tiny)
    code, log = ended(launch(config, tiny, 4, SLEEP))
    assert code != 0
    found = assert_failed(config, "rank 2 of 4 has spent more than 6 s in reading the data of step 20", code=75)
    assert "the run resumes from its last checkpoint" in found["reason"]
    assert len(error_lines(log)) == 1, log
    assert "rank(s) 2, in reading the data of step 20" in log and "in batch" in log
    assert saved_step(config) == 20
    assert "exitcode  : 75" in log and "exitcode  : 1 " not in log


@pytest.mark.parametrize("victim", [pytest.param(2, marks=pytest.mark.campaign), 0])
def test_a_stopped_rank_is_named(tiny: Path, victim: int) -> None:
    config = hanging(tiny)
    process = launch(config, tiny, 4)
    wait_for_step(config, process, 5)
    stopped = ranks_of(process)[victim]
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 120
    while status(config)["state"] != "failed":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    # The others exit now; torchrun would give the one that is stopped 30 s more.
    os.kill(stopped, signal.SIGKILL)
    code, log = ended(process)
    assert code != 0
    assert f"rank(s) {victim} of 4 did not respond" in status(config)["reason"], log
    assert (status(config)["state"], status(config)["exit_code"]) == ("failed", 75)
    assert len(error_lines(log)) == 1, log
    assert victim == 0 or saved_step(config) == status(config)["step"] >= 5


def test_a_killed_rank_is_named_and_the_rest_saved(tiny: Path) -> None:
    config = hanging(tiny)
    process = launch(config, tiny, 4)
    wait_for_step(config, process, 5)
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    code, log = ended(process)
    assert code != 0
    found = assert_failed(config, "rank(s) 2 of 4 did not respond", code=75)
    assert saved_step(config) == found["step"] >= 5
    assert "Traceback (most recent call last)" not in log.split("torch/distributed")[0], log


# ---- two at a time, and in odd places ----

ATTACKS = {
    "two data errors": (
        "from train.data import batches\nreal = batches.Prefetcher._make\ndef make(self, first):\n"
        "    if RANK in '13' and first >= 16 * 16: raise OSError(5, 'Input/output error', 'shard' + RANK)\n"
        "    return real(self, first)\nbatches.Prefetcher._make = make\n",
        "Input/output error: shard1",
        2,
    ),
    "out of memory and a data error": (
        "import torch\nfrom train import trainer\nreal = trainer.Trainer.micro_batch\ndef micro_batch(self, number):\n"
        "    if self.step == 16 and RANK == '1': raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    if self.step == 16 and RANK == '3': self.fault = OSError(5, 'Input/output error', 'shard3')\n"
        "    return real(self, number)\ntrainer.Trainer.micro_batch = micro_batch\n",
        "rank 1: cpu is out of memory",
        2,
    ),
    "evaluation cannot read": (
        "from train import evaluation\nreal = evaluation.windows_at\ndef windows_at(*a):\n"
        "    if RANK == '2': raise OSError(5, 'Input/output error', 'val')\n    return real(*a)\n"
        "evaluation.windows_at = windows_at\n",
        "rank 2: Input/output error: val",
        2,
    ),
    "the preview fails": (
        "from train import preview\n"
        "def show(self, *a): raise RuntimeError('the preview')\n"
        "if RANK == '0': preview.Previews.show = show\n",
        "RuntimeError: the preview",
        1,
    ),
    "a bug in the backward pass": (
        "from train import trainer\nreal = trainer.Trainer.micro_batch\ndef micro_batch(self, number):\n"
        "    if self.step == 16 and RANK == '1': raise KeyError('ours')\n    return real(self, number)\n"
        "trainer.Trainer.micro_batch = micro_batch\n",
        "rank 1: KeyError: 'ours'",
        1,
    ),
    "the disk is full when it saves for a fault": (
        "from train import saving\nfrom train.data import batches\nreal = batches.Prefetcher._make\n"
        "def make(self, first):\n    if RANK == '2' and first >= 17 * 16: raise OSError(5, 'Input/output error', 'shard')\n"
        "    return real(self, first)\nbatches.Prefetcher._make = make\nwrite = saving.write_checkpoint\n"
        "def full(checkpoints, *a, description, **k):\n"
        "    if description.step > 15: raise OSError(28, 'No space left on device', 'weights')\n"
        "    return write(checkpoints, *a, description=description, **k)\nsaving.write_checkpoint = full\n",
        "rank 2: Input/output error: shard",
        2,
    ),
}


IN_EVERY_RUN = ("out of memory and a data error", "the disk is full when it saves for a fault")


@pytest.mark.parametrize(
    "attack", [pytest.param(name, marks=[pytest.mark.campaign] * (name not in IN_EVERY_RUN)) for name in ATTACKS]
)
def test_an_attack_ends_all_ranks_with_the_first_reason(tiny: Path, attack: str) -> None:
    inject, reason, code = ATTACKS[attack]
    config = faulty(tiny, eval={"every_steps": 15})
    started = time.monotonic()
    launched, log = ended(launch(config, tiny, 4, inject))
    assert launched != 0
    assert_failed(config, reason, code)
    assert saved_step(config) >= 5
    assert time.monotonic() - started < 90 and "SIGKILL" not in log and "Connection closed" not in log, log
