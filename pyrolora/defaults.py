"""Defaults that were chosen, each with its reason.

Those that change nothing (a KL weight of 1, no dropout), the shape of the adapters, and what Pyro's
NUTS takes, stand with their options.
"""

from __future__ import annotations

from typing import Final

# Training. AdamW as in the Trainer; small encoders learn at this rate (the benchmark's runs), large
# language models usually want less, 1e-4 to 5e-4.
EPOCHS = 5
LEARNING_RATE = 1e-3
BATCH_SIZE = 32
SEED = 42
MAX_SEED = 2**32 - 1  # the Trainer seeds NumPy's generator, too, which takes no more

# The scales of the posterior (Dirichlet, Wishart, sample scale, noise) are logarithms: one unit is
# a factor e, so they need larger steps than weights, and no weight decay (BLoB: 1e-2). The rate is
# lower where the means take small steps, or noise would come before they have learnt; it does not
# rise with theirs, or nothing is learnt. In fits of T > 256 steps to a cold posterior it falls as
# 1/√T, as the best constant step over a horizon does, or noise outgrows what the means have learnt:
# docs/evidence.md#montec
SCALE_LEARNING_RATE = 1e-2
SCALE_RATE = 10.0
SCALE_STEPS = 256
# Relative to what is learnt, trained scales begin at the prior's width and have to come down from
# it, as far as the data say: by factors of 10, in the hundreds of steps of a fit.
SCALE_LEARNING_RATE_FROM_PRIOR = 0.1

# The curvature by which scales are settled takes a batch, or a few examples, while the means are
# trained, which is as much as another step, some ten times in a fit; and more examples at the end,
# as much as 3 % of eight epochs of 1,000.
CURVATURE_FEW = 8
CURVATURE_EXAMPLES = 256

# Scales without a closed optimum are trained from that of a diagonal curvature, to which they are
# set for the last time at this share of the steps. Where the rate falls to zero, a sixteenth of the
# way of the means is left, and in some hundred steps scales still move by factors from there.
SETTLED_LAST = 0.75

# The width of the noise by examples that are held back: a tenth, where that comes to ten, and
# not more than tell two numbers well enough: what is held back is not learnt. Each time
# that the steps have learnt from so many examples, so many of them, and of those that are learnt,
# pass in so many draws. These are forward passes of two batches of 32, which cost less than the
# steps that 10 % of the examples, held back, save.
HOLD_BACK = 0.1
HELD_BACK_LEAST = 10
HELD_BACK_MOST = 250
WIDTH_EVERY = 256
WIDTH_EXAMPLES = 8
WIDTH_DRAWS = 4
WIDTH_RATE = 0.3
WIDTHS = (1e-2, 1e2)
# Standard deviations of the normal priors of the logarithms of the width and of the temperature.
WIDTH_PRIOR = 1.0
TEMPERATURE_PRIOR = 0.5
TEMPERATURE_DRAWS = 8

# MonteCLoRA. The paper finds 4 components enough.
NUM_COMPONENTS = 4
# The noise is relative to what is learnt, which has no price of its own. Data choose its width from
# here on; its shape is the optimum of the objective: docs/evidence.md#montec
PRIOR_MEAN: Final = "learned"
SAMPLE_SCALE = 1.0
INIT_COVARIANCE = 1.0
# ν = 4 r: at V = I the isotropic KL then costs 0.6 nats per column, at ν = r 4.6.
DF_PER_RANK = 4
# The Dirichlet prior: uniform on the simplex.
CONCENTRATION = 1.0

# Gaussian guides: likewise.
PRIOR_SCALE = 1.0
INIT_SCALE = 1.0

# Entries of a closed KL whose intermediate values are held at a time: 16 MB each, of the 300 that a
# factor of LLaMA-7B at rank 16 would take six times over.
ENTRIES_AT_ONCE = 2**22

# A low-rank covariance: each direction costs a copy of the factors.
COVARIANCE_RANK = 8

# SWAG, in fits of a few epochs: the second half at half the first learning rate; 20 iterates as in
# the paper, and half as many directions.
SWAG_START = 0.5
SWAG_SNAPSHOTS = 20
SWAG_RANK = 10

# TFB: the tolerance and the draws of the authors' scripts for an adapter trained without noise.
TFB_TOLERANCE = 0.003
TFB_DRAWS = 10
TFB_STEPS = 10

# MC dropout: PEFT's usual lora_dropout. A dropout layer has one mask per example; eight per batch
# have most of its lower variance.
DROPOUT = 0.1
DROPOUT_DRAWS = 8

# Flat-LoRA: the paper's range is 0.05 to 0.1.
RHO = 0.05

# Examples on which a selected layer has to be called once, or it counts as not called: enough for
# each of a few dozen experts to have its turn.
CALL_EXAMPLES = 64

