"""Speed and memory of the parts that count, each against a well-known implementation of the same.

    python tests/bench.py [--only circle step generate kernel] [--quick] [--out bench.json]
    python tests/bench.py --fit 0.5B 1.5B 7B

Ours and theirs take turns within one run, after a warm-up, and the medians are compared: a busy machine then
slows down both. On a CPU, peak memory is that of a process of its own that does the work once, less what it
held before; on a GPU it is the allocator's. Nothing here is a test: times depend on the machine.

  circle    Circle loss, forward and backward             pytorch-metric-learning; the bare matrix products
  step      a training step (forward, backward, AdamW)    transformers' LlamaForCausalLM of the same shape
  generate  greedy continuations of 64 prompts            transformers' generate
  kernel    exact kernel norms of 15 prompts              Jacobians in full, by torch.func
"""
import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Example, World, world_chat                            # noqa: E402 (after the path is set)
from dcr import circle_loss, kernel_norms                              # noqa: E402
from model import GPT, GPTConfig, generate                             # noqa: E402
from train import REAL, Run, parse, refine, resolve, sft_loss, tune    # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = GPTConfig(vocab_size=1536, heads=4, kv_heads=2)                 # the GPT of train.py, with more words
SMOLLM2 = GPTConfig(vocab_size=49152, width=576, blocks=30, heads=9, kv_heads=3, head_width=64, hidden=1536,
                    context=2048, tied=True)                           # SmolLM2-135M


# ----------------------------------------------------------------------------------------------------------
# The works. Each case is (name, repeats, {who: make}); make() -> a function that does the work once.

def circle(quick):
    sizes = {"cpu": [256, 1024, 4096], "cuda": [1024, 4096, 16384, 65536]}[DEVICE]
    widths = {"cpu": (64, 576), "cuda": (64, 1024)}[DEVICE]
    if quick:
        sizes = sizes[:2]
    for d in widths:
        for N in sizes:
            def features():
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(N, d, generator=generator).to(DEVICE).requires_grad_()
                return x, (torch.arange(N) % 2).to(DEVICE)

            def ours():
                x, labels = features()
                return lambda: torch.autograd.grad(circle_loss(x, labels), x)

            def theirs():
                from pytorch_metric_learning.losses import CircleLoss
                x, labels = features()
                loss = CircleLoss(m=0.25, gamma=32)
                return lambda: torch.autograd.grad(loss(x, labels), x)

            def products():                      # one for the similarities, one for either side's gradient
                x = features()[0].detach()
                rows = 4096

                def work():
                    for i in range(0, N, rows):
                        s = x[i:i + rows] @ x.T
                        s @ x, s.T @ x[i:i + rows]
                return work
            theirs_fits = DEVICE == "cpu" or N <= 32768                # 59 bytes a pair: 63 GB at 32,768
            peers = {"pytorch-metric-learning": theirs} if theirs_fits else {}
            yield f"Circle loss, N = {N:,}, d = {d}", 7, {"ours": ours, **peers, "bare products": products}


def llama(config):
    from transformers import LlamaConfig, LlamaForCausalLM
    c = LlamaConfig(vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.hidden,
                    num_hidden_layers=config.blocks, num_attention_heads=config.heads,
                    num_key_value_heads=config.kv_heads, head_dim=config.head_width,
                    rms_norm_eps=config.norm_eps, max_position_embeddings=config.context,
                    tie_word_embeddings=config.tied, bos_token_id=None, eos_token_id=None, pad_token_id=0,
                    attn_implementation="sdpa")
    return LlamaForCausalLM(c).to(DEVICE)


def step(quick):
    """Once on a full rectangle of tokens, every one with a target: the network alone. Once on exchanges of
    mixed lengths, where the answers teach: ours as `train.sft_loss` does it, packed and with the head where
    it is due; theirs the usual way, padded, with labels of -100."""
    many = {"cpu": {"small GPT": (SMALL, 64), "SmolLM2-135M": (SMOLLM2, 4)},
            "cuda": {"small GPT": (SMALL, 512), "SmolLM2-135M": (SMOLLM2, 64)}}[DEVICE]
    run = SimpleNamespace(s=SimpleNamespace(device=DEVICE), autocast=lambda: torch.autocast(
        DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"))
    if quick:
        del many["SmolLM2-135M"]
    for name, (config, B) in many.items():
        T = 24 if config is SMALL else 128
        rectangle = torch.randint(1, config.vocab_size, (B, T + 1))
        shapes = [(T // 2 + 5 * i % T + 4, T // 3 + 3 * i % T // 2) for i in range(B)]
        exchanges = [(torch.randint(1, config.vocab_size, (length,)).tolist(), first_of_answer)
                     for length, first_of_answer in shapes]
        longest = max(len(ids) for ids, _ in exchanges)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in exchanges])
        labels = torch.tensor([[-100] * first + ids[first:] + [-100] * (longest - len(ids))
                               for ids, first in exchanges])
        texts = [(ids, 1) for ids in rectangle.tolist()]
        for what, sequences, tokens, targets in (("rectangle", texts, rectangle, rectangle),
                                                 ("exchanges", exchanges, padded, labels)):
            def ours(model):
                if what == "exchanges":
                    return sft_loss(model, sequences, run)
                logits = model(tokens[:, :-1])
                return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten())

            def theirs(model):
                logits = model(tokens[:, :-1]).logits
                return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten())

            def training(make, loss):
                def start():
                    torch.manual_seed(0)
                    model = make(config)
                    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

                    def work():
                        with run.autocast():
                            value = loss(model)
                        value.backward()
                        optimizer.step()
                        optimizer.zero_grad()
                    return work
                return start
            tokens, targets = tokens.to(DEVICE), targets.to(DEVICE)
            yield (f"training step, {name}, {what}, {sum(len(ids) - 1 for ids, _ in sequences):,} tokens",
                   30 if config is SMALL else 7,
                   {"ours": training(lambda config: GPT(config).to(DEVICE), ours),
                    "transformers": training(llama, theirs)})


