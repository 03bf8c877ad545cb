"""A posterior's adapters in PEFT, and PEFT's adapters as posteriors: the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from problems import (
    batch_of,
    bert,
    bert_choice,
    bert_mlm,
    gpt2,
    llama,
    mask_tokenizer,
    mlp,
    questions,
    reviews,
    tokenizer,
    tokens,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.adapters import bind
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.guides import MAP, NUTS, Ensemble, Flat, Guide, Laplace, MeanField, MonteCLoRA

pytestmark = pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")

NUMBERS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CONFIG = "adapter_config.json"
GUIDES: dict[str, Guide] = {
    "map": MAP(),
    "montec": MonteCLoRA(latent="AB", sample_scale=0.5),
    "meanfield": MeanField(latent="AB", init_scale=0.1),
    "laplace": Laplace(prior_scale=0.2, linearised=False),
    "nuts": NUTS(chains=2, num_samples=4, warmup_steps=6, max_tree_depth=2),
    "nuts on both": NUTS(
        inner=MAP(prior_scale=0.3), chains=1, num_samples=4, warmup_steps=6, max_tree_depth=2
    ),
    "flat+montec": Flat(inner=MonteCLoRA(sample_scale=0.5), rho=0.1),
}


@dataclass(frozen=True)
class Problem:
    """A network, data to fit, and the adapter."""

    network: Callable[[], nn.Module]
    data: Callable[[int], Any]
    tokenizer: Callable[[], Any]
    adapter: AdapterConfig


def texts(n: int) -> Any:
    return reviews(n).remove_columns("label")


PROBLEMS = {
    "encoder": Problem(lambda: bert(initializer_range=0.3), reviews, tokenizer, AdapterConfig(r=2)),
    "llama": Problem(
        llama, texts, tokenizer,
        AdapterConfig(
            r=3, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}
        ),
    ),
    "gpt-2": Problem(gpt2, texts, tokenizer, AdapterConfig(r=2)),
    "multiple choice": Problem(bert_choice, questions, tokenizer, AdapterConfig(r=2)),
    "masked": Problem(bert_mlm, texts, mask_tokenizer, AdapterConfig(r=2)),
}  # fmt: skip
CASES = [("encoder", guide) for guide in GUIDES] + [
    (problem, guide) for problem in PROBLEMS if problem != "encoder" for guide in ("montec", "nuts")
]


def fitted(problem: str, guide: Any) -> Posterior:
    case = PROBLEMS[problem]
    return pyrolora.fit(
        case.network(), case.data(8), guide=guide, tokenizer=case.tokenizer(), epochs=3,
        adapter=case.adapter, learning_rate=0.05, batch_size=4, seed=1,
    )  # fmt: skip


def inputs(problem: str) -> dict[str, Tensor]:
    """Tokens; of multiple choice (n, choices, T)."""
    batch = {k: t for k, t in batch_of(tokens(6)).items() if k != "labels"}
    if problem == "multiple choice":
        return {name: tensor.view(2, 3, -1) for name, tensor in batch.items()}
    return batch


def own_logits(posterior: Posterior, problem: str, draw: int | None = None) -> Tensor:
    """What the network says under the mean adapter, or under the draw of that number."""
    model = posterior.model
    if draw is None:
        factors = model.program.mean()
    elif model.program.stored() is not None:
        factors = model.program.factors(model.program.pick(torch.tensor([draw])))[0]
    else:
        factors = model.program.factors(posterior.sample(draws=[draw]))[0]
    with torch.no_grad(), bind(model.binding(factors)):
        return posterior.base(**inputs(problem)).logits


def pefts_logits(path: Path, problem: str) -> Tensor:
    model = PeftModel.from_pretrained(PROBLEMS[problem].network(), path).eval()
    with torch.no_grad():
        return model(**inputs(problem)).logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


# Out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("problem", "guide"), CASES)
def test_peft_gives_the_logits_of_the_mean_and_of_a_draw(
    problem: str, guide: str, tmp_path: Path
) -> None:
    posterior = fitted(problem, GUIDES[guide])
    posterior.to_peft(tmp_path / "mean")
    posterior.to_peft(tmp_path / "draws", [0, 3])
    posterior.to_peft(tmp_path / "three", draw=3)
    mean = pefts_logits(tmp_path / "mean", problem)
    drawn = {k: pefts_logits(tmp_path / "draws" / f"draw-{k}", problem) for k in (0, 3)}
    close(mean, own_logits(posterior, problem))
    for k, found in drawn.items():
        close(found, own_logits(posterior, problem, k))
    files = [tmp_path / "draws" / "draw-3", tmp_path / "three"]
    assert {file.name for file in files[0].iterdir()} == {CONFIG, "adapter_model.safetensors"}
    for name in (CONFIG, "adapter_model.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    plain = PROBLEMS[problem].network()
    with torch.no_grad():
        assert (plain(**inputs(problem)).logits - mean).abs().max() > 1e-3
    spread = max((found - mean).abs().max() for found in drawn.values())
    assert spread == 0 if guide == "map" else spread > 1e-4


@pytest.mark.parametrize("guide", ["map", "montec", "nuts"])
def test_merging_a_draw_is_the_adapter_of_that_draw(guide: str) -> None:
    posterior = fitted("encoder", GUIDES[guide])
    for draw in ("mean", 2):
        with torch.no_grad():
            found = posterior.merge(draw)(**inputs("encoder")).logits
        close(found, own_logits(posterior, "encoder", None if draw == "mean" else 2))


def test_stored_draws_are_numbered_chain_after_chain(tmp_path: Path) -> None:
    """Of NUTS: file k holds the k-th stored draw."""
    posterior = fitted("encoder", GUIDES["nuts"])
    A = posterior.model.program.get_buffer("A")
    posterior.to_peft(tmp_path, range(8))
    for k in range(8):
        read = pyrolora.from_peft(tmp_path / f"draw-{k}", PROBLEMS["encoder"].network())
        assert torch.equal(read.bank.means().A, A[k])


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    posterior = fitted("encoder", GUIDES["montec"])
    before = torch.get_rng_state()
    posterior.to_peft(tmp_path, [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_network_goes_out_and_comes_back(tmp_path: Path) -> None:
    posterior = pyrolora.fit(
        mlp(), (NUMBERS, torch.arange(6) % 3), guide=MeanField(), task="classification",
        adapter=AdapterConfig(r=2, target_modules=["0"], modules_to_save=["2"]), epochs=2,
    )  # fmt: skip
    posterior.to_peft(tmp_path, draw=4)
    model = PeftModel.from_pretrained(mlp(), tmp_path)
    read = pyrolora.from_peft(tmp_path, mlp(), task="classification")
    with torch.no_grad():
        close(model(NUMBERS), posterior.merge(4)(NUMBERS))
        close(read.merge()(NUMBERS), model(NUMBERS))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ("median", "draw must be 'mean' or the number of a draw, got 'median'"),
        ("3", "draw must be 'mean' or the number of a draw, got '3'"),
        (-1, "draw must be a whole number >= 0, got -1"),
        (True, "draw must be a whole number >= 0, got True"),
        ([0, 1.5], r"draw\[1\] must be a whole number >= 0, got 1.5"),
        ([2, 0, 2], r"draw has \[2\] more than once; name each draw once"),
        ([], "draw names no draw"),
        (1.5, "draw must be a whole number >= 0, got 1.5"),
        (None, "draw must be a whole number >= 0, got None"),
    ],
)
@pytest.mark.parametrize("how", ["to_peft", "merge"])
def test_other_draws_are_refused(how: str, draw: Any, message: str, tmp_path: Path) -> None:
    posterior = fitted("encoder", "map")
    if how == "merge" and isinstance(draw, list):
        message = r"draw must be a whole number >= 0, got \["
    with pytest.raises(ConfigError, match=message):
        posterior.merge(draw) if how == "merge" else posterior.to_peft(tmp_path / "out", draw)


def test_a_stored_draw_that_is_not_there_is_refused(tmp_path: Path) -> None:
    posterior = fitted("encoder", GUIDES["nuts"])
    posterior.to_peft(tmp_path / "last", draw=7)
    with pytest.raises(ConfigError, match="there are 8 draws, numbered from 0, got draw=8"):
        posterior.to_peft(tmp_path / "none", draw=8)
    assert not (tmp_path / "none").exists()


def test_a_draw_with_noise_on_the_weights_is_no_adapter(tmp_path: Path) -> None:
    posterior = fitted("encoder", Flat(inner=MonteCLoRA(), at_prediction=True))
    with pytest.raises(ConfigError, match=r"noise on the weights.*draw='mean'"):
        posterior.to_peft(tmp_path / "draw", draw=0)
    posterior.to_peft(tmp_path / "mean")
    with torch.no_grad():
        expected = posterior.merge()(**inputs("encoder")).logits
    close(pefts_logits(tmp_path / "mean", "encoder"), expected)


def test_a_folder_with_something_else_is_not_written_to(tmp_path: Path) -> None:
    posterior = fitted("encoder", "map")
    posterior.save(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="holds no adapter"):
        posterior.to_peft(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    posterior.to_peft(tmp_path / "adapter")
    posterior.to_peft(tmp_path / "adapter", draw=0)  # over an older one


def test_a_detached_posterior_still_writes_its_adapter(tmp_path: Path) -> None:
    posterior = fitted("encoder", GUIDES["montec"])
    expected = own_logits(posterior, "encoder", 1)
    posterior.detach()
    posterior.to_peft(tmp_path, draw=1)
    close(pefts_logits(tmp_path, "encoder"), expected)


def test_a_draw_of_a_linearised_posterior_is_no_adapter(tmp_path: Path) -> None:
    posterior = fitted("encoder", Laplace(prior_scale=0.2))
    for export in (posterior.merge, lambda draw: posterior.to_peft(tmp_path, draw)):
        with pytest.raises(ConfigError, match=r"linear in its draws.*linearised=False"):
            export(draw=1)
        export(draw="mean")


def test_a_draw_of_a_reloaded_posterior_is_the_same_file(tmp_path: Path) -> None:
    posterior = fitted("encoder", GUIDES["laplace"])
    posterior.save(tmp_path / "run")
    again = pyrolora.load(tmp_path / "run", PROBLEMS["encoder"].network())
    posterior.to_peft(tmp_path / "one", draw=7)
    again.to_peft(tmp_path / "two", draw=7)
    names = [tmp_path / folder / "adapter_model.safetensors" for folder in ("one", "two")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("draw", ["mean", 2])
def test_a_uniform_adapter_has_one_rank_and_the_scaling_one(
    draw: str | int, tmp_path: Path
) -> None:
    """Of layers with patterns, for servers that read none: PEFT's outputs are the same, and so are
    the updates of whoever knows r and lora_alpha alone."""
    posterior = fitted("llama", GUIDES["montec"])
    posterior.to_peft(tmp_path / "own", draw)
    posterior.to_peft(tmp_path / "uniform", draw, uniform=True)
    own, config = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("own", "uniform"))
    assert own["rank_pattern"]
    assert own["alpha_pattern"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    close(pefts_logits(tmp_path / "uniform", "llama"), pefts_logits(tmp_path / "own", "llama"))
    close(
        pefts_logits(tmp_path / "uniform", "llama"),
        own_logits(posterior, "llama", None if draw == "mean" else draw),
    )
    tensors = load_file(tmp_path / "uniform" / "adapter_model.safetensors")
    plain = {n: load_file(tmp_path / "own" / "adapter_model.safetensors")[n] for n in tensors}
    for name, spec in posterior.bank.specs.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert (A.shape, B.shape) == ((3, spec.in_features), (spec.out_features, 3))
        A0, B0 = (plain[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        close(B @ A, spec.scaling * B0 @ A0)
    read = pyrolora.from_peft(tmp_path / "uniform", llama())
    close(own_logits(read, "llama"), pefts_logits(tmp_path / "uniform", "llama"))


def test_uniform_is_true_or_false(tmp_path: Path) -> None:
    posterior = fitted("encoder", GUIDES["map"])
    with pytest.raises(ConfigError, match="uniform must be True or False, got 1"):
        posterior.to_peft(tmp_path / "out", uniform=1)
    assert not (tmp_path / "out").exists()


# In -----------------------------------------------------------------------------------------------

PEFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("encoder", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 30}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*\.(q|v)_proj",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 7},
        },
    ),
    "modules to save": (
        "encoder",
        {"target_modules": "all-linear", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "output layer": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]}),
    "fan_in_fan_out": ("gpt-2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "multiple choice": (
        "multiple choice",
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "masked": ("masked", {"target_modules": ["query", "key"]}),
}


def saved_by_peft(path: Path, problem: str, options: dict[str, Any]) -> Tensor:
    """A PEFT adapter of random numbers in the folder, and its logits."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, **options})
    model = get_peft_model(PROBLEMS[problem].network(), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    with torch.no_grad():
        return model.eval()(**inputs(problem)).logits


@pytest.mark.parametrize("name", PEFTS)
def test_what_peft_wrote_is_a_posterior_with_its_logits(name: str, tmp_path: Path) -> None:
    problem, options = PEFTS[name]
    expected = saved_by_peft(tmp_path / "peft", problem, options)
    network = PROBLEMS[problem].network()
    posterior = pyrolora.from_peft(tmp_path / "peft", network)
    assert posterior.base is network
    assert posterior.options == MAP()
    close(own_logits(posterior, problem), expected)
    close(own_logits(posterior, problem, 5), expected)  # without width
    with torch.no_grad():
        plain = PROBLEMS[problem].network()(**inputs(problem)).logits
        assert (plain - expected).abs().max() > 1e-2
        close(posterior.merge()(**inputs(problem)).logits, expected)
    posterior.save(tmp_path / "run")
    again = pyrolora.load(tmp_path / "run", PROBLEMS[problem].network())
    close(own_logits(again, problem), expected)
    posterior.to_peft(tmp_path / "back")
    close(pefts_logits(tmp_path / "back", problem), expected)
    posterior.detach()
    with torch.no_grad():
        close(network(**inputs(problem)).logits, plain)


@pytest.mark.parametrize("name", PEFTS)
def test_what_peft_wrote_gets_a_spread(name: str, tmp_path: Path) -> None:
    problem, options = PEFTS[name]
    expected = saved_by_peft(tmp_path, problem, options)
    case = PROBLEMS[problem]
    given = pyrolora.from_peft(tmp_path, case.network(), tokenizer=case.tokenizer())
    posterior = pyrolora.fit(given, case.data(8), guide=GUIDES["laplace"])
    assert posterior.model.num_examples == 8
    close(own_logits(posterior, problem), expected)
    draws = [own_logits(posterior, problem, k) for k in range(2)]
    assert (draws[0] - draws[1]).abs().max() > 1e-4
    assert len(posterior.predict(case.data(3), 4).to_pandas()) == 3


def test_a_language_model_may_be_named_by_its_folder(tmp_path: Path) -> None:
    """Network and tokenizer are loaded from there."""
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    expected = saved_by_peft(adapter, "llama", PEFTS["patterns"][1])
    for name in (folder, str(folder)):
        posterior = pyrolora.from_peft(adapter, name)
        assert type(posterior.base) is type(llama())
        close(own_logits(posterior, "llama"), expected)
        ids = posterior.tokenizer("a good film")["input_ids"]
        assert ids == tokenizer()("a good film")["input_ids"]
    own = mask_tokenizer()
    assert pyrolora.from_peft(adapter, folder, tokenizer=own).tokenizer is own
    posterior = pyrolora.fit(posterior, texts(8), guide="laplace", eval_data=texts(4))
    posterior.save(tmp_path / "run")
    close(own_logits(pyrolora.load(tmp_path / "run"), "llama"), expected)


@pytest.mark.parametrize(
    ("make", "kind"), [(bert, "BertForSequenceClassification"), (bert_mlm, "BertForMaskedLM")]
)
def test_another_network_has_to_be_loaded_with_its_head(
    make: Callable[[], Any], kind: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "model")
    saved_by_peft(tmp_path / "adapter", "encoder", PEFTS["lora"][1])
    with pytest.raises(ConfigError, match=f"is a {kind}, not a causal.*pass that network"):
        pyrolora.from_peft(tmp_path / "adapter", tmp_path / "model")
    if make is bert:
        network = BertForSequenceClassification.from_pretrained(tmp_path / "model")
        assert pyrolora.from_peft(tmp_path / "adapter", network).base is network


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, "llama", PEFTS["rslora"][1])
    with pytest.raises(ConfigError, match=r"cannot load the model '.*nowhere'"):
        pyrolora.from_peft(tmp_path, tmp_path / "nowhere")


