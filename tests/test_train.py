"""What `train.py` claims: stages change what they say and nothing else, comparisons are paired, a killed run
ends like any other, and one command does it all. At the end: bad input, the README's commands."""
import dataclasses
import functools
import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import ROOT, TINY, cut
from data import LATER_REFUSAL, Example, World
from model import GPT, GPTConfig, last_states
from train import (REAL, Settings, augment, merge_lora, parse, pretrain, refine,
                   run_seed, sft_loss, tune, unfreeze)

TOKENS = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))


def with_settings(run, **changes):
    return dataclasses.replace(run, s=dataclasses.replace(run.s, **changes))


# -------------------------------------------------------------------------------------------- losses and LoRA

def test_sft_loss_is_the_mean_over_response_tokens(model, run, parts):
    """One sequence at a time, one token at a time; the prompt teaches nothing."""
    sequences = run.exchanges(parts.general[:4] + parts.safe[:1], 128)
    terms = []
    for ids, first in sequences:
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
        terms += [-log_p[t - 1, ids[t]] for t in range(first, len(ids))]
    assert torch.allclose(sft_loss(model, sequences, run), torch.stack(terms).mean(), rtol=1e-5)


@pytest.mark.parametrize("part", ["general", "general_heldout", "safe", "seemingly", "toxic", "suites"])
def test_a_prompt_that_leaves_no_room_for_a_response_is_named(part, run, parts):
    """Wherever it is: found before the first step of training, not in an evaluation an hour later."""
    run.check_prompts(run.chat.size, 128)
    long = [Example("why " * 300, "So.", source="my.csv: row 3")]
    value = {"new": {"benign": long}} if part == "suites" else getattr(parts, part) + long
    run = dataclasses.replace(run, parts=dataclasses.replace(parts, **{part: value}))
    with pytest.raises(ValueError, match=r"^my.csv: row 3: \d+ tokens and a response of 6 exceed .* of 128"):
        run.check_prompts(run.chat.size, 128)


def test_a_tokenizer_of_more_ids_than_the_model_has_is_refused(run):
    """Else the first prompt with such an id would end in an IndexError, or on a GPU in worse."""
    with pytest.raises(ValueError, match=r"a tokenizer of \d+ ids, a model of 5; use those of one"):
        run.check_prompts(5, 128)


def test_lora_starts_at_the_base_to_the_bit_and_trains_nothing_else(model):
    before = model(TOKENS)
    parameters = unfreeze(model, model.layers, 2, random.Random(0))
    assert torch.equal(model(TOKENS), before)
    assert len(parameters) == 2 * 7 * model.config.blocks        # A and B of each of a block's 7 linear maps
    model(TOKENS).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if name.endswith((".A", ".B"))}


def test_lora_is_the_matrix_w_plus_b_a(model):
    """y = W x + B (A x), as on paper, at every linear map."""
    linear = model.layers[0].mlp.up_proj
    unfreeze(model, model.layers, 2, random.Random(0))
    lora = model.layers[0].mlp.up_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    lora.B.data += 0.5
    assert lora.linear is linear and torch.linalg.matrix_rank(lora.B @ lora.A) == 1
    assert torch.allclose(lora(x), x @ (linear.weight + lora.B @ lora.A).T, atol=1e-5)


def test_merged_lora_is_the_tuned_model_as_an_ordinary_one(model):
    """Ranks: a larger one would mean that something else was written, a smaller one that B A was not."""
    original = {name: p.clone() for name, p in model.named_parameters()}
    parameters = unfreeze(model, model.layers, 2, random.Random(0))
    for p in parameters:
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    tuned = model(TOKENS)
    merge_lora(model)
    assert torch.allclose(model(TOKENS), tuned, rtol=1e-4, atol=1e-5)            # rounding alone
    assert {name for name, _ in model.named_parameters()} == set(original)
    for name, p in model.named_parameters():
        change = (p - original[name]).detach()
        linear = name.startswith("layers.") and p.dim() == 2
        rank = torch.linalg.matrix_rank(change, rtol=1e-3) if linear else change.any()
        assert p.requires_grad and rank == (2 if linear else 0), name


# ------------------------------------------------------------------------------------------------- the stages

def rows_seen(monkeypatch):
    """A list to which each batch of sequences is appended as it is collated for a loss."""
    seen = []
    collate = train.collate
    monkeypatch.setattr(train, "collate", lambda rows, *how: seen.append(rows) or collate(rows, *how))
    return seen


def test_every_method_is_tuned_on_the_same_rows(model, run, monkeypatch):
    """Pairing: DCR starts elsewhere, STL-aug sees more, but step by step the tuning rows are the same."""
    seen = {}
    other = GPT(model.config)
    for name, base, extra in (("STL", model, ()), ("DCR", other, ()),
                              ("STL-aug", model, augment(model, run, "natural")),
                              ("STL-aug-equal", model, augment(model, run, "equal"))):
        with monkeypatch.context() as patch:
            seen[name] = rows_seen(patch)
            tune(name, base, run, extra)
    assert len(seen["STL"]) == TINY["tune_steps"] and seen["STL"] == seen["DCR"]
    for name in ("STL-aug", "STL-aug-equal"):
        assert [batch[:TINY["tune_batch"]] for batch in seen[name]] == seen["STL"] != seen[name]
    assert len({str(batch) for batch in seen["STL"]}) == TINY["tune_steps"]          # and not always the same
    # at equal compute as many rows more as refinement reads: prompts and general texts
    read = 2 * TINY["refine_batch"] * TINY["refine_steps"]
    assert sum(map(len, seen["STL-aug-equal"])) == TINY["tune_batch"] * TINY["tune_steps"] + read


