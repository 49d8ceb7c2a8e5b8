"""What `model.py` claims: it IS Llama and Qwen2, the cut at block l is a cut, the cache changes nothing but
time, and a bad checkpoint is one clear line. Everything runs on tiny random models, offline."""
import json
import math

import pytest
import torch

from data import collate
from model import (GPT, Cache, GPTConfig, generate, last_states, prefill,
                   read_safetensors, rotary_table, rotate, token_losses, write_safetensors)

TINY = dict(vocab_size=50, width=32, blocks=3, heads=4, kv_heads=2, head_width=8, hidden=48, context=64)


def tiny(seed=0, **changes):
    """Weights 5 times the usual: at initialisation's own, all logits are nearly equal and hide errors."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | changes))
    for p in model.parameters():
        p.data += torch.randn_like(p) * (0.1 if p.dim() == 2 else 0.3)
    return model


def some_tokens(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- the network itself

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)


@pytest.mark.parametrize("kind, changes", [
    ("Llama", {}), ("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(head_dim=16)),
    ("Llama", dict(rope_parameters=LLAMA3 | dict(rope_theta=500.0))),
    ("Qwen2", {}), ("Qwen2", dict(tie_word_embeddings=True)),
    ("Qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))), ("Qwen3", dict(head_dim=16)),
])
def test_logits_are_those_of_transformers(kind, changes, tmp_path):
    """Any slip in the order of norms, the pairing of rotary coordinates or the sharing of heads shows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **changes)).eval()
    for p in peer.parameters():                  # biases start at 0, gains at 1: an error would not show
        p.data += torch.randn_like(p) * 0.3 if p.dim() == 1 else 0
    peer.save_pretrained(tmp_path)
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        expected = peer(tokens).logits
        ours = GPT.from_pretrained(tmp_path)(tokens)
    assert expected.std() > 0.5 and torch.allclose(ours, expected, atol=1e-4)


def test_rotary_depends_only_on_the_distance():
    cos, sin = rotary_table(GPTConfig(**TINY))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    score = lambda i, j: (rotate(q, cos[i], sin[i]) * rotate(k, cos[j], sin[j])).sum()
    assert torch.allclose(score(7, 3), score(47, 43), atol=1e-5)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


def test_a_later_token_leaves_earlier_logits_unchanged():
    model = tiny()
    tokens = some_tokens(1, 12)
    before = model(tokens)
    tokens[0, 8] = (tokens[0, 8] + 1) % 50
    after = model(tokens)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-2)


def test_under_autocast_the_residual_stream_stays_fp32():
    model = tiny()
    seen = []
    for block in model.layers:
        block.mlp.down_proj.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        stream = model(some_tokens(2, 12), upto=3)
    assert seen == [torch.bfloat16] * 3 and stream.dtype == torch.float32
    assert torch.allclose(stream, model(some_tokens(2, 12), upto=3), atol=0.1 * stream.std().item())


# ----------------------------------------------------------------------------------------- the cut at block l

@pytest.mark.parametrize("l", [0, 1, 2, 3])
def test_tail_of_the_stream_after_block_l_is_the_model(l):
    model = tiny()
    tokens = some_tokens(2, 12)
    assert torch.equal(model.tail(model(tokens, upto=l), since=l), model(tokens))


def test_tail_after_the_last_block_takes_single_positions():
    model = tiny()
    tokens = some_tokens(2, 12)
    hidden = model(tokens, upto=3)
    assert torch.allclose(model.tail(hidden[:, 5], since=3), model(tokens)[:, 5], atol=1e-5)
    assert torch.allclose(model.tail(hidden[0, 5], since=3), model(tokens)[0, 5], atol=1e-5)


def above(model, l):
    """The parameters that come after block l."""
    return [*model.layers[l:].parameters(), *model.norm.parameters(), *model.lm_head.parameters()]


@pytest.mark.parametrize("l", [0, 1, 2, 3])
def test_upto_l_computes_nothing_above_block_l(l):
    """Every later parameter is NaN; one touch and the stream would be NaN too."""
    model = tiny()
    tokens = some_tokens(2, 12)
    clean = model(tokens, upto=l)
    for p in above(model, l):
        p.data.fill_(float("nan"))
    assert torch.equal(model(tokens, upto=l), clean)


def test_untied_the_tail_has_no_gradient_from_the_stream_even_unfrozen():
    model = tiny()
    model(some_tokens(2, 12), upto=2).square().sum().backward()
    assert all(p.grad is None for p in above(model, 2))


@pytest.mark.parametrize("call", [lambda m: m(some_tokens(1, 4), upto=4),
                                  lambda m: m(some_tokens(1, 4), upto=-1),
                                  lambda m: m.tail(torch.zeros(1, 4, 32), since=4)])
