"""Let a model continue a text, piece by piece."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from threading import Thread
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lorq.grids import levels
from lorq.joined import merging
from lorq.kernels import cpu


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
        products: how inputs meet integer codes on a CPU: "exact", or "bytes", see `lorq.kernels.cpu.products`.
        compile: have torch.compile make one program of what a token takes, after the first token. Takes a minute or
            more, which a line on stderr tells; needs a C++ compiler on a CPU.

    Raises:
        ValueError: if the prompt is empty, a number is out of range, or the model cannot be compiled.
    """
    from transformers import AutoConfig, AutoTokenizer

    from lorq.adapters import load_adapter, read_adapter_config
    from lorq.hf import load, read_device
    from lorq.source import resolve_model

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
    yield from _written(loaded, tokenizer, options, inference=compile)


def _written(model: Any, tokenizer: Any, options: dict[str, Any], *, inference: bool) -> Iterator[str]:
    """What `generate` writes with these options, as it comes."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def write() -> None:
        try:
            # Compiled, inference mode spares every operator a look at gradients; else layers that share a rotated
            # input would lose it (`lorq.linear.SharedRotation`).
            with torch.inference_mode() if inference else nullcontext():
                model.generate(streamer=streamer, **options)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    writer = Thread(target=write, daemon=True)
    writer.start()
    yield from streamer
    writer.join()
    if failure:
        raise failure[0]


# What `generate` must be told to go with `compile_steps`: keys and values in tensors of a fixed size, and no second
# compilation by transformers.
STEPS: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch would find no C++ compiler.

    Raises:
        ValueError: naming what it looks for.
    """
    from torch._inductor import config, cpp_builder, exc

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        names = ", ".join(name for name in config.cpp.cxx if name)
        raise ValueError(f"to compile takes a C++ compiler, got none for {names}; install g++ or set CXX") from None


def compile_steps(model: Any) -> None:
    """Compile the forward pass of a single token, in place. The passes of prompts are left as they are.

    Compiling happens at the second token; the operators of `lorq.kernels` stay calls of what they call otherwise. The
    cache must be of fixed size (`STEPS`). The model must stay as it is: tensors of it that are replaced later are
    seen, and their shapes checked, but not modules or settings.

    Raises:
        ValueError: at the second token, if the model cannot be compiled; later, if its dtype is another.
    """
    # What codes stand for is a constant of the program, not computed by it. That it is kept is no news to users.
    torch.compiler.assume_constant_result(levels)
    warnings.filterwarnings("ignore", "Dynamo detected a call to a", UserWarning)
    # To see at every token whether any of some hundred modules was changed takes an eighth of the time.
    skip = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)  # from torch 2.8 on
    options: dict[str, Any] = {} if skip is None else {"guard_filter_fn": skip}
    # There a token's launches take longer than its work: one graph of them all.
    options |= {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
    options |= merging(model)
    plain, dtype = model.forward, model.dtype

    def step(**given: Any) -> Any:
        return plain(**given)

    # Programs are kept by code, and nothing else tells those of two models of one class apart.
    own = FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)

    @wraps(plain)
    def forward(input_ids: Tensor, *, past_key_values: Any, **others: Any) -> Any:
        if input_ids.shape[1] > 1 or not past_key_values.is_initialized:
            return plain(input_ids=input_ids, past_key_values=past_key_values, **others)
        if model.dtype != dtype:
            raise ValueError(f"the model was compiled in {dtype} and is {model.dtype} now; load and compile it again")
        try:
            return compiled(input_ids=input_ids, past_key_values=past_key_values, **others)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{type(model).__name__} cannot be compiled: {reason}; generate without it, or, if an earlier run was "
                f"killed while it compiled, delete {torch._inductor.codecache.cache_dir()}"
            ) from error

    model.forward = forward


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
