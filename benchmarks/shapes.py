"""How much memory a fit and its posterior take beside the network, by formula, for LLaMA-7B.

Each formula is compared with a measurement at three small sizes: of what is stored, the bytes of
the tensors; of work, the peak of the bytes alive, with small bounds in `pyrolora.defaults`. For
LLaMA-7B's shape nothing is allocated. ``--write`` puts the table into a page of the documentation.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import RESULTS, markdown, provenance, save_json, show
from memory import LiveBytes
from torch import Tensor, nn
from transformers import TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, defaults
from pyrolora.adapters import AdapterBank, LayerSpec, attach
from pyrolora.guides import (
    MAP,
    NUTS,
    SWAG,
    Ensemble,
    Guide,
    Laplace,
    LowRank,
    MeanField,
    MonteCLoRA,
)
from pyrolora.inference import Objective, kfac, weight_gradients
from pyrolora.inference.curvature import portions
from pyrolora.model import JointModel, build
from pyrolora.tasks import task_for

BEGIN, END = "<!-- table: memory -->\n", "<!-- end -->"
SMALLER = 8  # the bounds at small shapes: an eighth of everything
WORD = 4  # bytes of a number in float32
DRAWS, MANY = defaults.NUM_SAMPLES, defaults.KHAT_DRAWS


@dataclass(frozen=True)
class Decoder:
    """The linear layers of a LLaMA: four of width x width, and three of a gated network.

    Attributes
    ----------
    layers, width, inner
        Blocks, the width of the residual stream, and that of the gated network.
    rank
        Of the adapters.
    attention
        Whether only queries and values have adapters.
    """

    layers: int
    width: int
    inner: int
    rank: int = 16
    attention: bool = False

    @property
    def specs(self) -> list[LayerSpec]:
        w, f = self.width, self.inner
        sides = {"q": (w, w), "v": (w, w)}
        if not self.attention:
            sides |= {"k": (w, w), "o": (w, w), "gate": (w, f), "up": (w, f), "down": (f, w)}
        return [
            LayerSpec(f"blocks.{i}.{name}", *side, self.rank, 1.0)
            for i in range(self.layers)
            for name, side in sides.items()
        ]

    @property
    def columns(self) -> dict[str, list[int]]:
        """The columns of each block of A (inputs) and of Bᵀ (outputs)."""
        return {
            "A": [spec.in_features for spec in self.specs],
            "B": [spec.out_features for spec in self.specs],
        }

    def entries(self, latent: str) -> int:
        """The entries of A, of B, or of both."""
        return self.rank * sum(sum(self.columns[factor]) for factor in latent)

    @property
    def copy(self) -> int:
        """The bytes of one copy of the adapters."""
        return WORD * self.entries("AB")

    @property
    def squares(self) -> list[int]:
        """The bytes of KFAC's sums, a square matrix for each side, of every layer."""
        return [WORD * (spec.in_features**2 + spec.out_features**2) for spec in self.specs]

    @property
    def weights(self) -> list[int]:
        """The bytes of every adapted weight."""
        return [WORD * spec.in_features * spec.out_features for spec in self.specs]


LARGE = {
    "all linear": Decoder(32, 4096, 11008),
    "q, v": Decoder(32, 4096, 11008, attention=True),
}
SMALL = [Decoder(2, 128, 344), Decoder(3, 192, 516), Decoder(4, 256, 688)]


class Network(nn.Module):
    """A network of such layers, with a head."""

    def __init__(self, shape: Decoder) -> None:
        super().__init__()
        w, f = shape.width, shape.inner
        sides = {"q": (w, w), "k": (w, w), "v": (w, w), "o": (w, w)}
        sides |= {"gate": (w, f), "up": (w, f), "down": (f, w)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(*side, bias=False) for n, side in sides.items()})
            for _ in range(shape.layers)
        )
        self.head = nn.Linear(w, 2)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            for name in ("q", "k", "v", "o"):
                x = block[name](x)
            x = block["down"](block["gate"](x).sigmoid() * block["up"](x))
        return self.head(x)


