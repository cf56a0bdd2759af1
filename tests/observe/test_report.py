"""The report: what a browser makes of it, what it says without one, and that no run's content becomes code in it."""

import hashlib
import html
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import Page, open_browser
from conftest import run_program, write_dataset
from PIL import Image

from observe.report import run as report
from observe.report.page import MOST_ROWS
from observe.report.read import Run, Table
from observe.report.reduce import reduce
from observe.report.templates import resource
from pipeline.config.load import from_dict, to_toml
from pipeline.runs import RunFolder

UPLOT_SHA256 = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"  # of uplot@1.6.32 in npm's registry
HOSTILE = (
    "</script><img src=x onerror=hacked=1>&quot;'\"</textarea>\u2028\u2029\x00\x1b[2J\ud800\u202eevil\ufeff {{ 7*7 }}"
)
PHONE, DESKTOP = 390, 1280


def metrics(rows: int, level: float = 2.0, val_every: int = 5) -> list[dict[str, Any]]:
    """A falling curve with some noise that is the same each time, and a spike of the gradient norm."""
    found = []
    for step in range(1, rows + 1):
        row = {"step": step, "tokens": step * 1000, "loss": level + 3 / step + 0.05 * math.sin(step * 7)}
        row |= {
            "lr": 1e-3 * (1 - step / (2 * rows)),
            "grad_norm": 9.0 if step == rows // 2 else 1 + 0.1 * math.cos(step),
        }
        row |= {"tokens_per_s": 2000.0, "mfu": None, "data_wait": 0.01}
        found.append(row | ({"val_loss": level + 0.1 + 3 / step} if step % val_every == 0 else {}))
    return found


def write_run(folder: Path, rows: list[dict[str, Any]], events: list[dict[str, Any]] = [], **config: Any) -> Path:  # noqa: B006
    """A run's files as `train` writes them."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    sections = {"train": {"max_steps": 40, "tokens_per_step": 1000}, "model": {"n_layer": 1, "n_head": 1, "n_embd": 8}}
    document = {name: sections.get(name, {}) | config.get(name, {}) for name in sections | config}
    run.config.write_text(to_toml(from_dict(document | {"run": {"name": "any"}})))
    run.status.write_text(json.dumps({"state": "done", "step": len(rows), "reason": "", "exit_code": 0}))
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def written(folder: Path, *runs: Path | str, **files: Path) -> str:
    """The page about some runs."""
    report.run([str(run) for run in runs], folder / "report.html", png=files.get("png"), svg=files.get("svg"))
    return (folder / "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


class Tags(HTMLParser):
    """What a page is made of: its tags, their attributes, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


