"""Compiled networks give the numbers of plain ones, in few graphs, and stay as they were."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import arguments, bert, llama, mlp, tokens
from torch import nn

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import AdapterLayer, HeadSlot, bind
from pyrolora.adapters import compiled as compiled_code
from pyrolora.adapters.compiled import UNBOUND
from pyrolora.errors import ConfigError
from pyrolora.guides import MonteCLoRA

# The compiler looks at the gradients of its inputs, which factors have none of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

GUIDE = MonteCLoRA(sample_scale=2.0, init_covariance=1.0)
OPTIONS = {"adapter": AdapterConfig(r=2)}
DATA = tokens(16)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Counting:
    """A compiler that counts its graphs, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module


COUNTING = Counting()
torch._dynamo.register_backend(COUNTING, name="counting")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    COUNTING.graphs = 0
    yield
    torch._dynamo.reset()


def breaks():
    return dict(torch._dynamo.utils.counters["graph_break"])


def network():
    return bert(initializer_range=0.3, num_hidden_layers=1)


def fitted(model, guide=GUIDE, data=DATA, **options):
    return pyrolora.fit(model, data, guide, training=arguments("unused", **options), **OPTIONS)


def assert_same(one, other, **tolerance):
    states = [p.model.own_state() for p in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, **(tolerance or CLOSE))


@pytest.fixture(scope="module")
def plain():
    return fitted(network())


def wrapped(model, backend=COUNTING):
    return torch.compile(model, backend=backend)


def in_place(model, backend=COUNTING):
    model.compile(backend=backend)
    return model


def one_layer(model, backend=COUNTING):
    model.bert.encoder.layer[0].compile(backend=backend)
    return model


def forward(model, backend=COUNTING):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in (in_place, one_layer, forward)]


@pytest.mark.parametrize("compiled", [wrapped, *SLOW])
def test_a_compiled_network_gives_the_numbers_of_a_plain_one(compiled, plain, tmp_path):
    model = compiled(network())
    calls = [m._compiled_call_impl for m in model.modules()]
    posterior = fitted(model)
    assert COUNTING.graphs == 1
    assert not breaks()
    assert_same(plain, posterior)
    expected = plain.predict(DATA, 3, seed=0)
    torch.testing.assert_close(posterior.predict(DATA, 3, seed=0).draws, expected.draws, **CLOSE)
    assert COUNTING.graphs == 2  # one for the training, one for several draws
    assert posterior.evaluate(DATA, 3, seed=0)["nll"] == pytest.approx(
        plain.evaluate(DATA, 3, seed=0)["nll"], rel=1e-5
    )
    posterior.save(tmp_path / "run")
    posterior.to_peft(tmp_path / "peft")
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"_orig_mod" not in file.read_bytes(), file
    merged = posterior.merge()
    assert merged(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 2)
    for name, value in plain.merge().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, **CLOSE)
    with ThreadPoolExecutor(4) as pool:
        seeds = [0, 1, None] * 4
        found = [*pool.map(lambda s: posterior.predict(DATA, 3, seed=s).draws, seeds)]
    other = plain.predict(DATA, 3, seed=1)
    assert not torch.allclose(other.draws, expected.draws)
    for seed, draws in zip(seeds, found, strict=True):
        if seed is not None:
            torch.testing.assert_close(draws, (expected, other)[seed].draws, **CLOSE)
    assert COUNTING.graphs == 2
    again = pyrolora.load(tmp_path / "run", compiled(network()))
    torch.testing.assert_close(again.predict(DATA, 3, seed=0).draws, expected.draws, **CLOSE)
    assert not any(bound(m) for m in layers(posterior))
    posterior.detach()
    assert not any(isinstance(m, AdapterLayer | HeadSlot) for m in model.modules())
    assert [m._compiled_call_impl for m in model.modules()] == calls


@pytest.mark.slow
def test_a_fit_beside_predictions_on_its_compiled_network_is_the_fit_alone():
    model = network()
    served = fitted(wrapped(model))
    expected = served.predict(DATA, 3, seed=0).draws
    alone = fitted(model, max_steps=12)
    with ThreadPoolExecutor(3) as pool:
        fit = pool.submit(fitted, wrapped(model), max_steps=12)
        found = [*pool.map(lambda _: served.predict(DATA, 3, seed=0).draws, range(20))]
        assert_same(alone, fit.result())
    for draws in found:
        torch.testing.assert_close(draws, expected, **CLOSE)


def test_a_fit_gives_way_without_the_lock_of_compiled_code(monkeypatch):
    free = []

    def look(*_):
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(compiled_code._lock.acquire, blocking=False).result())
            other.submit(compiled_code._lock.release)

    monkeypatch.setattr("pyrolora.inference.run.give_way", look)
    pyrolora.fit(
        in_place(mlp(), "eager"),
        (torch.randn(6, 4), torch.arange(6) % 3),
        MonteCLoRA(head="gaussian"),
        task="classification",
        training=arguments("unused", max_steps=1),
        adapter=AdapterConfig(r=2, modules_to_save=["2"]),
    )
    assert free
    assert all(free)


def test_the_trainer_s_arguments_compile_the_network_for_the_fit(plain):
    model = network()
    posterior = fitted(model, torch_compile=True, torch_compile_backend="counting")
    assert COUNTING.graphs == 1
    assert not breaks()
    assert_same(plain, posterior)
    posterior.predict(DATA, 3, seed=0)
    assert COUNTING.graphs == 1
    assert not any(m._compiled_call_impl for m in model.modules())
    assert not any(bound(m) for m in layers(posterior))


def bound(wrapper):
    shown = wrapper.shown or UNBOUND
    return shown.bound or shown.several or getattr(wrapper, "called", False)


