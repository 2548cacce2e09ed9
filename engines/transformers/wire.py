"""Engine contract objects to wire messages and back: the server's side first, then the worker's."""

import time

import msgspec

from ...adapters.base import ModuleShape
from ...storage.errors import InvalidInput
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


def check_submit(message: Submit, vocab_size: int) -> None:
    """Refuse what would index outside the logits, or ends before it begins: one request must not end the worker."""
    sampling = message.sampling
    for param, ids in (
        ("prompt", message.prompt),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        bad = next((t for t in ids if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise InvalidInput(f"Token id {bad} is outside the vocabulary of {vocab_size} tokens.", param=param)
    if not message.prompt:
        raise InvalidInput("The prompt has no tokens. Send at least one.", param="prompt")
    if sampling.max_tokens < 1 or sampling.n < 1:
        raise InvalidInput("Ask for at least one completion of at least one token.", param="max_tokens")


def sampling_params(wire: WireSampling, index: int) -> SamplingParams:
    """The row's own parameters; prompt log-probabilities are told once, by the first row."""
    fields = msgspec.structs.asdict(wire)
    fields["stop_token_ids"] = frozenset(wire.stop_token_ids)
    fields["prompt_logprobs"] = wire.prompt_logprobs if index == 0 else None
    return SamplingParams(**fields)


def wire_logprob(entry: TokenLogprob | None) -> WireLogprob | None:
    return None if entry is None else WireLogprob(entry.token_id, entry.logprob, entry.rank, list(entry.top))
