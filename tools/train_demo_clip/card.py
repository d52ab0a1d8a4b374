"""The model card: what the demo CLIP is, how it was made, what it can and cannot do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomically
from datamodules._drawing import BACKGROUNDS, COLOURS, NOUNS
from surgery import TEMPLATES
from tools.train_demo_clip.model import (
    EMBED,
    HEAD,
    IMAGE,
    PATCH,
    TEXT_LAYERS,
    VISION_LAYERS,
    VOCABULARY,
    WIDTH,
)
from tools.train_demo_clip.scenes import HELD_OUT_WORLD, TRAINING_WORLD, Words
from tools.train_demo_clip.scoring import Scores, score
from tools.train_demo_clip.training import CLIMB, PUSH, Recipe

METHODS = ("clip", "architecture", "surgery")
"""In the order of the tables."""


def publish(runs: Sequence[Path], output: Path, *, scenes: int = 256) -> None:
    """Measure runs, copy the one with the best mIoU of surgery, write the card of all.

    Args:
        runs: folders of models, each with a card.json.
        output: where the model and its card, README.md, go.
        scenes: held-out scenes to measure on.
    """
    found = [score(run, scenes=scenes) for run in runs]
    best = max(range(len(runs)), key=lambda i: found[i].mean("surgery", "mIoU"))
    unseen = score(runs[best], scenes=scenes, background="clouds")
    depths = {blocks: score(runs[best], scenes=scenes, blocks=blocks) for blocks in (2, 4, 9)}
    output.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(runs[best] / name, output / name)
    text = model_card(
        [json.loads((run / "card.json").read_text()) for run in runs],
        found,
        best,
        unseen,
        dict(sorted((depths | {6: found[best]}).items())),
        (output / "model.safetensors").stat().st_size,
    )
    write_atomically(output / "README.md", text)


def model_card(
    cards: Sequence[dict[str, Any]],
    found: Sequence[Scores],
    best: int,
    unseen: Scores,
    depths: dict[int, Scores],
    size: int,
) -> str:
    """The model card, Markdown.

    Args:
        cards: what training wrote of each run.
        found: what each can do.
        best: which of them is published.
        unseen: what it can do on a background that training never showed.
        depths: what it can do, by the number of reformed blocks.
        size: bytes of the weights.
    """

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    card, seed = cards[best], cards[best]["seed"]
    recipe = Recipe(**card["stages"][0]["recipe"])
    stages = table(
        ["seed", "steps", "Muon", "AdamW", "falls from", "difficulty", "scenes", "seconds", "note"],
        [
            [
                str(each["seed"]),
                f"{stage['steps_done']:,}",
                f"{stage['recipe']['muon_rate']:g}",
                f"{stage['recipe']['adam_rate']:g}",
                f"{Recipe(**stage['recipe']).falls:,}",
                f"{stage['recipe']['difficulty']:.2f} to {stage['difficulty']:.2f}",
                f"{stage['scenes']:,}",
                f"{stage['seconds']:,}",
                stage.get("note", ""),
            ]
            for each in cards
            for stage in each["stages"]
        ],
    )
    rises = ", ".join(
        f"{step:g} (mAP on new scenes above {above})"
        for above, step in (*CLIMB, (recipe.push, PUSH))
    )
    seeds = table(
        [
            "seed",
            "mAP",
            "all-foreground mIoU",
            *(f"{metric} {method}" for metric in ("mIoU", "mSC") for method in METHODS),
        ],
        [
            [
                f"{run['seed']}{' (published)' if i == best else ''}",
                f"{each.precision('cosine'):.3f}",
                percent(each.whole_image),
                *(percent(each.mean(of, metric)) for metric in ("mIoU", "mSC") for of in METHODS),
            ]
            for i, (run, each) in enumerate(zip(cards, found, strict=True))
        ],
    )
    own = found[best]
    nouns = table(
        ["noun", "AP", "IoU clip", "IoU surgery", "SC clip", "SC surgery"],
        [
            [
                noun,
                f"{own.precision('cosine', noun):.3f}",
                *(
                    percent(own.of_noun(noun, method, metric))
                    for metric in ("IoU", "SC")
                    for method in ("clip", "surgery")
                ),
            ]
            for noun in NOUNS
        ],
    )
    blocks = table(
        ["reformed blocks", "mIoU architecture", "mIoU surgery", "mSC surgery"],
        [
            [
                str(count),
                percent(each.mean("architecture", "mIoU")),
                percent(each.mean("surgery", "mIoU")),
                percent(each.mean("surgery", "mSC")),
            ]
            for count, each in depths.items()
        ],
    )
    reversed_too = [noun for noun in NOUNS if own.of_noun(noun, "clip", "SC") < 0]
    opposite = (
        f"its contrast is negative for {', '.join(reversed_too)} only."
        if reversed_too
        else "its contrast is positive for every noun."
    )
    return f"""# The demo CLIP

