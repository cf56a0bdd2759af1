"""--decontaminate: documents that contain evaluation texts are left out and listed."""

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from test_near_duplicates import kept_texts, make_words
from test_prepare_resume import contents, options_for

from pipeline.errors import UserError
from prepare import units
from prepare.encoding.contamination import evaluation_ngrams
from prepare.run import run

QUESTION = "What is the capital of a country that has never had any king or queen at all?"
ANSWER = "a very long answer of exactly eight words"


@pytest.fixture(autouse=True)
def _no_cache() -> None:
    evaluation_ngrams.cache_clear()


def prose(words: int, seed: int = 0) -> str:
    return " ".join(make_words(words, random.Random(seed)))


def prepare(tmp_path: Path, texts: list[str], *names: Path | str, name: str = "x", **more: Any) -> list[dict[str, str]]:
    """The list of documents that were left out."""
    source = write_jsonl(tmp_path, texts)
    run(options_for(tmp_path, source, name, tokenizer="byte", decontaminate=tuple(map(str, names)), **more))
    folder = tmp_path / "data" / name
    found = [json.loads(line) for line in (folder / "decontaminated.jsonl").read_text().splitlines()]
    skipped = orjson.loads((folder / "manifest.json").read_bytes())["skipped"]
    assert skipped.get("contaminated", {"count": 0})["count"] == len(found)
    return found


def write_rows(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif ".csv" in path.name or ".tsv" in path.name:
        table = io.StringIO()
        writer = csv.writer(table, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerows([row["question"], *row["choices"]] for row in rows)
        path.write_bytes(
            gzip.compress(table.getvalue().encode()) if path.suffix == ".gz" else table.getvalue().encode()
        )
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif path.suffix == ".txt":
        path.write_text("\n".join(text for row in rows for text in (row["question"], *row["choices"])))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"question": "Too short?", "choices": ["yes", "no"], "answer": 1},
    {"question": QUESTION, "choices": ["none", ANSWER], "answer": 0},
]


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.parquet", "e.jsonl.gz", "e.txt", "e.csv", "e.tsv.gz"])
def test_every_string_of_a_row_is_looked_for(tmp_path: Path, name: str) -> None:
    texts = [
        prose(50, 1), f"{prose(30, 2)} {QUESTION} {prose(30, 3)}", prose(40, 4),
        f"Loudly: {QUESTION.upper().replace(' ', ', ')}", f"{prose(9, 5)} {ANSWER}, {prose(9, 6)}",
        " ".join(QUESTION.split()[:12]), " ".join(ANSWER.split()[:7]), prose(50, 7),
    ]  # fmt: skip
    path = write_rows(tmp_path / name, ROWS)
    found = prepare(tmp_path, texts, path)
    assert sorted(kept_texts(tmp_path / "data" / "x")) == sorted(texts[at] for at in (0, 2, 5, 6, 7))
    lines = (tmp_path / "c.jsonl").read_bytes().splitlines(keepends=True)
    assert [entry["document"] for entry in found] == [
        f"{tmp_path / 'c.jsonl'} at byte {sum(map(len, lines[:at]))}" for at in (1, 3, 4)
    ]
    assert found[0]["words"] == " ".join(QUESTION.split()[:13]) and found[2]["words"] == ANSWER
    assert all(entry["evaluation_text"].startswith(f"{path} row ") for entry in found)
    if path.suffix != ".txt":  # there each line is a row
        assert {entry["evaluation_text"] for entry in found} == {f"{path} row 2"}


@pytest.mark.parametrize("place", [0, 131_072, 262_144, 4 << 20])
def test_it_is_found_wherever_it_lies_in_a_long_document(tmp_path: Path, place: int) -> None:
    """Pieces end after 131,072 characters; a document above 4 MB of a text file is read in blocks."""
    filler = prose(1_200_000)[: 5 << 20]
    for shift in (-40, 0, 7):
        at = max(filler.rfind(" ", 0, max(place + shift, 0)), 0)
        long = f"{filler[:at]} {QUESTION} {filler[at:]}"
        assert (
            len(
                prepare(
                    tmp_path, [long, prose(99, 1), prose(99, 2)], write_rows(tmp_path / "e.jsonl", ROWS), force=True
                )
            )
            == 1
        )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(long)
    (tmp_path / "corpus" / "b.txt").write_text(prose(99))
    options = options_for(
        tmp_path, tmp_path / "corpus", "files", tokenizer="byte", decontaminate=(str(tmp_path / "e.jsonl"),)
    )
    run(options)
    listed = (tmp_path / "data" / "files" / "decontaminated.jsonl").read_text().splitlines()
    assert [json.loads(line)["document"] for line in listed] == [str(tmp_path / "corpus" / "a.txt")]


