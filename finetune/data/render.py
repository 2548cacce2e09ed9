"""Turns rows into token sequences by the function that serves, so that what is trained is what is served.

The ids before each answer equal, one for one, those that the server sends for the same conversation. A tokenizer may
join the end of a prompt with the beginning of an answer into one token; then the text is encoded in pieces, and if
that changes a later prompt, turn by turn. It knows no file, no cutoff and no packing.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...engines.assistant_spans import TrainingText, training_texts
from ...engines.tokenizer import ChatTokenizer
from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from .base import Row, TokenSequence
from .checks import DataError

_Ids = list[int]


@dataclass(frozen=True, slots=True)
class _Encoding:
    """Ids of a text, or of the prompt and answer of one turn. `at` tells the places of edges among the ids; what lies
    outside of its edges is not learned here, nor are the turns of `elsewhere`, which have their own."""

    ids: _Ids
    at: Mapping[int, int]
    elsewhere: tuple[tuple[int, int], ...] = ()

    def sequence(self, text: TrainingText, row: Row) -> TokenSequence:
        supervised = [False] * len(self.ids)
        first, last = min(self.at), max(self.at)
        spans = [(span, True) for span in text.spans] + [(turn, False) for turn in self.elsewhere]
        for (start, end), learned in spans:
            if start < last and end > first:
                a, b = self.at[max(start, first)], self.at[min(end, last)]
                supervised[a:b] = [learned] * (b - a)
        supervised[:1] = [False] * len(supervised[:1])  # nothing predicts the first token
        return TokenSequence(ids=self.ids, supervised=supervised, place=row.place)


class Renderer:
    """By one tokenizer and one recipe, whose `default_system`, `enable_thinking`, `train_on_prompt` and `mask_history`
    decide. `split_conversations` counts the rows that became several sequences."""

    def __init__(self, tokenizer: ChatTokenizer, recipe: Recipe) -> None:
        self._tokenizer = tokenizer
        self._recipe = recipe
        thinking = recipe.enable_thinking
        self._template_kwargs = None if thinking is None else {"enable_thinking": thinking}
        self._anchor = _anchor(tokenizer)
        self.split_conversations = 0

    def texts(self, row: Row) -> list[TrainingText]:
        """What the row becomes before tokenisation; several texts if the template rewrites earlier turns.

        Raises DataError that names the row's place.
        """
        if row.text is not None:
            return [TrainingText(row.text, ((0, len(row.text)),), ())]
        messages = self.messages(row)
        learned = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("weight") != 0]
        if self._recipe.mask_history:
            learned = learned[-1:]
        shift = len(messages) - len(row.messages)
        try:
            return training_texts(
                self._tokenizer,
                messages,
                [index + shift for index in learned],
                tools=row.tools,
                template_kwargs=self._template_kwargs,
                with_prompts=self._recipe.train_on_prompt,
            )
        except InvalidInput as error:
            raise _refused(row, error) from error

    def messages(self, row: Row) -> list[dict[str, Any]]:
        """The row's messages as the server gives them to the template, the recipe's system message included."""
        messages = [_to_template(message) for message in row.messages]
        if self._recipe.default_system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self._recipe.default_system})
        return messages

    def prompt(self, messages: Many[Mapping[str, Any]], tools: Many[Mapping[str, Any]]) -> _Ids:
        """The ids that the server sends for these messages."""
        return self._tokenizer.render_chat(messages, tools=tools, template_kwargs=self._template_kwargs)

    def spans(self, row: Row) -> list[tuple[str, bool]]:
        """The row's text, in pieces, each with whether it is learned; several texts follow one another."""
        pieces: list[tuple[str, bool]] = []
        for text in self.texts(row):
            edges = [0, *(edge for span in text.spans for edge in span), len(text.text)]
            pieces += [(text.text[a:b], place % 2 == 1) for place, (a, b) in enumerate(pairwise(edges)) if a < b]
        return pieces

    def sequences(self, row: Row) -> list[TokenSequence]:
        """The token sequences of one row; see `rows`."""
        return self.rows([row])[0]

    def rows(self, rows: Many[Row]) -> list[list[TokenSequence]]:
        """The token sequences of each row. Many rows at once are encoded together, which is much faster.

        Raises DataError that names the place of the first row that cannot be rendered.
        """
        texts = [self.texts(row) for row in rows]
        plain: list[str] = []
        pieces: dict[str, _Ids] = {}
        for row, of_row in zip(rows, texts, strict=True):
            for text in of_row:
                if row.text is not None:
                    plain.append(text.text)
                else:
                    pieces.update((text.text[:edge], []) for edge in (*_edges(text), len(text.text)))
        try:
            pieces.update(
                zip(pieces, self._tokenizer.encode_batch(list(pieces), add_special_tokens=False), strict=True)
            )
            plain_ids = iter(self._tokenizer.encode_batch(plain, add_special_tokens=True))
        except InvalidInput as error:
            if len(rows) == 1:
                raise _refused(rows[0], error) from error
            return [self.sequences(row) for row in rows]  # one of them is to blame, and says its place
        return [
            [self._plain(row, next(plain_ids))] if row.text is not None else self._chat(row, of_row, pieces)
            for row, of_row in zip(rows, texts, strict=True)
        ]

    def _plain(self, row: Row, ids: _Ids) -> TokenSequence:
        """A text to go on training with: all of it is learned, and that it ends."""
        end = self._tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        return TokenSequence(ids=ids, supervised=[place > 0 for place in range(len(ids))], place=row.place)

    def _chat(self, row: Row, texts: Many[TrainingText], pieces: Mapping[str, _Ids]) -> list[TokenSequence]:
        found = []
        for text in texts:
            before = {edge: pieces[text.text[:edge]] for edge in _edges(text)}
            found += [encoding.sequence(text, row) for encoding in self._encodings(text, before, pieces[text.text])]
        self.split_conversations += len(found) > 1
        return found

    def _encodings(self, text: TrainingText, before: Mapping[int, _Ids], whole: _Ids) -> list["_Encoding"]:
        """The text's ids; several times where only that keeps all prompts exact."""
        at = {0: 0, **{edge: _shared(whole, ids) for edge, ids in before.items()}, len(text.text): len(whole)}
        broken = {edge for edge, ids in before.items() if at[edge] != len(ids)}
        if not broken:
            return [_Encoding(whole, at)]
        edges = [0, *before, len(text.text)]
        encoded = {a: self._continue(text.text[a:b], first=a == 0) for a, b in pairwise(edges)}
        pieced = _joined(0, [], edges, encoded)
        if all(pieced.ids[: pieced.at[prompt]] == before[prompt] for prompt, _ in text.turns):
            return [pieced]
        alone = [turn for turn in text.turns if any(turn[0] <= edge <= turn[1] for edge in broken)]
        found = []
        for start, end in alone:
            inside = [edge for edge in edges if start <= edge <= end]
            found.append(_joined(start, before[start], inside, encoded))
        if len(alone) < len(text.turns):
            found.append(_Encoding(whole, at, tuple(alone)))
        return found

    def _continue(self, piece: str, *, first: bool) -> _Ids:
        """The ids of a piece that stands behind others: without the space that some tokenizers begin a text with."""
        if first or self._anchor is None:
            return self._tokenizer.encode(piece, add_special_tokens=False)
        return self._tokenizer.encode(self._anchor + piece, add_special_tokens=False)[1:]


