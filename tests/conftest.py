"""What several test files need: small datasets on disk, a tiny config, and a way to run the program for real."""

import gzip
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
import torch

from pipeline.config.keys import Config
from pipeline.config.load import from_dict
from pipeline.dataset.shards import Manifest, Shard
from pipeline.files import hash_file
from pipeline.vocabulary.byte_pair import GPT2_RANKS, BytePairTokenizer
from pipeline.vocabulary.char_byte_word import ByteTokenizer
from pipeline.vocabulary.huggingface_files import open_json
from pipeline.vocabulary.tokenizer import Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer
from prepare.encoding.vocabulary import learn_vocabulary

pytest_plugins = ["slurm_cluster"]
ROOT = Path(__file__).parents[1]
# Prose, code, scripts and what pre-tokenizers disagree about.
ALPHABET = "abE '\"’sdmtlvre019½ \t\n\r\u00a0\u2003.,-_(){}<|>/éßñΩжǅʰ中日한😀\u200d\u0301\x00\x1f\u2028"
WriteDataset = Callable[..., Path]
GPT2_END = 50256
MakeConfig = Callable[..., Config]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign-share", type=float, default=1.0, help="run this share of the campaign, drawn at random"
    )
    parser.addoption("--campaign-seed", type=int, default=0, help="chooses which tests of the campaign these are")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """CI takes a sample of the campaign, another one each time: the whole of it takes a quarter of an hour.

    With several workers, one has the machine's SLURM, a slow test goes to whichever is free, and the others of a
    file stay together. SLURM's and the slow ones come first: a worker that gets them last works on alone.
    """
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    if hasattr(config, "workerinput"):  # in one process, files with fixtures of their own stay together
        slow = {groups[item] for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (groups[item] != "slurm", groups[item] not in slow))
    share = config.option.campaign_share
    campaign = [item for item in items if item.get_closest_marker("campaign")]
    if share < 1 and campaign:
        chosen = random.Random(config.option.campaign_seed).sample(campaign, ceil(share * len(campaign)))
        left_out = set(campaign).difference(chosen)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def group_of(item: pytest.Item) -> str:
    """Tests of one group run in one worker."""
    fixtures = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    if "cluster" in fixtures:
        return "slurm"
    # Those of a file that share a fixture would each make it again elsewhere.
    shares = any(found[-1].scope in ("module", "class", "package") for found in fixtures.values())
    return item.nodeid if item.get_closest_marker("slow") and not shares else item.path.name


def prose() -> list[str]:
    """The texts that vocabularies are learnt from here: the standard library's words on a few modules, and some scripts."""
    import calendar
    import json
    import textwrap

    documents = [Path(module.__file__).read_text(encoding="utf-8") for module in (calendar, json, textwrap)]
    return [*documents, "naïve café, 東京 와 한국; 'tis <|endoftext|> 12,345 😀\r\n\n", ALPHABET]


@cache
def tokenizer_named(name: str) -> Tokenizer:
    """One of each kind. Tables that only the network has are stood in for by GPT-2's ranks, under the name's own rules."""
    if name in ("char", "word", "bpe:512"):
        return learn_vocabulary(name, iter(prose()))
    if name in ("byte", "gpt2"):
        return ByteTokenizer() if name == "byte" else BytePairTokenizer("gpt2")
    table = GPT2_RANKS.read_bytes()
    if name == "own.tiktoken":
        return BytePairTokenizer(name, b"".join(table.splitlines(keepends=True)[:1000]))
    if name in ("cl100k_base", "o200k_base"):
        return BytePairTokenizer(name, table)
    if name == "template.json":
        with tempfile.TemporaryDirectory() as folder:
            write_template_json(Path(folder))
            return open_json(Path(folder) / "tokenizer.json")
    return JsonTokenizer("tokenizer.json", *{"merges.json": shuffled_json, "unigram.json": unigram_json}[name]())


