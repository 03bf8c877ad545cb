"""A spread around an adapter that is there already: the adapter stays, its uncertainty is added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from problems import bert, gpt2, llama, mlp, reviews, tokenizer, tokens
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import NUTS, Ensemble, Flat, Guide, Laplace, MeanField, MonteCLoRA

pytestmark = pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")

SHORT = NUTS(chains=1, num_samples=6, warmup_steps=6, max_tree_depth=2)
TRAINED_MONTEC = MonteCLoRA(scale_updates="gradient")
GUIDES: dict[str, Guide] = {
    "montec": MonteCLoRA(),
    "trained montec": TRAINED_MONTEC,
    "montec, all options": MonteCLoRA(latent="AB", covariance="full", learn_sample_scale=True),
    "meanfield": MeanField(latent="AB"),
    "laplace": Laplace(),
    "laplace, sampled": Laplace(latent="B", prior_scale=0.3, linearised=False),
    "nuts": SHORT,
    "flat+montec": Flat(inner=TRAINED_MONTEC, rho=0.1),
}
MOVED = {
    "montec": {"scale_diag"},
    "trained montec": {"scale_diag"},
    "montec, all options": {"scale_tril", "sample_scale"},
    "meanfield": {"A_scale", "B_scale"},
    "laplace": {"precision", "values_A_0", "values_B_0", "rows_A_0", "columns_B_0"},
    "laplace, sampled": {"precision", "values_B_0", "rows_B_0", "columns_B_0"},
    "nuts": {"A"},
    "flat+montec": {"scale_diag"},
}
"""What the guide learns, from a start that is always the same."""

TRAINED = ["trained montec", "montec, all options", "flat+montec"]


def rows(n: int) -> Any:
    """Numbers with a real-valued label."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    return x, x[:, 0] - x[:, 1]


@dataclass(frozen=True)
class Problem:
    """A network, its data, and how an adapter of it is fitted."""

    network: Callable[[], nn.Module]
    data: Callable[[int], Any]
    options: dict[str, Any] = field(default_factory=dict)
    task: str | None = None


R2 = {"adapter": AdapterConfig(r=2)}
PROBLEMS = {
    "encoder": Problem(lambda: bert(initializer_range=0.3), reviews, R2),
    "regression": Problem(
        lambda: mlp(outputs=1), rows,
        {"adapter": AdapterConfig(r=2, modules_to_save=["2"], target_modules=["0"])}, "regression",
    ),
    "llama": Problem(llama, lambda n: reviews(n).remove_columns("label"), R2),
    "gpt-2": Problem(gpt2, lambda n: reviews(n).remove_columns("label"), R2),
}  # fmt: skip
CASES = [("encoder", name) for name in GUIDES] + [
    (problem, name)
    for problem in ("regression", "llama", "gpt-2")
    for name in ("montec", "meanfield", "laplace", "nuts")
]


def words(problem: str) -> Any:
    return None if problem == "regression" else tokenizer()


def adapted(problem: str, guide: Any = "map") -> Posterior:
    """The posterior whose adapter is given on."""
    case = PROBLEMS[problem]
    return pyrolora.fit(
        case.network(), case.data(10), guide=guide, task=case.task,
        tokenizer=words(problem), epochs=3, learning_rate=0.05, batch_size=5, seed=1,
        **case.options,
    )  # fmt: skip


def post_hoc(given: Posterior, problem: str, guide: Any, **options: Any) -> Posterior:
    """One more epoch or two, where there is something to train."""
    how = (guide if isinstance(guide, Guide) else pyrolora.guides.as_guide(guide)).supports.post_hoc
    if how == "trained":
        options = {"epochs": 3, "learning_rate": 0.05, **options}
    elif problem in ("llama", "gpt-2"):  # where Laplace tunes its prior on held-out data
        options = {"eval_data": PROBLEMS[problem].data(6), **options}
    data = options.pop("data", PROBLEMS[problem].data(12))
    return pyrolora.fit(given, data, guide=guide, batch_size=4, seed=5, **options)


def fixed(posterior: Posterior) -> dict[str, Tensor]:
    """Means and heads."""
    state = {**posterior.bank.state_dict(), **posterior.model.heads.state_dict()}
    return {name: tensor.clone() for name, tensor in state.items()}


def spread(posterior: Posterior) -> dict[str, Tensor]:
    """What the guide has besides them: scales, curvature, draws."""
    state = posterior.model.program.state_dict().items()
    return {name: t.clone() for name, t in state if not name.split("bank.")[-1].endswith("_loc")}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def said(posterior: Posterior, problem: str, draws: int = 0) -> Tensor:
    """What it predicts for new examples."""
    found = posterior.predict(PROBLEMS[problem].data(6), draws, seed=2)
    return found.entropy if problem in ("llama", "gpt-2") else found.draws


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, equal_nan=True)


