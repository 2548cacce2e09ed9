"""Reads YAML as people mean it: `1e-4` is a number, and a key that stands twice is an error with its line."""

import re
from pathlib import Path
from typing import Any

import yaml

from ...storage.errors import InvalidInput


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                first = seen[key.value] + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands there already, in line {first}", key.start_mark
                )
            seen[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a number with an exponent, and takes 1e-4 for a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises InvalidInput that names the file and, where it can, the line."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"The recipe {path} cannot be read: {error.strerror}.", param="config") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"The recipe {path} is no UTF-8 text; save it as such.", param="config") from error
    content = _load(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidInput(f"The recipe {path} must hold `key: value` lines.", param="config")
    return content


def load_scalar(key: str, text: str) -> Any:
    """The value of `key=text` on a command line, by YAML's rules; nothing means null."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise InvalidInput(f"{key}={text} is no YAML value; put quotes around it.", param=key) from error


def _load(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise InvalidInput(f"The recipe {name}{line} is not valid YAML: {error.problem}.", param="config") from error
    except yaml.YAMLError as error:
        raise InvalidInput(f"The recipe {name} is not valid YAML: {error}.", param="config") from error
