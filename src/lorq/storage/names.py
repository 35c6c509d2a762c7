"""The names of files in a lorq folder, and the version of what is in them."""

from typing import Any

# Of the format (docs/format.md): of a newer one nobody knows what it means.
FORMAT_VERSION = 5

JOURNAL = "lorq_journal.jsonl"
# The table of tokens and the head, as far as they are quantized.
TABLES = "lorq-tables.safetensors"
REPORT_NAME = "lorq_report.json"
# In a folder of the cache that was decoded from a file: what its weights were. Hidden, so that it travels nowhere.
DECODED_FROM = ".decoded_from"
# In every folder that was exported: what it is, and which files are its own.
EXPORTED = "lorq_export.json"
# The first key of lorq's own in a GGUF file, near its beginning: by it a file is known as one that lorq wrote.
GGUF_MARK = "lorq.version"
# The next one: sha256 of the file, with spaces where this stands.
GGUF_SEAL = "lorq.sha256"
# How long the folder took to make, and how good it is; never the same twice.
MEASURED = "lorq_measured.json"
# Where an unfinished tuning is, of the whole model and of its blocks.
TUNING = "lorq_tuning.safetensors"
TUNED_BLOCKS = "lorq_tuned_blocks.safetensors"
INDEX = "lorq.safetensors.index.json"
# transformers only warns about a quant_method it does not know and then returns random weights. So config.json
# names a weights file that does not exist, whose name says what to do; with lorq present, a hook (`lorq.runtime.hf`)
# puts the real name in before the files are looked for.
SENTINEL = "this-folder-needs--pip-install-lorq--and--import-lorq.safetensors.index.json"


def check_version(version: Any) -> None:
    """Refuse what no format version is, and those of a newer lorq.

    Raises:
        ValueError: naming the version.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format_version of a lorq folder must be a whole number from 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the folder has lorq format version {version}, this lorq reads up to {FORMAT_VERSION}; take a newer one"
        )


def shard_name(number: int, blocks: int) -> str:
    """File of one block, counted from 1; 0 holds what lies outside the blocks."""
    return f"lorq-{number:05d}-of-{blocks:05d}.safetensors"
