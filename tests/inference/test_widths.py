"""The width of the noise and the temperature, by training examples that the fit holds back."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import bert, bert_spans, bert_tags, reviews, squad, tagged, tokenizer
from torch import nn
from transformers import TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, defaults
from pyrolora.adapters import FlatFactors
from pyrolora.data import prepare
from pyrolora.errors import ConfigError
from pyrolora.guides import Flat, LowRank, MeanField, MonteCLoRA
from pyrolora.inference import widths
from pyrolora.predictive.calibration import calibrated
from pyrolora.tasks import QuestionAnswering

GAUSSIAN = {"units": "row", "prior_mean": "learned", "prior_scale": 0.5, "init_scale": 0.5}
GUIDES = {
    "montec": MonteCLoRA(hold_back=0.25),
    "meanfield": MeanField(**GAUSSIAN, hold_back=0.25),
    "lowrank": LowRank(**GAUSSIAN, hold_back=0.25),
    "flat+montec": Flat(inner=MonteCLoRA(hold_back=0.25)),
}
SMALL = AdapterConfig(r=2)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eight steps of four examples: the fits here are short."""
    monkeypatch.setattr(defaults, "WIDTH_EVERY", 32)


def fitted(guide: Any = "montec", n: int = 48, **more: Any) -> pyrolora.Posterior:
    options = {"epochs": 4, "batch_size": 4, "adapter": SMALL, "tokenizer": tokenizer(), **more}
    guide = GUIDES[guide] if isinstance(guide, str) else guide
    return pyrolora.fit(bert(), reviews(n), guide, **options)


def width(posterior: pyrolora.Posterior) -> float:
    found = widths.program_of(posterior.model).width
    assert found is not None
    return float(found[0].exp())


@pytest.mark.parametrize("guide", GUIDES)
def test_it_measures_the_gap_and_the_variance(guide: str) -> None:
    """Against predictions of the same examples at each of the draws, one by one."""
    posterior = fitted(guide, epochs=1)
    joint = posterior.model
    parts = [prepare(reviews(n), posterior.base, posterior.task, tokenizer()) for n in (20, 12)]
    gap, variance, spread = widths.ChooseWidth(joint, *parts)._measured(
        TrainingArguments("x", seed=3), 8
    )
    with widths.seeded(3 + 6271 * 8), torch.no_grad(), widths.evaluating(joint):
        drawn = widths.program_of(joint).factors(
            widths.program_of(joint).draw(defaults.WIDTH_DRAWS)
        )
        found = []
        for data in parts:
            picked = torch.randint(len(data), (defaults.WIDTH_EXAMPLES,)).tolist()
            (batch,) = data.loader(len(picked), picked)
            outputs = [joint.network(batch, FlatFactors(A, drawn.B)) for A in drawn.A]
            found.append(torch.stack([joint.task.log_prob(o, batch) for o in outputs]))
    learnt = found[0]
    mixed = [part.exp().mean(0).log() for part in found]
    assert float(gap) == pytest.approx(float(mixed[0].mean() - mixed[1].mean()), abs=1e-5)
    assert float(variance) == pytest.approx(float(learnt.var(0).mean()), rel=1e-3)
    both = (mixed[0].var() + mixed[1].var()) / 2
    assert float(spread) == pytest.approx(float(both), rel=1e-3)


