"""Programs whose prior has a centre: learned means, their start, zero, or an earlier posterior."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.guides.options import Guide
from pyrolora.guides.program import Program


class CentredProgram(Program):
    """A program whose latent factors have a prior around a centre.

    The centre is that of the option ``prior_mean``; the scales are multiples of the size of a row
    of the means with ``units="row"``, and of c, which examples that are held back choose
    (``hold_back``). An earlier posterior of the same guide can be the prior.

    Attributes
    ----------
    width
        log c, and running means of what it is chosen by (`inference.widths`), (4,); None where no
        examples are held back.
    """

    prior_loc: Tensor | None
    row_sizes: Tensor | None
    width: Tensor | None

    def __init__(self, bank: AdapterBank, options: Guide) -> None:
        super().__init__(bank, options)
        self.register_buffer("prior_loc", None)
        self.register_buffer("row_sizes", None)
        scaled = options.held_back and options.unit == "row"
        self.register_buffer("width", torch.zeros(4) if scaled else None)
        if getattr(options, "prior_mean", None) == "start" and bank.origin is None:
            A, B = (bank.get_parameter(f"{factor}_loc").detach() for factor in "AB")
            start = bank.latent_part(self.options.latent, FlatFactors(A, B))
            self.prior_loc = start.clone()

    def sizes(self, site: str | None = None) -> Tensor | None:
        """Return c times the root mean square of each row of the latent means, (L, r).

        A start of the adapters that is taken off again is taken off here, too: what is left has
        been learnt. None, unless scales are multiples of it. After an earlier posterior it is that
        of its means. Of a ``site`` that has one of two latent factors, the rows are that factor's.
        """
        latent, bank = self.options.latent if site is None else site, self.bank
        if self.options.unit != "row":
            return None
        if self.row_sizes is not None:
            if latent == self.options.latent:
                return self.row_sizes
            blocks = len(bank.layout("A"))  # which come first
            return self.row_sizes[:blocks] if latent == "A" else self.row_sizes[blocks:]
        sizes = bank.layout(latent).row_sizes(self.learnt(latent))
        return sizes if self.width is None else sizes * self.width[0].exp()

    def learnt(self, site: str) -> Tensor:
        """Return the means of the factors of a site, flat, less a start that is taken off again."""
        means, origin = self.bank.latent_part(site, self.bank.means()), self.bank.origin
        return means if origin is None else means - self.bank.latent_part(site, origin)

    def centre(self, site: str) -> Tensor | None:
        """Return the prior's mean of the factors of a site, flat; None: zero."""
        if self.bank.origin is not None:
            return self.bank.latent_part(site, self.bank.origin)
        if self.prior_loc is None or site == self.options.latent:
            return self.prior_loc
        first = self.bank.layouts["A"].total
        return self.prior_loc[:first] if site == "A" else self.prior_loc[first:]

    @torch.no_grad()
    def recentre(self) -> None:
        if self.prior_loc is not None:
            means = self.bank.latent_part(self.options.latent, self.bank.means())
            self.prior_loc.copy_(means.detach())

    @torch.no_grad()
    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        renewed = super().renew(rows)
        if self.prior_loc is not None:
            latent = self.options.latent
            means = self.bank.latent_part(latent, self.bank.means())
            new = self.bank.spread(latent, rows.to(means.device))
            self.prior_loc.copy_(torch.where(new, means, self.prior_loc))
        return renewed

    @torch.no_grad()
    def succeed(self, previous: Program | Guide) -> None:
        """Take the guide of ``previous`` for the prior, and start from its means and scales.

        A factor that is not latent has no prior, and becomes a constant.
        """
        if not self.supports.prior:
            self._refuse("prior")
        if isinstance(previous, Guide):
            bank = AdapterBank(list(self.bank.specs.values()), self.bank.config)
            previous = previous.build(bank)
        assert isinstance(previous, CentredProgram)
        for name, parameter in previous.named_parameters(recurse=False):
            self.get_parameter(name).copy_(parameter)
        for factor in "AB":
            latent = factor in self.options.latent
            self.bank.get_parameter(f"{factor}_loc").requires_grad_(latent)
        for name in self.scale_parameters():
            self.get_parameter(name).requires_grad_(True)
        if self.width is not None and previous.width is not None:
            self.width.copy_(previous.width)
        self.previous = copy.deepcopy(previous).requires_grad_(False)
        self.previous.previous = None
        sizes = previous.sizes()
        for program in (self, self.previous):  # the means of both may have moved since
            program.register_buffer("row_sizes", None if sizes is None else sizes.detach().clone())
