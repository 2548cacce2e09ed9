"""Tiny random checkpoints and a hand crank for the engine core: what the tests of the transformers engine share."""

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tuneloop.engines.transformers.config import TransformersConfig
from tuneloop.engines.transformers.core import EngineCore
from tuneloop.engines.transformers.model import LoadedModel, load_model
from tuneloop.engines.transformers.protocol import Failed, FromWorker, StepDone, Submit, Token, ToWorker, WireSampling

torch.set_num_threads(1)  # products this small only wait for each other

VOCAB = 160
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-bias": lambda: hf.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}),
}


def make_checkpoint(config: Any, folder: Path) -> Path:
    """A random model whose greedy choices are clear: its weights are larger than freshly made ones."""
    torch.manual_seed(7)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@cache
def temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tuneloop-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def checkpoint(kind: str) -> Path:
    """One of CHECKPOINTS, made once a session."""
    return make_checkpoint(CHECKPOINTS[kind](), temporary_folder() / kind)


@cache
def loaded(kind: str) -> LoadedModel:
    """A checkpoint ready to serve in exact float32, loaded once a session; `engine_core` cleans it after use."""
    return load_model(checkpoint(kind), TransformersConfig(weights="float32"))


def greedy(max_tokens: int, **changes: Any) -> WireSampling:
    fields: dict[str, Any] = {
        "n": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "logit_bias": {},
        "stop_token_ids": [],
        "ignore_eos": True,
        "min_tokens": 0,
        "max_tokens": max_tokens,
        "logprobs": None,
        "prompt_logprobs": None,
    }
    return WireSampling(**{**fields, **changes})


def submit(request_id: str, prompt: Sequence[int], sampling: WireSampling, **changes: Any) -> Submit:
    """`adapter` is a folder or a (digest, folder) pair."""
    adapter = changes.pop("adapter", None)
    digest, path = adapter if isinstance(adapter, tuple) else (str(adapter), str(adapter)) if adapter else (None, None)
    fields = {"priority": 0, "seconds_left": None, **changes}
    return Submit(request_id, list(prompt), sampling, digest, str(path) if path is not None else None, **fields)


class _Stop(Exception):
    """Ends EngineCore.run in a test."""


class Crank:
    """Turns a core by hand, one step at a time, and sorts what it says. Rows are named `request/index`."""

    def __init__(self, model: LoadedModel, config: TransformersConfig) -> None:
        self.sent: list[FromWorker] = []
        self.said: list[FromWorker] = []  # since the last turn
        self.tokens: dict[str, list[Token]] = {}
        self.finished: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}
        self.core = EngineCore(model, config, send=self._hear, wake=lambda: None)
        self.scheduler = self.core.scheduler

    def _hear(self, message: FromWorker) -> None:
        self.sent.append(message)
        self.said.append(message)
        if isinstance(message, StepDone):
            for token in message.tokens:
                name = f"{token.request_id}/{token.index}"
                self.tokens.setdefault(name, []).append(token)
                if token.finish is not None:
                    self.finished[name] = token.finish
        elif isinstance(message, Failed):
            assert message.request_id not in self.failed, "a request fails once"
            self.failed[message.request_id] = message

    def turn(self, *messages: ToWorker) -> None:
        """One round of the loop: take `messages`, plan, compute at most one step."""
        rounds = iter([list(messages)])
        self.said = []

        def take(_: float) -> list[ToWorker]:
            try:
                return next(rounds)
            except StopIteration:
                raise _Stop from None

        try:
            self.core.run(take)
        except _Stop:
            self.scheduler.check_integrity()
        if not self.scheduler.running:
            time.sleep(0.001)  # an adapter is being read

    def run(self, *messages: ToWorker, turns: int = 30_000) -> None:
        """Turn until nothing runs or waits."""
        self.turn(*messages)
        while self.scheduler.running or self.scheduler.waiting:
            turns -= 1
            assert turns > 0, "the core makes no progress"
            self.turn()

    def ids(self, name: str) -> list[int]:
        return [t.token_id for t in self.tokens.get(name, [])]

    def texts(self) -> dict[str, list[int]]:
        return {name: self.ids(name) for name in self.tokens}


@contextmanager
def engine_core(model: LoadedModel, **settings: Any) -> Iterator[Crank]:
    """A core over `model` with a small pool; afterwards nothing of it is left in the model."""
    config = TransformersConfig(**{"kv_cache_bytes": 1 << 26, "prefix_cache_bytes": 1 << 24, **settings})
    crank = Crank(model, config)
    try:
        yield crank
    finally:
        crank.scheduler.adapters.close()
        for linear in model.linears:
            linear.stacks.clear()
