"""Parts -> shards: the split rule, where shards end, duplicates, and statistics against plain counting."""

import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pipeline.errors import UserError
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from prepare.assembly import duplicates
from prepare.assembly.duplicates import mark_duplicates
from prepare.assembly.shards import Assembly, lay_out_shards, statistics, write_shard, written_shard
from prepare.assembly.splits import SplitByHash, SplitByPosition, SplitFinder, numbered_parts, split_position
from prepare.encoding.encode import EncodingOptions, UnitEncoder, UnitJob
from prepare.unfinished.parts import Part
from prepare.units import Texts

BYTES = ByteTokenizer()
U2 = np.dtype("<u2")


def make_parts(folder: Path, texts: list[str], in_part: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    encoder = UnitEncoder(EncodingOptions(tokenizer=BYTES.spec(), parts=folder, vocabulary=folder, seed=0))
    for item, at in enumerate(range(0, len(texts), in_part)):
        unit = Texts(tuple(text.encode() for text in texts[at : at + in_part]), 1, "", at)
        encoder.encode(UnitJob(item=f"{item:06d}", unit=0, last=True, work=unit))
    return sorted(folder.glob("*.part"))


def find_rule(parts: list[Path], fraction: float, marks: Path | None = None) -> SplitByHash:
    return SplitFinder(parts, BYTES, fraction, marks).find(parts[0].parent / "heads")


def half(text: str) -> int:
    return xxhash.xxh3_128_intdigest(text.encode(), 0) >> 64


def assembly(folder: Path, rule: SplitByHash, marks: Path | None = None) -> Assembly:
    (folder / "shards").mkdir(exist_ok=True)
    return Assembly(parts=folder, folder=folder / "shards", vocab_size=BYTES.vocab_size, rule=rule, duplicates=marks)


def documents_of(path: Path) -> list[str]:
    ids = np.fromfile(path, U2)
    assert ids[-1] == 256
    return [bytes(each[:-1].astype(np.uint8)).decode() for each in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_small_corpus_has_both_splits_and_only_the_nearest_document_moves(
    tmp_path: Path, fraction: float, count: int
) -> None:
    texts = [f"document {i}" for i in range(count)]
    parts = make_parts(tmp_path, texts)
    rule = find_rule(parts, fraction)
    val = [text for part, each in numbered_parts(parts, U2) for text in texts[each.number :][: each.stop]
           if rule.heads(part, each)[texts.index(text) - each.number, 0] == 0]  # fmt: skip
    ranked = sorted(texts, key=half)
    assert val == ([ranked[0]] if fraction < 0.5 else [text for text in texts if text != ranked[-1]])
    assert rule.record()["fraction"] == fraction


@pytest.mark.parametrize(("texts", "words"), [(["x"] * 3, "same single token"), (["x"], "single token")])
def test_a_corpus_that_cannot_be_split_is_refused(tmp_path: Path, texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_rule(make_parts(tmp_path, texts), 0.1)


@pytest.mark.parametrize("fraction", [1e-18, 0.5, 0.999999])
def test_a_document_of_two_characters_still_gives_both_splits(tmp_path: Path, fraction: float) -> None:
    parts = make_parts(tmp_path, ["ab"])
    rule = find_rule(parts, fraction)
    made = assembly(tmp_path, rule)
    shards = [write_shard((made, layout)) for layout in lay_out_shards(parts, made, 10)]
    assert [documents_of(tmp_path / "shards" / shard.file) for shard in shards] == [["a"], ["b"]]
    assert [(shard.bytes, shard.documents) for shard in shards] == [(1, 1), (1, 0)]


def test_a_lone_document_is_never_cut_inside_a_character(tmp_path: Path) -> None:
    """GPT-2's vocabulary splits rare characters over several tokens."""
    tokenizer = BytePairTokenizer("gpt2")
    text = "ab" + "𒀀" * 5
    ids = tokenizer.encode(text)
    for fraction in np.linspace(0.02, 0.98, 40).tolist():
        cut = split_position(ids, tokenizer, fraction)
        assert 0 < cut < len(ids)
        tokenizer.decode_bytes(ids[:cut].tolist()).decode()


def shares(folder: Path, texts: list[str], fraction: float, parts: int = 3) -> tuple[list[list[str]], SplitByHash]:
    """The documents of each split as `prepare` would write them, and the rule."""
    paths = make_parts(folder, texts, in_part=-(-len(texts) // parts))
    made = assembly(folder, find_rule(paths, fraction))
    shards = [write_shard((made, layout)) for layout in lay_out_shards(paths, made, 10**9)]
    assert [shard.file for shard in shards] == ["train_00000.bin", "val_00000.bin"]
    found = [documents_of(folder / "shards" / shard.file) for shard in shards]
    assert sum(shard.documents for shard in shards) == len(texts)
    assert [shard.documents + shard.tails for shard in shards] == [len(each) for each in found]
    assert [shard.bytes for shard in shards] == [len("".join(each).encode()) for each in found]
    assert made.rule.record().get("cut_documents", 0) == sum(shard.tails for shard in shards)
    return found, made.rule


NOTES = ["a note", "another note"]


def counting(words: int) -> str:
    return " ".join(map(str, range(words)))


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.01, 0.99])
@pytest.mark.parametrize(
    "texts",
    [
        [*NOTES, counting(10_000)],
        ["x", counting(10_000)],
        [counting(200)] * 40,
        [*NOTES * 50, counting(900), "two é" + counting(5000), counting(700), "two é" + counting(5000)],
        [f"{number}: {counting(300)}" for number in range(9)],
        [*NOTES * 2000, *(f"{number} words" for number in range(1500)), counting(1000)],
        ["an equal sentence"] * 3000,
    ],
    ids=["one long", "two", "equal", "unequal", "few", "many duplicates", "equal sentences"],
)
def test_val_has_about_its_share_of_the_tokens(tmp_path: Path, texts: list[str], fraction: float) -> None:
    (train, val), rule = shares(tmp_path / "a", texts, fraction)
    sizes = [sum(len(text.encode()) + 1 for text in split) for split in (train, val)]
    assert fraction / 2 <= sizes[1] / sum(sizes) <= 2 * fraction
    assert (1 - fraction) / 2 <= sizes[0] / sum(sizes)
    # What is cut is all there, in order.
    whole = Counter(texts)
    tails = [text for text in val if text not in whole]
    heads = [text for text in train if text not in whole]
    cut = Counter(head + tail for head, tail in zip(heads, tails, strict=True))
    assert sum(cut.values()) == rule.record().get("cut_documents", 0)
    assert cut + Counter(text for text in train + val if text in whole) == whole
    assert not set(train) & set(val)
    again, _ = shares(tmp_path / "b", texts, fraction, parts=7)
    assert again == [train, val]


def test_documents_that_fit_are_never_cut(tmp_path: Path) -> None:
    """Five documents of equal length: one of them is a fifth, near enough to a tenth."""
    (train, val), rule = shares(tmp_path, [f"{number} words and more" * 100 for number in range(5)], 0.1)
    assert (len(train), len(val)) == (4, 1) and not isinstance(rule, SplitByPosition)


def test_a_fraction_of_zero_leaves_val_empty(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, ["x"] * 3)
    made = assembly(tmp_path, find_rule(parts, 0))
    assert [layout.name for layout in lay_out_shards(parts, made, 10**9)] == ["train_00000"]


@pytest.mark.slow
@pytest.mark.parametrize("shard_tokens", [1, 30, 200, 10**9])
def test_a_shard_is_closed_by_the_document_that_fills_it(tmp_path: Path, shard_tokens: int) -> None:
    chance = random.Random(0)
    texts = [f"{i} " + "x" * chance.randint(0, 40) for i in range(100)]
    parts = make_parts(tmp_path, texts, in_part=7)
    made = assembly(tmp_path, find_rule(parts, 0.3))
    layouts = lay_out_shards(parts, made, shard_tokens)
    for split in ("train", "val"):
        mine = [text for text in texts if (half(text) < int(0.3 * 2**64)) == (split == "val")]
        wanted: list[list[str]] = [[]]
        for text in mine:
            if sum(len(each) + 1 for each in wanted[-1]) >= shard_tokens:
                wanted.append([])
            wanted[-1].append(text)
        shards = [write_shard((made, layout)) for layout in layouts if layout.split == split]
        assert [documents_of(tmp_path / "shards" / shard.file) for shard in shards] == wanted
        assert [shard.documents for shard in shards] == [len(each) for each in wanted]
        assert [shard.bytes for shard in shards] == [sum(map(len, each)) for each in wanted]
        for shard in shards:
            assert shard.hash == xxhash.xxh3_128_hexdigest((tmp_path / "shards" / shard.file).read_bytes())


def test_long_runs_are_copied_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [chr(97 + i % 26) * (i * 7 % 50 + 1) for i in range(40)]
    parts = make_parts(tmp_path, texts)
    made = assembly(tmp_path, SplitByHash(0.5, 2**63))
    (train, val) = lay_out_shards(parts, made, 10**9)
    whole = [write_shard((made, layout)) for layout in (train, val)]
    monkeypatch.setattr("prepare.assembly.shards.COPY_TOKENS", 5)
    assert [write_shard((made, layout)) for layout in (train, val)] == whole


def test_a_written_shard_is_found_again(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, ["a", "b", "c", "d"])
    made = assembly(tmp_path, SplitByHash(0.5, 2**63))
    layout = lay_out_shards(parts, made, 10)[0]
    assert written_shard(made, layout) is None
    assert write_shard((made, layout)) == written_shard(made, layout)


@pytest.mark.parametrize("at_once", [2_000_000, 30, 1])
def test_later_duplicates_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """In one file of hashes, in several, and in as many as there may be."""
    monkeypatch.setattr(duplicates, "RECORDS_PER_FILE", at_once)
    chance = random.Random(3)
    texts = [f"text {chance.randint(0, 120)}" for _ in range(300)]
    parts = make_parts(tmp_path, texts, in_part=11)
    marks = mark_duplicates((Part(path, U2).hashes for path in parts), len(texts), tmp_path)
    wanted = [text in texts[:i] for i, text in enumerate(texts)]
    assert np.fromfile(marks.path, np.bool_).tolist() == wanted
    first = wanted.index(True)
    assert (marks.count, marks.clusters) == (sum(wanted), [[texts.index(texts[first]), first]])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", *[".part"] * len(parts)]


def test_duplicates_are_in_no_shard(tmp_path: Path) -> None:
    texts = [f"text {i % 40}" for i in range(150)]
    parts = make_parts(tmp_path, texts)
    marks = mark_duplicates((Part(path, U2).hashes for path in parts), len(texts), tmp_path).path
    made = assembly(tmp_path, find_rule(parts, 0.3, marks), marks)
    shards = [write_shard((made, layout)) for layout in lay_out_shards(parts, made, 50)]
    found = [text for shard in shards for text in documents_of(tmp_path / "shards" / shard.file)]
    assert sorted(found) == sorted(set(texts))


def test_duplicates_of_one_document_leave_a_lone_one(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, ["abcdefghij"] * 5)
    marks = mark_duplicates((Part(path, U2).hashes for path in parts), 5, tmp_path).path
    made = assembly(tmp_path, find_rule(parts, 0.2, marks), marks)
    shards = [write_shard((made, layout)) for layout in lay_out_shards(parts, made, 50)]
    assert [documents_of(tmp_path / "shards" / shard.file) for shard in shards] == [["abcdefgh"], ["ij"]]
    assert [(shard.bytes, shard.documents) for shard in shards] == [(8, 1), (2, 0)]


def test_entropies_are_those_of_plain_counting(tmp_path: Path) -> None:
    texts = [f"the {i} cat {i * i} sat" for i in range(60)]
    parts = make_parts(tmp_path, texts)
    made = assembly(tmp_path, find_rule(parts, 0.2))
    layouts = lay_out_shards(parts, made, 10**9)
    shards = [write_shard((made, layout)) for layout in layouts]
    found = statistics(made, layouts, shards)
    ids = np.fromfile(tmp_path / "shards" / "train_00000.bin", U2).tolist()

    def entropy(counts: Counter[object]) -> float:
        total = sum(counts.values())
        return -sum(n / total * math.log(n / total) for n in counts.values())

    pairs = Counter(pairwise(ids))
    assert found["unigram_entropy_nats"] == pytest.approx(entropy(Counter(ids)), abs=1e-4)
    assert found["bigram_entropy_nats"] == pytest.approx(entropy(pairs) - entropy(Counter(ids[:-1])), abs=1e-4)
    text_bytes = sum(len(text.encode()) for text in texts)
    assert found["bytes_per_token"] == pytest.approx(text_bytes / (text_bytes + len(texts)), abs=1e-4)
