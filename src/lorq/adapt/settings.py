"""How a model is trained, and how it is tuned."""

from dataclasses import dataclass
from typing import Annotated, Literal

from lorq.core.checks import Range, check_settings
from lorq.models.texts import StartToken


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch: sequences of a step; all of them where the data set has fewer.
        seq_len: tokens of a sequence, where the data set is a text.
        start_token: begin each with a start token: "auto" (as the model's tokenizer does), "always" or "never".
        learning_rate: of AdamW after the warm-up, falling to a tenth along half a cosine; 0 takes 5e-4 for "peft" and
            5e-5 for "qat".
        scale_rate: the scales' learning rate over the weights', with "qat".
        scale_steps: steps at the beginning in which the scales train alone, with "qat"; the weights join after.
        warmup: share of the steps in which the rate rises.
        rank: of the adapter, the same in every layer; -1 keeps each layer's own ("peft" only).
        gradient_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        seed: of the order of the data, of what an adapter starts with, and of the model's own dropout.
    """

    steps: Annotated[int, Range(1)] = 200
    batch: Annotated[int, Range(1)] = 4
    seq_len: Annotated[int, Range(2)] = 512
    start_token: StartToken = "auto"
    learning_rate: Annotated[float, Range(0, 1)] = 0.0
    scale_rate: Annotated[float, Range(0, 1000)] = 4.0
    scale_steps: Annotated[int, Range(0)] = 0
    warmup: Annotated[float, Range(0, 1)] = 0.05
    rank: Annotated[int, Range(1, minus_one="each layer's own")] = -1
    gradient_checkpointing: bool = False
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.scale_steps >= self.steps:
            raise ValueError(f"scale_steps must be fewer than the {self.steps} steps, got {self.scale_steps}; lower it")


@dataclass(frozen=True)
class Tuning:
    """How a quantized model is tuned.

    Attributes:
        steps: gradient steps through the whole model, which must fit in memory with its original; 0 leaves them out.
        block_steps: gradient steps on each block before, one block in memory at a time; 0 leaves them out.
        batch: windows of a step.
        samples: windows of text to tune on.
        held_out: windows of the same text to measure on: what measures best is kept.
        seq_len: tokens of a window.
        start_token: begin each window of a text with a start token: "auto" (as the model's tokenizer does), "always" or
            "never". What the original writes itself always begins with one.
        learning_rate: of the first step, relative to the size of what learns; it falls to 0 along half a cosine.
        seed: of the order of the windows, and of text that the original writes.
    """

    steps: Annotated[int, Range(0)] = 100
    block_steps: Annotated[int, Range(0)] = 0
    batch: Annotated[int, Range(1)] = 2
    samples: Annotated[int, Range(1)] = 128
    held_out: Annotated[int, Range(1)] = 4
    seq_len: Annotated[int, Range(2)] = 512
    start_token: StartToken = "auto"
    learning_rate: Annotated[float, Range(0, 1)] = 1e-3
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.steps + self.block_steps:
            raise ValueError("steps or block_steps must be at least 1, got 0 for both; give one of them")


@dataclass(frozen=True)
class Groups:
    """The codes that stand in place of those under scales of low rank.

    Attributes:
        grid: "integer", which has the fastest kernels; or "levels", the model's own, which at as many bits lose about
            half as much and run slower.
        bits: width of a code, 2 to 8; -1 keeps each layer's own. One more than the model's loses a quarter as much.
        group_size: input columns that share a scale; must divide each layer's width.
    """

    grid: Literal["integer", "levels"] = "integer"
    bits: Annotated[int, Range(2, 8, "each layer's own")] = -1
    group_size: Annotated[int, Range(1)] = 64

    def __post_init__(self) -> None:
        check_settings(self)
