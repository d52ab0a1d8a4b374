"""The paper's three analyses (Eq. 4, Eq. 5, Fig. 6) in plain numpy, read independently of our code."""

import numpy as np


def cell_shares(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Binary ground truth [H, W] as the share of each grid cell that it covers: [h*w].

    sum(A_up * G) / sum(A_up), with A enlarged to H x W (nearest) and binary G, is the same number as
    sum(A * shares) / sum(A) on the grid when the grid divides the image, so that both readings of
    'G ... whose size is H x W' (the grid's or the image's) give one formula.
    """
    h, w = grid
    rows = np.linspace(0, mask.shape[0], h + 1)
    cols = np.linspace(0, mask.shape[1], w + 1)
    integral = np.pad(mask.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def at(y, x):
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        y1, x1 = min(y0 + 1, mask.shape[0]), min(x0 + 1, mask.shape[1])
        fy, fx = y - y0, x - x0
        top = integral[y0, x0] * (1 - fx) + integral[y0, x1] * fx
        bottom = integral[y1, x0] * (1 - fx) + integral[y1, x1] * fx
        return top * (1 - fy) + bottom * fy

    out = np.empty(grid)
    for i in range(h):
        for j in range(w):
            area = (rows[i + 1] - rows[i]) * (cols[j + 1] - cols[j])
            out[i, j] = (
                at(rows[i + 1], cols[j + 1])
                - at(rows[i], cols[j + 1])
                - at(rows[i + 1], cols[j])
                + at(rows[i], cols[j])
            ) / area
    return out.ravel()


def fsr(attention: np.ndarray, similarity: np.ndarray, foreground: np.ndarray) -> float:
    """One sample (one positive label of one image) of Eq. 4, before m_s and m_c.

    attention [1+N, 1+N]: softmaxed self-attention of the LAST layer, mean over heads, class token
    first. similarity [N]: the label's similarity map on the token grid; the asking token is its
    highest cell ('belonging to the token at the highest score on the similarity map').
    foreground [N]: ground truth on the grid, binary or shares.
    """
    row = attention[1 + int(similarity.argmax()), 1:]
    return float((row * foreground).sum() / row.sum())


def mfsr(samples: list[tuple[int, float]]) -> float:
    """m_c(m_s(.)): mean over the samples of a class, then over classes. samples: (class, fsr)."""
    classes = sorted({c for c, _ in samples})
    return float(np.mean([np.mean([v for k, v in samples if k == c]) for c in classes]))


def survival(samples: list[tuple[int, float]], thresholds: np.ndarray) -> np.ndarray:
    """Fig. 4(b): share of samples whose FSR is higher than each threshold."""
    values = np.array([v for _, v in samples])
    return (values[None] > thresholds[:, None]).mean(1)


def affinity(feature: np.ndarray, texts: np.ndarray) -> float:
    """a(F_t, F_c) = sum_i F_t(i) . F_c / N_t, with unit vectors: mean cosine over the given texts.

    feature [C]: class token of a module's output, already multiplied with the last projection.
    texts [N_t, C]: the image's positive (or, for the red line, negative) labels.
    """
    unit = feature / np.linalg.norm(feature)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    return float((texts @ unit).mean())


def min_max(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (x.max() - x.min())


def l1(one: np.ndarray, other: np.ndarray | float) -> float:
    """Mean absolute difference of a similarity map (scaled to [0, 1], Eq. 1) and another, or 0."""
    return float(np.abs(one - other).mean())