TOKENIZERS = (
    "gpt2", "cl100k_base", "o200k_base", "own.tiktoken", "char", "byte", "word", "bpe:512", "merges.json", "unigram.json",
    "template.json",
)  # fmt: skip


def shuffled_json() -> tuple[bytes, int]:
    """A byte-level tokenizer.json in Llama 3's manner, with its ids in no order; and its end-of-text."""
    import json

    from pipeline.vocabulary.merges import LLAMA3_PATTERN

    document = json.loads(tokenizer_named("bpe:512").files()["tokenizer.json"])
    ids = random.Random(0).sample(range(600), 512)
    document["model"]["vocab"] = {token: ids[i] for token, i in document["model"]["vocab"].items()} | {"</s>": ids[511]}
    document["added_tokens"][0] |= {"id": ids[511], "content": "</s>"}
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    return json.dumps(document).encode(), ids[511]


def write_template_json(folder: Path) -> None:
    """A folder in Llama 3's manner: a token before every text, and one of several that might end a text named as doing so."""
    import json

    content, _ = shuffled_json()
    document = json.loads(content)
    added = document["added_tokens"][0]
    for token in ("<|begin|>", "<|endoftext|>"):
        document["model"]["vocab"][token] = max(document["model"]["vocab"].values()) + 1
        document["added_tokens"].append(added | {"id": document["model"]["vocab"][token], "content": token})
    begin = {"id": "<|begin|>", "ids": [document["model"]["vocab"]["<|begin|>"]], "tokens": ["<|begin|>"]}
    template = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": template,
                "pair": template,
                "special_tokens": {"<|begin|>": begin},
            },
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>", "eos_token": "</s>"}')


def unigram_json() -> tuple[bytes, int]:
    """A tokenizer.json that no byte-pair engine can take the place of, cutting texts short as some files do."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>"]
    library.train_from_iterator(
        prose(), trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    library.enable_truncation(5)
    return library.to_str().encode(), 1


def write_dataset(folder: Path, train_tokens: int = 20_000, val_tokens: int = 2_000, seed: int = 0) -> Path:
    """A byte-vocabulary dataset with learnable structure: each id follows from the one before it, plus some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteTokenizer()
    random = np.random.default_rng(seed)
    splits = {}
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        ids = np.cumsum(random.integers(1, 4, size=count)) % 50 + 65
        ids[-1] = tokenizer.end_of_text
        splits[split] = [write_shard(folder, split, 0, ids)]
    manifest = Manifest(
        tokenizer=tokenizer.spec(),
        dtype="uint16",
        splits=splits,
        sources=[],
        options={},
        val_rule={},
        skipped={},
        program="test",
    )
    manifest.save(folder)
    return folder


def write_shard(folder: Path, split: str, number: int, ids: npt.ArrayLike, documents: int = 1) -> Shard:
    """A shard of 16-bit ids; its bytes of text are made up, to be told from its tokens."""
    path = folder / f"{split}_{number:05d}.bin"
    content = np.asarray(ids).astype("<u2")
    content.tofile(path)
    return Shard(path.name, len(content), documents, len(content) - 1, hash_file(path))


