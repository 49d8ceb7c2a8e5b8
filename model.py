"""A small GPT that is also a real one.

One architecture serves the miniature world and the checkpoints people use: pre-norm RMSNorm, rotary
positions, grouped-query attention, SwiGLU, optional biases on q/k/v, optionally tied embeddings. It
IS, with the right sizes, Llama, Qwen2, Qwen3 or SmolLM2, whose checkpoints this file reads.

For the method of "Discern Truth from Falsehood" (arXiv 2603.03323, "the paper") there are
  * `model(tokens, upto=l)`: the residual stream after block l, with nothing computed above it;
  * `last_states`: h_x, the states in that stream that refinement shapes (section 4 of the paper);
  * `model.tail(hidden, since=l)`: everything after block l, the part that refinement freezes.
Read `dcr.py` next: what to do with those states.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import read_json, write, write_json

@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    width: int = 64                # d, the size of the residual stream
    blocks: int = 4
    heads: int = 4
    kv_heads: int = 2              # fewer than `heads`: query heads share keys and values
    head_width: int = 16
    hidden: int = 192              # inner width of the SwiGLU
    context: int = 128             # longest sequence, in tokens
    rope_theta: float = 10_000.0
    rope_scaling: tuple = ()       # Llama 3.1: factor, low, high, original context (`rotary_table`)
    norm_eps: float = 1e-5
    qkv_bias: bool = False         # Qwen2 has it, Llama has not
    qk_norm: bool = False          # Qwen3 normalises each head's q and k
    tied: bool = False             # output head = token embeddings

class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain, in fp32: in bf16 the error of 61 norms shows in greedy answers."""

    def forward(self, x):
        return super().forward(x.float())

def rotary_table(c):
    """cos and sin of position * theta^(-2i/head_width), (context, head_width) each. The halves
    repeat: Llama pairs coordinate i with i + head_width/2."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_width, 2).float() / c.head_width)
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        turns = freq * original / (2 * math.pi)                # within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)      # 1: turns often, keeps its speed
        freq = freq * (keep + (1 - keep) / factor)
    angle = torch.outer(torch.arange(c.context).float(), freq).repeat(1, 2)
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """Turn each pair of coordinates of x (B, heads, T, head_width) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin

class Attention(nn.Module):
    """A token looks at those of its row, up to itself; with a Cache, at those read before, too."""

    def __init__(self, c):
        super().__init__()
        self.head_width = c.head_width
        self.q_proj = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_width, c.width, bias=False)
        self.q_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rotary, cache=None):
        split = (-1, self.head_width)     # x (B, T, width); q, k, v -> (B, heads, T, head_width)
        q = self.q_norm(self.q_proj(x).unflatten(2, split)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(2, split)).transpose(1, 2)      # k, v: kv_heads
        v = self.v_proj(x).unflatten(2, split).transpose(1, 2)
        # Rotation is in fp32, and so are its results; under autocast v is bf16, and all must agree.
        q = rotate(q, *rotary).to(v.dtype)
        k = rotate(k, *rotary).to(v.dtype)
        visible = None
        if cache is not None:
            k, v, visible = cache.extend(self, k, v)
        if visible is not None:          # no fused kernel takes both a mask and fewer keys' heads
            shared = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(shared, 1)                      # (B, heads, T, head_width)
            v = v.repeat_interleave(shared, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None,
                                           enable_gqa=True)         # several heads for each of k, v
        return self.o_proj(y.transpose(1, 2).flatten(2))            # (B, T, heads * head_width)

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
        self.input_layernorm = RMSNorm(c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)   # the stream x stays fp32
        return x + self.mlp(self.post_attention_layernorm(x))

