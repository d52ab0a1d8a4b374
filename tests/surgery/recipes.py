"""The table of recipes as the small networks of `reference` take it."""

from dataclasses import replace

from surgery import RECIPES

SMALL = {"sink_channels": (4, 17, 33, 58, 76, 91, 104, 120), "sink_factor": 1.75}
"""RF-CLIP's own channels are those of larger networks."""

OURS = {
    name: replace(recipe, **SMALL) if name.startswith("rf_clip") else recipe
    for name, recipe in RECIPES.items()
}
