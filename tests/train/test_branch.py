"""Other paths from a checkpoint: back inside a run by checkpoint.resume, once, and into a new run by run.branch_from."""

import importlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import die_at, overrides, run_program, tiny_config, write_dataset, write_documents
from safetensors.torch import load_file
from test_train_run import assert_identical, copy_of, curve, final_tensors, renamed, rows, status

from pipeline.checkpoint.folder import Description, hash_of_description, read_description
from pipeline.checkpoint.pointers import checkpoint_folders, pointed_folder
from pipeline.checkpoint.prune import prune_checkpoints
from pipeline.config.keys import Config, WeightedDataset
from pipeline.config.load import to_dict
from pipeline.errors import Diverged, UserError
from pipeline.runs import RunFolder
from train.resume import enter, log_changes
from train.run import run
from train.saving import choose_best


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of ten steps with checkpoints at 5 and 10, and another dataset beside its own. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("trunk")
    write_dataset(folder / "data" / "tiny")
    write_dataset(folder / "data" / "other", seed=3)
    config = tiny_config(folder, model={"dropout": 0.1}, checkpoint={"keep": 10})
    run(config)
    return config


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **keys) for name, keys in sections.items()})


def branch_of(trunk: Config, name: str, step: int = 5, **sections: dict[str, Any]) -> Config:
    config = changed(trunk, **sections)
    source = str(trunk.run_dir / "checkpoints" / f"step_{step:08d}")
    config = changed(config, run={"name": name, "branch_from": source})
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return config


def checkpoint(config: Config, step: int) -> Path:
    return config.run_dir / "checkpoints" / f"step_{step:08d}"


def steps(config: Config) -> list[int]:
    return [int(folder.name[5:]) for folder in checkpoint_folders(config.run_dir / "checkpoints")]


def stopped_at(config: Config, step: int) -> None:
    """As a stop request after that step: saved, and not evaluated."""
    run(changed(config, train={"max_steps": step}, schedule={"decay_steps": config.decay_steps}))


# ---- back inside a run ----


@pytest.mark.slow
def test_a_checkpoint_named_by_resume_is_gone_back_to_once(trunk: Config, caplog: pytest.LogCaptureFixture) -> None:
    """As a job that SLURM queues again: each start makes a few steps, and none takes them back."""
    caplog.set_level("INFO", "pipeline")
    config = changed(copy_of(trunk, "once"), checkpoint={"resume": "step_00000005"}, optimizer={"lr": 5e-3})
    straight = renamed(config, "at_once")
    shutil.copytree(config.run_dir, straight.run_dir)
    for step in (7, 9, 10):
        stopped_at(config, step)
        assert status(config)["step"] == step and step in steps(config)
    assert "the run went back there before, and resumes from the newest checkpoint since" in caplog.text
    run(straight)
    for name, tensor in final_tensors(straight).items():
        assert torch.equal(final_tensors(config)[name], tensor), name
    left = list((config.run_dir / "checkpoints").glob("left_behind_*"))
    assert [path.name for path in left] == ["left_behind_step_00000010"]


