"""The arithmetic of a run before it starts: tokens, accumulation, epochs, parameters, FLOPs, bytes.
No torch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from pipeline.checkpoint.layouts import layout_of
from pipeline.config.keys import Config, ModelConfig
from pipeline.dataset.shards import Manifest
from pipeline.dataset.windows import window_count
from pipeline.errors import UserError
from pipeline.machine.gpus import CPU_BFLOAT16_MIN_WIDTH, Hardware, hardware_named
from pipeline.model.constants import VOCAB_MULTIPLE
from pipeline.model.footprint import BYTES, F32, Footprint, Setting, Sizes

# Float32 weights, and AdamW's two moments of each; Muon has one.
CHECKPOINT_BYTES_PER_PARAMETER, MUON_BYTES_LESS = 12, 4
# Assumed parts of the peaks. So GPT-2 124M takes 144 ms a step of 524,288 tokens on 8 H100 (llm.c: 140 ms,
# modded-nanogpt records/2024-10-13) and 384 ms on 8 A100 80GB (build-nanogpt: about 350 ms).
MATRICES_REACH, ATTENTION_REACHES, BANDWIDTH_REACHED, LINK_REACHED = 0.6, 0.3, 0.85, 0.8
LAUNCH_S = 5e-6  # of one kernel, or of one of PyTorch's operations on a CPU
UPDATE_BYTES = 40  # a parameter: AdamW reads 16 and writes 12, clipping reads 8 and writes 4
USABLE = 0.9
BUCKET_BYTES = (1 << 20, 25 << 20)  # DDP's first bucket, so that something is sent early, and the others
AGREED_VALUES = 6  # float32: loss, gradient norm, and four flags of what a rank has noticed


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches each rank accumulates for one optimizer step. Raises UserError with the nearest
    values that divide.
    """
    train, block_size = config.train, config.model.block_size
    wanted = train.tokens_per_step
    tokens_at_a_time = train.micro_batch_size * block_size * world_size
    if wanted % tokens_at_a_time == 0:
        return wanted // tokens_at_a_time
    # 0 tokens would divide too.
    below = wanted // tokens_at_a_time * tokens_at_a_time
    nearest = [str(value) for value in (below, below + tokens_at_a_time) if value]
    # A smaller or larger micro-batch may divide where the ranks do.
    per_rank, remainder = divmod(wanted, block_size * world_size)
    micro = [size for size in range(1, per_rank + 1) if per_rank % size == 0] if remainder == 0 else []
    fitting = sorted(micro, key=lambda size: abs(size - train.micro_batch_size))[:2]
    hint = f", or train.micro_batch_size={' or '.join(map(str, sorted(fitting)))}" if fitting else ""
    raise UserError(
        f"train.tokens_per_step={wanted} does not divide: one micro-batch of every rank is micro_batch_size "
        f"{train.micro_batch_size} x block_size {block_size} x {world_size} rank(s) = {tokens_at_a_time} tokens; "
        f"set train.tokens_per_step={' or '.join(nearest)}{hint}"
    )


def step_arithmetic(config: Config, world_size: int) -> str:
    """How a step adds up, with every factor, so that a wrong one is noticed before it costs
    anything.
    """
    train = config.train
    return (
        f"tokens_per_step {train.tokens_per_step:,} = micro_batch_size {train.micro_batch_size} x block_size "
        f"{config.model.block_size} x accumulation {accumulation_steps(config, world_size)} x {world_size} rank(s)"
    )


