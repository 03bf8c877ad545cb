"""Guides: one method per file, each a Pyro model/guide pair over the adapter factors."""

from pyrolora.guides.dropout import Dropout
from pyrolora.guides.engines import Curvature, Fit, Law
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.factor_program import FactorProgram, GaussianGuide
from pyrolora.guides.flat import Flat
from pyrolora.guides.full import Full
from pyrolora.guides.gaussian_head import HEAD, GaussianHead, HeadLaw
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.lowrank import LowRank
from pyrolora.guides.map import MAP
from pyrolora.guides.meanfield import MeanField
from pyrolora.guides.montec import MonteCLoRA
from pyrolora.guides.nuts import NUTS
from pyrolora.guides.options import Guide, Latent, Variational
from pyrolora.guides.plates import averaged, spread
from pyrolora.guides.program import Program, Quantities, Sites
from pyrolora.guides.registry import (
    _REGISTRY,
    as_guide,
    available,
    from_options,
    full_name,
    guide_class,
    register,
    unregistered,
)
from pyrolora.guides.supports import Supports
from pyrolora.guides.swag import SWAG
from pyrolora.guides.tfb import TFB
from pyrolora.guides.wrapping import WrappingProgram

_REGISTRY |= {
    kind.name: kind
    for kind in (
        *(MAP, MonteCLoRA, Flat, MeanField, LowRank),
        *(Laplace, TFB, SWAG, Ensemble, Dropout, NUTS, Full),
    )
}

__all__ = [
    "HEAD",
    "MAP",
    "NUTS",
    "SWAG",
    "TFB",
    "Curvature",
    "Dropout",
    "Ensemble",
    "FactorProgram",
    "Fit",
    "Flat",
    "Full",
    "GaussianGuide",
    "GaussianHead",
    "Guide",
    "HeadLaw",
    "Laplace",
    "Latent",
    "Law",
    "LowRank",
    "MeanField",
    "MonteCLoRA",
    "Program",
    "Quantities",
    "Sites",
    "Supports",
    "Variational",
    "WrappingProgram",
    "as_guide",
    "available",
    "averaged",
    "from_options",
    "full_name",
    "guide_class",
    "register",
    "spread",
    "unregistered",
]
