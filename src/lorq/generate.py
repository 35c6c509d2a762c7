"""Let a model continue a text, piece by piece."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from lorq.kernels import cpu
from lorq.runtime.compiled import STEPS, check_compiler, compile_steps


def stream_text(
    model: str,
    prompt: str,
    *,
    adapter: str | Path | None = None,
    tokens: int = 64,
    chat: bool = True,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    products: str = "exact",
    compile: bool = False,
) -> Iterator[str]:
    """Yield the model's answer as it is written.

    Args:
        model: a lorq folder, or anything that `lorq.quantize` takes.
        prompt: the text to answer, or to continue.
        adapter: folder of an adapter to use on the model (`lorq.adapt`).
        tokens: at most this many new tokens, at least 1.
        chat: put the prompt into the tokenizer's chat template, if it has one.
        temperature: 0 is greedy.
        seed: of the sampling; torch's global generator is seeded, as `generate` reads no other.
        device: "auto" takes an accelerator if there is one.
        dtype: of the activations.
        products: how inputs meet integer codes on a CPU: "exact", or "bytes", see `lorq.kernels.cpu.products`: it holds
            for the whole process while the answer is written.
        compile: have torch.compile make one program of what a token takes, after the first token. Takes a minute or
            more, which a line on stderr tells; needs a C++ compiler on a CPU.

    Raises:
        ValueError: if the prompt is empty, a number is out of range, or the model cannot be compiled.
    """
    from transformers import AutoConfig, AutoTokenizer

    from lorq.adapt.adapters import load_adapter, read_adapter_config
    from lorq.models.locate import resolve_model
    from lorq.runtime.device import read_device
    from lorq.runtime.hf import load

    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    cpu.check_products(products)
    if compile:
        check_compiler(read_device(device))
    folder = resolve_model(model)
    if adapter is not None:
        read_adapter_config(Path(adapter))  # before the model is read
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = _read_prompt(tokenizer, prompt, chat=chat)
    limit = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if limit is not None and length + tokens > limit:
        raise ValueError(
            f"prompt and answer must fit into the model's {limit} positions, got {length} + {tokens} tokens"
        )
    loaded: Any = load(folder, device=device, dtype=dtype)
    if adapter is not None:
        load_adapter(loaded, adapter)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    options |= {"max_new_tokens": tokens, **inputs.to(loaded.device)}
    if compile:
        compile_steps(loaded)
        options |= STEPS
        print("compiling: up to a minute before the second token", file=sys.stderr, flush=True)
    torch.manual_seed(seed)
    yield from _written(loaded, tokenizer, options, products, inference=compile)


def _written(model: Any, tokenizer: Any, options: dict[str, Any], products: str, *, inference: bool) -> Iterator[str]:
    """What `generate` writes with these options, as it comes; an answer that is not read to its end ends there."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    unread = Event()

    def ended(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(tokens),), unread.is_set(), device=tokens.device)

    def write() -> None:
        try:
            # Compiled, inference mode spares every operator a look at gradients; else layers that share a rotated
            # input would lose it (`lorq.runtime.rotation.SharedRotation`).
            with cpu.products(products), torch.inference_mode() if inference else nullcontext():
                model.generate(streamer=streamer, stopping_criteria=[ended], **options)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    writer = Thread(target=write, daemon=True)
    writer.start()
    try:
        yield from streamer
    except GeneratorExit:
        unread.set()
        writer.join()  # at most a token later; only then `products` are what they were
        raise
    writer.join()
    if failure:
        raise failure[0]


def _read_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """The prompt's tokens, in the chat template if there is one and it is wanted."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt must have at least one token, got an empty one")
    return inputs
