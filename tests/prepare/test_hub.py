"""Datasets of the Hub, laid out in a local folder as Hugging Face's cache holds them: no network."""

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, get_ident
from typing import Any

import huggingface_hub.constants
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run_program
from test_corpus import documents, opened, refused, units, whole

from pipeline.errors import UserError
from prepare.run import PrepareOptions, run
from prepare.sources import hub as hub_sources
from prepare.sources.corpus import open_corpus
from prepare.sources.hub import parse_name
from prepare.sources.hub_parquet import HubName, HubParquet
from prepare.sources.names import hub_source
from prepare.units import Reading, Refused

COMMIT = "0123456789" * 4
TWO_CONFIGS = "---\nconfigs:\n- config_name: one\n  data_files: one/*\n- config_name: two\n  data_files: two/*\n---\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a machine without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def repository(hub: Path, source: str) -> Path:
    """The folder of a repository's files at the revision that is named, or that `main` points to."""
    name = parse_name(source)
    folder = hub / f"datasets--{name.repository.replace('/', '--')}"
    if not name.revision:
        write(folder / "refs" / "main", COMMIT)
    return folder / "snapshots" / (name.revision or COMMIT)


def without_pauses(folder: Path) -> dict[str, str]:
    """The environment of a program that never sleeps: the libraries' attempts are 20 s apart in all."""
    (folder / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def write_parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_openwebtext_from_the_cache(tmp_path: Path, hub: Path) -> None:
    folder = repository(hub, str(hub_source("openwebtext")))
    write_parquet(folder / "plain_text" / "train-00000-of-00002.parquet", [f"first {i}" for i in range(30)])
    write_parquet(folder / "plain_text" / "train-00001-of-00002.parquet", [f"second {i}" for i in range(30)])
    write(folder / "README.md", "---\nconfigs:\n- config_name: plain_text\n  data_files: plain_text/train-*\n---\n")
    assert documents(tmp_path, "openwebtext") == [f"{part} {i}" for part in ("first", "second") for i in range(30)]
    sources = opened(tmp_path, "openwebtext").record(lambda path: "hash")
    assert [entry["path"] for entry in sources] == [f"plain_text/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert {entry["repository"] for entry in sources} == {"Skylion007/openwebtext"}
    assert {entry["revision"] for entry in sources} == {"b4325f019c648b1641a1784748667e8b74e5e064"}
    assert all(entry["config"] == "plain_text" and entry["bytes"] > 0 and entry["hash"] for entry in sources)


@pytest.mark.parametrize(
    ("source", "repository", "config"),
    [
        ("tinystories", "roneneldan/TinyStories", None),
        ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("fineweb-edu:sample-350BT", "HuggingFaceFW/fineweb-edu", "sample-350BT"),
        ("fineweb-edu:default", "HuggingFaceFW/fineweb-edu", "default"),
    ],
)
def test_named_corpora_are_pinned(source: str, repository: str, config: str | None) -> None:
    name = parse_name(str(hub_source(source)))
    assert (name.repository, name.config) == (repository, config)
    assert re.fullmatch("[0-9a-f]{40}", str(name.revision))


def test_tinystories_leaves_its_own_validation_split_aside(tmp_path: Path, hub: Path) -> None:
    write_parquet(repository(hub, str(hub_source("tinystories"))) / "data" / "train-00000-of-00001.parquet", ["a", "b"])
    write_parquet(repository(hub, str(hub_source("tinystories"))) / "data" / "validation-00000-of-00001.parquet", ["c"])
    assert documents(tmp_path, "tinystories") == ["a", "b"]


def test_a_size_that_fineweb_edu_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fineweb-edu has no size '1T': expected sample-10BT, .*, default"):
        opened(tmp_path, "fineweb-edu:1T")


def test_a_repository_of_jsonl_is_streamed_and_only_its_train_split(tmp_path: Path, hub: Path) -> None:
    rows = "".join(f'{{"text": "row {i}", "id": {i}}}\n' for i in range(20)) + '{"text": null, "id": 20}\n'
    write(repository(hub, "hf:Org/Lines") / "train.jsonl", rows)
    write(repository(hub, "hf:Org/Lines") / "test.jsonl", '{"text": "test row", "id": 0}\n')
    assert documents(tmp_path, "hf:Org/Lines") == [*(f"row {i}" for i in range(20)), None]
    found = opened(tmp_path, "hf:Org/Lines")
    path = repository(hub, "hf:Org/Lines") / "train.jsonl"
    about = {"repository": "Org/Lines", "config": "default", "revision": COMMIT}
    assert found.record(str) == [
        {**about, "path": "train.jsonl", "bytes": path.stat().st_size, "hash": str(path.resolve())}
    ]
    (unit,) = units(found)
    assert list(unit.documents())[20] == (20, Refused("null"))
    assert unit.locate(20) == "Org/Lines row 20"


def test_a_local_copy_that_changes_is_seen(tmp_path: Path, hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = repository(hub, "hf:Org/Lines") / "train.jsonl"
    rows = "".join(f'{{"text": "row {i}"}}\n' for i in range(300))
    write(copy, rows)
    options = PrepareOptions(["hf:Org/Lines"], name="lines", data_dir=str(tmp_path / "data"), workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.__globals__, "finish", lambda *_, **__: pytest.fail("cut off"))
        with pytest.raises(pytest.fail.Exception):
            run(options)
    write(copy, rows.replace("row 7", "one 7"))
    with caplog.at_level(logging.INFO, "pipeline"):
        run(options)
    assert "Org/Lines changed: 1 finished units" in caplog.text
    run(options)
    write(copy, rows)
    with pytest.raises(UserError, match=r"sources differ \(.*train\.jsonl\)"):
        run(options)


def test_one_of_several_configs(tmp_path: Path, hub: Path) -> None:
    write_parquet(repository(hub, "hf:Org/Two") / "one" / "train-0.parquet", ["a", "b"])
    write_parquet(repository(hub, "hf:Org/Two") / "two" / "train-0.parquet", ["c", "d"])
    write(repository(hub, "hf:Org/Two") / "README.md", TWO_CONFIGS)
    assert documents(tmp_path, "hf:Org/Two:two") == ["c", "d"]
    for source in ("hf:Org/Two", "hf:Org/Two:three"):
        with pytest.raises(UserError, match=r"Org/Two has several configs: one, two; write hf:Org/Two:CONFIG"):
            opened(tmp_path, source)


def test_a_script_is_never_run(tmp_path: Path, hub: Path) -> None:
    write(repository(hub, "hf:Org/Old") / "Old.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"Org/Old could not be opened"):
        documents(tmp_path, "hf:Org/Old")
    assert not (tmp_path / "ran").exists()


def test_a_repository_without_a_train_split_says_which_there_are(tmp_path: Path, hub: Path) -> None:
    write(repository(hub, "hf:Org/Test") / "test.jsonl", '{"text": "a"}\n')
    with pytest.raises(UserError, match=r"Org/Test has no split 'train', its splits are: test"):
        documents(tmp_path, "hf:Org/Test")


def test_a_split_is_chosen_and_an_unknown_one_names_those_there_are(tmp_path: Path, hub: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(repository(hub, "hf:Org/Pages") / "data" / f"{split}-0.parquet", [split])
        write(repository(hub, "hf:Org/Lines") / f"{split}.jsonl", orjson.dumps({"text": split}).decode() + "\n")
    for source in ("hf:Org/Pages", "hf:Org/Lines"):
        for split in ("train", "validation"):
            found = open_corpus([source], Reading(split=split), tmp_path)
            assert [whole(document) for unit in units(found) for _, document in unit.documents()] == [split]
            assert [split in entry["path"] for entry in found.record(str)] == [True]
        with pytest.raises(UserError, match=r"has no split 'dev', its splits are: train, validation; choose with --sp"):
            open_corpus([source], Reading(split="dev"), tmp_path)


@pytest.mark.parametrize("source", ["hf:Org/Pages", "hf:Org/Lines"])
def test_a_local_copy_is_known_by_size_time_and_hash(tmp_path: Path, hub: Path, source: str) -> None:
    folder = repository(hub, source)
    path = folder / ("train.parquet" if source == "hf:Org/Pages" else "train.jsonl")
    if path.suffix == ".parquet":
        write_parquet(path, ["some words"])
    else:
        write(path, '{"text": "some words"}\n')
    options = PrepareOptions([source], name="x", data_dir=str(tmp_path / "data"), tokenizer="byte", workers=1)
    run(options)
    before = opened(tmp_path, source).stored
    run(options)
    content = path.read_bytes().replace(b"words", b"birds")
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 5))
    assert opened(tmp_path, source).stored != before
    run(options)  # the same bytes at another time are the same dataset
    path.write_bytes(content)
    with pytest.raises(UserError, match="was prepared differently: the sources differ"):
        run(options)


def test_a_dataset_that_is_named_twice_is_read_once(tmp_path: Path, hub: Path) -> None:
    write_parquet(repository(hub, "hf:Org/Pages") / "train.parquet", ["a"])
    write(repository(hub, "hf:Org/Lines") / "train.jsonl", '{"text": "b"}\n')
    sources = ("hf:Org/Pages", "hf:Org/Lines", f"hf:Org/Pages@{COMMIT}", "hf:Org/Lines@main")
    assert documents(tmp_path, *sources) == ["a", "b"]
    found = [source.passed_over for source in opened(tmp_path, *sources).sources]
    assert [len(each) for each in found] == [0, 0, 1, 1]
    assert found[2]["already listed"] == {"count": 1, "example": f"Org/Pages@{COMMIT}/train.parquet"}


class Downloads:
    """Stands in for `hf_hub_download`: which files were asked for, and those that wait until they are let go."""

    def __init__(self, found: HubParquet) -> None:
        self.found, self.asked, self.threads = found, [], set()  # type: ignore[var-annotated]
        self.released = {name: Event() for name in found.sizes}

    def __call__(self, repository: str, name: str, **_: Any) -> str:
        self.asked.append(name)
        self.threads.add(get_ident())
        assert self.released[name].wait(20)
        if name == "broken.parquet":
            raise ConnectionError("reset\nby peer")
        write_parquet(self.found.path(name), [name])
        return str(self.found.path(name))


def coming(hub: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[HubParquet, Downloads]:
    found = HubParquet(Reading(), HubName("Org/Far", "default", COMMIT), dict.fromkeys(names, 10))
    downloads = Downloads(found)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloads)
    return found, downloads


def test_a_listing_that_a_read_only_cache_refuses_stops_nothing(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets").write_text("not a folder")
    found, _ = coming(hub, monkeypatch, "a.parquet")
    hub_sources._save_listing(found.dataset, found)
    assert hub_sources._load_listing(found.dataset, "train") is None


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_next_file_is_downloaded_while_one_is_read(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, downloads = coming(hub, monkeypatch, "0.parquet", "1.parquet", "2.parquet")
    planned = {file.path: file.etag for file in found.stored()}
    assert sum(file.size for file in found.stored()) == 30, "known before anything is downloaded"
    files = found.downloaded()
    assert downloads.asked == []
    downloads.released["0.parquet"].set()
    assert next(files).path == str(found.path("0.parquet"))
    wait_for(lambda: downloads.asked == ["0.parquet", "1.parquet"])
    assert downloads.asked == ["0.parquet", "1.parquet"], "one ahead, and not all"
    assert get_ident() not in downloads.threads
    for name in ("1.parquet", "2.parquet"):
        downloads.released[name].set()
        assert next(files).path == str(found.path(name))
    assert list(files) == []
    assert {file.path: file.etag for file in found.stored()} == planned
    os.utime(found.path("1.parquet"))
    assert found.stored()[1].etag != planned[str(found.path("1.parquet"))], "as an edit would leave it"


def test_a_download_that_fails_in_the_background_is_the_same_one_line(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, downloads = coming(hub, monkeypatch, "0.parquet", "broken.parquet", "2.parquet")
    for event in downloads.released.values():
        event.set()
    files = found.downloaded()
    next(files)
    with pytest.raises(UserError) as caught:
        next(files)
    assert str(caught.value) == (
        "broken.parquet of dataset Org/Far is not in the cache and could not be downloaded (ConnectionError: reset by peer): "
        f"run pipeline fetch hf:Org/Far:default@{COMMIT} on a machine with a network"
    )
    assert downloads.asked == ["0.parquet", "broken.parquet"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"body": "a"}, "missing"),
        ({"text": 3}, "not text"),
        ({"text": None}, "null"),
    ],
)
def test_streamed_rows_are_checked(tmp_path: Path, hub: Path, row: dict[str, Any], words: str) -> None:
    write(repository(hub, "hf:Org/Bad") / "train.jsonl", orjson.dumps(row).decode() + "\n")
    ((reason, _, where),) = refused(tmp_path, "hf:Org/Bad")
    assert reason == words
    assert "Org/Bad row 0" in where


def test_a_streamed_file_that_is_damaged_is_one_line(tmp_path: Path, hub: Path) -> None:
    write(repository(hub, "hf:Org/Bad") / "train.jsonl", '{"text": "a"}\nnot json\n')
    with pytest.raises(UserError, match="Org/Bad") as caught:
        documents(tmp_path, "hf:Org/Bad")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_cannot_be_reached_names_the_way_without_a_network(tmp_path: Path) -> None:
    """A closed port of this machine stands for the Hub, so that the test is the same with and without a network."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", **without_pauses(tmp_path)}
    result = run_program("prepare", "hf:Org/Elsewhere", cwd=tmp_path, **environment)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert all(word in line for word in ("error: ", "Org/Elsewhere", "Couldn't reach", "pipeline fetch", "HF_HOME"))


def test_what_the_cache_lacks_names_the_way_to_get_it(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(
        UserError, match=r"Org/Any is not complete in .* cache .*run pipeline fetch hf:Org/Any on a mach"
    ):
        opened(tmp_path, "hf:Org/Any")


def test_without_datasets_the_command_to_install_it(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(repository(hub, "hf:Org/Any") / "train.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'datasets>=4\.0'"):
        documents(tmp_path, "hf:Org/Any")
