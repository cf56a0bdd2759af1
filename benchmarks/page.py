"""docs/benchmarks.md: the tables between its marks are made of docs/benchmarks.json; the prose around them is left alone.

`python -m benchmarks.page` writes it.
"""

import datetime
import statistics
from collections.abc import Iterable, Iterator

from benchmarks.measure import RESULTS, ROOT, Row, read_rows

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
TITLES = {
    "preparation": "Preparation", "loading": "Loading", "step": "A step, by part", "bookkeeping": "Logging and watching",
    "shakespeare": "Time to a loss", "decoding": "Decoding", "eval": "Evaluation", "checkpoint": "Saving",
    "startup": "Start-up", "memory": "Peak memory",
}  # fmt: skip


def with_results(text: str, rows: list[Row]) -> str:
    """The page with its tables anew."""
    before, _, after = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{results(rows)}\n{END}{after.partition(END)[2]}"


def results(rows: list[Row]) -> str:
    machines = list(dict.fromkeys(row.machine for row in rows))
    letters = {machine: chr(ord("A") + number) for number, machine in enumerate(machines)}
    lines = [f"- **{letters[machine]}**: {machine}; {software(machine, rows)}" for machine in machines]
    for group, title in TITLES.items():
        if found := [row for row in rows if row.group == group]:
            lines += ["", f"### {title}", "", *table(found, letters)]
    return "\n".join(lines)


def software(machine: str, rows: list[Row]) -> str:
    """Versions of the newest row on a machine."""
    newest = max((row for row in rows if row.machine == machine), key=lambda row: row.date)
    return ", ".join(f"{name} {number}" for name, number in newest.versions.items()) or "versions not recorded"


def table(rows: Iterable[Row], letters: dict[str, str] | None = None) -> Iterator[str]:
    """Medians, with the least and the largest of the turns where there were several."""
    yield "| what | here | peer | times better here | measured |"
    yield "|---|---|---|---|---|"
    for row in rows:
        peer = f"{row.peer}: {spread(row.there, row.unit) if row.there else f'not measured: {row.note}'}"
        day = datetime.date.fromisoformat(row.date)
        where = f"{letters[row.machine] if letters else row.commit}, {day.day} {day:%b %Y}"
        figure = f"{row.title}: {row.figure}"
        yield f"| {figure} | {spread(row.here, row.unit)} | {peer if row.peer else ''} | {spread(row.ratios)} | {where} |"


def spread(figures: list[float], unit: str = "") -> str:
    """`12.3 s (11.9 to 14)`; a peer that was not measured has none."""
    if not figures:
        return ""
    digits = 4 if unit == "nats" else 3
    middle = f"{number(statistics.median(figures), digits)} {unit}".strip()
    if len(figures) == 1:
        return middle
    return f"{middle} ({number(min(figures), digits)} to {number(max(figures), digits)})"


def number(figure: float, digits: int = 3) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.{digits}g}"


if __name__ == "__main__":
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), read_rows(RESULTS)), encoding="utf-8")
