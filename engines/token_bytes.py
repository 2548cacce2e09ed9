"""Which bytes each token of a vocabulary stands for, where that does not depend on its neighbours.

True for byte-level BPE (GPT-2, LLaMA 3, Qwen, ...) and for SentencePiece vocabularies (LLaMA 2, Mistral, Gemma, ...).
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

_SPACE_SIGN = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class PieceTable:
    """Token id to bytes, worked out at the first look-up of each id. Ids without a token stand for nothing.

    `strips_first_space`: the tokenizer's decoder drops one space at the start of a sequence.
    """

    def __init__(
        self, piece_of: Callable[[int], str | None], to_bytes: Callable[[str], bytes], *, strips_first_space: bool
    ) -> None:
        self.strips_first_space = strips_first_space
        self._piece_of = piece_of
        self._to_bytes = to_bytes
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            piece = self._piece_of(token_id)
            found = b"" if piece is None else self._to_bytes(piece)
            self._known[token_id] = found
        return found


def piece_table(backend: Tokenizer) -> PieceTable | None:
    """The table for this tokenizer, or None if its decoder joins tokens in a way that a table cannot hold."""
    if backend.decoder is None:
        return None
    # The Python object tells its type only by its serialised state.
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceTable(backend.id_to_token, _byte_level_bytes, strips_first_space=False)
    if kinds == ["Metaspace"]:
        plain = steps[0].get("replacement") == _SPACE_SIGN
        strips = steps[0].get("prepend_scheme") != "never"
        return PieceTable(backend.id_to_token, _spaced_bytes, strips_first_space=strips) if plain else None
    if all(_is_sentencepiece_step(step) for step in steps) and {"Replace", "Fuse"} <= set(kinds):
        to_bytes = _byte_fallback_bytes if "ByteFallback" in kinds else _spaced_bytes
        return PieceTable(backend.id_to_token, to_bytes, strips_first_space="Strip" in kinds)
    return None


def _is_sentencepiece_step(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Replace", "pattern": {"String": str(sign)}, "content": " "}:
            return sign == _SPACE_SIGN
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return True
        case {"type": "ByteFallback" | "Fuse"}:
            return True
    return False


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(_BYTE_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()  # an added token, kept as plain text


def _spaced_bytes(piece: str) -> bytes:
    return piece.replace(_SPACE_SIGN, " ").encode()


def _byte_fallback_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _spaced_bytes(piece)
