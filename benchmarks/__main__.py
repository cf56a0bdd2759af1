"""`make bench`: all measurements, each group in a process of its own, into docs/benchmarks.json and docs/benchmarks.md.

python -m benchmarks [--only eval,decoding] [--turns N] [--tiny] [--nanogpt DIR] [--text FILE] [--results FILE]
"""

import subprocess
import sys

from benchmarks.measure import RESULTS, ROOT, parser
from benchmarks.page import PAGE, TITLES, read_rows, with_results


def main() -> int:
    arguments = parser().parse_args()
    if arguments.tiny and arguments.results is None:
        sys.exit("--tiny measures nothing that docs/benchmarks.json should keep: set --results to another file")
    results = arguments.results or RESULTS
    wanted = {name.partition(".")[0] for name in arguments.only.split(",") if name} or set(TITLES)
    if unknown := wanted - set(TITLES):
        sys.exit(f"no benchmark {', '.join(sorted(unknown))}: expected {', '.join(TITLES)}")
    failed = []
    for group in TITLES:
        if group in wanted:  # one that fails costs the others nothing
            command = [sys.executable, "-m", f"benchmarks.{group}", *sys.argv[1:]]
            if arguments.results is None:
                command += ["--results", str(results)]
            print(f"\n{group}", flush=True)
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                failed.append(group)
    if results == RESULTS:
        PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), read_rows(RESULTS)), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
