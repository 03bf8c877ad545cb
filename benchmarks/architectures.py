"""Which architectures of transformers get which adapters, and whether these compute W + s B A.

    python benchmarks/architectures.py                                # a minute of one core
    python benchmarks/architectures.py --only bert,t5                 # some of them
    python benchmarks/architectures.py --write docs/architectures.md  # puts it into the docs

Every network is tiny, with random weights, made from a configuration. A posterior is fitted to it
for one step with "auto", and with "all-linear", in mixtures with the experts and routers as
target_parameters. Then log p(y | x) of its mean and of two draws is compared with that of the plain
network in whose weights W + s B A was written here; and so are the merged network, the adapter as
PEFT reads it, and the one that is read again. A posterior that is saved and loaded has to have the
same draws, and texts have to be those that the merged network writes. What differs by more than
`TOLERANCE` nats is wrong, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import linear_layers
from pyrolora.adapters.names import collapsed
from pyrolora.errors import PyroLoraError
from pyrolora.guides import MonteCLoRA

WORDS, TOKENS, EXAMPLES, CLASSES, RANK, ALPHA = 60, 8, 4, 3, 2, 8.0
TOLERANCE = 1e-3  # of log-likelihoods of order 10, in float32
LEAST = 1e-2  # what adapters that do something change at least
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

# Each configuration takes those of these that it has.
WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "d_inner"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
}
COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    "num_experts_per_tok": 1,
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 32),
    "image_size": 8,
    "patch_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURE = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
VISION = {**PICTURE, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": WORDS}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 32}
WINDOWS = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "window_size": 2}
WINDOWS |= {"depths": [1, 1], "num_heads": [2, 2]}


@dataclass(frozen=True)
class Architecture:
    """A network: the class of its configuration without "Config", what a tiny one needs beside the
    usual sizes, its task (a classifier of texts, pictures or sounds, or a language model), and the
    parameters that are adapted beside its linear layers."""

    config: str
    task: str = "SequenceClassification"
    options: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()


def classifier(config: str, **options: Any) -> Architecture:
    return Architecture(config, options=options)


def writer(config: str, **options: Any) -> Architecture:
    return Architecture(config, "CausalLM", options)


def mixture(config: str, router: str = "gate.weight", **options: Any) -> Architecture:
    experts = ("experts.gate_up_proj", "experts.down_proj")
    return Architecture(config, "CausalLM", options, (*experts, router))


def viewer(config: str, **options: Any) -> Architecture:
    return Architecture(config, "ImageClassification", options)


SOUND = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_conv_pos_embeddings": 4}
SOUND |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
MLA = {"kv_lora_rank": 4, "q_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
MLA |= {"v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MLA |= {"num_key_value_heads": 2, "head_dim": 4}
STATES = {"state_size": 4, "time_step_rank": 4}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": classifier("Bert"),
    "roberta": classifier("Roberta"),
    "xlm-roberta": classifier("XLMRoberta"),
    "camembert": classifier("Camembert"),
    "distilbert": classifier("DistilBert"),
    "albert": classifier("Albert"),
    "electra": classifier("Electra"),
    "deberta": classifier("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": classifier("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": classifier("ModernBert", cls_token_id=3, sep_token_id=4),
    "mpnet": classifier("MPNet"),
    "longformer": classifier("Longformer", attention_window=4),
    "big_bird": classifier("BigBird", attention_type="original_full"),
    "funnel": classifier("Funnel", block_sizes=[1, 1], num_decoder_layers=1),
    "xlnet": classifier("XLNet"),
    "gpt2": writer("GPT2"),
    "gpt_bigcode": writer("GPTBigCode"),
    "gpt_neo": writer("GPTNeo", attention_types=[[["global", "local"], 1]], window_size=4),
    "gpt_neox": writer("GPTNeoX"),
    "gptj": writer("GPTJ", rotary_dim=4),
    "codegen": writer("CodeGen", n_head=4, rotary_dim=4),
    "opt": writer("OPT", word_embed_proj_dim=16),
    "bloom": writer("Bloom"),
    "mpt": writer("Mpt", expansion_ratio=2),
    "falcon": writer("Falcon"),
    "llama": writer("Llama"),
    "mistral": writer("Mistral", sliding_window=4),
    "mixtral": mixture("Mixtral"),
    "qwen2": writer("Qwen2"),
    "qwen2_moe": mixture("Qwen2Moe", "mlp.gate.weight"),
    "qwen3": writer("Qwen3"),
    "qwen3_moe": mixture("Qwen3Moe", mlp_only_layers=[0]),
    "gemma2": writer("Gemma2"),
    "gemma3_text": writer("Gemma3Text"),
    "phi": writer("Phi"),
    "phi3": writer("Phi3"),
    "olmo2": writer("Olmo2"),
    "smollm3": writer("SmolLM3"),
    "granite": writer("Granite"),
    "cohere": writer("Cohere"),
    "stablelm": writer("StableLm"),
    "gpt_oss": mixture("GptOss", "router.weight"),
    "deepseek_v3": mixture("DeepseekV3", **MLA),
    "mamba": writer("Mamba", **STATES),
    "mamba2": writer("Mamba2", state_size=4, num_heads=4, n_groups=1, chunk_size=4),
    "rwkv": writer("Rwkv", attention_hidden_size=16, context_length=32),
    "t5": classifier("T5", decoder_start_token_id=0),
    "mt5": classifier("MT5", decoder_start_token_id=0),
    "bart": classifier("Bart", decoder_start_token_id=2),
    "mbart": classifier("MBart", decoder_start_token_id=2),
    "vit": viewer("ViT"),
    "deit": viewer("DeiT"),
    "beit": viewer("Beit"),
    "dinov2": viewer("Dinov2", mlp_ratio=2),
    "swin": viewer("Swin", **WINDOWS),
    "swinv2": viewer("Swinv2", **WINDOWS),
    "convnext": viewer("ConvNext", hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=2),
    "clip": viewer("CLIP", vision_config=VISION, text_config={**TEXT, "projection_dim": 16}),
    "siglip": viewer("Siglip", vision_config=VISION, text_config=TEXT),
    "wav2vec2": Architecture("Wav2Vec2", "AudioClassification", SOUND),
    "hubert": Architecture("Hubert", "AudioClassification", SOUND),
}


def build(name: str) -> nn.Module:
    """The network, in evaluation, without dropout; weights are so large that its outputs differ."""
    arch = ARCHITECTURES[name]
    kind = getattr(transformers, f"{arch.config}Config")
    known = kind().to_dict().keys()
    sizes = {option: size for option, size in {**WIDTHS, **COUNTS}.items() if option in known}
    config = kind(**{**sizes, **arch.options, "num_labels": CLASSES})
    for option, value in config.to_dict().items():
        if isinstance(value, float) and re.search("drop|jitter|mask_time|mask_feature", option):
            setattr(config, option, 0.0)
    torch.manual_seed(0)
    classes = getattr(transformers, f"AutoModelFor{arch.task}")._model_mapping[kind]
    # Of DeiT's two the first has one head.
    network: nn.Module = (classes[0] if isinstance(classes, tuple) else classes)(config).eval()
    with torch.no_grad():
        for own, parameter in network.named_parameters():
            if parameter.dim() > 1 and not own.endswith("A_log"):
                fan = 1 if "embed" in own else parameter[0].numel()
                parameter.normal_(std=fan**-0.5)
    return network


class Examples(torch.utils.data.Dataset[Any]):
    """Random texts, pictures or sounds with labels."""

    def __init__(self, task: str) -> None:
        seeded = torch.Generator().manual_seed(1)
        labels = torch.arange(EXAMPLES) % CLASSES
        if task == "ImageClassification":
            self.tensors = {"pixel_values": torch.randn(EXAMPLES, 3, 8, 8, generator=seeded)}
        elif task == "AudioClassification":
            self.tensors = {"input_values": torch.randn(EXAMPLES, 64, generator=seeded)}
        else:
            ids = torch.randint(5, WORDS, (EXAMPLES, TOKENS), generator=seeded)
            ids[:, -1] = 2  # BART reads a class where the text ends
            self.tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            labels = ids if task == "CausalLM" else labels
        self.tensors["labels"] = labels

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.tensors.items()}

    @torch.no_grad()
    def scores(self, network: nn.Module) -> Tensor:
        """log p of each example's label, or of all its tokens after the first, (n,)."""
        labels = self.tensors["labels"]
        inputs = {name: values for name, values in self.tensors.items() if name != "labels"}
        logits = network.eval()(**inputs).logits.log_softmax(-1)
        if labels.dim() == 1:
            return logits.gather(-1, labels[:, None])[:, 0]
        return logits[:, :-1].gather(-1, labels[:, 1:, None])[..., 0].sum(-1)


