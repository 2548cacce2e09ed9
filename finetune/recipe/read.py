"""Reads recipes: YAML files, `key=value` words, and LLaMA-Factory's keys. It knows no model and opens no data."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...storage.errors import InvalidInput
from .llamafactory import NO_EFFECT, REFUSED, RENAMED, adapt, refusal, refused_value
from .nearest import nearest
from .recipe import Recipe
from .values import coerce
from .yaml_text import load_scalar, load_yaml

AUTO_KEYS = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "warmup_ratio")
_COMMON_NAMES = {
    "model": "model_name_or_path", "base_model": "model_name_or_path", "epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size", "r": "lora_rank", "rank": "lora_rank", "alpha": "lora_alpha",
    "target_modules": "lora_target", "steps": "max_steps", "max_seq_length": "cutoff_len",
    "data": "dataset", "train_file": "dataset", "validation_file": "eval_dataset", "system": "default_system",
}  # fmt: skip
_SAVE_STEPS = 500  # transformers' own, where a recipe says `steps` and no number


def read_recipe(path: Path | None, overrides: Sequence[str]) -> tuple[Recipe, tuple[str, ...], list[str]]:
    """The recipe of a YAML file, changed by `key=value` words; keys that are `auto`; notices for the person.

    A notice tells of a key that is understood and changes nothing here. Raises InvalidInput.
    """
    values: dict[str, Any] = {}
    notices: list[str] = []
    if path is not None:
        values, notices = translate(load_yaml(path), where=f"in {path}")
    words, more = translate(_read_overrides(overrides), where="on the command line")
    return _build({**values, **words}, notices + more)


def parse_recipe(values: Mapping[str, Any], *, where: str) -> tuple[Recipe, tuple[str, ...], list[str]]:
    """The same for keys that were read elsewhere; `where` says where in errors, as "in `tuning`"."""
    ours, notices = translate(values, where=where)
    return _build(ours, notices)


def translate(values: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], list[str]]:
    """Our keys with values of their types (or "auto"), and notices. `None` stands for "leave it at its default"."""
    ours: dict[str, Any] = {}
    origins: dict[str, str] = {}
    notices = []
    for name, value in values.items():
        if name in NO_EFFECT:
            notices.append(f"{name} {where} has no effect: {NO_EFFECT[name]}.")
            continue
        for key, part in _meaning(name, value, where).items():
            shown = name if name == key else f"{name} (here {key})"
            part = _value(key, part, shown=f"{shown} {where}")
            if key == "report_to" and key in ours:
                part = (*ours[key], *part)
            elif key in ours and ours[key] != part:
                raise InvalidInput(
                    f"{origins[key]} and {name} {where} both set {key}, and differently; leave one of them out.",
                    param=name,
                )
            ours[key], origins[key] = part, name
    return ours, notices


def _meaning(name: str, value: Any, where: str) -> Mapping[str, Any]:
    if name in Recipe.model_fields:
        instead = refused_value(name, value)
        if instead is not None:
            raise InvalidInput(f"The {name} {value!r} {where} is not supported yet; {instead}.", param=name)
        return adapt(name, value)
    if name in RENAMED:
        return RENAMED[name](value)
    if name in REFUSED:
        reason = refusal(name, value)
        if reason is None:
            return {}
        raise InvalidInput(f"{name} {where} cannot be used. {reason}.", param=name)
    near = _COMMON_NAMES.get(name) or nearest(name, Recipe.model_fields) or nearest(name, known_keys())
    hint = f"Did you mean {near}?" if near else "docs/recipe.md lists the known ones."
    raise InvalidInput(f"{name} {where} is not a known key. {hint}", param=name)


def known_keys() -> Iterable[str]:
    return (*Recipe.model_fields, *RENAMED, *NO_EFFECT, *REFUSED)


def _value(key: str, value: Any, *, shown: str) -> Any:
    if value is None or (value == "auto" and key in AUTO_KEYS):
        return value
    return coerce(key, value, shown=shown)


def _build(values: Mapping[str, Any], notices: list[str]) -> tuple[Recipe, tuple[str, ...], list[str]]:
    auto = tuple(key for key in AUTO_KEYS if values.get(key) == "auto")
    given = {key: value for key, value in values.items() if value is not None and key not in auto}
    if "model_name_or_path" not in given:
        raise InvalidInput("The recipe names no model; set model_name_or_path.", param="model_name_or_path")
    _fill_intervals(given)
    notices = notices + [_without_effect(given, what) for what in ("save", "eval") if _is_unneeded(given, what)]
    try:
        return Recipe(**given), auto, notices
    except ValidationError as error:
        raise _refused(error) from error


def _is_unneeded(given: Mapping[str, Any], what: str) -> bool:
    return f"{what}_steps" in given and given[f"{what}_strategy"] != "steps"


def _without_effect(given: dict[str, Any], what: str) -> str:
    """Take the number of steps out, which LLaMA-Factory's files have beside any strategy, and say so."""
    del given[f"{what}_steps"]
    return f"{what}_steps has no effect: {what}_strategy is {given[f'{what}_strategy']}."


def _fill_intervals(given: dict[str, Any]) -> None:
    """What one of the interval keys says about the others that are left out."""
    for what in ("save", "eval"):
        if f"{what}_steps" in given:
            given.setdefault(f"{what}_strategy", "steps")
    if given.get("eval_strategy") == "steps" and "logging_steps" in given:
        given.setdefault("eval_steps", given["logging_steps"])  # as transformers does
    if given.get("load_best_model_at_end") and given.get("eval_strategy", "no") != "no":
        given.setdefault("save_strategy", given["eval_strategy"])
        if given["save_strategy"] == "steps" and "eval_steps" in given:
            given.setdefault("save_steps", given["eval_steps"])
    if given.get("save_strategy") == "steps":
        given.setdefault("save_steps", _SAVE_STEPS)


def _refused(error: ValidationError) -> InvalidInput:
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:  # a contradiction between keys; recipe.py gives its key along
        context = problem.get("ctx", {})
        return InvalidInput(f"{problem['msg']}.", param=context.get("key"))
    key = str(problem["loc"][0])
    reason = problem["msg"].replace("Input should be", "it must be", 1)
    return InvalidInput(f"{key} is {problem['input']!r}; {reason[0].lower()}{reason[1:]}.", param=key)


def _read_overrides(words: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise InvalidInput(
                f"{word!r} is no override; write key=value, as in learning_rate=1e-4.", param="overrides"
            )
        if key in values:
            raise InvalidInput(f"{key} is given twice on the command line; leave one of them out.", param=key)
        values[key] = load_scalar(key, text)
    return values
