"""Plots of a fit and of the posterior's draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrolora.checks import share
from pyrolora.errors import ConfigError
from pyrolora.plots.arguments import check_axes, check_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 40
"""The most rows of a plot of which each has a name."""

History = Sequence[Mapping[str, Any]]


def elbo_curve(history: History, *, ax: Axes, label: str | None = None) -> Axes:
    """Plot the ELBO over steps, averaged over the steps between two entries of the log.

    Parameters
    ----------
    history
        `Posterior.history`; every member of an ensemble has a curve.
    ax
        The axes to draw on; call again with another ``label`` to compare.

    Raises
    ------
    ConfigError
        When the history has no entries with an ELBO.
    """
    check_axes(ax, label)
    for member, entries in _runs(history).items():
        name = label if member is None else f"member {member}"
        ax.plot([e["step"] for e in entries], [e["elbo"] for e in entries], label=name)
    ax.set(xlabel="step", ylabel="ELBO (nats)")
    return ax


def kl_curves(history: History, *, ax: Axes) -> Axes:
    """Plot the KL of every latent site over steps, linear up to one nat and logarithmic above.

    It is not weighted by β. ``history`` is as in `elbo_curve`.
    """
    check_axes(ax)
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
    """Group the entries with an ELBO by the member of an ensemble that they belong to."""
    check_history(history)
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
    """Plot the signal-to-noise ratio of every rank of every block as a heat map.

    It shows means over draws. Below 1 the mean of a rank is smaller than its posterior spread.
    With noise in units of the rows (``units="row"``) the ratio is the same at every size of the
    mean, and does not tell the worth of a rank: it is higher where the data narrow the noise. Ranks
    that a block does not have are left blank.

    Parameters
    ----------
    idata
        The result of `Posterior.to_arviz` for a guide with ``signal_to_noise`` (``"montec"``).
    ax
        The axes to draw on; a colour bar is put beside them.

    Raises
    ------
    ConfigError
        When the draws have no variable of this name.
    """
    from matplotlib.colors import LogNorm

    check_axes(ax)
    ratios = _variable(idata, "signal_to_noise")
    values = ratios.mean(("chain", "draw")).transpose("block", "rank").to_numpy()
    shown = np.ma.masked_less_equal(values, 0)
    spread = shown.count() > 0 and shown.max() > shown.min()
    image = ax.imshow(shown, aspect="auto", norm=LogNorm() if spread else None)
    colorbar = ax.figure.colorbar(image, ax=ax, label="signal to noise")
    colorbar.ax.minorticks_off()
    ranks = np.arange(values.shape[1])
    ax.set_xticks(ranks[:: 1 + len(ranks) // 17], (ranks + 1)[:: 1 + len(ranks) // 17])
    ax.set_xlabel("rank")
    _name_rows(ax, ratios["block"].to_numpy())
    return ax


def mixture_weights(idata: Any, *, ax: Axes) -> Axes:
    """Plot the mean weight of every mixture component: one bar per block, the components in a row.

    Parameters
    ----------
    idata
        The result of `Posterior.to_arviz` for a guide with ``mixture_weights`` (``"montec"``).

    Raises
    ------
    ConfigError
        When the draws have no variable of this name.
    """
    check_axes(ax)
    draws = _variable(idata, "mixture_weights")
    weights = draws.mean(("chain", "draw")).transpose("block", "component").to_numpy()
    left = np.zeros(len(weights))
    for k, column in enumerate(weights.T):
        ax.barh(np.arange(len(weights)), column, left=left, height=0.8, label=str(k + 1))
        left = left + column
    ax.set(xlabel="mean mixture weight, by component", xlim=(0, 1))
    ax.set_ylim(len(weights) - 0.5, -0.5)
    _name_rows(ax, draws["block"].to_numpy())
    return ax


def adapter_norms(idata: Any, *, ax: Axes, mass: float = 0.9) -> Axes:
    """Plot ‖s B A‖_F of every layer: the mean over draws and the central interval of that mass.

    Parameters
    ----------
    idata
        The result of `Posterior.to_arviz`.
    mass
        Between 0 and 1.
    """
    check_axes(ax)
    share("the mass of an interval", mass, "(0, 1)")
    norms = _variable(idata, "adapter_norm")
    draws = norms.stack(sample=("chain", "draw")).transpose("sample", "layer").to_numpy()
    means, rows = draws.mean(0), np.arange(draws.shape[1])
    low, high = np.quantile(draws, [(1 - mass) / 2, (1 + mass) / 2], axis=0)
    ax.hlines(rows, low, high, linewidth=3, alpha=0.5)
    ax.plot(means, rows, "o", markersize=4)
    ax.set(xlabel=f"‖sBA‖, mean and {mass:.0%} interval")
    ax.set_xlim(left=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    _name_rows(ax, norms["layer"].to_numpy())
    return ax


def short_names(names: Sequence[str]) -> list[str]:
    """Return module names without the parts that all of them share.

    ``encoder.layer.0.query`` and ``encoder.layer.1.query`` become ``0`` and ``1``.
    """
    split = [str(name).split(".") for name in names]
    if len({len(parts) for parts in split}) > 1:
        columns = [*zip(*split, strict=False)][:-1]  # the shortest name keeps its last part
        shared = next((i for i, parts in enumerate(columns) if len({*parts}) > 1), len(columns))
        return [".".join(parts[shared:]) for parts in split]
    differ = [len({*parts}) > 1 for parts in zip(*split, strict=True)]
    return [".".join(_kept(parts, differ)) or parts[-1] for parts in split]


def _kept(parts: Sequence[str], kept: Sequence[bool]) -> Iterator[str]:
    return (part for part, keep in zip(parts, kept, strict=True) if keep)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows: each of them, or some of very many."""
    step = -(-len(names) // MOST_NAMES)
    rows = range(0, len(names), step)
    labels = short_names(names)
    ax.set_yticks(rows, [labels[row] for row in rows], fontsize="small", parse_math=False)


def _variable(idata: Any, name: str) -> Any:
    try:
        group = idata["posterior"]
        there = sorted(map(str, group.data_vars))
    except Exception as error:  # each type has an error of its own
        raise ConfigError(
            f"idata must be what posterior.to_arviz() returns, got {idata!r:.60}"
        ) from error
    if name not in there:
        raise ConfigError(
            f"the draws of guide {group.attrs.get('guide', 'unknown')!r} have no {name!r}; they "
            f"have {there}"
        )
    return group[name]
