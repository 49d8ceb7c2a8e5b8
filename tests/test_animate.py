"""tests/animate.py: the film shows what training does, and training is not changed by being looked at."""
import pytest
import torch
from PIL import Image

import animate
import eval as evaluation
import train
from model import GPT, GPTConfig


def a_base(run):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=run.chat.size, width=16, blocks=2, kv_heads=2, head_width=4, hidden=48))


def test_looking_changes_nothing(run):
    base = a_base(run)
    classes = evaluation.prompt_classes(run.parts, 3)
    every_train = train.train
    unseen, _ = train.refine("refined", base, run, run.s)
    seen, moments = animate.film(lambda: train.refine("refined", base, run, run.s), run, classes)
    assert train.train is every_train
    assert moments[0]["states"].shape == (9, 16)
    for p, q in zip(unseen.parameters(), seen.parameters()):
        assert torch.equal(p, q)


def test_the_film_waits_for_refinement_and_then_tunes_both(run, tmp_path):
    base = a_base(run)
    classes = evaluation.prompt_classes(run.parts, 3)
    panels = animate.scenes(run, base, classes)
    left = panels["STL"]
    right = panels["DCR"]
    assert len(left) == len(right)
    first_of_tuning = next(i for i, (caption, _) in enumerate(left) if "tuning" in caption)
    waiting = [moment for caption, moment in left[:first_of_tuning]]
    assert all(moment is waiting[0] for moment in waiting)
    refined = right[first_of_tuning - 1][1]                      # tuning goes on from where refinement ended
    assert torch.allclose(refined["states"], right[first_of_tuning][1]["states"], atol=1e-5)
    assert not torch.allclose(refined["states"], waiting[0]["states"], atol=1e-5)

    animate.flatten(panels)
    few = {name: frames[::8] for name, frames in panels.items()}
    animate.draw(few, classes, 1, tmp_path / "states.gif")
    with Image.open(tmp_path / "states.gif") as film:
        assert 1 < film.n_frames <= len(few["DCR"])              # frames that rest may be stored as one


def test_a_folder_without_results_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no such file; make it with python train.py") as error:
        animate.main(["--out", str(tmp_path)])
    assert "\n" not in str(error.value)
