"""Bring a corpus and a vocabulary into a folder, on a machine with a network, for machines without one."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.files import one_writer
from pipeline.log import ProgressReport, logger
from prepare.sources.corpus import hub_source
from prepare.sources.download import download, sha256_of
from prepare.sources.hub import HubName, commit_of, file_of, hub_fault, parse_name, remote_builder, train_files
from prepare.sources.offline import Record, hub_record, load, url_record
from prepare.sources.pinned import SHAKESPEARE_SHA256, fetch_shakespeare
from prepare.sources.remote import list_remote
from prepare.storage.files import Remote, is_url, shown

VOCABULARIES = ("cl100k_base", "o200k_base")


def run(source: str, folder: Path, tokenizer: str) -> dict[str, str]:
    """Fetch what is not there yet; the environment variables that make the other commands read it."""
    variables = {"PIPELINE_HUB_DIR": str(folder.resolve())}
    with one_writer(folder):
        if tokenizer in VOCABULARIES:
            variables["TIKTOKEN_CACHE_DIR"] = str((folder / "tiktoken").resolve())
            _fetch_vocabulary(tokenizer, folder / "tiktoken")
        hub = hub_source(source)
        if hub is not None:
            _fetch_hub(parse_name(hub), folder)
        elif source == "shakespeare":
            path = folder / "shakespeare" / "input.txt"
            if not path.is_file() or sha256_of(path) != SHAKESPEARE_SHA256:
                fetch_shakespeare(path)
        elif is_url(source):
            _fetch_url(source, folder)
        else:
            raise UserError(f"{source!r} needs no fetching: wanted a named corpus of the Hub, hf:ORG/NAME or a URL")
    return variables


def _fetch_vocabulary(name: str, folder: Path) -> None:
    """tiktoken's own download: it knows the address, the file's hash, and the name it will look for."""
    import tiktoken_ext.openai_public

    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()
    except Exception as error:  # tiktoken lets the network library's own exceptions through
        raise UserError(
            f"the vocabulary of {name} could not be fetched ({type(error).__name__}): check the network"
        ) from None
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def _fetch_hub(name: HubName, folder: Path) -> None:
    builder = remote_builder(name)
    urls = train_files(builder, name.repository)
    if not all(url.endswith(".parquet") for url in urls):
        raise UserError(
            f"dataset {name.repository} is not Parquet: bring it with "
            f"hf download --repo-type dataset {name.repository} --local-dir {folder / name.repository}"
        )
    revision = commit_of(urls[0])
    path = hub_record(folder, name.repository, builder.config.name)
    source = f"hf:{name.repository}:{builder.config.name}@{revision}"
    record = load(path) or Record(source, revision)
    if record.revision != revision:
        raise UserError(f"{path.parent} holds revision {record.revision}, wanted {revision}: choose another folder")
    with ProgressReport(f"fetch {name.repository}", total=len(urls), unit="files") as report:
        for file in map(file_of, urls):
            target = path.parent / file
            told = record.files.get(file)
            if told is None or not target.is_file() or target.stat().st_size != told["bytes"]:
                record.files[file] = _fetch_hub_file(name.repository, str(revision), file, path.parent)
                record.save(path)
            report.advance(1)
    record.whole = True
    record.save(path)


def _fetch_hub_file(repository: str, revision: str, file: str, folder: Path) -> dict[str, object]:
    """Through huggingface_hub, which goes on with what was cut off; then held against the Hub's own SHA-256."""
    from huggingface_hub import HfApi, hf_hub_download

    told: Any
    try:
        (told,) = HfApi().get_paths_info(repository, [file], revision=revision, repo_type="dataset")
        path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:  # as in prepare.hub: what the Hub and the network raise has no common kind
        raise hub_fault(repository, error) from None
    sha256 = told.lfs.sha256 if told.lfs else None
    if path.stat().st_size != told.size or (sha256 and sha256_of(path) != sha256):
        path.unlink()
        raise UserError(f"{file} of {repository} came damaged: fetch it again")
    return {"bytes": told.size, "sha256": sha256}


def _fetch_url(source: str, folder: Path) -> None:
    remotes = list_remote(source)
    path = url_record(folder, source)
    record = load(path) or Record(shown(source))
    kept = {place: told for place, told in record.files.items() if told in map(_told, remotes)}
    record = Record(shown(source), None, {}, False)
    with ProgressReport(
        f"fetch {shown(source)}", total=sum(remote.size for remote in remotes) / 1e6, unit="MB"
    ) as report:
        for remote in remotes:
            place = _place(remote.url)
            target = folder / place
            if place not in kept or not target.is_file() or target.stat().st_size != remote.size:
                download(remote, target)
            record.files[place] = {**_told(remote), "bytes": target.stat().st_size}
            record.save(path)
            report.advance(remote.size / 1e6)
    record.whole = True
    record.save(path)
    logger.info("%s files of %s are in %s", f"{len(remotes):,}", shown(source), folder)


def _told(remote: Remote) -> dict[str, object]:
    return {"url": shown(remote.url), "bytes": remote.size, "etag": remote.etag}


def _place(url: str) -> str:
    """Where a URL's file lies in the folder; its suffixes stay, they say what it holds."""
    parts = urlsplit(url)
    names = [name for name in (parts.netloc.rpartition("@")[2], *parts.path.split("/")) if name not in ("", ".", "..")]
    return "/".join(("fetched", parts.scheme, *names))
