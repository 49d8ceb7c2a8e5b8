"""Contrastive refinement: the kernel that couples prompts, and the losses that part them.

A refusal taught on a toxic prompt x moves every other prompt x' in proportion to their kernel K(x', x): with
z the logits of the first response token and pi their softmax, a step of size eta on (x, y) makes

    Delta z(x') = -eta K(x', x) (pi(x) - e_y) + O(eta^2),      K(x', x) = dz(x')/dtheta  dz(x)/dtheta^T.

Section 1 computes K, what it predicts, and every term of the paper's bound. With all parameters after block
l frozen, K is bounded by a bilinear similarity of the states at block l (Proposition 1),

    ||K(x', x)||_F  <=  c_l  h_x'^T Q_l h_x  +  Delta,

so refinement makes the h of toxic and of seemingly toxic prompts dissimilar before any refusal is taught.
Section 2 has its losses: the pull within a class and the push between classes is the Circle loss (Sun et al.
2020), and two retention terms keep the model what it was otherwise.

There is no training here. Read `train.py` next; for the losses alone, begin at section 2.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
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
        if isinstance(module, RMSNorm):                                  # u = gain * a / rms(a), elementwise
            a = F.rms_norm(a.float(), module.weight.shape, eps=module.eps)
            g = (B.view(n, k, -1, len(module.weight)) * a.view(n, 1, -1, len(module.weight))).sum(2)
            G += torch.einsum("ipw,jqw->ijpq", g, g)
        else:
            if isinstance(module, nn.Embedding):
                overlap = (a[:, :, None, None] == a).to(B.dtype)                       # (n, T, n, T)
            else:
                overlap = torch.einsum("itc,jsc->itjs", a, a) + (module.bias is not None)
            for i in range(n):                       # a prompt at a time: another (n, k, T, out) is enough
                mixed = overlap[i].transpose(0, 1)[:, None] @ B               # (n, 1, T, T) @ (n, k, T, out)
                product = B[i].reshape(k, -1) @ mixed.view(n * k, -1).T                 # (k, n k), T and out
                G[i] = product.view(k, n, k).transpose(0, 1)                              # are summed over
        groups[group] = groups.get(group, 0) + fp64(G)
    return r.detach(), groups


def fp64(x):
    """x in double precision; on the CPU if its device has none, like Apple's GPUs."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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
        (G, c), left, right = self.pieces(only), fp64(left), fp64(right)
        return torch.einsum("id,ijde,je->ij", left @ self.W, G, right @ self.W) + c * (left @ right.T)


