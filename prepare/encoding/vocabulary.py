"""`--tokenizer` -> a tokenizer: published, from the user's file, or learned from the corpus."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import xxhash

from pipeline.errors import UserError
from pipeline.log import ProgressReport, logger
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer, CharTokenizer, WordTokenizer, split_words
from pipeline.vocabulary.huggingface_files import has_vocabulary, open_json
from pipeline.vocabulary.merges import PUBLISHED, published_for, read_ranks, write_ranks
from pipeline.vocabulary.specs import TIKTOKEN_NAMES, unknown_name
from pipeline.vocabulary.tokenizer import END_OF_TEXT, JSON_FILE, Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer
from prepare.encoding.pieces import blocks_of, pieces
from prepare.storage.files import assets
from prepare.units import Item, Refused, Unreadable

# The 256 bytes and end-of-text; five times the largest vocabulary in use.
MIN_BPE_SIZE, MAX_BPE_SIZE = 257, 1_000_000
# With <|unk|> and <|endoftext|> exactly the ids that fit two bytes.
MAX_WORDS = (1 << 16) - 2
# Distinct words held while counting: 200 MB. Beyond it the rarer half is dropped, which takes 360
# MB for a moment.
MAX_COUNTED_WORDS = 1 << 21
# A vocabulary is learned from about this much text, spread over the corpus: ten times as much
# changes few of its tokens.
LEARN_BYTES = 200_000_000


def check_name(name: str) -> str:
    """The name that the spec will carry: for a file, without its folder.

    Raises UserError for an unknown tokenizer.
    """
    if name.startswith("bpe:"):
        _bpe_size(name)
    return _file(name).name if is_file(name) else name


def is_file(name: str) -> bool:
    """Whether the vocabulary is in a file of the user's."""
    return name not in (*TIKTOKEN_NAMES, "byte") and not learns_from_corpus(name)


def learns_from_corpus(name: str) -> bool:
    """Whether the vocabulary is made from the documents."""
    return name in ("char", "word") or name.startswith("bpe:")


def open_vocabulary(name: str) -> Tokenizer:
    """A vocabulary that exists before the corpus is read.

    Raises UserError if it is missing or cannot be used.
    """
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


def learn_from(items: list[Item], name: str, limit: int | None) -> Tokenizer:
    """The vocabulary of a corpus, or of its first `limit` documents."""
    text_bytes = sum(item.size for item in items)
    # All of it for `char`, since a character that was not seen could not be encoded.
    one_in = 1 if name == "char" or limit else max(1, -(-text_bytes // LEARN_BYTES))
    with ProgressReport(f"learn the vocabulary {name}", text_bytes / 1e6, "MB") as progress:
        return learn_vocabulary(name, _texts(items, limit, one_in, progress))


def learn_vocabulary(name: str, texts: Iterable[str]) -> Tokenizer:
    """`char`, `word` or `bpe:N` from documents or their pieces, which are read once, never held."""
    if name == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(characters))
    return _learn_words(texts) if name == "word" else _learn_merges(name, texts)


def _texts(items: list[Item], limit: int | None, one_in: int, progress: ProgressReport) -> Iterator[str]:
    """The pieces of the first `limit` documents, or one in `one_in` of all pieces.

    Pieces, because a document may be a book of hundreds of MB: the trainer holds what it is handed,
    and a sample of documents might be all of the corpus, or nothing.
    """
    taken = 0
    is_first = True
    for unit in (unit for item in items for unit in item.units()):
        for _, document in unit.documents():
            if isinstance(document, Refused):
                continue
            number = -1
            with suppress(UnicodeDecodeError, Unreadable):  # the encoder meets it too, and counts it
                for number, (piece, _) in enumerate(pieces(blocks_of(document))):
                    # By content, so that other files in the corpus change little of the sample; with
                    # its number, as all pieces of a document may be equal.
                    if is_first or xxhash.xxh3_64_intdigest(piece.encode(), number) % one_in == 0:
                        yield piece
                    is_first = False
                taken += number >= 0
            if taken == limit:
                return
        progress.advance(unit.size / 1e6)


def _bpe_size(name: str) -> int:
    size = re.fullmatch(r"bpe:(\d{1,9})", name)
    if size is None or not MIN_BPE_SIZE <= int(size[1]) <= MAX_BPE_SIZE:
        raise UserError(
            f"unknown tokenizer {name!r}: expected bpe:N, a vocabulary of N tokens with N in "
            f"{MIN_BPE_SIZE} .. {MAX_BPE_SIZE}, such as bpe:4096"
        )
    return int(size[1])


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() and has_vocabulary(path):
        return path / JSON_FILE  # also stands for a vocab.json with its merges.txt
    if path.suffix not in (".json", ".tiktoken"):
        raise UserError(unknown_name(name))
    if not path.is_file():
        raise UserError(
            f"tokenizer not found: {path}; expected a tokenizer.json or .tiktoken file, or a folder with a tokenizer.json"
        )
    return path


def _fetch(name: str) -> bytes:
    """A rank table as a file, from tiktoken's cache or the network."""
    import tiktoken

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(assets() / "tiktoken"))
    try:
        return write_ranks(tiktoken.get_encoding(name)._mergeable_ranks)
    except Exception as error:  # tiktoken does not wrap the exceptions of the network library
        raise UserError(
            f"cannot download the vocabulary {name} ({type(error).__name__}): connect to the network once, or set "
            "TIKTOKEN_CACHE_DIR to a folder with tiktoken's cached file, or use --tokenizer gpt2, which is built in"
        ) from None


def _open_ranks(path: Path, content: bytes) -> Tokenizer:
    try:
        ranks = read_ranks(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if published_for(path.name, ranks) not in PUBLISHED.values():
        logger.info(
            "%s has %s ranks, which matches no published table: assuming the pattern of cl100k_base, and the next id for %s; "
            "a tokenizer.json would define both",
            path, f"{len(ranks):,}", END_OF_TEXT,
        )  # fmt: skip
    return BytePairTokenizer(path.name, content)


def _learn_words(texts: Iterable[str]) -> Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text))
        if len(counts) > MAX_COUNTED_WORDS:
            counts = Counter({word: counts[word] for word in _most_frequent(counts, MAX_COUNTED_WORDS // 2)})
    words = _most_frequent(counts, MAX_WORDS)
    if len(words) < len(counts):
        logger.info("word: kept the %s most frequent words, the others become <|unk|>", f"{len(words):,}")
    return WordTokenizer(words)


def _most_frequent(counts: Counter[str], count: int) -> list[str]:
    """Words by falling frequency, equally frequent ones in code point order."""
    return sorted(counts, key=lambda word: (-counts[word], word))[:count]


def _learn_merges(name: str, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pattern: the 256 bytes, the merges as learned, end-of-text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    size = _bpe_size(name)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(iter(texts), trainer)
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    found = library.get_vocab_size()
    if found < size:
        logger.info("%s: the corpus gives only %s tokens", name, f"{found:,}")
    return JsonTokenizer(name, library.to_str().encode(), found - 1)
