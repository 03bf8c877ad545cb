"""From folders to posteriors: those that were saved, and adapters of PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters import (
    Attachment,
    LayerSpec,
    bare,
    features,
    plain_copy,
    refuse_foreign,
    unwrapped,
)
from pyrolora.adapters.modules import adaptable_layers
from pyrolora.adapters.new_weights import own_new_weights
from pyrolora.adapters.other_kinds import is_embedding
from pyrolora.adapters.parameters import Place, places
from pyrolora.attaching import attached
from pyrolora.checks import true_or_false
from pyrolora.errors import CheckpointError, TargetError
from pyrolora.guides import MAP, Guide, full_name
from pyrolora.model import JointModel, build
from pyrolora.parameters import ParamModule
from pyrolora.peft import Adapter, read_adapter
from pyrolora.posterior import Posterior
from pyrolora.seeding import seeded
from pyrolora.storage import (
    Description,
    Saved,
    check_base,
    load_base,
    located,
    read_folder,
)
from pyrolora.tasks import Task, load_language_model, task_for


@torch.inference_mode(False)
@seeded(0)  # what is made before it is read leaves the process's random numbers alone
def load(
    path: str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Posterior:
    """Load a posterior that `Posterior.save` or `Posterior.push_to_hub` wrote.

    The folder is data: nothing in it is run, whoever wrote it (SECURITY.md says what it can do).

    Parameters
    ----------
    path
        The folder; or the hub's repository, ``"owner/name"``, of which the posterior's files are
        fetched into the hub's cache. A folder of that name wins.
    model
        The network that it was fitted on, or the hub id or folder to load it from. None: it is
        loaded from where it came from at the fit, from safetensors alone.
    revision, token
        Of a repository: its branch, tag or commit, and the access token for a private one. They
        are the posterior's, and not the network's.
    trust_remote_code
        Let network and tokenizer be of classes whose code lies beside their files, and run it. Only
        this argument allows it, nothing in a file.

    Raises
    ------
    CheckpointError
        When the folder is damaged, or the network is another one. A network that was passed is
        then left as it was.
    ConfigError
        For a ``revision`` or ``token`` of what is a folder.
    """
    true_or_false("trust_remote_code", trust_remote_code)
    if isinstance(model, nn.Module):
        network = bare(model)
        refuse_foreign(network)
        model = network
    saved = read_folder(located(path, revision=revision, token=token))
    description = saved.description
    try:
        _check_sizes(description, saved.tensors.declared)
        tokenizer = saved.tokenizer(trust_remote_code=trust_remote_code)
        network = _network(description, model, trust_remote_code)
        with attached(network, partial(_attached, description, network)) as attachment:
            joint = _joint(saved, attachment)
    except Exception as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} was edited or is incomplete ({type(error).__name__}: {error}); restore it "
            "from a copy"
        ) from error
    return Posterior(
        joint,
        description.guide,
        tokenizer=tokenizer,
        history=description.history,
        settings=description.settings,
        identity=description.base,
        temperature=description.temperature,
    )


def _network(
    description: Description, model: str | Path | nn.Module | None, trust_remote_code: bool
) -> nn.Module:
    """Return the network that was passed or is loaded; a copy, if the file has all its weights."""
    if isinstance(model, nn.Module):
        return model if description.guide.adapts else plain_copy(model)
    name = None if model is None else str(model)
    return load_base(description.base, name, trust_remote_code=trust_remote_code)


def _attached(description: Description, network: nn.Module) -> Attachment:
    """Wrap the layers and heads that a description names, in the network that it describes."""
    check_base(network, description.heads, description.base)
    _check_layers(description.specs, network)
    return Attachment(network, description.specs, description.heads)


def _joint(saved: Saved, attachment: Attachment) -> JointModel:
    """Build the joint model of a saved posterior, with its tensors."""
    description, network = saved.description, attachment.network
    task = task_for(network, description.task)
    task.class_names, task.texts = description.classes, description.texts
    joint = build(
        network,
        attachment,
        description.config,
        description.guide,
        task,
        description.num_examples,
    )
    if description.prior is not None:
        joint.program.succeed(description.prior)
        joint.align()
    joint.program.reserve()
    joint.check_own_state(saved.tensors.declared)
    joint.load_own_state(saved.state())
    _check_values(joint)
    return joint


def _check_sizes(description: Description, declared: Mapping[str, Tensor]) -> None:
    """Compare the sizes in the description with those of the stored tensors.

    No tensor of such a size has been made yet.
    """
    stored = {
        name.removeprefix("program."): tuple(tensor.shape)
        for name, tensor in declared.items()
        if name.startswith("program.")
    }
    _check_program(description.guide, description, stored)
    if description.prior is not None:
        guide, prefix = description.prior, "previous."
        inner: Any = description.guide
        while (inner := getattr(inner, "inner", None)) is not None:
            prefix = f"inner.{prefix}"
        _check_program(guide, description, _below(prefix, stored))


def _check_program(
    guide: Guide, description: Description, stored: Mapping[str, tuple[int, ...]]
) -> None:
    inner = getattr(guide, "inner", None)
    if inner is not None:
        _check_program(inner, description, _below("inner.", stored))
    for name, shape in guide.shapes(description.specs, description.config).items():
        if name not in stored:
            raise CheckpointError(
                f"the saved tensors are not those of this guide, {full_name(guide)!r}: missing "
                f"{name!r}; were the adapter settings or the guide changed?"
            )
        if stored[name] != shape:
            raise CheckpointError(
                f"the saved tensor {name!r} has shape {stored[name]}, and by the description of "
                f"guide and layers it is {shape}; were they changed?"
            )


def _below(prefix: str, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    names = [name for name in stored if name.startswith(prefix)]
    return {name.removeprefix(prefix): stored[name] for name in names}


def _places(specs: Iterable[LayerSpec], network: nn.Module) -> Mapping[str, Place]:
    try:
        return places(network, [spec.name for spec in specs])
    except TargetError as error:
        raise CheckpointError(f"the posterior adapts what this network has not: {error}") from error


def _check_layers(specs: Sequence[LayerSpec], network: nn.Module) -> None:
    layers = adaptable_layers(network)
    standing = _places(specs, network)
    shapes: dict[str, tuple[int, float]] = {}
    for spec in specs:
        stack = standing[spec.name].stack
        shape = (spec.rank, spec.scaling)
        if stack is not None and shapes.setdefault(stack.name, shape) != shape:
            raise CheckpointError(
                f"the experts of {stack.name!r} have adapters of one rank and scaling, and that of "
                f"{spec.name!r} has others; the posterior was edited: restore it from a copy"
            )
        if stack is None and spec.name not in layers:
            raise CheckpointError(
                f"this {type(network).__name__} has no linear layer {spec.name!r}, which the "
                "posterior adapts; load the model that it was fitted on"
            )
        lookup = stack is None and is_embedding(unwrapped(layers[spec.name]))
        if spec.lookup is not lookup:
            raise CheckpointError(
                f"the layer {spec.name!r} has lookup={lookup}, and in the posterior {spec.lookup}; "
                "it was edited: restore it from a copy"
            )
        size = features(layers[spec.name]) if stack is None else stack.size
        if size != (spec.in_features, spec.out_features):
            raise CheckpointError(
                f"the layer {spec.name!r} maps {size[0]} to {size[1]} features, and in the "
                f"posterior {spec.in_features} to {spec.out_features}; load the model that it was "
                "fitted on"
            )


@torch.no_grad()
def _check_values(joint: JointModel) -> None:
    """Refuse values that a parameter cannot have, and such that give no finite adapter."""
    for name, module in joint.named_modules():
        outside = module.outside() if isinstance(module, ParamModule) else []
        if outside:
            raise CheckpointError(
                f"the saved tensor {f'{name}.{outside[0]}'!r} has values that it cannot have; it "
                "was edited: restore it from a copy"
            )
    for name, tensor in joint.own_state().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"the tensor {name!r} is too large for {tensor.dtype}")
    for statistics in (m for m in joint.modules() if isinstance(m, nn.modules.batchnorm._NormBase)):
        if statistics.running_var is not None and (statistics.running_var < 0).any():
            raise CheckpointError("a saved running variance is negative; restore it from a copy")
    program = joint.program
    if not program.bank.specs:
        return
    with seeded(0):
        for factors in (program.mean(), program.factors(program.draw(1))):
            if not all(torch.isfinite(t).all() for t in (factors.A, factors.B)):
                raise CheckpointError(
                    "the saved tensors are finite, and the adapters made from them are not; they "
                    "were edited: restore them from a copy"
                )


@torch.inference_mode(False)
@seeded(0)  # what is made before it is read leaves the process's random numbers alone
def from_peft(
    path: str | Path,
    model: str | Path | nn.Module,
    *,
    task: str | Task | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Posterior:
    """Read a LoRA adapter that PEFT saved, as a posterior without width (``"map"``).

    ``fit(from_peft(...), data, guide="laplace")`` then infers the uncertainty of the adapter
    without training it again.

    Parameters
    ----------
    path
        The adapter's folder: ``adapter_config.json`` and ``adapter_model.safetensors``.
    model
        The network that it was trained on, with a task head of the same size; for a language model
        also a hub id or folder.
    task
        A name from ``pyrolora.tasks.available()``, or a `Task`; None: from the model's class.
    tokenizer
        The tokenizer for raw text; with the hub id or folder of a model it is loaded.
    trust_remote_code
        Let a model that is loaded be of a class whose code lies beside its files, and run it. The
        adapter's folder is data, and brings no code.

    Returns
    -------
    Posterior
        Its ``num_examples`` is 1: the data that the adapter was trained on are unknown.

    Raises
    ------
    ConfigError
        For a variant of LoRA that pyrolora does not have, naming the option.
    CheckpointError
        When the files are damaged, or belong to another network.
    """
    true_or_false("trust_remote_code", trust_remote_code)
    if isinstance(model, nn.Module):
        network = bare(model)
    else:
        network, tokenizer = load_language_model(
            str(model), tokenizer, trust_remote_code=trust_remote_code
        )
    law = task_for(network, task)
    adapter = read_adapter(path, network)
    with attached(network, partial(_attached_as_peft, adapter, network)) as attachment:
        joint = build(network, attachment, adapter.config, MAP(), law, num_examples=1)
        bank = joint.program.bank
        flat = bank.flattened(adapter.matrices)
        bank.assign("A_loc", flat.A)
        bank.assign("B_loc", flat.B)
        for name, (head,) in joint.named_heads().items():
            if name in adapter.heads:
                head.load_state_dict(adapter.heads[name])
        _check_values(joint)
        network.eval()
    return Posterior(joint, MAP(), tokenizer=tokenizer)


def _attached_as_peft(adapter: Adapter, network: nn.Module) -> Attachment:
    """Wrap the layers and heads of an adapter, and the modules that no checkpoint had."""
    heads = [*adapter.heads, *own_new_weights(network, adapter.heads)]
    return Attachment(network, adapter.specs, heads)
