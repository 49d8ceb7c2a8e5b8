"""Is a change any good? Two folders of train.py side by side: the same methods, before and after.

    python tests/compare.py out-before out-after

What settings, code and machine do not share is named first: one thing should be other, not several. Then,
for each method that both folders have, a table of the held-out numbers (in percent; `general loss`, in nats
a token, is left out), seed by seed. Its last line is the difference, after minus before: the mean over the
seeds in points, with the interval that 95 % of resamples of the seeds give. Of five seeds or fewer such an
interval is too short; there look at the seeds.

A seed draws the world, its words and the batches, and the base is that of the seed. So a comparison is
paired only where both folders started from bases that measure the same; it is said if they did not. Copy
`out-before/seed-N/base` to `out-after/seed-N/base` before you train, and they do."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import read_json                                             # noqa: E402 (after the path is set)
from eval import COLUMNS, METHODS, markdown, paired, read_results, values      # noqa: E402

SHARES = [title for title, (*_, scale, _) in COLUMNS.items() if scale == 100]


def seeds_of(results, method):
    return {row["seed"] for row in results["rows"] if row["method"] == method}


def facts(folder, results):
    """{name: its values} of settings, code and machine, in results.json and in every model's log."""
    logs = [read_json(path) for path in sorted(folder.glob("seed-*/*/log.json"))]
    found = {}
    for made in [results, *logs]:
        for name, value in (made.get("settings", {}) | made.get("environment", {})).items():
            found.setdefault(name, set()).add(str(value))
    return {name: " and ".join(sorted(known)) for name, known in found.items() if name != "seed"}


def differing(before, after):
    """Lines such as "gamma: 32.0, then 8.0" of all facts that are not equal."""
    lines = []
    for name in before | after:
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name, 'none')}, then {after.get(name, 'none')}")
    return lines


def measured(results, method, title, seeds):
    """One value a seed of a column."""
    rows = [row for row in results["rows"] if row["seed"] in seeds]
    return values({"rows": rows}, method, *COLUMNS[title][:3])


def same_base(before, after, seeds):
    """Whether the bases answer, refuse and know alike on these seeds: then they are the same."""
    for title in SHARES:
        if measured(before, "base", title, seeds) != measured(after, "base", title, seeds):
            return False
    return True


def table(before, after, method, seeds):
    """A Markdown table: a line a seed, "84.1 -> 88.0", and the mean difference."""
    columns = [["seed", *map(str, seeds), "difference"]]
    for title in SHARES:
        old = measured(before, method, title, seeds)
        new = measured(after, method, title, seeds)
        if len(old) == len(new) == len(seeds):                                 # else not measured
            cells = [f"{100 * a:.1f} -> {100 * b:.1f}" for a, b in zip(old, new)]
            columns.append([title, *cells, paired(new, old)])
    return markdown(columns)


def compare(old, new):
    """The text that is printed. ValueError if a folder has no results, or they share no method and seed."""
    before = read_results(old)
    after = read_results(new)
    lines = [f"{old}, then {new}. What differs:"]
    lines += [f"  {line}" for line in differing(facts(old, before), facts(new, after)) or ["nothing"]]
    compared = []
    for method in METHODS:
        seeds = sorted(seeds_of(before, method) & seeds_of(after, method))
        if method == "base" or not seeds:
            continue
        title = f"\n{method}"
        if not same_base(before, after, seeds):
            title += ", NOT paired: the bases differ (--help says how to share them)"
        alone = sorted(seeds_of(before, method) ^ seeds_of(after, method))
        if alone:
            title += f", without seeds {', '.join(map(str, alone))}, which one folder lacks"
        compared.append(f"{title}\n\n{table(before, after, method, seeds)}")
    if not compared:
        raise ValueError(f"{new}: no method has a seed that it has in {old}; run both with the same --seed "
                         "and --methods")
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
