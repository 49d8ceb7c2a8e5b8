"""tests/choices.py reads published question files, and chooses the answer that is likeliest by its tokens."""
import json

import pytest
import torch

import choices
from choices import Question


def test_mmlu_and_both_forms_of_arc_give_the_same_question(tmp_path):
    expected = [Question("Who, then?", ("Ada", "Bob, too", "Cleo", "Dan"), 2)]
    (tmp_path / "mmlu.csv").write_text('"Who, then?",Ada,"Bob, too",Cleo,Dan,C\n')
    texts = ["Ada", "Bob, too", "Cleo", "Dan"]
    labelled = [{"label": label, "text": text} for label, text in zip("ABCD", texts)]
    ai2 = {"question": {"stem": "Who, then?", "choices": labelled}, "answerKey": "C"}
    hub = {"question": "Who, then?", "choices": {"label": list("ABCD"), "text": texts}, "answerKey": "C"}
    (tmp_path / "ai2.jsonl").write_text(json.dumps(ai2) + "\n\n")
    (tmp_path / "hub.jsonl").write_text(json.dumps(hub))
    for name in ("mmlu.csv", "ai2.jsonl", "hub.jsonl"):
        assert choices.questions_of(tmp_path / name) == expected


@pytest.mark.parametrize("name, text, says", [
    ("a.csv", "Who?,Ada,Bob,Cleo,Dan,C\nWho?,Ada,Bob,Cleo,Dan,X\n", "row 2: not a question"),
    ("a.csv", "question,answer\n", "row 1: not a question"),
    ("a.jsonl", '{"question": "Who?", "choices": {"label": ["A"], "text": ["Ada"]}, "answerKey": "B"}',
     "line 1"),
    ("a.jsonl", '{"prompt": "Who?"}', "line 1: no question of ARC"),
    ("a.csv", "Who?,Ada,,Cleo,Dan,C\n", "row 1: not a question"),               # once always chosen
    ("a.jsonl", '{"question": "Who?", "choices": {"label": ["A", "B"], "text": ["Ada", " "]},'
     '"answerKey": "A"}',
     "line 1"),
    ("a.jsonl", '{"question": null, "choices": {"label": ["A"], "text": ["Ada"]}, "answerKey": "A"}',
     "line 1"),
    ("a.txt", "Who?", "give MMLU as .csv or ARC as .jsonl"),
])
def test_other_files_get_one_clear_line(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        choices.questions_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_answer_with_the_highest_mean_log_probability_is_chosen(model, chat):
    question = Question("Where is the dog?", ("in the harbor", "To kill means to stop.", "Sure"), 0)
    prompt = chat.prompt(question.text)
    means = []
    for answer in question.answers:
        ids = chat.ids(answer)
        log_p = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
        terms = [log_p[len(prompt) - 1 + i, token] for i, token in enumerate(ids)]
        means.append(torch.stack(terms).mean())
    assert choices.chosen(model, chat, question) == int(torch.stack(means).argmax())


def test_the_choice_does_not_depend_on_the_order_of_the_answers(model, chat):
    answers = ("in the harbor", "To kill means to stop.", "Sure", "a dog")
    forward = choices.chosen(model, chat, Question("Where is the dog?", answers, 0))
    backward = choices.chosen(model, chat, Question("Where is the dog?", answers[::-1], 0))
    assert answers[forward] == answers[::-1][backward]


def test_a_table_of_two_models_is_printed(model, chat, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choices, "load_tokenizer", lambda folder: chat)
    model.save_pretrained(tmp_path / "one")
    model.lm_head.weight.data.neg_()
    model.save_pretrained(tmp_path / "other")
    questions = tmp_path / "mmlu.csv"
    questions.write_text("Where?,Ada,Bob,the dog,Dan,C\n"
                         "Who is it?,a cat,the guard,in it,to kill,A\n")
    with pytest.raises(ValueError, match="other: no tokenizer.json in it"):            # before any is asked
        (tmp_path / "one" / "tokenizer.json").write_text("{}")
        choices.main([str(questions), str(tmp_path / "one"), str(tmp_path / "other")])
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    choices.main([str(questions), str(tmp_path / "one"), str(tmp_path / "other")])
    lines = capsys.readouterr().out.splitlines()
    assert "less the first, points" in lines[0]
    assert len(lines) == 4
    assert lines[3].split("|")[4].strip()                      # the second is compared with the first
