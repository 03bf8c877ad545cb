"""Every guide on an accelerator: nothing stays on the CPU, and no step waits that need not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mock_device
import pytest
import torch
from problems import arguments, bert, llama, reviews, tokenizer, tokens
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, defaults, guides, seeding
from pyrolora.adapters import AdapterBank, LaterFactors, LayerSpec
from pyrolora.adapters.weight_noise import WeightNoise
from pyrolora.guides import NUTS, SWAG, Ensemble, Flat, Laplace, MonteCLoRA

CONFIG = AdapterConfig(r=2)
VARIANTS: dict[str, guides.Guide] = {
    **{name: guides.as_guide(name) for name in guides.available()},
    "nuts": NUTS(num_samples=4, warmup_steps=2, max_tree_depth=2),
    "swag": SWAG(snapshots=2, rank=2),
    "ensemble": Ensemble(members=2),
    "members side by side": Ensemble(members=2, side_by_side=True),
    "full covariance": MonteCLoRA(
        component_prior="hierarchical", covariance="full", learn_sample_scale=True
    ),
    "several draws": MonteCLoRA(draws_per_batch=2),
    "curvature": MonteCLoRA(scale_updates="curvature"),
    "draws of Laplace": Laplace(linearised=False),
    "flat predictions": Flat(inner=MonteCLoRA(), at_prediction=True),
}
# Two more: torch's Cholesky factors look at whether they exist.
WAITS = {"lowrank": 3}
STEPPING = ["map", "montec", "meanfield", "lowrank", "dropout", "flat", "members side by side"]


class Steps(TrainerCallback):
    """The events of each training step."""

    def __init__(self) -> None:
        self.events: list[mock_device.Events] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch = mock_device.watched()
        self.events.append(self.watch.__enter__())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.__exit__(None, None, None)


def on_device(folder: Path, **changes: Any) -> TrainingArguments:
    return arguments(folder, **{"use_cpu": False, "logging_steps": 100, **changes})


def fitted(folder: Path, variant: str, network: Any = bert, **options: Any) -> pyrolora.Posterior:
    guide = VARIANTS[variant]
    options = {"adapter": CONFIG if guide.adapts else None, "training": on_device(folder)} | options
    return pyrolora.fit(network(), options.pop("data", None) or tokens(24), guide, **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # few examples say little of a fit
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_posterior_lives_on_the_device(variant: str, tmp_path: Path) -> None:
    posterior = fitted(tmp_path, variant, eval_data=tokens(8, seed=4))
    tensors = [*posterior.model.named_parameters(), *posterior.model.named_buffers()]
    assert {name for name, t in tensors if t.device.type != "mock"} == set()
    test = tokens(7)
    scores = posterior.evaluate(test, 3, seed=0)
    posterior.to_arviz(4, data=test, log_likelihood=True)
    posterior.report(tmp_path / "page.html", test, num_samples=3)
    posterior.save(tmp_path / "saved")
    for device in ("cpu", "mock"):
        again = pyrolora.load(tmp_path / "saved", bert().to(device))
        assert again.evaluate(test, 3, seed=0)["nll"] == pytest.approx(scores["nll"], rel=1e-4)
    posterior.merge()


@pytest.mark.filterwarnings("ignore:the chains of NUTS:RuntimeWarning")
@pytest.mark.parametrize(
    ("variant", "start"),
    [("nuts", "olora"), ("montec", "pissa"), ("ensemble", "lora-ga"), ("laplace", "olora")],
)
def test_a_start_from_the_weights_is_on_the_device(
    variant: str, start: Any, tmp_path: Path
) -> None:
    adapter = AdapterConfig(r=2, init_lora_weights=start)
    fitted(tmp_path, variant, lambda: bert().to("mock"), adapter=adapter)


@pytest.mark.parametrize("variant", ["montec", "flat"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_layers_are_recomputed_in_the_thread_of_the_device(variant: str, tmp_path: Path) -> None:
    options = on_device(tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2)
    posterior = fitted(tmp_path, variant, training=options)
    plain = on_device(tmp_path, gradient_accumulation_steps=2)
    again = fitted(tmp_path, variant, training=plain)
    for name, tensor in posterior.model.own_state().items():
        torch.testing.assert_close(tensor, again.model.own_state()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["montec", "flat"])
def test_a_fit_in_bfloat16(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("accelerate.accelerator.is_bf16_available", lambda *_: True)
    posterior = fitted(tmp_path, variant, training=on_device(tmp_path, bf16=True))
    assert all(tensor.isfinite().all() for tensor in posterior.model.own_state().values())


@pytest.mark.parametrize("variant", ["montec", "ensemble"])
def test_a_decoder_writes_on_the_device(variant: str, tmp_path: Path) -> None:
    posterior = fitted(
        tmp_path, variant, llama, data=reviews(16).remove_columns("label"), tokenizer=tokenizer()
    )
    texts = posterior.generate(["the film", "good"], 2, max_new_tokens=2, seed=0)
    assert texts.log_likelihood.isfinite().all()


def test_a_pass_of_prediction_waits_five_times(tmp_path: Path) -> None:
    """For the network's mask, its labels and its results; not once per layer or draw."""
    posterior, data = fitted(tmp_path, "montec"), tokens(16)
    counts = []
    for batch_size in (8, 4):  # two passes, and four
        posterior.predict(data, 4, batch_size=batch_size)
        with mock_device.watched() as events:
            posterior.predict(data, 4, batch_size=batch_size)
        counts.append(sum(events.of("wait").values()))
    assert (counts[1] - counts[0]) / 2 <= 5