def generation(quick):
    lengths = [8 + 5 * i % 33 for i in range(64)]
    new = 32
    networks = {"small GPT": SMALL, "SmolLM2-135M": SMOLLM2}
    if quick:
        del networks["SmolLM2-135M"]
    for name, config in networks.items():
        def prompts():
            generator = torch.Generator().manual_seed(0)
            return [torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

        def ours():
            torch.manual_seed(0)
            model = GPT(config).to(DEVICE).eval()
            return lambda: generate(model, prompts(), new, stop=-1)

        def theirs():
            torch.manual_seed(0)
            model = llama(config).eval()
            longest = max(lengths)
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts()], device=DEVICE)
            mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=DEVICE)
            return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        yield (f"64 prompts, {new} new tokens, {name}", 15 if config is SMALL else 3,
               {"ours": ours, "transformers": theirs})


def kernels(quick):
    torch.manual_seed(0)
    lengths = [5 + i % 9 for i in range(15)]
    model = GPT(SMALL).to(DEVICE)
    prompts = [torch.randint(1, 1536, (n,)).tolist() for n in lengths]

    def jacobian(ids):
        parameters = dict(model.named_parameters())
        tokens = torch.tensor([ids], device=DEVICE)
        rows = jacrev(lambda p: functional_call(model, p, (tokens,))[0, -1], chunk_size=64)(parameters)
        return torch.cat([row.flatten(1) for row in rows.values()], 1)               # (V, parameters): 2.4 GB

    def theirs():                                # one pair: two Jacobians, their product and its norm
        return lambda: (jacobian(prompts[0]).detach() @ jacobian(prompts[8]).detach().T).norm()
    # all pairs take 15 Jacobians, if they can be kept (36 GB), and 120 products: at least 7.5 times as long
    yield "kernel norms of 15 prompts (theirs: 2 prompts)", 1 if quick else 2, {
        "ours": lambda: lambda: kernel_norms(model, prompts), "torch.func": theirs}


# Shapes of Qwen2.5, by size
SHAPES = {"0.5B": dict(width=896, blocks=24, heads=14, kv_heads=2, head_width=64, hidden=4864, tied=True),
          "1.5B": dict(width=1536, blocks=28, heads=12, kv_heads=2, head_width=128, hidden=8960, tied=True),
          "7B": dict(width=3584, blocks=28, heads=28, kv_heads=4, head_width=128, hidden=18944)}


def fit(sizes):
    """Does it fit the card? Peak memory and time of the stages as `train.py --init` runs them, on random
    models of Qwen2.5's shapes, with prompts of 50 tokens and answers of 65: matrices in bf16, LoRA twice.
    ValueError without a GPU. (STL-aug-equal reads several times as many rows a step, and takes more.)"""
    if DEVICE != "cuda":
        raise ValueError("--fit: no GPU that torch can use, and a CPU would take hours")
    world = World(0).parts(4)
    chat = world_chat(world)
    rng = random.Random(0)
    objects = [o for members in World(0).members.values() for o in members]

    def examples(n):
        texts = [" ".join(rng.choices(objects, k=k)) for k in (47, 64) * n]
        return [Example(prompt, answer) for prompt, answer in zip(texts[::2], texts[1::2])]
    parts = replace(world, general=examples(200), safe=examples(50), seemingly=examples(50),
                    toxic=examples(50))
    settings = replace(resolve(parse(["--dtype=bfloat16"])), **REAL)
    for size in sizes:
        config = GPTConfig(vocab_size=152064, context=2048, qkv_bias=True, **SHAPES[size])
        with torch.device(DEVICE):
            base = GPT(config)
        for p in base.parameters():
            p.data = p.data.bfloat16() if p.dim() == 2 else p.data
        s = replace(settings, layer=config.blocks - 2, refine_steps=5, tune_steps=5)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(s, Path(folder), parts, chat)
            refined, refining = refine("refined", base, run, s)
            del base
            _, tuning = tune("DCR", refined, run)
            for stage, log in (("refinement", refining), ("tuning", tuning)):
                yield {"model": size, "stage": stage, "GB": log.get("gpu_gb"),
                       "seconds a step": log["seconds"] / 5}
        del refined