def _refused(row: Row, error: InvalidInput) -> DataError:
    return DataError(error.message, "Correct the row, or remove it.", place=row.place)


def _edges(text: TrainingText) -> list[int]:
    """Where a token must end: at both ends of what is learned, and of the prompts. Neither 0 nor the text's end."""
    edges = {edge for span in (*text.spans, *text.turns) for edge in span}
    return sorted(edges - {0, len(text.text)})


def _joined(start: int, prompt: _Ids, edges: Many[int], encoded: Mapping[int, _Ids]) -> "_Encoding":
    """The ids of a prompt that ends at `start`, and behind it those of the pieces between the edges."""
    ids, at = list(prompt), {start: len(prompt)}
    for edge, following in pairwise(edges):
        ids += encoded[edge]
        at[following] = len(ids)
    return _Encoding(ids, at)


def _shared(ids: _Ids, others: _Ids) -> int:
    """How many ids both begin with."""
    if ids[: len(others)] == others:
        return len(others)
    return next(place for place, (a, b) in enumerate(zip([*ids, -1], [*others, -2], strict=False)) if a != b)


def _to_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as the server's wire types give it to a template."""
    shown = {key: value for key, value in message.items() if key not in ("weight", "reasoning", "thinking")}
    reasoning = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    if reasoning is not None:
        shown["reasoning_content"] = reasoning
    return shown


def _anchor(tokenizer: ChatTokenizer) -> str | None:
    """A special token to encode pieces behind, if the tokenizer begins every text with a space of its own."""
    encode: Callable[[str], _Ids] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    anchor = tokenizer.special_tokens.get("eos_token")
    if anchor is None or len(encode(anchor)) != 1 or encode("a") == encode(anchor + "a")[1:]:
        return None
    return anchor
