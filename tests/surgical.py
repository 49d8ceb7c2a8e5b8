"""Surgical, a rival (Wang et al. 2024, arXiv 2410.03415), as one more method of train.py.

    python tests/surgical.py --seed 80 --seeds 10 --kernel 20 --out contest --methods all

All flags are those of train.py; --methods knows "Surgical" as well, and "all" has it. It takes false refusals
out of a tuned model by a change of its weights alone, so what it leaves is a checkpoint like any other. (The
other rival that steers, SCANS, changes no weight: see tests/scans.py.) A pattern for methods of your own."""
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation                                              # noqa: E402 (after the path is set)
import train                                                           # noqa: E402
from model import last_states                                          # noqa: E402


@torch.no_grad()
def surgical(stl, run):
    """(model, log): Surgical (Wang et al. 2024, arXiv 2410.03415) takes false refusals out of a tuned model.
    Let w be the mean state of refused benign prompts less that of answered general ones, and r the
    same of toxic prompts. Made orthogonal to r, w is what only false refusals have. No matrix that
    writes to the stream may write along w: W <- W - w w^T W. Each of the lower 80 % of blocks has
    such a w; the best leaves the fewest false refusals of other prompts, and few other changes."""
    begin = time.time()
    stl = stl.float()                                    # linear algebra wants all digits
    blocks = stl.config.blocks

    def chosen(examples, refused):
        prompts = [e.prompt for e in examples[:500]]
        probabilities = evaluation.refusal_probability(stl, run.chat, prompts).tolist()
        kept = [prompt for prompt, p in zip(prompts, probabilities) if (p > 0.5) == refused]
        return kept[:160]                                # enough for a mean

    def states(model, prompts, l):
        return last_states(model, [run.chat.prompt(prompt) for prompt in prompts], l)

    def log_p(model):                                    # of the first tokens of general answers
        return model.tail(states(model, general, blocks), blocks).log_softmax(-1)

    toxic = chosen(run.parts.toxic, refused=True)
    general = chosen(run.parts.general, refused=False)
    falsely = chosen(run.parts.seemingly, refused=True)
    choose_on = falsely[:len(falsely) // 5]
    falsely = falsely[len(choose_on):]
    best = stl
    least = float("inf")
    tries = int(0.8 * blocks) if toxic and general and choose_on else 0  # else: nothing to take out
    for l in range(1, tries + 1):
        centre = states(stl, general, l).mean(0)                         # (width,)
        r = states(stl, toxic, l).mean(0) - centre
        w = states(stl, falsely, l).mean(0) - centre
        w = F.normalize(w - (w @ r) / (r @ r) * r, dim=0)
        model = copy.deepcopy(stl)
        model.embed_tokens.weight -= torch.outer(model.embed_tokens.weight @ w, w)   # and tied head
        for block in model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight -= torch.outer(w, w @ linear.weight)
        changed = F.kl_div(log_p(model), log_p(stl), log_target=True, reduction="batchmean")
        refused = evaluation.refusal_probability(model, run.chat, choose_on).mean().item()
        if changed <= 0.2 and refused < least:           # KL in nats, Wang et al.'s limit
            best = model
            least = refused
    return best, {"seconds": time.time() - begin, "curve": []}


train.RIVALS["Surgical"] = ("STL", surgical)

if __name__ == "__main__":
    try:
        train.main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
