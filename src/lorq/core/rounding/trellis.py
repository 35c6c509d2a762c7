"""Trellis rounding: the cheapest stream of codes for each column, later columns making up for the error."""

import torch
from jaxtyping import Float
from torch import Tensor

from lorq.core.codes.trellis import VALUES_DEVIATION, TrellisCodes, TrellisGrid, trellis_values
from lorq.core.half import SMALLEST_SCALE, stored_half
from lorq.core.stats import PreparedHessian

# Columns that pass their errors on to each other one by one, as in `lorq.core.rounding.gptq`.
_BLOCK = 128
# By how much the scales are longer than those of codes with the variance of their weights, by bits.
_LENGTHS = {2: 1.1, 3: 1.02}
# What values of a window of 12 bits reach with others around them to choose from; the largest is 3.98.
_REACH = 3.75
# A peak over the deviation of its row that Gaussian rows do not have: once in 5e8 weights.
_PEAK = 6.0


def trellis(
    target: Float[Tensor, "out in"],
    hessian: PreparedHessian,
    grid: TrellisGrid,
    row_weights: Float[Tensor, "out"] | None = None,
) -> TrellisCodes:
    """Trellis codes that keep ``tr[A (T - Q) H (T - Q)^T]`` small by passing errors on, ``A = diag(row_weights)``.

    As `lorq.core.rounding.gptq`, but for how a column is rounded: the rows do not disturb each other in ``H``, so
    that the best codes of a column minimise ``sum_r a_r (t_r - scale_r value_r)^2``, which Viterbi's algorithm finds
    for each sequence of rows.

        scale_r = length(bits) sqrt(mean(T_r^2)) / deviation of the values

    At 2 bits codes do better that are a little too long, which makes up for what the nearest ones lack in variance: the
    divergence of SmolLM2 is 4 % less. At 1 bit it would be more, from 3 on it makes no difference (docs/log.md).

    Args:
        target: what is to be rounded, best in a rotated basis, where its rows are all but Gaussian; unchanged.
        hessian: of the inputs.
        row_weights: what an error of each row costs; all the same if left out.

    Raises:
        ValueError: if the damped Hessian is not positive definite, or a scale does not fit float16.

    Source:
        QTIP, arXiv:2406.11235, for the codes. Deviation: sequences run down columns, so that feedback from column to
        column is exact (QTIP's run through tiles of 16 x 16, within which there is none).
    """
    out, width = target.shape
    grid.check(out, width)
    deviation = target.square().mean(1, keepdim=True).sqrt() / VALUES_DEVIATION
    wanted = deviation * _LENGTHS.get(grid.bits, 1.0)
    if len(peaked := (target.abs().amax(1) > _PEAK * VALUES_DEVIATION * deviation[:, 0]).nonzero()[:, 0]):
        wanted[peaked] *= _longer(target[peaked], wanted[peaked], grid.bits)
    # Rows that are all but zero, as those of tokens that no text has: zeros are nearer than the smallest codes.
    scale = stored_half(torch.where(wanted < SMALLEST_SCALE / 2, 0.0, wanted.clamp(min=SMALLEST_SCALE)))
    # Errors of a row that is larger by a factor cost its square.
    factor = target.new_ones(out, 1) if row_weights is None else row_weights.sqrt().unsqueeze(1)
    # Rows that fill the last tile: whatever their codes, they cost nothing.
    spare = grid.rows(out) - out
    columns = torch.nn.functional.pad(target * factor, (0, 0, 0, spare)).T.contiguous()
    row_scale = torch.nn.functional.pad((scale * factor)[:, 0].float(), (0, spare))
    codes = torch.empty_like(columns, dtype=torch.uint8)
    upper = hessian.inverse_factor
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        codes[start:end], errors = encode_trellis(
            columns[start:end], row_scale, upper[start:end, start:end].contiguous(), grid.bits, grid.window, grid.length
        )
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return TrellisCodes.of(codes.T.contiguous(), scale, grid)


