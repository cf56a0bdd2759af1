"""What the user of `pipeline export` chose."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportOptions:
    """The options of `pipeline export`."""

    to: Path
    ckpt: str = "latest"
    dtype: str = "float32"
    format: str = "safetensors"
    run_dir: Path | None = None
