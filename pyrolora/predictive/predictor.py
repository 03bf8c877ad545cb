"""Predictors: draws of a posterior, run over data as users have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.checks import whole_number
from pyrolora.columns import INPUTS
from pyrolora.data import Prepared, prepare
from pyrolora.data.examples import as_examples, without_labels
from pyrolora.model import JointModel
from pyrolora.predictive.choices import choice_rows, choose
from pyrolora.predictive.generate import generate
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.numbered import NumberedDraws, alone
from pyrolora.predictive.predict import draw_factors, predict
from pyrolora.seeding import seeded, state_of
from pyrolora.tasks import Prediction


@dataclass(frozen=True)
class Predictor:
    """A joint model with what it takes to predict from raw data.

    Attributes
    ----------
    joint
        The joint model.
    tokenizer
        Turns raw text to tokens; None for other data.
    temperature
        T of every prediction (`Task.at`).
    seed
        The seed of the fit, which with its number determines a draw.
    """

    joint: JointModel
    tokenizer: Any
    temperature: float
    seed: int

    @property
    def numbered(self) -> NumberedDraws:
        """The draws by their numbers."""
        return NumberedDraws(self.joint, self.seed)

    def numbers(self, draws: Any, **beside: Any) -> list[int] | None:
        """Validate the numbers in ``draws``, which no option stands ``beside``; None stays None."""
        if draws is None:
            return None
        alone(**beside)
        return self.numbered.check(draws)

    def factors(
        self, num_samples: int | None, seed: int | None, numbers: Sequence[int] | None
    ) -> AnyFactors:
        """Return the factors of the draws with these numbers, or of ``num_samples`` others."""
        if numbers is None:
            return draw_factors(self.joint, num_samples, seed)
        return self.numbered.factors(numbers)

    def drawn(
        self, num_samples: int | None, seed: int | None, numbers: Sequence[int] | None
    ) -> tuple[AnyFactors, Tensor | None]:
        """Return the factors of draws, and the state of torch's random numbers after them.

        It is the state with which `generate` samples tokens: None where the device's cannot be
        copied.
        """
        with seeded(seed):
            factors = self.factors(num_samples, None, numbers)
            return factors, state_of(next(self.joint.program.parameters()).device)

    def fresh(self, seed: int | None) -> Tensor | None:
        """Return the state of random numbers before the first of a seed, as `drawn` gives states.

        None without a seed.
        """
        if seed is None:
            return None
        with seeded(seed):
            return state_of(next(self.joint.program.parameters()).device)

    def as_writer(self) -> Predictor:
        """Return the predictor with the task under which its draws write."""
        text = self.joint.task.as_text()
        if text is None or text is self.joint.task:
            return self
        return replace(self, joint=self.joint.under(text), temperature=1.0)

    def generate(
        self,
        inputs: Any,
        num_samples: int | None,
        numbers: Sequence[int] | None,
        seed: int | None,
        options: Mapping[str, Any],
    ) -> Generation:
        """Return the continuations of ``inputs`` by the draws, as `Posterior.generate` does."""
        if num_samples is None:
            num_samples = self.joint.program.usual_draws(defaults.GENERATE_SAMPLES)
        with seeded(seed):
            return generate(
                self.joint,
                inputs,
                self.factors(num_samples, None, numbers),
                self.tokenizer,
                numbers=numbers,
                options=options,
                temperature=self.as_writer().temperature,
            )

    def prepare(
        self, data: Any, *, need_labels: bool, splits: Sequence[str] = defaults.SCORE_SPLITS
    ) -> Prepared:
        """Validate ``data`` and make examples of it."""
        return prepare(
            data,
            self.joint.base,
            self.joint.task,
            self.tokenizer,
            splits=splits,
            need_labels=need_labels,
            to_learn=False,
        )

    def reader(
        self,
        data: Any,
        batch_size: int = defaults.BATCH_SIZE,
        *,
        need_labels: bool,
        look: Callable[[Prepared], None] | None = None,
    ) -> Callable[..., Prediction]:
        """Validate ``data`` and return a function from factors to predictions.

        The function takes another ``temperature``, too. A language model chooses between the texts
        of a column ``choices``; of other data ``look`` gets the examples.
        """
        rows, usual = choice_rows(data, self.joint), self.temperature
        if rows is not None:
            return lambda factors, temperature=usual: choose(
                self.joint,
                rows,
                factors,
                self.tokenizer,
                need_labels=need_labels,
                batch_size=batch_size,
                temperature=temperature,
            )
        prepared = self.prepare(data, need_labels=need_labels)
        if look is not None:
            look(prepared)
        return lambda factors, temperature=usual: predict(
            self.joint, prepared, factors, batch_size=batch_size, temperature=temperature
        )

    def predict(
        self,
        data: Any,
        num_samples: int | None,
        batch_size: int,
        seed: int | None,
        *,
        draws: Iterable[int] | None = None,
        need_labels: bool,
    ) -> Prediction:
        """Return the predictions of the draws for ``data``."""
        whole_number("batch_size", batch_size, at_least=1)
        numbers = self.numbers(draws, num_samples=num_samples, seed=seed)
        read = self.reader(data, batch_size, need_labels=need_labels)
        return read(self.factors(num_samples, seed, numbers))

    def inputs_of(self, data: Any) -> Any:
        """Return ``data`` without labels, which may be of other classes.

        The labels of texts stay, since they say which tokens count.
        """
        name = getattr(self.joint.base, "main_input_name", INPUTS)
        if self.joint.task.keeps_labels:
            return as_examples(data, name, defaults.OUTSIDE_SPLITS)
        return without_labels(data, name, defaults.OUTSIDE_SPLITS)