@pytest.mark.slow
def test_another_step_goes_back_again_and_the_first_one_after_its_mark_is_removed(trunk: Config) -> None:
    config = changed(copy_of(trunk, "twice"), checkpoint={"every_steps": 1, "keep": 20})
    for resume, first in (("step_00000005", 6), ("step_00000007", 8), ("step_00000005", 6)):
        before = len(list(config.run_dir.glob("left_behind_metrics*.jsonl")))
        run(changed(config, checkpoint={"resume": resume}))
        left = sorted(config.run_dir.glob("left_behind_metrics*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        assert len(left) == before + 1
        assert json.loads(left[-1].read_text().splitlines()[0])["step"] == first
    run(changed(config, checkpoint={"resume": "step_00000005"}))
    assert len(list(config.run_dir.glob("left_behind_metrics*.jsonl"))) == 3, "the last one counted before"
    (config.run_dir / "checkpoints" / "branch").unlink()
    run(changed(config, checkpoint={"resume": "step_00000005"}))
    assert len(list(config.run_dir.glob("left_behind_metrics*.jsonl"))) == 4


def test_going_back_to_the_newest_sets_nothing_aside(trunk: Config) -> None:
    config = changed(copy_of(trunk, "newest"), checkpoint={"resume": "step_00000010"}, train={"max_steps": 12})
    run(config)
    run(config)
    assert steps(config) == [5, 10, 12] and not list(config.run_dir.glob("**/left_behind*"))


def test_a_named_checkpoint_past_latest_becomes_latest(trunk: Config) -> None:
    """A kill right after finds the run there, and not before it."""
    config = changed(copy_of(trunk, "ahead"), checkpoint={"resume": "step_00000010"})
    (config.run_dir / "checkpoints" / "latest").write_text("step_00000005\n")
    enter(RunFolder(config.run_dir), 10, "step_00000010")
    run(config)
    assert status(config)["step"] == 10 and steps(config) == [5, 10]
    assert len(rows(config)) == 10


def test_the_best_is_chosen_among_what_remains(trunk: Config) -> None:
    """A branch that never gets as low as the one left has a best all the same."""
    config = copy_of(trunk, "best")
    assert pointed_folder(config.run_dir / "checkpoints", "best") == checkpoint(config, 10)
    worse = changed(config, checkpoint={"resume": "step_00000005"}, optimizer={"lr": 3.0, "min_lr": 3.0})
    run(changed(worse, train={"max_steps": 20}))
    best = pointed_folder(config.run_dir / "checkpoints", "best")
    losses = {row["step"]: row["val_loss"] for row in rows(config) if "val_loss" in row}
    assert best == checkpoint(config, min(losses, key=losses.__getitem__))
    left = [json.loads(line) for line in (config.run_dir / "left_behind_metrics.jsonl").read_text().splitlines()]
    assert left == rows(trunk)[5:], "the rows of the branch left are kept"
    assert [row["step"] for row in rows(config)] == list(range(1, 21))


def test_a_loss_that_is_not_a_number_is_never_the_best(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.evaluation import Evaluation, ValLoss

    config, losses = tiny_config(tiny, checkpoint={"every_steps": 1}), iter([math.nan, -math.inf, 3.0, math.nan] * 3)
    monkeypatch.setattr(Evaluation, "run", lambda self, model: ValLoss(next(losses), [1.0]))
    run(changed(config, train={"max_steps": 2}))
    checkpoints = config.run_dir / "checkpoints"
    assert not (checkpoints / "best").exists()
    run(changed(config, train={"max_steps": 4}))
    assert pointed_folder(checkpoints, "best") == checkpoint(config, 3)
    (checkpoints / "best").unlink()
    assert choose_best(checkpoints, config.eval.tokens) == 3.0
    assert pointed_folder(checkpoints, "best") == checkpoint(config, 3)


def test_the_best_starts_over_where_losses_no_longer_compare(trunk: Config) -> None:
    config = changed(copy_of(trunk, "tokens"), train={"max_steps": 20}, eval={"tokens": 32})
    run(changed(config, optimizer={"lr": 1.0, "min_lr": 1.0}))
    losses = {row["step"]: row["val_loss"] for row in rows(config) if row["step"] > 10 and "val_loss" in row}
    assert min(losses.values()) > rows(config)[9]["val_loss"], "worse than the best on other tokens"
    best = pointed_folder(config.run_dir / "checkpoints", "best")
    assert best == checkpoint(config, min(losses, key=losses.__getitem__))
    assert read_description(checkpoint(config, 20)).config["eval"]["tokens"] == 32


def test_a_checkpoint_of_the_version_before_eval_tokens_is_resumed(trunk: Config) -> None:
    config = copy_of(trunk, "earlier")
    for folder in checkpoint_folders(config.run_dir / "checkpoints"):
        document = json.loads((folder / "checkpoint.json").read_text())
        document["config"]["eval"] |= {"batches": 4}
        del document["config"]["eval"]["tokens"], document["began_at"]
        document["hash"] = hash_of_description(document)
        (folder / "checkpoint.json").write_text(json.dumps(document))
    assert read_description(checkpoint(config, 10)).config["eval"]["tokens"] == 4 * 2 * 16 == config.eval.tokens
    run(changed(config, train={"max_steps": 12}))
    assert steps(config) == [5, 10, 12]


@pytest.mark.slow
def test_going_back_may_be_killed_at_any_moment(trunk: Config) -> None:
    """The next start of the same command finds the run at the step or goes back to it, and loses nothing of the rest."""
    straight = changed(copy_of(trunk, "unkilled"), checkpoint={"resume": "step_00000005"})
    run(straight)
    for operation in range(1, 100):
        config = changed(copy_of(trunk, "kill"), checkpoint={"resume": "step_00000005"})
        folder = RunFolder(config.run_dir)
        survived = die_at(operation, lambda at=folder, config=config: enter(at, 5, config.checkpoint.resume))  # type: ignore[misc]
        run(config)
        assert_identical(config, straight)
        left = [path for path in folder.checkpoints.glob("left_behind_*") if path.is_dir()]
        assert [path.name for path in left] == ["left_behind_step_00000010"]
        kept = "".join(path.read_text() for path in sorted(config.run_dir.glob("left_behind_metrics*.jsonl")))
        assert [json.loads(row) for row in kept.splitlines()][:5] == rows(trunk)[5:]
        if survived:
            break
    assert operation > 5


# ---- what a start says ----


@pytest.mark.slow
def test_a_longer_run_says_where_the_rate_jumps_to_and_how_it_would_not(
    trunk: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(copy_of(trunk, "longer"), train={"max_steps": 20})
    run(config)
    line = next(message for message in caplog.messages if "learning rate" in message)
    assert line == (
        "at step 10 the learning rate changes from 1.00e-03 to 6.28e-03: set schedule.decay_steps=10 to keep the schedule"
    )
    assert rows(config)[10]["lr"] == pytest.approx(6.28e-3, rel=1e-3)
    caplog.clear()
    config = changed(copy_of(trunk, "longer"), train={"max_steps": 20}, schedule={"decay_steps": 10})
    run(config)
    assert "learning rate" not in caplog.text and rows(config)[10]["lr"] == pytest.approx(1e-3)


def test_a_longer_wsd_says_the_cooldown_too_as_that_follows_from_the_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wsd = tiny_config(tmp_path, schedule={"kind": "wsd"}, train={"max_steps": 1000})
    saved = Description(step=950, tokens=0, config=to_dict(wsd), tokenizer={}, dataset="")
    longer = changed(wsd, train={"max_steps": 2000})
    log_changes(saved, longer)
    assert "set schedule.decay_steps=1000 schedule.cooldown_steps=200 to keep the schedule" in caplog.messages[-1]
    caplog.clear()
    log_changes(saved, changed(longer, schedule={"decay_steps": 1000, "cooldown_steps": 200}))
    assert "learning rate" not in caplog.text


@pytest.mark.slow
def test_what_was_kept_before_giving_up_is_on_the_disk(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two planned checkpoints; the run resumes there."""
    from train.trainer import Trainer

    config = tiny_config(tiny, train={"max_bad_steps": 2}, checkpoint={"every_steps": 3}, eval={"every_steps": 0})
    straight = renamed(config, "straight")
    run(straight)
    real = Trainer.micro_batch

    def poisoned(self: Trainer, number: int) -> Any:
        if self.step >= 7:
            next(self.model.parameters()).register_hook(lambda grad: grad * math.nan)
        return real(self, number)

    monkeypatch.setattr(Trainer, "micro_batch", poisoned)
    with pytest.raises(Diverged, match="the weights of step 7 were kept: .*checkpoints/step_00000007;"):
        run(config)
    assert read_description(checkpoint(config, 7)).bad_steps == 0
    assert pointed_folder(config.run_dir / "checkpoints", "latest") == checkpoint(config, 7)
    monkeypatch.setattr(Trainer, "micro_batch", real)
    run(config)
    assert_identical(config, straight)


def test_a_run_without_one_good_step_keeps_nothing_and_says_so(tiny: Path) -> None:
    config = tiny_config(tiny, train={"max_bad_steps": 2}, optimizer={"lr": 1e30, "min_lr": 1e30, "grad_clip": 0.0})
    with pytest.raises(Diverged, match="the weights of step 1 were kept: .*step_00000001;"):
        run(config)
    infinite = changed(renamed(config, "infinite"), model={"init_from": ""})
    write_dataset(tiny / "data" / "tiny")
    from train.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        real = Trainer.micro_batch
        patch.setattr(Trainer, "micro_batch", lambda self, number: (spoil(self), real(self, number))[1])
        with pytest.raises(Diverged, match="or a spike: no step reached the weights; try"):
            run(infinite)
    assert not (infinite.run_dir / "checkpoints").exists()


def spoil(trainer: Any) -> None:
    next(trainer.model.parameters()).data[:] = math.nan


# ---- checkpoints that stay ----


@pytest.mark.slow
def test_permanent_checkpoints_stay_beside_the_newest_and_the_best(tiny: Path) -> None:
    config = tiny_config(tiny, train={"max_steps": 17}, checkpoint={"every_steps": 2, "keep": 2, "keep_every_steps": 5})
    run(config)
    best = pointed_folder(config.run_dir / "checkpoints", "best")
    assert best is not None
    assert {5, 10, 15, 16, 17} <= {*steps(config)} <= {5, 10, 15, 16, 17, int(best.name[5:])}


# ---- a new run from a checkpoint ----


@pytest.mark.slow
def test_a_branch_with_the_same_data_is_the_trunk_s_own_continuation(trunk: Config) -> None:
    config = branch_of(trunk, "same")
    run(config)
    for name, tensor in final_tensors(trunk).items():
        assert torch.equal(final_tensors(config)[name], tensor), name
    assert curve(config) == curve(trunk)[5:]
    assert [row["tokens"] for row in rows(config)] == [row["tokens"] for row in rows(trunk)[5:]]
    assert read_description(checkpoint(config, 10)).began_at == {"step": 5, "sample": 40, "tokens": 640}
    assert steps(trunk) == [5, 10] and read_description(checkpoint(trunk, 10)).began_at == {
        "step": 0, "sample": 0, "tokens": 0
    }  # fmt: skip


def test_a_cooldown_is_a_branch_while_the_trunk_goes_on_as_it_was(trunk: Config) -> None:
    """The rate falls linearly from where the branch begins; the trunk's is the same as without one, to the bit."""
    constant = {"kind": "wsd", "warmup_steps": 2, "decay_steps": 1000, "cooldown_steps": 500}
    straight = renamed(changed(trunk, schedule=constant, optimizer={"name": "muon"}), "wsd-straight")
    run(straight)
    going = renamed(straight, "wsd-trunk")
    stopped_at(going, 5)
    cooldown = branch_of(
        going,
        "cooldown",
        train={"max_steps": 9},
        schedule={"decay_steps": 0, "cooldown_steps": 4},
        optimizer={"min_lr": 0.0},
    )
    run(cooldown)
    assert [row["lr"] for row in rows(cooldown)] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    run(going)
    assert [row["lr"] for row in rows(going)][2:] == [1e-2] * 8
    for name, tensor in final_tensors(straight).items():
        assert torch.equal(final_tensors(going)[name], tensor), name


def test_another_optimizer_begins_its_state_anew_in_a_branch_and_is_no_resume(
    trunk: Config, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = changed(copy_of(trunk, "muon"), optimizer={"name": "muon"}, train={"max_steps": 12})
    with pytest.raises(UserError, match="cannot resume with optimizer.name 'adamw' -> 'muon': set them back"):
        run(resumed)
    config = branch_of(trunk, "muon-branch", optimizer={"name": "muon"})
    run(config)
    assert "optimizer.name adamw -> muon: its state starts from zero, the weights do not" in caplog.text
    assert rows(config)[0]["loss"] == rows(trunk)[5]["loss"], "the trunk's weights and samples"
    names = load_file(checkpoint(config, 10) / "training_state.safetensors")
    assert {name.split(".")[0] for name in names} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


def annealing(trunk: Config, name: str) -> Config:
    """Another mixture, twice the batch, a schedule of its own."""
    mixture = (WeightedDataset("tiny", 1.0), WeightedDataset("other", 3.0))
    return branch_of(
        trunk, name, data={"mixture": mixture}, train={"tokens_per_step": 256, "max_steps": 12},
        optimizer={"lr": 5e-3, "min_lr": 0.0, "weight_decay": 0.0}, schedule={"warmup_steps": 0}, eval={"tokens": 64},
    )  # fmt: skip


def test_everything_but_the_shapes_may_change_and_tokens_are_counted_on(trunk: Config) -> None:
    config = annealing(trunk, "annealed")
    run(config)
    assert [row["step"] for row in rows(config)] == list(range(6, 13))
    assert [row["tokens"] for row in rows(config)] == [640 + 256 * n for n in range(1, 8)]
    saved = read_description(checkpoint(config, 12))
    assert saved.began_at == {"step": 5, "sample": 0, "tokens": 640} and saved.tokens == 640 + 7 * 256
    evaluated = rows(config)[-1]
    assert evaluated["tokens_tiny"] + evaluated["tokens_other"] == 7 * 256, "the new mixture from its first sample on"


@pytest.mark.slow
@pytest.mark.parametrize("make", [branch_of, annealing])
def test_a_branch_stopped_after_any_step_ends_the_same(trunk: Config, make: Any) -> None:
    straight, chopped = make(trunk, "whole"), make(trunk, "chopped")
    run(straight)
    for step in range(6, straight.train.max_steps):
        stopped_at(chopped, step)
    run(chopped)
    for name, tensor in final_tensors(straight).items():
        assert torch.equal(final_tensors(chopped)[name], tensor), name
    assert [row["loss"] for row in rows(chopped)] == [row["loss"] for row in rows(straight)]
    assert read_description(checkpoint(chopped, straight.train.max_steps)).began_at["step"] == 5


@pytest.mark.slow
def test_a_branch_resumes_without_its_trunk_and_goes_back_inside_itself(trunk: Config) -> None:
    gone = copy_of(trunk, "gone")
    config = branch_of(gone, "orphan", checkpoint={"every_steps": 1, "keep": 20})
    stopped_at(config, 8)
    shutil.rmtree(gone.run_dir)
    run(config)
    wanted = final_tensors(config)
    run(changed(config, checkpoint={"resume": "step_00000007"}))
    for name, tensor in final_tensors(config).items():
        assert torch.equal(tensor, wanted[name]), name
    run(changed(config, run={"branch_from": ""}, checkpoint={"resume": "must"}, train={"max_steps": 12}))
    run(changed(config, train={"max_steps": 14}))
    assert steps(config)[-1] == 14 and not list((config.run_dir / "checkpoints").glob("damaged_*"))


@pytest.mark.slow
def test_a_branch_of_a_branch_counts_from_the_first_trunk(trunk: Config) -> None:
    first = annealing(trunk, "first")
    run(first)
    second = branch_of(first, "second", step=10, train={"max_steps": 14})
    run(second)
    assert read_description(checkpoint(second, 14)).began_at == {"step": 10, "sample": 5 * 16, "tokens": 640 + 5 * 256}


def test_a_branch_begins_at_the_latest_of_a_run_named_by_folder_or_name(trunk: Config) -> None:
    for number, source in enumerate((str(trunk.run_dir), trunk.run.name)):
        config = branch_of(trunk, f"latest{number}", train={"max_steps": 11})
        run(changed(config, run={"branch_from": source}))
        assert [row["step"] for row in rows(config)] == [11]


def test_a_branch_killed_before_its_first_checkpoint_begins_again(trunk: Config) -> None:
    config = branch_of(trunk, "killed")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 6, "loss": 1}\n')
    run(config)
    assert curve(config) == curve(trunk)[5:]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"n_layer": 3}}, r"has other shapes, model.n_layer 2 -> 3: set them back"),
        ({"model": {"block_size": 8}}, r"has other shapes, model.block_size 16 -> 8"),
        ({"train": {"max_steps": 5}}, r"is at step 5: set train.max_steps to more than that"),
        ({"data": {"dataset": "char"}}, r"has the vocabulary char"),
        ({"checkpoint": {"resume": "must"}}, r"nothing to resume: .*resume=must forbids a fresh start"),
        ({"checkpoint": {"resume": "step_00000005"}}, r"no checkpoint .*step_00000005: checkpoint.resume names it"),
    ],
)
def test_what_a_branch_cannot_be_is_one_line(trunk: Config, sections: dict[str, Any], message: str) -> None:
    if "data" in sections:
        sections = {"data": {"dataset": char_dataset(Path(trunk.data.data_dir) / "char")}}
    config = branch_of(trunk, "refused", **sections)
    with pytest.raises(UserError, match=message) as error:
        run(config)
    assert "\n" not in str(error.value) and not (config.run_dir / "checkpoints").exists()


