"""Write train.jsonl and test.jsonl: pairs of questions with the same intent, from examples/intents."""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent


def pairs(name: str, of_each: int) -> list[dict[str, str]]:
    """`of_each` pairs of every intent, no text in two of them, in an order in which the intents take turns."""
    texts: dict[str, list[str]] = {}
    for line in (HERE.parent / "intents" / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["label"], []).append(row["text"])
    draw = random.Random(0)
    drawn = [draw.sample(sorted(set(texts[label])), 2 * of_each) for label in sorted(texts)]
    return [{"anchor": own[2 * i], "positive": own[2 * i + 1]} for i in range(of_each) for own in drawn]


def main() -> None:
    for name, of_each in (("train.jsonl", 10), ("test.jsonl", 1)):
        lines = [json.dumps(pair) + "\n" for pair in pairs(name, of_each)]
        (HERE / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
