"""Draws that share a pass are the draws alone, whatever order a network has its rows in."""

from __future__ import annotations

import pytest
import torch
from problems import arguments, bert, mlp, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import FlatFactors, attach
from pyrolora.guides import MAP, Dropout, Ensemble, Flat, Laplace, MeanField, MonteCLoRA
from pyrolora.inference.curvature import kfac
from pyrolora.model import build
from pyrolora.tasks import task_for

# XLNet's projections are parameters of three dimensions, which are pointed out.
pytestmark = pytest.mark.filterwarnings("ignore:'all-linear' adapts linear layers")

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3,
    "initializer_range": 0.3,
}  # fmt: skip
LENGTH = 8
EVERY_LAYER = AdapterConfig(r=2, target_modules="all-linear")


class PositionsFirst(nn.Module):
    """(T, b, H) inside; for T = b no size tells."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.table(input_ids).transpose(0, 1)
        return self.second(self.first(hidden).tanh()).transpose(0, 1).mean(1)


class WithTable(nn.Module):
    """A layer that projects a table of positions, which has no examples; 24 of them, which eight
    examples and three draws divide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 8)
        self.positions = nn.Parameter(torch.randn(24, 8))
        self.project, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.table(input_ids) + self.project(self.positions)[: input_ids.shape[1]]
        return self.out(hidden.tanh().mean(1))


