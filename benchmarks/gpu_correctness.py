"""The steps of gpu_check.py that tell whether a GPU computes what a CPU does, and whether runs stop and resume there."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_harness import ROOT, Check, NotMeasured, correct, distance, largest_gap
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.keys import Config
from pipeline.config.load import from_dict
from pipeline.dataset.mixture import Mixture
from pipeline.machine.ranks import World
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel
from train import parallel
from train.run import assemble, autocast_type, initialise
from train.spikes import Outcome

OPTIONAL = (
    "orjson", "xxhash", "tiktoken", "tokenizers", "rich", "safetensors", "tensorboard", "pyarrow", "zstandard", "transformers",
)  # fmt: skip
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS, CURVES = {"float32": 1e-5, "bfloat16": 1e-2}, {"float32": 1e-4, "bfloat16": 1e-2}
DECODER = {"float32": 1e-5, "bfloat16": 2e-2}  # whose residual stream is rounded at every addition: 1.02e-2 on a CPU
GROUPS, RESUMED = 1e-3, 1e-3
KERNELS = {
    "default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip


def environment(check: Check) -> dict[str, Any]:
    """What is installed, and the machine's ceilings: what products and copies of this size reach."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0], "cuda": torch.version.cuda, "peak": check.peak,
        "missing packages": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "compiler": shutil.which(os.environ.get("CC", "gcc")),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file(),
        "compile": parallel.should_compile("auto", check.device),
    }  # fmt: skip
    if check.cuda:
        found |= {
            "cudnn": torch.backends.cudnn.version(),
            "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
        }
        found["sdpa"] = {
            name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "cudnn", "mem_efficient")
        }
    square, rows = (256, 64) if check.tiny else (8192, 16384)
    products = {"square": (square, square, square)}
    if not check.tiny:
        layers = {"c_attn": (768, 2304), "c_fc": (768, 3072), "c_proj": (3072, 768), "head": (768, 50304)}
        products |= {name: (rows, *sizes) for name, sizes in layers.items()}
    for name, (m, k, n) in products.items():
        x, weight = (torch.randn(*shape, device=check.device, dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
        took = check.median_s(lambda x=x, weight=weight: F.linear(x, weight))
        found[f"{name}_tflops"] = round(2 * m * k * n / took / 1e12, 1)
    source = torch.empty(1 << (30 if check.cuda else 22), dtype=torch.uint8, device=check.device)
    copy = torch.empty_like(source)
    found["copy_tb_per_s"] = round(2 * source.numel() / check.median_s(lambda: copy.copy_(source)) / 1e12, 3)
    return found


def attention(check: Check) -> dict[str, Any]:
    """What each kernel takes in training, with and without a mask, and for each new length of the keys in decoding: cuDNN
    builds a plan for every one.
    """
    B, H, T, D = (2, 2, 64, 16) if check.tiny else (16, 12, 1024, 64)  # noqa: N806
    qkv = torch.randn(B, T, 3 * H * D, device=check.device, dtype=torch.bfloat16, requires_grad=True)
    flops = 3.5 * 4 * B * H * T * T * D / 2  # causal: forward, and 2.5 times that backward
    mask = torch.ones(B, 1, T, T, dtype=torch.bool, device=check.device).tril()

    def train(mask: torch.Tensor | None) -> None:
        qkv.grad = None  # adding to it would count as attention
        q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in qkv.split(H * D, dim=2))
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).sum().backward()

    def trained(kernel: SDPBackend | None, mask: torch.Tensor | None) -> dict[str, float]:
        with sdpa_kernel(kernel) if kernel else nullcontext():
            took = check.median_s(lambda: train(mask))
        return {"ms": round(took * 1e3, 3), "tflops": round(flops / took / 1e12, 1)}

    cache = torch.randn(2, 1, H, T, D, device=check.device, dtype=torch.bfloat16)

    def decoded(kernel: SDPBackend | None) -> dict[str, float]:
        with torch.inference_mode(), sdpa_kernel(kernel) if kernel else nullcontext():
            ends = iter(range(17, 33))

            def one() -> None:
                end = next(ends)
                F.scaled_dot_product_attention(cache[0, :, :, :1], cache[0, :, :, :end], cache[1, :, :, :end])

            return {"ms of a new length": round(check.median_s(one, warm=1, runs=15) * 1e3, 3)}

    def where_there(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                return work()
            except RuntimeError as error:  # not every kernel is in every build, or takes a mask
                raise NotMeasured(str(error)[:120]) from error

        return run

    plan: dict[str, Callable[[], Any]] = {}
    for name, kernel in KERNELS.items():
        plan[name] = where_there(lambda kernel=kernel: trained(kernel, None))
        plan[f"{name}, mask"] = where_there(lambda kernel=kernel: trained(kernel, mask))
        plan[f"{name}, decoding"] = where_there(lambda kernel=kernel: decoded(kernel))
    return check.rows("attention", plan)


def logits(check: Check) -> dict[str, Any]:
    """Logits, loss, every gradient and the decoder's steps against a CPU in float32; the padded ids stay out."""
    torch.manual_seed(0)
    # No TF32 here: what is compared is the program.
    torch.set_float32_matmul_precision("highest")
    here, there = (LanguageModel(check.small(), check.vocabulary).eval() for _ in range(2))
    there.load_state_dict(here.state_dict())
    there.to(check.device)
    ids = torch.randint(check.vocabulary, (4, here.config.block_size + 1))
    x, y = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        expected = here.logits(x)
    loss = here(x, y)
    loss.backward()
    found: dict[str, Any] = {}
    for name, dtype in TYPES.items():
        with torch.no_grad(), check.autocast(dtype):
            found[f"logits, {name}"] = correct(distance(there.logits(x.to(check.device)), expected), LOGITS[name])
        decoder, half = Decoder(there, 4, dtype), x.size(1) // 2
        out = [decoder.prefill(x[:, :half].to(check.device)).clone()]
        out += [decoder.step(x[:, at].to(check.device)).clone() for at in range(half, x.size(1))]
        gap = max(distance(step, expected[:, half - 1 + index]) for index, step in enumerate(out))
        found[f"decoder, {name}"] = correct(gap, DECODER[name])
        there.zero_grad()
        with check.autocast(dtype):
            ours = there(x.to(check.device), y.to(check.device))
        ours.backward()
        found[f"loss, {name}"] = correct(abs(ours.item() / loss.item() - 1), LOGITS[name])
        # A sum over many tokens rounds more than a logit. A key's bias has no gradient but rounding.
        pairs = [(a.grad, b.grad) for a, b in zip(here.parameters(), there.parameters(), strict=True)]
        gap = max(distance(b, a) for a, b in pairs if a.norm() > 1e-5)
        found[f"gradients, {name}"] = correct(gap, 10 * LOGITS[name])
        padding = there.transformer.token_embedding.weight.grad[check.vocabulary :]
        found[f"padding's gradient, {name}"] = correct(float(padding.abs().max()), 0.0)
    return found


def config_of(check: Check, name: str, device: str, steps: int, sections: dict[str, dict[str, Any]]) -> Config:
    shape, micro = check.small(), 4
    base: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(check.data / "runs"), "device": device, "compile": "off", "dtype": "float32"},
        "data": {"dataset": "stdlib", "data_dir": str(check.data)},
        "model": {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "block_size")},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4}, "schedule": {"warmup_steps": 5},
        "train": {"max_steps": steps, "tokens_per_step": 2 * micro * shape.block_size, "micro_batch_size": micro},
        "eval": {"every_steps": 0, "tokens": 2 * micro * shape.block_size}, "checkpoint": {"every_steps": 1000},
        "log": {"every_steps": 1, "tensorboard": False},
    }  # fmt: skip
    try:
        return from_dict({name: section | sections.get(name, {}) for name, section in base.items()})
    except Exception as error:
        raise NotMeasured(str(error)) from error


