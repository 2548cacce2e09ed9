"""Loads a checkpoint for serving: device, dtype, kernels, and proof that the operated model still says the same.

The proof: before surgery the model answers a short prompt in its own way; afterwards the executor answers it from the
pool, in a prompt chunk and two decoding steps. If the logits differ, the slower executor is tried; if those differ
too, the model is refused. So an architecture is served rightly or not at all.
"""

import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from ...storage.errors import InvalidInput
from .attention import ATTENTION
from .batch import ChunkInput, build_batch
from .config import TransformersConfig
from .executor import Executor, FlatExecutor, GroupExecutor
from .kernels import Float16Kernel, Int8Kernel, KernelFactory, choose_kernel
from .kv import KVPool, KVShape
from .linear import AdaptedLinear
from .surgery import Surgeon

_PROBE = 12  # tokens


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    executor: Executor
    modules: dict[str, tuple[AdaptedLinear, int]]
    shapes: list[KVShape]
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    kernel: str
    seconds: float

    @property
    def linears(self) -> list[AdaptedLinear]:
        return list({id(linear): linear for linear, _ in self.modules.values()}.values())


def choose_device(name: str | None) -> torch.device:
    """The named device, else torch's accelerator, else the CPU. Raises InvalidInput for one that isn't there."""
    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InvalidInput(
                f"device={name} does not work with this build of torch on this machine ({str(error).splitlines()[0]}). "
                "Leave it out to let the engine choose.",
                param="device",
            ) from error
        return device
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        assert found is not None
        return found
    return torch.device("cpu")


