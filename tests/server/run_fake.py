"""Runs the server with the fake engine, as scripts run it with a real one: `python run_fake.py SETTINGS`, a JSON object of `ServerSettings`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxmoe.report.command import run_command  # noqa: E402
from jaxmoe.server.serve import run_server  # noqa: E402
from jaxmoe.server.settings import ServerSettings  # noqa: E402
from tests.server.fake_engine import FakeEngine  # noqa: E402

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    engine = FakeEngine(running=16, waiting=32, step_seconds=given.pop("step_seconds", 0.002), positions=4096)
    given["api_keys"] = tuple(given.get("api_keys", ()))
    sys.exit(run_command(lambda: run_server(engine, ServerSettings(**given))))