def kernel(model, prompts):
    """The exact `Kernel` of prompts (lists of token ids), all parameters, all logits. ValueError if tied."""
    if model.config.tied:
        raise ValueError("a tied head has no exact kernel here: its embeddings are read and written at once")
    h, groups = gradient_products(model, prompts, model.norm)
    return Kernel(fp64(model.lm_head.weight.detach()), fp64(h), groups)


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
    h, R = fp64(states[0].detach()), fp64(R)
    K = sum(groups.values()) + (h @ h.T)[:, :, None, None] * (R.T @ R)               # (n, n, probes, probes)
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
    (x, y), this is -eta K(x', x) (pi(x) - e_y); with another change it is the same theory for any optimizer.
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
    return fp64(model.lm_head.weight.detach()) @ fp64(last), elsewhere


def bilinear(h, products, ridge=0.1):
    """Q (d, d), positive semi-definite: the h'^T Q h that explains the inner products (n, n) of features.

    Features g(x) that were linear in the state, g = Phi h, would have <g', g> = h'^T Phi^T Phi h. Phi is the
    ridge regression of g on h, Phi = g^T S with S = h (h^T h + lambda I)^-1, and then Q = Phi^T Phi =
    S^T <g', g> S needs the inner products alone. `ridge` is lambda over the mean of ||h||^2.
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
    A4, bounded features, is that ||h_x|| and ||G_x|| have a maximum. `left` and `right` are the two sides
    with the tail trained, `left_frozen` and `right_frozen` with it frozen. (n, n) each, fp64. To see what
    loosens the bound: `through` ||T' G' G^T T^T||_F with T = dz/dh_x (`sensitivity`: its operator norm,
    `elsewhere`: what passes it by), `products` ||G' G^T||_F, `traces` <G', G>, `form` h'^T Q h, `size`
    ||G_x||_F, `crossed` the term with sqrt(c) tau.
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
    return fp64(h), sum(groups.values())


def trace(G):
    """tr G of the last two axes: (..., d, d) -> (...)."""
    return G.diagonal(dim1=-2, dim2=-1).sum(-1)


# ----------------------------------------------------------------------------------------------------------
# 2. The losses: what parts them

DENSE = 128 * 128          # up to this many pairs the similarities are written out as one matrix,
TILE = 512                 # beyond that never more than these rows and columns at a time (a GPU: 8 times)


def circle_loss(features, labels, references=None, reference_labels=None, margin=0.25, gamma=32.0, own=None):
    """The Circle loss of features (N, d) with integer labels (N,), a scalar (Sun et al. 2020).

    Every row is an anchor once. With s_p its cosine similarities to the others of its class (positives) and
    s_n those to the other classes (negatives), its loss is

        log(1 + sum_n exp(gamma a_n (s_n - m)) * sum_p exp(-gamma a_p (s_p - (1 - m))))
        a_p = [1 + m - s_p]_+     a_n = [s_n + m]_+     both constants for the gradient

    so the loss wants s_p > 1 - m and s_n < m, and pulls hardest at the pairs farthest from it. Returned is
    the mean over the anchors that have a positive and a negative; a zero with a graph when there are none.
    Computed in fp32, or in fp64 for fp64 features, whatever the autocast.

    Positives and negatives are looked for among `references` (M, d) with `reference_labels` (M,), a memory
    bank or the batches of other workers; without them, among the anchors. If the anchors are rows own,
    own + 1, ... of the references, say so, and none is compared with itself. ValueError for other shapes.

    The value may rise while the classes part: for s_n > -m, a_n (s_n - m) = s_n^2 - m^2 has its minimum at
    0. Watch the similarities.
    """
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels come together")
    others = (features, labels) if references is None else (references, reference_labels)
    for x, y in ((features, labels), others):
        if x.dim() != 2 or y.shape != x.shape[:1] or x.shape[1] != features.shape[1]:
            raise ValueError(f"features {tuple(x.shape)} with labels {tuple(y.shape)}: they should be (N, d) "
                             "and (N,), those of references (M, d) and (M,)")
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
        y, own = (None, 0) if references is None else (F.normalize(references.to(x.dtype), dim=1), own)
        few = len(x) * len(others[0]) <= DENSE
        log_sums = dense_log_sums if few else TiledLogSums.apply
        L_p, L_n = log_sums(x, y, labels, reference_labels, margin, gamma, own)                  # (N,) each
        # log(1 + e^x) to the last digit; F.softplus returns x from x = 20 on
        loss = torch.logaddexp(L_p + L_n, torch.zeros_like(L_p))
        counts = (torch.minimum(L_p, L_n) > torch.finfo(x.dtype).min / 2)          # no sum was without terms
        return (loss * counts).sum() / counts.sum().clamp(min=1)


def dense_log_sums(x, y, labels, reference_labels, m, gamma, own):
    """log sum_p exp(-gamma a_p (s_p - (1 - m))) and log sum_n exp(gamma a_n (s_n - m)) of each anchor, by the
    definition; for a sum without terms the least finite number. y None: among themselves."""
    y, reference_labels = (x, labels) if y is None else (y, reference_labels)
    s = x @ y.T                                                                # (N, M) cosines
    same = labels[:, None] == reference_labels[None, :]
    positive = same
    if own is not None:
        row, column = (torch.arange(len(z), device=x.device) for z in (x, y))
        positive = same & (row[:, None] + own != column)                       # not itself
    a_p, a_n = (1 + m - s.detach()).relu(), (s.detach() + m).relu()
    # the most negative finite number, not -inf: a row without positives then has no inf - inf anywhere
    nothing = torch.finfo(s.dtype).min
    l_p = (-gamma * a_p * (s - (1 - m))).masked_fill(~positive, nothing)
    l_n = (gamma * a_n * (s - m)).masked_fill(same, nothing)
    return l_p.logsumexp(1), l_n.logsumexp(1)


class TiledLogSums(torch.autograd.Function):
    """`dense_log_sums` without the matrix: it is walked in tiles that stay in the cache, and walked again for
    the gradient. Memory O((N + M) d + tile^2), so the batch may be as large as its features allow.

    Cosines are at most 1, so each weight makes a square of its pair. With t = s - 1 for a positive and
    t = max(s, -m) for a negative,

        -gamma a_p (s - (1 - m)) = gamma (t^2 - m^2)          d/ds, a_p held:  -gamma a_p = gamma (t - m)
         gamma a_n (s - m)       = gamma (t^2 - m^2)          d/ds, a_n held:   gamma a_n = gamma (t + m)

    A log-sum L's gradient is the softmax exp(l - L) times dl/ds. If W holds these products times what comes
    back to L, then, as s = x y^T, the gradients are W y for x and W^T x for y: two matrix products. Among
    themselves (y None) s_ij = s_ji, so half the tiles serve both anchors, with axis 1 for those of the rows I
    and axis 0 for those of the columns J.
    """

    @staticmethod
    def forward(ctx, x, y, labels, reference_labels, m, gamma, own):
        ctx.save_for_backward(x, y, labels, reference_labels)
        ctx.knobs, nothing = (m, gamma, own), torch.finfo(x.dtype).min
        L_p, L_n = (x.new_full((len(x),), nothing) for _ in range(2))
        for I, J, t, same in tiles(x, y, labels, reference_labels, m):
            l = gamma * t.square_() - gamma * m * m
            l_p, l_n = l.masked_fill(~same, nothing), l.masked_fill_(same, nothing)
            if own is not None:
                l_p.diagonal(own + I.start - J.start).fill_(nothing)
            for anchors, axis in ((I, 1), (J, 0)) if y is None and I != J else ((I, 1),):
                for L, l in ((L_p, l_p), (L_n, l_n)):
                    most = torch.maximum(l.amax(axis), L[anchors])
                    terms = exp(l - most.unsqueeze(axis)).sum(axis) + exp(L[anchors] - most)
                    L[anchors] = torch.where(most > nothing, most + terms.log(), nothing)
        ctx.log_sums = L_p, L_n
        return L_p, L_n

    @staticmethod
    @once_differentiable
    def backward(ctx, to_p, to_n):
        (x, y, labels, reference_labels), (m, gamma, own) = ctx.saved_tensors, ctx.knobs
        (L_p, L_n), among = ctx.log_sums, y is None
        to_x = torch.zeros_like(x)
        to_y = to_x if among else torch.zeros_like(y)          # x is both sides and gets what is for either
        for I, J, t, same in tiles(x, y, labels, reference_labels, m):
            l, W = gamma * t.square() - gamma * m * m, 0
            for anchors, axis in ((I, 1), (J, 0)) if among else ((I, 1),):
                def either(p, n):
                    return torch.where(same, p[anchors].unsqueeze(axis), n[anchors].unsqueeze(axis))
                W = W + exp(l - either(L_p, L_n)).mul_(either(gamma * to_p, gamma * to_n))
            W *= torch.where(same, t - m, t + m)
            if own is not None:
                W.diagonal(own + I.start - J.start).zero_()
            to_x[I].addmm_(W, (x if among else y)[J])
            if not (among and I == J):
                to_y[J].addmm_(W.T, x[I])
        return to_x, None if among else to_y, None, None, None, None, None


def tiles(x, y, labels, reference_labels, m):
    """Yields rows I, columns J, t (tile, tile) and where the classes are the same, of every tile; with y None
    of those on and above the diagonal."""
    size = TILE if x.is_cpu else 8 * TILE          # what a CPU's cache holds; enough for a GPU to be busy
    among = y is None
    y, reference_labels = (x, labels) if among else (y, reference_labels)
    for i in range(0, len(x), size):
        for j in range(i if among else 0, len(y), size):
            I, J = slice(i, i + size), slice(j, j + size)
            s, same = x[I] @ y[J].T, labels[I, None] == reference_labels[J]
            yield I, J, torch.where(same, s - 1, s.clamp(min=-m)), same


def exp(x):
    """e^x in place, at least e^-80: smaller results, no normal floats, take a CPU 50 times as long."""
    return x.clamp_(min=-80).exp_()


def forgetting(logits, base_logits):
    """KL(base || model) of the next token, mean over positions (n, V) each: retention of what the model SAYS.

    Unlike a likelihood of some text it has nothing to teach, only something to keep.
    """
    base, new = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(new, base, log_target=True, reduction="sum") / len(base)


def drift(hidden, base_hidden, centre):
    """||h - h_base||^2 over positions (n, d), relative to ||h_base - centre||^2: retention of states."""
    return (hidden - base_hidden).square().sum() / (base_hidden - centre).square().sum()
