"""The shares of an alias that splits its traffic. It knows no adapter."""

import math
from collections.abc import Mapping

from ..storage.errors import InvalidInput


def shares(weights: Mapping[int, float]) -> dict[int, float]:
    """The weights, scaled to add up to 1. Raises InvalidInput (param `weights`) unless there are some, all above 0."""
    if not weights:
        raise InvalidInput("An alias needs at least one version; write {version: weight}.", param="weights")
    for number, weight in weights.items():
        if not math.isfinite(weight) or weight <= 0:
            raise InvalidInput(
                f"The weight {weight} of version {number} is not above 0; leave a version out to give it none.",
                param="weights",
            )
    total = math.fsum(weights.values())
    return {number: weight / total for number, weight in sorted(weights.items())}