# The adapter stays, the spread is inferred --------------------------------------------------------


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_the_adapter_stays_and_a_spread_is_inferred(problem: str, name: str) -> None:
    given, guide = adapted(problem), GUIDES[name]
    network = given.base
    weights = {key: t.clone() for key, t in network.state_dict().items()}
    before, own, expected = fixed(given), given.model.own_state(), said(given, problem)

    posterior = post_hoc(given, problem, guide)
    assert posterior.base is network
    assert posterior.options == guide
    assert posterior.model.num_examples == 12
    assert posterior.bank.specs == given.bank.specs
    assert posterior.task is not given.task
    assert_equal(fixed(posterior), before)
    if name != "nuts":  # whose mean adapter is the mean of the draws
        same(said(posterior, problem), expected)
    program = guide.build(posterior.bank)
    program.reserve()
    start = program.state_dict()
    moved = {
        key.split(".")[-1]
        for key, tensor in spread(posterior).items()
        if (tensor - start[key]).abs().max() > 1e-4
    }
    assert moved >= MOVED[name]
    draws = posterior.model.program.factors(posterior.sample(8, seed=0))
    for factor, value in (("A", draws.A), ("B", draws.B)):
        if value.dim() > 1:
            assert value.std(0).max() > 1e-5
        else:
            assert torch.equal(value, before[f"{factor}_loc"])
    assert draws.draws == 8

    assert_equal(given.model.own_state(), own)
    assert_equal(dict(network.state_dict()), weights)
    same(said(given, problem), expected)
    many = said(posterior, problem, 3)
    posterior.detach()
    same(said(given, problem), expected)
    with pytest.raises(pyrolora.PyroLoraError, match="detached"):
        said(posterior, problem)
    again = post_hoc(given, problem, guide)  # repeatable
    same(said(again, problem, 3), many)
    given.detach()
    same(said(again, problem, 3), many)
    again.detach()
    assert [type(m) for m in network.modules()] == [
        type(m) for m in PROBLEMS[problem].network().modules()
    ]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_scale_of_montec_is_learned_from_its_start() -> None:
    """Only scales move, and they do so as in a fit with frozen means."""
    given = adapted("encoder")
    one = post_hoc(given, "encoder", TRAINED_MONTEC, epochs=1)
    more = post_hoc(given, "encoder", TRAINED_MONTEC, epochs=4)
    learnt = {name: t for name, t in spread(one).items() if not name.endswith("width")}
    for name, tensor in learnt.items():
        assert not torch.equal(tensor, spread(more)[name])
    assert any("elbo" in entry for entry in more.history)


@pytest.mark.parametrize("name", ["montec", "trained montec", "laplace", "nuts"])
def test_of_a_regression_the_noise_is_that_of_the_residuals(name: str) -> None:
    """Where it starts for guides that are trained, and where it stays for the others."""
    given = adapted("regression")
    noise = given.task.param("noise_scale").item()
    posterior = post_hoc(given, "regression", GUIDES[name])
    trained = {key for key, p in posterior.model.named_parameters() if p.requires_grad}
    computed = GUIDES[name].supports.post_hoc == "computed"
    assert any("noise_scale" in key for key in trained) is not computed
    assert not any("bank" in key or "heads" in key for key in trained)
    assert posterior.task.param("noise_scale").item() != pytest.approx(noise, rel=1e-3)
    assert given.task.param("noise_scale").item() == noise


def test_laplace_of_a_given_regression_is_laplace_with_the_noise_that_fits_the_residuals() -> None:
    """σ is the root mean square of the residuals, whatever it was."""
    given = adapted("regression")
    x, y = rows(12)
    posterior = pyrolora.fit(given, (x, y), guide="laplace", batch_size=5)
    residuals = y - given.predict((x,), 0).mean
    expected = residuals.square().mean().sqrt().item()
    assert posterior.task.param("noise_scale").item() == pytest.approx(expected, rel=1e-5)


# Where the adapter comes from ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["montec", "meanfield", "laplace", "nuts"])
@pytest.mark.parametrize("source", ["fit", "load", "from_peft"])
def test_the_adapter_may_come_from_a_fit_a_folder_or_peft(
    source: str, name: str, tmp_path: Path
) -> None:
    original = adapted("encoder")
    expected = said(original, "encoder")
    given = original
    if source == "load":
        original.save(tmp_path)
        given = pyrolora.load(tmp_path, PROBLEMS["encoder"].network())
    elif source == "from_peft":
        original.to_peft(tmp_path)
        network = PROBLEMS["encoder"].network()
        given = pyrolora.from_peft(tmp_path, network, tokenizer=tokenizer())
    before = fixed(given)
    posterior = post_hoc(given, "encoder", GUIDES[name])
    assert posterior.tokenizer is given.tokenizer
    assert_equal(fixed(posterior), before)
    if name != "nuts":
        same(said(posterior, "encoder"), expected)
    same(said(given, "encoder"), expected)
    fresh = said(post_hoc(original, "encoder", GUIDES[name]), "encoder", 3)
    same(said(posterior, "encoder", 3), fresh)  # whichever way it came


