"""Evaluate a server over its OpenAI API: `python -m recipes.demo.eval --base-url http://127.0.0.1:8000 --num 50`.

Greedy, each problem with thinking and without. Prints a table, then one line of JSON; the exit status is 1 below the bar.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp

from recipes.demo.problem import TASKS, Problem
from recipes.demo.report import BAR, Outcome, passes, summary, table
from recipes.demo.scoring import parse_reply, problems, score

MAX_NEW_TOKENS = 400


def request_body(problem: Problem, thinking: bool, model: str) -> dict[str, Any]:
    """The body of the chat request that asks `problem` greedily."""
    body: dict[str, Any] = {
        "model": model,
        "messages": problem.messages,
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    return body | ({"tools": problem.tools} if problem.tools else {})


async def ask(session: aiohttp.ClientSession, problem: Problem, thinking: bool, model: str) -> Outcome:
    """One request and its outcome; a refusal, a dead connection or a timeout counts as a wrong reply and is told."""
    question = str(problem.messages[-1]["content"])[-200:]
    outcome = Outcome(problem.task, thinking, False, 0, question, "", problem.answer)
    try:
        async with session.post("v1/chat/completions", json=request_body(problem, thinking, model)) as response:
            if response.status != 200:
                outcome.error = f"status {response.status}: {(await response.text())[:300]}"
                return outcome
            body = await response.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    message = body["choices"][0]["message"]
    outcome.prompt_tokens = (body.get("usage") or {}).get("prompt_tokens", 0)
    reply = parse_reply(message.get("content"), message.get("reasoning_content"), message.get("tool_calls"))
    outcome.reply = json.dumps(message, ensure_ascii=False)
    outcome.right = score(problem, reply, thinking)
    return outcome


async def evaluate(args: argparse.Namespace) -> list[Outcome]:
    """The outcomes of all tasks, at most `concurrency` requests at a time."""
    slots = asyncio.Semaphore(args.concurrency)
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    connector = aiohttp.TCPConnector(limit=args.concurrency)
    base = args.base_url.removesuffix("/").removesuffix("/v1") + "/"
    async with aiohttp.ClientSession(base, headers=headers, timeout=timeout, connector=connector) as session:

        async def one(problem: Problem, thinking: bool) -> Outcome:
            async with slots:
                return await ask(session, problem, thinking, args.model)

        jobs = [
            one(problem, thinking)
            for task in args.tasks
            for thinking in (False, True)
            for problem in problems(task, args.num, args.seed)
        ]
        return await asyncio.gather(*jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="with or without /v1")
    parser.add_argument("--model", default="demo", help="the model name in the requests")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--num", type=int, default=50, help="problems of each task, asked with thinking and without")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--bar", type=float, default=BAR, help="the accuracy that every task needs")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    args = parser.parse_args()
    outcomes = asyncio.run(evaluate(args))
    rows = summary(outcomes)
    if args.json:
        text = json.dumps([vars(outcome) for outcome in outcomes], ensure_ascii=False, indent=1)
        args.json.write_text(text, encoding="utf-8")
    print(table(rows))
    for error in sorted({outcome.error for outcome in outcomes if outcome.error})[:5]:
        print(f"no reply: {error}", file=sys.stderr)
    print(json.dumps(rows))
    return 0 if passes(rows, args.bar) else 1


if __name__ == "__main__":
    sys.exit(main())
