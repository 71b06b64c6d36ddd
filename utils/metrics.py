"""Retrieval and its uncertainty in numbers: arrays in, plain floats out. None stands for "undefined".

Conventions. Similarities are (N images, M captions), larger = better match. Of equal similarities the lower row counts as the better one.
Uncertainty is one number a query, larger = less certain. A query is answered right if its first answer is.
"""

import numpy as np
import torch
from scipy import stats

TILE = 512  # images of a tile; its captions are as many as so many images have


def rank_queries(score, image_of_caption, images, uncertainty):
    """Answer every query of both directions, without ever holding more than a tile of the similarity matrix.

    A tile is the images of one block against the captions of the images of another, so that all pairs that belong together lie in the tiles
    on the diagonal. These come first: from then on it is known what every competitor has to beat, and each tile is computed exactly once.

    Args: score: function of (image rows, caption rows), two int64 tensors of n and m rows, that returns the (n, m) similarities as a tensor.
    image_of_caption (M,): image rows. images: N. uncertainty (M,): of the captions.
    Returns: dict of two dicts of arrays with one entry a query, "t2i" (M captions) and "i2t" (the images that have a caption):
        query: the caption's or image's row. top1: row of the first answer. rank: of the first right answer, 1 = best.
        uncertainty: of the caption itself (t2i), of the caption retrieved (i2t).
    Raises: ValueError if a similarity is not a number.

    Example: two images, two captions each; caption 1 prefers the wrong image, and image 1 prefers a caption of image 0.
    >>> s = torch.tensor([[0.9, 0.4, 0.1, 0.2], [0.3, 0.8, 0.7, 0.6]])
    >>> answers = rank_queries(lambda i, j: s[i][:, j], np.array([0, 0, 1, 1]), 2, np.array([1.0, 4.0, 2.0, 3.0]))
    >>> answers["t2i"]["rank"].tolist(), answers["t2i"]["top1"].tolist()
    ([1, 2, 1, 1], [0, 1, 1, 1])
    >>> answers["i2t"]["rank"].tolist(), answers["i2t"]["top1"].tolist(), answers["i2t"]["uncertainty"].tolist()
    ([1, 2], [0, 1], [1.0, 4.0])
    """
    owner = torch.as_tensor(np.asarray(image_of_caption), dtype=torch.int64)
    image_blocks = list(torch.arange(images).split(TILE))
    by_block = torch.argsort(owner // TILE, stable=True)  # captions by the block of their image, in ascending order within it
    caption_blocks = by_block.split(torch.bincount(owner // TILE, minlength=len(image_blocks)).tolist())
    t2i, i2t = _Race(len(owner)), _Race(images)
    blocks = range(len(image_blocks))
    for a, b in [(k, k) for k in blocks] + [(a, b) for b in blocks for a in blocks if a != b]:
        rows, columns = image_blocks[a], caption_blocks[b]
        if not len(columns):
            continue
        tile = score(rows, columns)  # (n, m)
        if a == b:
            own = owner[columns]
            right = tile[own - rows[0], torch.arange(len(columns))].cpu()  # (m,), what each caption's own image has
            t2i.aim(columns, right, own)
            order = np.lexsort((columns.numpy(), -right.double().numpy(), own.numpy()))  # an image's best own caption comes first
            best = order[np.unique(own.numpy()[order], return_index=True)[1]]
            i2t.aim(own[best], right[best], columns[best])
        t2i.run(columns, tile, 0, rows, a == b)
        i2t.run(rows, tile, 1, columns, a == b)
    uncertainty, asked = np.asarray(uncertainty), owner.unique().numpy()
    answers = {
        "t2i": {"query": np.arange(len(owner)), "top1": t2i.top1.numpy(), "rank": t2i.rank.numpy(), "uncertainty": uncertainty},
        "i2t": {"query": asked, "top1": i2t.top1.numpy()[asked], "rank": i2t.rank.numpy()[asked]},
    }
    answers["i2t"]["uncertainty"] = uncertainty[answers["i2t"]["top1"]]
    return answers


class _Race:
    """For every query of one direction, the best answer so far and how many answers beat the best right one."""

    def __init__(self, queries):
        self.target = torch.full((queries,), torch.inf, dtype=torch.float64)  # similarity of the best right answer; nothing beats infinity
        self.target_row = torch.zeros(queries, dtype=torch.int64)
        self.rank = torch.ones(queries, dtype=torch.int64)
        self.best = torch.full((queries,), -torch.inf, dtype=torch.float64)
        self.top1 = torch.full((queries,), -1, dtype=torch.int64)

    def aim(self, queries, similarity, row):
        """Set the best right answer of some queries: its similarity and row."""
        self.target[queries], self.target_row[queries] = similarity.double(), row

    def run(self, queries, tile, dim, answers, diagonal):
        """Take in a tile (n, m).

        dim: the axis of the answers. queries, answers: the rows that the two axes stand for, answers ascending. diagonal: whether the
        queries' right answers are in it.
        """
        target = self.target[queries].to(tile.device, tile.dtype).unsqueeze(dim)
        above, level = (tile > target).sum(dim).cpu(), (tile == target).sum(dim).cpu()
        highest, where = (x.cpu() for x in tile.max(dim))  # the first of equal ones
        if highest.isnan().any():
            raise ValueError("a similarity is not a number")
        for q in (level > int(diagonal)).nonzero().flatten().tolist():  # ties: few, but for captions of the same text
            line = tile.select(1 - dim, q).cpu() == target.flatten()[q].cpu()
            above[q] += (answers[line] < self.target_row[queries[q]]).sum()
        self.rank[queries] += above
        highest, where = highest.double(), answers[where]
        better = (highest > self.best[queries]) | ((highest == self.best[queries]) & (where < self.top1[queries]))
        self.best[queries[better]], self.top1[queries[better]] = highest[better], where[better]


def recall_at(rank, k):
    """Share of queries whose first right answer is among the best k. Args: rank (Q,), 1 = best. Returns: float in [0, 1].

    >>> recall_at(np.array([1, 2, 7, 1]), 5)
    0.75
    """
    return float(np.mean(np.asarray(rank) <= k))


def recall_by_level(correct, uncertainty, levels):
    """R@1 of equally many queries a level, least uncertain level first.

    Queries are sorted by uncertainty (stable: ties stay in query order) and split into levels; none is dropped, a remainder makes the
    first levels one query larger. Args: correct (Q,) bool, uncertainty (Q,), levels: K <= Q. Returns: list of K floats.
    Source: the protocol of ProbVLM (arXiv 2307.00398, sec. 4.1). Raises: ValueError if K > Q or K < 1.

    >>> recall_by_level(np.array([True, False, True, True]), np.array([0.3, 0.9, 0.1, 0.5]), 2)
    [1.0, 0.5]
    """
    if not 1 <= levels <= len(correct):
        raise ValueError(f"{levels} levels for {len(correct)} queries")
    order = np.argsort(uncertainty, kind="stable")
    return [float(part.mean()) for part in np.array_split(np.asarray(correct, dtype=np.float64)[order], levels)]


def level_statistics(recall):
    """How steadily recall falls with the uncertainty level. Args: recall: K floats, least uncertain first.

    Returns: dict: "S": Spearman correlation of level and recall, -1 is best; "R2": r^2 of the straight line; "-S*R2": 1 is best.
    None where undefined: fewer than two levels, or the same recall in all. Source: ProbVLM, sec. 4.1.

    >>> level_statistics([0.9, 0.6, 0.3])
    {'S': -1.0, 'R2': 1.0, '-S*R2': 1.0}
    """
    if len(recall) < 2 or np.ptp(recall) == 0:
        return {"S": None, "R2": None, "-S*R2": None}
    level = np.arange(len(recall))
    s = float(stats.spearmanr(level, recall).statistic)
    r2 = float(stats.linregress(level, recall).rvalue ** 2)
    return {"S": s, "R2": r2, "-S*R2": -s * r2}


def aurc(correct, uncertainty):
    """Area under the risk-coverage curve: the mean over n = 1..Q of the error rate among the n most certain queries.

    Of queries with the same uncertainty every order is equally likely, and the expectation is returned: no order is favoured.
    Args: correct (Q,) bool, uncertainty (Q,). Returns: dict: "AURC" in [0, 1], less is better; "E-AURC": its excess over the best
    possible order's. Source: Geifman et al., "Bias-reduced uncertainty estimation", arXiv 1805.08206.

    >>> aurc(np.array([True, False]), np.array([0.1, 0.2]))
    {'AURC': 0.25, 'E-AURC': 0.0}
    >>> aurc(np.array([True, False]), np.array([0.5, 0.5]))
    {'AURC': 0.5, 'E-AURC': 0.25}
    """
    error = 1.0 - np.asarray(correct, dtype=np.float64)
    _, group = np.unique(uncertainty, return_inverse=True)
    expected = (np.bincount(group, weights=error) / np.bincount(group))[group]
    area = _area(expected[np.argsort(group, kind="stable")])
    return {"AURC": area, "E-AURC": max(0.0, area - _area(np.sort(error)))}


def _area(error):
    return float(np.mean(np.cumsum(error) / np.arange(1, len(error) + 1)))


def spearman(x, y):
    """Spearman rank correlation, in [-1, 1], or None if one of them is constant. Args: x, y (Q,)."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(stats.spearmanr(x, y).statistic)


def partial_spearman(x, y, given):
    """Spearman correlation of x and y that a third quantity does not explain: (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2)(1 - r_yg^2)).

    Args: x, y, given (Q,). Returns: float in [-1, 1], or None where undefined.
    """
    xy, xg, yg = spearman(x, y), spearman(x, given), spearman(y, given)
    if None in (xy, xg, yg) or (1 - xg**2) * (1 - yg**2) <= 1e-12:
        return None
    return float((xy - xg * yg) / np.sqrt((1 - xg**2) * (1 - yg**2)))


def retrieval_metrics(answers, levels):
    """All figures of one direction. Args: answers: "t2i" or "i2t" of `rank_queries`. levels: K.

    Returns: (recall: list of K floats by level, dict of "R@1", "R@5", "R@10", "S", "R2", "-S*R2", "AURC", "E-AURC").
    """
    correct = answers["rank"] == 1
    recall = recall_by_level(correct, answers["uncertainty"], levels)
    overall = {f"R@{k}": recall_at(answers["rank"], k) for k in (1, 5, 10)}
    return recall, overall | level_statistics(recall) | aurc(correct, answers["uncertainty"])


def ambiguity_metrics(answers, relevance, lengths, annotated=None):
    """Uncertainty against exact ambiguity, where it is known which images each caption describes.

    Args: answers: "t2i" of `rank_queries`. relevance: M lists of image rows; their number is the ambiguity. lengths (M,): words a caption.
    annotated: the caption rows for which that is known, over which all figures are; None: all.
    Returns: dict: "spearman" of uncertainty and ambiguity; "partial_spearman_given_length"; "R@1_described": share of captions whose first
    image is one that the caption describes.
    """
    known = slice(None) if annotated is None else np.asarray(annotated)
    ambiguity = np.array([len(rows) for rows in relevance])[known]
    described = np.array([top1 in set(rows) for top1, rows in zip(answers["top1"].tolist(), relevance, strict=True)])[known]
    uncertainty = answers["uncertainty"][known]
    return {
        "spearman": spearman(uncertainty, ambiguity),
        "partial_spearman_given_length": partial_spearman(uncertainty, ambiguity, np.asarray(lengths)[known]),
        "R@1_described": float(np.mean(described)),
    }
