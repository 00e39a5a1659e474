"""Settings from flags, environment and file; the command that serves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from draftsieve import SpecKVPC, SpecPC
from draftsieve.core.config import DEFAULT_METHOD
from draftsieve.core.errors import ConfigError, ModelNotFoundError
from draftsieve.integrations.cli import main
from draftsieve.integrations.server import Settings, create_app, read_settings
from draftsieve.integrations.server.extension import Extension, method_of

from .adapters_fixtures import BUILTIN
from .served import wait_for


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DRAFTSIEVE_")]:
        if name != "DRAFTSIEVE_HOME":
            monkeypatch.delenv(name)


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nhost = "::1"\nmax_tokens = 7\n[method]\nratio = 0.2\n')
    monkeypatch.setenv("DRAFTSIEVE_PORT", "2")
    monkeypatch.setenv("DRAFTSIEVE_HOST", "127.0.0.2")
    monkeypatch.setenv("DRAFTSIEVE_MODEL_NAMES", '["a"]')
    monkeypatch.setenv("DRAFTSIEVE_API_KEYS", '{"north": "n"}')
    found = read_settings(file, port=3)
    assert (found.port, found.host, found.max_tokens) == (3, "127.0.0.2", 7)
    assert found.method.ratio == 0.2
    assert found.model_names == ("a",)
    assert found.keys == {"north": SecretStr("n")}
    assert read_settings().max_tokens == Settings().max_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prot": 1}, "no option 'prot': it has port"),
        ({"port": 70000}, "less than or equal to 65535"),
        ({"host": "0.0.0.0"}, "lets other machines in"),
        ({"host": "::"}, "lets other machines in"),
        ({"host": "example.org"}, "lets other machines in"),
        ({"api_key": " "}, "API key is empty"),
        ({"api_key": "a", "api_keys": {"b": "a"}}, "same API key"),
        ({"method": {"method": "magic"}}, "method"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(None, **options)


def test_open_servers_have_a_key_or_are_wanted() -> None:
    assert Settings(host="0.0.0.0", api_key="k").host == "0.0.0.0"
    assert Settings(host="0.0.0.0", public_without_key=True).host == "0.0.0.0"
    for host in ("localhost", "127.0.0.1", "127.3.2.1", "::1"):
        assert Settings(host=host).host == host


@pytest.mark.parametrize("text", ["port = ", "port = 1\nbroken", "\xff"])
def test_a_file_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(file)
    with pytest.raises(ConfigError, match="no file"):
        read_settings(tmp_path / "other.toml")


def test_an_environment_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSIEVE_API_KEYS", "secret")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_settings()
    assert "secret" not in str(caught.value)


def test_models_that_are_not_there_are_told_at_once() -> None:
    with pytest.raises(ModelNotFoundError, match="no bundled model"):
        create_app(Settings(target="builtin:nothing"))
    with pytest.raises(ModelNotFoundError):
        create_app(Settings(target="builtin:target", draft="./nowhere"))
    with pytest.raises(ConfigError, match="Did you mean ratio"):
        create_app(Settings(target="builtin:target", method={"raito": 0.2}))


def test_methods_of_requests() -> None:
    def made(**asked: Any) -> Any:
        return method_of(Extension(**asked), has_draft=True)

    assert made() == DEFAULT_METHOD
    assert method_of(Extension(), has_draft=False) is None
    assert made(ratio=0.2, unit="passage") == SpecPC.preset("2026-12", ratio=0.2, unit="passage")
    assert made(preset="paper", capacity=50) == SpecPC(capacity=50)
    both = made(**{"method": "speckv-pc", "ratio": 0.1, "specpc.kernel_size": 8})
    assert isinstance(both, SpecKVPC)
    assert (both.specpc.ratio, both.specpc.kernel_size, both.speckv.ratio) == (0.2, 8, 0.5)
    assert made(method="none", ratio=0.1) is None
    assert made(head_weights="auto").head_weights == "auto"
    with pytest.raises(ConfigError, match="unit"):
        made(unit=[[]])
    with pytest.raises(ConfigError, match="both stages have it"):
        made(method="speckv-pc", kernel_size=8)


def test_print_config_is_a_file_of_the_same_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSIEVE_API_KEY", "very-secret")
    flags = ["serve", "--print-config", "--port", "81", "--ratio", "0.2", "--method", "specpc"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "very-secret" not in printed
    values = tomllib.loads(printed)
    assert values["method"] == {"method": "specpc", "ratio": 0.2}
    file = tmp_path / "server.toml"
    file.write_text(printed)
    again = read_settings(file, api_key="very-secret")
    same = read_settings(None, port=81, method={"method": "specpc", "ratio": 0.2})
    assert again.model_dump() == same.model_dump()


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "lets other machines in" in capsys.readouterr().err


def test_a_place_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--target", "builtin:target", "--draft", "builtin:draft"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", *models, "--port", str(port)]) == 1
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_models_that_cannot_be_loaded_end_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their folder is there, so it shows only while they are loaded."""
    shutil.copytree(BUILTIN / "target", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    models = ["--target", str(tmp_path / "broken"), "--draft", "builtin:draft"]
    assert main(["serve", *models, "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert '"event": "listening"' in told
    assert "draftsieve: error: " in told


async def test_before_the_models_are_there() -> None:
    app = create_app(Settings(target="builtin:target", draft="builtin:draft"))
    place = httpx.ASGITransport(app)  # it does not start the app, so nothing is loaded
    async with httpx.AsyncClient(transport=place, base_url="http://a") as web:
        assert (await web.get("/health")).status_code == 200
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        for answer in (
            await web.get("/ready"),
            await web.post("/v1/chat/completions", json=body),
            await web.post("/v1/compress", json=body),
            await web.get("/v1/models"),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["code"] == "not_ready"


@pytest.fixture
def running() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`draftsieve serve` with the bundled pair, and what it says first."""
    words = ["serve", "--target", "builtin:target", "--draft", "builtin:draft", "--port", "0"]
    code = "import sys; from draftsieve.integrations.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DRAFTSIEVE_API_KEY": "k"},
    ) as process:
        assert process.stderr is not None
        try:
            lines = (json.loads(line) for line in process.stderr)
            yield process, next(line for line in lines if line["event"] == "listening")
        finally:
            process.kill()


def test_the_command_serves_until_it_is_told_to_end(
    running: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    process, told = running
    head = {"Authorization": "Bearer k"}
    with httpx.Client(base_url=told["url"], headers=head, trust_env=False, timeout=120) as web:

        def get(path: str) -> int:
            try:
                return web.get(path).status_code
            except httpx.ConnectError:
                return 0

        wait_for(lambda: get("/health") == 200)
        wait_for(lambda: get("/ready") == 200, seconds=120)
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}
        with web.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(60) == -signal.SIGTERM
    assert process.stderr is not None
    events = [json.loads(line) for line in process.stderr]
    assert [e["status"] for e in events if e.get("route") == "/v1/chat/completions"] == [200]
    assert not [event for event in events if "Hello" in json.dumps(event)]
