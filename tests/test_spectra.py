"""Stable ranks and resizing, against the dense computation."""
import pytest
import torch

import v10_transformer_lowrank_scaled as v10

FROM_R_TO_K = ("m", "n", "r", "k")
SHAPES = [(48, 48, 12), (48, 160, 12), (160, 48, 12), (20, 30, 20), (5, 7, 1)]  # m, n, r
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def factors(m, n, r, dtype=torch.float64, seed=0, unbalanced=True):
    """Random factors; unbalanced ones have columns and rows of very different norms."""
    g = torch.Generator().manual_seed(seed)
    U, V = torch.randn(m, r, generator=g, dtype=torch.float64), torch.randn(r, n, generator=g, dtype=torch.float64)
    if unbalanced:
        U, V = 3 * U * torch.linspace(1, 0.1, r), V * torch.linspace(0.2, 2, r)[:, None]
    return U.to(dtype), V.to(dtype)


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_the_exact_stable_rank_is_that_of_the_dense_product(m, n, r):
    U, V = factors(m, n, r)
    W = U @ V
    assert v10.stable_rank(U, V) == pytest.approx((W.norm()**2 / torch.linalg.matrix_norm(W, 2)**2).item(), rel=1e-12)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("iterations", [1, 5])
def test_power_iteration_in_factor_form_is_power_iteration_through_the_product(m, n, r, iterations):
    U, V = factors(m, n, r)
    W, x = U @ V, torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(iterations):
        x = W.T @ (W @ x)
        x = x / x.norm()
    expected = W.norm()**2 / (W @ x).norm()**2
    got = v10.stable_rank(U, V, iterations, torch.Generator().manual_seed(3))
    assert got == pytest.approx(expected.item(), rel=1e-12)


def test_the_estimate_overstates_the_stable_rank_by_about_an_eighth_at_initialisation():
    torch.manual_seed(0)
    layers = [v10.LowRankLinearAdaptiveSpectral(512, m, 64) for m in (512, 2048) for _ in range(10)]
    g = torch.Generator().manual_seed(0)
    factors_of = [layer.factors() for layer in layers]
    ratios = torch.tensor([v10.stable_rank(U, V, 5, g) / v10.stable_rank(U, V) for U, V in factors_of])
    assert ratios.min() >= 1
    assert 1.08 < ratios.mean() < 1.18
    converged = v10.stable_rank(*layers[0].factors(), 500, g)
    assert converged == pytest.approx(v10.stable_rank(*layers[0].factors()), rel=1e-3)


