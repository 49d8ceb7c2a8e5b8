"""The whole story in one command: `python train.py`.

For every seed, numbered as in the README: 1. make the world (or read --data), 2. train its tokenizer (or
read --init's), 3. pretrain the base (or load it), 4. tune it for safety (STL), 5. the same with
refinement's prompts mixed in (STL-aug), 6. refine the base and tune that (DCR), 7. the same with shuffled
labels (the control), 8. evaluate all, print tables, draw figures.

Every comparison is paired: the same base, the same batches, the same number of steps. Each finished model
is a checkpoint folder, each unfinished one a state on disk, so the same command goes on where it was
stopped.

Stage 2 is the usual SFT objective -E sum_t log pi(y_t | x, y_<t); stage 1 is `dcr.circle_loss` at block l
with every later parameter frozen, and two retention terms. Read `eval.py` next.
"""
import argparse
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import random
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import eval as evaluation
from data import World, collate, load_folder, load_tokenizer, world_chat
from dcr import circle_loss, drift, forgetting
from model import GPT, GPTConfig, Packed, read_config


@dataclass(frozen=True)
class Settings:
    """Every knob, its default and its reason: the defaults ARE the experiment, the comments are --help."""
    out: str = "out"            # folder for checkpoints, results, figures; the same command goes on from it
    init: str = ""              # Hugging Face folder of a Llama, Qwen2 or SmolLM2 chat model, the base then
    data: str = ""              # folder of benchmark files, to use in place of the miniature world
    seed: int = 0               # first seed: facts, splits, initial weights and batches all follow from it
    seeds: int = 1              # how many seeds to run; five or more before believing a difference
    device: str = "auto"        # auto, cpu, cuda or mps; auto takes the first of cuda, mps, cpu that is there
    dtype: str = "auto"         # float32 or bfloat16 for matrix products; auto is bfloat16 on cuda only
    scale: float = 1.0          # multiplies the steps of all stages; 0.02 shows in seconds that all runs

    width: int = 64             # of the small GPT: 48 is too little to hold the world's facts
    blocks: int = 4             # of the small GPT
    vocab: int = 1536           # tokens of the small GPT: most words of the world are then one token
    pretrain_steps: int = 1500  # a base that knows the facts; much longer and plain STL discerns by itself
    pretrain_batch: int = 64    # texts a step
    pretrain_lr: float = 4e-3   # high, as small models like it; warmed up and decayed as in every stage

    layer: int = 3              # l: refinement shapes the states after this block and freezes all above
    refine_steps: int = 300     # the loss is near its floor after 50; in the rest damage heals
    refine_batch: int = 32      # prompts a step, half of each class, and as many general texts for retention
    refine_lr: float = 1e-3     # 3e-4 parts the classes too little to survive the tuning
    margin: float = 0.25        # m of the Circle loss, its authors' value
    gamma: float = 32.0         # scale of the Circle loss: how much harder hard pairs are pulled
    centre: bool = False        # subtract the base's mean state before the cosine; large models need it
    keep: float = 30.0          # weight of KL(base || model) on general texts; the paper has no such term
    still: float = 3.0          # weight of the relative squared drift of states on general texts; nor this

    tune_steps: int = 400       # steps of safety tuning, every method the same
    tune_batch: int = 32        # exchanges a step
    tune_lr: float = 1e-3       # 5e-4 refuses too little, 2e-3 undoes refinement
    refusals: float = 0.05      # share of (toxic prompt, refusal) pairs in tuning, as in Safety-Tuned LLaMAs
    lora: int = 8               # rank of the updates of safety tuning, as the paper uses LoRA; 0 tunes all

    longest: int = 256          # tokens a training sequence; longer answers are cut
    max_new: int = 32           # tokens a response when evaluating
    suite: int = 80             # prompts a half of a suite, at most
    split: str = "held-out"     # suites to evaluate on; choose settings on "development", then report once


# The defaults with --init: tried out on SmolLM2-135M, which has 30 blocks.
REAL = dict(layer=15, refine_steps=40, refine_batch=24, refine_lr=1e-4, gamma=16.0, centre=True, keep=0.0,
            still=1.0, tune_steps=40, tune_batch=16, tune_lr=2e-3, refusals=0.2, lora=16)


