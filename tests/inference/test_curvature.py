"""KFAC against exact Hessians, sums by hand and laplace-torch; the evidence against conjugacy."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from problems import SIZES, bert, gpt2, llama, llama_reward, mlp
from scipy.optimize import minimize_scalar
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import MultivariateNormal
from transformers import BertConfig, BertForMultipleChoice

from pyrolora import AdapterConfig
from pyrolora.adapters import FlatFactors, attach
from pyrolora.errors import DataError
from pyrolora.guides import MAP
from pyrolora.inference import Kronecker, best_precision, kfac, log_marginal_likelihood
from pyrolora.inference.evidence import PRECISIONS
from pyrolora.inference.recording import read
from pyrolora.model import build
from pyrolora.tasks import task_for

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def joint_of(network, task=None, **config):
    """A joint model in double precision, its B away from zero."""
    options = AdapterConfig(**{"r": 2, "target_modules": "all-linear", **config})
    law = task_for(network, task)
    joint = build(network.double(), attach(network, options), options, MAP(), law, 1).double()
    bank = joint.program.bank
    bank.assign("B_loc", 0.5 * torch.randn_like(bank.B_loc))
    return joint


def means(joint):
    factors = joint.program.bank.means()
    return FlatFactors(factors.A.detach(), factors.B.detach())


def matrices(joint, layer):
    A, B = joint.program.bank.matrices(means(joint))[layer]
    return A, B


def dense(block):
    return torch.kron(block.rows, block.columns)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def curvature_vectors(logits):
    """√p_c (e_c − p) of one example, written out."""
    p = logits.softmax(-1)
    for c in range(len(p)):
        unit = torch.zeros_like(p)
        unit[c] = 1.0
        yield p[c].sqrt() * (unit - p)


# Exactness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["A", "B"])
def test_one_factor_of_a_linear_gaussian_layer_has_its_exact_hessian(factor):
    """f = (W + s B A) x: given the other factor it is linear in one."""
    joint = joint_of(nn.Sequential(nn.Linear(4, 1)), "regression", r=1, lora_alpha=3.0)
    joint.task.assign("noise_scale", torch.tensor(0.7, dtype=torch.float64))
    x, y = numbers(9, 4), numbers(9)
    joint.task.targets = lambda batch: batch["labels"]  # in double precision
    point = means(joint)

    def negative_log_likelihood(flat):
        factors = FlatFactors(**{"A": point.A, "B": point.B, factor: flat})
        output = joint.network({"inputs": x}, factors)
        return -joint.task.log_prob(output, {"labels": y}).sum()

    found = dense(kfac(joint, [{"inputs": x, "labels": y}])[f"0.{factor}"])

    torch.testing.assert_close(found, hessian(negative_log_likelihood, getattr(point, factor)))
    A, B = matrices(joint, "0")
    by_hand = {
        "A": torch.kron(3.0**2 * B.T @ B / 0.7**2, x.T @ x),
        "B": 3.0**2 * A @ x.T @ x @ A.T / 0.7**2,
    }
    torch.testing.assert_close(found, by_hand[factor], **CLOSE)


def exact_blocks(joint, batch):
    """Block name -> Jᵀ H J of a classifier, from the whole Jacobian."""
    point = means(joint)

    def output(A, B):
        return joint.network(batch, FlatFactors(A, B)).flatten()

    jacobians = dict(zip("AB", jacobian(output, (point.A, point.B)), strict=True))
    logits = output(point.A, point.B).unflatten(0, (len(batch["labels"]), -1))
    p = logits.softmax(-1)
    H = torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None, :]))
    found = {}
    for factor, layout in joint.program.bank.layouts.items():
        sizes = [block.rank * block.columns for block in layout.blocks]
        parts = jacobians[factor].split(sizes, dim=1)
        found |= {b.name: J.T @ H @ J for b, J in zip(layout.blocks, parts, strict=True)}
    return found


def test_every_block_of_a_deep_network_is_exact_for_one_example():
    joint = joint_of(mlp(), "classification", rank_pattern={"2": 1})
    batch = {"inputs": numbers(1, 4), "labels": torch.tensor([1])}
    expected = exact_blocks(joint, batch)
    found = kfac(joint, [batch])
    assert found.keys() == expected.keys() == {"0.A", "0.B", "2.A", "2.B"}
    for name, block in found.items():
        torch.testing.assert_close(dense(block), expected[name], **CLOSE)


def test_b_given_a_of_a_softmax_layer_has_its_exact_hessian_for_one_example():
    joint = joint_of(nn.Sequential(nn.Linear(4, 3)), "classification")
    batch = {"inputs": numbers(1, 4), "labels": torch.tensor([2])}
    point = means(joint)

    def negative_log_likelihood(B):
        output = joint.network(batch, FlatFactors(point.A, B))
        return -joint.task.log_prob(output, batch).sum()

    found = dense(kfac(joint, [batch])["0.B"])
    torch.testing.assert_close(found, hessian(negative_log_likelihood, point.B), **CLOSE)


def test_batches_add_up_to_the_whole():
    joint = joint_of(mlp(), "classification")
    x, y = numbers(7, 4), torch.arange(7) % 3
    whole = kfac(joint, [{"inputs": x, "labels": y}])
    parts = kfac(joint, [{"inputs": x[:5], "labels": y[:5]}, {"inputs": x[5:], "labels": y[5:]}])
    for name, block in whole.items():
        torch.testing.assert_close(parts[name].rows, block.rows, **CLOSE)
        torch.testing.assert_close(parts[name].columns, block.columns, **CLOSE)


# Sequences ---------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """The mean over the positions that the mask has of tanh(W x_t), read out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.register_buffer("readout", torch.randn(5, 3))

    def forward(self, inputs_embeds, attention_mask):
        hidden = self.layer(inputs_embeds).tanh() * attention_mask[..., None]
        return hidden.sum(1) / attention_mask.sum(1, keepdim=True) @ self.readout


