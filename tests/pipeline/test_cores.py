"""Cores that other programs want too, and memory: what is set, noticed and measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.machine import cores, device
from pipeline.machine.cores import CoreWatch, core_wait_s, share_cores
from pipeline.machine.device import keep_freed_memory, pick_dtype

CPU = torch.device("cpu")


def test_openmp_gives_up_its_core_soon_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_program_chooses_before_torch_is_there() -> None:
    program = (
        "import os, sys; sys.argv = ['pipeline', '--version']\nfrom pipeline.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    )
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    variables.pop("GOMP_SPINCOUNT", None)
    output = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "False 1000"


def test_waiting_for_cores_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    waited, clock = iter([0.0, 0.1, 5.0, 20.0]), iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(cores, "core_wait_s", lambda: next(waited))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    watch = CoreWatch()
    watch.look()
    assert caplog.text == ""
    watch.look()
    assert "in 10.0 s the" in caplog.text and "waited 4.9 s" in caplog.text and "OMP_NUM_THREADS=" in caplog.text
    caplog.clear()
    watch.look()
    assert caplog.text == "", "once"


def test_the_kernels_count_is_read_where_there_is_one() -> None:
    before = core_wait_s()
    assert 0 <= before <= core_wait_s()


@pytest.mark.parametrize(
    ("width", "seconds", "expected", "why"),
    [
        (768, (2e-3, 1e-3), torch.bfloat16, "a product takes 1.00 ms in bfloat16, 2.00 ms in float32"),
        (768, (2e-3, 1.9e-3), torch.float32, "a product takes 1.90 ms in bfloat16, 2.00 ms in float32"),
        (128, (2e-3, 1e-3), torch.float32, "narrower than 256 is slower in bfloat16"),
    ],
)
def test_a_cpu_takes_bfloat16_where_a_trial_is_faster(
    monkeypatch: pytest.MonkeyPatch, width: int, seconds: tuple[float, float], expected: torch.dtype, why: str
) -> None:
    monkeypatch.setattr(device, "product_seconds", lambda columns: seconds)
    found, reason = pick_dtype("auto", CPU, width)
    assert found == expected and why in reason


def test_the_trial_leaves_the_number_of_threads_and_asks_once() -> None:
    threads = torch.get_num_threads()
    found = device.product_seconds(64)
    assert min(found) > 0 and found is device.product_seconds(64)
    assert torch.get_num_threads() == threads


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    keep_freed_memory()  # musl and macOS have no mallopt
    with pytest.raises(UserError, match="float16 works on CUDA only"):
        pick_dtype("float16", CPU, 768)