def test_a_block_that_does_not_exist_is_an_error(call):
    with pytest.raises(ValueError, match="there is no block (4|-1): the model has 3"):
        call(tiny())


def test_a_sequence_beyond_the_context_is_an_error():
    with pytest.raises(ValueError, match="sequence of 65 tokens exceeds the context of 64"):
        tiny()(some_tokens(1, 65))


# ------------------------------------------------------------------------------ states and losses of prompts

PROMPTS = [some_tokens(n, seed=n).tolist() for n in (1, 9, 4, 17, 9)]


@pytest.mark.parametrize("l", [0, 1, 2, 3])
def test_last_states_are_those_at_the_last_token_of_each_prompt(l):
    """No mask hides the padding, and none is needed: each prompt alone has the same state."""
    model = tiny()
    states = last_states(model, PROMPTS, l)
    for ids, state in zip(PROMPTS, states, strict=True):
        assert torch.allclose(state, model(torch.tensor([ids]), upto=l)[0, -1], atol=1e-5)


def test_token_losses_are_those_of_one_sequence_and_one_token_at_a_time():
    """Each loss is computed anew from the tokens before it alone, however long the other rows are."""
    model = tiny()
    sequences = [(ids, first) for ids, first in zip(PROMPTS[1:], (3, 1, 16, 9 - 2))]
    tokens, targets = collate(sequences, "cpu")
    losses = token_losses(model, tokens, targets)
    assert len(losses) == sum(len(ids) - first for ids, first in sequences) == (targets >= 0).sum()
    owner = (targets >= 0).nonzero()[:, 0]
    for i, (ids, first) in enumerate(sequences):
        alone = [-model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]]
                 for t in range(first, len(ids))]
        assert torch.allclose(losses[owner == i], torch.stack(alone), atol=1e-4)


def test_the_prompt_teaches_nothing():
    """Its tokens are read and have no loss: another target there would change no number."""
    model = tiny()
    tokens, targets = collate([([5, 6, 7, 8, 9], 3)], "cpu")
    losses = token_losses(model, tokens, targets)
    assert losses.shape == (2,) and (targets[0, :2] == -1).all()
    logits = model(tokens)[0]
    expected = torch.nn.functional.cross_entropy(logits[2:], torch.tensor([8, 9]), reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)


# --------------------------------------------------------------------------------------- cache and generation


@torch.no_grad()
def generate_plain(model, prompts, max_new, stop):
    """The definition of `generate`: one prompt at a time and no cache."""
    answers = [[] for _ in prompts]
    for prompt, answer in zip(prompts, answers):
        for _ in range(max_new):
            tokens = torch.tensor([prompt + answer], device=model.cos.device)    # (1, T)
            token = model(tokens)[0, -1].argmax().item()
            if token == stop:
                break
            answer.append(token)
    return answers


def test_batched_generation_is_plain_generation_token_for_token():
    """Rounding could part them at a near tie; the gaps between these logits are far wider than the rounding.
    The stop token is one that some rows meet and others do not: rows leave the batch at different steps."""
    model = tiny()
    endless = generate_plain(model, PROMPTS, 20, stop=-1)
    stop = endless[1][3]
    plain = generate_plain(model, PROMPTS, 20, stop)
    assert min(map(len, plain)) < 20 == max(map(len, plain)), "the test should see both"
    assert generate(model, PROMPTS, 20, stop) == plain
    assert generate(model, PROMPTS, 20, stop=-1) == endless


def test_generation_ends_when_all_rows_have_stopped():
    model = tiny()
    steps = []
    model.norm.register_forward_hook(lambda m, x, y: steps.append(len(y)))
    first = generate_plain(model, PROMPTS[:1], 1, stop=-1)[0][0]
    steps.clear()
    assert generate(model, PROMPTS[:1] * 3, 20, stop=first) == [[], [], []] and steps == [3]


def test_neither_padding_nor_neighbours_change_an_answer():
    """Rows are padded with token 0. In no prompt or answer here, it may as well have another embedding."""
    model = tiny()
    prompts = [torch.tensor(prompt).clamp(min=1).tolist() for prompt in PROMPTS]
    together = generate(model, prompts, 12, stop=-1)
    assert together == [generate(model, [prompt], 12, stop=-1)[0] for prompt in prompts]
    assert not any(0 in answer for answer in together)
    model.embed_tokens.weight.data[0] *= -9
    assert together == generate(model, prompts, 12, stop=-1)