def test_the_stable_rank_counts_equal_singular_values_and_is_zero_for_zero():
    Q = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    assert v10.stable_rank(Q, Q.T) == pytest.approx(6)
    zero = torch.zeros(20, 6)
    assert v10.stable_rank(zero, zero.T) == v10.stable_rank(zero, zero.T, 5) == 0


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_the_svd_of_the_factors_is_that_of_their_product(m, n, r):
    U, V = factors(m, n, r)
    P, S, Qt = v10.product_svd(U, V)
    assert torch.allclose(S, torch.linalg.svdvals(U @ V)[:r], rtol=1e-12, atol=1e-12 * S[0].item())
    assert relative(P * S @ Qt, U @ V) < 1e-13
    for basis in (P, Qt.T):
        assert torch.allclose(basis.T @ basis, torch.eye(r, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(FROM_R_TO_K, [(48, 48, 12, 8), (48, 160, 12, 11), (160, 48, 9, 1), (512, 999, 64, 60)])
def test_shrinking_is_the_truncated_svd_of_the_dense_product(m, n, r, k, dtype):
    U, V = factors(m, n, r, dtype)
    P, S, Qt = torch.linalg.svd(U.double() @ V.double(), full_matrices=False)
    best = P[:, :k] * S[:k] @ Qt[:k]
    new_U, new_V, A, B, carried = v10.resize_factors(U, V, k, torch.Generator())
    assert (new_U.shape, new_V.shape, carried) == ((m, k), (k, n), k)
    assert relative(new_U.double() @ new_V.double(), best) < TOLERANCE[dtype]
    # the maps that carry gradients, and the even split of the singular values
    assert relative(U @ A, new_U) < 10 * TOLERANCE[dtype]
    assert relative(B @ V, new_V) < 10 * TOLERANCE[dtype]
    assert relative(B @ A, torch.eye(k, dtype=dtype)) < 100 * TOLERANCE[dtype]
    assert relative(new_U.T @ new_U, torch.diag(S[:k].to(dtype))) < 10 * TOLERANCE[dtype]
    assert relative(new_V @ new_V.T, torch.diag(S[:k].to(dtype))) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(FROM_R_TO_K, [(48, 48, 12, 16), (48, 160, 12, 13), (16, 48, 9, 16), (512, 512, 60, 64)])
def test_growth_leaves_the_factors_and_the_product_bit_identical(m, n, r, k, dtype):
    U, V = factors(m, n, r, dtype)
    new_U, new_V, A, B, carried = v10.resize_factors(U, V, k, torch.Generator().manual_seed(0))
    assert carried == r
    assert torch.equal(new_U[:, :r], U)
    assert torch.equal(new_V[:r], V)
    assert torch.equal(new_U @ new_V, U @ V)
    assert torch.equal(A, torch.eye(r, k, dtype=dtype))
    assert torch.equal(B, torch.eye(k, r, dtype=dtype))


def test_new_rows_are_orthogonal_of_the_mean_norm_and_learn_at_once():
    layer = v10.LowRankLinearAdaptiveSpectral(40, 30, 6)
    U, V, *_ = v10.resize_factors(*layer.factors(), 10, torch.Generator().manual_seed(0))
    mean_norm = V[:6].norm(dim=1).mean()
    assert torch.allclose(V[6:] @ V[6:].T, torch.eye(4) * mean_norm**2, atol=1e-5)
    assert (V[6:] @ V[:6].T).abs().max() < 1e-5
    assert not U[:, 6:].any()
    layer.set_factors(U, V)
    layer(torch.randn(100, 40)).square().sum().backward()
    assert (layer.U.grad[:, 6:].norm(dim=0) > 0.1 * layer.U.grad[:, :6].norm(dim=0).min()).all()


@pytest.mark.parametrize("k", [4, 6])
def test_a_negligible_direction_is_grown_afresh(k):
    U, V = factors(30, 40, 8, torch.float32)
    U[:, 3:] = 0  # W has rank 3
    new_U, new_V, A, B, carried = v10.resize_factors(U, V, k, torch.Generator().manual_seed(0))
    assert carried == 3
    assert relative(new_U @ new_V, U @ V) < 1e-5
    assert not new_U[:, 3:].any()
    assert not A[:, 3:].any()
    assert not B[3:].any()
    assert (new_V[3:].norm(dim=1) > 0).all()


def test_a_zero_matrix_can_shrink_and_still_learn():
    _, V = factors(30, 40, 8, torch.float32)
    U, V, _, _, carried = v10.resize_factors(torch.zeros(30, 8), V, 5, torch.Generator().manual_seed(0))
    assert carried == 0
    assert U.shape == (30, 5)
    assert not U.any()
    assert torch.linalg.matrix_rank(V) == 5


def test_svds_on_several_threads_are_those_on_one_bit_for_bit_each_time():
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(m, 30, generator=generator), torch.randn(30, n, generator=generator))
               for m, n in ((128, 128), (512, 128), (128, 512)) * 6]
    expected = [v10.product_svd(U, V) for U, V in factors]
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            found = v10.on_threads(v10.product_svd, [(U.clone(), V.clone()) for U, V in factors])
            assert all(a.equal(b) for one, other in zip(expected, found, strict=True)
                       for a, b in zip(one, other, strict=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
