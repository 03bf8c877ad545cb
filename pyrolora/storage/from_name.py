"""The base network of a saved posterior, loaded again; nothing in a file chooses code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pyrolora.errors import CheckpointError
from pyrolora.files import read_strict_json, shown
from pyrolora.storage.base import DTYPES, QUANTISATION
from pyrolora.storage.configuration import restore
from pyrolora.storage.digest import quantised_layers

QUANTISERS = ("bitsandbytes", "torchao", "quanto", "hqq")  # whose settings are plain values
PASS_IT = (
    "pass the network, or the folder that its save_pretrained(folder) wrote, as model=: "
    "pyrolora.load(path, model)"
)


def load_base(
    description: Mapping[str, Any], name: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the network of a description, which has passed `check_description`.

    Nothing in the description chooses code: the class is looked up in the list of transformers'
    Auto classes, and the configuration is the one of the network's folder, with values of the saved
    one for names that it has (`configuration.restore`). Weights are read from safetensors alone
    where the description says where from, and quantised as the posterior's network was, by the
    methods of `QUANTISERS`.

    Parameters
    ----------
    name
        The hub id or folder that the caller named. None: the one in the description.
    trust_remote_code
        Run the code in the network's folder, for a class that is none of transformers'.

    Raises
    ------
    CheckpointError
        When it cannot be loaded so; the message says what to pass.
    """
    place, kind = name or description["name_or_path"], description["class"]
    if not place or not description["config"]:
        raise CheckpointError(
            f"the posterior's network, a {kind}, was built or changed in memory and has no hub id "
            f"or folder to come back from; {PASS_IT}"
        )
    how = description.get(QUANTISATION, {})
    known = how.get("quant_method") in QUANTISERS
    if name is None and quantised_layers(description["weights"]) and not known:
        raise CheckpointError(
            f"the posterior's network, a {kind} ({place}), is quantised, and not by a method that "
            f"a posterior can name ({', '.join(QUANTISERS)}); load it with its "
            f"quantization_config and {PASS_IT}"
        )
    try:
        with _quiet():  # transformers reports a missing head: the posterior brings its own
            loader = _class(kind, place, trust_remote_code)
            config = _configuration(loader, place, description, name is None)
            options: dict[str, Any] = {"use_safetensors": True} if name is None else {}
            if known and getattr(config, "quantization_config", None) is None:
                options["quantization_config"] = AutoQuantizationConfig.from_dict(dict(how))
            network: PreTrainedModel = loader.from_pretrained(
                place,
                config=config,
                dtype=DTYPES[description["dtype"]],
                trust_remote_code=trust_remote_code,
                weights_only=True,
                **options,
            )
    except CheckpointError:
        raise
    except Exception as error:  # configuration, files and code are not ours
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        here = "" if os.path.isdir(place) else f"; there is no such folder in {Path.cwd()} either"
        raise CheckpointError(
            f"cannot load the posterior's network, a {kind}, from {place!r} ({reason:.300}{here}); "
            f"{PASS_IT}"
        ) from error
    return network


@cache
def _classes() -> frozenset[str]:
    """Return the names of the classes that transformers registers for its Auto classes."""
    mappings = [m for name, m in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    values = [value for mapping in mappings for value in mapping.values()]
    return frozenset(n for value in values for n in ([value] if isinstance(value, str) else value))


def _class(kind: str, place: str, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return the class of a name: transformers', or the folder's, if the caller trusts it."""
    known = getattr(transformers, kind, None) if kind in _classes() else None
    if isinstance(known, type) and issubclass(known, PreTrainedModel):
        return known
    if not trust_remote_code:
        raise CheckpointError(
            f"the posterior's network, a {kind}, is no class of transformers' Auto classes; "
            f"{PASS_IT}; or, if you trust the code in {place!r}, pass trust_remote_code=True"
        )
    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    references = dict(getattr(config, "auto_map", None) or {}).values()
    reference = next((r for r in references if str(r).endswith(f".{kind}")), None)
    if reference is None:
        raise CheckpointError(f"{place!r} has no code for the class {kind}; {PASS_IT}")
    loaded: type[PreTrainedModel] = get_class_from_dynamic_module(reference, place)
    return loaded


def _configuration(
    loader: type[PreTrainedModel], place: str, description: Mapping[str, Any], strange: bool
) -> PreTrainedConfig:
    """Return the configuration of the folder, with the saved values.

    A folder that the caller did not name is ``strange``: its implementations that are fetched from
    elsewhere are left out.
    """
    if strange:
        _check_place(Path(place))
    if not loader.config_class.get_config_dict(place)[0]:
        raise CheckpointError(f"{place!r} has no configuration; {PASS_IT}")
    config: PreTrainedConfig = loader.config_class.from_pretrained(place)
    if strange:
        _check_codes(config, place, description)
        config._attn_implementation = config._experts_implementation = None
        for attribute in ("fusion_config", "transformers_weights"):
            if hasattr(config, attribute):
                delattr(config, attribute)
    size = _size(loader, config)
    most = max(len(description["weights"]), 64)
    if restore(config, description["config"], most) and _size(loader, config) > 2 * size + 2**24:
        raise CheckpointError(
            f"with the saved configuration the network is more than twice as large as the one in "
            f"{place!r}; {PASS_IT}"
        )
    return config


def _check_codes(config: PreTrainedConfig, place: str, description: Mapping[str, Any]) -> None:
    """Refuse a folder with quantised weights, unless the posterior's network has the same method.

    The folder's weights are then its codes, and its settings plain values, as the posterior's are.
    """
    held = getattr(config, QUANTISATION, None)
    if held is None:
        return
    method = held.get("quant_method") if isinstance(held, Mapping) else None
    if method not in QUANTISERS or method != description.get(QUANTISATION, {}).get("quant_method"):
        raise CheckpointError(
            f"the network in {place!r} is quantised by {shown(str(method))}, and the posterior's "
            f"is not, or not by a method that a posterior can name ({', '.join(QUANTISERS)}); "
            f"{PASS_IT}"
        )


def _check_place(place: Path) -> None:
    """Refuse anything but a network's folder of plain files, with all weights in it.

    transformers would wait for a pipe, or read a pickle.
    """
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{str(place)!r} is no folder; {PASS_IT}")
    names = [file.name for file in place.iterdir()] if place.is_dir() else []
    shards: set[str] = set()
    if SAFE_WEIGHTS_INDEX_NAME in names and (place / SAFE_WEIGHTS_INDEX_NAME).is_file():
        shards = set(
            map(str, read_strict_json(place / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values())
        )
    for name in sorted({*names, *shards}):
        plain = (place / name).is_file() or (name in names and (place / name).is_dir())
        elsewhere = name in shards and (name not in names or not name.endswith(".safetensors"))
        if name == "adapter_config.json" or elsewhere or not plain:
            raise CheckpointError(
                f"{str(place)!r} is no plain network: it has, or names, {shown(name)}; {PASS_IT}"
            )


def _size(loader: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """Return the number of elements of a network with this configuration, without making it."""
    with torch.device("meta"):
        network = loader(config)
    return sum(t.numel() for t in (*network.parameters(), *network.buffers()))


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
