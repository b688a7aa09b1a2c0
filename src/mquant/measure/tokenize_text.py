"""Tokenize a text in a process of bounded memory, which runs this file by its path.

A tokenizer.json may be hostile: a normalizer that puts a million characters for one, or an unknown
token that is a megabyte long, takes any amount of memory, and `tokenizers` then aborts its process.

    python -P tokenize_text.py BYTES_OF_MEMORY BYTES_OF_TOKENIZER < tokenizer.json and text

On stdout are the ids of the tokens, then the ends of the tokens in characters, as int64. If the
tokenizer cannot be understood, stderr begins with `damaged: ` and says why.
"""

import os
import resource
import sys
from array import array


def main() -> None:
    """Tokenize the text on stdin."""
    memory, length = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    raw = sys.stdin.buffer.read()
    try:
        tokenizer = Tokenizer.from_str(raw[:length].decode("utf-8"))
    except Exception as error:  # noqa: BLE001 -- tokenizers raises bare Exception
        sys.stderr.write(f"damaged: {error}")
        return
    tokenizer.no_truncation()  # some files say how to cut and fill the texts of a training
    tokenizer.no_padding()
    encoding = tokenizer.encode(raw[length:].decode("utf-8"), add_special_tokens=False)
    ids, ends = array("q", encoding.ids), array("q", (end for _, end in encoding.offsets))
    sys.stdout.buffer.write(ids.tobytes() + ends.tobytes())


if __name__ == "__main__":
    main()
