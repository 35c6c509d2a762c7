"""`--to gguf`: a file for llama.cpp, whose weights are what the folder's codes stand for."""

import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lorq.core.codes import IntGrid
from lorq.exports.dense import activations_lost
from lorq.exports.gguf_model import architecture_of, rope_tensors, write_metadata
from lorq.exports.gguf_plan import FileTensor, Plan
from lorq.exports.gguf_tokenizer import write_tokenizer
from lorq.exports.gguf_told import add_told, tell_lost, told_of
from lorq.exports.gguf_types import FLOATS, type_number
from lorq.exports.plain import own_dtype
from lorq.exports.request import Exported, ExportRequest, GgufType
from lorq.foreign.gguf_file import write_lora
from lorq.models.skeleton import read_config
from lorq.pipeline.presets import knows_types
from lorq.progress import EXPORT, paced
from lorq.storage.atomic import require_space
from lorq.storage.folder import LorqFolder
from lorq.storage.seal import mark
from lorq.version import __version__


def export(folder: LorqFolder, out: Path, request: ExportRequest) -> Exported:
    """Write the file, tensor by tensor.

    Raises:
        ImportError: without the gguf package.
        ValueError: if llama.cpp cannot run such a model, or no type holds its codes and none is asked for by name.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("a GGUF file needs the gguf package: pip install 'lorq[gguf]'") from error
    whole = read_config(folder.path, quantized=True)
    config = whole.get_text_config()
    architecture = architecture_of(config)
    float_type = FLOATS[own_dtype(folder, request.dtype)]
    plan = Plan(folder, whole, config, architecture, request.gguf, float_type, request.adapter is not None)
    plan.check()
    tensors = plan.tensors(request.progress)
    require_space(out.parent, sum(math.prod(tensor.bytes_shape) for tensor in tensors))
    lost = _write(plan, tensors, out, request)
    size, adapter = out.stat().st_size, ""
    if request.adapter_place is not None:
        factors = {t.source.name: found for t in tensors if (found := plan.factors(t.source)) is not None}
        write_lora(request.adapter_place, architecture.name, factors, told_of(folder, request.command("gguf")))
        size, adapter = size + request.adapter_place.stat().st_size, f" --lora {shlex.quote(str(request.adapter))}"
    types = Counter(tensor.type for tensor in tensors)
    lines: tuple[str, ...] = (
        f"tensors: {', '.join(f'{count} {name}' for name, count in types.most_common())}",
        f"run it: llama-cli -m {shlex.quote(str(request.out))}{adapter}",
    )
    if types["q5_0"] and any(isinstance(f.codes, IntGrid) for f in folder.formats.values()):
        lines += (
            "q5_0 holds codes of 4 bits with zero points exactly; --type q4_1 is smaller and rounds their minima",
        )
    return Exported(size, lines, lost)


def check_file(source: Path, method: Any) -> None:
    """Refuse a model or a method whose file llama.cpp would not read, before it is quantized.

    Raises:
        ValueError: naming the rule.
    """
    from gguf import GGUFWriter

    if not knows_types(method):
        raise ValueError(
            "a .gguf file needs a method that knows GGUF's types, gptq, nearest, or flrq with --budget 0, got "
            f"{type(method).__name__}; take one of them, or quantize into a folder and `lorq export OUT model.gguf "
            "--type q8_0`, which rounds its weights again"
        )
    if (grid := method.grid) not in get_args(GgufType):
        raise ValueError(
            f"a .gguf file needs one of GGUF's grids, --grid {', '.join(get_args(GgufType)[len(FLOATS) :])}, got "
            f"{grid}; other codes can be exported from a folder, some of them exactly"
        )
    if getattr(method, "budget", 0):
        raise ValueError(
            f"a .gguf file has no low-rank part, got budget {method.budget}; take --budget 0, or quantize into a "
            "folder and export it with --adapter"
        )
    _write_metadata(GGUFWriter(None, ""), source, read_config(source).get_text_config(), None)


def _write_metadata(writer: Any, source: Path, config: Any, tokenizer_pre: str | None) -> list[str]:
    """What the file says of the model and its tokenizer; what llama.cpp does otherwise, in words."""
    otherwise = write_metadata(writer, config, architecture_of(config))
    write_tokenizer(writer, source, config.vocab_size, tokenizer_pre)
    return otherwise


def _write(plan: Plan, tensors: list[FileTensor], out: Path, request: ExportRequest) -> dict[str, str]:
    """The file; what is lost."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter, Metadata, size_label

    config, path = plan.config, plan.folder.path
    writer = GGUFWriter(out, plan.architecture.name)
    mark(writer)
    try:
        writer.add_type("model")
        otherwise = _write_metadata(writer, path, config, plan.options.tokenizer_pre)
        writer.add_file_type(_file_type(tensors))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        factors = rope_tensors(config)
        for name, values in factors.items():
            writer.add_tensor_info(name, tuple(values.shape), np.dtype(np.float32), values.nbytes)
        for tensor in tensors:
            shape = tensor.bytes_shape
            size = int(np.prod(shape))
            writer.add_tensor_info(tensor.source.name, shape, np.dtype(np.uint8), size, type_number(tensor.type))
        counts = writer.get_total_parameter_count()
        card = Metadata.load(model_path=path, total_params=counts[0])  # the model card's, and what generation wants
        card.quantized_by, card.size_label = f"lorq {__version__}", size_label(*counts)
        card.set_gguf_meta_model(writer)
        add_told(writer, plan.folder, request.command("gguf"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        assert writer.fout is not None
        end = writer.fout[0].tell()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values.numpy())
        for tensor in paced(tensors, plan.measure, request.progress, EXPORT):
            writer.write_tensor_data(plan.rows(tensor).contiguous().numpy())
    finally:
        writer.close()
    lost = {f"window {number}" if number else "window": text for number, text in enumerate(otherwise)}
    lost |= plan.losses.in_words(len(tensors)) | activations_lost(plan.folder)
    tell_lost(out, end, lost)
    return lost


def _file_type(tensors: list[FileTensor]) -> Any:
    """llama.cpp's name of a file by the type that most of its weights have."""
    from gguf import LlamaFileType

    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += int(np.prod(tensor.shape))
    most = sizes.most_common(1)[0][0].upper()
    names = ("ALL_F32",) if most == "F32" else (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_S")
    return next(LlamaFileType[name] for name in names if name in LlamaFileType.__members__)
