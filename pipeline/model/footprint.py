"""Bytes that a training step allocates on one rank, by formula. No torch.

Counted from what the model, the loss, AdamW, DDP and FSDP2 allocate, and held to measurement by
tests/pipeline/test_footprint.py. A new architecture adds what its block keeps to `KEPT`.

Shapes: B sequences, T tokens, C = n_embd, H heads, P = padded vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from pipeline.config.keys import Config
from pipeline.model.constants import chunk_count, swiglu_width

F32, INT64 = 4, 8
BYTES = {"float32": F32, "bfloat16": 2, "float16": 2}
BATCHES = 3  # of windows: one computes, one waits, one is being made


@dataclass(frozen=True)
class Setting:
    """What decides how much is allocated, apart from the config.

    `shards`: ranks that share one copy of weights, gradients and optimizer state; 1 where each has
    its own. `accumulation`: micro-batches of a step, each rank. `dtype`: autocast's.
    """

    ranks: int = 1
    shards: int = 1
    accumulation: int = 1
    dtype: str = "float32"
    on_cpu: bool = True
    compiled: bool = False


@dataclass(frozen=True)
class Sizes:
    """Parameters of the whole model, of one rank's shard, of one block, of the token embedding; and
    those of the shard that Muon updates, with one moment instead of two, in all and at once.
    """

    all: int
    shard: int
    block: int
    table: int
    matrices: int = 0
    stack: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind, each at its largest; `other`: what else there is at the peak, such
    as gathered shards, casts of weights, work space of the backward pass, batches.

    `overlap`: what of them is never there together, as gradients are made while activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int
    overlap: int

    @property
    def total(self) -> int:
        """The peak."""
        kinds = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.other)
        return sum(kinds) - self.overlap

    def as_json(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Footprint:
    """One rank's step: the quantities that its peak is made of, in bytes."""

    config: Config
    sizes: Sizes
    setting: Setting

    @property
    def tokens(self) -> int:
        return self.config.train.micro_batch_size * self.config.model.block_size

    @property
    def itemsize(self) -> int:
        return BYTES[self.setting.dtype]

    @property
    def stream(self) -> int:
        """The residual stream (B, T, C), which is float32 under autocast too, unless configured."""
        return self.stream_itemsize * self.tokens * self.config.model.n_embd

    @property
    def stream_itemsize(self) -> int:
        return self.itemsize if self.config.model.residual_dtype == "autocast" else F32

    @property
    def block(self) -> int:
        """What a block keeps for the backward pass."""
        return KEPT[self.config.model.arch](self)

    @property
    def recomputes(self) -> bool:
        return self.config.model.activation_checkpointing == "block"

    @property
    def kept(self) -> int:
        """What remains of a block after the forward pass: recomputed ones keep their input alone."""
        return self.stream if self.recomputes else self.block

    @property
    def ends(self) -> int:
        """Kept outside of the blocks: the last norm's input and output, its mean and deviation."""
        numbers = self.tokens * self.config.model.n_embd
        mask = (self.stream if self.setting.on_cpu else numbers) if self.config.model.dropout else 0
        return self.stream + numbers * self.itemsize + 2 * F32 * self.tokens + mask

    @property
    def activations(self) -> int:
        return self.config.model.n_layer * self.kept + self.ends

    @property
    def logits(self) -> int:
        """Of one chunk (n, P) the loss holds logits, float32 logarithms of probabilities, and the gradient:
        in place in float32; compiled without the logarithms. On a CPU `scatter_` works in float32.
        """
        setting, vocabulary = self.setting, self.sizes.table // self.config.model.n_embd
        rows = -(-self.tokens // chunk_count(self.tokens, vocabulary, on_cpu=setting.on_cpu))
        copies = 2 * self.itemsize
        if self.itemsize < F32 and not setting.compiled:
            copies += 2 * F32 if setting.on_cpu else F32
        return copies * rows * vocabulary

    @property
    def fresh(self) -> bool:
        """Whether gradients are freed with each step, and made anew while activations go: not with
        a second micro-batch, nor in DDP's buckets.
        """
        return self.setting.accumulation == 1 and (self.setting.ranks == 1 or self.setting.shards > 1)

    @property
    def gradients(self) -> int:
        """FSDP2 keeps those of micro-batches that are not reduced yet complete, in float32."""
        complete = self.setting.shards == 1 or self.setting.accumulation > 1
        return F32 * (self.sizes.all if complete else self.sizes.shard)

    def memory(self) -> Memory:
        weights, activations, logits = F32 * self.sizes.shard, self.activations, self.logits
        peak = self.throughout + max(self.moments())
        more = peak - self.gradients - activations - logits
        moments = 2 * weights - F32 * self.sizes.matrices
        return Memory(weights, self.gradients, moments, activations=activations, logits=logits,
                      other=max(more, 0), overlap=max(-more, 0))  # fmt: skip

    @property
    def throughout(self) -> int:
        """Batches; what FSDP2 gathers outside of the blocks for a whole step; DDP's buckets, which are the
        gradients only when a step has one micro-batch: others make their own before they are reduced.
        """
        train, model, sizes, setting = self.config.train, self.config.model, self.sizes, self.setting
        held = BATCHES * INT64 * train.micro_batch_size * (model.block_size + 1)
        if setting.shards > 1:
            held += F32 * (sizes.all - model.n_layer * sizes.block)
        elif setting.ranks > 1 and setting.accumulation > 1:
            held += F32 * sizes.all
        return held

    def moments(self) -> Iterator[int]:
        """What there is besides weights, AdamW's moments and `throughout`, when it may be most."""
        layers, sizes, shards = self.config.model.n_layer, self.sizes, self.setting.shards
        tied, sharded = self.config.model.tie_weights, shards > 1
        table, block = F32 * sizes.table, F32 * sizes.block
        head = table if tied or self.fresh else 0  # the gradient, until the embedding's is added
        # The gradients of an MLP's inner (B, T, 4 C), in and out, less what its product has freed.
        numbers = self.tokens * self.config.model.n_embd
        work = self.stream + 4 * self.itemsize * numbers + 4 * F32 * self.config.model.n_embd**2
        gathered = self.itemsize * sizes.block if sharded else 0
        # Autocast's copies of weights, which the backward pass frees; FSDP2 gathers a block's as such.
        low = self.itemsize < F32
        cast = self.itemsize * sizes.block if low and not sharded else 0
        before = 0 if self.fresh else self.gradients
        # The loss adds up the head's gradient in the forward pass, and multiplies it in the backward pass.
        forward = before + self.activations + gathered + layers * cast + table
        yield forward + self.logits + self.itemsize * low * sizes.table
        yield forward + table + self.stream
        for done in range(layers):  # blocks, the last one first
            gradients = before
            if sharded:
                # A block's are in a buffer of their own until they have been reduced.
                gradients += done * (block // shards - (0 if self.fresh else block)) + (block if done else 0)
            elif self.fresh:
                gradients += done * block
            # FSDP2 copies a block out of what it gathered, and gathers the next one while this one computes.
            there = gradients + head + min(2, layers - done) * gathered
            left = self.activations - self.ends - done * self.kept + (layers - done) * cast
            yield gradients + head + left + 2 * gathered
            yield there + left + self.block - self.kept + work
            own = gathered if sharded else block if self.fresh else 0
            yield there + left - self.kept + own + 2 * self.stream
        # Momentum, gradient and three more of what Muon updates at once.
        yield self.gradients + 5 * F32 * sizes.stack
        # The embedding's backward pass adds its gradient to the head's.
        copies = 1 + tied
        if sharded:
            outside = F32 * sizes.all - layers * block
            yield (
                before
                + (F32 * sizes.shard if self.fresh else -layers * block)
                + block
                + max(copies * table, 2 * outside)
            )
        else:
            yield before + (F32 * sizes.all - table if self.fresh else 0) + copies * table + self.stream


def gpt2_block(step: Footprint) -> int:
    """Bytes of (B, T, C) and others that GPT-2's block keeps."""
    model, item = step.config.model, step.itemsize
    # In the residual stream's type both norms' inputs; in autocast's 14 C: both norms' outputs, queries,
    # keys and values, attention's output, 4 C before GELU and 4 C behind it. Float32 means and deviations.
    columns = model.n_embd * (2 * step.stream_itemsize + 14 * item) + 4 * F32
    # A trace of Inductor's min-cut partition kept 42 C: two normalised float32 copies more, less what
    # it computes again. Not measured on a GPU.
    if step.setting.compiled:
        columns += 6 * model.n_embd
    return (columns + _attention(step)) * step.tokens


def qwen3_block(step: Footprint) -> int:
    """Bytes of (B, T, C) and others that a block of model.arch=qwen3 keeps. Not measured on a GPU, nor compiled."""
    model, item = step.config.model, step.itemsize
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    # Norms' inputs and outputs as in GPT-2. Queries and keys before their norms and turned, values,
    # attention's output; gate, its SiLU, up, and their product.
    columns = model.n_embd * (2 * step.stream_itemsize + 2 * item) + item * (
        3 * queries + 3 * keys + 4 * swiglu_width(model)
    )
    # Float32 scales of all norms.
    columns += F32 * (2 + model.n_head + model.kv_heads)
    return (columns + _attention(step)) * step.tokens


def _attention(step: Footprint) -> int:
    """Bytes a token that attention, masks and dropout keep besides queries, keys, values and output."""
    model, setting, item = step.config.model, step.setting, step.itemsize
    low = item < F32
    columns = model.n_head * F32  # logarithms of attention's sums
    if model.dropout and setting.on_cpu:
        # No flash kernel: probabilities, mask and product (B, H, T, T); the masks of two outputs.
        scores = 3 * F32 + 2 * low
        columns += model.n_head * (scores * model.block_size - F32) + model.n_embd * (2 * item + item * low)
    elif model.dropout:
        columns += 2 * model.n_embd
    if step.config.data.document_mask and (setting.on_cpu or model.dropout or not low):
        columns += item * model.block_size  # the mask as a bias, made in each block
    return columns


# By `model.arch`.
KEPT = {"gpt2": gpt2_block, "qwen3": qwen3_block}