class GPT(nn.Module):
    """Modules are named as in Hugging Face's Llama, except that "model." in front is left out."""

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
        # As in GPT-2, what writes to the stream starts smaller. Biases stay as torch makes them.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.blocks) ** 0.5 if writes else 0.02)

    def forward(self, tokens, upto=None, cache=None):
        """Logits (B, T, vocabulary) of tokens (B, T); with `upto=l` the stream (B, T, width) there.
        l counts from 1: after block l. l = 0 is the embedding. No block above l is computed.
        ValueError: l out of range; T beyond the context; in a Cache, tokens beyond its room."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(f"sequence of {T} tokens exceeds the context of {self.config.context}")
        last = self.config.blocks if upto is None else upto
        stream = self.through_blocks(self.embed_tokens(tokens).float(), 0, last, cache)
        return self.lm_head(self.norm(stream)) if upto is None else stream

    def tail(self, hidden, since):
        """Logits of the stream after block `since`: tail(model(x, upto=l), since=l) == model(x).
        After the last block only norm and head are left: there any shape (..., width) will do.
        No `Cache` here: forward(upto=l) has already claimed its slots for these tokens."""
        stream = self.through_blocks(hidden, since, self.config.blocks)
        return self.lm_head(self.norm(stream))

    def through_blocks(self, x, first, last, cache=None):
        """From the stream x after block `first` to the stream after block `last`."""
        for l in (first, last):
            if not 0 <= l <= self.config.blocks:
                raise ValueError(f"there is no block {l}: the model has {self.config.blocks}")
        if first == last:
            return x                                           # of any shape, as `tail` promises
        T = x.shape[1]
        if cache is None:
            rotary = (self.cos[:T], self.sin[:T])              # (T, head_width) each
        else:
            positions = cache.advance(T)[:, None]              # (B, 1, T): for all heads alike
            rotary = (self.cos[positions], self.sin[positions])    # (B, 1, T, head_width) each
        for block in self.layers[first:last]:
            x = block(x, rotary, cache)
        return x

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The model of a Hugging Face folder (config.json, *.safetensors; of the model_types in
        SUPPORTED): matrices in `dtype`, norms and biases in fp32, context at most CONTEXT_CAP.
        ValueError, one line with file and remedy, for whatever is wrong with the folder."""
        source = Path(folder) / "config.json"
        config = read_config(source)
        stored = read_weights(Path(folder))
        mixed = "use the config and weights of one checkpoint"
        need(config.blocks < len(stored), source, f"{config.blocks} blocks, too many", mixed)
        with torch.device("meta"):                             # shapes alone: nothing is allocated
            model = cls(config)
        if config.tied:
            stored.pop("lm_head.weight", None)                 # a copy of the embeddings
        ours = {hf_name(name): list(p.shape) for name, p in model.named_parameters()}
        theirs = {name: list(tensor.shape) for name, tensor in stored.items()}
        for name in sorted(ours | theirs):
            problem = f"tensor {name} should be {ours.get(name, 'absent')}, in the weights it is "
            problem += f"{theirs.get(name, 'absent')}"
            need(ours.get(name) == theirs.get(name), source, problem, mixed)
        loaded = {}
        for name, p in model.named_parameters():
            tensor = stored[hf_name(name)].to(device, dtype if p.dim() == 2 else torch.float32)
            need(tensor.isfinite().all(), folder, f"tensor {hf_name(name)} has NaN or infinity")
            loaded[name] = tensor.clone()                      # the file may be written over
        model.load_state_dict(loaded, strict=False, assign=True)    # a tied head is not in it
        if config.tied:
            model.lm_head.weight = model.embed_tokens.weight
        cos, sin = rotary_table(config)                        # of "meta" they had no values
        model.cos = cos.to(device)
        model.sin = sin.to(device)
        return model

    def save_pretrained(self, folder):
        """Write model.safetensors, then config.json with the context it was loaded with."""
        c = self.config
        family = "Qwen2" if c.qkv_bias else "Llama"
        if c.qk_norm:
            family = "Qwen3"
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        hf = {"architectures": [family + "ForCausalLM"], "model_type": family.lower(),
              "hidden_act": "silu", "torch_dtype": dtype, "rms_norm_eps": c.norm_eps,
              "tie_word_embeddings": c.tied, "rope_theta": c.rope_theta}
        hf |= {theirs: getattr(c, ours) for ours, theirs in SIZES.items()}
        if c.rope_scaling:
            hf["rope_scaling"] = {"rope_type": "llama3"} | dict(zip(LLAMA3, c.rope_scaling))
        tensors = {hf_name(name): p for name, p in self.named_parameters()}
        write_safetensors(Path(folder) / "model.safetensors", tensors)
        write_json(Path(folder) / "config.json", hf)

