"""vLLM's plug-in: `vllm serve OUT` of a lorq folder as it is. See docs/engines/vllm.md.

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.
"""


def register() -> None:
    """Make "lorq" one of vLLM's quantizations; safe to call twice."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from lorq.runtime.vllm.config import VllmConfig

    register_quantization_config("lorq")(VllmConfig)
