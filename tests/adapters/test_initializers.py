"""Starts from weights and gradients: PEFT's, the bank's update around them, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from problems import batch_of, bert, gpt2, tokens
from torch import Tensor, nn

import pyrolora
from pyrolora.adapters import (
    AdapterBank,
    FlatFactors,
    LayerSpec,
    attach,
    frozen_weight,
    linear_layers,
    start_of,
)
from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.targets import find_targets
from pyrolora.errors import ConfigError

STARTS = ("lora-ga", "pissa", "olora")
BERT: dict[str, Any] = {
    "target_modules": ["query", "key", "value", "dense"],
    "rank_pattern": {"query": 2},
    "alpha_pattern": {"key": 7.0},
}
GPT2: dict[str, Any] = {
    "target_modules": ["c_attn", "c_proj", "c_fc"],
    "rank_pattern": {"c_fc": 2},
    "alpha_pattern": {"c_attn": 7.0},
}


def inputs(network: nn.Module) -> dict[str, Tensor]:
    batch = batch_of(tokens(6))
    if not hasattr(network, "classifier"):
        batch["labels"] = batch["input_ids"]
    return batch


def loss_of(network: nn.Module) -> Tensor:
    return network(**inputs(network)).loss


def gradients_of(network: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """By a plain backward pass."""
    loss_of(network).backward()
    found = {name: network.get_submodule(name).weight.grad.clone() for name in names}
    network.zero_grad()
    return found


def gpt(**changes: Any) -> nn.Module:
    """Without dropout: PEFT estimates the gradient in training mode."""
    return gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **changes)


def our_start(network: nn.Module, name: str, shapes: dict[str, Any]) -> Mapping[str, Any]:
    config = AdapterConfig(r=3, lora_alpha=5.0, modules_to_save=[], **shapes)
    specs = find_targets(network, config, ["classifier"])
    layers = linear_layers(network)
    start = start_of(
        {s.name: layers[s.name] for s in specs},
        specs,
        name,
        lambda read: {
            n: read(n, g) for n, g in gradients_of(network, [s.name for s in specs]).items()
        },
    )
    assert start is not None
    return {s.name: (s, *start[s.name]) for s in specs}


def pefts_start(network: nn.Module, name: str, shapes: dict[str, Any]) -> Mapping[str, Any]:
    """Layer -> A, B, and the weight that is left; PEFT changes ``network``."""
    options = {"lora_ga_config": LoraGAConfig()} if name == "lora-ga" else {}
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5.0,
        init_lora_weights=name.replace("-", "_"),
        fan_in_fan_out=shapes is GPT2,
        **shapes,
        **options,
    )
    if name == "lora-ga":
        preprocess_loraga(network, config, lambda: loss_of(network).backward())
    model = peft.get_peft_model(network, config)
    return {
        layer.removeprefix("base_model.model."): (
            m.lora_A["default"].weight.detach(),
            m.lora_B["default"].weight.detach(),
            m.base_layer.weight.detach(),
        )
        for layer, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }


@pytest.mark.filterwarnings("ignore:Full backward hook")  # PEFT's
@pytest.mark.parametrize(
    ("name", "make", "shapes"),
    [
        *((name, bert, BERT) for name in STARTS),
        # PEFT's OLoRA decomposes the transpose of a Conv1D, of which the shapes do not fit.
        *((name, gpt, GPT2) for name in ("lora-ga", "pissa")),
    ],
)
def test_the_start_is_pefts(name, make, shapes):
    """The same factors up to the signs of singular vectors, which are joint ones of A and B where
    both take the same vectors; and what PEFT leaves of the weight is what our update takes off."""
    ours = our_start(make(initializer_range=0.3), name, shapes)
    theirs = pefts_start(make(initializer_range=0.3), name, shapes)
    weights = linear_layers(make(initializer_range=0.3))
    assert len({(s.in_features, s.out_features, s.rank) for s, _, _ in ours.values()}) >= 3
    assert set(ours) == set(theirs)
    for layer, (spec, A, B) in ours.items():
        other_a, other_b, left = theirs[layer]
        rows, columns = (A * other_a).sum(1).sign(), (B * other_b).sum(0).sign()
        assert name == "lora-ga" or torch.equal(rows, columns)
        A, B = rows[:, None] * A, B * columns
        # The randomised decomposition of the gradient, PEFT's, is exact where 4 r >= in or out.
        error = 1e-3 if name == "lora-ga" and 4 * spec.rank < 16 else 1e-5
        for own, other in ((A, other_a), (B, other_b)):
            assert (own - other).abs().max() < error * own.abs().max()
        update = spec.scaling * (B @ A)
        taken = weights[layer].weight - (update.T if shapes is GPT2 else update)
        assert (taken - left).abs().max() < error * update.abs().max() + 1e-6
        assert update.norm() > 1e-3


@pytest.mark.filterwarnings("ignore:Full backward hook")  # PEFT's
@pytest.mark.parametrize(("make", "shapes"), [(bert, BERT), (gpt, GPT2)])
def test_the_start_of_a_fit_is_pefts_with_the_networks_own_loss(make, shapes):
    """With one batch for all data, so that both see the same."""
    data = tokens(6) if shapes is BERT else tokens(6).remove_columns("labels")
    options = {"r": 3, "lora_alpha": 5.0, "modules_to_save": [], "init_lora_weights": "lora-ga"}
    posterior = pyrolora.fit(
        make(initializer_range=0.3),
        data,
        "map",
        adapter=AdapterConfig(**options, **shapes),
        epochs=1,
        batch_size=6,
    )
    bank = posterior.bank
    A, B = (bank.layouts[f].matrices(getattr(bank.origin, f)) for f in "AB")
    for name, (other_a, other_b, _) in pefts_start(
        make(initializer_range=0.3), "lora-ga", shapes
    ).items():
        for own, other in ((A[name], other_a), (B[name], other_b.T)):
            signs = (own * other).sum(1, keepdim=True).sign()
            assert (signs * own - other).abs().max() < 1e-3 * own.abs().max()


def test_olora_of_a_conv1d_is_the_decomposition_of_its_weight_as_out_by_in():
    network = gpt2()
    for layer, (spec, A, B) in our_start(network, "olora", GPT2).items():
        Q, R = torch.linalg.qr(network.get_submodule(layer).weight.T)
        assert torch.equal(B, Q[:, : spec.rank])
        assert torch.equal(A, R[: spec.rank])


def test_half_precision_weights_are_decomposed_in_float32():
    for name in STARTS:
        for spec, A, B in our_start(bert(initializer_range=0.3).bfloat16(), name, BERT).values():
            assert A.dtype == B.dtype == torch.float32
            if name == "olora":
                torch.testing.assert_close(B.T @ B, torch.eye(spec.rank), atol=1e-5, rtol=0)


# Around a start -----------------------------------------------------------------------------------

SPECS = [
    LayerSpec("a", 14, 12, 2, 1.0),
    LayerSpec("b", 9, 11, 3, 2.0),
    LayerSpec("c", 14, 12, 2, 0.5),
]


def started(specs=SPECS):
    start = {
        s.name: (torch.randn(s.rank, s.in_features), torch.randn(s.out_features, s.rank))
        for s in specs
    }
    return AdapterBank(specs, AdapterConfig(init_lora_weights="pissa"), start), start


@pytest.mark.parametrize(
    ("draws_a", "draws_b"), [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,))], ids=str
)
def test_the_update_is_the_product_less_that_of_the_start(draws_a, draws_b):
    bank, start = started()
    factors = FlatFactors(
        torch.randn(*draws_a, bank.layouts["A"].total),
        torch.randn(*draws_b, bank.layouts["B"].total),
    )
    matrices, norms = bank.matrices(factors), bank.update_norms(factors)
    layers = bank.layer_factors(factors, torch.float32)
    A, B = (bank.layouts[f].matrices(getattr(factors, f)) for f in "AB")
    for i, spec in enumerate(SPECS):
        A0, B0 = start[spec.name]
        expected = B[spec.name].mT @ A[spec.name] - B0 @ A0
        left, right = matrices[spec.name]
        assert left.shape == (*draws_a, 2 * spec.rank, spec.in_features)
        assert right.shape == (*draws_b, spec.out_features, 2 * spec.rank)
        torch.testing.assert_close(right @ left, expected, atol=1e-5, rtol=1e-5)
        own = layers[spec.name]
        torch.testing.assert_close(own.sB.mT @ own.A, spec.scaling * expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            norms[..., i], spec.scaling * torch.linalg.matrix_norm(expected), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("draws", [2, 5])
def test_pooled_draws_are_the_mean_of_their_updates_less_the_start_once(draws):
    bank, start = started()
    each = FlatFactors(*(torch.randn(draws, bank.layouts[f].total) for f in "AB"))
    pooled = bank.matrices(replace(each, pooled=True))
    layers = bank.layer_factors(replace(each, pooled=True), torch.float32)
    A, B = (bank.layouts[f].matrices(getattr(each, f)) for f in "AB")
    for spec in SPECS:
        A0, B0 = start[spec.name]
        expected = (B[spec.name].mT @ A[spec.name]).mean(0) - B0 @ A0
        left, right = pooled[spec.name]
        rank = min(draws * spec.rank, spec.in_features, spec.out_features) + spec.rank
        assert left.shape == (rank, spec.in_features)
        torch.testing.assert_close(right @ left, expected, atol=1e-5, rtol=1e-5)
        own = layers[spec.name]
        torch.testing.assert_close(own.sB.mT @ own.A, spec.scaling * expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_update_is_exactly_zero(dtype):
    """In any dtype, since no large products are subtracted; near it the error is that of the
    distance, not of the start."""
    bank, start = started()
    for own in bank.layer_factors(bank.means(), dtype).values():
        assert not (own.sB.mT @ own.A).any()
    step = FlatFactors(bank.A_loc + 1e-3, bank.B_loc + 1e-3)
    A, B = (bank.layouts[f].matrices(getattr(step, f).detach().double()) for f in "AB")
    for name, own in bank.layer_factors(step, dtype).items():
        A0, B0 = (t.double() for t in start[name])
        expected = bank.specs[name].scaling * (B[name].mT @ A[name] - B0 @ A0)
        error = (own.sB.mT.double() @ own.A.double() - expected).norm() / expected.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_gradients_at_the_start_are_those_of_the_product():
    """d(BA − B₀A₀): what the second form of it must not change."""
    bank, start = started()
    weights = {s.name: torch.randn(s.out_features, s.in_features) for s in SPECS}
    sum((w * (bank.matrices(bank.means())[n][1] @ bank.matrices(bank.means())[n][0])).sum()
        for n, w in weights.items()).backward()  # fmt: skip
    A, B = (bank.layouts[f].matrices(bank.get_parameter(f"{f}_loc").grad) for f in "AB")
    for name, (A0, B0) in start.items():
        torch.testing.assert_close(A[name], B0.T @ weights[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(B[name].mT, weights[name] @ A0.T, atol=1e-5, rtol=1e-5)


def test_a_bank_without_a_start_keeps_no_tensor_of_one():
    bank = AdapterBank(SPECS, AdapterConfig())
    assert set(bank.state_dict()) == {"A_loc", "B_loc"}
    assert bank.origin is None
    assert not bank.start().B.any()
    with_start, _ = started()
    assert set(with_start.state_dict()) == {"A_loc", "B_loc", "A_start", "B_start"}
    empty = AdapterBank(SPECS, AdapterConfig(init_lora_weights="olora"))
    empty.load_state_dict(with_start.state_dict())
    assert torch.equal(empty.origin.A, with_start.A_loc)
    assert torch.equal(empty.start().B, with_start.B_loc)


def test_flattening_is_the_inverse_of_matrices():
    bank = AdapterBank(SPECS, AdapterConfig())
    factors = FlatFactors(*(torch.randn(bank.layouts[f].total) for f in "AB"))
    again = bank.flattened(bank.matrices(factors))
    assert torch.equal(again.A, factors.A)
    assert torch.equal(again.B, factors.B)


# What is refused ----------------------------------------------------------------------------------


def refused(layer, spec, name, gradient=None):
    with pytest.raises(ConfigError) as caught:
        start_of({"x": layer}, [spec], name, lambda read: {"x": read("x", gradient)})
    return str(caught.value)


def test_lora_ga_takes_twice_the_rank():
    layer, gradient = nn.Linear(9, 8), torch.randn(8, 9)
    message = refused(layer, LayerSpec("x", 9, 8, 5, 1.0), "lora-ga", gradient)
    assert all(word in message for word in ("10", "'x'", "in 9, out 8", "r <= 4", "rank_pattern"))
    start = start_of(
        {"x": layer},
        [LayerSpec("x", 9, 8, 4, 1.0)],
        "lora-ga",
        lambda read: {"x": read("x", gradient)},
    )
    assert start["x"][0].shape == (4, 9)


@pytest.mark.parametrize(("value", "words"), [(0.0, "is zero"), (torch.inf, "is not finite")])
def test_a_gradient_that_says_nothing_is_refused(value, words):
    gradient = torch.full((8, 9), value)
    message = refused(nn.Linear(9, 8), LayerSpec("x", 9, 8, 2, 1.0), "lora-ga", gradient)
    assert words in message
    assert "exclude_modules" in message


@pytest.mark.parametrize("name", STARTS)
def test_weights_that_are_no_plain_ones_are_refused(name):
    class Quantised(nn.Linear):
        def __init__(self):
            super().__init__(9, 8)
            codes = torch.zeros(36, 1, dtype=torch.uint8)
            self.weight = nn.Parameter(codes, requires_grad=False)

    message = refused(Quantised(), LayerSpec("x", 9, 8, 2, 1.0), name)
    assert all(word in message for word in ("'x'", "torch.uint8", "unquantised"))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(9, 8))
    assert "none of its own" in refused(normed, LayerSpec("x", 9, 8, 2, 1.0), name)


def test_the_weight_of_a_wrapped_layer_is_that_of_the_layer():
    network = bert()
    attachment = attach(network, AdapterConfig())
    for name, layer in attachment.layers.items():
        assert frozen_weight(name, layer.base_layer) is layer.weight
