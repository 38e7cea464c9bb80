"""Claude Code in its print mode, with the model that it chooses; it speaks Messages."""

from pathlib import Path

from tests.e2e.clients.agents.run import QUESTION, TEXT, events_of, installed, passed, run_agent

CLAUDE = installed("@anthropic-ai/claude-code/cli-wrapper.cjs")
# It would look for updates and send statistics.
QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
PROOF = Path("proof.txt")
ORDER = f'call Bash {{"command": "echo was here | tee {PROOF}", "description": "Write a file"}}'


def ask(*arguments: str, fails: bool = False) -> str:
    """Run it with a prompt."""
    return run_agent(CLAUDE, "--print", *arguments, environment=QUIET, fails=fails)


def main() -> None:
    """Everything."""
    assert ask(QUESTION).strip() == TEXT
    passed("answer")

    assert ask("And now?", "--continue").strip() == f"As I said: {TEXT}"
    passed("conversation")

    options = ("--output-format", "stream-json", "--verbose", "--include-partial-messages")
    events = events_of(ask(QUESTION, *options))
    inner = [event["event"] for event in events if event["type"] == "stream_event"]
    deltas = [event["delta"] for event in inner if event["type"] == "content_block_delta"]
    pieces = [delta["text"] for delta in deltas if delta["type"] == "text_delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == TEXT
    assert any(delta["type"] == "signature_delta" for delta in deltas)
    assert inner[-1]["type"] == "message_stop"
    assert events[-1]["usage"]["output_tokens"] == 20
    passed("stream")

    assert ask(ORDER, "--allowedTools", "Bash").strip() == "The tool says: was here"
    assert PROOF.read_text() == "was here\n"
    passed("tools")

    assert "400 Model 'nope' not found" in ask(QUESTION, "--model", "nope", fails=True)
    refused = run_agent(
        CLAUDE, "--print", QUESTION, environment={**QUIET, "ANTHROPIC_API_KEY": "wrong"}, fails=True
    )
    assert "401" in refused
    passed("errors")


if __name__ == "__main__":
    main()
