"""Makes train.jsonl, valid.jsonl and test.jsonl of the text-to-SQL rows beside this folder: python make.py

A question's words that are the value of a condition in its query are tagged: B-text or B-number for the first word of
a value, I-… for the others, O for all other words. Rows where a value of the query does not stand in the question, word
by word whatever the case, or stands there more than once, are left out, because what to tag would be a guess.
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")
CONDITION = re.compile(r"(?:WHERE|AND) .+? [=<>] ('.*?'|\S+)(?= AND |$)")
NUMBER = re.compile(r"[\d.,]+")


def tagged(question: str, query: str) -> dict[str, list[str]] | None:
    """The row, or None where a value is not found exactly once."""
    words = WORD.findall(question)
    tags = ["O"] * len(words)
    lower = [word.lower() for word in words]
    for value in CONDITION.findall(query):
        value = value.strip("'")
        sought = WORD.findall(value.lower())
        length = len(sought)
        places = [place for place in range(len(words)) if sought and lower[place : place + length] == sought]
        if len(places) != 1 or any(tag != "O" for tag in tags[places[0] : places[0] + length]):
            return None
        kind = "number" if NUMBER.fullmatch(value) else "text"
        tags[places[0] : places[0] + length] = [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
    return {"tokens": words, "tags": tags} if words else None


def main() -> None:
    for part in ("train", "valid", "test"):
        lines = (HERE.parent / "text_to_sql" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = []
        for line in lines:
            row = json.loads(line)
            rows.append(tagged(row["prompt"].partition("\nQ: ")[2], row["completion"]))
        kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row is not None]
        (HERE / f"{part}.jsonl").write_text("".join(kept), encoding="utf-8")
        print(f"{part}: {len(kept)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
