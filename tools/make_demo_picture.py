"""Draw the README's picture: scenes, plain CLIP's map, CLIP Surgery's map, its mask.

python tools/make_demo_picture.py docs/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from datamodules._drawing import NOUNS, draw_scene
from surgery import encode_prompts, feature_surgery, load_backbone, similarity, similarity_map
from surgery.visualize import heat_map

SIDE, GAP, HEAD, LEFT = 144, 8, 18, 84
ROWS = ("scene", "plain CLIP", "CLIP Surgery", "its mask")
THRESHOLD = 0.8125  # of the demo's masks, see configs/demo.yaml
SCENES = ((2026, 0), (2026, 3), (2026, 12), (2026, 17), (2026, 29), (2026, 41))


def main(path: str) -> None:
    """Write the picture."""
    backbone = load_backbone("demo", "demo")
    text = encode_prompts(backbone, backbone.tokenizer, list(NOUNS))
    rows = []
    for seed, index in SCENES:
        scene = draw_scene(seed, index, SIDE)
        small = torch.from_numpy(draw_scene(seed, index, 96).image).permute(2, 0, 1)[None]
        picture = torch.from_numpy(scene.image)
        noun = scene.nouns[-1]
        column = NOUNS.index(noun)
        images = backbone.preprocess(small)
        raw = backbone.with_attention("raw").encode_image(images)
        tokens = backbone.encode_image(images)
        scores = feature_surgery(tokens.patch_tokens, tokens.class_token, text)
        plain = similarity_map(similarity(raw.patch_tokens, text), raw.grid, (SIDE, SIDE))
        maps = similarity_map(scores, tokens.grid, (SIDE, SIDE))[0, column]
        mask = (maps >= THRESHOLD)[..., None].numpy()
        cut = np.where(mask, scene.image, scene.image // 5)
        cells = (scene.image, heat_map(picture, plain[0, column]), heat_map(picture, maps), cut)
        rows.append((noun, [np.asarray(cell) for cell in cells]))
    width = LEFT + len(rows) * (SIDE + GAP)
    canvas = Image.new("RGB", (width, HEAD + 4 * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, title in enumerate(ROWS):
        draw.text((GAP, HEAD + j * (SIDE + GAP) + SIDE // 2 - 6), title, fill="black")
    for i, (noun, cells) in enumerate(rows):
        x = LEFT + i * (SIDE + GAP)
        draw.text((x, 3), f'"{noun}"', fill="black")
        for j, cell in enumerate(cells):
            canvas.paste(Image.fromarray(cell), (x, HEAD + j * (SIDE + GAP)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1])
