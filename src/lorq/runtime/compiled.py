"""Programs of what a token takes, made by torch.compile."""

import warnings
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lorq.core.codes import levels
from lorq.kernels import OPERATORS
from lorq.runtime.linear import QuantLinear
from lorq.runtime.same_input import Together


def merge_calls(graph: torch.fx.Graph) -> None:
    """Leave one of several calls of lorq's operators with the same arguments. They write to nothing."""
    ours = [getattr(torch.ops.lorq, name).default for name in ("rotate", *OPERATORS)]
    seen: dict[tuple[Any, ...], torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ours:
            first = seen.setdefault((node.target, *node.args, *node.kwargs.items()), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def merging(model: nn.Module) -> tuple[dict[str, Any], list[Together]]:
    """Let layers join in programs that inductor compiles with these options, and which do; none where it takes none."""
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass
    except ImportError:
        return {}, []

    class MergeCalls(CustomGraphPass):  # type: ignore[misc]
        def __call__(self, graph: torch.fx.Graph) -> None:
            merge_calls(graph)

        def uuid(self) -> str:  # of the compiler's cache
            return "lorq.runtime.compiled.merge_calls 1"

    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    joined = list({id(layer.together[0]): layer.together[0] for layer in layers if layer.together}.values())
    for together in joined:
        together.program = []
    return {"post_grad_custom_pre_pass": MergeCalls()}, joined


# What `generate` must be told to go with `compile_steps`: keys and values in tensors of a fixed size, and no second
# compilation by transformers.
STEPS: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def check_compiler(device: torch.device) -> None:
    """Refuse to compile, with a ValueError, where torch would find no C++ compiler."""
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
    seen from the next prompt on, and their shapes checked, but not modules or settings.

    Raises:
        ValueError: at the second token, if the model cannot be compiled; later, if its dtype is another.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # control flow by what tensors hold

    # What codes stand for is a constant of the program, not computed by it. That it is kept is no news to users: the
    # filter below.
    torch.compiler.assume_constant_result(levels)
    # To see at every token whether any of some hundred modules was changed takes an eighth of the time.
    skip = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)  # from torch 2.8 on
    options: dict[str, Any] = {} if skip is None else {"guard_filter_fn": skip}
    # There a token's launches take longer than its work: one graph of them all.
    options |= {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
    merged, joined = merging(model)
    options |= merged
    plain, dtype = model.forward, model.dtype

    def step(**given: Any) -> Any:
        return plain(**given)

    # Programs are kept by code, and nothing else tells those of two models of one class apart.
    own = FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)

    @wraps(plain)
    def forward(input_ids: Tensor, *, past_key_values: Any, **others: Any) -> Any:
        if input_ids.shape[1] > 1 or not past_key_values.is_initialized:
            for together in joined:
                together.refresh()
            return plain(input_ids=input_ids, past_key_values=past_key_values, **others)
        if model.dtype != dtype:
            raise ValueError(f"the model was compiled in {dtype} and is {model.dtype} now; load and compile it again")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Dynamo detected a call to a", UserWarning)
                return compiled(input_ids=input_ids, past_key_values=past_key_values, **others)
        except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{type(model).__name__} cannot be compiled: {reason}; generate without it, or, if an earlier run was "
                f"killed while it compiled, delete {torch._inductor.codecache.cache_dir()}"
            ) from error

    model.forward = forward
