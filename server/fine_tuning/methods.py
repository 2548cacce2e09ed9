"""OpenAI's names of training methods, as stages of recipes; those that `finetune/methods` knows can be trained with."""

from ...finetune.methods import stages
from ...storage.errors import InvalidInput

_STAGES = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}


def check_method(name: str) -> None:
    """Raises InvalidInput (param `method.type`) for a method that nobody knows, or that is not here."""
    here = [method for method, stage in _STAGES.items() if stage in stages()]
    if name in here:
        return
    if name in _STAGES:
        raise InvalidInput(
            f"The training method '{name}' is not available on this server. Use {', '.join(here)}.",
            param="method.type",
            code="unsupported_value",
        )
    raise InvalidInput(f"There is no training method '{name}'. Use {', '.join(here)}.", param="method.type")
