"""Time of `pipeline --help` in a fresh interpreter, compared with starting the interpreter alone; medians."""

import argparse
import statistics
import subprocess
import sys
import time


def median_s(command: list[str], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    bare = median_s([sys.executable, "-c", "pass"], runs)
    ours = median_s([sys.executable, "-m", "pipeline", "--help"], runs)
    print("| command | seconds, median |\n|---|---|")
    print(f"| python -c pass | {bare:.2f} |\n| pipeline --help | {ours:.2f} |")


if __name__ == "__main__":
    main()
