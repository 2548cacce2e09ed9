"""`tuneloop data`: shows what a model would learn from data, before anything trains. It trains nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import CliError, console, print_json, print_table, say
from .local import Config, Home, explained, open_database, read_settings, run

if TYPE_CHECKING:
    from ...engines.tokenizer import ChatTokenizer
    from ...finetune.data.base import Row
    from ...finetune.run_folder import RunSpec
    from ..settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look at training data as a model would see them; no server is needed.")

Data = Annotated[str, typer.Argument(metavar="DATA", help="A file, a name of dataset_info.json, or a source.")]
Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of a recipe, as cutoff_len=1024.", show_default=False),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Served name, source or folder of a model that is here.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_BAR = 40


@app.command()
def preview(
    data: Data,
    keys: Keys = None,
    model: Model = "smollm2-135m",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Rows to show.")] = 3,
    as_json: Json = False,
    home: Home = None,
    config: Config = None,
) -> None:
    """Show rows as rendered text; what the model learns to write is green."""
    from ...finetune.data.read import read_rows
    from ...finetune.data.render import Renderer

    with explained():
        spec, tokenizer = _spec(data, keys, model, home, config)
        render = Renderer(tokenizer, spec.recipe)
        shown = [_preview(row, render) for row in read_rows(spec, "train", limit=count)]
    if as_json:
        print_json(shown)
        return
    for row in shown:
        _print_row(row, spec.recipe.cutoff_len)


@app.command()
def stats(
    data: Data, keys: Keys = None, model: Model = "smollm2-135m", as_json: Json = False, home: Home = None,
    config: Config = None,
) -> None:  # fmt: skip
    """Count rows, tokens and lengths, and name rows that are too long."""
    from dataclasses import asdict

    from ...finetune.data.read import read_rows
    from ...finetune.data.tokenise import Tokenise

    with explained():
        spec, tokenizer = _spec(data, keys, model, home, config)
        tokenise = Tokenise(tokenizer, spec.recipe)
        for _ in tokenise(read_rows(spec, "train")):
            pass
        if tokenise.problems:
            raise tokenise.problems[0]
        report = asdict(tokenise.report())
    if as_json:
        print_json(report)
        return
    _print_report(report)


@app.command()
def check(
    data: Data, keys: Keys = None, model: Model = "smollm2-135m", as_json: Json = False, home: Home = None,
    config: Config = None,
) -> None:  # fmt: skip
    """Name what training would refuse, at most 20 rows. The exit status is 1 if there is anything."""
    from ...finetune.data.read import check_rows, read_rows
    from ...finetune.data.tokenise import Tokenise
    from ...storage.errors import InvalidInput

    with explained():
        spec, tokenizer = _spec(data, keys, model, home, config)
        problems: list[InvalidInput] = list(check_rows(spec, "train"))
        rows = 0
        if not problems:
            tokenise = Tokenise(tokenizer, spec.recipe)
            for _ in tokenise(read_rows(spec, "train")):
                pass
            problems = list(tokenise.problems)
            rows = tokenise.report().rows
            if not problems:
                try:
                    tokenise.check()
                except InvalidInput as error:
                    problems = [error]
    if as_json:
        print_json({"ok": not problems, "rows": rows, "problems": [problem.message for problem in problems]})
    elif problems:
        for problem in problems:
            console().print(problem.message, soft_wrap=True)
    else:
        console().print(f"{rows} rows, and nothing is wrong with them.")
    raise typer.Exit(1 if problems else 0)


def _spec(
    data: str, keys: list[str] | None, model: str, home: Path | None, config: Path | None
) -> "tuple[RunSpec, ChatTokenizer]":
    from ...engines.tokenizer import ChatTokenizer
    from ...finetune.recipe.read import read_recipe
    from ...finetune.run_folder import RunSpec

    settings = read_settings(home, config)
    words = [f"model_name_or_path={model}", *(keys or [])]
    recipe, _, notices = read_recipe(None, words)
    for notice in notices:
        say(f"Note: {notice}")
    path = Path(data).expanduser()
    name = str(path.absolute()) if path.is_file() or (path.is_dir() and "/" in data) else data
    recipe = recipe.model_copy(
        update={"dataset": (name,), "dataset_dir": _absolute(recipe.dataset_dir), "val_size": 0.0, "streaming": False}
    )
    checkpoint = run(_checkpoint(recipe.model_name_or_path, settings))
    spec = RunSpec(recipe=recipe, base_name=model, model_path=checkpoint, home=settings.home)
    return spec, ChatTokenizer.load(checkpoint, trust_remote_code=recipe.trust_remote_code)


def _absolute(folder: str) -> str:
    """LLaMA-Factory's ONLINE and REMOTE: are no folders."""
    return folder if folder == "ONLINE" or folder.startswith("REMOTE:") else str(Path(folder).expanduser().absolute())


async def _checkpoint(model: str, settings: "Settings") -> Path:
    """The model's folder; only its tokenizer is read, and nothing is fetched for a look at data."""
    from ...engines.catalog import ModelCatalog
    from ...engines.sources import find_model, parse_model_argument

    async with open_database(settings) as database:
        catalog = ModelCatalog(database, settings.home)
        await catalog.start()
        source = catalog.get(model).source if catalog.known(model) else parse_model_argument(model)[1]
    found = find_model(source, settings.home)
    if found is None:
        raise CliError(f"The model {model} is not on this machine; fetch it with `tuneloop pull {model}`.")
    return found.path


def _preview(row: "Row", render: Any) -> dict[str, Any]:
    sequences = render.sequences(row)
    return {
        "place": str(row.place),
        "tokens": sum(len(sequence.ids) for sequence in sequences),
        "supervised_tokens": sum(sum(sequence.supervised) for sequence in sequences),
        "sequences": len(sequences),
        "spans": [{"text": text, "supervised": supervised} for text, supervised in render.spans(row)],
    }


def _print_row(row: dict[str, Any], cutoff_len: int) -> None:
    from rich.text import Text

    several = f", {row['sequences']} sequences" if row["sequences"] > 1 else ""
    head = f"{row['place']}: {row['tokens']} tokens, {row['supervised_tokens']} of them learned{several}"
    if row["sequences"] == 1 and row["tokens"] > cutoff_len:
        head += f"; longer than cutoff_len, which is {cutoff_len}"
    console().print(head, style="bold", soft_wrap=True)
    text = Text()
    for span in row["spans"]:
        text.append(span["text"], style="green" if span["supervised"] else "dim")
    console().print(text, soft_wrap=True)


def _print_report(report: dict[str, Any]) -> None:
    names = (
        "rows",
        "sequences",
        "tokens",
        "supervised_tokens",
        "longest",
        "too_long",
        "dropped",
        "split_conversations",
    )
    print_table(("what", "count"), [(name.replace("_", " "), report[name]) for name in names], empty="")
    most = max(report["lengths"].values(), default=1)
    bars = [(f"<= {b}", n, "#" * -(-n * _BAR // most)) for b, n in report["lengths"].items()]
    print_table(("tokens", "sequences", ""), bars, empty="No sequence is left.")
    for place in report["too_long_places"]:
        say(f"Too long: {place}")
    for notice in report["notices"]:
        say(f"Note: {notice}")
