"""Copies that `pipeline fetch` made, in the folder that PIPELINE_HUB_DIR names: what they are copies of.

Hub repositories lie there as ORG/NAME, with a record of each config inside; URLs under `fetched/`, with a record for each source.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from pipeline.errors import UserError
from pipeline.files import hash_bytes, write_atomic

# Hidden, so that no reader of data files takes it for one.
HUB_RECORD = ".fetched."


@dataclass
class Record:
    """What was fetched: `files` by their places in the folder, each with what its server told; `whole` once all are."""

    source: str
    revision: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    whole: bool = False

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))

    def check(self, folder: Path) -> None:
        """Raises UserError unless every file is there in its size."""
        for name, told in self.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != told["bytes"]:
                found = "is not there" if size is None else f"has {size:,} bytes"
                raise UserError(f"{path} {found}, wanted {told['bytes']:,}: pipeline fetch {self.source} again")
        if not self.whole:
            raise UserError(f"the copy of {self.source} in {folder} is not whole: pipeline fetch it again")


def offline_folder() -> Path | None:
    named = os.environ.get("PIPELINE_HUB_DIR")
    return Path(named) if named else None


def load(path: Path) -> Record | None:
    """The record at `path`, if there is one. Raises UserError where it is damaged."""
    if not path.is_file():
        return None
    try:
        return Record(**orjson.loads(path.read_bytes()))
    except (orjson.JSONDecodeError, TypeError):
        raise UserError(f"{path} is damaged: remove it and pipeline fetch again") from None


def hub_record(folder: Path, repository: str, config: str) -> Path:
    return folder / repository / f"{HUB_RECORD}{config}.json"


def hub_records(folder: Path, repository: str) -> dict[str, Record]:
    """By config, what was fetched of a Hub repository."""
    found = sorted(Path(folder, repository).glob(f"{HUB_RECORD}*.json"))
    records = {path.name.removeprefix(HUB_RECORD).removesuffix(".json"): load(path) for path in found}
    return {config: record for config, record in records.items() if record}


def url_record(folder: Path, source: str) -> Path:
    return folder / "fetched" / f"{hash_bytes(source.encode())}.json"
