"""How fast `prepare` is, from Parquet to shards and manifest, and what others do with the same file.

    datasets.map   the usual script: datasets.map with tiktoken in as many processes, then a memory-mapped uint16 file
    tiktoken       one process, texts in memory, nothing written: an upper bound per process
    gigatoken      the encoder alone on as many threads, texts in memory, nothing written

The text is found on this machine: the sources and documents of the standard library and the installed packages, in pieces
of about 4 kB; for a larger corpus the same files are split again at other offsets. MB are of UTF-8 text.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import HERE, ROOT, Measurement, Options, Sides, main, run

PIECE_CHARACTERS = 4000
PIECES_AT_ONCE = 20_000
POLL_S = 0.02
WORKERS = 2
TINY_BYTES = 200_000

# Seconds in the encoder, of texts in memory.
ENCODE = """
import os, sys, time
import pyarrow.parquet as pq
from pipeline.vocabulary.byte_pair import GPT2_RANKS, BytePairTokenizer
parquet, library, os.environ["RAYON_NUM_THREADS"] = sys.argv[1:]
if library == "gigatoken":
    import gigatoken
    encode = gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="gpt2").encode_batch
else:
    encoding = BytePairTokenizer("gpt2").encoding
    encode = lambda texts: [encoding.encode_ordinary(text) for text in texts]
taken = 0.0
for batch in pq.ParquetFile(parquet).iter_batches(10_000):
    texts = batch.column(0).to_pylist()
    if library == "gigatoken":
        texts = [text.encode() for text in texts]
    started = time.perf_counter()
    encode(texts)
    taken += time.perf_counter() - started
print(taken)
"""

MAP = """
import sys
import numpy as np
from datasets import load_dataset
from pipeline.vocabulary.byte_pair import BytePairTokenizer

def encode(row):
    ids = ENCODING.encode_ordinary(row["text"])
    ids.append(50256)
    return {"ids": ids, "length": len(ids)}

ENCODING = BytePairTokenizer("gpt2").encoding
if __name__ == "__main__":
    parquet, folder, processes = sys.argv[1:]
    rows = load_dataset("parquet", data_files=parquet, split="train", cache_dir=folder + "/cache")
    for split, part in rows.train_test_split(test_size=0.01, seed=0).items():
        encoded = part.map(encode, remove_columns=["text"], num_proc=int(processes))
        total = int(np.sum(np.asarray(encoded["length"]), dtype=np.int64))
        target = np.memmap(f"{folder}/{split}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        at, pieces = 0, min(1024, len(encoded))
        for piece in range(pieces):
            shard = encoded.shard(num_shards=pieces, index=piece, contiguous=True).with_format("numpy")
            ids = np.concatenate(shard["ids"])
            target[at : at + len(ids)] = ids
            at += len(ids)
        target.flush()
"""

PREPARE = """
import sys
from prepare.options import PrepareOptions
from prepare.run import run
if __name__ == "__main__":
    for library in sys.argv[4:]:
        sys.modules[library] = None  # importing it now raises ImportError
    run(PrepareOptions([sys.argv[1]], name="bench", data_dir=sys.argv[2], workers=int(sys.argv[3]), force=True))
"""


@contextmanager
def sides(options: Options, megabytes: int, hidden: tuple[str, ...], peers: tuple[str, ...]) -> Iterator[Sides]:
    """`hidden`: the libraries that `prepare` is kept from importing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, size = write_corpus(folder, TINY_BYTES if options.tiny else megabytes * 1_000_000)

        def in_memory(library: str) -> dict[str, float]:
            return {"speed": size / 1e6 / float(run([sys.executable, "-c", ENCODE, source, library, str(WORKERS)]))}

        def on_disk(program: str, *more: str) -> dict[str, float]:
            target = folder / "target"
            target.mkdir()
            command = [sys.executable, "-c", program, str(source), str(target), str(WORKERS), *more]
            took, peak = run_timed(command)
            shutil.rmtree(target)
            return {"speed": size / 1e6 / took, "peak memory, all processes": peak / 1e6}

        others = {
            "datasets.map and tiktoken, 2 processes": partial(on_disk, MAP),
            "tiktoken, 1 process, nothing written": partial(in_memory, "tiktoken"),
            "gigatoken, 2 threads, nothing written": partial(in_memory, "gigatoken"),
        }
        fast = partial(on_disk, PREPARE, *hidden)
        missing = [library for library in ("gigatoken", "fastokens") if not find_spec(library)]
        ours: Sides = {HERE: f"install the extra fast: no {missing[0]}" if missing else fast}
        yield ours | {peer: turn for peer, turn in others.items() if peer.startswith(peers)}


def write_corpus(folder: Path, wanted_bytes: int) -> tuple[Path, int]:
    """Write a Parquet file of text found on this machine; return its path and the UTF-8 bytes of its texts."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    suffixes = (".py", ".md", ".rst", ".txt")
    paths = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix in suffixes and path.is_file()]
    schema = pa.schema([("text", pa.string())])
    size = turn = 0
    pieces: list[str] = []
    with pq.ParquetWriter(folder / "text.parquet", schema) as writer:
        while size < wanted_bytes:
            shift = turn * 997 % PIECE_CHARACTERS
            for path in paths:
                text = path.read_text(encoding="utf-8", errors="ignore")
                for at in range(-shift, len(text), PIECE_CHARACTERS):
                    if piece := text[max(at, 0) : at + PIECE_CHARACTERS]:
                        pieces.append(piece)
                        size += len(piece.encode())
                if len(pieces) >= PIECES_AT_ONCE:
                    writer.write_table(pa.table({"text": pieces}, schema))
                    pieces = []
                if size >= wanted_bytes:
                    break
            turn += 1
        writer.write_table(pa.table({"text": pieces}, schema))
    return folder / "text.parquet", size


def run_timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds with Python's start, and the peak resident bytes of all its processes together."""
    environment, peak, started = os.environ | {"PYTHONPATH": str(ROOT)}, 0, time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory_of_tree(process.pid))
        time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"{command[3:]} ended with code {process.returncode}")
    return time.perf_counter() - started, peak


def memory_of_tree(root: int) -> int:
    """Resident bytes of a process and its descendants; shared pages are counted once per process."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has exited since it was listed
            continue
        parents[int(entry.name)] = int(fields[1])
        resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    tree = {root}
    while grown := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(resident.get(pid, 0) for pid in tree)


FIGURES = {"speed": "MB/s", "peak memory, all processes": "MB"}
WITHOUT = ("gigatoken", "fastokens")
CASES = {
    "fast": ("400 MB with gigatoken", 400, (), ("datasets",)),
    "fast-1gb": ("1 GB with gigatoken", 1000, (), ("gigatoken",)),
    "tiktoken": ("400 MB with tiktoken alone", 400, WITHOUT, ("datasets", "tiktoken")),
    "fastokens": ("400 MB with fastokens", 400, WITHOUT[:1], ("tiktoken",)),
}
MEASUREMENTS = [
    Measurement(
        f"preparation.{name}", f"`prepare` of Parquet, 2 workers, {title}", FIGURES,
        partial(sides, megabytes=megabytes, hidden=hidden, peers=peers), turns=3, warm_up=False,
    )
    for name, (title, megabytes, hidden, peers) in CASES.items()
]  # fmt: skip

if __name__ == "__main__":
    main(MEASUREMENTS)
