"""A small OpenAI-compatible chat server over an `Engine`, on 127.0.0.1 and a free port."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from draftsieve.core.config import Generation
from draftsieve.core.engine import Engine
from draftsieve.core.prompt.messages import Prompt
from draftsieve.core.types import Answer


@dataclass
class OpenAIServer:
    """Where the server listens, and the bodies of the requests that it got."""

    base_url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def openai_server(engine: Engine) -> Iterator[OpenAIServer]:
    """Serve an engine's target until the block ends."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = OpenAIServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    Handler.engine, Handler.requests = engine, found.requests
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    engine: Engine
    requests: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        try:
            if self.path != "/v1/chat/completions":
                raise ValueError(f"There is nothing at {self.path}.")
            prompt, generation = Prompt.from_messages(body["messages"]), _generation(body)
            if body.get("stream"):
                self._stream(prompt, generation, body)
                return
            self._send(200, _completion(self.engine.generate(prompt, generation=generation), body))
        except (ValueError, KeyError) as error:
            told = {"message": str(error), "type": "invalid_request_error", "code": None}
            self._send(400, {"error": told})

    def _stream(self, prompt: Prompt, generation: Generation, body: dict[str, Any]) -> None:
        chunks = self.engine.stream_prompt(prompt, generation=generation)
        self._head(200, "text/event-stream")
        self._event(_chunk(body, {"role": "assistant", "content": ""}))
        for chunk in chunks:
            if chunk.text:
                self._event(_chunk(body, {"content": chunk.text}))
            if chunk.answer is not None:
                self._event(_chunk(body, {}, _reason(chunk.answer)))
                if (body.get("stream_options") or {}).get("include_usage"):
                    usage = _usage(chunk.answer)
                    self._event({**_chunk(body, {}), "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, value: dict[str, Any]) -> None:
        self._head(status, "application/json")
        self.wfile.write(json.dumps(value).encode())

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _generation(body: dict[str, Any]) -> Generation:
    stop = body.get("stop") or ()
    return Generation(
        max_new_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or 64,
        temperature=body.get("temperature") or 0.0,
        seed=body.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _completion(answer: Answer, body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": _reason(answer), "logprobs": None}
    return {**_head(body, "chat.completion"), "choices": [choice], "usage": _usage(answer)}


def _chunk(
    body: dict[str, Any], delta: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {**_head(body, "chat.completion.chunk"), "choices": [choice]}


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
    }


def _reason(answer: Answer) -> str:
    return "length" if answer.finish_reason == "length" else "stop"


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "total_tokens": answer.usage.total_tokens,
    }
