"""The mixture of experts that is cut from the demo's model."""

import pytest
import torch
from torch.nn.functional import silu
from torch.testing import assert_close

import lorq
from lorq.bench.cut_experts import activity, cut_mlp, expert_model, fit_router, group_neurons
from lorq.demo import demo_model
from lorq.models.locate import load_dense

HIDDEN, WIDTH, EXPERTS = 16, 48, 4


@pytest.fixture
def mlp(generator):
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(2))
    return gate, up, torch.randn(HIDDEN, WIDTH, generator=generator)


def experts_output(x, gate_up, down, weights):
    """Sum of the experts' outputs, (tokens, experts) weights, straight from the fused tensors."""
    total = torch.zeros_like(x)
    for e in range(len(down)):
        gate, up = (x @ gate_up[e].T).chunk(2, dim=-1)
        total += weights[:, e : e + 1] * ((silu(gate) * up) @ down[e].T)
    return total


def test_all_experts_together_are_the_dense_mlp(mlp, generator):
    gate, up, down = mlp
    x = torch.randn(10, HIDDEN, generator=generator)
    groups = torch.randperm(WIDTH, generator=generator).view(EXPERTS, -1)
    fused = cut_mlp(gate, up, down, groups, EXPERTS)
    y = experts_output(x, *fused, torch.full((10, EXPERTS), 1 / EXPERTS))
    assert_close(y, (silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-4, atol=1e-4)


def test_groups_are_a_balanced_partition_and_find_neurons_that_act_together(generator):
    # Four kinds of tokens, each with twelve neurons of its own, shuffled.
    kind = torch.randint(EXPERTS, (200,), generator=generator)
    order = torch.randperm(WIDTH, generator=generator)
    owner = torch.arange(WIDTH) % EXPERTS
    active = torch.rand(200, WIDTH, generator=generator) * 0.1 + (kind[:, None] == owner) * 1.0
    groups = group_neurons(active[:, order], EXPERTS)
    assert torch.equal(groups.flatten().sort().values, torch.arange(WIDTH))
    assert all(len(set(owner[order][group].tolist())) == 1 for group in groups)


def test_the_router_finds_the_expert_that_gives_most(mlp, generator):
    gate, up, down = mlp
    # Tokens of four directions: which neurons they move is a function of the direction.
    kind = torch.randint(EXPERTS, (400,), generator=generator)
    x = 2 * torch.randn(EXPERTS, HIDDEN, generator=generator)[kind] + 0.2 * torch.randn(
        400, HIDDEN, generator=generator
    )
    active = activity(x, gate, up, down)
    groups = group_neurons(active, EXPERTS)
    logits = x @ fit_router(x, active, groups).T
    assert float(logits.std()) == pytest.approx(0.3, rel=1e-4)
    best = torch.stack([active[:, group].square().sum(1) for group in groups], 1).argmax(1)
    assert float((logits.argmax(1) == best).float().mean()) > 0.8  # chance is 0.25


@pytest.mark.slow
def test_the_dense_cut_computes_the_original_function():
    original, cut = (load_dense(folder, torch.float32) for folder in (demo_model(), expert_model()))
    window = torch.randint(40000, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = (model(window).logits.log_softmax(-1) for model in (original, cut))
    assert_close(got, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_sparse_cut_still_speaks():
    figures = lorq.evaluate(expert_model(sparse=True), text="python-docs", window=256, windows=4)
    assert figures.perplexity < 2000  # a random model has the size of the vocabulary, 49152