def test_an_adapter_that_peft_trained_gets_a_posterior(tmp_path: Path) -> None:
    network = bert(initializer_range=0.3)
    model = get_peft_model(
        copy.deepcopy(network), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    given = pyrolora.from_peft(tmp_path, network)
    posterior = pyrolora.fit(given, tokens(12), guide="laplace")
    with torch.no_grad():
        ids = torch.tensor(tokens(6)["input_ids"][:])
        expected = model.eval()(input_ids=ids).logits.softmax(-1)
    torch.testing.assert_close(posterior.predict(tokens(6), 0).draws[0], expected)
    assert posterior.predict(tokens(6), 50, seed=0).draws.std(0).min() > 0


@pytest.mark.parametrize("source", ["montec", "meanfield", "laplace", "flat+montec"])
def test_of_a_posterior_with_a_spread_the_means_are_taken(source: str) -> None:
    given = adapted("encoder", guide=source)
    posterior = post_hoc(given, "encoder", "laplace")
    assert_equal(fixed(posterior), fixed(given))
    same(said(posterior, "encoder"), said(given, "encoder"))


def test_a_spread_may_follow_a_spread() -> None:
    given = adapted("encoder")
    second = post_hoc(post_hoc(given, "encoder", "laplace"), "encoder", "montec")
    same(said(second, "encoder"), said(given, "encoder"))


def test_the_tokenizer_is_that_of_the_posterior_or_the_one_passed() -> None:
    given = adapted("encoder")
    assert post_hoc(given, "encoder", "laplace").tokenizer is given.tokenizer
    other = tokenizer()
    assert post_hoc(given, "encoder", "laplace", tokenizer=other).tokenizer is other


def test_a_detached_posterior_gives_its_adapter_still() -> None:
    given = adapted("encoder")
    expected = said(given, "encoder")
    given.detach()
    same(said(post_hoc(given, "encoder", "laplace"), "encoder"), expected)


# With what else a fit has -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["montec", "trained montec", "flat+montec", "laplace", "nuts"])
def test_it_saves_itself_and_loads(name: str, tmp_path: Path) -> None:
    given = adapted("encoder")
    posterior = post_hoc(given, "encoder", GUIDES[name], output_dir=tmp_path)
    assert bool(list(tmp_path.glob("checkpoint-*"))) == (name in TRAINED)
    again = pyrolora.load(tmp_path, PROBLEMS["encoder"].network())
    assert_equal(again.model.own_state(), posterior.model.own_state())
    assert again.options == GUIDES[name]
    same(said(again, "encoder", 3), said(posterior, "encoder", 3))


@pytest.mark.parametrize(("name", "times"), [("montec", 1), *((n, 3) for n in TRAINED)])
def test_held_out_data_is_scored_while_it_trains(name: str, times: int) -> None:
    """And once at the end, where nothing is trained."""
    posterior = post_hoc(adapted("encoder"), "encoder", GUIDES[name], eval_data=reviews(5))
    assert len([entry for entry in posterior.history if "eval_nll" in entry]) == times


def test_the_prior_of_laplace_may_be_chosen_on_held_out_data() -> None:
    given, guide = adapted("encoder"), Laplace(tune="validation")
    posterior = post_hoc(given, "encoder", guide, eval_data=reviews(5))
    assert_equal(fixed(posterior), fixed(given))
    with pytest.raises(ConfigError, match="eval_data="):
        post_hoc(given, "encoder", guide)


def test_the_trainers_arguments_and_callbacks_hold(tmp_path: Path, steps: list[int]) -> None:
    class Noted(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.groups = kwargs["optimizer"].param_groups

    given, noted = adapted("encoder"), Noted()
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    steps.clear()
    posterior = pyrolora.fit(
        given, reviews(12), guide=TRAINED_MONTEC, training=args, callbacks=[noted]
    )
    assert len(steps) == 3
    assert [len(group["params"]) for group in noted.groups] == [0, 0, 2]  # scales alone
    assert posterior.history[-1]["step"] == 3


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise Killed

    def run(folder: str, resume: bool = False, **options: Any) -> Posterior:
        args = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, per_device_train_batch_size=4,
            save_strategy="steps", save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
            learning_rate=0.05, resume_from_checkpoint=resume,
        )  # fmt: skip
        return pyrolora.fit(given, reviews(12), guide=TRAINED_MONTEC, training=args, **options)

    given = adapted("encoder")
    expected = said(given, "encoder")
    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", callbacks=[Kill()])
    same(said(given, "encoder"), expected)
    assert_equal(run("killed", resume=True).model.own_state(), whole.model.own_state())


def test_a_failure_leaves_the_given_posterior_usable() -> None:
    given = adapted("encoder")
    expected = said(given, "encoder")
    for options in ({"data": []}, {"data": [{"text": "a film"}]}):
        with pytest.raises(DataError):
            post_hoc(given, "encoder", "laplace", **options)
    same(said(given, "encoder"), expected)
    given.detach()
    assert not any("pyrolora" in type(module).__module__ for module in given.base.modules())


# What is refused ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given() -> Posterior:
    return adapted("encoder")


@pytest.mark.parametrize(
    "guide", ["map", "flat", "ensemble", "flat+map", "flat+ensemble", "flat+laplace"]
)
def test_guides_without_a_spread_to_infer_are_refused(guide: str, given: Posterior) -> None:
    able = "choose one of montec, meanfield, lowrank, laplace, tfb, nuts"
    with pytest.raises(ConfigError, match=able) as error:
        pyrolora.fit(given, reviews(4), guide=guide)
    assert repr(pyrolora.guides.full_name(pyrolora.guides.as_guide(guide))) in str(error.value)


@pytest.mark.parametrize("name", ["montec", "meanfield"])
def test_noise_on_weights_is_refused_where_scales_are_computed(name: str, given: Posterior) -> None:
    """It acts in training, and there is none."""
    for guide in (f"flat+{name}", Flat(inner=GUIDES[name], at_prediction=True)):
        with pytest.raises(ConfigError, match=rf"'flat\+{name}' .*'gradient' .*'{name}' alone"):
            pyrolora.fit(given, reviews(4), guide=guide)
    held = Flat(inner=replace(GUIDES[name], hold_back=0.2))
    with pytest.raises(ConfigError, match=rf"'{name}' .* trains nothing .*got hold_back=0\.2"):
        pyrolora.fit(given, reviews(4), guide=held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": AdapterConfig(r=2)}, "adapter= comes with the posterior"),
        ({"task": "classification"}, "task= comes with the posterior"),
        ({"epochs": 2, "guide": "laplace"}, "'laplace' trains nothing.*leave epochs out"),
        ({"epochs": 2, "guide": "montec"}, "'montec'.* trains nothing.*leave epochs out"),
        ({"learning_rate": 0.1, "guide": "nuts"}, "'nuts' trains nothing.*learning_rate out"),
        (
            {"callbacks": [TrainerCallback()], "guide": "laplace"},
            "'laplace' trains nothing.*leave callbacks out",
        ),
        (
            {"epochs": 1, "learning_rate": 0.1, "guide": SHORT},
            "leave epochs, learning_rate out",
        ),
    ],
)
def test_what_the_posterior_brings_or_nothing_uses_is_refused(
    options: dict[str, Any], message: str, given: Posterior
) -> None:
    with pytest.raises(ConfigError, match=message):
        pyrolora.fit(given, reviews(4), **options)


