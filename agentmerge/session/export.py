"""From a search to a checkpoint on disk that scores as the search saw it.

Writes through ``merging/export.py`` (or mergekit itself), then scores the written files once, as a
stranger would, and says whether they score the same. Knows runs and cards; knows no kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agentmerge.config import FIRST, SearchConfig, WorkerSettings
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger, ResultKey
from agentmerge.ledger.folder import opened
from agentmerge.parents.checkpoint import Checkpoint
from agentmerge.parents.headers import chat_template
from agentmerge.parents.plain import make_plain
from agentmerge.parents.sources import find_parent
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.recipe.names import public_names
from agentmerge.report.model_card import model_card
from agentmerge.report.summary import best_recipe
from agentmerge.search.judging import Judges
from agentmerge.system.temporary import write_at_once
from agentmerge.workers.kinds import reads_models

#: The recipe beside an exported model.
RECIPE = "mergekit_config.yml"
#: What is written: a whole model, or a LoRA adapter of its base.
MODEL, ADAPTER = "model", "adapter"


def export_run(
    name: str,
    to: Path,
    *,
    runs_dir: Path | str = "runs",
    engine: str = "agentmerge",
    verify: bool = True,
    overwrite: bool = False,
    layers: int | None = None,
    form: str = MODEL,
    rank: int | None = None,
    factors_only: bool = False,
    point: int | None = None,
    prefer: str | None = None,
) -> dict[str, Any]:
    """Write a run's answer to ``to``: {path, score, disk_score, equal, differing_items, warning}.

    engine: "agentmerge" or "mergekit". overwrite: in place of an export that is there, which goes
    once the new one is written. layers: the stack of so many layers of the answer's table,
    instead of the answer. point, prefer: a point of its front. form: "model", or
    "adapter": a LoRA adapter of the base, of at most ``rank``, with ``factors_only`` without
    modules that are kept whole; the report then has its ``adapter`` too. ``equal`` is None where
    ``verify`` is off.

    Raises:
        UserError: an unknown engine, or a folder that is not empty, or not an export's.
    """
    if engine not in ("agentmerge", "mergekit"):
        raise UserError(f"--with {engine!r} is not known; use agentmerge or mergekit")
    if form not in (MODEL, ADAPTER):
        raise UserError(f"--as {form!r} is not known; use {MODEL} or {ADAPTER}")
    if form == ADAPTER and engine != "agentmerge":
        raise UserError(f"{engine} writes no adapter of a merge; leave out --with")
    if rank is not None and (form != ADAPTER or rank < 1):
        raise UserError(f"--rank {rank} is of an adapter, and at least 1; write --as adapter")
    if factors_only and form != ADAPTER:
        raise UserError("--factors-only is of an adapter; write --as adapter")
    with opened(runs_dir) as ledger:
        row = ledger.run(name)
        found = best_recipe(ledger, row, layers, point, prefer)
        config = SearchConfig.from_text(row.config, row.name)
        prepared = prepare(config, allow_benchmarks=True, tasks=verify)
        if not reads_models(config.worker.kind):
            raise UserError(
                f"run {name!r} searched on the {config.worker.kind} worker: it has no model to "
                "export"
            )
        recipe = Recipe.parse(found["recipe"])
        if overwrite:
            refuse_foreign(to)
        card = model_card(ledger, row, found, prepared.licences)
        report: dict[str, Any] = {
            "path": str(to),
            "score": found["score"],
            "disk_score": None,
            "equal": None,
            "differing_items": None,
            "warning": "",
        }
        name, written = str(to.absolute()), to
        if form == ADAPTER:
            card = card.replace("library_name: transformers", "library_name: peft", 1)
            asked = {"rank": rank, "factors_only": factors_only, "overwrite": overwrite}
            base, made = _write_adapter(prepared, recipe, to, card, **asked)
            report["adapter"] = made | {"base": base}
            if verify:
                name = f"{base}+{name}"
                written = _applied(name, prepared.config.worker)
        else:
            report["warning"] = _write(prepared, recipe, to, engine, card, overwrite)
        if verify:
            report |= _verified(prepared, ledger, found, name, written)
    return report


def refuse_foreign(folder: Path) -> None:
    """Raises UserError where there is something at ``folder`` that no export of ours wrote."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is no folder, so no model is written over it; name another")
    if any(folder.iterdir()) and not _is_export(folder):
        raise UserError(
            f"{folder} holds files that agentmerge did not write, so they are not removed; name "
            "another folder, or move them away"
        )


