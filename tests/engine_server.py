"""vLLM and SGLang as their sources describe them, on the loopback: requests, statuses, error bodies and names are theirs.

Behind it is the CPU world's backbone in plain transformers and PEFT, so that an adapter that is registered really answers.
Nothing of the engines themselves runs here.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import torch
from loopback import LoopbackServer, serving
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shine.zoo import SHIPPED

BASE = "cpu-world"
STOPS = ("<|im_end|>", "<|endoftext|>")


class Unpickler(pickle.Unpickler):
    """Takes tensors and plain containers, as SGLang's does; nothing else is called while reading."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("torch", "collections", "builtins") or name in ("eval", "exec", "getattr"):
            raise RuntimeError(f"Blocked unsafe class loading ({module}.{name})")
        return super().find_class(module, name)


class EngineServer:
    """One server and what it was asked.

    Attributes:
        updating: whether adapters may be loaded while it runs; vLLM has no such routes otherwise.
        failing: what every request gets instead, as (status, body); ``None`` where it works.
        refusal: status and type with which this release of vLLM refuses what it cannot load.
        field: how this release of SGLang calls the weights it is sent.
        requests: (path, body) of all that was posted.
    """

    def __init__(self, kind: Literal["vllm", "sglang"], *, max_rank: int = 16, key: str | None = None) -> None:
        self.kind, self.max_rank, self.key = kind, max_rank, key
        self.updating, self.failing, self.delay = True, None, 0.0
        self.refusal = (400, "BadRequestError")
        self.field = "serialized_named_tensors"
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, str] = {}
        self.weights: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {}
        self.tokenizer = AutoTokenizer.from_pretrained(SHIPPED[BASE])
        self.http = LoopbackServer(_handler(self))
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def load(self, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> str | None:
        """Keep an adapter, or say what is wrong with it."""
        if config["r"] > self.max_rank:
            if self.kind == "vllm":
                return f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}."
            return f"LoRA adapter {name} with rank {config['r']} is incompatible with the current LoRA memory pool configuration."
        self.adapters[name], self.weights[name] = path, (config, tensors)
        return None

    def generate(self, name: str | None, prompt: str, limit: int) -> str:
        """Greedy, by transformers, with PEFT's arithmetic for the adapter."""
        model: Any = AutoModelForCausalLM.from_pretrained(SHIPPED[BASE], dtype=torch.float32)
        if name is not None:
            config, tensors = self.weights[name]
            model = get_peft_model(model, LoraConfig(**{**config, "base_model_name_or_path": str(SHIPPED[BASE])}))
            assert isinstance(model, PeftModel)
            assert not set_peft_model_state_dict(model, tensors).unexpected_keys
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        stops = [self.tokenizer.convert_tokens_to_ids(stop) for stop in STOPS]
        out = model.generate(**ids, max_new_tokens=limit, do_sample=False, eos_token_id=stops, pad_token_id=stops[-1])
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def _vllm_error(status: int, kind: str, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _vllm(server: EngineServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    name, folder = body.get("lora_name"), body.get("lora_path")
    if path.endswith("/unload_lora_adapter"):
        if not name:
            return _vllm_error(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        if server.adapters.pop(name, None) is None:
            return _vllm_error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return 200, f"Success: LoRA adapter '{name}' removed successfully."
    if not name or not folder:
        return _vllm_error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    if name in server.adapters:
        return _vllm_error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
    if not (Path(folder) / "adapter_config.json").exists():
        return _vllm_error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {folder}")
    problem = server.load(name, *_read(folder), folder)
    return _vllm_error(*server.refusal, problem) if problem else (200, f"Success: LoRA adapter '{name}' added successfully.")


def _sglang(server: EngineServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    name = body["lora_name"]
    problem: str | None
    if path == "/unload_lora_adapter":
        problem = None if server.adapters.pop(name, None) else f"LoRA with name {name} does not exist."
    elif name in server.adapters:
        problem = f"LoRA with name {name} already exists. Loaded LoRAs: {list(server.adapters)}"
    elif path == "/load_lora_adapter_from_tensors":
        if server.field not in body:
            return 422, {"detail": [{"type": "missing", "loc": ["body", server.field], "msg": "Field required"}]}
        sent = body[server.field]
        tensors = Unpickler(io.BytesIO(base64.b64decode(sent if isinstance(sent, str) else sent[0]))).load()
        problem = server.load(name, body["config_dict"], tensors, "__tensor__")
    elif not Path(body["lora_path"]).exists():
        problem = f"Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{body['lora_path']}'"
    else:
        problem = server.load(name, *_read(body["lora_path"]), body["lora_path"])
    loaded = {adapter: {"lora_name": adapter, "lora_path": where} for adapter, where in server.adapters.items()}
    return (400 if problem else 200), {"success": problem is None, "error_message": problem, "loaded_adapters": loaded}


def _read(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    return config, load_file(Path(folder) / "adapter_model.safetensors")


def _complete(server: EngineServer, body: dict[str, Any]) -> tuple[int, Any]:
    asked = body["model"]
    name = None if asked == BASE else asked if server.kind == "vllm" else asked.partition(":")[2]
    if name is not None and name not in server.adapters:
        if server.kind == "vllm":
            return _vllm_error(404, "NotFoundError", f"The model `{asked}` does not exist.")
        message = f"The following requested LoRA adapters are not loaded: {name}"
        return 400, {"object": "error", "message": message, "type": "BadRequest", "param": None, "code": 400}
    text = server.generate(name, body["prompt"], body["max_tokens"])
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
    return 200, {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": asked, "choices": [choice]}


def _handler(server: EngineServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.respond("GET", {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, body))
            self.respond("POST", body)

        def respond(self, method: str, body: dict[str, Any]) -> None:
            time.sleep(server.delay)
            if server.failing is not None:
                self.send(*server.failing)
            elif server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.send(401, {"error": "Unauthorized"})
            elif (method, self.path) == ("GET", "/v1/models"):
                cards = [{"id": BASE, "root": str(SHIPPED[BASE]), "parent": None}]
                cards += [{"id": name, "root": root, "parent": BASE} for name, root in server.adapters.items()]
                self.send(200, {"object": "list", "data": cards})
            elif (method, self.path) == ("POST", "/v1/completions"):
                self.send(*_complete(server, body))
            elif server.updating and server.kind == "vllm" and self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
                self.send(*_vllm(server, self.path, body))
            elif server.kind == "sglang" and self.path.startswith(("/load_lora_adapter", "/unload_lora_adapter")):
                self.send(*_sglang(server, self.path, body))
            else:
                self.send(404, {"detail": "Not Found"})

        def send(self, status: int, body: Any) -> None:
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


@contextmanager
def engine_server(kind: Literal["vllm", "sglang"], **options: Any) -> Iterator[EngineServer]:
    """A server in a thread of its own, gone when the block ends."""
    server = EngineServer(kind, **options)
    with serving(server.http):
        yield server
