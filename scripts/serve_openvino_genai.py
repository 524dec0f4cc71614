"""OpenVINO GenAI's continuous batching behind HTTP, as thin as possible, to measure it with `iceformer bench-serve`.

    python scripts/serve_openvino_genai.py model.gguf --port 8001 --threads 2

It answers `POST /v1/completions` with `stream` and nothing else. It needs openvino-genai and no iceformer.
"""

import argparse
import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openvino_genai as genai  # pyright: ignore[reportMissingImports]

_Token = tuple[list[int], bool]


class Pipeline:
    """One pipeline, and the thread that takes its steps while there is something to do."""

    def __init__(self, model: str, threads: int, gigabytes: int, batched_tokens: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = gigabytes
        scheduler.max_num_batched_tokens = batched_tokens
        scheduler.enable_prefix_caching = True
        self._pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.tokenizer = self._pipe.get_tokenizer()
        self._new: queue.SimpleQueue[tuple[Any, int, queue.SimpleQueue[_Token]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def tokens(self, ids: Any, new_tokens: int) -> Iterator[list[int]]:
        """The tokens that continue a prompt, as they come."""
        out: queue.SimpleQueue[_Token] = queue.SimpleQueue()
        self._new.put((ids, new_tokens, out))
        last = False
        while not last:
            found, last = out.get()
            if found:
                yield found

    def _run(self) -> None:
        running: list[tuple[Any, queue.SimpleQueue[_Token]]] = []
        number = 0
        while True:
            while not running or not self._new.empty():
                ids, new_tokens, out = self._new.get()
                config = genai.GenerationConfig(max_new_tokens=new_tokens, do_sample=False)
                running.append((self._pipe.add_request(number, ids, config), out))
                number += 1
            self._pipe.step()
            for handle, out in list(running):
                found: list[int] = []
                while handle.can_read():
                    for output in handle.read().values():
                        found += output.generated_ids
                ended = handle.get_status() != genai.GenerationStatus.RUNNING and not handle.can_read()
                if found or ended:
                    out.put((found, ended))
                if ended:
                    running.remove((handle, out))


def handler(pipeline: Pipeline) -> type[BaseHTTPRequestHandler]:
    """Answers requests through a pipeline."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Streams a completion."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions" or not body.get("stream"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            ids = pipeline.tokenizer.encode(body["prompt"]).input_ids
            written: list[int] = []
            said = ""
            for tokens in pipeline.tokens(ids, body.get("max_tokens", 16)):
                written += tokens
                text = pipeline.tokenizer.decode(written)
                if not text.endswith("\ufffd"):
                    self._send({"choices": [{"index": 0, "text": text[len(said) :]}]})
                    said = text
            prompt, new = int(ids.shape[1]), len(written)
            self._send({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": new}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, event: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    return Handler


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or a folder of OpenVINO's")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gigabytes", type=int, default=2)
    parser.add_argument("--batched-tokens", type=int, default=256, help="tokens of one step, prompts included")
    given = parser.parse_args()
    pipeline = Pipeline(given.model, given.threads, given.cache_gigabytes, given.batched_tokens)
    server = ThreadingHTTPServer(("127.0.0.1", given.port), handler(pipeline))
    server.daemon_threads = True
    print(f"listening at http://127.0.0.1:{given.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
