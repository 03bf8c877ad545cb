"""A stub of vLLM: the same protocol, by transformers and PEFT on the CPU.

It has what `pyrolora.serving.vllm` uses of ``vllm serve``, with its names, errors and defaults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from peft import PeftModel
from starlette.responses import JSONResponse, PlainTextResponse, Response
from torch import nn

LEAST = -9999.0


@dataclass
class Stub:
    """An engine.

    Attributes
    ----------
    network
        The base model.
    ends
        The ids that end a text.
    decode
        Turns ids into text, in which stop strings are looked for.
    runtime
        Whether adapters may be loaded over HTTP.
    max_logprobs
        The most log-probabilities per place; -1: any number.
    confused
        Adapter -> the model that is served in its place: another adapter, or "base".
    delay
        Seconds per request.
    """

    network: nn.Module
    ends: frozenset[int]
    decode: Callable[..., str]
    runtime: bool = True
    max_logprobs: int = 20
    context: int = 32
    confused: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    key: str | None = None
    loaded: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    written: int = 0
    _peft: Any = None

    def load(self, name: str, folder: str) -> None:
        if not (Path(folder) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"No adapter found for {folder}")
        key = name.replace(".", "_")  # torch's names of modules have none
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self.network, folder, adapter_name=key)
        else:
            self._peft.load_adapter(folder, adapter_name=key)
        self._peft.eval()
        self.loaded[name] = folder

    @torch.no_grad()
    def logs(self, model: str, ids: list[int]) -> torch.Tensor:
        """log p of all tokens after each of the ids, (T, V)."""
        model = self.confused.get(model, model)
        row = torch.tensor([ids])
        if self._peft is None:
            logits = self.network(input_ids=row).logits
        elif model == "base":
            with self._peft.disable_adapter():
                logits = self._peft(input_ids=row).logits
        else:
            self._peft.set_adapter(model.replace(".", "_"))
            logits = self._peft(input_ids=row).logits
        return logits[0].log_softmax(-1)

    def write(self, body: Mapping[str, Any], seed: int, ids: list[int]) -> list[int]:
        written: list[int] = []
        generator = torch.Generator().manual_seed(seed)
        while len(written) < body["max_tokens"]:
            logs = self.logs(body["model"], [*ids, *written])[-1]
            if body["temperature"] == 0:
                token = int(logs.argmax())
            else:
                probs = (logs / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(probs, 1, generator=generator))
            written.append(token)
            self.written += 1
            special = body.get("skip_special_tokens", True)
            text = self.decode(written, skip_special_tokens=special)
            if token in self.ends or any(stop in text for stop in body.get("stop", ())):
                break
        return written

    def prompt_logprobs(self, model: str, ids: list[int], top: int) -> list[Any]:
        logs = self.logs(model, ids)
        count = logs.shape[-1] if top == -1 else min(top, logs.shape[-1])
        places: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            row = logs[place]
            named = {token, *row.topk(count).indices.tolist()}
            places.append(
                {
                    str(one): {
                        "logprob": max(float(row[one]), LEAST),
                        "rank": int((row > row[one]).sum()) + 1,
                        "decoded_token": f"<{one}>",
                    }
                    for one in named
                }
            )
        return places


def refuse(status: int, message: str, kind: str = "BadRequestError") -> Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status)


def app_of(stub: Stub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def key(request: Request, call_next: Any) -> Any:
        if stub.key and request.headers.get("authorization") != f"Bearer {stub.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    @app.get("/v1/models")
    def models() -> Response:
        cards = [{"id": "base", "parent": None, "root": "base", "max_model_len": stub.context}]
        cards += [{"id": n, "parent": "base", "root": f} for n, f in stub.loaded.items()]
        return JSONResponse({"object": "list", "data": cards})

    if stub.runtime:

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> Response:
            body = await request.json()
            name = body["lora_name"]
            if name in stub.loaded:
                return refuse(400, f"The lora adapter '{name}' has already been loaded.")
            try:
                stub.load(name, body["lora_path"])
            except FileNotFoundError as error:
                return refuse(500, str(error), "InternalServerError")
            return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = {"n": 1, "temperature": 1.0, **await request.json()}
        stub.requests.append(body)
        await asyncio.sleep(stub.delay)
        top = body.get("prompt_logprobs")
        if body["model"] not in ("base", *stub.loaded):
            message = f"The model `{body['model']}` does not exist."
            return refuse(404, message, "NotFoundError")
        if top is not None and stub.max_logprobs != -1 and not 0 <= top <= stub.max_logprobs:
            return refuse(
                400, f"Requested prompt logprobs of {top}, which is greater than max allowed: "
                f"{stub.max_logprobs}"
            )  # fmt: skip
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if any(len(ids) + body["max_tokens"] > stub.context for ids in prompts):
            return refuse(400, f"This model's maximum context length is {stub.context} tokens.")
        choices = []
        for ids in prompts:
            scores = None if top is None else stub.prompt_logprobs(body["model"], ids, top)
            for k in range(body["n"]):
                written = stub.write(body, body.get("seed", 0) + k, ids)
                choices.append(
                    {
                        "index": len(choices),
                        "text": "",
                        "token_ids": written if body.get("return_token_ids") else None,
                        "prompt_logprobs": scores,
                        "finish_reason": "stop" if written[-1] in stub.ends else "length",
                    }
                )
        return JSONResponse({"object": "text_completion", "choices": choices})

    return app
