"""Convolutions and embeddings: adapted where they are named, as PEFT adapts them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from problems import SIZES, arguments, bert, llama, tokens
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import FlatFactors, attach, bind
from pyrolora.errors import ConfigError, TargetError
from pyrolora.guides import MAP, Flat, Laplace, MonteCLoRA
from pyrolora.inference import kfac
from pyrolora.model import build
from pyrolora.tasks import task_for

PICTURES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6) % 3


class Pictures(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": PICTURES[index], "labels": LABELS[index]}


def convnext() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    config = ConvNextConfig(**sizes, num_labels=3, layer_scale_init_value=1.0)
    network = ConvNextForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network


def texts(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        network.get_input_embeddings().weight.normal_()
    return network.eval()


IDS = torch.tensor(tokens(6)["input_ids"])


def scores(network: nn.Module) -> Tensor:
    """log p of each example's label, or of its tokens after the first."""
    with torch.no_grad():
        if isinstance(network, ConvNextForImageClassification):
            logits = network.eval()(pixel_values=PICTURES).logits.log_softmax(-1)
            return logits.gather(-1, LABELS[:, None])[:, 0]
        logits = network.eval()(input_ids=IDS).logits.log_softmax(-1)
        return logits[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0].sum(1)


def written(network: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], k: int) -> nn.Module:
    network = copy.deepcopy(network).requires_grad_(False)
    for name, pair in factors.items():
        A, B = (factor[k] if factor.dim() == 3 else factor for factor in pair)
        layer = network.get_submodule(name)
        update = 4.0 * (B @ A)
        update = update.T if isinstance(layer, nn.Embedding) else update
        layer.weight.add_(update.view_as(layer.weight))
    return network


CASES = {
    # Stems that are convolutions, strided, and a linear layer.
    "convnext": (convnext, Pictures(), ["patch_embeddings", "downsampling_layer.1", "pwconv1"]),
    # Embeddings of tokens that the output layer is tied to, and queries.
    "llama": (
        lambda: texts(llama(tie_word_embeddings=False)),
        [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in IDS],
        ["embed_tokens", "q_proj"],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    make, data, names = CASES[request.param]
    config = AdapterConfig(r=2, lora_alpha=8, target_modules=names, modules_to_save=[])
    args = arguments(tmp_path_factory.mktemp("fit"), max_steps=2, learning_rate=2e-2)
    guide = MonteCLoRA(units="one", scale_updates="gradient")
    task = "classification" if request.param == "convnext" else None
    return make(), data, pyrolora.fit(make(), data, guide, adapter=config, training=args, task=task)


def test_mean_and_draws_are_those_of_networks_with_the_updates_in_their_weights(
    fitted: Any, tmp_path: Path
) -> None:
    network, data, posterior = fitted
    mean = scores(written(network, posterior.factors(), 0))
    assert (mean - scores(network)).abs().max() > 0.01
    torch.testing.assert_close(posterior.log_likelihood(data, 0)[0], mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores(posterior.merge()), mean, atol=1e-4, rtol=0)
    drawn = posterior.factors(posterior.sample(3, seed=3))
    expected = torch.stack([scores(written(network, drawn, k)) for k in range(3)])
    assert expected.std(0).max() > 0.02
    found = posterior.log_likelihood(data, 3, seed=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path, copy.deepcopy(network))
    assert torch.equal(again.log_likelihood(data, 3, seed=3), found)


def test_draws_share_a_pass(fitted: Any) -> None:
    """Patches, positions and tokens have examples outermost."""
    posterior = fitted[2]
    data = posterior.model.attachment.network
    batch = {"pixel_values": PICTURES} if hasattr(data, "convnext") else {"input_ids": IDS}
    assert posterior.model.together({**batch, "labels": LABELS})


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_peft_computes_the_same_and_its_adapters_are_read(fitted: Any, tmp_path: Path) -> None:
    network, _, posterior = fitted
    posterior.to_peft(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "ours")
    expected = scores(posterior.merge())
    torch.testing.assert_close(scores(theirs.get_base_model()), expected, atol=1e-4, rtol=0)
    again = pyrolora.from_peft(tmp_path / "ours", copy.deepcopy(network), task=posterior.task.name)
    torch.testing.assert_close(scores(again.merge()), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    has_embeddings = "model.embed_tokens" in posterior.bank.specs
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=has_embeddings)
    read = pyrolora.from_peft(tmp_path / "theirs", copy.deepcopy(network), task=posterior.task.name)
    torch.testing.assert_close(
        scores(read.merge()), scores(theirs.get_base_model()), atol=1e-4, rtol=0
    )
    if has_embeddings:
        other = copy.deepcopy(network)
        with torch.no_grad():
            other.get_input_embeddings().weight[3, 3] += 1
        with pytest.raises(ConfigError, match=r"embed_tokens.*this network has another one"):
            pyrolora.from_peft(tmp_path / "theirs", other)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6)),
        (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1, bias=False), (2, 3, 9)),
    ],
)
def test_the_update_of_a_convolution_and_its_curvature(layer: Any, inputs: Any) -> None:
    """Against a convolution with s B A in its weight; KFAC's X is the mean over all patches."""
    torch.manual_seed(0)
    network = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(inputs)
    network(x)
    config = AdapterConfig(r=2, target_modules=["0"])
    joint = build(
        network, attach(network, config), config, MAP(), task_for(network, "classification"), 1
    )
    bank = joint.program.bank
    spec = bank.specs["0"]
    with torch.no_grad():
        for name in ("A_loc", "B_loc"):
            bank.get_parameter(name).normal_()
    A, B = bank.matrices(bank.means())["0"]
    plain = layer()
    plain.load_state_dict(network[0].state_dict())
    with torch.no_grad(), bind(joint.binding(bank.means())):
        adapted = network[0](x)
        plain.weight.add_((spec.scaling * B @ A).view_as(plain.weight))
    torch.testing.assert_close(adapted, plain(x), atol=1e-4, rtol=1e-4)
    found = kfac(joint, [{"inputs": x, "labels": torch.tensor([0, 1])}])["0.A"]
    assert found.columns.shape == (spec.in_features, spec.in_features)


