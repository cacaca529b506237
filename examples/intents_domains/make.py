"""Makes train.jsonl, valid.jsonl and test.jsonl of CLINC150's files: python make.py FOLDER

FOLDER holds data_small.json and domains.json. A text of the domains banking, travel and kitchen_and_dining has two
labels, its intent and its domain; a text that is out of CLINC's scope has none.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
DOMAINS = ("banking", "travel", "kitchen_and_dining")
OUTSIDE = {"train": 100, "val": 100, "test": 100}
"""At most so many texts without a label."""


def main() -> None:
    source = Path(sys.argv[1])
    texts = json.loads((source / "data_small.json").read_text(encoding="utf-8"))
    domains = json.loads((source / "domains.json").read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain in DOMAINS for intent in domains[domain]}
    for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        rows = [
            {"text": text, "labels": [intent, domain_of[intent]]} for text, intent in texts[part] if intent in domain_of
        ]
        rows += [{"text": text, "labels": []} for text, _ in texts[f"oos_{part}"][: OUTSIDE[part]]]
        random.Random(0).shuffle(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
