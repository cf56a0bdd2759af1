"""Model folders that a stranger made to do harm: one line, exit code 2, little memory, and nothing in them is run.

Each case is tried by the real commands in a fork that may take 512 MiB more than it has and is killed after a minute.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tokenizer_named
from safetensors.torch import load_file, save_file
from test_checkpoint import SMALL, saved

import observe.inspect
import sample.run
from pipeline.checkpoint.folder import hash_of_description, write_model
from pipeline.checkpoint.safetensors_files import INDEX, WEIGHTS
from pipeline.cli import main as cli
from pipeline.model.language_model import LanguageModel

MORE_BYTES = 512 << 20
STATM = Path("/proc/self/statm")
DEEP, NESTED = b"[" * 100_000, json.loads("[" * 400 + "]" * 400)

assert observe.inspect and sample.run  # imported before the forks, which should not each do it


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder as it should be."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    write_model(folder, LanguageModel(SMALL, 512), tokenizer_named("bpe:512"))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it should be."""
    return saved(tmp_path_factory.mktemp("ours"), tokenizer=tokenizer_named("word"))[0]


def attempt(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command, in a fork with little memory; the signal's number, negative, where one killed it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.argv = os.fdopen(2, "w"), ["pipeline", *arguments]
        if STATM.is_file():  # Linux; elsewhere the alarm alone stands guard
            in_use = int(STATM.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (in_use + MORE_BYTES, resource.RLIM_INFINITY))
        signal.alarm(60)
        torch.set_num_threads(1)  # the other threads of a pool are not there after a fork, and would be waited for
        try:
            cli.main()
            os._exit(0)
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(int(stop.code or 0))
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def refused(folder: Path, reason: str, commands: tuple[str, ...] = ("sample", "inspect")) -> None:
    for command in commands:
        arguments = (command, "--ckpt", str(folder)) if command == "sample" else (command, str(folder))
        code, said = attempt(*arguments)
        assert code == 2, f"{command}: exit code {code}: {said[-2000:]}"
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 2000, said[:2000]
        assert reason in said, said


# ---- ways to do harm ----

Harm = Callable[[Path], object]


def config(**changes: Any) -> Harm:
    def change(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(document | changes))

    return change


def content(name: str, data: bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(data)


def gone(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def pipe(name: str) -> Harm:
    """One that nobody ever writes to."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def directory(name: str) -> Harm:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def link(name: str, target: str) -> Harm:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def endless(name: str, size: int = 1 << 40) -> Harm:
    """A terabyte that takes no room on the disk."""

    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return apply


def header(document: Any, data: bytes = b"", length: int | None = None) -> Harm:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return content(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def sharded(weight_map: Any, also: Harm | None = None) -> Harm:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        document = {"weight_map": weight_map}
        (folder / INDEX).write_bytes(weight_map if isinstance(weight_map, bytes) else json.dumps(document).encode())
        if also:
            also(folder)

    return change


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Harm:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return apply


def endless_token(document: dict[str, Any]) -> None:
    """One of 64 kB, by merges: finding how ranks would merge its bytes would take minutes."""
    model = document["model"]
    model["vocab"]["<|endoftext|>"] = 511
    for length in (2**power for power in range(16)):
        model["vocab"]["Q" * length * 2] = len(model["vocab"])
        model["merges"].append(["Q" * length] * 2)


def description(change: Callable[[dict[str, Any]], object]) -> Harm:
    """A changed checkpoint.json, with the hash that anybody can compute for it."""

    def apply(folder: Path) -> None:
        document = json.loads((folder / "checkpoint.json").read_text())
        change(document)
        with contextlib.suppress(TypeError):  # of a document too deep to be written, which is refused before
            document["hash"] = hash_of_description(document)
        (folder / "checkpoint.json").write_text(json.dumps(document))

    return apply


def at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


def twice(folder: Path) -> None:
    """Two shards with the same tensors."""
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")


WTE = "transformer.wte.weight"

THEIRS: dict[str, tuple[Harm, str]] = {
    # config.json: what it asks for
    "a terabyte of width": (config(n_embd=10**6, n_head=1), "expected (512, 1000000)"),
    "a billion layers": (config(n_layer=10**9), "1000000000 layers of 28 tensors"),
    "a thousand layers": (config(n_layer=1000), "1000 layers of 28 tensors"),
    "a vocabulary of 10**12": (config(vocab_size=10**12), "rows for the 512 tokens"),
    "10**15 positions": (config(n_positions=10**15), "expected (1000000000000000, 32)"),
    "more positions than there are": (config(n_positions=25), "transformer.wpe.weight is (24, 32), expected (25, 32)"),
    "negative": (config(n_layer=-1), "n_layer=-1, expected an integer"),
    "zero": (config(n_head=0), "n_head=0, expected an integer"),
    "a fraction": (config(n_embd=32.0), "n_embd=32.0, expected an integer"),
    "true": (config(n_layer=True), "n_layer=True, expected an integer"),
    "text": (config(n_embd="32"), "n_embd='32', expected an integer"),
    "a long text": (config(n_embd="3" * 500_000), "expected an integer"),
    "a list": (config(n_embd=[32]), "n_embd=[32], expected an integer"),
    "null": (config(n_embd=None), "n_embd=None, expected an integer"),
    "past 64 bits": (config(n_embd=10**300), "expected an integer"),
    "not a number": (config(n_embd=float("nan")), "is not JSON"),
    "a text for yes": (config(tie_word_embeddings="no"), "tie_word_embeddings='no'"),
    "a wide n_inner": (config(n_inner=10**12), "n_inner=1000000000000"),
    "quantized": (config(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config="),
    # config.json: what it is
    "deep config": (content("config.json", DEEP), "is not JSON"),
    "no text": (content("config.json", b"\xff\xfe\x00"), "is not JSON"),
    "empty config": (content("config.json", b""), "is not JSON"),
    "endless config": (endless("config.json"), "is too large"),
    "a pipe for a config": (pipe("config.json"), "neither checkpoint.json nor a Hugging Face config.json"),
    "a folder for a config": (directory("config.json"), "neither checkpoint.json nor a Hugging Face config.json"),
    "a device for a config": (link("config.json", "/dev/zero"), "neither checkpoint.json nor"),
    # model.safetensors
    "a header of 2**63 bytes": (header(b"{}", length=1 << 63), "has a header of 9,223,372,036,854,775,808 bytes"),
    "a header of 2**64-1 bytes": (header(b"{}", length=(1 << 64) - 1), "has a header of"),
    "a header of 90 MB": (header(b"{" + b" " * 90_000_000 + b"}"), "has a header of 90,000,002 bytes"),
    "a header that is no JSON": (header(b"hello"), "is not a complete safetensors file"),
    "a header that is a list": (header([]), "is not a complete safetensors file"),
    "a deep header": (header(DEEP), "is not a complete safetensors file"),
    "tensors over each other": (header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "is not a complete"),
    "a hole": (
        header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
        "is not a complete safetensors file",
    ),
    "past the end": (header({"a": entry([1], 0, 4)}), "is not a complete safetensors file"),
    "a negative size": (header({"a": entry([-1], 0, 4)}, bytes(4)), "is not a complete safetensors file"),
    "a huge shape without data": (header({WTE: entry([1 << 62, 1 << 62], 0, 0)}), "is not a complete safetensors file"),
    "a huge empty shape": (header({WTE: entry([1 << 40, 0], 0, 0)}), "2 layers of 1 tensors"),
    "a name twice": (
        header(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)),
        "2 layers of 1 tensors",
    ),
    "no tensor": (header({}), "2 layers of 0 tensors"),
    "nothing": (content(WEIGHTS, b""), "is not a complete safetensors file"),
    "cut short": (lambda folder: os.truncate(folder / WEIGHTS, 5000), "is not a complete safetensors file"),
    "more behind it": (endless(WEIGHTS), "is not a complete safetensors file"),
    "eight-bit weights": (tensors(lambda t: t.update({WTE: t[WTE].to(torch.int8)})), f"{WTE} is I8"),
    "float8 weights": (tensors(lambda t: t.update({WTE: t[WTE].to(torch.float8_e4m3fn)})), f"{WTE} is F8_E4M3"),
    "another shape": (
        tensors(lambda t: t.update({WTE: t[WTE].t().contiguous()})),
        f"{WTE} is (32, 512), expected (512, 32)",
    ),
    "a flat shape": (tensors(lambda t: t.update({WTE: t[WTE].flatten()})), f"{WTE} is (16384,), expected (512, 32)"),
    "a tensor missing": (tensors(lambda t: t.pop(WTE)), f"missing: {WTE}"),
    "a tensor too many": (tensors(lambda t: t.update({"evil\n\x1b[2J": t[WTE].clone()})), "unknown: evil"),
    "a tensor by both its names": (tensors(lambda t: t.update({"wte.weight": t[WTE].clone()})), "a second time"),
    "a pipe for weights": (pipe(WEIGHTS), "only safetensors are read"),
    "a folder for weights": (directory(WEIGHTS), "only safetensors are read"),
    "a device for weights": (link(WEIGHTS, "/dev/zero"), "only safetensors are read"),
    "no weights": (gone(WEIGHTS), "only safetensors are read"),
    # model.safetensors.index.json
    "a shard above": (sharded({"a": "../model.safetensors"}), "names the file '../model.safetensors'"),
    "a shard from the root": (sharded({"a": "/etc/x.safetensors"}), "names the file '/etc/x.safetensors'"),
    "a shard in a folder": (sharded({"a": "x/y.safetensors"}), "names the file 'x/y.safetensors'"),
    "a shard that is a pickle": (sharded({"a": "pytorch_model.bin"}), "names the file 'pytorch_model.bin'"),
    "a shard with a NUL": (sharded({"a": "x\0.safetensors"}), "names the file"),
    "a shard on two lines": (sharded({"a": "x\ny.safetensors"}), "names the file"),
    "a shard that is a number": (sharded({"a": 7}), "names the file '7'"),
    "shards of two kinds": (sharded({"a": 7, "b": "x"}), "is damaged"),
    "a shard that is missing": (
        sharded({"a": "model-9.safetensors"}),
        "names model-9.safetensors, which does not exist",
    ),
    "a shard that is a pipe": (sharded({"a": "p.safetensors"}, pipe("p.safetensors")), "which does not exist"),
    "a list for a map": (sharded(["model-1.safetensors"]), "is damaged"),
    "an index that is a list": (sharded(b"[]"), "is damaged"),
    "a deep index": (sharded(DEEP), "is damaged"),
    "an endless index": (sharded({"a": "model-1.safetensors"}, endless(INDEX)), "is too large"),
    "tensors in two shards": (
        sharded({"a": "model-1.safetensors", "b": "model-2.safetensors"}, twice),
        "a second time",
    ),
    # the tokenizer's files
    "an endless tokenizer": (endless("tokenizer.json"), "is too large"),
    "a deep tokenizer": (content("tokenizer.json", DEEP), "is not a valid tokenizer.json"),
    "no tokenizer": (content("tokenizer.json", b"no"), "is not a valid tokenizer.json"),
    "a pipe for a tokenizer": (pipe("tokenizer.json"), "its vocabulary is unknown"),
    "an id of 2**40": (tokenizer(at("model", "vocab", "!", value=1 << 40)), "not in 0 .."),
    "a negative id": (tokenizer(at("model", "vocab", "!", value=-1)), "not in 0 .."),
    "an id that is a fraction": (tokenizer(at("model", "vocab", "!", value=0.5)), "an id is not an integer"),
    "an id that is text": (tokenizer(at("model", "vocab", "!", value="0")), "an id is not an integer"),
    "an id twice": (tokenizer(at("model", "vocab", "!", value=1)), "occurs twice"),
    "a vocabulary that is a number": (tokenizer(at("model", "vocab", value=7)), "tokenizer.json"),
    "merges of nothing": (tokenizer(at("model", "merges", value=[["!", "no such"]])), "tokenizer.json"),
    "merges that are a text": (tokenizer(at("model", "merges", value="abc")), "tokenizer.json"),
    "a token of 64 kB": (tokenizer(endless_token), "has 512 rows for the 528 tokens of its vocabulary"),
    "a regex that is none": (
        tokenizer(
            at(
                "pre_tokenizer",
                value={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
            )
        ),
        "tokenizer.json",
    ),
    "a model of another kind": (tokenizer(at("model", "type", value="Evil")), "tokenizer.json"),
    "an endless tokenizer_config": (
        lambda folder: (
            tokenizer(at("model", "vocab", "!", value=0))(folder),
            endless("tokenizer_config.json")(folder),
        ),
        "is too large",
    ),
    "a deep tokenizer_config": (content("tokenizer_config.json", DEEP), "is not JSON"),
}

OURS: dict[str, tuple[Harm, str]] = {
    "a billion layers": (description(at("config", "model", "n_layer", value=10**9)), "1000000000 layers of 28"),
    "a terabyte of width": (description(at("config", "model", "n_embd", value=10**6)), ", 1000000)"),
    "3 layers": (description(at("config", "model", "n_layer", value=3)), "missing: transformer.h.2"),
    "negative": (description(at("config", "model", "n_layer", value=-1)), "checkpoint.json: model.n_layer=-1: expected an"),
    "text": (description(at("config", "model", "n_layer", value="2")), "model.n_layer='2': expected an integer >= 1"),
    "a section that is a list": (description(at("config", "model", value=[])), "model=[]: expected a section"),
    "no config": (description(at("config", value=None)), "is damaged"),
    "an endless config": (description(at("config", "x" * 500_000, value={})), "config is too large"),
    "a step that is a text": (description(at("step", value="3")), "is damaged"),
    "a loss that is a list": (description(at("val_loss", value=[])), "is damaged"),
    "norms that are texts": (description(at("grad_norms", value=["a"])), "is damaged"),
    "an unknown key": (description(at("evil", value=1)), "is damaged"),
    "a later format": (description(at("format", value=2)), "has format 2"),
    "files above": (description(at("files", "../../../etc/passwd", value="0")), "is damaged"),
    "files from the root": (description(at("files", "/etc/passwd", value="0")), "is damaged"),
    "files that are the folder above": (description(at("files", "..", value="0")), "is damaged"),
    "files without a name": (description(at("files", "", value="0")), "is damaged"),
    "files that are a list": (description(at("files", value=["x"])), "is damaged"),
    "a hash that is a number": (description(at("files", "config.json", value=7)), "is damaged"),
    "a tokenizer that is a text": (description(at("tokenizer", value="gpt2")), "is damaged"),
    "a tokenizer without a name": (description(lambda d: d["tokenizer"].pop("name")), "is damaged"),
    "a tokenizer from above": (description(at("tokenizer", "name", value="../../x.json")), "does not match its description"),
    "a tokenizer nobody knows": (description(at("tokenizer", "name", value="evil")), "unknown tokenizer 'evil'"),
    "a vocabulary of 10**12": (description(at("tokenizer", "vocab_size", value=10**12)), "does not match its desc"),
    "a vocabulary of another size": (description(at("tokenizer", "vocab_size", value=300)), "does not match its description"),
    "an end of text that is a list": (description(at("tokenizer", "end_of_text", value=[1])), "is damaged"),
    "a negative vocabulary": (description(at("tokenizer", "vocab_size", value=-5)), "vocabulary"),
    "a deep description": (content("checkpoint.json", DEEP), "is damaged"),
    "a description that is a list": (content("checkpoint.json", b"[1]"), "is damaged"),
    "nesting that is read and not written": (description(at("scaler", "x", value=NESTED)), "is damaged"),
    "an endless description": (endless("checkpoint.json"), "is too large"),
    "words that are numbers": (content("vocabulary.json", b"[1, 2]"), "vocabulary.json"),
    "deep words": (content("vocabulary.json", DEEP), "vocabulary.json"),
    "endless words": (endless("vocabulary.json", 1 << 30), "vocabulary.json"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("harm", THEIRS)
def test_a_hostile_model_folder_is_one_line(theirs: Path, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(theirs, folder)
    change, reason = THEIRS[harm]
    change(folder)
    # What is no model to `inspect` is looked for as a dataset, and refused as that.
    refused(folder, reason, ("sample",) if "for a config" in harm else ("sample", "inspect"))


@pytest.mark.slow
@pytest.mark.parametrize("harm", OURS)
def test_a_hostile_checkpoint_is_one_line(ours: Path, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ours, folder)
    change, reason = OURS[harm]
    change(folder)
    refused(folder, reason, ("sample",) if "words" in harm else ("sample", "inspect"))


@pytest.mark.parametrize(
    "pointer",
    [
        b"../step_00000003", b"/etc", b"step_00000003/..", b"step_00000003\nstep_00000004", b"step_00000003\0", b"",
        b"\xff\xfe", b"step_" + b"1" * 300, b"x" * 10_000_000, b"step_00000009",
    ],
)  # fmt: skip
def test_a_hostile_pointer_is_one_line(ours: Path, tmp_path: Path, pointer: bytes) -> None:
    shutil.copytree(ours, tmp_path / "checkpoints" / ours.name)
    (tmp_path / "checkpoints" / "latest").write_bytes(pointer)
    code, said = attempt("sample", "--ckpt", "latest", "--run-dir", str(tmp_path))
    assert code == 2 and said.count("\n") == 1 and len(said) < 2000, said[:2000]


# ---- nothing is run ----


class Payload:
    """What a pickle can hold: unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_the_payload_would_explode(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))  # noqa: S301
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_programs_and_pickles_in_a_folder_are_never_run(theirs: Path, tmp_path: Path, whole: bool) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(theirs, folder)
    program = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: ...\n"
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(program)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "added_tokens.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    evil = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    config(auto_map=evil, custom_pipelines={"text-generation": {"impl": "modeling_evil.Evil"}})(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if whole:
        for arguments in (
            ("sample", "--ckpt", str(folder), "--max-new-tokens", "3"),
            ("inspect", str(folder)),
            ("export", "--ckpt", str(folder), "--to", str(tmp_path / "out")),
        ):
            code, said = attempt(*arguments)
            assert code == 0, said
    else:
        (folder / WEIGHTS).unlink()
        refused(folder, "pickled weights (.bin, .pt) never")
    assert not mark.exists()


def test_the_folders_themselves_are_good(theirs: Path, ours: Path) -> None:
    """What the cases above change works unchanged, in as little memory."""
    for folder in (theirs, ours):
        for arguments in (("sample", "--ckpt", str(folder), "--max-new-tokens", "3"), ("inspect", str(folder))):
            code, said = attempt(*arguments)
            assert code == 0, said
