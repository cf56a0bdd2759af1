"""The run's folder `tb/`: curves in groups, hyperparameters, texts and reference lines."""

import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline.config.keys import Config
from pipeline.config.load import to_toml
from pipeline.runs import Row, RunFolder
from train.metrics.record import Metrics, tag, writing


class TensorBoard(Metrics):
    """Curves of a run that has none past `first_step`."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        from torch.utils.tensorboard import SummaryWriter

        _wait_for_new_name(folder)
        threading.excepthook = _without_disk_errors
        # purge_step: TensorBoard hides what an earlier start wrote past the resumed step.
        self._writer: Any = SummaryWriter(folder.tensorboard, purge_step=first_step + 1)

    def describe(self, config: Config, references: dict[str, float]) -> None:
        """The config, as text and for the tab of hyperparameters; and one chart of losses and what they
        may be compared with.
        """
        from torch.utils.tensorboard.summary import hparams

        flat = {f"{section}.{key}": value for section, keys in asdict(config).items() for key, value in keys.items()}
        known = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flat.items()}
        # Not `add_hparams`, which would begin a second folder of curves.
        for summary in hparams(known, {"train/loss": None, "val/loss": None}):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        for name, value in references.items():
            for step in (self._first_step + 1, config.train.max_steps):  # a line has two ends
                self._writer.add_scalar(f"reference/{name}", value, step)
        self._writer.add_custom_scalars({"loss": {"loss": ["Multiline", ["train/loss", "val/loss", "reference/.*"]]}})
        self.write_text("config", to_toml(config), self._first_step + 1)

    def write(self, row: Row) -> None:
        with writing(self._folder.tensorboard):
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(tag(name), value, row["step"])
            self._writer.flush()  # or a kill would lose up to two minutes of rows that metrics.jsonl has

    def write_text(self, name: str, text: str, step: int) -> None:
        # Indented, it is code to Markdown, which would otherwise lay it out.
        self._writer.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)
        self._writer.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()


def _without_disk_errors(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread prints the traceback of an error that our next flush raises too."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _wait_for_new_name(folder: RunFolder) -> None:
    """Until a new event file's name sorts after the earlier ones: at most a second.

    TensorBoard reads a folder's files in the order of their names, which begin with the second of
    their creation. Of two of the same second the process numbers would decide, and the older file
    could hide the newer one's steps.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.tensorboard.glob("events.out.tfevents.*")]
    # A clock that was set back is not waited for.
    if int(time.time()) in seconds:
        time.sleep(1 - time.time() % 1)
