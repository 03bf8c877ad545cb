"""Multiple choice: the law over each example's own choices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from problems import bert, bert_choice, llama, mask_tokenizer, questions
from torch import Tensor

from pyrolora.columns import CHOICE_MASK
from pyrolora.data import prepare
from pyrolora.errors import DataError
from pyrolora.tasks import Classification, MultipleChoice, task_for

OUTPUT = torch.tensor([[0.3, -1.0, 2.0, 5.0], [1.0, 0.5, 9.0, -3.0]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
LABELS = torch.tensor([2, 1])


def batch(mask: Tensor | None = MASK) -> dict[str, Tensor]:
    return {"labels": LABELS} | ({} if mask is None else {CHOICE_MASK: mask})


def test_the_network_calls_for_it() -> None:
    assert type(task_for(bert_choice())) is MultipleChoice
    assert type(task_for(bert(3))) is Classification
    assert not MultipleChoice.matches(llama())


def test_log_prob_is_transformers_own_loss() -> None:
    """With one number of choices, where transformers has a loss."""
    data = [row for row in questions(40) if len(row["choices"]) == 3]
    network, law = bert_choice(), MultipleChoice()
    (made,) = prepare(data, network, law, mask_tokenizer()).loader(40)
    assert made.pop(CHOICE_MASK).all()
    with torch.no_grad():
        raw = network(**made)
    found = law.log_prob(law.output(raw), made)
    assert found.std() > 0.01
    torch.testing.assert_close(-found.mean(), raw.loss)


def test_masked_choices_are_as_if_they_were_not_there() -> None:
    law = MultipleChoice()
    found = law.log_prob(OUTPUT, batch())
    alone = law.log_prob(OUTPUT[1:, :2], {"labels": LABELS[1:]})
    torch.testing.assert_close(found[1:], alone)
    probs = law.law(OUTPUT, batch()).probs
    assert (probs[~MASK] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))


def test_masked_choices_give_no_nan_in_entropy_or_gradient() -> None:
    law, output = MultipleChoice(), OUTPUT.clone().requires_grad_()
    entropy = law.law(output, batch()).entropy()
    p = torch.tensor([1.0, 0.5]).softmax(0)
    torch.testing.assert_close(entropy[1], -(p * p.log()).sum())
    (entropy + law.log_prob(output, batch())).sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
    assert (output.grad[~MASK] == 0).all()
    assert (output.grad[MASK] != 0).all()


def test_masked_choices_are_never_drawn() -> None:
    drawn = MultipleChoice().law(OUTPUT, batch()).sample((500,))
    assert drawn[:, 1].max() == 1
    assert drawn[:, 0].max() == 3


def test_draws_share_the_mask() -> None:
    law = MultipleChoice()
    output = torch.stack([OUTPUT, OUTPUT.flip(0)])
    found = law.log_prob(output, batch())
    assert found.shape == (2, 2)
    torch.testing.assert_close(found[1], law.log_prob(OUTPUT.flip(0), batch()))


def test_without_a_mask_all_choices_count() -> None:
    expected = torch.nn.functional.cross_entropy(OUTPUT, LABELS, reduction="none")
    torch.testing.assert_close(-MultipleChoice().log_prob(OUTPUT, batch(None)), expected)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0.5, 1.0]), "number of the right choice.*float32.*count.*from 0"),
        (torch.tensor([[0, 1]]), r"number of the right choice.*\(1, 2\)"),
        (torch.tensor([0, -1]), ">= 0, got -1"),
    ],
)
def test_labels_that_are_no_choice_are_refused(labels: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        MultipleChoice().check_labels(labels, bert_choice())


def test_an_output_that_is_no_score_a_choice_is_refused() -> None:
    with pytest.raises(DataError, match=r"one score per choice.*\(2, 4, 7\)"):
        MultipleChoice().check_output(torch.zeros(2, 4, 7), LABELS)


def test_padding_and_the_batch_change_no_log_prob() -> None:
    """The network's own scores, of examples with two to four choices: together and one by one."""
    network, law = bert_choice(), MultipleChoice()
    prepared = prepare(questions(12), network, law, mask_tokenizer())

    def scores(size: int) -> Tensor:
        found = []
        for made in prepared.loader(size):
            inputs = {k: v for k, v in made.items() if k not in ("labels", CHOICE_MASK)}
            found.append(law.log_prob(law.output(network(**inputs)), made))
        return torch.cat(found)

    with torch.no_grad():
        alone, together = scores(1), [scores(size) for size in (5, 12)]
    assert alone.std() > 0.1
    for one, other in pairwise([alone, *together]):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
