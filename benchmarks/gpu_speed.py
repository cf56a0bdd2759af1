"""The steps of gpu_check.py that tell how fast training and decoding are, next to nanoGPT's model and transformers."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_harness import Check, NotMeasured, target
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from pipeline.budget import flops_per_token
from pipeline.config.keys import Config
from pipeline.model.attention import document_offsets, takes_offsets
from pipeline.model.decoder import Decoder
from pipeline.model.language_model import LanguageModel, document_numbers
from sample.choice import Choice
from sample.generate import generate
from train.optimizer.adamw import AdamW
from train.optimizer.groups import build_optimizer
from train.optimizer.muon import Muon

FASTER_THAN_NANOGPT, MFU_124M, GREEDY_TOKENS_PER_S = 1.2, 0.45, 2000
DOCUMENT_TOKENS = 300  # about OpenWebText's median
PROMPT = list(range(100, 116))


def our_model(check: Check, config: Config) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config.model, check.vocabulary).to(check.device)
    if not check.tiny:
        model.compile_blocks()
    return model


def nanogpt_model(check: Check, config: Config) -> nn.Module:
    """nanoGPT's, compiled as its train.py does."""
    if not check.nanogpt.is_file():
        raise NotMeasured(f"no {check.nanogpt}: pass --nanogpt")
    spec = importlib.util.spec_from_file_location("nanogpt", check.nanogpt)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {key: getattr(config.model, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    padded = -(-check.vocabulary // 64) * 64
    model: nn.Module = module.GPT(module.GPTConfig(vocab_size=padded, bias=True, **shape)).to(check.device)
    return model if check.tiny else torch.compile(model)


def one_step(
    check: Check, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], accumulate: int
) -> Callable[[], None]:
    """As both programs train: autocast, accumulation, clipping, a fused update."""
    never = torch.zeros((), dtype=torch.bool, device=check.device)
    ours = isinstance(optimizer, AdamW | Muon)

    def step() -> None:
        for _ in range(accumulate):
            with check.autocast():
                value = loss()
            (value / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step_unless(never) if ours else optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed(check: Check, config: Config, step: Callable[[], None], accumulate: int) -> dict[str, Any]:
    """Tokens/s and MFU by nanoGPT's count of FLOPs, seconds of the first step, which compiles, and peak memory."""
    first_s = check.seconds(step)
    took = check.median_s(step, warm=2, runs=6)
    tokens_per_s = config.train.micro_batch_size * config.model.block_size * accumulate / took
    achieved = tokens_per_s * flops_per_token(config.model, check.vocabulary)
    return {
        "tokens_per_s": round(tokens_per_s), "mfu": round(achieved / check.peak, 4) if check.peak else None,
        "ms": round(took * 1e3, 1), "first_step_s": round(first_s, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if check.cuda else None,
    }  # fmt: skip


def training_speed(check: Check) -> dict[str, Any]:
    """Our model and nanoGPT's under the same step; then what each option costs or gains. In pairs, and first what has a mark."""
    torch.set_float32_matmul_precision("high")
    few, many = (2, 4) if check.tiny else (16, 64)

    def windows(micro: int, block_size: int) -> Tensor:
        return torch.randint(check.vocabulary, (micro, block_size + 1), device=check.device)

    def ours(micro: int, accumulate: int, *overrides: str) -> dict[str, Any]:
        config = check.gpt2(
            f"train.micro_batch_size={micro}", f"train.tokens_per_step={micro * accumulate * 1024}", *overrides
        )
        model, ids = our_model(check, config), windows(micro, config.model.block_size)
        documents = None
        if config.data.document_mask:
            end_of_text = check.vocabulary - 1
            ids[:, ::DOCUMENT_TOKENS] = end_of_text
            with check.autocast():
                by_offset = takes_offsets(check.device, config.model)
            documents = (document_offsets if by_offset else document_numbers)(ids[:, :-1].cpu(), end_of_text).to(
                check.device
            )
        optimizer = build_optimizer(model, config.optimizer)
        step = one_step(check, model, optimizer, lambda: model(ids[:, :-1], ids[:, 1:], documents), accumulate)
        return speed(check, config, step, accumulate)

    def nanogpt(micro: int, accumulate: int) -> dict[str, Any]:
        config = check.gpt2(f"train.micro_batch_size={micro}", f"train.tokens_per_step={micro * accumulate * 1024}")
        model, ids = nanogpt_model(check, config), windows(micro, config.model.block_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        return speed(check, config, one_step(check, model, optimizer, lambda: model(x, y)[1], accumulate), accumulate)

    def without_cudnn() -> dict[str, Any]:
        with kernel_off("cudnn"):
            return ours(many, 1)

    plan: dict[str, Callable[[], Any]] = {
        f"ours, {many}": lambda: ours(many, 1), f"nanoGPT, {many}": lambda: nanogpt(many, 1),
        f"bfloat16 residual stream, {many}": lambda: ours(many, 1, "model.residual_dtype=autocast"),
        f"qwen3, {many}": lambda: ours(many, 1, "model.arch=qwen3"),
        f"muon, {many}": lambda: ours(many, 1, "optimizer.name=muon"),
        f"documents, {few}": lambda: ours(few, 1, "data.document_mask=true"), f"without documents, {few}": lambda: ours(few, 1),
        f"ours, {few} x 4": lambda: ours(few, 4), f"nanoGPT, {few} x 4": lambda: nanogpt(few, 4),
        f"without cuDNN, {many}": without_cudnn,
        f"dropout, {few}": lambda: ours(few, 1, "model.dropout=0.1"),
        f"recompute, {many}": lambda: ours(many, 1, "model.activation_checkpointing=block"),
    }  # fmt: skip
    found = check.rows("training_speed", plan)
    for size in (f"{many}", f"{few} x 4"):
        own, peer = (found[f"{name}, {size}"].get("tokens_per_s") for name in ("ours", "nanoGPT"))
        if own and peer:
            found[f"ours / nanoGPT, {size}"] = target(round(own / peer, 3), FASTER_THAN_NANOGPT)
    rates = [row["mfu"] for name, row in found.items() if name.startswith(("ours, ", "bfloat16")) and row.get("mfu")]
    found["best mfu"] = target(max(rates, default=None), MFU_124M)
    return found


@contextmanager
def kernel_off(name: str) -> Iterator[None]:
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch(False)
    try:
        yield
    finally:
        switch(True)


def decoding_speed(check: Check) -> dict[str, Any]:
    """Tokens/s of texts one after the other: what is compiled, captured or planned for the first is there for the third."""
    config, new = check.gpt2(), 16 if check.tiny else 256
    torch.manual_seed(0)
    model = LanguageModel(config.model, check.vocabulary).to(check.device).eval()

    def ours(samples: int, choice: Choice, texts: int = 3) -> dict[str, Any]:
        decoder, rates = Decoder(model, samples, torch.bfloat16), []
        for _ in range(texts):
            took = check.seconds(lambda: list(generate(decoder, PROMPT, max_new_tokens=new, choice=choice, seed=0)))
            rates.append(round(samples * new / took))
        return {"texts": rates, "tokens_per_s": rates[-1]}

    def theirs(samples: int) -> dict[str, Any]:
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise NotMeasured(str(error)) from error
        shape = config.model
        sizes = {"n_embd": shape.n_embd, "n_layer": shape.n_layer, "n_head": shape.n_head}
        peer = GPT2LMHeadModel(GPT2Config(vocab_size=check.vocabulary, n_positions=shape.block_size, **sizes))
        peer = peer.to(check.device, torch.bfloat16).eval()
        prompts = torch.tensor([PROMPT] * samples, device=check.device)
        length, mask = {"min_new_tokens": new, "max_new_tokens": new}, torch.ones_like(prompts)
        times = [
            check.seconds(
                lambda: peer.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
            )
            for _ in range(2)
        ]
        return {"tokens_per_s": round(samples * new / times[-1])}

    greedy = Choice(temperature=0)
    several = 2 if check.tiny else 8
    plan: dict[str, Callable[[], Any]] = {
        "greedy, 1": lambda: ours(1, greedy), "top-k 50, 1": lambda: ours(1, Choice()),
        f"greedy, {several}": lambda: ours(several, greedy),
        "transformers, 1": lambda: theirs(1), f"transformers, {several}": lambda: theirs(several),
    }  # fmt: skip
    found = check.rows("decoding_speed", plan)
    found["greedy, one sample"] = target(found["greedy, 1"].get("tokens_per_s"), GREEDY_TOKENS_PER_S)
    return found


def profile(check: Check) -> dict[str, Any]:
    """Where a compiled step's time goes, by kernel: ms a step, calls, share; for Perfetto in trace.json.gz."""
    config = check.gpt2(f"train.micro_batch_size={2 if check.tiny else 32}")
    model = our_model(check, config)
    ids = torch.randint(
        check.vocabulary, (config.train.micro_batch_size, config.model.block_size + 1), device=check.device
    )
    optimizer = build_optimizer(model, config.optimizer)
    step = one_step(check, model, optimizer, lambda: model(ids[:, :-1], ids[:, 1:]), 1)
    for _ in range(3):
        step()
    check.synchronize()
    steps = 2
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.cuda else [])]) as trace:
        for _ in range(steps):
            step()
        check.synchronize()
    trace.export_chrome_trace(str(check.out / "trace.json.gz"))
    key = "self_device_time_total" if check.cuda else "self_cpu_time_total"
    # Of a GPU the kernels alone: the operations that launched them have the same time once more.
    kind = DeviceType.CUDA if check.cuda else DeviceType.CPU
    found = (row for row in trace.key_averages() if row.device_type == kind and not row.is_user_annotation)
    rows = sorted(found, key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows) or 1
    return {
        row.key[:110]: [
            round(getattr(row, key) / steps / 1e3, 3),
            row.count // steps,
            f"{getattr(row, key) / total:.1%}",
        ]
        for row in rows[:40]
    }
