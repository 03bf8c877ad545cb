"""The posterior: the result of a fit, and everything that can be done with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import Pipeline

from pyrolora import defaults
from pyrolora.adapters import AdapterBank
from pyrolora.arviz import inference_data, summary
from pyrolora.checks import path_like, true_or_false, whole_number
from pyrolora.data import Prepared, TextOptions, prepare
from pyrolora.data.labels import class_names_of
from pyrolora.diagnostics import PSIS, khat
from pyrolora.diagnostics.leave_one_out import by_places
from pyrolora.errors import ConfigError
from pyrolora.guides import Guide, full_name
from pyrolora.inference.identity import known_digest
from pyrolora.model import JointGuide, JointModel
from pyrolora.peft import export_factors, why_no_mean
from pyrolora.pipelines import pipeline
from pyrolora.predictive import (
    Calibration,
    ClassPrediction,
    Generation,
    GenerationScores,
    Prediction,
    Predictor,
    acquire,
    calibrate,
    check_temperature,
    choose,
    evaluate,
    scored_answers,
    warn_untempered,
)
from pyrolora.predictive.acquisition import By, one_split
from pyrolora.predictive.answers import Correct, asked_of, judge, rows_to_answer, truth_rows
from pyrolora.predictive.meanings import Same
from pyrolora.report import card_of, judge_by, page_file, push, report_on, save
from pyrolora.seeding import seeded
from pyrolora.storage import describe_base, merged
from pyrolora.tasks import Task


class Posterior:
    """A distribution over the adapters of a network, with the network that it was fitted on.

    `pyrolora.fit` and `pyrolora.load` make posteriors.

    Attributes
    ----------
    model, guide
        The Pyro pair, ``model(batch)`` and ``guide(batch)``, for ``pyro.infer.SVI``,
        ``Predictive`` and ``MCMC(NUTS(...))``. ``model`` is the untempered joint density of the
        adapters and the n training examples; without ``labels`` in the batch, y is sampled. Start
        a chain near the guide, at the values of ``sample(1)``. (With ``"laplace"`` they have the
        network itself, not the linearised one that ``predict`` uses.)
    base
        The network. Its weights are never changed.
    options
        The guide's options.
    history
        The log of the fit, one dict per entry: ``loss``, ``elbo``, ``log_likelihood``,
        ``kl/<site>``, evaluation metrics, ``ranks_lost``, by ``step`` and ``epoch``. Where examples
        were held back, the last entry has ``held_back``, their number, and what they have chosen:
        ``width``, the c of ``hold_back`` of the guide, and ``temperature``.
    tokenizer
        The tokenizer for raw text, or the processor for pictures and sounds, or None.
    settings
        How the fit was run: epochs, learning rate, batch size, seed.
    identity
        A description that recognises the network as it was at the fit: `save` writes it, and
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
        apart = f", held_back={self.held_back}" if self.held_back else ""
        cooled = "" if self.temperature == 1 else f", temperature={self.temperature:.4g}"
        return (
            f"Posterior(guide={full_name(self.options)!r}, task={self.task.name!r}, "
            f"base={type(self.base).__name__}, layers={len(self.bank.specs)}, "
            f"num_examples={self.model.num_examples}{apart}{cooled})"
        )

    @property
    def held_back(self) -> int:
        """The number of training examples that the fit did not learn from, but chose by."""
        return int(self.settings.get("held_back", 0)) if self.options.held_back else 0

    @property
    def base(self) -> nn.Module:
        """The network."""
        return self.model.base

    @property
    def bank(self) -> AdapterBank:
        """The means of the adapters; in an ensemble, whose members have their own, the layout."""
        return self.model.program.bank

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> its rank; where ranks moved between layers, the rank at the end of the fit."""
        return self.bank.ranks()

    @property
    def task(self) -> Task:
        """The task: the law of the targets, with its parameters."""
        return self.model.task

    @property
    def temperature(self) -> float:
        """T of every prediction; it may be set, as to 1.

        A fit that holds examples back chooses it, and so does `calibrate`; otherwise it is 1.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_temperature(value)

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes by number: the network's, or those of the data of the fit.

        Predictions and tables show them, and later labels that are names are numbered by them.
        """
        names = class_names_of(self.base, self.task) if self.task.names_classes else {}
        return [names[number] for number in sorted(names)] or None

    @property
    def texts(self) -> TextOptions | None:
        """How texts are read, where the fit was told; a `TextOptions` may be set."""
        return self.task.texts

    @texts.setter
    def texts(self, value: TextOptions | None) -> None:
        if not self.task.collator.reads_texts or not isinstance(value, TextOptions | None):
            raise ConfigError(
                "texts must be a pyrolora.TextOptions or None, of a causal language model, got "
                f"{value!r} for the task {self.task.name!r}"
            )
        self.task.texts = value

    @property
    def predictor(self) -> Predictor:
        """The joint model with what it takes to predict from raw data."""
        return Predictor(self.model, self.tokenizer, self.temperature, self.settings.get("seed", 0))

    # Draws --------------------------------------------------------------------------------------

    def sample(
        self,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Draw every latent site independently.

        ``"nuts"`` and ``"ensemble"`` have a list of draws: evenly spaced ones are taken of it,
        whatever the seed.

        Parameters
        ----------
        num_samples, seed
            The number of draws, and the seed that makes them repeatable.
        draws
            Instead of these two, the numbers of draws, in this order. Draw k is one function
            wherever its number stands: here, in ``draws`` of `predict`, `evaluate`,
            `log_likelihood`, `generate`, `calibrate`, `report`, `to_arviz`, `pyrolora.compare`, the
            command line and the server, and in ``draw`` of `to_peft` and `merge`.
            It is the k-th stored draw of ``"nuts"`` (chain after chain) and ``"ensemble"`` (with
            its head). With other guides the fit's seed and k determine it, whatever else is drawn,
            also after the posterior was saved and loaded, and on every device. (Linearised
            ``"laplace"`` predicts with the tangent plane at the mean, in the direction of draw k,
            which `to_peft` and `merge` refuse.)

        Returns
        -------
        dict
            Site -> (S, ...). `factors` turns them into the matrices of each layer.

        Raises
        ------
        ConfigError
            When both are given, or ``draws`` is empty, repeats a number, or has one that does not
            exist.
        """
        predictor = self.predictor
        numbers = predictor.numbers(draws, num_samples=num_samples, seed=seed)
        if numbers is not None:
            return predictor.numbered.sites(numbers)
        if num_samples is None:
            raise ConfigError("say how many draws, sample(8), or which, sample(draws=[0, 1, 2])")
        whole_number("num_samples", num_samples, at_least=1)
        with seeded(seed):
            return self.model.program.draw(num_samples)

    @torch.no_grad()
    def factors(
        self, draws: Mapping[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return layer -> (A, B), the factors of draws or of the mean adapter.

        The update of a layer's weight is s B A. Means of updates, and a start that is not random,
        give it more ranks than r.

        Parameters
        ----------
        draws
            Draws of `sample`; a factor that varies with them has the shape (S, r, in) or
            (S, out, r). None: the mean adapter.
        """
        if draws is not None and not isinstance(draws, Mapping):
            raise ConfigError(f"draws must be what sample(n) returns, or None, got {draws!r:.60}")
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
        """Return the predictive ensemble of ``num_samples`` draws (0: the mean adapter alone).

        Parameters
        ----------
        data
            As in `pyrolora.fit`; also a list of texts; labels are optional. With a column
            ``choices``, a language model chooses between them, by their texts where the fit was
            to texts: `predict_choices`.
        num_samples
            S. Each draw is one function, with the same weights for all examples. None: 32; with an
            ensemble every member once.
        draws
            Instead of ``num_samples`` and ``seed``, the numbers of draws, as in `sample`:
            ``draws=[0, 1, 2]`` are the functions that ``to_peft(path, draw=[0, 1, 2])`` writes.
        batch_size
            Examples per batch. Draws share its passes where the device is faster so.
        seed
            Makes the draws repeatable; they are other draws than those that have numbers.

        Returns
        -------
        Prediction
            ``ClassPrediction``, ``RegressionPrediction`` or ``TokenPrediction``.
        """
        prediction = self.predictor.predict(
            data, num_samples, batch_size, seed, draws=draws, need_labels=False
        )
        prediction.check_finite()
        return prediction

    def calibrate(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Calibration:
        """Set the temperature T of all later predictions to the best one on held-out data.

        It has the lowest negative log-likelihood of the predictive mean,

            T = argmin −Σ_i log mean_s p_T(y_i | draw s),   p_T ∝ p^(1/T).

        T acts on the law of each draw: softmax(f_s / T) of classes, of choices that a network
        scores, and of each token; N(f_s, T σ²) in a regression, which widens the noise alone, so
        that the means stay. Each draw thus stays a function with a law of its own (entropy still
        splits into aleatoric and epistemic, log-likelihoods and texts follow from the same law),
        unlike with softmax(log p̄ / T) of the mean. No draw changes its mind; the mean of several
        may, where they disagree. For a point (``"map"``) it is temperature scaling (Guo et al.
        2017, ICML).

        From then on T is in `predict`, `evaluate`, `log_likelihood`, `generate`, choices between
        texts, `report`, `pyrolora.compare`, `pyrolora.diagnostics.loo` and ArviZ's
        ``posterior_predictive``, and `save` keeps it. A fit that holds examples back
        (``hold_back``) has chosen one already, which this one replaces. (Of a causal language model
        that was fitted to choose it is the T of its choices, and not of the texts that it writes.)
        What describes the fit has no temperature: `model`, `guide`, `khat`, ArviZ's
        ``log_likelihood`` (leave-one-out weighs draws by the likelihood that made them), and a
        later fit. `merge` and `to_peft` cannot hold it, and warn.

        Parameters
        ----------
        data
            Labelled data, not those of the training, on which the fit is too sure; training data
            are not recognised here (the command line does, by their file). Of a ``DatasetDict``
            ``validation``, else ``test``.
        num_samples, draws, seed
            The draws, as in `predict`; T suits predictions of about as many. A second call
            starts anew, from T = 1.
        batch_size
            Examples per batch. There are two passes over the data, with 25 temperatures in each.

        Returns
        -------
        Calibration
            ``temperature``, ``nll_before`` (at T = 1) and ``nll_after``.

        Raises
        ------
        ConfigError
            For a task without a temperature, or data with ``choices`` for a language model, whose
            temperature is that of tokens.
        """
        calibration = calibrate(
            self.predictor, data, num_samples, draws=draws, batch_size=batch_size, seed=seed
        )
        self.temperature = calibration.temperature
        return calibration

    def predict_choices(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        choices: str | None = None,
        per_token: bool = False,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> ClassPrediction:
        """Have a causal language model choose between the texts of each example's ``choices``.

        It need not have been fitted to choose. With ``choices="texts"`` p_s(c) ∝
        exp(log p(c | context, draw s)), the sum over the choice's tokens; with ``per_token``, or
        ``"texts-per-token"``, the mean over them takes its place. With ``"letters"`` p_s(c) is that
        of letter c after a prompt with lettered options, among the letters. None: as the fit has
        it; by texts, where it was fitted to texts. The other parameters are those of `predict`.
        """
        whole_number("batch_size", batch_size, at_least=1)
        predictor = self.predictor
        numbers = predictor.numbers(draws, num_samples=num_samples, seed=seed)
        factors = predictor.factors(num_samples, seed, numbers)
        return choose(
            self.model,
            data,
            factors,
            self.tokenizer,
            choices=choices,
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
        """Have ``num_samples`` draws continue prompts (0: the mean adapter alone).

        Each draw writes its own continuations, with the same weights from the first token to the
        last. Then all draws read all continuations, for the uncertainty of every token. A
        sequence-to-sequence network writes its texts apart: its encoder reads the prompts as in a
        fit.

        Parameters
        ----------
        inputs
            A list of texts; a chat, as a list of messages, or a list of chats, in which it is the
            assistant's turn; rows as in a fit (``messages``, ``prompt``, ``question``, ...), whose
            prompts are written as there, with their pictures; token ids, (n, T) or lists; or a
            mapping with ``input_ids``, ``attention_mask``, and other inputs of the network, such as
            ``pixel_values``, as its processor makes them.
        num_samples
            S. None: 8; with an ensemble every member once.
        draws
            Instead of ``num_samples``, the numbers of draws, as in `sample`.
        seed
            Makes the draws, those without numbers, and the sampling of tokens repeatable.
        **generate_options
            Options of transformers' ``generate``: ``max_new_tokens`` (by default what the
            network's settings say, or 40, at most to the end of its context), ``do_sample``,
            ``temperature``, ``num_beams``, ``num_return_sequences``, ``stop_strings`` (each
            continuation ends with the first that it completes), ... Greedy search, sampling, and
            both with beams. A ``streamer`` takes one prompt and one draw.

        Raises
        ------
        ConfigError
            When the network does not write texts, or for a decoding that would mix rows of
            different draws (contrastive, assisted, ...).
        """
        numbers = self.predictor.numbers(draws, num_samples=num_samples)
        return self.predictor.generate(inputs, num_samples, numbers, seed, generate_options)

    def p_true(
        self,
        generation: Generation,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        ideas: int = defaults.IDEAS,
        choices: str = "letters",
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Tensor:
        """Return the probability that each continuation is true, as the model itself answers.

        It is asked "Is the possible answer: A. True, B. False?" about each, after it has read some
        of them (Kadavath et al. 2022), and P(True | draw s) is that of the letter among the two.

        Parameters
        ----------
        generation
            Of `generate`; a model of texts.
        num_samples, draws, batch_size, seed
            As in `predict`.
        ideas
            The most continuations of a prompt that the model reads before each question; 0: none.
        choices
            ``"letters"``, or ``"texts"``: the words True and False instead.

        Returns
        -------
        Tensor
            (S, n, K).

        Raises
        ------
        ConfigError
            For a model that does not continue texts.
        """
        whole_number("ideas", ideas, at_least=0)
        options: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "seed": seed}
        rows = truth_rows(generation, ideas=ideas)
        prediction = self.predict_choices(rows, num_samples, choices=choices, **options)
        return prediction.draws[..., 0].unflatten(1, tuple(generation.sequences.shape[:2]))

    def evaluate_generation(
        self,
        data: Any,
        correct: Correct | str,
        num_samples: int | None = None,
        *,
        prompts: Any = None,
        same: Same | None = None,
        p_true: bool = False,
        draws: Iterable[int] | None = None,
        seed: int | None = None,
        **generate_options: Any,
    ) -> GenerationScores:
        """Return how often generated answers are right, and what their uncertainties are worth.

        Parameters
        ----------
        data
            Rows with prompts, as in `generate`; of a ``DatasetDict`` ``test``, or ``validation``.
        correct
            A function ``correct(row, text)``, true for a right answer; or the name of the column
            with the right answer, or with a list of them, which is no part of the prompt.
        prompts
            The prompts of the rows, where `generate` cannot read these as they are.
        same
            Adds semantic entropy: as in `Generation.semantic_entropy`.
        p_true
            Add `p_true`, which takes a pass over all continuations.
        num_samples, draws, seed, generate_options
            As in `generate`.

        Returns
        -------
        GenerationScores
            ``metrics`` has AUROC, AURC and calibration error of every uncertainty, with their
            standard errors; ``answers`` the answers.

        Raises
        ------
        DataError
            For a column that the data lack.
        """
        true_or_false("p_true", p_true)
        rows = rows_to_answer(data)
        judge(correct, rows)  # before the texts are written, which takes longer
        if num_samples is None and draws is None:
            num_samples = self.model.program.usual_draws(defaults.GENERATE_SAMPLES)
        numbers = self.predictor.numbers(draws, num_samples=num_samples)
        options: dict[str, Any] = {"draws": numbers, "seed": seed}
        asked = asked_of(rows, correct) if prompts is None else prompts
        generation = self.generate(asked, num_samples, **options, **generate_options)
        truth = self.p_true(generation, num_samples, **options) if p_true else None
        semantic = None if same is None else generation.semantic_entropy(same)
        return scored_answers(generation, rows, correct, semantic=semantic, p_true=truth)

    def pipeline(
        self,
        task: str | None = None,
        *,
        num_samples: int | None = None,
        draws: Iterable[int] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Pipeline:
        """Return a pipeline of transformers' with this posterior, by its network and task.

        ``text-classification``, ``token-classification``, ``text-generation``, ``fill-mask``,
        ``image-classification`` and ``audio-classification`` are subclasses of transformers'
        pipelines: they are called alike (``top_k``, ``aggregation_strategy``, ``max_new_tokens``,
        data sets, generators, batches), and their outputs have the usual keys, of the predictive
        mean, and the uncertainty beside them. With ``num_samples=0`` they are those of
        transformers' pipeline on `merge`. ``question-answering`` and ``text2text-generation``,
        which transformers no longer has, are called as there before version 5.

        Parameters
        ----------
        task
            The name of the pipeline, which is checked. None: that of the task.
        num_samples, draws, seed
            The draws, as in `predict`, the same ones at every call of the pipeline: without
            ``draws`` and ``seed`` those with the numbers 0, 1, ...
        **options
            Options of the pipeline, such as ``batch_size``, ``top_k`` and ``tokenizer``.

        Raises
        ------
        ConfigError
            When no pipeline has this task's outputs, or the network is none of transformers'.
        """
        return pipeline(self, task, num_samples=num_samples, draws=draws, seed=seed, **options)

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
        """Return metrics of the predictive mean over draws.

        Classification and multiple choice: ``accuracy``, ``nll``, ``ece``, ``brier``,
        ``error_auroc``, ``aurc``; regression: ``rmse``, ``nll``, ``crps``, ``coverage``, ``aurc``;
        language models: ``nll`` (per counted token) and ``perplexity``, or, for data with a column
        ``choices``, the metrics of classification (`predict_choices`). With ``outside``, data of
        another distribution (labels are not needed): ``ood_auroc``.
        `pyrolora.predictive.evaluate` defines each. The draws are those of `predict`.
        """
        predictor = self.predictor
        numbers = predictor.numbers(draws, num_samples=num_samples, seed=seed)
        inside = predictor.predict(
            data, num_samples, batch_size, seed, draws=numbers, need_labels=True
        )
        if outside is None:
            return evaluate(inside)
        other = self.predict(
            self.inputs_of(outside), num_samples, draws=numbers, batch_size=batch_size, seed=seed
        )
        return evaluate(inside, other)

    def acquire(
        self,
        pool: Any,
        k: int,
        by: By = "epistemic",
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> list[int]:
        """Return the numbers of the ``k`` examples of a pool to label next, the best first.

        ``pool.select(posterior.acquire(pool, 20))`` are these examples.

        Parameters
        ----------
        pool
            One data set, as in `predict`; labels are not read.
        k
            How many.
        by
            ``"epistemic"``: the highest mutual information of label and draw; ``"entropy"``: the
            highest entropy; ``"batchbald"``: the batch whose labels tell most together, for one
            class per example. `pyrolora.predictive.acquire` defines each.
        num_samples, draws, batch_size, seed
            As in `predict`. S draws tell at most log S nats, which a batch of ``"batchbald"`` soon
            needs: take 100 or more.

        Raises
        ------
        ConfigError
            For a task that does not have the criterion, and draws that are all the same.
        DataError
            For a pool of fewer than ``k`` examples, or of several splits.
        """
        options: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "seed": seed}
        prediction = self.predict(self.inputs_of(one_split(pool)), num_samples, **options)
        return acquire(prediction, k, by, seed=seed)

    def log_likelihood(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Tensor:
        """Return log p(y_i | draw s), (S, n), in nats.

        That of a text is the sum over its labelled tokens, and that of an example with ``choices``
        is of the right choice among them. The draws are those of `predict`.
        """
        prediction = self.predictor.predict(
            data, num_samples, batch_size, seed, draws=draws, need_labels=True
        )
        assert prediction.log_likelihood is not None
        return prediction.log_likelihood

    def inputs_of(self, data: Any) -> Any:
        """Return data as `predict` takes them, without labels, which may be of other classes.

        The labels of texts stay, since they say which tokens count.
        """
        return self.predictor.inputs_of(data)

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
        """Return draws as ArviZ's ``InferenceData`` (0.2x) or ``DataTree`` (1.x).

        The draws of a fitted guide are one chain of independent draws: R-hat and effective sample
        size say nothing about its quality. Those of ``"nuts"`` are its chains, and
        `pyrolora.arviz.as_chains` makes chains of several fits; look at ``adapter_norm``,
        ``factor_norm`` and ``covariance_eigenvalues``, which no rotation of the ranks changes, not
        at entries of the factors.

        The coordinate ``draw`` is the number of the draw, as in `sample`: without ``seed`` and
        ``draws`` they are 0, 1, ... (draw k of ``"nuts"`` stands in chain k // n at k % n, n the
        draws per chain; fewer of stored ones are evenly spaced). Draws of a ``seed`` have no
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
            Instead, the numbers of draws, as in `sample`; in one chain.
        data
            Adds ``posterior_predictive`` (sampled ``y``, and ``probs`` or ``mean`` of each draw)
            and, with labels, ``observed_data`` for these examples. Tags have the ``position`` of
            each token in ``constant_data``, and its example as coordinate. A language model has no
            ``posterior_predictive``, since no other texts are drawn here, and so no
            ``az.plot_ppc``; in its ``observed_data`` a token that does not count is -100. For data
            with ``choices``, ``y`` is the choice (`predict_choices`).
        log_likelihood
            With ``data``: adds the pointwise log-likelihood of the model, without the temperature.
            `pyrolora.diagnostics.loo` makes a leave-one-out estimate of those of
            the training data, exact for draws of the posterior itself: its weights are
            p(y_i|θ)^(−1/β) with the β of the fit, which is the attribute ``kl_weight`` of every
            group. ``az.loo`` has those of β = 1; for another β a log says so, once, and so does
            the attribute ``leave_one_out``. Where the temperature is not 1, or examples that were
            held back chose it, ``sample_stats`` has the ``calibrated_log_likelihood``, too, which
            `loo` scores by. With means, a head
            and a noise that were fitted to the same data both are too good; for held-out data
            there is ``evaluate(data)["nll"]``.
        factors
            Adds every entry of A and B, ``A[layer]`` and ``B[layer]``; by default there are the
            guide's scales (mixture weights, Σ, signal-to-noise) and ``adapter_norm``, ‖s B A‖_F per
            layer.
        seed
            Seed of draws other than the numbered ones.
        """
        true_or_false("log_likelihood", log_likelihood)
        true_or_false("factors", factors)
        predictor = self.predictor
        numbers = predictor.numbers(draws, num_samples=num_samples, seed=seed)
        if log_likelihood and data is None:
            raise ConfigError("log_likelihood=True needs data= to score")
        others = False

        def look(prepared: Prepared) -> None:
            nonlocal others
            others = self._are_others(prepared)

        read = None
        if data is not None:
            looks = look if log_likelihood and self.held_back else None
            read = predictor.reader(data, need_labels=log_likelihood, look=looks)
        return inference_data(
            self.model,
            self.options,
            read,
            predictor.numbered,
            num_samples,
            draws=numbers,
            temperature=self.temperature,
            held_back=self.held_back,
            fit_seed=self.settings.get("seed", 0),
            other_data=others,
            log_likelihood=log_likelihood,
            factors=factors,
            seed=seed,
        )

    def summary(
        self,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Return ``az.summary`` of what `to_arviz` has of low dimension, one row per entry.

        These are ``adapter_norm`` and the guide's scales; where there are chains, with R-hat and
        effective sample sizes. The parameters are those of `to_arviz`.
        """
        return summary(self.to_arviz(num_samples, draws=draws, seed=seed))

    def khat(
        self,
        data: Any,
        num_samples: int = defaults.KHAT_DRAWS,
        *,
        seed: int | None = None,
        per_layer: bool = False,
    ) -> PSIS | dict[str, PSIS]:
        """Return k̂, which says if the guide's draws can stand for the posterior of the fit.

        Pareto-smoothed importance sampling with the weights

            log w_s = log p(θ_s) + (1/β) Σ_i log p(y_i | θ_s) − log q(θ_s),   θ_s ~ q,

        over the n training examples: with β the weight of the KL, the fit's optimum without
        restriction is ∝ p(θ) p(y|θ)^{1/β}. θ are all latent sites of the pair (for isotropic
        MonteCLoRA also Σ, which the data do not see); means, heads and the noise of a regression
        are fixed. p(y_i | θ) is that of `predict`: for linearised Laplace that of the linearised
        network.

        Below the limit, min(0.7, 1 − 1/log₁₀ S), the guide is close. Above it, it need not be far:
        in 10³ to 10⁴ dimensions nearly every k̂ is (a Gaussian 10 % too narrow has 0.4 in ten,
        5 in 10,000). The verdict compares with that Gaussian.

        Parameters
        ----------
        data
            The training data. Of those that the fit held back, nothing is counted; they are known
            by their places, so that the order is that of the fit.
        num_samples
            S; every draw runs over all of ``data``.
        seed
            Makes the draws repeatable. There is no ``draws``: k̂ judges the guide by a random
            sample as a whole, and no draw of it is seen again elsewhere.
        per_layer
            Judge each layer with the others fixed: its own θ drawn, the other layers at the
            guide's mean, against p(θ_layer | y, the others there). The guides' layers are
            independent, so that is the guide's own law of the layer. It takes as many passes as
            there are layers.

        Returns
        -------
        PSIS
            ``khat``, ``dimensions`` and a ``verdict`` in words; with ``per_layer`` one for each
            layer, by name.

        Raises
        ------
        ConfigError
            For a guide without a density: ``"map"`` with a point head, ``"ensemble"``, ``"nuts"``,
            ``"dropout"``, ``"full"``, ``"tfb"``, ``Laplace(curvature="full")``, and ``"swag"``
            without a prior.
        DataError
            When ``data`` has another number of examples than the fit.
        """
        prepared = prepare(data, self.base, self.task, self.tokenizer)
        if self.held_back and len(prepared) == self.model.num_examples + self.held_back:
            number = self.options.number_held_back(len({*prepared.of_rows}))
            if self._are_others(prepared):
                warnings.warn(by_places(self.held_back), UserWarning, stacklevel=2)
            prepared, _ = prepared.parted(number, self.settings.get("seed", 0))
        return khat(self.model, self.options, prepared, num_samples, seed=seed, per_layer=per_layer)

    def _are_others(self, data: Prepared) -> bool:
        """Return whether the data are known not to be those of the fit in their order.

        Texts that a language model has learnt end with EOS, and those that it scores do not: of
        them it is not known.
        """
        before, now = self.settings.get("data_digest"), None
        if before is not None and data.collate.ends_texts == self.task.collator.ends_texts:
            now = known_digest(data)
        return now is not None and before != now

    # Report -------------------------------------------------------------------------------------

    def report(
        self,
        path: str | Path,
        data: Any,
        *,
        outside: Any = None,
        num_samples: int | None = None,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Path:
        """Write one self-contained HTML page about this posterior.

        It has warnings in plain words, metrics, pictures, the most and the least certain examples,
        data and settings, and needs no network and no script.

        Parameters
        ----------
        path
            A file; one that exists is replaced.
        data
            As in `predict`. Without labels there are no metrics, and the training data allow no
            judgement of what was learnt: labels can be memorised, random ones too.
        outside
            Other data, without labels: how well does the uncertainty tell them from ``data``?
        num_samples, draws
            As in `predict`. The pictures of the posterior itself have as many draws as `to_arviz`.
        batch_size
            Examples per batch. Draws share its passes where the device is faster so.
        seed
            Seed of draws without numbers. None: a random one, which the page states.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        ConfigError
            When ``path`` is a folder, or its folder does not exist.
        """
        file = page_file(path)  # before the predictions, which take longer
        options: dict[str, Any] = {"num_samples": num_samples, "draws": draws, "seed": seed}
        return report_on(self, data, outside=outside, batch_size=batch_size, **options).write(file)

    # Storage ------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, peft: bool = False) -> None:
        """Write the posterior to a folder that `pyrolora.load` reads.

        Tensors are stored as safetensors, the rest as JSON, the tokenizer beside them, and a model
        card, ``README.md`` (`card`); one that you edited stays. The network
        is not copied: its name, its configuration and digests of its weights are kept, as they
        were at the fit. A network without a name, since it was built, merged or changed in memory,
        has to be saved by itself and passed to `pyrolora.load`; a log says so.

        Parameters
        ----------
        path
            The folder. An older posterior in it is replaced.
        peft
            Also write the mean adapter, as `to_peft` does, to ``path/peft``, for readers who have
            PEFT alone: as many numbers again as a point has, which is why it is not the default.

        Raises
        ------
        ConfigError
            When ``path`` is a file, or PEFT cannot hold the mean.
        """
        path_like("path", path)
        true_or_false("peft", peft)
        save(self, Path(path), peft=peft)

    def card(
        self,
        data: Any = None,
        num_samples: int | None = None,
        *,
        draws: Iterable[int] | None = None,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
        repo_id: str | None = None,
        **metadata: Any,
    ) -> ModelCard:
        """Return the model card, a ``huggingface_hub.ModelCard``, made from the facts of the fit.

        It has the network, the digest of the training data, settings and options, scores, the
        warnings of `report`, and how to load the posterior with and without pyrolora.

        Parameters
        ----------
        data
            Labelled data: scores and warnings are those of `report` on them. None: the scores are
            those of the fit's last evaluation, and the warnings those that need no data.
        num_samples, draws, batch_size, seed
            As in `report`.
        repo_id
            The repository that the card's code loads; None: a folder.
        **metadata
            Entries of the card's header, such as ``license="apache-2.0"``, ``language="en"``,
            ``datasets=["glue"]``: those of ``huggingface_hub.ModelCardData``. ``tags`` are added.
        """
        judged = None
        if data is not None:
            options: dict[str, Any] = {"num_samples": num_samples, "draws": draws, "seed": seed}
            judged = judge_by(self, data, batch_size=batch_size, **options)
        mean = why_no_mean(self.model, self.options)
        return card_of(self, judged, repo_id=repo_id, mean=mean, metadata=metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: ModelCard | None = None,
        peft: bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save` writes to a repository of the hub, in one commit.

        ``pyrolora.load(repo_id)`` reads it. Files of an older posterior there are removed.

        Parameters
        ----------
        repo_id
            ``owner/name``; it is made where it does not exist.
        card
            A card in place of that of the fit, such as ``posterior.card(data)``. None: a card there
            that somebody edited stays, and a log says so.
        peft
            Whether the mean adapter goes with it, in ``peft/``. None: where PEFT can hold it; a log
            says so where it cannot.
        private, revision, token, commit_message, create_pr
            As in huggingface_hub: visibility of a new repository, branch, access token (None: that
            of ``hf auth login``), message, and whether to open a pull request instead.

        Returns
        -------
        str
            The address of the commit, or of the pull request.

        Raises
        ------
        SaveError
            When the hub refuses or cannot be reached.
        """
        return push(
            self,
            repo_id,
            card=card,
            peft=peft,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def merge(self, draw: str | int = "mean", *, dequantize: bool = False) -> nn.Module:
        """Return a plain model with an adapter added to its weights, and the posterior's head.

        This posterior and its network stay as they are. The model cannot hold a `temperature`
        other than 1: a warning says how the mean adapter gets one.

        Parameters
        ----------
        draw
            ``"mean"``: the mean adapter (for an ensemble: the mean of the updates, and of the
            heads); or the number k of a draw, as in `to_peft`.
        dequantize
            Make every quantised layer a plain one first, with the weights that it computes with.

        Raises
        ------
        ConfigError
            When a layer's weight is quantised, without ``dequantize``, parametrised or offloaded,
            or the draw is no adapter.
        """
        true_or_false("dequantize", dequantize)
        warn_untempered("a merged model", self.temperature)
        factors = self.predictor.numbered.exportable(draw)
        return merged(self.model, factors, dequantize=dequantize)

    def to_peft(
        self,
        path: str | Path,
        draw: str | int | Iterable[int] = "mean",
        *,
        uniform: bool = False,
    ) -> None:
        """Write a LoRA adapter that ``peft.PeftModel.from_pretrained(network, path)`` loads.

        Its outputs are the same, but for a `temperature` other than 1, which an adapter cannot
        hold: a warning says how the mean adapter gets one. PEFT itself is not needed to write it.

        Parameters
        ----------
        path
            A folder.
        draw
            ``"mean"``; or k, the number of a draw, as in `sample` and ``predict(draws=[k])``; or a
            list of these, each written to ``path/draw-<k>``, for a server that holds several
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
        path_like("path", path)
        true_or_false("uniform", uniform)
        if not self.bank.specs:
            raise ConfigError(
                f"{full_name(self.options)!r} has no adapter; write the network itself with "
                "posterior.merge().save_pretrained(path)"
            )
        numbered = self.predictor.numbered
        if isinstance(draw, Iterable) and not isinstance(draw, str):
            for number in numbered.check(draw, "draw"):
                self.to_peft(Path(path) / f"draw-{number}", number, uniform=uniform)
            return
        warn_untempered("an adapter", self.temperature)
        export_factors(Path(path), self.model, numbered.exportable(draw), uniform=uniform)

    def detach(self) -> nn.Module:
        """Put the network's own modules back and return it.

        The posterior keeps its draws but can no longer predict. Other posteriors of the network
        are not disturbed.
        """
        self.model.attachment.detach()
        return self.base