def curve(
    check: Check, device: str, steps: int, sections: dict[str, dict[str, Any]]
) -> tuple[list[float], str, float | None]:
    """Losses of a run, a hash of its weights, its validation loss where it has one."""
    config = config_of(check, "curve", device, steps, sections)
    world = World(rank=0, size=1, local_size=1, device=check.device if device == "cuda" else torch.device(device))
    trainer, _ = assemble(config, world, Mixture(config), autocast_type(config, world))
    torch.set_float32_matmul_precision("highest")  # `assemble` turns TF32 on
    initialise(trainer)
    trainer.replicate()
    losses: list[float] = []
    val = None
    for step in range(steps):
        # float16 begins with too large a scale: until it fits, a step is not taken, and there is nothing to compare.
        while (result := trainer.train_step()).outcome is Outcome.RESCALED:
            pass
        losses.append(result.loss)
        trainer.step += 1
        if config.eval.every_steps and step == steps // 2:
            val = round(trainer.evaluation.run(trainer.model).mean, 4)
    weights = (parameter.detach().cpu().numpy().tobytes() for parameter in trainer.model.parameters())
    trainer.batches.close()
    return losses, hashlib.sha256(b"".join(weights)).hexdigest()[:12], val


def curves(check: Check) -> dict[str, Any]:
    """Losses of some steps on the device against the same steps on the CPU in float32."""
    steps, there = (4, "cpu") if check.tiny else (10, check.device.type)
    references: dict[str, list[float]] = {}

    def against(kind: str, **sections: dict[str, Any]) -> Callable[[], Any]:
        """`kind`: of the arithmetic, float32 or bfloat16; the reference has what changes the task."""

        def run() -> Any:
            task = {name: sections[name] for name in ("data", "optimizer") if name in sections}
            task["model"] = {key: value for key, value in sections.get("model", {}).items() if key == "arch"}
            key = json.dumps(task, sort_keys=True)
            losses, _, val = curve(check, there, steps, sections)
            if key not in references:
                references[key] = curve(check, "cpu", steps, task)[0]
            return correct(largest_gap(losses, references[key]), CURVES[kind]) | {"val loss": val}

        return run

    low = {"dtype": "bfloat16"}
    compiled = {} if check.tiny else {"compile": "on"}  # on a CPU that takes longer than all the rest
    documents = {"document_mask": True}
    plan = {
        "float32": against("float32"),
        "bfloat16": against("bfloat16", run=low),
        "bfloat16, compiled": against("bfloat16", run=low | compiled, eval={"every_steps": 5}),
        "recompute": against("bfloat16", run=low, model={"activation_checkpointing": "block"}),
        "documents": against("bfloat16", run=low | compiled, data=documents),
        "documents, float32": against("float32", data=documents),
        "bfloat16 residual stream": against("bfloat16", run=low | compiled, model={"residual_dtype": "autocast"}),
        "qwen3": against("bfloat16", run=low | compiled, model={"arch": "qwen3"}),
        "muon": against("bfloat16", run=low | compiled, optimizer={"name": "muon", "lr": 1e-3, "min_lr": 1e-4}),
        "float16": against("bfloat16", run={"dtype": "float16"}),
    }  # fmt: skip
    if not check.cuda:
        del plan["float16"]
    return check.rows("curves", plan)


