"""What `dcr.py` claims of the kernel: it is exact, it is what a step of training does, and the terms of the
bound are what they are called. On tiny random models, held against Jacobians written out in full."""
import pytest
import torch

from dcr import kernel_norms
from model import GPT, GPTConfig

IDS = [[5, 9, 5, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [5, 9]]


def brute_force(model, names, prompts, logits=None):
    """J = dz/dtheta in full, z the (likeliest) logits of the first response token; ||J' J^T||_F by pair."""
    parameters, jacobians = [p for name, p in model.named_parameters() if name in names], []
    for ids in prompts:
        z = model(torch.tensor([ids]))[0, -1].sort(descending=True).values[:logits]
        rows = [torch.autograd.grad(z_i, parameters, retain_graph=True) for z_i in z]
        jacobians.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double())
    return torch.stack([torch.stack([(a @ b.T).norm() for b in jacobians]) for a in jacobians])


def small(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=20, width=8, blocks=2, heads=2, kv_heads=1, head_width=4, hidden=12)
    model = GPT(GPTConfig(**sizes | changes))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.3
    return model


@pytest.mark.parametrize("changes", [{}, dict(qkv_bias=True), dict(kv_heads=2, blocks=1)])
def test_the_exact_kernel_is_that_of_all_parameters(changes):
    """Every kind of parameter has its own formula: embeddings of a token seen twice, norms, biases, shared
    heads. One of them left out is an error of per cents; padding that leaks in, likewise."""
    model = small(**changes)
    expected = brute_force(model, dict(model.named_parameters()), IDS)
    assert torch.allclose(kernel_norms(model, IDS), expected, rtol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    without = brute_force(model, [name for name, _ in model.named_parameters() if "norm" not in name], IDS)
    assert not torch.allclose(without, expected, rtol=1e-3)


@pytest.mark.parametrize("changes", [dict(tied=True), dict(width=136)])
def test_tied_or_wide_the_kernel_is_that_of_ten_logits_and_the_last_four_blocks(changes):
    model = small(blocks=5, **changes)
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.") and name[7] != "0"]
    expected = brute_force(model, names, IDS, logits=10)
    assert torch.allclose(kernel_norms(model, IDS), expected, rtol=1e-4)         # fp32, norms of 10,000
    assert not torch.allclose(brute_force(model, names, IDS, logits=9), expected, rtol=1e-3)


def test_similarity_to_itself_is_one_and_to_others_at_most_one():
    """||K(x', x)||^2 <= ||K(x, x)|| ||K(x', x')||: Cauchy-Schwarz on J^T J."""
    K = kernel_norms(small(), IDS + IDS[:1])
    own = K.diagonal()
    similarity = K / (own[:, None] * own[None, :]).sqrt()
    assert torch.allclose(K, K.T) and torch.allclose(similarity.diagonal(), torch.ones(5, dtype=K.dtype))
    assert similarity.max() <= 1 + 1e-9 and similarity.min() < 0.9
    assert similarity[0, 4].item() == pytest.approx(1)                     # the same prompt once more
