"""benchmarks/gpu_check.py, which is for machines with a GPU, at toy size on this CPU: so that it runs when one is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--device", "cpu", "--tiny", *options],
        env=os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_all_steps_pass_at_toy_size(tmp_path: Path) -> None:
    # On a busy machine the shares of 300 s, a part of them at toy size, may be short.
    done = check(tmp_path, "--seconds", "500")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert done.returncode == 0 and report["failed"] == [], done.stdout[-3000:] + done.stderr[-1000:]
    steps = [name for name, entry in report.items() if isinstance(entry, dict)]
    assert len(steps) == 11 and all("result" in report[name] for name in steps)
    # A step's most important numbers: the device's logits, and a resumed run's losses, against those expected.
    assert report["logits"]["result"]["logits, bfloat16"]["at most"] == 0.01
    assert (
        report["stop_and_resume"]["result"]["losses"]["value"] == 0
        and report["stop_and_resume"]["result"]["weights equal"]
    )
    assert report["training_speed"]["result"]["nanoGPT, 4"] == {
        "not measured": f"no {ROOT}/nanoGPT/model.py: pass --nanogpt"
    }


@pytest.mark.slow
def test_a_step_that_is_late_fails_alone(tmp_path: Path) -> None:
    done = check(tmp_path, "--seconds", "4.5", "--only", "training_speed,profile")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tokens_per_s" in report["training_speed"]["result"]["ours, 4"]
    assert report["profile"]["error"].startswith("Late:") and report["failed"][-1] == "profile"


@pytest.mark.slow
def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    done = check(tmp_path, "--only", "speed")
    assert done.returncode == 2 and "unknown steps ['speed']" in done.stderr