def _choose_dtype(wanted: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if device.type == "cpu":
        return torch.float32  # half precision is emulated on most CPUs; kernels.py stores the weights smaller
    return torch.bfloat16 if checkpoint == torch.float32 else checkpoint


def load_model(path: Path, config: TransformersConfig) -> LoadedModel:
    """Load `path` (a folder in Hugging Face's layout). Raises InvalidInput with the reason if it cannot be served."""
    began = time.monotonic()
    device = choose_device(config.device)
    try:
        hf = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # its validators raise classes of their own
        raise InvalidInput(f"'{path}' is not a model that transformers knows: {error}", param="model") from error
    text = hf.get_text_config()
    checkpoint = getattr(hf, "dtype", None) or torch.float32
    dtype = _choose_dtype(config.dtype, device, checkpoint)
    bits = _bits_per_weight(hf, checkpoint)
    kernel, why = choose_kernel(config.weights if dtype == torch.float32 else "native", device, bits)
    for attempt in ("flat", "group"):
        model = _read(path, config, dtype, device)
        if attempt == "flat" and not getattr(model, "_supports_attention_backend", False):
            continue
        if attempt == "flat" and _length_dependent_rope(text):
            continue
        probe = torch.arange(_PROBE, device=device) * 7 % text.vocab_size
        expected, shapes = _reference(model, probe)
        if not bool(torch.isfinite(expected).all()):
            raise InvalidInput(
                f"The model at '{path}' answers with numbers that are not finite in {dtype}: its weights are broken, "
                "or overflow in this dtype. Fetch it again, or start with dtype=float32.",
                param="model",
            )
        surgeon = Surgeon(kernel, dtype, device, fuse=attempt == "flat", head=_head_name(model))
        surgeon.operate(model)
        executor = _executor(attempt, model, text)
        got = _through_pool(executor, probe, shapes, dtype, device)
        if _agree(expected, got, kernel, dtype):
            return LoadedModel(
                executor=executor,
                modules=surgeon.modules,
                shapes=shapes,
                device=device,
                dtype=dtype,
                vocab_size=expected.shape[-1],
                max_model_len=_max_len(text, config),
                eos_token_ids=_eos(hf, model),
                kernel=f"{why}; {'flat batches' if attempt == 'flat' else 'grouped batches through its own attention'}",
                seconds=time.monotonic() - began,
            )
        del model, executor, surgeon
    raise InvalidInput(
        f"The transformers engine cannot serve this architecture ({hf.model_type}): through its KV pool the model "
        "gives other logits than by itself. Serve it with another engine, or report it.",
        param="model",
    )


def _read(path: Path, config: TransformersConfig, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=None,
            use_safetensors=True,
        )
    except Exception as error:  # safetensors, model code and transformers raise classes of their own
        raise InvalidInput(f"The model at '{path}' cannot be loaded: {error}", param="model") from error
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise InvalidInput(
            f"The checkpoint at '{path}' lacks {len(missing)} weights of its model, {missing[0]} among them. "
            "Fetch it again, or save it with all of its weights.",
            param="model",
        )
    return model.eval().requires_grad_(False).to(device)


def _executor(attempt: str, model: Any, text: Any) -> Executor:
    if attempt == "flat":
        model.set_attn_implementation(ATTENTION)
        return FlatExecutor(model)
    layer_types = getattr(text, "layer_types", None) or []
    windowed = getattr(text, "sliding_window", None) is not None or any("full" not in t for t in layer_types)
    return GroupExecutor(
        model,
        same_length_only=windowed or _length_dependent_rope(text),
        takes_positions="position_ids" in inspect.signature(model.forward).parameters,
    )


def _length_dependent_rope(text: Any) -> bool:
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    return any(r.get("rope_type") in ("dynamic", "longrope") for r in kinds)


def _head_name(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((n for n, m in model.named_modules() if m is head), None)


@torch.inference_mode()
def _reference(model: Any, probe: Tensor) -> tuple[Tensor, list[KVShape]]:
    """The model's own logits of the last three probe tokens, and what its cache looks like."""
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=probe[None], past_key_values=cache, use_cache=True).logits[0, -3:].float()
    shapes: list[KVShape] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4:
            raise InvalidInput(
                "This model keeps a state that is not keys and values (a recurrent or hybrid architecture); "
                "the transformers engine serves attention models only.",
                param="model",
            )
        shapes.append(KVShape(keys.shape[1], keys.shape[3], values.shape[3]))
    return logits, shapes


@torch.inference_mode()
def _through_pool(
    executor: Executor, probe: Tensor, shapes: list[KVShape], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The same three rows of logits from a chunk and two decoding steps, or None if the model cannot run so."""
    pool = KVPool(shapes, dtype, device, max_bytes=1 << 40, max_tokens_per_row=64)
    slot = pool.allocate(_PROBE)
    assert slot is not None
    rows: list[Tensor] = []
    done = 0
    try:
        for count in (_PROBE - 2, 1, 1):
            chunk = ChunkInput(
                probe[done : done + count].tolist(), done, slot, None, all_logits=False, wants_logits=True
            )
            rows.append(executor.run(build_batch([chunk], device))[-1])
            done += count
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError):
        return None
    return torch.stack(rows)


def _agree(expected: Tensor, got: Tensor | None, kernel: KernelFactory, dtype: torch.dtype) -> bool:
    if got is None or got.shape != expected.shape or not bool(torch.isfinite(got).all()):
        return False
    lossy: dict[KernelFactory, float] = {Float16Kernel: 0.03, Int8Kernel: 0.5}
    relative = lossy.get(kernel, 2e-3 if dtype == torch.float32 else 0.1)
    spread = float(expected.std().clamp_min(1e-6))
    return float((expected - got).abs().max()) <= relative * max(spread, 1e-3) * 10


def _bits_per_weight(hf: Any, checkpoint: torch.dtype) -> float:
    if getattr(hf, "tuneloop_source_bits", None):
        return float(hf.tuneloop_source_bits)
    return float(checkpoint.itemsize * 8)


def _max_len(text: Any, config: TransformersConfig) -> int:
    trained = int(getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None) or 2048)
    if _length_dependent_rope(text):  # past the first length all earlier keys would have to be turned again
        rope = getattr(text, "rope_parameters", None) or {}
        first = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        trained = min(trained, int(first or trained))
    if config.max_model_len is None:
        return trained
    if config.max_model_len > trained:
        raise InvalidInput(
            f"max_model_len={config.max_model_len} is over the {trained} positions that it can be served with.",
            param="max_model_len",
        )
    return config.max_model_len


def _eos(hf: Any, model: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (hf, getattr(model, "generation_config", None)):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
