"""The two libraries that can read a tokenizer, behind one face. They know ids and text, no chats and no templates."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from ..storage.errors import InvalidInput
from .token_bytes import PieceTable, piece_table
from .tokenizer_files import TokenizerFiles


class TokenizerBackend(ABC):
    """Safe to call from several threads. `table` is None where a token's text depends on its neighbours."""

    special_ids: frozenset[int]
    vocab_size: int
    table: PieceTable | None

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def id_to_token(self, token_id: int) -> str | None: ...

    @abstractmethod
    def token_to_id(self, token: str) -> int | None: ...


class JsonBackend(TokenizerBackend):
    """A `tokenizer.json`, read by the `tokenizers` library alone: no torch, no transformers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.table = piece_table(tokenizer)

    @classmethod
    def load(cls, path: Path, files: TokenizerFiles) -> "JsonBackend":
        """Raises InvalidInput for a file that the library cannot parse."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InvalidInput(f"{path} cannot be read ({error}); fetch the checkpoint again.") from error
        _complete(tokenizer, files)
        return cls(tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class PythonBackend(TokenizerBackend):
    """A tokenizer written in Python (the checkpoint's own code, or transformers'), without a `tokenizer.json` form."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.table = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def id_to_token(self, token_id: int) -> str | None:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return None if token is None else str(token)

    def token_to_id(self, token: str) -> int | None:
        found = self._tokenizer.get_vocab().get(token)
        return None if found is None else int(found)


def load_by_transformers(
    folder: Path, files: TokenizerFiles, *, trust_remote_code: bool
) -> tuple[TokenizerBackend, TokenizerFiles]:
    """Let transformers build the tokenizer from whatever files there are; imports torch.

    The files come back with the special tokens that only the tokenizer itself could name.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise InvalidInput(f"{folder} holds no tokenizer that can be read: {error}") from error
    named = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    files = replace(files, special_tokens={**named, **files.special_tokens})
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return (JsonBackend(fast) if isinstance(fast, Tokenizer) else PythonBackend(tokenizer)), files


def _complete(tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    """Apply what the configuration files say beyond `tokenizer.json`, as transformers does on loading."""
    for _, token in sorted(files.added_tokens.items()):
        if tokenizer.token_to_id(token["content"]) is None:
            tokenizer.add_tokens([_added_token(token)])
    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = (*files.special_tokens.values(), *files.extra_special_tokens)
    tokenizer.add_special_tokens([text for text in named if text not in marked])
    if files.add_bos is None and files.add_eos is None:
        return
    bos = files.special_tokens.get("bos_token") if files.add_bos else None
    eos = files.special_tokens.get("eos_token") if files.add_eos else None
    around = [(text, found) for text in (bos, eos) if text and (found := tokenizer.token_to_id(text)) is not None]
    parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    tokenizer.post_processor = TemplateProcessing(single=parts, pair=[*parts, "$B:1"], special_tokens=around)


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], special=bool(token.get("special", False)), **flags)