def test_training_arguments_say_batches_and_seed_where_nothing_is_trained(
    given: Posterior, tmp_path: Path, steps: list[int]
) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=3, seed=4,
    )  # fmt: skip
    first = pyrolora.fit(given, reviews(8), guide="laplace", training=args)
    second = pyrolora.fit(given, reviews(8), guide="laplace", batch_size=3, seed=4)
    assert_equal(first.model.own_state(), second.model.own_state())
    assert first.settings["batch_size"] == 3
    assert not steps


@pytest.mark.parametrize("guide", [Ensemble(members=2), Flat(inner=Ensemble(members=2))], ids=str)
@pytest.mark.parametrize("name", ["montec", "laplace"])
def test_an_ensemble_gives_a_member_by_way_of_peft(guide: Guide, name: str, tmp_path: Path) -> None:
    several = adapted("encoder", guide)
    with pytest.raises(ConfigError, match=r"to_peft\(path, draw=k\).*from_peft"):
        pyrolora.fit(several, reviews(4), guide=name)
    several.to_peft(tmp_path, draw=1)
    one = pyrolora.from_peft(tmp_path, PROBLEMS["encoder"].network(), tokenizer=tokenizer())
    expected = said(several, "encoder", 2)[1]
    same(said(post_hoc(one, "encoder", name), "encoder")[0], expected)