def test_a_sequence_sums_over_the_positions_that_count():
    joint = joint_of(Pooled(), "classification", lora_alpha=3.0)
    lengths, x = [4, 2, 3], numbers(3, 4, 4)
    mask = torch.tensor([[1] * n + [0] * (4 - n) for n in lengths])
    A, B = matrices(joint, "layer")
    linear, s = joint.base.layer.base_layer, 1.5
    W, b, R = linear.weight.detach() + s * B @ A, linear.bias.detach(), joint.base.readout

    inputs, hidden, up, down = [], [], 0.0, 0.0
    for sequence, n in zip(x, lengths, strict=True):
        logits = torch.stack([(W @ x_t + b).tanh() for x_t in sequence[:n]]).mean(0) @ R
        for x_t in sequence[:n]:
            inputs.append(torch.outer(x_t, x_t))
            hidden.append(torch.outer(A @ x_t, A @ x_t))
            slope = 1 - (W @ x_t + b).tanh() ** 2
            for v in curvature_vectors(logits):
                g = s * slope * (R @ v) / n
                up = up + torch.outer(g, g)
                down = down + torch.outer(B.T @ g, B.T @ g)

    batch = {"inputs_embeds": x, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
    found = kfac(joint, [batch])

    assert len(inputs) == sum(lengths)
    torch.testing.assert_close(found["layer.A"].columns, torch.stack(inputs).mean(0), **CLOSE)
    torch.testing.assert_close(found["layer.A"].rows, down, **CLOSE)
    torch.testing.assert_close(found["layer.B"].rows, torch.stack(hidden).mean(0), **CLOSE)
    torch.testing.assert_close(found["layer.B"].columns, up, **CLOSE)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, block in expected.items():
        torch.testing.assert_close(found[name].rows, block.rows, **CLOSE)
        torch.testing.assert_close(found[name].columns, block.columns, **CLOSE)


def token_batch(*shape):
    ids = torch.randint(4, 16, shape)
    mask = torch.ones_like(ids)
    mask[0, ..., -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(shape[0]) % 2}


def padded(batch, extra):
    wide = {
        name: torch.nn.functional.pad(batch[name], (0, extra))
        for name in ("input_ids", "attention_mask")
    }
    return {**batch, **wide}


def test_more_padding_changes_nothing():
    joint = joint_of(bert(initializer_range=0.3))
    batch = token_batch(4, 6)
    expected = kfac(joint, [batch])
    assert_same(kfac(joint, [padded(batch, 5)]), expected)
    unmasked = {**padded(batch, 5), "attention_mask": torch.ones(4, 11, dtype=torch.long)}
    name = "bert.encoder.layer.0.attention.self.query.A"
    changed = kfac(joint, [unmasked])[name].columns
    assert not torch.allclose(changed, expected[name].columns)


def test_choices_that_an_example_does_not_have_change_nothing():
    torch.manual_seed(0)
    config = BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3
    )
    joint = joint_of(BertForMultipleChoice(config).eval(), modules_to_save=["classifier"])
    batch = token_batch(3, 2, 5)
    expected = kfac(joint, [batch])
    assert "bert.pooler.dense.A" in expected  # a layer without positions
    more = {
        name: torch.cat([batch[name], batch[name][:, :1]], dim=1)
        for name in ("input_ids", "attention_mask")
    }
    own = torch.tensor([[True, True, False]] * 3)
    assert_same(kfac(joint, [{**batch, **more, "choice_mask": own}]), expected)


