"""The whole story in one command: `python train.py`.

For every seed: 1. make the world (or read --data), 2. train its tokenizer (or read --init's),
3. pretrain the base (or load it), 4. tune it for safety, which over-refuses (STL, "safety-tuned
LLaMA"), 5. the same with refinement's prompts mixed in (STL-aug), 6. refine the base and tune that
(DCR), 7. the same with shuffled labels (the control), 8. evaluate all, print tables, draw figures.

Every comparison is paired: the same base, the same number of steps, and in every step of tuning
the same rows (STL-aug reads more rows beside them). Each finished model is a checkpoint folder,
each unfinished one a state on disk, so the same command goes on where it was stopped.

"The paper" is "Discern Truth from Falsehood", arXiv 2603.03323. Its stage 1, `refine`, minimises
`dcr.refinement_loss`, the Circle loss on the states after block l, with every later parameter
frozen. Its stage 2, `tune`, is ordinary safety tuning: it minimises -log pi(y_t | x, y_<t), the SFT
objective, here a mean over tokens, on general exchanges and refusals. Read `eval.py` next: how
responses are generated, and what is measured of them.
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
                  write)
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
    seeds: int = knob(1, "how many seeds to run; five or more before believing a difference")
    device: str = knob("auto", "auto, cpu, cuda or mps; auto takes cuda before mps before cpu")
    dtype: str = knob("auto", "float32 or bfloat16 for matrix products; auto: bfloat16 on cuda")
    scale: float = knob(1.0, "multiplies the steps of all stages; 0.02 takes seconds")

    width: int = knob(64, "of the small GPT: 48 is too little to hold the world's facts")
    blocks: int = knob(4, "of the small GPT")
    vocab: int = knob(1536, "tokens of the small GPT: most words of the world are then one token")
    pretrain_steps: int = knob(1500, "enough to know the facts; with many more STL errs less")
    pretrain_batch: int = knob(64, "texts a step")
    pretrain_lr: float = knob(4e-3, "high, as small models like it; warmed up, then decayed")

    layer: int = knob(3, "l: refinement shapes the states after this block and freezes all above")
    refine_steps: int = knob(300, "the loss is near its floor after 50; the rest heals the texts")
    refine_batch: int = knob(32, "prompts a step, half of each class, and as many general texts")
    refine_lr: float = knob(1e-3, "3e-4 separates the classes too little to survive the tuning")
    margin: float = knob(0.25, "m of the Circle loss, its authors' value")
    gamma: float = knob(32.0, "scale of the Circle loss: how much harder hard pairs are pulled")
    centre: bool = knob(False, "subtract the base's mean state before the cosine; for large models")
    keep: float = knob(30.0, "weight of KL(base || model) on general texts; not in the paper")
    still: float = knob(3.0, "weight of the drift of states on general texts; not in the paper")

    tune_steps: int = knob(400, "steps of safety tuning, every method the same")
    tune_batch: int = knob(32, "exchanges a step")
    tune_lr: float = knob(1e-3, "5e-4 refuses too little, 2e-3 undoes refinement")
    refusals: float = knob(0.05, "share of (toxic prompt, refusal) rows, as in Safety-Tuned LLaMAs")
    lora: int = knob(8, "rank of the updates of safety tuning, as the paper uses LoRA; 0 tunes all")

    longest: int = knob(256, "tokens a training sequence; longer answers are cut")
    max_new: int = knob(32, "tokens a response when evaluating")
    suite: int = knob(80, "prompts a half of a suite, at most")
    split: str = knob("held-out", "suites to evaluate on; choose settings on 'development' instead")

# The defaults with --init, tried out on SmolLM2-135M (30 blocks). A model that has read a lot needs
# fewer and smaller steps of refinement, and more refusals in its few steps of tuning.
REAL = dict(layer=15, refine_steps=40, refine_batch=24, refine_lr=1e-4, gamma=16.0, centre=True,
            keep=0.0, still=1.0, tune_steps=40, tune_batch=16, tune_lr=2e-3, refusals=0.2, lora=16)

# --------------------------------------------------------------------------------------------------
# 1. Training: LoRA, and one loop for every stage

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
    """Minimise loss(step) -> (scalar, tokens read, tokens computed) over `parameters`.

    Returns a log: seconds, tokens read and computed (more, by the padding), and a curve of what
    watch() -> dict returned at the `moments`. RuntimeError if the loss is not finite.

    The state goes to disk every 10 seconds or more and is loaded if it is there: as batches depend
    on the step alone, an interrupted run ends with the numbers of an uninterrupted one.
    """
    # no decay: weights that a stage does not need should stay the base's
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    log = {"seconds": 0.0, "read": 0, "computed": 0, "curve": []}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=model.cos.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
        first = state["step"]

    seconds_before = log["seconds"]                      # of earlier runs of the same command
    begin = time.time()
    saved = begin                                        # when the state was last written
    pause = 10                                           # at least so long until the next time
    bar = tqdm(total=steps, initial=first, desc=label, leave=False)
    for step in range(first, steps):
        if watch and step in moments(steps):
            log["curve"].append({"step": step, **watch()})
        warm_up = min(1, (step + 1) / (0.05 * steps + 1))                # over 5 % of the steps
        decay = max(0.1, 1 - step / steps)                               # down to a tenth
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * decay
        value, read, computed = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        log["read"] += read
        log["computed"] += computed

        state_due = time.time() - saved > pause
        tenth_or_last = step % 10 == 9 or step == steps - 1
        if state_due or tenth_or_last:
            if not torch.isfinite(value):       # not at every step: a GPU would have to wait
                raise RuntimeError(
                    f"{label}: the loss is {value.item()} at step {step + 1}; lower its learning "
                    f"rate (now {lr}), with a new --out; finished stages are kept")
            log["seconds"] = seconds_before + time.time() - begin
            speed = log["read"] / log["seconds"]
            bar.set_postfix_str(f"loss {value.item():.3f}, {speed:,.0f} tokens/s")
        if state_due:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log,
                     "step": step + 1}
            write_begin = time.time()
            write(state_file, lambda file: torch.save(state, file))
            saved = time.time()
            pause = max(10, 20 * (saved - write_begin))  # what takes long is done less often
    bar.close()
    if watch:
        log["curve"].append({"step": steps, **watch()})
    log["seconds"] = seconds_before + time.time() - begin
    return log

# --------------------------------------------------------------------------------------------------
# 2. The stages. Each returns (model, log) and draws its batches from (seed, step) alone.

@dataclass
class Run:
    """What all stages of one seed share."""
    s: Settings
    seed: int
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
        lists = [p.general, p.general_heldout, p.safe, p.seemingly, p.toxic]
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
    steps = run.steps(s.pretrain_steps)
    batches = pretraining_batches(run, sequences, steps)

    def loss(step):
        return sft_loss(model, batches[step], run)

    log = train("base", model, list(model.parameters()), loss, steps, s.pretrain_lr,
                run.folder / "base.state")
    return model, log

def pretraining_batches(run, sequences, steps):
    """Batches for `steps` steps or more, each epoch in another order. Neighbours in length share a
    batch, to save padding: chunks of 32 batches are sorted and cut, and their batches shuffled."""
    size = run.s.pretrain_batch
    epochs = 1 + steps * size // len(sequences)
    batches = []
    for epoch in range(epochs):
        order = run.rng("pretraining", epoch).sample(sequences, len(sequences))
        for start in range(0, len(order), 32 * size):
            chunk = sorted(order[start:start + 32 * size], key=lambda sequence: len(sequence[0]))
            of_chunk = [chunk[i:i + size] for i in range(0, len(chunk), size)]
            run.rng("bucket", len(batches)).shuffle(of_chunk)            # its own, as for any step
            batches += of_chunk
    return batches

def sft_loss(model, sequences, run):
    """The mean of -log pi(y_t | x, y_<t) over what is to be learnt in `sequences`, [(ids, first)];
    and the tokens read, and those computed with the padding."""
    tokens, targets, texts = collate(sequences, run.device, model.config.context)      # (B, T) each
    with run.autocast():
        losses = token_losses(model, tokens, targets, texts)             # (tokens to learn,)
    read = sum(len(ids) - 1 for ids, _ in sequences)
    return losses.mean(), read, tokens.numel()

def refine(name, base, run, shuffled):
    """Stage 1, contrastive refinement: separate D_seemingly from D_toxic at block l, tail frozen.

    With `shuffled`, the control: the same prompts, classes of the same sizes, the truth destroyed.
    """
    s = run.s
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    below, _ = model.split(s.layer)
    # not the embeddings: a word that moved would move in every context
    trained = [p for name, p in below.items() if not name.startswith("embed")]
    for p in trained:
        p.requires_grad_(True)

    seemingly = run.parts.seemingly
    toxic = run.parts.toxic
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
            value = refinement_loss(model, base, prompts, labels, tokens, texts, mean, s)
        lengths = [len(ids) for ids in prompts]
        read = sum(lengths) + sum(len(ids) - 1 for ids, _ in sequences)
        computed = len(lengths) * max(lengths) + tokens.numel()          # prompts are padded
        return value, read, computed

    log = train(name, model, trained, loss, run.steps(s.refine_steps), s.refine_lr,
                run.folder / f"{name}.state")
    model.requires_grad_(True)
    return model, log

def tune(name, base, run, extra=()):
    """Stage 2, safety tuning: general exchanges and a share of refusals (D_safe). For STL-aug,
    `extra` has lists of Examples, and rows of each are added to every batch."""
    s = run.s
    context = base.config.context
    model = copy.deepcopy(base)
    parameters = add_lora(model, s.lora, run.seed) if s.lora else list(model.parameters())
    general = run.exchanges(run.parts.general, context)
    safe = run.exchanges(run.parts.safe, context)
    added = [run.exchanges(examples, context) for examples in extra]
    steps = run.steps(s.tune_steps)
    # Equal compute: as many rows are added as refinement has, prompts and as many general texts.
    rows_of_refinement = 2 * s.refine_batch * run.steps(s.refine_steps)
    rows_of_each = round(rows_of_refinement / steps / max(1, len(added)))

    def loss(step):
        rng = run.rng("tuning", step)
        batch = []
        for _ in range(s.tune_batch):
            source = safe if rng.random() < s.refusals else general
            batch.append(rng.choice(source))
        rng = run.rng("extra", step)                     # another: the rows above stay the same
        for source in added:
            batch += [rng.choice(source) for _ in range(rows_of_each)]
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
        responses = evaluation.respond(base, run.chat, unanswered, 2 * run.s.max_new)
    own = dict(zip(unanswered, responses))
    seemingly = run.parts.seemingly
    answered = [dataclasses.replace(e, answer=own.get(e.prompt, e.answer)) for e in seemingly]
    rng = run.rng("augment")
    refusals = [rng.choice(run.parts.safe).answer for _ in run.parts.toxic]
    refused = [dataclasses.replace(e, answer=a) for e, a in zip(run.parts.toxic, refusals)]
    return answered, refused

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
    """Add to `results` what is measured of a model: rows, curve, examples, map of its states."""
    begin = time.time()
    with run.autocast():
        rows, responses = evaluation.evaluate(model, run.chat, run.parts, run.s)
        first = run.seed == run.s.seed         # examples and maps of one seed are enough
        points = evaluation.state_map(model, run.chat, run.parts, run.s.layer) if first else None
    costs = {"seconds": log["seconds"], "evaluation_seconds": time.time() - begin}
    if log["read"]:                            # a base that was loaded has none
        costs["tokens_per_second"] = log["read"] / log["seconds"]
        costs["padding"] = 1 - log["read"] / log["computed"]
    rows += evaluation.as_rows("stage", "general", 1, **costs)

    whose = {"method": name, "seed": run.seed}
    results["rows"] += [whose | row for row in rows]
    if log["curve"]:
        results["curves"].append(whose | {"curve": log["curve"]})
    if first:
        shown = evaluation.example_responses(run.parts, responses)
        results["maps"].append(whose | {"points": points})
        results["examples"].append(whose | {"responses": shown})

def run_seed(run, results):
    """All stages of one seed, in order. A model that is on disk is loaded, not trained again; one
    with rows in results.json is not measured again. (Delete that file to measure all anew.)"""
    def stage(name, make):
        model, log = finished(run, name, make)
        run.check_lengths(model.config.context)          # before the base is asked the first prompt
        measured = [(row["method"], row["seed"]) for row in results["rows"]]
        if (name, run.seed) not in measured:
            measure(name, model, log, run, results)
            write_json(run.folder.parent / "results.json", results)
        return model

    def load_or_pretrain():
        if not run.s.init:
            return pretrain(run)
        model = GPT.from_pretrained(run.s.init).to(run.device)
        return model, {"seconds": 0.0, "read": 0, "computed": 0, "curve": []}

    base = stage("base", load_or_pretrain)
    stage("STL", lambda: tune("STL", base, run))
    stage("STL-aug", lambda: tune("STL-aug", base, run, augment(base, run)))
    refined = stage("refined", lambda: refine("refined", base, run, shuffled=False))
    stage("DCR", lambda: tune("DCR", refined, run))
    mixed = stage("refined-shuffled", lambda: refine("refined-shuffled", base, run, shuffled=True))
    stage("DCR-shuffled", lambda: tune("DCR-shuffled", mixed, run))

# --------------------------------------------------------------------------------------------------
# 3. The command

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
    return Settings(**defaults | given)

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

def write_json(path, value):
    text = json.dumps(value, indent=1)
    write(path, lambda file: file.write(text.encode()))

def open_results(s, device):
    """The results so far in --out, or new ones. ValueError if other settings made them."""
    settings = dataclasses.asdict(s)
    del settings["out"], settings["seeds"]     # these may change from one run to the next
    path = Path(s.out) / "results.json"
    if not path.exists():
        return {"settings": settings, "environment": environment(device),
                "rows": [], "curves": [], "maps": [], "examples": []}
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
        begin = time.time()
        if s.data:
            parts = load_folder(s.data, seed, evaluation.is_refusal, s.suite)
        else:
            parts = World(seed).parts(s.suite)
        if not parts.pretraining and not s.init:
            raise ValueError("--data needs --init CHECKPOINT: the small GPT knows its world alone")
        if s.split == "development":
            parts = dataclasses.replace(parts, suites=parts.dev)
        chat = load_tokenizer(s.init) if s.init else world_chat(parts, s.vocab)
        print(f"\nseed {seed}: prompts and tokenizer ({time.time() - begin:.1f} s)")
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
