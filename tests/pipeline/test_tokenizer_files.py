"""The tokenizer of a checkpoint's folder, opened offline by transformers: the same ids and the same text as ours."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import ALPHABET, TOKENIZERS, prose, tokenizer_named

from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.huggingface_files import tokenizer_files
from pipeline.vocabulary.merges import merges_in, write_ranks
from pipeline.vocabulary.tokenizer_json import JsonTokenizer
from prepare.encoding.vocabulary import open_vocabulary

transformers = pytest.importorskip("transformers")


def random_texts() -> list[str]:
    chance = np.random.default_rng(0)
    found = ["".join(chance.choice(list(ALPHABET), size=60)) for _ in range(300)]
    return [*found, "", "   ", "a" * 200, "end \n ", "x\n\n\n  y  \r\n"]


def twin_of(name: str, folder: Path) -> "transformers.PreTrainedTokenizerBase":
    for file, content in tokenizer_files(tokenizer_named(name), 64).items():
        (folder / file).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_knows_how_much_the_model_reads(tmp_path: Path) -> None:
    assert twin_of("byte", tmp_path).model_max_length == 64


LARGE = ("cl100k_base", "o200k_base")  # a second each, to find their merges


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in TOKENIZERS]
)
def test_transformers_encodes_and_decodes_as_ours_does(name: str, tmp_path: Path) -> None:
    ours, twin = tokenizer_named(name), twin_of(name, tmp_path)
    end_of_text = ours.decode_bytes([ours.end_of_text]).decode()
    known = set("".join(prose()))
    for text in (*prose(), *random_texts()):
        # Written out, a special token is found by transformers and is text to us.
        text = text.replace("<|endoftext|>", "").replace("<|unk|>", "")
        if name == "char":
            text = "".join(character for character in text if character in known)
        ids = ours.encode(text).tolist()
        assert twin(text)["input_ids"] == ids, repr(text)
        if name != "word":  # ours keeps to print's rules, transformers' has its own
            assert twin.decode(ids) == ours.decode_bytes(ids).decode(), repr(text)
    assert twin.eos_token_id == ours.end_of_text and twin.eos_token == end_of_text
    assert twin.encode(end_of_text, add_special_tokens=False) == [ours.end_of_text]
    assert max(twin.get_vocab().values()) < ours.vocab_size


def library_pieces(count: int) -> list[str]:
    """Paragraphs of the standard library's source, docstrings and comments: all with more than ASCII, then others."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    texts = (path.read_bytes().decode("utf-8", errors="ignore") for path in files)
    pieces = list(dict.fromkeys(piece for text in texts for piece in text.split("\n\n") if piece))
    strange = [piece for piece in pieces if not piece.isascii()][: count // 2]
    plain = [piece for piece in pieces if piece.isascii()][: count - len(strange)]
    return [*strange, *plain]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "bpe:512"])
def test_ten_thousand_real_documents_are_the_same_to_transformers(name: str, tmp_path: Path) -> None:
    ours, twin = tokenizer_named(name), twin_of(name, tmp_path)
    texts = [text.replace("<|endoftext|>", "") for text in library_pieces(10_000)]
    assert len(texts) == 10_000 and sum(not text.isascii() for text in texts) > 100
    theirs = twin(texts, add_special_tokens=False)["input_ids"]
    assert theirs == [ours.encode(text).tolist() for text in texts]
    assert twin.batch_decode(theirs) == [ours.decode_bytes(ids).decode() for ids in theirs] == texts


def test_unknown_words_and_their_token_are_the_same_to_transformers(tmp_path: Path) -> None:
    ours, twin = tokenizer_named("word"), twin_of("word", tmp_path)
    ids = twin.encode("the xyzzy calendar", add_special_tokens=False)
    assert ids == ours.encode("the xyzzy calendar").tolist()
    assert ids[1] == twin.unk_token_id == ours.vocab_size - 2
    assert twin.decode(ids) == "the <|unk|> calendar"


def test_an_unknown_character_is_refused_there_too(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="UNK"):
        twin_of("char", tmp_path).encode("字")


def test_a_table_with_tokens_that_no_merge_makes_is_the_same_to_transformers(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b" whole": 257, b"xyz": 258, b"abc": 259}
    ours = BytePairTokenizer("odd.tiktoken", write_ranks(ranks))
    for file, content in tokenizer_files(ours, 64).items():
        (tmp_path / file).write_bytes(content)
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = open_vocabulary(str(tmp_path))
    for text in ("xyz", "xyzxyz", "the whole abc", "abab abcabc"):
        ids = ours.encode(text).tolist()
        assert twin.encode(text) == ids == again.encode(text).tolist()
    assert ours.encode("xyz").tolist() == [258]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "own.tiktoken", "bpe:512", "merges.json"])
def test_the_folders_tokenizer_prepares_other_data_as_fast(name: str, tmp_path: Path) -> None:
    """A tokenizer.json that a checkpoint carries is proven equal to a rank table, so tiktoken encodes for it."""
    twin_of(name, tmp_path)
    again = open_vocabulary(str(tmp_path))
    assert isinstance(again, JsonTokenizer) and merges_in(again.document) is not None
    assert again.token_bytes().tolist() == tokenizer_named(name).token_bytes().tolist()
    for text in prose():
        assert again.encode(text).tolist() == tokenizer_named(name).encode(text).tolist()
