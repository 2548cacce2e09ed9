"""Decides whether a request may bring a chat template of its own: a program that the server would run."""

from ...storage.errors import InvalidInput


def check_chat_template(chat_template: str | None, *, trusted: bool) -> None:
    """Raises InvalidInput for a template where the operator does not allow them."""
    if chat_template is not None and not trusted:
        raise InvalidInput(
            "The field 'chat_template' is not allowed by this server; the model's own template is used. "
            "The operator can allow it with the setting trust_request_chat_template.",
            param="chat_template",
            code="unsupported_parameter",
        )
