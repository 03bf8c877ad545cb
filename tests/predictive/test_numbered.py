"""Draw k of a posterior is one function: in predictions, sites, ArviZ, texts and exports."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from problems import absolute, llama, mlp, texts, tokenizer
from test_conformance import VARIANTS
from torch import Tensor

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.arviz import as_chains
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, NUTS, TFB, Ensemble, Flat, Guide, Laplace, MonteCLoRA
from pyrolora.predictive.predict import passes
from pyrolora.seeding import seed_of_draw

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
TEST = (X[:7],)


def fitted(guide: Guide, **options: Any) -> Posterior:
    """A plain classifier, whose last layer is the task head."""
    adapter = AdapterConfig(r=2, modules_to_save=["2"]) if guide.adapts else None
    posterior = pyrolora.fit(
        mlp(), (X, Y), guide=guide, task="classification", adapter=adapter,
        eval_data=(X[:6], Y[:6]),
        **{"epochs": 4, "batch_size": 4, "learning_rate": 0.05, "seed": 1, **options},
    )  # fmt: skip
    posterior.temperature = 1.0  # which neither factors nor PEFT's format have
    return posterior


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def with_factors(posterior: Posterior, numbers: list[int]) -> Tensor:
    """The probabilities of the network with what `sample` gives in its layers."""
    joint = posterior.model
    factors = joint.program.factors(posterior.sample(draws=numbers))
    with torch.no_grad():
        outputs = list(passes(joint, {"inputs": TEST[0]}, factors, 1000))
    return torch.cat(outputs).softmax(-1)


@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_draw_is_one_function_wherever_its_number_stands(variant: str, tmp_path: Path) -> None:
    posterior = fitted(VARIANTS[variant])
    program = posterior.model.program
    numbers = list(range(min(program.stored() or 3, 3)))[::-1]
    generator = torch.get_rng_state()
    drawn = posterior.predict(TEST, draws=numbers).draws
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)  # the caller's generator has no part in it
    close(posterior.predict(TEST, draws=numbers[::-1], batch_size=2).draws.flip(0), drawn)
    close(posterior.predict(TEST, draws=numbers[:1]).draws, drawn[:1])
    close(with_factors(posterior, numbers), drawn)
    tree = posterior.to_arviz(draws=numbers, data=TEST)
    probs = tree["posterior_predictive"]["probs"]
    for k, expected in zip(numbers, drawn, strict=True):
        close(torch.from_numpy(probs.sel(chain=0, draw=k).values), expected)

    posterior.save(tmp_path / "run")
    loaded = pyrolora.load(tmp_path / "run", mlp())
    assert torch.equal(loaded.predict(TEST, draws=numbers).draws, drawn)

    refused = why_not(posterior)
    for k, expected in zip(numbers, drawn, strict=True):
        if refused is not None:
            with pytest.raises(ConfigError, match=refused):
                posterior.to_peft(tmp_path / "adapter", draw=k)
            continue
        posterior.to_peft(tmp_path / f"adapter-{k}", draw=k)
        posterior.to_peft(tmp_path / f"uniform-{k}", draw=k, uniform=True)
        for name in ("adapter", "uniform"):
            with torch.no_grad():
                model = PeftModel.from_pretrained(mlp(), tmp_path / f"{name}-{k}").eval()
                close(model(TEST[0]).softmax(-1), expected)


def why_not(posterior: Posterior) -> str | None:
    """Why no adapter is a draw of it."""
    if not posterior.options.adapts:
        return "has no adapter"
    if posterior.model.program.supports.linearised:
        return "linear in its draws"
    noisy = getattr(posterior.options, "at_prediction", False)
    return "noise on the weights" if noisy else None


@pytest.mark.parametrize("guide", [MonteCLoRA(sample_scale=0.5), Laplace(prior_scale=0.5)])
def test_draws_differ_and_so_do_those_of_other_fits(guide: Guide) -> None:
    drawn = fitted(guide).predict(TEST, draws=[0, 1, 2**32 - 1]).draws
    assert all((drawn[i] - drawn[j]).abs().max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))
    seeds = {seed_of_draw(seed, k) for seed in (1, 2) for k in range(1000)}
    assert len(seeds) == 2000, "no two draws have the same random numbers"


def test_numbered_draws_have_the_law_of_the_guide() -> None:
    """Each entry of A is N(m, σ²): of 400 draws z = (A - m) / σ has mean 0 and variance 1."""
    posterior = fitted(VARIANTS["meanfield"])
    program = posterior.model.program
    A = posterior.sample(draws=range(400))["A"]
    scale = program.in_rows("A", program.param("A_scale"))
    z = ((A - program.bank.means().A) / scale).detach()
    count = z.numel()
    assert abs(float(z.mean())) < 4 / count**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / count) ** 0.5
    neighbours = (z[1:] * z[:-1]).mean()  # of consecutive seeds
    assert abs(float(neighbours)) < 4 / count**0.5


@pytest.fixture(scope="module")
def spread_out() -> Posterior:
    return fitted(MonteCLoRA(sample_scale=0.5))


def test_scores_of_all_kinds_are_of_the_draws_of_these_numbers(
    spread_out: Posterior, tmp_path: Path
) -> None:
    numbers = [4, 1]
    scores = spread_out.evaluate((X, Y), draws=numbers)
    table = pyrolora.compare({"a": spread_out, "b": spread_out}, (X, Y), draws=iter(numbers))
    assert table.loc["b", "nll"] == pytest.approx(scores["nll"], rel=1e-6)
    assert table.loc["b", "nll_difference"] == pytest.approx(0.0, abs=1e-7)
    page = spread_out.report(tmp_path / "page.html", (X, Y), draws=numbers).read_text()
    assert "the draws 4, 1;" in page
    assert f"{scores['nll']:.3f}" in page
    summary = spread_out.summary(draws=numbers)
    group = spread_out.to_arviz(draws=numbers)["posterior"]["adapter_norm"]
    expected = float(group.mean(("chain", "draw"))[0])
    assert float(summary["mean"].iloc[0]) == pytest.approx(expected, abs=1e-2)
    found = spread_out.calibrate((X, Y), draws=numbers)
    spread_out.temperature = 1.0
    assert found.nll_before == pytest.approx(scores["nll"], rel=1e-5)
    assert found.nll_before != pytest.approx(spread_out.evaluate((X, Y), draws=[0])["nll"])


def test_a_copy_in_another_process_has_the_same_draws(spread_out: Posterior) -> None:
    torch.rand(5)
    copy = pickle.loads(pickle.dumps(spread_out))
    expected = spread_out.predict(TEST, draws=[7, 2]).draws
    assert torch.equal(copy.predict(TEST, draws=[7, 2]).draws, expected)


@pytest.mark.parametrize(
    "guide", [Laplace(curvature="kronecker", linearised=False, prior_scale=0.5), TFB()]
)
@pytest.mark.filterwarnings("ignore:the noise of 'tfb'")
def test_draws_around_an_adapter_of_peft_have_numbers(guide: Guide, tmp_path: Path) -> None:
    fitted(MAP()).to_peft(tmp_path / "map")
    read = pyrolora.from_peft(tmp_path / "map", mlp(), task="classification")
    assert torch.equal(read.predict(TEST, draws=[3]).draws[0], read.predict(TEST, 0).draws[0])
    posterior = pyrolora.fit(read, (X, Y), guide=guide, seed=5)
    drawn = posterior.predict(TEST, draws=[2, 0]).draws
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4
    posterior.save(tmp_path / "run")
    loaded = pyrolora.load(tmp_path / "run", mlp())
    assert torch.equal(loaded.predict(TEST, draws=[2, 0]).draws, drawn)
    loaded.to_peft(tmp_path / "draws", draw=[2, 0], uniform=True)
    for k, expected in zip((2, 0), drawn, strict=True):
        with torch.no_grad():
            model = PeftModel.from_pretrained(mlp(), tmp_path / "draws" / f"draw-{k}").eval()
            close(model(TEST[0]).softmax(-1), expected)


# Texts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer() -> Posterior:
    return pyrolora.fit(
        llama(initializer_range=0.3), texts(12),
        absolute(MonteCLoRA, latent="AB", sample_scale=1.0, init_covariance=1.0),
        tokenizer=tokenizer(), epochs=1, seed=1,
    )  # fmt: skip


def test_texts_are_written_by_the_draws_of_these_numbers(writer: Posterior, tmp_path: Path) -> None:
    prompts, options = ["the film", "good"], {"max_new_tokens": 6}
    found = writer.generate(prompts, draws=[5, 0], **options)
    assert found.draw.tolist() == [5, 0]
    assert found.to_pandas()["draw"].tolist() == [5, 0, 5, 0]
    alone = writer.generate(prompts, draws=[0], **options)
    for i in range(2):
        own = [f.sequences[i, -1][f.mask[i, -1]].tolist() for f in (found, alone)]
        assert own[0] == own[1]
    assert found.sequences[0, 0].tolist() != found.sequences[0, 1].tolist()
    writer.to_peft(tmp_path, draw=5)
    model = PeftModel.from_pretrained(llama(initializer_range=0.3), tmp_path).eval()
    ids = torch.tensor([writer.tokenizer("the film")["input_ids"][:-1]])
    with torch.no_grad():
        theirs = model.generate(input_ids=ids, do_sample=False, pad_token_id=0, **options)
    ours = found.sequences[0, 0][found.mask[0, 0]].tolist()
    assert theirs[0, ids.shape[1] :][: len(ours)].tolist() == ours


def test_the_seed_beside_numbers_is_that_of_the_tokens(writer: Posterior) -> None:
    options: dict[str, Any] = {"draws": [3], "do_sample": True, "max_new_tokens": 8}
    one, same, other = (
        writer.generate(["good"], seed=s, **options).sequences.tolist() for s in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_texts_of_unlike_length_have_the_same_scores_in_every_batch(writer: Posterior) -> None:
    data = texts(9, seed=2)
    whole = writer.log_likelihood(data, draws=[4, 1])
    close(writer.log_likelihood(data, draws=[4, 1], batch_size=2), whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-2
    scores = writer.evaluate(data, draws=[4, 1])
    assert scores == pytest.approx(writer.evaluate(data, draws=[1, 4], batch_size=3), rel=1e-5)
    assert scores["nll"] != pytest.approx(writer.evaluate(data, draws=[4])["nll"], rel=1e-3)
    rows = [{"question": "the film", "choices": ["is good", "is bad"], "label": 0}]
    both = writer.predict(rows, draws=[0, 1]).draws
    close(writer.predict_choices(rows, draws=[1, 0]).draws.flip(0), both)


# ArviZ --------------------------------------------------------------------------------------------


def test_without_a_seed_arviz_has_the_first_numbers() -> None:
    posterior = fitted(MonteCLoRA(sample_scale=0.5))
    group = posterior.to_arviz(4)["posterior"]
    assert group["draw"].values.tolist() == [0, 1, 2, 3]
    assert group.attrs["draws"] == "numbered"
    named = posterior.to_arviz(draws=[2])["posterior"]
    close(*(torch.from_numpy(g["adapter_norm"].sel(draw=2).values) for g in (group, named)))
    seeded = posterior.to_arviz(4, seed=0)["posterior"]
    assert seeded.attrs["draws"] == "counted"
    assert (seeded["adapter_norm"] != group["adapter_norm"]).all()


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_stored_draws_keep_their_numbers_in_arviz() -> None:
    posterior = fitted(NUTS(chains=2, num_samples=6, warmup_steps=2, max_tree_depth=2))
    A = posterior.model.program.get_buffer("A")
    fewer = posterior.to_arviz(6, factors=True)["posterior"]
    assert fewer["draw"].values.tolist() == [0, 2, 4]
    for k in (2, 8):  # chain 0 and chain 1
        entry = fewer["A[0]"].sel(chain=k // 6, draw=k % 6).values
        assert entry.flatten().tolist() == A[k].tolist()
    named = posterior.to_arviz(draws=[8, 3], factors=True)
    assert (
        named["posterior"]["A[0]"].sel(chain=0, draw=3).values.flatten().tolist() == A[3].tolist()
    )
    assert named["sample_stats"]["diverging"].shape == (1, 2)
    members = fitted(Ensemble(members=2)).to_arviz(4)["posterior"]
    assert members["member"].values.tolist() == [[0, 0, 1, 1]]
    assert members.attrs["draws"] == "counted"
    assert members["draw"].values.tolist() == [0, 1, 2, 3]


def test_two_fits_are_independent_chains() -> None:
    """Under the same numbers their noise is not the same: it is of the fit's seed, too."""
    fits = [fitted(VARIANTS["meanfield"], seed=seed) for seed in (1, 2)]
    z = []
    for posterior in fits:
        program = posterior.model.program
        A = posterior.sample(draws=range(100))["A"]
        z.append(((A - program.bank.means().A) / program.param("A_scale")).detach())
    assert abs(float((z[0] * z[1]).mean())) < 4 / z[0].numel() ** 0.5
    both = as_chains([posterior.to_arviz(5) for posterior in fits])
    assert both["posterior"].sizes["chain"] == 2