def test_the_tags_of_one_example_are_measured_together() -> None:
    """What was learnt of an example, its tags share, and their scores vary together."""
    options = {"tokenizer": tokenizer(), "epochs": 1, "adapter": SMALL}
    joint = pyrolora.fit(bert_tags(), tagged(16), GUIDES["meanfield"], **options).model
    data = prepare(tagged(16), joint.base, joint.task, tokenizer())
    with widths.seeded(3), torch.no_grad(), widths.evaluating(joint):
        drawn = widths.program_of(joint).factors(widths.program_of(joint).draw(2))
        found = widths.scores(joint, data, drawn, 32)
    with widths.seeded(3):
        widths.program_of(joint).draw(2)
        picked = torch.randint(16, (defaults.WIDTH_EXAMPLES,))
    assert found.shape == (2, defaults.WIDTH_EXAMPLES)
    for draw, scores in enumerate(found):
        with torch.no_grad(), widths.evaluating(joint):
            (batch,) = data.loader(16)
            output = joint.network(batch, FlatFactors(drawn.A[draw], drawn.B))
            rows = joint.task.row_log_prob(output, batch)
            owner = joint.task.token_mask(batch).nonzero()[:, 0]
        summed = torch.zeros(16).index_add_(0, owner, rows)
        torch.testing.assert_close(scores, summed[picked], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_passes_that_measure_are_no_larger_than_those_of_the_training(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = fitted(n=16, epochs=1).model
    data = prepare(reviews(16), joint.base, joint.task, tokenizer())
    sizes = []
    run = joint.network

    def seen(batch: Any, factors: FlatFactors) -> Any:
        sizes.append(len(batch["input_ids"]) * defaults.WIDTH_DRAWS)
        return run(batch, factors)

    found = []
    for most in (rows, 1000):
        sizes.clear()
        with (
            widths.seeded(3),
            torch.no_grad(),
            widths.evaluating(joint),
            monkeypatch.context() as m,
        ):
            m.setattr(joint, "network", seen)
            drawn = widths.program_of(joint).factors(
                widths.program_of(joint).draw(defaults.WIDTH_DRAWS)
            )
            found.append(widths.scores(joint, data, drawn, most))
        assert max(sizes) <= max(most, defaults.WIDTH_DRAWS)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guide", ["montec", "flat+montec"])
def test_a_head_with_a_law_leaves_the_width_where_it_is(guide: str) -> None:
    posterior = fitted(dataclasses.replace(GUIDES[guide], head="gaussian"), n=16, epochs=1)
    assert width(posterior) == posterior.history[-1]["width"]


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_the_exact_posterior_knows_how_far_it_overfits(beta: float) -> None:
    """The equation of state of linear regressions, whose posterior at β is N(w, β (XᵀX)⁻¹)."""
    torch.manual_seed(0)
    n, columns, fits, draws = 200, 10, 300, 40
    x, apart = torch.randn(fits, n, columns), torch.randn(fits, 1000, columns)
    y, new = torch.randn(fits, n, 1), torch.randn(fits, 1000, 1)  # the true weights are 0
    gram = x.mT @ x
    means = torch.linalg.solve(gram, x.mT @ y)
    root = torch.linalg.cholesky(torch.linalg.inv(gram))
    weights = means + beta**0.5 * root @ torch.randn(fits, columns, draws)

    def found(scale: float) -> tuple[float, float]:
        wide = means + scale * (weights - means)
        learnt = -0.5 * (y - x @ wide).square()
        held_back = -0.5 * (new - apart @ wide).square()
        mixed = [part.logsumexp(-1) - math.log(draws) for part in (learnt, held_back)]
        gap = mixed[0].mean() - mixed[1].mean() - of_truth
        return float(gap), float(learnt.var(-1).mean())

    of_truth = 0.5 * (new.square().mean() - y.square().mean())  # 0 in expectation
    gap, variance = found(1.0)
    assert variance == pytest.approx(beta * gap, rel=0.1)
    for scale in (0.7, 1.4):
        gap, variance = found(scale)
        assert (variance - beta * gap) * (scale - 1) > 0.3 * beta * gap * abs(scale - 1)


@pytest.mark.parametrize(
    ("gap", "beta", "processes"),
    [(0.0, 1, 1), (0.02, 1, 1), (0.5, 1, 1), (5.0, 1, 1), (0.05, 1, 8), (0.1, 0.25, 1)],
)
def test_steps_lead_to_the_optimum(
    gap: float, beta: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the stated objective, where V goes as c² and the gap stands still."""
    state_of_all = SimpleNamespace(num_processes=processes, process_index=0)
    guide = dataclasses.replace(GUIDES["montec"], kl_weight=beta)
    joint = fitted(guide, n=16, epochs=1).model
    data = prepare(reviews(400), joint.base, joint.task, tokenizer())
    chooser = widths.ChooseWidth(joint, data, data)
    state = widths.program_of(joint).width
    assert state is not None
    spread, at_one = 0.5, 0.1
    monkeypatch.setattr(widths, "PartialState", lambda: state_of_all)
    for number in range(1, 201):
        variance = at_one * math.exp(2 * float(state[0]))
        chooser._follow(torch.tensor([gap, variance, spread]), number)
    seen = (1 + widths.MEMORY) / (1 - widths.MEMORY) * defaults.WIDTH_EXAMPLES * processes
    squared_error = spread * (1 / len(data) + 2 / seen)
    grid = torch.linspace(-4, 4, 8001)
    missing = beta * gap - at_one * (2 * grid).exp()
    loss = missing.square() / (2 * beta**2 * squared_error)
    best = grid[(loss + grid.square() / (2 * defaults.WIDTH_PRIOR**2)).argmin()]
    assert float(state[0]) == pytest.approx(float(best), abs=0.02)


def test_draws_have_the_width() -> None:
    """Noise is c times as wide, in draws as in the quantities."""
    posterior = fitted(epochs=1)
    program = widths.program_of(posterior.model)
    assert program.width is not None
    means = program.bank.means().A

    def spread() -> Any:
        sites = posterior.sample(4, seed=0)
        noise = posterior.model.program.factors(sites).A - means
        return noise, program.quantities(sites)["signal_to_noise"][0]

    noise, ratio = spread()
    program.width[0] += math.log(3)
    wide, small = spread()
    torch.testing.assert_close(wide, 3 * noise, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small, ratio / 3, rtol=1e-4, atol=1e-6)


def test_labels_that_say_nothing_make_it_wide() -> None:
    """A fit that learns random labels by heart has more noise than one with labels to learn."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    real = (x[:, 0] > 0).long()
    guide = MonteCLoRA(hold_back=0.5)
    found = []
    for labels in (real, real[torch.randperm(400)]):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 2))
        posterior = pyrolora.fit(
            network,
            (x, labels),
            guide,
            epochs=30,
            learning_rate=2e-2,
            task="classification",
            adapter=AdapterConfig(r=2),
        )
        found.append(width(posterior))
    assert found[1] > 1.5 * found[0]


def test_examples_held_back_teach_the_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that stands still leaves the fit of the other examples, to the bit."""
    monkeypatch.setattr(defaults, "WIDTH_RATE", 0.0)
    whole = reviews(48)
    guide = MonteCLoRA(hold_back=0.25)
    posterior = fitted(guide, seed=5)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5)).tolist()
    rest = [whole[i] for i in sorted(order[12:])]
    alone = pyrolora.fit(
        bert(),
        rest,
        dataclasses.replace(guide, hold_back=0.0),
        epochs=4,
        batch_size=4,
        seed=5,
        adapter=SMALL,
        tokenizer=tokenizer(),
    )
    assert posterior.model.num_examples == 36
    found, expected = posterior.model.own_state(), alone.model.own_state()
    assert {*found} - {*expected} == {"program.width"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_fit_that_goes_on_has_the_same_width(tmp_path: Any) -> None:
    """The state of the search is in the checkpoints."""

    def run(folder: Any, **more: Any) -> pyrolora.Posterior:
        arguments = TrainingArguments(
            str(folder),
            num_train_epochs=4,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=10,
            learning_rate=1e-2,
            disable_tqdm=True,
            report_to="none",
            **more,
        )
        return pyrolora.fit(
            bert(),
            reviews(48),
            GUIDES["montec"],
            training=arguments,
            adapter=SMALL,
            tokenizer=tokenizer(),
        )

    whole = run(tmp_path / "a")
    again = run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-20"))
    states = [widths.program_of(posterior.model).width for posterior in (whole, again)]
    assert states[0] is not None
    assert states[0][1:].ne(0).all()
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert whole.temperature == again.temperature


def test_what_was_chosen_is_kept(tmp_path: Any) -> None:
    posterior = fitted()
    found = posterior.history[-1]
    assert found == {
        "held_back": 12,
        "width": width(posterior),
        "temperature": posterior.temperature,
    }
    state = widths.program_of(posterior.model).width
    assert state is not None
    state[0] += math.log(2)
    posterior.save(tmp_path / "p")
    loaded = pyrolora.load(tmp_path / "p", bert())
    assert width(loaded) == width(posterior) != 1.0
    assert loaded.temperature == posterior.temperature
    given = reviews(6)
    torch.testing.assert_close(
        loaded.predict(given, 3, seed=0).probs, posterior.predict(given, 3, seed=0).probs
    )


def test_what_cannot_be_measured_leaves_the_width() -> None:
    """The next step of the training says what is wrong."""
    joint = fitted("meanfield", n=16, epochs=1).model
    data = prepare(reviews(16), joint.base, joint.task, tokenizer())
    chooser, width = widths.ChooseWidth(joint, data, data), widths.program_of(joint).width
    assert width is not None
    before = width.clone()
    joint.program.bank.get_parameter("A_loc").data.fill_(math.inf)
    measured = chooser._measured(TrainingArguments("x"), 8)
    assert measured.isnan().all()
    chooser._follow(measured, 1)
    assert torch.equal(width, before)


def test_the_temperature_has_a_prior() -> None:
    """Of a few examples, all of them right, it makes no posterior that is sure of everything."""
    posterior = fitted(epochs=1)
    rows = reviews(8)
    said = posterior.predict(rows, 0).probs.argmax(-1).tolist()
    right = [{**row, "label": label} for row, label in zip(rows, said, strict=True)]
    data = prepare(right, posterior.base, posterior.task, tokenizer())
    mean = posterior.model.program.mean()
    free = calibrated(posterior.model, data, mean, batch_size=8)
    prior = calibrated(posterior.model, data, mean, batch_size=8, prior=0.5)
    assert free.temperature == pytest.approx(defaults.TEMPERATURES[0], rel=0.01)

    def loss(log_temperature: float) -> float:
        task = posterior.model.task.at(math.exp(log_temperature))
        (batch,) = data.loader(8)
        with torch.no_grad(), widths.evaluating(posterior.model):
            output = posterior.model.network(batch, mean)
            return float(-task.row_log_prob(output, batch).sum() + 2 * log_temperature**2)

    grid = torch.linspace(-1.5, 1.5, 601)
    best = grid[torch.tensor([loss(float(t)) for t in grid]).argmin()]
    assert math.log(prior.temperature) == pytest.approx(float(best), abs=0.03)


def test_khat_takes_the_data_of_the_fit_whole_or_in_part() -> None:
    posterior = fitted(epochs=1)
    whole = reviews(48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(defaults.SEED)).tolist()
    part = [whole[i] for i in sorted(order[12:])]
    assert posterior.khat(whole, 50, seed=1).khat == posterior.khat(part, 50, seed=1).khat


def test_khat_of_the_whole_data_in_another_order_is_warned_of() -> None:
    """Examples that were held back are known by their places alone."""
    posterior = fitted(epochs=1)
    with pytest.warns(UserWarning, match=r"12 of .* in another order, .* as the fit got them"):
        posterior.khat(reviews(48).select(range(47, -1, -1)), 50, seed=1)


def test_what_cannot_be_held_back_is_an_error() -> None:
    for options in ({"units": "fan_in"}, {"prior_mean": "zero"}):
        with pytest.raises(ConfigError, match=r"got units='fan_in'; choose units='row'"):
            MonteCLoRA(hold_back=0.1, **options)
    with pytest.raises(ConfigError, match=r"'map' has none; choose another guide, or hold_back=0"):
        pyrolora.guides.MAP(hold_back=0.1)
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        MonteCLoRA(hold_back=1.0)
    with pytest.raises(ConfigError, match="of 4 examples is 0"):
        fitted(MonteCLoRA(hold_back=0.1), n=4)


def test_a_fit_without_steps_chooses_no_width() -> None:
    given = fitted(MonteCLoRA(), n=8, epochs=1)
    with pytest.raises(ConfigError, match=r"'montec'.* trains nothing .*got hold_back=0\.1"):
        pyrolora.fit(given, reviews(20), MonteCLoRA(hold_back=0.1))


def test_windows_of_one_context_are_held_back_together() -> None:
    """What is held back is a share of the examples, however many windows they have."""
    options = {"tokenizer": tokenizer(), "adapter": SMALL, "epochs": 1}
    with pytest.raises(ConfigError, match="of 2 examples is 0"):
        pyrolora.fit(bert_spans(), squad(2, 60), GUIDES["montec"], **options)
    windows = prepare(squad(4, 60), bert_spans(), QuestionAnswering(), tokenizer())
    assert len(windows) > 8
    kept, back = windows.parted(1, 0)
    assert len({*back.of_rows}) == 1
    assert not {*back.of_rows} & {*kept.of_rows}
    assert len(kept) + len(back) == len(windows)


def test_after_an_earlier_posterior_the_width_is_that_ones() -> None:
    earlier = fitted("meanfield")
    state = widths.program_of(earlier.model).width
    assert state is not None
    state[0] += math.log(2)
    moved = width(earlier)
    later = pyrolora.fit(earlier.base, reviews(40), prior=earlier, epochs=4, batch_size=4)
    assert width(later) == width(earlier) == pytest.approx(moved)
    assert later.model.num_examples == 30
    assert later.history[-1]["temperature"] == later.temperature
