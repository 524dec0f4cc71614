"""Load and faults on a running server: what clients that misbehave do to those that do not, in numbers.

    iceformer serve demo-artifact --port 8000
    python scripts/serve_faults.py http://127.0.0.1:8000 --clients 16 --seconds 120

Each of the clients asks for completions of mixed lengths, one after the other, with temperature 0. Every answer must be
the same as the first one to the same prompt. Meanwhile others leave in the middle of their answers, read a byte a
second, send nothing, or send too much. It needs the standard library only, and ends with code 1 if an answer differs.
"""

import argparse
import http.client
import json
import random
import re
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

_TEXT = "the small fox counted stars at night and lived in a wood near the old river where owls sang of winter"
_WORDS = re.findall(r"\w+", _TEXT)
_GIGABYTE = 1 << 30


@dataclass
class Run:
    """What is asked, and what was found so far."""

    host: str
    port: int
    lengths: list[int]
    max_tokens: int
    end: float
    answers: dict[str, str] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.end

    def count(self, what: str, by: int = 1) -> None:
        """Counts an event."""
        with self.lock:
            self.counts[what] += by

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own."""
        return http.client.HTTPConnection(self.host, self.port, timeout=600)


def prompt(seed: int, words: int) -> str:
    """Words that a seed decides on."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(_WORDS) for _ in range(words))


def body(run: Run, seed: int) -> bytes:
    """A request, one of few, so that the same ones are asked again."""
    words = run.lengths[seed % len(run.lengths)]
    asked = {"prompt": prompt(seed, words), "max_tokens": run.max_tokens, "temperature": 0, "stream": True}
    return json.dumps(asked).encode()


def good_client(run: Run, number: int) -> None:
    """Asks, reads to the end, and compares."""
    chosen = random.Random(number)
    while not run.over:
        seed = chosen.randrange(4 * len(run.lengths))
        start = time.monotonic()
        connection = run.connect()
        try:
            connection.request("POST", "/v1/completions", body(run, seed), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status == 429:
                run.count("refused with 429")
                time.sleep(min(float(response.headers["Retry-After"]), 5.0))
                continue
            if response.status != 200:
                run.count(f"status {response.status}")
                continue
            text, times = "", []
            for line in iter(response.readline, b""):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        run.count(f"error {event['error'].get('code')}")
                    text += "".join(choice["text"] for choice in event.get("choices", []))
                    times.append(time.monotonic())
        except (OSError, http.client.HTTPException) as error:
            run.count(f"good client: {type(error).__name__}")
            continue
        finally:
            connection.close()
        with run.lock:
            run.counts["answers"] += 1
            run.counts["answers that differ"] += run.answers.setdefault(str(seed), text) != text
            run.seconds.setdefault(run.lengths[seed % len(run.lengths)], []).append(time.monotonic() - start)
            run.gaps += [later - earlier for earlier, later in pairwise(times)]


def leaving_client(run: Run, number: int) -> None:
    """Asks, and closes the connection at some time, often while the prompt is read."""
    chosen = random.Random(1000 + number)
    while not run.over:
        with suppress(OSError, http.client.HTTPException):
            connection = run.connect()
            connection.request("POST", "/v1/completions", body(run, chosen.randrange(100, 200)))
            time.sleep(chosen.uniform(0.1, 2.0))
            connection.close()
            run.count("clients that left")


def slow_reader(run: Run, number: int) -> None:
    """Reads a byte a second."""
    while not run.over:
        with suppress(OSError), socket.create_connection((run.host, run.port), timeout=60) as connection:
            data = body(run, 300 + number)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            while not run.over and connection.recv(1):
                run.count("bytes read slowly")
                time.sleep(1)


def slow_sender(run: Run, number: int) -> None:
    """Sends a byte of its headers a second."""
    del number
    while not run.over:
        with suppress(OSError), socket.create_connection((run.host, run.port), timeout=60) as connection:
            for byte in b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * 10_000:
                if run.over:
                    break
                connection.sendall(bytes([byte]))
                time.sleep(1)


def large_body(run: Run, number: int) -> None:
    """Announces a gigabyte, and sends as much as the server takes."""
    del number
    while not run.over:
        start = time.monotonic()
        with suppress(OSError), socket.create_connection((run.host, run.port), timeout=60) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {_GIGABYTE}\r\n\r\n".encode()
            )
            with suppress(OSError):
                for _ in range(64):
                    connection.sendall(b" " * (1 << 20))
            answer = connection.recv(64)
            run.count(f"1 GB: {answer[9:12].decode() or 'closed'}")
        run.count("1 GB: milliseconds in all", round(1000 * (time.monotonic() - start)))
        time.sleep(5)


