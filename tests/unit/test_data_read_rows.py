"""Reading a run's rows: kinds of files, mixing, validation rows, limits, digests, and bounded memory."""

import builtins
import gzip
import json
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tuneloop.finetune.data.base import Row
from tuneloop.finetune.data.mix import interleave, sampled_rows, validation_rows
from tuneloop.finetune.data.read import content_digest, has_rows, read_rows
from tuneloop.finetune.recipe.recipe import Recipe
from tuneloop.finetune.run_folder import DataFile, RunSpec
from tuneloop.storage.errors import InvalidInput

ALPACA = [{"instruction": f"Say {i}, please", "input": "", "output": f'"{i}"\nü'} for i in range(5)]


def spec_of(*files: Path, evals: tuple[Path, ...] = (), **keys: Any) -> RunSpec:
    recipe = Recipe(model_name_or_path="m", **keys)
    train, evaluation = (tuple(DataFile(path=str(f), name=f.name) for f in group) for group in (files, evals))
    return RunSpec(recipe=recipe, base_name="m", model_path=Path("/m"), train_files=train, eval_files=evaluation)


def text_file(folder: Path, name: str, count: int) -> Path:
    file = folder / f"{name}.txt"
    file.write_text("".join(f"{name}{i}\n" for i in range(count)))
    return file


def told(spec: RunSpec, split: Any = "train", limit: int | None = None) -> str:
    return " ".join(row.text or "" for row in read_rows(spec, split, limit=limit))


def answers(rows: list[Row]) -> list[str]:
    return [row.messages[-1]["content"] for row in rows]


def _csv(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [",".join(f'"{cell}"' for cell in rows[0])]
    lines += [",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in rows]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ALPACA))),
        ("a.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ALPACA)),
        ("a.json", json.dumps(ALPACA)),
        ("a.json", "\ufeff" + json.dumps(ALPACA, indent=2, ensure_ascii=False) + "\n"),
        ("a.json", "\n".join(map(json.dumps, ALPACA))),
        ("upload", json.dumps(ALPACA)),
        ("a.jsonl", json.dumps(ALPACA)),
        ("a.csv", _csv(ALPACA)),
        ("a.tsv", _csv(ALPACA).replace('","', '"\t"')),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str, content: str, packed: bool) -> None:
    file = tmp_path / (name + (".gz" if packed else ""))
    file.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    rows = list(read_rows(spec_of(file), "train"))
    assert answers(rows) == [row["output"] for row in ALPACA]
    assert all(row.place.file == file.name for row in rows)


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "upload"
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]}]
    parquet.write_table(pyarrow.Table.from_pylist(chat * 600), file)
    rows = list(read_rows(spec_of(file, val_size=100), "train"))
    assert len(rows) == 500
    assert rows[0].messages[1] == {"role": "assistant", "content": "Hello", "weight": 1}
    assert str(rows[-1].place).startswith("upload, row ")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1....PAR1")
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidInput, match=r"pip install 'tuneloop\[finetune\]'"):
        list(read_rows(spec_of(file), "train"))


def test_json_arrays_are_read_across_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.finetune.data.kinds.json_array._READ_BYTES", 7)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ALPACA, indent=1, ensure_ascii=False))
    rows = list(read_rows(spec_of(file), "train"))
    assert answers(rows) == [row["output"] for row in ALPACA]
    assert [str(row.place) for row in rows[:2]] == ["a.json, row 1 (line 2)", "a.json, row 2 (line 7)"]


@pytest.mark.parametrize("name", ["big.json", "big.jsonl", "big.txt"])
def test_memory_is_bounded_by_rows_not_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    row = json.dumps({"text": "x" * 20_000})
    separator = ",\n" if name == "big.json" else "\n"
    with file.open("w") as out:
        out.write("[" if name == "big.json" else "")
        for index in range(1000):
            out.write((separator if index else "") + row)
        out.write("]" if name == "big.json" else "")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(spec_of(file), "train")) == 1000
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024  # of 20 MB
    finally:
        tracemalloc.stop()


