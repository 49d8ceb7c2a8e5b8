"""Contrastive refinement: the losses of the stage that the paper adds before safety tuning.

A refusal taught on a toxic prompt x moves every other prompt x' in proportion to their kernel K(x', x). With
all parameters after block l frozen, the paper bounds that kernel by a bilinear similarity of the states at
block l (Proposition 1),

    ||K(x', x)||_F  <=  c_l  h_x'^T Q_l h_x  +  Delta,

so refinement makes the h of toxic and of seemingly toxic prompts dissimilar before any refusal is taught.
The pull within a class and the push between classes is the Circle loss (Sun et al. 2020); two retention
terms keep the model what it was otherwise. Everything here is a pure function of tensors.

Read `train.py` next.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import collate
from model import RMSNorm


# ----------------------------------------------------------------------------------------------------------
# 1. The kernel: what couples two prompts

def gradient_products(model, prompts, read, l=None, modules=None):
    """(r, {group: G}): r = read(h) (n, k) and, for each group of parameters, the inner products of gradients

        G[i, j] = dr(x_i)/dtheta  dr(x_j)/dtheta^T,    G (n, n, k, k), fp64.

    h (n, width) is the stream after block l (default: the last) at the last token of each prompt (lists of
    ids), `read` any function of it. The groups are embeddings, block 1 ... block L, final norm: all that h
    and `read` depend on but the head, or what lies inside `modules`.

    It takes k backward passes, for prompts do not meet in a batch: the gradient of a sum over prompts is each
    prompt's own. No gradient of a weight is ever formed. A linear map u_t = W a_t adds sum_t B_t a_t^T to the
    gradient of W, with B_t = dr/du_t the signal that comes back to u_t, so its share of G is

        sum over t', t of  <a'_t', a_t>  B'_t' B_t^T :

    what two prompts have in common going up, times what they have in common coming down. An embedding is the
    linear map of one-hot a: <a', a> asks whether the tokens are the same.
    """
    named = {module: name for name, module in model.named_modules()}
    calls, n = [], len(prompts)

    def record(module, inputs, output):
        calls.append((module, inputs[0].detach(), output))
    hooks = [m.register_forward_hook(record) for root in modules or [model] for m in root.modules()
             if isinstance(m, (nn.Linear, nn.Embedding, RMSNorm)) and m is not model.lm_head]
    try:
        with torch.enable_grad(), torch.autocast(model.cos.device.type, enabled=False):
            tokens, targets, _ = collate([(ids + [0], len(ids)) for ids in prompts], model.cos.device)
            r = read(model(tokens, upto=model.config.blocks if l is None else l)[targets >= 0])
    finally:
        for hook in hooks:
            hook.remove()
    k, us = r.shape[1], [u for _, _, u in calls]
    signals = [torch.autograd.grad(r[:, i].sum(), us, retain_graph=i < k - 1) for i in range(k)]
    groups = {}
    for (module, a, _), B in zip(calls, zip(*signals)):
        group, G = group_of(named[module]), r.new_zeros(n, n, k, k)
        B, a = torch.stack(B, 1), a.view(n, -1, *a.shape[2:])                   # (n, k, T, out), (n, T, in)
        if isinstance(module, RMSNorm):                                    # u = gain * a / rms(a), elementwise
            a = F.rms_norm(a.float(), module.weight.shape, eps=module.eps)
            g = (B.view(n, k, -1, len(module.weight)) * a.view(n, 1, -1, len(module.weight))).sum(2)
            G += torch.einsum("ipw,jqw->ijpq", g, g)
        else:
            if isinstance(module, nn.Embedding):
                overlap = (a[:, :, None, None] == a).to(B.dtype)                       # (n, T, n, T)
            else:
                overlap = torch.einsum("itc,jsc->itjs", a, a) + (module.bias is not None)
            for i in range(n):                       # a prompt at a time: another (n, k, T, out) is enough
                mixed = overlap[i].transpose(0, 1)[:, None] @ B                 # (n, 1, T, T) @ (n, k, T, out)
                product = B[i].reshape(k, -1) @ mixed.view(n * k, -1).T                   # (k, n k), T and out
                G[i] = product.view(k, n, k).transpose(0, 1)                              # are summed over
        groups[group] = groups.get(group, 0) + G.double()
    return r.detach(), groups


def group_of(name):
    """The group a parameter or module belongs to: "layers.2.mlp.up_proj" is in "block 3"."""
    if name.startswith("layers."):
        return f"block {int(name.split('.')[1]) + 1}"
    return {"embed_tokens": "embeddings", "norm": "final norm", "lm_head": "head"}[name.split(".")[0]]


@dataclass
class Kernel:
    """K(x', x) = J(x') J(x)^T of all pairs of n prompts, J = dz/dtheta (V, parameters), in small pieces.

    z = W h are the logits of the first response token. With G = dh(x') dh(x)^T over the parameters below the
    head, and the head's own gradient,

        K(x', x) = W G W^T + <h', h> I,

    so no V x V matrix is needed, and d backward passes do the work of V. Exact for an untied head.
    """
    W: torch.Tensor          # (V, d) the head
    h: torch.Tensor          # (n, d) the final, normed state: z = W h
    groups: dict             # {group: G (n, n, d, d)} below the head

    def pieces(self, only=None):
        """(G (n, n, d, d), <h', h> (n, n)) summed over the groups named in `only`; all by default."""
        only = [*self.groups, "head"] if only is None else only
        n, d = self.h.shape
        G = sum((self.groups[g] for g in only if g != "head"), self.h.new_zeros(n, n, d, d))
        return G, self.h @ self.h.T * ("head" in only)

    def norms(self, only=None):
        """||K(x', x)||_F, (n, n): tr(G^T M G M) + 2 c tr(G M) + c^2 V with M = W^T W, c = <h', h>."""
        (G, c), M = self.pieces(only), self.W.T @ self.W
        squared = (G * (M @ G @ M)).sum((2, 3)) + 2 * c * (G * M).sum((2, 3)) + c.square() * len(self.W)
        return squared.clamp(min=0).sqrt()

    def between(self, left, right, only=None):
        """left_i^T K(x_i, x_j) right_j of all pairs, (n, n), for left, right (n, V)."""
        (G, c), left, right = self.pieces(only), left.double(), right.double()
        return torch.einsum("id,ijde,je->ij", left @ self.W, G, right @ self.W) + c * (left @ right.T)


def kernel(model, prompts):
    """The exact `Kernel` of prompts (lists of token ids), all parameters, all logits. ValueError if tied."""
    if model.config.tied:
        raise ValueError("a tied head has no exact kernel here: its embeddings are read and written at once")
    h, groups = gradient_products(model, prompts, model.norm)
    return Kernel(model.lm_head.weight.detach().double(), h.double(), groups)


def kernel_norms(model, prompts):
    """||K(x', x)||_F of all pairs of prompts (lists of ids), (n, n).

    With a tied head, or d in the hundreds, exact is out of reach: there, as in the paper, the 10 likeliest
    logits of each prompt and the parameters of the last 4 blocks.
    """
    if not model.config.tied and model.config.width <= 128:
        return kernel(model, prompts).norms()
    _, groups = gradient_products(model, prompts, lambda h: model.lm_head(model.norm(h)).topk(10).values,
                                  modules=model.layers[-4:])
    return sum(groups.values()).square().sum((2, 3)).sqrt()


def probed_norms(model, prompts, probes=16, seed=0):
    """||K(x', x)||_F estimated with few backward passes, (n, n): for independent standard normal u, v (V,)

        E (u^T K v)^2 = ||K||_F^2,

    so the mean of squares over pairs of different probes estimates the square without bias. Untied heads.
    """
    W, states = model.lm_head.weight.detach(), []
    R = torch.randn(len(W), probes, generator=torch.Generator().manual_seed(seed)).to(W)

    def read(h):
        states.append(model.norm(h))
        return states[0] @ (W.T @ R)                                                    # R^T z, (n, probes)
    _, groups = gradient_products(model, prompts, read)
    h, R = states[0].detach().double(), R.double()
    K = sum(groups.values()) + (h @ h.T)[:, :, None, None] * (R.T @ R)                  # (n, n, probes, probes)
    return K[:, :, ~torch.eye(probes, dtype=torch.bool, device=W.device)].square().mean(-1).sqrt()


class FirstToken(nn.Module):
    """The logits of the first response token of some prompts, as a module without inputs."""

    def __init__(self, model, prompts):
        super().__init__()
        tokens, targets, _ = collate([(ids + [0], len(ids)) for ids in prompts], model.cos.device)
        self.model, self.tokens, self.last = model, tokens, targets >= 0

    def forward(self):
        blocks = self.model.config.blocks
        return self.model.tail(self.model(self.tokens, upto=blocks)[self.last], since=blocks)      # (n, V)


@torch.no_grad()
def first_order(model, prompts, parameters, change):
    """(z, dz), (n, V) each: the logits at `parameters` {name: tensor} and their derivative along `change`,

        z(theta + change) = z + J change + O(change^2),

    in one forward-mode pass: J is never formed. With change = -eta J(x)^T (pi(x) - e_y), the step of SGD on
    (x, y), this is -eta K(x', x) (pi(x) - e_y); with any other change it is the same theory for any optimizer.
    """
    first, (theta, step) = FirstToken(model, prompts), ({f"model.{name}": p for name, p in part.items()}
                                                        for part in (parameters, change))
    with sdpa_kernel(SDPBackend.MATH):                      # the fused attentions have no forward mode
        return jvp(lambda theta: functional_call(first, theta, ()), (theta,), (step,))


def tail_sensitivity(model, prompts, l):
    """(T, elsewhere): T = dz/dh_x (n, V, d), h_x the stream after block l at the last token of a prompt, and
    the share (n,) of ||dz/dH||^2 that reaches the logits from the stream at the prompt's other tokens."""
    tokens, targets, _ = collate([(ids + [0], len(ids)) for ids in prompts], model.cos.device)
    with torch.no_grad():
        H = model(tokens, upto=l)                                                              # (n, T, d)
    with torch.enable_grad():
        h = model.norm(model.blocks(H.requires_grad_(), l, model.config.blocks)[targets >= 0])     # (n, d)
        D = torch.stack([torch.autograd.grad(h[:, i].sum(), H, retain_graph=True)[0]
                         for i in range(h.shape[1])], 2)                                # (n, T, d, d of H)
    last = D[targets >= 0]                                                                     # (n, d, d)
    elsewhere = 1 - last.square().sum((1, 2)) / D.square().sum((1, 2, 3))
    return model.lm_head.weight.detach().double() @ last.double(), elsewhere


def bilinear(h, products, ridge=0.1):
    """Q (d, d), positive semi-definite: the h'^T Q h that explains the inner products (n, n) of features.

    Features g(x) that were linear in the state, g = Phi h, would have <g', g> = h'^T Phi^T Phi h. Phi is the
    ridge regression of g on h, Phi = g^T S with S = h (h^T h + lambda I)^-1; as Q = Phi^T Phi = S^T <g', g> S,
    the inner products are all it needs. `ridge` is lambda over the mean of ||h||^2.
    """
    penalty = ridge * h.square().sum(1).mean() * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    S = h @ torch.linalg.inv(h.T @ h + penalty)                                                     # (n, d)
    return S.T @ products @ S


def proposition_1(model, prompts, l, others):
    """Both sides of the paper's Proposition 1 for all pairs of prompts, and every term, in a dict:

        ||K(x', x)||_F <= c h_x'^T Q h_x + sqrt(c) tau (||G_x'||_F + ||G_x||_F) + tau^2 + Delta.

    The terms, as we read them (the paper states that they exist, not how to measure them):
      G_x    dh_x/dtheta over the parameters up to block l; h_x is the stream after it at the last token
      c      max ||dz/dh_x||_op^2 over the prompts (A1, bounded tail sensitivity)
      Q      such that <G_x', G_x> = tr(G_x' G_x^T) ~ h_x'^T Q h_x (A2, local linearity), from `bilinear` on
             `others`, prompts that are not tested
      Delta  what A2 leaves: c times the most that ||G_x' G_x^T||_F exceeds h_x'^T Q h_x by, among `others`
      tau    max ||dz/dtheta_tail||_F over the prompts (A3, weak tail updates); 0 when the tail is frozen
    A4, bounded features, is that ||h_x|| and ||G_x|| have a maximum. `left` and `right` are the two sides with
    the tail trained, `left_frozen` and `right_frozen` with the tail frozen. (n, n) each, fp64.
    """
    K, (h, G) = kernel(model, prompts), states_and_products(model, prompts, l)
    T, elsewhere = tail_sensitivity(model, prompts, l)
    below = ["embeddings", *(f"block {i + 1}" for i in range(l))]
    tail = [group for group in (*K.groups, "head") if group not in below]
    sensitivity = torch.linalg.matrix_norm(T, 2)                                                       # (n,)
    c, size = sensitivity.max() ** 2, trace(G).diagonal().sqrt()
    # ||dz/dtheta_tail||_F^2 = tr K_tail(x, x) = tr(W^T W G_tail) + <h, h> V
    G_tail, inner = K.pieces(tail)
    tau = (trace(G_tail @ (K.W.T @ K.W)) + inner * len(K.W)).diagonal().sqrt().max()
    other_h, other_G = states_and_products(model, others, l)
    Q = bilinear(other_h, trace(other_G))
    products = G.square().sum((2, 3)).sqrt()                                                # ||G' G^T||_F
    gap = other_G.square().sum((2, 3)).sqrt() - other_h @ Q @ other_h.T
    delta = c * gap.fill_diagonal_(0).max()                                      # pairs of different prompts
    form = h @ Q @ h.T
    frozen = c * form + delta
    crossed = c.sqrt() * tau * (size[:, None] + size[None, :])
    M = T.transpose(1, 2) @ T                                                                    # (n, d, d)
    through = (G * (M[:, None] @ G @ M[None])).sum((2, 3)).sqrt()                       # ||T' G' G^T T^T||_F
    return dict(left=K.norms(), left_frozen=K.norms(below), right=frozen + crossed + tau ** 2,
                right_frozen=frozen, c=c, Q=Q, tau=tau, delta=delta, h=h, size=size, sensitivity=sensitivity,
                elsewhere=elsewhere, through=through, products=products, traces=trace(G), form=form,
                crossed=crossed)


def states_and_products(model, prompts, l):
    """h_x (n, d) and G_x' G_x^T (n, n, d, d), fp64, for G_x = dh_x/dtheta."""
    h, groups = gradient_products(model, prompts, lambda h: h, l)
    return h.double(), sum(groups.values())


def trace(G):
    return G.diagonal(dim1=-2, dim2=-1).sum(-1)


# ----------------------------------------------------------------------------------------------------------
# 2. The losses: what parts them

def circle_loss(features, labels, margin=0.25, gamma=32.0):
    """The Circle loss of features (N, d) with integer labels (N,), a scalar (Sun et al. 2020).

    Every row is an anchor once. With s_p its cosine similarities to the others of its class (positives) and
    s_n those to the other classes (negatives), its loss is

        log(1 + sum_n exp(gamma a_n (s_n - m)) * sum_p exp(-gamma a_p (s_p - (1 - m))))
        a_p = [1 + m - s_p]_+     a_n = [s_n + m]_+     both constants for the gradient

    so the loss wants s_p > 1 - m and s_n < m, and pulls hardest at the pairs farthest from it. Returned is
    the mean over the anchors that have a positive and a negative; a zero with a graph when there are none.
    Computed in fp32, or in fp64 for fp64 features, whatever the autocast.

    The value may rise while the classes part: for s_n > -m, a_n (s_n - m) = s_n^2 - m^2 has its minimum at
    0. Watch the similarities.
    """
    x = features if features.dtype == torch.float64 else features.float()
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x, dim=1)
        s = x @ x.T                                                            # (N, N) cosines
        same = labels[:, None] == labels[None, :]
        positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)  # not itself
        a_p, a_n = (1 + margin - s.detach()).relu(), (s.detach() + margin).relu()
        # the most negative finite number, not -inf: a row without positives then has no inf - inf anywhere
        nothing = torch.finfo(s.dtype).min
        l_p = (-gamma * a_p * (s - (1 - margin))).masked_fill(~positive, nothing)
        l_n = (gamma * a_n * (s - margin)).masked_fill(same, nothing)
        log_sums = l_p.logsumexp(1) + l_n.logsumexp(1)                         # (N,)
        # log(1 + e^x) to the last digit; F.softplus returns x from x = 20 on
        loss = torch.logaddexp(log_sums, torch.zeros_like(log_sums))
        counts = positive.any(1) & ~same.all(1)
        return (loss * counts).sum() / counts.sum().clamp(min=1)


def forgetting(logits, base_logits):
    """KL(base || model) of the next token, mean over positions (n, V) each: retention of what the model SAYS.

    Unlike a likelihood of some text it has nothing to teach, only something to keep.
    """
    base, new = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(new, base, log_target=True, reduction="sum") / len(base)


def drift(hidden, base_hidden, centre):
    """||h - h_base||^2 over positions (n, d), relative to ||h_base - centre||^2: retention of states."""
    return (hidden - base_hidden).square().sum() / (base_hidden - centre).square().sum()
