"""Fewer rows that draw the same curve: what a page can show of a million steps."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from observe.report.read import Column, Table


@dataclass(frozen=True)
class Reduction:
    """The rows that are kept, (kept,) ascending, and how many rows of the table share a bucket."""

    kept: npt.NDArray[np.int64]
    bucket: int

    def means(self, column: Column) -> Column:
        """The mean of each kept row's bucket, (kept,): smoothing the extremes would not give it."""
        starts, is_number = np.arange(0, len(column), self.bucket), np.isfinite(column)
        counts = np.add.reduceat(is_number, starts, dtype=int)
        sums = np.add.reduceat(np.where(is_number, column, 0.0), starts)
        means: Column = np.where(counts, sums / np.maximum(counts, 1), np.nan)
        return means[self.kept // self.bucket]


def reduce(table: Table, most_rows: int) -> Reduction:
    """All rows where there are at most `most_rows`; else those that hold a column's smallest or
    largest value in each of many buckets of consecutive rows, the first row and the last.
    """
    rows = len(table.steps)
    if rows <= most_rows:
        return Reduction(np.arange(rows), 1)
    bucket = -(-rows // max(1, most_rows // (2 * len(table.columns))))
    starts = np.arange(0, rows, bucket)
    kept = [np.array([0, rows - 1])]
    for column in table.columns.values():
        for sign in (1, -1):
            padded = np.full(len(starts) * bucket, np.inf)
            padded[:rows] = np.where(np.isfinite(column), sign * column, np.inf)
            # A bucket without a number keeps its first row, where the curve has a gap.
            kept.append(starts + padded.reshape(-1, bucket).argmin(axis=1))
    return Reduction(np.unique(np.concatenate(kept)), bucket)
