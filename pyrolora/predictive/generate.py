"""Have draws of the posterior write, and read what they wrote."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from pyrolora import defaults
from pyrolora.adapters import Binding, FlatFactors, SharedPassError, check_eager
from pyrolora.columns import IGNORED, LABELS
from pyrolora.data import prepare
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import TensorExamples
from pyrolora.data.inputs import KNOWN_INPUTS, context_length, taken_by
from pyrolora.data.padding import MASK, padding_of
from pyrolora.errors import ConfigError, DataError
from pyrolora.model import JointModel, evaluating
from pyrolora.predictive.generation import Generation
from pyrolora.predictive.predict import predict
from pyrolora.tasks import CausalLM, TokenPrediction

# Those that keep a row's neighbours, whatever they do with the rows.
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
PER_TOKEN = "token_type_ids"
OURS = {
    **dict.fromkeys(("return_dict_in_generate", "streamer", "stopping_criteria"), "leave it out"),
    **dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids", "inputs_embeds"),
        "pass inputs as a mapping with input_ids and attention_mask",
    ),
    "stop_strings": "a text is followed to its end token; cut the texts afterwards",
}


@torch.no_grad()
def generate(
    joint: JointModel,
    inputs: Any,
    factors: FlatFactors,
    tokenizer: Any = None,
    *,
    numbers: Sequence[int] | None = None,
    rows: int = defaults.PREDICT_ROWS,
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
) -> Generation:
    """Continuations of ``inputs`` by transformers' own ``generate``, then their scores.

    A draw is bound for the whole of its continuations, so that the keys and values in the cache
    are those of its own weights. Draws are outermost in the batch; beams and several continuations
    of a prompt are neighbours of its row, and stay in their draw.

    Parameters
    ----------
    inputs
        Texts (with ``tokenizer``); a tensor of ids (n, T); a list of lists of ids; or a mapping
        with ``input_ids``, ``attention_mask``, and what else the network takes, such as
        ``pixel_values``, with a row per prompt.
    factors
        Of S draws, or of one setting.
    numbers
        Of the draws; None: they are counted.
    rows
        Most rows (draws x prompts x beams) of one pass.
    options
        Of ``generate``: ``max_new_tokens``, ``do_sample``, ``num_beams``, ...
    temperature
        The posterior's own (`Task.at`), in writing and in scoring; that of ``options`` acts
        on what it gives.
    """
    options = dict(options or {})
    settings = _check(joint, options)
    prompts = _as_ids(inputs, tokenizer, joint)
    others = _others(inputs, joint, prompts)
    _set_length(joint, prompts, settings)
    settings.disable_compile = True  # the compiler cannot follow the binding
    settings.return_dict_in_generate = False
    settings.pad_token_id = pad = _padding(settings, tokenizer)
    several = settings.num_return_sequences or 1
    width = max(settings.num_beams or 1, several)
    draws = factors.draws
    per_pass = max(1, rows // width)
    prompts_at_once = min(len(prompts), per_pass)
    draws_at_once = max(1, per_pass // prompts_at_once)
    passes = [
        (start, first)
        for start in range(0, len(prompts), prompts_at_once)
        for first in range(0, draws or 1, draws_at_once)
    ]
    written: list[list[Tensor]] = [[] for _ in prompts]
    own_law = _at_temperature(joint, temperature)
    bar = tqdm(desc="generating", unit="token", delay=2, leave=False)
    with evaluating(joint), own_law, bar:
        for start, first in passes:
            own = prompts[start : start + prompts_at_once]
            chosen = factors if draws is None else factors[first : first + draws_at_once]
            beside = {name: rows[start : start + len(own)] for name, rows in others.items()}
            found = _continuations(joint, own, beside, chosen, settings, several, bar)
            for i, continuations in enumerate(found):
                written[start + i] += continuations
    ended = _ends(settings)
    kept = [[_until(ids, ended) for ids in continuations] for continuations in written]
    names = torch.arange(draws or 1) if numbers is None else torch.tensor(numbers)
    draw = names.repeat_interleave(several)
    return _scored(joint, prompts, others, kept, draw, factors, pad, tokenizer, rows, temperature)


@contextmanager
def _at_temperature(joint: JointModel, temperature: float) -> Iterator[None]:
    """The network gives tempered logits to transformers' ``generate``, whatever the decoding."""
    law = joint.task.at(temperature)

    def temper(_: Any, __: Any, output: Any) -> Any:
        output.logits = law.tempered(output.logits)
        return output

    handle = joint.base.register_forward_hook(temper)
    try:
        yield
    finally:
        handle.remove()


