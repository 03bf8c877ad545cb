"""A fresh network: it gets new adapters, or is trained itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, Self

from torch import Tensor, nn
from transformers import TrainingArguments

from pyrolora import defaults
from pyrolora.adapters import (
    Attachment,
    Start,
    as_adapter_config,
    attach,
    check_uncalled,
    explained_kernels,
    plain_copy,
    start_of,
)
from pyrolora.adapters.config import AdapterConfig
from pyrolora.attaching import attached
from pyrolora.data import Prepared, to_device
from pyrolora.data.examples import first_row
from pyrolora.errors import ConfigError
from pyrolora.fitting.first_pass import check_first_pass, weight_gradients_of
from pyrolora.fitting.origin import Builder, Origin, check_network
from pyrolora.fitting.request import Request
from pyrolora.guides import MAP, Guide
from pyrolora.inference import check_allocation
from pyrolora.inference.reading import explained_pass
from pyrolora.model import JointModel, build
from pyrolora.seeding import seeded
from pyrolora.tasks import load_for_task, task_for


class Fresh(Origin):
    """A network and new adapters; with a guide that does not adapt, a copy that is trained."""

    @classmethod
    def of(cls, request: Request) -> Self:
        check_network(request.model)
        network, tokenizer, named = load_for_task(
            request.model, request.data, request.tokenizer, request.task
        )
        config = AdapterConfig()
        if request.options.adapts:
            config = as_adapter_config(request.adapter)
        else:
            network = _trained_copy(network)
        row = first_row(request.data, network) if named is None else None
        task = task_for(network, named, row)
        return cls(request.options, network, tokenizer, config, task)

    def attach(self, data: Prepared, args: TrainingArguments) -> Attachment:
        assert data.labels is not None
        self.task.start(data.labels)
        if not self.guide.adapts:
            return Attachment(self.network, [], [])
        with attached(self.network, partial(attach, self.network, self.config)) as attachment:
            uncalled = self._uncalled(attachment, data, args)
            called = attachment
            if uncalled:
                check_uncalled(self.config, uncalled, [spec.name for spec in attachment.specs])
                called = attachment.without(uncalled)
                attachment.detach()
            called.checked = True
            return called

    def builder(self, attachment: Attachment, data: Prepared, args: TrainingArguments) -> Builder:
        def gradients(read: Callable[[str, Tensor], Any]) -> dict[str, Any]:
            joint = self._build(attachment, len(data), None, MAP())
            return weight_gradients_of(joint, data, args, read)

        layers = {n: layer.base_layer for n, layer in attachment.layers.items()}
        init = self.config.init_lora_weights
        start = start_of(layers, attachment.specs, init, gradients)
        return partial(self._build, attachment, data.num_examples, start)

    def ready(
        self,
        joint: JointModel,
        data: Prepared,
        held_out: Prepared | None,
        args: TrainingArguments,
    ) -> None:
        check_allocation(joint, held_out)
        check_first_pass(joint, data, untrained=True)

    def _build(
        self, attachment: Attachment, num_examples: int, start: Start | None, guide: Guide
    ) -> JointModel:
        task = copy.deepcopy(self.task)
        return build(self.network, attachment, self.config, guide, task, num_examples, start)

    def _uncalled(
        self, attachment: Attachment, data: Prepared, args: TrainingArguments
    ) -> list[str]:
        """Return the layers that the network does not call for the first examples.

        Two examples are enough, unless a layer is left that others could call.
        """
        with seeded(args.seed):  # leaves the process's random numbers to the fit itself
            joint = self._build(attachment, len(data), None, MAP())
        device = next(joint.parameters()).device
        pieces = ((0, 2), (2, defaults.CALL_EXAMPLES))
        examples = ([data.examples[i] for i in range(a, min(b, len(data)))] for a, b in pieces)
        batches = (to_device(data.collate(some), device) for some in examples if some)
        first = next(batches)
        with explained_kernels(attachment), explained_pass(self.network, first):
            return joint.uncalled(chain([first], batches))


def _trained_copy(network: nn.Module) -> nn.Module:
    """Copy a network whose weights are trained; raise `ConfigError` where they cannot be."""
    if getattr(network, "is_quantized", False):
        raise ConfigError(
            f"this {type(network).__name__} is quantised, and its weights take no gradient; load "
            "it without a quantisation_config, or choose a guide with adapters"
        )
    copied = plain_copy(network)
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        raise ConfigError(
            f"no weight of this {type(network).__name__} takes a gradient, and full fine-tuning "
            "trains those that do; call model.requires_grad_(True)"
        )
    return copied
