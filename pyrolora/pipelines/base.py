"""The part that all pipelines of a posterior share: its draws, and the pass of a batch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.checks import whole_number
from pyrolora.data import pass_rows, to_device
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel, evaluating
from pyrolora.predictive import Predictor
from pyrolora.predictive.predict import passes, turn_of
from pyrolora.tasks import Task

DRAWN = ("num_samples", "draws", "seed")
MASS = 0.9
"""The probability that an interval holds."""


class Source(Protocol):
    """The attributes of a posterior that its pipelines read."""

    model: JointModel
    tokenizer: Any
    temperature: float

    @property
    def base(self) -> nn.Module: ...

    @property
    def task(self) -> Task: ...

    @property
    def predictor(self) -> Predictor: ...

    @property
    def classes(self) -> list[str] | None: ...

    def save(self, path: Any, *, peft: bool = False) -> None: ...

    @property
    def push_to_hub(self) -> Callable[..., str]: ...


def drawn(
    posterior: Source,
    num_samples: int | None,
    draws: Iterable[int] | None,
    seed: int | None,
    usual: int,
) -> AnyFactors:
    """Return the factors of a pipeline's draws, the same ones at every call of it.

    Without ``draws`` and ``seed`` they are the draws 0, 1, ..., of stored ones evenly spaced.
    """
    predictor, program = posterior.predictor, posterior.model.program
    numbers = predictor.numbers(draws, num_samples=num_samples, seed=seed)
    count = program.usual_draws(usual) if num_samples is None else num_samples
    whole_number("num_samples", count, at_least=0)
    if numbers is None and seed is None and count and program.stored() is None:
        numbers = [*range(count)]
    return predictor.factors(count, seed, numbers)


class Drawn:
    """The mixin of a pipeline whose passes are those of a posterior's draws.

    Parameters
    ----------
    posterior
        The posterior.
    factors
        The factors of its draws.
    options
        Of transformers' pipeline.
    """

    def __init__(self, posterior: Source, factors: AnyFactors, **options: Any) -> None:
        network: Any = posterior.base
        if not isinstance(network, PreTrainedModel):
            raise ConfigError(
                f"a pipeline needs a network of transformers, got a {type(network).__name__}; use "
                "posterior.predict"
            )
        if "device" in options or "model" in options:
            raise ConfigError(
                "a pipeline of a posterior has its network, where that is; leave out "
                f"{' and '.join(sorted({'device', 'model'} & {*options}))}, and move the posterior "
                "with posterior.model.to(device)"
            )
        self.posterior, self.factors = posterior, factors
        # A pipeline pads on another side than a fit: the tokenizer is a copy.
        copied = {name: copy.deepcopy(value) for name, value in options.items() if name in PARTS}
        model = _named(network, posterior.classes)
        made: Any = super().__init__  # that of transformers' Pipeline
        made(model=model, device=network.device, **{**options, **copied})

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if inputs and isinstance(inputs[0], list | tuple) and not inputs[0]:
            refuse_drawn(options)
            return []  # transformers' text pipelines look at the first one
        called: Any = super().__call__  # type: ignore[misc]
        return called(*inputs, **options)

    def _sanitize_parameters(self, *given: Any, **options: Any) -> Any:
        refuse_drawn(options)
        read: Any = super()  # transformers' Pipeline
        return read._sanitize_parameters(*given, **options)

    def outputs(self, batch: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the network's outputs (s, b, ...), as the task reads them."""
        placed = to_device(batch, next(self.posterior.model.program.parameters()).device)
        rows = pass_rows(placed, defaults.PREDICT_ROWS)
        return passes(self.posterior.model, placed, self.factors, rows)

    @contextmanager
    def predicting(self) -> Iterator[Task]:
        """Put the network in evaluation mode, and yield the task at the posterior's temperature."""
        with turn_of(self.factors), evaluating(self.posterior.model):
            yield self.posterior.task.at(self.posterior.temperature)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the posterior, as `Posterior.save` does."""
        self.posterior.save(save_directory, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the posterior, as `Posterior.push_to_hub` does."""
        return self.posterior.push_to_hub(repo_id, **options)


def _named(network: PreTrainedModel, classes: list[str] | None) -> PreTrainedModel:
    """Return the network under the names of the posterior's classes, which data may have given.

    It has the same modules and weights; only the configuration is another.
    """
    named = copy.copy(network)
    named.config = copy.deepcopy(network.config)
    if classes is not None:
        named.config.id2label = dict(enumerate(classes))
        named.config.label2id = {name: k for k, name in enumerate(classes)}
    return named


PARTS = ("tokenizer", "image_processor", "feature_extractor", "processor")


def refuse_drawn(options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options of the draws, which a pipeline has from its making."""
    given = [name for name in DRAWN if name in options]
    if given:
        raise ConfigError(
            f"{', '.join(given)} belong to posterior.pipeline(...), which makes a pipeline with"
            " its draws, so that its answers come from the same functions; make another pipeline"
        )