def data_arithmetic(config: Config, folder: Path, manifest: Manifest, share: float) -> str:
    """What a run takes of one dataset, whose part of the samples is `share` (1 unless in a
    mixture).
    """
    train, block_size = config.train, config.model.block_size
    windows = round(share * (train.max_steps * train.tokens_per_step // block_size))
    tokens = manifest.count("train", "tokens")
    epochs = windows / window_count(tokens, block_size)
    part = f" ({share:.2%} of the samples)" if share < 1 else ""
    return (
        f"data {folder}{part}: {tokens:,} train tokens; {train.max_steps:,} steps take {windows * block_size:,} tokens, "
        f"{epochs:.2f} epoch(s)"
    )


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, tied ones once, without padding: what the literature calls a model's
    size.
    """
    layout = layout_of(model)
    shapes = layout.shapes(model, vocab_size).items()
    return sum(math.prod(shape) for name, shape in shapes if layout.is_trained(model, name))


def flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Forward and backward: 6 for each weight that is multiplied, 12 L H D T for attention (Chowdhery
    et al. 2022).
    """
    # Rows of a table are looked up; a tied token embedding is multiplied too, as the head.
    rows = len(layout_of(model).position_rows) * model.block_size + (0 if model.tie_weights else vocab_size)
    multiplied = parameters(model, vocab_size) - rows * model.n_embd
    return 6 * multiplied + _attention_flops(model)


def _attention_flops(model: ModelConfig) -> int:
    return 12 * model.n_layer * model.n_head * model.head_width * model.block_size


def most_checkpoints(config: Config) -> int:
    """How many a run's folder may hold: the newest, the permanent, the best and the one being
    written.
    """
    every = config.checkpoint.keep_every_steps
    return config.checkpoint.keep + (config.train.max_steps // every if every else 0) + 2


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Size of one checkpoint on disk, but for tokenizer and descriptions."""
    matrices = sum(map(math.prod, muon_matrices(config)))
    return CHECKPOINT_BYTES_PER_PARAMETER * parameters(config.model, vocab_size) - MUON_BYTES_LESS * matrices


def muon_matrices(config: Config) -> list[tuple[int, int]]:
    """Rows and columns of what Muon updates: the matrices of the blocks, a fused one as one; none with AdamW."""
    layout, model = layout_of(config.model), config.model
    shapes, outside = (layout.shapes(each, VOCAB_MULTIPLE) for each in (model, replace(model, n_layer=0)))
    if config.optimizer.name != "muon":
        return []
    matrices = {name: shape for name, shape in shapes.items() if name not in outside and len(shape) == 2}
    return [(c, r) if name.endswith(layout.transposed) else (r, c) for name, (r, c) in matrices.items()]


def newton_schulz_flops(config: Config) -> int:
    """Of one step, all ranks together: 5 iterations of 3 products on each matrix, r the shorter side."""
    return sum(5 * (4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3) for shape in muon_matrices(config))


# ---- the memory and the time of a step ----


def setting(config: Config, hardware: Hardware) -> Setting:
    """How the ranks of a run would share the model, in which type, compiled or not."""
    device, ranks = hardware.device, hardware.ranks
    shards = {"ddp": 1, "fsdp": ranks, "hsdp": hardware.per_node}[config.parallel.strategy]
    narrow = device.is_cpu and config.model.n_embd < CPU_BFLOAT16_MIN_WIDTH
    dtype = ("float32" if narrow else device.dtype) if config.run.dtype == "auto" else config.run.dtype
    compiled = {"auto": not device.is_cpu, "on": True, "off": False}[config.run.compile]
    accumulation = accumulation_steps(config, ranks)
    return Setting(ranks, shards, accumulation, dtype=dtype, on_cpu=device.is_cpu, compiled=compiled)


def footprint(config: Config, vocab_size: int, setting: Setting) -> Footprint:
    """The memory of a step on one rank."""
    model = config.model
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    shard = sum(_shards(model, padded, setting.shards))
    complete = parameters(model, padded)
    block = complete - parameters(replace(model, n_layer=model.n_layer - 1), padded)
    stacks = [count * rows * columns for (rows, columns), count in Counter(muon_matrices(config)).items()]
    matrices, stack = (found // setting.shards for found in (sum(stacks), max(stacks, default=0)))
    sizes = Sizes(complete, shard, block, table=padded * model.n_embd, matrices=matrices, stack=stack)
    return Footprint(config, sizes, setting)


def _shards(model: ModelConfig, padded: int, shards: int) -> list[int]:
    """Elements of each trained tensor on one rank, in the layout's order."""
    layout = layout_of(model)
    trained = {name: shape for name, shape in layout.shapes(model, padded).items() if layout.is_trained(model, name)}
    # FSDP2 pads what it shards to equal parts, along the first dimension in torch's order.
    rows = {name: shape[-1 if name.endswith(layout.transposed) else 0] for name, shape in trained.items()}
    return [-(-rows[name] // shards) * math.prod(shape) // rows[name] for name, shape in trained.items()]


def nearest_batch(config: Config, ranks: int) -> Config:
    """The config itself, or with the nearest tokens_per_step that divides over the ranks; smaller
    micro-batches where it is less than one of each rank.
    """
    train, sequences = config.train, config.model.block_size * ranks
    size = min(train.micro_batch_size, max(1, round(train.tokens_per_step / sequences)))
    at_a_time = size * sequences
    tokens = max(1, round(train.tokens_per_step / at_a_time)) * at_a_time
    return replace(config, train=replace(train, tokens_per_step=tokens, micro_batch_size=size))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. `compute_s`: FLOPs of all micro-batches; `traffic_s`: reading
    and writing memory, in and between their kernels; `launch_s`: starting those; `update_s`: clipping and
    the optimizer; `exchange_s`: between ranks, of which `exposed_s` is not hidden behind the others.
    """

    compute_s: float
    traffic_s: float
    launch_s: float
    update_s: float
    exchange_s: float
    exposed_s: float

    @property
    def forward_backward_s(self) -> float:
        # Kernels are launched while others run.
        return max(self.compute_s + self.traffic_s, self.launch_s)

    @property
    def total_s(self) -> float:
        return self.forward_backward_s + self.update_s + self.exposed_s


def step_time(step: Footprint, hardware: Hardware, vocab_size: int) -> StepTime:
    """A step on this hardware, by formula, at the assumed parts of its peaks."""
    model, device, setting = step.config.model, hardware.device, step.setting
    flops, bandwidth = device.flops, device.bandwidth * BANDWIDTH_REACHED
    if setting.dtype == "float32" and not device.is_cpu:
        flops /= 2  # TF32, which has half of bfloat16's peak on all of NVIDIA's data sheets
    tokens, again = step.tokens * setting.accumulation, 4 / 3 if step.recomputes else 1.0
    attention = _attention_flops(model)
    matrices = flops_per_token(model, vocab_size) - attention
    # Of attention a causal kernel skips half, and its backward pass computes a sixth again.
    per_token_s = matrices / (flops * MATRICES_REACH) + 7 / 12 * attention / (flops * ATTENTION_REACHES)
    # 146 C bytes a block if compiled (40 forward, 106 backward), by the tensors that Inductor's kernels read and
    # write; about three times as many in single operations. Of the logits 8 or 40 each.
    block, logit = (146, 8) if setting.compiled else (440, 40)
    moved = block * model.n_layer * model.n_embd + logit * step.sizes.table / model.n_embd
    # Casts of weights, and adding gradients, in each micro-batch.
    weights = setting.accumulation * step.sizes.all * (18 if setting.dtype != "float32" else 12)
    launches = setting.accumulation * model.n_layer * (30 if setting.compiled else 100)
    exchange_s = _exchange_s(gradient_exchanges(step), hardware)
    compute_s = tokens * per_token_s * again
    orthogonalise_s = newton_schulz_flops(step.config) / setting.ranks / (flops * MATRICES_REACH)
    # A sharded model is gathered and reduced while others compute. Gradients of replicas are sent during the last
    # micro-batch's backward pass, two thirds of its work; those outside of the blocks are complete at its end alone.
    last_s, hides_s = 0.0, compute_s
    if setting.shards == 1:
        last_s = exchange_s * (1 - model.n_layer * step.sizes.block / step.sizes.all)
        hides_s = 2 / 3 * compute_s / setting.accumulation
    update_exchange_s = _exchange_s(update_exchanges(step), hardware)
    exposed_s = last_s + max(0.0, exchange_s - last_s - hides_s) + update_exchange_s
    return StepTime(
        compute_s, traffic_s=(tokens * moved * again + weights) / bandwidth, launch_s=launches * LAUNCH_S,
        update_s=UPDATE_BYTES * step.sizes.shard / bandwidth + orthogonalise_s,
        exchange_s=exchange_s + update_exchange_s, exposed_s=exposed_s,
    )  # fmt: skip


class Span(Enum):
    """The ranks of a collective: all, those of a node, or those with the same shard, one of each node."""

    ALL, NODE, REPLICAS = "all", "node", "replicas"


@dataclass(frozen=True)
class Exchange:
    """`count` collectives of one step that each rank takes part in, with `size` bytes in all: of the
    complete tensor for all_gather and reduce_scatter, of a rank's for all_reduce and all_to_all.
    """

    collective: str
    span: Span
    count: int
    size: int


def exchanges(step: Footprint) -> list[Exchange]:
    """All collectives of a step; tests/train/test_exchange.py counts them on real ranks."""
    return [*gradient_exchanges(step), *update_exchanges(step)]


def update_exchanges(step: Footprint) -> Iterator[Exchange]:
    """Those of Muon, whose ranks compute some matrices each of every stack of one shape: replicas gather
    all of them, shards of rows become matrices and these shards again.
    """
    setting = step.setting
    computed = F32 if setting.on_cpu else BYTES["bfloat16"]
    for (rows, columns), count in Counter(muon_matrices(step.config)).items():
        if setting.shards > 1:
            size = setting.shards * -(-count // setting.shards) * -(-rows // setting.shards) * columns
            span = Span.ALL if setting.shards == setting.ranks else Span.NODE
            yield Exchange("all_to_all", span, 2, size=(F32 + computed) * size)
        elif setting.ranks > 1:
            size = setting.ranks * -(-count // setting.ranks) * rows * columns
            yield Exchange("all_gather", Span.ALL, 1, size=computed * size)


def gradient_exchanges(step: Footprint) -> list[Exchange]:
    """Those of weights, gradients, and what the ranks agree on."""
    model, setting, layers = step.config.model, step.setting, step.config.model.n_layer
    if setting.ranks == 1:
        return []
    rows = step.sizes.table // model.n_embd
    tensors, fewer = (_shards(each, rows, setting.shards) for each in (model, replace(model, n_layer=layers - 1)))
    agreed = Exchange("all_reduce", Span.ALL, 1, size=F32 * AGREED_VALUES)
    if setting.shards == 1:
        return [Exchange("all_reduce", Span.ALL, _buckets(tensors), size=F32 * sum(tensors)), agreed]
    blocks = setting.shards * layers * (sum(tensors) - sum(fewer))
    outside = setting.shards * sum(tensors) - blocks
    span = Span.ALL if setting.shards == setting.ranks else Span.NODE
    # A block is gathered forward and backward, what is around the blocks once, in float32.
    gathered = setting.accumulation * (2 * step.itemsize * blocks + F32 * outside)
    found = [
        Exchange("all_gather", span, setting.accumulation * (2 * layers + 1), size=gathered),
        Exchange("reduce_scatter", span, layers + 1, size=F32 * (blocks + outside)),
        Exchange("all_reduce", span, 1, size=F32 * len(tensors)),  # the norm of each gradient
        agreed,
    ]
    if span is Span.NODE:
        found.append(Exchange("all_reduce", Span.REPLICAS, layers + 1, size=F32 * sum(tensors)))
    return found


def _buckets(tensors: list[int]) -> int:
    """DDP's all-reduces: gradients, from the last layer's to the first's, in buckets that are sent when full."""
    count, held = 0, 0
    for size in reversed(tensors):
        held += F32 * size
        if held >= BUCKET_BYTES[min(count, 1)]:
            count, held = count + 1, 0
    return count + (held > 0)


def _exchange_s(found: Iterable[Exchange], hardware: Hardware) -> float:
    """A rank's bytes over its links: inside nodes, then between them; an all-reduce sends twice (Thakur et
    al. 2005). Without latency, which ranks by the hundred add.
    """
    per_node, nodes = hardware.per_node, hardware.nodes
    inside, between = (per_node - 1) / per_node / hardware.device.link, (nodes - 1) / nodes / hardware.device.net
    a_byte_s = {Span.ALL: inside + between / per_node, Span.NODE: inside, Span.REPLICAS: between}
    sent = (a_byte_s[each.span] * each.size * (1 + (each.collective == "all_reduce")) for each in found)
    return sum(sent) / LINK_REACHED


def outlook(config: Config, vocab_size: int, device_name: str, ranks: int) -> list[str]:
    """The short form of `pipeline plan`, for the log: memory and time, where the device is known."""
    hardware = hardware_named(device_name, ranks)
    if hardware is None:
        return [f"memory and time: unknown for {device_name or 'no GPU'}; see pipeline plan --on KINDx{ranks}"]
    step = footprint(config, vocab_size, setting(config, hardware))
    found = step.memory()
    kinds = ", ".join(f"{kind} {size / 1e9:,.2f}" for kind, size in asdict(found).items() if size)
    lines = [
        f"memory a rank: about {found.total / 1e9:,.2f} GB of {hardware.device.memory_bytes / 1e9:,.0f} GB ({kinds}), by formula"
    ]
    if found.total > usable_bytes(hardware):
        kind = hardware.device.kind
        lines.append(f"warning: that does not fit {kind}: see pipeline plan --on {hardware} for what does")
    step_s = step_time(step, hardware, vocab_size).total_s
    hours = step_s * config.train.max_steps / 3600
    return [*lines, f"time: about {step_s:,.3g} s a step, {hours:,.1f} hours in all on {hardware}, assumed"]


def usable_bytes(hardware: Hardware) -> float:
    """Memory of a rank that tensors can fill: the rest is the context, NCCL, gaps between blocks."""
    return hardware.device.memory_bytes * USABLE