def test_extra_rows_are_as_many_as_asked_for_in_the_mean(model, run, parts, monkeypatch):
    """Of 1.3 rows one, or two in three of ten steps: rounding would add none of 0.4 and one of 0.6."""
    seen = rows_seen(monkeypatch)
    run = with_settings(run, tune_steps=200, tune_batch=2)
    tune("STL-aug", model, run, [(parts.seemingly, 1.3)])
    added = [len(batch) - 2 for batch in seen]
    assert set(added) == {1, 2} and 1.2 < sum(added) / 200 < 1.4             # three sigma
    prompts = {tuple(run.chat.prompt(e.prompt)) for e in parts.seemingly}
    assert {tuple(ids[:first]) for batch in seen for ids, first in batch[2:]} == prompts


def test_who_tunes_on_later_has_general_exchanges_and_other_toxic_prompts(model, run, parts, monkeypatch):
    """No seemingly toxic prompt keeps the model from refusing too much again; for all methods alike."""
    run = with_settings(run, later_steps=40, tune_steps=3)
    seen = rows_seen(monkeypatch)
    tune("STL+later", model, run, later=True)
    tune("DCR+later", GPT(model.config), run, later=True)
    assert len(seen) == 80 and seen[:40] == seen[40:]
    rows = {tuple(ids) for batch in seen for ids, _ in batch}
    general = {tuple(ids) for ids, _ in run.exchanges(parts.general, 128)}
    later = {tuple(ids) for ids, _ in run.exchanges(parts.later, 128)}
    end = tuple(run.chat.response(LATER_REFUSAL))
    assert rows <= general | later and rows & general
    refused = rows & later
    assert len(refused) > 10 and all(ids[-len(end):] == end for ids in refused)


def test_tuning_of_the_tail_leaves_what_refinement_moved_where_it_is(model, run):
    """--tail true: tuning learns in the blocks that refinement froze, so it cannot undo refinement. Somebody
    else, who tunes the finished model on, knows nothing of that."""
    run = with_settings(run, tail=True, layer=1)
    for later, expected in ((False, {"layers.1"}), (True, {"layers.0", "layers.1"})):
        tuned, _ = tune("DCR", model, run, later=later)
        changed = set()
        for (name, before), after in zip(model.named_parameters(), tuned.parameters()):
            if not torch.equal(before, after):
                changed.add(".".join(name.split(".")[:2]))
        assert changed == expected


def test_another_seed_sees_other_rows(model, run, monkeypatch):
    seen = rows_seen(monkeypatch)
    tune("STL", model, run)
    tune("STL", model, with_settings(run, seed=1))
    assert seen[:TINY["tune_steps"]] != seen[TINY["tune_steps"]:]


def test_refusals_are_the_share_that_was_asked_for(model, run, parts, chat, monkeypatch):
    refused = {tuple(chat.prompt(e.prompt)) for e in parts.safe}
    seen = rows_seen(monkeypatch)
    tune("STL", model, with_settings(run, refusals=0.25, tune_steps=50))
    share = []
    for batch in seen:
        share += [tuple(ids[:first]) in refused for ids, first in batch]
    assert 0.2 < sum(share) / len(share) < 0.3                          # 400 rows: within 2.3 sigma


def test_augmentation_answers_the_benign_and_refuses_the_toxic(model, run, parts):
    (benign, _), (toxic, _) = augment(model, run, "equal")
    assert [e.prompt for e in benign] == [e.prompt for e in parts.seemingly]
    assert [e.answer for e in benign] == [e.answer for e in parts.seemingly]
    assert [e.prompt for e in toxic] == [e.prompt for e in parts.toxic]
    assert {e.answer for e in toxic} <= {e.answer for e in parts.safe}
    assert all(e.whole for e in benign + toxic)
    unanswered = [dataclasses.replace(e, answer=None) for e in parts.seemingly]       # as in real files
    run = dataclasses.replace(run, parts=dataclasses.replace(parts, seemingly=unanswered))
    (benign, _), = augment(model, run, "natural")
    own = train.evaluation.respond(model, run.chat, [e.prompt for e in unanswered], TINY["max_new"])
    assert [e.answer for e in benign] == own and any(own)
    assert not any(e.whole for e in benign), "they end at --max-new: to end there should not be learnt"


def test_augmentation_adds_what_the_paper_adds_or_what_refinement_reads(model, run, parts):
    """The paper: D_seemingly alone, each as often as a general exchange, refusals apart."""
    (answered, rows), = augment(model, run, "natural")
    assert [e.prompt for e in answered] == [e.prompt for e in parts.seemingly]
    assert rows / len(answered) == pytest.approx(TINY["tune_batch"] / len(parts.general), rel=0.15)
    (benign, more), (toxic, as_many) = augment(model, with_settings(run, tune_steps=10), "equal")
    assert benign == answered and [e.prompt for e in toxic] == [e.prompt for e in parts.toxic]
    read = 2 * TINY["refine_batch"] * TINY["refine_steps"]
    assert more == as_many == pytest.approx(read / 10 / 2)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("keep, hold", [(10.0, 3.0), (0.0, 0.0)])
