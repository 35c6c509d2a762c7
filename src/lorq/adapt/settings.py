"""How a model is trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch: sequences of a step; all of them where the data set has fewer.
        seq_len: tokens of a sequence, where the data set is a text.
        learning_rate: of AdamW after the warm-up, falling to a tenth along half a cosine; 0 takes 5e-4 for "peft" and
            5e-5 for "qat".
        scale_rate: the scale factors' learning rate over the weights', with "qat".
        warmup: share of the steps in which the rate rises.
        rank: of the adapter, the same in every layer; -1 keeps each layer's own ("peft" only).
        gradient_checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.
        seed: of the order of the data, of what an adapter starts with, and of the model's own dropout.
    """

    steps: int = 200
    batch: int = 4
    seq_len: int = 512
    learning_rate: float = 0.0
    scale_rate: float = 4.0
    warmup: float = 0.05
    rank: int = -1
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("seq_len", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, high in (("learning_rate", 1.0), ("scale_rate", 1000.0), ("warmup", 1.0)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between 0 and {high:g}, got {getattr(self, name)}")
        if self.rank < 1 and self.rank != -1:
            raise ValueError(f"rank must be at least 1, or -1 for each layer's own, got {self.rank}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2^63 - 1, got {self.seed}")