def adapter(shape: Decoder) -> AdapterConfig:
    names = sorted({spec.name.rpartition(".")[2] for spec in shape.specs})
    return AdapterConfig(r=shape.rank, target_modules=names, modules_to_save=["head"])


def fitted(shape: Decoder, guide: Guide, **options: Any) -> pyrolora.Posterior:
    """Fit for a step on two examples."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a training
        return pyrolora.fit(
            Network(shape), data(shape), guide=guide, adapter=adapter(shape),
            task="classification", **(options or {"epochs": 1}),
        )  # fmt: skip


def joint_of(shape: Decoder, guide: Guide) -> JointModel:
    torch.manual_seed(0)
    network, config = Network(shape), adapter(shape)
    task = task_for(network, "classification")
    return build(network, attach(network, config), config, guide, task, 2)


def data(shape: Decoder) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, shape.width, generator=generator), torch.tensor([0, 1])


def batch_of(shape: Decoder) -> dict[str, Tensor]:
    return dict(zip(("inputs", "labels"), data(shape), strict=True))


# Measuring ----------------------------------------------------------------------------------------


@contextmanager
def bounds(**values: int) -> Iterator[None]:
    """Set bounds of `pyrolora.defaults` for the block."""
    before = {name: getattr(defaults, name) for name in values}
    try:
        for name, value in values.items():
            setattr(defaults, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(defaults, name, value)


def counting(*modules: nn.Module) -> LiveBytes:
    """A counter of bytes that knows the tensors of these modules already."""
    live = LiveBytes()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            live.seen.add(tensor.untyped_storage())
    return live


def stored(guide: Guide) -> Callable[[Decoder], int]:
    """The bytes of the tensors of a posterior."""

    def measure(shape: Decoder) -> int:
        program = guide.build(AdapterBank(shape.specs, AdapterConfig(r=shape.rank)))
        with bounds(CURVATURE_BYTES=sum(shape.squares) // SMALLER):
            program.reserve()
        return sum(tensor.nbytes for tensor in program.state_dict().values())

    return measure


def step(guide: Guide) -> Callable[[Decoder], int]:
    """The peak of a training step above its start, without the gradients."""

    def measure(shape: Decoder) -> int:
        joint = joint_of(shape, guide).train()
        objective, batch = Objective(joint, 2), batch_of(shape)
        trained = [p for p in joint.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        with bounds(ENTRIES_AT_ONCE=shape.entries("AB") // 64):
            objective(batch, 1.0).backward()
            optimizer.step()
            optimizer.zero_grad()
            with counting(joint) as live:
                objective(batch, 1.0).backward()
        return live.peak - sum(parameter.nbytes for parameter in trained)

    return measure


def work(action: Callable[[Any, Decoder], Any]) -> Callable[[Decoder], int]:
    """The peak of something that a posterior does, two draws being held at a time."""

    def measure(shape: Decoder) -> int:
        posterior = fitted(shape, MeanField(latent="AB"))
        with bounds(DRAWN_BYTES=2 * shape.copy):
            posterior.predict(batch_of(shape)["inputs"], num_samples=2)  # the first asks more
            with counting(posterior.base, posterior.model) as live:
                action(posterior, shape)
        return live.peak

    return measure


def sums(shape: Decoder) -> int:
    """The peak of the curvature of one portion of the layers."""
    joint, batch = joint_of(shape, MAP()), batch_of(shape)
    with bounds(CURVATURE_BYTES=sum(shape.squares) // SMALLER):
        sizes = dict(zip(joint.program.bank.specs, shape.squares, strict=True))
        names = max(portions(shape.specs), key=lambda part: sum(sizes[name] for name in part))
        with counting(joint) as live:
            kfac(joint, [batch], names)
    return live.peak


def gradients(shape: Decoder) -> int:
    """The peak of the start from gradients."""
    joint, batch = joint_of(shape, MAP()), batch_of(shape)
    with bounds(GRADIENT_BYTES=sum(shape.weights) // SMALLER), counting(joint) as live:
        weight_gradients(joint, batch, lambda _, gradient: gradient.norm())
    return live.peak


def checkpoint(shape: Decoder) -> int:
    """The bytes of a checkpoint's files."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=2, save_strategy="steps", save_steps=2, report_to="none",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        fitted(shape, MeanField(), training=args)
        (written,) = Path(folder).glob("checkpoint-*")
        return sum(file.stat().st_size for file in written.rglob("*") if file.is_file())


