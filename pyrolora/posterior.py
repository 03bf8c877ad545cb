"""The posterior: what a fit returns, and everything that is done with it."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors, LayerSpec
from pyrolora.arviz import inference_data, summary
from pyrolora.checks import true_or_false, whole_number
from pyrolora.columns import INPUTS
from pyrolora.data import Prepared, prepare
from pyrolora.data.examples import as_examples, without_labels
from pyrolora.diagnostics import PSIS, khat
from pyrolora.errors import ConfigError
from pyrolora.guides import Guide, full_name
from pyrolora.model import JointGuide, JointModel
from pyrolora.predictive import (
    Calibration,
    ClassPrediction,
    Generation,
    NumberedDraws,
    Prediction,
    alone,
    calibrated,
    check_temperature,
    choice_rows,
    choose,
    draw_factors,
    evaluate,
    generate,
    predict,
)
from pyrolora.report import page_file, report_on
from pyrolora.seeding import seeded
from pyrolora.storage import (
    as_uniform,
    describe_base,
    merged,
    write_adapter,
    write_folder,
)
from pyrolora.tasks import Regression, Task

logger = logging.getLogger(__name__)


class Posterior:
    """A distribution over the adapters of a network, with the network that it was fitted on.

    Made by `pyrolora.fit` and `pyrolora.load`.

    Attributes
    ----------
    model, guide
        The Pyro pair, ``model(batch)`` and ``guide(batch)``, for ``pyro.infer.SVI``,
        ``Predictive`` and ``MCMC(NUTS(...))``. ``model`` is the untempered joint density of the
        adapters and the n training examples; without ``labels`` in the batch, y is sampled. Start
        a chain near the guide, at the values of ``sample(1)``. (Of
        ``"laplace"`` they have the network itself, not the linearised one that ``predict`` uses.)
    base
        The network. Its own weights are never changed.
    options
        The guide's options.
    history
        The log of the fit, one dict an entry: ``loss``, ``elbo``, ``log_likelihood``,
        ``kl/<site>``, evaluation metrics, ``ranks_lost``, by ``step`` and ``epoch``.
    tokenizer
        What turns raw text to tokens, or None.
    settings
        How the fit was run: epochs, learning rate, batch size, seed.
    identity
        What recognises the network that was fitted, as it was at the fit: `save` writes it, and
        `pyrolora.load` refuses another network.
    """

    def __init__(
        self,
        joint: JointModel,
        options: Guide,
        *,
        tokenizer: Any = None,
        history: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.model = joint
        self.guide = JointGuide(joint.program)
        self.options = options
        self.tokenizer = tokenizer
        self.history = [dict(entry) for entry in history]
        self.settings = dict(settings or {})
        self.temperature = temperature
        if identity is None:
            heads = joint.attachment.heads
            identity = describe_base(joint.base, heads, weights=options.adapts)
        self.identity = dict(identity)

    def __repr__(self) -> str:
        cooled = "" if self.temperature == 1 else f", temperature={self.temperature:.4g}"
        return (
            f"Posterior(guide={full_name(self.options)!r}, task={self.task.name!r}, "
            f"base={type(self.base).__name__}, layers={len(self.bank.specs)}, "
            f"num_examples={self.model.num_examples}{cooled})"
        )

    @property
    def base(self) -> nn.Module:
        return self.model.base

    @property
    def bank(self) -> AdapterBank:
        """The adapter means; of an ensemble only their layout, since each member has its own."""
        return self.model.program.bank

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> its rank; where ranks have moved between layers, that of the end."""
        return self.bank.ranks()

    @property
    def task(self) -> Task:
        """The law of the targets."""
        return self.model.task

    @property
    def temperature(self) -> float:
        """T of every prediction, which `calibrate` sets; 1 without. May be set, as to 1."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_temperature(value)

    @property
    def classes(self) -> list[str] | None:
        """What the data of the fit call the classes, where the network has no names for them: in
        predictions and tables, and to number later labels that are names."""
        names = self.task.class_names
        return None if names is None else list(names)

    # Draws --------------------------------------------------------------------------------------

    def sample(
        self,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Independent draws of every latent site; of ``"nuts"`` and ``"ensemble"``, whose draws
        are a list, evenly spaced ones whatever the seed.

        Parameters
        ----------
        num_samples, seed
            How many, and what makes them repeatable.
        draws
            In their place the numbers of draws, in this order. Draw k is one function wherever its
            number stands: here, in ``draws`` of `predict`, `evaluate`, `log_likelihood`,
            `generate` and `to_arviz`, and in ``draw`` of `to_peft` and `merge`. It is the k-th
            stored draw of ``"nuts"`` (chain after chain) and ``"ensemble"`` (with its head); of
            other guides the one that the fit's seed and k determine, whatever else is drawn, for a
            posterior that was saved and loaded, too, on every device. (Linearised ``"laplace"``
            predicts with the tangent plane at the mean, in the direction of draw k, which `to_peft`
            and `merge` refuse.)

        Returns
        -------
        dict
            Site -> (S, ...). `factors` turns them to the matrices of each layer.

        Raises
        ------
        ConfigError
            When both are given, or ``draws`` has none, one twice, or one that there is not.
        """
        numbers = self._named(draws, num_samples=num_samples, seed=seed)
        if numbers is not None:
            return self._numbered.sites(numbers)
        if num_samples is None:
            raise ConfigError("say how many draws, sample(8), or which, sample(draws=[0, 1, 2])")
        whole_number("num_samples", num_samples, at_least=1)
        with seeded(seed):
            return self.model.program.draw(num_samples)

    @property
    def _numbered(self) -> NumberedDraws:
        """The draws by their numbers, for which the seed of the fit is read."""
        return NumberedDraws(self.model, self.settings.get("seed", 0))

    def _named(self, draws: Any, **beside: Any) -> list[int] | None:
        """The numbers in ``draws``, checked, with nothing ``beside`` them; None: none is named."""
        if draws is None:
            return None
        alone(**beside)
        return self._numbered.check(draws)

    def _drawn(
        self, num_samples: int | None, seed: int | None, numbers: list[int] | None
    ) -> FlatFactors:
        """The factors of the draws of these numbers, or of ``num_samples`` others."""
        if numbers is None:
            return draw_factors(self.model, num_samples, seed)
        return self._numbered.factors(numbers)

    @torch.no_grad()
    def factors(
        self, draws: Mapping[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A, B): of shape (S, r, in) and (S, out, r) where they vary with the draws of
        `sample`; without draws, of the mean adapter. The update is s B A: means of updates, and a
        start that is not random, make more ranks of it than r."""
        program = self.model.program
        try:
            flat = program.mean() if draws is None else program.factors(draws)
        except KeyError as error:
            raise ConfigError(
                f"the draws have no site {error}, they have {sorted(draws or {})}; pass what "
                "sample(n) returns"
            ) from error
        return {name: (A.detach(), B.detach()) for name, (A, B) in self.bank.matrices(flat).items()}

    # Prediction ---------------------------------------------------------------------------------

    def predict(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Prediction:
        """The predictive ensemble of ``num_samples`` draws (0: the mean adapter alone).

        Parameters
        ----------
        data
            As in `pyrolora.fit`; also a list of texts; labels are optional. With a column
            ``choices``, a language model chooses between them: `predict_choices`.
        num_samples
            S. Each draw is one function, the same weights for all examples. None: 32; of an
            ensemble every member once.
        draws
            In place of ``num_samples`` and ``seed`` the numbers of draws, as in `sample`:
            ``draws=[0, 1, 2]`` are the functions that ``to_peft(path, draw=[0, 1, 2])`` writes.
        batch_size
            Examples a batch. Draws share its passes where the device is faster so.
        seed
            Makes the draws repeatable; others than those that have numbers.

        Returns
        -------
        Prediction
            ``ClassPrediction``, ``RegressionPrediction`` or ``TokenPrediction``.
        """
        prediction = self._predict(
            data, num_samples, batch_size, seed, draws=draws, need_labels=False
        )
        prediction.check_finite()
        return prediction

    def calibrate(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Calibration:
        """Choose the temperature T of all later predictions by held-out data: that of the lowest
        negative log-likelihood of the predictive mean,

            T = argmin −Σ_i log mean_s p_T(y_i | draw s),   p_T ∝ p^(1/T).

        T acts on each draw's law: softmax(f_s / T) of classes, of choices that a network scores,
        and of each token; N(f_s, T σ²) in a regression, which widens the noise alone, so that
        the means stay. Each draw thus stays a function with a law of its own (entropy still splits
        into aleatoric and epistemic, log-likelihoods and texts follow from the same law), which
        softmax(log p̄ / T) of the mean would not leave. No draw changes its mind; the mean of
        several may, where they disagree. For a point (``"map"``) it is temperature scaling (Guo et
        al. 2017, ICML).

        From then on T is in `predict`, `evaluate`, `log_likelihood`, `generate`, choices between
        texts, `report`, `pyrolora.compare` and ArviZ's ``posterior_predictive``, and `save` keeps
        it. What is about the fit has none: `model`, `guide`, `khat`, ArviZ's ``log_likelihood``
        (leave-one-out weighs draws by the likelihood that made them), and a later fit. `merge` and
        `to_peft` cannot hold it, and warn.

        Parameters
        ----------
        data
            Labelled, and not the training data, on which the fit is too sure; they are not
            recognised here (the command line does, by their file). Of a ``DatasetDict``
            ``validation``, else ``test``.
        num_samples, seed
            Of the draws, as in `predict`; T suits predictions of about as many. A second call
            starts anew, from T = 1.
        batch_size
            Examples a batch. Two passes over the data, with 25 temperatures in each.

        Returns
        -------
        Calibration
            ``temperature``, ``nll_before`` (at T = 1) and ``nll_after``.

        Raises
        ------
        ConfigError
            For a likelihood without a temperature, or data with ``choices`` before a language
            model, whose temperature is that of tokens.
        """
        whole_number("batch_size", batch_size, at_least=1)
        if choice_rows(data, self.model) is not None:
            raise ConfigError(
                "a language model's temperature is that of each token, and the data have 'choices' "
                "between texts, whose best temperature is another; calibrate on texts, or fit a "
                "network that scores choices (AutoModelForMultipleChoice)"
            )
        prepared = self._prepare(data, need_labels=True, splits=defaults.FIT_SPLITS)
        factors = draw_factors(self.model, num_samples, seed)
        found = calibrated(self.model, prepared, factors, batch_size=batch_size)
        self.temperature = found.temperature
        logger.info(
            "temperature %.4g from %d examples: NLL %.4f before, %.4f after",
            found.temperature,
            found.num_examples,
            found.nll_before,
            found.nll_after,
        )
        if found.at_an_end:
            warnings.warn(
                f"the temperature {found.temperature:.4g} is the end of what was looked at, "
                f"{defaults.TEMPERATURES}: too few examples, all of them right, labels that the "
                "predictions say nothing of, or draws that lie further apart than the labels; "
                "posterior.temperature = 1.0 undoes it",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def predict_choices(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        per_token: bool = False,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> ClassPrediction:
        """What a language model chooses between the texts of each example's column ``choices``:
        p_s(c) ∝ exp(log p(c | context, draw s)), with ``per_token`` the mean log-likelihood of the
        choice's tokens in place of their sum. The rest is as in `predict`."""
        whole_number("batch_size", batch_size, at_least=1)
        numbers = self._named(draws, num_samples=num_samples, seed=seed)
        factors = self._drawn(num_samples, seed, numbers)
        return choose(
            self.model,
            data,
            factors,
            self.tokenizer,
            per_token=per_token,
            batch_size=batch_size,
            temperature=self.temperature,
        )

    def generate(
        self,
        inputs: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        seed: int | None = None,
        **generate_options: Any,
    ) -> Generation:
        """Continuations by ``num_samples`` draws (0: the mean adapter alone), each of which writes
        its own with the same weights from the first token to the last; then all draws read all of
        them, for the uncertainty of every token.

        Parameters
        ----------
        inputs
            A list of texts; token ids, (n, T) or lists; or a mapping with ``input_ids``,
            ``attention_mask``, and what else the network takes, a row per prompt, such as
            ``pixel_values``.
        num_samples
            S. None: 8; of an ensemble every member once.
        draws
            In place of ``num_samples`` the numbers of draws, as in `sample`.
        seed
            Makes the draws, those without numbers, and the sampling of tokens repeatable.
        **generate_options
            Of transformers' ``generate``: ``max_new_tokens`` (what the network's own settings say,
            or 40, at most to the end of its context), ``do_sample``, ``temperature``,
            ``num_beams``, ``num_return_sequences``, ... Greedy search, sampling, and both with
            beams.

        Raises
        ------
        ConfigError
            When the network is no causal language model, or for a decoding that would mix rows of
            different draws (contrastive, assisted, ...).
        """
        numbers = self._named(draws, num_samples=num_samples)
        if num_samples is None:
            num_samples = self.model.program.usual_draws(defaults.GENERATE_SAMPLES)
        with seeded(seed):
            factors = self._drawn(num_samples, None, numbers)
            return generate(
                self.model,
                inputs,
                factors,
                self.tokenizer,
                numbers=numbers,
                options=generate_options,
                temperature=self.temperature,
            )

    def evaluate(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        outside: Any = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> dict[str, float]:
        """Metrics of the predictive mean over draws.

        Classification and multiple choice: ``accuracy``, ``nll``, ``ece``, ``brier``,
        ``error_auroc``, ``aurc``; regression: ``rmse``, ``nll``, ``crps``, ``coverage``, ``aurc``;
        language models: ``nll`` (a counted token) and ``perplexity``, or, of data with a column
        ``choices``, what classification has (`predict_choices`). With ``outside``, data of
        another distribution (labels are not needed): ``ood_auroc``.
        `pyrolora.predictive.evaluate` defines each. The draws are those of `predict`.
        """
        numbers = self._named(draws, num_samples=num_samples, seed=seed)
        inside = self._predict(data, num_samples, batch_size, seed, draws=numbers, need_labels=True)
        if outside is None:
            return evaluate(inside)
        other = self.predict(
            self.inputs_of(outside), num_samples, draws=numbers, batch_size=batch_size, seed=seed
        )
        return evaluate(inside, other)

    def log_likelihood(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Tensor:
        """log p(y_i | draw s), (S, n), in nats; a text's is the sum over its labelled tokens, and
        of data with ``choices`` it is that of the right choice among them. The draws are those of
        `predict`."""
        prediction = self._predict(
            data, num_samples, batch_size, seed, draws=draws, need_labels=True
        )
        assert prediction.log_likelihood is not None
        return prediction.log_likelihood

    def _predict(
        self,
        data: Any,
        num_samples: int | None,
        batch_size: int,
        seed: int | None,
        *,
        draws: Iterable[int] | None = None,
        need_labels: bool,
    ) -> Prediction:
        whole_number("batch_size", batch_size, at_least=1)
        numbers = self._named(draws, num_samples=num_samples, seed=seed)
        read = self._reader(data, batch_size, need_labels=need_labels)
        return read(self._drawn(num_samples, seed, numbers))

    def _reader(
        self, data: Any, batch_size: int = defaults.BATCH_SIZE, *, need_labels: bool
    ) -> Callable[..., Prediction]:
        """What draws say of data that are checked already, at the posterior's temperature or at
        another; of ``choices`` before a language model, what they choose."""
        rows, own = choice_rows(data, self.model), self.temperature
        if rows is not None:
            return lambda factors, temperature=own: choose(
                self.model,
                rows,
                factors,
                self.tokenizer,
                need_labels=need_labels,
                batch_size=batch_size,
                temperature=temperature,
            )
        prepared = self._prepare(data, need_labels=need_labels)
        return lambda factors, temperature=own: predict(
            self.model, prepared, factors, batch_size=batch_size, temperature=temperature
        )

    # ArviZ --------------------------------------------------------------------------------------

    def to_arviz(
        self,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        data: Any = None,
        log_likelihood: bool = False,
        factors: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Draws as ArviZ's ``InferenceData`` (0.2x) or ``DataTree`` (1.x).

        The draws of a fitted guide are one chain of independent draws: R-hat and effective sample
        size say nothing about its quality. Those of ``"nuts"`` are its chains, and
        `pyrolora.arviz.as_chains` makes chains of several fits; look at ``adapter_norm``,
        ``factor_norm`` and ``covariance_eigenvalues``, which no rotation of the ranks changes, not
        at entries of the factors.

        The coordinate ``draw`` is the number of the draw, as in `sample`: without ``seed`` and
        ``draws`` they are 0, 1, ... (of ``"nuts"`` draw k stands in chain k // n at k % n, n the
        draws of a chain; fewer of stored ones are evenly spaced). Draws of a ``seed`` have no
        numbers, nor have stored ones that are asked for more than once: there ``draw`` counts them.
        The attribute ``draws`` of every group says which it is.

        Dimensions are ``layer``, ``block`` (a factor of a layer), ``rank``, ``component``,
        ``class`` (under the network's names), ``example`` and ``token``; the attributes of every
        group say which guide made the draws.

        Parameters
        ----------
        num_samples
            Number of draws, over all chains. None: 200, or all that there are where draws are
            stored (``"nuts"``, ``"ensemble"``).
        draws
            In its place the numbers of draws, as in `sample`; in one chain.
        data
            Adds ``posterior_predictive`` (sampled ``y``, and ``probs`` or ``mean`` of each draw)
            and, with labels, ``observed_data`` for these examples. Of a language model there is no
            ``posterior_predictive``, since other texts than the given ones are not drawn here, and
            so no ``az.plot_ppc``; in its ``observed_data`` a token that does not count is -100.
            Of data with ``choices`` ``y`` is what it chooses (`predict_choices`).
        log_likelihood
            With ``data``: adds the pointwise log-likelihood, that of the model, without the
            temperature of `calibrate`. `pyrolora.diagnostics.loo` makes a leave-one-out estimate of
            those of the training data, exact for draws of the posterior itself: it has the weights
            p(y_i|θ)^(−1/β) of the β of the fit, which is the attribute ``kl_weight`` of every
            group. ``az.loo`` has those of β = 1; for another β a log says so, once, and the
            attribute ``leave_one_out``. After `calibrate`, ``sample_stats`` has the
            ``calibrated_log_likelihood``, too, which `loo` then scores by. With means, a head and a
            noise that were fitted to the same data both are too good; held-out data have
            ``evaluate(data)["nll"]``.
        factors
            Adds every entry of A and B, ``A[layer]`` and ``B[layer]``; by default there are the
            guide's scales (mixture weights, Σ, signal-to-noise) and ``adapter_norm``, ‖s B A‖_F per
            layer.
        seed
            Of other draws than the numbered ones.
        """
        numbers = self._named(draws, num_samples=num_samples, seed=seed)
        if log_likelihood and data is None:
            raise ConfigError("log_likelihood=True needs data= to score")
        read = None if data is None else self._reader(data, need_labels=log_likelihood)
        return inference_data(
            self.model,
            self.options,
            read,
            self._numbered,
            num_samples,
            draws=numbers,
            temperature=self.temperature,
            log_likelihood=log_likelihood,
            factors=factors,
            seed=seed,
        )

    def summary(self, num_samples: int | None = None, *, seed: int | None = None) -> pd.DataFrame:
        """``az.summary`` of what `to_arviz` has of low dimension: ``adapter_norm`` and the guide's
        scales, a row an entry; with R-hat and effective sample sizes where there are chains."""
        return summary(self.to_arviz(num_samples, seed=seed))

    def khat(
        self,
        data: Any,
        num_samples: int = defaults.KHAT_DRAWS,
        *,
        seed: int | None = None,
        per_layer: bool = False,
    ) -> PSIS | dict[str, PSIS]:
        """k̂: can the guide's draws stand for the posterior that the fit aimed at?

        Pareto-smoothed importance sampling with the weights

            log w_s = log p(θ_s) + (1/β) Σ_i log p(y_i | θ_s) − log q(θ_s),   θ_s ~ q,

        over the n training examples: with β the weight of the KL, the fit's optimum without
        restriction is ∝ p(θ) p(y|θ)^{1/β}. θ are all latent sites of the pair (of isotropic
        MonteCLoRA also Σ, which the data do not see); means, heads and the noise of a regression
        are given. p(y_i | θ) is what `predict` has: for linearised Laplace that of the linearised
        network.

        Below the limit, min(0.7, 1 − 1/log₁₀ S), the guide is close. Above it, it need not be far:
        in 10³ to 10⁴ dimensions nearly every k̂ is (a Gaussian 10 % too narrow has 0.4 in ten,
        5 in 10,000). The verdict compares with that Gaussian.

        Parameters
        ----------
        data
            The training data.
        num_samples
            S; every draw runs over all of ``data``.
        seed
            Makes the draws repeatable.
        per_layer
            Judge each layer given the others: its own θ drawn, the other layers at the guide's
            mean, against p(θ_layer | y, the others there). The guides' layers are independent, so
            that is the guide's own law of the layer. As many passes as there are layers.

        Returns
        -------
        PSIS
            ``khat``, ``dimensions`` and a ``verdict`` in words; per layer a dict of them by name.

        Raises
        ------
        ConfigError
            For a guide without a density of its own: ``"map"``, ``"ensemble"``, ``"nuts"``,
            ``"dropout"``, ``"full"``, ``"tfb"``, and ``"swag"`` without a prior.
        DataError
            When ``data`` has another number of examples than the fit.
        """
        prepared = prepare(data, self.base, self.task, self.tokenizer)
        return khat(self.model, self.options, prepared, num_samples, seed=seed, per_layer=per_layer)

    # A page -------------------------------------------------------------------------------------

    def report(
        self,
        path: str | Path,
        data: Any,
        *,
        outside: Any = None,
        num_samples: int | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Path:
        """Write one self-contained HTML page about this posterior: warnings in plain words,
        metrics, pictures, the most and the least certain examples, data, settings. It needs no
        network and no script.

        Parameters
        ----------
        path
            A file; one that is there is replaced.
        data
            As in `predict`. Without labels there are no metrics, and with those of the training no
            judgement of what was learnt: they can be memorised, random ones too.
        outside
            Other data, without labels: how well does the uncertainty tell them from ``data``?
        num_samples
            As in `predict`.
        batch_size
            Examples a batch. Draws share its passes where the device is faster so.
        seed
            Of the draws. None: a random one, which the page states.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        ConfigError
            When ``path`` is a folder, or stands in none.
        """
        file = page_file(path)  # before the predictions, which take longer
        options: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size}
        return report_on(self, data, outside=outside, seed=seed, **options).write(file)

    # Storage ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior to a folder: tensors as safetensors, the rest as JSON, the tokenizer
        beside them; `pyrolora.load` reads it again.

        The base network is not copied: its name, its configuration and digests of its weights are
        kept, as they were at the fit. One that has no name, since it was built, merged or changed
        in memory, has to be saved by itself and passed to `pyrolora.load`; a log says so."""
        if self.identity["config"] and not self.identity["name_or_path"]:
            logger.warning(
                "the network of this posterior, a %s, has no hub id or folder to come back from: "
                "keep it with posterior.base.save_pretrained(folder), and load the posterior "
                "with pyrolora.load(path, folder)",
                self.identity["class"],
            )
        specs = list(self.bank.specs.values())
        previous = self.model.program.previous
        meta = {
            "guide": _described(self.options),
            "prior": None if previous is None else _described(previous.options),
            "task": self.task.name,
            "classes": self.classes,
            "adapter": dataclasses.asdict(self.bank.config),
            "layers": [dataclasses.asdict(spec) for spec in specs],
            "heads": list(self.model.attachment.heads),
            "base": self.identity,
            "num_examples": self.model.num_examples,
            "settings": self.settings,
            "history": self.history,
            "temperature": self.temperature,
        }
        write_folder(Path(path), meta, self.model.own_state(), self.tokenizer)

    def merge(self, draw: str | int = "mean") -> nn.Module:
        """A new plain model with an adapter added to its weights and the posterior's head; this
        posterior and its base stay as they are.

        Parameters
        ----------
        draw
            ``"mean"``: the mean adapter (of an ensemble: the mean of the updates, and of the
            heads); or the number k of a draw, as in `to_peft`.

        Raises
        ------
        ConfigError
            When a layer's weight is quantised, parametrised or offloaded, or the draw is no
            adapter.
        """
        self._warn_untempered("a merged model")
        return merged(self.model, self._setting(draw))

    def to_peft(
        self,
        path: str | Path,
        draw: str | int | Iterable[int] = "mean",
        *,
        uniform: bool = False,
    ) -> None:
        """Write a LoRA adapter that ``peft.PeftModel.from_pretrained(network, path)`` loads, with
        the same outputs; PEFT itself is not needed to write it.

        Parameters
        ----------
        path
            A folder.
        draw
            ``"mean"``; or k, the number of a draw, as in `sample` and ``predict(draws=[k])``; or a
            list of these, written to ``path/draw-<k>`` each, for a server that holds several
            adapters on one network.
        uniform
            Give all layers the largest of their ranks, filled up with zeros, and the scaling 1
            (``lora_alpha`` = ``r``), with s in B: the same outputs, for servers that read neither
            ``rank_pattern`` nor ``alpha_pattern`` (vLLM, LoRAX). Ranks of zeros do not learn, if
            the adapter is trained on.

        Raises
        ------
        ConfigError
            When the folder holds something else, or the draw is no low-rank adapter.
        """
        true_or_false("uniform", uniform)
        if not self.bank.specs:
            raise ConfigError(
                f"{full_name(self.options)!r} has no adapter; write the network itself with "
                "posterior.merge().save_pretrained(path)"
            )
        if isinstance(draw, Iterable) and not isinstance(draw, str):
            for number in self._numbered.check(draw, "draw"):
                self.to_peft(Path(path) / f"draw-{number}", number, uniform=uniform)
            return
        self._warn_untempered("an adapter")
        setting = self._setting(draw)
        heads = {name: own for name, (own,) in self.model.named_heads(setting).items()}
        matrices = self.bank.matrices(setting)
        specs: Mapping[str, LayerSpec] = self.bank.specs
        if uniform:
            specs, matrices = as_uniform(specs, matrices)
        write_adapter(Path(path), specs, matrices, heads, self.base)

    def _warn_untempered(self, what: str) -> None:
        if self.temperature != 1:
            means = (
                "T is a factor of the noise's variance"
                if isinstance(self.task, Regression)
                else "divide its logits by it"
            )
            warnings.warn(
                f"{what} does not hold the temperature {self.temperature:.4g} of this posterior: "
                f"its predictions are those before calibrate(...); {means}",
                UserWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def _setting(self, draw: str | int) -> FlatFactors:
        """The factors of the mean adapter, or of one draw."""
        program = self.model.program
        if draw == "mean":
            return program.mean()
        if isinstance(draw, str):
            raise ConfigError(f"draw must be 'mean' or the number of a draw, got {draw!r}")
        numbered = self._numbered
        numbered.check_one(draw)
        if program.linearised and self.task.linearisable:
            raise ConfigError(
                "the predictions of this posterior are linear in its draws, and the network with a "
                "draw in it gives others; use draw='mean', or fit with "
                "Laplace(curvature='kronecker', linearised=False)"
            )
        setting = program.factors(numbered.sites([draw]))[0]
        if setting.seeds is not None:
            raise ConfigError(
                "a draw of Flat(at_prediction=True) has noise on the weights, which no adapter "
                "holds; use draw='mean', or at_prediction=False"
            )
        return setting

    def detach(self) -> nn.Module:
        """Put the network's original modules back and return it. The posterior keeps its draws but
        can no longer predict; other posteriors of the network are not disturbed."""
        self.model.attachment.detach()
        return self.base

    def inputs_of(self, data: Any) -> Any:
        """Data as `predict` takes it, without labels, which may be of other classes; those of texts
        stay, since they say which tokens count."""
        name = getattr(self.base, "main_input_name", INPUTS)
        if self.task.keeps_labels:
            return as_examples(data, name, defaults.OUTSIDE_SPLITS)
        return without_labels(data, name, defaults.OUTSIDE_SPLITS)

    def _prepare(
        self, data: Any, *, need_labels: bool, splits: Sequence[str] = defaults.SCORE_SPLITS
    ) -> Prepared:
        return prepare(
            data,
            self.base,
            self.task,
            self.tokenizer,
            splits=splits,
            need_labels=need_labels,
            to_learn=False,
        )


def _described(guide: Guide) -> dict[str, Any]:
    return {"name": full_name(guide), "options": dataclasses.asdict(guide)}