def one_rank_groups(check: Check) -> dict[str, Any]:
    """DDP and FSDP2 over a group of one rank, which take the paths of many: losses as without. The command line has no such
    run, since it makes no group for one rank.
    """
    store = dist.HashStore()
    dist.init_process_group("nccl" if check.cuda else "gloo", store=store, rank=0, world_size=1)
    ids = torch.randint(check.vocabulary, (4, check.small().block_size + 1), device=check.device)
    steps = 3

    def losses(kind: str, compiled: bool) -> list[float]:
        """Of the steps, each in two micro-batches, and of an evaluation after them, which compiles anew."""
        torch.manual_seed(0)
        complete = LanguageModel(check.small(), check.vocabulary)
        model = LanguageModel.without_memory(check.small(), check.vocabulary)
        mesh = init_device_mesh(check.device.type, (1,), mesh_dim_names=("shard",)) if kind == "fsdp" else None
        world = World(rank=0, size=1, local_size=1, device=check.device)
        parallel.allocate(model, world, mesh, dtype=torch.bfloat16, compiled=compiled)
        parallel.distribute(complete, model)
        wrapped: nn.Module = model
        if kind == "ddp":
            # `replicate` wraps none for a single rank.
            wrapped = parallel.replicate(model, replace(world, size=2))
            assert isinstance(wrapped, DistributedDataParallel)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        values = []
        for _ in range(steps):
            for last in (False, True):
                with parallel.reduce_gradients(wrapped, last), check.autocast():
                    loss = wrapped(ids[:, :-1], ids[:, 1:])
                    (loss / 2).backward()
            values.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), check.autocast():
            values.append(model(ids[:, :-1], ids[:, 1:]).item())
        parallel.reshard(model)
        return values

    try:
        expected = losses("plain", False)
        plan = {
            f"{kind}{', compiled' * compiled}": lambda kind=kind, compiled=compiled: correct(
                largest_gap(losses(kind, compiled), expected), GROUPS
            )
            for compiled in ((False,) if check.tiny else (False, True))
            for kind in ("plain", "ddp", "fsdp")
        }
        return check.rows("one_rank_groups", plan)
    finally:
        dist.destroy_process_group()


