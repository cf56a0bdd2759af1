"""The tokenizer of a checkpoint's folder, opened offline by transformers: the same ids and the same text as ours."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ALPHABET, TOKENIZERS, prose, tokenizer_named

from pipeline.huggingface import tokenizer_files

transformers = pytest.importorskip("transformers")


def random_texts() -> list[str]:
    chance = np.random.default_rng(0)
    found = ["".join(chance.choice(list(ALPHABET), size=60)) for _ in range(300)]
    return [*found, "", "   ", "a" * 200, "end \n ", "x\n\n\n  y  \r\n"]


def twin_of(name: str, folder: Path) -> "transformers.PreTrainedTokenizerBase":
    for file, content in tokenizer_files(tokenizer_named(name)).items():
        (folder / file).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
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
        assert twin.encode(text, add_special_tokens=False) == ids, repr(text)
        if name != "word":  # ours keeps to print's rules, transformers' has its own
            assert twin.decode(ids) == ours.decode_bytes(ids).decode(), repr(text)
    assert twin.eos_token_id == ours.end_of_text and twin.eos_token == end_of_text
    assert twin.encode(end_of_text, add_special_tokens=False) == [ours.end_of_text]
    assert max(twin.get_vocab().values()) < ours.vocab_size


def test_unknown_words_and_their_token_are_the_same_to_transformers(tmp_path: Path) -> None:
    ours, twin = tokenizer_named("word"), twin_of("word", tmp_path)
    ids = twin.encode("the xyzzy calendar", add_special_tokens=False)
    assert ids == ours.encode("the xyzzy calendar").tolist()
    assert ids[1] == twin.unk_token_id == ours.vocab_size - 2
    assert twin.decode(ids) == "the <|unk|> calendar"


def test_an_unknown_character_is_refused_there_too(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="UNK"):
        twin_of("char", tmp_path).encode("字")
