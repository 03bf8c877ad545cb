"""Matrices that are parameters of modules other than linear layers: fused experts, routers.

PEFT adapts them by ``target_parameters``, and so does this package, with PEFT's rules for names and
for shapes (``ParamWrapper`` in ``peft/tuners/lora/layer.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.kinds import is_dense, is_linear
from pyrolora.adapters.left_out import nearest
from pyrolora.adapters.modules import plain_parameters, walk
from pyrolora.adapters.names import ends_with
from pyrolora.adapters.wrapper import Wrapper, unwrapped
from pyrolora.errors import TargetError, listed

WEIGHT = "weight"


@dataclass(frozen=True)
class Stack:
    """One parameter of a module: a matrix (out, in), or one matrix per expert.

    Attributes
    ----------
    module, parameter
        Name of the module in the network, and of the parameter in the module.
    experts
        E of a parameter (E, out, in); None for a single matrix (out, in).
    in_features, out_features
        Sizes of each matrix.
    transposed
        Whether the parameter is (E, in, out): the module's ``is_transposed`` says so.
    """

    module: str
    parameter: str
    experts: int | None
    in_features: int
    out_features: int
    transposed: bool

    @property
    def name(self) -> str:
        """The name of the parameter in the network."""
        return f"{self.module}.{self.parameter}"

    @property
    def size(self) -> tuple[int, int]:
        """Sizes (in, out) of each matrix."""
        return self.in_features, self.out_features

    @property
    def names(self) -> list[str]:
        """Names of the matrices: that of the parameter, with the number of the expert."""
        if self.experts is None:
            return [self.name]
        return [f"{self.name}.{expert}" for expert in range(self.experts)]


@dataclass(frozen=True)
class Place:
    """The place of an adapter: a layer, or a matrix in a parameter of a module."""

    module: str
    stack: Stack | None = None
    expert: int | None = None

    @property
    def parameter(self) -> str:
        """The name in the module of the parameter that is adapted."""
        return WEIGHT if self.stack is None else self.stack.parameter


def stacks(network: nn.Module, wanted: Iterable[str]) -> dict[str, Stack]:
    """Return name -> parameter for those that ``wanted`` names, as PEFT selects them.

    An entry is a parameter's name, or the end of it after a dot. The weights of linear layers are
    left out: these are layers.

    Raises
    ------
    TargetError
        For a parameter of another number of dimensions than two or three, one that is quantised,
        one of the network itself, and one of a module whose ``forward`` was replaced.
    """
    entries = list(wanted)
    found = {}
    modules = dict(walk(network)) if entries else {}
    for name, parameter in plain_parameters(network) if entries else ():
        module, _, own = name.rpartition(".")
        owner = unwrapped(modules[module])
        if ends_with(name, entries) and not (is_linear(owner) and own == WEIGHT):
            found[name] = _stack(owner, module, own, parameter)
    return found


def named_parameters(
    network: nn.Module, config: AdapterConfig, heads: Sequence[str]
) -> tuple[dict[str, Stack], list[str]]:
    """Return the parameters that ``target_parameters`` names, and the linear layers whose weight.

    Raises
    ------
    TargetError
        For an entry that names no parameter, or one of a task head, which is trained in full.
    """
    entries = config.target_parameters or []
    every = [name for name, _ in plain_parameters(network)] if entries else []
    for entry in entries:
        named = [name for name in every if ends_with(name, [entry])]
        if not named:
            hint = nearest(entry.rpartition(".")[2], every)
            raise TargetError(
                f"target_parameters names {entry!r}, and {type(network).__name__} has no such "
                f"parameter{hint}; write the names as the network has them"
            )
        if any(name.startswith(f"{head}.") for name in named for head in heads):
            raise TargetError(
                f"target_parameters names {entry!r}, a parameter of a task head, which is trained "
                "in full (see modules_to_save); leave it out"
            )
    found = stacks(network, entries)
    weights = [n.rpartition(".")[0] for n in every if ends_with(n, entries) and n not in found]
    return found, weights


def places(network: nn.Module, names: Sequence[str]) -> dict[str, Place]:
    """Return where each name of an adapted matrix stands in the network.

    Raises
    ------
    TargetError
        For a name that the network does not have, and a stack without some of its experts.
    """
    modules = {name for name, _ in walk(network)}
    others = [name for name in names if name not in modules]
    parameters = {name for name, _ in plain_parameters(network)} if others else set()
    inside = stacks(network, {n if n in parameters else _parameter(n) for n in others})
    matrices = {
        name: Place(stack.module, stack, None if stack.experts is None else expert)
        for stack in inside.values()
        for expert, name in enumerate(stack.names)
    }
    missing = [name for name in others if name not in matrices]
    missing += [*(matrices.keys() - {*others})]
    if missing:
        raise TargetError(
            f"{type(network).__name__} has no linear layer and no parameter {listed(missing)}, or "
            "the adapter has not; pass the network that it was made for"
        )
    return {name: matrices.get(name) or Place(name) for name in names}


def _parameter(name: str) -> str:
    """Return the name without the number of an expert."""
    before, _, last = name.rpartition(".")
    return before if last.isdigit() else name


def _stack(owner: nn.Module, module: str, own: str, parameter: Tensor) -> Stack:
    _check(owner, module, own, parameter)
    transposed = parameter.dim() == 3 and bool(getattr(owner, "is_transposed", False))
    experts = parameter.shape[0] if parameter.dim() == 3 else None
    first, second = parameter.shape[-2:]
    sizes = (first, second) if transposed else (second, first)
    return Stack(module, own, experts, *sizes, transposed=transposed)


def _check(owner: nn.Module, module: str, own: str, parameter: Tensor) -> None:
    kind = type(owner).__name__
    if not module:
        raise TargetError(
            f"target_parameters names {own!r}, a parameter of the network itself, which no wrapper "
            "can stand in for (nor can PEFT's); name parameters of its modules"
        )
    if parameter.dim() not in (2, 3) or not is_dense(parameter):
        raise TargetError(
            f"target_parameters adapts matrices, and stacks of them, in 16 bits or more; {own!r} "
            f"of {module!r} (a {kind}) has the shape {tuple(parameter.shape)} and the dtype "
            f"{parameter.dtype}; leave it out, or load the network without that quantisation"
        )
    if "forward" in owner.__dict__ and not isinstance(owner, Wrapper):
        raise TargetError(
            f"the forward of {module!r} (a {kind}) was replaced, by a kernel or a hook, and reads "
            f"its own {own!r} whatever an adapter says; load the network without it"
        )
