"""SCANS steers each prompt by what it was judged to be, from its last token on, and no other."""
import dataclasses
import itertools
import json

import pytest
import torch

import eval as evaluation
import scans
from data import World, collate
from model import GPT, GPTConfig, generate, last_states, token_losses


@pytest.fixture
def steering(model, chat, parts):
    return scans.SCANS(model, chat, parts)


@pytest.fixture
def plain(run):
    """The run, without kernels to measure."""
    return dataclasses.replace(run, s=dataclasses.replace(run.s, kernel=0))


def test_anchors_are_in_no_suite(whole, chat, model, monkeypatch):
    """Those that it reads, whichever those should be."""
    read = set()
    ids = scans.SCANS.ids

    def recorded(self, prompts, then=""):
        read.update(prompts)
        return ids(self, prompts, then)

    monkeypatch.setattr(scans.SCANS, "ids", recorded)
    scans.SCANS(model, chat, whole)
    assert len(read) > scans.ANCHORS
    for halves in [*whole.suites.values(), *whole.dev.values()]:
        for examples in halves.values():
            assert not read & {e.prompt for e in examples}


@pytest.mark.parametrize("blocks, steers, judges", [
    (1, [1], [1]), (3, [2], [2, 3]), (4, [2, 3], [2, 3, 4]), (6, [3, 4], [3, 4, 5, 6])])
def test_the_middle_third_steers_and_the_upper_two_judge(blocks, steers, judges, chat, parts):
    """Of 4 blocks, where thirds are no whole blocks, those that lie in them in part."""
    config = GPTConfig(vocab_size=chat.size, width=16, blocks=blocks, head_width=4, hidden=16)
    steering = scans.SCANS(GPT(config), chat, parts)
    assert (list(steering.steers), list(steering.judges)) == (steers, judges)


def test_steering_by_nothing_changes_nothing(steering, model, plain):
    _, expected = evaluation.evaluate(model, plain.chat, plain.parts, plain.s)
    assert scans.responses(steering, plain, 0.0) == expected


def test_the_state_moves_along_v_at_the_last_token_and_nowhere_before(steering, model, chat, parts):
    prompts = [chat.prompt(e.prompt) for e in parts.toxic[:3]]           # of several lengths
    first = min(steering.steers)
    before = [model(torch.tensor([ids]), upto=first)[0] for ids in prompts]
    with steering.steered(0.5):
        together = last_states(model, prompts, first)
        alone = [model(torch.tensor([ids]), upto=first)[0] for ids in prompts]
    shift = 0.5 * steering.n[first] * steering.v[first]
    assert steering.v[first].norm() == pytest.approx(1)                  # alpha is in mean lengths
    for unsteered, steered, padded in zip(before, alone, together):
        assert torch.allclose(steered[:-1], unsteered[:-1], atol=1e-6)
        assert torch.allclose(steered[-1], unsteered[-1] + shift, atol=1e-5)
        assert torch.allclose(padded, steered[-1], atol=1e-5)
    after = model(torch.tensor([prompts[0]]), upto=first)[0]
    assert torch.equal(after, before[0])                                 # the hooks are gone


def test_every_token_of_an_answer_is_steered(steering, model, chat, parts):
    """With a cache as without: greedy answers are those of reading all anew for each token, even
    where a broken model writes, in some rows of a batch, the token that ends prompts."""
    prompts = [chat.prompt(e.prompt) for e in parts.toxic[:4]]
    with torch.no_grad():
        model.lm_head.weight[steering.last_of_prompt] *= 1.5             # at times it is the likeliest
    with steering.steered(1.0):
        answers = generate(model, prompts, 8, stop=-1)
        for ids, answer in zip(prompts, answers):
            naive = list(ids)
            for _ in range(8):
                naive.append(model(torch.tensor([naive]))[0, -1].argmax().item())
            assert answer == naive[len(ids):]
    broken = [steering.last_of_prompt in answer for answer in answers]
    assert any(broken) and not all(broken)


