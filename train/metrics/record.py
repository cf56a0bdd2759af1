"""What a run records about itself: metrics.jsonl, bad_steps.jsonl, events.jsonl, references.json."""

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pipeline.dataset.mixture import Mixture
from pipeline.dataset.scan import sampled_entropies
from pipeline.errors import UserError
from pipeline.files import write_atomic
from pipeline.log import logger
from pipeline.runs import Row, RunFolder
from train.evaluation import ValLoss

# The group of each column; of another one, such as the tokens of a mixture's source, it is `data`.
GROUPS = {
    "loss": "train", "tokens": "train", "val_loss": "val", "lr": "optimizer", "grad_norm": "optimizer",
    "tokens_per_s": "speed", "mfu": "speed", "data_wait": "speed", "memory_bytes": "speed",
}  # fmt: skip


class Metrics:
    """Records nothing: what every rank has but the first, which has `FileMetrics`."""

    def write(self, row: Row) -> None:
        """Record a row of numbers; it has a `step`. None stands for a value that is not finite."""

    def write_bad_step(self, row: Row) -> None:
        """Log a step that did not reach the weights, and append its samples to bad_steps.jsonl."""

    def write_event(self, event: str, step: int, **details: str) -> None:
        """Append to events.jsonl, with the time."""

    def write_text(self, name: str, text: str, step: int) -> None:
        """Show `text` in TensorBoard as it is."""

    def close(self) -> None:
        """Close the files."""


class FileMetrics(Metrics):
    """Rows in the run's folder, and whatever else `others` make of them."""

    def __init__(self, folder: RunFolder, others: Sequence[Metrics] = ()) -> None:
        self._folder, self._others = folder, others
        self._file = folder.metrics.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        # json would write NaN, which is not JSON.
        row = {name: value if math.isfinite(value or 0) else None for name, value in row.items()}
        with writing(self._folder.metrics):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        for other in self._others:
            other.write(row)

    def write_bad_step(self, row: Row) -> None:
        see = f"its texts: pipeline inspect {shlex.quote(str(self._folder.path))} --step {row['step']}"
        figures = row["step"], row["reason"], row["loss"], row["grad_norm"], see
        logger.warning("step %d skipped (%s): loss %s, gradient norm %s; %s", *figures)
        with self._folder.bad_steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_event(self, event: str, step: int, **details: str) -> None:
        row = {"step": step, "event": event, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._folder.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | details) + "\n")

    def write_text(self, name: str, text: str, step: int) -> None:
        for other in self._others:
            other.write_text(name, text, step)

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed, or its error raised
            self._file.close()
        for other in self._others:
            other.close()


def val_columns(val_loss: ValLoss, mixture: Mixture, samples: int) -> Row:
    """The loss on the val split and, in a mixture, each source's loss and what the first `samples`
    samples took of it.
    """
    row: Row = {"val_loss": val_loss.mean}
    if len(mixture.sources) > 1:
        for (name, (tokens, epochs)), loss in zip(mixture.progress(samples).items(), val_loss.by_source, strict=True):
            row |= {f"val_loss_{name}": loss, f"tokens_{name}": tokens, f"epochs_{name}": epochs}
    return row


def bits_per_byte(loss: float, mixture: Mixture) -> float | None:
    """A loss in nats a token, by the bytes a token of the complete val splits; None where shards of
    another program do not record them.
    """
    manifests = [(source.share, source.manifest) for source in mixture.sources]
    if any(manifest.is_foreign for _, manifest in manifests):
        return None
    counts = ((share, manifest.count("val", "bytes"), manifest.count("val", "tokens")) for share, manifest in manifests)
    bytes_per_token = sum(share * text_bytes / tokens for share, text_bytes, tokens in counts)
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


def reference_losses(folder: RunFolder, mixture: Mixture) -> dict[str, float]:
    """The losses of models that know how frequent tokens, and pairs of tokens, are, and nothing else; of a
    mixture the mean by share. Measured at the first start, and kept in references.json.
    """
    with suppress(OSError, ValueError):
        return {name: float(value) for name, value in json.loads(folder.references.read_bytes()).items()}
    found = {"unigram_entropy": 0.0, "bigram_entropy": 0.0}
    try:
        for source in mixture.sources:
            for name, entropy in zip(found, sampled_entropies(source.loader.reader), strict=True):
                found[name] += source.share * entropy
    except UserError:  # a damaged shard, which training reports when it gets there
        return {}
    write_atomic(folder.references, json.dumps(found).encode() + b"\n")
    return found


def tag(name: str) -> str:
    """The group and the name of a column's curve: val_loss_a is val/loss_a."""
    if "/" in name:
        return name
    group = "val" if name.startswith("val_") else GROUPS.get(name, "data")
    return f"{group}/{name.removeprefix('val_')}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds the path to an OSError, of which a file that is open already says nothing."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
