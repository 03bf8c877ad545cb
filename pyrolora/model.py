"""The joint Pyro model: base network, adapter bank, likelihood; and its guide."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters import (
    Attachment,
    Binding,
    FlatFactors,
    SharedPassError,
    Sharing,
    bind,
    check_eager,
    current_binding,
    is_quantised,
    is_quantised_layer,
    kind_of,
    layers_called,
    shares,
    sharing_of,
)
from pyrolora.columns import INPUTS, LABELS, Batch
from pyrolora.errors import BindingError, CheckpointError, ConfigError, listed
from pyrolora.guides import Program, averaged
from pyrolora.parameters import param_statement
from pyrolora.seeding import DRAWING
from pyrolora.tasks import Task

NOT_CALLED = (
    "the network does not call the adapted layer(s) {}: its code reads their weights directly, or "
    "does not use them for such inputs; leave them out with exclude_modules"
)


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
        task: Task,
        num_examples: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.program = program
        self.task = task
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
        self._quantised = [m for m in base.modules() if is_quantised_layer(m)]
        self._frozen_statistics = of_base if program.bank.specs else []
        self.trained_statistics = of_heads if program.bank.specs else [*of_base, *of_heads]
        encoders = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
        self._has_fastpath = any(isinstance(m, encoders) for m in base.modules())
        self._cacheless = "use_cache" in inspect.signature(base.forward).parameters

    def train(self, mode: bool = True) -> JointModel:
        """As of a module; but the running statistics of a network that gets adapters belong to its
        weights, and stay as they are, and quantised layers stay in training mode: it chooses their
        kernels, and in evaluation mode some repack their weights for good, for a product that has
        no gradient."""
        super().train(mode)
        for module in self._frozen_statistics:
            module.eval()
        for module in self._quantised:
            module.train()
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
            # Groups share the rows of the batch out; other draws have all of them each.
            run = self.shared_out if groups > 1 else self.network
            return self.task(run(batch, factors), batch, self.num_examples)

    def _trained(self) -> dict[str, nn.Module]:
        """What is trained beside the program: the heads, or, without adapters, the network."""
        return {"heads": self.heads} if self.program.bank.specs else {"base": self.base}

    def network(self, batch: Batch, factors: FlatFactors) -> Tensor:
        """The likelihood's view of the network's output under ``factors``: (b, ...), or
        (S, b, ...) for S draws, which share a pass where they can (`together`)."""
        draws = factors.draws
        if draws is None:
            return self.run(batch, self.binding(factors))
        if draws > 1 and self.together(batch):
            repeated = {
                name: t.repeat(draws, *[1] * (t.dim() - 1)) if isinstance(t, Tensor) else t
                for name, t in batch.items()
            }
            output = self._in_one_pass(repeated, factors)
            if output is not None:
                return output.unflatten(0, (draws, -1))
        return torch.stack([self.run(batch, self.binding(factors[s])) for s in range(draws)])

    def shared_out(self, batch: Batch, factors: FlatFactors) -> Tensor:
        """The same, (b, ...), with the rows of the batch in S equal blocks, one for each draw."""
        draws = factors.draws
        assert draws is not None
        if draws > 1 and self.together(batch):
            output = self._in_one_pass(batch, factors)
            if output is not None:
                return output
        size = _rows(batch) // draws
        blocks = [{n: t[s * size : (s + 1) * size] for n, t in batch.items()} for s in range(draws)]
        return torch.cat([self.run(own, self.binding(factors[s])) for s, own in enumerate(blocks)])

    def together(self, batch: Batch) -> bool:
        """Whether several draws can share a pass on data such as ``batch``: every adapted layer
        then sees rows that fall into equal blocks, draw after draw.

        So it is where examples are outermost in each layer's input. A network that turns its
        tensors round, projects a table that has no examples, or sends some rows to some layers is
        another function for such draws, and gets one draw in a pass. The first batch of each kind
        shows which it is (`adapters.shares`): the forward passes of 12 examples for a network and
        its adapted layers, whatever follows. Layers that were not called then, and numbers of rows
        that do not fit, end the sharing later on.
        """
        if not self.attachment.layers and self.program.members == 1:
            return True
        known, kind = self._sharing(), kind_of(self._inputs(batch))
        if known.possible and kind not in known.checked:
            plain = self.binding(self.program.mean())
            with evaluating(self):
                known.possible, called = shares(self.run, batch, plain, self.program.members > 1)
            known.checked.add(kind)
            known.seen |= self._names(called)
        return known.possible

    def fits(self, binding: Binding) -> bool:
        """Whether a pass that draws shared called no layer but those that were seen to allow it;
        if not, it was the last one."""
        known = self._sharing()
        known.possible &= self._names(binding.used) <= known.seen
        return known.possible

    def keep_apart(self) -> None:
        """Let each draw have a pass of its own from now on."""
        self._sharing().possible = False

    def _in_one_pass(self, batch: Batch, factors: FlatFactors) -> Tensor | None:
        """The output of draws that share a pass; None where it turns out that they cannot."""
        binding = self.binding(factors, _rows(batch))
        try:
            output = self.run(batch, binding)
        except SharedPassError:
            self.keep_apart()
            return None
        return output if self.fits(binding) else None

    def _sharing(self) -> Sharing:
        heads = self.attachment.heads if self.program.members > 1 else ()
        return sharing_of(self.base, self.attachment.layers, heads)

    def _names(self, layers: Set[nn.Module]) -> set[str]:
        return {name for name, layer in self.attachment.layers.items() if layer in layers}

    def run(self, batch: Batch, binding: Binding) -> Tensor:
        """The likelihood's view of the network's output on the rows of ``batch`` with ``binding``
        in its layers."""
        check_eager(self.base)
        with self.bound(binding):
            raw = self._call(self._inputs(batch))
        if len(binding.used) < len(binding.factors) and not self._may_leave_out():
            self._warn_of_uncalled(binding)
        return self.task.output(raw)

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

    def binding(self, factors: FlatFactors, rows: int = 1) -> Binding:
        """The binding of ``factors`` and of this posterior's heads; ``rows`` are those of a pass
        that several draws share."""
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
            rows=rows,
        )

    def uncalled(self, batches: Iterable[Batch]) -> list[str]:
        """The adapted layers that the network, in evaluation mode, calls for none of the batches;
        no more of them are read than are needed."""
        left = set(self.attachment.layers)
        with evaluating(self), torch.no_grad():
            for batch in batches:
                binding = self.binding(self.program.mean())
                with self.bound(binding):
                    self._call(self._inputs(batch))
                left -= self._names(binding.used)
                if not left:
                    break
        return [name for name in self.attachment.layers if name in left]

    @contextmanager
    def bound(self, binding: Binding) -> Iterator[None]:
        """Bind for the block, in which the network runs: its code calls its layers (torch's fast
        path for ``nn.TransformerEncoder`` would read their weights), and has torch's default dtype
        as the caller set it."""
        calls = layers_called() if self._has_fastpath else nullcontext()
        with bind(binding), calls, DRAWING.callers_dtype():
            yield

    def _may_leave_out(self) -> bool:
        """Training may leave layers out by chance (layerdrop); others have been looked at."""
        return self.base.training or self.attachment.checked

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The columns that the network is given."""
        own = {LABELS, *self.task.extras}
        return {name: tensor for name, tensor in batch.items() if name not in own}

    def _call(self, inputs: Mapping[str, Tensor]) -> Any:
        if set(inputs) == {INPUTS}:
            return self.base(inputs[INPUTS])
        if self._cacheless:
            return self.base(**inputs, use_cache=False)
        return self.base(**inputs)

    def _warn_of_uncalled(self, binding: Binding) -> None:
        """Once for layers of which nobody has seen whether the network calls them: an adapter whose
        layer is not called does nothing."""
        self.attachment.checked = True
        names = self._names(binding.factors.keys() - binding.used)
        if len(names) == len(binding.factors):
            raise BindingError(NOT_CALLED.format(listed(sorted(names))))
        warnings.warn(
            f"{NOT_CALLED.format(listed(sorted(names)))}: these adapters do nothing here",
            UserWarning,
            stacklevel=2,
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
            self.task.load_state_dict(other.task.state_dict())
            return
        for key, head in other.heads.items():
            self.heads.get_submodule(f"{key}.{member}").load_state_dict(head.state_dict())

    def align(self) -> None:
        """Move the posterior's own parts to where the network is: a later fit may have moved it."""
        device = next(self.base.parameters()).device
        for part in (self.program, self.heads, self.task):
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
        self.check_own_state(state)
        with torch.no_grad():
            for name, tensor in self._own():
                tensor.copy_(state[name])

    def check_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise `CheckpointError` unless the tensors, of which the values are not looked at, are
        those of `own_state` by name, shape and dtype; a network's own weights may be in another
        precision."""
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
            found = state[name].dtype
            cast = name.startswith("base.") and found.is_floating_point
            if found != tensor.dtype and not (cast and tensor.is_floating_point()):
                raise CheckpointError(
                    f"the saved tensor {name!r} holds {found}, this model needs {tensor.dtype}"
                )

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """The base is not asked for its state: bitsandbytes then unpacks 4-bit weights in place,
        and rounds their scales."""
        for part, module in self._modules.items():
            if module is not None and f"{part}." not in self._foreign:
                for name, tensor in module.state_dict().items():
                    yield f"{part}.{name}", tensor


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
    if not all(map(is_quantised_layer, trained)):
        module.eval()
        for child in filter(is_quantised_layer, trained):
            child.train()  # see `JointModel.train`
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
