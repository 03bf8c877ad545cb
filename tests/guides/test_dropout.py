"""MC dropout: masks against torch's own arithmetic, and their moments against closed forms."""

from __future__ import annotations

import pytest
import torch
from linear import layer
from problems import llama, texts, tokenizer
from pyro import poutine
from torch import Tensor

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import Dropout
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide


def outputs(problem, mask: Tensor) -> Tensor:
    """(S, n, out) of given masks."""
    program = problem.joint.program
    return problem.joint.network(problem.batch, program.factors({"mask": mask})).detach()


def test_a_mask_of_inputs_is_dropout_on_what_the_adapter_sees():
    problem = layer(Dropout(p=0.25))
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    A, B = problem.joint.program.bank.matrices(problem.joint.program.bank.means())["0"]
    s, W = problem.joint.program.bank.specs["0"].scaling, problem.joint.base[0].weight
    for found, z in zip(outputs(problem, mask), mask, strict=True):
        x = problem.inputs
        expected = x @ W.T + s * ((x * z / 0.75) @ A.T) @ B.T
        torch.testing.assert_close(found, expected.detach())


def test_a_mask_of_ranks_takes_ranks_out():
    problem = layer(Dropout(p=0.5, unit="rank"))
    A, B = problem.joint.program.bank.matrices(problem.joint.program.bank.means())["0"]
    s, W = problem.joint.program.bank.specs["0"].scaling, problem.joint.base[0].weight
    (found,) = outputs(problem, torch.tensor([[0.0, 1.0]]))
    update = 2 * s * torch.outer(B[:, 1], A[1])
    torch.testing.assert_close(found, (problem.inputs @ (W + update).T).detach())


@pytest.mark.parametrize("unit", ["input", "rank"])
def test_moments_of_the_output_are_those_of_independent_units(unit):
    """Mean that of M; variance p / (1 − p) Σ_u (s B M_u x_u)²."""
    problem, p, count = layer(Dropout(p=0.3, unit=unit)), 0.3, 20_000
    program = problem.joint.program
    A, B = (t.detach() for t in program.bank.matrices(program.bank.means())["0"])
    s, x = program.bank.specs["0"].scaling, problem.inputs
    if unit == "input":
        parts = s * torch.einsum("or,ri,ni->noi", B, A, x)
    else:
        parts = s * torch.einsum("or,ri,ni->nor", B, A, x)
    variance = p / (1 - p) * parts.square().sum(-1)
    drawn = outputs(problem, program.draw(count)["mask"])
    mean = problem.joint.network(problem.batch, program.mean()).detach()
    assert ((drawn.mean(0) - mean).abs() < 5 * (variance / count).sqrt() + 1e-5).all()
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.1, atol=1e-6)


def test_the_divergence_is_zero():
    problem, elbo = layer(Dropout(p=0.5, draws_per_batch=4), n=12), NamedELBO()
    joint = problem.joint.train()
    elbo.differentiable_loss(joint, JointGuide(joint.program), problem.batch)
    assert elbo.terms["kl/mask"].item() == 0


def test_each_group_of_a_training_batch_has_a_mask_of_its_own():
    """The rows of a group see their group's mask, in training; in evaluation all see one."""
    problem = layer(Dropout(p=0.5, draws_per_batch=4), n=12)
    joint = problem.joint.train()
    trace = poutine.trace(joint).get_trace(problem.batch)
    masks = trace.nodes["mask"]["value"].reshape(4, -1)
    assert len(masks.unique(dim=0)) > 1
    found = trace.nodes["y"]["fn"].base_dist.loc.detach().reshape(12, -1)
    of_all = outputs(problem, masks)
    for group, rows in enumerate(torch.arange(12).split(3)):
        torch.testing.assert_close(found[rows], of_all[group, rows])
    trace = poutine.trace(joint.eval()).get_trace(problem.batch)
    assert trace.nodes["mask"]["value"].numel() == masks.shape[-1]


def test_a_draw_writes_a_whole_text_with_one_mask():
    """Every token of a draw is the likeliest one of the network with that draw's mask."""
    posterior = pyrolora.fit(
        llama(initializer_range=0.5),
        texts(12),
        guide=Dropout(p=0.5),
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2),
        epochs=4,
        learning_rate=5e-2,
    )
    prompt, length = torch.tensor([[2, 11, 6]]), 6
    written = posterior.generate(prompt, 8, max_new_tokens=length, do_sample=False, seed=0)
    masks = posterior.sample(8, seed=0)["mask"]
    found = []
    for mask, own, kept in zip(masks, written.sequences[0], written.mask[0], strict=True):
        factors = posterior.model.program.factors({"mask": mask})
        ids = prompt
        for token in own[kept]:
            logits = posterior.model.network({"input_ids": ids}, factors)
            assert token == logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], -1)
        found.append(tuple(own[kept].tolist()))
    assert len(set(found)) > 1, "the masks make no difference"


@pytest.mark.parametrize(
    "options", [{"p": 0.0}, {"p": 1.0}, {"unit": "token"}, {"draws_per_batch": 0}], ids=str
)
def test_options_that_make_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        Dropout(**options)
