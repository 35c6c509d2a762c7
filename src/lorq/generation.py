"""Let a model continue a text, piece by piece."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any

from lorq.adapt.folder import read_adapter_config
from lorq.models.locate import resolve_model

_log = logging.getLogger(__name__)


def generate(
    model: str | Path,
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
    """Let a model answer a prompt.

    Args:
        model: a lorq folder, or anything that quantize takes.
        prompt: the text to answer or continue.
        adapter: a folder that `lorq adapt` wrote, to be used on the model.
        tokens: at most this many new tokens.
        chat: use the model's chat template if it has one; else the text is continued as it stands.
        temperature: 0 always takes the likeliest token.
        seed: for temperatures above 0; of torch's global generator.
        device: auto, which takes an accelerator if there is one, cpu, cuda and so on.
        dtype: of the activations: float32, bfloat16 or float16; auto is float32 on a CPU.
        products: how inputs meet integer codes on a CPU (in the whole process, while the answer is written): exact, or
            bytes, which rounds them to 8 bits on the fly.
        compile: have torch.compile make one program of what a token takes; up to a minute before the second token.
            Needs a C++ compiler on a CPU.

    Returns:
        Pieces of the answer, which is written from the first ``next`` on; what can be refused is refused before.

    Raises:
        FileNotFoundError, ValueError: as `lorq.load` does, if the prompt is empty, if a number is out of range, and if
            the model cannot be compiled.
    """
    # Here, so that the command line has its flags before torch is there.
    from transformers import AutoConfig, AutoTokenizer

    from lorq.adapt.adapters import load_adapter
    from lorq.kernels.cpu import check_products
    from lorq.runtime.compiled import STEPS, check_compiler, compile_steps
    from lorq.runtime.device import read_device
    from lorq.runtime.hf import load

    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    check_products(products)
    if compile:
        check_compiler(read_device(device))
    folder = resolve_model(model)
    if adapter is not None:
        read_adapter_config(Path(adapter))  # before the model is read
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = _read_prompt(tokenizer, prompt, chat=chat)
    limit = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
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
        _log.info("compiling: up to a minute before the second token")
    return _written(loaded, tokenizer, options, seed, products, inference=compile)


def _written(
    model: Any, tokenizer: Any, options: dict[str, Any], seed: int, products: str, *, inference: bool
) -> Iterator[str]:
    """What ``model.generate`` writes with these options, as it comes; what is not read to its end, ends."""
    import torch
    from transformers import TextIteratorStreamer

    from lorq.kernels import cpu

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    unread = Event()

    def ended(tokens: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(tokens),), unread.is_set(), device=tokens.device)

    def write() -> None:
        try:
            # Compiled, inference mode spares every operator a look at gradients; else layers that share a rotated
            # input would lose it (`lorq.runtime.same_input.Together`).
            with cpu.products(products), torch.inference_mode() if inference else nullcontext():
                model.generate(streamer=streamer, stopping_criteria=[ended], **options)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    torch.manual_seed(seed)  # `model.generate` reads no other generator
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
