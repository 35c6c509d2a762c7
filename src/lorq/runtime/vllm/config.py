"""What vLLM asks of a quantization: which of its layers are whose."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from lorq.core.weight import LayerFormat
from lorq.runtime.vllm.experts import LorqExpertsMethod
from lorq.runtime.vllm.linear import LorqLinearMethod, LorqTableMethod
from lorq.storage.config import LorqConfig

# As Triton's.
_CAPABILITY = 70


class VllmConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a lorq folder for vLLM."""

    def __init__(self, config: LorqConfig):
        super().__init__()
        self.formats: dict[str, LayerFormat] = config.formats()
        self.tables = list(config.embeddings)
        self.heads = {head: table for table, head in config.embeddings.items() if head}
        if config.tiles:
            raise ValueError(
                f"vLLM must give every expert its own factors, {next(iter(config.tiles))} shares them (tileq); serve "
                "`lorq export OUT DEST --to dense`, or quantize with another method"
            )

    def get_name(self) -> str:
        return "lorq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return _CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmConfig":
        return cls(LorqConfig(**config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.formats = hf_to_vllm_mapper.apply_dict(self.formats)
        self.tables = hf_to_vllm_mapper.apply_list(self.tables)
        self.heads = hf_to_vllm_mapper.apply_dict(self.heads)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, VocabParallelEmbedding):
            # vLLM's Llama gives its table no name, here it has the only one that can be meant.
            if not prefix and len(self.tables) == 1 and not isinstance(layer, ParallelLMHead):
                prefix = self.tables[0]
            if prefix in self.formats or prefix in self.heads:
                return LorqTableMethod(prefix, self.formats.get(prefix))
            return None
        if isinstance(layer, LinearBase):
            names = self._parts(prefix)
            if not any(name in self.formats for name in names):
                return UnquantizedLinearMethod()
            return LorqLinearMethod({name: self.formats.get(name) for name in names})
        if any(name.startswith(f"{prefix}.") for name in self.formats):
            if isinstance(layer, RoutedExperts):
                return LorqExpertsMethod(layer, prefix, self.formats)
            raise ValueError(
                f"{prefix} ({type(layer).__name__}) must be a linear layer or a table of tokens to have lorq's codes "
                "in vLLM; serve `lorq export OUT DEST --to compressed-tensors` or `--to dense`"
            )
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The model's own layers in one of vLLM's."""
        parent, _, leaf = prefix.rpartition(".")
        if prefix in self.formats or leaf not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{name}".lstrip(".") for name in self.packed_modules_mapping[leaf]]