# Formulas -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """Something that takes memory.

    Attributes
    ----------
    what, formula
        In words, and in entries: n_A, n_B and n those of A, of B and of both.
    size
        Returns the bytes for a shape and the bounds, as a multiple of the small ones or as set.
    measure
        Returns the bytes at a small shape; what draws take does not depend on their number.
    unbounded
        Returns the bytes that a bound divides: those of all draws, of all layers; None without.
    """

    what: str
    formula: str
    size: Callable[[Decoder], float]
    measure: Callable[[Decoder], int]
    unbounded: Callable[[Decoder], float] | None = None


def largest(sizes: list[int], bound: int) -> int:
    """The bytes of the largest portion of neighbours that a bound allows."""
    most = now = 0
    for size in sizes:
        now = size if now and now + size > bound else now + size
        most = max(most, now)
    return most


def bound_of(name: str, shape: Decoder) -> int:
    """A bound as it is set, and at a small shape as it was measured with."""
    if shape in LARGE.values():
        return int(getattr(defaults, name))
    small = {
        "CURVATURE_BYTES": sum(shape.squares) // SMALLER,
        "GRADIENT_BYTES": sum(shape.weights) // SMALLER,
        "DRAWN_BYTES": 2 * shape.copy,
    }
    return small[name]


def drawn(count: int, times: float, shape: Decoder) -> float:
    """So many times the bytes of the draws that are held at a time, of ``count``."""
    at_once = max(1, bound_of("DRAWN_BYTES", shape) // shape.copy)
    return times * min(count, at_once) * shape.copy


def eigenvectors(shape: Decoder) -> int:
    """The bytes of Laplace's eigenvectors and eigenvalues."""
    columns, r = [*shape.columns["A"], *shape.columns["B"]], shape.rank
    bound = bound_of("CURVATURE_BYTES", shape)
    kept = bound // (WORD * sum(columns)) if sum(shape.squares) > bound else max(columns)
    return WORD * sum((c + r) * min(c, kept) + r * r for c in columns)


def entries(A: float = 0, B: float = 0) -> Callable[[Decoder], float]:
    """A multiple of the entries of A, and one of those of B."""
    return lambda shape: WORD * (A * shape.entries("A") + B * shape.entries("B"))


