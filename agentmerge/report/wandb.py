"""Weights & Biases: scores and thoughts a candidate, as LLM-Evo-Merge; recipe and report after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.errors import UserError


class WandbTracker:
    """A W&B run. Needs ``pip install agentmerge[wandb]``; WANDB_MODE=offline works.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(
        self, config: SearchConfig, *, name: str | None, project: str | None, entity: str | None
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs the package wandb: pip install wandb") from None
        self._best: float | None = None
        self._run = wandb.init(
            project=project or "agentmerge",
            entity=entity,
            name=name,
            config=config.model_dump(mode="json"),
        )

    def tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "candidate" and event["score"] is not None:
            self._best = max(event["score"], event["score"] if self._best is None else self._best)
            tasks = {f"task/{name}": value for name, value in event["tasks"].items()}
            self._run.log(
                {"score": event["score"], "best": self._best, "generation": event["generation"]}
                | tasks
            )
        elif event["event"] == "advice":
            self._run.log({f"thought/{event['role']}": event["words"]})
        elif event["event"] == "done" and event["card"]:
            self._run.summary.update(
                {"best": event["card"]["answer"]["score"], "verdict": event["card"]["verdict"]}
            )

    def keep(self, kind: str, path: Path) -> None:
        import wandb

        if kind == "report":
            self._run.log({"report": wandb.Html(str(path), inject=False)})
        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
