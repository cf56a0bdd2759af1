"""Choosing a vocabulary: every form of --tokenizer, what is learnt and that it is always the same, and each refusal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, prose, tiny_config, tokenizer_named, write_template_json

from pipeline.checkpoint.load import load_model
from pipeline.dataset.shards import load_manifest
from pipeline.errors import UserError
from pipeline.vocabulary.byte_pair import GPT2_RANKS, BytePairTokenizer
from pipeline.vocabulary.char_byte_word import WordTokenizer
from pipeline.vocabulary.merges import PUBLISHED, merges_in, read_ranks, write_ranks
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer_json import JsonTokenizer
from prepare.encoding import vocabulary
from prepare.encoding.vocabulary import (
    check_name,
    learn_from,
    learn_vocabulary,
    learns_from_corpus,
    open_vocabulary,
)
from prepare.run import PrepareOptions, run
from prepare.units import Texts
from sample import run as sample
from sample.options import SampleOptions
from train.run import run as train

# ---- names ----


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "char", "byte", "word", "bpe:257", "bpe:65536"])
def test_a_name_is_known_before_there_is_a_corpus(name: str) -> None:
    assert check_name(name) == name
    assert learns_from_corpus(name) == (name in ("char", "word") or name.startswith("bpe:"))


@pytest.mark.parametrize("name", ["bpe:", "bpe:256", "bpe:1000001", "bpe:4k", "bpe:-1", "bpe:99999999999"])
def test_a_size_that_is_none_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"unknown tokenizer '{name}': expected bpe:N, .* N in 257 \.\. 1000000"):
        check_name(name)


def test_a_path_goes_by_its_files_name(tmp_path: Path) -> None:
    for file in ("own.tiktoken", "tokenizer.json"):
        (tmp_path / file).write_bytes(b"")
        assert check_name(str(tmp_path / file)) == file
    assert check_name(str(tmp_path)) == "tokenizer.json"
    with pytest.raises(
        UserError, match=f"tokenizer not found: {tmp_path}/gone.json; expected a tokenizer.json or .tik"
    ):
        check_name(str(tmp_path / "gone.json"))
    with pytest.raises(UserError, match="unknown tokenizer 'tokenizer.model': expected one of gpt2"):
        check_name("tokenizer.model")


# ---- those that are there ----


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_a_published_table_is_fetched_once_and_carried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = read_ranks(GPT2_RANKS.read_bytes())  # stands in for the table that only the network has
    published = tiktoken.Encoding(
        name, pat_str=PUBLISHED[name].pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 60_000}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {name: published}.__getitem__)
    tokenizer = open_vocabulary(name)
    assert tokenizer.files() == {"vocabulary.tiktoken": GPT2_RANKS.read_bytes()}
    for text in prose():
        assert tokenizer.encode(text).tolist() == published.encode_ordinary(text)


def test_a_vocabulary_that_cannot_be_fetched_is_one_line_for_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError(f"no route to {name}\nat all")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError) as caught:
        open_vocabulary("cl100k_base")
    assert str(caught.value) == (
        "cannot download the vocabulary cl100k_base (ConnectionError): connect to the network once, or set "
        "TIKTOKEN_CACHE_DIR to a folder with tiktoken's cached file, or use --tokenizer gpt2, which is built in"
    )


def test_a_rank_table_of_no_known_size_is_cut_as_cl100k_base_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(GPT2_RANKS.read_bytes().splitlines(keepends=True)[:1000]))
    with caplog.at_level("INFO", "pipeline"):
        tokenizer = open_vocabulary(str(path))
    assert (
        "own.tiktoken has 1,000 ranks, which matches no published table: assuming the pattern of cl100k_base"
        in caplog.text
    )
    assert isinstance(tokenizer, BytePairTokenizer) and tokenizer.pattern() == PUBLISHED["cl100k_base"].pattern
    assert (tokenizer.name, tokenizer.end_of_text, tokenizer.vocab_size) == ("own.tiktoken", 1000, 1001)


def test_gpt2s_table_by_its_path_gives_gpt2s_ids(tmp_path: Path) -> None:
    tokenizer = open_vocabulary(str(GPT2_RANKS))
    assert (tokenizer.name, tokenizer.vocab_size) == ("gpt2.tiktoken", 50_257)
    for text in prose():
        assert tokenizer.encode(text).tolist() == tokenizer_named("gpt2").encode(text).tolist()


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.tiktoken").write_bytes(write_ranks({b"a": 0}))
    with pytest.raises(UserError, match=r"own.tiktoken: the .tiktoken file has no token for byte 0x00"):
        open_vocabulary(str(tmp_path / "own.tiktoken"))


def write_json(folder: Path, end_of_text: str) -> Path:
    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    document["added_tokens"][0]["content"] = end_of_text
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("end_of_text", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>"])
def test_the_end_of_text_of_a_tokenizer_json_is_found(tmp_path: Path, end_of_text: str) -> None:
    tokenizer = open_vocabulary(str(write_json(tmp_path, end_of_text)))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (511, 512)
    assert 511 not in tokenizer.encode(f"a{end_of_text}")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<over>", {"content": "<over>"}])
def test_the_end_of_text_may_be_named_beside_it(tmp_path: Path, file: str, token: Any) -> None:
    write_json(tmp_path, "<over>")
    with pytest.raises(
        UserError, match=r"no end-of-text token: expected one of <\|endoftext\|>, </s>, .*eos_token in a"
    ):
        open_vocabulary(str(tmp_path))
    (tmp_path / file).write_text(json.dumps({"eos_token": token}))
    assert open_vocabulary(str(tmp_path)).end_of_text == 511
    (tmp_path / file).write_text("{")
    with pytest.raises(UserError, match=f"{file} is not JSON"):
        open_vocabulary(str(tmp_path))


def test_of_several_tokens_that_might_end_a_text_the_folder_names_the_one(tmp_path: Path) -> None:
    write_template_json(tmp_path)
    config, special = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"

    def found() -> str:
        tokenizer = open_vocabulary(str(tmp_path))
        return tokenizer.decode_bytes([tokenizer.end_of_text]).decode()

    special.write_text('{"eos_token": "<|begin|>"}')
    assert found() == "</s>"
    config.write_text('{"eos_token": "<no such token>"}')
    assert found() == "<|begin|>"
    special.unlink()
    assert found() == "<|endoftext|>"


def test_a_tokenizer_json_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}/tokenizer.json: .*KeyError: 'model'.*save it again"):
        open_vocabulary(str(tmp_path))


# ---- those that are learnt ----


def test_a_learnt_bpe_has_exactly_the_size_asked_for_and_end_of_text_last() -> None:
    for size in (257, 300, 512):
        tokenizer = learn_vocabulary(f"bpe:{size}", iter(prose()))
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (size, size - 1)
    small = learn_vocabulary("bpe:300", iter(prose()))
    assert isinstance(small, JsonTokenizer) and merges_in(small.document) is not None
    text = prose()[0]
    assert len(tokenizer.encode(text)) < len(small.encode(text)) < len(text)


def test_a_corpus_too_small_for_the_size_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.log.logger.propagate", True)
    with caplog.at_level("INFO", "pipeline"):
        tokenizer = learn_vocabulary("bpe:4096", iter(["abab"]))
    assert "bpe:4096: the corpus gives only 259 tokens" in caplog.text
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)
    assert tokenizer.token_bytes().tolist()[256:] == [2, 4, 0]


LEARN = """
import sys
from conftest import prose
from pipeline.files import hash_bytes
from prepare.encoding.vocabulary import learn_vocabulary
for name in ("bpe:700", "word", "char"):
    tokenizer = learn_vocabulary(name, iter(prose() * 3))
    print(hash_bytes(b"".join(tokenizer.files().values())), tokenizer.spec())
