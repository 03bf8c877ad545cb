"""Semantic entropy: known answers on made-up clusters, and the three ways to find clusters."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import Entailment, Generation, Similarity
from pyrolora.predictive.meanings import by_frequency, by_likelihood, meanings


def generation(texts, scores, writers, prompts=None):
    """Texts (n x K), each of them one token, with log-likelihoods (S, n, K)."""
    known = sorted({text for row in texts for text in row})
    ids = torch.tensor([[[known.index(text)] for text in row] for row in texts])
    return Generation(
        sequences=ids, mask=torch.ones_like(ids).bool(), draw=torch.tensor(writers),
        log_likelihood=torch.as_tensor(scores, dtype=torch.float32),
        entropy=torch.zeros(ids.shape), aleatoric=torch.zeros(ids.shape),
        prompts=prompts or ["?"] * len(texts), texts=texts,
    )  # fmt: skip


def initial(prompt, first, second):
    return first[0] == second[0]


def h(*shares):
    return -sum(p * math.log(p) for p in shares if p)


def test_frequencies_of_made_up_clusters():
    """Two draws, three texts each: draw 0 says one thing twice, draw 1 the other always."""
    clusters = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    found = by_frequency(clusters, torch.tensor([4, 4, 4, 9, 9, 9]))
    assert found.entropy.tolist() == pytest.approx([h(1 / 3, 2 / 3), 0.0])
    assert found.aleatoric.tolist() == pytest.approx([h(2 / 3, 1 / 3) / 2, 0.0])
    assert found.epistemic.tolist() == pytest.approx([h(1 / 3, 2 / 3) / 2, 0.0], abs=1e-7)
    assert found.confidence[0].tolist() == pytest.approx([1 / 3] * 2 + [2 / 3] * 4)


def test_likelihoods_of_made_up_clusters():
    """p_0 = (.6, .2, .2) and p_1 = (.1, .4, .5) of three texts, the last two of one meaning."""
    scores = torch.tensor([[[0.6, 0.2, 0.2]], [[0.1, 0.4, 0.5]]]).log() - 3  # any constant
    found = by_likelihood(torch.tensor([[0, 1, 1]]), scores)
    assert found.draws[:, 0].flatten().tolist() == pytest.approx([0.6, 0.4, 0.1, 0.9])
    assert float(found.entropy) == pytest.approx(h(0.35, 0.65))
    assert float(found.aleatoric) == pytest.approx((h(0.6, 0.4) + h(0.1, 0.9)) / 2)
    assert float(found.entropy) == pytest.approx(float(found.aleatoric + found.epistemic))
    apart = by_likelihood(torch.tensor([[0, 1, 2]]), scores)
    assert float(apart.entropy) > float(found.entropy)  # of finer meanings


def test_the_same_tokens_count_once_by_likelihood_and_each_time_by_frequency():
    scores = [[[0.5, 0.5, 0.25]], [[0.3, 0.3, 0.3]]]
    written = generation([["ab", "ab", "cd"]], np.log(scores), [0, 0, 1])
    found = written.semantic_entropy(initial)
    assert found.draws[:, 0].tolist() == [pytest.approx([2 / 3, 1 / 3]), pytest.approx([0.5, 0.5])]
    counted = written.semantic_entropy(initial, weights="frequency")
    assert counted.probs.tolist() == [pytest.approx([0.5, 0.5])]  # draws weigh the same
    assert float(counted.aleatoric) == 0


def test_one_text_per_draw_has_no_parts_by_frequency_but_by_likelihood():
    written = generation([["ab", "cd"]], np.log([[[0.5, 0.25]], [[0.25, 0.5]]]), [0, 1])
    counted = written.semantic_entropy(initial, weights="frequency")
    assert float(counted.entropy) == pytest.approx(math.log(2))
    assert counted.aleatoric.isnan().all()
    assert counted.epistemic.isnan().all()
    found = written.semantic_entropy(initial)
    assert float(found.aleatoric) == pytest.approx(h(1 / 3, 2 / 3))
    assert float(found.epistemic) == pytest.approx(math.log(2) - h(1 / 3, 2 / 3))


def test_likelihoods_per_token_are_those_of_the_geometric_mean():
    written = generation([["ab", "cd"]], np.log([[[0.5, 0.25]]]), [0, 0])
    longer = Generation(
        **{**vars(written), "sequences": written.sequences.repeat(1, 1, 2),
           "mask": torch.tensor([[[True, False], [True, True]]])}
    )  # fmt: skip
    found = longer.semantic_entropy(initial, per_token=True)
    assert found.draws[0, 0].tolist() == pytest.approx([0.5, 0.5])


def test_a_text_joins_the_first_cluster_whose_first_text_means_the_same():
    asked = []

    def same(prompt, first, second):
        asked.append((first, second))
        return abs(int(first) - int(second)) <= 1

    assert meanings("?", ["1", "2", "3", "2", "0"], same) == [0, 0, 1, 0, 0]
    assert ("3", "2") not in asked  # "2" is known
    assert len(asked) == len({*asked})


class Inference(torch.nn.Module):
    """Entails where the second text has no word that the first lacks."""

    def __init__(self, names=("contradiction", "neutral", "entailment")):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(names)), name_or_path="stub")
        self.device = torch.device("cpu")

    def forward(self, pairs):
        entails = [{*second.split()} <= {*first.split()} for first, second in pairs]
        logits = torch.tensor([[0.0, 1.0, 2.0 if yes else 0.0] for yes in entails])
        return SimpleNamespace(logits=logits)


class Pairs(dict):
    def to(self, device):
        return self


def pairs(first, second, **options):
    return Pairs(pairs=[*zip(first, second, strict=True)])


def test_entailment_has_to_hold_in_both_directions():
    same = Entailment(Inference(), pairs, batch_size=2)
    assert same("", "the film is good", "good is the film")
    assert not same("", "the film is good", "the film")  # only in one
    assert not same("", "the film", "the film is good")
    texts = ["good film", "film good", "bad", "good", "film good good"]
    assert meanings("is it", texts, same) == [0, 0, 1, 2, 0]
    # with the prompt before each answer, one that repeats it says no more
    assert same("the film is", "good", "the film is good")
    assert not Entailment(Inference(), pairs, with_prompt=False)("the film", "good", "the good")


def test_the_model_of_entailment_keeps_its_mode():
    model = Inference()
    model.dropout, model.frozen = torch.nn.Dropout(), torch.nn.Dropout().eval()
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append(model.dropout.training))
    assert Entailment(model, pairs)("", "the film", "film the")
    assert modes == [False]
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_a_model_without_a_class_of_entailment_is_refused():
    with pytest.raises(ConfigError, match=r"one class named 'entailment'.*'LABEL_0', 'LABEL_1'"):
        Entailment(Inference(("LABEL_0", "LABEL_1")), pairs)
    with pytest.raises(ConfigError, match=r"cannot load the model of entailment '/no/such"):
        Entailment("/no/such")


def test_similarity_is_the_cosine_of_embeddings():
    angles = {"a": 0.0, "b": 0.1, "c": 0.3, "d": 3.0}

    class Encoder:
        def encode(self, texts):
            return np.array([[math.cos(angles[t]), math.sin(angles[t])] for t in texts]) * 5

    for encode in (Encoder(), Encoder().encode):
        same = Similarity(encode, threshold=math.cos(0.2))
        assert meanings("", ["a", "b", "c", "d", "b"], same) == [0, 0, 1, 2, 0]
    assert Similarity(Encoder(), 1.0)("", "a", "a")
    with pytest.raises(ConfigError, match="threshold"):
        Similarity(Encoder(), 1.5)
    with pytest.raises(ConfigError, match="encode must be a function"):
        Similarity("a-model")


@pytest.mark.parametrize("score", [0.2, 0, None, torch.tensor(0.1)])
def test_a_score_is_no_verdict(score):
    written = generation([["ab", "cd"]], np.log([[[0.5, 0.25]]]), [0, 0])
    with pytest.raises(ConfigError, match=r"must return True or False, got .*from where on"):
        written.semantic_entropy(lambda prompt, first, second: score)


def test_what_cannot_be_clustered_is_refused():
    written = generation([["ab", "cd"]], np.zeros((1, 1, 2)), [0, 0])
    with pytest.raises(ConfigError, match="same must be a function"):
        written.semantic_entropy("exact")
    with pytest.raises(ConfigError, match="weights must be one of 'likelihood', 'frequency'"):
        written.semantic_entropy(initial, weights="counts")
    with pytest.raises(ConfigError, match="per_token=True is for weights='likelihood'"):
        written.semantic_entropy(initial, weights="frequency", per_token=True)
    silent = Generation(**{**vars(written), "texts": None})
    with pytest.raises(DataError, match="there are only token ids"):
        silent.semantic_entropy(initial)
