"""A faster library in the place of tiktoken: the same bytes whatever it does, and it is gone at its first fault."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
import xxhash

from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from prepare import units
from prepare.encoding import engine, work
from prepare.encoding.engine import Checked, EngineFault, fast_libraries
from prepare.run import PrepareOptions, run
from prepare.unfinished.journal import Journal

REFERENCE = BytePairTokenizer("gpt2")
LIBRARIES = ["gigatoken", "fastokens"]
# Letters of Unicode 17, which gigatoken 0.10 knows and tiktoken 0.13 does not; and a space to fastokens 0.3.5 that is
# none to tiktoken.
NEW_LETTERS = "\u088f\u0c5c\ua7ce\U00010940\U000323b0\u180e"


def make_texts(count: int = 300) -> list[str]:
    chance = random.Random(7)
    parts = [
        "the",
        " cat",
        "  ",
        "\n",
        "\t",
        "'s",
        "'ll",
        "'",
        " 12",
        "é",
        "e\u0301",
        "東京",
        "。",
        "한국어",
        "ไทย",
        "🙂",
    ]
    parts += [
        "👨‍👩‍👧",
        "\u3000",
        "\u200b",
        "\x00",
        "<|endoftext|>",
        "def f(x):\n    return x\n",
        "=" * 40,
        *NEW_LETTERS,
    ]
    texts = ["".join(chance.choices(parts, k=chance.randint(1, 80))) for _ in range(count)]
    runs = [character * 5000 + "x" for character in "a \né東!1🙂"]
    return texts + runs + [f"{letter}'s {letter}1{letter}" for letter in NEW_LETTERS]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(units, "SMALLEST_UNIT_BYTES", 8192)
    path = tmp_path / "varied.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in make_texts()))
    return path


def prepared(source: Path, name: str, workers: int) -> dict[str, bytes]:
    """Every file of the dataset, the manifest among them."""
    options = PrepareOptions(
        [str(source)], name=name, data_dir=str(source.parent), workers=workers, shard_tokens=20_000
    )
    return {path.name: path.read_bytes() for path in run(options).iterdir() if path.name != ".lock"}


def by_tiktoken(source: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prepare.encoding.work.fast_libraries", lambda name, distrusted: [])
        return prepared(source, "by_tiktoken", 1)


class Honest:
    """What gigatoken promises to be."""

    def encode(self, content: bytes) -> npt.NDArray[np.uint32]:
        return REFERENCE.encode(content.decode()).astype(np.uint32)


class Liar(Honest):
    """Honest at first, then two neighbours change places: the byte count still comes out."""

    told = 0

    def encode(self, content: bytes) -> npt.NDArray[np.uint32]:
        ids = super().encode(content)
        self.told += len(content) < 1000  # the probes of characters are longer
        if self.told > 100 and 1 < len(ids) < 1000:
            ids[[0, 1]] = ids[[1, 0]]
        return ids


class Shortener(Honest):
    def encode(self, content: bytes) -> npt.NDArray[np.uint32]:
        return super().encode(content)[:-1]


class PanicException(BaseException):
    """As Rust's panics arrive: no Exception."""


class Panicker(Honest):
    def encode(self, content: bytes) -> npt.NDArray[np.uint32]:
        raise PanicException("index out of bounds")


def replace_library(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any]) -> None:
    """gigatoken is this one, and installed."""
    monkeypatch.setitem(engine._BUILDERS, "gigatoken", lambda: build().encode)
    monkeypatch.setattr(engine, "find_spec", lambda name: name)


def missing() -> Any:
    raise ImportError("libgigatoken.so")


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_dataset_is_the_same_with_and_without_it(
    source: Path, workers: int, library: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr("prepare.encoding.work.fast_libraries", lambda name, distrusted: [library])
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    assert prepared(source, "fast", workers) == by_tiktoken(source)
    assert "starting over" not in caplog.text


@pytest.mark.slow
def test_a_fault_that_another_task_met_counts_at_the_end(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    encode_missing, engines = work._encode_missing, []

    def met_elsewhere(journal: Journal, *arguments: Any, engine: str, **more: Any) -> None:
        encode_missing(journal, *arguments, engine=engine, **more)
        engines.append(engine)
        if engine == "gigatoken":
            journal.distrust(engine, "differs")

    monkeypatch.setattr(work, "_encode_missing", met_elsewhere)
    found = prepared(source, "fast", 1)
    assert len(engines) > 1 and found == by_tiktoken(source)


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_text_is_encoded_as_tiktoken_does(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr(engine, "CHECK_ONE_IN", 1 << 64)  # its own work, not mended by a check
    tokenizer = Checked(library)
    for text in make_texts(2000):
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), REFERENCE.encode(text))


def test_characters_that_only_one_of_the_two_knows_go_to_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    class KnowsMore(Honest):
        def encode(self, content: bytes) -> npt.NDArray[np.uint32]:
            return super().encode(content.replace("\ua7ce".encode(), "\ua7cd".encode()))

    replace_library(monkeypatch, KnowsMore)
    monkeypatch.setattr(engine, "CHECK_ONE_IN", 1)
    tokenizer = Checked("gigatoken")
    for text in ("\ua7ce's", "a \ua7ce", "é", "a"):
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), REFERENCE.encode(text))