"""


@pytest.mark.slow
def test_the_same_documents_teach_the_same_vocabulary_whatever_the_threads() -> None:
    outputs = []
    for threads in ("1", "4", "4"):
        environment = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
        }
        result = subprocess.run(
            [sys.executable, "-c", LEARN], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0].splitlines()) == 3


def test_documents_are_read_once_and_never_held() -> None:
    for name in ("char", "word", "bpe:300"):
        documents = iter(prose())
        learn_vocabulary(name, documents)
        assert next(documents, None) is None


def test_a_long_document_is_learned_from_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which there are several: the trainer holds what it is handed, and a document may be a book of hundreds of MB."""
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("prepare.encoding.pieces.NEAR_CHARACTERS", 50)
    document = "some words of it\nand an endlesslylongoneinthemiddle of others" * 5
    seen: list[str] = []
    learn = vocabulary.learn_vocabulary
    monkeypatch.setattr(
        vocabulary, "learn_vocabulary", lambda name, texts: learn(name, (seen.append(text) or text for text in texts))
    )
    learned = learn_from([Texts((document.encode(), b"", b"x"), len(document), "", 0)], "word", None)
    assert "".join(seen) == document + "x" and max(map(len, seen)) <= 100 and len(seen) > 3
    assert learned.spec() == learn("word", iter([document, "x"])).spec()