# Rank allocation. Eight rounds, with training in between that shows what the last one was worth;
# none before the first tenth of the training, when B has hardly left zero, and none in its second
# half, in which the ranks that stay learn the rest. Where ranks move, a tenth of them per round can
# move more than half of the budget. Slots for twice the rank bound what the products of the
# adapters cost, and how much a layer can win.
ALLOCATION_ROUNDS = 8
ALLOCATION_SHARE = 0.1
ALLOCATION_START = 0.1
ALLOCATION_END = 0.5
ALLOCATION_GROWTH = 2.0
# An ablation runs its examples twice per rank, always the same ones. 64 are too few to tell ranks
# apart on the task of benchmarks/rank_allocation.py.
ALLOCATION_EXAMPLES = 256
# The spread of the squared norm of a row is known to a third from 16 draws of one entry, and better
# from more entries.
ALLOCATION_DRAWS = 16

# Gradients of weights that a start from gradients holds at a time: one backward pass for
# BERT-large, 13 for LLaMA-7B in 16 bits, whose gradients take as much as it does.
GRADIENT_BYTES = 2**30
# Laplace: the sums of KFAC that are held at a time, and the eigenvectors that are kept. BERT-base
# with adapters on all linear layers has 1.2 GB of each, which are kept whole; LLaMA-7B has 70,
# summed over some layers at a time, and keeps some 200 eigenvectors per block (Yang et al. 2024:
# 10).
CURVATURE_BYTES = 2**31
# The most features of a layer with a dense curvature, a matrix of that many rows: 4 GiB, and again
# to decompose it. LLaMA's output layer has 32,000; one of 128,000 words would take 66 GB twice.
CURVATURE_WIDTH = 2**15

# Deep ensembles: most of the gain is there with five members (Lakshminarayanan et al. 2017).
MEMBERS = 5

# NUTS: Pyro's own target; two chains at least, for R-hat.
CHAINS = 2
NUTS_DRAWS = 200
NUTS_WARMUP = 200

# The largest head whose posterior has the whole covariance, a matrix of that many rows: 25 MB that
# are saved. BERT-base has 769 entries per class.
HEAD_ENTRIES = 2500

# Splits that are scored, where data has several: while fitting, afterwards, and as data of another
# distribution.
FIT_SPLITS = ("validation", "test")
SCORE_SPLITS = ("test", "validation")
OUTSIDE_SPLITS = (*SCORE_SPLITS, "train")

# Questions on contexts that are longer than the network reads: windows share 128 tokens, and an
# answer has at most 30, as in transformers' own script. Answers of several windows are joined from
# the 20 likeliest of each.
WINDOW_STRIDE = 128
MAX_ANSWER = 30
ANSWERS_PER_WINDOW = 20

# Prediction: the Monte Carlo error of a probability is below 0.5 / sqrt(32) = 0.09 at worst.
NUM_SAMPLES = 32
# The bounds of a calibration: beyond them, the data tell nothing about probabilities.
TEMPERATURES = (0.05, 20.0)
# The most tokens of a text to learn, as in TRL: attention costs the square of it.
MAX_LENGTH = 1024
# Texts: each draw writes a continuation, and all draws score all of them.
GENERATE_SAMPLES = 8
MAX_NEW_TOKENS = 40
# The most answers that a model reads before it is asked whether one of them is true.
IDEAS = 5
# Draws for ArviZ: enough for the intervals of a summary.
ARVIZ_DRAWS = 200
# For k̂, where every draw runs over all training examples: a tail of 42 weights.
KHAT_DRAWS = 200
# Bootstrap samples for the standard error of a metric that is no mean: it is then known to 5 %.
RESAMPLES = 200
# During training, evaluation runs once per epoch and has to stay cheap.
EVAL_SAMPLES = 4
# The size of one pass through the network at prediction: rows (draws x examples), and tokens. A
# processor is fastest while a layer's activations fit its cache (benchmarks/NOTES.md, prediction);
# on an accelerator memory is the bound: the logits of a language model take 8 GB per copy at
# 128,000 words.
PREDICT_ROWS = 128
PREDICT_TOKENS = 16384
PREDICT_TOKENS_CPU = 1024
# Draws of the factors that are held at a time; more are drawn anew for every batch. 32 draws of 2.4
# million entries fit whole (SmolLM2-135M at rank 8), and six of LLaMA-7B's 40 million at rank 16,
# beside its 13 GB: docs/costs.md#memory
DRAWN_BYTES = 2**30
# Texts that are written side by side: 25 posteriors of 8 draws. A step has a token per row, so that
# it is faster with many of them; their keys and values are the bound.
WRITE_ROWS = 256
# Logits that are normalised at a time. On the CPU they fit a core's cache, which halves the time at
# 49,152 words; on an accelerator fewer would mean more kernels, and more would mean more memory.
LOGITS = 2**26
LOGITS_CPU = 2**18

# The demo: both fits and their predictions in three minutes on two cores.
DEMO_EPOCHS = 8
DEMO_LEARNING_RATE = 2e-3
DEMO_SAMPLES = 12
DEMO_TRAIN = 120  # sentences per library
DEMO_TEST = 100
