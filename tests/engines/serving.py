"""A vLLM server, asked by the openai client, beside `lorq.load`; the figures of docs/engines/vllm.md.

    LORQ_VLLM_PYTHON=/path/to/python python tests/engines/serving.py SERVED SAME[,WITH_ADAPTER] [FLAG ...]

SERVED is the folder that vLLM serves, SAME the lorq folder that says the same, WITH_ADAPTER the one that says what the
adapter low-rank does; flags are those of `vllm serve`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

PYTHON = os.environ.get("LORQ_VLLM_PYTHON", "")
PROMPT, TOKENS = "The capital of France is", 32
# The real client, in vLLM's environment.
CLIENT = """
import json, sys, time
from openai import OpenAI
url, model, prompt, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
ask = dict(model=model, prompt=prompt, temperature=0, logprobs=1, extra_body={"return_token_ids": True})
client.completions.create(max_tokens=2, **ask)  # what is compiled at the first call is
began = time.monotonic()
answer = client.completions.create(max_tokens=tokens, **ask).choices[0]
seconds = time.monotonic() - began
print(json.dumps({"text": answer.text, "tokens": answer.token_ids, "seconds": seconds,
    "logprobs": answer.logprobs.token_logprobs, "models": [m.id for m in client.models.list()]}))
"""


def _environment() -> dict[str, str]:
    rest = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LORQ_SRC")}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | rest


@contextmanager
def served(folder: Path, *flags: str, log: Path) -> Iterator[str]:
    """The address of a server, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command asks for the version of a package vllm, which vllm-cpu is not.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--max-num-seqs", "4", *flags]
    with log.open("w") as out:
        # A group of its own: its workers end with it.
        running = subprocess.Popen(command, stdout=out, stderr=out, env=_environment(), start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while running.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(2)
        else:
            raise RuntimeError(f"vLLM ended with {running.returncode}: {log.read_text()[-2000:]}")
        yield url
    finally:
        for sign in (signal.SIGINT, signal.SIGKILL):
            if running.poll() is None:
                os.killpg(running.pid, sign)
                with suppress(subprocess.TimeoutExpired):
                    running.wait(60)


def completed(url: str, model: str, prompt: str = PROMPT, tokens: int = TOKENS) -> dict:
    """What the openai client is answered: text, tokens, their log-probabilities, seconds."""
    asked = [PYTHON, "-c", CLIENT, url, model, prompt, str(tokens)]
    done = subprocess.run(asked, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(folder: Path, taken: list[int], prompt: str = PROMPT, dtype: str = "float32") -> dict:
    """What `lorq.load` says after the prompt and these tokens: its own choices, and the tokens' log-probabilities."""
    from transformers import AutoTokenizer

    import lorq

    model = lorq.load(folder, device="cpu", dtype=dtype)
    first = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    ids = torch.cat([first, torch.tensor([taken])], 1)
    with torch.no_grad():
        logs = model(ids).logits[0, first.shape[1] - 1 : -1].float().log_softmax(-1)
    own = logs.gather(1, torch.tensor(taken)[:, None])[:, 0]
    return {"tokens": logs.argmax(-1).tolist(), "logprobs": own.tolist(), "best": logs.amax(-1).tolist()}


def main(serve: Path, same: list[str], flags: list[str]) -> None:
    folders = dict(zip((str(serve), "low-rank"), map(Path, same), strict=False))
    with served(serve, *flags, log=Path("vllm.log")) as url:
        answers = {model: completed(url, model) for model in folders}
    for model, answer in answers.items():
        own = expected(folders[model], answer["tokens"])
        off = max(abs(a - b) for a, b in zip(own["logprobs"], answer["logprobs"], strict=True))
        alike = sum(a == b for a, b in zip(own["tokens"], answer["tokens"], strict=True))
        print(
            f"{model}: {alike} of {len(own['tokens'])} tokens alike, log-probabilities off by {off:.5f} at most, "
            f"{len(own['tokens']) / answer['seconds']:.1f} tokens/s; {answer['text']!r}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