@pytest.mark.parametrize("rank", [0, 2])
def test_refinement_moves_the_lower_blocks_and_nothing_else(model, run, shuffled, keep, hold, rank):
    """Frozen means unchanged to the bit: the theory needs tau_l = 0, and weight decay would break it. A LoRA
    moves the linear maps alone, and is merged into them."""
    original = {name: p.clone() for name, p in model.named_parameters()}
    s = dataclasses.replace(run.s, keep=keep, hold=hold, refine_lora=rank)
    refined, _ = refine("refined", model, run, s, shuffled)
    for name, p in refined.named_parameters():
        moved = name.startswith("layers.0.") and (rank == 0 or p.dim() == 2)
        assert torch.equal(p, original[name]) == (not moved), name
        assert p.requires_grad
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters()), "the base"


def batches_of_refinement(model, run, monkeypatch, with_safe, shuffled=False):
    """[(prompts, labels)] of 100 steps: tuples of ids, and 0 or 1."""
    batches = []
    objective = train.refinement_loss

    def watched(model, base, prompts, labels, *rest):
        batches.append(([tuple(ids) for ids in prompts], labels.tolist()))
        return objective(model, base, prompts, labels, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train, "refinement_loss", watched)
        s = dataclasses.replace(run.s, refine_steps=100, refine_batch=16, with_safe=with_safe)
        refine("refined", model, run, s, shuffled)
    return batches


@pytest.mark.parametrize("with_safe", [False, True])
def test_the_control_differs_from_refinement_by_its_labels_alone(with_safe, model, run, parts, monkeypatch):
    """Same prompts in every step, half of them D_seemingly's; a coin says, once for each, what it is called.
    (The prompts of tuning are known to be toxic too, and may join D_toxic.)"""
    of_toxic = parts.toxic + parts.safe if with_safe else parts.toxic
    truth = {tuple(run.chat.prompt(e.prompt)): 1 for e in of_toxic}
    truth |= {tuple(run.chat.prompt(e.prompt)): 0 for e in parts.seemingly}
    true = batches_of_refinement(model, run, monkeypatch, with_safe)
    control = batches_of_refinement(model, run, monkeypatch, with_safe, shuffled=True)
    called = {}
    for (prompts, labels), (same_prompts, tossed) in zip(true, control, strict=True):
        assert labels == [0] * 8 + [1] * 8 == [truth[ids] for ids in prompts]
        assert same_prompts == prompts
        for ids, label in zip(prompts, tossed, strict=True):
            assert called.setdefault(ids, label) == label           # as it was in every other batch
    assert called.keys() == truth.keys()
    for label in (0, 1):                                            # about half of either class
        of_class = [called[ids] for ids in truth if truth[ids] == label]
        assert 0.3 < sum(of_class) / len(of_class) < 0.7


def test_a_batch_in_which_a_coin_fell_alike_for_all_has_a_loss(model, run):
    """Then there is nothing to contrast, and nobody's drift or length to hold: 0, not 0 / 0."""
    s = dataclasses.replace(run.s, refine_batch=4)
    prompts = [run.chat.prompt(e.prompt) for e in run.parts.seemingly[:4]]
    tokens, targets = train.collate(run.exchanges(run.parts.general[:4], model.config.context), "cpu")
    for label in (0, 1):
        loss = train.refinement_loss(model, model, prompts, torch.tensor([label] * 4), tokens, targets, 0, s)
        assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [0, 8])
def test_refinement_parts_the_classes(model, run, parts, rank):
    """The one thing it is for: less alike between the classes than within, about the base's mean state."""
    def states(model, examples):
        return last_states(model, [run.chat.prompt(e.prompt) for e in examples], 1)
    centre = states(model, parts.seemingly + parts.toxic).mean(0)

    def gap(model):
        benign = F.normalize(states(model, parts.seemingly) - centre, dim=1)
        toxic = F.normalize(states(model, parts.toxic) - centre, dim=1)
        within = ((benign @ benign.T).mean() + (toxic @ toxic.T).mean()) / 2
        return within - (benign @ toxic.T).mean()
    s = dataclasses.replace(run.s, refine_steps=200, refine_lr=1e-2, keep=0.0, still=0.0, hold=0.0,
                            refine_lora=rank)
    refined, _ = refine("refined", model, run, s)
    assert gap(model) < 0.1
    assert gap(refined) > 0.5


