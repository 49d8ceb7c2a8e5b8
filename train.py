"""The whole story in one command: `python train.py`.

For every seed: make the world and its tokenizer (or read --data and --init's), pretrain the base
(or load it), tune it for safety, after which it over-refuses (STL, "safety-tuned LLaMA"); with
seemingly toxic prompts mixed in (STL-aug); refine the base and tune that (DCR). More: `run_seed`.

Every comparison is paired: the same base, the same number of steps, and in every step of tuning the
same rows. Each finished model is a checkpoint folder, each unfinished one a state on disk, so the
same command goes on where it was stopped.

"The paper" is "Discern Truth from Falsehood", arXiv 2603.03323. Its stage 1, `refine`, minimises
`dcr.refinement_loss` with all that comes after block l frozen. Its stage 2, `tune`, is ordinary
safety tuning: it minimises -log pi(y_t | x, y_<t), the SFT objective, on general exchanges and
refusals. Read `eval.py` next: how responses are generated, and what is measured of them.
"""
import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from data import (Chat, Parts, World, collate, load_folder, load_tokenizer, read_json, world_chat,
                  write, write_json)
from dcr import refinement_loss
from model import GPT, GPTConfig, last_states, read_config, token_losses

def knob(default, reason):
    """A setting: its default value, and why it is that, which is also what --help says."""
    return dataclasses.field(default=default, metadata={"reason": reason})

@dataclass(frozen=True)
class Settings:
    """Every knob, its default and its reason: the defaults ARE the experiment."""
    out: str = knob("out", "folder of checkpoints, results and figures; the same command goes on")
    init: str = knob("", "Hugging Face folder of a Llama, Qwen2 or SmolLM2 chat model, the base")
    data: str = knob("", "folder of benchmark files, to use in place of the miniature world")
    seed: int = knob(0, "first seed: facts, splits, initial weights and batches all follow from it")
    methods: str = knob("STL,STL-aug,DCR", "what to compare: names from `run_seed`, or all")
    seeds: int = knob(1, "how many seeds to run; five or more before believing a difference")
    device: str = knob("auto", "auto, cpu, cuda or mps; auto takes cuda before mps before cpu")
    dtype: str = knob("auto", "float32 or bfloat16 for matrix products; auto: bfloat16 on cuda")
    scale: float = knob(1.0, "multiplies the steps of all stages; 0.02 takes seconds")

    width: int = knob(64, "of the small GPT: 48 is too little to hold the world's facts")
    blocks: int = knob(4, "of the small GPT")
    pretrain_steps: int = knob(1500, "enough to know the facts; with many more STL errs less")
    pretrain_batch: int = knob(64, "texts a step")
    pretrain_lr: float = knob(4e-3, "high, as small models like it; warmed up, then decayed")

    layer: int = knob(3, "l: refinement shapes the states after this block and freezes all above")
    refine_steps: int = knob(300, "100 are too few on some seeds, 600 no better")
    refine_batch: int = knob(32, "prompts a step, half of each class, and as many general texts")
    refine_lr: float = knob(1e-3, "5e-4 does about as well")
    margin: float = knob(0.25, "m of the Circle loss, its authors' value")
    gamma: float = knob(32.0, "scale of the Circle loss: how much harder hard pairs are pulled")
    centre: bool = knob(False, "subtract the base's mean state before the cosine; for large models")
    with_safe: bool = knob(True, "D_safe's prompts are known to be toxic: they join D_toxic")
    hold: float = knob(3.0, "weight of the drift of D_seemingly's states; 10 does about as well")
    keep: float = knob(30.0, "weight of KL(base || model) on general texts; not in the paper")
    still: float = knob(3.0, "weight of the drift of states on general texts; not in the paper")

    tune_steps: int = knob(800, "steps of safety tuning, every method the same")
    tune_batch: int = knob(32, "exchanges a step")
    tune_lr: float = knob(1e-3, "5e-4 refuses too little, 2e-3 undoes refinement")
    refusals: float = knob(0.1, "share of (toxic prompt, refusal) rows; 5 % is not enough for all")
    later_steps: int = knob(400, "steps of tuning a finished model on, by somebody else")
    lora: int = knob(8, "rank of the updates of safety tuning, as the paper uses LoRA; 0 tunes all")

    longest: int = knob(256, "tokens a training sequence; longer answers are cut")
    max_new: int = knob(32, "tokens a response when evaluating")
    suite: int = knob(80, "prompts a half of a suite, at most")
    kernel: int = knob(4, "prompts a class to measure kernels on; time grows with the square")
    split: str = knob("held-out", "suites to evaluate on; choose settings on 'development' instead")

