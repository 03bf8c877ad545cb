"""Wrap the target layers and the task head of a network, and put everything back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from pyrolora.adapters.compiled import keep_compiled, uncompile
from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.heads import find_heads
from pyrolora.adapters.kinds import is_quantised_layer
from pyrolora.adapters.layer import AdapterLayer, HeadSlot
from pyrolora.adapters.left_out import refuse_foreign
from pyrolora.adapters.modules import plain_parameters, walk
from pyrolora.adapters.new_weights import own_new_weights
from pyrolora.adapters.parameter_layer import ParameterLayer, ParameterSlot
from pyrolora.adapters.parameters import Place, places
from pyrolora.adapters.targets import LayerSpec, find_targets
from pyrolora.adapters.wrapper import Wrapper
from pyrolora.errors import TargetError

W = TypeVar("W", bound=Wrapper)


@dataclass
class _Shared:
    """State that the attachments of one network share: who uses it, and its gradient flags."""

    requires_grad: dict[str, bool]
    attachments: WeakSet[Attachment] = field(default_factory=WeakSet)


_networks: WeakKeyDictionary[nn.Module, _Shared] = WeakKeyDictionary()


class Attachment:
    """The wrappers that one posterior uses in a network.

    ``checked`` says whether it is known which of the layers the network calls.

    Several attachments share a network: a layer that two of them target is wrapped once, and stays
    wrapped until the last of them is detached. While one with adapters is attached, the network's
    own parameters take no gradient.
    """

    def __init__(self, network: nn.Module, specs: list[LayerSpec], heads: list[str]) -> None:
        refuse_foreign(network)
        for name in heads:
            network.get_submodule(name)
        # All of them are looked up before the first is wrapped.
        standing = places(network, [spec.name for spec in specs])
        _check_nesting(network, standing.values(), heads)
        shared = _networks.get(network)
        if shared is None:
            shared = _Shared({name: p.requires_grad for name, p in plain_parameters(network)})
            _networks[network] = shared
        self.network = network
        self.specs = specs
        self._modules: dict[str, Wrapper] = {}
        self.layers: dict[str, AdapterLayer | ParameterSlot] = {}
        self.heads: dict[str, HeadSlot] = {}
        self.attached = True
        self.checked = False
        self._requires_grad = shared.requires_grad
        shared.attachments.add(self)
        try:
            for name, place in standing.items():
                self.layers[name] = self._key(place)
            for name in heads:
                self.heads[name] = _wrap(network, name, HeadSlot)
            if specs:
                network.requires_grad_(False)
        except BaseException:  # an interruption, with some of the layers wrapped
            self.detach()
            raise

    def _key(self, place: Place) -> AdapterLayer | ParameterSlot:
        """Wrap the module at ``place``, and return the key of its factors in a binding."""
        if place.stack is None:
            layer = _wrap(self.network, place.module, AdapterLayer)
            self._modules[place.module] = layer
            return layer
        wrapper = self._modules.get(place.module)
        if not isinstance(wrapper, ParameterLayer):
            wrapper = _wrap(self.network, place.module, ParameterLayer)
            self._modules[place.module] = wrapper
        return wrapper.slot(place.stack, place.expert)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy (``copy.deepcopy``, pickle) as an attachment of the copied network."""
        self.__dict__.update(state)
        if self.attached:
            shared = _networks.setdefault(self.network, _Shared(self._requires_grad))
            shared.attachments.add(self)

    def again(self) -> Attachment:
        """Return another attachment of the same layers and heads, detached on its own."""
        return self.without(())

    def without(self, names: Collection[str]) -> Attachment:
        """Return another attachment without the layers of these names."""
        specs = [spec for spec in self.specs if spec.name not in names]
        attachment = Attachment(self.network, specs, list(self.heads))
        attachment.checked = self.checked
        return attachment

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """All wrappers by the name of the module that they wrap."""
        return {**self._modules, **self.heads}

    def detach(self) -> None:
        """Put the original modules back where no other attachment needs the wrapper."""
        if not self.attached:
            return
        self.attached = False
        shared = _networks.get(self.network)
        others: Iterable[Attachment] = ()
        if shared is not None:
            shared.attachments.discard(self)
            others = shared.attachments
        needed = {id(wrapper) for other in others for wrapper in other.wrappers.values()}
        if needed:
            for name, wrapper in self.wrappers.items():
                if id(wrapper) not in needed:
                    self.network.set_submodule(name, wrapper.base_layer)
            return
        unwrap(self.network)
        _networks.pop(self.network, None)
        for name, parameter in plain_parameters(self.network):
            parameter.requires_grad_(self._requires_grad[name])