def _check(joint: JointModel, options: Mapping[str, Any]) -> GenerationConfig:
    """The settings that ``generate`` will have; refuses what would leave the draws."""
    base: Any = joint.base
    check_eager(base)
    able = getattr(base, "can_generate", None)
    if not isinstance(joint.task, CausalLM) or able is None or not able():
        raise ConfigError(
            "generate() needs a causal language model of transformers, fitted as one; this is a "
            f"{type(base).__name__} with the task {joint.task.name!r}"
        )
    # As transformers does: what is given goes before what the network's own settings say.
    settings = copy.deepcopy(base.generation_config)
    given = options.get("generation_config")
    if given is not None:
        settings.update(**{n: v for n, v in given.to_dict().items() if v is not None})
    try:
        unknown = settings.update(**{n: v for n, v in options.items() if n != "generation_config"})
    except ValueError as error:  # settings that contradict one another
        raise ConfigError(str(error)) from error
    for name, advice in OURS.items():
        if options.get(name) is not None or (name == "stop_strings" and settings.stop_strings):
            raise ConfigError(f"generate() sets {name} itself: {advice}")
    mode = str(getattr(settings.get_generation_mode(options.get("assistant_model")), "value", ""))
    if mode not in MODES or options.get("custom_generate") is not None:
        found = "custom_generate" if mode in MODES else mode
        raise ConfigError(
            f"{found} arranges the rows of a batch anew, and rows would meet the weights of other "
            f"draws; generate() takes {', '.join(MODES)}"
        )
    if unknown:
        raise ConfigError(f"transformers' generate() has no options {sorted(unknown)}")
    return settings


def _as_ids(inputs: Any, tokenizer: Any, joint: JointModel) -> list[Tensor]:
    """The prompts' ids, without padding."""
    if isinstance(inputs, str):
        raise DataError(f"pass prompts as a list: [{inputs[:40]!r}]")
    texts = isinstance(inputs, Sequence) and len(inputs) > 0 and isinstance(inputs[0], str)
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        prompts = _tensors(inputs["input_ids"])
        if "attention_mask" in inputs:
            masks = [row.bool() for row in _tensors(inputs["attention_mask"])]
            if [m.shape for m in masks] != [row.shape for row in prompts]:
                raise DataError("input_ids and attention_mask differ in shape")
            prompts = [row[own] for row, own in zip(prompts, masks, strict=True)]
    elif texts:
        if not all(isinstance(text, str) for text in inputs):
            raise DataError("the prompts have to be texts, all of them")
        if tokenizer is None:
            raise DataError(
                "the prompts are texts and there is no tokenizer; pass tokenizer= to fit() or "
                "load(), or a tensor of token ids here"
            )
        rows = Encoder(tokenizer, math.inf, open=True)(list(inputs))["input_ids"]
        prompts = [torch.as_tensor(ids) for ids in rows]
    elif isinstance(inputs, Tensor) and inputs.dim() != 2:
        raise DataError(f"token ids must be (n, T), got shape {tuple(inputs.shape)}")
    elif isinstance(inputs, Tensor | Sequence) and not any(isinstance(x, Mapping) for x in inputs):
        prompts = _tensors(inputs)
    else:
        got = (
            f"a mapping with {[*inputs]}" if isinstance(inputs, Mapping) else type(inputs).__name__
        )
        raise DataError(
            "inputs must be a list of texts, a tensor of token ids (n, T), or a mapping with "
            f"'input_ids', got {got}; of rows pass the texts alone: data['text']"
        )
    if not prompts:
        raise DataError("there are no prompts")
    for number, ids in enumerate(prompts):
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise DataError(
                f"prompt {number} is no list of token ids, or has none: {ids.tolist()!r:.60}; give "
                "each prompt at least one"
            )
    vocabulary = getattr(joint.base.config, "vocab_size", math.inf)
    lowest, highest = (f(int(f(ids)) for ids in prompts) for f in (min, max))
    if lowest < 0 or highest >= vocabulary:
        raise DataError(
            f"token ids must be in 0..{vocabulary - 1}, got {lowest}..{highest}; was another "
            "tokenizer used?"
        )
    if not texts and not (_is_mapping(inputs) and MASK in inputs):
        padding = padding_of(joint.base, tokenizer)
        read = [padding.mask(ids) for ids in prompts]
        prompts = [
            ids if mask is None else ids[torch.tensor(mask).bool()]
            for ids, mask in zip(prompts, read, strict=True)
        ]
    return [ids.long() for ids in prompts]


