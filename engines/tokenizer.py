"""A checkpoint's own tokenizer behind one face: text to ids and back, and chats to prompts.

It knows nothing of engines and HTTP. Two kinds of checkpoint, clearly told apart:

- with a `tokenizer.json` (nearly all): read by the `tokenizers` library alone, so that no process imports torch for it;
- without one, or with tokenizer code of its own that the operator trusts: transformers' AutoTokenizer, which does.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.errors import InvalidInput
from .detokenizer import ByteDecoder, TextDecoder, WindowDecoder
from .rendering import Message, render_chat
from .sampling_defaults import SamplingDefaults, read_sampling_defaults
from .tokenizer_backends import JsonBackend, TokenizerBackend, load_by_transformers
from .tokenizer_files import TokenizerFiles, read_tokenizer_files


class ChatTokenizer:
    """Safe to call from several threads. Build it with `load`; `path` is the checkpoint folder it came from."""

    def __init__(
        self, path: Path, backend: TokenizerBackend, files: TokenizerFiles, sampling_defaults: SamplingDefaults
    ) -> None:
        self.path = path
        self.sampling_defaults = sampling_defaults
        self._backend = backend
        self._files = files

    @classmethod
    def load(cls, path: Path, *, trust_remote_code: bool = False) -> "ChatTokenizer":
        """Read a checkpoint folder. Blocking. Raises InvalidInput if it holds no tokenizer that can be read."""
        files = read_tokenizer_files(path)
        source = path / "tokenizer.json"
        backend: TokenizerBackend
        if source.is_file() and not (files.has_remote_code and trust_remote_code):
            backend = JsonBackend.load(source, files)
        else:
            backend, files = load_by_transformers(path, files, trust_remote_code=trust_remote_code)
        return cls(path, backend, files, read_sampling_defaults(path))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return self._backend.vocab_size

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The named special tokens (`bos_token`, `eos_token`, ...) with their text."""
        return self._files.special_tokens

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def all_special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of a text."""
        return self._backend.special_ids

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._files.templates

    def chat_template(self, name_or_source: str | None = None, *, has_tools: bool = False) -> str:
        """The Jinja source to use: the one given, the checkpoint's template of that name, or its own choice.

        Raises InvalidInput if the checkpoint has none.
        """
        templates = self._files.templates
        if name_or_source is not None:
            return templates.get(name_or_source, name_or_source)
        if has_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" not in templates:
            raise InvalidInput(
                "This model has no chat template, so it cannot be chatted with; use /v1/completions instead.",
                param="messages",
                code="no_chat_template",
            )
        return templates["default"]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens` adds what the tokenizer itself puts around a text, such as BOS."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _no_unicode() from error

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """The same for many texts, on all cores where the tokenizers library reads the tokenizer."""
        try:
            return self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _no_unicode() from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all ids at once. Raises InvalidInput for an id outside the vocabulary."""
        self.check_ids(ids)
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def check_ids(self, ids: Sequence[int], *, param: str | None = None) -> None:
        """Raises InvalidInput for the first id outside the vocabulary."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise InvalidInput(
                f"Token id {wrong} is outside the vocabulary, which has the ids 0 to {self.vocab_size - 1}.",
                param=param,
            )

    def token_piece(self, token_id: int) -> str:
        """The token as the vocabulary writes it (`Ġthe`, `▁the`, `<0x0A>`); empty for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; they may be a part of a character."""
        if self._backend.table is not None:
            return self._backend.table.bytes_of(token_id)
        return self.token_piece(token_id).encode()

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def text_decoder(self, *, skip_special_tokens: bool, context: Sequence[int] = ()) -> TextDecoder:
        """A decoder for one row that follows the ids of `context` (its prompt)."""
        if self._backend.table is not None:
            strip = self._backend.table.strips_first_space and not context
            return ByteDecoder(self._skipping(self._backend.table.bytes_of, skip_special_tokens), strip_space=strip)

        def decode(ids: Sequence[int]) -> str:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

        return WindowDecoder(decode, context)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """The token ids of a conversation's prompt; see `rendering.render_chat`."""
        return render_chat(
            self,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            chat_template=chat_template,
            add_special_tokens=add_special_tokens,
        )

    def _skipping(self, bytes_of: Callable[[int], bytes], skip: bool) -> Callable[[int], bytes]:
        if not skip:
            return bytes_of
        special = self._backend.special_ids
        return lambda token_id: b"" if token_id in special else bytes_of(token_id)

    def _named_id(self, name: str) -> int | None:
        token = self._files.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _no_unicode() -> InvalidInput:
    return InvalidInput("The text holds a lone surrogate, which is no character; send valid Unicode.")
