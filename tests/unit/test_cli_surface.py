"""The command line as people and scripts rely on it: commands, options, exit codes, and what starting it costs."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tuneloop import __version__
from tuneloop.server.cli import build_app, main
from tuneloop.server.settings import Settings

SERVER = ["--url", "--api-key"]
LOCAL = ["--home", "--config", "--database-url"]
COMMANDS = {
    "": ["--version", "--install-completion", "--show-completion"],
    "pull": ["MODEL", "--refresh", *LOCAL],
    "train": ["CONFIG|KEY=VALUE", "--dry-run", "--json", "--device", "--suffix", "--home", *SERVER],
    "data preview": ["DATA", "[KEY=VALUE]...", "--model", "--count", "--json", "--home", "--config"],
    "data stats": ["DATA", "[KEY=VALUE]...", "--model", "--json", "--home", "--config"],
    "data check": ["DATA", "[KEY=VALUE]...", "--model", "--json", "--home", "--config"],
    "jobs list": ["--limit", "--json", *SERVER],
    "jobs show": ["JOB", "--json", *SERVER],
    "jobs logs": ["JOB", "--follow", "--raw", "--json", *SERVER],
    "jobs events": ["JOB", "--limit", "--json", *SERVER],
    "jobs checkpoints": ["JOB", "--json", *SERVER],
    "jobs cancel": ["JOB", "--json", *SERVER],
    "jobs pause": ["JOB", "--json", *SERVER],
    "jobs resume": ["JOB", "--json", *SERVER],
    "chat": ["MESSAGE", "--model", "--system", "--temperature", "--max-tokens", *SERVER],
    "doctor": ["--offline", "--json", "--home", "--config"],
    "models list": ["--json", *SERVER],
    "models load": ["MODEL", "--source", "--pin", "--json", *SERVER],
    "models unload": ["MODEL", "--json", *SERVER],
    "models pin": ["MODEL", "--off", "--json", *SERVER],
    "adapters list": ["--base", "--json", *SERVER],
    "adapters add": ["ADAPTER", "SOURCE", "--base", "--replace", "--on-server", "--json", *SERVER],
    "adapters show": ["ADAPTER", "--json", *SERVER],
    "adapters remove": ["ADAPTER[@VERSION]", *SERVER],
    "adapters alias": ["ADAPTER", "ALIAS", "TARGET", "--delete", "--json", *SERVER],
    "adapters rollback": ["ADAPTER", "--alias", "--json", *SERVER],
    "adapters pin": ["ADAPTER", "--off", "--json", *SERVER],
    "adapters download": ["ADAPTER", "--version", "--output", *SERVER],
    "keys create": ["NAME", "--scope", "--model", "--rpm", "--days", *LOCAL],
    "keys list": ["--json", *LOCAL],
    "keys revoke": ["ID", *LOCAL],
}


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Each command with its options and arguments as written on the command line."""
    children = getattr(command, "commands", {})
    if not children or not path:
        names = [p.opts[0] if p.param_type_name == "option" else p.metavar or p.name.upper() for p in command.params]
        yield " ".join(path), names
    for name, child in children.items():
        yield from leaves(child, (*path, name))


def test_commands_and_options() -> None:
    found = dict(leaves(typer.main.get_command(build_app())))
    serve = found.pop("serve")
    assert found == COMMANDS
    flags = ["--" + name.replace("_", "-") for name in Settings.model_fields if name != "models"]
    assert serve == ["MODEL", "--config", *flags]
    for fixed in ("--host", "--port", "--engine", "--home"):
        assert fixed in serve


def test_serve_shows_what_each_setting_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    run("serve", "--help")
    out = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        if name != "models":
            assert str(field.description).split("`", maxsplit=1)[0].strip() in out, name
    assert "--no-enable-prefix-caching" in out
    assert "auto|transformers" in out
    assert "~/.tuneloop" in out


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    return int(exit_info.value.code or 0)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"tuneloop {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--prot", "1"], "No such option: --prot"),
        (["models", "load"], "Missing argument 'MODEL'"),
        (["sevre"], "No such command 'sevre'"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "many"], "Error: The setting 'port' given as a flag is wrong: "),
        (["serve", "--memory-budget-bytes", "2 bananas"], "Error: The setting 'memory_budget_bytes' given as a flag"),
        (["serve", "--config", "/no/such/file.yaml"], "Error: The settings file /no/such/file.yaml cannot be read: "),
        (["serve", "/no/such/folder"], "Error: The model folder /no/such/folder does not exist"),
        (["models", "list", "--url", "http://127.0.0.1:9"], "Error: No server answers at http://127.0.0.1:9."),
        (["models", "list", "--url", "nonsense"], "Error: --url nonsense is no base URL"),
    ],
)
def test_an_error_is_one_line_and_ends_with_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuneloop.server.cli", "keys", "list", "--json", "--home", str(tmp_path)]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: The system refuses: ") and ended.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "tuneloop.server.cli", "serve", str(tmp_path), "--port", str(port)]
        ended = subprocess.run([*command, "--home", str(tmp_path)], stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert f"Error: 127.0.0.1:{port} cannot be listened on: Address already in use." in ended.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "fastapi", "pydantic", "sqlalchemy", "httpx", "numpy", "huggingface_hub")
    code = (
        "import sys\nfrom tuneloop.server.cli import main\n"
        f"try:\n    main(['--help'])\nfinally:\n    sys.stderr.write(repr([m for m in {heavy} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]"
    assert "Usage: tuneloop" in done.stdout


def test_serve_hands_the_settings_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("tuneloop.server.run.serve", served.append)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    config = tmp_path / "settings.yaml"
    config.write_text("port: 1234\nmax_num_seqs: 7\n")
    flags = ["--config", str(config), "--port", "99", "--no-enable-prefix-caching", "--memory-budget-bytes", "2GiB"]
    assert run("serve", f"mine={tmp_path}", str(tmp_path), "--home", str(tmp_path / "home"), *flags) == 0
    (settings,) = served
    assert settings.models == (f"mine={tmp_path}", str(tmp_path))
    assert (settings.port, settings.max_num_seqs, settings.enable_prefix_caching) == (99, 7, False)
    assert settings.memory_budget_bytes == 2 * 1024**3
    assert capsys.readouterr().err == ""
