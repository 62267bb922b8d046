"""Evaluate the checkpoint through transformers: `python -m recipes.demo.eval_local --num 200`.

Greedy, float32, in batches of prompts of like length. Prints the table and JSON of `recipes.demo.report`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipes.demo.chat import MODEL_DIR, render
from recipes.demo.problem import TASKS, Problem
from recipes.demo.report import BAR, Outcome, passes, summary, table
from recipes.demo.scoring import parse_reply, problems, score


class Local:
    """A checkpoint that answers batches of prompts greedily."""

    def __init__(self, path: Path, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.to(device)
        end = self.tokenizer.eos_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=self.tokenizer.pad_token_id)

    @torch.inference_mode()
    def reply(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """The texts behind `prompts`, up to the end of the turn."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        rows = out[:, inputs["input_ids"].shape[1] :].tolist()
        return [str(self.tokenizer.decode(self._turn(row), skip_special_tokens=False)) for row in rows]

    def _turn(self, row: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return row[: row.index(end)] if end in row else row


def evaluate(local: Local, task: str, thinking: bool, asked: list[Problem], batch_tokens: int) -> list[Outcome]:
    """The outcomes of `asked`, in batches of at most `batch_tokens` prompt tokens, padding included."""
    prompts = [render(problem.messages, problem.tools, thinking) for problem in asked]
    sizes = [len(ids) for ids in local.tokenizer(prompts)["input_ids"]]
    order = sorted(range(len(asked)), key=sizes.__getitem__)
    outcomes = []
    while order:
        batch = [order.pop()]
        while order and sizes[batch[0]] * (len(batch) + 1) <= batch_tokens:
            batch.append(order.pop())
        longest = max(len(local.tokenizer.encode(asked[at].answer + asked[at].thought)) for at in batch)
        replies = local.reply([prompts[at] for at in batch], longest + 40)
        for at, text in zip(batch, replies, strict=True):
            right = score(asked[at], parse_reply(text), thinking)
            outcomes.append(
                Outcome(
                    task, thinking, right, sizes[at], asked[at].messages[-1]["content"][-200:], text, asked[at].answer
                )
            )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--num", type=int, default=100, help="problems of each task, asked with thinking and without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=100_000 if torch.cuda.is_available() else 8_000)
    parser.add_argument("--json", type=Path, help="write every outcome here")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    local = Local(args.model, args.device)
    outcomes: list[Outcome] = []
    for task in args.tasks:
        start = time.monotonic()
        for thinking in (False, True):
            outcomes += evaluate(local, task, thinking, problems(task, args.num, args.seed), args.batch_tokens)
        print(f"{task}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(table(summary(outcomes)))
    if args.json:
        args.json.write_text(
            json.dumps([vars(outcome) for outcome in outcomes], ensure_ascii=False, indent=1), encoding="utf-8"
        )
    print(json.dumps(summary(outcomes)))
    return 0 if passes(summary(outcomes), BAR) else 1


if __name__ == "__main__":
    sys.exit(main())
