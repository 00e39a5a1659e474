"""A virtual environment for each peer, and the draft in a form that transformers 4 reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STAMP = "installed.txt"  # in an environment: the requirements it was made from


class PeerUnavailableError(RuntimeError):
    """A peer cannot be installed or started; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A script, what its environment needs, and which of our models it loads."""

    name: str
    model: str  # "target" or "draft"
    transformers_4: bool = False
    folder: Path = HERE

    @property
    def script(self) -> Path:
        """Its script; arguments are a prompts file, a model and an answers file."""
        return self.folder / f"{self.name}_peer.py"

    @property
    def requirements(self) -> Path:
        """Its pinned requirements."""
        return self.folder / f"{self.name}.txt"


PEERS = (Peer("kvpress", "target"), Peer("llmlingua", "draft", transformers_4=True))


def run_peer(peer: Peer, environments: Path, prompts: Path, model: str, answers: Path) -> None:
    """Install a peer where it is not yet, and run its script.

    Raises:
        PeerUnavailableError: That failed.
    """
    python = install(peer, environments)
    local = Path(model).is_dir()
    if peer.transformers_4 and local:
        model = str(as_transformers_4(Path(model), environments / f"{peer.name}-model"))
    environment = {**os.environ, **({"HF_HUB_OFFLINE": "1"} if local else {})}
    command = [str(python), str(peer.script), str(prompts), model, str(answers)]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise PeerUnavailableError(f"{peer.script.name} ended with code {code}; see above")


def install(peer: Peer, environments: Path) -> Path:
    """The Python of a peer's environment, made from its requirements if it is not there.

    Raises:
        PeerUnavailableError: An installation failed.
    """
    home = environments / peer.name
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted, stamp = peer.requirements.read_text(encoding="utf-8"), home / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python.absolute()
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(peer.requirements)],
    ):
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError as error:
            raise PeerUnavailableError(f"{command[0]} cannot be started: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
            raise PeerUnavailableError(f"it cannot be installed: {lines[-1]}")
    stamp.write_text(wanted, encoding="utf-8")
    return python.absolute()


def as_transformers_4(source: Path, copy: Path) -> Path:
    """A copy of a model's folder that transformers 4 understands.

    It knows neither `rope_parameters` (and would silently rotate by its default) nor the tokenizer
    class of transformers 5. Folders of transformers 4 are returned as they are.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" not in config:
        return source
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name, content in (
        ("config.json", config_4(config)),
        ("tokenizer_config.json", tokenizer_4(tokenizer)),
    ):
        (copy / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return copy


def config_4(config: dict[str, Any]) -> dict[str, Any]:
    """A model's configuration in the words of transformers 4."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    plain = rope.get("rope_type", "default") == "default"
    old["rope_scaling"] = None if plain else rope
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return old


def tokenizer_4(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration in the words of transformers 4."""
    old = {key: value for key, value in config.items() if key != "backend"}
    if old.get("tokenizer_class") == "TokenizersBackend":
        old["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := old.get("extra_special_tokens"), list):
        del old["extra_special_tokens"]
        old["additional_special_tokens"] = extra
    return old
