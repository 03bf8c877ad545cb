"""LoRA adapters in PEFT's file format, written and read without PEFT.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, whose tensors
are named ``base_model.model.<layer>.lora_A.weight`` (r, in), ``.lora_B.weight`` (out, r), and
``base_model.model.<module>.<tensor>`` for the modules of ``modules_to_save``.
"""

from pyrolora.peft.beside import remove_mean, why_no_mean, write_mean
from pyrolora.peft.config import CONFIG_FILE
from pyrolora.peft.export import export_factors
from pyrolora.peft.read import Adapter, read_adapter
from pyrolora.peft.write import as_uniform, write_adapter

__all__ = [
    "CONFIG_FILE",
    "Adapter",
    "as_uniform",
    "export_factors",
    "read_adapter",
    "remove_mean",
    "why_no_mean",
    "write_adapter",
    "write_mean",
]
