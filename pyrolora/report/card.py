"""The model card of a posterior: the facts of its fit, as people and the hub read them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from pyrolora.checks import text_or_none
from pyrolora.diagnostics.contraction import contractions, update_norms
from pyrolora.errors import ConfigError
from pyrolora.guides import full_name
from pyrolora.pipelines.names import pipeline_name, reads_plain_texts
from pyrolora.report import findings
from pyrolora.report.facts import Subject, option_facts, posterior_facts
from pyrolora.report.findings import Finding
from pyrolora.report.report import Judgement
from pyrolora.report.widths import prior_finding
from pyrolora.storage import MEAN_FOLDER
from pyrolora.visible import visible

TEMPLATE = "card.md.jinja"
LIBRARY = "pyrolora"
HELD_OUT = "data held out of the fit"
FOLDER = "path/to/this/folder"
WENT_BACK = "load_best_model_at_end"
"""The entry of the settings of a fit that does not end at its last step."""
HUB_TASKS = {
    *("text-classification", "token-classification", "text-generation", "question-answering"),
    *("fill-mask", "image-classification", "audio-classification"),
}
"""Names of pipelines that the hub has, too."""
AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
"""Pipeline -> the class of transformers that loads its networks."""
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")


def card_of(
    posterior: Subject,
    judged: Judgement | None = None,
    *,
    repo_id: str | None = None,
    mean: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Make the model card of a posterior.

    Parameters
    ----------
    posterior
        The posterior.
    judged
        The posterior on labelled data, with the metrics and warnings for the card. None: the
        metrics are those of the fit's last evaluation, and the warnings those that need no data.
    repo_id
        The repository that the card is for; None: a folder.
    mean
        None: the mean lies beside the posterior as an adapter of PEFT's. Otherwise why it does not.
    metadata
        Further entries of the header (``license``, ``language``, ``datasets``, ``tags``, ...), as
        of huggingface_hub's ``ModelCardData``. They replace those of the fit; tags are added.

    Raises
    ------
    ConfigError
        For metadata that the hub's format does not have.
    """
    text_or_none("repo_id", repo_id)
    base, where = source(posterior), repo_id or FOLDER
    scores = _scores(posterior) if judged is None else dict(judged.metrics)
    scores = {name: value for name, value in scores.items() if math.isfinite(value)}
    warnings = _without_data(posterior) if judged is None else judged.findings
    title = f"{full_name(posterior.options)} posterior of {base or type(posterior.base).__name__}"
    network = type(posterior.base).__name__ + (f" ({base})" if base else "")
    facts = {**posterior_facts(posterior), "network": network, LIBRARY: version(LIBRARY)}
    text = _template().render(
        header=_header(posterior, base, scores, mean is None, title, dict(metadata or {})),
        title=plain(title),
        summary=plain(
            f"A distribution over the low-rank adapters of {base or 'a ' + network}: every draw "
            "of it is a network, and their disagreement is what the fit does not know."
            if posterior.bank.specs
            else f"A distribution over the weights of {base or 'a ' + network}."
        ),
        loading=f"posterior = pyrolora.load({where!r}{'' if base else ', network'})",
        example=_example(posterior),
        unnamed=base is None,
        mean_folder=MEAN_FOLDER,
        why_no_mean=None if mean is None else plain(mean),
        mean_loading=_mean_loading(posterior, base, where),
        lost=_lost(posterior),
        metrics=[(plain(name), f"{value:.4g}") for name, value in scores.items()],
        scored="On the data of the report" if judged else _last_evaluation(posterior),
        findings=[(plain(w.title), plain(f"{w.found} {w.advice}")) for w in warnings],
        judged=judged is not None,
        facts=_rows(facts),
        options=_rows(option_facts(posterior.options)),
    )
    return ModelCard(text, ignore_metadata_errors=False)


def source(posterior: Subject) -> str | None:
    """Return the hub id of the network; None for one of a folder, or that was built in memory.

    Paths of a machine are nobody else's business.
    """
    name = str(getattr(getattr(posterior.base, "config", None), "name_or_path", "") or "")
    folder = not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).exists()
    return None if folder else name


def plain(text: Any) -> str:
    """Return a text that Markdown shows as it is, on one line, without markup of its own."""
    line = " ".join(visible(str(text)).split())
    return _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(plain(name), plain(value)) for name, value in facts.items()]


