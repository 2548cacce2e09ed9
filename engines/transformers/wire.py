"""Engine contract objects to wire messages and back, on the server's side."""

import time

from ...adapters.base import ModuleShape
from ..base import EngineInfo, GenerateRequest, SamplingParams, TokenLogprob
from .protocol import Ready, Submit, Token, WireLogprob, WireSampling


def submit(request: GenerateRequest) -> Submit:
    s = request.sampling
    left = None if request.deadline is None else request.deadline - time.monotonic()
    return Submit(
        request.request_id,
        list(request.prompt_token_ids),
        WireSampling(
            n=s.n,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            logit_bias=dict(s.logit_bias),
            stop_token_ids=sorted(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            min_tokens=s.min_tokens,
            max_tokens=s.max_tokens,
            logprobs=s.logprobs,
            prompt_logprobs=s.prompt_logprobs,
        ),
        request.adapter.digest if request.adapter is not None else None,
        str(request.adapter.path) if request.adapter is not None else None,
        request.priority,
        left,
    )


def logprob(wire: WireLogprob, top: int | None) -> TokenLogprob:
    return TokenLogprob(wire.token_id, wire.logprob, wire.rank, tuple(wire.top[:top]))


def prompt_logprobs(token: Token, sampling: SamplingParams) -> list[TokenLogprob | None] | None:
    if token.prompt_logprobs is None:
        return None
    return [None if p is None else logprob(p, sampling.prompt_logprobs) for p in token.prompt_logprobs]


def engine_info(ready: Ready, pid: int) -> EngineInfo:
    return EngineInfo(
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        eos_token_ids=frozenset(ready.eos_token_ids),
        device=ready.device,
        dtype=ready.dtype,
        kernel=ready.kernel,
        modules={n: ModuleShape(in_features=i, out_features=o) for n, (i, o) in ready.modules.items()},
        kv_cache_tokens=ready.kv_cache_tokens,
        load_seconds=ready.load_seconds,
        pid=pid,
    )
