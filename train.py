"""The whole story in one command: `python train.py`.

For every seed: make the world and its tokenizer (or read --data and --init's), pretrain the base
(or load it), tune it for safety, after which it over-refuses (STL, the paper's name for it); with
seemingly toxic prompts mixed in (STL-aug); refine the base and tune that (DCR). More: `run_seed`.

Every comparison is paired: same base, same steps of tuning, same rows in each of them (augmentation
adds its own). Each finished model is a checkpoint folder, so the same command goes on where it was
stopped; and as batches depend on the step alone, it ends with the same numbers.

"The paper" is "Discern Truth from Falsehood", arXiv 2603.03323. Its stage 1, `refine`, minimises
`dcr.refinement_loss` with all after block l frozen. Its stage 2, `tune`, is ordinary safety tuning
on general exchanges and refusals: it minimises -log pi(y_t | x, y_<t). Read `eval.py` next.
"""
import argparse
import copy
import dataclasses
import fcntl
import hashlib
import json
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from data import (FORMATS, Chat, Parts, World, collate, load_folder, load_tokenizer, read_json,
                  world_chat, write, write_json)
from dcr import refinement_loss
from model import GPT, GPTConfig, last_states, read_config, token_losses

def knob(default, reason, least=0.0, most=1e30, choices=()):
    """A setting: its default, and why it is that, which is also what --help says. Numbers lie from
    `least` to `most`; a text is one of `choices`, if there are any."""
    about = {"reason": reason, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=about)

