"""Retrieval and its uncertainty in numbers: arrays in, plain floats out. None stands for "undefined".

Conventions. Similarities are (N images, M captions), larger = better match. Of equal similarities the lower row counts as the better one.
Uncertainty is one number a query, larger = less certain. A query is answered right if its first answer is.
"""

import numpy as np
import torch
from scipy import stats

RELEVANT_BLOCK = 128  # queries whose answers are sorted at a time
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
    by_block = torch.argsort(
        owner // TILE, stable=True
    )  # captions by the block of their image, in ascending order within it
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
            order = np.lexsort(
                (columns.numpy(), -right.double().numpy(), own.numpy())
            )  # an image's best own caption comes first
            best = order[np.unique(own.numpy()[order], return_index=True)[1]]
            i2t.aim(own[best], right[best], columns[best])
        t2i.run(columns, tile, 0, rows, a == b)
        i2t.run(rows, tile, 1, columns, a == b)
    uncertainty, asked = np.asarray(uncertainty), owner.unique().numpy()
    answers = {
        "t2i": {
            "query": np.arange(len(owner)),
            "top1": t2i.top1.numpy(),
            "rank": t2i.rank.numpy(),
            "uncertainty": uncertainty,
        },
        "i2t": {"query": asked, "top1": i2t.top1.numpy()[asked], "rank": i2t.rank.numpy()[asked]},
    }
    answers["i2t"]["uncertainty"] = uncertainty[answers["i2t"]["top1"]]
    return answers


class _Race:
    """For every query of one direction, the best answer so far and how many answers beat the best right one."""

    def __init__(self, queries):
        self.target = torch.full(
            (queries,), torch.inf, dtype=torch.float64
        )  # similarity of the best right answer; nothing beats infinity
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


def rank_relevant(score, relevance, answers):
    """How well all right answers are found, where a query has several of them.

    Args: score: function of (query rows (q,), answer rows (n,)), two int64 tensors, that returns the (q, n) similarities as a tensor.
    relevance: Q lists of right answers, each once, at least one. answers: N, how many there are to choose from.
    Returns: dict of arrays with one entry a query:
        relevant: R, how many answers are right. relevant_rank: rank of the first right answer, 1 = best.
        ap_at_r: average precision at R in [0, 1]: sum over the right ones among the best R of (precision at its rank) / R.
    Memory is linear in N. Source: Musgrave et al., "A metric learning reality check", arXiv 2003.08505, sec. 3.2.

    Example: answers 0 and 2 are right, and the order is 2, 1, 0: AP@R = (1/1 + 0) / 2.
    >>> found = rank_relevant(lambda q, a: torch.tensor([[0.1, 0.5, 0.9]]), [[0, 2]], 3)
    >>> found["relevant"].tolist(), found["relevant_rank"].tolist(), found["ap_at_r"].tolist()
    ([2], [1], [0.5])
    """
    everything, found = torch.arange(answers), []
    for start in range(0, len(relevance), RELEVANT_BLOCK):
        part = [np.asarray(rows, dtype=np.int64) for rows in relevance[start : start + RELEVANT_BLOCK]]
        count = np.array([len(rows) for rows in part])
        query = np.repeat(np.arange(len(part)), count)  # of every right answer
        order = score(torch.arange(start, start + len(part)), everything).argsort(
            dim=1, descending=True, stable=True
        )  # (q, N), best first
        place = torch.empty_like(order).scatter_(1, order, everything.to(order.device).expand_as(order)).cpu().numpy()
        rank = place[query, np.concatenate(part)] + 1  # of every right answer, 1 = best
        rank = rank[np.lexsort((rank, query))]
        first = np.cumsum(count) - count  # where a query's right answers begin
        precision = (np.arange(1, len(rank) + 1) - first[query]) / rank
        ap_at_r = np.bincount(query, weights=precision * (rank <= count[query]), minlength=len(part)) / count
        found.append((count, rank[first], ap_at_r))
    return dict(
        zip(("relevant", "relevant_rank", "ap_at_r"), map(np.concatenate, zip(*found, strict=True)), strict=True)
    )


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
    area = float(np.mean(risk_coverage(correct, uncertainty)))
    best = float(np.mean(risk_coverage(correct, ~np.asarray(correct, dtype=bool))))
    return {"AURC": area, "E-AURC": max(0.0, area - best)}


