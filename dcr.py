"""Contrastive refinement: separate toxic from seemingly toxic prompts before refusals are taught.

This file is the method of "Discern Truth from Falsehood: Reducing Over-Refusal via Contrastive
Refinement" (arXiv 2603.03323), in the rest of the project called "the paper". Three sections:

1. The Circle loss (Sun et al. 2020, arXiv 2002.10857). It makes the states of one class alike and
   those of two classes unlike.
2. The objective of refinement: the Circle loss on the states h_x after block l, and terms that
   hold what is harmless, and the length of what is toxic. For another method, change this.
3. Why that should help. Let z(x) be the logits of the first response token after a prompt x, pi(x)
   their softmax and e_y the one-hot vector of a token y. A step of SGD on (x, y) with learning rate
   eta changes the logits of every other prompt x' by

       Delta z(x') = -eta K(x', x) (pi(x) - e_y) + O(eta^2)
       with the kernel  K(x', x) = dz(x')/dtheta dz(x)/dtheta^T,

   so a refusal spreads as far as the kernel reaches. With all after block l frozen, Proposition 1
   of the paper bounds ||K(x', x)||_F by a similarity of the states h_x' and h_x: prompts with
   unlike states should not share refusals. The bound is in `theory.ipynb`. Read `train.py` next.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import RMSNorm, last_states

# ---- 1. The Circle loss --------------------------------------------------------------------------

STRIP = 256                # anchors at a time on a CPU: with 4,096 others, 4 MB of cosines
GPU_STRIP_PAIRS = 2 ** 27  # pairs at a time on a GPU, which wants more at once: 0.5 GB a matrix

def circle_loss(features, labels, margin=0.25, gamma=32.0):
    """The Circle loss of features (N, d) with integer labels (N,), a scalar (Sun et al. 2020).

    Every row is an anchor once. Let s_p be its cosine similarities to the others of its class, the
    positives, and s_n those to the other classes, the negatives. With margin m, its loss is

        L = log(1 + sum_n exp(gamma a_n (s_n - m)) * sum_p exp(-gamma a_p (s_p - (1 - m))))
        a_p = [1 + m - s_p]_+       a_n = [s_n + m]_+       both constants for the gradient

    It wants s_p > 1 - m and s_n < m. The weights a_p, a_n are large for pairs that are far from
    that and shrink as they are solved. They carry no gradient, since they say how hard to pull, not
    where to: with one, every pair would also be pulled towards having a small weight. Returned is
    the mean over the anchors that have a positive and a negative, or 0 (with a gradient of zeros).

    The value may rise while the classes separate. Multiplied out, a_n (s_n - m) = s_n^2 - m^2 is
    least at s_n = 0, but with a_n held the gradient pushes on to s_n = -m. So watch similarities.

    No gamma overflows: sums of exponentials are taken relative to their largest term. The loss is
    in fp32, or in fp64 for fp64 features, under any autocast. ValueError for other shapes."""
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)}, labels {tuple(labels.shape)}: they "
                         "should be (N, d) and (N,)")
    precision = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(precision), dim=1)
        return CircleLoss.apply(x, labels, margin, gamma)

class CircleLoss(torch.autograd.Function):
    """The loss of unit vectors x (N, d), with its gradient by hand.

    By hand, because autograd would keep a dozen matrices of all pairs: at N = 4,096 this takes a
    fifth to a twentieth of the time, and a tenth of the memory or less, of the usual way.

    Cosines are at most 1, so each weight makes a square of its pair. With t = s_p - 1 for a
    positive (a_p = m - t) and t = max(s_n, -m) for a negative (a_n = t + m), both look alike:

        e_p = -gamma a_p (s_p - (1 - m)) = gamma (t^2 - m^2)     de_p/ds_p, a_p held: gamma (t - m)
        e_n =  gamma a_n (s_n - m)       = gamma (t^2 - m^2)     de_n/ds_n, a_n held: gamma (t + m)

    The code works with t sqrt(gamma), whose square is the exponent but for the constant gamma m^2.
    There are no masks: the anchors of a class meet their positives, themselves among them, as one
    matrix and their negatives as another. And there is no matrix of all pairs: the anchors come in
    strips of rows, and memory is O(N d + strip * N).

    With Z_p = sum_p exp(e_p) and Z_n likewise, an anchor's loss is log(1 + Z_n Z_p), so

        dL/ds_n = sigmoid(log Z_n + log Z_p)  exp(e_n) / Z_n  de_n/ds_n         and for s_p alike.

    The loss is a mean, so this gradient is known as soon as a strip's sums are. It is computed in
    the forward pass, and the backward pass multiplies it by what comes back."""

    @staticmethod
    def forward(ctx, x, labels, m, gamma):
        root = gamma ** 0.5
        strip = STRIP if x.is_cpu else max(STRIP, GPU_STRIP_PAIRS // len(x))
        total = x.new_zeros(())
        anchors = 0
        grad = torch.zeros_like(x)
        for label in labels.unique():
            positives = (labels == label).nonzero()[:, 0]
            negatives = (labels != label).nonzero()[:, 0]
            if len(positives) == 1 or len(negatives) == 0:
                continue
            anchors += len(positives)
            x_p = x[positives]                                           # (P, d)
            x_n = x[negatives]                                           # (Q, d)
            grad_p = torch.zeros_like(x_p)
            grad_n = torch.zeros_like(x_n)
            for rows in torch.arange(len(x_p), device=x.device).split(strip):    # which of x_p
                scaled = root * x_p[rows]                                # (strip, d)
                t_p = (scaled @ x_p.T).sub_(root)             # (strip, P): sqrt(gamma) (s_p - 1)
                t_n = (scaled @ x_n.T).clamp_(min=-root * m)  # (strip, Q): sqrt(gamma) max(s_n, -m)
                log_p, sum_p, terms_p = exponentials(t_p, itself=rows)
                log_n, sum_n, terms_n = exponentials(t_n)
                log_z = log_p + log_n - 2 * gamma * m * m                # (strip,): log(Z_p Z_n)
                # log(1 + e^x) to the last digit; F.softplus returns x from x = 20 on
                total += torch.logaddexp(log_z, torch.zeros_like(log_z)).sum()
                if not ctx.needs_input_grad[0]:                     # nobody asks for a gradient
                    continue
                # dL/ds = pull * terms * slope. In place, for these matrices are needed no more;
                # pull belongs to a row and scales the narrow (strip, d) side of the products.
                t_p -= root * m
                t_n += root * m
                slopes_p = terms_p.mul_(t_p)                             # (strip, P)
                slopes_n = terms_n.mul_(t_n)                             # (strip, Q)
                pull_p = (log_z.sigmoid() / sum_p)[:, None]              # (strip, 1)
                pull_n = (log_z.sigmoid() / sum_n)[:, None]
                # gamma is this root, times the one in slopes; of anchors, then of partners
                grad_p[rows] += root * (pull_p * (slopes_p @ x_p) + pull_n * (slopes_n @ x_n))
                grad_p.addmm_(slopes_p.T, pull_p * scaled)
                grad_n.addmm_(slopes_n.T, pull_n * scaled)
            grad[positives] += grad_p
            grad[negatives] += grad_n
        anchors = max(anchors, 1)
        ctx.save_for_backward(grad / anchors)
        return total / anchors

    @staticmethod
    @once_differentiable
    def backward(ctx, weight):
        grad, = ctx.saved_tensors
        return weight * grad, None, None, None

def exponentials(t, itself=None):
    """Three things for each row of t (rows, columns): the log of its sum of exp(t^2), (rows,); that
    sum relative to its largest term, (rows,); and the terms relative to it, (rows, columns).
    `itself` (rows,) names a column of each row that does not count."""
    exponents = t.square()
    if itself is not None:
        exponents[torch.arange(len(t), device=t.device), itself] = -torch.inf
    largest = exponents.amax(1)                                          # (rows,)
    # At least e^-80, for `itself` too: it adds nothing to a sum of 1 or more, and smaller
    # numbers are denormal in fp32, which takes a CPU 50 times as long.
    terms = exponents.sub_(largest[:, None]).clamp_(min=-80).exp_()
    sums = terms.sum(1)
    return largest + sums.log(), sums, terms

# ---- 2. The objective of refinement --------------------------------------------------------------

def refinement_loss(model, base, prompts, labels, tokens, targets, mean, s):
    """What refinement minimises on one batch, a scalar:

        Circle loss of h_x  +  hold * (drift of h_x, harmless prompts  +  of its length, toxic ones)
                            +  still * drift of h, texts to hold
                            +  keep * KL(base || model), texts to hold

    The first term is the paper's. The others are ours (`drift` and `forgetting` are below): what is
    harmless stays where the base has it, what is toxic turns away and keeps its length. A cosine is
    blind to length: left free, toxic states grow fivefold, and a step of tuning moves them less.

    model, base     the GPT that is refined, and the GPT from which it started
    prompts         lists of token ids, half of them D_seemingly's
    labels          (n,): 0 harmless, 1 toxic
    tokens, targets (B, T) texts to hold, from `data.collate`: general ones, and D_seemingly's
    mean            (width,) the base's mean state over all prompts of refinement: see `drift`
    s               `train.Settings`; read here: layer, margin, gamma, hold, still, keep"""
    l = s.layer
    states = last_states(model, prompts, l)                              # (n, width): h_x
    loss = circle_loss(states, labels, margin=s.margin, gamma=s.gamma)
    if s.hold:
        harmless = labels == 0
        with torch.no_grad():
            base_states = last_states(base, prompts, l)
        loss = loss + s.hold * drift(states[harmless], base_states[harmless], mean)
        lengths = states[~harmless].norm(dim=1)                          # (toxic ones,)
        base_lengths = base_states[~harmless].norm(dim=1)
        loss = loss + s.hold * drift(lengths, base_lengths, 0)
    if not (s.still or s.keep):
        return loss
    inside = targets >= -1                       # (B, T): prompts (-1) too, but not padding (-2)
    hidden = model(tokens, upto=l)                                       # (B, T, width)
    with torch.no_grad():
        base_hidden = base(tokens, upto=l)
    if s.still:
        loss = loss + s.still * drift(hidden[inside], base_hidden[inside], mean)
    if s.keep:
        logits = model.tail(hidden, l)[inside]                           # (inside, vocabulary)
        with torch.no_grad():
            base_logits = base.tail(base_hidden, l)[inside]
        loss = loss + s.keep * forgetting(logits, base_logits)
    return loss

def drift(hidden, base_hidden, centre):
    """How far states (n, d) or lengths (n,) went: ||h - h_base||^2 / ||h_base - centre||^2."""
    moved = (hidden - base_hidden).square().sum()
    size = (base_hidden - centre).square().sum()
    return moved / size.clamp(min=1e-30)                 # no rows, as random labels may give: 0

def forgetting(logits, base_logits):
    """How answers changed: KL(base || model) of the next token, mean over positions; logits (n, V).
    Unlike the likelihood of some text it has nothing to teach, only something to keep."""
    base_log_p = base_logits.float().log_softmax(-1)
    log_p = logits.float().log_softmax(-1)
    # torch's kl_div(log q, log p) is KL(p || q); "batchmean" is the sum over V, mean over n
    return F.kl_div(log_p, base_log_p, log_target=True, reduction="batchmean")

# ---- 3. The kernel, exactly or as the paper estimates it -----------------------------------------

def gradient_products(model, prompts, l, read, inside=None):
    """(r, {group: G}): r = read(h) (n, k), and the inner products of its gradients with respect to
    all parameters below the head,
        G[i, j] = dr(x_i)/dtheta  dr(x_j)/dtheta^T,      G (n, n, k, k).

    h (n, width) is the stream after block l at the last token of each of n prompts (lists of ids),
    and `read` any function of it, with no parameters but the final norm's, which count, and the
    head's, which do not. G comes in groups of parameters: embeddings, block 1 ... block l, final
    norm; or, if `inside` lists modules, of those in them alone. Products are in fp32, sums in fp64.

    No gradient of a weight is formed, and k backward passes are enough: prompts do not meet in a
    batch, so the gradient of a sum over prompts is each prompt's own. A linear map u_t = W a_t at
    tokens t adds sum_t B_t a_t^T to the gradient of W, where B_t = dr/du_t is the signal that comes
    back to u_t. So its share of G is

        sum over t', t of  <a'_t', a_t>  B'_t' B_t^T :

    what two prompts have in common going up, times what they have in common coming down. (For whole
    networks see Novak et al. 2022, arXiv 2206.08720: "structured derivatives".)"""
    calls = []                                    # (module, input a, output u), as they ran
    def record(module, inputs, output):
        calls.append((module, inputs[0].detach(), output))
    hooks = []
    roots = [model] if inside is None else inside
    for root in roots:
        for module in root.modules():
            has_weight = isinstance(module, (nn.Linear, nn.Embedding, RMSNorm))
            if has_weight and module is not model.lm_head:
                hooks.append(module.register_forward_hook(record))
    try:
        with torch.enable_grad(), torch.autocast(model.cos.device.type, enabled=False):
            r = read(last_states(model, prompts, l))                     # (n, k)
    finally:
        for hook in hooks:
            hook.remove()

    outputs = [output for _, _, output in calls]
    signals = []                                  # k times: dr/du of every call
    for i in range(r.shape[1]):
        signals.append(torch.autograd.grad(r[:, i].sum(), outputs, retain_graph=True))
    names = {module: name for name, module in model.named_modules()}
    groups = {}
    for call, (module, a, _) in enumerate(calls):
        B = torch.stack([signal[call] for signal in signals], dim=1)     # (n, k, T, out)
        group = group_of(names[module])
        groups[group] = groups.get(group, 0) + products_of_call(module, a, B).double()
    return r.detach(), groups

def products_of_call(module, a, B):
    """One module's share (n, n, k, k) of `gradient_products`, from its inputs a (n, T, in) and the
    signals B (n, k, T, out). Padding has no share: no signal comes back to it."""
    n, k = B.shape[:2]
    if isinstance(module, RMSNorm):               # u = weight * a / rms(a): dr/dweight is a sum
        width = a.shape[-1]
        unit = F.rms_norm(a.float(), (width,), eps=module.eps)
        by_token = (B * unit[:, None]).view(n, k, -1, width)     # -1: T, T * heads, at the end 1
        g = by_token.sum(2)                                              # (n, k, width)
        return torch.einsum("ipw,jqw->ijpq", g, g)
    if isinstance(module, nn.Embedding):          # a linear map of one-hot vectors; a (n, T) ids
        overlap = (a[:, :, None, None] == a).to(B.dtype)                 # (n, T', n, T)
    else:
        overlap = torch.einsum("itc,jsc->itjs", a, a)                    # (n, T', n, T)
        if module.bias is not None:
            overlap = overlap + 1                 # a bias is the weight of one more input, always 1
    G = B.new_empty(n, n, k, k)
    for i in range(n):                            # one by one, to save memory
        by_prompt = overlap[i].transpose(0, 1)                           # (n, T', T)
        mixed = by_prompt[i:, None] @ B[i:]    # (n - i, k, T', out): sum over t of <a'_t', a_t> B_t
        product = B[i].reshape(k, -1) @ mixed.reshape((n - i) * k, -1).T     # (k, (n - i) k)
        from_i = product.view(k, n - i, k).transpose(0, 1)               # (n - i, k, k)
        G[i, i:] = from_i
        G[i:, i] = from_i.transpose(1, 2)         # G(x, x') is the transpose of G(x', x)
    return G

def group_of(name):
    """The group of a parameter or module: that of "layers.2.mlp.up_proj" is "block 3"."""
    if name.startswith("layers."):
        return f"block {int(name.split('.')[1]) + 1}"
    others = {"embed_tokens": "embeddings", "norm": "final norm", "lm_head": "head"}
    return others[name.split(".")[0]]

@dataclass
class Kernel:
    """K(x', x) = dz(x')/dtheta dz(x)/dtheta^T of all pairs of n prompts, in small pieces.
    The V logits of the first response token are z = W h: W is the head, and h the stream after the
    last block and the final norm. With G = dh(x')/dtheta dh(x)/dtheta^T over the parameters below
    the head, and the gradient of the head itself added,

        K(x', x) = W G W^T + <h', h> I.

    No V x V matrix is needed, and d backward passes do the work of V. Exact for an untied head."""
    W: torch.Tensor          # (V, d)
    h: torch.Tensor          # (n, d), after the final norm
    groups: dict             # {group: G (n, n, d, d)}

    def pieces(self, only=None):
        """G (n, n, d, d) and <h', h> (n, n), summed over the groups in `only` (default: all)."""
        only = [*self.groups, "head"] if only is None else only
        n, d = self.h.shape
        of_head = float("head" in only)
        G = sum([self.groups[group] for group in only if group != "head"])
        return self.h.new_zeros(n, n, d, d) + G, of_head * (self.h @ self.h.T)

    def norms(self, only=None):
        """||K(x', x)||_F, (n, n). Its square, multiplied out with M = W^T W and inner = <h', h>, is
        tr(G^T M G M) + 2 inner tr(G M) + inner^2 V."""
        G, inner = self.pieces(only)
        M = self.W.T @ self.W                                            # (d, d), symmetric
        quadratic = (G * (M @ G @ M)).sum((2, 3))     # tr(A^T B): sum of the elementwise product
        linear = (G * M).sum((2, 3))
        squared = quadratic + 2 * inner * linear + inner.square() * len(self.W)
        return squared.clamp(min=0).sqrt()

def kernel(model, prompts):
    """The exact `Kernel` of prompts (lists of ids). ValueError for a model with a tied head."""
    if model.config.tied:
        raise ValueError("a tied head has no exact kernel here: its embeddings are used twice")
    h, groups = gradient_products(model, prompts, model.config.blocks, model.norm)
    return Kernel(model.lm_head.weight.detach().double(), h.double(), groups)

def kernel_norms(model, prompts):
    """||K(x', x)||_F of all pairs of prompts (lists of ids), (n, n): exact for the small GPT, which
    costs n^2 width^2 numbers and needs an untied head. Other models get what the paper measures, of
    each prompt its own 10 likeliest logits and the last 4 blocks: not to be compared with that."""
    if model.config.width <= 128 and not model.config.tied:
        return kernel(model, prompts).norms()
    if model.lm_head.weight.dtype != torch.float32:                      # matrices in bf16
        model = copy.deepcopy(model).float()
    def likeliest(h):
        return model.lm_head(model.norm(h)).topk(10).values              # (n, 10)
    blocks = model.config.blocks
    _, groups = gradient_products(model, prompts, blocks, likeliest, inside=model.layers[-4:])
    return torch.linalg.matrix_norm(sum(groups.values()))