@dataclasses.dataclass(frozen=True)
class Settings:
    """Every knob, its default, and its reason or meaning: the defaults ARE the experiment."""
    out: str = knob("out", "folder of checkpoints, results and figures; the same command goes on")
    seeds: int = knob(1, "how many seeds to run; five or more before believing a difference", 1)
    methods: str = knob("STL,STL-aug,DCR", "what to compare, or all; a wrong name lists them")
    suite: int = knob(80, "prompts a half of a suite, at most", 1)
    kernel: int = knob(4, "prompts a class to measure kernels on, 2 or more; 0: none")
    curve: bool = knob(True, "measure refusals along tuning too, which takes a large model long")
    split: str = knob("held-out", "suites to evaluate on; choose settings on 'development' instead",
                      choices=("held-out", "development"))

    init: str = knob("", "Hugging Face folder of a Llama, Qwen or SmolLM2 chat model, the base")
    data: str = knob("", "folder of benchmark files, to use in place of the miniature world")
    seed: int = knob(0, "first seed: facts, splits, initial weights and batches all follow from it")
    device: str = knob("auto", "auto takes cuda if it is there", choices=("auto", "cpu", "cuda"))
    dtype: str = knob("auto", "of matrix products; auto: bfloat16 on cuda with --init",
                      choices=("auto", "float32", "bfloat16"))
    scale: float = knob(1.0, "multiplies the steps of all stages; 0.02 takes seconds", 1e-6)
    longest: int = knob(256, "tokens a training sequence; longer answers are cut", 8)
    width: int = knob(64, "of the small GPT: 48 is too little to hold the world's facts", 16)
    blocks: int = knob(4, "of the small GPT", 1)
    pretrain_steps: int = knob(1000, "enough to know the facts; after 3,000 STL errs no less", 1)
    pretrain_batch: int = knob(64, "texts a step", 1)
    pretrain_lr: float = knob(4e-3, "high, as small models like it; warmed up, then decayed", 1e-9)

    layer: int = knob(3, "l: refinement shapes the states after this block; 0: all but two")
    seemingly: int = knob(0, "prompts of D_seemingly; 0: all of them, 250 as in the paper")
    narrow: bool = knob(False, "few actions and objects in the world's D_seemingly and D_toxic")
    refine_steps: int = knob(300, "100 are too few on some seeds, 600 no better", 1)
    refine_batch: int = knob(32, "prompts a step, half of each class, and as many texts to hold", 4)
    refine_lr: float = knob(1e-3, "5e-4 does about as well", 1e-9)
    refine_lora: int = knob(0, "rank of the updates of refinement; 0 trains blocks 1 to l in full")
    margin: float = knob(0.25, "m of the Circle loss, its authors' value", 0, 1)
    gamma: float = knob(32.0, "scale of the Circle loss: pull on hard pairs; 8 does as well", 1e-3)
    with_safe: bool = knob(True, "D_safe's prompts are known to be toxic: they join D_toxic")
    hold: float = knob(3.0, "weight: D_seemingly's drift, toxic lengths; 0: all texts are general")
    keep: float = knob(30.0, "weight of KL(base || model) on texts, half of them D_seemingly's")
    still: float = knob(3.0, "weight of the drift of states on the same texts")

    tail: bool = knob(False, "tune the blocks above l alone, so as not to undo refinement")
    tune_steps: int = knob(800, "steps of safety tuning, every method the same", 1)
    tune_batch: int = knob(32, "exchanges a step", 1)
    tune_lr: float = knob(1e-3, "in the world 5e-4 is too little and 2e-3 undoes refinement", 1e-9)
    refusals: float = knob(0.1, "share of (toxic prompt, refusal) rows; 0.05 to 0.2 do alike", 0, 1)
    later_steps: int = knob(400, "steps of tuning a finished model on, by somebody else", 1)
    lora: int = knob(8, "rank of the updates of safety tuning, as the paper uses LoRA; 0 tunes all")
    max_new: int = knob(32, "tokens a response, at most; the base's own answers end there", 1)

    def check(self):
        """ValueError, one line, for the first setting out of its range; nan is in none."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            about = field.metadata
            flag = f"--{field.name.replace('_', '-')} {value}"
            if about["choices"] and value not in about["choices"]:
                raise ValueError(f"{flag}: choose {' or '.join(about['choices'])}")
            if isinstance(value, int | float) and not about["least"] <= value <= about["most"]:
                raise ValueError(f"{flag}: choose from {about['least']:g} to {about['most']:g}")

    def weights_dtype(self):
        """The dtype of matrices: bfloat16, half the memory, if a LoRA learns in both stages."""
        frozen = self.init and self.lora and self.refine_lora
        return torch.bfloat16 if frozen and self.dtype == "bfloat16" else torch.float32

    def fixed(self, stage=None):
        """{name: value} of the settings in which all runs of one --out agree, and so the models in
        it. A "base" depends on those from init to pretrain_lr alone: it serves any other stage."""
        names = list(vars(self))
        if stage == "base":
            names = names[names.index("init"):names.index("layer")]
        free = ("out", "seeds", "methods")
        if stage:
            free += ("kernel",)                          # measured of a model, no part of it
        return {name: getattr(self, name) for name in names if name not in free}

# The defaults with --init, chosen on development prompts with SmolLM2-135M (see the README).
REAL = dict(curve=False, layer=0, refine_steps=60, refine_batch=24, refine_lr=3e-3, refine_lora=16,
            gamma=16.0, keep=1.0, tail=True, tune_steps=80, tune_batch=16, tune_lr=5e-3,
            refusals=0.2, lora=16)

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

def unfreeze(model, blocks, rank, rng):
    """Freeze all of the model but these blocks. Returns what to train: a new LoRA of this rank on
    each of their linear maps, or if that is 0 all of their weights."""
    model.requires_grad_(False)
    if not rank:
        return list(blocks.requires_grad_(True).parameters())
    generator = torch.Generator().manual_seed(rng.randrange(2 ** 31))
    for parent in list(blocks.modules()):                # lists: the tree changes while we walk it
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
    """Where a curve has points: every 2 % of the steps to a fifth, then every 10 %; 19 in all."""
    return [steps * i // 50 for i in range(10)] + [steps * i // 10 for i in range(2, 11)]

def train(name, model, parameters, loss, steps, lr, watch=None):
    """Minimise loss(step), a scalar, over `parameters` of the model.
    Returns a log: seconds, the GPU's peak memory in GB, if there is one, and a curve of what
    watch(model) -> dict returned at the `moments`. RuntimeError if the loss is not finite."""
    # no decay: weights that a stage does not need should stay the base's
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0, fused=True)
    on_gpu = parameters[0].is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.time()
    curve = []
    bar = tqdm(range(steps), desc=name, leave=False)
    for step in bar:
        if watch and step in moments(steps):
            curve.append({"step": step, **watch(model)})
        warm_up = min(1, (step + 1) / (0.05 * steps + 1))                # over 5 % of the steps
        decay = max(0.1, 1 - step / steps)                               # down to a tenth
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * decay
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == steps - 1:          # not always: a GPU would have to wait
            if not torch.isfinite(value):
                raise RuntimeError(
                    f"{name}: the loss is {value.item()} at step {step + 1}; lower its learning "
                    f"rate (now {lr}), with a new --out")
            bar.set_postfix_str(f"loss {value.item():.3f}")
    if watch:                                            # the last moment is after the loop
        curve.append({"step": steps, **watch(model)})
    log = {"seconds": time.time() - begin, "curve": curve}
    if on_gpu:
        log["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return log

# ---- 2. The stages: each gives (model, log), and draws its batches from (seed, step) alone -------

@dataclasses.dataclass
class Run:
    """What all stages of one seed share."""
    s: Settings              # as `resolve` leaves them; s.seed is this seed
    folder: Path             # of this seed's checkpoints
    parts: Parts             # prompts and answers
    chat: Chat               # tokenizer and chat format

    def autocast(self):
        """The context in which models run."""
        return torch.autocast(self.s.device, torch.bfloat16, enabled=self.s.dtype == "bfloat16")

    def rng(self, purpose, step=0):
        """A generator for each purpose and step: one more stage moves no other's batches."""
        return random.Random(f"{purpose} {self.s.seed} {step}")

    def steps(self, n):
        return max(2, round(n * self.s.scale))           # 2, so that a curve has two ends

    def exchanges(self, examples, context):
        """Examples or plain texts as a list of (ids, index of the first token to learn)."""
        return [self.chat.exchange(e, self.s.longest, context) for e in examples]

    def check_prompts(self, vocabulary, context):
        """ValueError, naming file and row, for a prompt that leaves no room for a response, and for
        a tokenizer whose ids the model does not know."""
        if self.chat.size > vocabulary:
            raise ValueError(f"{self.s.init}: a tokenizer of {self.chat.size} ids, a model of "
                             f"{vocabulary}; use those of one checkpoint")
        p = self.parts
        examples = p.general + p.general_heldout + p.safe + p.seemingly + p.toxic + p.later
        for halves in p.suites.values():
            examples += sum(halves.values(), [])
        for e in examples:
            length = len(self.chat.prompt(e.prompt))
            if length + self.s.max_new > context:
                raise ValueError(f"{e.source or e.prompt}: {length} tokens and a response of "
                                 f"{self.s.max_new} exceed the context of {context}; shorten it")

