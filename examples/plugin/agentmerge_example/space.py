"""A search space: what one of two experts gains in a group of layers, the other loses."""

from functools import cached_property

from agentmerge.contracts import Axis, Setting, Slice, Source, UserError


class Seesaw:
    """One axis a group: 0 is the first expert alone, 1 the second."""

    mixes_all = True
    has_depth_line = False
    redundant = 0
    only_ratios = False
    scale = ("", ())

    def __init__(self, on):
        if (
            len(on.models) != 2
            or on.filters != (None,)
            or [parameter.name for parameter in on.method.source] != ["weight"]
        ):
            raise UserError("genome.space 'seesaw' takes two experts, one weight each, no filters")
        self.on = on

    @cached_property
    def axes(self):
        return tuple(
            Axis(f"{self.on.layers_text(group)} balance", "balance", group, None, None, 0.0, 1.0)
            for group in range(self.on.groups)
        )

    def slices(self, values):
        found = []
        for group, balance in enumerate(values):
            weights = (round(1.0 - balance, 12), balance)
            sources = (
                Source(model, self.on.layers(group), (("weight", Setting.scalar(weight)),))
                for model, weight in zip(self.on.models, weights, strict=True)
            )
            found.append(Slice(tuple(sources)))
        return found

    def values(self, recipe):
        found = []
        for group in range(self.on.groups):
            weights = dict.fromkeys(self.on.models, 0.0)
            sources = recipe.effective("", self.on.layers(group)[0]).sources
            weights |= {model: dict(own).get("weight", 0.0) for model, _, own in sources}
            found.append(weights[self.on.models[1]])
        return found

    def end_point(self, name):
        ends = dict(zip(self.on.models, (0.0, 1.0), strict=True))
        return (ends[name],) * self.on.groups if name in ends else None
