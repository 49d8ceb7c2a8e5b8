"""tests/variants.py: each variant replaces what it says, and nothing else."""
import pytest
import torch
import torch.nn.functional as F

import train
import variants
from model import last_states


def test_supcon_is_its_formula_written_as_loops():
    torch.manual_seed(0)
    features = torch.randn(7, 5)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])          # class 2 has no positive: its anchor adds nothing
    x = F.normalize(features, dim=1)
    losses = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        total = sum((x[i] @ x[a] / variants.TEMPERATURE).exp() for a in others)
        terms = [-((x[i] @ x[p] / variants.TEMPERATURE).exp() / total).log() for p in others
                 if labels[p] == labels[i]]
        losses.append(sum(terms) / len(terms) if terms else torch.tensor(0.0))
    assert torch.allclose(variants.supcon_loss(features, labels), torch.stack(losses).mean(), atol=1e-6)


def test_supcon_parts_two_classes():
    torch.manual_seed(0)
    features = torch.randn(16, 8, requires_grad=True)
    labels = torch.arange(16) % 2
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        variants.supcon_loss(features, labels).backward()
        optimizer.step()
    x = F.normalize(features.detach(), dim=1)
    cosines = x @ x.T
    same = labels[:, None] == labels[None, :]
    assert cosines[same].min() > cosines[~same].max()


def test_mean_states_are_those_of_each_prompt_alone(model):
    prompts = [[5, 6, 7, 8], [9, 10]]
    together = variants.mean_states(model, prompts, 1)
    for row, prompt in zip(together, prompts):
        alone = model(torch.tensor([prompt]), upto=1)[0].mean(0)
        assert torch.allclose(row, alone, atol=1e-6)
    assert not torch.allclose(together, last_states(model, prompts, 1), atol=1e-3)


def test_qkv_trains_queries_keys_and_values_alone(model, run):
    trained = variants.unfreeze_qkv(model, model.layers, 2, run.rng("LoRA"))
    names = {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj"}
    assert len(trained) == 2 * 3 * model.config.blocks                   # A and B of three maps a block


def test_all_tokens_are_due(run):
    example = run.parts.safe[0]
    (ids, first), = variants.exchanges_all_tokens(run, [example], 64)
    (same_ids, usual_first), = run.exchanges([example], 64)
    assert ids == same_ids
    assert first == 1 < usual_first


def test_results_say_which_variant_made_them(tmp_path, monkeypatch):
    for owners, attribute, _ in variants.VARIANTS.values():              # put back after the test
        for owner in owners:
            monkeypatch.setattr(owner, attribute, getattr(owner, attribute))
    monkeypatch.setattr(train, "origin", train.origin)
    called = []
    monkeypatch.setattr(train, "main", called.append)
    variants.main(["supcon", "--seed", "50"])
    assert called == [["--seed", "50"]]
    assert train.refinement_loss.__globals__["circle_loss"] is variants.supcon_loss
    made = train.origin(train.Settings().fixed(), "cpu")
    assert made["environment"]["variant"] == "supcon"


def test_an_unknown_variant_is_one_clear_line():
    with pytest.raises(ValueError, match="supcon, mean, qkv, all-tokens") as error:
        variants.main(["triplet"])
    assert "\n" not in str(error.value)
