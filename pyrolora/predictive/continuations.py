"""Continuations of prompts by draws, token after token, with transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from pyrolora.adapters import Binding, FlatFactors, SharedPassError, after_calls
from pyrolora.columns import DECODER_IDS
from pyrolora.data.media.pieces import PER_TOKEN, for_network, joined
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel
from pyrolora.predictive.decoding import StopStrings


@dataclass(frozen=True)
class Writer:
    """Draws of a joint model that continue prompts.

    A draw is bound for the whole of its continuations, so that the keys and values in the cache
    are those of its own weights. Draws are outermost in a pass; beams and several continuations of
    a prompt are neighbours of its row, and stay in their draw.

    Attributes
    ----------
    joint
        The joint model.
    settings
        The settings of ``generate``.
    start
        The id with which a decoder of its own starts; None where a prompt is continued.
    bar
        Progress, by tokens.
    stops
        The texts that end a continuation, if there are any.
    streamer
        What is given every token at once, if anything is.
    """

    joint: JointModel
    settings: GenerationConfig
    start: int | None
    bar: Any
    stops: StopStrings | None = None
    streamer: Any = None

    @property
    def several(self) -> int:
        """The number of continuations of a prompt per draw."""
        return self.settings.num_return_sequences or 1

    def write(
        self,
        prompts: Sequence[Tensor],
        others: Mapping[str, list[Tensor]],
        factors: FlatFactors,
    ) -> list[list[Tensor]]:
        """Return the continuations of each prompt by all draws in turn, in one pass if possible.

        Parameters
        ----------
        prompts
            Token ids.
        others
            Other inputs, one row per prompt.
        factors
            The factors of S draws, or of one setting.
        """
        joint, batch = self.joint, self._batch(prompts, others)
        draws = factors.draws
        if draws is not None and draws > 1 and joint.together(self._first(batch)):
            try:
                rows, binding = self._pass(batch, factors)
            except SharedPassError:
                joint.keep_apart()
            else:
                if joint.fits(binding):
                    return [[*texts] for texts in rows]
        if draws is None:
            return [[*texts] for texts in self._pass(batch, factors)[0]]
        parts = [self._pass(batch, factors[s])[0] for s in range(draws)]
        return [[row for part in parts for row in part[i]] for i in range(len(prompts))]

    def _first(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of the network's first pass."""
        if self.start is None:
            return batch
        ids = torch.full_like(batch["input_ids"][:, :1], self.start)
        return {**batch, DECODER_IDS: ids}

    def _batch(
        self, prompts: Sequence[Tensor], others: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """Return the padded prompts, on the network's device and in its precision.

        Those that are continued are padded on the left, those of an encoder on the right.
        """
        side = "left" if self.start is None else "right"
        parameters = list(self.joint.base.parameters())
        device = parameters[0].device
        pad: Any = self.settings.pad_token_id
        ids = pad_sequence(list(prompts), True, pad, padding_side=side).to(device)
        ones = [torch.ones_like(prompt) for prompt in prompts]
        mask = pad_sequence(ones, True, 0, padding_side=side).to(device)
        dtype = next(p.dtype for p in parameters if p.is_floating_point())
        batch = {"input_ids": ids, "attention_mask": mask}
        for name, rows in others.items():
            if name in PER_TOKEN:
                batch[name] = pad_sequence(rows, True, 0, padding_side=side)
            else:
                batch |= joined(name, rows)
        for name, tensor in batch.items():
            batch[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return batch

    def _pass(self, batch: Mapping[str, Tensor], factors: FlatFactors) -> tuple[Tensor, Binding]:
        """Return (prompts, draws x continuations, T) of one pass, and its binding."""
        base: Any = self.joint.base
        draws = factors.draws or 1
        size, before = batch["input_ids"].shape
        before = before if self.start is None else 1
        binding = self.joint.binding(factors, draws * size if draws > 1 else 1)
        with self.joint.bound(binding):
            try:
                rows = base.generate(
                    **for_network(
                        {n: t.repeat(draws, *[1] * (t.dim() - 1)) for n, t in batch.items()}
                    ),
                    generation_config=self.settings,
                    stopping_criteria=self._criteria(before),
                    streamer=self.streamer,
                )
            except ValueError as error:  # settings that contradict one another
                raise ConfigError(f"transformers' generate(): {error}") from error
        new = rows[:, before:].cpu().unflatten(0, (draws, size, self.several))
        return new.transpose(0, 1).flatten(1, 2), binding

    def _criteria(self, length: int) -> StoppingCriteriaList:
        criteria: list[StoppingCriteria] = [_Progress(self.bar)]
        if self.stops is not None:
            criteria.append(_Stopped(self.stops, length))
        return StoppingCriteriaList(criteria)


@contextmanager
def tempered_network(joint: JointModel, temperature: float) -> Iterator[None]:
    """Have the network give tempered logits for the block, whatever the decoding."""
    task = joint.task.at(temperature)

    def temper(output: Any) -> Any:
        output.logits = task.tempered(output.logits)
        return output

    with after_calls(joint.base, temper):
        yield


class _Progress(StoppingCriteria):
    """A criterion that stops nothing, and counts the steps on a bar."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.bar.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Stopped(StoppingCriteria):
    """A criterion that stops each row at the first stop string after its prompt."""

    def __init__(self, stops: StopStrings, length: int) -> None:
        self.stops, self.length = stops, length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        written = input_ids[:, self.length :].tolist()
        return torch.tensor([self.stops.end(ids) for ids in written], device=input_ids.device)
