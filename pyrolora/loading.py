"""From files and adapters to posteriors; and the joint model that both they and fits need."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from pyrolora.adapters import AdapterBank, Attachment, LayerSpec, Start, check_eager, plain_copy
from pyrolora.errors import CheckpointError
from pyrolora.guides import MAP, Guide, from_options
from pyrolora.inference import load_language_model
from pyrolora.likelihoods import Likelihood, likelihood_for
from pyrolora.model import JointModel
from pyrolora.posterior import Posterior
from pyrolora.seeding import DRAWING
from pyrolora.storage import check_base, load_base, read_adapter, read_folder
from pyrolora.types import AdapterConfig


def build(
    network: nn.Module,
    attachment: Attachment,
    config: AdapterConfig,
    guide: Guide,
    likelihood: Likelihood,
    num_examples: int,
    start: Start | None = None,
) -> JointModel:
    """The joint model of a network with its wrapped layers; everything eager, on its device."""
    bank = AdapterBank(attachment.specs, config, start)
    joint = JointModel(network, attachment, guide.build(bank), likelihood, num_examples)
    device = next(network.parameters()).device
    for part in (joint.program, joint.heads, joint.likelihood):
        part.to(device)
    return joint.eval()


@torch.inference_mode(False)
@DRAWING
def load(path: str | Path, model: str | Path | nn.Module | None = None) -> Posterior:
    """Load a posterior that `Posterior.save` wrote.

    Parameters
    ----------
    path
        The folder.
    model
        The network that it was fitted on, or the hub id or folder to load it from. None: from
        where it came at the time.

    Raises
    ------
    CheckpointError
        When the folder is damaged, or the network is another one.
    """
    if isinstance(model, nn.Module):
        check_eager(model)
    meta, state, tokens = read_folder(Path(path))
    attachment = None
    try:
        tokenizer = None
        if tokens is not None:
            tokenizer = AutoTokenizer.from_pretrained(tokens.resolve(), local_files_only=True)
        specs = [LayerSpec(**spec) for spec in meta["layers"]]
        heads, base = list(meta["heads"]), meta["base"]
        guide = from_options(meta["guide"]["name"], meta["guide"]["options"])
        config = AdapterConfig(**meta["adapter"])
        num_examples = operator.index(meta["num_examples"])
        history, settings = [dict(entry) for entry in meta["history"]], dict(meta["settings"])
        if bool(specs) != guide.adapts or num_examples < 1:
            raise ValueError("no layers, or no examples")
        network = model
        if not isinstance(network, nn.Module):
            name = base.get("name_or_path") if model is None else str(model)
            network = load_base({**base, "name_or_path": name})
        elif not guide.adapts:
            network = plain_copy(network)
        if guide.adapts:  # else every weight is in the file
            check_base(network, heads, base)
        likelihood = likelihood_for(network, meta["likelihood"])
        attachment = Attachment(network, specs, heads)
        joint = build(network, attachment, config, guide, likelihood, num_examples)
        if meta.get("prior") is not None:  # folders of earlier versions have no such entry
            joint.program.await_prior(from_options(meta["prior"]["name"], meta["prior"]["options"]))
            joint.align()
        joint.load_own_state(state)
    except BaseException as error:
        if attachment is not None:
            attachment.detach()
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{path} was edited or is incomplete ({type(error).__name__}: {error}); restore it "
            "from a copy"
        ) from error
    return Posterior(joint, guide, tokenizer=tokenizer, history=history, settings=settings)


@torch.inference_mode(False)
@DRAWING
def from_peft(
    path: str | Path,
    model: str | Path | nn.Module,
    *,
    likelihood: str | None = None,
    tokenizer: Any = None,
) -> Posterior:
    """A LoRA adapter that PEFT saved, as a posterior without width (``"map"``).

    ``fit(from_peft(...), data, guide="laplace")`` then infers how sure the adapter may be, without
    training it again.

    Parameters
    ----------
    path
        The adapter's folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
    model
        The network that it was trained on, with a task head of the same size; of a language model
        also its hub id or folder.
    likelihood
        A name from ``pyrolora.likelihoods.available()``; None: from the model's class.
    tokenizer
        For raw text; loaded with a model that is given by its name.

    Returns
    -------
    Posterior
        Its ``num_examples`` is 1: the data that the adapter was trained on are not known.

    Raises
    ------
    ConfigError
        For a variant of LoRA that pyrolora does not have, naming the option.
    CheckpointError
        When the files are damaged, or belong to another network.
    """
    if isinstance(model, nn.Module):
        check_eager(model)
        network = model
    else:
        network, tokenizer = load_language_model(str(model), tokenizer)
    law = likelihood_for(network, likelihood)
    adapter = read_adapter(path, network)
    attachment = Attachment(network, adapter.specs, list(adapter.heads))
    guide = MAP()
    try:
        joint = build(network, attachment, adapter.config, guide, law, num_examples=1)
        bank = joint.program.bank
        flat = bank.flattened(adapter.matrices)
        bank.assign("A_loc", flat.A)
        bank.assign("B_loc", flat.B)
        for name, (head,) in joint.named_heads().items():
            head.load_state_dict(adapter.heads[name])
    except BaseException:
        attachment.detach()
        raise
    network.eval()
    return Posterior(joint, guide, tokenizer=tokenizer)