def test_several_sources_are_looked_for_and_one_given_twice_counts_once(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "e.jsonl", ROWS)
    other = write_rows(tmp_path / "f.jsonl", [{"q": [{"nested": prose(30, 9)}, None, 5]}])
    odd = tmp_path / "g.jsonl"
    odd.write_text('{"q": "\\ud800 ' + prose(20, 8) + '", "n": NaN}')
    texts = [prose(50, 1), f"{QUESTION} {prose(9)}", prose(30, 9), prose(20, 8), prose(50, 3)]
    found = prepare(tmp_path, texts, rows, rows, other, odd)
    assert [entry["evaluation_text"] for entry in found] == [f"{rows} row 2", f"{other} row 1", f"{odd} row 1"]


def test_text_without_spaces_is_compared_by_characters(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "e.jsonl", [{"q": "東京タワーの高さは何メートルですか"}])
    found = prepare(
        tmp_path, ["前文。東京タワーの高さは何メートルですか。後", "東京タワーの高さ", "他の文", "四"], rows
    )
    assert len(found) == 1


def test_limits_count_documents_that_are_kept(tmp_path: Path) -> None:
    texts = [prose(50, at) + (f" {QUESTION}" if at % 2 else "") for at in range(20)]
    prepare(tmp_path, texts, write_rows(tmp_path / "e.jsonl", ROWS), limit_docs=6)
    assert sorted(kept_texts(tmp_path / "data" / "x")) == sorted(texts[:12:2])


@pytest.mark.slow
def test_workers_and_tasks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 1 << 12)
    texts = [prose(200, at) + (f" {QUESTION}" if at % 7 == 3 else "") for at in range(40)]
    rows = write_rows(tmp_path / "e.jsonl", ROWS)
    assert len(prepare(tmp_path, texts, rows, name="one")) == 6
    two: dict[str, Any] = {"decontaminate": (str(rows),), "workers": 2}
    run(options_for(tmp_path, tmp_path / "c.jsonl", "two", tokenizer="byte", **two))
    for task in (1, 0):
        evaluation_ngrams.cache_clear()
        options = {"decontaminate": (str(rows),), "task_id": task, "tasks": 2}
        run(options_for(tmp_path, tmp_path / "c.jsonl", "tasks", tokenizer="byte", **options))
    for name in ("two", "tasks"):
        assert contents(tmp_path / "data" / name) == contents(tmp_path / "data" / "one")


def test_other_evaluation_texts_make_another_dataset(tmp_path: Path) -> None:
    texts = [prose(50, at) for at in range(5)]
    rows = write_rows(tmp_path / "e.jsonl", ROWS)
    prepare(tmp_path, texts, rows)
    prepare(tmp_path, texts, rows)  # already prepared
    write_rows(rows, [{"question": f"{QUESTION} {QUESTION[::-1]}"}])
    evaluation_ngrams.cache_clear()
    with pytest.raises(UserError, match="decontaminate was "):
        prepare(tmp_path, texts, rows)
    run(options_for(tmp_path, tmp_path / "c.jsonl", "x", tokenizer="byte", force=True))
    assert not (tmp_path / "data" / "x" / "decontaminated.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.jsonl", '{"q": "too short"}\n', "none of its 1 texts has 8 words or more"),
        ("empty.jsonl", "", "none of its 0 texts has 8 words or more"),
        ("broken.jsonl", '{"q": ', "not JSON"),
        ("nowhere.jsonl", None, "no such file"),
        ("table.xls", "a", "no known suffix"),
        ("n" * 300, None, "no such file"),
    ],
)
def test_what_cannot_be_looked_for_is_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^--decontaminate .*{name}: .*{message}") as caught:
        prepare(tmp_path, [prose(20)], tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- tasks of the harness ----

TASK = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_texts_of_a_task_are_looked_for(tmp_path: Path, split: str) -> None:
    questions = write_rows(tmp_path / "questions.jsonl", ROWS)
    task = tmp_path / "tasks" / "choose.yaml"
    task.parent.mkdir()
    content = TASK.replace("QUESTIONS", str(questions)).replace("{test: ", f"{{{split}: ")
    task.write_text(content.replace("test_split: test", f"{split}_split: {split}"))
    texts = [prose(50, 1), f"{prose(30, 2)} {QUESTION}", f"{ANSWER}!", prose(50, 3)]
    found = prepare(tmp_path, texts, task)
    assert [entry["evaluation_text"] for entry in found] == [f"{task} row 2"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_an_unknown_task_names_those_that_are_like_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--decontaminate helaswag: no such file or task: did you mean hellaswag.*\?$"
    ):
        prepare(tmp_path, [prose(20)], "helaswag")


def test_without_the_harness_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(
        UserError, match=r"--decontaminate hellaswag: tasks require .*pip install 'gpt-pipeline\[eval\]'"
    ):
        prepare(tmp_path, [prose(20)], "hellaswag")
