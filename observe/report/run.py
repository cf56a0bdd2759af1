"""`pipeline report`: one or several runs as one HTML file, and their loss curve as a figure."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from observe.report.figure import color_of, loss_svg, to_png
from observe.report.page import reference_losses, render
from observe.report.read import Run
from pipeline.files import write_atomic
from pipeline.log import logger
from pipeline.runs import find_runs


def run(names: Sequence[str], out: Path, png: Path | None, svg: Path | None) -> None:
    """Write the files; the page's path goes to stdout. Raises UserError for what is no run."""
    folders = find_runs(names)
    same = Counter(folder.path.resolve().name for folder in folders)
    # Runs of the same name in different folders are labelled by their paths.
    labels = [name if same[name := folder.path.resolve().name] == 1 else str(folder.path) for folder in folders]
    runs = [Run(label, folder, color_of(n)) for n, (label, folder) in enumerate(zip(labels, folders, strict=True))]
    write_atomic(out, render(runs))
    figure = loss_svg(runs, reference_losses(runs)) if png or svg else ""
    if svg is not None:
        write_atomic(svg, figure.encode("utf-8", "replace"))
    if png is not None:
        write_atomic(png, to_png(figure))
    logger.info("%d run(s), %.1f MB: open it in any browser, or mail it", len(runs), out.stat().st_size / 1e6)
    sys.stdout.write(f"{out}\n")
