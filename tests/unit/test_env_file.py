"""`make env`: what compose needs, once, and nothing overwritten."""

import stat
from pathlib import Path

from deploy import env_file


def test_what_compose_needs_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("RATE_LIMIT=7/minute\nCOMPOSE_PROFILES=lite\n", encoding="utf-8")
    added = env_file.complete(path, env_file.COMPOSE, "make env")
    assert set(added) == set(env_file.COMPOSE) - {"COMPOSE_PROFILES"}
    values = env_file.read(path)
    assert values["RATE_LIMIT"] == "7/minute"
    assert values["COMPOSE_PROFILES"] == "lite"
    assert all(values[name] for name in env_file.COMPOSE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert env_file.complete(path, env_file.COMPOSE, "make env") == []