def risk_coverage(correct, uncertainty):
    """The risk-coverage curve: the error rate among the n most certain queries, n = 1..Q, the expected one where uncertainty ties.

    Args: correct (Q,) bool, uncertainty (Q,). Returns: (Q,) array in [0, 1]; entry n - 1 is at coverage n / Q. Source: as for `aurc`.

    >>> risk_coverage(np.array([True, False]), np.array([0.1, 0.2])).tolist()
    [0.0, 0.5]
    """
    error = 1.0 - np.asarray(correct, dtype=np.float64)
    _, group = np.unique(uncertainty, return_inverse=True)
    expected = (np.bincount(group, weights=error) / np.bincount(group))[np.sort(group)]
    return np.cumsum(expected) / np.arange(1, len(error) + 1)


def auroc(correct, uncertainty):
    """How well uncertainty tells wrong answers from right ones: the probability that a wrong one is the less certain, ties counting half.

    Args: correct (Q,) bool, uncertainty (Q,). Returns: float in [0, 1], 0.5 = no information; None where all are right or all wrong.

    >>> auroc(np.array([True, False, True]), np.array([0.1, 0.2, 0.3]))
    0.5
    """
    correct = np.asarray(correct, dtype=bool)
    right, wrong = int(correct.sum()), int((~correct).sum())
    if not right or not wrong:
        return None
    ranks = stats.rankdata(uncertainty)
    return float((ranks[~correct].sum() - wrong * (wrong + 1) / 2) / (right * wrong))


def hierarchy_metrics(uncertainty, chains):
    """How steadily uncertainty falls along chains of texts from general to specific.

    Args: uncertainty (T,). chains: lists of rows, general first; those of one text are left out.
    Returns: dict: "falling": share of the adjacent steps whose uncertainty falls, in [0, 1]; "tau": mean over the chains of Kendall's tau-b of
    depth and certainty, in [-1, 1], 1 = always falls; a chain whose uncertainty is constant counts 0.

    >>> hierarchy_metrics(np.array([0.9, 0.5, 0.7]), [[0, 1, 2]])
    {'falling': 0.5, 'tau': 0.33333333333333337}
    """
    steps, taus = [], []
    for chain in chains:
        values = np.asarray(uncertainty)[chain]
        if len(values) < 2:
            continue
        steps.append(values[1:] < values[:-1])
        taus.append(0.0 if np.ptp(values) == 0 else float(stats.kendalltau(np.arange(len(values)), -values).statistic))
    if not taus:
        return {"falling": None, "tau": None}
    return {"falling": float(np.concatenate(steps).mean()), "tau": float(np.mean(taus))}


def uncertainty_by_depth(uncertainty, chains):
    """How uncertainty falls with depth, in ranks, so that methods can be compared.

    Args: as for `hierarchy_metrics`. Returns: list of floats, one a depth that a chain reaches, general first: the mean percentile, in
    [0, 100], of its texts among all T.

    >>> uncertainty_by_depth(np.array([0.9, 0.5, 0.7]), [[0, 1], [0, 2]])
    [100.0, 50.0]
    """
    percentile = 100 * stats.rankdata(uncertainty) / len(uncertainty)
    depths = range(max(map(len, chains), default=0))
    return [float(np.mean([percentile[chain[depth]] for chain in chains if len(chain) > depth])) for depth in depths]


def share_of_ties(uncertainty):
    """The share of queries whose uncertainty another query has too. Args: uncertainty (Q,). Returns: float in [0, 1].

    >>> share_of_ties(np.array([0.1, 0.1, 0.2, 0.3]))
    0.5
    """
    _, group, count = np.unique(uncertainty, return_inverse=True, return_counts=True)
    return float((count[group] > 1).mean())


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


