"""Makes requests meaningful: ids that were made up are replaced by those of runs that the test has claimed.

Only in requests that are to be valid; in the others an id may be what makes them invalid. The ids come by the
environment (`described.rs`).
"""

import os

import schemathesis
from schemathesis import Case, HookContext

RUNNER = os.environ["VM0_RUNNER_ID"]
RUNNING = os.environ["VM0_RUN_RUNNING"]
JOBS = "/api/runners/jobs/{run}/"
# Whoever completes or releases a run ends what the others can do with it.
OWN = {verb: os.environ[f"VM0_RUN_{of}"] for verb, of in [("claim", "QUEUED"), ("complete", "COMPLETE"), ("release", "RELEASE")]}
EPOCH = 1


@schemathesis.hook
def before_call(_context: HookContext, case: Case, _kwargs: dict[str, object]) -> None:
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    path = case.operation.path
    if path.startswith("/api/webhooks/agent/"):
        fill(case.body, runId=RUNNING, runnerId=RUNNER, epoch=EPOCH)
    elif path.startswith(JOBS):
        case.path_parameters["run"] = OWN.get(path.removeprefix(JOBS), RUNNING)
        fill(case.body, runnerId=RUNNER, epoch=EPOCH)
        fill(case.query, runnerId=RUNNER, epoch=EPOCH)
    elif path == "/api/runs":
        fill(case.body, group="vm0/demo")


def fill(members: object, **values: object) -> None:
    """Replaces those members that are there."""
    if isinstance(members, dict):
        members.update({name: value for name, value in values.items() if name in members})
