"""What `--tokenizer` names -> a tokenizer: a published vocabulary, a file of the user's, or one learnt from the corpus."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer, WordTokenizer, split_words
from pipeline.vocabulary.huggingface_files import has_vocabulary, open_json
from pipeline.vocabulary.merges import PUBLISHED, published_for, read_ranks, write_ranks
from pipeline.vocabulary.specs import TIKTOKEN_NAMES, unknown_name
from pipeline.vocabulary.tokenizer import END_OF_TEXT, JSON_FILE, Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer
from prepare.storage.assets import assets

LEAST_BPE, MOST_BPE = 257, 1_000_000  # the 256 bytes and end-of-text; five times the largest in use
# With <|unk|> and <|endoftext|> just what two bytes an id can hold.
MOST_WORDS = (1 << 16) - 2
# Distinct words held while counting: 200 MB, and 360 while the rarer half is forgotten, which happens beyond it.
MOST_COUNTED = 1 << 21
# One text handed to the trainer: a document may be a book of hundreds of MB, and the trainer holds what it is handed.
PIECE_CHARACTERS = 1 << 20


def check_name(name: str) -> str:
    """The name a spec will carry: a file's without its folder. Raises UserError for what is no tokenizer."""
    if name.startswith("bpe:"):
        _bpe_size(name)
    return _file(name).name if is_file(name) else name


def is_file(name: str) -> bool:
    """Whether the vocabulary is in a file of the user's."""
    return name not in (*TIKTOKEN_NAMES, "byte") and not learns_from_corpus(name)


def learns_from_corpus(name: str) -> bool:
    """Whether the vocabulary is made from the documents; of `char`, from every one of them."""
    return name in ("char", "word") or name.startswith("bpe:")


def open_vocabulary(name: str) -> Tokenizer:
    """A vocabulary that is there before the corpus. Raises UserError where it is missing or cannot be used."""
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return BytePairTokenizer(name)
    if name in TIKTOKEN_NAMES:
        return BytePairTokenizer(name, _fetch(name))
    path = _file(name)
    try:
        return _open_ranks(path, path.read_bytes()) if path.suffix == ".tiktoken" else open_json(path)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None


def learn_vocabulary(name: str, documents: Iterator[str]) -> Tokenizer:
    """The vocabulary of `documents`, which are read once and never held: `char`, `word` or `bpe:N`."""
    if name == "char":
        characters: set[str] = set()
        for text in documents:
            characters.update(text)
        return CharTokenizer("".join(characters))
    return _learn_words(documents) if name == "word" else _learn_merges(name, documents)


def _bpe_size(name: str) -> int:
    size = re.fullmatch(r"bpe:(\d{1,9})", name)
    if size is None or not LEAST_BPE <= int(size[1]) <= MOST_BPE:
        raise UserError(
            f"unknown tokenizer {name!r}: wanted bpe:N, a vocabulary of N tokens with N in {LEAST_BPE} .. {MOST_BPE}, "
            "such as bpe:4096"
        )
    return int(size[1])


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() and has_vocabulary(path):
        return path / JSON_FILE  # also where vocab.json and merges.txt take its place
    if path.suffix not in (".json", ".tiktoken"):
        raise UserError(unknown_name(name))
    if not path.is_file():
        raise UserError(
            f"no tokenizer at {path}: wanted a tokenizer.json or .tiktoken file, or a folder with the first"
        )
    return path


def _fetch(name: str) -> bytes:
    """A rank table as a file, from tiktoken's cache or the network."""
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(assets() / "tiktoken"))
    try:
        return write_ranks(tiktoken.get_encoding(name)._mergeable_ranks)
    except Exception as error:  # tiktoken lets the network library's own exceptions through
        raise UserError(
            f"the vocabulary of {name} could not be fetched ({type(error).__name__}): connect once, or point "
            "TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's cached file, or use --tokenizer gpt2, which ships here"
        ) from None


def _open_ranks(path: Path, content: bytes) -> Tokenizer:
    try:
        ranks = read_ranks(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if published_for(path.name, ranks) not in PUBLISHED.values():
        logger.info(
            "%s has %s ranks, as no published table: text is cut as for cl100k_base, and %s gets the id after them; "
            "a tokenizer.json would say both itself",
            path, f"{len(ranks):,}", END_OF_TEXT,
        )  # fmt: skip
    return BytePairTokenizer(path.name, content)


def _learn_words(documents: Iterator[str]) -> Tokenizer:
    counts: Counter[str] = Counter()
    for piece in _pieces(documents):
        counts.update(split_words(piece))
        if len(counts) > MOST_COUNTED:
            counts = Counter({word: counts[word] for word in _most_frequent(counts, MOST_COUNTED // 2)})
    words = _most_frequent(counts, MOST_WORDS)
    if len(words) < len(counts):
        logger.info("word: the %s most frequent words are kept, others become <|unk|>", f"{len(words):,}")
    return WordTokenizer(words)


def _most_frequent(counts: Counter[str], most: int) -> list[str]:
    """Words by falling count, equal ones in code point order."""
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def _learn_merges(name: str, documents: Iterator[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern: the 256 bytes, the merges as they were learnt, end-of-text with the last id."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    size = _bpe_size(name)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(_pieces(documents), trainer)
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    found = library.get_vocab_size()
    if found < size:
        logger.info("%s: the corpus gives %s tokens and no more", name, f"{found:,}")
    return JsonTokenizer(name, library.to_str().encode(), found - 1)


def _pieces(documents: Iterator[str]) -> Iterator[str]:
    """The documents, long ones in pieces that begin at a space or a line's end where there is one."""
    for text in documents:
        start = 0
        while start < len(text):
            end = start + PIECE_CHARACTERS
            if end < len(text):
                gap = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
                end = gap if gap > 0 else end
            yield text[start:end]
            start = end
