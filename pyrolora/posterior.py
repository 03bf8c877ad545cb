"""The posterior: what a fit returns, and everything that is done with it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, Attachment, FlatFactors, LayerSpec
from pyrolora.errors import CheckpointError, ConfigError, whole_number
from pyrolora.guides import MAP, Guide, from_options, full_name, spread
from pyrolora.inference import Prepared, load_language_model, prepare
from pyrolora.likelihoods import Likelihood, likelihood_for
from pyrolora.model import JointGuide, JointModel
from pyrolora.predictive import (
    Prediction,
    draw_factors,
    evaluate,
    predict,
    seeded,
)
from pyrolora.report import to_inference_data
from pyrolora.storage import (
    check_base,
    describe_base,
    load_base,
    merged,
    read_adapter,
    read_folder,
    write_adapter,
    write_folder,
)
from pyrolora.types import AdapterConfig

DRAWS_AT_ONCE = 50  # of all entries, when only functions of them are kept


class Posterior:
    """A distribution over the adapters of a network, with the network that it was fitted on.

    Made by `pyrolora.fit` and `pyrolora.load`.

    Attributes
    ----------
    model, guide
        The Pyro pair, ``model(batch)`` and ``guide(batch)``, for ``pyro.infer.SVI``,
        ``Predictive`` and ``MCMC(NUTS(...))``. ``model`` is the untempered joint density of the
        adapters and the n training examples; without ``labels`` in the batch, y is sampled. (Of
        ``"laplace"`` they have the network itself, not the linearised one that ``predict`` uses.)
    base
        The network. Its own weights are never changed.
    options
        The guide's options.
    history
        The log of the fit, one dict an entry: ``loss``, ``elbo``, ``log_likelihood``,
        ``kl/<site>``, evaluation metrics, by ``step`` and ``epoch``.
    tokenizer
        What turns raw text to tokens, or None.
    settings
        How the fit was run: epochs, learning rate, batch size, seed.
    """

    def __init__(
        self,
        joint: JointModel,
        options: Guide,
        *,
        tokenizer: Any = None,
        history: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = joint
        self.guide = JointGuide(joint.program)
        self.options = options
        self.tokenizer = tokenizer
        self.history = [dict(entry) for entry in history]
        self.settings = dict(settings or {})

    def __repr__(self) -> str:
        return (
            f"Posterior(guide={full_name(self.options)!r}, likelihood={self.likelihood.name!r}, "
            f"base={type(self.base).__name__}, layers={len(self.bank.specs)}, "
            f"num_examples={self.model.num_examples})"
        )

    @property
    def base(self) -> nn.Module:
        return self.model.base

    @property
    def bank(self) -> AdapterBank:
        """The adapter means; of an ensemble only their layout, since each member has its own."""
        return self.model.program.bank

    @property
    def likelihood(self) -> Likelihood:
        """The law of the targets."""
        return self.model.likelihood

    # Draws --------------------------------------------------------------------------------------

    def sample(self, num_samples: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """Independent draws of every latent site; of ``"nuts"`` and ``"ensemble"``, whose draws
        are a list, evenly spaced ones whatever the seed.

        Returns
        -------
        dict
            Site -> (num_samples, ...). `factors` turns them to the matrices of each layer.
        """
        whole_number("num_samples", num_samples, at_least=1)
        with seeded(seed):
            return self.model.program.draw(num_samples)

    @torch.no_grad()
    def factors(
        self, draws: Mapping[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A, B): of shape (S, r, in) and (S, out, r) where they vary with the draws of
        `sample`; without draws, of the mean adapter."""
        program = self.model.program
        flat = program.mean() if draws is None else program.factors(draws)
        return {name: (A.detach(), B.detach()) for name, (A, B) in self.bank.matrices(flat).items()}

    # Prediction ---------------------------------------------------------------------------------

    def predict(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Prediction:
        """The predictive ensemble of ``num_samples`` draws (0: the mean adapter alone).

        Parameters
        ----------
        data
            As in `pyrolora.fit`; also a list of texts; labels are optional.
        num_samples
            S. Each draw is one function, the same weights for all examples. None: 32; of an
            ensemble every member once.
        batch_size
            Examples a pass.
        seed
            Makes the draws repeatable.

        Returns
        -------
        Prediction
            ``ClassPrediction``, ``RegressionPrediction`` or ``TokenPrediction``.
        """
        return self._predict(data, num_samples, batch_size, seed, need_labels=False)

    def evaluate(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> dict[str, float]:
        """Metrics of the predictive mean over draws.

        Classification and multiple choice: ``accuracy``, ``nll``, ``ece``, ``brier``,
        ``error_auroc``; regression: ``rmse``, ``nll``, ``crps``, ``coverage``; language models:
        ``nll`` (a counted token) and ``perplexity``. `pyrolora.predictive.evaluate` defines each.
        """
        return evaluate(self._predict(data, num_samples, batch_size, seed, need_labels=True))

    def log_likelihood(
        self,
        data: Any,
        num_samples: int | None = None,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Tensor:
        """log p(y_i | draw s), (S, n), in nats; a text's is the sum over its labelled tokens."""
        prediction = self._predict(data, num_samples, batch_size, seed, need_labels=True)
        assert prediction.log_likelihood is not None
        return prediction.log_likelihood

    def _predict(
        self,
        data: Any,
        num_samples: int | None,
        batch_size: int,
        seed: int | None,
        *,
        need_labels: bool,
    ) -> Prediction:
        whole_number("batch_size", batch_size, at_least=1)
        factors = draw_factors(self.model, num_samples, seed)
        prepared = self._prepare(data, need_labels=need_labels)
        return predict(self.model, prepared, factors, batch_size=batch_size)

    # ArviZ --------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_arviz(
        self,
        num_samples: int | None = None,
        *,
        data: Any = None,
        log_likelihood: bool = False,
        factors: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Draws as ArviZ's ``InferenceData`` (0.2x) or ``DataTree`` (1.x).

        The draws of a fitted guide are one chain of independent draws: R-hat and effective sample
        size say nothing about its quality. Those of ``"nuts"`` are its chains; look at
        ``adapter_norm``, ``factor_norm`` and ``covariance_eigenvalues``, which no rotation of the
        ranks changes, not at entries of the factors.

        Parameters
        ----------
        num_samples
            Number of draws, over all chains. None: 200, or all that there are where draws are
            stored (``"nuts"``, ``"ensemble"``).
        data
            Adds ``posterior_predictive`` (sampled ``y``, and ``probs`` or ``mean`` of each draw)
            and, with labels, ``observed_data`` for these examples.
        log_likelihood
            With ``data``: adds the pointwise log-likelihood. ``az.loo`` is about the training data,
            and exact for draws of the posterior itself, not for ``kl_weight`` below 1; for held-out
            data there is ``evaluate(data)["nll"]``.
        factors
            Adds every entry of A and B, ``A[layer]`` and ``B[layer]``; by default there are the
            guide's scales (mixture weights, Σ, signal-to-noise) and ``adapter_norm``, ‖s B A‖_F per
            layer.
        seed
            Makes the draws repeatable.
        """
        if log_likelihood and data is None:
            raise ConfigError("log_likelihood=True needs data= to score")
        program = self.model.program
        if num_samples is None:
            num_samples = program.stored() or defaults.ARVIZ_DRAWS
        whole_number("num_samples", num_samples, at_least=1)
        if num_samples % program.chains:
            raise ConfigError(
                f"num_samples must be a multiple of the {program.chains} chains, got {num_samples}"
            )
        shape = partial(_by_chain, chains=program.chains)
        pieces, kept = [], []
        with seeded(seed):
            for sites in program.draws(num_samples, DRAWS_AT_ONCE):
                drawn = program.factors(sites)
                pieces.append(self._variables(sites, drawn, factors))
                if data is not None:
                    kept.append(drawn)
        posterior = {
            name: (shape(torch.cat([piece[name][0] for piece in pieces])), dims)
            for name, (_, dims) in pieces[0].items()
        }
        groups: dict[str, Any] = {"posterior": posterior}
        stored = program.stored()
        if stored is not None:
            statistics = program.statistics(spread(stored, num_samples))
            groups["sample_stats"] = {n: (shape(t), ()) for n, t in statistics.items()}
        if data is not None:
            groups |= self._data_groups(data, FlatFactors.cat(kept), log_likelihood, shape)
        coords = {"layer": list(self.bank.specs), "block": program.block_names()}
        attrs: dict[str, str | int | float] = {
            "guide": full_name(self.options),
            "guide_options": str(self.options),
            "base": type(self.base).__name__,
            "inference_library": "pyrolora",
            "num_examples": self.model.num_examples,
        }
        return to_inference_data(groups, coords, attrs)

    def _variables(
        self, sites: Mapping[str, Tensor], drawn: FlatFactors, factors: bool
    ) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """The posterior group of some draws: name -> (S, ...) and its dimensions."""
        variables = dict(self.model.program.quantities(sites))
        norms = self.bank.update_norms(drawn)
        variables["adapter_norm"] = (norms.expand(drawn.draws or 1, -1), ("layer",))
        if factors:
            size = len(next(iter(sites.values())))
            for name, (A, B) in self.bank.matrices(drawn).items():
                A, B = (matrix.expand(size, *matrix.shape[-2:]) for matrix in (A, B))
                variables[f"A[{name}]"] = (A, ("rank", f"in[{name}]"))
                variables[f"B[{name}]"] = (B, (f"out[{name}]", "rank"))
        return variables

    def _data_groups(
        self,
        data: Any,
        factors: FlatFactors,
        log_likelihood: bool,
        shape: Callable[[Tensor], np.ndarray],
    ) -> dict[str, Any]:
        prepared = self._prepare(data, need_labels=log_likelihood)
        prediction = predict(self.model, prepared, factors)
        groups: dict[str, Any] = {
            "posterior_predictive": {
                name: (shape(draws), dims)
                for name, (draws, dims) in prediction.predictive_draws().items()
            }
        }
        if prediction.targets is not None:
            dims = ("example", "token")[: prediction.targets.dim()]
            groups["observed_data"] = {"y": (prediction.targets.numpy(), dims)}
        if log_likelihood:
            assert prediction.log_likelihood is not None
            groups["log_likelihood"] = {"y": (shape(prediction.log_likelihood), ("example",))}
        return groups

    # Storage ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior to a folder: tensors as safetensors, the rest as JSON, the tokenizer
        beside them; the base network is not copied. `pyrolora.load` reads it again."""
        specs = list(self.bank.specs.values())
        meta = {
            "guide": {"name": full_name(self.options), "options": dataclasses.asdict(self.options)},
            "likelihood": self.likelihood.name,
            "adapter": dataclasses.asdict(self.bank.config),
            "layers": [dataclasses.asdict(spec) for spec in specs],
            "heads": list(self.model.attachment.heads),
            "base": describe_base(self.base, self.model.attachment.heads),
            "num_examples": self.model.num_examples,
            "settings": self.settings,
            "history": self.history,
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
        """
        return merged(self.model, self._setting(draw))

    def to_peft(self, path: str | Path, draw: str | int | Iterable[int] = "mean") -> None:
        """Write a LoRA adapter that ``peft.PeftModel.from_pretrained(network, path)`` loads, with
        the same outputs; PEFT itself is not needed to write it.

        Parameters
        ----------
        path
            A folder.
        draw
            ``"mean"``; or k, the draw that ``sample(1, seed=k)`` gives (the k-th stored one of
            ``"nuts"`` and ``"ensemble"``); or a list of these, written to ``path/draw-<k>`` each,
            for a server that holds several adapters on one network.

        Raises
        ------
        ConfigError
            When the folder holds something else, or the draw is no low-rank adapter.
        """
        if isinstance(draw, Iterable) and not isinstance(draw, str):
            for number in draw:
                self.to_peft(Path(path) / f"draw-{number}", number)
            return
        setting = self._setting(draw)
        heads = {name: own for name, (own,) in self.model.named_heads(setting).items()}
        matrices = self.bank.matrices(setting)
        write_adapter(Path(path), self.bank.specs, matrices, heads, self.base)

    @torch.no_grad()
    def _setting(self, draw: str | int) -> FlatFactors:
        """The factors of the mean adapter, or of one draw."""
        program = self.model.program
        if draw == "mean":
            return program.mean()
        if isinstance(draw, str):
            raise ConfigError(f"draw must be 'mean' or the number of a draw, got {draw!r}")
        whole_number("draw", draw, at_least=0)
        if program.linearised and self.likelihood.linearisable:
            raise ConfigError(
                "the predictions of this posterior are linear in its draws, and the network with a "
                "draw in it gives others; use draw='mean', or fit with Laplace(linearised=False)"
            )
        stored = program.stored()
        if stored is not None and draw >= stored:
            raise ConfigError(f"there are {stored} draws, numbered from 0, got draw={draw}")
        with seeded(draw):
            sites = program.draw(1) if stored is None else program.pick(torch.tensor([draw]))
        setting = program.factors(sites)[0]
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

    def _prepare(self, data: Any, *, need_labels: bool) -> Prepared:
        return prepare(
            data,
            self.base,
            self.likelihood,
            self.tokenizer,
            splits=defaults.SCORE_SPLITS,
            need_labels=need_labels,
        )


def build(
    network: nn.Module,
    attachment: Attachment,
    config: AdapterConfig,
    guide: Guide,
    likelihood: Likelihood,
    num_examples: int,
) -> JointModel:
    """The joint model of a network with its wrapped layers; everything eager, on its device."""
    bank = AdapterBank(attachment.specs, config)
    joint = JointModel(network, attachment, guide.build(bank), likelihood, num_examples)
    device = next(network.parameters()).device
    for part in (joint.program, joint.heads, joint.likelihood):
        part.to(device)
    return joint.eval()


@torch.inference_mode(False)
def load(path: str | Path, model: str | Path | nn.Module | None = None) -> Posterior:
    """Load a posterior that `Posterior.save` wrote.

    Parameters
    ----------
    path
        The folder.
    model
        The network that it was fitted on, or the hub id or folder to load it from. None: from
        where it came at the time.

    Raises
    ------
    CheckpointError
        When the folder is damaged, or the network is another one.
    """
    meta, state, tokens = read_folder(Path(path))
    attachment = None
    try:
        tokenizer = None
        if tokens is not None:
            tokenizer = AutoTokenizer.from_pretrained(tokens.resolve(), local_files_only=True)
        specs = [LayerSpec(**spec) for spec in meta["layers"]]
        heads, base = list(meta["heads"]), meta["base"]
        guide = from_options(meta["guide"]["name"], meta["guide"]["options"])
        config = AdapterConfig(**meta["adapter"])
        num_examples = operator.index(meta["num_examples"])
        history, settings = [dict(entry) for entry in meta["history"]], dict(meta["settings"])
        if not specs or num_examples < 1:
            raise ValueError("no layers, or no examples")
        network = model
        if not isinstance(network, nn.Module):
            name = base.get("name_or_path") if model is None else str(model)
            network = load_base({**base, "name_or_path": name})
        check_base(network, heads, base)
        likelihood = likelihood_for(network, meta["likelihood"])
        attachment = Attachment(network, specs, heads)
        joint = build(network, attachment, config, guide, likelihood, num_examples)
        joint.load_own_state(state)
    except BaseException as error:
        if attachment is not None:
            attachment.detach()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{path} was edited or is incomplete ({type(error).__name__}: {error}); restore it "
            "from a copy"
        ) from error
    return Posterior(joint, guide, tokenizer=tokenizer, history=history, settings=settings)


@torch.inference_mode(False)
def from_peft(
    path: str | Path,
    model: str | Path | nn.Module,
    *,
    likelihood: str | None = None,
    tokenizer: Any = None,
) -> Posterior:
    """A LoRA adapter that PEFT saved, as a posterior without width (``"map"``).

    ``fit(from_peft(...), data, guide="laplace")`` then infers how sure the adapter may be, without
    training it again.

    Parameters
    ----------
    path
        The adapter's folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
    model
        The network that it was trained on, with a task head of the same size; of a language model
        also its hub id or folder.
    likelihood
        A name from ``pyrolora.likelihoods.available()``; None: from the model's class.
    tokenizer
        For raw text; loaded with a model that is given by its name.

    Returns
    -------
    Posterior
        Its ``num_examples`` is 1: the data that the adapter was trained on are not known.

    Raises
    ------
    ConfigError
        For a variant of LoRA that pyrolora does not have, naming the option.
    CheckpointError
        When the files are damaged, or belong to another network.
    """
    if isinstance(model, nn.Module):
        network = model
    else:
        network, tokenizer = load_language_model(str(model), tokenizer)
    law = likelihood_for(network, likelihood)
    adapter = read_adapter(path, network)
    attachment = Attachment(network, adapter.specs, list(adapter.heads))
    guide = MAP()
    try:
        joint = build(network, attachment, adapter.config, guide, law, num_examples=1)
        bank = joint.program.bank
        A, B = (bank.layouts[factor].blocks for factor in "AB")
        bank.assign("A_loc", torch.cat([adapter.matrices[b.layer][0].flatten() for b in A]))
        bank.assign("B_loc", torch.cat([adapter.matrices[b.layer][1].mT.flatten() for b in B]))
        for name, (head,) in joint.named_heads().items():
            head.load_state_dict(adapter.heads[name])
    except BaseException:
        attachment.detach()
        raise
    network.eval()
    return Posterior(joint, guide, tokenizer=tokenizer)


def _by_chain(draws: Tensor, chains: int) -> np.ndarray:
    """(S, ...) -> (chains, S / chains, ...)."""
    return draws.detach().cpu().unflatten(0, (chains, -1)).numpy()
