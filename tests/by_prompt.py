"""What two methods answer, prompt by prompt: is the difference more than chance? From the responses on disk.

    python tests/by_prompt.py out-real [--against STL-aug-equal] [--xstest BENCHMARKS/xstest_v2_prompts.csv]

For each half of each suite, prompts of all seeds pooled: the share that is refused, with Wilson's 95 %
interval; each method minus STL, or another, with the interval that 95 % of 10,000 resamples of the prompts
give, paired: in each both methods are asked the same prompts. (That other seeds would give other models is
not in it.)
With --xstest, what is answered by XSTest's type of prompt."""
import argparse
import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import parse_json, read_text                                 # noqa: E402 (after the path is set)
from eval import METHODS, is_refusal, markdown                         # noqa: E402


def read(out):
    """{(suite, kind): {method: {(seed, prompt): refused}}}. ValueError if there are no responses."""
    found = defaultdict(lambda: defaultdict(dict))
    for path in sorted(Path(out).glob("seed-*/responses/*.jsonl")):
        seed = path.parent.parent.name
        if path.stem in METHODS:
            for line in read_text(path).splitlines():
                r = parse_json(line, path)
                found[r["suite"], r["kind"]][path.stem][seed, r["prompt"]] = is_refusal(r["response"])
    if not found:
        raise ValueError(f"{out}: no responses in seed-*/responses; give a folder that train.py wrote")
    return found


def types_of(xstest):
    """{prompt: type} of XSTest's file. ValueError if it has no such columns."""
    rows = list(csv.DictReader(io.StringIO(read_text(xstest), newline="")))
    if not rows or not {"prompt", "type"} <= rows[0].keys():
        raise ValueError(f"{xstest}: no columns prompt and type; give XSTest's own file")
    return {row["prompt"].strip(): row["type"] for row in rows}


def wilson(hits, n):
    """Wilson's 95 % interval of a share of hits in n."""
    z = 1.96
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return centre - half, centre + half


def rate(refused):
    low, high = wilson(sum(refused), len(refused))
    return f"{100 * np.mean(refused):.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def less(method, rival):
    """How much more `method` refuses than `rival`: the mean over the prompts that both were asked, in points,
    with its interval; "-" if there is none."""
    both = sorted(method.keys() & rival.keys())
    if not both:
        return "-"
    difference = 100 * np.array([float(method[key]) - float(rival[key]) for key in both])
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(10_000):                                         # one at a time, for memory
        draws.append(rng.choice(difference, len(difference)).mean())
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{difference.mean():+.1f} [{low:.1f}, {high:.1f}]"


def tables(out, xstest=None, rival=None):
    found = read(out)
    measured = set()
    for by_method in found.values():
        measured.update(by_method)
    methods = [m for m in METHODS if m in measured]
    if rival and rival not in methods:
        raise ValueError(f"--against {rival}: choose from {', '.join(methods)}")
    rival = rival or "STL"
    compared = [m for m in methods if m not in ("base", rival)]
    lines = [["suite", "prompts", *methods]]
    differences = [["suite", "prompts", *compared]]
    for (suite, kind), by_method in found.items():
        lines.append([suite, kind, *[rate(list(by_method[m].values())) for m in methods]])
        differences.append([suite, kind, *[less(by_method[m], by_method[rival]) for m in compared]])
    text = ["refused, in percent, with Wilson's interval", markdown(zip(*lines)),
            f"refused, minus {rival}, paired by prompt, in points", markdown(zip(*differences))]
    if xstest:
        kind_of = types_of(xstest)
        lines = [["type", "prompts", *methods]]
        for kind in sorted(set(kind_of.values())):
            line = []
            for m in methods:
                both = found["XSTest", "benign"][m] | found["XSTest", "toxic"][m]
                answered = []
                for (_, prompt), refused in both.items():
                    if kind_of.get(prompt) == kind:
                        answered.append(not refused)
                line.append(answered)
            if any(line):
                most = max(map(len, line))
                lines.append([kind, str(most), *[f"{100 * np.mean(answered):.0f}" for answered in line]])
        text += ["XSTest, answered, in percent, by type", markdown(zip(*lines))]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder that train.py wrote")
    parser.add_argument("--xstest", help="XSTest's file, for its types")
    parser.add_argument("--against", metavar="METHOD", help="[STL] what the others are compared with")
    args = parser.parse_args()
    try:
        print(tables(args.out, args.xstest, args.against))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
