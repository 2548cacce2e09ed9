"""Turns text and chats into token ids and back, by the tokenizer of a served model. It knows no Starlette."""

import asyncio

from ...engines.registry import ModelRegistry
from ...engines.tokenizer import ChatTokenizer
from ...storage.errors import InvalidInput
from ..generation.rendering import encode_text, render_messages
from ..generation.template import check_chat_template
from .protocol import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse


class TokenizeService:
    """`trust_chat_template`: whether requests may bring a template of their own."""

    def __init__(self, registry: ModelRegistry, *, trust_chat_template: bool) -> None:
        self._registry = registry
        self._trust_chat_template = trust_chat_template

    def model_or_only(self, model: str | None) -> str:
        """The model that a request means. Raises InvalidInput if it names none and there is a choice."""
        if model is not None:
            return model
        ready = [status.name for status in self._registry.statuses() if status.state == "ready"]
        if len(ready) == 1:
            return ready[0]
        raise InvalidInput(
            f"The field 'model' is missing, and {len(ready)} base models are loaded; name the one that you mean.",
            param="model",
        )

    async def tokenize(self, model: str, body: TokenizeRequest) -> TokenizeResponse:
        """Loads the model if need be, for its context length."""
        check_chat_template(body.chat_template, trusted=self._trust_chat_template)
        async with self._registry.lease(model) as lease:
            tokens = await _encode(lease.tokenizer, body)
            strings = [lease.tokenizer.token_piece(token_id) for token_id in tokens] if body.return_token_strs else None
            return TokenizeResponse(
                count=len(tokens), max_model_len=lease.info.max_model_len, tokens=tokens, token_strs=strings
            )

    async def detokenize(self, model: str, body: DetokenizeRequest) -> DetokenizeResponse:
        """The text with its special tokens. Raises InvalidInput for ids outside the vocabulary."""
        async with self._registry.lease(model) as lease:
            lease.tokenizer.check_ids(body.tokens, param="tokens")
            text = await asyncio.to_thread(lease.tokenizer.decode, body.tokens, skip_special_tokens=False)
            return DetokenizeResponse(prompt=text)


async def _encode(tokenizer: ChatTokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        return await encode_text(tokenizer, body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    continues = bool(body.continue_final_message)
    return await render_messages(
        tokenizer,
        [message.to_template() for message in body.messages],
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        template_kwargs=body.chat_template_kwargs,
        chat_template=body.chat_template,
        add_special_tokens=bool(body.add_special_tokens),
    )
