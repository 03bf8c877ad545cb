"""A posterior as a model of lm-evaluation-harness.

The harness finds models by name in a registry, which importing this module adds to. It loads no
plugins of its own, so that its command is run from here:

    python -m pyrolora.harness run --model pyrolora --model_args posterior=DIR --tasks ...

In Python, ``import pyrolora.harness`` before ``lm_eval.simple_evaluate(model="pyrolora", ...)``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pyrolora import defaults
from pyrolora.checks import whole_number
from pyrolora.data import pass_rows
from pyrolora.errors import ConfigError
from pyrolora.loading import load
from pyrolora.model import evaluating
from pyrolora.pipelines.base import drawn
from pyrolora.posterior import Posterior
from pyrolora.predictive import generate
from pyrolora.predictive.predict import passes, turn_of
from pyrolora.predictive.ranking import chosen
from pyrolora.tasks import TokenTask
from pyrolora.tasks.prediction import log_mean_exp

try:
    from lm_eval import utils
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ConfigError(
        f"pyrolora.harness needs lm-evaluation-harness ({error}); install it with "
        "pip install 'pyrolora[harness]'"
    ) from error

Request = tuple[Any, list[int], list[int]]
"""A key of the harness's cache, the context's tokens and the continuation's."""
Scored = tuple[Tensor, bool]
"""log p of a continuation under each draw, (S,), and whether the mixture would write it."""


@register_model("pyrolora")
class PosteriorLM(HFLM):
    """A causal language model whose probabilities are those of a posterior's draws.

    A continuation's log-likelihood is that of the mixture of draws, each of which is one network
    for all of its tokens:

        log p(y | x) = log mean_s Π_t p_s(y_t | x, y_<t),

    in nats, and so is that of a document in several windows (``loglikelihood_rolling``). "Greedy"
    is a continuation of which every token is the likeliest of Σ_s w_s p_s(· | x, y_<t), where
    w_s ∝ Π_{u<t} p_s(y_u | x, y_<u) is what the tokens so far say about the draws. Texts
    (``generate_until``) are written by every draw; the answer is the one that the mixture finds
    likeliest per token, or that of the first draw where tokens are sampled. With ``num_samples=0``
    all are those of the merged mean. `Posterior.temperature` holds.

    Parameters
    ----------
    posterior
        The folder or repository of a posterior, or a `Posterior`.
    model
        The network, its hub id or folder, as in `pyrolora.load`.
    num_samples, draws, seed
        The draws: 8 unless told otherwise, those with the numbers 0, 1, ... In ``--model_args``
        the numbers of ``draws`` are joined by ``+``, as in ``draws=0+1+2``.
    batch_size
        Requests per batch, a number.
    device
        Where to run; None: where the posterior is.
    revision, token, trust_remote_code
        As in `pyrolora.load`.
    **options
        Of ``HFLM``: ``max_length``, ``truncation``, ``add_bos_token``, ``prefix_token_id``,
        ``think_end_token``, ``enable_thinking``, ``chat_template_args``.

    Raises
    ------
    ConfigError
        For a posterior that is no causal language model, and for options without an effect here.
    """

    TAKEN = (
        *("max_length", "truncation", "add_bos_token", "prefix_token_id"),
        *("think_end_token", "enable_thinking", "chat_template_args"),
    )

    def __init__(
        self,
        posterior: Any = None,
        model: Any = None,
        *,
        num_samples: int | None = None,
        draws: Any = None,
        seed: int | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        device: str | None = None,
        revision: str | None = None,
        token: Any = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if max_batch_size is not None:  # of the harness's batch_size="auto"
            options["max_batch_size"] = max_batch_size
        unknown = sorted({*options} - {*self.TAKEN})
        if unknown:
            raise ConfigError(
                f"the model 'pyrolora' has no options {unknown}; beside posterior= and those of "
                f"the draws it takes {', '.join(self.TAKEN)}"
            )
        if posterior is None:
            raise ConfigError(
                "the model 'pyrolora' needs the folder or repository of a posterior, and got none; "
                "pass posterior=DIR in model_args"
            )
        if not isinstance(posterior, Posterior):
            where: dict[str, Any] = {"revision": revision, "token": token}
            posterior = load(posterior, model, trust_remote_code=trust_remote_code, **where)
        _check(posterior)
        if device is not None:
            posterior.model.to(device)
        self.posterior = posterior
        usual = defaults.GENERATE_SAMPLES
        self.factors = drawn(posterior, num_samples, _numbers(draws), seed, usual)
        tokenizer = copy.deepcopy(posterior.tokenizer)  # the harness sets its padding
        size = _size(batch_size)
        super().__init__(pretrained=posterior.base, tokenizer=tokenizer, batch_size=size, **options)

    # Scores -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers = []
        scored = self._scored(requests, disable_tqdm)
        for (key, _, _), (scores, greedy) in zip(requests, scored, strict=True):
            answer = float(log_mean_exp(scores)), greedy
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._scored([w for some in windows for w in some], disable_tqdm))
        answers = []
        for request, some in zip(requests, windows, strict=True):
            scores = [next(scored)[0] for _ in some]
            answers.append(float(log_mean_exp(torch.stack(scores).sum(0))) if scores else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def _windows(self, text: str) -> list[Request]:
        """Return the windows of a document, as the harness cuts it."""
        pairs = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *utils.make_disjoint_window(pair)) for pair in pairs]

    @torch.no_grad()
    def _scored(self, requests: Sequence[Request], hidden: bool) -> list[Scored]:
        """Score continuations; requests whose tokens but the last are the same share a row."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            rows.setdefault(self._row(context, continuation), []).append(i)
        order = sorted(rows, key=len, reverse=True)
        answers: dict[int, Scored] = {}
        bar = tqdm(total=len(requests), desc="scoring", disable=hidden or None, leave=False)
        with bar:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                asked = [[(i, requests[i][2]) for i in rows[row]] for row in some]
                answers |= self._batch(some, asked)
                bar.update(sum(map(len, asked)))
        return [answers[i] for i in range(len(requests))]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the tokens that the network reads, cut from the left to its context."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ConfigError(
                f"the context has {len(context)} tokens and the continuation {len(continuation)}; "
                f"both need one, and the network takes {self.max_length}: set max_length, or "
                "shorten the task's texts"
            )
        return tuple((context + continuation)[-(self.max_length + 1) :][:-1])

    def _batch(
        self, rows: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, list[int]]]]
    ) -> dict[int, Scored]:
        """Return the scores of the continuations, numbered, that end in these rows."""
        ids = [torch.tensor(row) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True).to(self.device),
            "attention_mask": pad_sequence(
                [torch.ones_like(row) for row in ids], batch_first=True
            ).to(self.device),
        }
        joint = self.posterior.model
        text: Any = joint.task.as_text()
        law = text.at(self.posterior.temperature if text is joint.task else 1.0)
        scores: dict[int, list[Tensor]] = {}
        mixtures: dict[int, Tensor] = {}
        with turn_of(self.factors), evaluating(joint):
            size = pass_rows(batch, defaults.PREDICT_ROWS)
            for output in passes(joint.under(text), batch, self.factors, size):
                logits = law.tempered(output)  # of the last token, too
                for j, continuations in enumerate(asked):
                    for i, tokens in continuations:
                        end = len(rows[j])
                        logs = logits[:, j, end - len(tokens) : end].float().log_softmax(-1)
                        own, mixture = _read(logs, torch.tensor(tokens, device=logs.device))
                        scores.setdefault(i, []).append(own.cpu())
                        known = mixtures.get(i)
                        mixtures[i] = mixture if known is None else torch.logaddexp(known, mixture)
        return {
            i: (torch.cat(scores[i]), mixtures[i].argmax(-1).tolist() == tokens)
            for continuations in asked
            for i, tokens in continuations
        }

    # Texts --------------------------------------------------------------------------------------

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context)).bool()
        sampled = generation_kwargs.get("do_sample") or False
        if not sampled and generation_kwargs.get("temperature", 0.0) == 0.0:
            generation_kwargs.pop("temperature", None)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = [text for text in stop if text and text != eos]
        rows = [row[kept].tolist() for row, kept in zip(context, mask, strict=True)]
        task = self.posterior.task
        generation = generate(
            self.posterior.model,
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
            self.factors,
            self.tokenizer,
            options={
                **generation_kwargs,
                "do_sample": sampled,
                "max_new_tokens": max_length - context.shape[1],
                **({"stop_strings": stops} if stops else {}),
            },
            temperature=self.posterior.temperature if task.as_text() is task else 1.0,
        )
        written = []
        for i in range(len(rows)):
            (k,) = chosen(generation, 1, sampled=sampled, prompt=i)
            written.append(generation.sequences[i, k][generation.mask[i, k]])
        padding = self.tokenizer.pad_token_id or 0
        padded = pad_sequence(written, batch_first=True, padding_value=padding)
        return torch.cat([context, padded.to(context)], -1)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes down about the model."""
        network: Any = self.posterior.base
        return {
            "model_num_parameters": network.num_parameters(),
            "model_dtype": str(network.dtype),
            "posterior": repr(self.posterior),
            "num_samples": self.factors.draws or 0,
        }


