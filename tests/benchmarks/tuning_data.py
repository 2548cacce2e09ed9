"""Rows for the tuning benchmark, and their order: the one that both peers draw by a seed is everybody's."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tuneloop.finetune.data.pack import plan_steps
from tuneloop.finetune.recipe.recipe import Recipe

Row = dict[str, str]
COUNT = 256
TEXT = (
    "water light stone garden river market winter music letter window story science history energy method balance "
    "number paper system people morning question answer reason example problem simple careful often between across "
    "because therefore several important different small large early local common to of and in the a is that with for"
)


def load_rows(path: Path | None) -> list[Row]:
    """Alpaca rows of a file; without one, generated rows of similar lengths."""
    if path is None:
        return _generated()
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: name an alpaca file with --data, or leave it out for generated rows.")
    rows: list[Row] = json.loads(path.read_text("utf-8"))
    return rows


def _generated() -> list[Row]:
    draw = random.Random(1)
    vocabulary = TEXT.split()

    def text(words: int) -> str:
        return " ".join(draw.choice(vocabulary) for _ in range(words)).capitalize() + "."

    return [
        {
            "instruction": text(draw.randint(6, 20)),
            "input": text(draw.randint(4, 40)) if draw.random() < 0.4 else "",
            "output": text(min(360, max(3, round(draw.lognormvariate(4.4, 0.9))))),
        }
        for _ in range(COUNT)
    ]


def peers_order(count: int, seed: int) -> list[int]:
    """The order in which transformers' Trainer visits `count` rows in its first epoch."""
    from accelerate.data_loader import SeedableRandomSampler

    return list(SeedableRandomSampler(data_source=range(count), data_seed=seed))


def places_of_steps(count: int, *, batch: int, seed: int) -> list[int]:
    """The places in a file that Tuneloop visits, step by step."""
    recipe = Recipe(model_name_or_path="any", per_device_train_batch_size=batch, seed=seed)
    plan = plan_steps([1] * count, recipe=recipe, epoch=0)
    return [place for step in plan for micro_batch in step for place in micro_batch]


def in_order(rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
    """A file in which visiting `places` one after another gives `rows`."""
    arranged = dict(zip(places, rows, strict=True))
    return [arranged[place] for place in range(len(rows))]
