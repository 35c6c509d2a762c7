"""InputStats: what calibration knows about the inputs of a layer."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lorq.core.basis import Basis
from lorq.core.checks import all_finite
from lorq.core.linalg import WIDE_STRIP, cholesky, damp, inverse_factor, shrink

# Rows of the Gram matrix that are summed at a time.
_STRIP = 256
# How much of the error of earlier layers is made up for, and the damping of that regression: 1 and 0.01 fit nothing but
# the calibration text (docs/log.md).
_CORRECTION, _CORRECTION_DAMPING = 0.35, 0.3
_LARGEST = 1e30  # of mean squares
TokenWeights = Literal["equal", "plain", "gradient"]


@dataclass(frozen=True)
class InputStats:
    """Second moments and mean magnitudes of one distinct input.

    Attributes:
        hessian: ``sum_t v_t d_t x_t x_t^T / sum_t v_t``; ``v_t`` is 1 where no router weighs the tokens. Squared
            activation units (dimensionless with "equal" weights).
        mean_abs: ``sum_t v_t sqrt(d_t) |x_tj| / sum_t v_t``, per input channel.
        tokens: calibration tokens seen.
        routed: how many of them the layer gets in use, where that is fewer: an expert that saw too few tokens has the
            statistics of all.
        low, high: smallest and largest value of each channel, unweighted; None where nobody looked.
        sensitivity: with "gradient" weights, ``d_t`` times this is the squared gradient ``|dL/dy_t|^2`` of the loss in
            nats, so a change ``D`` of the weight costs about ``sensitivity tr(D H D^T) / (2 out)`` a token; else 1.
        output_weights: with "gradient" weights, the mean squared gradient at each output of a layer, over their mean;
            None where nobody looked.
        correction: makes up for what the layers before have done to the inputs (`StatsAccumulator.correction`); None
            where nobody looked.
        input: a name by which layers with one input, each with its own statistics of it, know each other; else "".
    """

    hessian: Float[Tensor, "in in"]
    mean_abs: Float[Tensor, "in"]
    tokens: int
    routed: int | None = None
    low: Float[Tensor, "in"] | None = None
    high: Float[Tensor, "in"] | None = None
    sensitivity: float = 1.0
    output_weights: Float[Tensor, "out"] | None = None
    correction: Float[Tensor, "in in"] | None = None
    input: str = ""
    _prepared: dict[tuple[float, float, int], "PreparedHessian"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """What is derived is large and stays here when statistics are sent away."""
        return vars(self) | {"_prepared": {}}

    @property
    def load(self) -> int:
        """Tokens that the layer gets in use, at least 1."""
        return max(1, self.tokens if self.routed is None else self.routed)

    @property
    def empty(self) -> bool:
        """The inputs are always zero, or too small to have squares: they tell nothing of the weight."""
        return bool((self.hessian.diagonal().abs() <= torch.finfo(torch.float32).tiny).all())

    def smoothed(self, scale: Float[Tensor, "in"]) -> "InputStats":
        """Of the same inputs with each channel divided by ``scale``, the tokens weighted as before."""
        return replace(
            self,
            hessian=self.hessian / torch.outer(scale, scale),
            mean_abs=self.mean_abs / scale,
            low=None if self.low is None else self.low / scale,
            high=None if self.high is None else self.high / scale,
            correction=None if self.correction is None else self.correction * (scale / scale[:, None]),
        )

    def outputs_divided(self, scale: Float[Tensor, "out"]) -> "InputStats":
        """Of the same inputs to a layer whose outputs are divided by ``scale``, and then count so much more."""
        if self.output_weights is None:
            return self
        weights = self.output_weights * scale.square()
        return replace(self, output_weights=weights / weights.mean())

    def corrected(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight that makes up for what layers before have done to its inputs, or itself where nobody looked."""
        return weight if self.correction is None else weight + weight @ self.correction

    def of_outputs(self, index: Tensor) -> "InputStats":
        """Of some of the outputs; what was derived of the inputs, and will be, is shared."""
        if self.output_weights is None:
            return self
        part = replace(self, output_weights=self.output_weights[index])
        vars(part)["_prepared"] = self._prepared
        return part

    def prepared(self, *, shrinkage: float, damping: float, block: int = 0) -> "PreparedHessian":
        """The Hessian shrunk towards its diagonal, with its factors; made once for all layers that share it.

        With ``block`` it is then rotated, all columns in blocks of this size (`lorq.core.basis.Basis`).
        """
        key = (shrinkage, damping, block)
        if key not in self._prepared:
            turned = Basis(None, block, 0).rotate_hessian(shrink(self.hessian, shrinkage))
            # setdefault: layers that share an input are solved side by side.
            self._prepared.setdefault(key, PreparedHessian(turned, damping))
        return self._prepared[key]