def pretrain(run):
    """The base: a GPT that learns the world's text by heart, in which every request is answered."""
    s = run.s
    torch.manual_seed(s.seed)
    config = GPTConfig(vocab_size=run.chat.size, width=s.width, blocks=s.blocks,
                       head_width=s.width // 8 * 2, hidden=3 * s.width)          # rotary: even
    model = GPT(config).to(run.s.device)
    exchanges = run.exchanges(run.parts.pretraining, config.context)
    sequences = [(ids, 1) for ids, _ in exchanges]       # 1: prompts are learnt, not answers alone

    def loss(step):
        batch = run.rng("pretraining", step).sample(sequences, s.pretrain_batch)
        return sft_loss(model, batch, run)

    log = train("base", model, list(model.parameters()), loss, run.steps(s.pretrain_steps),
                s.pretrain_lr)
    return model, log

def sft_loss(model, sequences, run):
    """The mean of -log pi(y_t | x, y_<t) over what is due in `sequences`, [(ids, first)]."""
    tokens, targets = collate(sequences, run.s.device)                                 # (B, T) each
    with run.autocast():
        return token_losses(model, tokens, targets).mean()

def refine(name, base, run, s, shuffled=False):
    """Stage 1, contrastive refinement: part harmless from toxic prompts at block l, tail frozen.
    `s` is run.s or a variant. `shuffled` is the control: the very same batches, random labels."""
    model = copy.deepcopy(base)
    lower = model.layers[:s.layer]      # no embeddings: a word that moved would move in any context
    trained = unfreeze(model, lower, s.refine_lora, run.rng("LoRA of refinement"))

    toxic = run.parts.toxic
    weights = None
    if s.with_safe:     # D_toxic, with the hard contrasts, is drawn as often as a larger D_safe
        times = max(1, round(len(run.parts.safe) / len(toxic)))
        weights = [times] * len(toxic) + [1] * len(run.parts.safe)
        toxic = toxic + run.parts.safe
    seemingly = [(run.chat.prompt(e.prompt), 0) for e in run.parts.seemingly]     # 0: harmless
    toxic = [(run.chat.prompt(e.prompt), 1) for e in toxic]                       # 1: toxic
    if shuffled:                                         # a coin tossed once for every prompt
        coin = run.rng("shuffled")
        seemingly = [(ids, coin.randrange(2)) for ids, _ in seemingly]
        toxic = [(ids, coin.randrange(2)) for ids, _ in toxic]
    general = run.exchanges(run.parts.general, base.config.context)
    # At --hold 0 nothing of D_seemingly is held, and words that both classes use get mixed up
    lookalikes = run.exchanges(answered(base, run), base.config.context) if s.hold else general
    half = s.refine_batch // 2
    every = [ids for ids, _ in seemingly + toxic]
    at_once = 40_000 // max(map(len, every))             # 40,000 tokens: a prompt may be long
    total = 0
    for start in range(0, len(every), at_once):
        with torch.no_grad(), run.autocast():
            total += last_states(base, every[start:start + at_once], s.layer).float().sum(0)
    mean = total / len(every)                            # (width,)

    def loss(step):
        rng = run.rng("refinement", step)
        drawn = rng.choices(seemingly, k=half) + rng.choices(toxic, weights, k=half)
        prompts = [ids for ids, _ in drawn]
        labels = torch.tensor([label for _, label in drawn], device=run.s.device)        # (2 half,)
        sequences = rng.choices(general, k=half) + rng.choices(lookalikes, k=half)
        tokens, targets = collate(sequences, run.s.device)               # (B, T) each
        with run.autocast():
            return refinement_loss(model, base, prompts, labels, tokens, targets, mean, s)

    log = train(name, model, trained, loss, run.steps(s.refine_steps), s.refine_lr)
    merge_lora(model)
    return model, log

def tune(name, start, run, extra=(), later=False):
    """Stage 2, safety tuning: general exchanges and a share of refusals (D_safe).
    `extra` has pairs (Examples, rows): so many rows of them, in the mean, are added to every batch.
    `later`: somebody else tunes it on: other toxic prompts, another refusal, no D_seemingly."""
    s = run.s
    context = start.config.context
    purpose = "later" if later else "tuning"
    steps = run.steps(s.later_steps if later else s.tune_steps)
    safe = run.exchanges(run.parts.later if later else run.parts.safe, context)
    general = run.exchanges(run.parts.general, context)
    added = [(run.exchanges(examples, context), rows) for examples, rows in extra]
    model = copy.deepcopy(start)
    blocks = model.layers if s.lora else model           # a LoRA leaves embeddings and head alone
    if s.tail and not later:           # lower ones may undo refinement; somebody else tunes all
        blocks = model.layers[s.layer:]
    trained = unfreeze(model, blocks, s.lora, run.rng(f"LoRA of {purpose}"))

    def loss(step):
        rng = run.rng(purpose, step)
        batch = []
        for _ in range(s.tune_batch):
            source = safe if rng.random() < s.refusals else general
            batch.append(rng.choice(source))
        rng = run.rng("extra", step)                     # drawn apart from the rows above
        for source, rows in added:
            whole = int(rows + rng.random())             # of 2.3 rows: 2, or 3 in 3 of 10 steps
            batch += rng.choices(source, k=whole)
        return sft_loss(model, batch, run)

    def watch(model):
        with run.autocast():
            return evaluation.three_classes(model, run.chat, run.parts, (s.suite + 1) // 2)

    log = train(name, model, trained, loss, steps, s.tune_lr, watch if s.curve else None)
    merge_lora(model)
    return model, log

def answered(base, run):
    """D_seemingly with its right answers, or the base's own where none is known."""
    unanswered = [e.prompt for e in run.parts.seemingly if e.answer is None]
    with run.autocast():
        own = dict(zip(unanswered, evaluation.respond(base, run.chat, unanswered, run.s.max_new)))
    return [dataclasses.replace(e, answer=own.get(e.prompt, e.answer)) for e in run.parts.seemingly]

def augment(base, run, amount):
    """`extra` of STL-aug. "natural": D_seemingly, answered, by its size. "equal" (STL-aug-equal):
    as many rows as refinement reads, half of them D_seemingly, answered, half D_toxic, refused."""
    s = run.s
    known = {e.prompt for e in run.parts.seemingly if e.answer}          # other answers may be cut
    benign = [dataclasses.replace(e, whole=e.prompt in known) for e in answered(base, run)]
    if amount == "natural":
        return [(benign, s.tune_batch * len(benign) / len(run.parts.general))]
    rows = 2 * s.refine_batch * run.steps(s.refine_steps) / run.steps(s.tune_steps)      # a step
    return [(benign, rows / 2), (run.parts.toxic, rows / 2)]

def finished(run, name, make):
    """(model, log) of a stage: from its checkpoint if there is one, else make() -> (model, log)."""
    folder = run.folder / name
    if (folder / "config.json").exists():      # save_pretrained writes it last: the rest is there
        model = GPT.from_pretrained(folder, device=run.s.device, dtype=run.s.weights_dtype())
        return model, read_json(folder / "log.json")
    model, log = make()
    write_json(folder / "log.json", log | origin(run.s.fixed(name), run.s.device))
    if run.s.init:              # ready to use elsewhere; what ends an answer, unless its own says
        write_json(folder / "generation_config.json", {"eos_token_id": run.chat.stop})
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "generation_config.json"):
            if (Path(run.s.init) / file).exists():
                shutil.copy(Path(run.s.init) / file, folder)
    model.save_pretrained(folder)
    return model, log

def measure(name, model, log, run, results):
    """Add to `results` what is measured of a model: rows, and the curve of its training."""
    s = run.s
    if name not in evaluation.KERNELS_OF:
        s = dataclasses.replace(s, kernel=0)
    with run.autocast():
        rows, responses = evaluation.evaluate(model, run.chat, run.parts, s)
    clock = {what: log[what] for what in ("seconds", "gpu_gb") if what in log}
    rows += evaluation.as_rows("stage", "general", 1, **clock)
    lines = [json.dumps(response) + "\n" for response in responses]
    write(run.folder / "responses" / f"{name}.jsonl", lambda f: f.write("".join(lines).encode()))
    whose = {"method": name, "seed": run.s.seed}
    results["rows"] += [whose | row for row in rows]
    if log.get("curve"):
        results["curves"].append(whose | {"curve": log["curve"]})

RIVALS = {}    # more {name: (made from what, make(model, run) -> (model, log))}; tests/surgical.py

def run_seed(run, results):
    """All that --methods asks for, and before it what that is made from. What is on disk is loaded,
    what has rows in results.json is not measured again (to measure anew, delete that file)."""
    s = run.s
    as_in_paper = dataclasses.replace(s, hold=0.0, still=0.0, keep=0.0, with_safe=False)

    def tuned(amount=None, later=False):
        def make(name, start):
            extra = augment(stage("base"), run, amount) if amount else ()    # stage: below
            return tune(name, start, run, extra, later)
        return make

    def refined(settings, shuffled=False):
        return lambda name, base: refine(name, base, run, settings, shuffled)

    # name: (made from what, how). Tables show those in eval.METHODS; the README tells them apart
    recipes = {
        "base": (None, lambda name, _: pretrain(run)),
        "STL": ("base", tuned()),
        "STL-aug": ("base", tuned("natural")),
        "STL-aug-equal": ("base", tuned("equal")),
        "STL-aug-first": ("STL-aug-equal", tuned()),
        "refined": ("base", refined(s)),
        "DCR": ("refined", tuned()),
        "DCR+aug": ("refined", tuned("natural")),
        "refined-paper": ("base", refined(as_in_paper)),
        "DCR-paper": ("refined-paper", tuned()),
        "refined-shuffled": ("base", refined(s, shuffled=True)),
        "DCR-shuffled": ("refined-shuffled", tuned()),
    }
    for name, (start, make) in RIVALS.items():
        recipes[name] = (start, lambda _, model, make=make: make(model, run))    # each its own
    if run.parts.later:                                  # benchmark files have no such prompts
        for name in ("STL-aug", "STL-aug-equal", "STL-aug-first", "DCR"):
            recipes[name + "+later"] = (name, tuned(later=True))

    def stage(name):
        start, make = recipes[name]
        if name == "base" and s.init:                    # not copied
            model = GPT.from_pretrained(s.init, device=s.device, dtype=s.weights_dtype())
            log = {"seconds": 0.0, "curve": []}
        else:
            model, log = finished(run, name, lambda: make(name, stage(start) if start else None))
        run.check_prompts(model.config.vocab_size, model.config.context)     # before any is asked
        measured = [(row["method"], row["seed"]) for row in results["rows"]]
        if (name, run.s.seed) not in measured:
            measure(name, model, log, run, results)
            write_json(run.folder.parent / "results.json", results)
        return model

    asked = list(recipes) if s.methods == "all" else s.methods.split(",")
    for name in asked:
        if name not in recipes:
            raise ValueError(f"--methods {name}: choose from {', '.join(recipes)}, or all")
    for name in asked:
        line = []                    # from the base to it, for a model from disk asks for none
        while name:
            line.insert(0, name)
            name = recipes[name][0]
        for needed in line:
            stage(needed)

# ---- 3. The command ------------------------------------------------------------------------------

def true_or_false(text):
    return json.loads(text.lower())                      # bool("false") is True

def parse(argv):
    """Settings from the command line: one flag a field, unknown flags an error."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        default = str(field.default)
        if field.name in REAL:
            default += f"; with --init {REAL[field.name]}"
        reason = field.metadata["reason"].replace("%", "%%")             # argparse formats its help
        how = {"type": field.type}
        if field.type is bool:
            how = {"type": true_or_false, "choices": (True, False)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", metavar="X", **how,
                            default=argparse.SUPPRESS, help=f"[{default}] {reason}")
    given = vars(parser.parse_args(argv))
    defaults = REAL if given.get("init") else {}
    return Settings(**(defaults | given))

def resolve(s):
    """The settings with what "auto" and --layer 0 stand for. ValueError for what is not there."""
    s.check()
    if s.kernel == 1:
        raise ValueError("--kernel 1: a pair takes two; choose 2 or more, or 0 for none")
    if s.data and not Path(s.data).is_dir():
        raise ValueError(f"--data {s.data}: no such folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if s.device == "cuda" and device == "cpu":
        raise ValueError("--device cuda: no GPU that torch can use; choose cpu")
    device = device if s.device == "auto" else s.device
    if device == "cuda":    # cuDNN makes a plan for each new shape, and here nearly all are new
        torch.backends.cuda.enable_cudnn_sdp(False)
    usual = "bfloat16" if device == "cuda" and s.init else "float32"
    dtype = usual if s.dtype == "auto" else s.dtype
    blocks = read_config(Path(s.init) / "config.json").blocks if s.init else s.blocks
    layer = s.layer or max(1, blocks - 2)
    if not 1 <= layer <= blocks:
        raise ValueError(f"--layer {layer}: the model has blocks 1 to {blocks}")
    if s.tail and layer == blocks:
        raise ValueError(f"--layer {layer}: --tail true has no block above it to tune; lower one")
    print(f"device {device}, matrix products in {dtype}, {torch.get_num_threads()} threads")
    return dataclasses.replace(s, device=device, dtype=dtype, layer=layer)

def fingerprint(folder):
    """12 digits that tell the contents of a folder of benchmark files from any other's."""
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, Path(folder).iterdir())):
        if path.suffix.lower() in FORMATS:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]

