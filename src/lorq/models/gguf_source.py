"""A GGUF file -> a Hugging Face folder of what its codes stand for, by transformers' reader and what that leaves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorq.storage.gguf_header import read_gguf_header
from lorq.storage.json_files import some_of
from lorq.storage.names import DECODED_FROM
from lorq.storage.seal import check_seal

# Models whose attention llama.cpp scales by the head's width, but in the one of so many layers by hidden / heads.
_SCALED = {"gemma2": 46, "gemma3_text": 62}
# What transformers leaves out for some architectures, and the config's name for it.
_WIDTHS = {
    "attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip


def decode_gguf(path: Path, folder: Path, make_room: Callable[[Path, int], None]) -> None:
    """Decode a file into an empty folder: in float16, or in float32 where a weight is too large for that.

    ``make_room`` is asked for so many bytes in the folder first.

    Raises:
        ValueError: if transformers cannot read all of it, or lorq wrote it and it was changed since.
        ImportError: without the gguf package.
    """
    tensors = read_gguf_header(path)  # before transformers believes it
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    check_seal(path)
    make_room(folder, 2 * weights)
    model = _loaded(path, "float16")
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        make_room(folder, 4 * weights)
        model = _loaded(path, "float32")
    _check_read(path, model)
    model.save_pretrained(folder)
    if kinds := sorted({tensor.type.upper() for tensor in tensors} - {"F64", "F32", "F16", "BF16"}):
        note = f"the model's weights were quantized before (GGUF: {', '.join(kinds)}), and dequantized"
        (folder / DECODED_FROM).write_text(note, encoding="utf-8")
    _tokenizer(path).save_pretrained(folder)


def _loaded(path: Path, dtype: str) -> Any:
    """The model as transformers reads it, in a type."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, config=_config(path), dtype=dtype,
            quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
        )  # fmt: skip
    except (ValueError, KeyError, OSError, RuntimeError, AssertionError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "tensors have other shapes than its metadata says, as transformers reads it"
        raise ValueError(
            f"{path} could not be read as a GGUF language model: {reason}; take the model's Hugging Face folder"
        ) from error
    model, told = loaded
    if lacking := [*told["missing_keys"], *told["mismatched_keys"]]:
        raise ValueError(
            f"{path} must have every weight of a {type(model).__name__}, as transformers reads it, it lacks "
            f"{some_of(map(str, lacking))}; take the model's Hugging Face folder"
        )
    return model


def _config(path: Path) -> Any:
    """The config that transformers makes of a file's metadata, with what it leaves at the defaults of another model."""
    from gguf import GGUFReader
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = GGUFReader(path).fields
    stated = {name.partition(".")[2]: field for name, field in fields.items()}
    for key, name in _WIDTHS.items():
        # Heads of two widths (Gemma 4) transformers reads itself.
        if key in stated and f"{key}_swa" not in stated and hasattr(config, name):
            setattr(config, name, int(stated[key].contents()))
    if (layers := _SCALED.get(config.model_type)) is not None:
        whole = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = whole if config.num_hidden_layers == layers else config.head_dim
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and padding >= config.vocab_size:
        config.pad_token_id = None
    return config


def _tokenizer(path: Path) -> Any:
    """The file's tokenizer, without tokens that transformers adds to those of the file, which have no row."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    rows = len(GGUFReader(path).fields["tokenizer.ggml.tokens"].data)
    added = {token for token, number in found.get_added_vocab().items() if number >= rows}
    if not added:
        return found
    backend = json.loads(found.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in added]
    special = {name: token for name, token in found.special_tokens_map.items() if token not in added}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), chat_template=found.chat_template, **special
    )


def _check_read(path: Path, model: Any) -> None:
    """Refuse, with a ValueError, a file of which transformers has left out something that changes what comes out."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    scaled = "rope_freqs.weight" in names
    for name, field in reader.fields.items():
        scaled |= name.endswith(".rope.scaling.type") and str(field.contents()) not in ("none", "")
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    left_out = []
    if scaled and rope.get("rope_type", "default") == "default":
        left_out.append("the scaling of its positions (rope)")
    biases = sum(name.endswith(".bias") for name in names)
    if biases > sum(name.endswith("bias") for name in model.state_dict()):
        left_out.append("biases")
    if left_out:
        raise ValueError(
            f"{path} has {' and '.join(left_out)}, which transformers does not read of such files: the model would be "
            "another one; take its Hugging Face folder"
        )
