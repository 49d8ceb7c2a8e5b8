"""A small GPT that is also a real one.

One architecture serves the miniature world and the checkpoints people use: pre-norm RMSNorm, rotary
positions, grouped-query attention, SwiGLU, optional biases on q/k/v, optionally tied embeddings. With the
right sizes that IS Llama, Qwen2 or SmolLM2: the end of this file reads their checkpoints by itself.

Three things are here for the method's sake:
  * `model(tokens, upto=l)` returns the residual stream after block l and computes nothing above it: this is
    the h_x that contrastive refinement shapes (paper, section 4);
  * `model.tail(hidden, since=l)` is everything after block l: the part that refinement freezes;
  * `model.split(l)` names the parameters on either side of that cut.

There is no training here. Read `dcr.py` next: what to do with those hidden states.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    width: int = 64                # d, the size of the residual stream
    blocks: int = 4
    heads: int = 4
    kv_heads: int = 4              # fewer than `heads`: query heads share keys and values (grouped queries)
    head_width: int = 16
    hidden: int = 192              # inner width of the SwiGLU
    context: int = 128             # longest sequence, in tokens
    rope_theta: float = 10_000.0
    rope_scaling: tuple = ()       # Llama 3.1: factor, low, high, original context; see `rotary_table`
    norm_eps: float = 1e-5
    qkv_bias: bool = False         # Qwen2 has it, Llama has not
    tied: bool = False             # output head = token embeddings


class RMSNorm(nn.Module):
    """x / rms(x) * gain, always in fp32: in bf16 the error of 30 norms in a row shows in greedy answers."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotary_table(c):
    """cos and sin of position * theta^(-2i/head_width), each (context, head_width); the halves repeat:
    Llama pairs coordinate i with i + head_width/2."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_width, 2).float() / c.head_width)     # (head_width/2,)
    if c.rope_scaling:                   # keep what turns often in the original context, slow down the rest
        factor, low, high, original = c.rope_scaling
        keep = ((freq * original / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / factor)
    angle = torch.outer(torch.arange(c.context).float(), freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair of coordinates of x (B, H, T, head_width) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_width, c.width, bias=False)

    def forward(self, x, rotary, cache=None):
        (B, T, _), c = x.shape, self.c
        q = self.q_proj(x).view(B, T, c.heads, c.head_width).transpose(1, 2)     # (B, heads, T, head_width)
        k = self.k_proj(x).view(B, T, c.kv_heads, c.head_width).transpose(1, 2)  # (B, kv_heads, T, same)
        v = self.v_proj(x).view(B, T, c.kv_heads, c.head_width).transpose(1, 2)
        q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)    # v: bf16 under autocast
        k, v, visible = (k, v, None) if cache is None else cache.extend(self, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None,
                                           enable_gqa=c.heads != c.kv_heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                  # (B, T, heads * head_width)


class MLP(nn.Module):
    """SwiGLU: one half of the hidden layer gates the other."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.width, c.norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.width, c.norm_eps), MLP(c)

    def forward(self, x, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)           # the stream x stays fp32
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """Module names are those of Hugging Face's Llama less "model.", so that checkpoints map one to one."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.lm_head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rotary_table(c)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:                     # GPT-2's scheme: what writes to the stream starts smaller
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.blocks) ** 0.5 if writes else 0.02)

    def forward(self, tokens, upto=None, cache=None):
        """Logits (B, T, vocabulary) of tokens (B, T); with `upto=l` the stream (B, T, width) after block l.

        l counts from 1; l = 0 is the embedding. No block above l is computed. With a `Cache`, the tokens
        continue what it holds; a `Packed` in its place says that rows hold several texts. ValueError for
        sequences longer than the context and for an l out of range.
        """
        T, c = tokens.shape[1], self.config
        if T > c.context:
            raise ValueError(f"sequence of {T} tokens exceeds the context of {c.context}")
        last = c.blocks if upto is None else self.check(upto)
        x = self.blocks(self.embed_tokens(tokens).float(), 0, last, cache)
        return self.lm_head(self.norm(x)) if upto is None else x

    def tail(self, hidden, since, cache=None):
        """Logits from the stream after block `since`: tail(model(tokens, upto=l), l) == model(tokens).

        After the last block only norm and head are left, and `hidden` may have any shape (..., width).
        """
        return self.lm_head(self.norm(self.blocks(hidden, self.check(since), self.config.blocks, cache)))

    def blocks(self, x, first, last, cache=None):
        if first < last:
            T = x.shape[1]
            positions = slice(T) if cache is None else cache.advance(T)[:, None]    # (B, 1, T): heads alike
            rotary = self.cos[positions], self.sin[positions]
            for block in self.layers[first:last]:
                x = block(x, rotary, cache)
        return x

    def split(self, l):
        """Two dicts {name: parameter}: the embeddings with blocks 1 to l, and everything after them.

        Tied embeddings are the output head too and count as tail: freezing it freezes them in both roles.
        """
        lower = tuple(f"layers.{i}." for i in range(self.check(l)))
        lower += () if self.config.tied else ("embed_tokens.",)
        below, above = {}, {}
        for name, p in self.named_parameters():
            (below if name.startswith(lower) else above)[name] = p
        return below, above

    def check(self, l):
        if not 0 <= l <= self.config.blocks:
            raise ValueError(f"there is no block {l}: the model has {self.config.blocks}")
        return l

    @classmethod
    def from_pretrained(cls, folder, context=None):
        """The model of a Hugging Face folder (Llama or Qwen2: config.json and safetensors), in fp32.

        `context` (default 2048) caps the length that config.json allows, often far more than memory does.
        Whatever is wrong with the folder is a ValueError of one line that names the file and the remedy.
        """
        source = Path(folder) / "config.json"
        model, stored = cls(read_config(source, context or 2048)), read_weights(Path(folder))
        wanted = {hf_name(name): p for name, p in model.named_parameters()}
        if model.config.tied:
            stored.pop("lm_head.weight", None)                 # a copy of the embeddings
        for name in sorted(wanted.keys() | stored):
            asked, found = (list(x[name].shape) if name in x else "absent" for x in (wanted, stored))
            need(asked == found, source, f"tensor {name} should be {asked}, in the weights it is {found}",
                 "use the config.json and all the weights of one checkpoint")
            wanted[name].data.copy_(stored[name])
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (fp32), for `from_pretrained` and for transformers."""
        folder, c, end = Path(folder), self.config, 0
        kind, name = ("qwen2", "Qwen2ForCausalLM") if c.qkv_bias else ("llama", "LlamaForCausalLM")
        config = {"architectures": [name], "model_type": kind, "hidden_act": "silu", "torch_dtype": "float32",
                  "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied, "rope_theta": c.rope_theta,
                  **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()}}
        if c.rope_scaling:
            config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(LLAMA3, c.rope_scaling))}
        header = {"__metadata__": {"format": "pt"}}            # transformers insists on it
        for name, p in self.named_parameters():
            header[hf_name(name)] = {"dtype": "F32", "shape": list(p.shape),
                                     "data_offsets": [end, end := end + 4 * p.numel()]}
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)                    # the tensors start at a multiple of 8
        tensors = (p.detach().float().cpu().contiguous().numpy() for p in self.parameters())
        write(folder / "model.safetensors", (len(header).to_bytes(8, "little"), header, *tensors))
        write(folder / "config.json", (json.dumps(config, indent=2).encode(),))