def test_a_folder_without_an_adapter_is_refused_and_the_network_stays_plain(tmp_path: Path) -> None:
    network = bert()
    with pytest.raises(CheckpointError, match=CONFIG):
        pyrolora.from_peft(tmp_path, network)
    saved_by_peft(tmp_path, "encoder", {"target_modules": ["query"], "use_dora": True})
    with pytest.raises(ConfigError, match="use_dora=True"):
        pyrolora.from_peft(tmp_path, network)
    saved_by_peft(tmp_path, "llama", PEFTS["rslora"][1])
    with pytest.raises(CheckpointError):
        pyrolora.from_peft(tmp_path, network)
    assert not any("pyrolora" in type(module).__module__ for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_an_adapter_reads_beside_a_posterior_of_the_same_network(tmp_path: Path) -> None:
    posterior = fitted("encoder", GUIDES["montec"])
    expected = own_logits(posterior, "encoder", 1)
    posterior.to_peft(tmp_path, draw=1)
    read = pyrolora.from_peft(tmp_path, posterior.base)
    close(own_logits(read, "encoder"), expected)
    read.detach()
    close(own_logits(posterior, "encoder", 1), expected)


def test_a_members_mean_is_written_for_servers_that_read_one_rank(tmp_path: Path) -> None:
    """All layers of an ensemble's mean have rank K r and one scaling: no patterns."""
    posterior = fitted("encoder", Ensemble(members=2))
    posterior.to_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})
    assert config["lora_alpha"] / config["r"] == posterior.bank.config.lora_alpha / 2
