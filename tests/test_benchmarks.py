"""The harness of the benchmarks: turns, ratios, results that never change machine, the page, and what counts as a regression.

The figures themselves are nobody's promise.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare import LEAST_TURNS, Verdict, interval, judge
from benchmarks.measure import (
    HERE,
    RESULTS,
    Machine,
    Measurement,
    Options,
    Row,
    Sides,
    measure,
    merge,
    read_rows,
    take_turns,
    write_rows,
)
from benchmarks.page import PAGE, TITLES, number, results, spread, with_results

TODAY = Machine("machine A", "2026-11-26", "abc", {"torch": "2.13.0"})


def stand_in(here: list[float], there: list[float], unit: str) -> Measurement:
    """Sides that play back their figures, after one warm-up turn; a peer that lacks a figure, and one that cannot run."""

    @contextmanager
    def sides(options: Options) -> Iterator[Sides]:
        ours, theirs = iter([0.0, *here]), iter([0.0, *there])
        yield {
            HERE: lambda: {"figure": next(ours), "alone": 1.0}, "peer": lambda: {"figure": next(theirs)},
            "other": "set OTHER",
        }  # fmt: skip

    return Measurement("group.case", "case", {"figure": unit, "alone": "ms"}, sides, turns=len(here))


@pytest.mark.parametrize(("unit", "ratios"), [("s", [2.0, 1.5, 4.0]), ("tokens/s", [0.5, 1 / 1.5, 0.25])])
def test_every_figure_of_every_turn_is_kept_and_ratios_are_by_turn(unit: str, ratios: list[float]) -> None:
    rows = measure(stand_in([1.0, 2.0, 1.0], [2.0, 3.0, 4.0], unit), Options(), TODAY)
    paired, missing, *alone = rows
    assert (paired.here, paired.there, paired.peer) == ([1.0, 2.0, 1.0], [2.0, 3.0, 4.0], "peer")
    assert paired.ratios == pytest.approx(ratios)
    assert (paired.machine, paired.date, paired.commit) == ("machine A", "2026-11-26", "abc")
    assert (missing.peer, missing.there, missing.note) == ("other", [], "set OTHER")
    assert [(row.figure, row.here, row.ratios) for row in alone] == [("alone", [1.0] * 3, [])] * len(alone)


def test_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def side(name: str) -> dict[str, float]:
        order.append(name)
        return {}

    taken = take_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 3)
    assert order == [*"ab", *"ba", *"ab"]
    assert {name: len(turns) for name, turns in taken.items()} == {"a": 3, "b": 3}


def row(name: str, peer: str, there: list[float], machine: str = "machine A") -> Row:
    return Row(name, "figure", peer, title="case", unit="s", here=[1.0], there=there, ratios=there, machine=machine,
               date="2026-11-26", commit="abc")  # fmt: skip


def test_what_is_measured_again_replaces_its_rows_alone(tmp_path: Path) -> None:
    old = [row("a.x", "peer", [2.0]), row("a.x", "nanoGPT", [3.0]), row("a.x", "gone", []), row("b.y", "peer", [4.0])]
    new = [row("a.x", "peer", [5.0], "machine B"), row("a.x", "nanoGPT", [], "machine B")]
    merged = merge(old, [*new, row("c.z", "peer", [6.0], "machine B")])
    assert [(each.key[::2], each.there, each.machine) for each in merged] == [
        (("a.x", "peer"), [5.0], "machine B"),
        (("a.x", "nanoGPT"), [3.0], "machine A"),  # not measured now: its row stays, with its machine
        (("b.y", "peer"), [4.0], "machine A"),
        (("c.z", "peer"), [6.0], "machine B"),
    ]
    write_rows(tmp_path / "results.json", merged)
    assert read_rows(tmp_path / "results.json") == merged
    assert len((tmp_path / "results.json").read_text().splitlines()) == len(merged) + 2


def test_tables_show_medians_spread_and_each_rows_machine() -> None:
    rows = [
        row("step.x", "peer", [2.0, 9.0, 3.0]),
        replace(row("step.x", "nanoGPT", [], "machine B"), note="set NANOGPT"),
    ]
    text = results(rows)
    assert "| case: figure | 1 s | peer: 3 s (2 to 9) | 3 (2 to 9) | A, 26 Nov 2026 |" in text
    assert "nanoGPT: not measured: set NANOGPT" in text and "- **B**: machine B" in text
    assert [number(figure) for figure in (12345.6, 12.34, 1.234, 0.01234)] == ["12,346", "12.3", "1.23", "0.0123"]
    assert spread([]) == ""


def test_the_page_is_what_the_results_give() -> None:
    text, rows = PAGE.read_text(encoding="utf-8"), read_rows(RESULTS)
    assert text == with_results(text, rows), "python -m benchmarks.page writes it anew"
    assert {row.group for row in rows} <= set(TITLES), "a group without a title is not shown"


def test_the_prose_of_the_page_is_left_alone() -> None:
    before, after = "# Benchmarks\n", "\n## Missed\n"
    page = f"{before}<!-- results -->\nold\n<!-- end of results -->{after}"
    assert with_results(page, []) == f"{before}<!-- results -->\n\n<!-- end of results -->{after}"


# ---- what is a regression ----


def noisy(middle: float, spread: float, turns: int = 10, seed: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [middle * drawn.lognormvariate(0, spread) for _ in range(turns)]


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        (noisy(1.3, 0.05), Verdict.REGRESSION),
        (noisy(1 / 1.3, 0.05), Verdict.IMPROVEMENT),
        (noisy(1.0, 0.01), Verdict.SAME),
        (noisy(1.02, 0.001), Verdict.SAME),  # certain, and too little to matter
        (noisy(1.0, 0.3), Verdict.UNCERTAIN),
        ([1.2] * 5 + [0.8] * 5, Verdict.UNCERTAIN),
        ([1.2] * 9 + [0.1], Verdict.REGRESSION),  # one lucky turn is not an excuse
    ],
)
def test_a_regression_is_more_than_noise_and_more_than_little(ratios: list[float], verdict: Verdict) -> None:
    assert judge(ratios) is verdict


def test_noise_alone_seldom_fails() -> None:
    found = [judge(noisy(1.0, 0.1, seed=seed)) for seed in range(1000)]
    assert found.count(Verdict.REGRESSION) <= 25  # at 95 %, one side of it


def test_the_interval_of_a_median_needs_six_turns() -> None:
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)
    assert interval([float(turn) for turn in range(1, 11)]) == (2.0, 9.0)
    with pytest.raises(AssertionError, match="5 turns say nothing at 95%"):
        interval([1.0] * (LEAST_TURNS - 1))
