"""What `dcr.py` claims of the kernel: it is exact, and it is what a step of training does. On tiny random
models, held against Jacobians written out in full."""
import pytest
import torch

import dcr
from dcr import gradient_products, kernel, kernel_norms
from model import GPT, GPTConfig, last_states

IDS = [[5, 9, 5, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [5, 9]]


def brute_force(model, names, prompts, logits=None):
    """J = dz/dtheta in full, z the (likeliest) logits of the first response token; ||J' J^T||_F by pair."""
    parameters = [p for name, p in model.named_parameters() if name in names]
    jacobians = []
    for ids in prompts:
        z = model(torch.tensor([ids]))[0, -1].sort(descending=True).values[:logits]
        rows = []
        for z_i in z:
            gradient = torch.autograd.grad(z_i, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradient]))
        jacobians.append(torch.stack(rows).double())
    norms = torch.zeros(len(prompts), len(prompts), dtype=torch.float64)
    for i, a in enumerate(jacobians):
        for j, b in enumerate(jacobians):
            norms[i, j] = (a @ b.T).norm()
    return norms


def small(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=20, width=8, blocks=2, heads=2, kv_heads=1, head_width=4, hidden=12)
    model = GPT(GPTConfig(**sizes | changes))
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.3
    return model


@pytest.mark.parametrize("changes", [{}, dict(qkv_bias=True), dict(qk_norm=True), dict(kv_heads=2, blocks=1)])
def test_the_exact_kernel_is_that_of_all_parameters(changes):
    """Every kind of parameter has its own formula: embeddings of a token seen twice, norms, biases, shared
    heads. One of them left out is an error of per cents; padding that leaks in, likewise."""
    model = small(**changes)
    expected = brute_force(model, dict(model.named_parameters()), IDS)
    assert torch.allclose(kernel_norms(model, IDS), expected, rtol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    without = brute_force(model, [name for name, _ in model.named_parameters() if "norm" not in name], IDS)
    assert not torch.allclose(without, expected, rtol=1e-3)


def gradient_products_plain(model, prompts, l, read):
    """The definition of `gradient_products`: every gradient is written out."""
    r = read(last_states(model, prompts, l))                             # (n, k)
    below = [p for name, p in model.named_parameters() if dcr.group_of(name) != "head"]
    rows = []
    for number in r.flatten():
        gradients = torch.autograd.grad(number, below, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    J = torch.stack(rows).double().view(*r.shape, -1)                       # (n, k, parameters)
    return r.detach(), torch.einsum("ipw,jqw->ijpq", J, J)


@pytest.mark.parametrize("changes", [{}, dict(qkv_bias=True)])
@pytest.mark.parametrize("l", [0, 1, 2])
def test_products_of_activations_and_signals_are_those_of_gradients_written_out(l, changes):
    """The fast way against its plain twin, after every block, for a readout of two numbers."""
    model = small(**changes)

    def read(h):
        return torch.stack([h.sum(1), h.square().sum(1)], 1)                                # (n, 2)
    r, groups = gradient_products(model, IDS, l, read)
    r_plain, G = gradient_products_plain(model, IDS, l, read)
    assert torch.equal(r, r_plain) and G.shape == (4, 4, 2, 2)
    assert torch.allclose(sum(groups.values()), G, rtol=1e-4, atol=1e-6 * G.abs().max().item())
    assert [group for group in groups] == ["embeddings", "block 1", "block 2"][:l + 1]


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
    assert similarity.max() <= 1 + 1e-8 and similarity.min() < 0.9         # products are in fp32
    assert similarity[0, 4].item() == pytest.approx(1)                     # the same prompt once more


# ------------------------------------------------------------------------------------ parts and predictions

def scores(model, token=3):
    """log pi(token | x) of each prompt, by running the model on each alone."""
    return torch.stack([model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token] for ids in IDS])


def residuals(K, token=3):
    pi = (K.h @ K.W.T).softmax(-1)
    return torch.nn.functional.one_hot(torch.tensor(token), pi.shape[1]) - pi


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match="tied"):
        kernel(small(tied=True), IDS)
