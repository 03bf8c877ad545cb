"""Reward modelling: which of two texts is preferred, by the difference of their rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import datasets
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import CHOICE_MASK, LABELS, MARGIN, Batch
from pyrolora.data.columns import has_preferences
from pyrolora.data.examples import first_of, is_nested
from pyrolora.data.preferences import encode_preferences
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.classification import Classification, ClassPrediction
from pyrolora.tasks.evidence import Baseline
from pyrolora.tasks.heads import load_head
from pyrolora.tasks.multiple_choice import ChoiceCollator
from pyrolora.tasks.prediction import Prediction, joined, table_of

NAMES = ("chosen", "rejected")


class RewardCollator(ChoiceCollator):
    """Pairs of texts to a batch (b, 2, T), the chosen one first; single texts to (b, 1, T)."""

    targets = "columns 'chosen' and 'rejected'"
    makes_labels = True

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.taken.add(MARGIN)

    def check_data(self, examples: Any) -> None:
        row = first_of(examples, self.input_name)
        if has_preferences(row) and LABELS in row:
            raise DataError(
                "the data has a label, and of two texts 'chosen' is the preferred one by its name; "
                "swap the texts where the label says so, and drop it: data.remove_columns('label')"
            )

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        # A reward is that of a text that is over, wherever it is asked for.
        return encode_preferences(data, replace(self.encoder, ends=True))

    def labels_of(self, row: Mapping[str, Any], mask: list[int] | None) -> Any:
        ids: Any = row.get("input_ids")
        return 0 if is_nested(ids) and len(ids) == 2 else None

    def choices(self, example: Any) -> tuple[list[dict[str, Any]], list[bool]]:
        row = dict(self.example(example))
        row.pop(MARGIN, None)
        rows, mask = super().choices(row)
        if len(rows) > 2:
            raise DataError(
                f"an example has {len(rows)} texts, and a preference is one of two: the chosen "
                "text and the rejected one, (2, T)"
            )
        return rows, mask

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        margins: list[Any] = [self.example(example).get(MARGIN) for example in examples]
        if margins[0] is not None:
            batch[MARGIN] = torch.tensor([float(margin) for margin in margins])
        return batch


@dataclass(frozen=True)
class Rewards(Prediction):
    """Rewards of single texts: ``draws`` is (S, n).

    A constant that is added to all rewards changes no preference, so that part of their spread over
    draws may be common to all texts; `RewardPrediction` compares two.
    """

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {}
    uncertainty_name = "standard deviation of the reward"

    draws: Tensor

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"draws": torch.cat([output.squeeze(-1).cpu() for output in outputs])}

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> Rewards:
        draws = torch.cat([record["draws"] for record in records], dim=1)
        return cls(targets=None, log_likelihood=None, draws=draws)

    @property
    def mean(self) -> Tensor:
        """The mean over draws, (n,)."""
        return self.draws.mean(0)

    @property
    def uncertainty(self) -> Tensor:
        """The standard deviation over draws, (n,)."""
        return self.draws.std(0, correction=0)

    @property
    def loss(self) -> Tensor | None:
        return None

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        return {"reward": (self.draws, (self.row,))}

    def to_pandas(self) -> pd.DataFrame:
        return table_of({"reward": self.mean, "reward_sd": self.uncertainty}, None)


@dataclass(frozen=True)
class RewardPrediction(ClassPrediction):
    """Preferences between two texts: ``rewards`` is (S, n, 2), those of the chosen texts first.

    ``draws`` (S, n, 2) are the probabilities σ(Δ) that the chosen text is preferred, and 1 − σ(Δ),
    with Δ the difference of the rewards. So ``accuracy`` is the share of pairs in which the mean
    probability of the chosen text is above one half. ``log_likelihood`` is log σ(Δ − m), with the
    margin m of the data, if they have one.
    """

    by_draw = (*ClassPrediction.by_draw, "rewards")

    rewards: Tensor = field(kw_only=True)

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        outputs = list(outputs)
        if outputs[0].shape[-1] == 1:
            return Rewards.reduce(task, outputs, batch)
        record = {
            "draws": torch.cat([task.tempered(output).softmax(-1).cpu() for output in outputs]),
            "rewards": torch.cat([output.cpu() for output in outputs]),
        }
        if task.targets(batch) is not None:
            scores = [task.log_prob(output, batch).cpu() for output in outputs]
            record |= {"log_likelihood": torch.cat(scores), "targets": batch[LABELS].cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> Any:
        if "rewards" not in records[0]:
            return Rewards.collect(records, task)
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=joined(records, "targets", 0),
            log_likelihood=joined(records, "log_likelihood", 1),
            classes=NAMES,
            rewards=torch.cat([record["rewards"] for record in records], dim=1),
        )

    def decided(self, probs: Tensor) -> Tensor:
        """Return the preferred text (...); of equal ones the rejected, as TRL counts them."""
        return (probs[..., 0] <= probs[..., 1]).long()

    @property
    def mean(self) -> Tensor:
        """The mean rewards over draws, (n, 2)."""
        return self.rewards.mean(0)

    @property
    def std(self) -> Tensor:
        """The standard deviations of the rewards over draws, (n, 2)."""
        return self.rewards.std(0, correction=0)

    @property
    def differences(self) -> Tensor:
        """Δ of each draw, (S, n), in which what is common to both rewards is no more."""
        return self.rewards[..., 0] - self.rewards[..., 1]

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        return {**super().predictive_draws(), "reward": (self.rewards, (self.row, "class"))}

    def to_pandas(self) -> pd.DataFrame:
        columns = {"prob_chosen": self.probs[:, 0]}
        for i, name in enumerate(NAMES):
            columns |= {f"reward_{name}": self.mean[:, i], f"reward_{name}_sd": self.std[:, i]}
        difference = self.differences
        columns |= {
            "difference": difference.mean(0),
            "difference_sd": difference.std(0, correction=0),
            "entropy": self.entropy,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }
        return table_of(columns, None)

    def baseline(self, without_adapters: Callable[[], Prediction | None]) -> Baseline | None:
        """Return the scores of a coin."""
        if self.targets is None:
            return None
        half = torch.full((len(self.targets),), 0.5)
        return Baseline("coin", half.log(), half)

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        return {
            "p(chosen)": self.probs[:, 0].tolist(),
            "difference of rewards": self.differences.mean(0).tolist(),
            "its standard deviation": self.differences.std(0, correction=0).tolist(),
            "entropy": self.entropy.tolist(),
            "mutual information": self.epistemic.tolist(),
        }


class RewardModelling(Classification):
    """Preferences by rewards, as Bradley and Terry have them.

    p(chosen ≻ rejected) = σ(r_c − r_r − m), with r (..., b, 2) the network's single outputs for the
    two texts, and m the margin of the data, 0 without one: the loss of TRL's ``RewardTrainer``.
    """

    name = "reward-modelling"
    serves = None
    reads = "which of two texts is preferred"
    aliases = ("reward-modeling", "reward")
    collator = RewardCollator
    extras = (CHOICE_MASK, MARGIN)
    names_classes = False
    problem_type = None
    prediction = RewardPrediction

    @classmethod
    def matches(cls, network: nn.Module) -> bool:  # one output is a regression's, too
        return False

    @classmethod
    def claims(cls, network: nn.Module, row: Mapping[str, Any]) -> bool:
        outputs = getattr(getattr(network, "config", None), "num_labels", None)
        return type(network).__name__ in cls.classes and outputs == 1 and has_preferences(row)

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == "preferences"

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        return load_head(checkpoint, {"num_labels": 1})

    def inputs(self, batch: Batch, network: nn.Module) -> dict[str, Tensor]:
        rows = super().inputs(batch, network)
        return {name: tensor.flatten(0, 1) for name, tensor in rows.items()}

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        pairs = batch[CHOICE_MASK].shape
        if output.numel() != pairs.numel():
            raise ConfigError(
                f"a reward is one number per text, and the network gives {tuple(output.shape)} for "
                f"{pairs.numel()} texts; load it with AutoModelForSequenceClassification, "
                "num_labels=1"
            )
        return output.reshape(pairs)

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        margin = batch.get(MARGIN)
        if margin is not None:
            output = output - torch.stack([margin, torch.zeros_like(margin)], -1)
        return self.tempered(output)

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        """Take the labels, which the collator makes."""

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        """Take the output, which `scores` has checked."""