def test_openings_teacher_forced_through_the_cache_have_the_logits_of_whole_sequences():
    """Two openings of different length on one prefill: the second overwrites the slots of the first."""
    model = tiny()
    hidden, cache = prefill(model, PROMPTS, extra=6)
    for opening in ([7, 8, 9, 10, 11, 12], [20, 21]):
        cache.rewind()
        with torch.no_grad():
            logits = torch.cat((model.tail(hidden, since=3)[:, None],
                                model(torch.tensor([opening] * len(PROMPTS)), cache=cache)), 1)
            for row, prompt in zip(logits, PROMPTS):
                whole = model(torch.tensor([prompt + opening]))[0, len(prompt) - 1:]
                assert torch.allclose(row, whole, atol=1e-4)


def test_prompts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens: it needs one, and with 5 more"):
        generate(tiny(), [[1], []], 5, stop=0)
    with pytest.raises(ValueError, match="prompt 2 has 60 tokens: .* the context of 64; shorten it or"):
        generate(tiny(), [[1], [2], [3] * 60], 5, stop=0)
    with pytest.raises(ValueError, match="has 1 tokens: .* with 99 more must fit the context of 64; shorten"):
        generate(tiny(), [[1]], 99, stop=0)
    with pytest.raises(ValueError, match="0 . 6 tokens do not fit in a cache for 5"):
        tiny()(some_tokens(1, 6), cache=Cache([2], room=5, device="cpu"))


# ------------------------------------------------------------------------------------------------ checkpoints

VARIANTS = [{}, dict(tied=True), dict(qkv_bias=True), dict(qk_norm=True),
            dict(rope_theta=500.0, rope_scaling=(8.0, 1.0, 4.0, 32))]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_saved_model_comes_back_to_the_bit(changes, tmp_path):
    model = tiny(**changes)
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    again.save_pretrained(tmp_path)              # over the file that was just read, which replaces it
    assert torch.equal(GPT.from_pretrained(tmp_path).norm.weight, model.norm.weight)


