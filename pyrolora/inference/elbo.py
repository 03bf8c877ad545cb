"""The evidence lower bound with closed-form KLs, and its terms by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrolora.distributions.kl import divergence
from pyrolora.guides.program import SHARED_LAW

Node = Mapping[str, Any]
Nodes = Mapping[str, Node]


class NamedELBO(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO`` for one particle, keeping each term.

    The same estimator: Σ over latent sites of KL(q(site | parents) ‖ p(site | parents)), in closed
    form where one is registered, and log-densities at the draw elsewhere. Two differences: the
    terms of the last evaluation stay readable; and Pyro's traces and validation, where it is on,
    serve the first evaluation only, while later ones keep no more than the bound reads. Both cost
    more than the bound itself, and the programs have the same structure every time. The KL of a
    site that is marked ``SHARED_LAW`` is zero, and is not computed.

    Attributes
    ----------
    terms : dict[str, Tensor]
        Detached parts of the last ELBO, in nats over the whole data set: ``log_likelihood``,
        each other factor of the model by name, and ``kl/<site>``, unweighted by β.
    """

    def __init__(self) -> None:
        super().__init__(num_particles=1)
        self.terms: dict[str, Tensor] = {}
        self._validated = False
        self._kl_weight = 1.0

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._kl_weight = kwargs.get("kl_weight", 1.0)
        if is_validation_enabled() and not self._validated:
            traces = self._get_trace(model, guide, args, kwargs)
            loss = self._bound(*(trace.nodes for trace in traces))
            self._validated = True
            return loss
        with pyro.validation_enabled(False):
            with _Sites() as drawn:
                guide(*args, **kwargs)
            with _Sites(drawn.sites) as scored:
                model(*args, **kwargs)
            return self._bound(scored.sites, drawn.sites)

    def _bound(self, model_sites: Nodes, guide_sites: Nodes) -> Any:
        """Return −ELBO from the sites of both programs."""
        self.terms = {}
        loss: Any = 0.0
        shared = []
        divergences = iter(self._weighted(model_sites, guide_sites))
        for name, site in model_sites.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            if site["is_observed"]:
                term = _log_prob(site).sum()
                loss = loss - term
                if name == "y":
                    self.terms["log_likelihood"] = term.detach()
                else:  # a factor of the prior: logged without β, as the KLs are
                    self.terms[name] = term.detach() / self._kl_weight
            elif guide_sites[name]["infer"].get(SHARED_LAW):
                shared.append(f"kl/{name}")
                self.terms[shared[-1]] = torch.zeros(())  # in its place among the terms
            else:
                term, self.terms[f"kl/{name}"] = next(divergences)
                loss = loss + term
        if isinstance(loss, Tensor):  # on its device
            self.terms.update({name: loss.new_zeros(()) for name in shared})
        return loss

    def _weighted(self, model_sites: Nodes, guide_sites: Nodes) -> list[tuple[Tensor, Tensor]]:
        """Return the KL of each latent site times its weight, and what is logged of it.

        Sites of one weight, which all have as a rule, are weighted together.
        """
        latent = {
            name: (self._kl(site, guide_sites[name]), guide_sites[name]["scale"])
            for name, site in model_sites.items()
            if name in guide_sites
            and site["type"] == "sample"
            and not (site["is_observed"] or site_is_subsample(site))
            and not guide_sites[name]["infer"].get(SHARED_LAW)
        }
        by_weight: dict[Any, list[str]] = {}
        for name, (kl, weight) in latent.items():
            by_weight.setdefault((weight, kl.dtype, kl.device), []).append(name)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for (weight, _, _), names in by_weight.items():
            terms = weight * torch.stack([latent[name][0] for name in names])
            logged = terms.detach() / self._kl_weight
            pairs = zip(terms.unbind(), logged.unbind(), strict=True)
            found.update(zip(names, pairs, strict=True))
        return [found[name] for name in latent]

    def _kl(self, site: Node, guide_site: Node) -> Tensor:
        value = guide_site["value"]
        with torch.autocast(value.device.type, enabled=False):
            try:
                return divergence(guide_site["fn"], site["fn"]).sum()
            except NotImplementedError:  # torch has no closed form for this pair of laws
                return (guide_site["fn"].log_prob(value) - site["fn"].log_prob(value)).sum()


class _Sites(Messenger):
    """A light ``trace`` and ``replay``: record sample sites, and reuse the values in ``drawn``.

    Parameter statements and the graph of sites, which the bound does not read, are skipped.
    """

    def __init__(self, drawn: Nodes | None = None) -> None:
        super().__init__()
        self.drawn = drawn or {}
        self.sites: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.drawn and not msg["is_observed"]:
            site = self.drawn[msg["name"]]
            msg.update(done=True, value=site["value"], infer=site["infer"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            raise RuntimeError(f"multiple sample sites named '{msg['name']}'")
        self.sites[msg["name"]] = msg.copy()


def _log_prob(site: Node) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"])
    return scale_and_mask(log_prob, scale=site["scale"], mask=site["mask"])
