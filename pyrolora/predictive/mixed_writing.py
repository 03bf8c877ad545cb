"""Texts that draws of several posteriors on one network write in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from pyrolora import defaults
from pyrolora.adapters import SharedPassError, after_calls
from pyrolora.model import Mixture, Share, evaluating
from pyrolora.predictive.asks import PER_ROW, Ask
from pyrolora.predictive.decoding import (
    end_ids,
    padding_id,
    until_end,
)
from pyrolora.predictive.following import Choosing, Following, Part
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.mixed import Question, predict_mixed
from pyrolora.predictive.scored_texts import Texts
from pyrolora.seeding import DRAWING


@torch.no_grad()
def generate_mixed(
    asked: Sequence[Ask], *, rows: int = defaults.WRITE_ROWS
) -> list[Generation | None]:
    """Return the continuations of every prompt; their rows share passes where they can.

    Each is what `Predictor.generate` gives for this prompt alone: the law of each token is the same
    up to rounding, and a sampled token has the random number that it has alone. Settings may differ
    in the length, the texts that end it, and how tokens are sampled. Beams, and draws that
    `Share.mixes` excludes, have passes of their own.

    Parameters
    ----------
    asked
        The prompts. The networks of all posteriors have to be the same, but for the heads.
    rows
        Most rows (draws x continuations) of one pass.

    Returns
    -------
    list of Generation or None
        None for those that nobody wants any more.
    """
    written: dict[int, list[Tensor] | None] = {}
    groups: dict[Any, list[int]] = {}
    for place, ask in enumerate(asked):
        company = ask.company()
        groups.setdefault(place if company is None else company, []).append(place)
    for company, places in groups.items():
        if not isinstance(company, int):
            for piece in _pieces(asked, places, rows):
                written |= _together(asked, piece)
    made = _read(asked, {place: news for place, news in written.items() if news is not None})
    return [made.get(place) if place in written else ask.alone() for place, ask in enumerate(asked)]


def _pieces(asked: Sequence[Ask], places: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Yield the places of the prompts of each pass."""
    piece: list[int] = []
    size = 0
    for place in places:
        more = asked[place].draws * asked[place].several
        if piece and size + more > rows:
            yield piece
            piece, size = [], 0
        piece.append(place)
        size += more
    yield piece


def _together(asked: Sequence[Ask], places: Sequence[int]) -> dict[int, list[Tensor] | None]:
    """Write in one pass, or where rows cannot share one, in as many as there are prompts.

    A prompt of several draws is left out then.
    """
    try:
        return dict(zip(places, _written([asked[place] for place in places]), strict=True))
    except SharedPassError:
        if len(places) == 1:
            return {}
    apart: dict[int, list[Tensor] | None] = {}
    for place in places:
        apart |= _together(asked, [place])
    return apart


def _written(asked: Sequence[Ask]) -> list[list[Tensor] | None]:
    """Return the continuations of each prompt from one pass; None if nobody wants them.

    Raises
    ------
    SharedPassError
        Where draws cannot share a pass through this network.
    """
    voices: dict[Any, list[Ask]] = {}
    for ask in asked:
        voices.setdefault((id(ask.predictor.joint), id(ask.factors)), []).append(ask)
    in_order = [ask for voice in voices.values() for ask in voice]
    mixture = Mixture(
        [
            Share(voice[0].joint, voice[0].factors, sum(ask.several for ask in voice))
            for voice in voices.values()
        ]
    )
    carrier = mixture.carrier
    device = next(carrier.base.parameters()).device
    pad = padding_id(asked[0].settings, asked[0].tokenizer)
    parts = dict(zip(map(id, in_order), _parts([*voices.values()], device), strict=True))
    prompts = [ask.ids for ask in in_order for _ in range(ask.several)]
    ids = pad_sequence(prompts, True, pad, padding_side="left").to(device)
    mask = pad_sequence([torch.ones_like(p) for p in prompts], True, 0, padding_side="left")
    batch = {"input_ids": ids, "attention_mask": mask.to(device)}
    new = _pass(mixture, batch, [*parts.values()], asked[0].settings, pad, asked)
    return [_cut(ask, new[parts[id(ask)].rows.cpu()]) if ask.wanted() else None for ask in asked]


def _pass(
    mixture: Mixture,
    batch: dict[str, Tensor],
    parts: Sequence[Part],
    settings: GenerationConfig,
    pad: int,
    asked: Sequence[Ask],
) -> Tensor:
    """Return (rows, T), what all rows write."""
    carrier, before = mixture.carrier, batch["input_ids"].shape[1]
    base: Any = carrier.base
    shared = sum(mixture.sizes) > mixture.shares[0].size
    with DRAWING.shared(), evaluating(carrier):
        if shared and not mixture.possible(batch):
            raise SharedPassError("rows of several draws cannot share a pass through this network")
        index = mixture.numbers().to(batch["input_ids"].device)
        binding = mixture.binding() if shared else carrier.binding(mixture.shares[0].whole)
        with _tempered(mixture, asked) as newest, carrier.bound(binding):
            try:
                rows = base.generate(
                    **{name: tensor[index] for name, tensor in batch.items()},
                    generation_config=_greedy(settings, max(part.length for part in parts), pad),
                    logits_processor=LogitsProcessorList([Choosing(parts)]),
                    stopping_criteria=StoppingCriteriaList([Following(parts, before, newest)]),
                )
            except SharedPassError:
                mixture.keep_apart()
                raise
        if shared and not mixture.fits(binding):
            raise SharedPassError("the pass called layers that were not seen to allow sharing")
    new: Tensor = rows[:, before:].cpu()
    return new


