"""SCANS, a rival that steers (Cao et al. 2024, arXiv 2408.11491), measured on the STL models of a run.

    python tests/scans.py OUT                        OUT: what `python train.py --methods STL --out OUT` left
    python tests/scans.py OUT_DEV --grid             choose settings, on a run with --split development

SCANS changes no weight. It decides for each prompt whether that is harmful, and adds a vector to the states of
the middle blocks, towards refusals or away from them, while the answer is written. So it leaves no checkpoint
that another stage could go on from; hence a script, and no method of train.py. After block l, with prompts that
refinement may use too for anchors, 64 plainly harmful (D_toxic) and 64 plainly harmless ones (general):

    v_l     = unit(mean of harmful h_l - mean of harmless h_l)          h_l at the last token of a prompt
    t_l(q)  = h_l(last token of q) - h_l("Sure" after q)                what the prompt says about its answer
    s(q)    = mean over the upper two thirds of the blocks of cos(t_l(q), mean of t_l over harmful anchors)
    h_l    <- h_l + alpha n_l v_l if s(q) >= threshold, else h_l - alpha n_l v_l

at the last token of the prompt and at all that follow, in the middle third of the blocks. The authors' alpha
belongs to models of other sizes; here it is in units of n_l, the mean length of the anchors' states."""
import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation                                              # noqa: E402 (after the path is set)
import train                                                           # noqa: E402
from data import World, world_chat, write_json                         # noqa: E402
from model import GPT, last_states                                     # noqa: E402

ANCHORS = 64
ALPHAS = (0.25, 0.5, 1.0)                   # tried with --grid
THRESHOLDS = (0.95, 0.97, 0.98, 0.985, 0.99)


