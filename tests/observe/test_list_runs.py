"""pipeline runs: what it finds, whatever is missing, damaged or other than it was in other versions."""

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program, tiny_config

from observe.runs import matches, run
from pipeline.config.load import to_toml
from pipeline.errors import UserError
from pipeline.runs import RunFolder, State, Status

MINIMUM = {
    "name", "state", "step", "loss", "val_loss", "best_val_loss", "lr", "tokens", "tokens_per_s", "eta_s", "updated_at",
}  # fmt: skip


def make(root: Path, name: str, age_s: float = 0.0, status: dict[str, Any] | None = None, **sections: Any) -> RunFolder:
    """A run's small files, as training leaves them."""
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True)
    config = tiny_config(root.parent, run={"name": folder.path.name}, **sections)
    folder.config.write_text(to_toml(config))
    folder.write_status(Status(**{"state": State.DONE, "step": 10, "loss": 2.0} | (status or {})))
    document = json.loads(folder.status.read_text())
    document["updated_at"] = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat(timespec="seconds")
    folder.status.write_text(json.dumps(document))
    return folder


def found(capsys: pytest.CaptureFixture[str], root: Path, *where: str, sort: str = "name") -> list[dict[str, Any]]:
    run(root, where, sort, as_json=True)
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def names(capsys: pytest.CaptureFixture[str], root: Path, *where: str, sort: str = "name") -> list[str]:
    return [row["name"] for row in found(capsys, root, *where, sort=sort)]


def test_every_run_is_listed_at_any_depth_and_links_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    make(root, "b")
    make(root, "ablations/lr/a")
    make(tmp_path / "elsewhere", "c")
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "loop").symlink_to(root)
    (root / "not-a-run").mkdir()
    (root / "a-file").touch()
    assert names(capsys, root) == ["ablations/lr/a", "b", "c"]


def test_the_keys_of_scripts_are_there_and_what_is_unknown_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    status = {"val_loss": 2.5, "best_val_loss": 2.25, "lr": 1e-3, "tokens": 1280, "trained_s": 7200.0, "parameters": 9}
    make(root, "full", status=status)
    bare = RunFolder(root / "bare")
    bare.path.mkdir()
    bare.metrics.write_text('{"step": 3, "loss": 1.5, "tokens": 30}\n{"step": 4, "lo')
    bare_row, full = found(capsys, root)
    assert set(bare_row) >= MINIMUM <= set(full)
    assert (full["hours"], full["dataset"], full["parameters"], full["best_val_loss"]) == (2.0, "tiny", 9, 2.25)
    assert (bare_row["state"], bare_row["step"], bare_row["loss"], bare_row["dataset"]) == (None, 3, 1.5, None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"state": "asleep", "step": 1}', b'{"state": "done"}']
)
def test_damaged_files_of_one_run_do_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    root = tmp_path / "runs"
    make(root, "whole")
    for name in ("status", "config", "metrics"):
        damaged: Path = getattr(make(root, f"damaged-{name}"), name)
        damaged.write_bytes(content)
    assert names(capsys, root) == ["damaged-config", "damaged-metrics", "damaged-status", "whole"]
    run(root, [], "best_val_loss", as_json=False)
    assert len([line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]) == 5


def test_a_run_that_says_running_but_is_silent_is_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    for name, age_s in (("alive", 5.0), ("dead", 300.0)):
        make(root, name, age_s, status={"state": State.RUNNING, "eta_s": 60.0})
    rows = found(capsys, root)
    assert [(row["state"], row["eta_s"]) for row in rows] == [("running", 60.0), ("dead", None)]
    assert 300 <= rows[1]["age_s"] < 310
    assert names(capsys, root, "state=dead") == ["dead"]


