"""Choices of a posterior that was fitted to texts, or to choose in another way."""

from __future__ import annotations

from typing import Any

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.data import prepare
from pyrolora.data.columns import CHOICES
from pyrolora.data.examples import as_examples, is_plain
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel
from pyrolora.predictive.predict import predict
from pyrolora.tasks import BY_CAUSAL_LM, ClassPrediction, choice_task, task_class


def choice_rows(data: Any, joint: JointModel) -> Any:
    """Return the data as rows with a column ``choices``, if a model of texts is to choose."""
    if joint.task.writes != "on":
        return None
    rows = as_examples(data, "input_ids", defaults.SCORE_SPLITS)
    return rows if is_plain(rows) and CHOICES in rows.column_names else None


def choose(
    joint: JointModel,
    data: Any,
    factors: AnyFactors,
    tokenizer: Any,
    *,
    choices: str | None = None,
    per_token: bool = False,
    need_labels: bool = False,
    batch_size: int = defaults.BATCH_SIZE,
    temperature: float = 1.0,
) -> ClassPrediction:
    """Return the probabilities of each example's choices, as a fit with ``choices=`` has them.

    Parameters
    ----------
    joint
        The joint model, whose network is a causal language model.
    data
        As in `pyrolora.fit`, with a column ``choices`` (texts) and one of context; ``label`` is
        optional.
    factors
        The factors of the draws.
    tokenizer
        Turns text to tokens.
    choices
        ``"letters"``, ``"texts"`` or ``"texts-per-token"``; None: as the fit has it, by texts
        where it was fitted to texts.
    per_token
        With choices by texts, take the mean over tokens in place of the sum, so that long choices
        are not at a disadvantage.
    need_labels
        Refuse data without labels.
    batch_size
        Examples per batch.
    temperature
        T of the posterior: of each token, where it was fitted to texts; of its own choices, where
        it was fitted to choose. It has none for choices in another way.

    Returns
    -------
    ClassPrediction
        Its probability is 0 at the choices that an example with fewer does not have.
    """
    own, text = joint.task, joint.task.as_text()
    rows = as_examples(data, "input_ids", defaults.SCORE_SPLITS)
    writes = text is not None and text.writes == "on"
    if not writes or (is_plain(rows) and CHOICES not in rows.column_names):
        raise ConfigError(
            "choosing by likelihood needs a causal language model, and data with a column 'choices'"
            f" beside the question; the task is {own.name!r}"
        )
    task = _task(joint, choices, per_token)
    task.check_network(joint.base)
    if text is own:
        task.token_temperature, temperature = temperature, 1.0
    elif type(task) is not type(own):
        temperature = 1.0
    view = joint.under(task)
    prepared = prepare(
        data,
        joint.base,
        task,
        tokenizer,
        splits=defaults.SCORE_SPLITS,
        need_labels=need_labels,
        to_learn=False,
    )
    found = predict(view, prepared, factors, batch_size=batch_size, temperature=temperature)
    assert isinstance(found, ClassPrediction)
    return found


def _task(joint: JointModel, choices: str | None, per_token: bool) -> Any:
    """Return the task that chooses; raise `ConfigError` for choices by letters ``per_token``."""
    usual = {kind.name: short for short, kind in BY_CAUSAL_LM.items()}.get(joint.task.name, "texts")
    law = usual if choices is None else choices
    if per_token and law == "letters":
        raise ConfigError(
            "per_token=True is for choices by their texts, and these are by letters, a token each; "
            "leave it out, or pass choices='texts'"
        )
    kind = task_class(choice_task("texts-per-token" if per_token else law) or joint.task)
    return kind()