SECTIONS = {"circle": circle, "step": step, "generate": generation, "kernel": kernels}
NEEDS = {"pytorch-metric-learning": "pytorch_metric_learning", "transformers": "transformers"}


# ----------------------------------------------------------------------------------------------------------
# Measuring

def seconds(work):
    if DEVICE == "cuda":
        torch.cuda.synchronize()                 # what was queued before does not count
    begin = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def memory_here(work):
    """Peak bytes while work() runs, beyond what was held before; on a CPU only right in a new process."""
    if DEVICE == "cuda":
        work()                                   # workspaces that the first time leaves do not count
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - held

    def kilobytes(field):
        return int(Path("/proc/self/status").read_text().split(field)[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")                      # the peak so far is forgotten (Linux)
    held = kilobytes("VmRSS:")
    work()
    return 1024 * (kilobytes("VmHWM:") - held)


def memory(section, name, who, work):
    if DEVICE == "cuda":
        return memory_here(work)
    if DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    child = subprocess.run([sys.executable, __file__, "--memory", section, name, who], capture_output=True,
                           text=True)
    return int(child.stdout.split()[-1]) if child.returncode == 0 else None


def measure(section, quick):
    """Rows {work, who: {seconds, bytes}} of all cases of a section."""
    for name, repeats, cases in SECTIONS[section](quick):
        works = {}
        times = {}
        for who, make in cases.items():
            if find_spec(NEEDS.get(who, "torch")) is None:
                print(f"{who} is not installed: skipped", file=sys.stderr)
                continue
            works[who] = make()
            times[who] = []
            warm_up = 1 if repeats < 5 else 3
            try:
                for _ in range(warm_up):
                    works[who]()
            except torch.cuda.OutOfMemoryError:
                print(f"{who} runs out of memory at: {name}", file=sys.stderr)
                del works[who]
        for _ in tqdm(range(repeats), desc=name, leave=False):
            for who, work in works.items():
                times[who].append(seconds(work))
        yield {"work": name, **{who: {"seconds": statistics.median(times[who]),
                                      "bytes": memory(section, name, who, works[who])} for who in works}}


def table(rows):
    lines = ["| work | ours | theirs | ratio | memory, ours | theirs |", "|---|---|---|---|---|---|"]
    for row in rows:
        peers = [who for who in row if who not in ("work", "ours")]
        for who in peers:
            ours = row["ours"]
            theirs = row[who]
            held = ["-" if x["bytes"] is None else f"{x['bytes'] / 2 ** 20:,.0f} MB" for x in (ours, theirs)]
            lines.append(f"| {row['work']} | {1000 * ours['seconds']:,.1f} ms | "
                         f"{1000 * theirs['seconds']:,.1f} ms ({who}) | "
                         f"{theirs['seconds'] / ours['seconds']:.2f} | {held[0]} | {held[1]} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="[all] sections")
    parser.add_argument("--quick", action="store_true", help="the small sizes alone")
    parser.add_argument("--fit", nargs="+", choices=SHAPES, default=[], metavar="SIZE",
                        help="instead: do models of 0.5B, 1.5B, 7B fit the GPU?")
    parser.add_argument("--out", default="", help="[none] file for the figures as JSON")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)           # in a child process
    args = parser.parse_args()
    if args.memory:
        section, name, who = args.memory
        make = next(cases[who] for work, _, cases in SECTIONS[section](False) if work == name)
        print(memory_here(make()))
        return
    found = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "cpu",
             "threads": torch.get_num_threads(), "torch": torch.__version__,
             **{name: version(name) for name, module in NEEDS.items() if find_spec(module)}}
    print(", ".join(f"{key} {value}" for key, value in found.items()))

    def measured():
        if args.fit:
            yield from fit(args.fit)
        else:
            for section in args.only:
                yield from measure(section, args.quick)

    rows = []
    for row in measured():
        rows.append(row)
        if args.fit:
            print(row)
        if args.out:                                                   # what is measured is kept
            part = Path(args.out + ".part")
            part.write_text(json.dumps({**found, "rows": rows}, indent=1))
            part.replace(args.out)
    if not args.fit:
        print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: it does not fit: {error}")
    except ValueError as error:
        sys.exit(f"error: {error}")
