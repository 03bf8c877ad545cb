"""Wrapping changes nothing that the network's own code or files see; detaching restores it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from problems import SIZES, batch_of, bert, gpt2, llama, mlp, tokens
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from pyrolora.adapters import AdapterLayer, Binding, Factors, HeadSlot, attach, bind, unwrap
from pyrolora.adapters.config import AdapterConfig
from pyrolora.errors import TargetError

CONFIG = AdapterConfig(r=2)
ALL = AdapterConfig(r=2, target_modules="all-linear")


def roberta():
    """Its head is a module with two linear layers inside."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RobertaConfig(**SIZES, **dropout, pad_token_id=0)
    return RobertaForSequenceClassification(config).eval()


BUILDERS = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": llama}


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS.keys())
def network(request):
    return request.param()


def modules(network):
    return dict(network.named_modules(remove_duplicate=False))


def assert_same_objects(network, before):
    after = modules(network)
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())


def values(network):
    return {name: t.clone() for name, t in network.state_dict().items()}


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def outputs(network):
    batch = batch_of(tokens(4))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        return network(input_ids=ids, attention_mask=mask, output_hidden_states=True)


def random_binding(attachment, seed=0):
    """Factors for every layer of the attachment, large enough to change the output."""
    generator = torch.Generator().manual_seed(seed)
    return Binding(
        {
            attachment.layers[spec.name]: Factors(
                torch.randn(spec.rank, spec.in_features, generator=generator),
                torch.randn(spec.rank, spec.out_features, generator=generator),
            )
            for spec in attachment.specs
        }
    )


def bound_logits(network, attachment, seed=0):
    with bind(random_binding(attachment, seed)):
        return outputs(network).logits


def attach_or_refusal(network, config):
    """(attachment, None), or (None, the message of the TargetError)."""
    try:
        return attach(network, config), None
    except TargetError as error:
        return None, str(error)


# While wrapped ---------------------------------------------------------------------------------


def test_keys_and_tensors_of_the_state_dict_are_unchanged_while_wrapped(network):
    before = {name: t.data_ptr() for name, t in network.state_dict().items()}
    attach(network, ALL)
    after = {name: t.data_ptr() for name, t in network.state_dict().items()}
    assert list(after.items()) == list(before.items())


def test_a_state_dict_with_a_prefix_is_unchanged_while_wrapped():
    outer = nn.ModuleDict({"net": bert()})
    before = list(outer.state_dict(prefix="outer."))
    attach(outer["net"], ALL)
    assert list(outer.state_dict(prefix="outer.")) == before


def test_named_outputs_are_bit_identical_while_wrapped(network):
    before = outputs(network)
    attach(network, ALL)
    after = outputs(network)
    assert list(after) == list(before)
    assert torch.equal(after.logits, before.logits)
    assert all(map(torch.equal, after.hidden_states, before.hidden_states))


def test_bound_factors_change_the_output_and_the_plain_call_after_it_does_not(network):
    before = outputs(network).logits
    attachment = attach(network, CONFIG)
    assert not torch.allclose(bound_logits(network, attachment), before, atol=1e-3)
    assert torch.equal(outputs(network).logits, before)


def test_the_networks_parameters_take_no_gradient_while_wrapped(network):
    attach(network, CONFIG)
    assert not any(p.requires_grad for p in network.parameters())


def test_wrappers_are_in_the_mode_of_what_they_wrap():
    network = bert().train()
    network.bert.encoder.layer[0].eval()
    attach(network, CONFIG)
    assert not network.bert.encoder.layer[0].attention.self.query.training
    assert network.bert.encoder.layer[1].attention.self.query.training
    assert network.classifier.training


def test_a_state_dict_loads_while_wrapped(network):
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    expected = values(other)
    attachment = attach(network, ALL)
    result = network.load_state_dict(expected)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(network.state_dict(), expected)
    attachment.detach()
    assert_same_state(network.state_dict(), expected)


def test_a_state_dict_loads_by_assignment_while_wrapped():
    network, expected = bert(), values(bert(seed=1))
    attachment = attach(network, ALL)
    network.load_state_dict(expected, assign=True)
    attachment.detach()
    assert_same_state(network.state_dict(), expected)


def test_loading_does_not_change_the_callers_dictionary():
    network, state = bert(), values(bert(seed=1))
    keys = list(state)
    attach(network, ALL)
    network.load_state_dict(state)
    assert list(state) == keys


@pytest.mark.parametrize("builder", [bert, roberta])
def test_missing_and_unexpected_keys_are_reported_by_their_own_names_while_wrapped(builder):
    network = builder()
    state = values(network)
    prefix = f"{network.base_model_prefix}.encoder.layer.0.attention.self.query"
    head = next(key for key in state if key.startswith("classifier"))
    for key in (f"{prefix}.weight", head):
        del state[key]
    state |= {f"{prefix}.extra": torch.zeros(1), "classifier.extra": torch.zeros(1)}
    expected = builder().load_state_dict(state, strict=False)

    attach(network, ALL)
    actual = network.load_state_dict(state, strict=False)

    assert sorted(actual.missing_keys) == sorted(expected.missing_keys)
    assert sorted(actual.unexpected_keys) == sorted(expected.unexpected_keys)
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict(state)


