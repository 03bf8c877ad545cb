"""A program around another one forwards everything that a program can be asked for."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from pyrolora.adapters import AdapterBank, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.guides import FactorProgram, Flat, Guide, MonteCLoRA, Program, WrappingProgram
from pyrolora.guides.centred import CentredProgram

# Made of other methods of the same program, or of the options that it has.
DERIVED = {
    *("draw", "draws", "usual_draws", "sample_stored", "drawn", "replay", "traced"),
    *("options", "supports", "several_heads"),
}


def public(kind: type) -> set[str]:
    """Return the methods, properties and annotated attributes that a class itself defines."""
    names = {*vars(kind), *inspect.get_annotations(kind)}
    return {name for name in names if not name.startswith("_")}


def test_a_wrapping_program_forwards_every_method_and_flag() -> None:
    """Fails for a method or an attribute that is added to `Program` alone."""
    assert public(Program) >= DERIVED
    assert public(Program) - DERIVED <= public(WrappingProgram)


@pytest.mark.parametrize("kind", [CentredProgram, FactorProgram])
def test_subclasses_add_no_hook_that_others_call_without_forwarding_it(kind: type) -> None:
    """Their additions serve their subclasses."""
    inner = {"sizes", "centre", "prior_loc", "row_sizes", "width", "prior", "law", "loc", "in_rows"}
    inner |= {"learnt", "in_use", "normal_prior", "prior_scale", "units", "sites", "joint_law"}
    assert public(kind) - inner <= public(Program)


def test_flat_forwards_every_part_of_its_guide() -> None:
    made = {"build", "shapes", "name", "adapts", "head"}  # its own
    assert public(Guide) - made <= public(Flat)


class Wrapped(WrappingProgram):
    """A wrapping program with any capability."""

    options: Any = MagicMock()


def a_value(parameter: inspect.Parameter) -> Any:
    values: dict[str, Any] = {"rows": torch.ones(1, 2), "sites": {}, "previous": None}
    return values.get(parameter.name, 1)


@pytest.mark.parametrize(
    "name",
    sorted(n for n in public(Program) - DERIVED if inspect.isfunction(getattr(Program, n, None))),
)
def test_each_method_reaches_the_inner_program(name: str) -> None:
    inner = MonteCLoRA().build(AdapterBank([LayerSpec("layer", 3, 2, 2, 1.0)], AdapterConfig(r=2)))
    wrapped = Wrapped(inner)
    spy = MagicMock(return_value={} if name in ("rank_entries", "renew") else ["x"])
    setattr(inner, name, spy)
    arguments = list(inspect.signature(getattr(Program, name)).parameters.values())[1:]
    found = getattr(wrapped, name)(*map(a_value, arguments))
    spy.assert_called_once()
    if name == "scale_parameters":
        assert found == ["inner.x"]
    elif found is not None:
        assert found == spy.return_value


@pytest.mark.parametrize(
    "name",
    sorted(
        n for n in public(Program) - DERIVED - {"previous", "bank"}
        if not inspect.isfunction(getattr(Program, n, None))
    ),
)  # fmt: skip
def test_each_flag_is_that_of_the_inner_program(name: str) -> None:
    inner = MagicMock(spec=Program)
    wrapped = WrappingProgram.__new__(WrappingProgram)
    wrapped.__dict__["inner"] = inner
    value = object()
    setattr(type(inner), name, value)
    assert getattr(wrapped, name) is value


def test_progress_that_is_set_outside_is_seen_inside() -> None:
    program = Flat(inner=MonteCLoRA()).build(
        AdapterBank([LayerSpec("layer", 3, 2, 2, 1.0)], AdapterConfig(r=2))
    )
    program.progress = 0.25
    assert program.inner.progress == 0.25  # type: ignore[union-attr]
