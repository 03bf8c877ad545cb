"""An earlier posterior: its means stay (`Given`), or it is the prior (`Continued`)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Self

from torch import nn
from transformers import TrainingArguments

from pyrolora.adapters import Attachment
from pyrolora.data import Prepared
from pyrolora.data.labels import class_names_of
from pyrolora.errors import ConfigError
from pyrolora.fitting.first_pass import check_first_pass, mean_outputs
from pyrolora.fitting.origin import Builder, Origin, check_network
from pyrolora.fitting.request import Request
from pyrolora.guides import Guide
from pyrolora.inference import check_allocation
from pyrolora.model import JointModel, build
from pyrolora.posterior import Posterior
from pyrolora.storage import check_base
from pyrolora.tasks import load_network


@dataclass
class Earlier(Origin):
    """A posterior that brings its adapters, its heads and its task.

    Attributes
    ----------
    source
        That posterior; nothing in it changes.
    """

    source: Posterior

    def attach(self, data: Prepared, args: TrainingArguments) -> Attachment:
        return self.source.model.attachment.again()

    def builder(self, attachment: Attachment, data: Prepared, args: TrainingArguments) -> Builder:
        return partial(self._build, attachment, data.num_examples)

    def _build(self, attachment: Attachment, num_examples: int, guide: Guide) -> JointModel:
        task = copy.deepcopy(self.task)
        joint = build(self.network, attachment, self.config, guide, task, num_examples)
        joint.adopt(self.source.model)
        joint.freeze()
        joint.program.recentre()
        return joint


class Given(Earlier):
    """A posterior whose means and heads stay as they are; the guide adds their spread."""

    @classmethod
    def of(cls, request: Request) -> Self:
        source = request.given
        assert isinstance(source, Posterior)
        check_network(source.base)
        if not source.bank.specs:
            raise ConfigError(
                "full fine-tuning leaves no adapter to infer the spread of; fit the network "
                "posterior.base with a guide of your choice"
            )
        if source.model.program.members > 1:
            raise ConfigError(
                "an ensemble has no adapter of its own to give; export a member with "
                "to_peft(path, draw=k) and read it with from_peft"
            )
        tokenizer = source.tokenizer if request.tokenizer is None else request.tokenizer
        config, task = source.bank.config, copy.deepcopy(source.task)
        return cls(request.options, source.base, tokenizer, config, task, source)

    def _build(self, attachment: Attachment, num_examples: int, guide: Guide) -> JointModel:
        joint = super()._build(attachment, num_examples, guide)
        joint.task.load_state_dict(self.task.state_dict())  # which `ready` may have changed
        joint.task.requires_grad_(self.guide.supports.post_hoc == "trained")
        return joint

    def ready(
        self,
        joint: JointModel,
        data: Prepared,
        held_out: Prepared | None,
        args: TrainingArguments,
    ) -> None:
        check_first_pass(joint, data)
        if list(self.task.parameters()):
            assert data.labels is not None
            self.task.start(data.labels, mean_outputs(joint, data, args))
            joint.task.load_state_dict(self.task.state_dict())


class Continued(Earlier):
    """A posterior of earlier data, which becomes the prior of the latent factors."""

    @classmethod
    def of(cls, request: Request) -> Self:
        source = request.prior
        assert isinstance(source, Posterior)
        check_network(request.model)
        network, tokenizer = load_network(
            request.model, request.data, request.tokenizer, source.task, source.base
        )
        tokenizer = source.tokenizer if tokenizer is None else tokenizer
        config, task = source.bank.config, copy.deepcopy(source.task)
        return cls(request.options, network, tokenizer, config, task, source)

    def attach(self, data: Prepared, args: TrainingArguments) -> Attachment:
        if self.network is self.source.base:
            return super().attach(data, args)
        attachment = self.source.model.attachment
        heads = list(attachment.heads)
        check_base(self.network, heads, self.source.identity)
        self._check_classes(self.network)
        return Attachment(self.network, attachment.specs, heads)

    def _build(self, attachment: Attachment, num_examples: int, guide: Guide) -> JointModel:
        joint = super()._build(attachment, num_examples, guide)
        joint.task.requires_grad_(False)
        joint.program.succeed(self.source.model.program)
        return joint

    def ready(
        self,
        joint: JointModel,
        data: Prepared,
        held_out: Prepared | None,
        args: TrainingArguments,
    ) -> None:
        check_allocation(joint, held_out)
        check_first_pass(joint, data)

    def _check_classes(self, network: nn.Module) -> None:
        task = self.source.task
        names, known = class_names_of(network, task), class_names_of(self.source.base, task)
        if names and known and names != known:
            raise ConfigError(
                f"the network's classes are {list(names.values())}, and those of the earlier fit "
                f"{list(known.values())}; load it with id2label={known}"
            )
