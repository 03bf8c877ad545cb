"""Multiple choice and masked language models, from the data to the scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from console import saved
from problems import bert_choice, bert_mlm, mask_tokenizer, questions, reviews

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.columns import CHOICE_MASK
from pyrolora.data import prepare
from pyrolora.predictive import ClassPrediction, TokenPrediction
from pyrolora.predictive.metrics import values
from pyrolora.tasks import CausalLM, MaskedLM

# The texts here are classified elsewhere.
pytestmark = pytest.mark.filterwarnings(r"ignore:the columns \['label'\] are not read")

SETTINGS: dict[str, Any] = {"epochs": 5, "batch_size": 8, "learning_rate": 0.03, "seed": 0}
CASES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "choice": (bert_choice, questions),
    "masked": (bert_mlm, reviews),
}


def fit(case: str, guide: str = "map", **options: Any) -> Posterior:
    network, data = CASES[case]
    chosen = {**SETTINGS, "tokenizer": mask_tokenizer(), "adapter": AdapterConfig(r=2), **options}
    return pyrolora.fit(network(), data(48), guide=guide, **chosen)


@pytest.fixture(scope="module")
def choice() -> Posterior:
    return fit("choice", "montec")


@pytest.fixture(scope="module")
def masked() -> Posterior:
    return fit("masked", "montec")


@pytest.mark.parametrize("guide", ["map", "montec"])
def test_choices_are_learned(guide: str, request: pytest.FixtureRequest) -> None:
    posterior = fit("choice") if guide == "map" else request.getfixturevalue("choice")
    scores = posterior.evaluate(questions(30, seed=1), num_samples=4, seed=0)
    assert scores.keys() == {"accuracy", "nll", "ece", "brier", "error_auroc", "aurc"}
    assert scores["accuracy"] > 0.9
    assert scores["nll"] < 0.5


def test_a_loss_beyond_a_floats_exponent_is_an_infinite_perplexity() -> None:
    for loss, expected in ((700.0, math.exp(700)), (800.0, math.inf)):
        said = torch.full((1, 2), -2 * loss)
        prediction = TokenPrediction(
            targets=torch.zeros(2, 2),
            log_likelihood=said,
            num_tokens=torch.tensor([2, 2]),
            entropy=torch.zeros(2),
            aleatoric=torch.zeros(2),
        )
        assert float(values(prediction)["perplexity"]) == pytest.approx(expected)


@pytest.mark.parametrize("guide", ["map", "montec"])
def test_hidden_tokens_are_learned(guide: str, request: pytest.FixtureRequest) -> None:
    posterior = fit("masked") if guide == "map" else request.getfixturevalue("masked")
    test = reviews(40, seed=1)
    untrained = fit("masked", epochs=1, batch_size=48, learning_rate=1e-8)
    scores = posterior.evaluate(test, num_samples=4, seed=0)
    assert scores.keys() == {"nll", "perplexity"}
    assert scores["nll"] < untrained.evaluate(test, num_samples=0)["nll"] - 0.5
    assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"]), rel=1e-6)


def test_batches_with_few_choices_are_padded_to_the_most(choice: Posterior) -> None:
    """Whatever the batches, the probabilities are those of the example's own choices."""
    data = sorted(questions(20, seed=2), key=lambda row: len(row["choices"]))
    sizes = torch.tensor([len(row["choices"]) for row in data])
    assert sizes[:4].max() < sizes.max() == 4
    found = choice.predict(data, num_samples=3, seed=0, batch_size=4)
    assert isinstance(found, ClassPrediction)
    assert found.draws.shape == (3, 20, 4)
    beyond = torch.arange(4) >= sizes[:, None]
    assert (found.draws[:, beyond] == 0).all()
    torch.testing.assert_close(found.draws.sum(-1), torch.ones(3, 20))
    whole = choice.predict(data, num_samples=3, seed=0, batch_size=20)
    torch.testing.assert_close(found.draws, whole.draws)
    assert found.log_likelihood is not None
    assert found.targets is not None
    own = found.draws[:, torch.arange(20), found.targets].log()
    torch.testing.assert_close(found.log_likelihood, own, atol=1e-5, rtol=1e-4)
    drawn, _ = found.predictive_draws()["y"]
    assert (drawn < sizes).all()
    assert found.to_pandas().notna().all().all()