def test_a_slice_is_checked_that_follows_from_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {i}".encode() for i in range(9000)]
    checked: list[bytes] = []
    encode = engine.Plain.encode

    def note(plain: engine.Plain, content: bytes) -> npt.NDArray[Any]:
        checked.append(content)
        return encode(plain, content)

    replace_library(monkeypatch, Honest)
    monkeypatch.setattr(engine.Plain, "encode", note)
    library = Checked("gigatoken")
    for text in texts:
        library.encode(text)
    first = {*texts[:2]}
    assert checked == [text for text in texts if text in first or xxhash.xxh3_64_intdigest(text) % 256 == 0]
    assert 20 < len(checked) < 90


@pytest.mark.parametrize("tells_its_size", [True, False])
def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch, tells_its_size: bool, tmp_path: Path) -> None:
    """It is built anew when it has grown by a limit, or where that is not told after so much text."""
    built: list[Honest] = []
    replace_library(monkeypatch, lambda: built.append(Honest()) or built[-1])
    monkeypatch.setattr(engine, "MAX_TEXT_BYTES", 99)
    statm = tmp_path / "statm"
    monkeypatch.setattr(engine, "_STATM", statm)
    resident = iter(range(0, 10_000, 60))
    monkeypatch.setattr(engine, "_resident_bytes", lambda: next(resident))
    monkeypatch.setattr(engine, "MAX_GROWTH_BYTES", 100)
    if tells_its_size:
        statm.write_text("")
    library = Checked("gigatoken")
    for _ in range(10):
        library.encode(b"x" * 50)
        library.end_unit()
    assert len(built) == 6


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Liar, "differs from tiktoken"),
        (Shortener, "lost or added text"),
        (Panicker, "raised PanicException (index out of bounds)"),
        (missing, "raised ImportError"),
    ],
)
def test_one_fault_starts_over_with_the_next_one(
    source: Path,
    build: Callable[[], Any],
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    replace_library(monkeypatch, build)
    monkeypatch.setitem(engine._BUILDERS, "fastokens", lambda: Liar().encode)
    assert prepared(source, "faulty", 1) == by_tiktoken(source)
    lines = [record.getMessage() for record in caplog.records if "starting over" in record.getMessage()]
    assert len(lines) == 2  # fastokens comes second, and lies here
    assert words in lines[0]
    assert lines[1].startswith("fastokens differs")


FAKES = {
    "lie": "        return (__import__('numpy').zeros_like(right) if seen > 20 else right)",
    "raise": "        raise RuntimeError('out of luck')",
    "die": "        os._exit(139) if seen > 20 else None\n        return right",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"), [("lie", "gigatoken "), ("raise", "out of luck"), ("die", "killed a worker")]
)
def test_a_fault_in_a_worker_starts_over_with_the_next_one(
    tmp_path: Path,
    source: Path,
    fault: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package of that name before the real one on the path, which worker processes take over."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "gigatoken.py").write_text(
        "import os\nfrom pipeline.vocabulary.byte_pair import BytePairTokenizer\nseen = 0\nclass Tokenizer:\n"
        "    @classmethod\n    def from_tiktoken(cls, path, pretokenizer):\n        return cls()\n"
        "    def encode(self, content):\n        global seen\n        seen += 1\n"
        "        right = BytePairTokenizer('gpt2').encode(content.decode()).astype('uint32')\n" + FAKES[fault] + "\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    assert prepared(source, "faulty", 2) == by_tiktoken(source)
    lines = [record.getMessage() for record in caplog.records if "starting over" in record.getMessage()]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_fault_is_told_and_an_interrupt_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_library(monkeypatch, Panicker)
    with pytest.raises(EngineFault, match="PanicException"):
        Checked("gigatoken").encode(b"a")

    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(engine._BUILDERS, "gigatoken", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Checked("gigatoken").encode(b"a")


# ---- where it is not used --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_the_package_all_is_as_before(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    assert fast_libraries(REFERENCE.name, set()) == []
    for workers in (1, 2):
        assert prepared(source, f"w{workers}", workers) == by_tiktoken(source)


def test_it_is_for_one_vocabulary() -> None:
    assert fast_libraries(ByteTokenizer().name, set()) == []


def test_one_at_fault_is_not_asked_again() -> None:
    pytest.importorskip("fastokens")
    assert "fastokens" in fast_libraries(REFERENCE.name, {"gigatoken"})
    assert fast_libraries(REFERENCE.name, set(LIBRARIES)) == []