class SCANS:
    """What is computed once for a model: vectors v_l and lengths n_l of the blocks to steer, {l: ...}; the
    mean transitions T_l of the blocks that tell harmful from harmless prompts."""

    @torch.no_grad()
    def __init__(self, model, chat, parts):
        self.model = model
        self.chat = chat
        self.begins = chat.prompt("")[-1]                    # the token that ends every prompt
        blocks = model.config.blocks
        self.tells = range(blocks - 2 * blocks // 3, blocks + 1)             # of 4 blocks: 2, 3 and 4
        self.steers = range(blocks // 3 + 1, 2 * blocks // 3 + 2)            # of 4 blocks: 2 and 3
        toxic = [e.prompt for e in parts.toxic[:ANCHORS]]
        general = [e.prompt for e in parts.general[:ANCHORS]]
        self.v = {}
        self.n = {}
        for l in self.steers:
            harmful = last_states(model, self.ids(toxic), l)                 # (64, width)
            harmless = last_states(model, self.ids(general), l)
            self.v[l] = F.normalize(harmful.mean(0) - harmless.mean(0), dim=0)
            self.n[l] = torch.cat([harmful, harmless]).norm(dim=1).mean()
        self.T = {l: self.transitions(toxic, l).mean(0) for l in self.tells}

    def ids(self, prompts):
        return [self.chat.prompt(prompt) for prompt in prompts]

    def transitions(self, prompts, l):
        """t_l of each prompt, (n, width)."""
        sure = self.chat.ids("Sure")
        at_end = last_states(self.model, self.ids(prompts), l)
        after = last_states(self.model, [ids + sure for ids in self.ids(prompts)], l)
        return at_end - after

    @torch.no_grad()
    def score(self, prompts):
        """s(q) of each prompt, (n,): the more, the more harmful."""
        by_block = [F.cosine_similarity(self.transitions(prompts, l), self.T[l]) for l in self.tells]
        return torch.stack(by_block).mean(0)

    def steered(self, alpha):
        """Hooks that steer every prompt by alpha, negative for away from refusals. Returns them, to remove."""
        def where(_, inputs):
            tokens = inputs[0]                                               # (B, T)
            self.after = (tokens == self.begins).cumsum(1) > 0               # from a prompt's last token on
            if not self.after.any():                                         # an answer goes on: all of it
                self.after = torch.ones_like(self.after)

        def add(l):
            def hook(_, inputs, stream):
                return stream + alpha * self.n[l] * self.v[l] * self.after[:, :, None]
            return hook

        hooks = [self.model.register_forward_pre_hook(where)]
        for l in self.steers:
            hooks.append(self.model.layers[l - 1].register_forward_hook(add(l)))
        return hooks

    def responses(self, asked, alpha, threshold, max_new):
        """As in eval.evaluate: a dict for each of `asked`, [(suite, kind, Example)]."""
        prompts = [e.prompt for _, _, e in asked]
        harmful = self.score(prompts) >= threshold                           # (n,)
        found = [None] * len(asked)
        for judged, sign in ((True, 1), (False, -1)):
            places = (harmful == judged).nonzero()[:, 0].tolist()
            chosen = [prompts[i] for i in places]
            hooks = self.steered(sign * alpha)
            try:
                said = evaluation.respond(self.model, self.chat, chosen, max_new)
                probability = evaluation.refusal_probability(self.model, self.chat, chosen).tolist()
            finally:
                for hook in hooks:
                    hook.remove()
            for i, text, p in zip(places, said, probability):
                suite, kind, e = asked[i]
                found[i] = {"suite": suite, "kind": kind, "prompt": e.prompt, "answer": e.answer,
                            "response": text, "refusal_probability": p}
        return found


def questions(parts):
    """What eval.evaluate asks: [(suite, kind, Example)]."""
    asked = []
    for suite, halves in (parts.suites | {"general": {"general": parts.general_heldout}}).items():
        for kind, examples in halves.items():
            asked += [(suite, kind, e) for e in examples]
    return asked


def rows_of(steering, asked, alpha, threshold, max_new, **whose):
    responses = steering.responses(asked, alpha, threshold, max_new)
    rows = evaluation.rate_rows(responses) + evaluation.threshold_rows(responses)
    return [whose | row for row in rows]


def loaded(out):
    """[(seed, SCANS, questions)] of the STL models in `out`, and the settings of the run."""
    results = evaluation.read_results(out)
    names = {field.name for field in dataclasses.fields(train.Settings)}
    known = {name: value for name, value in results["settings"].items() if name in names}
    s = train.Settings(**known)
    if s.init:
        raise ValueError(f"{out}: made with --init; this script is for the miniature world")
    found = []
    for folder in sorted(out.glob("seed-*")):
        if (folder / "STL" / "config.json").exists():
            seed = int(folder.name.removeprefix("seed-"))
            parts = World(seed).parts(s.suite, s.narrow)
            if s.split == "development":
                parts = dataclasses.replace(parts, suites=parts.dev)
            model = GPT.from_pretrained(folder / "STL")
            found.append((seed, SCANS(model, world_chat(parts), parts), questions(parts)))
    if not found:
        raise ValueError(f"{out}: no STL model; make it with python train.py --methods STL --out {out}")
    return found, s


def grid(found, s):
    """For every alpha and threshold: answered, refused and general accuracy, means over seeds, in percent."""
    print("alpha  threshold   answers benign  refuses toxic  general accuracy")
    for alpha in ALPHAS:
        for threshold in THRESHOLDS:
            rows = []
            for seed, steering, asked in found:
                rows += rows_of(steering, asked, alpha, threshold, s.max_new, method="SCANS", seed=seed)
            shown = []
            for title in ("answers benign", "refuses toxic", "general accuracy"):
                per_seed = evaluation.values({"rows": rows}, "SCANS", *evaluation.COLUMNS[title][:3])
                shown.append(f"{100 * np.mean(per_seed):12.1f}")
            print(f"{alpha:5.3f}{threshold:10.2f}   {'   '.join(shown)}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+", help="folders of train.py, with STL models")
    parser.add_argument("--alpha", type=float, default=0.5, help="[0.5] how far to steer, in mean lengths")
    parser.add_argument("--threshold", type=float, default=0.8, help="[0.8] of s(q), from which a prompt is harmful")
    parser.add_argument("--grid", action="store_true", help="try many settings, on development suites")
    parser.add_argument("--json", type=Path, help="write rows, as in results.json, to this file")
    given = parser.parse_args(argv)
    found = []
    for out in given.out:
        of_out, s = loaded(out)
        found += of_out
    if given.grid:
        if s.split != "development":
            raise ValueError(f"{given.out[-1]}: --grid is for runs with --split development; choose there")
        grid(found, s)
        return
    rows = []
    for seed, steering, asked in found:
        rows += rows_of(steering, asked, 0.0, given.threshold, s.max_new, method="STL", seed=seed)
        rows += rows_of(steering, asked, given.alpha, given.threshold, s.max_new, method="SCANS", seed=seed)
    table = [["method", "STL", "SCANS"]]
    for title, (metric, kind, suite, scale, digits) in evaluation.COLUMNS.items():
        per_method = [evaluation.values({"rows": rows}, method, metric, kind, suite) for method in table[0][1:]]
        if all(per_method):
            table.append([title, *(evaluation.spread(per_seed, scale, digits) for per_seed in per_method)])
    seeds = ", ".join(str(seed) for seed, *_ in found)
    print(f"{s.split} suites, seeds {seeds}\n\n{evaluation.markdown(table)}")
    if given.json:
        settings = {"alpha": given.alpha, "threshold": given.threshold} | s.fixed()
        write_json(given.json, train.origin(settings, "cpu") | {"rows": rows})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
