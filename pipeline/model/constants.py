"""Numbers that trained weights presuppose, or that the memory of a step follows from. No torch."""

from pipeline.config.keys import ModelConfig

INIT_STD = 0.02  # GPT-2's, and most models' since
LAYER_NORM_EPSILON = 1e-5
RMS_NORM_EPSILON = 1e-6
VOCAB_MULTIPLE = 64  # matrix units work in tiles; GPT-2's 50,257 columns become 50,304
# Of the loss, computed in chunks of rows; each reads the head's weight anew and adds to all of its gradient.
# 1,024 rows of 50,304 logits, 768 wide, with gradients took 1,749 ms on two cores of an AMD EPYC in chunks of
# 128 rows, 1,492 of 256, 1,432 at once; on a Xeon 0.88 times as long in chunks of 256 as at once. On an H100
# that adding should take a twentieth of the products' time for chunks of 5,000 rows.
CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


def chunk_count(tokens: int, vocabulary: int, *, on_cpu: bool) -> int:
    """Chunks of about CHUNK_LOGITS for so many logits; of equal length where that can be, as what is
    compiled is for one length.
    """
    least = -(-tokens * vocabulary // CHUNK_LOGITS["cpu" if on_cpu else "cuda"])
    return next((count for count in range(least, 2 * least) if tokens % count == 0), least)


def swiglu_width(config: ModelConfig) -> int:
    """Three matrices of 8/3 n_embd have the parameters of two of 4 n_embd; up to a multiple of 64, for
    matrix units.
    """
    return config.n_inner or -(-8 * config.n_embd // (3 * 64)) * 64
