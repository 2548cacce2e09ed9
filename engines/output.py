"""The text of one row as it grows: whole characters only, cut at stop strings. It knows no engine and no batch.

A stop string ends the row when it is *completed*: of several, the one whose end comes first wins, and of those the
longest. The result depends on the tokens alone and not on how they were grouped into `push` calls.
"""

from collections.abc import Sequence

from .base import SamplingParams
from .tokenizer import ChatTokenizer


class OutputText:
    """Feed it every output token of a row once, in order, without the stop token that ends the row.

    `stopped` is the stop string that ended the row, or None; `token_count_at_stop` then says how many of the row's
    tokens were needed to complete it. Tokens pushed after that are ignored. The cost of a token does not depend on
    how many came before.
    """

    def __init__(self, tokenizer: ChatTokenizer, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.stopped: str | None = None
        self.token_count_at_stop: int | None = None
        self._decoder = tokenizer.text_decoder(
            skip_special_tokens=sampling.skip_special_tokens, context=prompt_token_ids
        )
        self._stops = tuple(stop for stop in sampling.stop if stop)
        self._include_stop = sampling.include_stop
        self._min_tokens = sampling.min_tokens
        self._count = 0
        self._held = ""  # decoded, but it may be the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is now safe to send. Empty after a stop."""
        decode = self._decoder.push
        if not self._stops:
            self._count += len(token_ids)
            return decode(token_ids[0]) if len(token_ids) == 1 else "".join(map(decode, token_ids))
        released = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self._count += 1
            released.append(self._take(decode(token_id)))
        return "".join(released)

    def finish(self) -> str:
        """The rest, when the row has ended for another reason than a stop string: nothing is held back any more.

        An incomplete character comes out as U+FFFD, and it may complete a stop string too.
        """
        if self.stopped is not None:
            return ""
        rest = self._decoder.flush()
        if not self._stops:
            return rest
        released = self._take(rest)
        held, self._held = self._held, ""
        return released + held

    def _take(self, piece: str) -> str:
        if not piece:
            return ""
        text = self._held + piece
        if self._count >= self._min_tokens:
            found = self._first_stop(text, new_from=len(self._held))
            if found is not None:
                end, stop = found
                self.stopped, self.token_count_at_stop, self._held = stop, self._count, ""
                return text[:end] if self._include_stop else text[: end - len(stop)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str, *, new_from: int) -> tuple[int, str] | None:
        """The end and the string of the stop that is completed first, within the text from `new_from` on."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, new_from + 1 - len(stop)))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or end < best[0] or (end == best[0] and len(stop) > len(best[1])):
                best = end, stop
        return best


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
