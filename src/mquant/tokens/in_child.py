"""Render conversations and tokenize texts in a process of bounded memory, which runs this file.

A tokenizer.json may be hostile: a normalizer that puts a million characters for one, or an unknown
token that is a megabyte long, takes any amount of memory, and `tokenizers` then aborts its process.
A chat template is a program: it may take any amount of memory, and any time.

    python -P in_child.py BYTES_OF_MEMORY < request

The request is a line of JSON, then tokenizer.json, then a row of JSON on each line. The first line
has `bytes` of tokenizer.json, `added`: the tokens to add to the tokenizer, `template`: the chat
template or null, `tool_template`: the template for rows with tools or null, `names`: the special
tokens that a template may use, `most`: the most tokens of a row or null, and `ends`: whether to say
where tokens end. A row has `text`, or `messages`, `tools` and perhaps its `number`.

On stdout is, for each row, as int64: the number of tokens, the ids of the tokens, and, if asked
for, the ends of the tokens in characters. If the process fails, the last line of stderr is JSON:
what is wrong (`what`), why (`reason`), and the `number` of the row.
"""

import json
import os
import resource
import sys
from array import array
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NoReturn

FAILED: Final = 3
"""The exit code of a process whose stderr ends with a line of JSON."""
MARGIN: Final = 50_000
"""Characters before a cut in a text: the text that was cut off could change the tokens there."""
CHARACTERS: Final = 32
"""The most characters of a text that are read for a token."""
PART: Final = 500_000
"""Characters that are tokenized at a time."""
_NOW: Final = datetime(2024, 7, 26)
"""The time for templates that tell the model the date: a run must make the same bytes every day.

Llama's templates take this day where they cannot ask for the time.
"""


def main() -> None:
    """Answer the request on stdin."""
    (memory,) = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    request = json.loads(sys.stdin.buffer.readline())
    tokenizer = _tokenizer(sys.stdin.buffer.read(request["bytes"]), request["added"])
    plain, for_tools = (_compiled(request[name]) for name in ("template", "tool_template"))
    answer = array("q")
    for line in sys.stdin.buffer:
        row = json.loads(line)
        text = row.get("text")
        if text is None:
            template = plain if row["tools"] is None or for_tools is None else for_tools
            text = _rendered(template, row, request["names"])
        if request["ends"]:
            encoding = _encoded(tokenizer, text)
            answer.append(len(encoding.ids))
            answer.extend(encoding.ids)
            answer.extend(end for _, end in encoding.offsets)
        else:
            ids = _tokens(tokenizer, text, request["most"])
            answer.append(len(ids))
            answer.extend(ids)
    sys.stdout.buffer.write(answer.tobytes())


def _tokenizer(raw: bytes, added: list[dict[str, Any]]) -> Any:
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
        known = tokenizer.get_added_tokens_decoder().values()
        contents = {token.content for token in known}
        exact = {repr(token) for token in known}
        tokens = []
        for each in added:
            token = AddedToken(**each["token"])
            if (repr(token) in exact) if each["exact"] else (token.content in contents):
                continue
            contents.add(token.content)
            tokens.append(token)
        tokenizer.add_tokens(tokens)
    except Exception as error:  # noqa: BLE001 -- tokenizers raises bare Exception
        _fail("tokenizer", str(error))
    tokenizer.no_truncation()  # some files say how to cut and fill the texts of a training
    tokenizer.no_padding()
    return tokenizer


def _encoded(tokenizer: Any, text: str) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # noqa: BLE001 -- tokenizers raises bare Exception
        return _fail("text", str(error))


def _tokens(tokenizer: Any, text: str, most: int | None) -> "array[int]":
    """Return the ids of a text's tokens, or of its first `most` tokens.

    A long text is tokenized in parts, each with MARGIN characters before and after it, so that its
    tokens are those of the whole text. Tokens of a character have the same end, so a token belongs
    to the part that has its end.
    """
    ids, at, end = array("q"), 0, len(text)
    if most is not None and end > CHARACTERS * most + MARGIN:
        end = CHARACTERS * most
    while at < end and (most is None or len(ids) < most):
        stop, start = min(at + PART, end), max(0, at - MARGIN)
        encoding = _encoded(tokenizer, text[start : stop + MARGIN])
        if (start, stop) == (0, len(text)):
            ids.extend(encoding.ids)
        else:
            after = at - start if at else -1  # a token before the first character ends at 0
            for token, (_, place) in zip(encoding.ids, encoding.offsets, strict=True):
                if after < place <= stop - start:
                    ids.append(token)
        at = stop
    return ids[:most]


def _compiled(template: str | None) -> Any:
    """Compile a chat template with all that transformers gives to templates."""
    if template is None:
        return None
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for trainings: it changes no text."""

        tags = {"generation"}  # noqa: RUF012 -- as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_said")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _NOW.strftime
    try:
        return environment.from_string(template)
    except Exception as error:  # noqa: BLE001 -- a template may be nested too deeply, too
        _fail("template", f"{error}, line {getattr(error, 'lineno', '?')}")


def _rendered(template: Any, row: Mapping[str, Any], names: Mapping[str, str]) -> str:
    try:
        text: str = template.render(
            messages=row["messages"],
            tools=row["tools"],
            documents=None,
            add_generation_prompt=False,
            **names,
        )
    except MemoryError:
        _fail("memory", "", row)
    except Exception as error:  # noqa: BLE001 -- a template is a program: it may raise anything
        _fail("messages", str(error) or type(error).__name__, row)
    for message in row["messages"]:
        content = message.get("content")
        if content and isinstance(content, list) and str(content) in text:
            reason = "it writes a `content` with parts as Python's text of a list"
            _fail("messages", reason, row)
    return text


def _fail(what: str, reason: str, row: Mapping[str, Any] = MappingProxyType({})) -> NoReturn:
    failure = {"what": what, "reason": reason[:1000], "number": row.get("number")}
    sys.stderr.write("\n" + json.dumps(failure))
    raise SystemExit(FAILED)


if __name__ == "__main__":
    main()