@pytest.mark.parametrize("variant", STEPPING)
def test_a_step_waits_once_and_copies_nothing(variant: str, tmp_path: Path) -> None:
    """The one wait looks at all numbers of a step together, for what is not finite."""
    steps = Steps()
    fitted(tmp_path, variant, callbacks=[steps])
    step = steps.events[3]
    ours = {place: n for place, n in step.of("wait").items() if place.startswith("pyrolora")}
    assert sum(ours.values()) == WAITS.get(variant, 1), ours
    copied = {place for place in step.of("copy") if place.startswith("pyrolora")}
    assert copied == set()


def test_generators_of_the_device_are_set_back() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3, device="mock")
    torch.manual_seed(0)
    with seeding.seeded(5):
        drawn = torch.randn(3, device="mock")
    assert torch.randn(3, device="mock").tolist() == expected.tolist()
    with seeding.seeded(5):
        assert torch.randn(3, device="mock").tolist() == drawn.tolist() != expected.tolist()


def test_a_fit_and_its_draws_are_the_same_twice(tmp_path: Path) -> None:
    """Whatever was drawn on the device before: its generator starts from the seed, too."""
    states = []
    for disturbance in (1, 7):
        torch.randn(disturbance, device="mock")
        posterior = fitted(tmp_path, "dropout", training=on_device(tmp_path, seed=3))
        states.append((posterior.model.own_state(), posterior.predict(tokens(4), 3, seed=1)))
    for name, tensor in states[0][0].items():
        assert torch.equal(tensor, states[1][0][name]), name
    assert torch.equal(states[0][1].draws, states[1][1].draws)


@pytest.mark.parametrize("guide", [guides.MeanField(latent="AB"), guides.MonteCLoRA()])
def test_draws_made_some_at_a_time_do_not_depend_on_how_many(
    guide: guides.Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator's numbers cannot be cut: each draw has a seed of its own."""
    specs = [LayerSpec("a", 40, 24, 4, 1.0), LayerSpec("b", 24, 40, 4, 1.0)]
    program = guide.build(AdapterBank(specs, AdapterConfig(r=4))).to("mock")
    size = sum(parameter.nbytes for parameter in program.bank.parameters())
    drawn = []
    for at_once in (1, 2):
        monkeypatch.setattr(defaults, "DRAWN_BYTES", at_once * size)
        torch.manual_seed(1)
        later = program.drawn(5)
        assert isinstance(later, LaterFactors)
        assert later.at_once == at_once
        drawn.append(torch.cat([later[i : i + at_once].A.cpu() for i in range(0, 4, at_once)]))
    torch.testing.assert_close(*drawn)
    assert drawn[0].std(0).max() > 0  # they differ from each other


def test_noise_on_a_wide_layer_is_drawn_at_once() -> None:
    """In pieces that fit a cache it would be two, and at 7B thousands of kernels a step."""
    layer = nn.Linear(1024, 2048, device="mock")
    x, A, sB = (torch.zeros(n, m, device="mock") for n, m in ((2, 1024), (2, 1024), (2, 2048)))
    noisy = WeightNoise((1,), 0.1, 0).frozen(layer, x, A, sB)
    with mock_device.watched() as events, torch.no_grad():
        noisy.forward(x)
    assert events["kernel", "aten::normal_", ""] == 1


def test_the_script_for_a_gpu_finds_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("accelerate.accelerator.is_bf16_available", lambda *_: True)
    monkeypatch.setattr(gpu, "GUIDES", {n: gpu.GUIDES[n] for n in ("montec", "ensemble", "flat")})
    original = gpu.fitted

    def fitted_there(guide: guides.Guide, device: torch.device, **options: Any) -> Any:
        chosen = "mock:0" if device.type == "mock" else "cpu"  # it goes before ``use_cpu``
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", chosen)
        return original(guide, device, **options)

    monkeypatch.setattr(gpu, "fitted", fitted_there)
    parts = ["conformance", "agreement"]
    assert gpu.main(["--device", "mock", "--parts", *parts, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu-agreement-mock.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"ok"}
    assert len(rows) == 4
