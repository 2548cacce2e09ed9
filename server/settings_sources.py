"""Reads settings: flags over environment over YAML file over defaults. The one place that looks at `os.environ`.

Unknown keys are refused with the nearest known one, in the file as in the environment: a misspelt limit that is
ignored in silence is worse than a server that does not start.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..storage.errors import InvalidInput
from .settings import Settings

PREFIX = "TUNELOOP_"
CONFIG_VARIABLE = "TUNELOOP_CONFIG"
CLIENT_VARIABLES = frozenset({"TUNELOOP_URL"})  # what the CLI reads to find a server; they set nothing here

# Kubernetes sets these in every pod beside a Service that is named `tuneloop`. They are not meant for us.
_SERVICE_LINK = re.compile(r"TUNELOOP_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")


def load_settings(
    config: Path | str | None = None, *, environ: Mapping[str, str] | None = None, **flags: Any
) -> Settings:
    """The settings of this process. `config` (or TUNELOOP_CONFIG) is a YAML file; flags that are None were not given.

    Raises InvalidInput that names the file, variable or field, what is wrong with it and the nearest known name.
    """
    environ = os.environ if environ is None else environ
    config = config or environ.get(CONFIG_VARIABLE) or None
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers = [
        ({} if config is None else _read_yaml(Path(config)), f"in {config}"),
        (_read_environment(environ), "in the environment"),
        ({name: value for name, value in flags.items() if value is not None}, "given as a flag"),
    ]
    for layer, origin in layers:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    _refuse_unknown(values, origins)
    try:
        return Settings(**values)
    except ValidationError as error:
        raise _invalid(error, origins) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"The settings file {path} cannot be read: {error.strerror}.", param="config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The settings file {path} is not valid YAML: {error}.", param="config") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidInput(f"The settings file {path} must hold `name: value` lines.", param="config")
    return content


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Our variables by field name. An empty one counts as not set, as charts and compose files leave them."""
    found = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE or name in CLIENT_VARIABLES or not value:
            continue
        if _SERVICE_LINK.match(name):
            continue
        if name == "TUNELOOP_PORT" and value.startswith("tcp://"):  # a Kubernetes service link too
            continue
        found[name.removeprefix(PREFIX).lower()] = value
    return found


def _refuse_unknown(names: Iterable[str], origins: Mapping[str, str]) -> None:
    known = Settings.model_fields
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "docs/settings.md lists the known ones."
        shown = f"{PREFIX}{name.upper()}" if origins[name] == "in the environment" else name
        raise InvalidInput(f"The setting '{shown}' {origins[name]} is not known. {hint}", param=name)


def _invalid(error: ValidationError, origins: Mapping[str, str]) -> InvalidInput:
    problem = error.errors(include_input=False, include_url=False)[0]
    name = str(problem["loc"][0])
    reason = problem["msg"].removeprefix("Value error, ").rstrip(".")
    return InvalidInput(f"The setting '{name}' {origins.get(name, '')} is wrong: {reason}.", param=name)
