"""Does the length of a file cost time before the first step, or memory?

`rankwise train` on files of 2,000 and of 200,000 different rows (SmolLM2-135M, 4 rows a batch, held-out rows as by
default), each in a process of its own that is stopped after its first step: seconds from the loaded model to the end of
that step, seconds from the start to there, and peak memory. The last line is JSON.

    python benchmarks/large_file.py [--rows 2000 200000]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def rows(count: int) -> Iterator[str]:
    """The text-to-SQL questions again and again, each time with another number, so that no two are the same."""
    lines = (EXAMPLES / "text_to_sql/train.jsonl").read_text(encoding="utf-8").splitlines()
    for number in range(count):
        row = json.loads(lines[number % len(lines)])
        yield json.dumps({**row, "prompt": f"{number}. {row['prompt']}"}) + "\n"


def measure(data: Path, out: Path) -> dict[str, float]:
    """Seconds to the first step, and the peak memory in bytes until the run is stopped there."""
    options = {
        "--model": "smollm2-135m",
        "--data": str(data),
        "--out": str(out),
        "--r": "8",
        "--batch-size": "4",
        "--max-steps": "20",
    }
    command = [sys.executable, "-m", "rankwise", "train", *(part for pair in options.items() for part in pair)]
    begin = time.perf_counter()
    at: dict[str, float] = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            for event in ("loading", "step 1/"):
                if line.startswith(event) and event not in at:
                    at[event] = time.perf_counter() - begin
                    if event == "step 1/":
                        process.terminate()
    if "step 1/" not in at:
        raise SystemExit(f"{' '.join(command)} failed")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return {
        "seconds_after_loading": at["step 1/"] - at["loading"],
        "seconds_from_start": at["step 1/"],
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 200_000])
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in options.rows:
            data = Path(scratch, f"{count}.jsonl")
            with data.open("w", encoding="utf-8") as file:
                file.writelines(rows(count))
            found = measure(data, Path(scratch, f"run-{count}"))
            figures.append({"rows": count, **found})
            print(
                f"{count:,} rows: first step {found['seconds_after_loading']:.1f} s after the model was loaded, "
                f"{found['seconds_from_start']:.1f} s after the start; peak {found['peak_memory_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    print(json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "runs": figures}))


if __name__ == "__main__":
    main()