class Cache:
    """Keys and values of a batch of prompts: a new token costs one position. Used under no_grad.
    Shorter prompts are filled up on the RIGHT: attention looks back, so no token sees the padding.
    Row b writes its next token at slot lengths[b], over the padding, and sees the slots up to it.
    Lengths 2 and 3, room for 5:   p p . _ _  ->  p p n n _    two new tokens each, in slots 2, 3
                                   p p p _ _  ->  p p p n n                         and in 3, 4"""

    def __init__(self, lengths, room, device):
        self.room = room                                       # slots in each row
        self.longest = max(lengths)
        self.lengths = torch.tensor(lengths, device=device)    # (B,)
        self.next = torch.zeros_like(self.lengths)    # (B,) next slot: 0, prompts are written first
        self.end = 0               # the longest row's next slot; an int, for asking a GPU is slow
        self.store = {}            # attention -> keys, values: each (B, room, kv_heads, head_width)

    def rewind(self):
        """Back to the ends of the prompts: after reading them, and before each continuation."""
        self.next = self.lengths.clone()
        self.end = self.longest

    def advance(self, T):
        """Claim T slots in every row, (B, T), and note what they see, for `extend`. A slot's number
        is its token's position. ValueError for tokens beyond the room."""
        if self.end + T > self.room:
            raise ValueError(f"{self.end} + {T} tokens do not fit in a cache for {self.room}")
        device = self.next.device
        self.slots = self.next[:, None] + torch.arange(T, device=device)
        self.next += T
        self.end += T
        self.visible = None                                    # nothing earlier: faster kernels
        if self.end > T:                                       # (B, 1, T, end): up to its own slot
            self.visible = torch.arange(self.end, device=device) <= self.slots[:, None, :, None]
        return self.slots

    def extend(self, attention, k, v):
        """Store the new k, v (B, kv_heads, T, head_width); return all so far, and `visible`."""
        B, kv_heads, _, head_width = k.shape
        if attention not in self.store:                        # zeros: a masked NaN is still NaN
            keys = k.new_zeros(B, self.room, kv_heads, head_width)
            self.store[attention] = (keys, torch.zeros_like(keys))
        keys, values = self.store[attention]
        rows = torch.arange(B, device=k.device)[:, None]       # (B, 1), beside slots (B, T)
        keys[rows, self.slots] = k.transpose(1, 2)             # (B, T, kv_heads, head_width)
        values[rows, self.slots] = v.transpose(1, 2)
        k = keys[:, :self.end].transpose(1, 2)                 # (B, kv_heads, end, head_width)
        v = values[:, :self.end].transpose(1, 2)
        return k, v, self.visible

def last_states(model, prompts, l, cache=None):
    """h_x of the paper, (n, width): the stream after block l at the last token of n prompts, lists
    of ids. Padding on the right needs no mask: attention looks back. Fills an empty `cache`."""
    tokens = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)        # (n, T)
    last = torch.tensor([len(ids) - 1 for ids in prompts])     # (n,)
    stream = model(tokens.to(model.cos.device), upto=l, cache=cache)       # (n, T, width)
    return stream[torch.arange(len(prompts)), last]