@pytest.mark.parametrize(
    "documents",
    [
        [" ".join(f"word{i}" for i in range(20_000))],
        ["the same line\n" * 20_000],
        [f"document number {i} of many" for i in range(8_000)],
        ["the same document"] * 8_000,
        [" ".join(f"word{i}" for i in range(20_000)), *(f"a short one {i}" for i in range(50))],
    ],
    ids=["one", "one of equal pieces", "many", "equal", "mixed"],
)
def test_a_vocabulary_is_learnt_from_about_as_much_text_as_it_needs(
    monkeypatch: pytest.MonkeyPatch, documents: list[str]
) -> None:
    monkeypatch.setattr("prepare.encoding.pieces.PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(vocabulary, "LEARN_BYTES", 20_000)
    seen: list[str] = []
    monkeypatch.setattr(
        vocabulary, "learn_vocabulary", lambda name, texts: (seen.extend(texts), learn_vocabulary(name, seen))[1]
    )
    size = sum(map(len, documents))
    items = [Texts(tuple(text.encode() for text in documents), size, "", 0)]
    for name in ("word", "bpe:300"):
        seen.clear()
        learned = learn_from(items, name, None)
        if documents[0] != "the same document":
            assert 10_000 <= sum(map(len, seen)) <= 40_000
        assert learned.spec() == learn_from(items, name, None).spec()
        assert learned.vocab_size > (4 if name == "word" else 257)


def test_words_come_by_frequency_then_by_the_word_and_the_rare_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["b a c a", "c b a d e"]
    whole = learn_vocabulary("word", iter(documents))
    assert isinstance(whole, WordTokenizer) and whole.words == ["a", "b", "c", "d", "e"]
    monkeypatch.setattr(vocabulary, "MAX_WORDS", 3)
    few = learn_vocabulary("word", iter(documents))
    assert few.encode("e a b c d").tolist() == [3, 0, 1, 2, 3] and few.vocab_size == 5
    monkeypatch.setattr(vocabulary, "MAX_COUNTED_WORDS", 2)
    assert learn_vocabulary("word", iter(["a a a", "b c d", "e a"])).encode("a").tolist() == [0]


def test_the_largest_word_vocabulary_still_takes_two_bytes() -> None:
    words = [f"w{i}" for i in range(vocabulary.MAX_WORDS)]
    tokenizer = WordTokenizer(words)
    assert tokenizer.vocab_size == 65_536 and tokenizer.encode("w0").dtype == np.uint16


# ---- from prepare to sample ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    parts = [part for text in prose() for part in text.split("\n\n")] + [
        "a literal <|endoftext|> in the text",
        "strange",
    ]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts if part))
    return path


