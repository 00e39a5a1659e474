"""The start of docs/server.md, command by command, against a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .served import wait_for

PAGE = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
START, CURL, PROXY = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
(CLIENT,) = re.findall(r"```py\n(.*?)```", PAGE, flags=re.DOTALL)
COMMAND = f'draftsieve() {{ "{sys.executable}" -W error -m draftsieve "$@"; }}\n'


@pytest.mark.real
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_start_runs_as_written(smollm2: str) -> None:
    """Apart from the port, which may be taken, and from pip."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = str(place.getsockname()[1])
    pip, *commands = START.splitlines()
    assert pip.startswith("pip install")
    environment = {**os.environ, "DRAFTSIEVE_PORT": port, "NO_PROXY": "127.0.0.1"}
    script = COMMAND + "\n".join([*commands[:-1], "exec_serve() { " + commands[-1] + "; }"])

    def run(code: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", code.replace("8000", port)],
            capture_output=True, text=True, env=environment, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    with subprocess.Popen(
        ["bash", "-c", script + "\nexec_serve"], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as server:  # fmt: skip
        try:
            ready = f"curl -sf http://127.0.0.1:{port}/ready || true"
            wait_for(lambda: "ready" in run(ready), seconds=200)
            told = json.loads(run(CURL))
            assert "seven in the morning" in told["choices"][0]["message"]["content"]
            assert told["draftsieve"]["spans"]
            quoted = CLIENT.replace("8000", port)
            done = subprocess.run(
                [sys.executable, "-c", quoted],
                capture_output=True, text=True, env=environment, timeout=200, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said, sizes, spans = done.stdout.splitlines()
            before, after = sizes.split(" -> ")
            assert said
            assert int(after) <= int(before)
            assert "passage" in spans
        finally:
            os.killpg(server.pid, 9)


def test_the_proxy_of_the_page_is_one() -> None:
    done = subprocess.run(
        ["bash", "-ec", COMMAND + PROXY.strip() + " --print-config"],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'upstream = "http://localhost:8080"' in done.stdout
    assert "ratio = 0.3" in done.stdout