@torch.no_grad()
def written(network: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy with W + s B A in the place of W; a Conv1D keeps its weight the other way round.

    An expert's name ends with its number in a parameter of its module.
    """
    network = copy.deepcopy(network)
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    for name, (A, B) in factors.items():
        update = ALPHA / RANK * B @ A
        if name in modules:
            layer = modules[name]
            turned = update.T if isinstance(layer, Conv1D) else update
            layer.weight = nn.Parameter(layer.weight + turned)
            continue
        place, _, number = name.rpartition(".")
        matrix = parameters[name] if name in parameters else parameters[place][int(number)]
        owner = modules[(name if name in parameters else place).rpartition(".")[0]]
        matrix += update.T if getattr(owner, "is_transposed", False) else update
    return network


def fitted(name: str, targets: str, data: Examples) -> Any:
    """A posterior after one step, whose draws are far from one another. The head stays as it is."""
    parameters = [] if targets == "auto" else [*ARCHITECTURES[name].parameters]
    adapter = AdapterConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        target_parameters=parameters,
        modules_to_save=[],
    )
    guide = MonteCLoRA(sample_scale=1.0, init_covariance=1.0)
    kind = "text-generation" if ARCHITECTURES[name].task == "CausalLM" else "classification"
    # The Trainer prints how long it took.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        steps = transformers.TrainingArguments(
            folder, max_steps=1, learning_rate=2e-2, per_device_train_batch_size=EXAMPLES,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        return pyrolora.fit(build(name), data, guide, adapter=adapter, task=kind, training=steps)


# Cells: each gives the largest difference ---------------------------------------------------------


def draws(posterior: Any, network: nn.Module, data: Examples) -> float:
    """Of the mean and of two draws, one after the other and together."""
    given = [posterior.factors()]
    both = posterior.factors(posterior.sample(2, seed=3))
    for k in range(2):
        given.append({n: (_draw(A, k), _draw(B, k)) for n, (A, B) in both.items()})
    expected = torch.stack([data.scores(written(network, factors)) for factors in given])
    spread = (expected[1:] - expected[0]).abs().max()
    if not spread > LEAST:
        raise ValueError(f"the draws of {len(both)} adapters change nothing: {spread:.2g}")
    found = [posterior.log_likelihood(data, n, seed=3) for n in (0, 2)]
    return gap(torch.cat(found), expected)


def _draw(factor: Tensor, k: int) -> Tensor:
    return factor[k] if factor.dim() == 3 else factor


def merged(posterior: Any, network: nn.Module, data: Examples) -> float:
    return gap(data.scores(posterior.merge()), data.scores(written(network, posterior.factors())))


def exported(posterior: Any, network: nn.Module, data: Examples) -> float:
    """As PEFT reads it, and as pyrolora reads it again."""
    expected = data.scores(written(network, posterior.factors()))
    with tempfile.TemporaryDirectory() as folder:
        posterior.to_peft(folder)
        theirs = data.scores(peft.PeftModel.from_pretrained(copy.deepcopy(network), folder))
        again = pyrolora.from_peft(folder, copy.deepcopy(network), task=posterior.task.name)
    return max(gap(theirs, expected), gap(again.log_likelihood(data, 0)[0], expected))


def saved(posterior: Any, network: nn.Module, data: Examples) -> float:
    """The draws of the posterior that is loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        posterior.save(folder)
        again = pyrolora.load(folder, copy.deepcopy(network))
    return gap(again.log_likelihood(data, 2, seed=3), posterior.log_likelihood(data, 2, seed=3))


def generated(posterior: Any, network: nn.Module, data: Examples) -> float:
    """Tokens of the mean that are other ones than those of the merged network."""
    prompt = data.tensors["input_ids"][:2, :5]
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    options = {"max_new_tokens": 4, "do_sample": False}
    found = posterior.generate(inputs, 0, **options).sequences[:, 0]
    expected = posterior.merge().generate(**inputs, **options)[:, prompt.shape[1] :]
    width = min(found.shape[1], expected.shape[1])
    return float((found[:, :width] != expected[:, :width]).sum())


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


# The table ---------------------------------------------------------------------------------------

COLUMNS = (
    "architecture",
    '`"auto"`',
    "exact",
    '`"all-linear"`',
    "left out",
    "exact",
    "merged",
    "saved",
    "PEFT",
    "generated",
)


@dataclass
class Row:
    """One architecture: its cells, how many are wrong, and refusals in full."""

    cells: list[str]
    wrong: int = 0
    refused: list[str] = field(default_factory=list)

    def check(self, measure: Callable[[], float]) -> None:
        try:
            size = measure()
            self.cells.append("yes" if size <= TOLERANCE else f"**off by {size:.2g}**")
            self.wrong += size > TOLERANCE
        except PyroLoraError as error:
            self.refuse(error)
        except Exception as error:
            self.cells.append(f"**{type(error).__name__}**")
            self.wrong += 1
            self.refused.append(f"{type(error).__name__}: {error}")

    def refuse(self, error: Exception) -> None:
        self.cells.append("refused")
        self.refused.append(f"{type(error).__name__}: {error}")


def row(name: str) -> Row:
    data, network = Examples(ARCHITECTURES[name].task), build(name)
    found = Row([f"`{name}`"])
    for targets in ("auto", "all-linear"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _add(found, name, targets, network, data)
    return found


def _add(found: Row, name: str, targets: str, network: nn.Module, data: Examples) -> None:
    try:
        posterior = fitted(name, targets, data)
    except PyroLoraError as error:
        found.refuse(error)
        found.cells += [""] * (1 if targets == "auto" else 6)
        return
    layers = list(posterior.bank.specs)
    if targets == "auto":
        ends = dict.fromkeys(layer.removesuffix(".linear").rpartition(".")[2] for layer in layers)
        found.cells.append(f"{len(layers)}: {', '.join(f'`{end}`' for end in ends)}")
    else:
        left = collapsed(_left_out(network, layers))
        found.cells += [str(len(layers)), ", ".join(f"`{own}`" for own in left)]
    checks = (draws,) if targets == "auto" else (draws, merged, saved, exported)
    for check in checks:
        found.check(lambda check=check: check(posterior, network, data))  # type: ignore[misc]
    if targets == "auto":
        return
    if ARCHITECTURES[name].task == "CausalLM":
        found.check(lambda: generated(posterior, network, data))
    else:
        found.cells.append("")


def _left_out(network: nn.Module, layers: list[str]) -> Iterator[str]:
    """What multiplies and has no adapter: linear layers, but for the output layer for tokens, and
    matrices that are parameters of other modules than torch's own."""
    output = network.get_output_embeddings()
    linear = linear_layers(network)
    adapted = {name.removesuffix(f".{name.rpartition('.')[2]}") for name in layers} | {*layers}
    yield from (n for n, module in linear.items() if n not in layers and module is not output)
    for name, parameter in network.named_parameters():
        place, _, own = name.rpartition(".")
        module = network.get_submodule(place)
        matrix = parameter.dim() == 3 or (parameter.dim() == 2 and own == "weight")
        plain = place in linear or type(module).__module__.startswith("torch.nn.")
        if matrix and min(parameter.shape) > 1 and not plain and name not in adapted:
            yield name


def table(rows: list[Row]) -> str:
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    lines += [" | ".join(found.cells) for found in rows]
    return "".join(f"| {line} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--write", type=Path, help="the file whose table is replaced")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(ARCHITECTURES)
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        parser.error(f"no architecture {unknown[0]!r}; there are {', '.join(ARCHITECTURES)}")
    transformers.logging.set_verbosity_error()
    logging.getLogger("pyrolora").setLevel(logging.ERROR)  # these networks have no home
    rows = []
    for name in names:
        rows.append(row(name))
        print(" | ".join(rows[-1].cells), *rows[-1].refused, sep="\n    ", flush=True)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}{table(rows)}{END}{after}")
    return min(sum(found.wrong for found in rows), 1)  # a status is a byte


if __name__ == "__main__":
    raise SystemExit(main())
