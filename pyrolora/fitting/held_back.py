"""Training examples that a fit holds back, to choose the width of its noise and a temperature."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from pyrolora import defaults
from pyrolora.data import Prepared
from pyrolora.errors import ConfigError
from pyrolora.fitting.request import Request
from pyrolora.inference.widths import program_of
from pyrolora.posterior import Posterior
from pyrolora.predictive import draw_factors
from pyrolora.predictive.calibration import calibrated
from pyrolora.processes import all_processes


def parted(
    data: Prepared, request: Request, args: TrainingArguments
) -> tuple[Prepared, Prepared | None]:
    """Return the examples to learn from, and those that the guide holds back.

    Where nobody asked for it, none are held back of few examples, of a stream or of texts that
    share rows, nor where an adapter is given, which may know them all.
    """
    share = request.options.held_back
    if not share:
        return data, None
    n = len({*data.of_rows()})
    count = request.options.number_held_back(n)
    apart = data.whole is None and data.texts is None
    inner: Any = getattr(request.options, "inner", request.options)
    enough = share * n >= defaults.HELD_BACK_LEAST
    if inner.hold_back is None and not (apart and request.given is None and enough):
        return data, None
    if not apart:
        what = "a stream" if data.texts is None else "texts that share rows (packing=True)"
        raise ConfigError(
            f"hold_back={share!r} sets training examples aside, and the training data are {what}; "
            "choose hold_back=None or 0, and call Posterior.calibrate with data of their own"
        )
    if not 0 < count < n:
        raise ConfigError(
            f"hold_back={share!r} of {n} examples is {count}; it has to leave some to learn from, "
            "and to hold back some to choose by: choose another share"
        )
    return data.parted(count, args.seed)


def calibrate(posterior: Posterior, held_back: Prepared, args: TrainingArguments) -> None:
    """Set the temperature by the examples that were held back, and log what they have chosen.

    A task whose laws have no temperature keeps 1.
    """
    joint = posterior.model
    if joint.task.tempers:
        factors = draw_factors(joint, defaults.TEMPERATURE_DRAWS, seed=args.seed)
        size, prior = args.per_device_eval_batch_size, defaults.TEMPERATURE_PRIOR
        with all_processes():
            found = calibrated(joint, held_back, factors, batch_size=size, prior=prior)
        posterior.temperature = found.temperature
    width = program_of(joint).width
    assert width is not None
    chosen = {"width": float(width[0].exp()), "temperature": posterior.temperature}
    posterior.history.append({"held_back": len(held_back), **chosen})