# ----------------------------------------------------------------------------------------------------------
# Training: one loop for every stage

class LoRA(nn.Module):
    """W + B A, with A (rank, in) random and B (out, rank) zero at first: training starts from W itself."""

    def __init__(self, weight, rank, generator):
        super().__init__()
        rows, columns = weight.shape                                    # out, in
        self.A = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns ** 0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight):
        return weight + self.B @ self.A


def add_lora(model, rank, seed):
    """Freeze the model, put a LoRA on each linear map of its blocks; returns the parameters to train."""
    model.requires_grad_(False)
    generator, device = torch.Generator().manual_seed(seed), model.cos.device
    for module in list(model.layers.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(
                module, "weight", LoRA(module.weight, rank, generator).to(device))
    return [p for p in model.parameters() if p.requires_grad]


def merge_lora(model):
    """Write W + B A into W: nothing of LoRA is left."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")      # keeps the value of W + B A
    model.requires_grad_(True)


def train(label, model, parameters, loss, steps, lr, state_file, watch=None):
    """Minimise loss(step) -> (scalar, tokens read, tokens computed) over `parameters`; returns a log.

    The state goes to disk every 10 seconds or more and is loaded if it is there: as batches depend on the
    step alone, an interrupted run ends with the numbers of an uninterrupted one. watch() -> dict is called
    20 times, more often early. The log: seconds, tokens read, tokens computed (more by the padding), and a
    curve of what watch() returned. RuntimeError if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    log, first = {"seconds": 0.0, "read": 0, "computed": 0, "curve": []}, 0
    if state_file.exists():
        state = torch.load(state_file, map_location=model.cos.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log, first = state["log"], state["step"]
    watched = {steps * i // 10 for i in range(11)} | {steps * i // 50 for i in range(10)}
    begin, saved, pause = time.time(), time.time(), 10
    bar = tqdm(total=steps, initial=first, desc=label, leave=False)
    for step in range(first, steps + 1):
        if watch and step in watched:
            log["curve"].append({"step": step, **watch()})
        if step == steps:
            break
        for group in optimizer.param_groups:        # warm up over 5 % of the steps, decay to a tenth
            group["lr"] = lr * min(1, (step + 1) / (0.05 * steps + 1)) * max(0.1, 1 - step / steps)
        value, read, computed = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        log["read"], log["computed"] = log["read"] + read, log["computed"] + computed
        if step % 10 == 9 or step == steps - 1 or time.time() - saved > pause:
            if not torch.isfinite(value):           # not at every step: a GPU would wait for the answer
                raise RuntimeError(f"{label}: the loss is {value.item()} at step {step + 1}; lower its "
                                   f"learning rate (now {lr}), with a new --out; finished stages are kept")
            log["seconds"], begin = log["seconds"] + time.time() - begin, time.time()
            bar.set_postfix_str(f"loss {value.item():.3f}, {log['read'] / log['seconds']:,.0f} tokens/s")
            if begin - saved > pause:
                write(state_file, lambda f: torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log,
                     "step": step + 1}, f))
                saved = time.time()
                pause = max(10, 20 * (saved - begin))       # a large model takes long to write: less often
    bar.close()
    log["seconds"] += time.time() - begin
    return log


def write(path, save):
    """save(file) under another name, then rename: `path` is the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        save(f)
    os.replace(part, path)


# ----------------------------------------------------------------------------------------------------------
# The stages. Each takes what it needs, returns (model, log), and draws its batches from (seed, step) alone.

@dataclass
class Run:
    """What all stages of one seed share."""
    s: Settings
    seed: int
    device: str
    folder: Path
    parts: object            # data.Parts
    chat: object             # data.Chat
    autocast: object         # -> context manager

    def rng(self, purpose, step=0):
        return random.Random(f"{purpose} {self.seed} {step}")

    def steps(self, n):
        return max(2, round(n * self.s.scale))

    def tokens(self, e, context):
        """An Example, or plain text, as (ids, index of the first token to learn)."""
        if isinstance(e, str):
            return self.chat.response(e), 1
        prompt = self.chat.prompt(e.prompt)
        longest = min(context, max(self.s.longest, len(prompt) + 8))
        return (prompt + self.chat.response(e.answer))[:longest], len(prompt)

    def check_lengths(self, context):
        """ValueError, naming file and row, for a prompt that leaves no room for a response."""
        halves = [half for suite in self.parts.suites.values() for half in suite.values()]
        for e in sum(halves, self.parts.general + self.parts.general_heldout + self.parts.safe +
                     self.parts.seemingly + self.parts.toxic):
            length = len(self.chat.prompt(e.prompt))
            if length + self.s.max_new > context:
                raise ValueError(f"{e.source or repr(e.prompt)}: {length} tokens and a response of "
                                 f"{self.s.max_new} exceed the model's context of {context}; shorten it")


def sft_loss(model, sequences, run):
    """Mean -log pi(y_t | x, y_<t) over the response tokens alone; tokens read, and computed with padding."""
    blocks, context = model.config.blocks, model.config.context
    tokens, targets, texts = collate(sequences, run.device, context)   # (B, T) each, packed
    learn = targets >= 0
    with run.autocast():
        hidden = model(tokens, upto=blocks, cache=Packed(texts))[learn]        # (n, width): head where due
        logits = model.tail(hidden, since=blocks)                              # (n, vocabulary)
    read = sum(len(ids) - 1 for ids, _ in sequences)
    return F.cross_entropy(logits.float(), targets[learn]), read, tokens.numel()


def pretrain(run):
    s = run.s
    torch.manual_seed(run.seed)
    model = GPT(GPTConfig(vocab_size=run.chat.size, width=s.width, blocks=s.blocks, heads=4, kv_heads=2,
                          head_width=s.width // 4, hidden=3 * s.width)).to(run.device)
    texts = [run.tokens(text, model.config.context) for text in run.parts.pretraining]
    texts = [(ids, 1) for ids, _ in texts]                             # every token teaches
    batches, size = [], s.pretrain_batch
    steps = run.steps(s.pretrain_steps)
    for epoch in range(1 + steps * size // len(texts)):                # neighbours in length share a batch
        order = run.rng("pretraining", epoch).sample(range(len(texts)), len(texts))
        for i in range(0, len(order), 32 * size):
            chunk = sorted(order[i:i + 32 * size], key=lambda j: len(texts[j][0]))
            rows = [chunk[j:j + size] for j in range(0, len(chunk), size)]
            run.rng("bucket", len(batches)).shuffle(rows)
            batches += rows

    def loss(step):
        return sft_loss(model, [texts[j] for j in batches[step]], run)
    return model, train("base", model, list(model.parameters()), loss, steps, s.pretrain_lr,
                        run.folder / "base.state")


def tune(name, base, run, extra=()):
    """Safety tuning: general exchanges and a share of refusals. `extra` adds rows from each of its lists."""
    s, context = run.s, base.config.context
    model = copy.deepcopy(base)
    parameters = add_lora(model, s.lora, run.seed) if s.lora else list(model.parameters())
    general, safe, *more = ([run.tokens(e, context) for e in part]
                            for part in (run.parts.general, run.parts.safe, *extra))
    # as many rows as refinement reads, spread over the steps of tuning: equal compute
    rows = round(2 * s.refine_batch * run.steps(s.refine_steps) / run.steps(s.tune_steps) / max(1, len(more)))

    def loss(step):
        rng = run.rng("tuning", step)
        batch = [rng.choice(safe if rng.random() < s.refusals else general) for _ in range(s.tune_batch)]
        rng = run.rng("extra", step)
        return sft_loss(model, batch + [rng.choice(part) for part in more for _ in range(rows)], run)

    def watch():
        with run.autocast():
            return evaluation.three_classes(model, run.chat, run.parts, s.suite // 2)
    log = train(name, model, parameters, loss, run.steps(s.tune_steps), s.tune_lr,
                run.folder / f"{name}.state", watch)
    merge_lora(model)
    return model, log


def augment(base, run):
    """Refinement's prompts as exchanges, for STL-aug: the benign answered, the toxic refused."""
    rng, unanswered = run.rng("augment"), [e for e in run.parts.seemingly if e.answer is None]
    with run.autocast():                       # where no right answer is known, the base's own
        answers = evaluation.respond(base, run.chat, [e.prompt for e in unanswered], 2 * run.s.max_new)
    own = {e.prompt: answer for e, answer in zip(unanswered, answers)}
    return ([dataclasses.replace(e, answer=own.get(e.prompt, e.answer)) for e in run.parts.seemingly],
            [dataclasses.replace(e, answer=rng.choice(run.parts.safe).answer) for e in run.parts.toxic])


def refine(name, base, run, shuffled):
    """Contrastive refinement: part D_seemingly and D_toxic at block l, the tail frozen, the rest retained."""
    s, l, context = run.s, run.s.layer, base.config.context
    model = copy.deepcopy(base)
    below, above = model.split(l)
    for parameter in above.values():
        parameter.requires_grad_(False)
    parameters = [p for n, p in below.items() if not n.startswith("embed")]    # words keep their meaning
    benign, toxic = run.parts.seemingly, run.parts.toxic
    if shuffled:                               # the control: the same prompts and sizes, the truth destroyed
        mixed = run.rng("shuffled").sample(benign + toxic, len(benign + toxic))
        benign, toxic = mixed[:len(benign)], mixed[len(benign):]
    benign, toxic = ([run.chat.prompt(e.prompt) for e in half] for half in (benign, toxic))
    general = [run.tokens(e, context) for e in run.parts.general]
    half = s.refine_batch // 2
    labels = torch.tensor([0] * half + [1] * half, device=run.device)
    with torch.no_grad():
        mean = evaluation.last_states(base, benign + toxic, l).mean(0)
    centre = mean if s.centre else torch.zeros_like(mean)

    def loss(step):
        rng = run.rng("refinement", step)
        prompts = rng.choices(benign, k=half) + rng.choices(toxic, k=half)        # balanced, as in the paper
        sequences = rng.choices(general, k=s.refine_batch)
        tokens, _, texts = collate(sequences, run.device, context)                # (B, T), packed
        used, packed = texts >= 0, Packed(texts)
        with run.autocast():
            states = evaluation.last_states(model, prompts, l)                    # (2 half, width): h_x
            hidden = model(tokens, upto=l, cache=packed)                          # (B, T, width)
            with torch.no_grad():
                base_hidden = base(tokens, upto=l, cache=packed)
            value = circle_loss(states - centre, labels, margin=s.margin, gamma=s.gamma)
            value = value + s.still * drift(hidden[used], base_hidden[used], mean)
            if s.keep:
                with torch.no_grad():
                    base_logits = base.tail(base_hidden, since=l, cache=packed)[used]
                logits = model.tail(hidden, since=l, cache=packed)[used]          # (n, vocabulary)
                value = value + s.keep * forgetting(logits, base_logits)
        read, more = sum(len(ids) - 1 for ids, _ in sequences), sum(map(len, prompts))
        return value, read + more, tokens.numel() + more
    log = train(name, model, parameters, loss, run.steps(s.refine_steps), s.refine_lr,
                run.folder / f"{name}.state")
    model.requires_grad_(True)
    return model, log


def finished(run, name, make):
    """(model, log) of a stage: from its checkpoint if there is one, else make() -> (model, log)."""
    folder = run.folder / name
    if (folder / "config.json").exists():          # written last, so everything else is there too
        return GPT.from_pretrained(folder).to(run.device), json.loads((folder / "log.json").read_text())
    model, log = make()
    write(folder / "log.json", lambda f: f.write(json.dumps(log).encode()))
    model.save_pretrained(folder)
    (run.folder / f"{name}.state").unlink(missing_ok=True)
    return model, log


def run_seed(run, results):
    """All stages of one seed, in order; what is on disk already is loaded, what is evaluated not again."""
    def stage(name, make):
        model, log = finished(run, name, make)
        run.check_lengths(model.config.context)
        evaluated = {(row["method"], row["seed"]) for row in results["rows"]}
        if (name, run.seed) not in evaluated:
            with run.autocast():
                evaluation.evaluate(name, model, log, run, results)
            save_results(run.folder.parent, results)
        return model

    def load():
        return GPT.from_pretrained(run.s.init).to(run.device), {"seconds": 0.0, "curve": []}

    base = stage("base", load if run.s.init else lambda: pretrain(run))
    stage("STL", lambda: tune("STL", base, run))
    stage("STL-aug", lambda: tune("STL-aug", base, run, augment(base, run)))
    refined = stage("refined", lambda: refine("refined", base, run, shuffled=False))
    stage("DCR", lambda: tune("DCR", refined, run))
    refined = stage("refined-shuffled", lambda: refine("refined-shuffled", base, run, shuffled=True))
    stage("DCR-shuffled", lambda: tune("DCR-shuffled", refined, run))


# ----------------------------------------------------------------------------------------------------------
# The command

def parse(argv):
    """Settings from the command line: one flag a field, its comment as the help, unknown flags an error."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Settings), re.M))
    for f in dataclasses.fields(Settings):
        real = f" (with --init {REAL[f.name]})" if f.name in REAL else ""
        kind = {"choices": ("true", "false")} if f.type is bool else {"type": f.type, "metavar": "X"}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **kind,
                            help=f"[{f.default}{real}] {comments[f.name]}".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    given |= {name: value == "true" for name, value in given.items() if value in ("true", "false")}
    return Settings(**(REAL if given.get("init") else {}) | given)


def pick_device(s):
    """(device, dtype) and the reasons, printed."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in available if available[d]) if s.device == "auto" else s.device
    if device not in available or not available[device]:
        raise ValueError(f"--device {s.device}: not available here; choose from auto, " +
                         ", ".join(d for d in available if available[d]))
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype {s.dtype}: choose float32, bfloat16 or auto")
    why = "the first there is of cuda, mps, cpu" if s.device == "auto" else "asked for"
    print(f"device {device} ({why}), matrix products in {dtype}, {torch.get_num_threads()} threads")
    return device, dtype


def environment(device):
    source = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes()
                      for name in ("data", "model", "dcr", "train", "eval"))
    return {"source": hashlib.sha256(source).hexdigest()[:12], "python": platform.python_version(),
            "torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device}


def save_results(out, results):
    write(out / "results.json", lambda f: f.write(json.dumps(results, indent=1).encode()))


def open_results(s, device):
    """The results so far in --out, or new ones. ValueError if they were made with other settings."""
    settings = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("out", "seeds")}
    if not (Path(s.out) / "results.json").exists():
        return {"settings": settings, "environment": environment(device),
                "rows": [], "curves": [], "maps": [], "examples": []}
    results = evaluation.read_results(Path(s.out))
    changed = [f"{k} was {results['settings'].get(k)!r}, is {v!r}" for k, v in settings.items()
               if results["settings"].get(k) != v]
    if changed:
        raise ValueError(f"{Path(s.out) / 'results.json'}: made with other settings ({'; '.join(changed)}); "
                         "choose another --out, or delete that folder")
    return results


