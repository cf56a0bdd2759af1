"""eval --follow: a row of evals.jsonl for each checkpoint of a run, whatever happens to either of them meanwhile."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, overrides, run_program, tiny_config
from test_harness import MULTIPLE_CHOICE, write_tasks
from test_score import ALONE

from pipeline.checkpoint.folder import DESCRIPTION, read_description
from pipeline.config.keys import Config
from pipeline.errors import UserError
from pipeline.runs import RunFolder, State, Status
from score import follow as module
from score.follow import Follower, follow
from score.options import EvalOptions
from score.run import evaluate
from train.run import run

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL_S", 0.1), ("APPEARS_S", 0.5), ("REMOVAL_S", 0.1)):
        monkeypatch.setattr(module, name, seconds)


def trained(tiny: Path, **sections: dict[str, Any]) -> Config:
    """Checkpoints at 5 and 10."""
    config = tiny_config(tiny, **sections)
    run(config)
    return config


def rows(config: Config) -> Rows:
    return [json.loads(line) for line in (config.run_dir / "evals.jsonl").read_text().splitlines()]


def options(config: Config, **others: Any) -> EvalOptions:
    return EvalOptions(follow=str(config.run_dir), device="cpu", json=True, **others)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(what: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_checkpoint_of_a_run_that_has_ended_gets_a_row(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained(tiny, log={"tensorboard": True})
    follow(options(config))
    found = rows(config)
    assert [row["step"] for row in found] == [5, 10]
    assert [row["tokens"] for row in found] == [640, 1280]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == found
    for row in found:
        folder = config.run_dir / "checkpoints" / f"step_{row['step']:08d}"
        wanted = evaluate(folder, EvalOptions(device="cpu"), ALONE)
        assert {name: row[name] for name in ("loss", "perplexity", "bits_per_byte")} == {
            name: wanted[name] for name in ("loss", "perplexity", "bits_per_byte")
        }
        assert read_description(folder).hash.startswith(row["checkpoint"])
        assert row["settings"] == {"data": "", "split": "val", "stride": None, "tasks": [], "limit": None}
    assert not (config.run_dir / ".evaluating").exists()
    assert curves_in(config.run_dir / "tb" / "evals")["eval/loss"] == [
        (row["step"], pytest.approx(row["loss"])) for row in found
    ]


def curves_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_a_restart_evaluates_what_is_missing_and_other_settings_all_of_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(tiny)
    evaluated: list[str] = []

    def noting(folder: Path, *others: Any) -> dict[str, Any]:
        evaluated.append(folder.name)
        return evaluate(folder, *others)

    monkeypatch.setattr(module, "evaluate", noting)
    follow(options(config))
    before = rows(config)
    follow(options(config))
    assert evaluated == ["step_00000005", "step_00000010"] and rows(config) == before

    longer = replace(config, train=replace(config.train, max_steps=15))
    run(longer)
    follow(options(config))
    assert evaluated[2:] == ["step_00000015"] and rows(config)[:2] == before

    follow(options(config, split="train"))
    assert evaluated[3:] == ["step_00000005", "step_00000010", "step_00000015"]
    assert {row["settings"]["split"] for row in rows(config)} == {"train"}


def test_rows_of_steps_that_the_run_went_back_from_are_replaced(tiny: Path) -> None:
    config = trained(tiny)
    follow(options(config))
    before = rows(config)
    back = tiny_config(tiny, optimizer={"lr": 5e-3}, train={"max_steps": 7}, checkpoint={"resume": "step_00000005"})
    run(back)
    follow(options(config))
    found = rows(config)
    assert [row["step"] for row in found] == [5, 7] and found[0] == before[0]
    run(tiny_config(tiny, optimizer={"lr": 5e-3}))
    follow(options(config))
    found = rows(config)
    assert [row["step"] for row in found] == [5, 7, 10] and found[2]["loss"] != before[1]["loss"]


def test_a_checkpoint_that_goes_while_it_is_evaluated_gets_its_row(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `keep` removes was pinned before; what it removed before that is skipped with a line."""
    config = trained(tiny)

    def removing(folder: Path, *others: Any) -> dict[str, Any]:
        shutil.rmtree(config.run_dir / "checkpoints" / folder.name)
        return evaluate(folder, *others)

    monkeypatch.setattr(module, "evaluate", removing)
    follow(options(config))
    assert [row["step"] for row in rows(config)] == [5, 10]


def test_a_checkpoint_that_goes_while_it_is_read_is_skipped_with_a_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, link = trained(tiny), os.link

    def removing(source: str, target: str) -> None:
        if "step_00000005" in source:
            shutil.rmtree(Path(source).parent, ignore_errors=True)
        link(source, target)

    monkeypatch.setattr(os, "link", removing)
    follow(options(config))
    assert [row["step"] for row in rows(config)] == [10]
    assert "step_00000005 is skipped: it was removed" in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", DESCRIPTION])