def token_losses(model, tokens, targets):
    """-log pi(y_t | x, y_<t), (n,), of the tokens due, targets[targets >= 0]. In nats, fp32.
    tokens, targets (B, T) are what `data.collate` gives."""
    due = targets >= 0
    blocks = model.config.blocks
    hidden = model(tokens, upto=blocks)                        # (B, T, width)
    logits = model.tail(hidden[due], since=blocks)             # (n, vocabulary): large, so only due
    return F.cross_entropy(logits.float(), targets[due], reduction="none")

@torch.no_grad()
def prefill(model, prompts, extra):
    """Read prompts, to continue them: the state (n, width) at the last token of each, from which
    model.tail(hidden, since=blocks) gets the next logits, and a Cache with room for `extra` tokens
    more. ValueError for a prompt that is empty, or that with these exceeds the context."""
    lengths = [len(prompt) for prompt in prompts]
    context = model.config.context
    for i, length in enumerate(lengths):
        if not 0 < length <= context - extra:
            raise ValueError(f"prompt {i} has {length} tokens: it needs one, and with {extra} more "
                             f"must fit the context of {context}; shorten it or ask for fewer")
    cache = Cache(lengths, max(lengths) + extra, model.cos.device)
    hidden = last_states(model, prompts, model.config.blocks, cache)
    cache.rewind()                                             # new tokens go over the padding
    return hidden, cache

@torch.no_grad()
def generate(model, prompts, max_new, stop):
    """Greedy continuations of prompts: lists of at most `max_new` ids, without the `stop` token.
    The head is computed at one position a row: vocabularies can be large."""
    blocks = model.config.blocks
    hidden, cache = prefill(model, prompts, max_new)           # (rows, width)
    answers = [[] for _ in prompts]
    going = set(range(len(prompts)))                           # rows that have not stopped
    for step in range(max_new):
        token = model.tail(hidden, since=blocks).argmax(-1)    # (rows,)
        for row, new in enumerate(token.tolist()):
            if new == stop:
                going.discard(row)
            elif row in going:
                answers[row].append(new)
        if not going:
            break
        if step < max_new - 1:                                 # the last one is not read again
            hidden = model(token[:, None], upto=blocks, cache=cache)[:, 0]
    return answers

# Checkpoint folders. SIZES: our name of a size, and its name in config.json. SUPPORTED: what
# this file can compute (None: not set); another setting is refused, for the model would be wrong.
SIZES = dict(vocab_size="vocab_size", width="hidden_size", hidden="intermediate_size",
             head_width="head_dim", blocks="num_hidden_layers", heads="num_attention_heads",
             kv_heads="num_key_value_heads", context="max_position_embeddings")
SUPPORTED = {"model_type": ("llama", "qwen2", "qwen3"), "hidden_act": ("silu", None),
             "attention_bias": (False, None), "mlp_bias": (False, None),
             "use_sliding_window": (False, None), "rope_type": ("default", "llama3", None),
             "tie_word_embeddings": (True, False, None), "partial_rotary_factor": (1, None)}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
CONTEXT_CAP = 2048             # config.json often allows far more than fits in memory
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def hf_name(name):
    return name if name.startswith("lm_head.") else "model." + name

def need(ok, file, problem, remedy="the copy is damaged or incomplete, make it again"):
    """Whatever is wrong with a checkpoint is one line: which file, what is wrong, what to do."""
    if not ok:
        raise ValueError(f"{file}: {problem}; {remedy}")