def measure_again(out):
    """Evaluate the saved models of --out anew, as after a change of eval.py."""
    results = evaluation.read_results(out)
    seeds = {row["seed"] for row in results["rows"]}
    s = Settings(**results["settings"], out=str(out), seeds=len(seeds))
    (out / "results.json").replace(out / "results.old.json")
    run_all(s)


def run_all(s):
    device, dtype = pick_device(s)
    blocks = read_config(Path(s.init) / "config.json", 1).blocks if s.init else s.blocks
    if not 1 <= s.layer <= blocks:
        raise ValueError(f"--layer {s.layer}: the model has blocks 1 to {blocks}")
    out, results = Path(s.out), open_results(s, device)
    save_results(out, results)
    for seed in range(s.seed, s.seed + s.seeds):
        begin = time.time()
        parts = (load_folder(s.data, seed, evaluation.is_refusal, s.suite) if s.data else
                 World(seed).parts(s.suite))
        if not parts.pretraining and not s.init:
            raise ValueError("--data needs --init CHECKPOINT: the small GPT knows the miniature world alone")
        if s.split == "development":
            parts = dataclasses.replace(parts, suites=parts.dev)
        chat = load_tokenizer(s.init) if s.init else world_chat(parts, s.vocab)
        print(f"\nseed {seed}: the world ({time.time() - begin:.1f} s)")
        evaluation.show_parts(parts)
        run_seed(Run(s, seed, device, out / f"seed-{seed}", parts, chat, lambda: torch.autocast(
            device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()), results)


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
