"""Shards written by other programs, used in place: nanoGPT's and llm.c's, both of GPT-2's
vocabulary.

    nanoGPT                 train.bin, val.bin: bare uint16 ids, an end-of-text token after each document
    llm.c, modded-nanogpt   NAME_train_000001.bin, NAME_val_000000.bin ...: a header of int32[256] (20240520, version 1,
                            number of ids), then uint16 ids, an end-of-text token before each document

The first bytes of a file decide, not its name: llm.c's header read as ids would be trained on.
Without a manifest, nothing but the number of ids is known until the shards are scanned.
"""

import re
from pathlib import Path

import xxhash

from pipeline.errors import UserError

SPLITS = ("train", "val")
NANOGPT, LLM_C = "nanoGPT", "llm.c"
HEADER_BYTES = {NANOGPT: 0, LLM_C: 1024}
END_OF_TEXT_STANDS = {NANOGPT: "after each document", LLM_C: "before each document"}
ID_BYTES = 2
# 16 blocks of 64 KiB: another corpus, vocabulary or order differs in all of them, and up to 1 MiB
# every byte is hashed.
SAMPLES, SAMPLE_BYTES = 16, 1 << 16

_LLM_C_MAGIC, _LLM_C_VERSION = 20240520, 1
_REFUSED = {
    20240801: "llm.c's format for Llama 3, whose vocabulary is not supported",
    20240522: "llm.c's format for multiple-choice questions, which is not text to train on",
}
_NUMPY_MAGIC = b"\x93NUMPY"
_SHARD_NAME = re.compile(r"(?P<dataset>(?:.*_)?)(?P<split>train|val)(?:_\d+)?\.bin")


def find(folder: Path) -> tuple[str, dict[str, list[Path]]] | None:
    """The program whose shards a folder holds, and the files of each split in order; None without
    such files.

    Raises UserError for shards that cannot be read, or not as one dataset.
    """
    named = {path: match for path in sorted(folder.glob("*.bin")) if (match := _SHARD_NAME.fullmatch(path.name))}
    programs = {path: sniff(path) for path in named}
    of_llm_c = [path for path, program in programs.items() if program == LLM_C]
    bare = [path for path, program in programs.items() if program == NANOGPT]
    if of_llm_c and bare:
        raise UserError(
            f"{folder} mixes formats: {of_llm_c[0].name} has llm.c's header, {bare[0].name} has none; "
            "give each dataset its own folder"
        )
    # Bare files with other names are what an unfinished `pipeline prepare` leaves behind.
    paths = of_llm_c or [path for path in bare if path.stem in SPLITS]
    if not paths:
        for path in sorted(folder.glob("*.npy")):
            sniff(path)  # which says how to convert it
        return None
    if not of_llm_c:
        refuse_pickled_vocabulary(folder)
    datasets = sorted({named[path]["dataset"] for path in paths})
    if len(datasets) > 1:
        raise UserError(f"{folder} holds several datasets ({', '.join(datasets)}): give each its own folder")
    splits = {split: [path for path in paths if named[path]["split"] == split] for split in SPLITS}
    for split, files in splits.items():
        if not files:
            wanted = f"{datasets[0]}{split}_000000.bin" if of_llm_c else f"{split}.bin"
            raise UserError(f"{folder} has {paths[0].name} but nothing for {split}: expected a file such as {wanted}")
    return programs[paths[0]], splits


def sniff(path: Path) -> str:
    """The program whose format a file's first bytes show; bare ids show nothing, so anything else
    is assumed to be nanoGPT's.

    Raises UserError for formats that are known but not supported.
    """
    with path.open("rb") as file:
        start = file.read(12)
    if start.startswith(_NUMPY_MAGIC):
        raise UserError(
            f"{path} is a NumPy .npy file, expected bare uint16 ids or llm.c's format: "
            'convert it with numpy.load(file).astype("<u2").tofile("train.bin")'
        )
    magic, version = (int.from_bytes(start[at : at + 4], "little") for at in (0, 4))
    if magic in _REFUSED:
        raise UserError(f"{path} is in {_REFUSED[magic]}: prepare the text again, or use shards of GPT-2's vocabulary")
    if magic == _LLM_C_MAGIC and version != _LLM_C_VERSION:
        raise UserError(f"{path} has version {version} of llm.c's format, expected {_LLM_C_VERSION}")
    return LLM_C if magic == _LLM_C_MAGIC else NANOGPT


def token_count(path: Path, program: str) -> int:
    """The number of ids in a shard. Raises UserError where the file's size does not match."""
    found = path.stat().st_size
    if program == LLM_C:
        with path.open("rb") as file:
            file.seek(8)
            tokens = int.from_bytes(file.read(4), "little")
        why = f"its header says {tokens} ids"
    else:
        tokens = found // ID_BYTES
        why = f"{ID_BYTES} an id"
    wanted = HEADER_BYTES[program] + ID_BYTES * tokens
    if found != wanted:
        raise UserError(f"{path} has {found} bytes, expected {wanted} ({why}): truncated or damaged, fetch it again")
    if not tokens:
        raise UserError(f"{path} holds no ids: fetch or write it again")
    return tokens


def sample_hash(path: Path) -> str:
    """XXH3-128 of a file's size and of blocks spread over it: identifies a shard of gigabytes in
    milliseconds.

    It tells one dataset from another, but misses small damage: that would take reading every byte
    at each start.
    """
    size = path.stat().st_size
    state = xxhash.xxh3_128(size.to_bytes(8, "little"))  # a truncated file keeps most of its samples
    with path.open("rb") as file:
        for sample in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def refuse_pickled_vocabulary(folder: Path) -> None:
    """Raises UserError where nanoGPT's files come with a vocabulary: it is a pickle, and opening
    one can run code.
    """
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} keeps its vocabulary in meta.pkl, a pickle, which is never opened: prepare the text again, for example "
            "with `pipeline prepare input.txt --tokenizer char`, or move meta.pkl away if the ids are GPT-2's"
        )
