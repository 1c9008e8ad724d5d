"""mergekit's own merge: compared with, never searched with.

mergekit is imported only when asked for,
and never its ``evo`` part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmerge.errors import CandidateFailed
from agentmerge.merging.export import default_card
from agentmerge.parents.chat_templates import recipe_template
from agentmerge.parents.depth import followed
from agentmerge.parents.writing import copy_side_files, directory_at_once
from agentmerge.recipe import Recipe, renamed
from agentmerge.recipe.copying import layers_read
from agentmerge.recipe.stages import MERGES
from agentmerge.system.temporary import temporary_folder


def mergekit_merge(
    recipe: Recipe,
    paths: Mapping[str, Path],
    out_dir: Path,
    *,
    template_model: str,
    card: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Merge by mergekit into ``out_dir``, as its command line would.

    Its DARE and DELLA draw masks of their own from ``merge_seed``, not ours, and it rounds after
    every operation, so its weights differ from ours in the last bits (theirs: in what is dropped).

    paths: the recipe's model names -> local directories.
    template_model, card, overwrite, finish: as in ``export_checkpoint`` (mergekit would take the
        tokenizer of the base).

    Raises:
        UserError: ``out_dir`` holds something, or cannot be written.
        CandidateFailed: mergekit could not merge, with its reason.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    out_dir = out_dir.expanduser().absolute()
    places = {name: str(Path(path).absolute()) for name, path in paths.items()}
    template = recipe_template(recipe.chat_template)

    def merge(one: Recipe, folder: Path) -> None:
        body = renamed(one.to_dict(), places)
        options = MergeOptions(
            random_seed=body.pop("merge_seed", None),
            quiet=True,
            copy_tokenizer=False,
            write_model_card=False,
            trust_remote_code=trust_remote_code,
        )
        # what comes here is aligned, and mergekit would cut rows
        for key in ("tokenizer_source", "chat_template", MERGES):
            body.pop(key, None)
        config = MergeConfiguration.model_validate(body)
        with _settings_follow(one):
            run_merge(config, str(folder), options=options)

    with (
        directory_at_once(out_dir, overwrite=overwrite) as scratch,
        temporary_folder("agentmerge-stages", scratch.parent) as first,
        _generators_kept(),
    ):
        try:
            for number, (name, one) in enumerate(recipe.merges):
                places[name] = str(first / str(number))
                merge(one, Path(places[name]))
            merge(recipe, scratch)
        except Exception as error:  # mergekit raises plain RuntimeError and ValueError
            raise CandidateFailed(f"mergekit could not merge this recipe: {error}") from error
        finally:
            LoaderCache().flush_all()
            LoaderCache().loaders.clear()
        copy_side_files(paths[template_model], scratch)
        if template is not None:
            (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
        (scratch / "mergekit_config.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        card = default_card(out_dir.name, recipe) if card is None else card
        (scratch / "README.md").write_text(card, encoding="utf-8")
        finish(scratch)


@contextmanager
def _settings_follow(recipe: Recipe) -> Iterator[None]:
    """Of a stack mergekit sets the number of layers alone, which transformers' configs refuse where
    layers have settings of their own; ours follow their layers there, too."""
    from mergekit import merge

    layers, original = layers_read(recipe), merge._model_out_config

    def made(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        text = config.get_text_config(decoder=True)
        own = text.to_dict()
        depth = len(own.get("layer_types") or ())
        if layers != tuple(range(depth)):  # in their places they keep what they have
            for key, value in followed(own, depth, layers).items():
                setattr(text, key, value)
        return config

    merge._model_out_config = made
    try:
        yield
    finally:
        merge._model_out_config = original


@contextmanager
def _generators_kept() -> Iterator[None]:
    """mergekit seeds every global generator; ours go on as if it had not."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
