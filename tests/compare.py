"""Is a change any good? Two folders of train.py side by side: the same methods, before and after.

    python tests/compare.py out-before out-after

What settings, code and machine do not share is named first: one thing should be other, not several. Then,
for each method that both folders have, a table of the held-out numbers (in percent; `general loss`, in nats
a token, is left out), seed by seed. Its last line is the difference, after minus before: the mean over the
seeds in points, with the interval that 95 % of resamples of the seeds give. Of five seeds or fewer such an
interval is too short; there look at the seeds.

A seed draws the world, its words and the batches, and the base is that of the seed. So a comparison is
paired only where both folders started from bases that measure the same; it says so if they did not. Copy
`out-before/seed-N/base` to `out-after/seed-N/base` before you train, and they do."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import COLUMNS, METHODS, markdown, paired, read_results, values      # noqa: E402 (after the path)

SHARES = [title for title, (*_, scale, _) in COLUMNS.items() if scale == 100]


def seeds_of(results, method):
    return sorted({row["seed"] for row in results["rows"] if row["method"] == method})


def differing(before, after):
    """Lines such as "gamma: 32.0, then 8.0" of all settings and facts of the machine that are not equal."""
    lines = []
    for part in ("settings", "environment"):
        old = before.get(part, {})
        new = after.get(part, {})
        for name in dict.fromkeys([*old, *new]):                               # in order, each once
            if old.get(name) != new.get(name) and name != "seed":              # the first of the seeds
                lines.append(f"{name}: {old.get(name, 'none')}, then {new.get(name, 'none')}")
    return lines


def same_base(before, after):
    """Whether the bases answer, refuse and know alike on every seed: then it is the same base."""
    measured = []
    for results in (before, after):
        measured.append([values(results, "base", *COLUMNS[title][:3]) for title in SHARES])
    return measured[0] == measured[1]


def table(before, after, method):
    """A Markdown table: a line a seed, "84.1 -> 88.0", and the mean difference."""
    seeds = seeds_of(before, method)
    columns = [["seed", *map(str, seeds), "difference"]]
    for title in SHARES:
        old = values(before, method, *COLUMNS[title][:3])
        new = values(after, method, *COLUMNS[title][:3])
        if len(old) == len(new) == len(seeds):                                 # else not measured
            cells = [f"{100 * a:.1f} -> {100 * b:.1f}" for a, b in zip(old, new)]
            columns.append([title, *cells, paired(new, old)])
    return markdown(columns)


def compare(old, new):
    """The text that is printed. ValueError if a folder has no results, or they share no method and seeds."""
    before = read_results(old)
    after = read_results(new)
    lines = [f"{old}, then {new}. What differs:"]
    lines += [f"  {line}" for line in differing(before, after) or ["nothing"]]
    if not same_base(before, after):
        lines.append("  the bases, so that nothing below is paired: see --help for how to share them")
    compared = []
    for method in METHODS:
        seeds = seeds_of(before, method)
        if method != "base" and seeds and seeds == seeds_of(after, method):
            compared.append(f"\n{method}\n\n{table(before, after, method)}")
    if not compared:
        raise ValueError(f"{new}: no method has the seeds it has in {old}; run both with the same --seed, "
                         "--seeds and --methods")
    return "\n".join(lines + compared)


if __name__ == "__main__":
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("before", type=Path, help="an --out folder of train.py")
    parser.add_argument("after", type=Path, help="another, made with the change")
    arguments = parser.parse_args()
    try:
        print(compare(arguments.before, arguments.after))
    except ValueError as error:
        sys.exit(f"error: {error}")