def write_documents(folder: Path, splits: dict[str, list[list[str]]]) -> Path:
    """A byte-vocabulary dataset of known texts: for each split its shards, for each shard its documents."""
    tokenizer = ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, list[Shard]] = {}
    for split, shards in splits.items():
        described[split] = []
        for number, texts in enumerate(shards):
            path = folder / f"{split}_{number:05d}.bin"
            ids = [part for text in texts for part in (tokenizer.encode(text), [tokenizer.end_of_text])]
            np.concatenate(ids).astype("<u2").tofile(path)
            text_bytes = sum(len(text.encode()) for text in texts)
            described[split].append(Shard(path.name, path.stat().st_size // 2, len(texts), text_bytes, hash_file(path)))
    Manifest(
        tokenizer=tokenizer.spec(),
        dtype="uint16",
        splits=described,
        sources=[{"path": "texts/a.jsonl", "bytes": 100}],
        options={"seed": 0},
        val_rule={"kind": "hash"},
        skipped={"empty": {"count": 2, "example": "texts/a.jsonl line 7"}},
        program="test",
        statistics={"bigram_entropy_nats": 1.25},
    ).save(folder)
    return folder


def write_jsonl(folder: Path, texts: list[str]) -> Path:
    (folder / "c.jsonl").write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return folder / "c.jsonl"


def write_gz(folder: Path, texts: list[str]) -> Path:
    """A stream, of which no unit can be read without those before it."""
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder, texts).read_bytes(), 1))
    return folder / "c.jsonl.gz"


def write_text_files(folder: Path, texts: list[str]) -> Path:
    (folder / "c").mkdir()
    for i, text in enumerate(texts):
        (folder / "c" / f"{i:06}.txt").write_bytes(text.encode())
    return folder / "c"


def ids_of(documents: int, length: int = 40, seed: int = 0, before: bool = False) -> npt.NDArray[np.uint16]:
    """Documents of GPT-2 ids in which each follows from the one before, end-of-text after or before each."""
    steps = np.random.default_rng(seed).integers(1, 4, size=(documents, length))
    ids = np.cumsum(steps, axis=1) % 1000
    ids[:, 0 if before else -1] = GPT2_END
    return ids.astype("<u2").ravel()


def llm_c(ids: npt.NDArray[np.uint16], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    header = struct.pack("<3i", magic, version, len(ids) if count is None else count)
    return header.ljust(1024, b"\0") + ids.tobytes()


def write_nanogpt(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ids_of(50, seed=1).tofile(folder / "train.bin")
    ids_of(5, seed=2).tofile(folder / "val.bin")
    return folder


def write_llm_c(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents, seed in (("train_000001", 30, 1), ("train_000002", 20, 2), ("val_000000", 5, 3)):
        (folder / f"fineweb_{name}.bin").write_bytes(llm_c(ids_of(documents, seed=seed, before=True)))
    return folder


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A two-layer model on `folder`/data/tiny, all runs under `folder`/runs; `sections` change single keys."""
    document: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder / "runs"), "device": "cpu", "dtype": "float32"},
        "data": {"dataset": "tiny", "data_dir": str(folder / "data")},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"max_steps": 10, "tokens_per_step": 128, "micro_batch_size": 2},
        "eval": {"every_steps": 5, "tokens": 128},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for section, keys in sections.items():
        document.setdefault(section, {}).update(keys)
    return from_dict(document)


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """The bits of a sum depend on the number of threads: a test that changes it does so for itself alone."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with the dataset data/tiny in it."""
    write_dataset(tmp_path / "data" / "tiny")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/run in it, trained for ten steps on the bytes A to r; to be read only."""
    from train.run import run

    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "data" / "tiny")
    run(tiny_config(folder))
    return folder


@pytest.fixture
def inside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def run_program(*arguments: str, cwd: Path, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ...` in a real process, or a real torchrun of `ranks` of them; never raises."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*launcher, "pipeline", *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def overrides(config: Config) -> list[str]:
    """`config` as the arguments of `pipeline train`, on top of a preset's name."""
    from pipeline.config.load import to_dict, toml_value

    def text(value: Any) -> str:
        return value if isinstance(value, str) else toml_value(value)

    return [
        f"{section}.{key}={text(value)}" for section, keys in to_dict(config).items() for key, value in keys.items()
    ]


def die_at(operation: int, work: Callable[[], object]) -> bool:
    """Run `work` in a fork that kills itself before its n-th change of a folder; whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        counter = itertools.count(1)

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if next(counter) == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)

            return call

        for name in ("rename", "link", "unlink", "rmdir", "mkdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)
