"""The curvature that scales are settled by, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyrolora
from pyrolora import guides
from pyrolora.inference.gauss_newton import gauss_newton
from pyrolora.model import JointModel

WIDTH, CLASSES, EXAMPLES = 5, 3, 6


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(EXAMPLES, WIDTH), torch.randint(0, CLASSES, (EXAMPLES,))


def joint_of(data: tuple[Tensor, Tensor], latent: str, start: str = "kaiming") -> JointModel:
    """Two adapted layers, whose posterior is all but a point."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    posterior = pyrolora.fit(
        network,
        data,
        guides.MeanField(latent=latent, scale_updates="gradient", init_scale=1e-6),
        task="classification",
        adapter=pyrolora.AdapterConfig(
            r=2, rank_pattern={"2": 1}, target_modules=["0", "2"], init_lora_weights=start
        ),
        epochs=3,
        learning_rate=3e-2,
        seed=0,
    )
    return posterior.model


def dense(joint: JointModel, X: Tensor, latent: str) -> Tensor:
    """J̃ of shape (n, classes, P) with Σ J̃ᵀ J̃ the Gauss-Newton matrix."""
    bank = joint.program.bank
    means = {f: bank.get_parameter(f"{f}_loc").detach() for f in "AB"}

    def logits(flat: Tensor, x: Tensor) -> Tensor:
        pairs = bank.matrices(bank.replaced(latent, flat))
        h, layers = x, {"0": joint.base[0], "2": joint.base[2]}
        for name, layer in layers.items():
            A, B = pairs[name]
            plain = layer.base_layer if hasattr(layer, "base_layer") else layer
            h = h @ plain.weight.T + plain.bias + bank.specs[name].scaling * (h @ A.T @ B.T)
            h = torch.tanh(h) if name == "0" else h
        return h

    theta = torch.cat([means[f] for f in latent])
    rows = []
    for x in X:
        J = torch.autograd.functional.jacobian(lambda t, x=x: logits(t, x), theta)
        p = logits(theta, x).softmax(-1)
        root = torch.stack([p[c].sqrt() * (torch.eye(CLASSES)[c] - p) for c in range(CLASSES)])
        rows.append(root @ J)
    return torch.stack(rows)


@pytest.mark.parametrize("start", ["kaiming", "lora-ga"])
@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_it_is_that_of_the_dense_matrix(
    data: tuple[Tensor, Tensor], latent: str, start: str
) -> None:
    joint = joint_of(data, latent, start)
    jacobian = dense(joint, data[0], latent)
    found = gauss_newton(joint, [{"inputs": data[0][:4]}, {"inputs": data[0][4:]}], CLASSES)
    entries = jacobian.square().sum((0, 1))
    torch.testing.assert_close(found.entries, entries, rtol=5e-3, atol=1e-6)
    layout, start = joint.program.bank.layout(latent), 0
    for number, block in enumerate(layout.blocks):
        size = block.rank * block.columns
        own = jacobian[..., start : start + size].unflatten(-1, (block.rank, block.columns))
        wanted = torch.zeros(2, 2)
        wanted[: block.rank, : block.rank] = torch.einsum("nvik,nvjk->ij", own, own)
        torch.testing.assert_close(found.ranks[number], wanted, rtol=5e-3, atol=1e-6)
        start += size


def test_random_signs_are_right_in_expectation(data: tuple[Tensor, Tensor]) -> None:
    joint = joint_of(data, "A")
    torch.manual_seed(1)
    exact = gauss_newton(joint, [{"inputs": data[0]}], CLASSES).ranks
    several = [gauss_newton(joint, [{"inputs": data[0]}], 1).ranks for _ in range(300)]
    torch.testing.assert_close(torch.stack(several).mean(0), exact, rtol=0.1, atol=0.02)


def test_a_part_of_the_examples_stands_for_all(data: tuple[Tensor, Tensor]) -> None:
    joint = joint_of(data, "A")
    parts = [gauss_newton(joint, [{"inputs": data[0][i : i + 2]}], CLASSES) for i in (0, 2, 4)]
    whole = gauss_newton(joint, [{"inputs": data[0]}], CLASSES)
    mean = torch.stack([part.entries for part in parts]).mean(0)
    torch.testing.assert_close(mean, whole.entries, rtol=5e-3, atol=1e-6)
