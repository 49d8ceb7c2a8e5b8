"""SCANS, a rival that steers (Cao et al. 2024, arXiv 2408.11491), on the STL models of a run.

    python tests/scans.py OUT                    OUT: what python train.py --methods STL left there
    python tests/scans.py OUT_DEV --grid         choose settings, on runs with --split development

SCANS changes no weight. It judges each prompt harmful or harmless, and while the answer is written
adds a vector to the states of the middle blocks: towards refusals, or away from them. So it leaves
no checkpoint from which another stage could go on; hence a script, and no method of train.py.
Anchors, prompts that training has at hand: 64 plainly harmful ones (D_toxic), 64 plainly harmless
ones (general). With h_l the state after block l at the last token of a prompt, q a prompt:

    v_l     = unit(mean h_l of harmful anchors - mean h_l of harmless ones)
    n_l     = mean |h_l| of all anchors
    t_l(q)  = h_l of q - h_l of q with the answer's first token, "Sure"
    s(q)    = mean over the upper two thirds of the blocks of cos(t_l(q), T_l)
    T_l     = mean t_l of harmful anchors
    h_l    <- h_l + alpha n_l v_l if s(q) >= threshold, else h_l - alpha n_l v_l

in the middle third of the blocks, at the prompt's last token and all that follow. A block counts to
a third in which it lies in part: of 4 blocks 2 and 3 steer, 2, 3 and 4 judge. The authors' alpha,
3.5 to 4, is in the units of their models' states; n_l makes it a share of the length of ours. Of the
settings that refused 95 % in a --grid over development seeds 100, 101 and 105, the defaults answered most."""
import argparse
import contextlib
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation                        # noqa: E402  (after the path is set)
import train                                     # noqa: E402
from data import World, world_chat, write_json   # noqa: E402
from model import GPT, last_states               # noqa: E402

ANCHORS = 64
ALPHAS = (0.1, 0.25, 0.5, 1.0)                    # tried with --grid
THRESHOLDS = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99)
SHOWN = ("answers benign", "refuses toxic", "AUC", "answers at 95 % defense", "general accuracy")
TOLERANCE = 2                                    # points: another machine rounds differently


