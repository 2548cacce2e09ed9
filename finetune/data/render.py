"""Turns rows into token sequences by the function that serves, and marks what the model is to learn to produce.

The ids before an answer are exactly those of the prompt that the server would make of the same conversation; a test
holds this for every template it knows. Where an answer begins and ends comes from the template itself: it is what the
template writes when the answer joins the conversation, or, of that, what `{% generation %}` blocks hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engines.rendering import marked_regions, render_text
from ...engines.tokenizer import ChatTokenizer
from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from .base import Row, TokenSequence
from .checks import DataError

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer: the ids of its prompt, and of what the template writes for it, each with whether it is learnt."""

    prompt: list[int]
    answer: list[int]
    learnt: list[bool]


class Renderer:
    """By one tokenizer and one recipe. `split_conversations` counts rows that became one sequence an answer."""

    def __init__(self, tokenizer: ChatTokenizer, recipe: Recipe) -> None:
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._kwargs = {} if recipe.enable_thinking is None else {"enable_thinking": recipe.enable_thinking}
        self.split_conversations = 0

    def sequences(self, row: Row) -> list[TokenSequence]:
        """One sequence; or one for each answer, where the template rewrites earlier turns, so that each is learnt
        behind the prompt that it will meet. Raises DataError if the template cannot show the row.
        """
        if row.text is not None:
            return [self._text(row, row.text)]
        messages = self._messages(row)
        wanted = self._supervised(messages)
        plain: list[Message] = [
            {key: value for key, value in message.items() if key != "weight"} for message in messages
        ]
        try:
            turns = [self._turn(plain, index, row) for index in wanted]
            whole = self._ids(self._render(plain, row, open_turn=False))
        except DataError:
            raise
        except InvalidInput as error:
            raise self._refused(row, error.message) from error
        joined = self._joined(turns, whole, row)
        if joined is not None:
            return [joined]
        self.split_conversations += 1
        return [self._alone(turn, row) for turn in turns]

    def spans(self, row: Row) -> list[tuple[str, bool]]:
        """The row's text as the model sees it, in pieces, each with whether it is learnt."""
        pieces: list[tuple[str, bool]] = []
        for sequence in self.sequences(row):
            start = 0
            for end in range(1, len(sequence.ids) + 1):
                if end == len(sequence.ids) or sequence.supervised[end] != sequence.supervised[start]:
                    text = self._tokenizer.decode(sequence.ids[start:end], skip_special_tokens=False)
                    pieces.append((text, sequence.supervised[start]))
                    start = end
        return pieces

    def _messages(self, row: Row) -> list[Message]:
        messages = list(row.messages)
        system = self._recipe.default_system
        if system is not None and messages[0].get("role") not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def _supervised(self, messages: Sequence[Message]) -> list[int]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self._recipe.mask_history:
            answers = answers[-1:]
        return [i for i in answers if messages[i].get("weight", 1) != 0]

    def _render(self, messages: Sequence[Message], row: Row, *, open_turn: bool) -> str:
        return render_text(
            self._tokenizer,
            messages,
            tools=row.tools or None,
            add_generation_prompt=open_turn,
            template_kwargs=self._kwargs,
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _turn(self, messages: Sequence[Message], index: int, row: Row) -> _Turn:
        before = self._render(messages[:index], row, open_turn=True)
        through = self._render(messages[: index + 1], row, open_turn=False)
        if not through.startswith(before):
            raise DataError(
                f"The chat template does not open message {index} as it shows it afterwards, so what is learnt would "
                "not be what is served.",
                "Set enable_thinking, mask_history or the message's weight to 0 so that this turn is not learnt, or "
                "use a model whose template is consistent.",
                place=row.place,
                path=f"messages[{index}]",
            )
        prompt = self._ids(before)
        learnt_text = through[len(before) :]
        if not learnt_text.strip():
            raise DataError(
                "The chat template shows nothing of this message.",
                "Its content may be of a kind that the template does not know.",
                place=row.place,
                path=f"messages[{index}]",
            )
        regions = self._regions(messages[: index + 1], row, through, begin=len(before))
        whole = self._ids(through)
        if regions is None and whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
            return _Turn(prompt, answer, [True] * len(answer))
        answer, learnt = [], []
        for start, end, marked in regions or [(len(before), len(through), True)]:
            ids = self._ids(through[start:end])
            answer += ids
            learnt += [marked] * len(ids)
        return _Turn(prompt, answer, learnt)

    def _regions(
        self, messages: Sequence[Message], row: Row, through: str, *, begin: int
    ) -> list[tuple[int, int, bool]] | None:
        """What `{% generation %}` blocks say of the text behind `begin`, in pieces; None for templates without."""
        marked = marked_regions(self._tokenizer, messages, tools=row.tools or None, template_kwargs=self._kwargs)
        if marked is None:
            return None
        pieces: list[tuple[int, int, bool]] = []
        position = begin
        for start, end in marked:
            first, last = max(start, begin), min(end, len(through))
            if last <= first:
                continue
            if position < first:
                pieces.append((position, first, False))
            pieces.append((first, last, True))
            position = last
        if position < len(through):
            pieces.append((position, len(through), False))
        return pieces

    def _joined(self, turns: Sequence[_Turn], whole: list[int], row: Row) -> TokenSequence | None:
        """All answers in one sequence, if each one's prompt is what it is when the conversation ends there."""
        supervised = [self._recipe.train_on_prompt] * len(whole)
        for turn in turns:
            end = len(turn.prompt) + len(turn.answer)
            if whole[:end] != turn.prompt + turn.answer:
                if len(turns) == 1 and turn is turns[0]:
                    return self._alone(turn, row)
                return None
            supervised[len(turn.prompt) : end] = turn.learnt
        return TokenSequence(ids=whole, supervised=_but_first(supervised), place=row.place)

    def _alone(self, turn: _Turn, row: Row) -> TokenSequence:
        supervised = [self._recipe.train_on_prompt] * len(turn.prompt) + turn.learnt
        return TokenSequence(ids=turn.prompt + turn.answer, supervised=_but_first(supervised), place=row.place)

    def _text(self, row: Row, text: str) -> TokenSequence:
        ids = self._tokenizer.encode(text, add_special_tokens=True)
        end = self._tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        return TokenSequence(ids=ids, supervised=_but_first([True] * len(ids)), place=row.place)

    def _refused(self, row: Row, reason: str) -> DataError:
        return DataError(reason, "Check the row against the model's chat template.", place=row.place)


def _without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _but_first(supervised: list[bool]) -> list[bool]:
    """Nothing comes before the first token that it could be learnt from."""
    return [False, *supervised[1:]] if supervised else []