def _tensors(rows: Any) -> list[Tensor]:
    try:
        return [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a prompt is a text or a list of token ids ({error}); of a chat make a text, with "
            "tokenizer.apply_chat_template(messages, tokenize=False)"
        ) from error


def _others(inputs: Any, joint: JointModel, prompts: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What a mapping has beside the tokens, a row per prompt; per token without the padding.

    Raises
    ------
    DataError
        For inputs that the network does not take, or that are not a row per prompt.
    """
    names = [n for n in inputs if n not in ("input_ids", MASK)] if _is_mapping(inputs) else []
    taken = taken_by(joint.base) & {*KNOWN_INPUTS} - {"position_ids", "inputs_embeds"}
    refused = [name for name in names if name not in taken]
    if refused:
        raise DataError(
            f"generate() does not pass {refused} on to this {type(joint.base).__name__}; leave "
            f"them out; beside input_ids and attention_mask it passes {sorted(taken)}"
        )
    found = {}
    for name in names:
        rows = _tensors(inputs[name])
        if len(rows) != len(prompts):
            raise DataError(
                f"{name!r} has {len(rows)} rows for {len(prompts)} prompts; give one row per "
                "prompt, or generate for one prompt at a time"
            )
        if name == PER_TOKEN and MASK in inputs:
            masks = [row.bool() for row in _tensors(inputs[MASK])]
            rows = [row[own] for row, own in zip(rows, masks, strict=True)]
        found[name] = rows
    return found


def _is_mapping(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and "input_ids" in inputs


def _set_length(joint: JointModel, prompts: list[Tensor], settings: GenerationConfig) -> None:
    """Give continuations a length, unless they have one; raise `DataError` for a prompt whose
    continuation would leave the network's context."""
    context = context_length(joint.base)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = len(prompts[longest])
    if settings.max_new_tokens is None and settings.max_length is None:
        settings.max_new_tokens = int(max(1, min(defaults.MAX_NEW_TOKENS, context - size)))
    if settings.max_new_tokens is None and settings.max_length <= size:
        raise DataError(
            f"prompt {longest} has {size} tokens, which max_length={settings.max_length} counts, "
            "too: nothing would be written; give max_new_tokens"
        )
    needed = size + settings.max_new_tokens if settings.max_new_tokens else settings.max_length
    if needed > context:
        raise DataError(
            f"prompt {longest} has {size} tokens, and with its continuation {needed}; the network "
            f"has {context} positions: shorten it, or lower max_new_tokens"
        )


def _padding(settings: GenerationConfig, tokenizer: Any) -> int:
    """What fills rows up; attention never sees it."""
    for value in (settings.pad_token_id, getattr(tokenizer, "pad_token_id", None)):
        if value is not None:
            return int(value)
    return next(iter(_ends(settings)), 0)


def _ends(settings: GenerationConfig) -> set[int]:
    """The ids that end a text."""
    ends = settings.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list | tuple) else {int(ends)}


def _continuations(
    joint: JointModel,
    prompts: Sequence[Tensor],
    others: Mapping[str, list[Tensor]],
    factors: FlatFactors,
    settings: GenerationConfig,
    several: int,
    bar: Any,
) -> list[list[Tensor]]:
    """For each prompt the continuations of all draws in turn, as `generate` gives them."""
    base: Any = joint.base
    device = next(base.parameters()).device
    pad = settings.pad_token_id
    ids = pad_sequence(list(prompts), True, pad, padding_side="left").to(device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]
    beside = {
        name: pad_sequence(rows, True, 0, padding_side="left")
        if name == PER_TOKEN
        else torch.stack(rows)
        for name, rows in others.items()
    }
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    beside = {
        n: t.to(device, dtype if t.is_floating_point() else t.dtype) for n, t in beside.items()
    }
    batch = {"input_ids": ids, "attention_mask": mask.long(), **beside}

    def write(own: FlatFactors) -> tuple[Tensor, Binding]:
        """All rows of a pass, and what was bound for it."""
        draws = own.draws or 1
        binding = joint.binding(own, draws * len(prompts) if draws > 1 else 1)
        with joint.bound(binding):
            try:
                rows = base.generate(
                    **{n: t.repeat(draws, *[1] * (t.dim() - 1)) for n, t in batch.items()},
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
                )
            except ValueError as error:  # of a setting
                raise ConfigError(f"transformers' generate(): {error}") from error
        new = rows[:, ids.shape[1] :].cpu().unflatten(0, (draws, len(prompts), several))
        return new.transpose(0, 1).flatten(1, 2), binding

    draws = factors.draws
    if draws is not None and draws > 1 and joint.together(batch):
        try:
            found, binding = write(factors)
        except SharedPassError:
            joint.keep_apart()
        else:
            if joint.fits(binding):
                return [[*own] for own in found]
    if draws is None:
        return [[*own] for own in write(factors)[0]]
    parts = [write(factors[s])[0] for s in range(draws)]
    return [[row for own in parts for row in own[i]] for i in range(len(prompts))]