A CLIP small enough to ship, so that CLIP Surgery can be tried, tested and looked at without a
download. A stock open_clip model: ViT of {VISION_LAYERS} blocks, image {IMAGE}, patch {PATCH}, \
width {WIDTH}, {WIDTH // HEAD} heads; text
tower of {TEXT_LAYERS} blocks, width {WIDTH}; joint space {EMBED}. {size / 1e6:.1f} MB in float16.
Of the table of {VOCABULARY:,} token embeddings the file holds the rows of known words
(`token_embedding.rows`, of the tokens `token_embedding.ids`); all others are zeros, and
`surgery.checkpoints.load_weights` puts them there.

```python
backbone = surgery.load_backbone("demo", "demo")
```

## Data

Scenes drawn by `datamodules._drawing.draw_scene` and their captions, nothing else: {len(NOUNS)} nouns
({", ".join(NOUNS)}),
{len(COLOURS)} colours ({", ".join(COLOURS)}),
{len(BACKGROUNDS)} backgrounds ({", ".join(BACKGROUNDS)}).
Trained on worlds from {TRAINING_WORLD:,} on, evaluated on world {HELD_OUT_WORLD:,}; no scene with a
small seed was seen in training. No photograph, label, mask or pretrained weight was used.

## Training

`tools/train_demo_clip`: the symmetric contrastive loss, {recipe.batch} pairs a step, two \
processes on two
CPU cores (shared with other work, so the seconds are high).

{stages}

Muon on the blocks' matrices, AdamW (0.9, 0.98) on the rest; weight decay {recipe.weight_decay}, \
gradient clip {recipe.clip:g};
{recipe.warm_up} steps of warm-up, then constant, then a cosine to {recipe.last_rate:.0%}. Patch \
dropout {recipe.patch_dropout}, none in the last
steps. In {recipe.unknown_words:.0%} of the captions one to four unknown words stand among the \
known ones. {recipe.fresh} new
scenes a step go into a ring of {recipe.ring:,}; captions are redrawn at each use. The world starts as
one white object on dark ground; its difficulty rises by {rises}
every {recipe.test_every} steps. At 0.75 all objects are there, on dark ground; at 1 the ground is as \
bright as they are.

## Results

Measured by the project's own tasks, Explainability and Recognition, on {own.scenes} held-out scenes at
full difficulty, prompts by the {len(TEMPLATES)} templates; percent but for mAP. "clip" is plain CLIP, \
"architecture"
the reformed attention with plain cosines, "surgery" has feature surgery too (as released). mIoU is
taken at the one threshold that suits all nouns best; all-foreground is what a mask of the whole image
gets. mAP ranks scenes by the plain cosine of the class token (Recognition's `mAP_cosine`).

{seeds}

By feature surgery of the cosines, which Recognition does by default (the code's form), seed
{seed} has an mAP of {own.precision("code"):.3f}; by the paper's form, \
{own.precision("paper"):.3f}.

Seed {seed} by noun:

{nouns}

Seed {seed} by depth (the paper reforms 6):

{blocks}

On backgrounds like a photograph's, never seen in training (`background="clouds"`), seed {seed} has
mAP {unseen.precision("cosine"):.3f}, mIoU {percent(unseen.mean("clip", "mIoU"))} \
by plain CLIP and {percent(unseen.mean("surgery", "mIoU"))} with surgery (all-foreground
{percent(unseen.whole_image)}), mSC {percent(unseen.mean("clip", "mSC"))} and \
{percent(unseen.mean("surgery", "mSC"))}.

## Limits

- It knows {len(Words().ids)} tokens. Any other word means nothing to it: "a photo of a zebra" is \
"a photo of a".
  It bears such words in templates, that is all.
- It knows flat shapes, not things: never use it on photographs.
- The paper's opposite visualisation (raw CLIP highlights the background) is not a property of this
  model: {opposite}
- Its numbers say whether the code works and whether the method helps here, nothing about a CLIP
  trained on the web.

## Licence

MIT, as the rest of the project; the data are drawn by it.
""".replace("\\\n", "")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
