"""An adapter that peft loads on the quantized model, and transformers, vLLM and SGLang with it."""

from collections import Counter
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lorq.foreign.choose import Compensated
from lorq.storage.atomic import sync_file
from lorq.storage.json_files import json_bytes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_peft(done: Compensated, folder: Path, base: str) -> int:
    """Write the adapter's two files; the bytes of its tensors.

    A LoRA adapter adds ``alpha / r B A``: ``B`` is our left factor, ``A`` the right one, and ``alpha = r`` in every
    layer, by patterns where ranks differ. Layers without factors are not named. ``init_lora_weights`` true and no
    dropout, bias or rslora: what servers accept.

    Args:
        base: the quantized model, which the factors are for, and for no other.
    """
    ranks = {name: rank for name, (_, rank) in done.layers.items() if rank}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    transposed = {t.transposed for targets in done.couple.targets.values() for t in targets if t.name in ranks}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True,
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": transposed == {True}, "modules_to_save": None,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        factors = done.factors(name)
        assert factors is not None
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.right.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.left.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors keeps it to its owner
    sync_file(folder / WEIGHTS)
    (folder / CONFIG).write_bytes(json_bytes(config))
    return sum(tensor.nbytes for tensor in tensors.values())
