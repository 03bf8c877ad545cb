"""The fit of a run: begun anew, or resumed from what an earlier one left in the folder."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyrolora.cli.output import say
from pyrolora.cli.runs import LAST_GOOD, Run
from pyrolora.errors import NonFiniteError, SaveError

if TYPE_CHECKING:
    from pyrolora.fitting import Request
    from pyrolora.posterior import Posterior


def fitted(
    run: Run, request: Request, *, resume: bool, writes: bool
) -> tuple[Posterior, dict[str, Any]]:
    """Fit what is requested, from the beginning or from the last checkpoint.

    Parameters
    ----------
    run
        The run, whose folder has the checkpoints.
    request
        What to fit.
    resume
        Go on from the checkpoints that are there.
    writes
        Whether this process writes to the folder.

    Returns
    -------
    Posterior
        The posterior.
    dict
        What the run's record says of it.
    """
    from pyrolora.fitting import fit_request
    from pyrolora.guides import full_name
    from pyrolora.inference import member_folders, newest_whole

    step, checkpoint = _resumed(run) if resume else (0, None)
    if checkpoint is not None:
        options = {**request.training_options, "resume_from_checkpoint": checkpoint}
        request = replace(request, training_options=options)
    started = time.perf_counter()
    try:
        posterior = fit_request(request)
    except NonFiniteError as error:
        if error.posterior is None:  # it met NaN from the start, or in another process
            raise
        raise NonFiniteError(_kept(run, error)) from error
    except SaveError as error:
        if error.posterior is None:
            raise
        raise SaveError(f"{_kept(run, error)}. {run.goes_on()}") from error
    except (KeyboardInterrupt, SystemExit):
        if newest_whole(run.folder)[0] or member_folders(run.folder):
            say(f"the same command goes on from the last checkpoint in {run.folder}")
        else:
            say(f"there is no checkpoint in {run.folder} yet; the same command starts anew")
        raise
    except Exception:
        if writes:
            run.abandon()
        raise
    return posterior, {
        "guide": full_name(request.options),
        "num_examples": posterior.model.num_examples,
        **_chosen(posterior),
        "layers": len(posterior.bank.specs),
        "seconds": round(time.perf_counter() - started, 1),
        "resumed_from_step": step,
    }


def _chosen(posterior: Posterior) -> dict[str, Any]:
    """Return how many examples were held back, and what they chose."""
    from pyrolora.inference.widths import chosen_width
    from pyrolora.report.facts import chose_width

    if not posterior.held_back:
        return {}
    return {
        "held_back": posterior.held_back,
        **({"width": chosen_width(posterior.model)} if chose_width(posterior) else {}),
        "temperature": posterior.temperature,
    }


def _kept(run: Run, error: NonFiniteError | SaveError) -> str:
    """Save the posterior of the error, and return the message, which says where it is."""
    folder = run.folder / LAST_GOOD
    try:
        error.posterior.save(folder)
    except SaveError as unsaved:
        return f"{str(error).replace('error.posterior', 'the last state')}. {unsaved}"
    return str(error).replace("error.posterior", str(folder))


def _resumed(run: Run) -> tuple[int, str | bool | None]:
    """Return the step to resume from and its checkpoint; True where members have their own."""
    from pyrolora.inference import checkpoint_step, member_folders, newest_whole

    checkpoint, note = newest_whole(run.folder)
    if note is not None:
        say(f"note: {note}")
    if checkpoint is not None:
        step = checkpoint_step(checkpoint)
        say(f"going on from step {step}, {checkpoint}")
        return step, str(checkpoint)
    if member_folders(run.folder):
        say(f"going on with the members in {run.folder}")
        return 0, True
    return 0, None