def char_dataset(folder: Path) -> str:
    from pipeline.dataset.shards import Manifest, load_manifest
    from pipeline.vocabulary.char_byte_word import CharTokenizer

    write_documents(folder, {"train": [["abc" * 20] * 20], "val": [["abc" * 20] * 20]})
    manifest: Manifest = load_manifest(folder)
    replace(manifest, tokenizer=CharTokenizer("".join(map(chr, range(32, 300)))).spec()).save(folder)
    return folder.name


def test_a_trunk_that_is_damaged_absent_or_without_its_state_is_one_line(trunk: Config) -> None:
    broken = copy_of(trunk, "broken")
    config = branch_of(broken, "off")
    (checkpoint(broken, 5) / "training_state.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged: training_state.safetensors is missing"):
        run(config)
    description = checkpoint(broken, 5) / "checkpoint.json"
    document = json.loads(description.read_text())
    del document["files"]["training_state.safetensors"]
    description.write_text(json.dumps(document | {"hash": hash_of_description(document)}))
    with pytest.raises(UserError, match=r"has no training_state.safetensors: .*model.init_from"):
        run(config)
    description.unlink()
    with pytest.raises(UserError, match=r"is not a checkpoint of this program: it has no checkpoint.json"):
        run(config)
    for name in ("nowhere", str(trunk.run_dir / "checkpoints" / "step_00000006"), "hf:gpt2"):
        with pytest.raises(UserError, match=f"no checkpoint at run.branch_from={name}: expected"):
            run(changed(config, run={"branch_from": name}))