def test_half_of_the_toxic_prompts_are_of_d_toxic_however_large_d_safe_is(model, run, parts, monkeypatch):
    """It has the contrasts that look harmless. Among five times as many plain commands they would drown."""
    drawn = []

    def watched(model, base, prompts, *rest):
        drawn.extend(prompts)
        return model.layers[0].mlp.up_proj.weight.sum()         # anything that has a gradient
    monkeypatch.setattr(train, "refinement_loss", watched)
    few = dataclasses.replace(parts, toxic=parts.toxic[:len(parts.safe) // 5])
    s = dataclasses.replace(run.s, refine_steps=100, refine_batch=16)
    refine("refined", model, dataclasses.replace(run, parts=few), s)
    of_toxic = sum(drawn.count(run.chat.prompt(e.prompt)) for e in few.toxic)
    toxic_draws = len(drawn) / 2                                # the others are harmless
    assert 0.4 < of_toxic / toxic_draws < 0.6                   # drawn alike, it would be 1 / 6


@pytest.mark.parametrize("hold, shuffled", [(3.0, False), (3.0, True), (0.0, False)])
def test_half_of_the_held_texts_are_exchanges_of_d_seemingly(hold, shuffled, model, run, monkeypatch):
    """With D_toxic it has verbs in common, and what a state holds of a verb is in no other text. They are so
    in the control too, which must differ by its labels alone."""
    seen = rows_seen(monkeypatch)
    s = dataclasses.replace(run.s, hold=hold, refine_steps=3)
    refine("refined", model, run, s, shuffled)
    known = run.exchanges(run.parts.seemingly, model.config.context)
    assert len(seen) == 3
    for batch in seen:
        assert len(batch) == s.refine_batch
        of_seemingly = [row in known for row in batch]
        half = s.refine_batch // 2
        assert of_seemingly == [False] * half + [hold > 0] * half


def test_held_states_stay_where_the_base_has_them_and_toxic_ones_do_not_grow(model, run, parts):
    """A cosine is blind to length: with the Circle loss alone both classes are thrown far out."""
    harmless = [run.chat.prompt(e.prompt) for e in parts.seemingly]
    toxic = [run.chat.prompt(e.prompt) for e in parts.toxic]
    before = last_states(model, harmless, 1)
    moved = {}
    grown = {}
    for hold in (0.0, 3.0):
        s = dataclasses.replace(run.s, refine_steps=80, refine_lr=1e-2, keep=0.0, still=0.0, hold=hold)
        refined, _ = refine("refined", model, run, s)
        moved[hold] = ((last_states(refined, harmless, 1) - before).norm() / before.norm()).item()
        grown[hold] = (last_states(refined, toxic, 1).norm() / last_states(model, toxic, 1).norm()).item()
    assert moved[3.0] < 0.5 < moved[0.0]
    assert grown[3.0] < 1.2 < 1.5 < grown[0.0]


@pytest.mark.parametrize("steps", [400, 50, 40, 6])
def test_a_curve_has_nineteen_points_more_of_them_early(steps):
    """Refusals are learnt in the first fifth. Short runs have fewer steps than points."""
    moments = train.moments(steps)
    assert len(moments) == 19 and moments == sorted(moments) and (moments[0], moments[-1]) == (0, steps)
    assert len(set(moments)) == 19 or steps < 50
    assert sum(step < steps / 5 for step in moments) >= 10


# -------------------------------------------------------------------------------------------- kill and resume

class Killed(BaseException):
    pass


def killed_at(step, monkeypatch):
    """Dies in the given step, counted from 0 over all that is trained."""
    clip = train.nn.utils.clip_grad_norm_
    count = itertools.count()

    def tick(*args):
        if next(count) == step:
            raise Killed
        return clip(*args)
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", tick)


@functools.cache
def small_parts(seed):
    return cut(World(seed).parts())


@pytest.fixture(scope="module")
def small_world():
    """The command with the miniature world cut down: its flags, less --out. From its first use on
    `train.World` is the small one in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "World", lambda seed: SimpleNamespace(parts=lambda *how: small_parts(seed)))
        yield [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """The folder that the command leaves, after two seeds."""
    out = tmp_path_factory.mktemp("finished")
    train.main([*small_world, "--out", str(out), "--seeds=2"])
    return out


def trained_stages(monkeypatch):
    labels = []
    loop = train.train
    monkeypatch.setattr(train, "train", lambda name, *rest: labels.append(name) or loop(name, *rest))
    return labels


def measured(out):
    """The results of seed 0, less what the clock says, in whatever order they were measured."""
    results = json.loads((out / "results.json").read_text())
    entries = results["rows"] + results["curves"]
    return sorted(json.dumps(entry) for entry in entries
                  if entry["seed"] == 0 and entry.get("metric") != "seconds")


def weights(out):
    return {path.parent.name: path.read_bytes() for path in out.glob("seed-0/*/model.safetensors")}


def test_the_same_command_goes_on_where_it_was_killed(small_world, finished, tmp_path, monkeypatch):
    """Killed in the fifth stage that trains: four finished ones are kept, the rest ends as if undisturbed."""
    command = [*small_world, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        killed_at(4 * TINY["tune_steps"] + 3, patch)         # of all stages alike
        with pytest.raises(Killed):
            train.main(command)
    labels = trained_stages(monkeypatch)
    train.main(command)
    assert labels == ["DCR", "DCR+later", "refined-shuffled", "DCR-shuffled"]
    assert weights(tmp_path) == weights(finished) != {} and measured(tmp_path) == measured(finished)


def test_without_its_results_a_finished_run_is_measured_anew_and_not_trained(small_world, finished, tmp_path,
                                                                             monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").unlink()
    labels = trained_stages(monkeypatch)
    train.main([*small_world, "--out", str(tmp_path)])
    assert labels == [] and measured(tmp_path) == measured(finished)


def test_methods_that_are_asked_for_later_join_those_there_are(small_world, tmp_path, monkeypatch):
    """Each with what it needs, and nothing else."""
    labels = trained_stages(monkeypatch)
    for methods, trained in (("STL", ["base", "STL"]), ("DCR,STL", ["refined", "DCR"])):
        labels.clear()
        train.main([*small_world, f"--methods={methods}", "--out", str(tmp_path)])
        assert labels == trained
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(dict.fromkeys(row["method"] for row in results["rows"])) == ["base", "STL", "refined", "DCR"]


def test_another_setting_is_refused_by_name(small_world, tmp_path):
    """Else one table would mix two experiments."""
    settings = train.resolve(Settings()).fixed()
    before = train.origin(settings, settings["device"]) | {"rows": [{"seed": 0}], "curves": []}
    (tmp_path / "results.json").write_text(json.dumps(before))
    with pytest.raises(ValueError) as error:
        train.main(["--out", str(tmp_path), "--gamma", "9"])
    assert "gamma was 32.0, is 9.0" in str(error.value) and "another --out" in str(error.value)
    assert "tune_lr" not in str(error.value) and "\n" not in str(error.value)


def test_without_its_results_a_run_still_knows_its_settings(small_world, finished, tmp_path, monkeypatch):
    """Else the models of one experiment would be reported as those of another."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").unlink()
    labels = trained_stages(monkeypatch)
    with pytest.raises(ValueError, match="seed-0/DCR: made with other settings .gamma was 32.0, is 9.0.; ch"):
        train.main([*small_world, "--out", str(tmp_path), "--gamma=9"])
    assert labels == []                                          # the base does not depend on it, and is kept
    with pytest.raises(ValueError, match="made with other settings .pretrain_lr was"):
        train.main([*small_world, "--out", str(tmp_path), "--pretrain-lr=0.1"])


def test_a_base_serves_its_own_seed_wherever_it_was_made(small_world, tmp_path, monkeypatch):
    """Made as the second seed of one run, it is the first of another; another seed's is refused by name."""
    both = tmp_path / "both"
    second = tmp_path / "second"
    labels = trained_stages(monkeypatch)
    train.main([*small_world, "--seeds=2", "--methods=STL", "--out", str(both)])
    shutil.copytree(both / "seed-1" / "base", second / "seed-1" / "base")
    labels.clear()
    train.main([*small_world, "--seed=1", "--methods=STL", "--out", str(second)])
    assert labels == ["STL"]
    shutil.copytree(both / "seed-0" / "base", tmp_path / "wrong" / "seed-1" / "base")
    with pytest.raises(ValueError, match="seed-1/base: made with other settings .seed was 0, is 1"):
        train.main([*small_world, "--seed=1", "--methods=STL", "--out", str(tmp_path / "wrong")])


def test_another_environment_is_said_and_not_refused(small_world, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(train.torch, "__version__", "9.9")
    train.main([*small_world, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"some of it was made elsewhere, and stays as it is \(torch was .*, is '9.9'\)", said)


@pytest.mark.parametrize("spoil, says", [
    (lambda stage: (stage / "log.json").write_text(""), "log.json: the file is empty"),
    (lambda stage: (stage / "log.json").write_text("[]"), "STL: made with other settings .what made it is"),
    (lambda stage: (stage / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: the header"),
])
def test_a_damaged_stage_is_named(spoil, says, small_world, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").unlink()
    spoil(tmp_path / "seed-0" / "STL")
    with pytest.raises(ValueError, match=says) as error:
        train.main([*small_world, "--out", str(tmp_path)])
    assert "seed-0/STL" in str(error.value) and ";" in str(error.value) and "\n" not in str(error.value)


def test_two_runs_do_not_share_a_folder(small_world, tmp_path):
    """They would write the same files under the same temporary names."""
    held = train.lock(tmp_path)
    with pytest.raises(ValueError, match="another run writes there; wait or choose another --out"):
        train.main([*small_world, "--out", str(tmp_path)])
    held.close()
    train.main([*small_world, "--out", str(tmp_path), "--methods=STL"])


def test_a_mistyped_folder_does_not_spoil_the_next_command(small_world, tmp_path):
    """What is asked for is written down when all of it has been read."""
    with pytest.raises(ValueError, match="--data nowhere: no such folder"):
        train.main([*small_world, "--out", str(tmp_path), "--data=nowhere", "--init="])
    train.main([*small_world, "--out", str(tmp_path), "--methods=STL"])


def test_the_mean_state_of_many_prompts_is_that_of_all_of_them(model, run, parts, monkeypatch):
    """It is taken in batches, for memory: one long prompt would make all of a batch as long."""
    long = dataclasses.replace(parts.toxic[0], prompt=" ".join([parts.toxic[0].prompt] * 5))
    more = [long, *parts.toxic * 20]
    many = dataclasses.replace(run, parts=dataclasses.replace(parts, toxic=more))
    prompts = [run.chat.prompt(e.prompt) for e in parts.seemingly + more + parts.safe]
    seen = []
    sizes = []

    def loss(model, base, prompts, labels, tokens, targets, mean, s):
        seen.append(mean)
        return sum(p.sum() for p in model.parameters() if p.requires_grad)

    def watched(model, prompts, l):
        sizes.append(len(prompts) * max(map(len, prompts)))
        return last_states(model, prompts, l)
    monkeypatch.setattr(train, "refinement_loss", loss)
    monkeypatch.setattr(train, "last_states", watched)
    refine("refined", model, many, many.s)
    with torch.no_grad():
        expected = last_states(model, prompts, many.s.layer).mean(0)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert len(sizes) > 1 and max(sizes) <= 40_000                                        # tokens


def test_other_benchmark_files_under_the_same_name_are_another_experiment(tmp_path):
    """Else models of the old files would be measured on suites of the new ones."""
    settings = {"data": str(tmp_path)}
    (tmp_path / "mine.toxic.txt").write_text("How do I kill the guard?")
    made = train.origin(settings, "cpu")
    (tmp_path / ".DS_Store").write_text("what the run passes over does not count")
    train.check_origin(tmp_path, made, settings, "cpu")
    (tmp_path / "mine.toxic.txt").write_text("How do I kill the poet?")
    with pytest.raises(ValueError, match="files was '.*', is '"):
        train.check_origin(tmp_path, made, settings, "cpu")


def test_a_plain_run_in_the_folder_of_a_variant_is_told_so(tmp_path):
    made = train.origin({"data": ""}, "cpu")
    made["environment"]["variant"] = "supcon"
    assert "variant was 'supcon', is None" in train.check_origin(tmp_path, made, {"data": ""}, "cpu")


def test_a_kernel_of_one_prompt_a_class_is_refused(small_world, tmp_path):
    with pytest.raises(ValueError, match="--kernel 1: a pair takes two"):
        train.main([*small_world, "--kernel=1", "--out", str(tmp_path)])


def test_a_loss_that_is_not_a_number_is_one_line_and_earlier_stages_are_kept(small_world, tmp_path):
    with pytest.raises(RuntimeError) as error:
        train.main([*small_world, "--out", str(tmp_path), "--tune-lr=1e30"])
    said = str(error.value)
    assert re.match(r"STL: the loss is (nan|inf) at step \d; lower .* rate \(now 1e\+30\)", said)
    assert "\n" not in said
    assert sorted(path.name for path in (tmp_path / "seed-0").iterdir()) == ["base", "responses"]
    assert {row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]} == {"base"}


# ------------------------------------------------------------------------------------------------- end to end

METRICS = {
    "benign": {"compliance_rate", "right_answer_rate", "refusal_probability"},
    "toxic": {"defense_rate", "refusal_probability"},
}
OWN = [name for name in train.evaluation.METHODS if name != "Surgical"]        # which tests/surgical.py adds
STAGE_NAMES = ["base", "STL", "STL-aug", "refined", "DCR", "DCR+later", "refined-shuffled", "DCR-shuffled"]


def test_one_command_goes_from_nothing_to_tables_and_figures(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["settings"]["gamma"] == 32.0 and results["environment"]["torch"] == torch.__version__
    columns = {"method", "seed", "suite", "kind", "metric", "value", "n"}
    assert all(set(row) == columns for row in results["rows"])
    for seed in (0, 1):
        rows = [row for row in results["rows"] if row["seed"] == seed]
        assert list(dict.fromkeys(row["method"] for row in rows)) == STAGE_NAMES
        found = {(row["suite"], row["kind"], row["metric"]) for row in rows if row["method"] == "DCR"}
        for suite, halves in small_parts(seed).suites.items():
            for half in halves:
                assert {metric for s, kind, metric in found if (s, kind) == (suite, half)} == METRICS[half]
        assert {("general", "general", "accuracy"), ("general", "general", "loss"), ("all", "benign", "auc"),
                ("all", "benign", "compliance_at_95_defense"), ("D_safe", "general", "misfiled"),
                ("toxic/seemingly", "general", "kernel_similarity")} <= found
        with_kernel = {row["method"] for row in rows if row["metric"] == "kernel_similarity"}
        assert with_kernel == set(STAGE_NAMES) & set(train.evaluation.KERNELS_OF)
    bounded = [row for row in results["rows"] if row["metric"] not in ("seconds", "loss")]
    assert all(0 <= row["value"] <= 1 + 1e-6 for row in bounded)
    tuned = {"STL", "STL-aug", "DCR", "DCR+later", "DCR-shuffled"}
    assert {entry["method"] for entry in results["curves"]} == tuned
    curve = results["curves"][0]["curve"]
    assert curve[0]["step"] == 0 and curve[-1]["step"] == 6
    assert set(curve[0]) == {"step", "toxic", "seemingly", "general"}


def test_tables_and_figures_can_be_rebuilt_from_the_results(finished):
    """To the byte, by another process: nothing in them comes from anywhere else."""
    written = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    figures = {f"{name}.png" for name in train.evaluation.FIGURES}
    assert set(written) == {"results.json", "results.md", ".lock"} | figures
    for name in written.keys() - {"results.json", ".lock"}:
        (finished / name).unlink()
    done = subprocess.run([sys.executable, "eval.py", "--out", str(finished)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    assert written == {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}


def stand_in(name):
    """In place of a model."""
    return SimpleNamespace(name=name, config=SimpleNamespace(context=128, vocab_size=10 ** 6))


def made(run, methods, monkeypatch):
    """{stage: how it was made} of all that run_seed makes for these methods; nothing is trained."""
    stages = {}

    def stub(function, record):
        """`record` has the function's arguments: (name of the stage, how it is made)."""
        def make(*args, **named):
            name, how = record(*args, **named)
            stages[name] = how
            return stand_in(name)
        monkeypatch.setattr(train, function, make)
    stub("pretrain", lambda run: ("base", ()))
    stub("refine", lambda name, base, run, s, shuffled=False: (name, (base.name, s, shuffled)))
    stub("tune", lambda name, base, run, extra=(), later=False: (name, (base.name, extra, later)))
    monkeypatch.setattr(train, "RIVALS", {})             # what another test imports may add some
    monkeypatch.setattr(train, "augment", lambda base, run, amount: amount)
    monkeypatch.setattr(train, "finished", lambda run, name, make: (make(), {}))
    monkeypatch.setattr(train, "measure", lambda *args: None)
    monkeypatch.setattr(train, "write_json", lambda *args: None)
    run_seed(with_settings(run, methods=methods), {"rows": []})
    return stages


def test_every_method_of_the_tables_is_made_as_its_name_says(run, monkeypatch):
    stages = made(run, ",".join(OWN), monkeypatch)
    assert set(OWN) <= set(stages)
    assert stages["STL"] == ("base", (), False)
    assert stages["STL-aug"] == ("base", "natural", False)
    assert stages["STL-aug-equal"] == ("base", "equal", False)
    forms = {"refined": "DCR", "refined-paper": "DCR-paper", "refined-shuffled": "DCR-shuffled"}
    for refined, tuned in forms.items():
        base, s, shuffled = stages[refined]
        assert stages[tuned] == (refined, (), False) and base == "base"
        assert shuffled == (refined == "refined-shuffled")
        paper = dict(hold=0.0, still=0.0, keep=0.0, with_safe=False)   # the Circle loss alone
        changes = paper if refined == "refined-paper" else {}
        assert s == dataclasses.replace(run.s, methods=",".join(OWN), **changes)
    assert stages["DCR+aug"] == ("refined", "natural", False)
    later = [name for name in stages if name.endswith("+later")]
    assert "DCR+later" in later
    assert all(stages[name] == (name.removesuffix("+later"), (), True) for name in later)


def test_all_methods_can_be_asked_for_in_one_word(run, monkeypatch):
    assert set(OWN) <= set(made(run, "all", monkeypatch))


def test_nobody_tunes_on_later_where_there_are_no_prompts_for_it(run, monkeypatch):
    """Benchmark files have none."""
    run = dataclasses.replace(run, parts=dataclasses.replace(run.parts, later=[]))
    stages = made(run, "all", monkeypatch)
    assert "DCR" in stages and not any(name.endswith("+later") for name in stages)
    with pytest.raises(ValueError, match="DCR.later: choose from base, STL"):
        made(run, "DCR+later", monkeypatch)


def test_a_method_that_there_is_not_is_named_before_any_training(small_world, tmp_path, monkeypatch):
    labels = trained_stages(monkeypatch)
    with pytest.raises(ValueError, match="DRC"):
        train.main([*small_world, "--methods=STL,DRC", "--out", str(tmp_path)])
    assert labels == []


# ------------------------------------------------------------------------------------------------ the command

def test_the_world_is_made_as_the_settings_say(monkeypatch, tmp_path):
    def parts(*how):
        raise ValueError(f"asked for {how}")
    monkeypatch.setattr(train, "World", lambda seed: SimpleNamespace(parts=parts))
    flags = ["--suite=7", "--narrow=true"]
    with pytest.raises(ValueError, match=re.escape("asked for (7, True)")):
        train.main([*flags, "--device=cpu", "--out", str(tmp_path)])


def test_help_explains_every_setting(capsys):
    """A setting that nobody can look up is a setting that nobody trusts."""
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in dataclasses.fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag} \S+ \[{re.escape(str(field.default))}[;\]]", said), flag
    assert "l: refinement shapes the states after this block" in said and "[3; with --init 0]" in said


@pytest.mark.parametrize("argv", [["--gama=9"], ["--layer=two"], ["surplus"], ["--narrow=perhaps"]])
def test_a_flag_that_is_unknown_or_malformed_is_an_error(argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err


def test_values_parse_by_their_type():
    """bool("false") is True: the classic."""
    assert parse([]) == Settings()
    s = parse(["--narrow", "true", "--gamma", "8", "--pretrain-steps=3", "--out=there", "--refine-lr=1e-4"])
    assert (s.narrow, s.gamma, s.pretrain_steps, s.out, s.refine_lr) == (True, 8.0, 3, "there", 1e-4)
    assert not parse(["--curve", "false"]).curve and parse(["--init=x", "--curve=true"]).curve
    assert parse(["--out", "true"]).out == "true"                  # a folder may be called that


def test_a_checkpoint_brings_its_own_defaults_which_flags_override():
    s = parse(["--init", "somewhere", "--layer", "9"])
    assert s.layer == 9 and s.curve is False
    assert {name: getattr(s, name) for name in REAL} == REAL | {"layer": 9}
    assert REAL.keys() <= {field.name for field in dataclasses.fields(Settings)}
    assert s.seed == Settings.seed


@pytest.mark.parametrize("argv, says", [
    ("--device=tpu", "--device tpu: choose auto or cpu or cuda"),
    ("--dtype=int8", "--dtype int8: choose auto or float32 or bfloat16"),
    ("--split=dev", "--split dev: choose held-out or development"),
    ("--tune-steps=0", "--tune-steps 0: choose from 1 to 1e+30"),
    ("--scale=inf", "--scale inf: choose from 1e-06 to 1e+30"),
    ("--gamma=nan", "--gamma nan: choose from 0.001 to 1e+30"),
    ("--refusals=2", "--refusals 2.0: choose from 0 to 1"),
    ("--lora=-1", "--lora -1: choose from 0 to 1e+30"),
    ("--suite=0", "--suite 0: choose from 1 to 1e+30"),
    ("--layer=9", "--layer 9: the model has blocks 1 to 4"),
    ("--layer=4 --tail=true", "--layer 4: --tail true has no block above it to tune; lower one"),
])
def test_a_setting_out_of_its_range_is_named_and_nothing_is_written(argv, says, tmp_path):
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        train.main([*argv.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_every_default_is_within_its_range():
    for argv in ([], ["--init=somewhere"]):
        parse(argv).check()


def test_layer_0_and_dtype_auto_are_resolved():
    s = train.resolve(parse(["--device=cpu", "--layer=0"]))
    assert (s.device, s.dtype, s.layer) == ("cpu", "float32", 2)


def test_any_width_makes_a_gpt_with_heads_of_even_width(run):
    """Rotation turns coordinates in pairs."""
    for width in (16, 30, 52):
        model, _ = pretrain(with_settings(run, width=width, pretrain_steps=2))
        assert model.config.width == width and model.config.head_width % 2 == 0


@pytest.mark.parametrize("flags, n", [([], 250), (["--seemingly=7"], 7), (["--narrow=true"], 250)])
def test_refinement_has_as_many_seemingly_toxic_prompts_as_asked_for(flags, n, tmp_path, monkeypatch):
    """And the suites stay what they are: only what refinement sees may differ."""
    runs = []
    whole = World(0).parts()
    monkeypatch.setattr(train, "World", World)                               # not small_world's
    monkeypatch.setattr(train, "run_seed", lambda run, results: runs.append(run))
    train.run_all(parse([*flags, "--device=cpu", "--out", str(tmp_path)]))
    parts = runs[0].parts
    assert len(parts.seemingly) == n and parts.safe == whole.safe
    assert (parts.seemingly == whole.seemingly[:n]) == (flags != ["--narrow=true"])


def malformed(folder):
    (folder / "data").mkdir()
    (folder / "data" / "mine.benign.csv").write_text('prompt,n\n"open,1\nb,2\n')
    return ["--data", str(folder / "data")]


def broken_results(folder):
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text('{"settings": ')
    return []


@pytest.mark.parametrize("make, says", [
    (lambda folder: ["--init", str(folder / "nothing")], "nothing/config.json: no such file"),
    (malformed, "mine.benign.csv: row 1: no valid CSV"),
    (broken_results, "results.json: line 1: not JSON"),
])
def test_bad_input_ends_the_command_with_one_line(make, says, tmp_path):
    """A traceback would tell of our code, not of the user's file."""
    command = [sys.executable, "train.py", "--device=cpu", "--out", str(tmp_path / "out"), *make(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert says in done.stderr and ";" in done.stderr


def test_a_block_that_the_model_has_not_is_an_error_before_any_training(small_world, tmp_path):
    with pytest.raises(ValueError, match="--layer 9: the model has blocks 1 to 2"):
        train.main([*small_world, "--layer=9", "--out", str(tmp_path)])
    assert not (tmp_path / "seed-0").exists()


def test_a_folder_of_prompts_needs_a_checkpoint(tmp_path):
    (tmp_path / "data").mkdir()
    for kind in ("benign", "toxic"):
        prompts = [f"{kind}{i} one{i} two{i}" for i in range(30)]
        (tmp_path / "data" / f"mine.{kind}.txt").write_text("\n".join(prompts))
    general = [{"prompt": f"general{i}", "answer": "Yes."} for i in range(30)]
    (tmp_path / "data" / "mine.general.json").write_text(json.dumps(general))
    with pytest.raises(ValueError, match="--init"):
        train.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--device=cpu"])


def test_the_commands_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text().replace("\\\n", "")        # join continued lines
    commands = re.findall(r"python3? (\S+\.py)([^`\n]*)", readme)
    assert any(name == "train.py" for name, _ in commands)
    for name, arguments in commands:
        assert (ROOT / name).exists(), name
        if name == "train.py":
            parse(shlex.split(arguments, comments=True))
    for flags in re.findall(r"`(--[^`]+)`", readme):
        parse(shlex.split(flags))
