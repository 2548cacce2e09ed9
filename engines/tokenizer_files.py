"""Reads what a checkpoint folder says about its tokenizer beside `tokenizer.json`: special tokens and chat templates.

It knows the files' formats (those that transformers reads and writes) and no tokenizer library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..storage.errors import InvalidInput

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The parsed files of one checkpoint.

    `special_tokens` are the named ones, by name, as templates see them (`bos_token` and so on); `extra_special_tokens`
    are further ones without a name; `added_tokens` maps ids to the tokens that `tokenizer_config.json` adds.
    `templates` has the entry `default` if the checkpoint has a chat template. `add_bos` and `add_eos` are None where
    the configuration leaves the matter to `tokenizer.json`.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    extra_special_tokens: tuple[str, ...] = ()
    added_tokens: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    has_remote_code: bool = False


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Parse the files of a checkpoint folder. Blocking. Raises InvalidInput for a file that is not valid JSON."""
    config = _read_json(folder / "tokenizer_config.json")
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    named = {name: text for name in NAMED_SPECIAL_TOKENS if (text := _content(merged.get(name))) is not None}
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named.update({name: text for name, token in extra.items() if (text := _content(token)) is not None})
        extra = []
    auto_map = config.get("auto_map")
    return TokenizerFiles(
        special_tokens=named,
        extra_special_tokens=tuple(text for token in extra if (text := _content(token)) is not None),
        added_tokens={int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()},
        templates=_read_templates(folder, config),
        add_bos=config.get("add_bos_token"),
        add_eos=config.get("add_eos_token"),
        has_remote_code=isinstance(auto_map, list | tuple) or "AutoTokenizer" in (auto_map or {}),
    )


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name; a `.jinja` file wins over the same template inside a JSON file, as in transformers."""
    templates: dict[str, str] = {}
    for stored in (_read_json(folder / "chat_template.json").get("chat_template"), config.get("chat_template")):
        if isinstance(stored, str):
            templates["default"] = stored
        elif isinstance(stored, list):
            templates.update({entry["name"]: entry["template"] for entry in stored})
    main = folder / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def _content(token: object) -> str | None:
    """A token is written as its text, or as an object with its text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path} is not valid JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(parsed, dict):
        raise InvalidInput(f"{path} must hold a JSON object; fetch the checkpoint again.")
    return parsed