class _Progress(StoppingCriteria):
    """Stops nothing; counts the steps on a bar."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.bar.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until(ids: Tensor, ends: set[int]) -> Tensor:
    """The ids up to the first that ends a text, with it."""
    places = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype)).nonzero()
    return ids[: int(places[0]) + 1] if len(places) else ids


def _scored(
    joint: JointModel,
    prompts: Sequence[Tensor],
    others: Mapping[str, list[Tensor]],
    written: Sequence[Sequence[Tensor]],
    draw: Tensor,
    factors: FlatFactors,
    pad: int,
    tokenizer: Any,
    rows: int,
    temperature: float,
) -> Generation:
    pairs = [(p, new) for p, own in zip(prompts, written, strict=True) for new in own]
    beside = {n: [row for row in rows for _ in written[0]] for n, rows in others.items()}
    prepared = prepare(_examples(pairs, beside, pad), joint.base, joint.task)
    read = predict(
        joint,
        prepared,
        factors,
        batch_size=min(defaults.BATCH_SIZE, rows),
        rows=rows,
        temperature=temperature,
    )
    assert isinstance(read, TokenPrediction)
    assert read.log_likelihood is not None
    shape = (len(prompts), len(draw))

    def aligned(values: Tensor) -> Tensor:
        """(n K, longest - 1) of whole texts to the continuations alone, (n, K, T)."""
        parts = [
            row[len(p) - 1 : len(p) - 1 + len(new)]
            for row, (p, new) in zip(values, pairs, strict=True)
        ]
        return pad_sequence(parts, True, torch.nan).unflatten(0, shape)

    news = [new for _, new in pairs]
    counted = pad_sequence([torch.ones_like(new, dtype=torch.bool) for new in news], True, False)
    texts = tokens = None
    if tokenizer is not None:
        texts = [[_decode(tokenizer, new) for new in own] for own in written]
        tokens = [[[_decode(tokenizer, i) for i in new] for new in own] for own in written]
    return Generation(
        sequences=pad_sequence(news, True, pad).unflatten(0, shape),
        mask=counted.unflatten(0, shape),
        draw=draw,
        log_likelihood=read.log_likelihood.unflatten(1, shape),
        entropy=aligned(read.entropy),
        aleatoric=aligned(read.aleatoric),
        prompts=None if tokenizer is None else [_decode(tokenizer, p) for p in prompts],
        texts=texts,
        tokens=tokens,
    )


def _examples(
    pairs: Sequence[tuple[Tensor, Tensor]], beside: Mapping[str, list[Tensor]], pad: int
) -> TensorExamples:
    """Whole texts of one length; the labels are the continuations' tokens. What stands beside
    every token of a prompt goes on with its last value, as in transformers' ``generate``."""
    whole = [torch.cat(pair) for pair in pairs]
    columns = {
        "input_ids": pad_sequence(whole, True, pad),
        MASK: pad_sequence([torch.ones_like(ids) for ids in whole], True, 0),
        LABELS: pad_sequence(
            [torch.cat([torch.full_like(p, IGNORED), new]) for p, new in pairs], True, IGNORED
        ),
    }
    for name, rows in beside.items():
        if name == PER_TOKEN:
            going = [
                torch.cat([r, r[-1:].expand(len(n))]) for r, (_, n) in zip(rows, pairs, strict=True)
            ]
            columns[name] = pad_sequence(going, True, 0)
        else:
            columns[name] = torch.stack(rows)
    return TensorExamples(columns)


def _decode(tokenizer: Any, ids: Tensor) -> str:
    return tokenizer.decode(ids.reshape(-1).tolist(), skip_special_tokens=ids.dim() > 0)