def items() -> Iterator[Item]:
    K, directions, members = defaults.SWAG_RANK, defaults.COVARIANCE_RANK, defaults.MEMBERS
    stored_draws = defaults.CHAINS * defaults.NUTS_DRAWS
    yield Item("posterior of map", "n", entries(1, 1), stored(MAP()))
    yield Item(
        "posterior of montec",
        "n + 20 per layer",
        lambda s: s.copy + WORD * len(s.specs) * (defaults.NUM_COMPONENTS + s.rank),
        stored(MonteCLoRA()),
    )
    yield Item("posterior of meanfield", "n + n_A", entries(2, 1), stored(MeanField()))
    yield Item(
        f"posterior of lowrank, K = {directions}",
        "n + (K + 1) n_A",
        entries(directions + 2, 1),
        stored(LowRank()),
    )
    yield Item(f"posterior of swag, K = {K}", "(K + 2) n", entries(K + 2, K + 2), stored(SWAG()))
    yield Item(
        f"posterior of ensemble, M = {members}",
        "(M + 1) n",
        entries(members + 1, members + 1),
        stored(Ensemble()),
    )
    yield Item(
        f"posterior of nuts, S = {stored_draws}",
        "n + (S + 1) n_A",
        entries(stored_draws + 2, 1),
        stored(NUTS()),
    )
    yield Item(
        "posterior of laplace",
        "n + K eigenvectors per block",
        lambda s: s.copy + eigenvectors(s),
        stored(Laplace()),
        unbounded=lambda s: s.copy + sum(s.squares),
    )
    yield Item("step of map", "n_B", entries(0, 1), step(MAP()))
    yield Item("step of montec", "2 n_A + n_B", entries(2, 1), step(MonteCLoRA()))
    yield Item("step of meanfield", "7.7 n_A + n_B", entries(7.7, 1), step(MeanField()))
    yield Item(
        "step of meanfield on A and B", "7.4 n", entries(7.4, 7.4), step(MeanField(latent="AB"))
    )
    yield Item(
        f"step of lowrank, K = {directions}",
        "7.6 K n_A + n_B",
        entries(7.6 * directions, 1),
        step(LowRank()),
    )
    yield Item("checkpoint of meanfield, on disk", "3 (n + n_A)", entries(6, 3), checkpoint)
    for what, count, times, action in (
        (f"predict, {DRAWS} draws", DRAWS, 2.6, predicted),
        (f"to_arviz with data, {MANY} draws", MANY, 3.1, in_arviz),
        (f"khat, {MANY} draws", MANY, 6.7, judged),
    ):
        yield Item(
            what,
            f"{times} S n, S draws at a time",
            partial(drawn, count, times),
            work(action),
            unbounded=lambda s, count=count: count * s.copy,
        )
    yield Item(
        "sums of laplace's curvature",
        "in² + out² of a portion of layers, and 2 n_B",
        lambda s: largest(s.squares, bound_of("CURVATURE_BYTES", s)) + entries(0, 2)(s),
        sums,
        unbounded=lambda s: sum(s.squares) + entries(0, 2)(s),
    )
    yield Item(
        "gradients for lora-ga",
        "in x out of a portion of layers",
        lambda s: largest(s.weights, bound_of("GRADIENT_BYTES", s)),
        gradients,
        unbounded=lambda s: sum(s.weights),
    )


def predicted(posterior: Any, shape: Decoder) -> Any:
    return posterior.predict(batch_of(shape)["inputs"], num_samples=DRAWS, seed=0)


def in_arviz(posterior: Any, shape: Decoder) -> Any:
    return posterior.to_arviz(DRAWS, data=data(shape))


def judged(posterior: Any, shape: Decoder) -> Any:
    return posterior.khat(data(shape), num_samples=DRAWS, seed=0)


def table() -> pd.DataFrame:
    rows = []
    for item in items():
        ratios = [item.measure(shape) / item.size(shape) for shape in SMALL]
        rows.append(
            {
                "what": item.what,
                "formula": item.formula,
                "measured to formula": " ".join(f"{ratio:.2f}" for ratio in ratios),
                **{f"GB, {name}": item.size(shape) / 1e9 for name, shape in LARGE.items()},
                "GB, all linear, unbounded": (
                    f"{item.unbounded(LARGE['all linear']) / 1e9:.3f}" if item.unbounded else ""
                ),
            }
        )
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--write", type=Path, help="a page that has the table between its marks")
    args = parser.parse_args(argv)
    page, args.write = args.write, str(args.write or "")
    frame = table()
    show(frame)
    save_json(args.out / "shapes.json", {**provenance(args), "items": frame.to_dict("records")})
    if page:
        before, _, rest = page.read_text().partition(BEGIN)
        assert rest, f"{page} has no line {BEGIN!r}"
        after = rest[rest.index(END) :]
        page.write_text(f"{before}{BEGIN}\n{markdown(frame)}\n{after}")
    (args.out / "shapes.md").write_text("# Memory beside the network\n\n" + markdown(frame))


if __name__ == "__main__":
    main()