def attach(network: nn.Module, config: AdapterConfig) -> Attachment:
    """Wrap the layers that ``config`` selects, the task head, and modules with new weights."""
    refuse_foreign(network)
    heads = find_heads(network, config)
    heads += own_new_weights(network, heads)
    return Attachment(network, find_targets(network, config, heads), heads)


@contextmanager
def explained_kernels(attachment: Attachment) -> Iterator[None]:
    """Turn errors of quantised layers whose library cannot run here into a `TargetError`."""
    layers = attachment.layers.items()
    quantised = {n: w.base_layer for n, w in layers if is_quantised_layer(w.base_layer)}
    try:
        yield
    except (AttributeError, ImportError, NotImplementedError) as error:
        if not quantised:
            raise
        name, layer = next(iter(quantised.items()))
        raise TargetError(
            f"a pass through the network fails ({type(error).__name__}: {error}), and layers such "
            f"as {name!r} are of the class {type(layer).__name__}: the library that multiplies "
            "with them has to be there; install it, or load the network without that quantisation"
        ) from error


def plain_copy(network: nn.Module) -> nn.Module:
    """Copy the network as it was before it was wrapped, with its gradient flags of that time."""
    copied, shared = copy.deepcopy(network), _networks.get(network)
    unwrap(copied)
    uncompile(copied)
    keep_compiled(copied, network)
    if shared is not None:
        for name, parameter in plain_parameters(copied):
            parameter.requires_grad_(shared.requires_grad[name])
    return copied


def unwrap(network: nn.Module) -> None:
    """Replace every wrapper of ours in ``network`` by the module that it wraps."""
    for name, module in list(walk(network)):
        if isinstance(module, Wrapper):
            network.set_submodule(name, module.base_layer)


def _check_nesting(network: nn.Module, targets: Iterable[Place], heads: list[str]) -> None:
    """Refuse an adapted layer that is a task head or lies in one: heads are owned whole.

    Nor may it lie in a module with adapted parameters, whose code runs on a copy of it.
    """
    present = {name: type(m) for name, m in walk(network) if isinstance(m, Wrapper)}
    owners = {place.module for place in targets if place.stack is not None}
    owners |= {name for name, kind in present.items() if kind is ParameterLayer}
    layers = {place.module for place in targets if place.stack is None}
    layers |= {name for name, kind in present.items() if kind is AdapterLayer}
    slots = {*heads, *(name for name, kind in present.items() if kind is HeadSlot)}
    for owner in owners:
        inside = [name for name in layers | owners if name.startswith(f"{owner}.")]
        if inside or owner in layers:
            raise TargetError(
                f"parameters of {owner!r} and {(inside or [owner])[0]!r} in it are adapted at "
                "once, and a layer can be adapted in one way; leave one of them out"
            )
    layers |= owners
    for slot in slots:
        for layer in layers:
            if layer == slot or layer.startswith(f"{slot}."):
                raise TargetError(
                    f"layer {layer!r} belongs to the task head {slot!r}: it is adapted by one "
                    "posterior of this network and owned as a head by another; detach() the "
                    "other one first"
                )


def _wrap(network: nn.Module, name: str, kind: type[W]) -> W:
    module = network.get_submodule(name)
    if isinstance(module, kind):
        return module
    wrapper = kind(module)
    wrapper.train(module.training)
    network.set_submodule(name, wrapper)
    return wrapper
