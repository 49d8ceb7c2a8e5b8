"""Contrastive refinement: separate toxic from seemingly toxic prompts before refusals are taught.

This file is the method of "Discern Truth from Falsehood: Reducing Over-Refusal via Contrastive
Refinement" (arXiv 2603.03323), in the rest of the project called "the paper". Three sections:

1. The Circle loss (Sun et al. 2020, arXiv 2002.10857). It makes the states of one class alike and
   those of two classes unlike.
2. The objective of refinement: the Circle loss on the states h_x after block l, plus two terms that
   keep the model what it was otherwise. Whoever wants to change the method changes this section.
3. Why that should help. A refusal taught on a prompt x moves every other prompt x' in proportion
   to their kernel K(x', x) = dz(x')/dtheta dz(x)/dtheta^T. Here z are the logits of the first
   response token. With pi their softmax and e_y the one-hot vector of the token y, a step of SGD on
   (x, y) with learning rate eta makes

       Delta z(x') = -eta K(x', x) (pi(x) - e_y) + O(eta^2).

   With all parameters after block l frozen, Proposition 1 of the paper bounds K by a similarity of
   states, ||K(x', x)||_F <= c_l h_x'^T Q_l h_x + slack. So prompts whose states are unlike should
   not share refusals. This section computes K and every term of the bound exactly.

There is no training here. Read `train.py` next.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import Packed, RMSNorm, last_states, right_padded

# --------------------------------------------------------------------------------------------------
# 1. The Circle loss

STRIP = 256                # anchors compared at a time on a CPU: their cosines fit in its cache
GPU_STRIP_PAIRS = 2 ** 27  # pairs at a time on a GPU, which wants more work at once: 0.5 GB

def circle_loss(features, labels, references=None, reference_labels=None, margin=0.25, gamma=32.0,
                own=None):
    """The Circle loss of features (N, d) with integer labels (N,), a scalar (Sun et al. 2020).

    Every row is an anchor once. Let s_p be its cosine similarities to the others of its class, the
    positives, and s_n those to the other classes, the negatives. With margin m, its loss is

        L = log(1 + sum_n exp(gamma a_n (s_n - m)) * sum_p exp(-gamma a_p (s_p - (1 - m))))
        a_p = [1 + m - s_p]_+       a_n = [s_n + m]_+       both constants for the gradient

    It wants s_p > 1 - m and s_n < m. The weights a_p, a_n are large for pairs that are far from
    that and vanish for solved ones. They carry no gradient, since they say how hard to pull, not
    where to: with one, every pair would also be pulled towards having a small weight. Returned is
    the mean over the anchors that have a positive and a negative, or 0 (with a gradient of zeros).

    The value may rise while the classes separate. With a_n as it is, a_n (s_n - m) = s_n^2 - m^2,
    which is least at s_n = 0, while the gradient goes on to s_n = -m. So watch the similarities.

    No gamma overflows: sums of exponentials are taken relative to their largest term. The loss is
    computed in fp32, or in fp64 for fp64 features, under any autocast.

    Positives and negatives are sought among `references` (M, d) with `reference_labels` (M,), for
    example a memory bank or the batches of other workers; by default among the anchors. If the
    anchors are rows own, own + 1, ... of the references, say so, and none is compared with itself.
    ValueError for other shapes.
    """
    if (references is None) != (reference_labels is None):
        raise ValueError("references and reference_labels come together")
    if references is None:
        references = features
        reference_labels = labels
        own = 0
    for x, x_labels in ((features, labels), (references, reference_labels)):
        fits = x.dim() == 2 and x.shape[1] == features.shape[1] and x_labels.shape == x.shape[:1]
        if not fits:
            raise ValueError(f"features {tuple(x.shape)} with labels {tuple(x_labels.shape)}: they "
                             "should be (N, d) and (N,), those of references (M, d) and (M,)")
    precision = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        anchors = F.normalize(features.to(precision), dim=1)
        others = F.normalize(references.to(precision), dim=1)
        return CircleLoss.apply(anchors, others, labels, reference_labels, margin, gamma, own)

class CircleLoss(torch.autograd.Function):
    """The loss of unit vectors x (N, d) among unit vectors y (M, d), with its gradient by hand.

    Cosines are at most 1, so each weight makes a square of its pair. With t = s_p - 1 for a
    positive and t = max(s_n, -m) for a negative, both exponents l and both slopes look alike:

        l_p = -gamma a_p (s_p - (1 - m)) = gamma (t^2 - m^2)     dl_p/ds_p, a_p held: gamma (t - m)
        l_n =  gamma a_n (s_n - m)       = gamma (t^2 - m^2)     dl_n/ds_n, a_n held: gamma (t + m)

    In the code, sqrt(gamma) is taken into the anchors, a = sqrt(gamma) x, so that a y^T gives
    t sqrt(gamma) at once, and its square is the exponent, but for the constant gamma m^2. There are
    no masks: the anchors of a class meet their positives as one matrix and their negatives as
    another. And there is no matrix of all pairs: the anchors come in strips of rows, and memory is
    O((N + M) d + strip * M).

    With Z_p = sum_p exp(l_p) and Z_n likewise, an anchor's loss is log(1 + Z_n Z_p), so

        dL/ds_n = sigmoid(log Z_n + log Z_p)  exp(l_n) / Z_n  dl_n/ds_n         and for s_p alike.

    The loss is a mean, so this gradient is known as soon as a strip's sums are. It is computed in
    the forward pass, and the backward pass multiplies it by what comes back.
    """

    @staticmethod
    def forward(ctx, x, y, x_labels, y_labels, m, gamma, own):
        root = gamma ** 0.5
        strip = STRIP if x.is_cpu else max(STRIP, GPU_STRIP_PAIRS // len(y))
        total = x.new_zeros(())
        anchors = 0
        grad_x = torch.zeros_like(x)
        grad_y = torch.zeros_like(y)
        for label in x_labels.unique():
            positives = (y_labels == label).nonzero()[:, 0]              # rows of y, ascending
            negatives = (y_labels != label).nonzero()[:, 0]
            partners = len(positives) if own is None else len(positives) - 1       # not itself
            if partners == 0 or len(negatives) == 0:
                continue
            y_p = y[positives]                                           # (P, d)
            y_n = y[negatives]                                           # (Q, d)
            grad_p = torch.zeros_like(y_p)
            grad_n = torch.zeros_like(y_n)
            of_class = (x_labels == label).nonzero()[:, 0]
            anchors += len(of_class)
            for rows in of_class.split(strip):
                a = root * x[rows]                                       # (strip, d)
                t_p = (a @ y_p.T).sub_(root)              # (strip, P): sqrt(gamma) (s_p - 1)
                t_n = (a @ y_n.T).clamp_(min=-root * m)   # (strip, Q): sqrt(gamma) max(s_n, -m)
                itself = None if own is None else torch.searchsorted(positives, rows + own)
                log_p, sum_p, terms_p = exponentials(t_p, itself)
                log_n, sum_n, terms_n = exponentials(t_n)
                log_z = log_p + log_n - 2 * gamma * m * m                # (strip,): log(Z_p Z_n)
                # log(1 + e^x) to the last digit; F.softplus returns x from x = 20 on
                total += torch.logaddexp(log_z, torch.zeros_like(log_z)).sum()
                if not any(ctx.needs_input_grad):
                    continue
                slopes_p = terms_p.mul_(t_p.sub_(root * m))              # (strip, P)
                slopes_n = terms_n.mul_(t_n.add_(root * m))              # (strip, Q)
                # What belongs to a row scales the narrow (strip, d) side of the products.
                pull_p = (log_z.sigmoid() / sum_p)[:, None]              # (strip, 1)
                pull_n = (log_z.sigmoid() / sum_n)[:, None]
                grad_x[rows] = root * (pull_p * (slopes_p @ y_p) + pull_n * (slopes_n @ y_n))
                grad_p.addmm_(slopes_p.T, pull_p * a)
                grad_n.addmm_(slopes_n.T, pull_n * a)
            grad_y[positives] += grad_p
            grad_y[negatives] += grad_n
        anchors = max(anchors, 1)
        ctx.save_for_backward(grad_x / anchors, grad_y / anchors)
        return total / anchors

    @staticmethod
    @once_differentiable
    def backward(ctx, weight):
        grad_x, grad_y = ctx.saved_tensors
        return weight * grad_x, weight * grad_y, None, None, None, None, None

def exponentials(t, left_out=None):
    """Of exponents t^2 (rows, columns): log sum exp(t^2) of each row, (rows,); then the sum and its
    terms, both relative to the largest term of the row, (rows,) and (rows, columns).

    `left_out` (rows,) names a column of each row that does not count.
    """
    exponents = t.square()
    if left_out is not None:
        exponents[torch.arange(len(t), device=t.device), left_out] = -torch.inf
    largest = exponents.amax(1)                                          # (rows,)
    # Nothing below e^-80: such numbers are denormal in fp32 and take a CPU 50 times as long.
    terms = exponents.sub_(largest[:, None]).clamp_(min=-80).exp_()
    sums = terms.sum(1)
    return largest + sums.log(), sums, terms

# --------------------------------------------------------------------------------------------------
# 2. The objective of refinement

def refinement_loss(model, base, prompts, labels, tokens, texts, mean, s):
    """What refinement minimises on one batch, a scalar:

        Circle loss of h_x   +   still * drift of h   +   keep * KL(base || model)

    The first term is the paper's. The other two are ours: they hold the model to the base on
    general texts, where nothing is to be separated. `train.refine` trains blocks 1 to l alone.

    model, base     the GPT that is refined, and the GPT from which it started
    prompts, labels half of each class, D_seemingly and D_toxic: lists of token ids; classes (n,)
    tokens, texts   (B, T) general texts, packed by `data.collate`
    mean            (width,) the base's mean state over all prompts of refinement
    s               `train.Settings`; read here: layer, margin, gamma, centre, still, keep
    """
    l = s.layer
    states = last_states(model, prompts, l)                              # (n, width): h_x
    if s.centre:
        states = states - mean
    loss = circle_loss(states, labels, margin=s.margin, gamma=s.gamma)

    packed = Packed(texts)
    inside = texts >= 0                                                  # (B, T): not padding
    hidden = model(tokens, upto=l, cache=packed)                         # (B, T, width)
    with torch.no_grad():
        base_hidden = base(tokens, upto=l, cache=packed)
    loss = loss + s.still * drift(hidden[inside], base_hidden[inside], mean)
    if s.keep:
        logits = model.tail(hidden, l, packed)[inside]                   # (tokens, vocabulary)
        with torch.no_grad():
            base_logits = base.tail(base_hidden, l, packed)[inside]
        loss = loss + s.keep * forgetting(logits, base_logits)
    return loss

def drift(hidden, base_hidden, centre):
    """How far states (n, d) moved: ||h - h_base||^2 / ||h_base - centre||^2, each a sum."""
    moved = (hidden - base_hidden).square().sum()
    size = (base_hidden - centre).square().sum()
    return moved / size

def forgetting(logits, base_logits):
    """How answers changed: KL(base || model) of the next token, mean over positions; logits (n, V).

    Unlike the likelihood of some text it has nothing to teach, only something to keep.
    """
    base_log_p = base_logits.float().log_softmax(-1)
    log_p = logits.float().log_softmax(-1)
    return F.kl_div(log_p, base_log_p, log_target=True, reduction="sum") / len(base_log_p)

# --------------------------------------------------------------------------------------------------
# 3. The kernel, what it predicts, and the bound. The evaluation needs `kernel_norms` and what it
#    calls; `Kernel.between` and everything from `first_order` on is for `theory.ipynb`.

def gradient_products(model, prompts, read, l=None, inside=None):
    """(r, {group: G}): r = read(h) (n, k) and the inner products of its gradients, by group,

        G[i, j] = dr(x_i)/dtheta  dr(x_j)/dtheta^T,      G (n, n, k, k), fp64.

    h (n, width) is the stream after block l (default: the last) at the last token of each of n
    prompts (lists of ids), and `read` any function of it. The groups of parameters are embeddings,
    block 1 ... block L, final norm: all that h and `read` depend on but the head, or what lies in
    the modules `inside`. What this means is `gradient_products_plain`, below.

    It takes k backward passes, for prompts do not meet in a batch: the gradient of a sum over
    prompts is each prompt's own. No gradient of a weight is ever formed. A linear map u_t = W a_t
    at tokens t adds sum_t B_t a_t^T to the gradient of W, where B_t = dr/du_t is the signal that
    comes back to u_t. So its share of G is

        sum over t', t of  <a'_t', a_t>  B'_t' B_t^T :

    what two prompts have in common going up, times what they have in common coming down. (For whole
    networks: Novak et al. 2022, arXiv 2206.08720, "structured derivatives".)
    """
    blocks = model.config.blocks if l is None else l
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
            r = read(last_states(model, prompts, blocks))                # (n, k)
    finally:
        for hook in hooks:
            hook.remove()

    outputs = [output for _, _, output in calls]
    signals = []                                  # for each of the k numbers, dr/du of every call
    for i in range(r.shape[1]):
        signals.append(torch.autograd.grad(r[:, i].sum(), outputs, retain_graph=True))
    names = {module: name for name, module in model.named_modules()}
    groups = {}
    for call, (module, a, _) in enumerate(calls):
        B = torch.stack([signal[call] for signal in signals], dim=1)     # (n, k, T, out)
        group = group_of(names[module])
        groups[group] = groups.get(group, 0) + fp64(products_of_call(module, a, B))
    return r.detach(), groups

def products_of_call(module, a, B):
    """One module's share (n, n, k, k) of `gradient_products`, from its inputs a (n, T, in) and the
    signals B (n, k, T, out). The embedding's inputs are (n, T), the final norm has no axis T."""
    n, k = B.shape[:2]
    if isinstance(module, RMSNorm):                       # u = weight * a / rms(a), elementwise
        width = a.shape[-1]
        unit = F.rms_norm(a.float(), (width,), eps=module.eps)
        g = (B * unit[:, None]).view(n, k, -1, width).sum(2)             # (n, k, width): dr/dweight
        return torch.einsum("ipw,jqw->ijpq", g, g)
    if isinstance(module, nn.Embedding):                  # a linear map of one-hot vectors
        overlap = (a[:, :, None, None] == a).to(B.dtype)                 # (n, T', n, T)
    else:
        overlap = torch.einsum("itc,jsc->itjs", a, a)                    # (n, T', n, T)
        if module.bias is not None:
            overlap = overlap + 1                         # the weight of one more input, always 1
    G = B.new_empty(n, n, k, k)
    for i in range(n):                                    # all pairs at once: n times the memory
        by_prompt = overlap[i].transpose(0, 1)[:, None]                  # (n, 1, T', T)
        mixed = by_prompt @ B                                            # (n, k, T', out)
        product = B[i].reshape(k, -1) @ mixed.view(n * k, -1).T          # (k, T' out) (T' out, n k)
        G[i] = product.view(k, n, k).transpose(0, 1)                     # (n, k, k)
    return G