class Packed:
    """Several texts in a row, so that short ones leave no padding; attention meets it in a cache's place.

    `texts` (B, T) says whose token each is. A token sees its own text, up to itself. Where in its row a text
    begins does not matter: rotary attention knows distances only.

    texts a a b   ->   token 0 sees 0; token 1 sees 0, 1; token 2 sees 2
    """

    def __init__(self, texts):
        self.visible = (texts[:, :, None] == texts[:, None, :]).tril()[:, None]               # (B, 1, T, T)

    def advance(self, T):
        return torch.arange(T, device=self.visible.device)[None]                              # (1, T)

    def extend(self, layer, k, v):
        return k, v, self.visible


class Cache:
    """Keys and values of a batch of prompts: a new token then costs one position, not the whole sequence.

    Prompts of different lengths are padded on the RIGHT: attention looks back, so no token sees the padding.
    Row b writes its next token at its own slot lengths[b] + t, over the padding, and sees the slots up to it.
    Lengths 2 and 3, room for 5:   p p . _ _  ->  p p n n _     two new tokens each, in slots 2, 3
                                   p p p _ _  ->  p p p n n                          and in 3, 4
    `rewind` goes back to the end of the prompts: another continuation, same prefill. For use under no_grad.
    """

    def __init__(self, lengths, room, device=None):
        self.longest, self.room = max(lengths), room           # room: slots per row
        self.lengths = torch.tensor(lengths, device=device)    # (B,)
        self.next, self.end = torch.zeros_like(self.lengths), 0        # next slot of each row (B,), largest
        self.store = {}                  # attention -> [keys, values], each (B, room, kv_heads, head_width)

    def rewind(self):
        self.next, self.end = self.lengths, self.longest

    def keep(self, rows):
        """Forget all rows but these (indices)."""
        self.lengths, self.next = self.lengths[rows], self.next[rows]
        self.store = {layer: [x[rows] for x in pair] for layer, pair in self.store.items()}

    def advance(self, T):
        """Claim T slots in every row; returns them, (B, T). A slot's number is its token's position."""
        if self.end + T > self.room:
            raise ValueError(f"{self.end} + {T} tokens do not fit in a cache with room for {self.room}")
        device, prefill = self.next.device, self.end == 0
        self.slots = self.next[:, None] + torch.arange(T, device=device)
        self.next, self.end = self.next + T, self.end + T
        up_to_own = torch.arange(self.end, device=device) <= self.slots[:, None, :, None]     # (B, 1, T, end)
        self.visible = None if prefill else up_to_own          # None: plain causal, which has faster kernels
        return self.slots

    def extend(self, layer, k, v):
        """Store new k, v (B, kv_heads, T, head_width); returns all so far, and which of them a token sees."""
        (B, H, _, D), rows = k.shape, torch.arange(len(k), device=k.device)[:, None]
        if layer not in self.store:                            # zeros: a masked NaN is still NaN (0 * NaN)
            self.store[layer] = [k.new_zeros(B, self.room, H, D), v.new_zeros(B, self.room, H, D)]
        for stored, new in zip(self.store[layer], (k, v)):
            stored[rows, self.slots] = new.transpose(1, 2)     # (B, T, kv_heads, head_width)
        k, v = (stored[:, :self.end].transpose(1, 2) for stored in self.store[layer])
        return k, v, self.visible


