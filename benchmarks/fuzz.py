"""Damage saved posteriors and adapters of PEFT's in every way that comes to mind, and load them.

    python benchmarks/fuzz.py --folders 100000 --seconds 3600

Each folder is changed by a mutation that its number chooses, with digests that were computed again
or not, and read into one network that all share. What may come of it: an error of ours; the same
predictions; or others that are finite, where the file says so (a value was changed and, in a
posterior, the digests with it). Anything else is a failure, is printed with its number
(``--only NUMBER`` runs it again), and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from fuzz_mutations import MARKER, Folder, mutate
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, Posterior, guides
from pyrolora.errors import PyroLoraError
from pyrolora.predictive import draw_factors

GUIDES = {
    "montec": guides.MonteCLoRA(),
    "meanfield": guides.MeanField(latent="AB"),
    "laplace": guides.Laplace(prior_scale=1.0),
    "ensemble": guides.Ensemble(members=2),
    "flat+montec": guides.Flat(inner=guides.MonteCLoRA(covariance="full")),
}
ALLOWED_SECONDS = 10
ALLOWED_BYTES = 2**29
TEXT = "a good film was not dull"
REFUSED, SAME, OTHER, FAILED = "refused", "same", "other, as the file says", "FAILED"
OUTCOMES = (REFUSED, SAME, OTHER, FAILED)


@dataclass(frozen=True)
class Case:
    """A folder to damage, and what it gives whole."""

    name: str
    folder: Folder
    output: Tensor
    ids: list[int] | None


class Hang(BaseException):
    """A load that took longer than it may."""


def network() -> Any:
    """A small BERT with fixed weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        vocab_size=16,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config).eval()


def tokenizer() -> Any:
    """A tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *TEXT.split(), "bad", "book", "very"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]"
    )


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 16, (4, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def output_of(posterior: Posterior) -> Tensor:
    """The network's outputs under two draws; NaN where `predict` would refuse them."""
    return posterior.model.network(batch(), draw_factors(posterior.model, 2, seed=0))


def originals(root: Path, base: nn.Module) -> list[Case]:
    """One saved posterior per guide, the first with a tokenizer, and one adapter of PEFT's."""
    rows = [{**{k: v[i % 4] for k, v in batch().items()}, "label": i % 2} for i in range(8)]
    cases = []
    for name, guide in GUIDES.items():
        words = tokenizer() if name == "montec" else None
        options: dict[str, Any] = {"epochs": 1, "seed": 0, "adapter": AdapterConfig(r=2)}
        posterior = pyrolora.fit(base, rows, guide=guide, tokenizer=words, **options)
        with torch.no_grad():
            posterior.bank.get_parameter("B_loc").add_(0.1)
        posterior.save(root / name)
        ids = None if words is None else words(TEXT)["input_ids"]
        cases.append(Case(name, Folder(root / name), output_of(posterior), ids))
        if name == "meanfield":
            posterior.to_peft(root / "peft")
        posterior.detach()
    adapter = pyrolora.from_peft(root / "peft", base)
    cases.append(Case("peft", Folder(root / "peft"), output_of(adapter), None))
    adapter.detach()
    return cases


def outcome(case: Case, base: nn.Module, says_so: bool) -> tuple[str, str]:
    """Load the damaged folder: what came of it, and why that is a failure."""
    before, peak = _fingerprint(base), _peak()
    try:
        with alarm(ALLOWED_SECONDS):
            found = _loaded(case, base, says_so or case.name == "peft")
    except Hang:
        found = FAILED, f"no answer in {ALLOWED_SECONDS} seconds"
    except PyroLoraError as error:
        found = REFUSED, ""
        if "emory" in str(error) and "allocate" in str(error):
            found = FAILED, f"allocated by the file's numbers: {error}"
        try:
            str(error).encode()
        except UnicodeEncodeError:
            found = FAILED, "a message that cannot be written"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = (
            FAILED,
            f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})",
        )
    if _peak() - peak > ALLOWED_BYTES:
        found = FAILED, f"{(_peak() - peak) / 2**20:.0f} MiB more memory"
    if _fingerprint(base) != before:
        found = FAILED, "the network that was passed is changed"
    if MARKER.exists():
        MARKER.unlink()
        found = FAILED, "code of the folder ran"
    return found


def _loaded(case: Case, base: nn.Module, says_so: bool) -> tuple[str, str]:
    read = pyrolora.from_peft if case.name == "peft" else pyrolora.load
    posterior = read(case.folder.path, base)
    try:
        output = output_of(posterior)
        if not torch.isfinite(output).all():
            posterior.predict(batch(), 2, seed=0)  # an error of ours, or
            return FAILED, "predictions that are not finite"
        words, ids = posterior.tokenizer, None
        if case.ids is not None:
            ids = words(TEXT)["input_ids"]
    finally:
        posterior.detach()
    if torch.equal(output, case.output) and ids == case.ids:
        return SAME, ""
    return (OTHER, "") if says_so else (FAILED, "other predictions, without a word")


def _fingerprint(base: nn.Module) -> list[Any]:
    modules = [(type(module), module.training) for module in base.modules()]
    return [*modules, *(p.requires_grad for p in base.parameters())]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Hang` in a block that takes longer; a load in C that never returns is killed later by
    whoever runs this, and the number that is printed last is its own."""

    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(folders: int, seconds: float, seed: int, only: int | None = None) -> int:
    """Run the numbers from 0 on, print a table and every failure; return how many failed."""
    counts: Counter[tuple[str, str]] = Counter()
    sealed = failures = done = 0
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        base = network()
        cases = originals(Path(scratch), base)
        began = time.monotonic()
        for number in range(folders) if only is None else [only]:
            if time.monotonic() - began > seconds:
                break
            rng = random.Random(f"{seed}-{number}")
            case = rng.choice(cases)
            with case.folder.restored():
                what, says_so = mutate(case.folder, rng)
                result, reason = outcome(case, base, says_so)
            done, sealed = done + 1, sealed + says_so
            counts[what, result] += 1
            if result == FAILED:
                failures += 1
                print(f"{FAILED} {number}: {case.name}, {what}: {reason}", flush=True)
    _print(counts)
    took = time.monotonic() - began
    print(
        f"{done:,} folders in {took:.0f} s ({60 * done / max(took, 1e-9):,.0f} a minute), "
        f"{sealed:,} of them with digests computed again; {failures} failed"
    )
    return failures


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of damaged files."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


def _print(counts: Counter[tuple[str, str]]) -> None:
    kinds = sorted({what for what, _ in counts})
    width = max(map(len, kinds), default=0)
    print(f"{'':{width}} " + " ".join(f"{name:>24}" for name in OUTCOMES))
    for what in kinds:
        print(f"{what:{width}} " + " ".join(f"{counts[what, name]:>24,}" for name in OUTCOMES))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="the budget of time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one folder")
    chosen = parser.parse_args(arguments)
    return min(run(chosen.folders, chosen.seconds, chosen.seed, chosen.only), 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