def repeats(check: Check) -> dict[str, Any]:
    """Whether a run gives the same bits twice, with and without torch's deterministic algorithms. A GPU's may not."""
    steps = 3 if check.tiny else 10
    compiled = {"run": {"dtype": "bfloat16", "compile": "on"}}
    kinds: dict[str, dict[str, Any]] = {"eager": {}}
    if not check.tiny:
        kinds |= {"compiled": compiled, "compiled, dropout": compiled | {"model": {"dropout": 0.1}}}

    def twice(sections: dict[str, Any], strict: bool) -> dict[str, Any]:
        torch.use_deterministic_algorithms(strict, warn_only=True)
        try:
            first, second = (curve(check, check.device.type, steps, sections) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        return {"equal": first[1] == second[1], "gap": correct(largest_gap(first[0], second[0]), RESUMED)}

    plan = {
        f"{name}{', deterministic' * strict}": lambda sections=sections, strict=strict: twice(sections, strict)
        for strict in (False, True)
        for name, sections in kinds.items()
    }
    return check.rows("repeats", plan)


# ---- the program, as users run it ----


def program(check: Check, *arguments: str, started: Callable[[subprocess.Popen[str]], None] | None = None) -> str:
    """What a command printed. Raises RuntimeError where it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments], cwd=check.data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    try:
        if started:
            started(process)
        text, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(f"pipeline {arguments[0]} exited with {process.returncode}: {text[-500:]}")
    return text


def prepared(check: Check) -> dict[str, Any]:
    """A dataset made here, which the steps after it train on."""
    source, tokenizer = "stdlib", "gpt2"
    if check.tiny:
        source, tokenizer = "tiny.jsonl", "byte"  # documents shorter than a window
        texts = ({"text": f"def f{n}(x):\n    return x + {n}\n\n"} for n in range(3000))
        (check.data / source).write_text("\n".join(map(json.dumps, texts)))
    text = program(
        check, "prepare", source, "--name", "stdlib", "--data-dir", ".", "--tokenizer", tokenizer, "--val-fraction", "0.05",
    )  # fmt: skip
    return {"printed": text[-300:]}


def stop_and_resume(check: Check) -> dict[str, Any]:
    """A run with dropout, through; the same one stopped by a signal and started again; a sample; an evaluation."""
    shape, steps = check.small(), 6 if check.tiny else 60
    keys = {
        "data.dataset": "stdlib", "data.data_dir": ".", "run.device": check.device.type, "run.compile": "off",
        "model.n_layer": shape.n_layer, "model.n_head": shape.n_head, "model.n_embd": shape.n_embd, "model.dropout": 0.1,
        "model.block_size": shape.block_size, "train.max_steps": steps, "train.tokens_per_step": 8 * shape.block_size,
        "train.micro_batch_size": 4, "eval.every_steps": 1000, "eval.tokens": 8 * shape.block_size,
        "checkpoint.every_steps": 1000, "log.every_steps": 1,
    }  # fmt: skip
    train = ["train", "quickstart", *(f"{key}={value}" for key, value in keys.items())]

    def stop(process: subprocess.Popen[str]) -> None:
        rows = check.data / "runs" / "stopped" / "metrics.jsonl"
        while process.poll() is None:  # the step's alarm bounds it
            if rows.is_file() and rows.read_text().count("\n") >= 2:
                process.send_signal(signal.SIGTERM)
                return
            time.sleep(0.02)

    program(check, *train, "run.name=through")
    program(check, *train, "run.name=stopped", started=stop)
    stopped_at = json.loads((check.data / "runs/stopped/status.json").read_text())
    program(check, *train, "run.name=stopped")
    folders = [check.data / "runs" / name for name in ("through", "stopped")]
    losses = [[json.loads(row)["loss"] for row in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    weights = {(f / f"checkpoints/step_{steps:08d}/model.safetensors").read_bytes() for f in folders}
    checkpoint = ["--ckpt", "runs/stopped", "--device", check.device.type, "--json"]
    return {
        "stopped at": [stopped_at["state"], stopped_at["step"]],
        "losses": correct(largest_gap(losses[1], losses[0]), RESUMED), "weights equal": len(weights) == 1,
        "sample": program(check, "sample", *checkpoint, "--max-new-tokens", "20", "--seed", "1")[-300:],
        "eval": program(check, "eval", *checkpoint, "--data-dir", ".")[-300:],
    }  # fmt: skip