def test_scores_of_hidden_tokens_are_of_the_tokens_that_count(masked: Posterior) -> None:
    test = reviews(15, seed=2)
    prediction = masked.predict(test, num_samples=3, seed=0, batch_size=4)
    assert isinstance(prediction, TokenPrediction)
    (batch,) = prepare(test, masked.base, MaskedLM(), mask_tokenizer()).loader(15)
    hidden = batch["labels"].ne(-100)
    assert torch.equal(prediction.num_tokens, hidden.sum(1))
    assert torch.equal(~prediction.entropy.isnan(), hidden)
    assert torch.equal(prediction.targets, batch["labels"])
    assert (prediction.aleatoric[hidden] <= prediction.entropy[hidden] + 1e-6).all()
    scores = masked.evaluate(test, num_samples=3, seed=0)
    expected = -prediction.log_predictive.sum() / hidden.sum()
    torch.testing.assert_close(scores["nll"], expected.item())


@pytest.mark.parametrize(("kind", "places"), [(MaskedLM, [0, 2]), (CausalLM, [1])])
def test_entropies_stand_where_their_tokens_are_predicted(kind: type, places: list[int]) -> None:
    """One draw: its entropy is the total, and the aleatoric one."""
    output = torch.randn(1, 1, 3, 5)
    labels = torch.tensor([[4, -100, 1]])
    record = TokenPrediction.reduce(kind(), [output], {"labels": labels})
    found = TokenPrediction.collect([record], kind())
    probs = output[0, 0].softmax(-1)
    expected = -(probs * probs.log()).sum(-1)[places]
    assert (~found.entropy.isnan()).sum() == len(places)
    torch.testing.assert_close(found.entropy[~found.entropy.isnan()], expected)
    torch.testing.assert_close(found.aleatoric[~found.entropy.isnan()], expected)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_posterior_predicts_the_same(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    network, data = CASES[case]
    posterior: Posterior = request.getfixturevalue(case)
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, network())
    assert type(loaded.task) is type(posterior.task)
    test = data(7, seed=3)
    expected = posterior.predict(test, num_samples=3, seed=0).log_likelihood
    found = loaded.predict(test, num_samples=3, seed=0).log_likelihood
    torch.testing.assert_close(found, expected)
    idata = loaded.to_arviz(4, data=test, log_likelihood=True)
    assert idata["log_likelihood"]["y"].shape == (1, 4, 7)


@pytest.mark.filterwarnings("ignore:new weights in bert.pooler")
@pytest.mark.parametrize("case", CASES)
def test_a_folder_and_data_are_enough(case: str, tmp_path: Path) -> None:
    """A masked language model on disk, and the data says what it is for."""
    folder = saved(bert_mlm(), tmp_path)
    mask_tokenizer().save_pretrained(folder)
    data = CASES[case][1](8)
    if case == "masked":
        data = data.remove_columns("label")
    posterior = pyrolora.fit(folder, data, guide="map", epochs=1, seed=0)
    assert posterior.task.name == {"choice": "multiple-choice", "masked": "fill-mask"}[case]
    scores = posterior.evaluate(data, num_samples=0)
    assert torch.isfinite(torch.tensor(scores["nll"]))


def test_the_merged_network_scores_choices_as_the_mean_adapter(choice: Posterior) -> None:
    data = questions(6, seed=4)
    found = choice.predict(data, num_samples=0)
    assert isinstance(found, ClassPrediction)
    (batch,) = prepare(data, choice.base, choice.task, mask_tokenizer()).loader(6)
    inputs = {k: v for k, v in batch.items() if k not in ("labels", CHOICE_MASK)}
    with torch.no_grad():
        scores = choice.merge()(**inputs).logits.masked_fill(~batch[CHOICE_MASK], -torch.inf)
    torch.testing.assert_close(found.probs, scores.softmax(-1), atol=1e-5, rtol=1e-4)


def test_masks_in_a_text_say_what_is_to_be_predicted() -> None:
    """Nothing else is hidden then, and the mask has an uncertainty."""
    words = mask_tokenizer()
    text = f"the film was {words.mask_token}"
    made = prepare([text], bert_mlm(), MaskedLM(), words, need_labels=False)
    (batch,) = made.loader(1)
    assert batch["input_ids"].tolist() == [words(text)["input_ids"]]
    assert made.labels is None
    prediction = fit("masked").predict([text], 4, seed=0)
    place = words(text)["input_ids"].index(words.mask_token_id)
    assert torch.isfinite(prediction.entropy[0, place])
    assert prediction.targets is None


def test_what_a_text_hides_does_not_depend_on_its_neighbours() -> None:
    texts = reviews(6)["text"]
    alone = prepare([texts[4]], bert_mlm(), MaskedLM(), mask_tokenizer()).labels
    among = prepare(list(texts), bert_mlm(), MaskedLM(), mask_tokenizer()).labels
    assert alone is not None
    assert among is not None
    assert torch.equal(among[4][: alone.shape[1]], alone[0])
