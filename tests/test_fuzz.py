"""Broken input, hundreds of ways: each file that is read is spoiled at random, and what reads it must take
it or say in one line which file is wrong. No traceback, no hang, no NaN.

    python tests/test_fuzz.py 2000          the same, with as many cases of each kind
"""
import json
import random
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation                                   # noqa: E402 (after the path is set)
import train                                                # noqa: E402
from data import load_tokenizer, read_prompts               # noqa: E402
from model import GPT, GPTConfig                            # noqa: E402
from test_eval import made_up                               # noqa: E402
from test_real import TEMPLATES, checkpoint, write          # noqa: E402

CASES = 60
ODD = [None, True, False, 0, -1, 1, 2.5, 1e999, float("nan"), 10 ** 12, "", "x", "false", "\ud800", [], {},
       [1], ["a", "b"], {"a": 1}, {"type": "x"}, [[]], [None]]


def spoil_bytes(raw, rng):
    """One to three small accidents: a byte changed, a piece lost, doubled or moved in, the end cut off."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        size = rng.choice((1, 2, 8, 50, len(raw) // 2))
        how = rng.randrange(5)
        if how == 0 and raw:
            raw[at % len(raw)] = rng.randrange(256)
        elif how == 1:
            del raw[at:at + size]
        elif how == 2:
            raw[at:at] = raw[at:at + size]
        elif how == 3:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(min(size, 50)))
        else:
            del raw[at:]
    return bytes(raw)


def spoil_json(raw, rng):
    """One to three values anywhere in it replaced by odd ones, left out or renamed."""
    value = json.loads(raw)
    for _ in range(rng.randint(1, 3)):
        places = []

        def walk(node):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            for key in keys:
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    walk(node[key])
        walk(value)
        if not places:
            break
        node, key = rng.choice(places[:200] + rng.sample(places, min(20, len(places))))
        how = rng.randrange(4)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node["other"] = node.pop(key)
        else:
            node[key] = rng.choice(ODD)
    return json.dumps(value).encode()


def model_folder(folder):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=30, width=16, blocks=2, kv_heads=2, head_width=4, hidden=8)
    GPT(config).save_pretrained(folder)


def load_model(folder):
    model = GPT.from_pretrained(folder)
    assert all(p.isfinite().all() for p in model.parameters()), "not a number, and not refused"
    return model(torch.tensor([[1]]))


def tokenizer_folder(folder):
    write(checkpoint(folder, "smollm2") / "tokenizer_config.json", {"chat_template": TEMPLATES["smollm2"][1]})


def prompts(name, text):
    return lambda folder: write(folder / name, text), lambda folder: read_prompts(folder / name)


def results_folder(folder):
    (folder / "results.json").write_text(json.dumps(made_up((0, 3))))


def log_folder(folder):
    stage = folder / "seed-0" / "STL"
    stage.mkdir(parents=True)
    settings = train.Settings().fixed("STL")
    (stage / "log.json").write_text(json.dumps(train.origin(settings, "cpu") | {"seconds": 1.0, "curve": []}))


def open_log(folder):
    train.open_results(train.Settings(out=str(folder)))


ROWS = [{"instruction": f"How {i}?", "input": "", "output": "So.", "type": "x"} for i in range(5)]
CSV = "id,prompt,type\n" + "\n".join(f'{i},"Why, {i}?",homonyms' for i in range(5))
# name: (file to spoil, how to make the folder, what reads it)
KINDS = {
    "config": ("config.json", model_folder, load_model),
    "weights": ("model.safetensors", model_folder, load_model),
    "tokenizer": ("tokenizer.json", tokenizer_folder, load_tokenizer),
    "template": ("tokenizer_config.json", tokenizer_folder, load_tokenizer),
    "csv": ("a.csv", *prompts("a.csv", CSV)),
    "json": ("a.json", *prompts("a.json", json.dumps(ROWS))),
    "columns": ("a.json", *prompts("a.json", json.dumps({"prompts": ["a", "b"], "tags": ["x", "y"]}))),
    "jsonl": ("a.jsonl", *prompts("a.jsonl", "\n".join(map(json.dumps, ROWS)))),
    "txt": ("a.txt", *prompts("a.txt", "How?\nWhy, then?\n")),
    "results": ("results.json", results_folder, evaluation.report),
    "log": ("seed-0/STL/log.json", log_folder, open_log),
}


def case(kind, number, folder):
    """How the file was taken: "read", or the message; an AssertionError for anything else."""
    name, make, read = KINDS[kind]
    folder.mkdir(exist_ok=True)
    make(folder)
    rng = random.Random(f"{kind} {number}")
    raw = (folder / name).read_bytes()
    as_json = name.endswith(".json") and rng.random() < 0.7
    (folder / name).write_bytes(spoil_json(raw, rng) if as_json else spoil_bytes(raw, rng))
    signal.alarm(10)
    try:
        read(folder)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said and str(folder) in said, f"{kind} {number}: {said}"
        return said
    except Exception as error:
        raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    return "read"


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_broken_is_read_or_named_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "FIGURES", {})                       # slow, and of what is in the tables
    warnings.simplefilter("ignore")
    said = [case(kind, number, tmp_path / str(number)) for number in range(CASES)]
    assert any(text != "read" for text in said), "the mutator should break something"


if __name__ == "__main__":
    import collections
    import contextlib
    import io
    import tempfile
    evaluation.FIGURES = {}
    count = collections.Counter()
    for kind in KINDS:
        for number in range(int(sys.argv[1])):
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                try:
                    said = case(kind, number, Path(folder))
                    how = "read" if said == "read" else "refused"
                    count[kind, how] += 1
                except AssertionError as error:
                    count[kind, "WRONG"] += 1
                    print(error, file=sys.stderr)
    for (kind, how), n in sorted(count.items()):
        print(f"{kind:<10} {how:<8} {n}")
