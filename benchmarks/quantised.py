"""Quantised networks: which format works with which guide, verb by verb.

A small decoder, quantised by each library that is installed (bitsandbytes, torchao, quanto), with
adapters on all linear layers. A fit counts as right where every layer has learnt; a posterior that
was loaded where it predicts as the saved one; a merged network where it computes what the posterior
does. It needs the libraries of tests/quantisers.txt, and optimum-quanto.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from common import RESULTS, markdown, provenance, save_json, short_training, show
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.errors import PyroLoraError
from pyrolora.guides import SWAG, Ensemble, Laplace
from pyrolora.model import evaluating
from pyrolora.storage.tensors import tensors

IDS = torch.randint(4, 250, (16, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in IDS.tolist()]
GUIDES: dict[str, guides.Guide] = {
    **{name: guides.as_guide(name) for name in ("map", "montec", "meanfield", "lowrank")},
    **{name: guides.as_guide(name) for name in ("dropout", "tfb", "flat")},
    "laplace": Laplace(prior_scale=0.1),
    "swag": SWAG(snapshots=2, rank=2),
    "ensemble": Ensemble(members=2),
}
START = """# Quantised networks

Networks that transformers has quantised are fitted, used, saved and loaded like others: the
adapters are in floating point, the weights stay as they are. The folder of a posterior says how
its network was quantised, so that `pyrolora.load(folder)` quantises it again. Onto a network that
is quantised otherwise, or not at all, it loads with a warning. `posterior.merge()` refuses
quantised layers; `posterior.merge(dequantize=True)` makes plain ones of them first, with the
weights that they compute with. `to_peft` writes the adapter, as QLoRA's users expect it.

Noise on the weights (`flat`) is refused. `weights` is their memory, to that of the network in
bfloat16, of whose weights 18 % (embeddings and output layer) stay as they are. This table is what
`python benchmarks/quantised.py --write docs/quantised.md` printed on a CPU: a small decoder with
adapters on all linear layers; *yes* means that every layer learnt, that what was loaded predicts
alike, and that what was merged computes the same.

"""


def _torchao(name: str) -> Any:
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, name)())


def _nf4(**options: Any) -> Any:
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return transformers.BitsAndBytesConfig(**four_bit, **options)


FORMATS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes int8": (
        "bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    ),
    "bitsandbytes NF4": ("bitsandbytes", _nf4),
    "bitsandbytes NF4, double": ("bitsandbytes", lambda: _nf4(bnb_4bit_use_double_quant=True)),
    "torchao int8 weights": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao int8": ("torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig")),
    "quanto int8": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
    "quanto int4": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int4")),
}


def network(folder: str, how: Any = None) -> Any:
    options = {} if how is None else {"quantization_config": how}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def outcome(action: Callable[[], bool | None]) -> str:
    """``yes``, ``wrong``, ``refused`` (an error of ours), or the error of another library."""
    try:
        return "wrong" if action() is False else "yes"
    except PyroLoraError:
        return "refused"
    except Exception as error:
        return type(error).__name__


def row(folder: str, how: Callable[[], Any], guide: guides.Guide) -> dict[str, str]:
    """The outcome of each verb."""
    made: list[pyrolora.Posterior] = []
    scratch = tempfile.mkdtemp()
    config = AdapterConfig(r=2, target_modules="all-linear")

    def fit() -> bool:
        arguments = short_training(
            scratch, torch.device("cpu"), max_steps=8, per_device_train_batch_size=4
        )
        base = network(folder, how())
        made.append(pyrolora.fit(base, ROWS, guide, adapter=config, training=arguments))
        norms = made[0].bank.update_norms(made[0].model.program.mean())
        return bool((norms > 0).all())

    def same(other: pyrolora.Posterior, tolerance: float = 1e-4) -> bool:
        nll = [p.evaluate(ROWS, 2, seed=0)["nll"] for p in (other, made[0])]
        return abs(nll[0] - nll[1]) <= tolerance

    @torch.no_grad()
    def merged() -> bool:
        whole = made[0].merge(dequantize=True)
        joint = made[0].model
        with evaluating(joint):
            batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
            expected = joint.network(batch, joint.program.mean()).softmax(-1)
        return bool((whole(IDS).logits.softmax(-1) - expected).abs().max() < 2e-2)

    found = {"fit": outcome(fit)}
    if not made:
        return found
    posterior = made[0]
    found["predict"] = outcome(lambda: posterior.predict(ROWS, 2) and None)
    found["generate"] = outcome(
        lambda: posterior.generate([[5, 6, 7]], 2, max_new_tokens=3) and None
    )
    saved = f"{scratch}/saved"
    found["save"] = outcome(lambda: posterior.save(saved))
    found["load"] = outcome(lambda: same(pyrolora.load(saved)))
    found["load, not quantised"] = outcome(
        lambda: same(pyrolora.load(saved, network(folder)), tolerance=0.1)
    )
    found["to_peft"] = outcome(lambda: posterior.to_peft(f"{scratch}/peft"))
    found["merge, dequantize"] = outcome(merged)
    return found


def size(model: Any) -> int:
    return sum(t.numel() * t.element_size() for _, t in tensors(model, []))


def table(names: list[str], which: list[str]) -> pd.DataFrame:
    """A row per format and guide."""
    folder = tempfile.mkdtemp()
    transformers.set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().save_pretrained(folder)
    plain = size(network(folder))
    rows = []
    for name in tqdm(names):
        library, how = FORMATS[name]
        if importlib.util.find_spec(library.partition(".")[0]) is None:
            rows.append({"format": name, "guide": f"{library} is not installed"})
            continue
        share = size(network(folder, how())) / plain
        for guide in which:
            with redirect_stdout(StringIO()):
                found = row(folder, how, GUIDES[guide])
            rows.append({"format": name, "weights": f"{share:.2f}", "guide": guide, **found})
    return pd.DataFrame(rows).fillna("")


def alike(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for the guides of a format that have the same outcomes."""
    rest = [name for name in frame.columns if name != "guide"]
    joined = frame.groupby(rest, sort=False)["guide"].agg(", ".join).reset_index()
    return joined[["format", "weights", "guide", *rest[2:]]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--guides", nargs="+", choices=list(GUIDES), default=list(GUIDES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--write", type=Path, help="a page of documentation with the table")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("pyrolora").setLevel("ERROR")
    frame = table(args.formats, args.guides)
    show(frame)
    page, args.write = args.write, str(args.write or "")
    save_json(args.out / "quantised.json", {**provenance(args), "rows": frame.to_dict("records")})
    if page:
        page.write_text(START + markdown(alike(frame)))


if __name__ == "__main__":
    main()