# The defaults with --init, tried out on SmolLM2-135M (30 blocks). A model that has read a lot needs
# fewer and smaller steps of refinement, and more refusals in its few steps of tuning. (Not tried
# there: with_safe and hold.)
REAL = dict(layer=15, refine_steps=40, refine_batch=24, refine_lr=1e-4, gamma=16.0, centre=True,
            with_safe=False, hold=0.0, keep=0.0, still=1.0,
            tune_steps=40, tune_batch=16, tune_lr=2e-3, refusals=0.2, lora=16)

# ---- 1. Training: LoRA, and one loop for every stage ---------------------------------------------

class LoRA(nn.Module):
    """y = W x + B (A x) for a linear map W (Hu et al. 2021, arXiv 2106.09685). A (rank, in) is
    random and B (out, rank) zero at first, so that training starts from W itself."""

    def __init__(self, linear, rank, generator):
        super().__init__()
        self.linear = linear
        size = linear.in_features
        self.A = nn.Parameter(torch.randn(rank, size, generator=generator) / size ** 0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B)    # (..., in) -> (..., out)

def add_lora(model, rank, seed):
    """Freeze the model, put a LoRA on each linear map of its blocks; returns what to train."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.layers.modules()):          # lists: the tree changes while we walk it
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRA(child, rank, generator).to(child.weight.device))
    return [p for p in model.parameters() if p.requires_grad]

@torch.no_grad()
def merge_lora(model):
    """W <- W + B A, and nothing of LoRA is left; all parameters may be trained again."""
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRA):
                child.linear.weight += child.B @ child.A
                setattr(parent, name, child.linear)
    model.requires_grad_(True)

def moments(steps):
    """The steps at which a curve has points: every 2 % up to a fifth, then every 10 %, 19 in all.
    The last, `steps`, is after training. (Runs of less than 50 steps have fewer points.)"""
    early = [steps * i // 50 for i in range(10)]
    late = [steps * i // 10 for i in range(2, 11)]
    return early + late

def train(label, model, parameters, loss, steps, lr, state_file, watch=None):
    """Minimise loss(step), a scalar, over `parameters`.
    Returns a log: seconds, and a curve of what watch() -> dict returned at the `moments`.
    RuntimeError if the loss is not finite.

    The state goes to disk every 10 seconds or more and is loaded if it is there: as batches depend
    on the step alone, an interrupted run ends with the numbers of an uninterrupted one."""
    # no decay: weights that a stage does not need should stay the base's
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0,
                                  fused=True)
    log = {"seconds": 0.0, "curve": []}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=model.cos.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
        first = state["step"]

    begin = time.time() - log["seconds"]                 # as if earlier runs had been part of this
    saved = time.time()                                  # when the state was last written
    pause = 10                                           # at least so long until the next time
    bar = tqdm(total=steps, initial=first, desc=label, leave=False)
    for step in range(first, steps):
        if watch and step in moments(steps):
            log["curve"].append({"step": step, **watch()})
        warm_up = min(1, (step + 1) / (0.05 * steps + 1))                # over 5 % of the steps
        decay = max(0.1, 1 - step / steps)                               # down to a tenth
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * decay
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()

        state_due = time.time() - saved > pause
        tenth_or_last = step % 10 == 9 or step == steps - 1
        if state_due or tenth_or_last:
            if not torch.isfinite(value):       # not at every step: a GPU would have to wait
                raise RuntimeError(
                    f"{label}: the loss is {value.item()} at step {step + 1}; lower its learning "
                    f"rate (now {lr}), with a new --out; finished stages are kept")
            bar.set_postfix_str(f"loss {value.item():.3f}")
        if state_due:
            log["seconds"] = time.time() - begin
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log,
                     "step": step + 1}
            write_begin = time.time()
            write(state_file, lambda file: torch.save(state, file))
            saved = time.time()
            pause = max(10, 20 * (saved - write_begin))  # what takes long is done less often
    bar.close()
    if watch:
        log["curve"].append({"step": steps, **watch()})
    log["seconds"] = time.time() - begin
    return log

# ---- 2. The stages: each gives (model, log), and draws its batches from (seed, step) alone -------

@dataclass
class Run:
    """What all stages of one seed share."""
    s: Settings
    seed: int                # of this run; s.seed is the first
    device: str
    folder: Path             # of this seed's checkpoints
    parts: Parts             # prompts and answers
    chat: Chat               # tokenizer and chat format
    autocast: Callable       # autocast() -> the context manager in which models run

    def rng(self, purpose, step=0):
        """A generator for each purpose and step: one more stage moves no other's batches."""
        return random.Random(f"{purpose} {self.seed} {step}")

    def steps(self, n):
        return max(2, round(n * self.s.scale))           # 2, so that a curve has two ends

    def exchanges(self, examples, context):
        """Examples or plain texts as a list of (ids, index of the first token to learn)."""
        return [self.chat.exchange(e, self.s.longest, context) for e in examples]

    def check_lengths(self, context):
        """ValueError, naming file and row, for a prompt that leaves no room for a response."""
        p = self.parts
        lists = [p.general, p.general_heldout, p.safe, p.seemingly, p.toxic, p.later]
        for halves in p.suites.values():
            lists += halves.values()
        for e in itertools.chain(*lists):
            length = len(self.chat.prompt(e.prompt))
            if length + self.s.max_new > context:
                where = e.source or repr(e.prompt)
                raise ValueError(f"{where}: {length} tokens and a response of {self.s.max_new} "
                                 f"exceed the model's context of {context}; shorten it")

