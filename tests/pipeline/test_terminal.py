"""What a run looks like: a panel that keeps what matters at 60 columns, a curve, a line for files."""

import io
import logging
import math
from collections.abc import Iterator

import pytest
from rich.console import Console
from test_log import on_a_terminal, without_control_sequences

from pipeline import log
from pipeline.machine import terminal
from pipeline.machine.terminal import RunDisplay, RunPanel, format_duration, line, smoothed, sparkline
from pipeline.runs import RunSummary, State

RUN = RunSummary(
    State.RUNNING, 12_345, name="gpt2-124m", max_steps=600_000, loss=3.2104, val_loss=3.31, best_val_loss=3.2999, lr=6e-4,
    tokens=123_456_789, tokens_per_s=812_345.6, eta_s=123_456, grad_norm=0.52, mfu=0.412, peak_flops=8 * 989e12,
    data_wait=0.0012, memory_bytes=71_234_567_890, losses=tuple(3 + math.exp(-i / 50) for i in range(300)),
    scores={"hellaswag/acc": 0.2871},
)  # fmt: skip
SHOWN = (
    "gpt2-124m: running", "step 12,345 / 600,000", "1d 10h left", "loss 3.2104", "smoothed 3.0", "val 3.3100", "best 3.2999",
    "lr 6.00e-04", "gradient norm 0.5200", "rate 812,346 tokens/s", "MFU 41.2% of 7,912 TFLOP/s", "data wait 0.1%",
    "memory 71.23 GB", "hellaswag/acc 0.2871",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _restored_logger() -> Iterator[None]:
    before = log.logger.handlers, log.logger.level, log.logger.propagate
    yield
    log.logger.handlers, log.logger.level, log.logger.propagate = before


def drawn(run: RunSummary, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, highlight=False).print(RunPanel(run))
    file.seek(0)
    return file.read().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_panel_keeps_every_figure_at_any_width(width: int) -> None:
    lines = drawn(RUN, width)
    # Two columns less than the terminal: there a Ctrl-C shows as ^C.
    assert {len(each) for each in lines} == {width - 2}
    for figure in SHOWN:
        assert any(figure in each for each in lines), f"{figure}\n" + "\n".join(lines)
    assert any(bar in "".join(lines) for bar in terminal.BARS)


def test_a_panel_of_a_run_that_has_said_nothing_yet() -> None:
    text = "\n".join(drawn(RunSummary(State.UNKNOWN, 0, name="a\x1b[31m"), 60))
    assert "a\\x1b[31m: unknown" in text and "step 0  - left" in text and "loss - " in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert "\n".join(drawn(RUN, 60, "ascii")).isascii()


def test_a_dead_run_says_since_when() -> None:
    text = "\n".join(drawn(RunSummary(State.DEAD, 5, name="a", age_s=7200.0), 60))
    assert "a: dead 2:00:00 ago" in text


def test_a_curve_has_the_shape_of_its_values() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([0.0, 1.0, 2.0, 7.0], 10) == "▁▂▃█"
    assert sparkline([0.0] * 50 + [1.0] * 50, 4) == "▁▁██"
    assert sparkline([0.0, 7.0], 2, ascii_only=True) == "_#"


def test_the_smoothed_loss_is_not_pulled_to_zero_at_its_start() -> None:
    assert smoothed([]) is None
    assert smoothed([2.5]) == pytest.approx(2.5)
    assert smoothed([2.5] * 7) == pytest.approx(2.5)
    assert smoothed([9.0, *[2.5] * 300]) == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0:00:00"), (-3, "0:00:00"), (3725, "1:02:05"), (90_000, "1d 1h")]
)
def test_a_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_line_has_the_names_of_the_rows_and_numbers_that_a_program_reads() -> None:
    found = dict(pair.split("=") for pair in line(RUN).split(" "))
    assert found == {
        "step": "12345", "max_steps": "600000", "loss": "3.2104", "val_loss": "3.31", "best_val_loss": "3.2999", "lr": "0.0006",
        "grad_norm": "0.52", "tokens": "123456789", "tokens_per_s": "812346", "mfu": "0.412", "data_wait": "0.0012",
        "memory_bytes": "71234567890", "eta_s": "123456",
    }  # fmt: skip
    assert line(RunSummary(State.RUNNING, 7)) == "step=7"


def test_into_a_file_goes_a_line_every_interval_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    log.configure()
    with RunDisplay(lambda: RunSummary(State.RUNNING, round(now[0]))) as display:
        for second in range(1, 26):
            now[0] = second
            display.step_ended(is_last=second == 25)
    assert capsys.readouterr().err == "step=1\nstep=11\nstep=21\nstep=25\n"


DISPLAY = """
import logging
from pipeline import log
from pipeline.machine import terminal
from pipeline.runs import RunSummary, State
log.configure()
terminal.DRAW_INTERVAL_S = 0.0
with terminal.RunDisplay(lambda: RunSummary(State.RUNNING, step, max_steps=30, tokens_per_s=1234.0, eta_s=60.0)) as display:
    for step in range(1, 4):
        display.step_ended(is_last=False)
        log.logger.info("line [%d]", step)
"""


def test_on_a_terminal_it_is_a_panel_that_log_lines_do_not_tear() -> None:
    written, _ = on_a_terminal(DISPLAY, COLUMNS="60")
    lines = [each.strip() for each in without_control_sequences(written).replace("\r", "\n").split("\n")]
    assert "\x1b[" in written and sum("step 3 / 30" in each and "0:01:00 left" in each for each in lines) >= 1
    assert any("rate 1,234 tokens/s" in each for each in lines)
    assert [each for each in lines if each.startswith("line")] == ["line [1]", "line [2]", "line [3]"]


@pytest.mark.parametrize("kind", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_draw_gets_lines(kind: str) -> None:
    written, _ = on_a_terminal(DISPLAY, TERM=kind)
    assert "\x1b" not in written and "step=1 max_steps=30 tokens_per_s=1234 eta_s=60" in written


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    log.logger.setLevel(logging.WARNING)
    with RunDisplay(lambda: RUN) as display:
        display.step_ended(is_last=True)
    assert capsys.readouterr().err == ""
