"""How fast `prepare` is, with and without gigatoken, against one process that calls tiktoken over the same texts.

    python benchmarks/prepare_throughput.py [--megabytes 100] [--rounds 5] [--workers 2] [--json]

The text is this machine's own: the standard library's and the installed packages' sources and documents, in pieces of
about 4 kB. The three run in turn, so that a change of the machine's speed falls on all; ratios are taken round by round.
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
POLL_S = 0.02

BASELINE = """
import sys, time
import pyarrow.parquet as pq
from pipeline.tokenizer import BytePairTokenizer
encoding = BytePairTokenizer("gpt2").encoding
texts = pq.read_table(sys.argv[1]).column("text").to_pylist()
started = time.perf_counter()
for text in texts:
    encoding.encode_ordinary(text)
print(time.perf_counter() - started)
"""

PREPARE = """
import sys
from prepare.run import PrepareOptions, run
if __name__ == "__main__":
    if "hide" in sys.argv:
        sys.modules["gigatoken"] = None  # as if it were not installed
    run(PrepareOptions([sys.argv[1]], name="bench", data_dir=sys.argv[2], workers=int(sys.argv[3]), force=True))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--row-group-size", type=int, default=None, help="rows; pq.write_table's 1 M when left out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare_throughput_"))
    try:
        source, text_bytes = write_corpus(folder, arguments.megabytes * 1_000_000, arguments.row_group_size)
        rounds = [measure(source, folder, arguments.workers) for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(folder)
    result = summarise(rounds, text_bytes / 1e6, arguments.workers)
    print(json.dumps(result) if arguments.json else table(result))


def measure(source: Path, folder: Path, workers: int) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes of each contestant, once."""
    found = {"tiktoken": (run_baseline(source), 0), "prepare": run_prepare(source, folder, workers, "hide")}
    if find_spec("gigatoken"):
        found["prepare_gigatoken"] = run_prepare(source, folder, workers)
    return found


def write_corpus(folder: Path, wanted_bytes: int, row_group_size: int | None) -> tuple[Path, int]:
    """A Parquet file of the machine's own text; returns its path and the UTF-8 bytes of its texts."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    pieces: list[str] = []
    size = 0
    for path in (path for root in roots for path in sorted(root.rglob("*"))):
        if path.suffix not in (".py", ".md", ".rst", ".txt") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for at in range(0, len(text), PIECE_CHARACTERS):
            pieces.append(text[at : at + PIECE_CHARACTERS])
            size += len(pieces[-1].encode())
        if size >= wanted_bytes:
            break
    target = folder / "text.parquet"
    pq.write_table(pa.table({"text": pieces}), target, row_group_size=row_group_size)
    return target, size


def run_baseline(source: Path) -> float:
    """Seconds that encoding alone takes, with the texts already in memory."""
    command = [sys.executable, "-c", BASELINE, str(source)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def run_prepare(source: Path, folder: Path, workers: int, *flags: str) -> tuple[float, int]:
    """Wall seconds of the whole command, from starting Python to its end, and the peak memory of all its processes."""
    command = [sys.executable, "-c", PREPARE, str(source), str(folder / "data"), str(workers), *flags]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
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
    """Resident bytes of a process and its descendants: pages they share are counted for each."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
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
    ratios = [each["tiktoken"][0] / each[name][0] for each in rounds]
    return {
        "mb_per_s": round(statistics.median(megabytes / each[name][0] for each in rounds), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "peak_mb": round(max(each[name][1] for each in rounds) / 1e6),
    }


def table(result: dict[str, Any]) -> str:
    titles = {
        "tiktoken": "tiktoken, one process, texts in memory",
        "prepare": f"prepare, {result['workers']} workers, Parquet to shards",
        "prepare_gigatoken": f"prepare, {result['workers']} workers, with gigatoken",
    }
    lines = [
        f"{result['megabytes']} MB of text, {result['cores']} cores, medians of {result['rounds']} rounds:",
        "",
        "| | MB/s | ratio | round by round | peak MB, all processes |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        ratios = ", ".join(map(str, row["ratios"]))
        lines.append(f"| {titles[name]} | {row['mb_per_s']} | {row['ratio']} | {ratios} | {row['peak_mb'] or '-'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
