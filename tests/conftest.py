"""What several test files share: a little of the miniature world, its tokenizer, a tiny model and a run."""
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"              # for the commands that tests start; here torch is told:
torch.set_num_threads(1)

from data import World, world_chat               # noqa: E402  (after the path is set)
from model import GPT, GPTConfig                 # noqa: E402
from train import Run, Settings                  # noqa: E402

# Settings with which every stage takes a moment
TINY = dict(width=16, blocks=2, layer=1, pretrain_steps=6, pretrain_batch=8, refine_steps=6,
            refine_batch=8, tune_steps=6, tune_batch=8, later_steps=6, max_new=6, lora=2, kernel=2,
            device="cpu", dtype="float32",
            methods="STL,STL-aug,DCR,DCR+later,DCR-shuffled")


def cut(parts):
    """The same parts with fewer examples in each."""
    suites = {}
    for name in ("combinations", "class", "context"):
        suites[name] = {half: examples[:4] for half, examples in parts.suites[name].items()}
    return dataclasses.replace(
        parts, pretraining=parts.pretraining[:600], general=parts.general[:60], safe=parts.safe[:30],
        general_heldout=parts.general_heldout[:8], seemingly=parts.seemingly[:20], toxic=parts.toxic[:40],
        later=parts.later[:30], suites=suites, dev=suites)


@pytest.fixture(scope="session")
def whole():
    """The Parts of seed 0, as experiments use them."""
    return World(0).parts()


@pytest.fixture(scope="session")
def parts(whole):
    return cut(whole)


@pytest.fixture(scope="session")
def chat(parts):
    return world_chat(parts)


@pytest.fixture
def model(chat):
    """Random, with weights 5 times the usual: at initialisation's own, nearly equal logits hide errors."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=chat.size, width=16, blocks=2, kv_heads=2, head_width=4, hidden=48))
    for p in model.parameters():
        p.data += torch.randn_like(p) * (0.1 if p.dim() == 2 else 0.3)
    return model


@pytest.fixture
def run(parts, chat, tmp_path):
    return Run(Settings(**TINY), tmp_path / "seed-0", parts, chat)