def test_a_damaged_checkpoint_is_skipped_once_with_a_line(
    tiny: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    config = trained(tiny)
    path = config.run_dir / "checkpoints" / "step_00000005" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status = RunFolder(config.run_dir).read_status()
    assert status is not None
    follower = Follower(options(config))
    with follower.alone():
        RunFolder(config.run_dir).write_status(replace(status, state=State.RUNNING))
        found, ended = follower.next()
        assert found is not None and found.name == "step_00000010" and not ended
        follower.add(evaluate(found, options(config), ALONE))
        assert follower.next() == follower.next() == (None, False)
    assert caplog.text.count("is skipped") == 1 and "is damaged" in caplog.text
    assert [row["step"] for row in rows(config)] == [10]


def test_where_the_disk_has_no_links_the_checkpoint_is_copied(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained(tiny)

    def none(source: str, target: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    follow(options(config))
    assert [row["step"] for row in rows(config)] == [5, 10]


def test_a_run_that_died_ends_its_follower_and_one_that_lives_does_not(tiny: Path) -> None:
    config = trained(tiny)
    folder = RunFolder(config.run_dir)
    folder.write_status(Status(State.RUNNING, 10))
    follower = Follower(options(config))
    follower._seen = set()
    follow_once = [follower.next()[1] for _ in range(2)]
    assert follow_once == [False, False]
    document = json.loads(folder.status.read_text()) | {"updated_at": "2026-01-01T00:00:00+00:00"}
    folder.status.write_text(json.dumps(document))
    follow(options(config))
    assert [row["step"] for row in rows(config)] == [5, 10]


def test_what_cannot_be_followed_is_said_in_a_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    config = trained(tiny)
    with pytest.raises(UserError, match="no run 'rum'.* did you mean run"):
        follow(EvalOptions(follow="rum", device="cpu"))
    with pytest.raises(UserError, match="leave out --ckpt"):
        follow(EvalOptions(follow="run", ckpt="best", device="cpu"))
    shutil.copytree(config.run_dir, config.run_dir.with_name("two"))
    with pytest.raises(UserError, match="is a folder of 2 runs: name one of them, such as runs/run"):
        follow(EvalOptions(follow="runs", device="cpu"))
    for content in ("{", '{"steps": 1}\n', "[]\n"):
        (config.run_dir / "evals.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"evals.jsonl is damaged"):
            follow(EvalOptions(follow="run", device="cpu"))


@pytest.mark.slow
def test_a_follower_beside_a_run_sees_all_of_it_and_is_the_only_one(tiny: Path) -> None:
    """Real processes: the run keeps one checkpoint, and the follower is stopped in between and started again."""
    config = tiny_config(
        tiny, train={"max_steps": 2000}, checkpoint={"every_steps": 100, "keep": 2}, log={"tensorboard": True},
        eval={"every_steps": 1000},
    )  # fmt: skip
    training = start(tiny, "train", "quickstart", *overrides(config))
    # Begun with the run, which has no folder yet.
    first = start(tiny, "eval", "--follow", "run", "--device", "cpu")
    wait_for((config.run_dir / "evals.jsonl").exists)
    second = run_program("eval", "--follow", "run", cwd=tiny)
    assert second.returncode == 2 and len(second.stderr.splitlines()) == 1, second.stderr
    assert f"is already followed by process {first.pid}" in second.stderr
    first.send_signal(signal.SIGTERM)
    _, log = first.communicate(timeout=60)
    assert first.returncode == 0, log
    assert "stopped: the same command evaluates the checkpoints that are missing" in log
    kept = rows(config)
    last = start(tiny, "eval", "--follow", "run", "--device", "cpu", "--json")
    out, log = last.communicate(timeout=300)
    assert last.returncode == 0, log
    assert training.wait(timeout=10) == 0
    found = rows(config)
    assert found[: len(kept)] == kept and found[-1]["step"] == 2000
    steps = [row["step"] for row in found]
    assert steps == sorted(set(steps)) and set(steps) <= set(range(100, 2100, 100))
    assert [json.loads(line)["step"] for line in out.splitlines()] == [
        step for step in steps if step > kept[-1]["step"]
    ]
    assert [step for step, _ in curves_in(config.run_dir / "tb" / "evals")["eval/loss"]] == steps
    # Training's own files are as they would be without it.
    assert [row["step"] for row in map(json.loads, (config.run_dir / "metrics.jsonl").open())] == list(range(1, 2001))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
def test_tasks_are_curves_too(tiny: Path) -> None:
    trained(tiny, model={"block_size": 48}, train={"tokens_per_step": 384})
    tasks = write_tasks(tiny / "tasks", choose=MULTIPLE_CHOICE)
    asked = ["--tasks", "choose", "--task-dir", str(tasks), "--limit", "2"]
    result = run_program("eval", "--follow", "run", *asked, cwd=tiny, HF_HUB_OFFLINE="1", HF_HOME=str(tiny / "hub"))
    assert result.returncode == 0, result.stderr
    found = rows(tiny_config(tiny))
    assert [row["step"] for row in found] == [5, 10]
    for row in found:
        assert {"choose/acc", "choose/acc_stderr", "choose/acc_norm", "loss", "bits_per_byte"} <= row.keys()
        assert not any("n_shot" in name or "documents" in name for name in row)
        assert row["loss"] > 0 and row["settings"]["tasks"] == ["choose"]


@pytest.mark.slow
def test_ranks_follow_together(tiny: Path) -> None:
    config = trained(tiny)
    result = run_program("eval", "--follow", "run", "--device", "cpu", "--json", cwd=tiny, ranks=2)
    assert result.returncode == 0, result.stderr
    alone = tiny_config(tiny, run={"name": "alone"})
    shutil.copytree(config.run_dir, alone.run_dir, ignore=shutil.ignore_patterns("evals.jsonl"))
    follow(options(alone))
    for ours, wanted in zip(rows(config), rows(alone), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-6) and ours["step"] == wanted["step"]