@torch.no_grad()
def prefill(model, prompts, room, pad=0):
    """Read `prompts`, lists of token ids, once. Returns the last hidden state of each, (B, width), for which
    `model.tail(hidden, since=blocks)` gives the next logits, and a Cache that `room` more tokens fit in."""
    most = model.config.context - room
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= most:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: it needs 1 to {most}, for {room} more to "
                             f"fit the context of {most + room}; shorten it or ask for fewer new tokens")
    lengths, device = [len(prompt) for prompt in prompts], model.cos.device
    cache = Cache(lengths, max(lengths) + room, device)
    padded = [prompt + [pad] * (cache.longest - len(prompt)) for prompt in prompts]
    hidden = model(torch.tensor(padded, device=device), upto=model.config.blocks, cache=cache)
    cache.rewind()                                             # new tokens go over the padding
    return hidden[torch.arange(len(prompts), device=device), cache.lengths - 1], cache


@torch.no_grad()
def generate(model, prompts, max_new, stop, pad=0):
    """Greedy continuations of `prompts`, lists of token ids of any lengths: lists of at most `max_new` ids,
    without the `stop` token. The head is computed at one position per row: vocabularies can be large."""
    hidden, cache = prefill(model, prompts, max_new, pad)      # (B, width)
    answers, going = [[] for _ in prompts], list(range(len(prompts)))
    for step in range(max_new):
        if step:
            hidden = model(token[:, None], upto=model.config.blocks, cache=cache)[:, 0]
        token = model.tail(hidden, since=model.config.blocks).argmax(-1)          # (rows still going,)
        rows = (token != stop).nonzero()[:, 0]
        if len(rows) < len(token):                             # those that stopped leave the batch
            cache.keep(rows)
            token, going = token[rows], [going[r] for r in rows.tolist()]
        if not going:
            break
        for i, t in zip(going, token.tolist()):
            answers[i].append(t)
    return answers


@torch.no_grad()
def generate_plain(model, prompts, max_new, stop):
    """What `generate` means: one prompt at a time, everything computed anew for each token."""
    answers = [[] for _ in prompts]
    for prompt, answer in zip(prompts, answers):
        for _ in range(max_new):
            token = model(torch.tensor([prompt + answer], device=model.cos.device))[0, -1].argmax().item()
            if token == stop:
                break
            answer.append(token)
    return answers