def tokenizer_option(name: str, folder: Path) -> str:
    """What to type for one of the kinds, its file written where one is needed."""
    if name == "own.tiktoken":
        (folder / name).write_bytes(b"".join(GPT2_RANKS.read_bytes().splitlines(keepends=True)[:1000]))
    elif name.endswith(".json"):
        (folder / name).write_bytes(tokenizer_named(name).files()["tokenizer.json"])
    return str(folder / name) if "." in name else name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bpe:512", "word", "char", "own.tiktoken", "merges.json", "unigram.json"])
def test_a_vocabulary_goes_from_prepare_to_sample(
    name: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"data_dir": str(tmp_path / "data"), "tokenizer": tokenizer_option(name, tmp_path)}
    folder = run(PrepareOptions([str(corpus)], name="tiny", workers=2, **options))
    alone = run(PrepareOptions([str(corpus)], name="alone", workers=1, **options))
    manifest = load_manifest(folder)
    assert manifest == load_manifest(alone)
    for file in (path for path in folder.iterdir() if path.name != ".lock"):
        assert file.read_bytes() == (alone / file.name).read_bytes()
    tokenizer = from_spec(manifest.tokenizer, folder)
    assert manifest.options["tokenizer"] == tokenizer.name
    if name.endswith((".json", ".tiktoken")):
        Path(options["tokenizer"]).unlink()  # what follows needs the dataset alone
    ids = np.concatenate([np.fromfile(path, manifest.dtype) for path in sorted(folder.glob("*.bin"))])
    documents = manifest.count("train", "documents") + manifest.count("val", "documents")
    assert (ids == tokenizer.end_of_text).sum() == documents  # none for the literal one
    assert ids.max() < tokenizer.vocab_size

    config = tiny_config(tmp_path, train={"max_steps": 2}, eval={"every_steps": 0}, checkpoint={"every_steps": 2})
    train(config)
    saved = tmp_path / "runs" / "run" / "checkpoints" / "step_00000002"
    assert load_model(saved)[1].spec() == manifest.tokenizer
    sample.run(SampleOptions(ckpt=str(saved), prompts=["the text"], max_new_tokens=20, seed=1))
    assert capsys.readouterr().out.startswith("the text")
    sample.run(SampleOptions(ckpt=str(saved), prompts=["the text"], max_new_tokens=20, seed=1, json=True))
    row = json.loads(capsys.readouterr().out)
    prompt = tokenizer.encode("the text").tolist()
    before, after = (
        tokenizer.decode_bytes(ids).decode(errors="replace") for ids in (prompt, prompt + row["token_ids"])
    )
    assert before + row["text"] == after  # with the space between them, where the vocabulary leaves it to words


@pytest.mark.slow
def test_training_refuses_a_dataset_whose_vocabulary_is_gone(corpus: Path, tmp_path: Path) -> None:
    run(PrepareOptions([str(corpus)], name="tiny", data_dir=str(tmp_path / "data"), tokenizer="word", workers=1))
    (tmp_path / "data" / "tiny" / "vocabulary.json").unlink()
    with pytest.raises(
        UserError, match="data/tiny has no vocabulary.json, which holds the vocabulary word: restore it"
    ):
        train(tiny_config(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_another_file_of_the_same_name_is_no_reason_to_keep_a_dataset(corpus: Path, tmp_path: Path) -> None:
    path = Path(tokenizer_option("own.tiktoken", tmp_path))
    options = PrepareOptions([str(corpus)], data_dir=str(tmp_path / "data"), tokenizer=str(path), workers=1)
    run(options)
    run(options)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:900]))
    with pytest.raises(UserError, match="the vocabulary .*own.tiktoken has another fingerprint"):
        run(options)