def _greedy(settings: GenerationConfig, length: int, pad: int) -> GenerationConfig:
    """Return the settings of a pass that takes the likeliest token of each row."""
    made: Any = copy.deepcopy(settings)
    for name in PER_ROW:
        setattr(made, name, None)
    made.do_sample = False
    made.max_new_tokens = length
    made.pad_token_id = pad
    made.disable_compile = True  # whether it is, is for the caller to say
    made.return_dict_in_generate = False
    result: GenerationConfig = made
    return result


def _parts(voices: Sequence[Sequence[Ask]], device: torch.device) -> Iterator[Part]:
    """Yield the rows and rules of each prompt, voice after voice."""
    start = 0
    for voice in voices:
        width = sum(ask.several for ask in voice)
        first = 0
        for ask in voice:
            settings: Any = ask.settings
            of_draw = torch.arange(first, first + ask.several)
            rows = start + width * torch.arange(ask.draws)[:, None] + of_draw
            yield Part(
                rows.flatten().to(device),
                settings.max_new_tokens,
                end_ids(settings),
                ask.stops,
                settings if settings.do_sample else None,
                _generator(ask, device),
                ask.wanted,
                ask.follower if ask.draws == 1 else None,
            )
            first += ask.several
        start += width * voice[0].draws


def _generator(ask: Ask, device: torch.device) -> torch.Generator | None:
    if ask.state is None or not ask.settings.do_sample:
        return None
    generator = torch.Generator(device)
    generator.set_state(ask.state)
    return generator


@contextmanager
def _tempered(mixture: Mixture, asked: Sequence[Ask]) -> Iterator[Callable[[], Tensor]]:
    """Have the network give tempered logits for the block, each row those of its posterior.

    Gives a function that returns the logits of the newest tokens.
    """
    temperatures = {id(ask.joint): ask.predictor.as_writer().temperature for ask in asked}
    tasks = [share.joint.task.at(temperatures[id(share.joint)]) for share in mixture.shares]
    newest: list[Tensor] = []

    def temper(output: Any) -> Any:
        if any(task.temperature != 1 for task in tasks):
            pieces = output.logits.split(mixture.sizes)
            each = zip(tasks, pieces, strict=True)
            output.logits = torch.cat([task.tempered(piece) for task, piece in each])
        newest[:] = [output.logits[:, -1]]
        return output

    with after_calls(mixture.carrier.base, temper):
        yield lambda: newest[0]


def _cut(ask: Ask, rows: Tensor) -> list[Tensor]:
    """Return the continuations up to their ends."""
    ends, stops = end_ids(ask.settings), ask.stops
    kept = [until_end(ids[: ask.settings.max_new_tokens], ends) for ids in rows]
    return kept if stops is None else [stops.until(ids) for ids in kept]


def _read(asked: Sequence[Ask], written: Mapping[int, list[Tensor]]) -> dict[int, Generation]:
    """Return the continuations with the scores of all draws of their posterior."""
    if not written:
        return {}
    voices: dict[Any, list[int]] = {}
    for place in written:
        ask = asked[place]
        voices.setdefault((id(ask.predictor.joint), id(ask.factors)), []).append(place)
    texts = [_texts(asked, places, written) for places in voices.values()]
    every = _texts(asked, [place for places in voices.values() for place in places], written)
    prepared, start = every.prepared(), 0
    questions = []
    for places, one in zip(voices.values(), texts, strict=True):
        ask, numbers = asked[places[0]], [*range(start, start + len(one.places))]
        part = prepared.part(numbers)
        questions.append(Question(ask.predictor.as_writer(), ask.factors, part, one.lengths))
        start += len(numbers)
    made: dict[int, Generation] = {}
    answers = predict_mixed(questions)
    for places, one, read in zip(voices.values(), texts, answers, strict=True):
        for i, place in enumerate(places):
            ask = asked[place]
            names = ask.numbers or range(ask.draws)
            draw = torch.tensor([*names]).repeat_interleave(ask.several)
            made[place] = one.generation(read, draw, ask.tokenizer, [i])
    return made


def _texts(
    asked: Sequence[Ask], places: Sequence[int], written: Mapping[int, list[Tensor]]
) -> Texts:
    first = asked[places[0]]
    return Texts(
        first.joint,
        [asked[place].ids for place in places],
        {},
        [written[place] for place in places],
        padding_id(first.settings, first.tokenizer),
    )