def origin(settings, device):
    """What made a model or results: the settings, and what else numbers depend on."""
    if settings["data"]:
        settings = settings | {"files": fingerprint(settings["data"])}
    source = hashlib.sha256()
    for name in ("data", "model", "dcr", "train", "eval"):
        source.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    environment = {"source": source.hexdigest()[:12], "torch": torch.__version__,
                   "processor": torch.backends.cpu.get_cpu_capability(),       # AVX2, AVX512, ...
                   "threads": torch.get_num_threads(),
                   "device": torch.cuda.get_device_name() if device == "cuda" else device}
    return {"settings": settings, "environment": environment}

def check_origin(path, made, settings, device):
    """ValueError if other settings made what is at `path`. Returns what else was different then."""
    now = origin(settings, device)
    try:
        other = changes(made["settings"], now["settings"])
        elsewhere = changes(made["environment"], now["environment"])
    except (LookupError, TypeError, AttributeError):
        other = "what made it is not said"
    if other:
        raise ValueError(f"{path}: made with other settings ({other}); choose another --out, or "
                         "delete that to make it again")
    return elsewhere

def changes(before, now):
    """"name was 1, is 2; ..." of all that is not as before, empty if there is nothing."""
    pairs = [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in before | now
             if before.get(name) != now.get(name)]
    return "; ".join(pairs)

