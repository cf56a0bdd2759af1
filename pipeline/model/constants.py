"""Numbers that trained weights presuppose, or that the memory of a step follows from. No torch."""

INIT_STD = 0.02  # GPT-2's, and most models' since
LAYER_NORM_EPSILON = 1e-5
VOCAB_MULTIPLE = 64  # matrix units work in tiles; GPT-2's 50,257 columns become 50,304
