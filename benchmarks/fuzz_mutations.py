"""The ways in which `fuzz.py` damages a folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from pyrolora.storage import digest_of

META, ADAPTER = "posterior.json", "adapter_config.json"
MARKER = Path(tempfile.gettempdir()) / f"pyrolora-fuzz-{os.getpid()}"
"""A file that the planted code would make."""
CODE = f"open({str(MARKER)!r}, 'w').close()\n"

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 10**9, 2**63, -(2**70), 0.5, 1e308, -1e-320, "", "x"),
    *("../x", "/etc/passwd", "a" * 5000, "\ud800", "\x00", "\x1b[31m", "(.*)*x", "[link=x]"),
    *([], {}, [[]], [1, "a"], {"a": 1}, ["query"], "montec", "flat+" * 300 + "map", "lora-ga"),
]
RAW = [
    *(
        "[" * 100_000,
        "[" * 400 + "]" * 400,
        '{"a":' * 300 + "1" + "}" * 300,
        "[" * 900 + "]" * 900,
        "9" * 6000,
        "NaN",
        "Infinity",
        "1e999",
        '"\\ud800"',
        "{}",
        '{"a":1,"a":2}',
    ),
    *('{"r":' * 5000, "-0", "1e-400", "\u202e", "''", "tru", '"' + "a" * 10**6 + '"'),
]


class Folder:
    """A folder whose files are kept in memory, to be put back after each damage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {
            str(file.relative_to(path)): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        self.is_adapter = ADAPTER in self.files
        self.description = ADAPTER if self.is_adapter else META
        self.state = next(name for name in self.files if name.endswith(".safetensors"))
        self.words = [name for name in self.files if "/" in name]

    def write(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)

    @contextmanager
    def restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            for item in self.path.iterdir():
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink()
            for name, content in self.files.items():
                (self.path / name).parent.mkdir(exist_ok=True)
                self.write(name, content)

    def seal(self) -> None:
        """Compute every digest again, as an editor of the folder would."""
        if self.is_adapter:
            return
        meta = json.loads((self.path / META).read_bytes())
        meta["sha256"] = _digest(self.path / self.state)
        if self.words:
            top = self.path / self.words[0].partition("/")[0]
            meta["tokenizer_files"] = {
                file.relative_to(top).as_posix(): _digest(file)
                for file in sorted(top.rglob("*"))
                if file.is_file()
            }
        meta["digest"] = digest_of(meta)
        self.write(META, json.dumps(meta).encode())


def mutate(folder: Folder, rng: random.Random) -> tuple[str, bool]:
    """Damage the folder: the name of what was done, and whether its digests say the same."""
    what, change = rng.choice([*MUTATIONS.items(), *([("words", _words)] if folder.words else [])])
    change(folder, rng)
    if folder.is_adapter or what == "kinds" or rng.random() < 0.5:
        return what, False
    try:
        folder.seal()
    except (OSError, ValueError, RecursionError, TypeError, AttributeError):
        return what, False  # what is there cannot be described
    return f"{what}, sealed", True


def _bytes(folder: Folder, rng: random.Random) -> None:
    name = rng.choice(sorted(folder.files))
    content = bytearray(folder.files[name])
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del content[rng.randrange(len(content)) :]
    elif how == 2:
        place = rng.randrange(len(content))
        content[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
    else:
        place = rng.randrange(len(content))
        content[place : place + 16] = bytes(16)
    folder.write(name, bytes(content))


def _values(folder: Folder, rng: random.Random) -> None:
    """One value of the description becomes another, goes, or gets a neighbour."""
    meta = json.loads(folder.files[folder.description])
    parent, key = _place(meta, rng)
    how = rng.randrange(5)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "auto_map", "trust_remote_code", "a" * 3000])] = rng.choice(ODD)
    elif how == 2 and isinstance(parent[key], int | float):
        parent[key] = rng.choice([parent[key] * 2, -parent[key], parent[key] + 1, 1e9, 10**12])
    elif how == 3 and isinstance(parent, dict):
        parent[key] = parent[rng.choice(list(parent))]
    else:
        parent[key] = rng.choice(ODD)
    folder.write(folder.description, json.dumps(meta).encode())