def test_concat_keeps_the_order_of_files(tmp_path: Path) -> None:
    files = [text_file(tmp_path, name, 2) for name in ("a", "b")]
    assert told(spec_of(*files)) == "a0 a1 b0 b1"
    assert told(spec_of(*files, max_samples=1)) == "a0 b0"
    assert told(spec_of(*files), limit=3) == "a0 a1 b0"
    assert told(spec_of(*files), limit=0) == ""


@pytest.mark.parametrize(
    ("strategy", "shares", "expected"),
    [  # as datasets.interleave_datasets gives them, seed 42
        ("interleave_under", (), "a0b0c0a1b1c1a2b2c2"),
        ("interleave_under", (0.5, 0.3, 0.2), "b0a0c0b1a1c1b2b3a2"),
        ("interleave_over", (), "a0b0c0a1b1c1a2b2c2a0b3c3a1b4c0"),
        ("interleave_over", (0.5, 0.3, 0.2), "b0a0c0b1a1c1b2b3a2a0a1c2b4c3"),
    ],
)
def test_interleaving(tmp_path: Path, strategy: str, shares: tuple[float, ...], expected: str) -> None:
    files = [text_file(tmp_path, name, count) for name, count in (("a", 3), ("b", 5), ("c", 4))]
    spec = spec_of(*files, mix_strategy=strategy, interleave_probs=shares)
    assert told(spec).replace(" ", "") == expected


def test_a_set_with_share_zero_ends_nothing() -> None:
    assert set(interleave([3, 2], "interleave_over", [1.0, 0.0], 1)) == {0}


def test_there_is_a_share_for_each_set(tmp_path: Path) -> None:
    files = [text_file(tmp_path, name, 2) for name in ("a", "b")]
    with pytest.raises(InvalidInput, match="1 shares for 2 data sets"):
        told(spec_of(*files, mix_strategy="interleave_under", interleave_probs=(1.0,)))


def test_validation_rows_are_those_of_datasets() -> None:
    assert sorted(validation_rows(20, 0.13, 42)) == [9, 14, 15]
    assert sorted(validation_rows(20, 4, 7)) == [3, 8, 12, 13]
    assert sampled_rows(3, 7, 1)[0] == 2
    assert len(sampled_rows(3, 7, 1)[1]) == 1


@pytest.mark.parametrize("mixing", ["concat", "interleave_over"])
def test_val_size_splits_every_row_once(tmp_path: Path, mixing: str) -> None:
    files = [text_file(tmp_path, name, 20) for name in ("a", "b")]
    spec = spec_of(*files, val_size=0.1, mix_strategy=mixing)
    train, kept = told(spec).split(), told(spec, "eval").split()
    assert (len(train), len(kept)) == (36, 4)
    assert sorted(train + kept) == sorted(f"{name}{i}" for name in "ab" for i in range(20))
    assert told(spec, "eval").split() == kept
    assert told(spec_of(*files, val_size=0.1, seed=1, mix_strategy=mixing), "eval").split() != kept


def test_validation_files(tmp_path: Path) -> None:
    train, evaluation = text_file(tmp_path, "a", 3), text_file(tmp_path, "b", 2)
    spec = spec_of(train, evals=(evaluation,))
    assert told(spec, "eval") == "b0 b1"
    assert has_rows(spec, "eval")
    assert not has_rows(spec_of(train), "eval")
    assert told(spec_of(train), "eval") == ""
    with pytest.raises(InvalidInput, match="keep one of them"):
        told(spec_of(train, evals=(evaluation,), val_size=1))
    with pytest.raises(InvalidInput, match="takes all 3 rows"):
        told(spec_of(train, val_size=3))


def test_the_digest_is_of_what_decides_rows(tmp_path: Path) -> None:
    a, b = text_file(tmp_path, "a", 3), text_file(tmp_path, "b", 3)
    same = tmp_path / "renamed.txt"
    same.write_bytes(a.read_bytes())
    digest = content_digest(spec_of(a), "train")
    assert digest == content_digest(spec_of(same, learning_rate=1), "train")
    others = [spec_of(b), spec_of(a, b), spec_of(a, max_samples=1), spec_of(a, val_size=1)]
    assert len({digest, *(content_digest(spec, "train") for spec in others)}) == 5
    assert content_digest(others[3], "eval") != content_digest(others[3], "train")