def test_a_folder_saved_while_wrapped_loads_as_a_plain_network(network, tmp_path):
    expected, logits = values(network), outputs(network).logits
    attach(network, ALL)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path).eval()
    assert not any(isinstance(m, AdapterLayer | HeadSlot) for m in loaded.modules())
    assert_same_state(loaded.state_dict(), expected)
    assert torch.equal(outputs(loaded).logits, logits)


def test_a_deepcopy_of_a_wrapped_network_is_independent(network):
    attachment = attach(network, ALL)
    twin = copy.deepcopy(network)
    expected = outputs(network).logits
    assert_same_state(twin.state_dict(), network.state_dict())
    assert not {id(m) for m in twin.modules()} & {id(m) for m in network.modules()}
    # What is bound to the original's layers is not bound to the copy's.
    with bind(random_binding(attachment)):
        assert torch.equal(outputs(twin).logits, expected)
        assert not torch.equal(outputs(network).logits, expected)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(outputs(network).logits, expected)


def test_unwrap_makes_a_plain_network_of_a_deepcopy_and_leaves_the_original_wrapped(network):
    before = list(network.named_modules())
    attachment = attach(network, ALL)
    twin = copy.deepcopy(network)
    unwrap(twin)
    assert [(n, type(m)) for n, m in twin.named_modules()] == [(n, type(m)) for n, m in before]
    assert all(isinstance(network.get_submodule(name), AdapterLayer) for name in attachment.layers)


def test_a_deepcopy_of_a_wrapped_network_can_be_attached_and_detached_on_its_own():
    network = bert()
    plain = [(name, type(module)) for name, module in network.named_modules()]
    first = attach(network, CONFIG)
    twin = copy.deepcopy(network)
    second = attach(twin, CONFIG)
    logits = outputs(network).logits
    assert torch.equal(bound_logits(twin, second), bound_logits(network, first))
    second.detach()
    assert [(name, type(module)) for name, module in twin.named_modules()] == plain
    assert torch.equal(outputs(twin).logits, logits)
    assert not torch.equal(bound_logits(network, first), logits)


def test_a_deepcopy_of_a_wrapped_network_has_the_flags_of_the_copy_back():
    """The copy was frozen when it was made; detaching restores that, for all of its parameters."""
    network = bert()
    attach(network, CONFIG)
    twin = copy.deepcopy(network)
    attach(twin, CONFIG).detach()
    assert len({p.requires_grad for p in twin.parameters()}) == 1


# Detaching -------------------------------------------------------------------------------------


def test_detach_restores_the_very_same_module_objects(network):
    before, expected = modules(network), values(network)
    attachment = attach(network, ALL)
    assert any(isinstance(m, AdapterLayer) for m in network.modules())
    attachment.detach()
    assert not attachment.attached
    assert_same_objects(network, before)
    assert_same_state(network.state_dict(), expected)


def test_detach_restores_the_very_same_parameters_and_their_gradient_flags(network):
    for i, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    before = {n: (id(p), p.requires_grad) for n, p in network.named_parameters()}
    attach(network, ALL).detach()
    after = {n: (id(p), p.requires_grad) for n, p in network.named_parameters()}
    assert after == before
    assert len({flag for _, flag in after.values()}) == 2


def test_detach_restores_a_plain_network():
    network = mlp()
    before = modules(network)
    attachment = attach(network, AdapterConfig(r=2))
    assert isinstance(network[0], AdapterLayer)
    assert isinstance(network[2], AdapterLayer)
    attachment.detach()
    assert_same_objects(network, before)


def test_detaching_twice_is_harmless(network):
    before = modules(network)
    first = attach(network, CONFIG)
    first.detach()
    first.detach()
    assert_same_objects(network, before)
    # Nor does it undo what another posterior has done since.
    second = attach(network, CONFIG)
    first.detach()
    assert all(isinstance(network.get_submodule(name), AdapterLayer) for name in second.layers)
    assert not any(p.requires_grad for p in network.parameters())


def test_a_network_can_be_attached_again_after_detach(network):
    before = outputs(network).logits
    first = attach(network, CONFIG)
    expected = bound_logits(network, first)
    first.detach()
    second = attach(network, CONFIG)
    assert torch.equal(bound_logits(network, second), expected)
    assert torch.equal(outputs(network).logits, before)


# Two attachments -------------------------------------------------------------------------------

OVERLAPS = {
    "equal": ({"target_modules": ["query", "value"]}, {"target_modules": ["query", "value"]}),
    "overlapping": ({"target_modules": ["query", "value"]}, {"target_modules": ["value", "key"]}),
    "nested": ({"target_modules": "all-linear"}, {"target_modules": ["key"]}),
    "disjoint": (
        {"target_modules": ["query"], "modules_to_save": []},
        {"target_modules": ["key"]},
    ),
}


