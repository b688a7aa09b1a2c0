"""Five prompts to a running server, each with a mechanical check of the answer.

The prompts detect the effects of a wrong checkpoint: noise, repetition, lost context, forgotten
languages. The prompts do not detect a loss of a percent of accuracy; `mquant eval` and
lm-evaluation-harness do.
"""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from mquant.checkpoint.generation_config import SAMPLING_KEYS
from mquant.findings import Finding, Rule, rule
from mquant.smoke.server import Answer, Server
from mquant.untrusted import parse_json

_CODE: Final = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)
_NUMBER: Final = re.compile(r"\d+(?:,\d{3})*")
_SAFE: Final = "740-193"
_LINE_TOKENS: Final = 20  # the most tokens of a line of the archive, in any tokenizer
_MOST_LINES: Final = 400
_LEAST_LINES: Final = 10

_WHY: Final = "A wrong checkpoint answers with noise, repetition or another language."
_FIX: Final = (
    "Read the answer, ask the parent the same question, and run mquant verify on the checkpoint."
)

SMOKE_CODING: Final = rule(
    "smoke-coding", "The server answers with a correct program.", _WHY, _FIX, needs="smoke"
)
SMOKE_MATHS: Final = rule(
    "smoke-maths", "The server answers with the correct number.", _WHY, _FIX, needs="smoke"
)
SMOKE_TRANSLATION: Final = rule(
    "smoke-translation", "The server answers with a correct translation.", _WHY, _FIX, needs="smoke"
)
SMOKE_RECALL: Final = rule(
    "smoke-recall", "The server finds a line in a long text.", _WHY, _FIX, needs="smoke"
)
SMOKE_JSON: Final = rule(
    "smoke-json", "The server answers with a correct JSON object.", _WHY, _FIX, needs="smoke"
)


@dataclass(frozen=True)
class Prompt:
    """A question; `check` returns the fault of an answer, or an empty string."""

    id: str
    rule: Rule
    what: str
    text: str
    check: Callable[[str], str]


@dataclass(frozen=True)
class Trial:
    """A prompt's answer and its fault; the fault is empty if the answer is right."""

    prompt: Prompt
    answer: str
    wrong: str

    def finding(self, model: str) -> Finding:
        """Return the fault as a finding. Only for a failed trial."""
        return self.prompt.rule.finding(model, f"{self.prompt.what}: {self.wrong}.")


def options_of(sampling: Mapping[str, float | bool], max_tokens: int) -> dict[str, float]:
    """Return the API's options for the sampling that generation_config.json recommends.

    The seed is fixed, so that a server which honours the seed repeats its answers. The server's
    own defaults hold if generation_config.json recommends no sampling.
    """
    options: dict[str, float] = {"max_tokens": max_tokens, "seed": 0}
    if sampling.get("do_sample") is False:
        return {**options, "temperature": 0}
    return {**options, **{key: sampling[key] for key in SAMPLING_KEYS if key in sampling}}


def smoke(server: Server, options: Mapping[str, float]) -> Iterator[Trial]:
    """Ask the five prompts, one after another, and yield a trial for each prompt."""
    room = server.context and server.context - int(options["max_tokens"])
    for prompt in prompts(room or None):
        answer = server.ask(prompt.text, options)
        yield Trial(prompt, answer.text, _wrong(prompt, answer))


def prompts(room: int | None = None) -> tuple[Prompt, ...]:
    """Return the five prompts.

    The longest prompt, which has at least 10 lines, fits into `room` tokens if `room` is known.
    """
    return (
        Prompt(
            "coding",
            SMOKE_CODING,
            "Coding",
            "Write a Python function `is_prime(n)` that returns whether the integer n is prime. "
            "Answer with one Python code block only.",
            _is_function,
        ),
        Prompt(
            "maths",
            SMOKE_MATHS,
            "Maths",
            "A crate holds 17 boxes with 24 screws each, and 13 loose screws. How many screws are "
            "in the crate? Think step by step, and end with the number.",
            _is_number,
        ),
        Prompt(
            "translation",
            SMOKE_TRANSLATION,
            "Translation",
            "Translate into German, and answer with the translation only: "
            "The cat is sleeping on the table.",
            _is_german,
        ),
        Prompt("recall", SMOKE_RECALL, "Recall", _archive(room), _is_code),
        Prompt(
            "json",
            SMOKE_JSON,
            "JSON",
            'Answer with a JSON object only, without any other text: "capital" is the capital of '
            'France, "digits" a list of the first three digits of pi, as integers.',
            _is_json,
        ),
    )


def _archive(room: int | None) -> str:
    """Return a text of many similar lines and one line with a code, and ask for the code."""
    count = _MOST_LINES if room is None else room // _LINE_TOKENS
    count = max(_LEAST_LINES, min(count, _MOST_LINES))
    lines = [f"Shelf {n} holds {n * 37 % 89 + 2} files." for n in range(1, count + 1)]
    lines.insert(count * 2 // 5, f"The code of the safe is {_SAFE}.")
    archive = "\n".join(lines)
    return f"{archive}\n\nWhat is the code of the safe? Answer with the code only."


def _wrong(prompt: Prompt, answer: Answer) -> str:
    if not answer.text:
        return "there is no answer" if answer.whole else "the answer was cut off while thinking"
    return _noise(answer.text) or prompt.check(answer.text)


def _noise(text: str) -> str:
    """Return how the answer looks like broken weights, e.g. by repetition; empty if not."""
    if re.search(r"(\S)\1{39}", text):
        return "one character is repeated over and over"
    words = text.split()
    if len(words) >= 20 and Counter(words).most_common(1)[0][1] > len(words) / 2:
        return "one word is repeated over and over"
    return "the answer has characters that are no text" if "\ufffd" in text else ""


def _is_function(text: str) -> str:
    block = _CODE.search(text)
    try:
        tree = ast.parse(block[1] if block else text)  # parsed, never run
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "the code is not Python"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "is_prime" and node.args.args:
            returns = any(isinstance(inner, ast.Return) for inner in ast.walk(node))
            return "" if returns else "is_prime returns nothing"
    return "there is no function is_prime"


def _is_number(text: str) -> str:
    numbers = _NUMBER.findall(text)
    last = numbers[-1].replace(",", "") if numbers else "no number"
    return "" if last == "421" else f"the answer ends with {last[:20]}, not 421"


def _is_german(text: str) -> str:
    missing = [word for word in ("Katze", "Tisch") if word.lower() not in text.lower()]
    return f"the translation has no {' and no '.join(missing)}" if missing else ""


def _is_code(text: str) -> str:
    return "" if _SAFE in text else f"the answer lacks {_SAFE}, the code in the prompt"


def _is_json(text: str) -> str:
    block = _CODE.search(text)
    try:
        value = parse_json((block[1] if block else text).encode())
    except ValueError:
        return "the answer is not JSON"
    expected = {"capital": "Paris", "digits": [3, 1, 4]}
    return "" if value == expected else "the JSON is not what was asked for"
