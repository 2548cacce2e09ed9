"""OpenAI's names of training methods, and which of them can be trained with. The one place that knows."""

from ...storage.errors import InvalidInput

AVAILABLE = ("supervised",)
_OPENAI = ("supervised", "dpo", "reinforcement")


def check_method(name: str) -> None:
    """Raises InvalidInput (param `method.type`) for a method that nobody knows, or that is not here."""
    if name in AVAILABLE:
        return
    here = ", ".join(AVAILABLE)
    if name in _OPENAI:
        raise InvalidInput(
            f"The training method '{name}' is not available on this server. Use {here}.",
            param="method.type",
            code="unsupported_value",
        )
    raise InvalidInput(f"There is no training method '{name}'. Use {here}.", param="method.type")
