"""Layers that training calls, leaves out, or does not move, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from problems import arguments, bert, mlp, tokens
from torch import Tensor, nn
from transformers import BartConfig, BartForCausalLM, OPTConfig, OPTForCausalLM

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import BindingError, PyroLoraError
from pyrolora.model import evaluating

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
OPTIONS = {"task": "classification", "epochs": 1, "batch_size": 4}
EVERY_LAYER = AdapterConfig(r=2, target_modules="all-linear")
IDS = torch.randint(4, 29, (8, 6), generator=torch.Generator().manual_seed(0))
SIZES = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}


class Cut(nn.Module):
    """Nothing behind the first layer passes a gradient on to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).detach())


@pytest.mark.parametrize("guide", ["map", "montec", "ensemble"])
def test_an_adapter_that_no_gradient_reaches_is_named(guide: str) -> None:
    adapter = AdapterConfig(r=2, target_modules=["first", "second"])
    with pytest.warns(UserWarning, match="adapters of 1 of 2 layers, 'first': no gradient"):
        pyrolora.fit(Cut(), (X, Y), guide, adapter=adapter, **OPTIONS)


def test_a_learning_rate_of_zero_is_the_reason_where_it_is_zero(tmp_path) -> None:
    args = arguments(tmp_path, learning_rate=0.0, max_steps=1)
    with pytest.warns(UserWarning, match=r"2 of 2 layers, '0', '2': the learning rate is 0"):
        pyrolora.fit(
            mlp(), (X, Y), "map", task="classification", adapter=EVERY_LAYER, training=args
        )


def test_a_warm_up_that_has_only_begun_is_the_reason(tmp_path) -> None:
    args = arguments(tmp_path, learning_rate=0.1, warmup_steps=5, max_steps=1)
    with pytest.warns(UserWarning, match=r"2 of 2 layers, '0', '2': the learning rate is 0"):
        pyrolora.fit(
            mlp(), (X, Y), "map", task="classification", adapter=EVERY_LAYER, training=args
        )


@pytest.mark.parametrize("guide", ["map", "montec"])
def test_a_step_without_any_layer_is_a_step_without_gradient(guide: str) -> None:
    """As where layerdrop leaves out all of them."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.calls = nn.Linear(4, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return x[:, :3] if self.training and self.calls % 2 else self.first(x)

    adapter = AdapterConfig(r=2, target_modules=["first"])
    posterior = pyrolora.fit(Dropped(), (X, Y), guide, adapter=adapter, **OPTIONS)
    assert posterior.factors(posterior.sample(1))["first"][1].norm() > 0


@pytest.mark.parametrize("guide", ["laplace", "flat+montec"])
def test_layers_that_moved_are_not_mentioned(guide: str) -> None:
    """A warning would fail the test."""
    pyrolora.fit(bert(initializer_range=0.3), tokens(), guide, eval_data=tokens(), epochs=1)


def test_layers_of_a_pattern_that_inputs_do_not_use_have_no_adapter() -> None:
    network = BartForCausalLM(BartConfig(vocab_size=30, max_position_embeddings=16, **SIZES))
    with pytest.warns(UserWarning, match=r"8 of 20 selected layers .*#.encoder_attn.k_proj'"):
        posterior = pyrolora.fit(network, (IDS,), "map", adapter=EVERY_LAYER, epochs=1)
    assert len(posterior.bank.specs) == 12
    assert not any("encoder_attn" in name for name in posterior.bank.specs)
    assert type(network.model.decoder.layers[0].encoder_attn.k_proj) is nn.Linear


def test_layers_left_out_by_chance_are_no_error() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    config = OPTConfig(vocab_size=30, num_hidden_layers=3, layerdrop=0.5, **sizes)
    posterior = pyrolora.fit(
        OPTForCausalLM(config), (IDS,), pyrolora.guides.MeanField(draws_per_batch=2),
        adapter=EVERY_LAYER, epochs=4, batch_size=4,
    )  # fmt: skip
    assert posterior.predict((IDS,), 2).log_likelihood.isfinite().all()


@pytest.mark.filterwarnings("ignore:'all-linear' adapts linear layers")
def test_layers_that_torchs_fast_path_would_read_are_called() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.encoder(x).mean(1))

    texts = torch.randn(12, 5, 8)
    adapter = AdapterConfig(r=2, target_modules="all-linear", modules_to_save=["out"])
    posterior = pyrolora.fit(Encoder(), (texts, Y), adapter=adapter, **OPTIONS)
    assert [name.rpartition(".")[2] for name in posterior.bank.specs] == ["linear1", "linear2"]
    draws = posterior.predict((texts,), 3).draws
    assert (draws[0] - draws[1]).abs().max() > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_of_ours_in_a_traced_model_has_no_table_of_sites() -> None:
    from pyro import poutine

    posterior = pyrolora.fit(mlp(), (X, Y), adapter=EVERY_LAYER, **OPTIONS)
    posterior.detach()
    with pytest.raises(BindingError) as caught:
        poutine.trace(posterior.model).get_trace({"inputs": X, "labels": Y})
    assert "Trace Shapes" not in str(caught.value)
    assert str(PyroLoraError("one\nTrace Shapes:\n Param Sites:")) == "one"


class Repacking(nn.Module):
    """Like a layer of bitsandbytes on a CPU: evaluation mode repacks its weight for good."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), False)
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        self.packed = self.packed or not self.training
        return (x.detach() if self.packed else x) @ self.weight.to(x.dtype)


def test_no_pass_of_ours_lets_quantised_layers_repack_their_weights() -> None:
    """The layer in front would have no gradient, and its B would stay."""
    network = nn.Sequential(nn.Linear(4, 4), Repacking(), nn.Tanh(), nn.Linear(4, 3))
    adapter = AdapterConfig(r=2)
    posterior = pyrolora.fit(network, (X, Y), "map", eval_data=(X, Y), adapter=adapter, **OPTIONS)
    assert all(B.norm() > 0 for _, B in posterior.factors().values())
    posterior.predict((X,))
    assert not network[1].packed
    with evaluating(network):
        assert network[1].base_layer.training
        assert not network[2].training
