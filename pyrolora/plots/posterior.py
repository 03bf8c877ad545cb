"""Pictures of a fit and of the posterior's draws: functions that draw on matplotlib axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrolora.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 40
"""Rows of a picture that still have a name each."""

History = Sequence[Mapping[str, Any]]


def elbo_curve(history: History, *, ax: Axes, label: str | None = None) -> Axes:
    """The ELBO, averaged over the steps between two entries of the log, over steps.

    Parameters
    ----------
    history
        `Posterior.history`; of an ensemble every member has its own curve.
    ax
        Where to draw; call again with another ``label`` to compare.

    Raises
    ------
    ConfigError
        When the history has no such entries.
    """
    for member, entries in _runs(history).items():
        name = label if member is None else f"member {member}"
        ax.plot([e["step"] for e in entries], [e["elbo"] for e in entries], label=name)
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    return ax


def kl_curves(history: History, *, ax: Axes) -> Axes:
    """The KL of every latent site over steps, in nats: linear up to one nat, logarithmic above.

    Not weighted by β. ``history`` as in `elbo_curve`.
    """
    for member, entries in _runs(history).items():
        sites = dict.fromkeys(key for e in entries for key in e if key.startswith("kl/"))
        for site in sites:
            logged = [entry for entry in entries if site in entry]
            name = site.removeprefix("kl/") + ("" if member is None else f", member {member}")
            ax.plot([e["step"] for e in logged], [e[site] for e in logged], label=name)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="step", ylabel="KL (nats)")
    return ax


def _runs(history: History) -> dict[int | None, list[Mapping[str, Any]]]:
    """The entries with an ELBO, by the member of an ensemble that they belong to."""
    runs: dict[int | None, list[Mapping[str, Any]]] = {}
    for entry in history:
        if "elbo" in entry:
            runs.setdefault(entry.get("member"), []).append(entry)
    if not runs:
        raise ConfigError(
            "the history has no entry with 'elbo': nothing was trained, or its training logged "
            "nothing; with training= set logging_steps below the number of steps"
        )
    return runs


def signal_to_noise_map(idata: Any, *, ax: Axes) -> Axes:
    """The signal-to-noise of every rank of every block, its mean over draws, as a heat map.

    Below 1 a rank's mean is smaller than its posterior spread. Ranks that a block does not have are
    left blank.

    Parameters
    ----------
    idata
        What `Posterior.to_arviz` gives, of a guide with ``signal_to_noise`` (``"montec"``).
    ax
        Where to draw; a colour bar is put beside it.

    Raises
    ------
    ConfigError
        When the draws have no such variable.
    """
    from matplotlib.colors import LogNorm

    found = _variable(idata, "signal_to_noise")
    values = found.mean(("chain", "draw")).transpose("block", "rank").to_numpy()
    shown = np.ma.masked_less_equal(values, 0)
    spread = shown.count() > 0 and shown.max() > shown.min()
    image = ax.imshow(shown, aspect="auto", norm=LogNorm() if spread else None)
    colorbar = ax.figure.colorbar(image, ax=ax, label="signal to noise")
    colorbar.ax.minorticks_off()
    ranks = np.arange(values.shape[1])
    ax.set_xticks(ranks[:: 1 + len(ranks) // 17], (ranks + 1)[:: 1 + len(ranks) // 17])
    ax.set_xlabel("rank")
    _name_rows(ax, found["block"].to_numpy())
    return ax


def mixture_weights(idata: Any, *, ax: Axes) -> Axes:
    """The mean weight of every mixture component, a bar a block, the components side by side.

    Parameters
    ----------
    idata
        What `Posterior.to_arviz` gives, of a guide with ``mixture_weights`` (``"montec"``).

    Raises
    ------
    ConfigError
        When the draws have no such variable.
    """
    found = _variable(idata, "mixture_weights")
    weights = found.mean(("chain", "draw")).transpose("block", "component").to_numpy()
    left = np.zeros(len(weights))
    for k, column in enumerate(weights.T):
        ax.barh(np.arange(len(weights)), column, left=left, height=0.8, label=str(k + 1))
        left = left + column
    ax.set(xlabel="mean mixture weight, by component", xlim=(0, 1))
    ax.set_ylim(len(weights) - 0.5, -0.5)
    _name_rows(ax, found["block"].to_numpy())
    return ax


def adapter_norms(idata: Any, *, ax: Axes, mass: float = 0.9) -> Axes:
    """‖s B A‖_F of every layer: the mean over draws and the central interval of that mass.

    Parameters
    ----------
    idata
        What `Posterior.to_arviz` gives.
    mass
        Between 0 and 1.
    """
    if not 0 < mass < 1:
        raise ConfigError(f"the mass of an interval must be between 0 and 1, got {mass!r}")
    found = _variable(idata, "adapter_norm")
    draws = found.stack(sample=("chain", "draw")).transpose("sample", "layer").to_numpy()
    means, rows = draws.mean(0), np.arange(draws.shape[1])
    low, high = np.quantile(draws, [(1 - mass) / 2, (1 + mass) / 2], axis=0)
    ax.hlines(rows, low, high, linewidth=3, alpha=0.5)
    ax.plot(means, rows, "o", markersize=4)
    ax.set(xlabel=f"‖sBA‖, mean and {mass:.0%} interval")
    ax.set_xlim(left=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    _name_rows(ax, found["layer"].to_numpy())
    return ax


def short_names(names: Sequence[str]) -> list[str]:
    """Module names without the parts that all of them share: of ``encoder.layer.0.query`` and
    ``encoder.layer.1.query`` the numbers."""
    parts = [str(name).split(".") for name in names]
    if len({len(own) for own in parts}) > 1:
        columns = [*zip(*parts, strict=False)][:-1]  # of the shortest name the last part stays
        shared = next((i for i, own in enumerate(columns) if len({*own}) > 1), len(columns))
        return [".".join(own[shared:]) for own in parts]
    differ = [len({*own}) > 1 for own in zip(*parts, strict=True)]
    return [".".join(_kept(own, differ)) or own[-1] for own in parts]


def _kept(parts: Sequence[str], kept: Sequence[bool]) -> Iterator[str]:
    return (part for part, keep in zip(parts, kept, strict=True) if keep)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """A tick for each row, or for some of very many."""
    step = -(-len(names) // MOST_NAMES)
    rows = range(0, len(names), step)
    labels = short_names(names)
    ax.set_yticks(rows, [labels[row] for row in rows], fontsize="small", parse_math=False)


def _variable(idata: Any, name: str) -> Any:
    group = idata["posterior"]
    if name not in group.data_vars:
        raise ConfigError(
            f"the draws of guide {group.attrs.get('guide', 'unknown')!r} have no {name!r}; they "
            f"have {sorted(map(str, group.data_vars))}"
        )
    return group[name]