def open_results(s):
    """The results so far in --out, or new ones. ValueError if other settings made what is there."""
    elsewhere = ""
    for log in sorted(Path(s.out).glob("seed-[0-9]*/*/log.json")):
        seed = int(log.parent.parent.name.split("-")[1])
        now = dataclasses.replace(s, seed=seed).fixed(log.parent.name)
        elsewhere = check_origin(log.parent, read_json(log), now, s.device) or elsewhere
    results = origin(s.fixed(), s.device) | {"rows": [], "curves": []}
    path = Path(s.out) / "results.json"
    if path.exists():
        results = evaluation.read_results(Path(s.out))
        elsewhere = check_origin(path, results, s.fixed(), s.device) or elsewhere
    if elsewhere:
        print(f"{s.out}: some of it was made elsewhere, and stays as it is ({elsewhere})")
    return results

def lock(out):
    """A file in `out` that one run at a time can hold, and holds until it ends."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out}: another run writes there; wait or choose another --out") from None
    return file

def run_all(s):
    """Every stage of every seed, with results.json and the checkpoints in --out."""
    s = resolve(s)
    out = Path(s.out)
    held = lock(out)                                     # as long as this name has it
    results = open_results(s)
    for seed in range(s.seed, s.seed + s.seeds):
        if s.data:
            parts = load_folder(s.data, seed, evaluation.is_refusal, s.suite)
        else:
            parts = World(seed).parts(s.suite, s.narrow)
        if not parts.pretraining and not s.init:
            raise ValueError("--data needs --init CHECKPOINT: the small GPT knows its world alone")
        parts = dataclasses.replace(parts, seemingly=parts.seemingly[:s.seemingly or None])
        if s.split == "development":
            parts = dataclasses.replace(parts, suites=parts.dev)
        chat = load_tokenizer(s.init) if s.init else world_chat(parts)
        print(f"\nseed {seed}")
        evaluation.show_parts(parts)
        run_seed(Run(dataclasses.replace(s, seed=seed), out / f"seed-{seed}", parts, chat), results)

def main(argv=None):
    sys.stdout.reconfigure(errors="replace")             # a terminal may know ASCII alone
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
