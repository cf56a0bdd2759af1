"""Folders and globs of this machine: every file below, each folder entered once, nothing skipped
without being counted.

Not glob.glob: it enters a folder as often as links lead to it (40 times where a link leads to its
parent), and skips folders that it may not list.
"""

import errno
import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from pipeline.dataset.shards import MANIFEST_NAME
from pipeline.errors import UserError
from prepare.sources.listing import FOLDER_OF_A_GLOB, HIDDEN_FILE, NOT_A_FILE, REPEATED, Listing
from prepare.sources.names import is_glob
from prepare.storage.files import reading, shown

# What is left of a glob below a folder, as parts of a path; () is left where it names an entry.
Patterns = frozenset[tuple[str, ...]]
# Lists the splits of a folder that `DatasetDict.save_to_disk` of Hugging Face wrote.
SAVED_SPLITS = "dataset_dict.json"
# Next to the data files of a folder that `Dataset.save_to_disk` of Hugging Face wrote.
SAVED_STATE = {"state.json", "dataset_info.json"}
SHARD_NAME = re.compile(r"(train|val)_\d{5,}\.bin")
# In a folder that holds the texts and their datasets too, as after `prepare .`.
PREPARED = "part of a prepared dataset"
T = TypeVar("T")
LINK_TO_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def every_file(root: Path, listing: Listing, split: str) -> list[Path]:
    """The files below a folder, sorted by path. Raises UserError if a folder cannot be listed."""
    return _Walk(listing, split).files(root, _with_none(("**", "*")))


def matches(glob: str, listing: Listing, split: str, without: Set[str] = frozenset()) -> list[Path]:
    """The files that a glob names, as `every_file`; folders of the names `without` are not entered."""
    parts = Path(glob).parts
    first = next(number for number, part in enumerate(parts) if is_glob(part))
    root = Path(*parts[:first])
    # `a/**` names every file below a, as `a/**/*` does.
    pattern = (*parts[first:], "*") if parts[-1] == "**" else parts[first:]
    return _Walk(listing, split, without).files(root, _with_none(pattern)) if root.is_dir() else []


class _Walk:
    def __init__(self, listing: Listing, split: str, without: Set[str] = frozenset()) -> None:
        self._listing, self._split, self._without = listing, split, without
        self._files: list[Path] = []
        self._folders: deque[tuple[Path, str, Patterns]] = deque()
        self._links: list[tuple[Path, Patterns]] = []
        self._entered: set[tuple[str, Patterns]] = set()

    def files(self, root: Path, patterns: Patterns) -> list[Path]:
        self._folders.append((root, os.path.realpath(root), patterns))
        # Links last, so that what is reached by its real path too is listed under that.
        while self._folders:
            while self._folders:
                self._enter(*self._folders.popleft())
            links, self._links = sorted(self._links, key=lambda link: link[0]), []
            for path, left in links:
                self._follow(path, left)
        return sorted(self._files, key=Path.as_posix)

    def _enter(self, folder: Path, real: str, patterns: Patterns) -> None:
        if (real, patterns) in self._entered:
            self._listing.pass_over(REPEATED, str(folder))
            return
        self._entered.add((real, patterns))
        with reading(str(folder)), os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        unread = _unread(folder, names, self._split)
        self._listing.has_splits |= SAVED_SPLITS in names
        unread |= dict.fromkeys(self._without, "left out of stdlib")
        for entry in entries:
            path, left = folder / entry.name, _below(patterns, entry.name)
            is_folder = entry.is_dir(follow_symlinks=False)
            if not left:
                hidden = _below(patterns, entry.name, hidden=True)
                if hidden and (is_folder or () in hidden):
                    self._listing.pass_over("hidden folder" if is_folder else HIDDEN_FILE, str(path))
            elif entry.name in unread and (is_folder or () in left):
                self._listing.pass_over(unread[entry.name], str(path))
            elif entry.is_symlink():
                self._links.append((path, left))
            else:
                self._add(path, f"{real}/{entry.name}", left)

    def _follow(self, link: Path, left: Patterns) -> None:
        try:
            link.stat()
        except OSError as error:
            if error.errno in LINK_TO_NOTHING:
                self._listing.pass_over("link to nothing", str(link))
                return
        self._add(link, os.path.realpath(link), left)

    def _add(self, path: Path, real: str, left: Patterns) -> None:
        with reading(str(path)):
            found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            if below := left - {()}:
                self._folders.append((path, real, below))
            else:
                self._listing.pass_over(FOLDER_OF_A_GLOB, str(path))
        elif () in left and not stat.S_ISREG(found.st_mode):
            self._listing.pass_over(NOT_A_FILE, str(path))
        elif () in left and self._listing.takes(str(path), found.st_size, real):
            self._files.append(path)


def _with_none(pattern: tuple[str, ...]) -> Patterns:
    """The pattern, and what it is where its `**` stand for no folder."""
    return frozenset({pattern, *(_with_none(pattern[1:]) if pattern[:1] == ("**",) else ())})


def _below(patterns: Patterns, name: str, *, hidden: bool = False) -> Patterns:
    """What is left of the patterns behind an entry of this name; nothing if they do not name it."""
    left: set[tuple[str, ...]] = set()
    for pattern in patterns - {()}:
        # As in a shell, only a pattern that begins with a period names what is hidden.
        if not name.startswith(".") or hidden or pattern[0].startswith("."):
            if pattern[0] == "**":
                left |= _with_none(pattern)
            elif fnmatchcase(name, pattern[0]):
                left |= _with_none(pattern[1:])
    return frozenset(left)


def _unread(folder: Path, names: Set[str], split: str) -> dict[str, str]:
    """Entries that hold no text of a folder that another program wrote in a known form, each with
    the reason.
    """
    if MANIFEST_NAME in names and any(SHARD_NAME.fullmatch(name) for name in names):
        return dict.fromkeys(names, PREPARED)
    if "unfinished" in names and (folder / "unfinished" / "plan.json").exists():
        return {"unfinished": PREPARED}
    if SAVED_SPLITS in names:
        splits = _read_saved(folder / SAVED_SPLITS, lambda found: list(map(str, found["splits"])))
        if split not in splits:
            raise UserError(
                f"{shown(str(folder))} has no split {split!r}, its splits are: {', '.join(splits)}; choose with --split"
            )
        return dict.fromkeys(names - {split}, f"not in the split {split}")
    if names >= SAVED_STATE:
        data = _read_saved(
            folder / "state.json", lambda found: {str(each["filename"]) for each in found["_data_files"]}
        )
        if missing := sorted(data - names):
            raise UserError(f"{shown(str(folder / missing[0]))} is missing: save the dataset again")
        # `datasets` keeps the results of map and filter, cache-*.arrow, in the same folder.
        return dict.fromkeys(names - data, "not a data file of a saved dataset")
    return {}


def _read_saved(path: Path, names_in: Callable[[Any], T]) -> T:
    """The names that a saved dataset's JSON holds. Raises UserError if it is damaged."""
    try:
        with reading(str(path)):
            return names_in(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{shown(str(path))} is damaged: save the dataset again") from None
