"""Surgery on a tuned model: what is cut out, and when nothing is. A rival is one more method of train.py."""
import dataclasses

import torch

import train
from model import GPT, GPTConfig
from surgical import surgical

TOKENS = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))


def patient(chat, loudness):
    """A random model of five blocks; how much its answers change with its states is up to `loudness`."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=chat.size, width=16, blocks=5, kv_heads=2, head_width=4, hidden=24))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.lm_head.weight.data *= loudness
    return model


def refusing(stl, prompts, after, monkeypatch):
    """Let `stl` refuse these prompts, and the models that surgery tries refuse as `after` says, in turn."""
    tries = iter(after)

    def probability(model, chat, asked):
        if model is stl:
            return torch.tensor([0.9 if prompt in prompts else 0.1 for prompt in asked])
        return torch.full((len(asked),), next(tries))
    monkeypatch.setattr(train.evaluation, "refusal_probability", probability)


def test_surgery_takes_the_direction_of_false_refusals_out_of_the_stream(chat, run, parts, monkeypatch):
    """Of blocks 1 to 4 the third leaves the fewest refusals. Its direction, one prompt at a time: the mean
    state of benign prompts that are refused, but for the fifth of them to choose the block on, less that of
    prompts that are answered, and orthogonal to the same of toxic prompts."""
    stl = patient(chat, loudness=0.1)
    falsely = [e.prompt for e in parts.seemingly[5:]]
    toxic = [e.prompt for e in parts.toxic]
    refused = {parts.general[0].prompt, *falsely, *toxic}
    refusing(stl, refused, (0.5, 0.4, 0.1, 0.3), monkeypatch)
    cured, _ = surgical(stl, run)

    @torch.no_grad()
    def mean_state(prompts):
        states = [stl(torch.tensor([chat.prompt(prompt)]), upto=3)[0, -1] for prompt in prompts]
        return sum(states) / len(states)
    answered = mean_state([e.prompt for e in parts.general if e.prompt not in refused])
    of_toxic = mean_state(toxic) - answered
    of_falsely = mean_state(falsely[3:]) - answered
    w = of_falsely - (of_falsely @ of_toxic) / (of_toxic @ of_toxic) * of_toxic
    w = w / w.norm()
    without = torch.eye(16) - torch.outer(w, w)
    before = dict(stl.named_parameters())
    for name, p in cured.named_parameters():
        if name == "embed_tokens.weight":
            assert torch.allclose(p, before[name] @ without, atol=1e-5)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.allclose(p, without @ before[name], atol=1e-5)
        else:
            assert torch.equal(p, before[name]), name
    for l in range(6):
        assert (cured(TOKENS, upto=l) @ w).abs().max() < 1e-5 < 0.1 < (stl(TOKENS, upto=l) @ w).abs().max()


def test_surgery_spares_a_model_that_refuses_nothing_falsely(chat, run, parts, monkeypatch):
    stl = patient(chat, loudness=0.1)
    refusing(stl, {e.prompt for e in parts.toxic}, (), monkeypatch)
    assert surgical(stl, run)[0] is stl


def test_surgery_that_would_change_the_answers_to_general_prompts_is_not_done(chat, run, parts, monkeypatch):
    stl = patient(chat, loudness=30)
    refusing(stl, {e.prompt for e in parts.toxic + parts.seemingly}, (0.0, 0.0, 0.0, 0.0), monkeypatch)
    assert surgical(stl, run)[0] is stl


def test_a_rival_is_one_more_method_of_the_command(run):
    """What it leaves is a checkpoint like any other, made from the one that it names, and has its rows."""
    results = {"rows": [], "curves": []}
    train.run_seed(dataclasses.replace(run, s=dataclasses.replace(run.s, methods="Surgical")), results)
    assert sorted(path.name for path in run.folder.iterdir()) == ["STL", "Surgical", "base", "responses"]
    assert {row["method"] for row in results["rows"]} == {"base", "STL", "Surgical"}
    assert GPT.from_pretrained(run.folder / "Surgical").config.blocks == run.s.blocks
