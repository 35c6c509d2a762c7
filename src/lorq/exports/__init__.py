"""Other programs' formats: one file a target, each with `export(folder, out, request)` (`lorq.exports.request`)."""

# name -> module, which is imported when it is asked for.
TARGETS: dict[str, str] = {
    "dense": "lorq.exports.dense",
}