def test_a_run_cannot_become_a_branch_nor_a_branch_another_one(trunk: Config) -> None:
    config = changed(copy_of(trunk, "itself"), run={"branch_from": str(trunk.run_dir)}, train={"max_steps": 12})
    with pytest.raises(UserError, match="cannot resume with run.branch_from '' -> .*: set them back, choose another"):
        run(config)
    own = changed(config, run={"branch_from": str(config.run_dir)})
    with pytest.raises(UserError, match="cannot resume with run.branch_from"):
        run(own)
    branch = branch_of(trunk, "fixed")
    run(branch)
    with pytest.raises(UserError, match="cannot resume with run.branch_from"):
        run(changed(branch, run={"branch_from": str(checkpoint(trunk, 10))}))


@pytest.mark.slow
def test_two_ranks_branch_as_one_does(trunk: Config) -> None:
    """Killed in between, and with a batch and a mixture of the branch's own."""
    straight, chopped = annealing(trunk, "two_whole"), annealing(trunk, "two_chopped")
    for config, ends in ((straight, (12,)), (chopped, (7, 12))):
        for end in ends:
            part = changed(config, train={"max_steps": end}, schedule={"decay_steps": 12})
            result = run_program("train", "quickstart", *overrides(part), cwd=trunk.run_dir, ranks=2)
            assert result.returncode == 0, result.stderr
    one = annealing(trunk, "one")
    run(one)
    for name, tensor in final_tensors(straight).items():
        assert torch.equal(final_tensors(chopped)[name], tensor), name
    assert [row["loss"] for row in rows(chopped)] == pytest.approx([row["loss"] for row in rows(one)], rel=2e-4)
    assert [row["tokens"] for row in rows(chopped)] == [row["tokens"] for row in rows(one)]