def retrieval_metrics(answers, levels, by="uncertainty"):
    """All figures of one direction. Args: answers: "t2i" or "i2t" of `rank_queries`. levels: K. by: the field that ranks the queries.

    Returns: (recall: list of K floats by level, dict of "R@1", "R@5", "R@10", "S", "R2", "-S*R2", "AURC", "E-AURC", "ties").
    """
    correct = answers["rank"] == 1
    recall = recall_by_level(correct, answers[by], levels)
    overall = {f"R@{k}": recall_at(answers["rank"], k) for k in (1, 5, 10)}
    return recall, overall | level_statistics(recall) | aurc(correct, answers[by]) | {
        "ties": share_of_ties(answers[by])
    }


def recall_metrics(t2i_rank, i2t_rank):
    """Recall both ways, in [0, 1], and their sum in per cent. Args: ranks of the first right answer, 1 = best.

    >>> recall_metrics(np.array([1, 9]), np.array([1]))["RSUM"]
    500.0
    """
    found = {
        f"{name} R@{k}": recall_at(rank, k) for name, rank in (("t2i", t2i_rank), ("i2t", i2t_rank)) for k in (1, 5, 10)
    }
    return found | {"RSUM": 100 * sum(found.values())}


def level_sweep(answers, levels=(5, 10, 20, 50)):
    """S and -S*R2 for several numbers of levels, since S is easily had at 10. Args: answers: as above. levels: those above the number of
    queries are left out. Returns: dict of "S@5", "-S*R2@5", "S@10", ..."""
    correct = answers["rank"] == 1
    swept = {}
    for k in levels:
        if k <= len(correct):
            found = level_statistics(recall_by_level(correct, answers["uncertainty"], k))
            swept |= {f"S@{k}": found["S"], f"-S*R2@{k}": found["-S*R2"]}
    return swept


def asymmetry_metrics(answers):
    """Which modality's uncertainty predicts the errors of retrieval.

    Args: answers: what `rank_queries` returned; "image_uncertainty" where images have one: of the image retrieved (t2i), of the query (i2t).
    Returns: dict of "t2i AURC by text", "t2i AURC by image", "i2t ..." and the same for AUROC; the image's only where there is one.
    """
    found = {}
    for figure, function in (("AURC", lambda right, u: aurc(right, u)["AURC"]), ("AUROC", auroc)):
        for direction in ("t2i", "i2t"):
            for modality, field in (("text", "uncertainty"), ("image", "image_uncertainty")):
                if field in answers[direction]:
                    found[f"{direction} {figure} by {modality}"] = function(
                        answers[direction]["rank"] == 1, answers[direction][field]
                    )
    return found


def only_annotated(answers):
    """The answers to the queries whose right answers were looked into; all where it is not said which. Args: "t2i" or "i2t"."""
    return {key: values[answers["annotated"]] for key, values in answers.items()} if "annotated" in answers else answers


def relevance_metrics(answers):
    """Retrieval where several answers are right. Args: answers: "t2i" or "i2t", with what `rank_relevant` returned.

    Returns: dict of "R@1", "R@5", "R@10", the shares of queries with a right answer among the best k, and "mAP@R".
    """
    return {f"R@{k}": recall_at(answers["relevant_rank"], k) for k in (1, 5, 10)} | {
        "mAP@R": float(np.mean(answers["ap_at_r"]))
    }


def ambiguity_metrics(answers):
    """Uncertainty against exact ambiguity, where it is known which images each caption describes.

    Args: answers: "t2i" of `rank_queries`, with what `rank_relevant` returned and "words", the captions' lengths.
    Returns: dict: "spearman" of uncertainty and ambiguity, the number of images described; "partial_spearman_given_length";
    "R@1_described": share of captions whose first image is one that the caption describes.
    """
    uncertainty, ambiguity = answers["uncertainty"], answers["relevant"]
    return {
        "spearman": spearman(uncertainty, ambiguity),
        "partial_spearman_given_length": partial_spearman(uncertainty, ambiguity, answers["words"])
        if "words" in answers
        else None,
        "R@1_described": recall_at(answers["relevant_rank"], 1),
    }