def _longer(target: Float[Tensor, "rows in"], scale: Float[Tensor, "rows 1"], bits: int) -> Float[Tensor, "rows 1"]:
    """By how much scales become longer for rows with peaks that codes do not reach, such as a rotated constant's.

    What is expected to be missed, of peaks and of everything else, is to be at most 0.8 of what it was:

        sum_j max(0, |t_j| - reach f scale)^2 + f^2 2^(-2 bits) sum_j t_j^2
    """
    most = (target.abs().amax(1, keepdim=True) / (_REACH * scale)).clamp(min=1.0)
    factors = most ** torch.linspace(0, 1, 17, device=target.device)  # (rows, 17), from 1
    peaks = [(target.abs() - _REACH * f * scale).clamp(min=0).square().sum(1) for f in factors.T.unsqueeze(2)]
    missed = torch.stack(peaks, 1) + factors.square() * 4.0**-bits * target.square().sum(1, keepdim=True)
    least, at = missed.min(1, keepdim=True)
    return torch.where(least < 0.8 * missed[:, :1], factors.gather(1, at), 1.0)


def encode_trellis_reference(
    columns: Tensor, scale: Tensor, upper: Tensor, bits: int, window: int, length: int
) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns, each passing its error on to the later ones of the block.

    Args:
        columns: (count, rows) float32.
        scale: (rows,) float32.
        upper: (count, count) float32, of the factor of the inverse Hessian.
        bits, window, length: of `TrellisGrid`.

    Returns:
        The codes (count, rows), uint8; and what each column missed, when its turn came, over the diagonal of ``upper``.
    """
    columns = columns.clone()
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    values = trellis_values(window, columns.device)
    scales = scale.view(-1, length)
    for i, column in enumerate(columns):
        states = _search(column.view(-1, length), scales, values, bits)
        codes[i] = (states & (2**bits - 1)).to(torch.uint8).flatten()
        errors[i] = (column - scale * values[states].flatten()) / upper[i, i]
        columns[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors


# The function keeps its name, as the kernels' reference.
encode_trellis = torch.library.custom_op("lorq::encode_trellis", encode_trellis_reference, mutates_args=())


def rows_around(bits: int, window: int, length: int) -> int:
    """Rows to each side of a sequence's seam in the search for what windows have in common there: some windows long."""
    return min(length, 12 + 2 * window // bits)


def _search(
    targets: Float[Tensor, "sequences length"],
    scale: Float[Tensor, "sequences length"],
    values: Float[Tensor, "states"],
    bits: int,
) -> Tensor:
    """The windows of each sequence, whose first reach around to its last codes (tail-biting).

    The bits that windows have in common at the seam are those of a search of its own, some rows to both sides of it.
    """
    length = targets.shape[1]
    around = rows_around(bits, len(values).bit_length() - 1, length)
    rows = (torch.arange(2 * around, device=targets.device) - around) % length
    near = _viterbi(targets[:, rows], scale[:, rows], values, bits, None)
    return _viterbi(targets, scale, values, bits, near[:, around - 1] % (len(values) >> bits))


def _viterbi(targets: Tensor, scale: Tensor, values: Tensor, bits: int, seam: Tensor | None) -> Tensor:
    """The cheapest windows (sequences, length), from any to any window, or from and to those of given lower bits."""
    sequences, length = targets.shape
    groups = len(values) >> bits
    costs = targets.new_zeros(sequences, groups)  # of the rows so far, by the lower bits of the window that they end in
    if seam is not None:
        costs.fill_(torch.inf).scatter_(1, seam.unsqueeze(1), 0.0)
    ways = []
    for t in range(length):
        reached = costs.repeat_interleave(2**bits, 1)  # by the window before it loses its upper bits
        reached = reached + (targets[:, t : t + 1] - scale[:, t : t + 1] * values).square()
        costs, way = reached.view(sequences, 2**bits, groups).min(1)
        ways.append(way)
    lower = costs.argmin(1) if seam is None else seam
    states = []
    for way in reversed(ways):
        state = way.gather(1, lower.unsqueeze(1))[:, 0] * groups + lower
        states.append(state)
        lower = state >> bits
    return torch.stack(states[::-1], 1)
