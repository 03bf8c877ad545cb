"""The request of a fit: everything that was asked for, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from pyrolora import defaults
from pyrolora.adapters import as_adapter_config
from pyrolora.adapters.config import AdapterConfig
from pyrolora.data import TextOptions
from pyrolora.errors import ConfigError
from pyrolora.fitting.stored import StoredPosterior
from pyrolora.fitting.supervised import text_options_of
from pyrolora.guides import Guide, Variational, as_guide, available, full_name
from pyrolora.inference import OF_STEPS, set_for_steps
from pyrolora.inference.recording import as_recordable
from pyrolora.posterior import Posterior
from pyrolora.tasks import Task

_DEFAULTS: dict[str, Any] = {
    "epochs": defaults.EPOCHS,
    "learning_rate": defaults.LEARNING_RATE,
    "batch_size": defaults.BATCH_SIZE,
    "seed": defaults.SEED,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Everything that a fit is asked for.

    The attributes without a description are the keywords of `pyrolora.fit`.

    Attributes
    ----------
    model
        The network, or its hub id or folder; with ``given`` the network of that posterior.
    given
        The posterior whose means stay, in a post-hoc fit, or its folder.
    prior
        The posterior of earlier data, or its folder.
    stream
        The stream of which ``data`` are the first examples, if they are.
    training_options
        Arguments of the Trainer that complete the shortcuts, by their names there.
    saves
        Whether the fit writes the posterior to ``output_dir``; if not, only checkpoints go there.
    """

    model: str | Path | nn.Module
    data: Any
    guide: str | Guide | None = None
    eval_data: Any = None
    tokenizer: Any = None
    task: str | Task | None = None
    adapter: AdapterConfig | Any = None
    texts: TextOptions | None = None
    num_examples: int | None = None
    stream: Any = None
    given: Posterior | StoredPosterior | None = None
    prior: Posterior | StoredPosterior | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    seed: int | None = None
    output_dir: str | Path | None = None
    training: TrainingArguments | None = None
    training_options: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[TrainerCallback] | TrainerCallback = ()
    saves: bool = True

    @cached_property
    def options(self) -> Guide:
        """The guide that is inferred: the one asked for, as the layers of ``given`` allow it."""
        if isinstance(self.given, Posterior):
            return as_recordable(self.asked, self.given.model.attachment)
        return self.asked

    @cached_property
    def asked(self) -> Guide:
        """The guide asked for; of the prior's guide the name stands for the prior's options."""
        prior, guide = self.prior, self.guide
        if prior is None:
            return as_guide("montec" if guide is None else guide)
        if not isinstance(prior, Posterior | StoredPosterior):
            raise ConfigError(
                f"prior must be a Posterior of an earlier fit, got {prior!r}; the prior scale of a "
                "guide is an option of the guide, as in MeanField(prior_scale=0.2)"
            )
        if guide is None or guide == full_name(prior.options):
            return prior.options
        return as_guide(guide)

    @property
    def inherits(self) -> bool:
        """Whether the guide's options are those of the prior, asked for with the earlier data."""
        if self.prior is None or isinstance(self.guide, Guide):
            return False
        return self.asked == self.prior.options

    @property
    def shortcuts(self) -> dict[str, Any]:
        """The Trainer's arguments that are keywords of `fit`, if they are set."""
        names = (*_DEFAULTS, "output_dir")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def held_out(self) -> Any:
        """The evaluation data; without ``eval_data`` the split ``validation`` of the data."""
        if self.eval_data is None and isinstance(self.data, dict):
            return self.data.get("validation")
        return self.eval_data

    @property
    def reading(self) -> TextOptions | None:
        """How texts are read, where the request says it: by ``texts``, or by TRL's arguments."""
        return text_options_of(self.training) if self.texts is None else self.texts

    @property
    def listeners(self) -> list[TrainerCallback]:
        """The callbacks as a list."""
        given: Any = self.callbacks
        alone = isinstance(given, TrainerCallback) or not isinstance(given, Iterable)
        return [given] if alone else list(given)

    def loaded(self) -> Request:
        """Return the request with its posteriors in memory, and their network in its place."""
        if isinstance(self.given, StoredPosterior):
            given = self.given.load(self.model, self.data, self.task)
            request = dataclasses.replace(self, model=given.base, given=given, task=None)
            request._check_given(given)
            return request
        if isinstance(self.prior, StoredPosterior):
            prior = self.prior.load(self.model, self.data, None)
            return dataclasses.replace(self, model=prior.base, prior=prior)
        return self

    def record(self) -> dict[str, Any]:
        """Return the request as JSON, with the defaults that apply; objects become their names."""
        adapter = None
        if self.options.adapts and self.given is None and self.prior is None:
            adapter = dataclasses.asdict(as_adapter_config(self.adapter))
        shortcuts: dict[str, Any] = {}
        training: Any = dict(self.training_options)
        if self.training is None:
            shortcuts = {**_DEFAULTS, **self.shortcuts}
            shortcuts.pop("output_dir", None)
        else:
            training = self.training.to_dict()
        return {
            "model": _name(self.model),
            "data": _name(self.data),
            "num_examples": self.num_examples,
            "eval_data": _name(self.held_out),
            "guide": {"name": full_name(self.options), **dataclasses.asdict(self.options)},
            "task": _name(self.task),
            "adapter": adapter,
            "texts": None if self.reading is None else dataclasses.asdict(self.reading),
            "given": _name(self.given),
            "prior": _name(self.prior),
            **shortcuts,
            "training": training,
        }

    # Checks --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `ConfigError` for parts that contradict one another, and for unfit callbacks."""
        guide, adapter = self.options, self.adapter
        self._check_callbacks()
        self._check_texts()
        if self.prior is not None:
            self._check_prior(self.prior)
        if self.given is not None:
            self._check_given(self.given)
        if adapter is not None and not guide.adapts:
            raise ConfigError(
                f"guide {guide.name!r} trains the network itself and has no adapters; leave "
                "adapter= out"
            )

    def _check_callbacks(self) -> None:
        for listener in self.listeners:
            kind = listener if isinstance(listener, type) else type(listener)
            if not issubclass(kind, TrainerCallback):
                raise ConfigError(
                    "callbacks must be transformers.TrainerCallback objects, or one, got "
                    f"{listener!r}; subclass TrainerCallback"
                )

    def _check_texts(self) -> None:
        if self.texts is None:
            return
        if not isinstance(self.texts, TextOptions):
            raise ConfigError(
                f"texts must be a pyrolora.TextOptions, got {self.texts!r}; for example "
                "TextOptions(max_length=512, assistant_only_loss=True)"
            )
        if text_options_of(self.training) is not None:
            raise ConfigError(
                f"texts= and a {type(self.training).__name__} both say how texts are read; leave "
                "texts= out, or pass a transformers.TrainingArguments"
            )

    def _check_prior(self, prior: Posterior | StoredPosterior) -> None:
        """Refuse what an earlier posterior brings itself, and a guide that cannot follow its."""
        if self.given is not None:
            raise ConfigError(
                "with prior= the network is what is fitted, and model= is a Posterior; pass "
                "posterior.base, or leave prior= out for a fit that keeps the means"
            )
        self._refuse("the prior", adapter=self.adapter, task=self.task)
        names = full_name(prior.options), full_name(self.options)
        if names[0] != names[1] or not self.options.supports.prior:
            able = ", ".join(n for n in available() if as_guide(n).supports.prior)
            raise ConfigError(
                f"a posterior of {names[0]!r} cannot be the prior of {names[1]!r}: both have to be "
                f"the same one of {able}, or 'flat' around it"
            )
        if "gaussian" in (prior.options.head, self.options.head):
            raise ConfigError(
                "an earlier posterior is the prior of the adapters, and the task head stays as it "
                "is, got head='gaussian'; pass a prior and a guide with head='point'"
            )
        earlier, later = (getattr(o, "inner", o) for o in (prior.options, self.options))
        free = {option.name for option in dataclasses.fields(Variational)}
        for option in dataclasses.fields(later):
            before, now = getattr(earlier, option.name), getattr(later, option.name)
            if option.name == "units":
                before, now = earlier.unit, later.unit  # of which None is one
            if option.name not in free and before != now:
                raise ConfigError(
                    f"{option.name}={now!r}, and in the prior it is {before!r}; it has to be the "
                    "same"
                )

    def _check_given(self, given: Posterior | StoredPosterior) -> None:
        """Refuse what a posterior brings itself, and a guide that has nothing to add to it."""
        from_peft = isinstance(given, StoredPosterior) and given.from_peft
        self._refuse("the posterior", adapter=self.adapter, task=None if from_peft else self.task)
        guide = self.options
        if isinstance(given, StoredPosterior) and guide.without_inputs() != guide:
            return  # what is trained depends on its layers, which `loaded` knows
        how = guide.supports.post_hoc
        guide.check_given()
        if how is None:
            able = ", ".join(n for n in available() if as_guide(n).supports.post_hoc is not None)
            raise ConfigError(
                f"guide {full_name(guide)!r} has nothing to infer when the adapter is given; "
                f"choose one of {able}, or fit the network anew"
            )
        if how != "computed":
            return
        useless = [name for name in ("epochs", "learning_rate", "callbacks") if getattr(self, name)]
        useless += [f"training.{name}" for name in self.training_options if name in OF_STEPS]
        if isinstance(self.training, TrainingArguments):
            useless += set_for_steps(self.training)
        if useless:
            raise ConfigError(
                f"guide {guide.name!r} trains nothing when the adapter is given; leave "
                f"{', '.join(useless)} out"
            )

    def _refuse(self, source: str, **options: Any) -> None:
        for name, value in options.items():
            if value is not None:
                raise ConfigError(f"{name}= comes with {source}; leave it out")


def _name(value: Any) -> Any:
    """Return a value that JSON can hold; objects become their name, or that of their class."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, StoredPosterior):
        return str(value.folder.resolve())
    if isinstance(value, Task):
        return value.name
    return repr(value) if isinstance(value, Posterior) else type(value).__name__
