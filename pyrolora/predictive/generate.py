"""Have draws of the posterior write, and read what they wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AnyFactors, FlatFactors, LaterFactors
from pyrolora.data.media.media import tokenizer_of
from pyrolora.model import JointModel, device_of, evaluating
from pyrolora.predictive.continuations import Writer, tempered_network
from pyrolora.predictive.decoding import (
    check_streamer,
    decoding_settings,
    end_ids,
    mixes_rows,
    padding_id,
    set_length,
    start_id,
    stop_strings,
    until_end,
)
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.prompts import read_prompts
from pyrolora.predictive.scored_texts import Texts, scored
from pyrolora.processes import processes, share_generators, shared_out, take_part
from pyrolora.progress import progress


@torch.no_grad()
def generate(
    joint: JointModel,
    inputs: Any,
    factors: AnyFactors,
    processor: Any = None,
    *,
    numbers: Sequence[int] | None = None,
    rows: int = defaults.PREDICT_ROWS,
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
) -> Generation:
    """Continue ``inputs`` with transformers' ``generate``, then score the continuations.

    Parameters
    ----------
    joint
        The joint model.
    inputs
        Texts, chats or rows with prompts (with ``tokenizer``); a tensor of ids (n, T); a list of
        lists of ids; or a mapping with ``input_ids``, ``attention_mask``, and other inputs of the
        network, such as ``pixel_values``, one row per prompt.
    factors
        The factors of S draws, or of one setting.
    processor
        The tokenizer, which turns texts to ids and back, or the processor of texts and pictures.
    numbers
        The numbers of the draws; None: they are counted.
    rows
        Most rows (draws x prompts x beams) of one pass.
    options
        Options of ``generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``, ...; with one
        prompt and one draw also ``streamer``.
    temperature
        T of the posterior (`Task.at`), in writing and in scoring; a temperature in ``options``
        acts on its result.
    """
    options, tokenizer = dict(options or {}), tokenizer_of(processor)
    streamer = options.pop("streamer", None)
    settings = decoding_settings(joint, options)
    text = joint.task.as_text()
    assert text is not None
    joint = joint.under(text)
    stops = stop_strings(settings, tokenizer)
    prompts, others = read_prompts(inputs, processor, joint)
    set_length(joint, prompts, settings)
    settings.disable_compile = True  # whether it is, is for the caller to say
    settings.return_dict_in_generate = False
    settings.pad_token_id = pad = padding_id(settings, tokenizer)
    starting = start_id(joint, settings)
    draws = factors.draws
    check_streamer(streamer, len(prompts), draws or 1, settings)
    written: list[list[Tensor]] = [[] for _ in prompts]
    bar = progress(title="generating", unit="token")
    with evaluating(joint), tempered_network(joint, temperature), bar:
        writer = Writer(joint, settings, starting, bar, stops, streamer)
        width = max(settings.num_beams or 1, writer.several)
        per_pass = 1 if mixes_rows(joint, settings) else max(1, rows // width)
        prompts_at_once = min(len(prompts), per_pass)
        draws_at_once = max(1, per_pass // prompts_at_once)
        if isinstance(factors, LaterFactors):
            draws_at_once = min(draws_at_once, factors.at_once)
        # Tokens are sampled one pass after another.
        apart = not (settings.do_sample or joint.sharded)
        if apart:
            draws_at_once = min(draws_at_once, -(-(draws or 1) // processes()))
        share_generators(device_of(joint.program))

        def some(first: int) -> FlatFactors:
            """Return the factors of the draws of a pass."""
            if isinstance(factors, FlatFactors) and draws is None:
                return factors
            return factors[first : first + draws_at_once]

        def write(passes: Sequence[tuple[int, int]]) -> list[list[list[Tensor]]]:
            """Return the continuations of passes, each known by its first prompt and draw."""
            return [
                writer.write(
                    prompts[start : start + prompts_at_once],
                    {name: v[start : start + prompts_at_once] for name, v in others.items()},
                    some(first),
                )
                for start, first in passes
            ]

        passes = [
            (start, first)
            for start in range(0, len(prompts), prompts_at_once)
            for first in range(0, draws or 1, draws_at_once)
        ]
        checksum = factors.checksum() if take_part() else None
        results = shared_out(passes, write, checksum) if apart else write(passes)
        for (start, _), parts in zip(passes, results, strict=True):
            for i, continuations in enumerate(parts):
                written[start + i] += continuations
    ends = end_ids(settings)
    kept = [[until_end(ids, ends) for ids in continuations] for continuations in written]
    if stops is not None:
        kept = [[stops.until(ids) for ids in continuations] for continuations in kept]
    names = torch.arange(draws or 1) if numbers is None else torch.tensor(numbers)
    draw = names.repeat_interleave(writer.several)
    texts = Texts(joint, prompts, others, kept, pad, starting)
    return scored(texts, draw, factors, tokenizer, rows, temperature)
