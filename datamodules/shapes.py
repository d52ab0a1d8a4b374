"""The demo world: drawn scenes as a data set; labels, DataModule. How they are drawn: `_drawing`."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image

from common.errors import InvalidSetting
from datamodules._convert import Members, Source, json_bytes, png_bytes, write_shards
from datamodules._datamodule import ShardDataModule
from datamodules._dataset_json import UNFINISHED, read_dataset_json
from datamodules._drawing import BACKGROUNDS, NOUNS, UNSEEN_BACKGROUNDS, draw_scene
from datamodules._samples import DatasetInfo
from datamodules._shards import tars_in
from datamodules._tar import TARS

PALETTE: Final[tuple[tuple[int, int, int], ...]] = (
    (230, 60, 60),
    (60, 120, 220),
    (245, 200, 40),
    (150, 80, 200),
    (240, 110, 170),
    (60, 180, 90),
    (245, 140, 40),
    (110, 200, 220),
    (150, 100, 60),
    (190, 230, 100),
    (40, 130, 140),
    (20, 90, 40),
)
"""One colour for each of `NOUNS`, for masks and legends."""

INFO: Final = DatasetInfo(
    name="shapes",
    classes=NOUNS,
    palette=PALETTE,
    zero_is_background=True,
    labels="mask",
    captions=True,
)


class World(NamedTuple):
    """Which scenes are drawn where nothing else is said."""

    scenes: int = 48
    seed: int = 2026
    size: int = 192


DRAWN: Final = World()


class Shapes(ShardDataModule):
    """The demo world: drawn scenes of 12 nouns with captions, labels and exact masks.

    Where the folder of shards is missing, or was not drawn to its end, the scenes are drawn before
    the run starts.

    Args:
        shards: folder of the shards, or a pattern or URL of shards that exist.
        scenes: how many scenes; 48 if they have to be drawn.
        seed: the world that they are taken from; 2026 if they have to be drawn.
        scene_size: their side in pixels; 192 if they have to be drawn.
        scenes_per_shard: how many make a shard.
        **kwargs: of every DataModule.
    """

    info = INFO
    layout = "  (nothing: the scenes are drawn)"

    def __init__(
        self,
        shards: str | list[str] = "shards/shapes",
        scenes: int | None = None,
        seed: int | None = None,
        scene_size: int | None = None,
        scenes_per_shard: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(shards, **kwargs)
        self.scenes = scenes
        self.seed = seed
        self.scene_size = scene_size
        self.scenes_per_shard = scenes_per_shard

    def prepare_data(self) -> None:
        """Draw the scenes that are not there, once a machine, if a folder is given for them.

        Raises:
            InvalidSetting: the folder holds other scenes than those asked for.
            MissingFile: it holds some of those that another command was drawing.
        """
        pattern = not isinstance(self.shards, str) or any(c in self.shards for c in "{}*?:")
        if pattern or not isinstance(self.shards, str) or self.shards.endswith(TARS):
            return
        folder = Path(self.shards)
        scenes = DRAWN.scenes if self.scenes is None else self.scenes
        if scenes < 1:
            raise InvalidSetting(f"--data.scenes must be at least 1, got {scenes}")
        seed = DRAWN.seed if self.seed is None else self.seed
        size = DRAWN.size if self.scene_size is None else self.scene_size
        source = self.source(scenes, seed, size)
        described = read_dataset_json(folder, half_made=True)
        if UNFINISHED in described:
            if (described["split"], described[UNFINISHED]["samples"]) != (source.split, scenes):
                read_dataset_json(folder)  # says that it is half made
        elif tars_in(self.shards):
            self._refuse_other_scenes(folder, described)
            return
        elif any(not path.name.startswith(".") for path in folder.glob("*")):
            return  # somebody's folder: what is not there is told, as of any other data set
        write_shards(source, folder, shard_size=self.scenes_per_shard, workers=1)

    def _refuse_other_scenes(self, folder: Path, described: dict[str, Any]) -> None:
        there = [f"{described.get('samples')} scenes", *described.get("split", "").split(", ")]
        asked = {
            f"{self.scenes} scenes": self.scenes,
            f"seed {self.seed}": self.seed,
            f"{self.scene_size} px": self.scene_size,
        }
        other = [
            words for words, value in asked.items() if value is not None and words not in there
        ]
        if described and other:
            raise InvalidSetting(
                f"{folder} holds {', '.join(there)}, not {', '.join(other)}: give the folder of others, "
                "or one to draw them in, with --data.shards"
            )

    @classmethod
    def source(
        cls, count: int, seed: int = 0, size: int = 96, background: str | None = None
    ) -> Source:
        """The first scenes of a world.

        Args:
            count: number of scenes.
            seed: the world; another one has other scenes.
            size: side of the images in pixels.
            background: the same one for all: plain, gradient, noise, stripes, checkers, dots, or
                clouds, which the tiny CLIP in this package has never seen.
        """
        if count < 1 or seed < 0 or size < 8:
            raise InvalidSetting(
                f"expected --count >= 1, --seed >= 0 and --size >= 8, got {count}, {seed}, {size}"
            )
        kinds = (*BACKGROUNDS, *UNSEEN_BACKGROUNDS)
        if background is not None and background not in kinds:
            raise InvalidSetting(
                f"--background must be one of {', '.join(kinds)}, got {background!r}"
            )
        split = f"seed {seed}, {size} px" + (f", {background}" if background else "")
        return Source(INFO, split, range(count), partial(_sample, seed, size, background))


def _sample(seed: int, size: int, background: str | None, index: int) -> Members:
    scene = draw_scene(seed, index, size, background=background)
    record = {
        "id": f"{seed}/{index}",
        "width": size,
        "height": size,
        "positives": sorted(NOUNS.index(noun) for noun in scene.nouns),
        "colours": dict(zip(scene.nouns, scene.colours, strict=True)),
        "background": scene.background,
    }
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "PNG")
    return {
        "__key__": f"{index:08d}",
        "png": buffer.getvalue(),
        "label.png": png_bytes(scene.label, INFO.flat_palette()),
        "txt": scene.caption.encode(),
        "json": json_bytes(record),
    }