def read_config(path):
    """The GPTConfig of a config.json, its context at most CONTEXT_CAP."""
    remedy = "give a local folder with config.json and *.safetensors"
    need(path.is_file(), path, "no such file", remedy)
    stored = read_json(path)
    need(isinstance(stored, dict), path, "not a JSON object")
    older = stored.get("rope_scaling") or {}                   # rope settings: older files
    newer = stored.get("rope_parameters") or {}                # nest them here, newer ones here
    for nested in (older, newer):
        need(isinstance(nested, dict), path, f"rope settings are {nested!r}, not an object")
    hf = stored | older | newer                                # what is nested there joins the rest
    hf["rope_type"] = hf.get("rope_type") or hf.get("type")
    for key, allowed in SUPPORTED.items():
        only = " or ".join(repr(value) for value in allowed if value is not None)
        problem = f"{key} is {hf.get(key)!r}, only {only} is supported"
        need(hf.get(key) in allowed, path, problem, "choose another checkpoint")

    def number(key, default=None):
        value = default if hf.get(key) is None else hf[key]
        ok = isinstance(value, (int, float)) and 0 < value < 1e12
        need(ok, path, f"{key} is {value!r}, not a number above 0, and finite")
        return value

    heads = number("num_attention_heads")
    defaults = {"num_key_value_heads": heads, "head_dim": number("hidden_size") // heads}
    sizes = {ours: int(number(theirs, defaults.get(theirs))) for ours, theirs in SIZES.items()}
    sizes["context"] = min(sizes["context"], CONTEXT_CAP)
    scaling = tuple(number(key) for key in LLAMA3) if hf["rope_type"] == "llama3" else ()
    return GPTConfig(**sizes, norm_eps=number("rms_norm_eps", 1e-6), rope_scaling=scaling,
                     rope_theta=number("rope_theta", 1e4), qkv_bias=hf["model_type"] == "qwen2",
                     qk_norm=hf["model_type"] == "qwen3", tied=bool(hf.get("tie_word_embeddings")))

def read_weights(folder):
    """{name: tensor} of model.safetensors, or else of its parts, model-00001-of-00002 and so on."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))
    need(files, folder, "no model.safetensors in it", "convert the weights to that format")
    tensors = {}
    for file in files:
        tensors |= read_safetensors(file)
    return tensors

def read_safetensors(path):
    """{name: tensor}, mapped into memory. A file: 8 bytes with the length of a header, the header,
    {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...} in JSON, the tensors."""
    need(path.is_file() and path.stat().st_size > 8, path, "no such file, or nothing in it")
    file = np.memmap(path, mode="c")                           # copy on write: torch wants writable
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    need(start <= len(file), path, f"the header would end at byte {start} of {len(file)}")
    body = file[start:]
    tensors = {}
    filled = 0                                                 # bytes of the body
    try:
        header = json.loads(file[8:start].tobytes())
        header.pop("__metadata__", None)
        # in the order of their bytes: together they fill the file, with nothing between or after
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = entry["dtype"]
            shape = entry["shape"]
            first = entry["data_offsets"][0]       # by index: unpacking raises ValueError, which
            end = entry["data_offsets"][1]         # is let through below, for need() raises it too
            problem = f"tensor {name} is {dtype}, only {', '.join(DTYPES)} are supported"
            need(dtype in DTYPES, path, problem, "choose a checkpoint without quantisation")
            inside = first == filled and end <= len(body) and min(shape, default=0) >= 0
            size = math.prod(shape) * DTYPES[dtype].itemsize
            where = f"cannot lie in bytes {first} to {end}, after {filled} of {len(body)}"
            need(inside and end - first == size, path, f"tensor {name} {dtype} {shape} {where}")
            tensors[name] = torch.from_numpy(body[first:end]).view(DTYPES[dtype]).view(shape)
            filled = end
        need(filled == len(body), path, f"no tensor has the bytes from {filled} on")
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as e:
        need(False, path, f"the header is not one of safetensors ({type(e).__name__})")
    return tensors

def write_safetensors(path, tensors):
    """Write {name: tensor}, each of one of DTYPES, in the format of `read_safetensors`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    arrays = []
    header = {"__metadata__": {"format": "pt"}}                # transformers insists on it
    end = 0
    for name, x in tensors.items():
        start = end
        x = x.detach().cpu().contiguous()
        end += x.nbytes
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [start, end]}
        arrays.append(x.view(torch.uint8).numpy())             # bytes: NumPy has no bfloat16
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                            # tensors start at a multiple of 8
    length = len(text).to_bytes(8, "little")
    write(path, lambda file: file.writelines([length, text, *arrays]))