# Checkpoint folders. SIZES: our name of a size, its name in config.json. SUPPORTED: other values are refused.
SIZES = dict(vocab_size="vocab_size", width="hidden_size", hidden="intermediate_size", head_width="head_dim",
             blocks="num_hidden_layers", heads="num_attention_heads", kv_heads="num_key_value_heads",
             context="max_position_embeddings")
SUPPORTED = {"model_type": ("llama", "qwen2"), "hidden_act": ("silu", None), "attention_bias": (False, None),
             "mlp_bias": (False, None), "use_sliding_window": (False, None),
             "rope_type": ("default", "llama3", None)}
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def hf_name(name):
    return name if name.startswith("lm_head.") else "model." + name


def need(ok, file, problem, remedy="the copy is damaged or incomplete, make it again"):
    """Whatever is wrong with a checkpoint is one line: which file, what is wrong, what to do."""
    if not ok:
        raise ValueError(f"{file}: {problem}; {remedy}")


def write(path, chunks):
    """First under another name: `path` is the old file or the whole new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.writelines(chunks)
    os.replace(part, path)


def read_json(path):
    need(path.is_file(), path, "no such file", "give a local folder with config.json and *.safetensors")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as e:
        need(False, path, f"not a JSON object ({e})")


def read_config(path, context):
    """GPTConfig of a config.json; what this file would compute wrongly is refused."""
    hf = read_json(path)
    hf |= (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})     # older, newer files
    hf["rope_type"] = hf.get("rope_type") or hf.get("type")
    for key, allowed in SUPPORTED.items():
        only = " or ".join(repr(value) for value in allowed if value is not None)
        need(hf.get(key) in allowed, path, f"{key} is {hf.get(key)!r}, only {only} is supported",
             "choose another checkpoint")

    def number(key, default=None):
        value = default if hf.get(key) is None else hf[key]
        need(isinstance(value, (int, float)) and value > 0, path, f"{key} is {value!r}, not a number above 0")
        return value

    hf["num_key_value_heads"] = number("num_key_value_heads", number("num_attention_heads"))
    hf["head_dim"] = number("head_dim", number("hidden_size") // number("num_attention_heads"))
    sizes = {ours: int(number(theirs)) for ours, theirs in SIZES.items()}
    sizes["context"] = min(sizes["context"], context)
    return GPTConfig(**sizes, norm_eps=number("rms_norm_eps", 1e-6), rope_theta=number("rope_theta", 1e4),
                     rope_scaling=tuple(map(number, LLAMA3)) if hf["rope_type"] == "llama3" else (),
                     qkv_bias=hf["model_type"] == "qwen2", tied=bool(hf.get("tie_word_embeddings")))


def read_weights(folder):
    """{name: tensor} from model.safetensors, or the shards that an index lists, or any *.safetensors."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [one] if one.exists() else sorted(folder.glob("*.safetensors"))
    if index.exists() and not one.exists():
        shards = read_json(index).get("weight_map")
        need(isinstance(shards, dict), index, "no weight_map in it")
        files = sorted({folder / str(name) for name in shards.values()})
    need(files, folder, "no *.safetensors in it", "convert the weights to that format")
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()
            if not name.endswith("rotary_emb.inv_freq")}       # constants in old checkpoints


def read_safetensors(path):
    """{name: tensor}, mapped into memory. The file: 8 bytes with the length of the header, a header in JSON,
    {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}, and the bytes of the tensors."""
    need(path.is_file() and path.stat().st_size > 8, path, "no such file, or nothing in it")
    data = np.memmap(path, mode="c")                           # copy on write: torch wants writable memory
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    need(start <= len(data), path, f"the header would end at byte {start} of {len(data)}")
    try:
        header, tensors = json.loads(data[8:start].tobytes()), {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            first, end = offsets[0], offsets[1]
            need(dtype in DTYPES, path, f"tensor {name} is {dtype}, only {', '.join(DTYPES)} are supported",
                 "choose a checkpoint without quantisation")
            fits = 0 <= first <= end <= len(data) - start and min(shape, default=0) >= 0
            need(fits and end - first == math.prod(shape) * DTYPES[dtype].itemsize, path,
                 f"tensor {name} {dtype} {shape} cannot lie in bytes {first} to {end} of {len(data) - start}")
            tensors[name] = torch.from_numpy(data[start + first:start + end]).view(DTYPES[dtype]).view(shape)
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as e:
        need(False, path, f"the header is not one of safetensors ({type(e).__name__})")
    return tensors
