"""The scenes and captions that the demo CLIP is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

from datamodules._drawing import BACKGROUNDS, COLOURS, NOUNS, PREFIXES, Draws, caption, draw_scene
from tools.train_demo_clip.model import IMAGE, WORDS, patchify

TRAINING_WORLD, STAGE_WORLD, HELD_OUT_WORLD = 700_000, 800_000, 900_000
"""Worlds drawn from here; a run's seed is added. The small seeds of users are never trained on."""


class Words:
    """Captions as rows of a compact token table; row 0 is any word outside it."""

    def __init__(self) -> None:
        self._tokenizer = SimpleTokenizer()
        self.start, self.end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        phrases = (*NOUNS, *COLOURS, *BACKGROUNDS.values(), *PREFIXES, "an and with , .")
        ids = {token for phrase in phrases for token in self._tokenizer.encode(phrase)}
        self.ids = [*sorted(ids), self.start, self.end]
        self._row = {token: row for row, token in enumerate(self.ids, 1)}

    def rows(self, text: str) -> list[int]:
        """The rows of a text's tokens, without start and end."""
        return [self._row.get(token, 0) for token in self._tokenizer.encode(text)]

    def batch(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L <= WORDS], padded with row 0, and the place of each end int64 [B]."""
        length = min(WORDS, 2 + max(len(rows) for rows in texts))
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        end = torch.empty(len(texts), dtype=torch.int64)
        for line, rows in enumerate(texts):
            rows = [self._row[self.start], *rows[: WORDS - 2], self._row[self.end]]
            tokens[line, : len(rows)] = torch.tensor(rows)
            end[line] = len(rows) - 1
        return tokens, end


@dataclass
class Ring:
    """The scenes at hand, oldest replaced first.

    The processes of a run take turns with the scenes of the world.

    Attributes:
        world: seed of the scenes.
        patches: the images, uint8 [N, h w, 3 P P].
        rank: which process this is.
        processes: of how many.
        drawn: scenes that this process drew so far.
        facts: by their place in the ring: nouns, colours, background, difficulty.
    """

    world: int
    patches: Tensor
    rank: int = 0
    processes: int = 1
    drawn: int = 0
    facts: dict[int, tuple[tuple[str, ...], tuple[str, ...], str, float]] = field(
        default_factory=dict
    )

    def add(self, count: int, difficulty: float) -> None:
        """Draw new scenes."""
        for _ in range(count):
            index = self.drawn * self.processes + self.rank
            scene = draw_scene(self.world, index, IMAGE, difficulty=difficulty)
            slot = self.drawn % len(self.patches)
            self.patches[slot] = patchify(scene.image)
            self.facts[slot] = (scene.nouns, scene.colours, scene.background, difficulty)
            self.drawn += 1

    def words(self, slot: int, draws: Draws, words: Words, unknown: float) -> list[int]:
        """A new caption of a scene; with probability `unknown`, some unknown words are put in."""
        nouns, colours, background, difficulty = self.facts[slot]
        rows = words.rows(caption(draws, nouns, colours, background, difficulty=difficulty))
        if draws.unit() < unknown:
            for _ in range(1 + draws.below(4)):
                rows.insert(draws.below(len(rows) + 1), 0)
        return rows