def test_conditions_compare_values_and_text_patterns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    make(root, "a", optimizer={"lr": 3e-4, "min_lr": 0.0})
    make(root, "b", optimizer={"lr": 3e-3, "betas": [0.9, 0.99]}, status={"state": State.FAILED})
    old = RunFolder(root / "old")
    old.path.mkdir()
    old.config.write_text("[optimizer]\nlr = 3e-4\n[eval]\nbatches = 4\n")
    old.metrics.write_text('{"step": 1, "loss": 3.0}\n')
    assert names(capsys, root, "optimizer.lr=3e-4") == names(capsys, root, " optimizer.lr = 0.00030 ") == ["a", "old"]
    assert names(capsys, root, "optimizer.lr=3e-4", "train.max_steps=10.0") == ["a"]  # the other lacks the key
    assert names(capsys, root, "eval.batches=4") == ["old"]  # of an earlier version
    assert names(capsys, root, "optimizer.betas=[0.9, 0.99]") == ["b"]
    assert names(capsys, root, "log.tensorboard=false") == ["a", "b"]
    assert names(capsys, root, "state=fail*") == names(capsys, root, "name=b") == ["b"]
    assert names(capsys, root, "optimizer.lr=fast") == []
    with pytest.raises(UserError, match=r"unknown key optimizer.lrr \(did you mean optimizer.lr\?\)"):
        found(capsys, root, "optimizer.lrr=1")
    with pytest.raises(UserError, match=r"unknown key learning_rate \(did you mean optimizer.lr\?\)"):
        found(capsys, root, sort="learning_rate")
    with pytest.raises(UserError, match=r"invalid --where 'optimizer.lr': expected KEY=VALUE"):
        found(capsys, root, "optimizer.lr")


def test_runs_are_sorted_by_any_key_and_what_has_none_comes_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    for name, loss, lr in (("a", 2.0, 3e-3), ("b", None, 1e-3), ("c", 1.0, 2e-3)):
        make(root, name, {"a": 30, "b": 10, "c": 20}[name], {"best_val_loss": loss}, optimizer={"lr": lr})
    assert names(capsys, root, sort="best_val_loss") == ["c", "a", "b"]
    assert names(capsys, root, sort="-best_val_loss") == ["a", "c", "b"]
    assert names(capsys, root, sort="optimizer.lr") == ["b", "c", "a"]
    assert names(capsys, root, sort="age_s") == ["b", "c", "a"]
    assert names(capsys, root, sort="-name") == ["c", "b", "a"]


def test_what_differs_is_marked_and_what_most_runs_share_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    make(root, "a")
    make(root, "b")
    make(root, "c", optimizer={"lr": 3e-3}, model={"n_layer": 4})
    assert [row["differs"] for row in found(capsys, root)] == [{}, {}, {"optimizer.lr": 3e-3, "model.n_layer": 4}]
    # Of two there is no usual value.
    assert [row["differs"].get("optimizer.lr") for row in found(capsys, root, "name=[bc]")] == [1e-2, 3e-3]
    run(root, [], "name", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "a", "b", "c", "model.n_layer=4"]
    assert lines[-1] == "    model.n_layer=4  optimizer.lr=0.003"


def test_a_table_has_no_control_characters_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "runs", "a")
    folder.config.write_text('[data]\ndataset = "x\\u001b[31m"\n')
    run(tmp_path / "runs", [], "name", as_json=False)
    assert "\x1b" not in capsys.readouterr().out


def test_values_are_compared_by_their_kind() -> None:
    assert matches(3e-4, "0.0003") and matches(2, "2.0") and matches([1, 2], "[1, 2]") and matches(True, "true")
    assert not matches(3e-4, "0.0004") and not matches(None, "1") and not matches(1, "") and not matches({}, "1 2")
    assert matches("fsdp", "fsdp") and matches("fsdp", "'fsdp'") and matches("fsdp", "?sdp") and not matches("a", "A")


def test_no_runs_are_no_error_and_no_folder_is(tmp_path: Path) -> None:
    for words, out in (([], ""), (["--json"], "[]\n")):
        result = run_program("runs", *words, cwd=tmp_path)
        assert (result.returncode, result.stdout, result.stderr) == (0, out, "no run under runs\n")
    result = run_program("runs", "nowhere", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, "error: no folder nowhere: expected one with runs in it\n")


@pytest.mark.slow
def test_500_runs_take_less_than_two_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    row = json.dumps({"step": 1, "tokens": 128, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1e6}) + "\n"
    for number in range(500):
        make(root, f"run-{number}", status={"best_val_loss": 2.0}).metrics.write_text(row * 10_000)
    began = time.process_time()  # other tests share the cores
    assert len(found(capsys, root)) == 500
    assert time.process_time() - began < 1.5