def layers(posterior):
    return [m for m in posterior.base.modules() if isinstance(m, AdapterLayer | HeadSlot)]


def test_arguments_that_torch_does_not_know_are_refused(steps):
    for options in ({"torch_compile_backend": "none such"}, {"torch_compile_mode": "fast"}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}=.*not known.*'"):
            fitted(network(), torch_compile=True, **options)
    ignored = {"torch_compile_backend": "eager", "torch_compile_mode": "max-autotune"}
    with pytest.raises(ConfigError, match=r"mode='max-autotune' has no effect with .*'eager'"):
        fitted(network(), **ignored)
    assert not steps


@pytest.mark.slow
def test_arguments_beside_a_compiled_network_warn():
    with pytest.warns(UserWarning, match="'counting'.*compiled already"):
        fitted(wrapped(network(), "eager"), max_steps=1, torch_compile_backend="counting")
    assert COUNTING.graphs == 0


def test_a_wrapper_in_place_of_a_part_is_refused(plain, tmp_path, steps):
    model = network()
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    plain.save(tmp_path / "run")
    for use in (
        lambda: fitted(model),
        lambda: pyrolora.load(tmp_path / "run", model),
        lambda: pyrolora.from_peft(tmp_path / "run", model),
    ):
        with pytest.raises(ConfigError, match=r"network\.bert\.encoder\.layer\.0\._orig_mod back"):
            use()
    assert not steps


GUIDES = {
    **{name: name for name in pyrolora.guides.available()},
    "nuts": pyrolora.guides.NUTS(num_samples=4, warmup_steps=2, max_tree_depth=2),
    "flat+montec": "flat+montec",
}


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_gives_the_numbers_of_a_plain_network(guide):
    adapts = pyrolora.guides.as_guide(GUIDES[guide]).adapts
    both = [
        pyrolora.fit(
            model,
            (torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3),
            GUIDES[guide],
            task="classification",
            training=arguments("unused"),
            adapter=AdapterConfig(r=2) if adapts else None,
        )
        for model in (mlp(), wrapped(mlp(), "aot_eager"))
    ]
    draws = [posterior.predict(torch.ones(3, 4), 2, seed=0).draws for posterior in both]
    # Rounding turns the eigenvectors of laplace, and its draws with them.
    torch.testing.assert_close(*draws, rtol=1e-4, atol=1e-2 if guide == "laplace" else 1e-5)


@pytest.mark.slow
def test_lengths_and_draws_and_steps_share_few_graphs():
    posterior = fitted(wrapped(network()))
    for length in (5, 6, 7, 9, 10, 12):
        for draws in (1, 2, 3, 4):
            posterior.predict(tokens(4, length), draws, seed=0)
    assert COUNTING.graphs <= 7
    assert not breaks()
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_a_compiled_language_model_writes_what_a_plain_one_writes(compiled):
    texts = DATA.remove_columns("labels")
    both = [fitted(model, data=texts) for model in (llama(), compiled(llama(), "eager"))]
    prompt = torch.tensor([[4, 5, 6]])
    for options in ({}, {"num_beams": 2}):
        written = [p.generate(prompt, 2, seed=0, max_new_tokens=4, **options) for p in both]
        assert torch.equal(written[0].sequences, written[1].sequences)
    for posterior in both:
        posterior.temperature = 3.0
    drawn = [p.generate(prompt, 2, seed=0, max_new_tokens=4, do_sample=True) for p in both]
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert both[1].base._forward_hooks == {}


def test_gradients_are_those_of_the_plain_network():
    gradients = []
    for compiled in (False, True):
        posterior = fitted(network(), max_steps=1)
        joint = posterior.model
        if compiled:
            in_place(joint.base, "aot_eager")
        factors = joint.program.bank.means()
        factors.A.requires_grad_(True)
        batch = {k: torch.tensor(DATA[k]) for k in ("input_ids", "attention_mask")}
        output = joint.network(batch, factors)
        gradients.append(torch.autograd.grad(output.square().sum(), [factors.A, factors.B]))
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-6


def test_code_that_the_caller_compiles_around_the_posterior_sees_the_factors():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    data, training = (x, torch.arange(6) % 3), arguments("unused", max_steps=2)
    posterior = pyrolora.fit(
        mlp(), data, GUIDE, task="classification", training=training, **OPTIONS
    )
    joint = posterior.model
    factors = joint.program.mean()
    with torch.no_grad():
        with bind(joint.binding(factors)):
            expected = joint.base(x)
            found = torch.compile(joint.base, backend="eager")(x)
        assert not torch.allclose(joint.base(x), expected)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_checkpointing_keeps_the_numbers(plain):
    posterior = fitted(wrapped(network()), gradient_checkpointing=True)
    assert_same(plain, posterior)


@pytest.mark.slow
def test_the_compiler_of_a_network_goes_with_it():
    model = network()
    seen = weakref.ref(model)
    posterior = fitted(wrapped(model), max_steps=1)
    copied = copy.deepcopy(posterior.base)
    assert copied._compiled_call_impl is None
    del model, posterior, copied
    torch._dynamo.reset()
    gc.collect()
    assert seen() is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_numbers(plain):
    posterior = fitted(network(), torch_compile=True)
    assert_same(plain, posterior, rtol=1e-3, atol=1e-4)
    in_place(posterior.base, "inductor")
    expected = plain.predict(DATA, 3, seed=0).draws
    torch.testing.assert_close(
        posterior.predict(DATA, 3, seed=0).draws, expected, rtol=1e-3, atol=1e-4
    )
    assert isinstance(posterior.base, nn.Module)