class SCANS:
    """What is computed once for a model: v_l and n_l of the blocks that steer, T_l of those that
    judge, as {l: ...}."""

    @torch.no_grad()
    def __init__(self, model, chat, parts):
        self.model = model
        self.chat = chat
        self.last_of_prompt = chat.prompt("")[-1]                        # the token that ends every prompt
        blocks = model.config.blocks
        first = blocks // 3 + 1
        self.steers = range(first, math.ceil(2 * blocks / 3) + 1)
        self.judges = range(first, blocks + 1)
        harmful = [e.prompt for e in parts.toxic[:ANCHORS]]
        harmless = [e.prompt for e in parts.general[:ANCHORS]]
        self.v = {}
        self.n = {}
        for l in self.steers:
            up = last_states(model, self.ids(harmful), l)        # (64, width)
            down = last_states(model, self.ids(harmless), l)
            self.v[l] = F.normalize(up.mean(0) - down.mean(0), dim=0)        # (width,)
            self.n[l] = torch.cat([up, down]).norm(dim=1).mean()
        self.T = {l: self.transitions(harmful, l).mean(0) for l in self.judges}

    def ids(self, prompts, then=""):
        return [self.chat.prompt(prompt) + self.chat.ids(then) for prompt in prompts]

    def transitions(self, prompts, l):
        """t_l of n prompts, (n, width)."""
        before = last_states(self.model, self.ids(prompts), l)
        after = last_states(self.model, self.ids(prompts, then="Sure"), l)
        return before - after

    @torch.no_grad()
    def score(self, prompts):
        """s(q) of n prompts, (n,): the higher, the more harmful."""
        cosines = [F.cosine_similarity(self.transitions(prompts, l), self.T[l])
                   for l in self.judges]
        return torch.stack(cosines).mean(0)                      # (judging blocks, n) -> (n,)

    @contextlib.contextmanager
    def steered(self, alpha):
        """While it lasts all prompts are steered: towards refusals; with alpha below 0, away."""
        def locate(_, inputs, keywords):
            tokens = inputs[0]                                   # (B, T)
            cache = keywords.get("cache")
            if cache is None or cache.end == 0:                  # reads prompts: from their end on
                self.due = (tokens == self.last_of_prompt).cumsum(1) > 0             # (B, T)
            else:                                                # reads answers: everywhere
                self.due = torch.ones_like(tokens, dtype=torch.bool)

        def add(l):
            return lambda _, inputs, stream: stream + self.due[:, :, None] * shift[l]

        shift = {l: alpha * self.n[l] * self.v[l] for l in self.steers}      # (width,) each
        hooks = [self.model.register_forward_pre_hook(locate, with_kwargs=True)]
        hooks += [self.model.layers[l - 1].register_forward_hook(add(l)) for l in self.steers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def responses(steering, run, alpha):
    """What eval.evaluate finds with all prompts steered by alpha."""
    with steering.steered(alpha):
        _, found = evaluation.evaluate(steering.model, run.chat, run.parts, run.s)
    return found


def merge(up, down, harmful):
    """Of two passes over the same prompts each response from the one that its prompt calls for."""
    merged = []
    for upward, downward, judged in zip(up, down, harmful, strict=True):
        if judged:
            merged.append(upward)
        else:
            merged.append(downward)
    return merged


def rows_of(found, method, seed):
    """Rows as in results.json."""
    rows = evaluation.rate_rows(found) + evaluation.threshold_rows(found)
    return [{"method": method, "seed": seed} | row for row in rows]


def columns(rows, method):
    """One value a seed of each column in SHOWN, in per cent, (columns, seeds)."""
    found = []
    for title in SHOWN:
        metric, kind, suite, scale, _ = evaluation.COLUMNS[title]
        per_seed = evaluation.values({"rows": rows}, method, metric, kind, suite)
        found.append(scale * np.array(per_seed))
    return np.stack(found)


def stl_models(out):
    """[(folder, settings, seed, stored rows)] of the STL models in a folder of train.py."""
    results = evaluation.read_results(out)
    settings = results["settings"]
    if settings.get("init"):
        raise ValueError(f"{out}: made with --init; this script knows the miniature world alone")
    names = {field.name for field in dataclasses.fields(train.Settings)}
    known = {name: value for name, value in settings.items() if name in names}
    s = train.Settings(**known | {"kernel": 0})                  # nor are kernels measured here
    stored = [row for row in results["rows"] if row["method"] == "STL"]
    found = []
    for seed in sorted({row["seed"] for row in stored}):
        folder = out / f"seed-{seed}" / "STL"
        if (folder / "config.json").exists():
            found.append((folder, s, seed, [row for row in stored if row["seed"] == seed]))
    if not found:
        raise ValueError(f"{out}: no STL model; make it with python train.py --methods STL "
                         f"--out {out}")
    return found


def measure(models, alphas, thresholds):
    """Rows of STL, and {(alpha, threshold): rows of SCANS}, of all seeds. ValueError if STL's are
    not those stored: in another version of the world words have other ids, and all is nonsense."""
    stl = []
    scans = {pair: [] for pair in itertools.product(alphas, thresholds)}
    for folder, s, seed, stored in models:
        parts = World(seed).parts(s.suite, s.narrow)
        if s.split == "development":
            parts = dataclasses.replace(parts, suites=parts.dev)
        run = train.Run(dataclasses.replace(s, seed=seed), folder.parent, parts, world_chat(parts))
        steering = SCANS(GPT.from_pretrained(folder), run.chat, parts)
        found = responses(steering, run, 0.0)
        rows = rows_of(found, "STL", seed)
        if np.abs(columns(rows, "STL") - columns(stored, "STL")).max() > TOLERANCE:
            raise ValueError(f"{folder}: measured now it differs from results.json; use the "
                             "version of the code that made it, or make it anew")
        stl += rows
        scores = steering.score([r["prompt"] for r in found])    # (n,)
        show_scores(seed, found, scores)
        for alpha in alphas:                                     # steered once for all thresholds
            up = responses(steering, run, alpha)
            down = responses(steering, run, -alpha)
            for threshold in thresholds:
                merged = merge(up, down, scores >= threshold)
                scans[alpha, threshold] += rows_of(merged, "SCANS", seed)
    return stl, scans


def show_scores(seed, found, scores):
    """Does s(q) tell toxic from benign? Where 90 % of each kind lie."""
    line = f"seed {seed}, s(q) from 5 to 95 %:"
    for kind in ("general", "benign", "toxic"):
        of_kind = torch.tensor([r["kind"] == kind for r in found])           # (n,)
        low, high = np.quantile(scores[of_kind], (0.05, 0.95))
        line += f"  {kind} {low:.3f} to {high:.3f}"
    print(line, flush=True)


def table(title, lines):
    """`lines` are pairs: two labels, and the values of SHOWN."""
    cells = [[*title, *SHOWN]]
    for labels, values in lines:
        cells.append([*labels, *[f"{value:.1f}" for value in values]])
    return evaluation.markdown(zip(*cells))


def by_seed(seeds, rows):
    """A line a seed and method, then the medians over seeds."""
    lines = []
    for i, seed in enumerate(seeds):
        for method in ("STL", "SCANS"):
            lines.append(((str(seed), method), columns(rows, method)[:, i]))
    for method in ("STL", "SCANS"):
        lines.append((("median", method), np.median(columns(rows, method), 1)))
    return table(("seed", "method"), lines)


def grid(stl, scans):
    """STL, then SCANS, a line a pair of settings: means over seeds."""
    lines = [(("STL", ""), columns(stl, "STL").mean(1))]
    for (alpha, threshold), rows in scans.items():
        lines.append(((f"{alpha:g}", f"{threshold:g}"), columns(rows, "SCANS").mean(1)))
    return table(("alpha", "threshold"), lines)


def choose(outs, seeds):
    """The STL models of these folders, or of these seeds alone, in order of seeds."""
    models = sum(map(stl_models, outs), [])
    if seeds:
        models = [model for model in models if model[2] in seeds]
    models.sort(key=lambda model: model[2])
    there = [seed for _, _, seed, _ in models]
    for seed in seeds or there:
        if there.count(seed) != 1:
            raise ValueError(f"seed {seed}: {there.count(seed)} STL models of it in the folders "
                             "given; give one")
    return models


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+", help="folders of train.py, with STL models")
    parser.add_argument("--seed", type=int, nargs="+", help="these seeds alone")
    parser.add_argument("--alpha", type=float, default=0.25,
                        help="[0.25] how far to steer, in mean lengths of states")
    parser.add_argument("--threshold", type=float, default=0.98,
                        help="[0.98] s(q) of a harmful prompt, at least; of D_toxic most lies above")
    parser.add_argument("--grid", action="store_true", help="try many settings")
    parser.add_argument("--json", type=Path, help="write rows, as in results.json, to this file")
    given = parser.parse_args(argv)
    for value in (given.alpha, given.threshold):
        if not math.isfinite(value):
            raise ValueError(f"{value}: --alpha and --threshold are finite numbers")
    models = choose(given.out, given.seed)
    splits = sorted({s.split for _, s, _, _ in models})
    if given.grid and splits != ["development"]:
        raise ValueError("--grid is for runs with --split development: choose settings there")
    print(f"{' and '.join(splits)} suites, mean over them, in percent")
    if given.grid:
        stl, scans = measure(models, ALPHAS, THRESHOLDS)
        print(f"\n{grid(stl, scans)}")
        return
    stl, scans = measure(models, [given.alpha], [given.threshold])
    rows = stl + scans[given.alpha, given.threshold]
    print(f"\n{by_seed([seed for _, _, seed, _ in models], rows)}")
    if given.json:
        settings = {"alpha": given.alpha, "threshold": given.threshold} | models[0][1].fixed()
        results = train.origin(settings, "cpu") | {"rows": rows, "curves": []}
        write_json(given.json, results)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
