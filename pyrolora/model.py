"""The joint Pyro model: base network, adapter bank, likelihood; and its guide."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters import (
    Attachment,
    Binding,
    FlatFactors,
    bind,
    check_eager,
    current_binding,
    is_quantised,
)
from pyrolora.errors import BindingError, CheckpointError, ConfigError
from pyrolora.guides import Program, averaged
from pyrolora.likelihoods import Likelihood
from pyrolora.parameters import param_statement
from pyrolora.seeding import DRAWING
from pyrolora.types import Batch

LABELS = "labels"
INPUTS = "inputs"


class JointModel(nn.Module):
    """p(y, θ | x): the prior of the guide's program over the adapters, then the likelihood of the
    network's output. A Pyro model: ``model(batch)`` works under ``SVI``, ``Predictive`` and NUTS.

    A plain module around the network: were the network a ``PyroModule``, every access to a frozen
    tensor would become a parameter statement.

    Parameters
    ----------
    base
        The network, with the layers of ``attachment`` wrapped.
    attachment
        The wrappers that receive the factors.
    program
        The latent part, with the bank.
    likelihood
        The law of the targets.
    num_examples
        n: the b examples of a batch are scaled by n / b.

    Attributes
    ----------
    trained_statistics
        The normalisations whose running statistics training changes.
    """

    def __init__(
        self,
        base: nn.Module,
        attachment: Attachment,
        program: Program,
        likelihood: Likelihood,
        num_examples: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.program = program
        self.likelihood = likelihood
        self.num_examples = num_examples
        self.attachment = attachment
        self._foreign = ("base.",) if program.bank.specs else ()
        self.heads = nn.ModuleDict(
            {
                _key(name): _copies(wrapper.base_layer, program.members)
                for name, wrapper in attachment.heads.items()
            }
        )
        self.heads.float().requires_grad_(True)
        of_base, of_heads = (_running_statistics(part) for part in (base, self.heads))
        self._frozen_statistics = of_base if program.bank.specs else []
        self.trained_statistics = of_heads if program.bank.specs else [*of_base, *of_heads]
        self._cacheless = "use_cache" in inspect.signature(base.forward).parameters

    def train(self, mode: bool = True) -> JointModel:
        """As of a module; but the running statistics of a network that gets adapters belong to its
        weights, and stay as they are."""
        super().train(mode)
        for module in self._frozen_statistics:
            module.eval()
        return self

    def forward(self, batch: Batch, kl_weight: float = 1.0) -> Tensor:
        """Run the model on one batch, a mapping with ``labels`` (or without: y is then sampled).

        ``kl_weight`` scales the prior alone; the default, 1, is the untempered joint density.
        """
        groups = self.program.groups(_rows(batch))
        with averaged("members", self.program.side_by_side()):
            with torch.autocast(_device_of(self).type, enabled=False):
                with averaged("groups", groups):
                    factors = self.program.model(kl_weight)
                for part, module in self._trained().items():
                    for name, parameter in module.named_parameters():
                        param_statement(f"{part}.{name}", parameter)
            if groups > 1:  # the rows are shared out, not repeated
                output = self.run(batch, self.binding(factors))
            else:
                output = self.network(batch, factors)
            return self.likelihood(output, batch, self.num_examples)

    def _trained(self) -> dict[str, nn.Module]:
        """What is trained beside the program: the heads, or, without adapters, the network."""
        return {"heads": self.heads} if self.program.bank.specs else {"base": self.base}

    def network(self, batch: Batch, factors: FlatFactors) -> Tensor:
        """The likelihood's view of the network's output under ``factors``: (b, ...), or
        (S, b, ...) for S draws, which are outermost in the batch."""
        draws = factors.draws
        if draws is not None:
            batch = {
                name: t.repeat(draws, *[1] * (t.dim() - 1)) if isinstance(t, Tensor) else t
                for name, t in batch.items()
            }
        output = self.run(batch, self.binding(factors))
        return output if draws is None else output.unflatten(0, (draws, -1))

    def run(self, batch: Batch, binding: Binding) -> Tensor:
        """The likelihood's view of the network's output on the rows of ``batch`` with ``binding``
        in its layers."""
        check_eager(self.base)
        own = {LABELS, *self.likelihood.extras}
        inputs = {name: tensor for name, tensor in batch.items() if name not in own}
        with bind(binding), DRAWING.callers_dtype():
            raw = self._call(inputs)
        if len(binding.used) < len(binding.factors):
            self._refuse(binding)
        return self.likelihood.output(raw)

    def named_heads(self, factors: FlatFactors | None = None) -> dict[str, list[nn.Module]]:
        """The posterior's copies of the task heads by their name in the network: one each, or one
        for each of the draws of ``factors``; the mean one for pooled draws."""
        heads: dict[str, Any] = {n: self.heads[_key(n)] for n in self.attachment.heads}
        if self.program.members == 1:
            return {name: [head] for name, head in heads.items()}
        assert factors is not None
        assert factors.members is not None
        chosen = factors.members.flatten().tolist()
        own = {name: [head[i] for i in chosen] for name, head in heads.items()}
        return {name: [_mean_of(h)] for name, h in own.items()} if factors.pooled else own

    def binding(self, factors: FlatFactors) -> Binding:
        """The binding of ``factors`` and of this posterior's heads."""
        if not self.attachment.attached:
            raise BindingError(
                "this posterior was detached from its network and cannot run it any more; "
                "load it again with pyrolora.load(path, model)"
            )
        device = _device_of(self)
        dtype = next((layer.weight for layer in self.attachment.layers.values()), factors.A).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        elif is_quantised(dtype):
            dtype = factors.A.dtype
        with torch.autocast(device.type, enabled=False):
            per_layer = self.program.bank.layer_factors(factors, dtype)
        return Binding(
            {self.attachment.layers[name]: value for name, value in per_layer.items()},
            {
                self.attachment.heads[name]: heads
                for name, heads in self.named_heads(factors).items()
            },
        )

    def _call(self, inputs: Mapping[str, Tensor]) -> Any:
        if set(inputs) == {INPUTS}:
            return self.base(inputs[INPUTS])
        if self._cacheless:
            return self.base(**inputs, use_cache=False)
        return self.base(**inputs)

    def _refuse(self, binding: Binding) -> None:
        """An adapter whose layer is not called does nothing."""
        unused = [n for n, layer in self.attachment.layers.items() if layer not in binding.used]
        raise BindingError(
            f"{len(unused)} adapted layer(s) were not called by the network, {unused[0]!r} "
            "first: its code reads their weights directly, or does not use them for this "
            "input; leave them out with exclude_modules"
        )

    # Checkpointing -----------------------------------------------------------------------------

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable activation (gradient) checkpointing in the network.

        Non-reentrant only. The recomputation runs when the binding of the forward pass has ended,
        on a GPU in another thread; ``context_fn`` carries the binding over to it.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ConfigError(
                "use_reentrant=True gives adapters inside the checkpointed layers no gradient; "
                "leave it out or pass use_reentrant=False"
            )
        options |= {"use_reentrant": False, "context_fn": _rebinding_contexts}
        method, keyword = _checkpointing_method(self.base)
        method(**{keyword: options}, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def activation_checkpointing_disable(self) -> None:
        """Switch activation checkpointing of the network off."""
        for prefix in ("activation", "gradient"):
            disable = getattr(self.base, f"{prefix}_checkpointing_disable", None)
            if disable is not None:
                disable()
                return

    # State -------------------------------------------------------------------------------------

    @torch.no_grad()
    def adopt(self, other: JointModel, member: int | None = None) -> None:
        """Take the means, the task heads and the likelihood of ``other``; with ``member`` they
        become that member's, and the likelihood stays."""
        if member is None:
            self.program.bank.load_state_dict(other.program.bank.state_dict())
            self.heads.load_state_dict(other.heads.state_dict())
            self.likelihood.load_state_dict(other.likelihood.state_dict())
            return
        for key, head in other.heads.items():
            self.heads.get_submodule(f"{key}.{member}").load_state_dict(head.state_dict())

    def align(self) -> None:
        """Move the posterior's own parts to where the network is: a later fit may have moved it."""
        device = next(self.base.parameters()).device
        for part in (self.program, self.heads, self.likelihood):
            part.to(device)

    def freeze(self) -> None:
        """Make constants of the means and the heads: what is left to infer is their spread."""
        self.program.bank.requires_grad_(False)
        self.heads.requires_grad_(False)

    def own_state(self) -> dict[str, Tensor]:
        """All tensors that belong to the posterior: adapters, heads, likelihood; not the base,
        unless it is what was trained."""
        return {name: tensor.detach().clone() for name, tensor in self._own()}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `own_state`; every tensor has to be there, in its shape."""
        own = dict(self._own())
        if set(own) != set(state):
            missing, foreign = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            raise CheckpointError(
                f"the saved tensors are not those of this model: missing {missing[:3]}, "
                f"unexpected {foreign[:3]}; were the adapter settings or the guide changed?"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"the saved tensor {name!r} has shape {tuple(state[name].shape)}, this model "
                    f"needs {tuple(tensor.shape)}; was it fitted on another network?"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        state: Mapping[str, Tensor] = self.state_dict()
        return ((name, t) for name, t in state.items() if not name.startswith(self._foreign))


class JointGuide(nn.Module):
    """q(θ): the guide of the program, with the signature of the model. Of the batch it looks at the
    size alone, and while training alone."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, batch: Batch | None = None, kl_weight: float = 1.0) -> None:
        """Sample the latent sites."""
        groups = 1 if batch is None else self.program.groups(_rows(batch))
        with (
            torch.autocast(_device_of(self).type, enabled=False),
            averaged("members", self.program.side_by_side()),
            averaged("groups", groups),
        ):
            self.program.guide(kl_weight)


def _running_statistics(module: nn.Module) -> list[nn.Module]:
    """The normalisations in ``module`` that keep running statistics of what they see, such as batch
    normalisation."""
    return [m for m in module.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; each submodule then has its own mode back."""
    trained = [child for child in module.modules() if child.training]
    if trained:
        module.eval()
    try:
        yield
    finally:
        for child in trained:
            child.training = True


def _rebinding_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), bind(current_binding())


def _checkpointing_method(base: Any) -> tuple[Callable[..., Any], str]:
    for prefix in ("activation", "gradient"):
        method = getattr(base, f"{prefix}_checkpointing_enable", None)
        if method is not None:
            return method, f"{prefix}_checkpointing_kwargs"
    raise ConfigError(f"{type(base).__name__} does not support activation checkpointing")


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _copies(head: nn.Module, members: int) -> nn.Module:
    copies = [copy.deepcopy(head) for _ in range(members)]
    return copies[0] if members == 1 else nn.ModuleList(copies)


def _mean_of(heads: Sequence[nn.Module]) -> nn.Module:
    """A head whose parameters are the means of those of ``heads``."""
    mean = copy.deepcopy(heads[0])
    with torch.no_grad():
        for parameter, *others in zip(
            mean.parameters(), *(h.parameters() for h in heads), strict=True
        ):
            parameter.copy_(torch.stack(others).mean(0))
    return mean


def _key(name: str) -> str:
    """A module name as a key of ``ModuleDict``, which takes no dots."""
    return name.replace(".", "-")