def pretrain(run):
    """The base: a GPT that learns the world's text by heart, in which every request is answered."""
    s = run.s
    torch.manual_seed(run.seed)
    config = GPTConfig(vocab_size=run.chat.size, width=s.width, blocks=s.blocks, heads=4,
                       kv_heads=2, head_width=s.width // 4, hidden=3 * s.width)
    model = GPT(config).to(run.device)
    exchanges = run.exchanges(run.parts.pretraining, config.context)
    sequences = [(ids, 1) for ids, _ in exchanges]       # 1: prompts are learnt, not answers alone

    def loss(step):
        batch = run.rng("pretraining", step).sample(sequences, s.pretrain_batch)
        return sft_loss(model, batch, run)

    log = train("base", model, list(model.parameters()), loss, run.steps(s.pretrain_steps),
                s.pretrain_lr, run.folder / "base.state")
    return model, log

def sft_loss(model, sequences, run):
    """The mean of -log pi(y_t | x, y_<t) over what is due in `sequences`, [(ids, first)]."""
    tokens, targets, texts = collate(sequences, run.device, model.config.context)      # (B, T) each
    with run.autocast():
        return token_losses(model, tokens, targets, texts).mean()

def refine(name, base, run, s, shuffled=False):
    """Stage 1, contrastive refinement: part harmless from toxic prompts at block l, tail frozen.
    `s` is run.s or a variant. `shuffled` is the control: the same prompts, the truth destroyed."""
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    below, _ = model.split(s.layer)
    # not the embeddings: a word that moved would move in every context
    trained = [p for key, p in below.items() if not key.startswith("embed")]
    for p in trained:
        p.requires_grad_(True)

    seemingly = run.parts.seemingly
    toxic = run.parts.toxic
    if s.with_safe:
        toxic = toxic + run.parts.safe
    if shuffled:
        both = seemingly + toxic
        mixed = run.rng("shuffled").sample(both, len(both))
        seemingly = mixed[:len(seemingly)]
        toxic = mixed[len(seemingly):]
    seemingly = [run.chat.prompt(e.prompt) for e in seemingly]           # lists of ids from here on
    toxic = [run.chat.prompt(e.prompt) for e in toxic]
    general = run.exchanges(run.parts.general, base.config.context)
    half = s.refine_batch // 2
    labels = torch.tensor([0] * half + [1] * half, device=run.device)    # 0 harmless, 1 toxic
    with torch.no_grad():
        mean = last_states(base, seemingly + toxic, s.layer).mean(0)     # (width,)

    def loss(step):
        rng = run.rng("refinement", step)
        prompts = rng.choices(seemingly, k=half) + rng.choices(toxic, k=half)    # balanced
        sequences = rng.choices(general, k=s.refine_batch)
        tokens, _, texts = collate(sequences, run.device, base.config.context)   # (B, T) each
        with run.autocast():
            return refinement_loss(model, base, prompts, labels, tokens, texts, mean, s)

    log = train(name, model, trained, loss, run.steps(s.refine_steps), s.refine_lr,
                run.folder / f"{name}.state")
    model.requires_grad_(True)
    return model, log

def tune(name, start, run, extra=(), later=False):
    """Stage 2, safety tuning: general exchanges and a share of refusals (D_safe).
    `extra` has pairs (Examples, rows): so many rows of them, in the mean, are added to every batch.
    With `later` somebody else tunes a finished model on, with other toxic prompts and another
    refusal, and no seemingly toxic prompts at hand."""
    s = run.s
    context = start.config.context
    purpose = "later" if later else "tuning"
    steps = run.steps(s.later_steps if later else s.tune_steps)
    safe = run.exchanges(run.parts.later if later else run.parts.safe, context)
    general = run.exchanges(run.parts.general, context)
    added = [(run.exchanges(examples, context), rows) for examples, rows in extra]
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    if s.lora:
        parameters = add_lora(model, s.lora, run.rng(f"LoRA of {purpose}").randrange(2 ** 31))

    def loss(step):
        rng = run.rng(purpose, step)
        batch = []
        for _ in range(s.tune_batch):
            source = safe if rng.random() < s.refusals else general
            batch.append(rng.choice(source))
        rng = run.rng("extra", step)                     # another: the rows above stay the same
        for source, rows in added:
            whole = int(rows + rng.random())             # of 2.3 rows: 2, or 3 in 3 of 10 steps
            batch += rng.choices(source, k=whole)
        return sft_loss(model, batch, run)

    def watch():
        with run.autocast():
            return evaluation.three_classes(model, run.chat, run.parts, s.suite // 2)

    log = train(name, model, parameters, loss, steps, s.tune_lr,
                run.folder / f"{name}.state", watch)
    merge_lora(model)
    return model, log

def augment(base, run):
    """Refinement's prompts as exchanges, for STL-aug: D_seemingly answered, D_toxic refused."""
    unanswered = [e.prompt for e in run.parts.seemingly if e.answer is None]
    with run.autocast():                       # where no correct answer is known, the base's own
        responses = evaluation.respond(base, run.chat, unanswered, run.s.max_new)
    own = dict(zip(unanswered, responses))
    seemingly = run.parts.seemingly
    answered = [dataclasses.replace(e, answer=own.get(e.prompt, e.answer)) for e in seemingly]
    rng = run.rng("augment")
    refusals = [rng.choice(run.parts.safe).answer for _ in run.parts.toxic]
    refused = [dataclasses.replace(e, answer=a) for e, a in zip(run.parts.toxic, refusals)]
    return answered, refused

def natural(base, run):
    """`extra` of STL-aug as the paper has it: D_seemingly, mixed in by its size."""
    answered, _ = augment(base, run)
    return [(answered, run.s.tune_batch * len(answered) / len(run.parts.general))]

def equal(base, run):
    """`extra` of STL-aug at equal compute: as many rows as refinement reads, prompts and texts."""
    rows = 2 * run.s.refine_batch * run.steps(run.s.refine_steps) / run.steps(run.s.tune_steps)
    return [(examples, rows / 2) for examples in augment(base, run)]     # a step; half answered

@torch.no_grad()
def surgical(stl, run):
    """Surgical (Wang et al. 2024, arXiv 2410.03415): take false refusals out of a tuned model.
    Let w be the mean state of refused benign prompts less that of answered general ones, and r the
    same of toxic prompts. Made orthogonal to r, w is what only false refusals have. No matrix that
    writes to the stream may write along w: W <- W - w w^T W. Each block has such a w. The best one
    leaves the fewest refusals of other benign prompts, while answers to general ones hardly change.
    Returns a model like any other, and a log."""
    begin = time.time()
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
    candidates = range(1, int(0.8 * blocks) + 1)
    if not (toxic and general and choose_on):
        candidates = []                                  # nothing to take out
    for l in candidates:
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

def finished(run, name, make):
    """(model, log) of a stage: from its checkpoint if there is one, else make() -> (model, log)."""
    folder = run.folder / name
    if (folder / "config.json").exists():      # save_pretrained writes it last: the rest is there
        return GPT.from_pretrained(folder).to(run.device), read_json(folder / "log.json")
    model, log = make()
    write_json(folder / "log.json", log)
    model.save_pretrained(folder)
    (run.folder / f"{name}.state").unlink(missing_ok=True)
    return model, log

def measure(name, model, log, run, results):
    """Add to `results` what is measured of a model: rows, curve of its training, examples."""
    s = run.s
    if name not in evaluation.KERNELS_OF:
        s = dataclasses.replace(s, kernel=0)
    with run.autocast():
        rows, responses = evaluation.evaluate(model, run.chat, run.parts, s)
    rows += evaluation.as_rows("stage", "general", 1, seconds=log["seconds"])
    whose = {"method": name, "seed": run.seed}
    results["rows"] += [whose | row for row in rows]
    if log["curve"]:
        results["curves"].append(whose | {"curve": log["curve"]})
    if run.seed == run.s.seed:                 # examples of one seed are enough
        shown = evaluation.example_responses(run.parts, responses)
        results["examples"].append(whose | {"responses": shown})

def run_seed(run, results):
    """All that --methods asks for, and before it what that is made from.
    A model that is on disk is loaded, not trained again; one with rows in results.json is not
    measured again (to measure anew, delete that file). None stays in memory once it is done."""
    s = run.s
    as_in_paper = dataclasses.replace(s, hold=0.0, still=0.0, keep=0.0, with_safe=False)

    def load_or_pretrain(_):
        if not s.init:
            return pretrain(run)
        model = GPT.from_pretrained(s.init).to(run.device)
        return model, {"seconds": 0.0, "curve": []}

    def tuned(name, make_extra=None, later=False):
        def make(start):
            added = make_extra(stage("base"), run) if make_extra else ()     # stage: below
            return tune(name, start, run, added, later)
        return make

    def refined(name, settings, shuffled=False):
        return lambda base: refine(name, base, run, settings, shuffled)

    # name: (the model it is made from, how it is made from that). -equal: as many extra rows as
    # refinement reads; -first: that, then plain tuning; -paper: the paper's loss alone; -shuffled:
    # refined with the classes mixed up
    recipes = {
        "base": (None, load_or_pretrain),
        "STL": ("base", tuned("STL")),
        "STL-aug": ("base", tuned("STL-aug", natural)),
        "STL-aug-equal": ("base", tuned("STL-aug-equal", equal)),
        "STL-aug-first": ("STL-aug-equal", tuned("STL-aug-first")),
        "refined": ("base", refined("refined", s)),
        "DCR": ("refined", tuned("DCR")),
        "DCR+aug": ("refined", tuned("DCR+aug", natural)),
        "refined-paper": ("base", refined("refined-paper", as_in_paper)),
        "DCR-paper": ("refined-paper", tuned("DCR-paper")),
        "refined-shuffled": ("base", refined("refined-shuffled", s, shuffled=True)),
        "DCR-shuffled": ("refined-shuffled", tuned("DCR-shuffled")),
        "Surgical": ("STL", lambda stl: surgical(stl, run)),
    }
    if run.parts.later:                                  # benchmark files have no such prompts
        for name in ("STL-aug", "STL-aug-equal", "STL-aug-first", "DCR"):
            recipes[name + "+later"] = (name, tuned(name + "+later", later=True))

    def stage(name):
        start, make = recipes[name]
        model, log = finished(run, name, lambda: make(stage(start) if start else None))
        run.check_lengths(model.config.context)          # before the base is asked the first prompt
        measured = [(row["method"], row["seed"]) for row in results["rows"]]
        if (name, run.seed) not in measured:
            measure(name, model, log, run, results)
            write_json(run.folder.parent / "results.json", results)
        return model

    asked = list(recipes) if s.methods == "all" else s.methods.split(",")
    for name in asked:
        if name not in recipes:
            raise ValueError(f"--methods {name}: choose from {', '.join(recipes)}, or all")
    for name in asked:
        line = []                                        # from the base to it: all are measured
        while name:
            line.insert(0, name)
            name = recipes[name][0]
        for needed in line:
            stage(needed)

# ---- 3. The command ------------------------------------------------------------------------------

def boolean(text):
    """true or false, as argparse wants it; bool("false") is True."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"

def parse(argv):
    """Settings from the command line: one flag a field, unknown flags an error."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        default = str(field.default)
        if field.name in REAL:
            default += f"; with --init {REAL[field.name]}"
        reason = field.metadata["reason"].replace("%", "%%")             # argparse formats its help
        kind = boolean if field.type is bool else field.type
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, metavar="X",
                            default=argparse.SUPPRESS, help=f"[{default}] {reason}")
    given = vars(parser.parse_args(argv))
    defaults = REAL if given.get("init") else {}
    return Settings(**(defaults | given))

def pick_device(s):
    """(device, dtype), printed with the reason. ValueError for what is not there or not known."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    available = [device for device in there if there[device]]
    device = available[0] if s.device == "auto" else s.device
    why = "the first available" if s.device == "auto" else "as asked"
    if device not in available:
        raise ValueError(f"--device {device}: not available here; choose from auto, "
                         f"{', '.join(available)}")
    usual = "bfloat16" if device == "cuda" else "float32"
    dtype = usual if s.dtype == "auto" else s.dtype
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {dtype}: choose float32, bfloat16 or auto")
    print(f"device {device} ({why}), matrix products in {dtype}, {torch.get_num_threads()} threads")
    return device, dtype

def environment(device):
    """What numbers depend on besides the settings."""
    source = hashlib.sha256()
    for name in ("data", "model", "dcr", "train", "eval"):
        source.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return {"source": source.hexdigest()[:12], "python": platform.python_version(),
            "torch": torch.__version__, "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device}

def open_results(s, device):
    """The results so far in --out, or new ones. ValueError if other settings made them."""
    settings = dataclasses.asdict(s)
    for free in ("out", "seeds", "methods"):   # these may change from one run to the next
        del settings[free]
    path = Path(s.out) / "results.json"
    if not path.exists():
        return {"settings": settings, "environment": environment(device),
                "rows": [], "curves": [], "examples": []}
    results = evaluation.read_results(Path(s.out))
    before = results["settings"]
    changed = [f"{name} was {before.get(name)!r}, is {value!r}" for name, value in settings.items()
               if before.get(name) != value]
    if changed:
        raise ValueError(f"{path}: made with other settings ({'; '.join(changed)}); choose another "
                         "--out, or delete that folder")
    return results

def run_all(s):
    """Every stage of every seed, with results.json and the checkpoints in --out."""
    if s.split not in ("held-out", "development"):
        raise ValueError(f"--split {s.split}: choose held-out or development")
    device, dtype = pick_device(s)
    blocks = read_config(Path(s.init) / "config.json").blocks if s.init else s.blocks
    if not 1 <= s.layer <= blocks:
        raise ValueError(f"--layer {s.layer}: the model has blocks 1 to {blocks}")
    out = Path(s.out)
    results = open_results(s, device)
    write_json(out / "results.json", results)

    def autocast():
        return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    for seed in range(s.seed, s.seed + s.seeds):
        if s.data:
            parts = load_folder(s.data, seed, evaluation.is_refusal, s.suite)
        else:
            parts = World(seed).parts(s.suite)
        if not parts.pretraining and not s.init:
            raise ValueError("--data needs --init CHECKPOINT: the small GPT knows its world alone")
        if s.split == "development":
            parts = dataclasses.replace(parts, suites=parts.dev)
        chat = load_tokenizer(s.init) if s.init else world_chat(parts)
        print(f"\nseed {seed}")
        evaluation.show_parts(parts)
        run_seed(Run(s, seed, device, out / f"seed-{seed}", parts, chat, autocast), results)

def main(argv=None):
    s = parse(argv)
    run_all(s)
    evaluation.report(Path(s.out))

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
