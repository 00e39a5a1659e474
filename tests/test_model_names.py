"""Names that stand for no model: said at once, with what was looked for and what may be meant."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from draftsieve.core.errors import ModelNotFoundError
from draftsieve.core.models.loading import load_model
from draftsieve.core.models.names import resolve


@pytest.fixture
def port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


class _Hub(BaseHTTPRequestHandler):
    """A hub that has no models."""

    def do_HEAD(self) -> None:
        """Nothing is found but the front page."""
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:nothing", r"no bundled model .*there are: .*builtin:draft.*builtin:target"),
        ("./missing", r"no folder '/.*missing'\. Give a folder .*builtin:target"),
        (Path("missing"), r"no folder '/.*missing'\. Give a folder"),
        ("models/a/b", r'hub ids look like "owner/name"'),
        ("owner/name with spaces", r'hub ids look like "owner/name"'),
        ("C:\\models\\mine", r'hub ids look like "owner/name"'),
        ("mine/model.safetensors", r"names a file; give the folder that holds it"),
        ("./draught", r"Similar names: builtin:draft\."),
        ("./smolm2-135", r"Similar names: smollm2-135m\."),
        (" ", "name is empty"),
    ],
)
def test_what_cannot_be_a_hub_id_is_refused_at_once(name: str | Path, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        resolve(name)


def test_folders_that_are_called_nearly_the_same_are_named(tmp_path: Path) -> None:
    for name in ("smollm2-135m", "smollm2-360m", "photos"):
        (tmp_path / name).mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    (tmp_path / "smollm2-135m.gguf").touch()
    with pytest.raises(ModelNotFoundError, match="Similar names") as caught:
        resolve(tmp_path / "smolm2-135m")
    assert str(tmp_path / "smollm2-135m") in str(caught.value)
    assert str(tmp_path / "smollm2-135m.gguf") in str(caught.value)
    assert "360m" not in str(caught.value)  # not a model


LOAD = """
import time
from draftsieve.core.errors import ModelNotFoundError
from draftsieve.core.models.loading import load_model
began = time.monotonic()
try:
    load_model("someone/{model}", device="cpu", progress=False)
except ModelNotFoundError as error:
    print(error)
print(time.monotonic() - began)
"""


def _load(model: str, **settings: str) -> tuple[str, float]:
    """What loading says in a fresh process, and the seconds it takes."""
    plain = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD.format(model=model)],
        env=plain | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    *said, seconds = run.stdout.strip().splitlines()
    return "\n".join(said), float(seconds)


def test_the_message_says_what_the_hub_had_to_say(hub: str, tmp_path: Path) -> None:
    cache = {"HF_HUB_CACHE": str(tmp_path)}
    said, _ = _load("nothing", HF_ENDPOINT=hub, **cache)
    assert "and the hub says: someone/nothing is not a local folder" in said
    said, seconds = _load("nothing", HF_HUB_OFFLINE="1", **cache)
    assert "the hub's cache does not hold it (HF_HUB_OFFLINE is set)" in said
    assert seconds < 5


def test_nothing_waits_for_a_hub_out_of_reach(tmp_path: Path, port: int) -> None:
    loaded = load_model("builtin:draft", device="cpu", progress=False)
    home = tmp_path / "models--someone--tiny"  # as the hub's client leaves models in its cache
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    loaded.model.save_pretrained(home / "snapshots" / ("a" * 40))
    loaded.tokenizer.save_pretrained(home / "snapshots" / ("a" * 40))
    silent = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_CACHE": str(tmp_path)}
    said, seconds = _load("mistyped", **silent)
    assert "cannot be reached" in said
    assert seconds < 10  # the hub's own client gives up after a minute
    said, seconds = _load("tiny", **silent)
    assert said == ""
    assert seconds < 15
