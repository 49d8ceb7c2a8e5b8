"""tests/scans.py: SCANS steers each prompt by what it was judged to be, from its last token on, and else nothing."""
import json

import pytest
import torch

import eval as evaluation
import scans
from model import last_states


@pytest.fixture
def steering(model, chat, parts):
    return scans.SCANS(model, chat, parts)


def test_anchors_are_in_no_suite(whole):
    anchors = {e.prompt for e in whole.toxic[:scans.ANCHORS] + whole.general[:scans.ANCHORS]}
    for halves in whole.suites.values():
        for examples in halves.values():
            assert not anchors & {e.prompt for e in examples}


def test_steering_by_nothing_changes_nothing(steering, model, chat, parts, run):
    asked = scans.questions(parts)
    _, expected = evaluation.evaluate(model, chat, parts, run.s)
    found = steering.responses(asked, alpha=0.0, threshold=0.5, max_new=run.s.max_new)
    for plain, steered in zip(expected, found):
        assert plain["prompt"] == steered["prompt"]
        assert plain["response"] == steered["response"]
        assert plain["refusal_probability"] == pytest.approx(steered["refusal_probability"], abs=1e-6)


def test_the_state_moves_along_v_at_the_last_token_and_nowhere_before(steering, model, chat, parts):
    prompts = [chat.prompt(e.prompt) for e in parts.toxic[:3]]           # of several lengths
    first = min(steering.steers)
    before = [model(torch.tensor([ids]), upto=first)[0] for ids in prompts]
    hooks = steering.steered(0.5)
    together = last_states(model, prompts, first)
    alone = [model(torch.tensor([ids]), upto=first)[0] for ids in prompts]
    for hook in hooks:
        hook.remove()
    shift = 0.5 * steering.n[first] * steering.v[first]
    for unsteered, steered, padded in zip(before, alone, together):
        assert torch.allclose(steered[:-1], unsteered[:-1], atol=1e-6)
        assert torch.allclose(steered[-1], unsteered[-1] + shift, atol=1e-5)
        assert torch.allclose(padded, steered[-1], atol=1e-5)
    after = model(torch.tensor([prompts[0]]), upto=first)[0]
    assert torch.equal(after, before[0])                                 # the hooks are gone


def test_what_is_judged_harmful_is_steered_up_and_the_rest_down(steering, parts, monkeypatch):
    asked = scans.questions(parts)[:4]
    judged = torch.tensor([0.9, 0.1, 0.1, 0.9])
    monkeypatch.setattr(steering, "score", lambda prompts: judged)
    by_sign = {}
    every = steering.steered

    def seen(alpha):
        by_sign[alpha] = []
        return every(alpha)

    monkeypatch.setattr(steering, "steered", seen)

    def respond(model, chat, prompts, max_new):
        latest = list(by_sign)[-1]
        by_sign[latest] += prompts
        return ["Sure."] * len(prompts)

    monkeypatch.setattr(evaluation, "respond", respond)
    found = steering.responses(asked, alpha=0.5, threshold=0.5, max_new=4)
    prompts = [e.prompt for _, _, e in asked]
    assert by_sign == {0.5: [prompts[0], prompts[3]], -0.5: [prompts[1], prompts[2]]}
    assert [r["prompt"] for r in found] == prompts                       # in the order in which they were asked


def test_the_score_is_its_formula_prompt_by_prompt(steering, model, chat, parts):
    sure = chat.ids("Sure")

    def transition(prompt, l):
        ids = chat.prompt(prompt)
        stream = model(torch.tensor([ids + sure]), upto=l)[0]
        return stream[len(ids) - 1] - stream[-1]

    anchors = [e.prompt for e in parts.toxic[:scans.ANCHORS]]
    prompt = parts.general[-1].prompt
    cosines = []
    for l in steering.tells:
        mean = torch.stack([transition(anchor, l) for anchor in anchors]).mean(0)
        cosines.append(torch.cosine_similarity(transition(prompt, l), mean, dim=0))
    assert torch.allclose(steering.score([prompt])[0], torch.stack(cosines).mean(), atol=1e-5)


def test_a_folder_without_an_stl_model_is_one_clear_line(tmp_path, run):
    results = {"settings": run.s.fixed(), "environment": {}, "curves": [], "rows": [{"seed": 0}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="no STL model; make it with python train.py"):
        scans.main([str(tmp_path)])