def test_steering_up_raises_refusals_and_down_lowers_them(model, chat, parts):
    """In a model that has learned to open with "Sorry" after toxic prompts, "Sure" after others."""
    sequences = []
    for examples, opening in ((parts.toxic, "Sorry"), (parts.general, "Sure")):
        for e in examples:
            ids = chat.prompt(e.prompt)
            sequences.append((ids + chat.ids(opening), len(ids)))
    tokens, targets = collate(sequences, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        token_losses(model, tokens, targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    steering = scans.SCANS(model, chat, parts)

    def refused(examples, alpha):
        with steering.steered(alpha):
            prompts = [e.prompt for e in examples]
            return evaluation.refusal_probability(model, chat, prompts).mean()

    assert refused(parts.general, 0.0) < 0.1 and refused(parts.general, 0.5) > 0.5
    assert refused(parts.toxic, 0.0) > 0.9 and refused(parts.toxic, -0.5) < 0.5


def test_a_prompt_judged_harmful_is_steered_the_other_way_than_one_judged_harmless(
        steering, plain, tmp_path, monkeypatch):
    """Through the whole measurement; each prompt keeps its own response, in the order of asking."""
    judged = {}

    def score(self, prompts):
        judged.update({prompt: i % 3 == 0 for i, prompt in enumerate(prompts)})
        return torch.tensor([float(judged[prompt]) for prompt in prompts])

    def responses(steering, run, alpha):
        _, found = evaluation.evaluate(steering.model, run.chat, run.parts, run.s)
        return [r | {"alpha": alpha} for r in found]

    def recorded(found, method, seed):
        seen.append(found)
        return rows_of(found, method, seed)

    seen = []
    rows_of = scans.rows_of
    monkeypatch.setattr(World, "parts", lambda *_: plain.parts)
    monkeypatch.setattr(scans.SCANS, "score", score)
    monkeypatch.setattr(scans, "responses", responses)
    monkeypatch.setattr(scans, "rows_of", recorded)
    steering.model.save_pretrained(tmp_path / "STL")
    stored = rows_of(responses(steering, plain, 0.0), "STL", 0)
    scans.measure([(tmp_path / "STL", plain.s, 0, stored)], [0.5], [0.5])
    stl, merged = seen
    assert [r["prompt"] for r in merged] == [r["prompt"] for r in stl]
    assert {r["alpha"] for r in merged if judged[r["prompt"]]} == {0.5}
    assert {r["alpha"] for r in merged if not judged[r["prompt"]]} == {-0.5}


def test_the_score_is_its_formula_prompt_by_prompt(steering, model, chat, parts):
    sure = chat.ids("Sure")

    def transition(prompt, l):
        ids = chat.prompt(prompt)
        stream = model(torch.tensor([ids + sure]), upto=l)[0]
        return stream[len(ids) - 1] - stream[len(ids)]

    anchors = [e.prompt for e in parts.toxic[:scans.ANCHORS]]
    prompt = parts.general[-1].prompt
    cosines = []
    for l in steering.judges:
        mean = torch.stack([transition(anchor, l) for anchor in anchors]).mean(0)
        cosines.append(torch.cosine_similarity(transition(prompt, l), mean, dim=0))
    assert torch.allclose(steering.score([prompt])[0], torch.stack(cosines).mean(), atol=1e-5)


def made(folder, run, model, **settings):
    """A folder as train.py leaves it, with `model` as STL and its rows in results.json."""
    model.save_pretrained(folder / f"seed-{run.s.seed}" / "STL")
    _, found = evaluation.evaluate(model, run.chat, run.parts, run.s)
    results = {"settings": run.s.fixed() | settings, "environment": {}, "curves": [],
               "rows": scans.rows_of(found, "STL", run.s.seed)}
    (folder / "results.json").write_text(json.dumps(results))


def test_the_command_prints_each_seed_and_the_median_and_writes_rows(
        tmp_path, plain, model, monkeypatch, capsys):
    monkeypatch.setattr(World, "parts", lambda *_: plain.parts)
    made(tmp_path, plain, model)
    scans.main([str(tmp_path), "--seed", "0", "--alpha", "0.5", "--json", str(tmp_path / "scans.json")])
    printed = capsys.readouterr().out
    for seed in ("0     ", "median"):
        for method in ("STL  ", "SCANS"):
            assert printed.count(f"| {seed} | {method}  |") == 1
    written = json.loads((tmp_path / "scans.json").read_text())
    assert written["settings"]["alpha"] == 0.5 and written["settings"]["suite"] == plain.s.suite
    ours = [row for row in written["rows"] if row["method"] == "SCANS"]
    stored = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(ours) == len(stored)
    for row, expected in zip(ours, stored):
        for key in ("seed", "suite", "kind", "metric", "n"):
            assert row[key] == expected[key]


def test_the_grid_has_a_line_a_pair_on_development_suites_alone(
        tmp_path, plain, model, monkeypatch, capsys):
    monkeypatch.setattr(World, "parts", lambda *_: plain.parts)
    monkeypatch.setattr(scans, "ALPHAS", (0.5, 1.0))
    made(tmp_path, plain, model)
    with pytest.raises(ValueError, match="choose settings there"):
        scans.main([str(tmp_path), "--grid"])
    made(tmp_path, plain, model, split="development")
    capsys.readouterr()
    scans.main([str(tmp_path), "--grid"])
    printed = capsys.readouterr().out.splitlines()
    table = [line.split("|")[1:3] for line in printed if line.startswith("|")]
    settings = table[3:]                                         # below title, rule and STL
    pairs = [(float(alpha), float(threshold)) for alpha, threshold in settings]
    assert pairs == list(itertools.product((0.5, 1.0), scans.THRESHOLDS))


def test_a_model_of_another_version_of_the_world_is_refused(tmp_path, plain, model, monkeypatch):
    """Its words had other ids: the answers are noise, and no number of them may be believed."""
    monkeypatch.setattr(World, "parts", lambda *_: plain.parts)
    made(tmp_path, plain, model)
    results = json.loads((tmp_path / "results.json").read_text())
    for row in results["rows"]:
        if row["metric"] == "compliance_rate":
            row["value"] -= 0.1
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="differs from results.json"):
        scans.main([str(tmp_path)])


@pytest.mark.parametrize("settings, flags, message", [
    ({}, ["--alpha", "nan"], "finite"), ({}, ["--seed", "7"], "seed 7: 0 STL models"),
    ({"init": "a folder"}, [], "made with --init")])
def test_what_cannot_be_measured_is_one_clear_line(
        settings, flags, message, tmp_path, plain, model):
    made(tmp_path, plain, model, **settings)
    with pytest.raises(ValueError, match=message) as error:
        scans.main([str(tmp_path), *flags])
    assert "\n" not in str(error.value)


def test_a_folder_without_an_stl_model_is_one_clear_line(tmp_path, run):
    results = {"settings": run.s.fixed(), "environment": {}, "curves": [],
               "rows": [{"seed": 0, "method": "base"}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="no STL model; make it with python train.py"):
        scans.main([str(tmp_path)])