# ---- while the trunk trains on ----


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["verify_files", "load_weights", "open_optimizer"])
def test_the_trunk_prunes_no_checkpoint_that_a_branch_is_reading(
    trunk: Config, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pruned by the next save, once it has been read."""
    module = {"verify_files": "train.resume", "load_weights": "train.run", "open_optimizer": "train.saving"}[moment]
    source = copy_of(trunk, f"trunk-{moment}")
    read = getattr(importlib.import_module(module), moment)

    def pruned_meanwhile(*arguments: Any) -> Any:
        prune_checkpoints(source.run_dir / "checkpoints", keep=1)
        assert steps(source) == [5, 10]
        return read(*arguments)

    monkeypatch.setattr(f"{module}.{moment}", pruned_meanwhile)
    config = branch_of(source, f"branch-{moment}", train={"max_steps": 12})
    run(config)
    assert status(config)["state"] == "done" and steps(config) == [10, 12]
    prune_checkpoints(source.run_dir / "checkpoints", keep=1)
    assert steps(source) == [10]


def test_a_checkpoint_that_the_trunk_has_pruned_is_one_line(trunk: Config) -> None:
    source = copy_of(trunk, "pruned")
    config = branch_of(source, "too-late", train={"max_steps": 12})
    prune_checkpoints(source.run_dir / "checkpoints", keep=1)
    with pytest.raises(UserError, match=r"no checkpoint at run\.branch_from=.*checkpoint\.keep_every_steps keeps them"):
        run(config)
