"""vLLM's own layers with lorq's weights, shared by several processes; run by test_vllm.py in vLLM's environment.

python vllm_layers.py FOLDER RANK WORLD     # FOLDER has layers.json and layers.safetensors
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig as Engine
from vllm.config import set_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import permute_param_layout_

from lorq.core.problem import Problem
from lorq.core.stats import InputStats
from lorq.kernels import fake_quantize
from lorq.methods import LoPRo
from lorq.runtime.vllm import mixed, register
from lorq.runtime.vllm.linear import Part
from lorq.storage.config import read_format

HIDDEN, MIDDLE, HEAD, TOKENS, EXPERTS, CHOSEN = 64, 128, 16, 200, 4, 2
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PARTS = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": (0, 1)}


def main(folder: Path, rank: int, world: int) -> None:
    spec, tensors = json.loads((folder / "layers.json").read_text()), load_file(folder / "layers.safetensors")
    os.environ["VLLM_DIST_IDENT"] = f"{folder.name}-{world}"  # vLLM's own launcher sets it
    register()
    register()  # as several processes and plug-ins may
    with set_current_vllm_config(Engine()):
        meeting = f"file://{folder}/meeting-{world}"
        init_distributed_environment(world, rank, meeting, local_rank=rank, backend="gloo")
        initialize_model_parallel(world)
        config = get_quantization_config("lorq").from_config(spec)
        config.packed_modules_mapping = FUSED
        check(config, spec, tensors, rank, world)
        check_experts(config, spec, tensors, world)
        check_mixed()
    print(f"rank {rank} of {world}: all alike")


def check_mixed():
    """Integer codes by vLLM's own kernel for CPUs, whose tensors, names and layouts are those of the ones for CUDA."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 128, generator=generator) for n in (96, 7))
    mixed.DEVICES.add("cpu")
    for symmetric in (True, False):
        for group in (32, 128):
            for rank in (0, 3):
                method = LoPRo(
                    bits=4, group_size=group, symmetric=symmetric, rank=rank, rounding="nearest", rotation="none"
                )
                solved = method.solve(
                    Problem({"w": weight}, {"w": InputStats(torch.eye(128), torch.ones(128), 128)}, 0)
                )["w"]
                part = Part(solved, (0, 96), (0, 128), torch.device("cpu"), torch.float16)
                assert isinstance(part.linear, mixed.MixedLinear) and (part.linear.left is not None) == bool(rank)
                exact = x.half().float() @ solved.dense().T
                torch.testing.assert_close(part(part.image(x.half())).float(), exact, rtol=1e-2, atol=2e-2)
                # Scales in float16 are exact there, and are not in bfloat16.
                own = Part(solved, (0, 96), (0, 128), torch.device("cpu"), torch.bfloat16)
                assert not isinstance(own.linear, mixed.MixedLinear)
    for other in (LoPRo(bits=3, group_size=32, rank=0, rotation="none"), LoPRo(bits=4, codebook="trellis", rank=0)):
        solved = other.solve(Problem({"w": weight}, {"w": InputStats(torch.eye(128), torch.ones(128), 128)}, 0))["w"]
        assert mixed.mixed_linear(replace(solved, basis=None), torch.float16, torch.device("cpu")) is None
    mixed.DEVICES.remove("cpu")

    class AsMarlin:
        """What `MarlinLinearKernel.process_weights_after_loading` does first to each tensor."""

        def process_weights_after_loading(self, layer):
            for name, packed in (("weight_packed", 0), ("weight_scale", None), ("weight_zero_point", 1)):
                places = {"input_dim": 0, "output_dim": 1} | ({} if packed is None else {"packed_dim": packed})
                permute_param_layout_(getattr(layer, name), **places)

    solved = LoPRo(bits=4, group_size=32, rank=0, rotation="none").solve(
        Problem({"w": weight}, {"w": InputStats(torch.eye(128), torch.ones(128), 128)}, 0)
    )["w"]
    layer = mixed.MixedLinear(solved, AsMarlin(), torch.float16, torch.device("cpu"))
    shapes = [tuple(getattr(layer, f"weight_{name}").shape) for name in ("packed", "scale", "zero_point")]
    assert shapes == [(128 * 4 // 32, 96), (128 // 32, 96), (128 // 32, 96 * 4 // 32)]


def dense(spec, tensors, name):
    """A layer's weight."""
    if name not in spec["layers"]:
        return tensors[f"{name}.weight"]
    own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
    return read_format(name, spec["layers"][name]).read(own).dense()


def close(ours, exact):
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def check(config, spec, tensors, rank, world):
    """Every layer's output is the dense weight's, or this rank's part of it."""

    def product(name, x):
        own = spec["layers"].get(name, {})
        if own.get("input_quantization") == "tensor":
            x = fake_quantize(x, tensors[f"{name}.input_scale"], tensors[f"{name}.input_zero_point"])
        y = x @ dense(spec, tensors, name).T
        return fake_quantize(y, None, None) if own.get("output_quantization") == "token" else y

    def filled(layer, prefix):
        parent, _, leaf = prefix.rpartition(".")
        for number, part in enumerate(FUSED.get(leaf, [leaf])):
            for key, tensor in tensors.items():
                if key.rpartition(".")[0] != f"{parent}.{part}".lstrip("."):
                    continue
                parameter = getattr(layer, key.rpartition(".")[2])
                shard = PARTS[leaf][number] if leaf in PARTS else None
                if number % 2 and shard is not None:  # as vLLM 0.32 tells it
                    tensor = tensor.detach()
                    tensor.shard_id = shard
                    parameter.weight_loader(parameter, tensor)
                else:
                    parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    rest = {"quant_config": config, "params_dtype": torch.float32}
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    for kv, prefix in ((2, "model.layers.0.self_attn.qkv_proj"), (1, "model.layers.1.self_attn.qkv_proj")):
        layer = filled(QKVParallelLinear(HIDDEN, HEAD, 4, kv, bias=False, prefix=prefix, **rest), prefix)
        wholes = [product(prefix.replace("qkv", letter), x) for letter in "qkv"]
        ranks = [(rank, world)] + [(rank * min(kv, world) // world, min(kv, world))] * 2
        parts = [whole.chunk(count, -1)[place] for whole, (place, count) in zip(wholes, ranks, strict=True)]
        close(layer(x)[0], torch.cat(parts, -1))
    for prefix in ("model.layers.0.mlp.gate_up_proj", "model.layers.1.mlp.gate_up_proj"):
        layer = filled(MergedColumnParallelLinear(HIDDEN, [MIDDLE] * 2, bias=False, prefix=prefix, **rest), prefix)
        parts = [product(prefix.replace("gate_up", part), x).chunk(world, -1)[rank] for part in ("gate", "up")]
        close(layer(x)[0], torch.cat(parts, -1))
        if world == 1:
            close(torch.compile(layer, fullgraph=True)(x)[0], torch.cat(parts, -1))
    for prefix, width in (
        ("model.layers.0.self_attn.o_proj", HIDDEN), ("model.layers.0.mlp.down_proj", MIDDLE),
        ("model.layers.1.mlp.down_proj", MIDDLE),
    ):  # fmt: skip
        z = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
        layer = filled(RowParallelLinear(width, HIDDEN, bias=False, prefix=prefix, **rest), prefix)
        close(layer(z.chunk(world, -1)[rank].contiguous())[0], product(prefix, z))
    table = filled(VocabParallelEmbedding(TOKENS, HIDDEN, prefix="model.embed_tokens", **rest), "model.embed_tokens")
    index = torch.tensor([0, 3, 99, 100, TOKENS - 1])
    local = "model.embed_tokens.weight_scale"
    tensors[local] *= 2  # another model's table of the same name
    other = filled(VocabParallelEmbedding(TOKENS, HIDDEN, prefix="model.embed_tokens", **rest), "model.embed_tokens")
    close(other(index), dense(spec, tensors, "model.embed_tokens")[index])
    tensors[local] /= 2
    close(table(index), dense(spec, tensors, "model.embed_tokens")[index])
    head = ParallelLMHead(TOKENS, HIDDEN, prefix="lm_head", **rest).tie_weights(table)
    head.quant_method.process_weights_after_loading(head)
    logits = head.quant_method.apply(head, x)
    own = table.shard_indices
    rows = slice(own.org_vocab_start_index, own.org_vocab_end_index)
    close(logits[:, : rows.stop - rows.start], x @ dense(spec, tensors, "model.embed_tokens")[rows].T)


def check_experts(config, spec, tensors, world):
    """Mixtures of all kinds, as they are and in a compiled program, which has the experts as one operator."""
    numbers = torch.Generator().manual_seed(2)
    routing = torch.rand(9, CHOSEN, generator=numbers)
    index = torch.stack([torch.randperm(EXPERTS, generator=numbers)[:CHOSEN] for _ in range(9)]).int()
    x = torch.randn(9, HIDDEN, generator=numbers)
    ways = {}
    for prefix in sorted({name.partition(".experts")[0] for name in spec["layers"] if ".experts" in name}):
        layer = mixture(config, tensors, f"{prefix}.experts")
        ways[prefix] = layer.lorq_routed.declines_at_once(x[:1], routing[:1])
        for tokens in (1, 9):  # few tokens are multiplied at once, many one expert after the other
            given = x[:tokens], routing[:tokens], index[:tokens]
            exact = torch.zeros(tokens, HIDDEN)
            for token, (row, weights, chosen) in enumerate(zip(*given, strict=True)):
                for weight, number in zip(weights, chosen.tolist(), strict=True):
                    gate, up, down = (
                        dense(spec, tensors, f"{prefix}.experts.{number}.{own}_proj") for own in ("gate", "up", "down")
                    )
                    exact[token] += weight * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
            close(tensor_model_parallel_all_reduce(layer.forward_modular(*given)), exact)
            if world == 1:
                torch._dynamo.reset()
                close(torch.compile(layer.forward_modular, fullgraph=True)(*given), exact)
    assert ways["at_once"] is None and ways["turned"] is None, ways
    assert all("are multiplied one expert after the other" in ways[name] for name in ("streams", "gguf")), ways
    assert "differ in how their inputs are turned" in ways["permuted"] and "factors of their own" in ways["ranks"], ways
    layer = mixture(config, tensors, "at_once.experts", run=False)
    layer.quant_method.captured = True
    layer.to("meta")  # of which no kernels are known
    try:
        layer.quant_method.process_weights_after_loading(layer)
    except ValueError as error:
        told = (
            "experts that vLLM captures in graphs must run in one product, those of at_once.experts do not (no kernels"
        )
        assert told in str(error) and "--enforce-eager" in str(error), error
    else:
        raise AssertionError("they are refused")


def mixture(config, tensors, prefix, run=True):
    """vLLM's own layer of experts with their weights."""
    # Each a model of its own for vLLM: its names are used once.
    with set_current_vllm_config(Engine()):
        runner = FusedMoEFactory(
            num_experts=EXPERTS, top_k=CHOSEN, hidden_size=HIDDEN, intermediate_size=MIDDLE, quant_config=config,
            prefix=prefix, params_dtype=torch.float32,
        )  # fmt: skip
    layer = runner.routed_experts
    for number in range(EXPERTS):
        for shard, own in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            stored = f"{prefix}.{number}.{own}."
            for key in [key for key in tensors if key.startswith(stored)]:
                local = key.removeprefix(stored)
                parameter = getattr(layer, ("w2_" if shard == "w2" else "w13_") + local)
                parameter.weight_loader(parameter, tensors[key], key, shard_id=shard, expert_id=number)
    if run:
        layer.quant_method.process_weights_after_loading(layer)
    return layer


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
