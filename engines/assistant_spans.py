"""Finds in a conversation's rendered text what the assistant wrote: the part that training is about.

The template itself decides, by its `{% generation %}` blocks, or else by the exact difference between the prompt of a
turn and the conversation through that turn. Either way everything before a span is, to the character, the prompt that
the server would send. It knows no token ids, no data files and no recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..storage.errors import InvalidInput
from .chat_templates import GENERATION_END, GENERATION_START, marks_generation
from .rendering import Message, TemplateTokenizer, render_text

_START, _END = "\ue0f4", "\ue0f5"  # private-use characters, taken out again
Span = tuple[int, int]  # characters from and to


@dataclass(frozen=True, slots=True)
class TrainingText:
    """A text to train on. `spans` is what is learned, in order; `turns` are the whole turns that were asked for, each
    from the end of its prompt to what the template writes behind the answer."""

    text: str
    spans: tuple[Span, ...]
    turns: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    index: int
    prompt: str
    through: str

    @property
    def span(self) -> Span:
        return len(self.prompt), len(self.through)


def training_texts(
    tokenizer: TemplateTokenizer,
    messages: Sequence[Message],
    learned: Sequence[int],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    with_prompts: bool = False,
) -> list[TrainingText]:
    """The texts that teach the assistant messages at the places `learned`, each message in exactly one of them.

    One text is enough unless the template writes earlier turns differently once there are later ones; then each such
    turn gets the conversation up to itself. `with_prompts` makes spans of everything but the assistant messages that
    are not in `learned`. Raises InvalidInput where the template makes prompt and answer inseparable.
    """

    def render(end: int, *, opens_turn: bool, more: Mapping[str, Any] | None = None) -> str:
        kwargs = {**(template_kwargs or {}), **(more or {})}
        return render_text(
            tokenizer, messages[:end], tools=tools, add_generation_prompt=opens_turn, template_kwargs=kwargs
        )

    def turn(index: int) -> _Turn:
        if index == 0:
            raise InvalidInput(
                "The first message is the assistant's, so there is no prompt that it answers. Put a user or system "
                "message before it, or give it weight 0.",
                param="messages",
            )
        prompt = render(index, opens_turn=True)
        through = render(index + 1, opens_turn=False)
        _check_separable(prompt, through, index)
        return _Turn(index, prompt, through)

    source = tokenizer.chat_template(has_tools=bool(tools))
    groups = _grouped([turn(index) for index in sorted(learned)])
    texts = []
    for group in groups:
        text = group[-1].through
        spans = tuple(turn.span for turn in group)
        if marks_generation(source):
            marks = {GENERATION_START: _START, GENERATION_END: _END}
            marked = _marked(render(group[-1].index + 1, opens_turn=False, more=marks), text)
            spans = spans if marked is None else _common(spans, marked)
        if with_prompts and group is groups[-1]:
            others = [i for i in range(1, group[-1].index) if messages[i]["role"] == "assistant" and i not in learned]
            spans = _without([_inside(turn(index), text) for index in others], len(text))
        texts.append(TrainingText(text, spans, tuple(turn.span for turn in group)))
    return texts


def _check_separable(prompt: str, through: str, index: int) -> None:
    if through.startswith(prompt) and len(through) > len(prompt):
        return
    same = next((i for i, (a, b) in enumerate(zip(prompt, through, strict=False)) if a != b), len(through))
    raise InvalidInput(
        f"This model's chat template makes it impossible to train on the answer in messages[{index}]: the conversation "
        f"no longer begins as the prompt that asks for the answer (that goes on with {prompt[same:][:40]!r}, the "
        f"conversation with {through[same:][:40]!r}), so that what is trained would not be what is served. Set "
        "enable_thinking: false if the template knows it, write the answer as this template opens it (with its "
        "reasoning, for example), or give the checkpoint a chat_template.jinja whose answers begin as its generation "
        "prompt ends.",
        param="messages",
        code="template_not_trainable",
    )


def _grouped(turns: Sequence[_Turn]) -> list[list[_Turn]]:
    """Turns that one text holds, together: every group's last turn is its text."""
    groups: list[list[_Turn]] = []
    for turn in reversed(turns):
        for group in groups:
            if group[0].through.startswith(turn.through):
                group.append(turn)
                break
        else:
            groups.append([turn])
    return [group[::-1] for group in reversed(groups)]


def _marked(rendered: str, text: str) -> list[Span] | None:
    """Where the marks stand; None if the text without them is another one (a template that trims around a mark, or
    messages that hold the same characters): then only the prompts can say what the assistant wrote."""
    spans, pieces, start, length = [], [], None, 0
    position = 0
    for place, character in enumerate(rendered):
        if character in (_START, _END):
            pieces.append(rendered[position:place])
            length += place - position
            position = place + 1
            if character == _START:
                start = length
            elif start is not None:
                spans.append((start, length))
                start = None
    pieces.append(rendered[position:])
    return spans if "".join(pieces) == text else None


def _common(spans: Sequence[Span], others: Sequence[Span]) -> tuple[Span, ...]:
    pairs = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return tuple((start, end) for start, end in pairs if start < end)


def _inside(turn: _Turn, text: str) -> Span:
    if not text.startswith(turn.through):
        raise InvalidInput(
            f"This model's chat template rewrites the answer in messages[{turn.index}] once later turns follow, so it "
            "cannot be left out of train_on_prompt; set train_on_prompt: false.",
            param="train_on_prompt",
        )
    return turn.span


def _without(holes: Sequence[Span], length: int) -> tuple[Span, ...]:
    edges = [0, *(edge for hole in holes for edge in hole), length]
    return tuple((start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end)