# What is refused ----------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Any]] = {
    "predict": lambda p, **o: p.predict(TEST, **o),
    "evaluate": lambda p, **o: p.evaluate((X, Y), **o),
    "log_likelihood": lambda p, **o: p.log_likelihood((X, Y), **o),
    "generate": lambda p, **o: p.generate(["a"], **o),
    "predict_choices": lambda p, **o: p.predict_choices([{"choices": ["a"]}], **o),
    "sample": lambda p, **o: p.sample(**o),
    "to_arviz": lambda p, **o: p.to_arviz(**o),
    "summary": lambda p, **o: p.summary(**o),
    "calibrate": lambda p, **o: p.calibrate((X, Y), **o),
    "compare": lambda p, **o: pyrolora.compare({"it": p}, (X, Y), **o),
    "report": lambda p, **o: p.report("unwritten.html", (X, Y), **o),
}


@pytest.fixture(scope="module")
def ensemble() -> Posterior:
    return fitted(Flat(inner=Ensemble(members=3)), epochs=1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": []}, "draws names no draw"),
        ({"draws": [0, -1]}, r"draws\[1\] must be a whole number >= 0, got -1"),
        ({"draws": [True]}, r"draws\[0\] must be a whole number >= 0, got True"),
        ({"draws": [1.0]}, r"draws\[0\] must be a whole number >= 0, got 1.0"),
        ({"draws": ["0"]}, r"draws\[0\] must be a whole number >= 0, got '0'"),
        ({"draws": [2, 0, 2, 1]}, r"draws has \[2\] more than once"),
        ({"draws": [0, 3]}, r"there are 3 draws, numbered from 0, got draws\[1\]=3"),
        ({"draws": [2**32]}, r"draws\[0\] must be at most 4294967295"),
        ({"draws": 2}, r"draws must be a list of the numbers of draws, such as \[0, 1, 2\], got 2"),
        ({"draws": "012"}, "draws must be a list.*got '012'"),
        ({"draws": {0, 1}}, r"draws must be a list.*got \{0, 1\}"),
        ({"draws": torch.tensor(1)}, "draws must be a list.*got 1"),
        ({"draws": [0], "num_samples": 3}, "draws= names the draws, and num_samples=3 would"),
        ({"draws": [0], "num_samples": 0}, "draws= names the draws, and num_samples=0 would"),
    ],
)
def test_what_names_no_draws_is_refused(
    call: str, options: dict[str, Any], message: str, ensemble: Posterior
) -> None:
    with pytest.raises(ConfigError, match=message):
        CALLS[call](ensemble, **options)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "generate"])
def test_a_seed_beside_numbers_is_refused(call: str, ensemble: Posterior) -> None:
    with pytest.raises(ConfigError, match="draws= names the draws, and seed=0 would take others"):
        CALLS[call](ensemble, draws=[0], seed=0)


def test_numbers_may_come_in_any_ordered_form(ensemble: Posterior) -> None:
    expected = ensemble.predict(TEST, draws=[1, 2]).draws
    for draws in (range(1, 3), (1, 2), torch.tensor([1, 2]), torch.tensor([1, 2]).numpy()):
        assert torch.equal(ensemble.predict(TEST, draws=draws).draws, expected)
    with pytest.raises(ConfigError, match=r"sample\(8\), or which"):
        ensemble.sample()


def test_a_seed_that_is_no_number_is_refused() -> None:
    posterior = fitted(MonteCLoRA(), epochs=1)
    posterior.settings["seed"] = "one"
    with pytest.raises(ConfigError, match=r"settings\['seed'\] must be a whole number"):
        posterior.sample(draws=[0])
