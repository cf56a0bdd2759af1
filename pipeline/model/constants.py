"""Numbers that trained weights presuppose, or that the memory of a step follows from. No torch."""

from pipeline.config.keys import ModelConfig

INIT_STD = 0.02  # GPT-2's, and most models' since
LAYER_NORM_EPSILON = 1e-5
RMS_NORM_EPSILON = 1e-6
VOCAB_MULTIPLE = 64  # matrix units work in tiles; GPT-2's 50,257 columns become 50,304


def swiglu_width(config: ModelConfig) -> int:
    """Three matrices of 8/3 n_embd have the parameters of two of 4 n_embd; up to a multiple of 64, for
    matrix units.
    """
    return config.n_inner or -(-8 * config.n_embd // (3 * 64)) * 64