def idle_connections(run: Run, count: int) -> list[socket.socket]:
    """Connections that send nothing, as many as the system allows."""
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection((run.host, run.port), timeout=10))
    except OSError as error:
        print(f"idle connections: {len(opened)} of {count} ({error.strerror})")
    run.count("idle connections", len(opened))
    return opened


def watch(run: Run, process: int | None, memory: list[int], health: list[float]) -> None:
    """Asks for the server's health, and reads its memory, once a second."""
    while not run.over:
        start = time.monotonic()
        try:
            connection = run.connect()
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            connection.close()
            health.append(time.monotonic() - start)
        except (OSError, http.client.HTTPException):
            run.count("health checks that failed")
        if process is not None:
            with suppress(OSError):
                status = Path(f"/proc/{process}/status").read_text()
                memory += [int(size) >> 10 for size in re.findall(r"VmRSS:\s+(\d+) kB", status)]
        time.sleep(1)


def main() -> None:
    """Runs all of it and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--words", default="20,200,1000", help="lengths of prompts")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--idle", type=int, default=500, help="connections that send nothing")
    parser.add_argument("--faults", type=int, default=2, help="clients of each kind that misbehaves")
    parser.add_argument("--process", type=int, help="the server's, whose memory is read")
    given = parser.parse_args()
    parts = urlsplit(given.url)
    lengths = [int(each) for each in given.words.split(",")]
    end = time.monotonic() + given.seconds
    run = Run(parts.hostname or "127.0.0.1", parts.port or 80, lengths, given.max_tokens, end)
    memory, health = list[int](), list[float]()
    idle = idle_connections(run, given.idle)
    kinds = [(good_client, given.clients)]
    kinds += [(kind, given.faults) for kind in (leaving_client, slow_reader, slow_sender, large_body)]
    threads = [
        threading.Thread(target=kind, args=(run, number), daemon=True)
        for kind, count in kinds
        for number in range(count)
    ]
    threads.append(threading.Thread(target=watch, args=(run, given.process, memory, health), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in idle:
        connection.close()
    for what, count in sorted(run.counts.items()):
        print(f"{what}: {count}")
    for words, seconds in sorted(run.seconds.items()):
        print(
            f"{words} words: {len(seconds)} answers, median {statistics.median(seconds):.2f} s, "
            f"longest {max(seconds):.2f} s"
        )
    if run.gaps:
        gaps = sorted(run.gaps)
        print(f"between chunks: median {statistics.median(gaps):.3f} s, p99 {gaps[int(0.99 * len(gaps))]:.3f} s, "
              f"longest {gaps[-1]:.3f} s")  # fmt: skip
    if health:
        print(f"health checks: median {statistics.median(health):.3f} s, longest {max(health):.3f} s")
    if memory:
        print(
            f"memory, MiB: {memory[0]} first, {memory[len(memory) // 2]} halfway, {memory[-1]} last, {max(memory)} most"
        )
    sys.exit(bool(run.counts["answers that differ"] or not run.counts["answers"]))


if __name__ == "__main__":
    main()
