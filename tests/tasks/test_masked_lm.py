"""Masked language modelling: the law of the hidden tokens."""

from __future__ import annotations

import pytest
import torch
from problems import bert, bert_mlm, llama, mask_tokenizer, reviews

from pyrolora.data import prepare
from pyrolora.errors import DataError
from pyrolora.tasks import CausalLM, MaskedLM, TokenTask, task_for

# The texts here are classified elsewhere.
pytestmark = pytest.mark.filterwarnings(r"ignore:the columns \['label'\] are not read")

LABELS = torch.tensor([[-100, 3, -100, 1], [2, -100, -100, -100]])


def test_the_network_calls_for_it() -> None:
    assert type(task_for(bert_mlm())) is MaskedLM
    assert type(task_for(llama())) is CausalLM
    assert not MaskedLM.matches(bert())


def test_log_prob_is_transformers_own_loss_summed() -> None:
    network, law = bert_mlm(), MaskedLM()
    (batch,) = prepare(reviews(20), network, law, mask_tokenizer()).loader(20)
    with torch.no_grad():
        raw = network(**batch)
    found = law.log_prob(law.output(raw), batch)
    assert found.shape == (20,)
    torch.testing.assert_close(-found.sum() / law.count(batch["labels"]), raw.loss)


def test_the_hidden_tokens_of_an_example_add_up_where_they_stand() -> None:
    output = torch.randn(3, 2, 4, 5)
    logs = output.log_softmax(-1)
    expected = torch.stack([logs[:, 0, 1, 3] + logs[:, 0, 3, 1], logs[:, 1, 0, 2]], dim=-1)
    found = MaskedLM().log_prob(output, {"labels": LABELS})
    torch.testing.assert_close(found, expected)


def test_the_first_token_counts_and_not_of_a_causal_model() -> None:
    assert MaskedLM().count(LABELS) == 3
    assert CausalLM().count(LABELS) == 2
    assert MaskedLM().token_mask({"labels": LABELS}).tolist() == LABELS.ne(-100).tolist()
    assert CausalLM().token_mask({"labels": LABELS}).shape == (2, 3)


@pytest.mark.parametrize("law", [MaskedLM(), CausalLM()], ids=lambda law: law.name)
def test_without_labels_all_tokens_but_the_padding_count(law: TokenTask) -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "input_ids": torch.zeros(1, 4)}
    assert law.token_mask(batch).sum() == 3 - law.shift
    assert law.targets(batch) is None
    assert law.token_mask({"input_ids": torch.zeros(1, 4)}).sum() == 4 - law.shift


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 1]), "a masked language model needs one token id per position"),
        (torch.full((2, 3), -100), "nothing to learn"),
        (torch.tensor([[3, 99]]), r"0\.\.16 or -100, got 3\.\.99"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        MaskedLM().check_labels(labels, bert_mlm())


def test_an_output_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"a masked language model gives.*\(2, 4\)"):
        MaskedLM().check_output(torch.zeros(2, 4), LABELS)
