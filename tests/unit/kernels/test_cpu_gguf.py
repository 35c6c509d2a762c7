"""The C++ search for steps of GGUF's groups against the reference in torch."""

import subprocess
import sys

import pytest
import torch

from lorq.core.codes.gguf_blocks import TYPES
from lorq.core.rounding.gguf_fit import covering, search_groups_reference
from lorq.kernels import cpu
from lorq.kernels.cpu_gguf import search_groups


def searched(search, weight, trials, upper, type):
    return search(weight, trials.step, trials.low, upper, type.bits, type.zero, list(type.levels))


@pytest.fixture(params=[True, False], ids=["feedback", "alone"])
def upper(request, generator):
    """Makes factors of some groups, or None."""

    def make(groups, size):
        inputs = torch.randn(groups, size, 2 * size, generator=generator)
        return torch.linalg.cholesky(inputs @ inputs.mT).mT.contiguous() / 8

    return make if request.param else lambda groups, size: None


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_codes_trials_and_costs_are_the_references(name, rows, upper, generator):
    type = TYPES[name]
    weight = torch.randn(3, type.group, rows, generator=generator)
    given = weight, covering(weight, type), upper(3, type.group), type
    codes, best, costs = searched(search_groups, *given)
    expected_codes, expected_best, expected_costs = searched(search_groups_reference, *given)
    torch.testing.assert_close(costs, expected_costs, rtol=1e-4, atol=0)
    # Where roundings of the last bit decide, another trial may be as cheap.
    same = best == expected_best
    assert same.float().mean() >= 0.99
    assert (codes == expected_codes).movedim(1, -1)[same].float().mean() >= 0.999


def test_steps_of_nothing_and_weights_of_nothing(generator):
    type = TYPES["q4_k"]
    weight = torch.randn(1, type.group, 3, generator=generator)
    weight[:, :, 1] = 0
    step, low = torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)
    given = weight, step, low, None, type.bits, type.zero, []
    for got, expected in zip(search_groups(*given), search_groups_reference(*given), strict=True):
        torch.testing.assert_close(got, expected)


def test_without_a_library_the_reference_searches(generator, monkeypatch):
    type = TYPES["q2_k"]
    weight = torch.randn(2, type.group, 5, generator=generator)
    given = weight, covering(weight, type), None, type
    monkeypatch.setattr(cpu, "library", lambda: (None, "switched off"))
    for got, expected in zip(searched(search_groups, *given), searched(search_groups_reference, *given), strict=True):
        assert torch.equal(got, expected)


def test_the_numbers_of_threads_makes_no_difference(generator):
    type, before = TYPES["q3_k"], torch.get_num_threads()
    weight = torch.randn(16, type.group, 700, generator=generator)
    given = weight, covering(weight, type), None, type
    try:
        torch.set_num_threads(1)
        one = searched(search_groups, *given)
        torch.set_num_threads(2)
        two = searched(search_groups, *given)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("module", ["lorq.exports.gguf", "lorq.pipeline.quantize"])
def test_what_rounds_to_blocks_brings_the_fast_search_along(module):
    code = f"import sys, {module}; print('lorq.kernels.cpu_gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