def _text(folder: Folder, rng: random.Random) -> None:
    """A value of the description's text becomes what may not be JSON."""
    meta = json.loads(folder.files[folder.description])
    parent, key = _place(meta, rng)
    parent[key] = "@@@"
    content = json.dumps(meta).replace('"@@@"', rng.choice(RAW), 1)
    folder.write(folder.description, content.encode("utf-8", "surrogatepass"))


def _tensors(folder: Folder, rng: random.Random) -> None:
    state = load(folder.files[folder.state])
    name = rng.choice(sorted(state))
    tensor = state[name].clone()
    how = rng.randrange(9)
    if how < 4 and tensor.numel() and tensor.is_floating_point():
        value = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1e20, 100.0, 0.0])
        if how < 3:
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
        else:
            tensor.fill_(value)
        state[name] = tensor
    elif how == 4:
        state[name] = tensor.to(rng.choice([torch.float64, torch.float16, torch.int64, torch.bool]))
    elif how == 5:
        shape = rng.choice([(3,), (), (0,), (*tensor.shape, 1), tuple(tensor.shape)[::-1]])
        state[name] = torch.zeros(shape)
    elif how == 6:
        del state[name]
    elif how == 7:
        state[rng.choice(["x", "base_model.model.x", f"{name}.x"])] = torch.zeros(2)
    else:
        state[rng.choice([f"{name}x", name.upper()])] = state.pop(name)
    folder.write(folder.state, save(state, {"format": "pt"}))


def _words(folder: Folder, rng: random.Random) -> None:
    name = rng.choice(folder.words)
    top = folder.words[0].partition("/")[0]
    how = rng.randrange(5)
    if how == 0:
        (folder.path / name).unlink()
    elif how == 1:
        planted = rng.choice(
            ["evil.py", "vocab.pkl", "config.json", "pytorch_model.bin", "vocab.txt"]
        )
        folder.write(f"{top}/{planted}", CODE.encode())
    elif how == 2:
        config = json.loads(folder.files[f"{top}/tokenizer_config.json"])
        config |= rng.choice(CONFIGS)
        folder.write(f"{top}/tokenizer_config.json", json.dumps(config).encode())
        folder.write(f"{top}/evil.py", CODE.encode())
    elif how == 3:
        content = bytearray(folder.files[name])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        folder.write(name, bytes(content))
    else:
        folder.write(name, rng.choice(RAW).encode("utf-8", "surrogatepass"))


CONFIGS: list[dict[str, Any]] = [
    {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"},
    {"tokenizer_class": "BertModel"},
    {"tokenizer_class": 3},
    {"tokenizer_file": "/etc/passwd"},
    {"vocab_file": "/etc/passwd"},
    {"init_inputs": ["/etc/passwd"]},
    {"processor_class": "evil.Evil"},
    {"chat_template": "{{ ''.__class__.__mro__ }}"},
    {"model_max_length": "x"},
    {"pad_token": 5},
    {"added_tokens_decoder": {"x": {}}},
]


def _kinds(folder: Folder, rng: random.Random) -> None:
    """A name of the folder is no file any more."""
    file = folder.path / rng.choice(sorted(folder.files))
    file.unlink()
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(file)
    elif how == 1:
        file.symlink_to("/dev/zero")
    elif how == 2:
        file.mkdir()
    elif how == 3:
        file.symlink_to("nowhere")
    elif how == 4:
        file.symlink_to(file.name)
    else:
        _socket(file)


def _socket(file: Path) -> None:
    place = os.getcwd()
    os.chdir(file.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(place)


MUTATIONS: dict[str, Callable[[Folder, random.Random], None]] = {
    "bytes": _bytes,
    "values": _values,
    "text": _text,
    "tensors": _tensors,
    "kinds": _kinds,
}


def _place(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random place in a tree of JSON, as a container and its key, near the top as often as far
    from it."""
    parent, key = tree, rng.choice(list(tree))
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.7:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
