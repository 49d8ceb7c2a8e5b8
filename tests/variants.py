"""What if one part of DCR were another? `train.py` with one function replaced; a pattern for your own ideas.

    python tests/variants.py supcon --seed 50 --methods DCR --out out-supcon

The first word names the variant, the rest is for train.py; each variant needs an --out of its own.

  supcon       another contrastive loss in place of the Circle loss (Khosla et al. 2020, arXiv 2004.11362)
  mean         h_x of refinement is the mean state over the prompt, in place of that at its last token
               (so it needs --kernel 0, since the kernel's h is not to change; nor does that of `misfiled`)
  qkv          the LoRA of safety tuning sits on queries, keys and values, in place of all linear maps
               (with --init that of refinement as well)
  all-tokens   safety tuning learns to predict the prompt as well, in place of the response alone

The paper leaves the first two open to the reader. The last two are what its authors' code is said to do."""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dcr                                                             # noqa: E402 (after the path is set)
import train                                                           # noqa: E402

TEMPERATURE = 0.1               # of SupCon, its authors' value; 1 / gamma plays that part in Circle


def supcon_loss(features, labels, margin=None, gamma=None):
    """The SupCon loss of features (N, d) with labels (N,), a scalar: for each anchor the mean over its
    positives p of -log(exp(s_p / T) / sum_a exp(s_a / T)), the sum over all others a, of either class.
    Arguments are those of `dcr.circle_loss`, which it replaces; it has no margin."""
    x = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)                # (N, N)
    with torch.autocast(x.device.type, enabled=False):                           # fp32, as the Circle loss
        similarity = (x @ x.T / TEMPERATURE).masked_fill(itself, -torch.inf)     # (N, N)
    log_share = similarity.log_softmax(1)
    positive = (labels[:, None] == labels[None, :]) & ~itself                    # (N, N)
    per_anchor = log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    return -per_anchor.mean()


def mean_states(model, prompts, l):
    """(n, width): the mean over each prompt's tokens of the stream after block l. As `model.last_states`,
    shorter prompts are padded on the right."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in prompts])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]                    # (n, T)
    device = model.cos.device
    stream = model(tokens.to(device), upto=l)                                    # (n, T, width)
    inside = inside.to(device)[:, :, None]                                       # (n, T, 1)
    return (stream * inside).sum(1) / inside.sum(1)


def unfreeze_qkv(model, blocks, rank, rng):
    """`train.unfreeze`, and then of each LoRA only those on queries, keys and values learn. The others are
    there, so that the random numbers stay the same, and stay zero. Without a LoRA (rank 0, as in refinement
    by default) nothing is other."""
    trained = every_unfreeze(model, blocks, rank, rng)
    if not rank:
        return trained
    model.requires_grad_(False)
    for block in blocks:
        attention = block.self_attn
        for lora in (attention.q_proj, attention.k_proj, attention.v_proj):
            lora.A.requires_grad_(True)
            lora.B.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def exchanges_all_tokens(run, examples, context):
    """`Run.exchanges` with every token due but the first, which nothing foretells."""
    return [(ids, 1) for ids, _ in every_exchanges(run, examples, context)]


every_unfreeze = train.unfreeze
every_exchanges = train.Run.exchanges
every_origin = train.origin
# what is replaced, where, and by what
VARIANTS = {"supcon": ([dcr], "circle_loss", supcon_loss),
            "mean": ([dcr, train], "last_states", mean_states),
            "qkv": ([train], "unfreeze", unfreeze_qkv),
            "all-tokens": ([train.Run], "exchanges", exchanges_all_tokens)}


def main(argv):
    if not argv or argv[0] not in VARIANTS:
        raise ValueError(f"name a variant first: {', '.join(VARIANTS)}; python tests/variants.py NAME --help")
    name = argv[0]
    if name == "mean" and train.parse(argv[1:]).kernel:
        raise ValueError("mean: add --kernel 0; the kernel would be that of mean states as well")
    owners, attribute, replacement = VARIANTS[name]
    for owner in owners:
        setattr(owner, attribute, replacement)

    def origin(settings, device):                                    # so that results say what they are
        made = every_origin(settings, device)
        made["environment"]["variant"] = name
        return made

    train.origin = origin
    train.main(argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
