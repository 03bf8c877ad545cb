"""Generation: each continuation is one function's, and its scores are those of that function."""

from __future__ import annotations

import datasets
import pytest
import torch
from problems import WORDS, bert, gpt2, llama, reviews, tokenizer, tokens
from transformers import (
    GenerationConfig,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import Ensemble, Flat, MonteCLoRA
from pyrolora.model import evaluating
from pyrolora.predictive import Ask, Generation, draw_factors, generate_mixed

WIDE = MonteCLoRA(sample_scale=1.0, init_covariance=1.0)
PROMPTS = ["the film", "good", "the book is not"]


def fitted(network=None, guide=WIDE, **options):
    return pyrolora.fit(
        llama(initializer_range=0.4) if network is None else network,
        reviews(24).remove_columns("label"), guide=guide, epochs=2, learning_rate=0.02, seed=0,
        **{"adapter": AdapterConfig(r=2), "tokenizer": tokenizer(), **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def posterior():
    return fitted()


def opened(text):
    """The tokens of a prompt: without the [SEP] that ends a text."""
    return tokenizer()(text)["input_ids"][:-1]


def alone(posterior, seed, draws, prompt, **options):
    """The continuations that plain networks, one a draw, write to one prompt."""
    factors = draw_factors(posterior.model, draws, seed)
    ids = torch.tensor([opened(prompt)])
    found = []
    for k in range(draws):
        setting = factors[k]
        network = llama(initializer_range=0.4)
        for name, (A, B) in posterior.bank.matrices(setting).items():
            layer = network.get_submodule(name)
            with torch.no_grad():
                layer.weight += posterior.bank.specs[name].scaling * B @ A
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, disable_compile=True,
            **options,
        )  # fmt: skip
        found += out[:, ids.shape[1] :].tolist()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_every_draw_writes_what_a_network_with_its_weights_writes(posterior, options):
    """Prompts of several lengths, draws and beams in one batch, against one network a draw."""
    found = posterior.generate(PROMPTS, 3, seed=5, max_new_tokens=6, **options)
    several = options.get("num_return_sequences", 1)
    assert found.draw.tolist() == [k for k in range(3) for _ in range(several)]
    for i, prompt in enumerate(PROMPTS):
        expected = alone(posterior, 5, 3, prompt, max_new_tokens=6, **options)
        own = [row[m].tolist() for row, m in zip(found.sequences[i], found.mask[i], strict=True)]
        assert own == [ids[: len(o)] for ids, o in zip(expected, own, strict=True)]
        assert all(len(o) == 6 or o[-1] == 2 for o in own)  # cut at the end of text alone
    assert (found.sequences[:, :1] != found.sequences).any(), "the draws are all alike"


def test_rows_are_split_over_passes_without_a_difference(posterior, monkeypatch):
    from pyrolora.predictive import generate

    whole = posterior.generate(PROMPTS, 4, seed=1, max_new_tokens=5)
    factors = draw_factors(posterior.model, 4, 1)
    for rows in (1, 2, 5, 7):
        parts = generate(
            posterior.model, PROMPTS, factors, tokenizer(), rows=rows,
            options={"max_new_tokens": 5},
        )  # fmt: skip
        assert parts.texts == whole.texts
        torch.testing.assert_close(parts.log_likelihood, whole.log_likelihood)


def test_scores_are_those_of_all_draws_on_the_continuations_alone(posterior):
    found = posterior.generate(PROMPTS, 3, seed=5, max_new_tokens=4, do_sample=True)
    factors = draw_factors(posterior.model, 3, 5)
    for i, prompt in enumerate(PROMPTS):
        start = opened(prompt)
        for k in range(3):
            new = found.sequences[i, k][found.mask[i, k]]
            ids = torch.tensor([[*start, *new.tolist()]])
            with torch.no_grad():
                logits = posterior.model.network({"input_ids": ids}, factors)[:, 0]
            log_probs = logits[:, len(start) - 1 : -1].log_softmax(-1)  # (S, T, V)
            own = log_probs.gather(-1, new.expand(3, -1)[..., None]).squeeze(-1)
            torch.testing.assert_close(found.log_likelihood[:, i, k], own.sum(-1))
            mean = log_probs.exp().mean(0)
            entropy = -(mean * mean.log()).sum(-1)
            aleatoric = -(log_probs.exp() * log_probs).sum(-1).mean(0)
            T = len(new)
            torch.testing.assert_close(found.entropy[i, k, :T], entropy, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.aleatoric[i, k, :T], aleatoric, rtol=1e-4, atol=1e-5)
            assert found.entropy[i, k, T:].isnan().all()
    assert (found.epistemic[found.mask] > 0).all()
    best = found.log_likelihood.amax(0)
    assert ((found.log_predictive <= best) & (found.log_predictive >= best - 3**0.5)).all()


def test_a_seed_repeats_draws_and_samples_and_leaves_the_global_numbers_alone(posterior):
    state = torch.get_rng_state()
    first = posterior.generate(PROMPTS, 3, seed=2, max_new_tokens=6, do_sample=True)
    assert torch.equal(torch.get_rng_state(), state)
    again = posterior.generate(PROMPTS, 3, seed=2, max_new_tokens=6, do_sample=True)
    other = posterior.generate(PROMPTS, 3, seed=3, max_new_tokens=6, do_sample=True)
    assert first.texts == again.texts != other.texts


def test_the_mean_adapter_is_one_function():
    posterior = fitted()
    found = posterior.generate(PROMPTS, 0, max_new_tokens=4)
    assert found.sequences.shape[1] == 1
    assert found.draw.tolist() == [0]
    assert (found.epistemic[found.mask].abs() < 1e-6).all()
    assert found.agreement.isnan().all()
    merged = posterior.merge()
    ids = torch.tensor([opened("good")])
    out = merged.generate(ids, max_new_tokens=4, pad_token_id=0)[0, ids.shape[1] :]
    own = found.sequences[1, 0][found.mask[1, 0]]
    assert out[: len(own)].tolist() == own.tolist()


def test_agreement_is_the_mean_similarity_over_pairs_of_draws():
    rows = torch.tensor([[[1, 2, 3], [1, 2, 4], [5, 6, 0]]])
    mask = torch.tensor([[[True] * 3, [True] * 3, [True, True, False]]])
    blank = torch.zeros(1, 3, 3)
    found = Generation(rows, mask, torch.tensor([0, 1, 1]), torch.zeros(2, 1, 3), blank, blank)
    # Two of three tokens shared, none shared; the two of draw 1 are not compared.
    assert found.agreement.tolist() == [pytest.approx((2 * 2 / 6 + 0) / 2)]


def test_ids_and_padded_batches_are_prompts_too(posterior):
    texts = posterior.generate(PROMPTS, 2, seed=0, max_new_tokens=3)
    ids = [opened(prompt) for prompt in PROMPTS]
    assert posterior.generate(ids, 2, seed=0, max_new_tokens=3).texts == texts.texts
    ragged = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    assert posterior.generate(ragged, 2, seed=0, max_new_tokens=3).texts == texts.texts
    padded = tokenizer().pad(ragged, padding_side="right", return_tensors="pt")
    assert posterior.generate(padded, 2, seed=0, max_new_tokens=3).texts == texts.texts
    one = posterior.generate(torch.tensor(ids[:1]), 2, seed=0, max_new_tokens=3)
    assert one.texts == texts.texts[:1]


def test_without_a_tokenizer_there_are_ids_alone():
    network = llama(initializer_range=0.4)
    posterior = pyrolora.fit(
        network, tokens(8).remove_columns("labels"), epochs=1, adapter=AdapterConfig(r=1), seed=0
    )
    found = posterior.generate([[4, 5, 6], [7]], 2, max_new_tokens=3)
    assert found.texts is found.tokens is found.prompts is None
    assert "text" not in found.to_pandas()
    with pytest.raises(DataError, match="there is no tokenizer"):
        posterior.generate(["the film"])


def test_settings_of_the_network_hold_where_none_are_given(monkeypatch):
    """Those of ``generation_config=`` go before them, and single options before both."""
    posterior = fitted()
    own = posterior.base.generation_config
    reference = posterior.generate(PROMPTS, 3, seed=5, max_new_tokens=8)
    end = int(reference.sequences[reference.mask][1])
    monkeypatch.setattr(own, "eos_token_id", end)
    monkeypatch.setattr(own, "num_beams", 2)
    monkeypatch.setattr(own, "num_return_sequences", 2)
    monkeypatch.setattr(own, "return_dict_in_generate", True)
    plain = posterior.generate(PROMPTS, 3, seed=5, max_new_tokens=8)
    given = GenerationConfig(max_new_tokens=8)
    same = posterior.generate(PROMPTS, 3, seed=5, generation_config=given)
    assert same.texts == plain.texts
    torch.testing.assert_close(same.log_likelihood, plain.log_likelihood)
    assert plain.sequences.shape[1] == 6
    ended = [row[m].tolist() for row, m in zip(same.sequences[0], same.mask[0], strict=True)]
    assert all(len(row) == 8 or row.index(end) == len(row) - 1 for row in ended)
    one = posterior.generate(
        PROMPTS, 3, seed=5, generation_config=given, num_beams=1, num_return_sequences=1
    )
    assert one.sequences.shape[1] == 3
    assert given.num_beams is None, "what was given is changed"
    assert own.pad_token_id == 0


def test_lengths_come_from_the_options_then_the_network_then_the_default(monkeypatch):
    posterior = fitted(llama(initializer_range=0.4, eos_token_id=None))
    assert posterior.generate(["good"], 1, seed=0).sequences.shape[-1] == 30  # to the context's end
    monkeypatch.setattr(posterior.base.generation_config, "max_new_tokens", 7)
    assert posterior.generate(["good"], 1, seed=0).sequences.shape[-1] == 7
    assert posterior.generate(["good"], 1, seed=0, max_new_tokens=5).sequences.shape[-1] == 5


def test_a_table_has_a_row_a_continuation(posterior):
    found = posterior.generate(PROMPTS, 2, seed=0, max_new_tokens=3, num_beams=2)
    table = found.to_pandas()
    assert table["prompt"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table["draw"].tolist() == [0, 1] * 3
    assert table["text"].tolist() == [text for texts in found.texts for text in texts]
    assert (table["entropy"] - table["aleatoric"] - table["epistemic"]).abs().max() < 1e-6
    own = found.sequences[2, 1][found.mask[2, 1]].tolist()
    assert found.tokens[2][1] == [tokenizer().decode([i]) for i in own]
    assert "draws=2" in repr(found)


@pytest.mark.parametrize(
    "guide",
    ["map", "meanfield", Ensemble(members=2), Flat(inner=WIDE, at_prediction=True)],
    ids=str,
)
def test_other_guides_write_too(guide):
    posterior = fitted(gpt2(), guide)
    found = posterior.generate(["the film", "good good good"], max_new_tokens=3, seed=0)
    draws = 2 if isinstance(guide, Ensemble) else 8
    assert found.sequences.shape[:2] == (2, draws)
    assert torch.isfinite(found.log_likelihood).all()
    if guide == "map":
        torch.testing.assert_close(found.agreement, torch.ones(2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"num_beams": 4, "num_beam_groups": 2}, "group_beam_search"),
        ({"dola_layers": "low"}, "dola_generation"),
        ({"custom_generate": "some/where"}, "custom_generate"),
        ({"stopping_criteria": ["any"]}, "stopping_criteria"),
        ({"streamer": "any"}, "streamer prints one text .* 6 are written"),
        ({"attention_mask": torch.ones(1, 2)}, "as a mapping with input_ids and attention_mask"),
        ({"stop_strings": ["good", 3]}, "stop_strings must be texts"),
        ({"stop_strings": ""}, "stop_strings must be texts, got ''"),
        ({"tokenizer": "any"}, "tokenizer itself"),
        ({"max_tokens": 3}, r"no options \['max_tokens'\]"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        (
            {"num_return_sequences": 3, "num_beams": 2, "do_sample": True},
            "smaller or equal",
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_decoding_that_mixes_rows_is_refused(posterior, options, reason):
    with pytest.raises(ConfigError, match=reason):
        posterior.generate(PROMPTS, 2, **options)


def test_a_network_whose_code_mixes_rows_writes_one_at_a_time():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 32}
    config = RwkvConfig(**sizes, vocab_size=len(WORDS), bos_token_id=None, eos_token_id=3)
    network = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        rows = torch.tensor([[4], [9]])
        each = torch.cat([network(row[None]).logits for row in rows])
        assert (network(rows).logits - each).abs().max() > 1e-4  # otherwise nothing is to be kept
    posterior, options = fitted(network), {"max_new_tokens": 5, "do_sample": False}
    together = posterior.generate(PROMPTS, draws=[0, 1], **options)
    for prompt, texts in zip(PROMPTS, together.texts, strict=True):
        alone = [posterior.generate([prompt], draws=[k], **options).texts[0] for k in (0, 1)]
        assert texts == [text for texts in alone for text in texts]
    draws = posterior.predictor.drawn(None, None, (0, 1))
    asked = [
        Ask(posterior.predictor, opened(prompt), None, None, (0, 1), options, *draws)
        for prompt in PROMPTS
    ]
    assert [made.texts[0] for made in generate_mixed(asked)] == together.texts
    with pytest.raises(ConfigError, match="num_return_sequences=2 needs rows beside"):
        posterior.generate(PROMPTS, 0, do_sample=True, num_return_sequences=2, max_new_tokens=2)


def test_texts_of_one_token_are_scored_apart_by_a_network_whose_code_mixes_rows():
    """It mixes them where it keeps a state, which a pass that only scores asks for none of."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 32}
    config = RwkvConfig(**sizes, vocab_size=len(WORDS), bos_token_id=None, eos_token_id=3)
    posterior = fitted(RwkvForCausalLM(config).eval())
    ids = torch.tensor([[4], [9], [7]])
    factors = posterior.predictor.factors(2, 0, None)
    with torch.no_grad(), evaluating(posterior.model):
        together = posterior.model.network({"input_ids": ids}, factors)
        alone = [posterior.model.network({"input_ids": row[None]}, factors) for row in ids]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_refused_in_words(posterior):
    with pytest.raises(DataError, match="pass prompts as a list"):
        posterior.generate("the film")
    with pytest.raises(DataError, match="there are no prompts"):
        posterior.generate([])
    with pytest.raises(DataError, match=r"must be \(n, T\)"):
        posterior.generate(torch.zeros(3, dtype=torch.long))
    with pytest.raises(DataError, match="prompt 1 is no list of token ids, or has none"):
        posterior.generate([[4, 5], []])
    with pytest.raises(DataError, match="prompt 0 is no list of token ids"):
        posterior.generate([4, 5])
    with pytest.raises(DataError, match=r"'text' here, and the data has \['answer'\]"):
        posterior.generate([{"text": "the film", "answer": "good"}])
    with pytest.raises(DataError, match=r"got -1\.\.4"):
        posterior.generate([[4, -1]])
    short = fitted(llama(max_position_embeddings=16))
    with pytest.raises(DataError, match=r"prompt 1 has 9 tokens.*19; the network has 16"):
        short.generate([[4], [4] * 9], max_new_tokens=10)
    with pytest.raises(DataError, match=r"token ids must be in 0\.\."):
        posterior.generate([[4, 5000]])
    with pytest.raises(DataError, match="got int"):
        posterior.generate(3)
    classifier = pyrolora.fit(bert(), tokens(), epochs=1, adapter=AdapterConfig(r=1), seed=0)
    with pytest.raises(ConfigError, match=r"causal language model.*BertForSequenceClassification"):
        classifier.generate(["the film"])


def test_settings_that_transformers_refuses_are_refused_in_words(posterior):
    with pytest.raises(DataError, match="prompt 1 has 4 tokens, which max_length=4 counts"):
        posterior.generate([[4], [4] * 4], 2, max_length=4)
    for word, options in (
        ("temperature", {"temperature": 0.0, "do_sample": True}),
        ("penalty", {"repetition_penalty": -1.0}),
    ):
        with pytest.raises(ConfigError, match=word):
            posterior.generate([[4, 5]], 2, **options)


def test_prompts_of_other_kinds_are_refused_in_words(posterior):
    with pytest.raises(DataError, match="have to be texts, all of them"):
        posterior.generate(["the film", None])
    with pytest.raises(DataError, match="has no chat template"):
        posterior.generate([[{"role": "user", "content": "the film"}]])
    with pytest.raises(DataError, match="attention_mask differ in shape"):
        posterior.generate({"input_ids": [[4, 5]], "attention_mask": [[1]]})
    with pytest.raises(DataError, match="a mapping with 'input_ids'"):
        posterior.generate({"tokens": [[4, 5]]})


def roberta() -> RobertaForCausalLM:
    """A decoder whose table of positions has room for 12 of its 14."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "is_decoder": True,
    }
    config = RobertaConfig(
        **sizes, intermediate_size=16, vocab_size=len(WORDS), max_position_embeddings=14,
        pad_token_id=1,
    )  # fmt: skip
    return RobertaForCausalLM(config).eval()


def test_a_decoder_whose_positions_count_from_the_padding_on():
    own = pyrolora.fit(
        roberta(), reviews(8).remove_columns("label"), "map", tokenizer=tokenizer(), epochs=1,
        adapter=AdapterConfig(r=1, target_modules=["query"]),
    )  # fmt: skip
    with pytest.raises(DataError, match="the network has 12 positions"):
        own.generate([[4] * 10], 0, max_new_tokens=4)
    assert own.generate([[4] * 10], 0).sequences.shape[-1] <= 2
    question = " ".join(["the film is good"] * 5)
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 12 tokens and are cut"):
        found = own.predict([{"question": question, "choices": ["good", "dull"]}], 0)
    assert found.probs.shape == (1, 2)


def test_other_texts_may_be_a_training_split(posterior):
    found = posterior.evaluate(
        reviews(4).remove_columns("label"),
        0,
        outside=datasets.DatasetDict(train=reviews(3).remove_columns("label")),
    )
    assert 0 <= found["ood_auroc"] <= 1