def _header(
    posterior: Subject,
    base: str | None,
    scores: Mapping[str, float],
    with_mean: bool,
    title: str,
    metadata: dict[str, Any],
) -> str:
    """Return the YAML of the card: the entries by which the hub finds and groups it."""
    name = pipeline_name(posterior.task, posterior.base)
    tag = name if name in HUB_TASKS else None
    tags = [LIBRARY, "bayesian", "uncertainty", full_name(posterior.options)]
    tags += ["lora"] if posterior.bank.specs else []
    tags += ["peft"] if with_mean else []
    tags += _texts("tags", metadata.pop("tags", ()))
    results = [
        EvalResult(
            task_type=name or posterior.task.name,
            dataset_type="held-out",
            dataset_name=HELD_OUT,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for metric, value in scores.items()
    ]
    entries: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter" if base and posterior.bank.specs else None,
        "library_name": LIBRARY,
        "pipeline_tag": tag,
        "tags": list(dict.fromkeys(tags)),
        "eval_results": results or None,
        "model_name": title if results else None,
        **metadata,
    }
    try:
        data = ModelCardData(**entries)
        return str(data.to_yaml(line_break="\n"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the card's metadata cannot be used: {error}; they are those of huggingface_hub's "
            f"ModelCardData, got {metadata!r}"
        ) from error


def _texts(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Iterable) or not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{name} must be a list of texts, got {value!r}")
    return list(values)


def _scores(posterior: Subject) -> dict[str, float]:
    """Return the metrics of the last evaluation in the log, without the prefix of the Trainer.

    There are none of a fit that went back to its best step: the log does not say which it was.
    """
    if posterior.settings.get(WENT_BACK):
        return {}
    for entry in reversed(posterior.history):
        found = {
            name.removeprefix("eval_"): float(value)
            for name, value in entry.items()
            if name.startswith("eval_") and isinstance(value, int | float)
        }
        if found:
            found.pop("loss", None)  # the nll again
            return found
    return {}


def _last_evaluation(posterior: Subject) -> str:
    """Return when the metrics of `_scores` were computed: before any temperature was chosen."""
    tempered = ", at temperature 1" if posterior.temperature != 1 else ""
    return f"At the last evaluation of the fit{tempered}"


def _without_data(posterior: Subject) -> list[Finding]:
    """Return the warnings of a report that need no data."""
    program = posterior.model.program
    blocks = contractions(program)
    checked = [
        findings.no_update(update_norms(program)),
        prior_finding(posterior, blocks),
        findings.not_converged(posterior.history),
        findings.chains_disagree(posterior.history),
    ]
    return [finding for finding in checked if finding is not None]


def _example(posterior: Subject) -> str:
    name = pipeline_name(posterior.task, posterior.base)
    if not reads_plain_texts(posterior.base, posterior.tokenizer):
        return "prediction = posterior.predict(data, num_samples=32)"
    if name in ("text-generation", "text2text-generation"):
        return 'print(posterior.generate(["A text to go on from"], num_samples=8).to_pandas())'
    if name == "text-classification":
        return 'print(posterior.predict(["A text"], num_samples=32).to_pandas())'
    return "prediction = posterior.predict(data, num_samples=32)"


def _mean_loading(posterior: Subject, base: str | None, where: str) -> str:
    """Return the code that loads the mean with PEFT alone."""
    name = pipeline_name(posterior.task, posterior.base)
    auto = AUTO.get(name or "")
    lines = ["from peft import PeftModel"]
    if auto and base:
        labels = getattr(getattr(posterior.base, "config", None), "num_labels", 0)
        more = f", num_labels={labels}" if str(name).endswith("-classification") else ""
        lines += [
            f"from transformers import {auto}",
            "",
            f"network = {auto}.from_pretrained({base!r}{more})",
        ]
    lines.append(f"mean = PeftModel.from_pretrained(network, {where!r}, subfolder={MEAN_FOLDER!r})")
    return "\n".join(lines)


def _lost(posterior: Subject) -> str:
    """Return what the mean alone does not have."""
    lost = ["the spread, and with it every measure of uncertainty"]
    if posterior.temperature != 1:
        lost.append(f"the temperature {posterior.temperature:.4g}, by which logits are divided")
    if posterior.model.program.members > 1:
        lost.append("the members of the ensemble, of which it is the mean")
    return "; ".join(lost)


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("pyrolora.report", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE)