EVENTS: list[dict[str, Any]] = [
    {"step": 0, "event": "start", "at": ""}, {"step": 10, "event": "save", "at": ""},
    {"step": 10, "event": "start", "at": ""}, {"step": 10, "event": "sample", "at": "", "text": "old words"},
    {"step": 40, "event": "sample", "at": "", "text": "new words"}, {"step": 40, "event": "save", "at": ""},
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about two runs: one with everything there is, one with another learning rate."""
    folder = tmp_path_factory.mktemp("two")
    write_dataset(folder / "data" / "tiny")
    data = {"dataset": str(folder / "data" / "tiny")}
    first = write_run(folder / "first", metrics(40), EVENTS, data=data)
    skip = {"step": 19, "reason": "spike", "loss": "2.5", "grad_norm": "9.0"}
    RunFolder(first).bad_steps.write_text(json.dumps(skip) + "\n")
    (first / "evals.jsonl").write_text(
        '{"step": 20, "hellaswag/acc": 0.25, "tokens": 9, "settings": "x"}\n{"step": 40, "hellaswag/acc": 0.4}\n'
    )
    (first / "references.json").write_text('{"unigram_entropy": 2.41234, "bigram_entropy": "x"}')
    write_run(folder / "second", metrics(30, level=1.5), data=data, optimizer={"lr": 3e-3})
    written(folder, folder / "first", folder / "second")
    return folder / "report.html"


# ---- without a browser ----


def test_uplot_is_the_published_file_with_its_licence() -> None:
    assert hashlib.sha256(resource("uPlot.iife.min.js").encode()).hexdigest() == UPLOT_SHA256
    assert "The MIT License" in resource("uPlot.LICENSE.txt")


def test_the_page_tells_what_the_runs_are_and_how_they_differ(two: Path) -> None:
    page = two.read_text(encoding="utf-8")
    texts = Tags(page).texts
    for expected in ("first", "second", "optimizer.lr", "0.003", "old words", "new words", "40 of 40"):
        assert any(expected in text for text in texts), expected
    assert "unigram entropy, first 2.412" in page and "bigram" not in page, "a number that is none is left out"
    assert "Restarted at step 10" in page and "Saved at step 10, 40" in page
    assert "Skipped step 19 (spike, loss 2.5, gradient norm 9.0)" in page
    assert "The MIT License" in page
    assert "data.dataset" not in texts, "it is the same in both"
    assert "<polyline" in page and page.count("<circle") == 8 + 6, "the curve without JavaScript, a dot a val loss"


def test_the_curves_are_all_rows_on_each_axis(two: Path) -> None:
    first, second = data_of(two.read_text(encoding="utf-8"))["runs"]
    assert first["axes"]["step"] == list(range(1, 41)) and first["axes"]["tokens"][-1] == 40_000
    assert first["axes"]["hours"][-1] == pytest.approx(40_000 / 2000 / 3600)
    assert first["axes"]["flops"][-1] > 1e6
    assert second["columns"]["loss"][0] == pytest.approx(metrics(30, 1.5)[0]["loss"], rel=1e-5)
    assert first["columns"]["val_loss"][:5] == [None] * 4 + [pytest.approx(2.7)]
    assert first["marks"]["restart"]["step"] == [10] and first["marks"]["skip"]["tokens"] == [20_000]
    assert first["evals"]["columns"] == {"hellaswag/acc": [0.25, 0.4]} and first["evals"]["axes"]["tokens"] == [
        20_000,
        40_000,
    ]


def test_nothing_in_a_run_becomes_code(tmp_path: Path) -> None:
    events = [{"step": 3, "event": "sample", "at": HOSTILE, "text": HOSTILE}]
    folder = write_run(
        tmp_path / "a<b>&'\"\u202e", metrics(5), events, eval={"sample_prompt": "</script><img src=x onerror=hacked=1>"}
    )
    RunFolder(folder).status.write_text(
        json.dumps({"state": "failed", "step": 5, "reason": HOSTILE, "updated_at": HOSTILE})
    )
    RunFolder(folder).version.write_bytes(HOSTILE.encode("utf-8", "replace"))
    RunFolder(folder).bad_steps.write_text(
        json.dumps({"step": 1, "reason": HOSTILE, "loss": HOSTILE, "grad_norm": [HOSTILE]})
    )
    (folder / "evals.jsonl").write_text(json.dumps({"step": 4, HOSTILE: 1.5}) + "\n")
    other = write_run(tmp_path / "b", metrics(5), optimizer={"lr": 1e-2})
    page = written(tmp_path, folder, other, svg=tmp_path / "loss.svg", png=tmp_path / "loss.png")
    found = Tags(page)
    assert found.tags.count("script") == 2 and "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert any("{{ 7*7 }}" in text for text in found.texts), "a template's words are text too"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e\ufeff]", page)
    assert data_of(page)["runs"][0]["label"] == "a<b>&'\"\\u202e"
    ElementTree.parse(tmp_path / "loss.svg")


def test_the_policy_allows_our_script_and_style_alone(two: Path) -> None:
    page = two.read_text(encoding="utf-8")
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)"', page)[0])
    assert (
        policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy and "http" not in policy
    )
    loaded = [value for name, value in Tags(page).attributes if name in ("src", "href")]
    assert loaded == ["data:,"], "nothing is fetched"


def test_damage_is_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "damaged", metrics(20))
    content = RunFolder(folder).metrics.read_bytes()
    bad = [
        b"\xff\xfe",
        b"[1, 2]",
        b'{"loss": 1}',
        b'{"step": "x"}',
        b'{"step": true}',
        b"[" * 100_000,
        b'{"step": -1}',
        b'{"step": 1e3}',
    ]
    odd = (
        b'{"step": 21, "tokens": 21000, "loss": NaN, "lr": "x", "grad_norm": 1' + b"0" * 400 + b', "val_loss": null}\n'
    )
    RunFolder(folder).metrics.write_bytes(b"\n".join(bad) + b"\n" + content + odd + b'{"step": 22, "lo')
    for name in ("status.json", "config.toml", "version.txt"):
        (folder / name).write_bytes(b"\x00\xff{")
    page = written(tmp_path, folder)
    (run,) = data_of(page)["runs"]
    assert run["axes"]["step"] == list(range(1, 22)) and run["columns"]["loss"][-1] is None
    assert Run("", RunFolder(folder), "").damaged == len(bad)
    assert f"<td>{len(bad)}</td>" in page


@pytest.mark.parametrize("rows", [[], metrics(1), metrics(3, val_every=9), [{"step": 1}], [{"step": 1, "loss": None}]])
def test_a_run_with_few_rows_or_none_has_a_page(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    folder = write_run(tmp_path / "short", rows)
    RunFolder(folder).status.write_text('{"state": "running", "step": 0, "reason": ""}')
    page = written(tmp_path, folder, png=tmp_path / "a.png", svg=tmp_path / "a.svg")
    assert "short" in page and ("no loss was recorded" in page) == (
        not any("loss" in row and row["loss"] for row in rows)
    )
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("x", "y"):
        write_run(Path(place) / "same", metrics(5))
    labels = [run["label"] for run in data_of(written(tmp_path, "x/same", "y/same", "x/same"))["runs"]]
    assert labels == ["x/same", "y/same"]


def test_a_missing_run_is_one_line(tmp_path: Path) -> None:
    done = run_program("report", "nothing-here", cwd=tmp_path)
    assert done.returncode == 2 and "no run 'nothing-here'" in done.stderr and not list(tmp_path.glob("*.html"))


def test_a_long_curve_keeps_its_extremes_and_means() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[50_000], values[70_001], values[:300] = 40, -40, np.nan
    table = Table(np.arange(100_000), {"loss": values, "lr": np.linspace(1, 0, 100_000)})
    reduction = reduce(table, 3000)
    assert len(reduction.kept) <= 3000 and {0, 50_000, 70_001, 99_999} <= set(reduction.kept.tolist())
    assert np.isnan(values[reduction.kept][0]), "a gap stays one"
    means = reduction.means(values)
    first = reduction.kept[-1] // reduction.bucket * reduction.bucket
    assert means[-1] == pytest.approx(values[first : first + reduction.bucket].mean())
    assert reduce(table, 100_000).bucket == 1


def test_the_figure_is_drawn_as_svg_and_png(two: Path, tmp_path: Path) -> None:
    runs = two.parent / "first", two.parent / "second"
    written(tmp_path, *runs, svg=tmp_path / "loss.svg", png=tmp_path / "loss.png")
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    words = "".join(root.itertext())
    assert "first" in words and "best val 2.175" in words and "step" in words
    image = Image.open(tmp_path / "loss.png")
    assert image.size == (2580, 1290)
    counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 20)}
    assert counts[0xFF, 0xFF, 0xFF] > image.width * image.height / 2
    assert min(counts[0x0A, 0x7F, 0xD0], counts[0xD5, 0x5E, 0x00]) > 500, "both val curves"


# ---- in a browser ----


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def colored(page: Page, chart: int) -> int:
    """Pixels of a chart that are neither empty nor grey: those of the curves."""
    return page.run(
        f"(() => {{ const c = charts[{chart}].ctx.canvas, p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let n = 0; for (let i = 0; i < p.length; i += 4) n += p[i + 3] > 0 && Math.max(p[i], p[i + 1], p[i + 2])"
        " - Math.min(p[i], p[i + 1], p[i + 2]) > 60; return n })()"
    )


def change(page: Page, id: str, value: str, event: str = "change") -> None:
    page.run(
        f"(() => {{ const e = document.getElementById('{id}'); e.value = '{value}'; e.dispatchEvent(new Event('{event}')) }})()"
    )
    page.run("new Promise(requestAnimationFrame)")


def last(page: Page, series: int, chart: int = 0) -> float:
    return page.run(f"Array.from(charts[{chart}].data[{series}]).filter(v => v != null).at(-1)")


@pytest.mark.slow
def test_a_browser_draws_every_curve_and_asks_for_nothing(two: Path, chromium: Page) -> None:
    chromium.open(two)
    assert chromium.run("charts.length") == 6, "five panels and one of evals.jsonl"
    titles = chromium.run("[...document.querySelectorAll('.panel h3')].map(e => e.textContent)")
    assert titles[0] == "Loss (nats per token)" and titles[-1] == "Evaluation: hellaswag/acc"
    assert all(colored(chromium, chart) > 200 for chart in range(6))
    assert chromium.requests == [two.as_uri()] and chromium.complaints == []
    assert not chromium.run("document.getElementById('static').offsetHeight"), "the charts take the figure's place"
    labels = chromium.run("charts[0].series.map(s => s.label)")
    assert labels == ["steps", "first raw", "first", "first val", "second raw", "second", "second val"]


def test_runs_axes_scale_and_smoothing_change_the_curves(two: Path, chromium: Page) -> None:
    chromium.open(two)
    raw = metrics(40)[-1]["loss"]
    assert last(chromium, 1) == pytest.approx(raw, rel=1e-5) and last(chromium, 2) != pytest.approx(raw, rel=1e-5)
    change(chromium, "smoothing", "0", "input")
    assert last(chromium, 1) == pytest.approx(raw, rel=1e-5) and chromium.run("charts[0].series.length") == 5
    for axis, end in (("tokens", 40_000), ("hours", 40_000 / 2000 / 3600), ("step", 40)):
        change(chromium, "axis", axis)
        assert chromium.run("charts[0].scales.x.max") == pytest.approx(end)
    before = colored(chromium, 0)
    chromium.run("document.querySelectorAll('#runs input')[0].click()")
    assert chromium.run("charts[0].series.map(s => s.label)") == ["steps", "second", "second val"]
    assert chromium.run("charts[0].scales.x.max") == 30 and colored(chromium, 0) < before
    change(chromium, "scale", "log")
    assert chromium.run("charts[0].scales.y.distr") == 3 and colored(chromium, 0) > 100
    chromium.run("document.querySelectorAll('#runs input')[1].click()")
    assert chromium.run("charts[0].series.length") == 1, "no run is shown"
    assert chromium.complaints == []


def test_a_drag_zooms_all_panels_and_a_hover_reads_them(two: Path, chromium: Page) -> None:
    chromium.open(two)
    x, y, width = chromium.run(
        "(() => { const r = charts[0].over.getBoundingClientRect(); return [r.left, r.top + 50, r.width] })()"
    )
    chromium.drag(x + width / 4, y, x + width / 2)
    chromium.wait("charts.every(c => Math.abs(c.scales.x.min - 10) < 0.5 && Math.abs(c.scales.x.max - 20) < 0.5)")
    chromium.mouse("Moved", x + width / 2, y)
    chromium.wait("charts[2].cursor.idx != null && charts[2].cursor.left > 0")
    shown = chromium.run("[...charts[0].root.querySelectorAll('.u-value')].map(e => e.textContent)")
    assert shown[0] == "15" and float(shown[3]) == pytest.approx(metrics(40)[14]["val_loss"], rel=1e-3)
    learning_rate = chromium.run("charts[1].root.querySelectorAll('.u-value')[1].textContent")
    assert float(learning_rate) == pytest.approx(metrics(40)[14]["lr"], rel=1e-2), "the cursor is in every panel"
    for _ in range(2):
        chromium.mouse("Pressed", x + 9, y, button="left", buttons=1, clickCount=_ + 1)
        chromium.mouse("Released", x + 9, y, button="left", clickCount=_ + 1)
    chromium.wait("charts.every(c => c.scales.x.min === 0 && c.scales.x.max === 40)")
    assert chromium.complaints == []


def test_without_javascript_there_are_the_curve_and_the_tables(two: Path, chromium: Page) -> None:
    chromium.open(two, script=False)
    chromium.ask("Emulation.setScriptExecutionDisabled", value=False)  # for our questions; the page was read without
    assert chromium.run("document.querySelector('#static svg').getBoundingClientRect().height") > 300
    assert chromium.run("document.querySelectorAll('table').length") == 2
    assert not chromium.run("document.getElementById('controls').offsetHeight"), "controls would do nothing"


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_a_desktop_light_and_dark(two: Path, chromium: Page, width: int, dark: bool) -> None:
    chromium.open(two, width=width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") == width, "nothing sticks out"
    color = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", color))) < 200) == dark
    assert all(colored(chromium, chart) > 200 for chart in range(6))
    assert chromium.run("charts[0].width") <= width and chromium.complaints == []


def test_hostile_text_does_nothing_in_a_browser(tmp_path: Path, chromium: Page) -> None:
    events = [{"step": 3, "event": "sample", "at": "", "text": HOSTILE}]
    folder = write_run(tmp_path / "<img src=x onerror=hacked=1>", metrics(9), events)
    (folder / "evals.jsonl").write_text(json.dumps({"step": 4, HOSTILE: 1.5}) + "\n")
    written(tmp_path, folder)
    chromium.open(tmp_path / "report.html")
    assert chromium.run("typeof hacked") == "undefined" and chromium.run("document.images.length") == 0
    assert "<img src=x onerror=hacked=1>" in chromium.run("document.getElementById('runs').textContent")
    assert chromium.requests == [(tmp_path / "report.html").as_uri()] and chromium.complaints == []


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": None, "lr": 0.0}], metrics(1), metrics(3, val_every=9)])
def test_a_run_with_few_rows_or_none_opens(tmp_path: Path, chromium: Page, rows: list[dict[str, Any]]) -> None:
    written(tmp_path, write_run(tmp_path / "short", rows))
    chromium.open(tmp_path / "report.html")
    if rows:
        change(chromium, "scale", "log")
        change(chromium, "axis", "tokens")
    assert chromium.complaints == []


@pytest.mark.slow
def test_four_runs_of_100_000_rows_open_in_under_a_second(tmp_path: Path, chromium: Page) -> None:
    runs = [write_run(tmp_path / f"run-{n}", metrics(100_000, 2 + n / 10)) for n in range(4)]
    page = written(tmp_path, *runs)
    assert len(page) < 4e6 and sum(len(run["axes"]["step"]) for run in data_of(page)["runs"]) <= MOST_ROWS
    assert "of 100,000 rows" in page, "what was left out is said"
    assert all(max(run["columns"]["grad_norm"]) == 9 for run in data_of(page)["runs"]), "the spike is there"
    # The best of several: the machine may be busy with something else.
    assert min(chromium.open(tmp_path / "report.html") for _ in range(5)) < 1
    assert colored(chromium, 0) > 1000 and chromium.complaints == []