def _is_export(folder: Path) -> bool:
    """A recipe beside a model card with our tag."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as card:
            return (folder / RECIPE).is_file() and "agentmerge" in card.read(1 << 16)
    except OSError:
        return False


def _publish_recipe(folder: Path) -> None:
    """An export is made to be shown to others: local folders are named by their last part."""
    file = folder / RECIPE
    recipe = Recipe.parse(file)
    names = public_names(recipe.models)
    if any(new != name for name, new in names.items()):
        text = recipe.renamed(lambda name: names.get(name, name)).to_yaml()
        head = (
            "# Local folders are named by their last part; best.yml of the search has all of it.\n"
        )
        write_at_once(file, head + text)


def report_text(report: dict[str, Any]) -> str:
    adapter = report.get("adapter")
    lines = [f"merged {'adapter' if adapter else 'model'}: {report['path']}"]
    if adapter:
        cut = "nothing was cut" if adapter["exact"] else "cut to that rank"
        lines.append(
            f"of {adapter['base']}, rank {adapter['rank']} ({cut}): it holds "
            f"{adapter['kept']:.2%} of the norm of what the merge adds"
        )
        if adapter["whole"]:
            lines.append(
                f"kept whole: {_listed(adapter['whole'])} (vLLM loads no such adapter; "
                "--factors-only leaves them as in the base)"
            )
        if adapter["left"]:
            lines.append(f"left as in the base: {_listed(adapter['left'])}")
    if report["warning"]:
        lines.append(f"note: {report['warning']}")
    if report["equal"] is None:
        lines.append("not scored from disk (--no-verify)")
    elif report["equal"] and report.get("unjudged_items"):
        lines.append(
            f"scored once from disk: {report['disk_score']:.6f}; without a verdict on "
            f"{report['unjudged_items']} items; all others as the search saw them"
        )
    elif report["equal"]:
        lines.append(f"scored once from disk: {report['disk_score']:.6f}, as the search saw it")
    else:
        lines.append(
            f"scored once from disk: {report['disk_score']:.6f}, and the search saw "
            f"{report['score']:.6f}: {report['differing_items']} items differ"
        )
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write_adapter(
    prepared: Prepared, recipe: Recipe, to: Path, card: str, **asked: Any
) -> tuple[str, dict[str, Any]]:
    """(the base's name, what was written). asked: as ``export_adapter`` has it."""
    from agentmerge.merging.adapter import base_of, export_adapter

    worker, genome = prepared.config.worker, prepared.config.genome
    if genome.tokenizer_source is not None:
        raise UserError(
            "tokenizer_source orders rows anew, and an adapter has the base's own order"
        )
    settings = {
        "trust_remote_code": worker.trust_remote_code,
        "allow_pickle": worker.allow_pickle,
    }
    parents = {name: find_parent(name, **settings) for name in prepared.paths}
    base = base_of(parents, recipe, genome.base_model)
    plain, asks = find_parent(base, **settings), prepared.spec.template_model
    made = export_adapter(
        recipe,
        prepared.paths,
        to,
        parents=parents,
        base=base,
        base_path=prepared.paths.get(base, plain.model),
        dtype=prepared.spec.dtype,
        card=card,
        template=_asked_template(prepared) or chat_template(prepared.paths[asks]),
        finish=_publish_recipe,
        **asked,
    )
    body = asdict(made)
    body.pop("path")
    return base, body


def _applied(name: str, worker: WorkerSettings) -> Path:
    """The checkpoint that an adapter makes of its model, as peft applies it."""
    code = worker.trust_remote_code
    parent = find_parent(name, trust_remote_code=code, allow_pickle=worker.allow_pickle)
    return make_plain([parent], trust_remote_code=code)[name]


def _asked_template(prepared: Prepared) -> str | None:
    """The template that the tasks were asked through where it is another than the models' own."""
    if prepared.config.tasks.chat_template in (None, FIRST):
        return None
    from agentmerge.evaluation.tokenizers import tokenizer_of

    return str(tokenizer_of(prepared.spec).get_chat_template())


def _write(
    prepared: Prepared, recipe: Recipe, to: Path, engine: str, card: str, overwrite: bool
) -> str:
    template = _asked_template(prepared)
    if template is not None:  # it talks as it was asked
        recipe = replace(recipe, chat_template=template)
    if engine == "agentmerge":
        from agentmerge.merging.export import export_checkpoint

        export_checkpoint(
            recipe,
            prepared.paths,
            to,
            template_model=prepared.spec.template_model,
            base=prepared.config.genome.base_model,
            dtype=prepared.spec.dtype,
            device=prepared.spec.device,
            card=card,
            overwrite=overwrite,
            finish=_publish_recipe,
        )
        return ""
    from agentmerge.merging.reference import mergekit_merge

    mergekit_merge(
        recipe,
        prepared.paths,
        to,
        template_model=prepared.spec.template_model,
        card=card,
        overwrite=overwrite,
        finish=_publish_recipe,
    )
    warning = "written by mergekit: rounding may differ from what the search scored"
    if any(one.merge_seed is not None for one in (recipe, *dict(recipe.merges).values())):
        warning = "written by mergekit: its random masks are not the ones the search scored"
    return warning


def _verified(
    prepared: Prepared, ledger: Ledger, found: dict[str, Any], name: str, to: Path
) -> dict[str, Any]:
    """Score what was written as a parent of its own, and compare item by item. to: its folder."""
    from agentmerge.workers.pool import Pool

    options = prepared.spec.options | {"base": None}
    tasks = prepared.spec.tasks.model_copy(update={"chat_template": None})  # the folder has it
    alone = replace(
        prepared.spec,
        parents=((name, str(to.absolute())),),
        template_model=name,
        tasks=tasks,
        options=options,
    )
    depth = Checkpoint.read(to).depth
    whole = Recipe.of_model(name, depth, prepared.space.dtype)
    refs = prepared.taskset.refs()
    with ExitStack() as stack:
        pool = Pool(alone, count=1)
        stack.callback(pool.close)
        _, rows, _ = pool.evaluate(whole.canonical(depth), refs)
        judges = Judges(lambda: prepared.config, prepared.taskset, ledger)
        results = dict(zip(refs, judges(refs, rows), strict=True))
        score = prepared.taskset.score(results)
        differing = 0
        unjudged = sum(result.missing for result in results.values())
        for task in prepared.taskset.tasks:
            key = ResultKey(found["recipe_hash"], prepared.engine, task.protocol_hash)
            stored = ledger.results(key)
            both = [ref for ref in task.part("search") if ref.key in stored]
            unjudged += sum(stored[ref.key].missing and not results[ref].missing for ref in both)
            differing += sum(
                not (stored[ref.key].missing or results[ref].missing)
                and stored[ref.key].value != results[ref].value
                for ref in both
            )
    # A score without a verdict on each item is by what else the search knew.
    equal = differing == 0 and (unjudged > 0 or score.value == found["score"])
    told = {"disk_score": score.value, "equal": equal, "differing_items": differing}
    return told | ({"unjudged_items": unjudged} if unjudged else {})