@pytest.mark.parametrize(
    "first_out", [True, False], ids=["first-in-first-out", "last-in-first-out"]
)
@pytest.mark.parametrize("options", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_two_attachments_are_detached_in_either_order(options, first_out):
    network = bert()
    network.bert.pooler.requires_grad_(False)
    before, plain = modules(network), outputs(network).logits
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    pair = [attach(network, AdapterConfig(r=2, **option)) for option in options]
    expected = [bound_logits(network, attachment, seed=i) for i, attachment in enumerate(pair)]
    leaving, staying = (0, 1) if first_out else (1, 0)

    pair[leaving].detach()

    # The other one works as before, and the network holds its wrappers only.
    wrapped = {n for n, m in network.named_modules() if isinstance(m, AdapterLayer | HeadSlot)}
    assert wrapped == {*pair[staying].layers, *pair[staying].heads}
    assert torch.equal(bound_logits(network, pair[staying], seed=staying), expected[staying])
    assert torch.equal(outputs(network).logits, plain)
    assert not any(p.requires_grad for p in network.parameters())

    pair[staying].detach()

    assert_same_objects(network, before)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags


def test_a_layer_that_two_attachments_target_is_wrapped_once():
    network = bert()
    first, second = attach(network, CONFIG), attach(network, ALL)
    name = first.specs[0].name
    assert first.layers[name] is second.layers[name]
    assert isinstance(first.layers[name].base_layer, nn.Linear)
    assert first.heads["classifier"] is second.heads["classifier"]


def test_two_attachments_of_different_ranks_share_a_network():
    network = bert()
    first = attach(network, AdapterConfig(r=2))
    alone = bound_logits(network, first)
    second = attach(network, AdapterConfig(r=5))
    assert torch.equal(bound_logits(network, first), alone)
    assert not torch.allclose(bound_logits(network, second), alone)


HEAD_CONFLICTS = {
    "head-first": (
        {"target_modules": ["query"]},
        {"target_modules": ["key", "classifier"], "modules_to_save": []},
    ),
    "layer-first": (
        {"target_modules": ["query", "classifier"], "modules_to_save": []},
        {"target_modules": ["key"]},
    ),
}


@pytest.mark.parametrize("options", HEAD_CONFLICTS.values(), ids=HEAD_CONFLICTS.keys())
def test_a_module_cannot_be_head_of_one_and_layer_of_another_posterior(options):
    network = bert()
    attach(network, AdapterConfig(r=2, **options[0]))
    with pytest.raises(TargetError, match=r"'classifier'.*detach\(\)"):
        attach(network, AdapterConfig(r=2, **options[1]))


@pytest.mark.parametrize("options", HEAD_CONFLICTS.values(), ids=HEAD_CONFLICTS.keys())
def test_a_refused_attachment_wraps_nothing(options):
    network = bert()
    before = modules(network)
    first = attach(network, AdapterConfig(r=2, **options[0]))
    wrapped = modules(network)
    with pytest.raises(TargetError):
        attach(network, AdapterConfig(r=2, **options[1]))
    assert_same_objects(network, wrapped)
    first.detach()
    assert_same_objects(network, before)


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("first_out", [True, False])
def test_a_head_and_an_adapted_layer_inside_of_it_are_kept_apart_or_refused(head_first, first_out):
    """RoBERTa's ``classifier`` holds ``dense``: one posterior copies the first, another adapts the
    second. Either it is refused, or detaching in either order restores the network."""
    network = roberta()
    before = modules(network)
    configs = [
        AdapterConfig(r=2, target_modules=["query"]),
        AdapterConfig(r=2, target_modules=["key", "classifier.dense"], modules_to_save=[]),
    ]
    if not head_first:
        configs.reverse()
    first = attach(network, configs[0])
    second, refusal = attach_or_refusal(network, configs[1])
    if second is None:
        assert "detach()" in refusal
        first.detach()
    else:
        inside = second if head_first else first
        assert "classifier.dense" in inside.layers
        for attachment in (first, second) if first_out else (second, first):
            attachment.detach()
    assert_same_objects(network, before)


def test_an_attachment_that_was_dropped_without_detach_is_cleaned_up_with_the_next():
    """A posterior that goes out of scope leaves wrappers; flags and modules still come back."""
    network = bert()
    before = modules(network)
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    attach(network, ALL)
    gc.collect()
    attach(network, CONFIG).detach()
    assert_same_objects(network, before)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags


def test_two_networks_are_independent():
    one, two = bert(), bert()
    first = attach(one, CONFIG)
    second = attach(two, CONFIG)
    first.detach()
    assert all(isinstance(two.get_submodule(name), AdapterLayer) for name in second.layers)
    assert not any(isinstance(m, AdapterLayer) for m in one.modules())
    assert all(p.requires_grad for p in one.parameters())
    assert not any(p.requires_grad for p in two.parameters())
