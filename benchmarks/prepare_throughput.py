"""How fast `prepare` is, from Parquet to shards and manifest, and what others do with the same file.

    python benchmarks/prepare_throughput.py [--megabytes 500] [--rounds 3] [--workers 2] [--without map ...] [--json]

    tiktoken   one process, texts in memory, nothing written: an upper bound per process
    map        the usual script: datasets.map with tiktoken in N processes, then a memory-mapped uint16 file
    gigatoken  the encoder alone on N threads, texts in memory, nothing written
    plain      `prepare` with tiktoken alone
    fastokens  `prepare` with fastokens
    prepare    `prepare` with gigatoken

The text is found on this machine: the sources and documents of the standard library and the installed
packages, in pieces of about 4 kB; for a larger corpus the same files are split again at other offsets.
The contestants take turns, so that a change in the machine's speed affects all of them; ratios are
computed round by round.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
PIECE_CHARACTERS = 4000
PIECES_AT_ONCE = 20_000
POLL_S = 0.02
NAMES = ("tiktoken", "map", "gigatoken", "plain", "fastokens", "prepare")
# The libraries that `prepare` is kept from importing.
HIDDEN = {"plain": ("gigatoken", "fastokens"), "fastokens": ("gigatoken",), "prepare": ()}

TIKTOKEN = """
import sys, time
import pyarrow.parquet as pq
from pipeline.vocabulary.byte_pair import BytePairTokenizer
encoding = BytePairTokenizer("gpt2").encoding
started, taken = 0.0, 0.0
for batch in pq.ParquetFile(sys.argv[1]).iter_batches(10_000):
    texts = batch.column(0).to_pylist()
    started = time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    taken += time.perf_counter() - started
print(taken)
"""

GIGATOKEN = """
import os, sys, time
os.environ["RAYON_NUM_THREADS"] = sys.argv[2]
import gigatoken
import pyarrow.parquet as pq
from pipeline.vocabulary.byte_pair import GPT2_RANKS
encoder = gigatoken.Tokenizer.from_tiktoken(GPT2_RANKS, pretokenizer="gpt2")
taken = 0.0
for batch in pq.ParquetFile(sys.argv[1]).iter_batches(10_000):
    texts = [text.encode() for text in batch.column(0).to_pylist()]
    started = time.perf_counter()
    encoder.encode_batch(texts)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], choices=NAMES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = [name for name in NAMES if name not in arguments.without]
    if not (find_spec("gigatoken") and find_spec("fastokens")):
        raise SystemExit("the benchmark compares with gigatoken and fastokens: pip install '.[fast]'")
    folder = Path(tempfile.mkdtemp(prefix="prepare_throughput_"))
    try:
        source, text_bytes = write_corpus(folder, arguments.megabytes * 1_000_000)
        rounds = [
            {name: measure(name, source, folder, arguments.workers) for name in names} for _ in range(arguments.rounds)
        ]
    finally:
        shutil.rmtree(folder)
    result = summarise(rounds, text_bytes / 1e6, arguments.workers)
    print(json.dumps(result) if arguments.json else table(result))


def measure(name: str, source: Path, folder: Path, workers: int) -> tuple[float, int]:
    """Seconds and peak bytes of one contestant, once."""
    if name in ("tiktoken", "gigatoken"):
        program = TIKTOKEN if name == "tiktoken" else GIGATOKEN
        return float(run_program(program, source, workers)), 0
    place = folder / name
    place.mkdir()
    try:
        if name == "map":
            return run_timed([sys.executable, "-c", MAP, str(source), str(place), str(workers)])
        return run_prepare(source, place, workers, *HIDDEN[name])
    finally:
        shutil.rmtree(place)


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


def run_program(program: str, source: Path, workers: int) -> str:
    """The stdout of a Python program."""
    command = [sys.executable, "-c", program, str(source), str(workers)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def run_prepare(source: Path, folder: Path, workers: int, *hidden: str) -> tuple[float, int]:
    """Wall seconds and peak bytes of the complete command, Python's start included."""
    return run_timed([sys.executable, "-c", PREPARE, str(source), str(folder / "data"), str(workers), *hidden])


def run_timed(command: list[str]) -> tuple[float, int]:
    """Wall seconds, and the peak resident bytes of all its processes together."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0

    def poll() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, memory_of_tree(process.pid))
            time.sleep(POLL_S)

    watcher = threading.Thread(target=poll)
    watcher.start()
    watcher.join()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"prepare ended with code {process.returncode}")
    return seconds, peak


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


def summarise(rounds: list[dict[str, tuple[float, int]]], megabytes: float, workers: int) -> dict[str, Any]:
    return {
        "megabytes": round(megabytes, 1),
        "workers": workers,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": len(rounds),
        "rows": {name: summarise_one(name, rounds, megabytes) for name in rounds[0]},
    }


def summarise_one(name: str, rounds: list[dict[str, tuple[float, int]]], megabytes: float) -> dict[str, Any]:
    """The median rate, and its ratio to the rate of every other contestant."""
    return {
        "mb_per_s": round(statistics.median(megabytes / each[name][0] for each in rounds), 1),
        "times": {
            other: round(statistics.median(each[other][0] / each[name][0] for each in rounds), 2)
            for other in rounds[0]
            if other != name
        },
        "peak_mb": round(max(each[name][1] for each in rounds) / 1e6),
    }


def table(result: dict[str, Any]) -> str:
    workers = result["workers"]
    titles = {
        "tiktoken": "tiktoken, one process, texts in memory",
        "map": f"datasets.map and a memory-mapped file, {workers} processes",
        "gigatoken": f"gigatoken, {workers} threads, texts in memory",
        "plain": f"prepare on tiktoken, {workers} workers",
        "fastokens": f"prepare with fastokens, {workers} workers",
        "prepare": f"prepare with gigatoken, {workers} workers",
    }
    others = list(result["rows"])
    lines = [
        f"{result['megabytes']} MB of text, {result['cores']} cores, medians of {result['rounds']} rounds:",
        "",
        f"| | MB/s | {' | '.join(f'times {name}' for name in others)} | peak MB, all processes |",
        "|---" * (len(others) + 3) + "|",
    ]
    for name, row in result["rows"].items():
        times = " | ".join(str(row["times"].get(other, "")) for other in others)
        lines.append(f"| {titles[name]} | {row['mb_per_s']} | {times} | {row['peak_mb'] or ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