def gradient_products_plain(model, prompts, read, l=None):
    """What `gradient_products` means, all groups together: every gradient written out. (r, G)."""
    blocks = model.config.blocks if l is None else l
    r = read(last_states(model, prompts, blocks))                        # (n, k)
    below = [p for name, p in model.named_parameters() if group_of(name) != "head"]
    rows = []
    for number in r.flatten():
        gradients = torch.autograd.grad(number, below, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    J = fp64(torch.stack(rows)).view(*r.shape, -1)                       # (n, k, parameters)
    return r.detach(), torch.einsum("ipw,jqw->ijpq", J, J)

def fp64(x):
    """x in double precision; on the CPU if its device has none, like Apple's GPUs."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.double()

def group_of(name):
    """The group of a parameter or module: that of "layers.2.mlp.up_proj" is "block 3"."""
    if name.startswith("layers."):
        return f"block {int(name.split('.')[1]) + 1}"
    others = {"embed_tokens": "embeddings", "norm": "final norm", "lm_head": "head"}
    return others[name.split(".")[0]]

@dataclass
class Kernel:
    """K(x', x) = J(x') J(x)^T of all pairs of n prompts, J = dz/dtheta, in small pieces.

    z = W h are the V logits of the first response token. With G = dh(x')/dtheta dh(x)/dtheta^T over
    the parameters below the head, and the gradient of the head itself added,

        K(x', x) = W G W^T + <h', h> I.

    No V x V matrix is needed, and d backward passes do the work of V. Exact for an untied head.
    """
    W: torch.Tensor          # (V, d) the head
    h: torch.Tensor          # (n, d) the final, normed state: z = W h
    groups: dict             # {group: G (n, n, d, d)} below the head

    def pieces(self, only=None):
        """G (n, n, d, d) and <h', h> (n, n), summed over the groups in `only` (default: all)."""
        if only is None:
            only = [*self.groups, "head"]
        n, d = self.h.shape
        G = self.h.new_zeros(n, n, d, d)
        inner = self.h.new_zeros(n, n)
        for group in only:
            if group == "head":
                inner = self.h @ self.h.T
            else:
                G = G + self.groups[group]
        return G, inner

    def norms(self, only=None):
        """||K(x', x)||_F, (n, n). Its square, multiplied out with M = W^T W and inner = <h', h>, is
        tr(G^T M G M) + 2 inner tr(G M) + inner^2 V."""
        G, inner = self.pieces(only)
        M = self.W.T @ self.W                                            # (d, d), symmetric
        quadratic = (G * (M @ G @ M)).sum((2, 3))     # tr(A^T B): sum of the elementwise product
        linear = (G * M).sum((2, 3))
        squared = quadratic + 2 * inner * linear + inner.square() * len(self.W)
        return squared.clamp(min=0).sqrt()

    def between(self, left, right, only=None):
        """left_i^T K(x_i, x_j) right_j of all pairs, (n, n), for left, right (n, V)."""
        G, inner = self.pieces(only)
        left = fp64(left)
        right = fp64(right)
        below = torch.einsum("id,ijde,je->ij", left @ self.W, G, right @ self.W)
        return below + inner * (left @ right.T)

def kernel(model, prompts):
    """The exact `Kernel` of prompts (lists of ids). ValueError for a model with a tied head."""
    if model.config.tied:
        raise ValueError("a tied head has no exact kernel here: its embeddings are used twice")
    h, groups = gradient_products(model, prompts, model.norm)
    return Kernel(fp64(model.lm_head.weight.detach()), fp64(h), groups)

def kernel_norms(model, prompts):
    """||K(x', x)||_F of all pairs of prompts (lists of ids), (n, n): exact for the small GPT.

    Exactness costs width^2 numbers a pair and needs an untied head. Other models get an estimate of
    the kind that the paper uses: the 10 likeliest logits of each prompt and the last 4 blocks. The
    two are different quantities: compare models within one kind.
    """
    if model.config.width <= 128 and not model.config.tied:
        return kernel(model, prompts).norms()

    def likeliest(h):
        return model.lm_head(model.norm(h)).topk(10).values              # (n, 10)

    _, groups = gradient_products(model, prompts, likeliest, inside=model.layers[-4:])
    return sum(groups.values()).square().sum((2, 3)).sqrt()

@torch.no_grad()
def first_order(model, prompts, parameters, change):
    """(z, dz), (n, V) each: the logits of the first response token at `parameters` {name: tensor},
    and their derivative along `change` {name: tensor},

        z(theta + change) = z + J change + O(change^2),

    in one forward-mode pass: J is never formed. With change = -eta J(x)^T (pi(x) - e_y), the step
    of SGD on (x, y), dz is -eta K(x', x) (pi(x) - e_y). Any other optimizer's step will do as well.
    """
    tokens, last = right_padded(prompts, model.cos.device)               # (n, T), (n,)
    rows = torch.arange(len(prompts), device=tokens.device)

    def logits(theta):
        return functional_call(model, theta, (tokens,))[rows, last]      # (n, V)

    with sdpa_kernel(SDPBackend.MATH):        # the fused kinds of attention have no forward mode
        return jvp(logits, (parameters,), (change,))

def tail_sensitivity(model, prompts, l):
    """(S, elsewhere): S = dz/dh_x (n, V, d), with h_x the stream after block l at a prompt's last
    token; elsewhere (n,), the share of ||dz/d(stream)||^2 that lies at its other tokens."""
    tokens, last = right_padded(prompts, model.cos.device)               # (n, T), (n,)
    rows = torch.arange(len(prompts), device=tokens.device)
    with torch.no_grad():
        stream = model(tokens, upto=l)                                   # (n, T, d)
    with torch.enable_grad():
        stream.requires_grad_()
        top = model.through_blocks(stream, l, model.config.blocks)
        h = model.norm(top[rows, last])                                  # (n, d): z = W h
        slopes = []
        for i in range(h.shape[1]):
            slopes.append(torch.autograd.grad(h[:, i].sum(), stream, retain_graph=True)[0])
    slopes = torch.stack(slopes, dim=2)                                  # (n, T, of h, of stream)
    at_last = slopes[rows, last]                                         # (n, d, d)
    share = at_last.square().sum((1, 2)) / slopes.square().sum((1, 2, 3))
    return fp64(model.lm_head.weight.detach()) @ fp64(at_last), 1 - share

def bilinear(h, products, ridge=0.1):
    """Q (d, d), positive semi-definite, such that h'^T Q h explains `products`, the inner products
    <g', g> (n, n) of features g of n prompts with states h (n, d).

    Features that were linear in the state, g = Phi h, would have <g', g> = h'^T Phi^T Phi h. Ridge
    regression of g on h gives Phi = g^T S with S = h (h^T h + lambda I)^-1. Then Q = Phi^T Phi =
    S^T <g', g> S needs the inner products alone. `ridge` is lambda over the mean of ||h||^2.
    """
    identity = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    penalty = ridge * h.square().sum(1).mean() * identity
    S = h @ torch.linalg.inv(h.T @ h + penalty)                          # (n, d)
    return S.T @ products @ S

def proposition_1(model, prompts, l, others):
    """Both sides of the paper's Proposition 1 for all pairs of prompts, and every term, in a dict:

        ||K(x', x)||_F <= c h_x'^T Q h_x + sqrt(c) tau (||G_x'||_F + ||G_x||_F) + tau^2 + Delta.

    The paper states that the terms exist, not how to measure them. We read them so:
      h, size      h_x, the stream after block l at the last token; ||G_x||_F for G_x = dh_x/dtheta
                   over the parameters up to block l. (A4, bounded features: both have a maximum)
      c            max ||dz/dh_x||_op^2 over the prompts (A1, bounded tail sensitivity)
      Q            such that tr(G_x' G_x^T) ~ h_x'^T Q h_x (A2, local linearity), by `bilinear` from
                   the prompts `others`, which are not tested
      delta        what A2 leaves open: c times the most by which ||G_x' G_x^T||_F exceeds
                   h_x'^T Q h_x among pairs of different `others`; at least 0
      tau          max ||dz/dtheta_tail||_F over the prompts (A3, weak tail updates)
    The two sides are `left` and `right` with the tail trained; with the tail frozen, tau is 0 and
    they are `left_frozen` and `right_frozen`; (n, n) each. What loosens the bound, (n, n) too:
      products     ||G' G^T||_F           traces     tr(G' G^T)            form    h'^T Q h
      through      ||S' G' G^T S^T||_F for S = dz/dh_x     crossed    the term with sqrt(c) tau
      sensitivity  ||S||_op, (n,)         elsewhere  what passes S by, (n,): `tail_sensitivity`
    All in fp64.
    """
    K = kernel(model, prompts)
    below = ["embeddings"] + [f"block {i}" for i in range(1, l + 1)]
    tail = [group for group in [*K.groups, "head"] if group not in below]

    # A1 and A4
    h, G = states_and_products(model, prompts, l)                        # (n, d), (n, n, d, d)
    S, elsewhere = tail_sensitivity(model, prompts, l)                   # (n, V, d), (n,)
    sensitivity = torch.linalg.matrix_norm(S, 2)                         # (n,)
    c = sensitivity.max() ** 2
    traces = trace(G)
    size = traces.diagonal().sqrt()
    products = G.square().sum((2, 3)).sqrt()

    # A2, on other prompts
    other_h, other_G = states_and_products(model, others, l)
    Q = bilinear(other_h, trace(other_G))
    excess = other_G.square().sum((2, 3)).sqrt() - other_h @ Q @ other_h.T
    excess.fill_diagonal_(0)                              # pairs of different prompts count
    delta = c * excess.max()
    form = h @ Q @ h.T

    # A3: ||dz/dtheta_tail||_F^2 = tr K_tail(x, x) = tr(W^T W G_tail) + <h, h> V
    G_tail, inner = K.pieces(tail)
    tail_traces = trace(G_tail @ (K.W.T @ K.W)) + inner * len(K.W)       # (n, n)
    tau = tail_traces.diagonal().sqrt().max()
    crossed = c.sqrt() * tau * (size[:, None] + size[None, :])

    gram = S.transpose(1, 2) @ S                                         # (n, d, d): S^T S
    through = (G * (gram[:, None] @ G @ gram[None])).sum((2, 3)).sqrt()
    right_frozen = c * form + delta
    return dict(left=K.norms(), right=right_frozen + crossed + tau ** 2,
                left_frozen=K.norms(below), right_frozen=right_frozen,
                h=h, size=size, c=c, Q=Q, delta=delta, tau=tau, products=products, traces=traces,
                form=form, through=through, crossed=crossed, sensitivity=sensitivity,
                elsewhere=elsewhere)

def states_and_products(model, prompts, l):
    """h_x (n, d) and G_x' G_x^T (n, n, d, d), fp64, for G_x = dh_x/dtheta."""
    h, groups = gradient_products(model, prompts, lambda h: h, l)
    return fp64(h), sum(groups.values())

def trace(G):
    """tr G of the last two axes: (..., d, d) -> (...)."""
    return G.diagonal(dim1=-2, dim2=-1).sum(-1)
