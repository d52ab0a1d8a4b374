"""What each training-free method changes in CLIP's image tower, as data: one row each.

All of them share one shape. The last blocks of a ViT get a second, *new* path of tokens that
starts as a copy of their input; its patch tokens, after the last norm and projection, are what
is compared with texts. Only the fields of a `Recipe` say how a method walks that path; what they
mean is in `surgery.attend` and `surgery.towers._paths`. The attention pool of CLIP's ResNets
follows the same `pairs`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from common.errors import InvalidSetting
from common.nearest import did_you_mean
from surgery.recipe import LARGE, Recipe, changed


def _like(row: Recipe, summary: str, **fields: Any) -> Recipe:
    return replace(row, summary=summary, **fields)


_SURGERY = Recipe(
    pairs=("vv",),
    released_class_token="original",
    summary="CLIP Surgery (Li et al. 2023; xmed-lab/CLIP_Surgery): v-v, dual path, no FFN",
)
_LAST = Recipe(pairs=("qk",), blocks=1, ffn=True, position="bicubic_scaled")
_BARE = replace(_LAST, residual=False, ffn=False)
_NO_CLASS_TOKEN = replace(_BARE, released_class_token="original")  # the new path has none
_SC_CLIP = _like(
    _NO_CLASS_TOKEN,
    "SC-CLIP (SuleBai/SC-CLIP): k-k and similarity, smoothed by earlier blocks' cells",
    pairs=("similarity", "kk"),
    similarity_block=8,
    smoothing_block=3,
    summed_blocks=(3, 10),
)
# What the author of SC-CLIP names for ViT-L/14 (an issue of its repository)
_SC_CLIP_LARGE = replace(
    _SC_CLIP, similarity_block=16, smoothing_block=6, summed_blocks=(8, 19), class_share=0.1
)
_RF_CLIP = _like(
    _NO_CLASS_TOKEN,
    "RF-CLIP (liblacklucy/RF-CLIP) as released: k-k of all blocks, sink cells toned down",
    pairs=("kk_all",),
)

# All of them on one screen, which the formatter would not leave
# fmt: off
RECIPES: dict[str, Recipe] = {
    "raw": Recipe(pairs=(), summary="plain CLIP, every token projected"),
    "surgery": _SURGERY,
    "gem": _like(
        _SURGERY, "GEM (Bousselham et al. 2024; WalBouss/GEM): q-q, k-k and v-v, clustered once",
        pairs=("vv", "kk", "qq"), iterations=1, position="bicubic", released_class_token="new",
    ),
    "maskclip": _like(
        _LAST, "MaskCLIP (Zhou et al. 2022; chongzhou96/MaskCLIP): the values, else unchanged",
        pairs=("identity",),
    ),
    "sclip": _like(
        _LAST, "SCLIP (Wang et al. 2024; wangf3014/SCLIP): q-q plus k-k",
        pairs=("qq", "kk"), combine="sum",
    ),
    "clearclip": _like(
        _BARE, "ClearCLIP (Lan et al. 2024; mc-lan/ClearCLIP): q-q, neither residual nor FFN",
        pairs=("qq",),
    ),
    "naclip": _like(
        _BARE, "NACLIP (Hajimiri et al. 2025; sinahmr/NACLIP): k-k near the token, bare as ClearCLIP",
        pairs=("kk",), neighbour_std=5.0,
    ),
    # Its settings of VOC20; those of other data sets differ
    "resclip": _like(
        _BARE, "ResCLIP (yvhangyang/ResCLIP): NACLIP, middle blocks' attention, a first pass's labels",
        pairs=("kk", "earlier"), neighbour_std=5.0, attention_blocks=(5, 9), balanced=False,
        combine=(0.8, 1.2), label_share=0.6,
    ),
    "cliptrase": _like(
        _LAST, "CLIPtrase (Shao et al. 2024; leaves162/CLIPtrase): q-q plus k-k plus v-v",
        pairs=("qq", "kk", "vv"), combine="sum",
    ),
    "pearl": _like(
        _BARE, "PEARL (PGSmall/PEARL): q-k with keys turned towards the queries, bare",
        alignment_rounds=5,
    ),
    "sc_clip": replace(_SC_CLIP, large=_SC_CLIP_LARGE),
    "sfp": _like(
        _SC_CLIP, "SFP (Kimsure/SFP, for 12 blocks): SC-CLIP's way with other outliers and pairs",
        pairs=("similarity", "qq", "kk"), summed_pairs=("similarity",), floored=True,
        outliers="class",
    ),
    "rf_clip": _RF_CLIP,
    "rf_clip_refocused": _like(
        _RF_CLIP, "RF-CLIP with the step of its title, which its released code never takes",
        refocused=True,
    ),
    "cliper": _like(
        _BARE, "CLIPer (linsun449/cliper.code): the balanced attention of all earlier blocks, bare",
        pairs=("earlier",), attention_blocks=(0, -1), position="bilinear",
    ),
    "maskclip_authors": _like(
        _SURGERY, "MaskCLIP of the paper's Table 5, by comments in its code: the values, as surgery",
        pairs=("identity",), blocks=1,
    ),
    # Table 4, rows 2 to 5 (row 1 is "raw", row 6 "surgery"); what a row means is our reading
    "surgery_last": _like(_SURGERY, "Table 4, row 2: with FFN", blocks=1, ffn=True),
    "surgery_single_path_ffn": _like(
        _SURGERY, "Table 4, row 3: a single path with FFN", reads="itself", ffn=True
    ),
    "surgery_ffn": _like(_SURGERY, "Table 4, row 4: dual path with FFN", ffn=True),
    "surgery_ffn_only": _like(
        _SURGERY, "Table 4, row 5: what the original path's FFNs add, no attention", ffn="only"
    ),
    # Not in the paper
    "surgery_qq": _like(_SURGERY, "surgery with q-q", pairs=("qq",)),
    "surgery_kk": _like(_SURGERY, "surgery with k-k", pairs=("kk",)),
    "surgery_qk": _like(_SURGERY, "surgery with CLIP's own q-k", pairs=("qk",)),
    "surgery_single_path": _like(
        _SURGERY, "surgery by a single path, without FFN", reads="itself"
    ),
    "surgery_resnet": _like(
        _SURGERY, 'the released code\'s setting "resnet", which that code never turns on',
        cosine_scale=8.0,
    ),
    "tai_dpt": Recipe(
        summary="TaI-DPT (Guo et al. 2023; guozix/TaI-DPT, for ResNets): values, no position embeddings",
        pairs=("identity",), position="none",
    ),
}
# fmt: on


def recipe_of(attention: str | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe that a setting names.

    Args:
        attention: a name in `RECIPES`; a mapping with such a ``name`` and fields of `Recipe` that are
            otherwise, as a config has it; or the recipe itself.

    Returns:
        The recipe.

    Raises:
        InvalidSetting: no such name or field, or a value of another type.

    Example:
        >>> recipe_of({"name": "naclip", "neighbour_std": 3}).neighbour_std
        3
    """
    if isinstance(attention, Recipe):
        return attention
    changes = {"name": attention} if isinstance(attention, str) else dict(attention)
    name = changes.pop("name", None)
    if name is None:
        raise InvalidSetting(
            f"attention: {', '.join(changes)} of which recipe? Give its name beside, such as "
            f"--model.backbone.attention.name sc_clip"
        )
    row = RECIPES.get(name)
    if row is None:
        hint = did_you_mean(str(name), RECIPES)
        raise InvalidSetting(f"attention={name!r}: expected one of {', '.join(RECIPES)}{hint}")
    return changed(row, changes)


def for_depth(recipe: Recipe, blocks: int) -> Recipe:
    """As it is meant for a network of so many blocks: `large`, with what was changed of its row."""
    if recipe.large is None or blocks != LARGE:
        return recipe
    row = next((row for row in RECIPES.values() if row.large == recipe.large), recipe)
    names = [field.name for field in fields(recipe)]
    own = {name: getattr(recipe, name) for name in names}
    return replace(
        recipe.large, **{name: own[name] for name in names if own[name] != getattr(row, name)}
    )
