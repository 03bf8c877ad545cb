"""Types that every floor shares: the batch, and the configuration of the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyrolora.errors import ConfigError, positive, whole_number

if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, "Tensor"]
"""Column name -> tensor whose first dimension counts examples; the targets are ``labels``."""

INITIALIZERS = ("kaiming", "gaussian", "lora-ga", "pissa", "olora")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which layers get an adapter, and of what shape. The names and their meaning are PEFT's.

    An adapted layer computes ``W x + s B A x`` with ``A`` (r, in), ``B`` (out, r) and the scaling
    ``s = lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).

    Parameters
    ----------
    r, lora_alpha
        Rank, and the numerator of the scaling.
    target_modules
        ``"auto"`` (the attention projections of a known architecture, else every linear layer),
        ``"all-linear"``, a list of names or of name suffixes, or one string: a regular expression
        for the whole name, or a suffix.
    exclude_modules
        Taken out of the targets; by the same rules.
    lora_dropout
        Dropout on the adapter's input during training.
    modules_to_save
        Modules that the posterior owns a trainable copy of. ``None``: the task head of a
        transformers model. An empty list: none.
    init_lora_weights
        How the means start. With B at zero and a random A: ``"kaiming"``, PEFT's default, or
        ``"gaussian"``, N(0, 1/r^2) as PEFT has it. Or with both from the singular vectors of the
        gradient of W on one batch (``"lora-ga"``), of W itself (``"pissa"``), or its QR
        decomposition (``"olora"``). Such a start A₀, B₀ is taken off again: the layer computes
        ``W x + s (B A - B₀ A₀) x``, with W as it was, and priors around zero are around A₀, B₀.
    rank_pattern, alpha_pattern
        Other ranks and alphas for the layers whose name ends with a match of the key.
    use_rslora
        Scale by ``lora_alpha / sqrt(r)``.

    Raises
    ------
    ConfigError
        For values that no adapter can have.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: str | Sequence[str] = "auto"
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: str = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for key, rank in {"r": self.r, **self.rank_pattern}.items():
            whole_number(f"the rank {key!r}", rank, at_least=1)
        for key, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            positive(repr(key), alpha)
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save must be a list of names, got {self.modules_to_save!r}; "
                f"write [{self.modules_to_save!r}]"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.init_lora_weights not in INITIALIZERS:
            raise ConfigError(
                f"unknown init_lora_weights {self.init_lora_weights!r}; "
                f"choose one of {', '.join(INITIALIZERS)}"
            )
