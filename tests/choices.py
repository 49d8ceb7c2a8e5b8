"""Did tuning cost general knowledge? Accuracy on multiple-choice questions, by likelihood.

    python tests/choices.py QUESTIONS CHECKPOINT out-real/seed-0/STL out-real/seed-0/DCR

QUESTIONS is a file of MMLU (.csv: question, four answers, the right one's letter; no header) or of
ARC (.jsonl, as AI2 or as Hugging Face publish it). Each answer is scored as the response to its
question, in the model's chat format: the mean log-probability of its tokens, so that a long answer
has no handicap. The highest is chosen. Printed are the accuracy with Wilson's 95 % interval, and
that of each model minus the first, paired by question."""
import argparse
import csv
import io
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from by_prompt import less, wilson                                     # noqa: E402 (after the path is set)
from data import collate, load_tokenizer, parse_json, read_text        # noqa: E402
from eval import markdown                                              # noqa: E402
from model import GPT, token_losses                                    # noqa: E402


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple      # texts
    right: int          # index of the right one


def questions_of(path):
    """The questions of a file. ValueError, naming file and row, for what is none."""
    text = read_text(path)
    ending = Path(path).suffix.lower()
    if ending == ".csv":
        rows = list(csv.reader(io.StringIO(text, newline="")))
        return [mmlu(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    if ending == ".jsonl":
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                found.append(arc(parse_json(line, path, number), f"{path}: line {number}"))
        return found
    raise ValueError(f"{path}: give MMLU as .csv or ARC as .jsonl")


def mmlu(row, place):
    """A Question of ["Who ...?", "Ada", "Bob", "Cleo", "Dan", "C"]."""
    letters = string.ascii_uppercase[:len(row) - 2]
    if len(row) < 4 or row[-1].strip() not in list(letters) or not all(map(str.strip, row)):
        raise ValueError(f"{place}: not a question, its answers and the letter of the right one; mend it")
    return Question(row[0], tuple(row[1:-1]), letters.index(row[-1].strip()))


def arc(record, place):
    """A Question of AI2's record,

        {"question": {"stem": ..., "choices": [{"label": "A", "text": ...}, ...]}, "answerKey": "A"}

    or of Hugging Face's,

        {"question": ..., "choices": {"label": [...], "text": [...]}, "answerKey": ...}
    """
    try:
        question = record["question"]
        if isinstance(question, dict):
            labels = [choice["label"] for choice in question["choices"]]
            texts = [choice["text"] for choice in question["choices"]]
            stem = question["stem"]
        else:
            labels = record["choices"]["label"]
            texts = record["choices"]["text"]
            stem = question
        if not all(text.strip() for text in (stem, *texts)):
            raise ValueError("what has no token has no probability")
        return Question(stem, tuple(texts), labels.index(record["answerKey"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{place}: no question of ARC (question, choices, answerKey), or one without "
                         "words; mend it") from None


@torch.no_grad()
def chosen(model, chat, question):
    """The index of the answer with the highest mean log-probability of its tokens."""
    prompt = chat.prompt(question.text)
    sequences = [(prompt + chat.ids(answer), len(prompt)) for answer in question.answers]
    longest = max(len(ids) for ids, _ in sequences)
    if longest > model.config.context:
        raise ValueError(f"{question.text[:60]}...: {longest} tokens exceed the context of "
                         f"{model.config.context}; leave it out")
    tokens, targets = collate(sequences, model.cos.device)                       # (answers, T) each
    losses = token_losses(model, tokens, targets)                                # (due tokens,), row by row
    due = (targets >= 0).sum(1).tolist()
    means = [of_answer.mean() for of_answer in losses.split(due)]
    return int(torch.stack(means).argmin())


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("questions", help="a .csv of MMLU or a .jsonl of ARC")
    parser.add_argument("models", nargs="+", help="checkpoint folders, tokenizer included")
    given = parser.parse_args(argv)
    questions = questions_of(given.questions)
    for folder in given.models:                                     # before the first takes its hour
        for file in ("config.json", "tokenizer.json"):
            if not (Path(folder) / file).exists():
                raise ValueError(f"{folder}: no {file} in it; give folders of checkpoints")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = [["model", "questions", "accuracy, %", "less the first, points"]]
    first = None
    for folder in given.models:
        model = GPT.from_pretrained(folder, device=device)
        chat = load_tokenizer(folder)
        right = {}
        for i, question in enumerate(tqdm(questions, desc=folder, leave=False)):
            right[i] = chosen(model, chat, question) == question.right
        hits = sum(right.values())
        low, high = wilson(hits, len(right))
        accuracy = f"{100 * hits / len(right):.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        table.append([folder, str(len(right)), accuracy, less(right, first) if first else ""])
        first = first or right
    print(markdown(zip(*table)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
