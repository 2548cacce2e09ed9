"""docs/recipe.md says what the code says: every key with its default and description, every foreign key."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from tuneloop.finetune.recipe.llamafactory import NO_EFFECT, REFUSED, RENAMED
from tuneloop.finetune.recipe.read import AUTO_KEYS, parse_recipe
from tuneloop.finetune.recipe.recipe import Recipe

TEXT = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text("utf-8")


def shown(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value in (None, (), {}):
        return ""
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_every_key_is_documented_in_order() -> None:
    keys = TEXT.partition("## Keys")[2].partition("## `auto`")[0]
    rows = [line for line in keys.splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | {shown(field)} | {field.description} |" for name, field in Recipe.model_fields.items()
    ]


@pytest.mark.parametrize("texts", [NO_EFFECT, REFUSED])
def test_every_foreign_key_is_documented_with_its_reason(texts: dict[str, str]) -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for key, text in texts.items():
        assert any(f"`{key}`" in row and row.endswith(f"| {text} |") for row in rows), key
    for key in (*RENAMED, *AUTO_KEYS):
        assert f"`{key}" in TEXT


def test_the_example_is_a_recipe() -> None:
    example = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    _, auto, notices = parse_recipe(yaml.safe_load(example[1]), where="in docs/recipe.md")
    assert auto == ("num_train_epochs", "learning_rate")
    assert notices == []


def test_descriptions_are_short_sentences() -> None:
    for name, field in Recipe.model_fields.items():
        assert field.description is not None and field.description.endswith("."), name
        assert len(field.description) <= 110, name
