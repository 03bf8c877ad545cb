"""Every default that a fit depends on, in one place, with the reason beside it."""

from __future__ import annotations

# Training. AdamW as in PEFT's recipes; the rate at which adapters of small encoders learn well.
EPOCHS = 5
LEARNING_RATE = 1e-3
BATCH_SIZE = 32
SEED = 42

# The scales of the posterior (Dirichlet, Wishart, sample scale, noise) are logarithms: one unit is
# a factor e, so they need larger steps than weights, and no weight decay (BLoB: 1e-2).
SCALE_LEARNING_RATE = 1e-2

# MonteCLoRA. The paper finds 4 components enough.
NUM_COMPONENTS = 4
# ε and the KL weight: near the paper's 5e-3 and 1e-5 · n the posterior is no calmer than LoRA
# (PEERS' reports and our MRPC trials agree); from about 0.2 with a weight of 1e-2 it is.
SAMPLE_SCALE = 0.2
KL_WEIGHT = 1e-2
# ν = 4 r: at V = I the isotropic KL then costs 0.6 nats a column, at ν = r 4.6.
DF_PER_RANK = 4
# The Dirichlet prior: uniform on the simplex.
CONCENTRATION = 1.0

# Prediction: the Monte Carlo error of a probability is below 0.5 / sqrt(32) = 0.09 at worst.
NUM_SAMPLES = 32
# During training, evaluation runs once an epoch and has to stay cheap.
EVAL_SAMPLES = 4
# Rows (draws x examples) of one pass through the network at prediction.
PREDICT_ROWS = 128
