"""Faults drawn at random, one after the other, over a run of four ranks: started again by the same command, it ends with the
bits of the undisturbed run, and status.json names each fault.

The seed is --campaign-seed; the faults of each test are printed.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config, write_dataset
from slurm_cluster import TRAIN, Cluster, wait_until, write_config
from test_faults import ended, launch, nothing_stays, saved_step
from test_kills import last_row, ranks_of
from test_train_run import curve, final_tensors, status

from pipeline.config.keys import Config
from pipeline.config.load import to_toml

pytestmark = pytest.mark.campaign
assert nothing_stays  # a fixture
RANKS, MAX_STEPS, FAULTS, PARTS = 4, 150, 5, 10
TIMEOUT_S = 6.0

# Faults inside a rank: fault.json, beside sitecustomize.py, names the rank and after how many calls of this start.
INJECT = """
import errno, json, os, pathlib, time
RANK = os.environ.get('RANK') or ('SLURM_STEP_ID' in os.environ and os.environ.get('SLURM_PROCID'))
path = pathlib.Path(os.environ['PYTHONPATH'].partition(':')[0], 'fault.json')
FAULT = json.loads(path.read_text()) if path.exists() else None
if FAULT and RANK == str(FAULT['rank']):
    import torch
    from train import trainer
    from train.data import batches
    from pipeline.model import language_model
    left = [FAULT['after']]
    def due():
        left[0] -= 1
        return left[0] < 0
    def hang():
        while True: time.sleep(0.1)
    def fail(): raise OSError(errno.ESTALE, 'Stale file handle', 'shard')
    def full(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    act = dict(hang_in_data=hang, hang_in_step=hang, data_error=fail, out_of_memory=full)[FAULT['kind']]
    if FAULT['kind'] in ('hang_in_data', 'data_error'):
        make = batches.Prefetcher._make
        def made(self, first):
            if due(): act()
            return make(self, first)
        batches.Prefetcher._make = made
    else:
        forward = language_model.LanguageModel.forward
        def forwarded(self, *args, **kwargs):
            if self.training and due(): act()
            return forward(self, *args, **kwargs)
        language_model.LanguageModel.forward = forwarded
"""
INSIDE = ("hang_in_data", "hang_in_step", "data_error", "out_of_memory")
OUTSIDE = ("kill", "stop", "full_disk", "SIGTERM", "SIGHUP", "SIGTERM of torchrun")


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, after how many steps or micro-batches of its start: past the first step, which may take
    half an hour."""

    kind: str
    rank: int
    after: int

    @classmethod
    def draw(cls, chance: random.Random, kinds: tuple[str, ...]) -> "Fault":
        return cls(chance.choice(kinds), chance.randrange(RANKS), chance.randint(4, 14))

    @property
    def wanted(self) -> tuple[str, int, str]:
        """State, exit code and a pattern of the reason."""
        of = f"rank {self.rank}: " if self.rank else "^"
        lost = rf"rank\(s\) {self.rank} of {RANKS} did not respond: stopped, killed, or the node is lost"
        if not self.rank:  # under srun it holds the store
            lost += "|the store of the ranks does not respond: rank 0"
        late = rf"spent more than {TIMEOUT_S:.0f} s in"
        return {
            "kill": ("failed", 75, lost),
            "stop": ("failed", 75, lost),
            "hang_in_data": ("failed", 75, rf"rank {self.rank} of {RANKS} has {late} reading the data of step \d+"),
            "hang_in_step": ("failed", 75, rf"{late} step \d+.*; rank {self.rank} of {RANKS} is not"),
            "data_error": ("failed", 2, f"{of}Stale file handle: shard"),
            "out_of_memory": ("failed", 2, f"{of}cpu is out of memory .*train.micro_batch_size"),
            "full_disk": ("failed", 2, "No space left on device"),
            "node": ("failed", 75, rf"rank\(s\) (2|3|2, 3) of {RANKS} did not respond"),
        }.get(self.kind, ("stopped", 0, f"^{self.kind.partition(' ')[0]}$"))


def faulty(folder: Path, strategy: str) -> Config:
    return tiny_config(
        folder, model={"dropout": 0.1}, train={"max_steps": MAX_STEPS, "tokens_per_step": 256, "micro_batch_size": 2},
        checkpoint={"every_steps": 7, "keep": 2}, eval={"every_steps": 20},
        parallel={"strategy": strategy, "timeout_s": TIMEOUT_S},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Config]:
    made: dict[str, Config] = {}

    def run_of(strategy: str) -> Config:
        if strategy not in made:
            folder = tmp_path_factory.mktemp(strategy)
            write_dataset(folder / "data" / "tiny")
            made[strategy] = faulty(folder, strategy)
            code, log = ended(launch(made[strategy], folder, RANKS))
            assert code == 0, log
        return made[strategy]

    return run_of


@contextmanager
def small_disk_at(disk: Path) -> Iterator[None]:
    """A disk that a file can fill."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)


def strike(fault: Fault, config: Config, process: "subprocess.Popen[str]") -> None:
    """From outside, while the run trains."""
    before = last_row(config)
    while last_row(config) <= before + fault.after:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    victim = ranks_of(process)[fault.rank]
    match fault.kind:
        case "kill":
            os.kill(victim, signal.SIGKILL)
        case "stop":
            os.kill(victim, signal.SIGSTOP)
            while status(config)["state"] == "running" and process.poll() is None:
                time.sleep(0.1)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)  # torchrun would take half a minute
        case "full_disk":
            fill(Path(config.run.dir))
        case "SIGTERM of torchrun":
            process.terminate()
        case _:
            os.kill(victim, getattr(signal, fault.kind))


def plant(fault: Fault | None, folder: Path) -> None:
    """Have a rank do it by itself, if it is a fault inside one."""
    (folder / "fault.json").unlink(missing_ok=True)
    if fault is not None and fault.kind in INSIDE:
        (folder / "fault.json").write_text(json.dumps(vars(fault)))


def check(fault: Fault, config: Config, log: str) -> None:
    """status.json is true, and the checkpoint that `latest` names is complete."""
    found, (state, exit_code, reason) = status(config), fault.wanted
    assert (found["state"], found["exit_code"]) == (state, exit_code), (fault, found, log)
    assert re.search(reason, found["reason"]), (fault, found["reason"], log)
    if (config.run_dir / "checkpoints" / "latest").exists():
        saved_step(config)


def suffer(fault: Fault, config: Config, folder: Path) -> None:
    """One start, which the fault ends."""
    plant(fault, folder)
    process = launch(config, folder, RANKS, INJECT)
    ranks: list[int] = []
    while len(ranks) < RANKS:
        assert process.poll() is None, process.communicate()[1]
        ranks = ranks_of(process)
    if fault.kind in OUTSIDE:
        strike(fault, config, process)
    code, log = ended(process)
    (folder / "runs" / "filler").unlink(missing_ok=True)
    check(fault, config, log)
    # torchrun itself has another code where it is signalled.
    assert (code == 0) == (fault.kind in ("SIGTERM", "SIGHUP")), (fault, code, log)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()], "every rank is gone"


def assert_same_run(found: Config, wanted: Config) -> None:
    """Bit for bit the weights, moments and losses; a step at which a start stopped is not evaluated."""
    ours, theirs = final_tensors(found), final_tensors(wanted)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    rows, wanted_rows = curve(found), curve(wanted)
    assert [row[:2] for row in rows] == [row[:2] for row in wanted_rows]
    assert all(row[2] in (None, other[2]) for row, other in zip(rows, wanted_rows, strict=True))


def draw(chance: random.Random, kinds: tuple[str, ...]) -> list[Fault]:
    faults = [Fault.draw(chance, kinds) for _ in range(FAULTS)]
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    return faults


@pytest.mark.timeout(570)
@pytest.mark.parametrize("part", range(PARTS))
def test_faults_at_random_end_with_the_undisturbed_weights(
    part: int, tiny: Path, undisturbed: Callable[[str], Config], request: pytest.FixtureRequest
) -> None:
    chance = random.Random(f"{request.config.option.campaign_seed} torchrun {part}")
    strategy = "ddp" if part % 3 else "fsdp"
    config, faults = faulty(tiny, strategy), draw(chance, INSIDE + OUTSIDE)
    (tiny / "runs").mkdir()
    with small_disk_at(tiny / "runs"):
        for fault in faults:
            suffer(fault, config, tiny)
        plant(None, tiny)
        code, log = ended(launch(config, tiny, RANKS))
        assert code == 0, log
        assert (status(config)["state"], status(config)["step"]) == ("done", MAX_STEPS)
        assert_same_run(config, undisturbed(strategy))


# ---- two nodes of SLURM ----

NODES = (*INSIDE, "kill", "stop", "full_disk", "node", "SIGTERM of scancel", "SIGTERM of a requeue")


def configure(cluster: Cluster, name: str) -> Config:
    config = write_config(cluster.folder, name, steps=MAX_STEPS, tokens_per_step=256)
    config = replace(
        config,
        checkpoint=replace(config.checkpoint, every_steps=7),
        parallel=replace(config.parallel, timeout_s=TIMEOUT_S),
    )
    (cluster.folder / f"{name}.toml").write_text(to_toml(config))
    return config


def submit(cluster: Cluster, config: Config, folder: Path) -> str:
    options = [f"--export=ALL,RANKS_PER_NODE=2,PYTHONPATH={folder}:{ROOT}", "--cpus-per-task=2"]
    return cluster.submit(TRAIN, f"{config.run.name}.toml", nodes=2, options=options)


@pytest.fixture(scope="module")
def undisturbed_on_nodes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = configure(cluster, "four-ranks")
    job = submit(cluster, config, tmp_path_factory.mktemp("nothing"))
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    return config


def strike_job(fault: Fault, config: Config, cluster: Cluster, job: str) -> None:
    """From outside, while the job trains."""
    before = last_row(config)
    wait_until("it trains", lambda: last_row(config) > before + fault.after)
    match fault.kind:
        case "kill":
            os.kill(cluster.rank(job, fault.rank), signal.SIGKILL)
        case "stop":
            stopped = cluster.rank(job, fault.rank)
            os.kill(stopped, signal.SIGSTOP)
            wait_until("the others leave", lambda: status(config)["state"] != "running")
            with suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGKILL)
        case "full_disk":
            fill(config.run_dir)
        case "node":
            for rank in (2, 3):
                os.kill(cluster.rank(job, rank), signal.SIGKILL)
            wait_until("the others leave", lambda: status(config)["state"] != "running")
            cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        case "SIGTERM of scancel":
            cluster.call("scancel", "--signal=TERM", job)
        case "SIGTERM of a requeue":
            cluster.call("scontrol", "requeue", job)


def suffer_on_nodes(fault: Fault, config: Config, cluster: Cluster, job: str) -> None:
    """One start, which the fault ends. A job that is queued again is not waited for: the same command is submitted."""
    restarts = int(cluster.job(job)["Restarts"])
    if fault.kind not in INSIDE:
        strike_job(fault, config, cluster, job)

    def is_over() -> bool:
        found = cluster.job(job)
        return found["JobState"] not in ("RUNNING", "PENDING", "COMPLETING") or (
            found["JobState"] == "PENDING" and int(found["Restarts"]) > restarts
        )

    wait_until(f"{fault} ends the start", is_over)
    with suppress(AssertionError):  # it is over
        cluster.call("scancel", job)
    wait_until("its processes are gone", lambda: not cluster.processes(job))
    (config.run_dir / "filler").unlink(missing_ok=True)
    if fault.kind == "node":
        with suppress(AssertionError):  # it came back by itself
            cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    check(fault, config, cluster.log(job))
    wait_until("the nodes are cleared", lambda: cluster.node_states() == ["idle", "idle"])


@pytest.mark.timeout(570)
@pytest.mark.parametrize("part", range(3))
def test_faults_at_random_on_two_nodes(
    part: int, cluster: Cluster, undisturbed_on_nodes: Config, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chance = random.Random(f"{request.config.option.campaign_seed} slurm {part}")
    config = configure(cluster, f"faults-{part}")
    (tmp_path / "sitecustomize.py").write_text(INJECT)
    config.run_dir.mkdir(parents=True)
    with small_disk_at(config.run_dir):
        for fault in draw(chance, NODES):
            plant(fault, tmp_path)
            suffer_on_nodes(fault, config, cluster, submit(cluster, config, tmp_path))
        plant(None, tmp_path)
        job = submit(cluster, config, tmp_path)
        assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
        assert (status(config)["state"], status(config)["step"]) == ("done", MAX_STEPS)
        assert_same_run(config, undisturbed_on_nodes)
