"""llama.cpp itself, as the package xllamacpp has it: logits, tokens, text, and ggml's own quantizer.

Run by the python that has the package.

The library that Python imports has llama.cpp's own C functions, which are called here. Of the structs of parameters
only the first numbers are known; each is checked by its default before it is changed.
"""

import argparse
import ctypes
import json
import os

import numpy as np
import xllamacpp

LIB = ctypes.CDLL(os.path.join(os.path.dirname(xllamacpp.__file__), "xllamacpp.abi3.so"))
P, I32, U8, F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_float
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, U8, P)


class Params(ctypes.Structure):
    """Larger than llama.cpp's, which reads and writes its own part."""

    _fields_ = (("words", I32 * 256),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", I32),
        ("token", ctypes.POINTER(I32)),
        ("embd", P),
        ("pos", ctypes.POINTER(I32)),
        ("n_seq_id", ctypes.POINTER(I32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(I32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_FUNCTIONS = {
    "llama_context_default_params": (Params,),
    "llama_model_default_params": (Params,),
    "llama_model_load_from_file": (P, U8, Params),
    "llama_init_from_model": (P, P, Params),
    "llama_free": (None, P),
    "llama_model_free": (None, P),
    "llama_batch_init": (Batch, I32, I32, I32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (I32, P, Batch),
    "llama_get_logits_ith": (ctypes.POINTER(F32), P, I32),
    "llama_get_memory": (P, P),
    "llama_memory_clear": (None, P, ctypes.c_bool),
    "llama_model_get_vocab": (P, P),
    "llama_vocab_n_tokens": (I32, P),
    "llama_tokenize": (I32, P, U8, I32, ctypes.POINTER(I32), I32, ctypes.c_bool, ctypes.c_bool),
    "llama_adapter_lora_init": (P, P, U8),
    "llama_set_adapters_lora": (I32, P, ctypes.POINTER(P), ctypes.c_size_t, ctypes.POINTER(F32)),
    "llama_log_set": (None, LOG, P),
}
for _name, (_result, *_arguments) in _FUNCTIONS.items():
    getattr(LIB, _name).restype, getattr(LIB, _name).argtypes = _result, _arguments
# ggml's numbers of block types, weights and bytes of a block. Of its functions that decode, some names end in K.
BLOCKS = {
    "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34),
    "iq4_nl": (20, 32, 18), "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176), "q6_k": (14, 256, 210), "tq1_0": (34, 256, 54), "tq2_0": (35, 256, 66),
}  # fmt: skip
LIB.ggml_quantize_chunk.restype = ctypes.c_size_t
LIB.ggml_quantize_chunk.argtypes = (ctypes.c_int, P, P, *(ctypes.c_int64,) * 3, P)
# Places and defaults of numbers of llama_context_params.
CONTEXT, BATCH, UBATCH, THREADS, THREADS_BATCH, FLASH, TYPE_K, TYPE_V = 0, 1, 2, 7, 8, 13, 26, 27
DEFAULTS = {CONTEXT: 512, BATCH: 2048, UBATCH: 512, THREADS: 4, THREADS_BATCH: 4, FLASH: -1, TYPE_K: 1, TYPE_V: 1}


class Llama:
    """A model in llama.cpp, whose keys and values are kept as float32."""

    def __init__(self, path, context=512, adapter=None, threads=1):
        self.said = []
        self._log = LOG(lambda level, text, data: self.said.append(text.decode(errors="replace")))
        LIB.llama_log_set(self._log, None)
        self.model = LIB.llama_model_load_from_file(str(path).encode(), LIB.llama_model_default_params())
        self._refuse(not self.model)
        self.vocabulary = LIB.llama_model_get_vocab(self.model)
        params = LIB.llama_context_default_params()
        assert {place: params.words[place] for place in DEFAULTS} == DEFAULTS, "another llama.cpp than this is for"
        for places, value in (((CONTEXT, BATCH, UBATCH), context), ((THREADS, THREADS_BATCH), threads)):
            for place in places:
                params.words[place] = value
        for place in (FLASH, TYPE_K, TYPE_V):
            params.words[place] = 0
        self.context = LIB.llama_init_from_model(self.model, params)
        self._refuse(not self.context)
        if adapter:
            loaded = LIB.llama_adapter_lora_init(self.model, str(adapter).encode())
            self._refuse(not loaded or LIB.llama_set_adapters_lora(self.context, (P * 1)(loaded), 1, (F32 * 1)(1.0)))

    def _refuse(self, failed):
        if failed:
            raise RuntimeError("".join(self.said[-20:]))

    def logits(self, tokens):
        """Of every position of one window."""
        LIB.llama_memory_clear(LIB.llama_get_memory(self.context), True)
        batch = LIB.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(tokens)
        self._refuse(LIB.llama_decode(self.context, batch))
        LIB.llama_batch_free(batch)
        size = (LIB.llama_vocab_n_tokens(self.vocabulary),)
        rows = (LIB.llama_get_logits_ith(self.context, i) for i in range(len(tokens)))
        return np.stack([np.ctypeslib.as_array(row, size).copy() for row in rows])

    def tokens(self, text):
        """Of a text, special ones recognised and added as the file says."""
        raw = text.encode()
        room = (I32 * (len(raw) + 8))()
        return list(room[: LIB.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)])

    def close(self):
        LIB.llama_free(self.context)
        LIB.llama_model_free(self.model)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def figures(model, windows, reference=None):
    """Perplexity, and mean divergence from a reference, over all positions of windows but the last."""
    surprise, divergence, count = 0.0, 0.0, windows.size - len(windows)
    for window in windows:
        own = log_softmax(model.logits(window)[:-1])
        surprise -= own[np.arange(len(own)), window[1:]].sum()
        if reference is not None:
            theirs = log_softmax(reference.logits(window)[:-1])
            divergence += (np.exp(theirs) * (theirs - own)).sum()
    return {"perplexity": float(np.exp(surprise / count)), "kl": float(divergence / count), "tokens": count}


def generate(path, prompt, count, adapter):
    """By the package's own server, greedily."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
    params.cpuparams.n_threads, params.warmup = 1, False
    if adapter:
        own = xllamacpp.CommonAdapterLoraInfo()
        own.path, own.scale = str(adapter), 1.0
        params.lora_adapters = [own]
    server = xllamacpp.Server(params)
    return server.handle_completions({"prompt": prompt, "max_tokens": count, "temperature": 0.0})


def decode(blocks, kind):
    """What ggml makes of rows of bytes."""
    function = LIB[f"dequantize_row_{kind.replace('_k', '_K')}"]
    function.restype, function.argtypes = None, (P, P, ctypes.c_int64)
    _, weights, size = BLOCKS[kind]
    blocks = np.ascontiguousarray(blocks)
    values = np.empty((len(blocks), blocks.shape[1] // size * weights), np.float32)
    function(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def quantize(weight, kind, importance=None):
    """A weight by llama.cpp's own quantizer, whose program calls this for every tensor, with or without importances."""
    number, weights, size = BLOCKS[kind]
    weight = np.ascontiguousarray(weight, np.float32)
    rows, width = weight.shape
    blocks = np.zeros((rows, width // weights * size), np.uint8)
    given = None if importance is None else np.ascontiguousarray(importance, np.float32)
    place = None if given is None else given.ctypes.data
    done = LIB.ggml_quantize_chunk(number, weight.ctypes.data, blocks.ctypes.data, 0, rows, width, place)
    assert done == blocks.size
    return blocks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("logits", "figures", "tokens", "generate", "decode", "quantize"))
    parser.add_argument("model")
    parser.add_argument("given", help="tokens .npy (windows, length); a JSON list of texts; a prompt; .npy, .npz")
    parser.add_argument("--out")
    parser.add_argument("--adapter")
    parser.add_argument("--reference")
    given = parser.parse_args()
    if given.what == "generate":
        print(json.dumps(generate(given.model, given.given, 32, given.adapter)))
        return
    if given.what == "quantize":  # into the type that stands in the model's place
        np.save(given.out, quantize(kind=given.model, **np.load(given.given)))
        return
    if given.what == "decode":  # of such a type
        np.save(given.out, decode(np.load(given.given), given.model))
        return
    if given.what == "tokens":
        model = Llama(given.model)
        print(json.dumps([model.tokens(text) for text in json.loads(given.given)]))
        return
    windows = np.load(given.given)
    model = Llama(given.model, windows.shape[1], given.adapter)
    if given.what == "logits":
        np.save(given.out, np.stack([model.logits(window) for window in windows]))
    else:
        reference = Llama(given.reference, windows.shape[1]) if given.reference else None
        print(json.dumps(figures(model, windows, reference)))


if __name__ == "__main__":
    main()
