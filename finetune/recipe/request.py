"""What a request for a job says about training, as a recipe. It knows no file, no job and no HTTP."""

import secrets
from collections.abc import Mapping
from typing import Any

from ...storage.errors import InvalidInput
from .llamafactory import NO_EFFECT
from .read import parse_recipe
from .recipe import Recipe

_SEEDS = 2**31
_HYPERPARAMETERS = {"n_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
_METHODS = "The methods are: supervised."

# What a request may not say in `tuning`, and where it belongs instead.
FORBIDDEN: Mapping[str, str] = {
    "model_name_or_path": "Name the model in `model`.",
    "adapter_name_or_path": "Name the adapter in `model`.",
    "trust_remote_code": "Only who runs the server may let it run a checkpoint's code.",
    "dataset": "Upload the data and name them in `training_file`.",
    "eval_dataset": "Upload the data and name them in `validation_file`.",
    "dataset_dir": "Upload the data and name them in `training_file`.",
    "output_dir": "A job's result is a model on the server.",
    "overwrite_output_dir": "Each job is new.",
    "resume_from_checkpoint": "A job goes on from its last checkpoint by itself.",
    "logging_dir": "TensorBoard's files of a job lie with the job.",
    "report_to": "Name trackers in `integrations`.",
    "seed": "Set the request's own `seed`.",
    "threads": "The server shares its processors out.",
}


def recipe_from_request(
    *,
    base: str,
    method: Mapping[str, Any] | None,
    hyperparameters: Mapping[str, Any] | None,
    tuning: Mapping[str, Any] | None,
    seed: int | None,
) -> tuple[Recipe, tuple[str, ...], float]:
    """The recipe, its keys that are `auto`, and the learning rate's multiplier. Raises InvalidInput.

    `hyperparameters` is the request's deprecated top-level object; `method` has its own. What neither they nor
    `tuning` say of epochs, batch size and learning rate is `auto`. Without a seed a random one is drawn.
    """
    place, wishes = _hyperparameters(method, hyperparameters)
    values = _tuning(tuning or {})
    multiplier = _multiplier(wishes, values, place)
    for wish, key in _HYPERPARAMETERS.items():
        value = wishes.get(wish)
        if value is None or value == "auto":
            values.setdefault(key, "auto")
        elif values.get(key, "auto") != "auto":
            raise InvalidInput(
                f"{place}{wish} and tuning.{key} say the same; leave one of them out.", param=f"tuning.{key}"
            )
        else:
            values[key] = _positive(value, f"{place}{wish}", whole=wish == "batch_size")
    if values.setdefault("learning_rate", "auto") == "auto" and "warmup_steps" not in values:
        values.setdefault("warmup_ratio", "auto")
    values["model_name_or_path"] = base
    values["seed"] = secrets.randbelow(_SEEDS) if seed is None else seed
    try:
        recipe, auto, _ = parse_recipe(values, where="in `tuning`")
    except InvalidInput as error:
        raise _in_request(error) from error
    return recipe, auto, multiplier


def _hyperparameters(
    method: Mapping[str, Any] | None, deprecated: Mapping[str, Any] | None
) -> tuple[str, Mapping[str, Any]]:
    """Where the hyperparameters stand, as a prefix for errors, and what they are."""
    kind = (method or {}).get("type", "supervised")
    if kind != "supervised":
        raise InvalidInput(f"The method {kind!r} is not supported yet. {_METHODS}", param="method.type")
    stated = ((method or {}).get("supervised") or {}).get("hyperparameters")
    if stated and deprecated:
        raise InvalidInput(
            "The hyperparameters are given twice: in `hyperparameters`, which is deprecated, and in `method`. Leave "
            "`hyperparameters` out.",
            param="hyperparameters",
        )
    place = "method.supervised.hyperparameters." if stated or not deprecated else "hyperparameters."
    wishes = stated or deprecated or {}
    for key in wishes:
        if key not in {*_HYPERPARAMETERS, "learning_rate_multiplier"}:
            raise InvalidInput(
                f"{place}{key} is not known. There are n_epochs, batch_size and learning_rate_multiplier; `tuning` "
                "takes all others.",
                param=f"{place}{key}",
            )
    return place, wishes


def _tuning(tuning: Mapping[str, Any]) -> dict[str, Any]:
    for key in tuning:
        if key in FORBIDDEN:
            raise InvalidInput(f"{key} cannot be set in `tuning`. {FORBIDDEN[key]}", param=f"tuning.{key}")
        if key in NO_EFFECT:
            raise InvalidInput(
                f"{key} in `tuning` would have no effect: {NO_EFFECT[key]}. Leave it out.", param=f"tuning.{key}"
            )
    return dict(tuning)


def _multiplier(wishes: Mapping[str, Any], values: Mapping[str, Any], place: str) -> float:
    value = wishes.get("learning_rate_multiplier")
    if value is None or value == "auto":
        return 1.0
    if values.get("learning_rate", "auto") != "auto":
        raise InvalidInput(
            f"{place}learning_rate_multiplier and tuning.learning_rate say the same; leave one of them out.",
            param="tuning.learning_rate",
        )
    return float(_positive(value, f"{place}learning_rate_multiplier"))


def _positive(value: Any, param: str, *, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InvalidInput(f"{param} is {value!r}; it must be a number above 0, or 'auto'.", param=param)
    if whole and value != int(value):
        raise InvalidInput(f"{param} is {value!r}; it must be a whole number.", param=param)
    return value


def _in_request(error: InvalidInput) -> InvalidInput:
    return InvalidInput(error.message, param=error.param if error.param == "seed" else f"tuning.{error.param}")
