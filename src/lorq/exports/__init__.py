"""Other programs' formats: one file a target, each with `export(folder, out, request)` (`lorq.exports.request`)."""

# name -> module, which is imported when it is asked for.
TARGETS: dict[str, str] = {
    "compressed-tensors": "lorq.exports.compressed_tensors",
    "dense": "lorq.exports.dense",
    "gptq": "lorq.exports.gptq",
    "peft": "lorq.exports.peft",
}
