"""One fit of the study: from a job to its scores."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import peft
import torch
import transformers
from peft.helpers import MontecloraTrainerMixin
from scipy.optimize import minimize_scalar
from scipy.stats import pearsonr
from study_jobs import ADAPTER, FOLLOWED, PEFT, POINTS, Job, Row
from tasks import (
    TASKS,
    Splits,
    load_network,
    load_task,
)
from torchmetrics.functional.classification import multiclass_matthews_corrcoef
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import pyrolora
from pyrolora import guides
from pyrolora.data import prepare
from pyrolora.inference import training_arguments
from pyrolora.predictive import (
    ClassPrediction,
    Prediction,
    RegressionPrediction,
    auroc,
    draw_factors,
    evaluate,
    predict,
)
from pyrolora.predictive.metrics import calibration_error
from pyrolora.seeding import seeded


@dataclass(frozen=True)
class Place:
    """Where a job finds what it needs."""

    data: Path
    model: Path
    dtype: str
    device: str


def run(job: Job, place: Place) -> Row:
    """Fit, predict, score; in a worker, which prints nothing."""
    if place.device == "cpu":
        torch.set_num_threads(1)  # the jobs are side by side
    _quiet()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return _run(job, place)


def _run(job: Job, place: Place) -> Row:
    splits = load_task(place.data, job.task, job.examples, job.seed)
    network, tokenizer = load_network(place.model, job.task, job.seed, place.dtype)
    fit = fit_peft if job.guide == PEFT else fit_pyrolora
    start = time.perf_counter()
    fitted = fit(job, network, tokenizer, splits, place)
    seconds = time.perf_counter() - start
    draws = 0 if job.guide in POINTS else job.draws
    start = time.perf_counter()
    scored = fitted.predict(splits.scored, draws)
    predict_s = time.perf_counter() - start
    results = scores(scored)
    if isinstance(scored, ClassPrediction):
        results["ece_exact"] = exact_ece(scored)
    if splits.outside is not None:
        outside = fitted.predict(splits.outside, draws)
        results["ood_auroc"] = auroc(scored.entropy, outside.entropy)
        if draws:
            results["ood_auroc_epistemic"] = auroc(scored.epistemic, outside.epistemic)
    results["by_draws"] = {str(count): scores(few) for count, few in fewer(scored)}
    held_out = fitted.predict(splits.held_out, draws)
    results["held_out_nll"] = evaluate(held_out)["nll"]
    if isinstance(scored, ClassPrediction) and isinstance(held_out, ClassPrediction):
        temperature = best_temperature(held_out)
        cooled = scores(tempered(scored, temperature))
        results |= {f"{name}_ts": cooled[name] for name in ("nll", "ece", "brier")}
        results["temperature"] = temperature
    return {
        **results,
        "curve": fitted.curve,
        "fit_s": seconds,
        "predict_s": predict_s,
        "train_size": len(splits.train),
        "scored_size": len(splits.scored),
        "draws": draws,
    }


@dataclass
class Fitted:
    """A network that predicts, and its scores after each epoch where they were followed."""

    predict: Callable[[Any, int], Prediction]
    curve: list[Row] = field(default_factory=list)


def fit_pyrolora(job: Job, network: Any, tokenizer: Any, splits: Splits, place: Place) -> Fitted:
    """The guide by `pyrolora.fit`."""
    curve = Curve(splits, tokenizer)
    # Only Laplace looks at the held-out examples: for the precision of its prior.
    extra = {"eval_data": splits.held_out} if job.guide == "laplace" else {}
    posterior = pyrolora.fit(
        network,
        splits.train,
        guides.from_options(job.guide, job.options),
        tokenizer=tokenizer,
        adapter=ADAPTER if guides.guide_class(job.guide.partition("+")[0]).adapts else None,
        training=arguments(job, place),
        callbacks=[curve] if job.guide == FOLLOWED else [],
        **extra,
    )
    return Fitted(lambda data, draws: posterior.predict(data, draws, seed=job.seed), curve.rows)


def arguments(job: Job, place: Place) -> TrainingArguments:
    return training_arguments(
        tempfile.gettempdir(),
        epochs=job.epochs,
        learning_rate=job.learning_rate,
        batch_size=job.batch,
        seed=job.seed,
        save=False,
        disable_tqdm=True,
        use_cpu=place.device == "cpu",
    )


class Curve(TrainerCallback):
    """Scores of the held-out and of the scored examples after each epoch, at the mean adapter."""

    def __init__(self, splits: Splits, tokenizer: Any) -> None:
        self.parts = {"held_out": splits.held_out, "scored": splits.scored}
        self.tokenizer = tokenizer
        self.rows: list[Row] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        joint = rest["model"].joint
        row: Row = {"epoch": round(state.epoch)}
        for name, data in self.parts.items():
            ready = prepare(data, joint.base, joint.task, self.tokenizer)
            row[name] = scores(predict(joint, ready, draw_factors(joint, 0)))
        self.rows.append(row)


def fit_peft(job: Job, network: Any, tokenizer: Any, splits: Splits, place: Place) -> Fitted:
    """PEFT's MonteCLoRA with PEFT's own defaults and its own loss; rank, scaling and layers as
    pyrolora's. It predicts at the mean: PEFT keeps no posterior."""

    class PEFTTrainer(MontecloraTrainerMixin, Trainer):
        pass

    def tokens(data: Any) -> Any:
        texts = TASKS[job.task].columns
        ready = data.map(
            lambda rows: tokenizer(*(rows[name] for name in texts), truncation=True), batched=True
        )
        kept = {"input_ids", "attention_mask", "token_type_ids", "label"}
        return ready.remove_columns([name for name in ready.column_names if name not in kept])

    with_adapter = peft.get_peft_model(
        network,
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=ADAPTER.r,
            lora_alpha=ADAPTER.lora_alpha,
            target_modules=list(ADAPTER.target_modules),
            monteclora_config=peft.MontecloraConfig(**job.options),
        ),
    )
    args = arguments(job, place)
    args.remove_unused_columns = True
    trainer = PEFTTrainer(
        model=with_adapter,
        args=args,
        train_dataset=tokens(splits.train),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    def probabilities(data: Any, draws: int) -> Prediction:
        output = trainer.predict(tokens(data))
        log_probs = torch.as_tensor(output.predictions).float().log_softmax(-1)
        if output.label_ids is None:
            return ClassPrediction(None, None, log_probs.exp()[None])
        targets = torch.as_tensor(output.label_ids)
        picked = log_probs.gather(1, targets[:, None]).mT
        return ClassPrediction(targets, picked, log_probs.exp()[None])

    return Fitted(probabilities)


# Scores -----------------------------------------------------------------------------------------


def scores(prediction: Prediction) -> dict[str, float]:
    """pyrolora's metrics, and the tasks' own: Matthews' correlation, Pearson's."""
    results = evaluate(prediction)
    assert prediction.targets is not None
    if isinstance(prediction, ClassPrediction):
        classes = prediction.probs.shape[-1]
        correlation = multiclass_matthews_corrcoef(
            prediction.predicted, prediction.targets, classes
        )
        results["mcc"] = float(correlation)
    elif isinstance(prediction, RegressionPrediction):
        results["pearson"] = float(pearsonr(prediction.mean, prediction.targets).statistic)
    return results


def exact_ece(prediction: ClassPrediction, times: int = 200) -> float:
    """The ECE that chance leaves with so many examples: its mean over labels that are drawn from
    the predicted probabilities, which then are exact."""
    law = torch.distributions.Categorical(prediction.probs.double())
    with seeded(0):
        labels = law.sample((times,))
    return fmean(calibration_error(prediction.probs, drawn) for drawn in labels)


def fewer(prediction: Prediction) -> Iterator[tuple[int, Prediction]]:
    """The prediction from its first 1, 2, 4, ... draws."""
    assert prediction.log_likelihood is not None
    assert isinstance(prediction, ClassPrediction | RegressionPrediction)
    total, count = len(prediction.draws), 1
    while count < total:
        yield (
            count,
            dataclasses.replace(
                prediction,
                draws=prediction.draws[:count],
                log_likelihood=prediction.log_likelihood[:count],
            ),
        )
        count *= 2


def best_temperature(prediction: ClassPrediction) -> float:
    """T of the highest likelihood of softmax(log p / T), p the predictive probabilities."""

    def nll(log_temperature: float) -> float:
        return evaluate(tempered(prediction, math.exp(log_temperature)))["nll"]

    return math.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x)


def tempered(prediction: ClassPrediction, temperature: float) -> ClassPrediction:
    """The prediction with its probabilities at that temperature; one draw."""
    assert prediction.targets is not None
    log_probs = (prediction.probs.double().clamp(min=1e-12).log() / temperature).log_softmax(-1)
    picked = log_probs.gather(1, prediction.targets[:, None]).mT
    return ClassPrediction(prediction.targets, picked, log_probs.exp()[None])


def _quiet() -> None:
    """Workers do not draw bars over one another."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
