"""An adapter that peft loads on the quantized model, and transformers, vLLM and SGLang with it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lorq.foreign.choose import Compensated
from lorq.storage.atomic import sync_file
from lorq.storage.json_files import json_bytes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_peft(done: Compensated, folder: Path, base: str) -> int:
    """Write the adapter of what was fitted; the bytes of its tensors.

    Args:
        base: the quantized model, which the factors are for, and for no other.
    """
    ranks = {name: rank for name, (_, rank) in done.layers.items() if rank}
    dense = not done.couple.files.layers  # else linear layers have taken the place of GPT-2's Conv1D
    transposed = {t.transposed for targets in done.couple.targets.values() for t in targets if t.name in ranks}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ranks:
        own = done.factors(name)
        assert own is not None
        factors[name] = own.left, own.right
    return write_lora(folder, factors, base, transposed=dense and transposed == {True})


def write_lora(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], base: str, *, transposed: bool) -> int:
    """Write an adapter's two files into a folder; the bytes of its tensors.

    A LoRA adapter adds ``alpha / r B A``: ``B`` is our left factor, ``A`` the right one, and ``alpha = r`` in every
    layer, by patterns where ranks differ. Layers without factors are not named. ``init_lora_weights`` true and no
    dropout, bias or rslora: what servers accept.

    Args:
        factors: left and right, by layer.
        transposed: the layers keep their weights as (in, out).
    """
    ranks = {name: left.shape[1] for name, (left, _) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True,
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": transposed, "modules_to_save": None,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors keeps it to its owner
    sync_file(folder / WEIGHTS)
    (folder / CONFIG).write_bytes(json_bytes(config))
    return sum(tensor.nbytes for tensor in tensors.values())
