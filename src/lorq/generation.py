"""Let a model continue a text, piece by piece."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated, Any

from lorq.adapt.folder import read_adapter_config
from lorq.core.checks import Dtype, Products, Range, check_arguments
from lorq.models.locate import resolve_model
from lorq.models.tokenizer import check_tokenizer
from lorq.progress import IMPORT, READ, Progress, no_progress

if TYPE_CHECKING:
    from lorq.models.windows import Encoder
_log = logging.getLogger(__name__)
# A folder's generation_config.json may ask for what cannot be shown piece by piece: several answers, or several at once
# to choose from. Its other settings, such as a penalty for repetition or words to stop at, are the model's own.
_ONE_ANSWER = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": None, "constraints": None, "force_words_ids": None,
    "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "return_dict_in_generate": False,
}  # fmt: skip


def generate(
    model: str | Path,
    prompt: str,
    *,
    adapter: str | Path | None = None,
    tokens: Annotated[int, Range(1)] = 64,
    chat: bool = True,
    temperature: Annotated[float, Range(0)] = 0.0,
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0,
    device: str = "auto",
    dtype: Dtype = "auto",
    products: Products = "exact",
    compile: bool = False,
    progress: Progress | None = None,
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
        progress: called as ``progress(stage, done, total)`` until the answer begins.

    Returns:
        Pieces of the answer, which is written from the first ``next`` on; what can be refused is refused before.

    Raises:
        FileNotFoundError, ValueError: as `lorq.load` does, if the prompt is empty, if a number is out of range, and if
            the model cannot be compiled.
    """
    dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    prompt, tokens, temperature, seed, device, dtype, products, chat, compile = check_arguments(
        generate, prompt=prompt, tokens=tokens, temperature=temperature, seed=seed, device=device, dtype=dtype,
        products=products, chat=chat, compile=compile,
    )  # fmt: skip
    progress = progress or no_progress
    folder = resolve_model(model)
    check_tokenizer(folder)
    if adapter is not None:
        read_adapter_config(adapter)
    progress(IMPORT, 0, 1)  # here, so that flags and refusals come before
    from lorq.adapt.adapters import load_adapter
    from lorq.models.skeleton import read_own_config
    from lorq.models.windows import Encoder
    from lorq.runtime.compiled import STEPS, check_compiler, compile_steps
    from lorq.runtime.device import own_defaults, read_device
    from lorq.runtime.hf import load

    progress(IMPORT, 1, 1)
    if compile:
        check_compiler(read_device(device))
    with own_defaults():
        encoder = Encoder.open(folder, read_own_config(folder))
        inputs = _read_prompt(encoder, prompt, chat=chat)
    length = inputs["input_ids"].shape[1]
    if encoder.positions is not None and length + tokens > encoder.positions:
        raise ValueError(
            f"prompt and answer must fit into the model's {encoder.positions} positions, got {length} + {tokens} tokens"
        )
    progress(READ, 0, 1)
    loaded: Any = load(folder, device=device, dtype=dtype)
    if adapter is not None:
        load_adapter(loaded, adapter)
    progress(READ, 1, 1)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    options |= {"max_new_tokens": tokens, "tokenizer": encoder.tokenizer, **_ONE_ANSWER, **inputs.to(loaded.device)}
    if compile:
        compile_steps(loaded)
        options |= STEPS
        _log.info("compiling: up to a minute before the second token")
    return _written(loaded, encoder.tokenizer, options, seed, products, inference=compile)


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
                answer = model.generate(streamer=streamer, stopping_criteria=[ended], **options)
            new = answer[0, options["input_ids"].shape[1] :]
            if len(new) == 1 and not tokenizer.decode(new, skip_special_tokens=True):
                _log.info("the model ended at once: its first token was the end token")
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


def _read_prompt(encoder: "Encoder", prompt: str, *, chat: bool) -> Any:
    """The prompt's tokens, in the chat template if there is one and it is wanted."""
    tokenizer: Any = encoder.tokenizer
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        # What a tokenizer appends, such as </s>, would be the end of what is to be continued.
        own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start, end = len(encoder.start), len(encoder.start) + len(own)
        if inputs["input_ids"][0, start:end].tolist() == own:
            for name, values in inputs.items():
                inputs[name] = values[:, :end]
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt must have at least one token, got an empty one")
    encoder.check(inputs["input_ids"][0].tolist(), "the prompt")
    return inputs
