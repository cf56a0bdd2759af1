"""Everything that a few minutes on a GPU can tell, in one run: first whether it is right, then how fast it is.

    python benchmarks/gpu_check.py --seconds 300 --nanogpt nanoGPT/model.py    # results in $OUT, or ./gpu_check
    python benchmarks/gpu_check.py --device cpu --tiny                         # the same steps at toy size
    python benchmarks/gpu_check.py --only training_speed,profile               # some of them again

Each step has a share of the time and an alarm: one that fails or is late is recorded, and the next begins. gpu_check.json
is written anew after every step, so that a kill loses only the step it hits. Exits 1 if a step failed, or a number that
tells whether training is right is past its mark; a missed speed is reported and fails nothing, nor does a peer that is missing.
"""

import argparse
import shutil
import sys
from pathlib import Path

import gpu_correctness
import gpu_speed
import torch
from gpu_harness import ROOT, SHARES, Check, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script where there is no GPU")
    parser.add_argument("--nanogpt", type=Path, default=ROOT / "nanoGPT" / "model.py", help="nanoGPT's model.py")
    parser.add_argument("--only", default=",".join(SHARES), help="steps by name, with commas")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SHARES):
        parser.error(f"unknown steps {sorted(unknown)}: expected some of {', '.join(SHARES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here: try --device cpu --tiny")
    if any(name in chosen for name in ("curves", "stop_and_resume", "repeats")) and "prepared" not in chosen:
        chosen.append("prepared")  # the data that they train on
    order = [name for name in SHARES if name in chosen]
    check = Check(options)
    try:
        for index, name in enumerate(order):
            module = gpu_correctness if hasattr(gpu_correctness, name) else gpu_speed
            check.step(name, getattr(module, name), order[index:])
    finally:
        shutil.rmtree(check.data, ignore_errors=True)
    failed = [*findings(check.report, "error", None), *findings(check.report, "passed", False)]
    check.report["failed"], check.report["missed"] = failed, list(findings(check.report, "reached", False))
    check.write()
    print(f"targets missed: {', '.join(check.report['missed']) or 'none'}")
    print(f"not measured: {', '.join(findings(check.report, 'not measured', None)) or 'none'}")
    print(f"failed: {', '.join(failed) or 'none'}; all results: {check.out / 'gpu_check.json'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
