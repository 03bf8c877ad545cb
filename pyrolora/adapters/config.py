"""The configuration of the adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pyrolora import defaults
from pyrolora.checks import (
    check_choices,
    is_listed,
    one_of,
    positive,
    share,
    true_or_false,
    whole_number,
)
from pyrolora.errors import ConfigError

RandomStart = Literal["kaiming", "gaussian"]
"""Starts with a random A, and B at zero: a rank can start so at any time."""
Initializer = Literal[RandomStart, "lora-ga", "pissa", "olora"]
Importance = Literal["alora", "snr"]
Schedule = Literal["prune", "move"]
Allocation = Literal["uniform", Importance]
"""Names that `AdapterConfig.rank_allocation` takes."""

RANDOM_STARTS = get_args(RandomStart)
INITIALIZERS = get_args(Initializer)
SCHEDULES = get_args(Schedule)
EVERY_LAYER = ("auto", "all-linear")
"""Targets that are rules rather than names."""


@dataclass(frozen=True, kw_only=True)
class RankAllocation:
    """Options by which the layers share one budget of ranks while the adapters are trained.

    The budget is the sum of the ranks r that the configuration gives, and every layer has slots for
    ``growth * r`` ranks (no more than it is wide). In each of ``rounds`` steps, evenly spaced
    between two shares of the training, the least useful of the active ranks lose their place,
    wherever they are, but for a layer's last one. The scaling of a layer stays what it was at
    rank r.

    Parameters
    ----------
    schedule
        ``"prune"``: all slots are active at the start, and each round takes as many ranks out as
        the others, until the budget is left (AdaLoRA's way). ``"move"``: every layer starts with
        its r, and layers that lost none in a round get as many as were lost, in turn, those of the
        highest mean importance first (ALoRA's way); a new rank has a random row of A and B = 0, so
        that the function stays.
    importance
        How a rank is judged. ``"alora"``: by ablation on a batch of ``eval_data``, the
        log-likelihood of the mean adapter, less that without the rank, plus that of the rank alone.
        ``"snr"``: by the signal-to-noise ratio of its update under the posterior, without a pass
        through the network; for guides with a width.
    rounds
        Number of rounds.
    share
        For ``"move"`` alone: the share of all active ranks that loses its place in a round; None:
        the default.
    start, end
        The shares of the training steps after which the first round and the last one come.
    growth
        The slots of a layer, relative to its r; they cost what active ranks do.

    References
    ----------
    Z. Liu, J. Lyn, W. Zhu, X. Tian (2024), "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning
    Large Language Models", NAACL, arXiv 2403.16187. Q. Zhang et al. (2023), "AdaLoRA: Adaptive
    Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR, arXiv 2303.10512.
    """

    importance: Importance = "alora"
    schedule: Schedule = "prune"
    rounds: int = defaults.ALLOCATION_ROUNDS
    share: float | None = None
    start: float = defaults.ALLOCATION_START
    end: float = defaults.ALLOCATION_END
    growth: float = defaults.ALLOCATION_GROWTH

    def __post_init__(self) -> None:
        check_choices(self)
        whole_number("rounds", self.rounds, at_least=1)
        positive("growth", self.growth)
        for name in ("start", "end"):
            positive(name, getattr(self, name), or_zero=True)
        self._check_share()
        if not self.start <= self.end < 1:
            raise ConfigError(
                "start and end must be shares of the training, 0 <= start <= end < 1, got "
                f"start={self.start!r} and end={self.end!r}"
            )
        if self.growth <= 1:
            raise ConfigError(f"growth must be above 1, or no layer can win, got {self.growth!r}")

    def _check_share(self) -> None:
        if self.share is None:
            return
        positive("share", self.share)
        if self.schedule == "prune":
            raise ConfigError(
                f"share={self.share!r} is an option of schedule='move'; how many ranks "
                "schedule='prune' takes out follows from rounds and growth; leave share out"
            )
        if self.share > 1:
            raise ConfigError(f"share must be a share of the ranks, at most 1, got {self.share!r}")

    def slots(self, rank: int, width: int) -> int:
        """Return for how many ranks a layer that starts with ``rank`` has room."""
        return min(math.ceil(self.growth * rank), width)

    def steps(self, total: int) -> list[int]:
        """Return after which of ``total`` steps ranks lose their place.

        Rounds that fall on one step are one.
        """
        gap = (self.end - self.start) / max(self.rounds - 1, 1)
        shares = (self.start + i * gap for i in range(self.rounds))
        return sorted({max(1, round(total * share)) for share in shares})


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
        ``"auto"``, or None (the query, key and value projections of attention in a transformers
        network, of its language model where it reads more than text; every linear layer of
        another network), ``"all-linear"``, names or name suffixes, or one string: a regular
        expression for the whole name, or a suffix. Each name of a list has to select a layer, which
        may be a convolution or an embedding, too. A pattern may select layers that are smaller than
        their rank or that the network does not call; these are left out, with a warning.
    exclude_modules
        Modules that are taken out of the targets, by the same rules. Each has to be in the network.
    target_parameters
        Parameters of other modules than linear layers that are adapted too, such as the fused
        experts of a mixture, ``["experts.gate_up_proj", "experts.down_proj"]``: names, or ends of
        names after a dot. A matrix (out, in) gets one adapter, a stack (E, out, in) one per expert,
        each of rank r. ``exclude_modules`` and ``layers_to_transform`` hold for them, too.
    layers_to_transform
        Numbers of blocks, counted from 0: targets in other blocks, or in none, get no adapter.
        ``None``: all blocks.
    layers_pattern
        The part of a name before a block's number, where there are several stacks:
        ``"decoder.layers"``. ``None``: the first number counts.
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
    rank_allocation
        ``"uniform"``: ranks stay as they are. ``"alora"`` or ``"snr"``: the layers share one
        budget, and training finds where it is of use, by ablation on ``eval_data`` or by the
        posterior's signal-to-noise ratio; a `RankAllocation` has the options.

    Raises
    ------
    ConfigError
        For values that no adapter can have.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: str | Sequence[str] | None = "auto"
    exclude_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: Initializer = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    rank_allocation: Allocation | RankAllocation | Mapping[str, Any] = "uniform"

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_numbers()
        self._check_names()
        self._check_parameters()
        self._check_blocks()
        share("lora_dropout", self.lora_dropout, "[0, 1)")
        true_or_false("use_rslora", self.use_rslora)
        self._check_allocation()

    def _check_numbers(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(
                    f"{name} must be a mapping of names to numbers, got {getattr(self, name)!r}"
                )
        for key, rank in {"r": self.r, **self.rank_pattern}.items():
            whole_number(f"the rank {key!r}", rank, at_least=1)
        for key, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            positive(repr(key), alpha)

    def _check_names(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save must be a list of names, got {self.modules_to_save!r}; "
                f"write [{self.modules_to_save!r}]"
            )
        for name in (
            "target_modules",
            "exclude_modules",
            "target_parameters",
            "layers_pattern",
            "modules_to_save",
        ):
            object.__setattr__(self, name, _in_order(name, getattr(self, name)))
        if self.target_modules is None:  # PEFT's default
            object.__setattr__(self, "target_modules", "auto")

    def _check_parameters(self) -> None:
        wanted = self.target_parameters
        if isinstance(wanted, str):
            raise ConfigError(
                f"target_parameters must be a list of names, got {wanted!r}; write [{wanted!r}]"
            )
        if wanted and self.lora_dropout:
            raise ConfigError(
                "lora_dropout acts on the input of a layer, and parameters such as fused experts "
                f"are adapted as W + s B A, without one (as in PEFT); got lora_dropout="
                f"{self.lora_dropout!r} and target_parameters={wanted!r}; leave one out"
            )
        if wanted and self.init_lora_weights not in RANDOM_STARTS:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} starts from the weights of layers, "
                f"and target_parameters={wanted!r} names others; choose one of "
                f"{', '.join(RANDOM_STARTS)}"
            )

    def _check_blocks(self) -> None:
        wanted, targets = self.layers_to_transform, self.target_modules
        if wanted is None:
            if self.layers_pattern:
                raise ConfigError(
                    f"layers_pattern={self.layers_pattern!r} says where the numbers of "
                    "layers_to_transform stand, which is None; pass it, or leave out both"
                )
            return
        many = isinstance(wanted, Collection) and is_listed(wanted)
        numbers: list[Any] = [*wanted] if many else [wanted]  # type: ignore[misc]
        for number in numbers:
            whole_number("layers_to_transform", number, at_least=0)
        if not numbers:
            raise ConfigError("layers_to_transform is empty: no layer is left; None means all")
        if isinstance(targets, str) and targets not in EVERY_LAYER:
            raise ConfigError(
                f"target_modules={targets!r} is a regular expression, which says for itself which "
                f"layers it means, and layers_to_transform={wanted!r} would take some out; write "
                "the numbers in the expression, or a list of names"
            )
        object.__setattr__(self, "layers_to_transform", sorted({int(n) for n in numbers}))

    def _check_allocation(self) -> None:
        value = self.rank_allocation
        if isinstance(value, Mapping):  # options read from JSON
            names = [field.name for field in dataclasses.fields(RankAllocation)]
            for name in value:
                if name not in names:
                    raise ConfigError(
                        f"rank_allocation has no option {name!r}; it has {', '.join(names)}"
                    )
            object.__setattr__(self, "rank_allocation", RankAllocation(**value))
        elif not isinstance(value, RankAllocation):
            one_of("rank_allocation", value, Allocation)
        if self.allocation is not None and self.init_lora_weights not in RANDOM_STARTS:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} gives the ranks of the start, and "
                f"rank_allocation adds later ones; choose one of {', '.join(RANDOM_STARTS)}, or "
                "rank_allocation='uniform'"
            )

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor s of the update of a layer with this rank and alpha."""
        return alpha / (rank**0.5 if self.use_rslora else rank)

    @property
    def allocation(self) -> RankAllocation | None:
        """Options by which ranks move; None where they do not."""
        value = self.rank_allocation
        if isinstance(value, RankAllocation):
            return value
        assert isinstance(value, str)
        return None if value == "uniform" else RankAllocation(importance=value)


def _in_order(option: str, value: Any) -> str | list[str] | tuple[str, ...] | None:
    """Return names in an order that a saved posterior can compare: sets are sorted."""
    if value is None or isinstance(value, str):
        return value
    listed = is_listed(value) and not isinstance(value, Mapping)
    if not listed or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{option} must be names of modules, got {value!r}; write a list of them")
    return value if isinstance(value, list | tuple) else sorted(value)
