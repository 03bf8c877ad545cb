"""Every guide against NUTS on its own model: same means, same prior, same data.

Two small classification problems, made from a seed: a linear layer, and a network with a hidden
layer, both with frozen weights that are off by updates of rank 2. A guide is judged by what it
predicts for new inputs, the mean and the spread over draws, beside what Markov chains on the same
posterior predict. Rows in brackets are no guides: each makes one approximation alone.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from common import RESULTS, hardware, markdown, save_json, versions
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, Posterior, defaults
from pyrolora.adapters import FlatFactors
from pyrolora.data import prepare
from pyrolora.guides import (
    MAP,
    NUTS,
    SWAG,
    Dropout,
    Ensemble,
    Flat,
    Full,
    Guide,
    Laplace,
    LowRank,
    MeanField,
    MonteCLoRA,
)
from pyrolora.predictive import draw_factors, predict

Data = tuple[Tensor, Tensor]
Row = dict[str, Any]

SIZE, HIDDEN, CLASSES, RANK = 5, 6, 3, 2
TRAIN, NEAR, FAR, DISTANCE = 60, 120, 60, 3.0
PRIOR_SCALE = 0.5  # of meanfield, laplace and map
# Of montec, so that an entry of A has the same standard deviation: with N components
# E‖π‖² = 2 / (N + 1).
SAMPLE_SCALE = PRIOR_SCALE * ((defaults.NUM_COMPONENTS + 1) / 2) ** 0.5
TRAINED = {"scale_updates": "gradient", "draws_per_batch": 10, "scale_learning_rate": 0.05}
BOUNDS = 4  # of the 20 that the Trainer logs a fit
ADAPTER = AdapterConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")


@dataclass(frozen=True)
class Budget:
    """How long everything runs."""

    epochs: int = 600
    plain_epochs: int = 60  # of plain LoRA, which has no prior to keep it from the extremes
    chains: int = 2
    num_samples: int = 300
    warmup_steps: int = 150

    @property
    def draws(self) -> int:
        """Of every guide, as many as the chains have."""
        return self.chains * self.num_samples


QUICK = Budget(epochs=20, plain_epochs=10, num_samples=8, warmup_steps=8)


# Problems ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A frozen network, training data, and test inputs: near the training data, and far."""

    name: str
    network: nn.Module
    train: Data
    test: Data


