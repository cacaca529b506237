"""Does an interrupted run end with the bytes of the uninterrupted one, whatever happens to it and when?

A tiny random Llama is trained by `rankwise train`, with dropout, held-out evaluations and a checkpoint every two steps.
Three things then happen to the run, each followed by `rankwise train --resume`:
  kills   SIGKILL at a random moment, again and again, until the run comes through;
  cuts    a file of the newest checkpoint (every fifth time of both) is cut at a random length;
  limits  no file may grow beyond a random size (RLIMIT_FSIZE): it must say so, and exit with 2;
  disks   its file system (a small tmpfs, which takes the right to mount one) is filled up to a random rest: the same.
Adapter and metrics (without times) must be equal to the uninterrupted run's, byte for byte.

    python benchmarks/kill.py --kills 50 --cuts 50 --limits 50 --disks 50

Every run is a process of its own, forked from one that has imported everything, which saves the seconds that importing
takes. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
DATA = Path(__file__).parents[1] / "examples" / "text_to_sql" / "valid.jsonl"
STEPS = 24
DISK = 8 * 2**20
"""Bytes of the small file system."""


def command(options: list[str], messages: Connection, largest_file: int | None) -> None:
    """`rankwise train` in this process, its messages in a pipe (which no limit on files concerns)."""
    os.dup2(messages.fileno(), sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    from rankwise.cli.main import main

    sys.exit(main(["train", *options]))


class Bench:
    """Runs in one scratch folder."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.draw = scratch, random.Random(seed)
        self.said = ""
        """By the last process, on standard error."""
        self.options = [
            *("--model", str(tiny_model(scratch / "model")), "--data", str(few_rows(scratch / "data.jsonl"))),
            *("--max-steps", str(STEPS), "--save-steps", "2", "--batch-size", "2", "--r", "2", "--eval-answers", "0"),
            *("--lora-dropout", "0.1", "--eval-steps", "5", "--patience", "0"),
        ]
        self.run(scratch / "warm-up")
        begin = time.perf_counter()
        self.whole = scratch / "whole"
        self.run(self.whole)
        self.seconds = time.perf_counter() - begin

    def run(self, folder: Path, kill_after: float | None = None, largest_file: int | None = None) -> int | None:
        """Begin the run in `folder`, or resume it where it has begun; returns the exit code."""
        begun = (folder / "run.yaml").is_file()
        options = ["--resume", str(folder)] if begun else [*self.options, "--out", str(folder)]
        reader, writer = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=command, args=(options, writer, largest_file))
        process.start()
        writer.close()
        process.join(kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        with os.fdopen(os.dup(reader.fileno()), encoding="utf-8") as messages:
            self.said = messages.read()
        reader.close()
        return process.exitcode

    def come_through(self, folder: Path) -> None:
        """Resume to the end and compare."""
        code = self.run(folder)
        assert code == 0, f"exit code {code}: {self.said}"
        assert outcome(folder) == outcome(self.whole), f"{folder} ends with other bytes"
        shutil.rmtree(folder)

    def killed(self, folder: Path) -> bool:
        """Run until a random moment; whether that came before the end, after which the run is compared."""
        code = self.run(folder, kill_after=self.draw.uniform(0, self.seconds))
        if code == 0 or (folder / "result.json").is_file():
            assert outcome(folder) == outcome(self.whole)
            shutil.rmtree(folder)
            return False
        assert code == -9, f"exit code {code}: {self.said}"
        return True

    def refused(self, folder: Path, code: int | None, words: str) -> bool | None:
        """Whether a run that could not write said so in these words, after which it comes through; None: it could."""
        if code == 0:
            assert outcome(folder) == outcome(self.whole)
            shutil.rmtree(folder)
            return None
        assert code == 2, f"exit code {code}: {self.said}"
        said = words in self.said
        self.come_through(folder)
        return said

    def kills(self, count: int) -> dict[str, int]:
        """SIGKILL at random moments; a run that ends before its kill is compared, and another one begins."""
        folder, done, while_writing, runs = self.scratch / "killed", 0, 0, 0
        while done < count:
            if not self.killed(folder):
                runs += 1
                continue
            done += 1
            while_writing += any(folder.rglob("*.tmp")) if folder.exists() else 0
        self.come_through(folder)
        return {"kills": done, "kills_while_writing": while_writing, "runs_killed": runs + 1}

    def cuts(self, count: int) -> dict[str, int]:
        """Cut files of checkpoints of a run that lacks its end."""
        folder, said = self.scratch / "cut", 0
        for number in range(count):
            shutil.copytree(self.whole, folder)
            (folder / "result.json").unlink()
            shutil.rmtree(folder / "adapter")
            checkpoints = sorted((folder / "checkpoints").iterdir(), reverse=True)
            for checkpoint in checkpoints[: 2 if number % 5 == 4 else 1]:
                file = self.draw.choice(sorted(checkpoint.iterdir()))
                content = file.read_bytes()
                file.write_bytes(content[: self.draw.randrange(len(content))])
            self.come_through(folder)
            said += "SHA256SUMS" in self.said
        return {"cuts": count, "cuts_said": said}

    def limits(self, count: int) -> dict[str, int]:
        """Let no file grow beyond a random size, from a random step on."""
        folder, reached, said = self.scratch / "limited", 0, 0
        largest = max(file.stat().st_size for file in self.whole.rglob("*") if file.is_file())
        while reached < count:
            if self.killed(folder):
                code = self.run(folder, largest_file=self.draw.randrange(largest))
                told = self.refused(folder, code, "File too large; raise the limit")
                reached += told is not None
                said += bool(told)
        return {"limits": reached, "limits_said": said}

    def disks(self, count: int) -> dict[str, int]:
        """Fill the run's file system at a random step, and make room again."""
        place, reached, said = self.scratch / "disk", 0, 0
        checkpoint = next((self.whole / "checkpoints").iterdir())
        largest = sum(file.stat().st_size for file in checkpoint.iterdir())
        folder, filler = place / "run", place / "filler"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], check=True)
        try:
            while reached < count:
                if self.killed(folder):
                    free = shutil.disk_usage(place).free
                    filler.write_bytes(bytes(free - self.draw.randrange(largest)))
                    code = self.run(folder)
                    filler.unlink()
                    told = self.refused(folder, code, "No space left on device; free some space")
                    reached += told is not None
                    said += bool(told)
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return {"disks": reached, "disks_said": said}


def tiny_model(folder: Path) -> Path:
    """A random Llama with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rankwise.models import local_path

    tokenizer = AutoTokenizer.from_pretrained(local_path("smollm2-135m"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def few_rows(file: Path) -> Path:
    file.write_text("\n".join(DATA.read_text(encoding="utf-8").splitlines()[:20]) + "\n", encoding="utf-8")
    return file


def outcome(run: Path) -> tuple[bytes, list[dict]]:
    """The adapter's bytes and all metrics but the times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return (run / "adapter/adapter_model.safetensors").read_bytes(), [{**json.loads(x), "seconds": 0} for x in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--limits", type=int, default=50)
    parser.add_argument("--disks", type=int, default=0, help="50 is as much as the others (0)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    PROCESSES.set_forkserver_preload(["rankwise.finetune", "transformers.models.llama.modeling_llama"])
    result: dict[str, int | bool | float] = {"steps": STEPS}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), options.seed)
        for name in ("kills", "cuts", "limits", "disks"):
            result |= getattr(bench, name)(getattr(options, name)) if getattr(options, name) else {}
            print(result, flush=True)
    print(json.dumps({**result, "all_equal": True}))


if __name__ == "__main__":
    main()
