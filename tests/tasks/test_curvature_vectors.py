"""The curvature vectors: their outer products are the Hessian of the negative log-likelihood."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from pyrolora.columns import CHOICE_MASK, PLACES
from pyrolora.tasks import (
    CausalLM,
    Classification,
    MaskedLM,
    MultipleChoice,
    Regression,
    Task,
    TokenClassification,
)

MASK = torch.tensor([[True, True, True, True], [True, False, True, False], [True] * 4])
WHOLE, REAL = torch.tensor([2, 0, 3]), torch.tensor([0.3, -1.0, 2.0])
TOKENS = torch.tensor([[-100, 2, 0, -100], [1, -100, 2, 1]])
EXACT = {
    "classification": (Classification, (3, 4), {"labels": WHOLE}),
    "multiple choice": (MultipleChoice, (3, 4), {"labels": WHOLE, CHOICE_MASK: MASK}),
    "regression": (Regression, (3,), {"labels": REAL}),
}


def summed(law: Task, output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Σ v vᵀ of each example, (n, D, D)."""
    vectors = list(law.curvature(output, batch))
    assert all(v.shape == output.shape and not v.requires_grad for v in vectors)
    flat = torch.stack([v.reshape(len(output), -1) for v in vectors])
    return torch.einsum("kni,knj->nij", flat, flat)


def exact(law: Task, output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The Hessian of each example in its own output, (n, D, D); that of two examples is 0."""
    n = len(output)
    full = hessian(lambda f: -law.log_prob(f.view_as(output), batch).sum(), output.flatten())
    blocks = full.view(n, output[0].numel(), n, output[0].numel())
    return torch.stack([blocks[i, :, i] for i in range(n)])


@pytest.mark.parametrize("name", EXACT)
def test_the_vectors_add_up_to_the_hessian(name: str) -> None:
    kind, shape, batch = EXACT[name]
    law = kind()
    if kind is Regression:
        law.assign("noise_scale", torch.tensor(0.4))
    assert law.linearisable
    output = 2 * torch.randn(shape, requires_grad=True)
    found, expected = summed(law, output, batch), exact(law, output.detach(), batch)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected)


def test_masked_choices_have_no_curvature() -> None:
    _, shape, batch = EXACT["multiple choice"]
    for vector in MultipleChoice().curvature(torch.randn(shape), batch):
        assert (vector[~MASK] == 0).all()


def test_draws_have_vectors_of_their_own() -> None:
    output = torch.randn(2, 3, 4)
    both = torch.stack(list(Classification().curvature(output, {})))
    for s in range(2):
        torch.testing.assert_close(
            both[:, s], torch.stack(list(Classification().curvature(output[s], {})))
        )


@pytest.mark.parametrize(
    ("kind", "places"),
    [(CausalLM, None), (MaskedLM, None), (TokenClassification, None), (CausalLM, [0, 2])],
)
def test_a_random_vector_of_tokens_has_the_hessian_as_its_mean(
    kind: type[Task], places: list[int] | None
) -> None:
    law, draws = kind(), 20_000
    batch = {"labels": TOKENS}
    if places is not None:
        batch[PLACES] = torch.tensor([places] * 2)
    output = torch.randn(2, 4 if places is None else len(places), 3)
    assert not law.linearisable
    (vectors,) = law.curvature(output.requires_grad_().expand(draws, *output.shape), batch)
    assert not vectors.requires_grad
    flat = vectors.flatten(2)
    found = torch.einsum("sni,snj->nij", flat, flat) / draws
    expected = exact(law, output.detach(), batch)
    assert (expected == 0).any()
    error = (flat[..., :, None] * flat[..., None, :]).std(0) / draws**0.5
    assert ((found - expected).abs() <= 5 * error + 1e-7).all()
    assert error.max() < 0.01
