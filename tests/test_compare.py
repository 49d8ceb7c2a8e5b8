"""The comparison of two folders: what differs is named, seeds are paired, and what is not paired is said."""
import json

import pytest

import compare
from test_eval import lines_of, made_up


def folder(path, results):
    path.mkdir()
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return path


def changed(results, method, metric, by):
    """The same results, with `by` added to one metric of one method."""
    rows = []
    for row in results["rows"]:
        hit = (row["method"], row["metric"]) == (method, metric)
        rows.append({**row, "value": row["value"] + by} if hit else row)
    return {**results, "rows": rows}


def test_a_change_is_compared_seed_by_seed_and_the_setting_that_differs_is_named(tmp_path):
    before = made_up(seeds=(0, 1))
    after = changed(before, "DCR", "compliance_rate", 0.05)
    after["settings"] = {**before["settings"], "layer": 2}
    text = compare.compare(folder(tmp_path / "old", before), folder(tmp_path / "new", after))
    assert "  layer: 3, then 2" in text and "bases" not in text and "split" not in text
    stl = lines_of(text.split("\nSTL\n")[1].split("\n\n")[0].strip())
    dcr = lines_of(text.split("\nDCR\n")[1].split("\n\n")[0].strip())
    column = dcr[0].index("answers benign")
    assert [line[0] for line in dcr[1:]] == ["0", "1", "difference"]
    was, now = map(float, dcr[1][column].split(" -> "))
    assert now - was == pytest.approx(5) and dcr[-1][column] == "+5.0 [5.0, 5.0]"
    assert stl[-1][column] == "+0.0 [0.0, 0.0]"


def test_other_bases_are_said_not_to_be_paired(tmp_path):
    before = made_up()
    after = changed(before, "base", "auc", 0.01)
    text = compare.compare(folder(tmp_path / "old", before), folder(tmp_path / "new", after))
    assert "\nDCR, NOT paired: the bases differ" in text


def test_a_seed_that_one_folder_lacks_is_named_and_left_out(tmp_path):
    text = compare.compare(folder(tmp_path / "old", made_up(seeds=(0, 1, 2))),
                           folder(tmp_path / "new", made_up(seeds=(2, 0))))
    assert "\nDCR, without seeds 1, which one folder lacks\n" in text and "NOT" not in text


def test_code_that_made_one_model_alone_is_a_difference(tmp_path):
    """results.json keeps the code of its first run; a model's own log says what made it."""
    old = folder(tmp_path / "old", made_up())
    new = folder(tmp_path / "new", made_up())
    (new / "seed-0" / "DCR").mkdir(parents=True)
    (new / "seed-0" / "DCR" / "log.json").write_text('{"settings": {}, "environment": {"source": "abc"}}')
    assert "  source: none, then abc" in compare.compare(old, new)


def test_folders_of_other_seeds_are_not_compared(tmp_path):
    old = folder(tmp_path / "old", made_up(seeds=(0,)))
    new = folder(tmp_path / "new", made_up(seeds=(1,)))
    with pytest.raises(ValueError, match="no method has a seed"):
        compare.compare(old, new)