def test_positions_that_nothing_reads_do_not_count():
    """A causal classifier reads the last token: so do most layers of its last block."""
    joint = joint_of(llama_reward(3), "classification", r=1)
    one = token_batch(2, 6)
    one = {name: rows[1:] for name, rows in one.items()}
    last = len(joint.base.model.layers) - 1
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    expected, found = exact_blocks(joint, one), kfac(joint, [one])
    for part in parts:
        for factor in "AB":
            name = f"model.layers.{last}.{part}.{factor}"
            assert expected[name].norm() > 1e-6
            scale = expected[name].abs().max().item()  # its norms are in single precision
            torch.testing.assert_close(
                dense(found[name]), expected[name], rtol=0, atol=1e-5 * scale
            )
    before = "model.layers.0.self_attn.q_proj.A"
    assert not torch.allclose(dense(found[before]), expected[before])  # all positions are read


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_query_that_decides_nothing_is_not_read_whatever_rounding_leaves_of_it(attention):
    """That of the first token, which attends to itself alone; nor the last, which nothing reads."""
    network = llama()
    network.config._attn_implementation = attention
    joint = joint_of(network)
    ids = torch.randint(4, 16, (3, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    name, seen = "model.layers.1.self_attn.q_proj", []
    joint.attachment.layers[name].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    joint.network(batch, joint.program.bank.means())
    x = seen[0].detach()[:, 1:-1].flatten(0, 1)
    found = kfac(joint, [batch])[f"{name}.A"].columns
    torch.testing.assert_close(found, x.T @ x / 12, **CLOSE)


def test_a_position_is_read_by_the_largest_gradient_of_its_own_example():
    sizes = torch.tensor([[1.0, 1e-6, 1e-4], [1e-7, 0.0, 1e-13], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[True, False, True], [True, False, False], [False] * 3])
    assert torch.equal(read(sizes, 3), expected)
    assert torch.equal(read(sizes.flatten(), 3), expected.flatten())


def test_examples_without_gradient_leave_a_curvature_of_zero():
    joint = joint_of(mlp(), "classification")
    nn.init.zeros_(joint.base[2].base_layer.weight)
    joint.program.bank.assign("B_loc", torch.zeros_like(joint.program.bank.B_loc))
    found = kfac(joint, [{"inputs": numbers(3, 4), "labels": torch.arange(3)}])
    assert found["0.A"].columns.count_nonzero() == 0
    assert found["2.A"].columns.count_nonzero() > 0
    assert all(dense(block).isfinite().all() for block in found.values())


class Repeated(nn.Module):
    """f = W tanh(W x): one layer in two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


def test_a_layer_that_is_called_twice_accumulates_both_uses():
    joint = joint_of(Repeated(), "classification", lora_alpha=3.0)
    x, s = numbers(5, 3), 1.5
    A, B = matrices(joint, "layer")
    W = joint.base.layer.base_layer.weight.detach() + s * B @ A
    inputs, up = [], 0.0
    for x_i in x:
        z = (W @ x_i).tanh()
        inputs += [torch.outer(x_i, x_i), torch.outer(z, z)]
        for v in curvature_vectors(W @ z):
            first = (1 - z**2) * (W.T @ v)
            up = up + s**2 * (torch.outer(v, v) + torch.outer(first, first))
    found = kfac(joint, [{"inputs": x, "labels": torch.zeros(5).long()}])
    torch.testing.assert_close(found["layer.A"].columns, torch.stack(inputs).mean(0), **CLOSE)
    torch.testing.assert_close(found["layer.B"].columns, up, **CLOSE)


def test_a_language_model_takes_the_sampled_vector_at_every_position():
    """GPT-2, whose layers are ``Conv1D``; inputs and gradients from hooks on the wrapped layers."""
    joint = joint_of(gpt2(), lora_alpha=3.0)
    ids = torch.randint(4, 16, (3, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    torch.manual_seed(5)
    found = kfac(joint, [batch])

    seen = {}
    for name, layer in joint.attachment.layers.items():
        layer.register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args[0].detach(), out)})
        )
    output = joint.network(batch, joint.program.bank.means())
    torch.manual_seed(5)
    (v,) = joint.task.curvature(output, batch)
    outs = [out for _, out in seen.values()]
    for (name, (x, _)), g in zip(
        seen.items(), torch.autograd.grad(output, outs, grad_outputs=v), strict=True
    ):
        # Nothing reads the last position, whose next word is in no label.
        x, g = x[:, :-1].flatten(0, 1), 1.5 * g.flatten(0, 1)
        torch.testing.assert_close(found[f"{name}.A"].columns, x.T @ x / 15, **CLOSE)
        torch.testing.assert_close(found[f"{name}.B"].columns, g.T @ g, **CLOSE)


# The way it runs ---------------------------------------------------------------------------------


def test_dropout_is_off_and_the_mode_comes_back():
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    joint = joint_of(network, "classification", lora_dropout=0.5)
    batch = {"inputs": numbers(5, 4), "labels": torch.zeros(5).long()}
    expected = kfac(joint.eval(), [batch])
    found = kfac(joint.train(), [batch])
    assert joint.training
    assert network[1].training
    assert_same(found, expected)


def test_it_leaves_no_gradient_and_no_graph_behind():
    joint = joint_of(mlp(), "classification")
    found = kfac(joint, [{"inputs": numbers(5, 4), "labels": torch.zeros(5).long()}])
    assert all(p.grad is None for p in joint.parameters())
    assert joint.program.bank.B_loc.requires_grad
    for block in found.values():
        assert not block.rows.requires_grad
        assert not block.columns.requires_grad


def test_sums_are_in_the_precision_of_the_bank_whatever_that_of_the_network():
    """Inputs of a bfloat16 network have 3 digits; their sums keep those of float32."""
    joint = joint_of(mlp(), "classification")
    joint.base.to(torch.bfloat16)
    joint.program.float()
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    found = kfac(joint, [{"inputs": x, "labels": torch.zeros(5).long()}])
    assert found["0.A"].columns.dtype == torch.float32
    torch.testing.assert_close(found["0.A"].columns, x.float().T @ x.float() / 5)


@pytest.mark.parametrize("batches", ["none", "masked"])
def test_without_a_position_that_counts_it_raises(batches):
    joint = joint_of(Pooled(), "classification")
    x, empty = numbers(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)
    batch = {"inputs_embeds": x, "attention_mask": empty, "labels": torch.tensor([0, 1])}
    with pytest.raises(DataError, match="no position of any batch counts for layer 'layer'"):
        kfac(joint, [] if batches == "none" else [batch])


def test_eigen_takes_both_factors_apart_and_clamps_what_rounding_makes_negative():
    half = numbers(3, 2)
    columns = half @ half.T - 1e-14 * torch.eye(3).double()  # of rank 2
    rows = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    U, V, values = Kronecker(rows, columns).eigen()
    assert (values >= 0).all()
    assert (torch.outer(*(torch.linalg.eigvalsh(m) for m in (rows, columns))) < 0).any()
    W = torch.kron(U, V)
    rebuilt = W @ torch.diag(values.flatten()) @ W.T
    torch.testing.assert_close(rebuilt, torch.kron(rows, columns), rtol=1e-9, atol=1e-12)


# laplace-torch -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_factors_precision_and_evidence_are_those_of_laplace_torch(task):
    import laplace

    outputs = 3 if task == "classification" else 1
    x = numbers(11, 4)
    y = torch.arange(11) % 3 if task == "classification" else numbers(11, 1).float().double()
    joint = low_rank(joint_of, outputs, task)
    explicit = explicit_low_rank(joint)
    sigma = 1.0 if task == "classification" else 0.6
    peer = laplace.Laplace(
        explicit,
        task,
        subset_of_weights="all",
        hessian_structure="kron",
        sigma_noise=sigma,
        prior_precision=0.7,
    )
    data = torch.utils.data.TensorDataset(x, y)
    peer.fit(torch.utils.data.DataLoader(data, batch_size=4))

    if task == "regression":
        joint.task.assign("noise_scale", torch.tensor(sigma, dtype=torch.float64))
    batch = {"inputs": x, "labels": y if outputs > 1 else y.squeeze(-1)}
    batches = [{name: t[i : i + 4] for name, t in batch.items()} for i in range(0, 11, 4)]
    found = kfac(joint, batches)

    theirs = dict(zip(("0.A", "0.B", "2.A", "2.B"), peer.H_facs.kfacs, strict=True))
    for name, sides in theirs.items():  # (out, in), or their product where both are numbers
        product = reduce(torch.kron, sides if name.endswith("A") else reversed(sides)) / sigma**2
        torch.testing.assert_close(dense(found[name]), product, **CLOSE)

    eigenvalues = [found[name].eigen().values for name in theirs]
    ours = torch.cat([e.flatten() for e in eigenvalues]).sort().values + 0.7
    precision = peer.posterior_precision.to_matrix()
    torch.testing.assert_close(torch.linalg.eigvalsh(precision), ours, **CLOSE)

    with torch.no_grad():
        output = joint.network(batch, means(joint))
        log_likelihood = joint.task.log_prob(output, batch).sum().item()
    theta = [means(joint).A, means(joint).B]
    for value in (0.7, 0.01, 30.0):
        evidence = log_marginal_likelihood(log_likelihood, eigenvalues, theta, value)
        expected = peer.log_marginal_likelihood(torch.tensor(value).double())
        assert evidence == pytest.approx(expected.item(), rel=1e-6)  # their constants: float32


def low_rank(make, outputs, task):
    """An adapted network whose own weights are 0: it is its adapters, with s = 1."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    pattern = {"2": min(2, outputs)}
    return make(network, task, rank_pattern=pattern, lora_alpha=2.0, alpha_pattern=pattern)


def explicit_low_rank(joint):
    """The same function as a network of plain linear layers."""
    layers = []
    for name in ("0", "2"):
        for weight in matrices(joint, name):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
            layer.weight.data.copy_(weight)
            layers.append(layer)
    return nn.Sequential(*layers[:2], nn.Tanh(), *layers[2:])


# The evidence ------------------------------------------------------------------------------------


class Regression:
    """y ~ N(Φ θ, σ² I), θ ~ N(0, I / λ): the evidence is in closed form."""

    def __init__(self, n=30, k=5, sigma=0.5):
        self.phi, self.sigma = numbers(n, k), sigma
        self.y = self.phi @ torch.tensor([0.5, -0.2, 0.0, 0.3, 0.1]).double() + sigma * numbers(n)
        self.curvature = self.phi.T @ self.phi / sigma**2
        self.eigenvalues = torch.linalg.eigvalsh(self.curvature)

    def mode(self, precision):
        eye = torch.eye(len(self.curvature), dtype=torch.float64)
        return torch.linalg.solve(
            self.curvature + precision * eye, self.phi.T @ self.y / self.sigma**2
        )

    def log_likelihood(self, theta):
        law = torch.distributions.Normal(self.phi @ theta, self.sigma)
        return law.log_prob(self.y).sum().item()

    def evidence(self, precision):
        eye = torch.eye(len(self.y), dtype=torch.float64)
        covariance = self.sigma**2 * eye + self.phi @ self.phi.T / precision
        return MultivariateNormal(torch.zeros_like(self.y), covariance).log_prob(self.y).item()


@pytest.mark.parametrize("precision", [1e-3, 1.0, 50.0])
def test_the_evidence_of_a_conjugate_regression_is_exact(precision):
    problem = Regression()
    theta = problem.mode(precision)
    parts = problem.eigenvalues[:2], problem.eigenvalues[2:].reshape(1, 3)
    found = log_marginal_likelihood(
        problem.log_likelihood(theta), parts, [theta[:1], theta[1:]], precision
    )
    assert found == pytest.approx(problem.evidence(precision), rel=1e-9)


def test_alternating_mode_and_precision_ends_at_the_best_evidence_of_the_regression():
    problem, precision = Regression(), 1.0
    for _ in range(60):
        precision = best_precision([problem.eigenvalues], [problem.mode(precision)])
    best = minimize_scalar(
        lambda log: -problem.evidence(math.exp(log)), bounds=(-5, 10), options={"xatol": 1e-9}
    )
    assert math.log(precision) == pytest.approx(best.x, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 10.0])
def test_the_best_precision_is_where_a_search_finds_it(scale):
    eigenvalues = [10 ** (4 * torch.rand(3, 4) - 2), torch.zeros(7)]
    theta = [scale * torch.randn(3, 4), scale * torch.randn(7)]
    found = minimize_scalar(
        lambda log: -log_marginal_likelihood(0.0, eigenvalues, theta, math.exp(log)),
        bounds=[math.log(bound) for bound in PRECISIONS],
        options={"xatol": 1e-9},
    )
    ours = best_precision(eigenvalues, theta)
    assert math.log(ours) == pytest.approx(found.x, abs=1e-4)
    gamma = sum((e.double() / (e.double() + ours)).sum() for e in eigenvalues)
    norm = sum(t.double().square().sum() for t in theta)
    assert ours * norm.item() == pytest.approx(gamma.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("eigenvalue", "mean", "bound"), [(1.0, 0.0, 1), (0.0, 1.0, 0), (0.0, 0.0, 0)]
)
def test_without_an_optimum_the_best_precision_is_a_bound(eigenvalue, mean, bound):
    ours = best_precision([torch.full((3,), eigenvalue)], [torch.full((3,), mean)])
    assert ours == pytest.approx(PRECISIONS[bound], rel=1e-9)
    assert PRECISIONS[0] <= ours <= PRECISIONS[1]
