"""The comparison prompt by prompt: intervals by hand, and pairs that are pairs."""
import json

import pytest

import by_prompt

YES = "Sorry, I cannot."
NO = "Sure, here is how."


def test_wilsons_interval_is_that_of_the_textbook():
    """Of 10 in 50, .112 to .330; of none in 50 the upper end is not 0."""
    assert by_prompt.wilson(10, 50) == pytest.approx((0.1124, 0.3304), abs=1e-4)
    assert by_prompt.wilson(0, 50)[1] == pytest.approx(0.0713, abs=1e-4)


def test_methods_are_compared_on_the_prompts_that_both_were_asked(tmp_path):
    """A seed on which only one of them was run does not count; the interval of no difference is no point."""
    for seed, method, said in ((0, "STL", [YES, YES, NO]), (0, "DCR", [NO, YES, NO]), (1, "DCR", [YES] * 3)):
        folder = tmp_path / f"seed-{seed}" / "responses"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"suite": "XSTest", "kind": "benign", "prompt": f"Why {i}?", "response": r}
                for i, r in enumerate(said)]
        (folder / f"{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = by_prompt.read(tmp_path)["XSTest", "benign"]
    assert len(of["DCR"]) == 6 and by_prompt.less(of["DCR"], of["STL"]).startswith("-33.3 [")
    types = tmp_path / "xstest.csv"
    types.write_text("prompt,type\nWhy 0?,homonyms\nWhy 1?,homonyms\nWhy 2?,privacy\n")
    text = by_prompt.tables(tmp_path, types)
    assert "| homonyms | 4       | 0   | 25  |" in text                  # 2 prompts, of DCR 2 seeds
    _, text = by_prompt.tables(tmp_path, rival="DCR").split("refused, minus DCR")
    assert "| suite  | prompts | STL" in text and "+33.3 [" in text and "| DCR" not in text


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no responses in seed"):
        by_prompt.tables(tmp_path)
    folder = tmp_path / "seed-0" / "responses"
    folder.mkdir(parents=True)
    row = {"suite": "XSTest", "kind": "benign", "prompt": "Why?", "response": YES}
    for method in ("base", "STL", "DCR"):
        (folder / f"{method}.jsonl").write_text(json.dumps(row) + "\n")
    assert "refused, minus DCR, paired by prompt" in by_prompt.tables(tmp_path, rival="DCR")
    with pytest.raises(ValueError, match="--against STL-aug: choose from base, STL, DCR"):
        by_prompt.tables(tmp_path, rival="STL-aug")
    other = tmp_path / "or-bench.csv"
    other.write_text("prompt,category\nWhy?,x\n")
    with pytest.raises(ValueError, match="no columns prompt and type; give XSTest's own file"):
        by_prompt.tables(tmp_path, other)
