"""Alpaca's format: instruction, input, output, and optionally history, system and tools.

Without a column of answers the prompt is plain text to go on training with, as LLaMA-Factory has it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Row
from ..checks import DataError, type_name
from ..conversation import check_conversation
from ..kinds import Record
from ..tools import parse_json_text, parse_tools
from .base import DEFAULT_COLUMNS, Columns, Format, field_of, names, text_of


@dataclass(frozen=True)
class Alpaca(Format):
    columns: Columns = DEFAULT_COLUMNS
    name: ClassVar[str] = "alpaca"

    def row(self, record: Record) -> Row:
        prompt = self._prompt(record)
        if self.columns.response is None:
            return Row(place=record.place, text=prompt)
        messages: list[dict[str, Any]] = []
        system = text_of(record, self.columns.system)
        if system:
            messages.append({"role": "system", "content": system})
        for question, answer in self._history(record):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        answer = text_of(record, self.columns.response, required=True)
        if not answer.strip():
            raise DataError(
                "the assistant's answer is empty.",
                "Write the answer, or remove the row.",
                place=record.place,
                path=self.columns.response,
            )
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Row(
            place=record.place,
            messages=check_conversation(messages, record.place),
            tools=parse_tools(field_of(record, self.columns.tools), record.place, self.columns.tools or "tools"),
        )

    def _prompt(self, record: Record) -> str:
        columns = [column for column in (self.columns.prompt, self.columns.query) if column is not None]
        if not any(column in record.fields for column in columns):
            raise DataError(
                f"there is no column {' or '.join(map(repr, columns))}; there are {names(record.fields)}.",
                "Add it, or name the right one under `columns` in dataset_info.json.",
                place=record.place,
            )
        prompt = "\n".join(filter(None, (text_of(record, column) for column in columns)))
        if not prompt.strip():
            raise DataError("the prompt is empty.", "Write it, or remove the row.", place=record.place, path=columns[0])
        return prompt

    def _history(self, record: Record) -> list[tuple[str, str]]:
        path = self.columns.history or "history"
        turns = field_of(record, self.columns.history)
        if isinstance(turns, str):
            turns = parse_json_text(turns, record.place, path, "a list of earlier turns") if turns.strip() else None
        if turns is None:
            return []
        form = 'Write [["question", "answer"], ...].'
        if not isinstance(turns, list):
            raise DataError(f"the history is {type_name(turns)}.", form, place=record.place, path=path)
        for index, turn in enumerate(turns):
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise DataError(
                    "a turn of the history is not a question and an answer.",
                    form,
                    place=record.place,
                    path=f"{path}[{index}]",
                )
            if not turn[1].strip():
                raise DataError(
                    "an answer of the history is empty.",
                    "Write the answer, or remove the turn.",
                    place=record.place,
                    path=f"{path}[{index}][1]",
                )
        return [(question, answer) for question, answer in turns]