@dataclass(frozen=True)
class PreparedHessian:
    """A Hessian as a method uses it, and what is expensive to derive from it, derived when first asked for.

    Attributes:
        matrix: the shrunk Hessian.
        damping: share of the mean diagonal added to the diagonal before it is factorised.
    """

    matrix: Float[Tensor, "in in"]
    damping: float
    _falling: dict[tuple[int, int], tuple[Tensor, "PreparedHessian"]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def factor(self) -> Float[Tensor, "in in"]:
        """Lower Cholesky factor of the damped matrix."""
        return cholesky(damp(self.matrix, self.damping))

    def falling(self, block: int, group: int) -> tuple[Int64[Tensor, "in"], "PreparedHessian"]:
        """Columns by falling diagonal, those of a block and of a group in it together; and itself in that order.

        Made once. Equal diagonals keep their order.
        """
        if (block, group) not in self._falling:
            size = self.matrix.diagonal().view(-1, block // group, group)
            order = torch.arange(size.numel(), device=size.device).view_as(size)
            order = order.gather(2, _falling(size))
            order = order.gather(1, _falling(size.mean(2)).unsqueeze(2).expand_as(order))
            order = order[_falling(size.mean((1, 2)))].flatten()
            ordered = PreparedHessian(self.matrix[order][:, order], self.damping)
            self._falling.setdefault((block, group), (order, ordered))
        return self._falling[block, group]

    @cached_property
    def inverse_factor(self) -> Float[Tensor, "in in"]:
        """Upper factor of the damped matrix's inverse, as `lorq.core.rounding.gptq` reads it."""
        return inverse_factor(damp(self.matrix, self.damping))


def _falling(values: Float[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    return values.argsort(descending=True, stable=True)


class StatsAccumulator:
    """Sums an input's statistics window by window, in float32.

    ``D`` weighs the tokens: "equal" by ``1 / mean(x_t^2)``, as a few have enormous activations (attention sinks), and
    the "plain" sum, ``D = I``, serves only those; "gradient" by how much the layer's output at a token decides, which
    is given with the inputs. Weights ``v_t`` from outside come on top; only their ratios matter.

    Source:
        "gradient": the input side of YAQA's Kronecker factors of the Fisher information (arXiv:2505.22988), with the
        output side left out.
    """

    def __init__(self, width: int, token_weights: TokenWeights = "equal", device: torch.device | str = "cpu"):
        self.token_weights = token_weights
        self.gram = torch.zeros(width, width, device=device)
        self.magnitude = torch.zeros(width, device=device)
        self.low = torch.full((width,), torch.inf, device=device)
        self.high = torch.full((width,), -torch.inf, device=device)
        self.tokens = 0
        self.weight = 0.0  # sum of v_t
        self.drift: Tensor | None = None

    def add(
        self, inputs: Float[Tensor, "*batch in"], weights: Float[Tensor, "*batch"] | None = None,
        gradients: Float[Tensor, "*batch"] | None = None, originals: Float[Tensor, "*batch in"] | None = None,
    ) -> None:  # fmt: skip
        """Count ``inputs``; leading dimensions are tokens, of weights ``v_t``, 1 if left out.

        ``gradients`` are ``d_t`` where tokens are weighed so, ``originals`` what the inputs are in the original model.

        Raises:
            FloatingPointError: if an input is not finite.
            ValueError: if a weight is negative or not finite.
        """
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        if not all_finite(x):
            bad = int((~torch.isfinite(x)).sum())
            raise FloatingPointError(
                f"calibration inputs must be finite, got {bad} NaN or infinite values of {x.numel()}; "
                "the model overflows on this text in this dtype"
            )
        if len(x):
            self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        moved = None if originals is None else originals.reshape(x.shape).float() - x
        root = self._roots(x, gradients)
        x = x if root is None else x * root
        self.tokens += x.shape[0]
        if weights is None:
            self.weight += x.shape[0]
            self.magnitude += x.abs().sum(0)
        else:
            v = _checked(weights)
            self.weight += float(v.sum())
            self.magnitude += v @ x.abs()
            x = x * v.sqrt()[:, None]
            root = v.sqrt()[:, None] if root is None else root * v.sqrt()[:, None]
        if moved is not None:
            self.drift = x.new_zeros(self.gram.shape) if self.drift is None else self.drift
            self.drift.addmm_((moved if root is None else moved * root).T, x)
        for start in range(0, x.shape[1], _STRIP):
            # Only on and right of the diagonal; a narrow strip keeps what is computed twice small.
            self.gram[start : start + _STRIP, start:].addmm_(x[:, start : start + _STRIP].T, x[:, start:])

    def _roots(self, x: Float[Tensor, "tokens in"], gradients: Tensor | None) -> Float[Tensor, "tokens 1"] | None:
        """``sqrt(d_t)``; None where it is 1."""
        if self.token_weights == "equal":
            # A token of zeros has no direction; the clamp lets it add nothing.
            return x.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
        if self.token_weights == "plain":
            return None
        if gradients is None:
            raise ValueError(f"{len(x)} tokens must come with their gradients to be weighed so, got none")
        return _checked(gradients).sqrt()[:, None]

    def finish(self) -> InputStats:
        """The means over all counted tokens.

        Raises:
            ValueError: if no token was counted.
            FloatingPointError: if inputs are so large that float32 has no room for what is made of their squares.
        """
        if not self.tokens:
            raise ValueError("statistics need at least one token, got 0; was the layer ever run?")
        weight = self.weight or 1.0  # no token with a weight is as good as inputs of zeros
        gram = _mirrored(self.gram.detach(), weight)
        if not float(gram.diagonal().max()) < _LARGEST:
            raise FloatingPointError(
                f"mean squares of inputs must be below {_LARGEST:.0e} to be calculated with, got "
                f"{float(gram.diagonal().max()):.1e}; weigh the tokens alike with --token-weights equal"
            )
        return InputStats(gram, self.magnitude / weight, self.tokens, low=self.low, high=self.high)

    def correction(self) -> Float[Tensor, "in in"]:
        """What is to be added to a weight ``W``, as ``W K``, since the originals have become the inputs.

            K = share C (H + damping)^-1,   C = sum_t v_t d_t (x°_t - x_t) x_t^T / sum_t v_t

        With share 1 and without damping ``|W x° - (W + W K) x|^2`` is least on these tokens; less overfits less.

        Raises:
            ValueError: if no token came with its original.

        Source:
            GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695), where each rounding step does it; here before all.
        """
        if self.drift is None:
            raise ValueError(f"a correction needs the originals of inputs, got none with {self.tokens} tokens")
        factor = cholesky(damp(self.finish().hessian, _CORRECTION_DAMPING))
        return _CORRECTION * torch.cholesky_solve(self.drift.T / (self.weight or 1.0), factor).T


def _mirrored(upper: Float[Tensor, "n n"], over: float) -> Float[Tensor, "n n"]:
    """The symmetric matrix of an upper triangle over a number, strip by strip; what is below the diagonal is not read.

    Example:
        >>> _mirrored(torch.tensor([[2.0, 4.0], [9.0, 6.0]]), 2.0)
        tensor([[1., 2.],
                [2., 3.]])
    """
    whole = torch.empty_like(upper)
    for start in range(0, len(upper), WIDE_STRIP):
        strip, behind = slice(start, start + WIDE_STRIP), slice(start + WIDE_STRIP, None)
        own = upper[strip, strip].triu() / over
        whole[strip, strip] = own + own.triu(1).T
        torch.div(upper[strip, behind], over, out=whole[strip, behind])
        whole[behind, strip] = whole[strip, behind].T
    return whole


def _checked(weights: Float[Tensor, "*batch"]) -> Float[Tensor, "tokens"]:
    v = weights.reshape(-1).float()
    if not bool((torch.isfinite(v) & (v >= 0)).all()):
        raise ValueError(f"token weights must be finite and at least 0, got {v.min()} to {v.max()}")
    return v


def output_energy(delta: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> Float[Tensor, ""]:
    """``tr(D H D^T)``: mean squared change of a layer's output if its weight changes by ``delta``.

    ``H`` is symmetric: only its upper triangle is multiplied, strip by strip, which is half the work.

    Example:
        >>> output_energy(torch.tensor([[3.0, 4.0]]), torch.eye(2))
        tensor(25.)
    """
    energy = delta.new_zeros(())
    for start in range(0, hessian.shape[1], WIDE_STRIP):
        columns = slice(start, start + WIDE_STRIP)
        half = delta[:, columns] @ hessian[columns, columns]
        if start:
            half = torch.addmm(half, delta[:, :start], hessian[:start, columns], alpha=2)
        energy = energy + (half * delta[:, columns]).sum()
    return energy
