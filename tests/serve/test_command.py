"""`iceformer serve` as a process."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

from iceformer.cli import main

from .conftest import NO_END, PROMPT, events_of


def test_sigterm_lets_running_requests_end(artifact: Path) -> None:
    """A stream that has begun is whole, no new connection is taken, and the process ends with code 0."""
    command = [sys.executable, "-m", "iceformer", "serve", f"tale={artifact}", "--port", "0"]
    environment = {**os.environ, "ICEFORMER_API_KEY": "secret"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"listening at (\S+)", process.stdout.readline())
            assert found is not None
            assert process.stdout.readline() == "ready: tale\n"
            url, headers = found[1], {"Authorization": "Bearer secret"}
            assert httpx2.get(f"{url}/v1/models").status_code == 401
            body = {"model": "tale", "prompt": PROMPT, "max_tokens": 200, "logit_bias": NO_END, "stream": True}
            with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as response:
                events = events_of(response)
                first = next(events)
                process.send_signal(signal.SIGTERM)
                rest = list(events)
            assert rest[-1] == "done"
            assert rest[-2]["timings"]["predicted_n"] == 200
            assert first["id"] == rest[-2]["id"]
            assert process.wait(30) == 0
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{url}/health/live")
            assert process.stderr is not None
            lines = [json.loads(line) for line in process.stderr.read().splitlines()]
            assert [line["status"] for line in lines] == [401, 200]
            assert (lines[-1]["finish"], lines[-1]["completion_tokens"]) == ("length", 200)
        finally:
            process.kill()


def test_an_artifact_that_cannot_be_loaded_ends_the_server(
    tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        (str(tmp_path / "missing"),): "missing is not a folder: expected an artifact",
        (str(artifact), str(artifact)): "two artifacts have the name 'fox'",
        (f"a={artifact}", "=b"): "'=b' is no artifact",
        (str(tmp_path / "empty"), "--port", "0"): "empty lacks manifest.json",
        (str(artifact), "--host", "999.1.1.1"): "999.1.1.1 port 8000 cannot be used",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as exit_:
            main(["serve", *arguments])
        assert exit_.value.code == 1
        error = " ".join(capsys.readouterr().err.split())
        assert message in error
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("iceformer empty")]


def test_a_missing_extra_is_named(artifact: Path) -> None:
    code = (
        f"import sys; sys.modules['uvicorn'] = None; from iceformer.cli import main; main(['serve', {str(artifact)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert "iceformer serve needs uvicorn: pip install 'iceformer[serve]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_sessions_import_nothing_of_the_server() -> None:
    code = "import sys, iceformer; iceformer.load; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    packages = {name.partition(".")[0] for name in result.stdout.split()}
    assert not packages & {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}
    assert "iceformer.serve" not in result.stdout
