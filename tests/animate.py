"""A film of the method: where the states of prompts go while a model is refined, and then tuned.

    python tests/animate.py [--out out] [--seed 0] [--to figures/states.gif]

It refines and tunes the base of --out again (after `python train.py`, some two minutes) and looks
at 19 moments of each stage: the states h_x after block l of 40 held-out prompts a class, on two
axes that stay the same throughout, the main directions (PCA) of all frames together. A prompt is
filled as the model would refuse it. Left STL, which waits while the other is refined; right DCR.
Nothing in --out is changed."""
import argparse
import dataclasses
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import to_rgba

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation                                              # noqa: E402 (after the path is set)
import train                                                           # noqa: E402
from data import World, world_chat                                     # noqa: E402
from model import GPT, last_states                                     # noqa: E402

PROMPTS = 40                                # a class
PAUSE = 8                                   # frames to rest at the end of a stage
SECONDS = 0.15                              # a frame


def film(stage, run, classes):
    """Run stage() -> (model, log), and look at the model at every moment of `train.moments`.
    Returns it, and at each moment {"step", "states" (n, width), "refusal" (n,)} of the n prompts."""
    prompts = sum(classes.values(), [])
    ids = [run.chat.prompt(prompt) for prompt in prompts]
    every_train = train.train

    def filmed(name, model, parameters, loss, steps, lr, watch=None):
        @torch.no_grad()
        def look(model):
            return {"states": last_states(model, ids, run.s.layer).float().cpu(),
                    "refusal": evaluation.refusal_probability(model, run.chat, prompts)}

        return every_train(name, model, parameters, loss, steps, lr, look)

    train.train = filmed
    try:
        model, log = stage()
    finally:
        train.train = every_train
    return model, log["curve"]


def scenes(run, base, classes):
    """What each panel shows, frame by frame: {"STL": [(caption, moment), ...], "DCR": the same}."""
    refined, refining = film(lambda: train.refine("refined", base, run, run.s), run, classes)
    _, tuning_dcr = film(lambda: train.tune("DCR", refined, run), run, classes)
    _, tuning_stl = film(lambda: train.tune("STL", base, run), run, classes)

    left = []
    right = []
    for moment in refining:
        left.append(("STL: the base, waiting", refining[0]))
        right.append((f"DCR: refinement, step {moment['step']}", moment))
    left += [left[-1]] * PAUSE
    right += [right[-1]] * PAUSE
    for of_stl, of_dcr in zip(tuning_stl, tuning_dcr):
        left.append((f"STL: safety tuning, step {of_stl['step']}", of_stl))
        right.append((f"DCR: safety tuning, step {of_dcr['step']}", of_dcr))
    left += [left[-1]] * 2 * PAUSE
    right += [right[-1]] * 2 * PAUSE
    return {"STL": left, "DCR": right}


def flatten(panels):
    """Two axes for all: moments get "points" (n, 2), the states along the two main directions."""
    moments = [moment for frames in panels.values() for _, moment in frames]
    together = torch.cat([moment["states"] for moment in moments])       # (frames n, width)
    centre = together.mean(0)
    _, _, directions = torch.linalg.svd(together - centre, full_matrices=False)
    for moment in moments:
        moment["points"] = ((moment["states"] - centre) @ directions[:2].T).numpy()     # (n, 2)


def draw(panels, classes, layer, path):
    """The film, as a GIF."""
    title = f"States after block {layer}; filled: would be refused"
    figure, axes = evaluation.axes(title, len(panels), (8.6, 4))
    everything = np.concatenate([moment["points"] for frames in panels.values() for _, moment in frames])
    low = everything.min(0) - 1
    high = everything.max(0) + 1
    dots = []
    for panel in axes:
        panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        of_panel = []
        for name, prompts in classes.items():
            colour, marker = evaluation.CLASSES[name]
            place = np.zeros((len(prompts), 2))
            of_panel.append(panel.scatter(*place.T, s=28, marker=marker, edgecolors=colour, linewidths=1,
                                          facecolors=colour, label=evaluation.LABELS[name]))
        dots.append(of_panel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)

    def show(i):
        for panel, of_panel, frames in zip(axes, dots, panels.values()):
            caption, moment = frames[i]
            panel.set_title(caption, loc="left", fontsize=10)
            begin = 0
            for (name, prompts), dot in zip(classes.items(), of_panel):
                rows = slice(begin, begin + len(prompts))
                begin += len(prompts)
                colour = evaluation.CLASSES[name][0]
                dot.set_offsets(moment["points"][rows])
                dot.set_facecolors([to_rgba(colour, alpha=p) for p in moment["refusal"][rows].tolist()])

    count = len(next(iter(panels.values())))
    FuncAnimation(figure, show, count).save(path, PillowWriter(fps=round(1 / SECONDS)), dpi=80)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="[out] folder of train.py, with the base")
    parser.add_argument("--seed", type=int, default=0, help="[0] which of its seeds")
    parser.add_argument("--to", default="figures/states.gif", help="[figures/states.gif] the film")
    given = parser.parse_args(argv)
    folder = Path(given.out) / f"seed-{given.seed}"
    settings = evaluation.read_results(Path(given.out))["settings"]
    if settings["init"]:
        raise ValueError(f"{given.out}: made with --init; this film is of the miniature world")
    names = {field.name for field in dataclasses.fields(train.Settings)}
    s = train.Settings(**{name: value for name, value in settings.items() if name in names})
    s = dataclasses.replace(s, seed=given.seed)
    parts = World(given.seed).parts(s.suite, s.narrow)
    parts = dataclasses.replace(parts, seemingly=parts.seemingly[:s.seemingly or None])
    run = train.Run(s, folder, parts, world_chat(parts))
    base = GPT.from_pretrained(folder / "base", device=s.device)
    classes = evaluation.prompt_classes(parts, PROMPTS)
    panels = scenes(run, base, classes)
    flatten(panels)
    draw(panels, classes, s.layer, given.to)
    print(f"film in {given.to}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
