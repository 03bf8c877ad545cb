"""The posterior: what a fit returns, and everything that is done with it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, Attachment, FlatFactors, LayerSpec
from pyrolora.errors import CheckpointError, ConfigError, whole_number
from pyrolora.guides import Guide, guide_class
from pyrolora.inference import Prepared, prepare
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
    read_folder,
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
        adapters and the n training examples; without ``labels`` in the batch, y is sampled.
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
            f"Posterior(guide={self.options.name!r}, likelihood={self.likelihood.name!r}, "
            f"base={type(self.base).__name__}, layers={len(self.bank.specs)}, "
            f"num_examples={self.model.num_examples})"
        )

    @property
    def base(self) -> nn.Module:
        return self.model.base

    @property
    def bank(self) -> AdapterBank:
        """The adapter means."""
        return self.model.program.bank

    @property
    def likelihood(self) -> Likelihood:
        """The law of the targets."""
        return self.model.likelihood

    # Draws --------------------------------------------------------------------------------------

    def sample(self, num_samples: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """Independent draws of every latent site.

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
        flat = self.bank.means() if draws is None else program.factors(draws)
        return {name: (A.detach(), B.detach()) for name, (A, B) in self.bank.matrices(flat).items()}

    # Prediction ---------------------------------------------------------------------------------

    def predict(
        self,
        data: Any,
        num_samples: int = defaults.NUM_SAMPLES,
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
            S. Each draw is one function, the same weights for all examples.
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
        num_samples: int = defaults.NUM_SAMPLES,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> dict[str, float]:
        """Metrics of the predictive mean over draws.

        Classification: ``accuracy``, ``nll``, ``ece``, ``brier``, ``error_auroc``; regression:
        ``rmse``, ``nll``, ``crps``, ``coverage``; language models: ``nll`` (a token) and
        ``perplexity``. `pyrolora.predictive.evaluate` defines each.
        """
        return evaluate(self._predict(data, num_samples, batch_size, seed, need_labels=True))

    def log_likelihood(
        self,
        data: Any,
        num_samples: int = defaults.NUM_SAMPLES,
        *,
        batch_size: int = defaults.BATCH_SIZE,
        seed: int | None = None,
    ) -> Tensor:
        """log p(y_i | draw s), (S, n), in nats; a text's is the sum over its labelled tokens."""
        prediction = self._predict(data, num_samples, batch_size, seed, need_labels=True)
        assert prediction.log_likelihood is not None
        return prediction.log_likelihood

    def _predict(
        self, data: Any, num_samples: int, batch_size: int, seed: int | None, *, need_labels: bool
    ) -> Prediction:
        whole_number("batch_size", batch_size, at_least=1)
        factors = draw_factors(self.model, num_samples, seed)
        prepared = self._prepare(data, need_labels=need_labels)
        return predict(self.model, prepared, factors, batch_size=batch_size)

    # ArviZ --------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_arviz(
        self,
        num_samples: int = 200,
        *,
        data: Any = None,
        log_likelihood: bool = False,
        factors: bool = False,
        seed: int | None = None,
    ) -> Any:
        """Draws as ArviZ's ``InferenceData`` (0.2x) or ``DataTree`` (1.x), as one chain.

        The draws of a fitted guide are independent: R-hat and effective sample size say nothing
        about its quality.

        Parameters
        ----------
        num_samples
            Number of draws.
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
        whole_number("num_samples", num_samples, at_least=1)
        pieces, kept = [], []
        with seeded(seed):
            for start in range(0, num_samples, DRAWS_AT_ONCE):
                sites = self.sample(min(DRAWS_AT_ONCE, num_samples - start))
                drawn = self.model.program.factors(sites)
                pieces.append(self._variables(sites, drawn, factors))
                if data is not None:
                    kept.append(drawn)
        posterior = {
            name: (_one_chain(torch.cat([piece[name][0] for piece in pieces])), dims)
            for name, (_, dims) in pieces[0].items()
        }
        groups: dict[str, Any] = {"posterior": posterior}
        if data is not None:
            groups |= self._data_groups(data, FlatFactors.cat(kept), log_likelihood)
        coords = {"layer": list(self.bank.specs), "block": self.model.program.block_names()}
        attrs: dict[str, str | int | float] = {
            "guide": self.options.name,
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
        variables["adapter_norm"] = (self._adapter_norms(drawn), ("layer",))
        if factors:
            size = len(next(iter(sites.values())))
            for name, (A, B) in self.bank.matrices(drawn).items():
                A, B = (matrix.expand(size, *matrix.shape[-2:]) for matrix in (A, B))
                variables[f"A[{name}]"] = (A, ("rank", f"in[{name}]"))
                variables[f"B[{name}]"] = (B, (f"out[{name}]", "rank"))
        return variables

    def _adapter_norms(self, factors: FlatFactors) -> Tensor:
        """‖s B A‖_F per draw and layer, (S, L), from the r x r Gram matrices: BᵀB and A Aᵀ."""
        norms = []
        for name, (A, B) in self.bank.matrices(factors).items():
            squared = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0)
            norms.append(self.bank.specs[name].scaling * squared.sqrt())
        return torch.stack(norms, dim=-1)

    def _data_groups(self, data: Any, factors: FlatFactors, log_likelihood: bool) -> dict[str, Any]:
        prepared = self._prepare(data, need_labels=log_likelihood)
        prediction = predict(self.model, prepared, factors)
        groups: dict[str, Any] = {
            "posterior_predictive": {
                name: (_one_chain(draws), dims)
                for name, (draws, dims) in prediction.predictive_draws().items()
            }
        }
        if prediction.targets is not None:
            dims = ("example", "token")[: prediction.targets.dim()]
            groups["observed_data"] = {"y": (prediction.targets.numpy(), dims)}
        if log_likelihood:
            assert prediction.log_likelihood is not None
            groups["log_likelihood"] = {"y": (_one_chain(prediction.log_likelihood), ("example",))}
        return groups

    # Storage ------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the posterior to a folder: tensors as safetensors, the rest as JSON, the tokenizer
        beside them; the base network is not copied. `pyrolora.load` reads it again."""
        specs = list(self.bank.specs.values())
        meta = {
            "guide": {"name": self.options.name, "options": dataclasses.asdict(self.options)},
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

    def merge(self) -> nn.Module:
        """A new plain model with the mean adapter added to its weights and the posterior's head;
        this posterior and its base stay as they are."""
        return merged(self.model, self.bank.means())

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
        guide = guide_class(meta["guide"]["name"])(**meta["guide"]["options"])
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


def _one_chain(draws: Tensor) -> np.ndarray:
    """(S, ...) -> (1, S, ...)."""
    return draws.detach().cpu().numpy()[None]
