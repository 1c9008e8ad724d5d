"""MLflow: scores as metrics, the config as parameters, words and files as artifacts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.errors import UserError

#: MLflow refuses longer values of parameters.
MAX_VALUE = 6000


class MlflowTracker:
    """An MLflow run. Needs ``pip install agentmerge[mlflow]``; MLFLOW_TRACKING_URI says where to
    (a folder is a URI as well: ``file:mlruns``).

    Raises:
        UserError: the package is not installed.
    """

    def __init__(
        self, config: SearchConfig, *, name: str | None, project: str | None, entity: str | None
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise UserError(
                "--tracker mlflow needs its package: pip install mlflow-skinny"
            ) from None
        self._client: Any = MlflowClient()
        title = project or "agentmerge"
        found = self._client.get_experiment_by_name(title)
        where = found.experiment_id if found else self._client.create_experiment(title)
        tags = {"entity": entity} if entity else {}
        self._run = self._client.create_run(where, run_name=name, tags=tags).info.run_id
        self._best: float | None = None
        self._step = 0
        for key, value in _flat(config.model_dump(mode="json")):
            self._client.log_param(self._run, key, str(value)[:MAX_VALUE])

    def tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "candidate" and event["score"] is not None:
            self._best = max(event["score"], event["score"] if self._best is None else self._best)
            self._step += 1
            values = {"score": event["score"], "best": self._best}
            values |= {f"task/{name}": value for name, value in event["tasks"].items()}
            for name, value in values.items():
                self._client.log_metric(self._run, name, value, step=self._step)
        elif event["event"] == "advice" and event["words"]:
            name = f"thoughts/{event['generation']:04d}-{event['role']}.txt"
            self._client.log_text(self._run, event["words"], name)
        elif event["event"] == "done" and event["card"]:
            self._client.set_tag(self._run, "verdict", event["card"]["verdict"])

    def keep(self, kind: str, path: Path) -> None:
        self._client.log_artifact(self._run, str(path), kind)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _flat(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
