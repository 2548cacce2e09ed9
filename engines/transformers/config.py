"""The knobs of the transformers engine: parsed at the edge, frozen, sent to the worker as they are."""

from dataclasses import dataclass
from typing import Literal

Weights = Literal["auto", "native", "float32", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """Sizes and limits of one worker. None means: chosen by the worker from the model and the machine.

    `weights` says how the matrices are stored on a CPU (the maths is float32): `float32` (exact), `float16` (half the
    bytes, exact to fp16 rounding), `int8` (only on wish: activations are quantised over the whole batch, so that rows
    influence each other slightly and a seed alone does not repeat an output), `native` (the module's own `F.linear`);
    `auto` takes float16 for checkpoints that hold 16 bits or less a weight, else float32. Other devices always use
    `native`.
    """

    device: str | None = None  # "cpu", "cuda:0", ...; None: torch.accelerator's, else the CPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights: Weights = "auto"
    threads: int | None = None  # compute threads on a CPU
    max_model_len: int | None = None
    max_num_seqs: int = 64  # rows in one batch
    max_num_batched_tokens: int = 512  # prompt tokens prefilled in one step, so that running streams keep moving
    max_waiting: int = 1024  # queued rows before Overloaded
    kv_cache_bytes: int | None = None  # bound of the KV pool
    enable_prefix_caching: bool = True
    prefix_cache_bytes: int | None = None
    max_loras: int = 32  # adapters on the device at once
    max_lora_rank: int = 256
    adapter_cpu_bytes: int = 1024**3  # prepared adapters kept in host memory beside the device slots
    trust_remote_code: bool = False
