"""How far work is, and what time is left."""

import pytest

from lorq import bars, progress
from lorq.progress import EXPORT, paced


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when it is told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


# A model's tensors: kind, weights, and seconds that a weight takes.
TABLE, NORM, LAYER = ("q6_k", 5000, 0.02), ("f32", 10, 0.001), ("q4_0", 1000, 0.001)


def work(clock, pieces):
    """What is told along the way, with the seconds that went by since the beginning."""
    told, began = [], clock[0]

    def note(stage, done, total):
        assert stage == EXPORT
        told.append((clock[0] - began, done, total))

    for _, size, cost in paced(pieces, lambda piece: piece[:2], note, EXPORT):
        clock[0] += size * cost
    return told


def test_time_left_is_told_when_it_is_known_and_is_right_then(clock):
    pieces = [TABLE, *[NORM, LAYER, LAYER] * 10]
    whole = sum(size * cost for _, size, cost in pieces)
    told = work(clock, pieces)
    assert told[0] == (0.0, 0, 1)
    assert told[1][0] == pytest.approx(101.01)  # not before a layer was done, since layers are nearly all that is left
    assert len(told) == 1 + 28 + 1
    for seconds, done, total in told[1:-1]:
        assert 0 < done < total
        left = seconds / done * (total - done)  # as it is shown
        assert left == pytest.approx(whole - seconds, rel=0.01, abs=0.02)
    assert told[-1][1] == told[-1][2] == pytest.approx(1e6 * whole, abs=1)


def test_work_of_no_pieces_and_of_no_time_ends(clock):
    assert work(clock, []) == [(0.0, 0, 1), (0.0, 1, 1)]
    assert work(clock, [("f32", 10, 0.0)] * 2) == [(0.0, 0, 1), (0.0, 0, 1), (0.0, 1, 1)]


def test_many_steps_are_shown_as_a_share(clock, monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(bars.notes, "print", lines.append)
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    shown = bars._ProgressLines()
    for seconds, done, total in ((0, 0, 1), (20, 20_000_000, 80_000_000), (80, 80_000_000, 80_000_000)):
        now[0] = float(seconds)
        shown(EXPORT, done, total)
    for seconds, done in ((80, 0), (100, 3), (120, 12)):
        now[0] = float(seconds)
        shown("quantize", done, 12)
    assert lines == [
        "export", "export: 25 %, 1.0 min left", "export: done in 1.3 min",
        "quantize: 0 of 12", "quantize: 3 of 12, 25 %, 1.0 min left", "quantize: 12 of 12, done in 40 s",
    ]  # fmt: skip