class Experts(nn.Module):
    """Experts that are linear layers, each with the rows that a router sends."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.router = nn.Embedding(60, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.out = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.table(input_ids)
        rows = hidden.flatten(0, 1)
        chosen = self.router(rows).argmax(-1)
        mixed = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mixed = mixed.index_add(0, (chosen == i).nonzero()[:, 0], expert(rows[chosen == i]))
        return self.out(mixed.tanh().view_as(hidden).mean(1))


def deberta() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
    more = {"type_vocab_size": 0, "position_biased_input": False, "position_buckets": 8}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **relative, **more))


def longformer() -> nn.Module:
    return LongformerForSequenceClassification(LongformerConfig(**SIZES, attention_window=4))


def xlnet() -> nn.Module:
    own = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 60}
    return XLNetForSequenceClassification(XLNetConfig(**own, num_labels=3, initializer_range=0.3))


def swin() -> nn.Module:
    own = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "window_size": 4}
    return Swinv2ForImageClassification(Swinv2Config(**own, num_heads=[2, 2], num_labels=3))


APART = {
    "deberta": deberta, "longformer": longformer, "xlnet": xlnet, "swin": swin,
    "positions first": PositionsFirst, "a table": WithTable, "experts": Experts,
}  # fmt: skip


def batch_of(network: nn.Module, n: int = 6, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 3
    if isinstance(network, Swinv2ForImageClassification):
        return {"pixel_values": torch.randn(n, 3, 16, 16, generator=generator), "labels": labels}
    ids = torch.randint(5, 16, (n, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def joint_of(network: nn.Module, guide=None, config=EVERY_LAYER, n=6):
    law = task_for(network, "classification")
    return build(network, attach(network, config), config, guide or MAP(), law, n).eval()


def random_factors(joint, draws: int, seed: int = 0) -> FlatFactors:
    generator = torch.Generator().manual_seed(seed)
    A, B = (joint.program.bank.layouts[f].total for f in "AB")
    return FlatFactors(
        torch.randn(draws, A, generator=generator), torch.randn(draws, B, generator=generator) / 3
    )


def alone(joint, batch, factors) -> Tensor:
    return torch.stack([joint.network(batch, factors[s]) for s in range(factors.draws)])


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("draws", [2, 3])
def test_draws_of_any_network_are_the_draws_alone(name: str, draws: int) -> None:
    torch.manual_seed(0)
    joint = joint_of(APART[name]())
    batch, factors = batch_of(joint.base), random_factors(joint, draws)
    with torch.no_grad():
        found, expected = joint.network(batch, factors), alone(joint, batch, factors)
    assert (expected[0] - expected[1]).abs().max() > 0.03
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not joint.together(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_with_examples_first_has_its_draws_in_one_pass(dtype: torch.dtype) -> None:
    joint = joint_of(bert(num_labels=3).to(dtype))
    batch, factors = batch_of(joint.base), random_factors(joint, 3)
    assert joint.together(batch)
    rows: list[int] = []
    joint.base.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        found = joint.network(batch, factors)
        assert rows == [18]
        if dtype == torch.float32:
            torch.testing.assert_close(found, alone(joint, batch, factors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [3, 6, LENGTH])
def test_sizes_that_fit_by_chance_do_not_hide_the_order(n: int) -> None:
    """T = b, a table of S b rows, and one example."""
    for make in (PositionsFirst, WithTable):
        joint = joint_of(make())
        batch, factors = batch_of(joint.base, n), random_factors(joint, 3)
        with torch.no_grad():
            torch.testing.assert_close(
                joint.network(batch, factors), alone(joint, batch, factors), rtol=1e-4, atol=1e-5
            )


class SomeTokens(nn.Module):
    """A layer that gets some of the tokens, as where padding is taken out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.out = nn.Embedding(60, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden, kept = self.table(input_ids), input_ids > 8
        return self.out(hidden.masked_scatter(kept[..., None], self.first(hidden[kept])).mean(1))


@pytest.mark.parametrize("n", [1, 2])
def test_few_examples_do_not_hide_that_each_has_its_number_of_rows(n: int) -> None:
    """Two draws with one or three examples each, whose tokens are even in number."""
    joint = joint_of(SomeTokens())
    batch, factors = batch_of(joint.base), random_factors(joint, 2)
    batch["input_ids"][:] = 20
    batch["input_ids"][0, :2] = batch["input_ids"][1, :4] = 5
    batch["input_ids"][2, :6] = 5
    joint.together({name: tensor[:n] for name, tensor in batch.items()})
    with torch.no_grad():
        for size in (2, 6):
            part = {name: tensor[:size] for name, tensor in batch.items()}
            halves = [{k: t.chunk(2)[s] for k, t in part.items()} for s in range(2)]
            expected = torch.cat([joint.network(h, factors[s]) for s, h in enumerate(halves)])
            torch.testing.assert_close(joint.shared_out(part, factors), expected)


def test_one_position_says_nothing_of_several() -> None:
    joint = joint_of(PositionsFirst())
    factors = random_factors(joint, 3)
    short, long = batch_of(joint.base, length=1), batch_of(joint.base)
    with torch.no_grad():
        for batch in (short, long):
            torch.testing.assert_close(joint.network(batch, factors), alone(joint, batch, factors))


@pytest.mark.parametrize("name", ["deberta", "xlnet", "positions first", "experts"])
def test_gradients_of_groups_are_those_of_each_group_alone(name: str) -> None:
    torch.manual_seed(0)
    joint = joint_of(APART[name]())
    batch = batch_of(joint.base)
    factors = random_factors(joint, 3)
    A = factors.A.requires_grad_()
    joint.shared_out(batch, factors).square().sum().backward()
    expected = torch.zeros_like(A)
    for s in range(3):
        own = {n: t[2 * s : 2 * s + 2] for n, t in batch.items()}
        single = FlatFactors(A[s].detach().requires_grad_(), factors.B[s])
        joint.network(own, single).square().sum().backward()
        expected[s] = single.A.grad
    assert expected.abs().amax(1).min() > 1e-3
    torch.testing.assert_close(A.grad, expected, rtol=1e-3, atol=1e-4)


class Sleeping(nn.Module):
    """A second expert that wakes for a token which the first batches do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 8)
        self.usual, self.rare, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.usual(self.table(input_ids)).tanh()
        rare = input_ids == 1
        if rare.any():
            hidden = hidden.masked_scatter(rare[..., None], self.rare(hidden[rare]))
        return self.out(hidden.mean(1))[:, :3]


def test_a_layer_that_no_check_has_seen_ends_the_sharing() -> None:
    """Each example has one such token: of the rows alone nothing can be told."""
    config = AdapterConfig(r=2, target_modules=["usual", "rare", "out"])
    joint = joint_of(Sleeping(), config=config)
    batch, factors = batch_of(joint.base), random_factors(joint, 3)
    joint.attachment.checked = True
    joint.together(batch)
    woken = {**batch, "input_ids": batch["input_ids"].clone()}
    woken["input_ids"][0, :3] = 1
    woken["input_ids"][1, :3] = 1
    with torch.no_grad():
        found = joint.network(woken, factors)
        torch.testing.assert_close(found, alone(joint, woken, factors))
    assert not joint.together(batch)


@pytest.mark.parametrize(
    "guide",
    [
        MonteCLoRA(),
        MeanField(draws_per_batch=3),
        Dropout(draws_per_batch=3),
        Ensemble(members=2, side_by_side=True),
        Flat(inner=MeanField(draws_per_batch=2), at_prediction=True),
        Laplace(prior_scale=0.1),
    ],
    ids=str,
)
def test_every_guide_draws_functions_in_a_network_that_runs_them_apart(guide, tmp_path) -> None:
    """Four examples in a pass with the draws, or one: the same draws."""
    torch.manual_seed(0)
    data = tokens(12, classes=3)
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=6, learning_rate=0.05)
    posterior = pyrolora.fit(deberta(), data, guide, adapter=EVERY_LAYER, training=args)
    together = posterior.predict(data, 3, seed=0, batch_size=4).draws
    for i in (0, 5):
        one = posterior.predict(data.select([i]), 3, seed=0).draws[:, 0]
        torch.testing.assert_close(together[:, i], one, rtol=1e-3, atol=1e-4)


def test_curvature_of_positions_first_is_that_of_examples_one_by_one() -> None:
    torch.manual_seed(0)
    joint = joint_of(PositionsFirst())
    with torch.no_grad():
        joint.program.bank.get_parameter("B_loc").normal_()
    batch = batch_of(joint.base, n=LENGTH)
    batch["attention_mask"][:, 5:] = 0
    singles = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(LENGTH)]
    found, expected = kfac(joint, [batch]), kfac(joint, singles)
    for name, block in found.items():
        torch.testing.assert_close(block.rows, expected[name].rows)
        torch.testing.assert_close(block.columns, expected[name].columns)


def test_heads_that_draws_do_not_share_are_cut_by_example() -> None:
    """Each member's head sees its own rows, also where it is given them by name."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(outputs=4), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=F.relu(self.body(x)))

    X, y = torch.randn(8, 4), torch.arange(8) % 3
    posterior = pyrolora.fit(
        Named(), (X, y), Ensemble(members=2, side_by_side=True), task="classification",
        adapter=AdapterConfig(r=2, target_modules=["body.0"], modules_to_save=["head"]), epochs=2,
    )  # fmt: skip
    draws = posterior.predict((X,)).draws
    for i in range(8):
        torch.testing.assert_close(draws[:, i], posterior.predict((X[i : i + 1],)).draws[:, 0])
