"""lm-evaluation-harness reads a posterior: its own figures on a merged mean, and mixtures."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import bert, llama, reviews, texts, writer_tokenizer

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.errors import ConfigError

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from pyrolora.harness import PosteriorLM

PAIRS = [
    ("the film was", " good"),
    ("the film was", " bad"),
    ("the film was", " very bad book"),
    ("", "the book is good"),
    ("a very dull film", " is not"),
]


@pytest.fixture(scope="module")
def fitted() -> Posterior:
    torch.manual_seed(0)
    tokenizer = writer_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    return pyrolora.fit(
        llama(initializer_range=0.3),
        texts(16),
        pyrolora.guides.MeanField(init_scale=0.3),
        tokenizer=tokenizer,
        adapter=AdapterConfig(r=2),
        epochs=1,
        learning_rate=0.05,
    )


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def of_mean(fitted: Posterior, **options: Any) -> tuple[HFLM, PosteriorLM]:
    network = fitted.merge()
    theirs = HFLM(
        pretrained=network, tokenizer=copy.deepcopy(fitted.tokenizer), batch_size=2, **options
    )
    return theirs, PosteriorLM(fitted, num_samples=0, batch_size=2, **options)


def test_the_harness_knows_the_model_by_name():
    assert get_model("pyrolora") is PosteriorLM


def test_without_draws_the_figures_are_the_harnesses_own_of_the_merged_mean(fitted: Posterior):
    theirs, ours = of_mean(fitted)
    requests = [asked(*pair) for pair in PAIRS]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], abs=1e-4)


def test_without_draws_documents_and_texts_are_the_harnesses_own(fitted: Posterior):
    theirs, ours = of_mean(fitted, max_length=8)
    documents = [asked("the film was very good not bad a book is fine the film"), asked("a book")]
    assert ours.loglikelihood_rolling(documents, disable_tqdm=True) == pytest.approx(
        theirs.loglikelihood_rolling(documents, disable_tqdm=True), abs=1e-4
    )
    theirs, ours = of_mean(fitted)
    settings = {"until": ["book"], "max_gen_toks": 6}
    prompts = [asked("the film was", settings), asked("very", settings), asked("a", settings)]
    assert ours.generate_until(prompts, disable_tqdm=True) == theirs.generate_until(
        prompts, disable_tqdm=True
    )


def by_hand(fitted: Posterior, number: int, context: str, continuation: str) -> list[float]:
    """The log-probabilities of the tokens under the merged network of one draw."""
    network, tokenizer = fitted.merge(number), fitted.tokenizer
    before = tokenizer.encode(context)
    ids = torch.tensor([before + tokenizer.encode(continuation)])
    with torch.no_grad():
        logs = network(input_ids=ids).logits[0].log_softmax(-1)
    return [float(logs[t - 1, ids[0, t]]) for t in range(len(before), ids.shape[1])]


def test_a_likelihood_is_that_of_the_mixture_of_whole_networks(fitted: Posterior):
    ours = PosteriorLM(fitted, draws=[0, 1, 2], batch_size=3)
    context, continuation = "the film was", " very bad book"
    ((log, _),) = ours.loglikelihood([asked(context, continuation)], disable_tqdm=True)
    sums = [sum(by_hand(fitted, k, context, continuation)) for k in range(3)]
    mixture = math.log(sum(map(math.exp, sums)) / 3)
    assert log == pytest.approx(mixture, abs=1e-4)
    per_token = [by_hand(fitted, k, context, continuation) for k in range(3)]
    product = sum(math.log(sum(map(math.exp, col)) / 3) for col in zip(*per_token, strict=True))
    assert abs(mixture - product) > 1e-3, "the two readings differ here"


def test_a_document_in_windows_is_one_text_to_every_draw(fitted: Posterior):
    whole = PosteriorLM(fitted, draws=[0, 1, 2])
    ours = PosteriorLM(fitted, draws="0+1+2", max_length=4)
    document = "the film was very good not bad"
    singles = [PosteriorLM(fitted, draws=[k], max_length=4) for k in range(3)]
    sums = [s.loglikelihood_rolling([asked(document)], disable_tqdm=True)[0] for s in singles]
    mixture = math.log(sum(map(math.exp, sums)) / 3)
    (found,) = ours.loglikelihood_rolling([asked(document)], disable_tqdm=True)
    assert found == pytest.approx(mixture, abs=1e-4)
    assert whole.factors.draws == ours.factors.draws == 3


def test_a_continuation_is_greedy_where_the_mixture_would_write_it(fitted: Posterior):
    """By the chain rule the mixture writes the likeliest token after those so far."""
    ours = PosteriorLM(fitted, draws=[0, 1, 2])
    context, vocabulary = "the film was", fitted.tokenizer.get_vocab()
    words = [word for word in vocabulary if not word.startswith("[")]
    written = ""
    for _ in range(2):
        requests = [asked(context, f"{written} {word}") for word in words]
        found = ours.loglikelihood(requests, disable_tqdm=True)
        best = max(range(len(words)), key=lambda i: found[i][0])
        greedy = [i for i, (_, is_greedy) in enumerate(found) if is_greedy]
        assert greedy in ([best], []), "[]: a special token is likelier than every word"
        written = f"{written} {words[best]}"


def test_batches_and_shared_rows_change_nothing(fitted: Posterior):
    requests = [asked(*pair) for pair in PAIRS]
    one, many = (
        PosteriorLM(fitted, num_samples=3, batch_size=size).loglikelihood(
            requests, disable_tqdm=True
        )
        for size in (1, "4")
    )
    assert [log for log, _ in one] == pytest.approx([log for log, _ in many], abs=1e-4)


def test_the_temperature_of_the_posterior_holds(fitted: Posterior):
    request = [asked(*PAIRS[0])]
    plain = PosteriorLM(fitted, num_samples=0).loglikelihood(request, disable_tqdm=True)[0][0]
    fitted.temperature = 3.0
    try:
        warm = PosteriorLM(fitted, num_samples=0).loglikelihood(request, disable_tqdm=True)[0][0]
    finally:
        fitted.temperature = 1.0
    assert warm != pytest.approx(plain, abs=1e-3)


def test_a_folder_is_loaded_with_the_arguments_of_the_command(fitted: Posterior, tmp_path: Any):
    fitted.save(tmp_path)
    made = PosteriorLM.create_from_arg_string(
        f"posterior={tmp_path},num_samples=2,seed=1", {"batch_size": "2", "model": fitted.base}
    )
    assert made.factors.draws == 2
    assert made.get_model_info()["num_samples"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, r"no options \['dtype'\]"),
        ({"max_batch_size": 4}, r"no options \['max_batch_size'\]"),
        ({"draws": "0,1"}, "joined by '[+]'"),
        ({"batch_size": "auto"}, "batch_size"),
        ({"draws": [0], "num_samples": 2}, "draws= names the draws"),
    ],
)
def test_options_without_an_effect_are_refused(
    fitted: Posterior, options: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        PosteriorLM(fitted, **options)


def test_a_posterior_that_writes_nothing_is_refused():
    posterior = pyrolora.fit(bert(), reviews(8), "map", tokenizer=writer_tokenizer(), epochs=1)
    with pytest.raises(ConfigError, match="scores texts by a causal language model"):
        PosteriorLM(posterior)


def test_a_model_without_a_posterior_is_refused():
    with pytest.raises(ConfigError, match="pass posterior=DIR in model_args"):
        PosteriorLM.create_from_arg_string("num_samples=2")