def test_an_embedding_of_draws_gives_each_block_its_own_and_padding_no_gradient() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 2))
    config = AdapterConfig(r=2, target_modules=["0"])
    joint = build(
        network, attach(network, config), config, MAP(), task_for(network, "classification"), 1
    )
    bank = joint.program.bank
    x = torch.tensor([[1, 2, 0], [8, 2, 3]])
    A = torch.randn(2, bank.layouts["A"].total, requires_grad=True)
    B = torch.randn(2, bank.layouts["B"].total)
    factors = FlatFactors(A, B)
    with bind(joint.binding(factors, rows=4)):
        both = network[0](x.repeat(2, 1))
    for k in range(2):
        with bind(joint.binding(factors[k])):
            torch.testing.assert_close(both[2 * k : 2 * k + 2], network[0](x))
    both.sum().backward()
    assert not A.grad.view(2, 2, 9)[..., 0].any()
    assert A.grad.view(2, 2, 9)[..., [1, 2, 3, 8]].all()


def test_a_scaled_embedding_scales_its_update() -> None:
    """As with s B A in its weight."""
    torch.manual_seed(0)
    network = nn.Sequential(BartScaledWordEmbedding(9, 4, 0, embed_scale=3.0), nn.Linear(4, 2))
    config = AdapterConfig(r=2, target_modules=["0"])
    joint = build(
        network, attach(network, config), config, MAP(), task_for(network, "classification"), 1
    )
    bank = joint.program.bank
    with torch.no_grad():
        bank.get_parameter("B_loc").normal_()
    A, B = bank.matrices(bank.means())["0"]
    plain, x = copy.deepcopy(network[0].base_layer), torch.tensor([[1, 2, 0]])
    with torch.no_grad(), bind(joint.binding(bank.means())):
        found = network[0](x)
        plain.weight.add_((bank.specs["0"].scaling * B @ A).T)
    torch.testing.assert_close(found, plain(x))


def test_the_first_a_of_an_embedding_does_not_shrink_with_the_vocabulary() -> None:
    """A product takes one column: its size is that of a layer with one input."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(4000, 4), nn.Linear(4, 2))
    config = AdapterConfig(r=2, target_modules=["0"])
    bank = build(
        network, attach(network, config), config, MAP(), task_for(network, "classification"), 1
    ).program.bank
    A = bank.get_parameter("A_loc")
    assert 0.99 < A.abs().max() <= 1.0
    assert bank.layouts["A"].fan_in().tolist() == [1.0]


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), "Conv2d, and has groups of channels"),
        (lambda: nn.Conv2d(4, 4, 3, dilation=2), "Conv2d, and has a dilation"),
        (lambda: nn.Conv1d(4, 4, 3, padding="same"), "Conv1d, and pads by 'zeros', 'same'"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "Embedding, and rescales its rows"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
            "ParametrizedConv1d, and has a weight that is made anew",
        ),
    ],
)
def test_layers_that_compute_something_else_are_refused_by_name(layer: Any, said: str) -> None:
    network = nn.ModuleDict({"a": layer(), "b": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match=f"'a' is of the class {said}"):
        attach(network, AdapterConfig(r=2, target_modules=["a", "b"]))


def test_one_that_is_named_alone_is_said_to_be_refused() -> None:
    network = nn.ModuleDict({"a": nn.Embedding(4, 4, max_norm=1.0), "b": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="no linear layer of ModuleDict; 'a' is of the class Emb"):
        attach(network, AdapterConfig(r=2, target_modules=["a"]))


def test_rules_do_not_take_them() -> None:
    config = AdapterConfig(r=2, target_modules="all-linear")
    names = [spec.name for spec in attach(convnext(), config).specs]
    assert all("pwconv" in name for name in names)
    assert "embed_tokens" not in str(attach(llama(), AdapterConfig(r=2)).specs)


def test_curvature_of_embeddings_and_noise_of_convolutions_are_refused(
    steps: list[int], tmp_path: Path
) -> None:
    args = arguments(tmp_path, max_steps=1)
    config = AdapterConfig(r=2, target_modules=["word_embeddings", "query"])
    with pytest.raises(ConfigError, match=r"embeddings have none .*word_embeddings'; leave them"):
        pyrolora.fit(bert(**SIZES), tokens(), Laplace(), adapter=config, training=args)
    assert not steps
    config = AdapterConfig(r=2, target_modules=["patch_embeddings"], modules_to_save=[])
    with pytest.raises(ConfigError, match=r"weight noise knows .* and Conv2d computes"):
        pyrolora.fit(
            convnext(), Pictures(), Flat(), adapter=config, training=args, task="classification"
        )