def problem(name: str, network: nn.Sequential, seed: int) -> Problem:
    """Weights of a scale that gives unsure labels; the truth is an update of rank 2 away."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    truth = copy.deepcopy(network)
    with torch.no_grad():
        for frozen, true in zip(network, truth, strict=True):
            if isinstance(frozen, nn.Linear):
                out, inputs = frozen.weight.shape
                frozen.weight.copy_(1.5 * normal(out, inputs) / inputs**0.5)
                frozen.bias.zero_()
                update = normal(out, RANK) @ normal(RANK, inputs) / (RANK * inputs) ** 0.5
                true.weight.copy_(frozen.weight + 0.8 * update)
                true.bias.zero_()

    def labelled(inputs: Tensor) -> Data:
        with torch.no_grad():
            probs = truth(inputs).softmax(-1)
        return inputs, torch.multinomial(probs, 1, generator=generator)[:, 0]

    train = labelled(normal(TRAIN, SIZE))
    test = labelled(torch.cat([normal(NEAR, SIZE), DISTANCE * normal(FAR, SIZE)]))
    return Problem(name, network, train, test)


def problems(seed: int) -> list[Problem]:
    two = nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    return [
        problem("linear", nn.Sequential(nn.Linear(SIZE, CLASSES)), seed),
        problem("two layers", two, seed),
    ]


# Predictions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """Draws of the class probabilities, (S, n, C), and what they say of each input."""

    draws: Tensor
    labels: Tensor

    @property
    def mean(self) -> Tensor:
        return self.draws.mean(0)

    @property
    def spread(self) -> Tensor:
        """(n,): the standard deviation over draws of the centred logits, root mean square over
        classes."""
        logs = self.draws.double().clamp(min=1e-38).log()
        return (logs - logs.mean(-1, keepdim=True)).var(0, correction=0).mean(-1).sqrt()

    @property
    def mutual_information(self) -> float:
        total = _entropy(self.mean) - _entropy(self.draws).mean(0)
        return float(total.sum())

    @property
    def nll(self) -> float:
        return float(-self.mean.gather(-1, self.labels[:, None]).log().mean())


def _entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum(-1)


def against(guide: Predicted, target: Predicted) -> Row:
    """The columns of the table: how far ``guide`` is from ``target``."""
    row = {"dp": float((guide.mean - target.mean).abs().mean()), "nll": guide.nll}
    if not guide.spread.max() > 1e-6:  # a point
        return {**row, "spread": 0.0, "spread_far": 0.0, "mi": 0.0}
    ratio = (guide.spread / target.spread).log()
    logs = torch.stack([guide.spread, target.spread]).log()
    return {
        **row,
        "spread": float(ratio[:NEAR].mean().exp()),
        "spread_far": float(ratio[NEAR:].mean().exp()),
        "correlation": float(torch.corrcoef(logs)[0, 1]),
        "mi": guide.mutual_information / target.mutual_information,
    }


# One problem ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The rows of one problem.

    Attributes
    ----------
    targets
        What the chains predict, by the name of their posterior.
    """

    problem: Problem
    budget: Budget
    seed: int
    rows: list[Row] = field(default_factory=list)
    chains: list[Row] = field(default_factory=list)
    targets: dict[str, Predicted] = field(default_factory=dict)

    def fit(self, start: nn.Module | Posterior, guide: Guide, **training: Any) -> Posterior:
        """A fit of the network, or around the means of a posterior; all examples a batch."""
        if isinstance(start, nn.Module):
            adapter = ADAPTER if guide.adapts else None
            training |= {"task": "classification", "adapter": adapter}
        return pyrolora.fit(
            start, self.problem.train, guide, batch_size=TRAIN, seed=self.seed, **training
        )

    def trained(
        self, start: nn.Module | Posterior, guide: Guide, epochs: int | None = None
    ) -> Posterior:
        """`fit` for a guide that takes steps."""
        return self.fit(start, guide, epochs=epochs or self.budget.epochs, learning_rate=2e-2)

    def noisy(self, start: nn.Module, guide: Guide) -> Posterior:
        """`trained` on batches of a third, whose noise is what spreads SWAG's iterates."""
        epochs = max(self.budget.epochs // 3, 1)
        batch = {"batch_size": TRAIN // 3, "epochs": epochs, "learning_rate": 2e-2}
        options = {"task": "classification", "adapter": ADAPTER, "seed": self.seed}
        return pyrolora.fit(start, self.problem.train, guide, **batch, **options)

    def predicted(self, posterior: Posterior, factors: FlatFactors | None = None) -> Predicted:
        """Of the test inputs, with draws of the posterior, or with ``factors``."""
        if factors is None:
            factors = draw_factors(posterior.model, self.budget.draws, self.seed)
        data = prepare(self.problem.test, posterior.base, posterior.task)
        prediction: Any = predict(posterior.model, data, factors, batch_size=NEAR + FAR)
        return Predicted(prediction.draws, self.problem.test[1])

    def add(self, name: str, target: str, predicted: Predicted, **more: float) -> None:
        """The row of a guide, or of a check, beside its target; in brackets, one not its own."""
        row = {"problem": self.problem.name, "guide": name, "target": target}
        row |= against(predicted, self.targets[target.strip("()")]) | more
        self.rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def guide(self, name: str, target: str, fit: Callable[[], Posterior]) -> Posterior:
        """Fit a guide and add its row."""
        with stopwatch() as seconds:
            posterior = fit()
        spent = seconds()
        self.add(name, target, self.predicted(posterior), **about(posterior), seconds=spent)
        return posterior

    def nuts(self, name: str, start: Posterior, inner: Guide) -> None:
        """The target of that name; and a chain with another seed beside it, for the Monte Carlo
        error of every column."""
        for run, chains in (("nuts", self.budget.chains), ("nuts again", 1)):
            options = NUTS(
                inner=inner,
                chains=chains,
                num_samples=self.budget.num_samples,
                warmup_steps=self.budget.warmup_steps,
            )
            seed = self.seed + 1000 * (run != "nuts")
            with stopwatch() as seconds, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of R-hat, which is in the table
                found = pyrolora.fit(start, self.problem.train, options, seed=seed)
            row = {"problem": self.problem.name, "target": name, "run": run, "chains": chains}
            self.chains.append({**row, **found.history[-1], "seconds": seconds()})
            draws = draw_factors(found.model, chains * self.budget.num_samples)
            predicted = self.predicted(found, draws)
            self.targets.setdefault(name, predicted)
            self.add(run, name, predicted, **about(found), seconds=seconds())
            if run == "nuts" and name != "AB":
                self._moved(found, name, draws)

    def _moved(self, nuts: Posterior, target: str, draws: FlatFactors) -> None:
        """The chains' draws, moved so that their mean is M: what a frozen mean costs. How far, as
        the root mean square over entries in standard deviations, is ``shift``."""
        factor = "B" if target == "B" else "A"
        value, given = getattr(draws, factor), getattr(nuts.bank.means(), factor).detach()
        delta = value.mean(0) - given
        shift = float((delta / value.std(0)).square().mean().sqrt())
        moved = replace(draws, **{factor: value - delta})
        self.add("(nuts, moved to M)", target, self.predicted(nuts, moved), shift=shift)


def about(posterior: Posterior) -> Row:
    """``update``: ‖s B A‖ of the mean adapter, over all layers; ``elbo``: the mean of the bound
    over the last fifth of the training, where that is what was trained."""
    with torch.no_grad():
        norms = posterior.bank.update_norms(posterior.model.program.mean())
    row = {"update": float(norms.norm())}
    bounds = [entry["elbo"] for entry in posterior.history if "elbo" in entry]
    if isinstance(posterior.options, LowRank | MeanField | MonteCLoRA):
        row["elbo"] = sum(bounds[-BOUNDS:]) / BOUNDS
    return row


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds of processor time: other work on the machine counts little."""
    start = time.process_time()
    yield lambda: time.process_time() - start


# Gaussians with less and less structure ---------------------------------------------------------


def curvature(posterior: Posterior, inputs: Tensor, latent: str) -> Tensor:
    """The whole Gauss-Newton matrix of −log p(y | A, B) at the means, (P, P)."""
    means = posterior.bank.means()
    leaves = {name: getattr(means, name).detach().requires_grad_() for name in latent}
    output = posterior.model.network({"inputs": inputs}, replace(means, **leaves))
    rows = [
        torch.cat(torch.autograd.grad(entry, list(leaves.values()), retain_graph=True))
        for entry in output.flatten()
    ]
    J = torch.stack(rows).unflatten(0, output.shape).double()
    p = output.detach().softmax(-1).double()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", J, hessian, J)


def structured(form: str, precision: Tensor, posterior: Posterior, latent: str) -> Tensor:
    """The precision of the Gaussian of that form that is closest in KL(q ‖ p) to the one with
    ``precision``: ``full``, itself; ``blocks``, a factor of a layer each; ``diagonal``;
    ``columns``, with one covariance for all columns of a factor."""
    blocks = [block for f in latent for block in posterior.bank.layouts[f].blocks]
    if form == "full":
        return precision
    if form == "diagonal":
        return torch.diag(precision.diagonal())
    sizes = [block.rank * block.columns for block in blocks]
    parts = []
    for i, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        own = precision[sum(sizes[:i]) :, sum(sizes[:i]) :][:size, :size]
        if form == "columns":
            shape = (block.rank, block.columns) * 2
            mean = own.reshape(shape).diagonal(dim1=1, dim2=3).mean(-1)
            own = torch.kron(mean, torch.eye(block.columns).double())
        parts.append(own)
    return torch.block_diag(*parts)


def gaussian(
    bench: Bench, target: str, form: str, posterior: Posterior, precision: Tensor, latent: str
) -> None:
    """The row of N(means, precision⁻¹) in that form, in the linearised network of a Laplace fit."""
    own = structured(form, precision, posterior, latent)
    torch.manual_seed(bench.seed)
    noise = torch.randn(len(own), bench.budget.draws).double()
    factor = torch.linalg.cholesky(own)
    delta = torch.linalg.solve_triangular(factor.T, noise, upper=True).T.float()
    with torch.no_grad():
        draws = posterior.bank.shifted(latent, delta)
    bench.add(f"(gaussian, {form})", target, bench.predicted(posterior, draws))


def gaussians(bench: Bench, target: str, posterior: Posterior, *forms: str) -> None:
    """Rows of the Gaussians around a Laplace fit."""
    options: Any = posterior.options
    H = curvature(posterior, bench.problem.train[0], options.latent)
    precision = H + PRIOR_SCALE**-2 * torch.eye(len(H))
    for form in forms:
        gaussian(bench, target, form, posterior, precision, options.latent)


# What is run ------------------------------------------------------------------------------------


def under_a_prior(bench: Bench, plain: Posterior) -> None:
    """MeanField and Laplace, around the MAP estimate under the very prior, and around others."""
    network = bench.problem.network
    start = bench.trained(network, MAP(prior_scale=PRIOR_SCALE))
    for latent in ("A", "B", "AB"):
        model = MeanField(latent=latent, prior_scale=PRIOR_SCALE, prior_mean="zero", units="one")
        field = replace(model, **TRAINED, init_scale=0.02)
        low = LowRank(rank=10, **{f.name: getattr(field, f.name) for f in fields(field)})
        laplace = Laplace(latent=latent, prior_scale=PRIOR_SCALE)
        sampled = replace(laplace, linearised=False)
        bench.nuts(latent, start, model)
        bench.add("map", latent, bench.predicted(start), **about(start))
        bench.guide("meanfield", latent, partial(bench.trained, start, field))
        bench.guide("lowrank", latent, partial(bench.trained, start, low))
        found = bench.guide("laplace", latent, partial(bench.fit, start, laplace))
        bench.guide("laplace, sampled", latent, partial(bench.fit, start, sampled))
        gaussians(bench, latent, found, "full", "blocks", "diagonal")
    bench.guide("meanfield, own means", "AB", partial(bench.trained, network, field))
    swag = SWAG(prior_scale=PRIOR_SCALE)
    bench.guide("swag, own means", "AB", partial(bench.noisy, network, swag))
    bench.guide("meanfield, plain LoRA", "AB", partial(bench.trained, plain, field))
    bench.guide("laplace, plain LoRA", "AB", partial(bench.fit, plain, laplace))


def monteclora(bench: Bench, plain: Posterior) -> None:
    """MonteCLoRA around plain LoRA; and with means of its own, which chains then take as given."""
    around = bench.fit(plain, Laplace(latent="A", prior_scale=PRIOR_SCALE))
    for component_prior in ("hierarchical", "isotropic"):
        target = f"montec {component_prior}"
        model = MonteCLoRA(component_prior=component_prior, sample_scale=SAMPLE_SCALE, units="one")
        guide = replace(model, **TRAINED)
        learned = replace(guide, learn_sample_scale=True)
        full = replace(learned, covariance="full")
        bench.nuts(target, plain, model)
        bench.add("map", target, bench.predicted(plain), **about(plain))
        bench.guide("montec", target, partial(bench.trained, plain, guide))
        bench.guide("montec, learned scale", target, partial(bench.trained, plain, learned))
        bench.guide("montec, full covariance", target, partial(bench.trained, plain, full))
        gaussians(bench, target, around, "full", "columns")
    with stopwatch() as seconds:
        own = bench.trained(bench.problem.network, learned)
    spent = seconds()
    target = f"{target}, own means"
    bench.nuts(target, own, model)
    name = "montec, learned scale"
    bench.add(name, target, bench.predicted(own), **about(own), seconds=spent)


def without_target(bench: Bench) -> None:
    """Guides that have no prior, and so no posterior: beside that of A and B, for its size."""
    epochs = bench.budget.plain_epochs
    for name, options in (
        ("ensemble", Ensemble()),
        ("flat+map", Flat(at_prediction=True)),
        ("dropout", Dropout()),
        ("full", Full()),
    ):
        fit = partial(bench.trained, bench.problem.network, options, epochs)
        bench.guide(name, "(AB)", fit)


def report(rows: list[Row], chains: list[Row]) -> str:
    """The tables in Markdown, a section a problem."""
    parts = []
    for one in dict.fromkeys(row["problem"] for row in rows):
        for title, table in ((one, rows), (f"{one}: chains", chains)):
            frame = pd.DataFrame(row for row in table if row["problem"] == one)
            names = [name for name in COLUMNS if name in frame]
            parts.append(f"## {title}\n\n{markdown(rounded(frame[names]))}")
    return "\n".join(parts)


COLUMNS = (
    *("guide", "target", "run", "chains", "r_hat", "effective_sample_size", "divergences"),
    *("dp", "spread", "spread_far", "correlation", "mi", "nll", "update", "shift", "elbo"),
    "seconds",
)
DIGITS = {"dp": 4, "nll": 3, "seconds": 2, "effective_sample_size": 0, "r_hat": 3}


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text, nothing where there is none."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.{DIGITS.get(name, 2)}f}"
        return str(value)

    return pd.DataFrame({name: [text(name, v) for v in frame[name]] for name in frame.columns})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of every fit")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers are noise")
    parser.add_argument("--name", default="gold_standard", help="of the files that are written")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    budget = QUICK if args.quick else Budget()
    rows: list[Row] = []
    chains: list[Row] = []
    with pyro.validation_enabled(False):
        for one in problems(args.seed):
            bench = Bench(one, budget, args.seed, rows, chains)
            plain = bench.trained(one.network, MAP(), budget.plain_epochs)
            under_a_prior(bench, plain)
            without_target(bench)
            monteclora(bench, plain)
    text = report(rows, chains)
    print(text)
    save_json(
        args.output / f"{args.name}.json",
        {
            "rows": rows,
            "chains": chains,
            "seed": args.seed,
            "budget": asdict(budget),
            "prior_scale": PRIOR_SCALE,
            "sample_scale": SAMPLE_SCALE,
            "examples": {"train": TRAIN, "near": NEAR, "far": FAR},
            "versions": versions(),
            "hardware": hardware(),
        },
    )
    (args.output / f"{args.name}.md").write_text(text)


if __name__ == "__main__":
    main()