def _read(logs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of the tokens (L,) under each draw, (S,), and the mixture's, (L, V).

    ``logs`` are (S, L, V). The mixture's are those of Σ_s p_s(tokens before) p_s(· | tokens
    before), not normalised: pieces of the draws add up.
    """
    own = logs.gather(-1, tokens.expand(len(logs), -1)[..., None]).squeeze(-1)
    before = own.cumsum(-1) - own
    return own.sum(-1), (before[..., None] + logs).logsumexp(0)


def _check(posterior: Posterior) -> None:
    text = posterior.task.as_text()
    if not isinstance(text, TokenTask) or text.writes != "on":
        raise ConfigError(
            "the harness scores texts by a causal language model, and this posterior is of the "
            f"task {posterior.task.name!r}; use posterior.evaluate"
        )
    if posterior.tokenizer is None or not isinstance(posterior.base, PreTrainedModel):
        raise ConfigError(
            "the harness needs a network of transformers and the posterior's tokenizer, got "
            f"{type(posterior.base).__name__} and {type(posterior.tokenizer).__name__}; set "
            "posterior.tokenizer"
        )


def _numbers(draws: Any) -> Iterable[int] | None:
    """Return the numbers of draws; in the harness's arguments a text, as ``0+1+2``."""
    if draws is None or not isinstance(draws, int | str):
        return draws
    parts = str(draws).split("+")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"draws must be numbers joined by '+', such as 0+1+2, got {draws!r}")
    return [int(part) for part in parts]


def _size(batch_size: Any) -> int:
    size = int(batch_size) if str(batch_size).isdecimal() else batch_size
    whole_number("batch_size", size, at_least=1)
    return int(size)


def main() -> None:
    """Run the harness's own command, with the model ``pyrolora`` among the others."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
