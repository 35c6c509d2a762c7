"""Linear algebra on Hessians against closed forms."""

import pytest
import torch
from torch.testing import assert_close

from lorq.core.linalg import cholesky, damp, inverse_factor, shrink, times_lower
from lorq.core.stats import output_energy


@pytest.fixture
def hessian(correlated):
    x = correlated(200, 24).double()
    return x.T @ x / 200


def test_shrinking_moves_only_what_is_off_the_diagonal():
    hessian = torch.tensor([[4.0, 2.0], [2.0, 8.0]])
    assert torch.equal(shrink(hessian, 0.25), torch.tensor([[4.0, 1.5], [1.5, 8.0]]))
    assert torch.equal(shrink(hessian, 0.0), hessian)
    assert torch.equal(shrink(hessian, 1.0), torch.diag(torch.tensor([4.0, 8.0])))
    assert torch.equal(hessian, torch.tensor([[4.0, 2.0], [2.0, 8.0]]))


def test_damping_adds_a_share_of_the_mean_diagonal():
    hessian = torch.tensor([[4.0, 2.0], [2.0, 8.0]])
    assert torch.equal(damp(hessian, 0.5), torch.tensor([[7.0, 2.0], [2.0, 11.0]]))
    assert torch.equal(damp(hessian, 0.0), hessian)
    assert torch.equal(hessian, torch.tensor([[4.0, 2.0], [2.0, 8.0]]))


def test_shrinking_a_singular_hessian_makes_it_positive_definite(generator):
    x = torch.randn(5, 20, generator=generator, dtype=torch.float64)  # fewer tokens than channels
    hessian = x.T @ x / 5
    assert float(torch.linalg.eigvalsh(hessian)[0]) < 1e-12
    assert float(torch.linalg.eigvalsh(shrink(hessian, 0.2))[0]) > 0.1 * float(hessian.diagonal().min())


def test_cholesky_factor_is_lower_and_squares_to_the_hessian(hessian):
    factor = cholesky(hessian)
    assert not factor.triu(1).any()
    assert_close(factor @ factor.T, hessian, rtol=1e-12, atol=1e-12)


def test_inverse_factor_is_upper_and_squares_to_the_inverse(hessian):
    upper = inverse_factor(hessian)
    assert not upper.tril(-1).any()
    # An inverse loses the condition number in digits.
    lost = 10 * float(torch.linalg.cond(hessian)) * torch.finfo(torch.float64).eps
    assert lost < 1e-6
    assert_close(hessian @ (upper.T @ upper), torch.eye(24, dtype=torch.float64), rtol=0, atol=lost)


@pytest.mark.parametrize("width", [511, 512, 513, 1300])
def test_an_inverse_factor_of_several_strips_is_that_of_the_inverse(width, generator):
    x = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / len(x)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    assert_close(inverse_factor(hessian), expected, rtol=1e-9, atol=1e-12)


def test_inverse_factor_holds_the_variance_of_each_input_given_the_later_ones(hessian):
    # What GPTQ needs: U_ii^-2 is the Schur complement of the inputs after i, so row i is that of their inverse.
    upper = inverse_factor(hessian)
    for i in (0, 7, 22, 23):
        inverse = torch.linalg.inv(hessian[i:, i:])
        assert_close(upper[i, i:] / upper[i, i], inverse[0] / inverse[0, 0], rtol=1e-9, atol=1e-9)
        assert_close(upper[i, i] ** 2, inverse[0, 0], rtol=1e-9, atol=0)


def test_channels_that_are_always_zero_need_damping_only(hessian):
    hessian[3] = hessian[:, 3] = 0
    with pytest.raises(ValueError, match="failure at column 3 of 24"):
        cholesky(hessian)
    upper = inverse_factor(damp(hessian, 0.01))
    assert torch.isfinite(upper).all()
    assert not upper[3, :3].any() and not upper[3, 4:].any()


def test_a_hessian_of_zeros_is_damped_to_something_positive():
    assert torch.isfinite(inverse_factor(damp(torch.zeros(4, 4), 0.01))).all()


@pytest.mark.parametrize("factorise", [cholesky, inverse_factor])
def test_a_matrix_that_is_not_positive_definite_is_refused_with_its_column(factorise):
    with pytest.raises(ValueError, match="failure at column 1 of 3; raise the damping"):
        factorise(torch.diag(torch.tensor([1.0, -1.0, 1.0])))


def test_shares_out_of_range_are_refused_with_their_value():
    for amount in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"shrinkage must be between 0 and 1, got {amount}"):
            shrink(torch.eye(2), amount)
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -0\.5"):
        damp(torch.eye(2), -0.5)


@pytest.mark.parametrize("width", [5, 1024, 2500])
def test_half_a_product_is_the_product(width, generator):
    lower = torch.randn(width, width, generator=generator).tril()
    rows = torch.randn(3, width, generator=generator)
    assert_close(times_lower(rows, lower), rows @ lower, rtol=1e-4, atol=1e-3)
    hessian = lower @ lower.T
    energy = torch.einsum("ri,ij,rj->", *(x.double() for x in (rows, hessian, rows)))
    assert float(output_energy(rows, hessian)) == pytest.approx(float(energy), rel=1e-5)