@pytest.mark.parametrize("changes", VARIANTS)
def test_transformers_and_safetensors_read_what_we_save(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny(**changes)
    tokens = some_tokens(2, 40)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(model(tokens), peer(tokens).logits, atol=1e-4)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], model.norm.weight) and stored.keys() == read_safetensors(
        tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_shards_load_into_fp32(dtype, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny()
    model.save_pretrained(tmp_path)
    tensors = {name: x.to(dtype) for name, x in read_safetensors(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00002.safetensors": sorted(tensors)[i - 1::2] for i in (1, 2)}
    for file, names in shards.items():
        safetensors.save_file({name: tensors[name] for name in names}, tmp_path / file)
    (tmp_path / "adapter.safetensors").write_bytes(b"not of this model")
    loaded = GPT.from_pretrained(tmp_path)
    for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p.to(dtype).float(), q)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"in the weights it is absent; use the config and weights of one"):
        GPT.from_pretrained(tmp_path)


def test_matrices_may_stay_in_bf16_and_norms_do_not(tmp_path):
    """What is frozen takes half of the memory and of the disk; what a norm multiplies keeps its digits."""
    tiny(qkv_bias=True).save_pretrained(tmp_path)
    half = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.dim() == 2 else torch.float32), name
    half.save_pretrained(tmp_path / "half")
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("", "half")]
    assert sizes[1] < 0.53 * sizes[0]
    again = GPT.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(half.parameters(), again.parameters(), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        logits = half(some_tokens(2, 40)).float()
    assert torch.allclose(logits, GPT.from_pretrained(tmp_path)(some_tokens(2, 40)), atol=0.1)


def test_a_copy_of_the_tied_head_and_files_beside_model_safetensors_are_ignored(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny(tied=True)
    model.save_pretrained(tmp_path)
    tensors = {name: x.clone() for name, x in read_safetensors(tmp_path / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "adapter.safetensors").write_bytes(b"not of this model")
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_context_is_capped(tmp_path):
    """A config.json often allows far more than fits in memory."""
    for context, kept in ((4096, 2048), (100, 100)):
        tiny(context=context).save_pretrained(tmp_path)
        assert GPT.from_pretrained(tmp_path).config.context == kept


# Ways to spoil a good folder: each takes what to change and returns a function of the folder.

def config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return spoil


def weights(change):
    def spoil(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    return spoil


def header(change):
    """`change` alters the parsed header in place; the tensors stay where they are."""
    def spoil(raw):
        n = int.from_bytes(raw[:8], "little")
        parsed = json.loads(raw[8:8 + n])
        change(parsed)
        text = json.dumps(parsed).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + n:]
    return weights(spoil)


def tensors(change):
    """`change` alters {name: tensor} in place."""
    def spoil(folder):
        path = folder / "model.safetensors"
        stored = {name: x.clone() for name, x in read_safetensors(path).items()}
        change(stored)
        write_safetensors(path, stored)
    return spoil


def norm(**changes):
    return header(lambda h: h["model.norm.weight"].update(changes))


BAD = {                                          # fault: (how to make it, what must be said)
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")),
                  "config.json: no such file; give a local folder with config.json and *.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file; give a local folder"),
    "cut JSON": (lambda f: (f / "config.json").write_text('{"a": '), "config.json: line 1: not JSON (Exp"),
    "JSON list": (lambda f: (f / "config.json").write_text("[1]"),
                  "config.json: not a JSON object; the copy"),
    "architecture": (config(model_type="mamba"),
                     "config.json: model_type is 'mamba', only 'llama' or 'qwen2' or 'qwen3' is supported"),
    "activation": (config(hidden_act="gelu"), "hidden_act is 'gelu', only 'silu' is supported"),
    "o_proj bias": (config(attention_bias=True), "attention_bias is True, only False is supported"),
    "MLP bias": (config(mlp_bias=True), "mlp_bias is True, only False is supported"),
    "sliding window": (config(use_sliding_window=True), "use_sliding_window is True, only False is"),
    "rope, old key": (config(rope_scaling={"type": "linear"}), "rope_type is 'linear', only 'default'"),
    "rope, new key": (config(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn', only 'default'"),
    "no size": (config(hidden_size=None), "config.json: hidden_size is None, not a number above 0, and"),
    "quoted size": (config(vocab_size="50"), "config.json: vocab_size is '50', not a number above 0, and"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in it; convert the"),
    "empty file": (weights(lambda raw: b""), "model.safetensors: no such file, or nothing in it; the copy"),
    "truncated": (weights(lambda raw: raw[:-100]),
                  "model.safetensors: tensor lm_head.weight F32 [50, 32] cannot lie in bytes 99456 to "
                  "105856, after 99456 of 105756; the copy is damaged or incomplete, make it again"),
    "long header": (weights(lambda raw: b"\xff" * 8 + raw[8:]), "the header would end at byte 1844674407370"),
    "no safetensors": (weights(lambda raw: bytes([40]) + bytes(200)), "the header is not one of safetensors"),
    "no offsets": (norm(data_offsets=None), "the header is not one of safetensors"),
    "one offset": (norm(data_offsets=[0]), "the header is not one of safetensors"),
    "quoted offset": (norm(data_offsets=["0", 128]), "the header is not one of safetensors"),
    "fractional shape": (norm(shape=[32.0]), "the header is not one of safetensors"),
    "negative offset": (norm(data_offsets=[-128, 0]), "F32 [32] cannot lie in bytes -128 to 0"),
    "two from the end": (norm(data_offsets=[-256, -128]), "F32 [32] cannot lie in bytes -256 to -128"),
    "negative shape": (norm(shape=[-4, -8]), "F32 [-4, -8] cannot lie in bytes"),
    "size of another type": (norm(dtype="BF16"), "tensor model.norm.weight BF16 [32] cannot lie in bytes"),
    "unknown type": (norm(dtype="I8"), "tensor model.norm.weight is I8, only F32, F16, BF16 are supported"),
    "a hole": (weights(lambda raw: raw.replace(b'[99328, 99456]', b'[99332, 99460]')),
               "F32 [32] cannot lie in bytes 99332 to 99460, after 99328"),
    "bytes beyond": (weights(lambda raw: raw + b"more"), "no tensor has the bytes from 105856 on; the copy"),
    "NaN": (tensors(lambda t: t["model.norm.weight"].fill_(math.nan)), "norm.weight has NaN or infinity"),
    "infinity": (tensors(lambda t: t["model.norm.weight"].fill_(math.inf)), "has NaN or infinity; the copy"),
    "many blocks": (config(num_hidden_layers=10 ** 6), "1000000 blocks, too many; use the config"),
    "infinite size": (config(vocab_size=math.inf), "vocab_size is inf, not a number above 0, and finite"),
    "rope list": (config(rope_scaling=[1]), "rope settings are [1], not an object"),
    "quoted tie": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false', only True or False"),
    "missing tensor": (tensors(lambda t: t.pop("model.norm.weight")),
                       "tensor model.norm.weight should be [32], in the weights it is absent; use the conf"),
    "surplus tensor": (tensors(lambda t: t.update(more=t["model.norm.weight"])),
                       "tensor more should be absent, in the weights it is [32]; use the config and"),
    "wrong shape": (norm(shape=[4, 8]), "tensor model.norm.weight should be [32], in the weights it is [4,"),
    "Llama as Qwen2": (config(model_type="qwen2"), "k_proj.bias should be [16], in the weights it is absent"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_checkpoint_is_one_line_with_the_file_and_the_remedy(fault, tmp_path):
    spoil, message = BAD[fault]
    folder = tmp_path / "checkpoint"
    tiny().save_pretrained(folder)
    spoil(folder)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    said = str(error.value)
    assert message in said and said.startswith(str(folder)) and "\n" not in said and "; " in said
