"""Reads streams with Anthropic's own library; run by a Python that has it.

``recorded_messages.py <base URL> <token> <number>`` asks for so many streams, one after the other, and writes
for each a line of JSON: the types of its events, its text, and the exception that ended it.
"""

import importlib
import json
import sys
from typing import Any

anthropic: Any = importlib.import_module("anthropic")


def read(client: Any) -> dict[str, object]:
    """One stream."""
    types: list[str] = []
    text = ""
    error = said = None
    try:
        messages = [{"role": "user", "content": "What is a trace?"}]
        with client.messages.create(model="demo", max_tokens=100, messages=messages, stream=True) as events:
            for event in events:
                types.append(event.type)
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    text += event.delta.text
    except anthropic.AnthropicError as raised:
        error, said = type(raised).__name__, getattr(raised, "body", None)
    return {"types": types, "text": text, "error": error, "body": said}


def main(url: str, token: str, number: str) -> None:
    """Read them all."""
    with anthropic.Anthropic(base_url=url, auth_token=token, api_key=None, max_retries=0) as client:
        for _ in range(int(number)):
            sys.stdout.write(json.dumps(read(client)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
