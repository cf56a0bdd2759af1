"""Numbers that trained weights presuppose, which config.json states too. No torch."""

INIT_STD = 0.02  # GPT-2's, and most models' since
LAYER_NORM_EPSILON = 1e-5
