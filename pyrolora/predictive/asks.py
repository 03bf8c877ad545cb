"""Prompts with the draws that continue them, and which of these can share a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.data.media.media import tokenizer_of
from pyrolora.model import JointModel, Share
from pyrolora.predictive.decoding import (
    StopStrings,
    decoding_settings,
    end_ids,
    mixes_rows,
    set_length,
    stop_strings,
)
from pyrolora.predictive.following import Follower
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.predictor import Predictor

PER_ROW = {
    *("max_new_tokens", "max_length", "do_sample", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "typical_p"),
}
"""Settings in which the rows of a pass may differ."""
INERT = {
    *("transformers_version", "_from_model_config", "pad_token_id", "bos_token_id", "use_cache"),
    *("output_attentions", "output_hidden_states", "disable_compile", "return_dict_in_generate"),
    *("decoder_start_token_id",),
}
"""Settings that change no token of a text that is continued."""
OF_SAMPLING = ("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "renormalize_logits")
"""Settings with which sampled texts have passes of their own, as with those of `APART`."""
APART = ("max_time", "watermarking_config", "guidance_scale", "token_healing")


@dataclass(frozen=True)
class Ask:
    """A prompt, and the draws of a posterior that continue it.

    Attributes
    ----------
    predictor
        The posterior.
    prompt
        Token ids.
    num_samples, seed, numbers
        The draws, as in `Predictor.generate`.
    options
        Of ``generate``.
    factors
        The factors of these draws.
    state
        The state of the random numbers after the draws, with which tokens are sampled; None where
        it cannot be known, and sampled texts are then written alone.
    wanted
        Whether anybody waits for the text still.
    follower
        Is told of each token at once, where one draw writes.
    """

    predictor: Predictor
    prompt: Sequence[int]
    num_samples: int
    seed: int | None
    numbers: tuple[int, ...] | None
    options: Mapping[str, Any]
    factors: AnyFactors
    state: Tensor | None = None
    wanted: Callable[[], bool] = lambda: True
    follower: Follower | None = None

    @property
    def draws(self) -> int:
        """S, or 1 of one setting."""
        return self.factors.draws or 1

    @cached_property
    def ids(self) -> Tensor:
        """The prompt, (T,)."""
        return torch.tensor([*self.prompt], dtype=torch.long)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the posterior."""
        return tokenizer_of(self.predictor.tokenizer)

    @cached_property
    def joint(self) -> JointModel:
        """The joint model, with the task under which it writes."""
        return self.predictor.as_writer().joint

    @cached_property
    def _decoding(self) -> tuple[GenerationConfig, StopStrings | None]:
        settings = decoding_settings(self.predictor.joint, self.options)
        stops = stop_strings(settings, self.tokenizer)
        set_length(self.joint, [self.ids], settings)
        if settings.max_new_tokens is None:
            settings.max_new_tokens = settings.max_length - len(self.ids)
        settings.max_length = None
        return settings, stops

    @property
    def settings(self) -> GenerationConfig:
        """The settings of the decoding."""
        return self._decoding[0]

    @property
    def stops(self) -> StopStrings | None:
        """The texts that end a continuation."""
        return self._decoding[1]

    @property
    def several(self) -> int:
        """The number of continuations per draw."""
        return self.settings.num_return_sequences or 1

    def company(self) -> Any:
        """Return a key that is equal for those that can share a pass; None: it needs its own.

        Settings that look at the tokens before, and count padding among them, are those of prompts
        of one length.
        """
        settings: Any = self.settings
        said = {name for name, value in settings.to_dict().items() if value is not None}
        sampled = settings.do_sample and (self.state is None or said & {*OF_SAMPLING})
        if (
            sampled
            or said & {*APART}
            or (settings.num_beams or 1) > 1
            or self.joint.task.writes == "apart"
            or self.draws * self.several > defaults.PREDICT_ROWS
            or mixes_rows(self.joint, settings)
            or not Share(self.joint, self.factors, 1).mixes
        ):
            return None
        same = {n: getattr(settings, n) for n in sorted(said - PER_ROW - INERT - {"eos_token_id"})}
        same.pop("num_beams", None)
        history = (len(self.ids), settings.max_new_tokens) if same else None
        return repr((end_ids(settings), same, history))

    def alone(self) -> Generation | None:
        """Return the continuations without company; None if nobody wants them any more."""
        if not self.wanted():
            return None
        return self.predictor.generate(
            {"input_ids": [[*self.prompt]], "attention_mask": [[1] * len(self.prompt)]},
            None if self.numbers is not None else self.num_samples,
            self.numbers,
            self.seed,
            self.options,
        )
