"""A function that scores in, the answer to every query out, without ever holding the matrix of all similarities.

Similarities are (n images, m captions), larger = better. Of equal ones the lower row counts as the better one.
"""

import numpy as np
import torch

TILE = 640  # images of a tile; its captions are as many as so many images have: of COCO, 8 MB in all


def rank_queries(score, image_of_caption, images, watch=None):
    """Answer every query of both directions, a tile of the similarity matrix at a time.

    The columns of a tile are the captions of as many images as it has rows, so that all right pairs lie in the tiles on
    the diagonal. These come first: then it is known what competitors have to beat; each tile is computed once.
    Args:
        score: function of (image rows (n,), caption rows (m,)) that returns the similarities (n, m); rows are int64
            tensors, or slices where they follow each other.
        image_of_caption (M,): image rows.
        images: N.
        watch: function of (tile (n, m), image rows, caption rows), called with every tile, or None.
    Returns: {"t2i": of M captions, "i2t": of the images that have a caption}, arrays with one entry a query:
        query (its row), top1 (row of the first answer) and rank (of the first right answer, 1 = best).
    Raises: ValueError if a similarity is not a number.

    Example: two images, two captions each; caption 1 prefers the wrong image, and image 1 a caption of image 0.
    >>> s = torch.tensor([[0.9, 0.4, 0.1, 0.2], [0.3, 0.8, 0.7, 0.6]])
    >>> answers = rank_queries(lambda i, j: s[i][:, j], np.array([0, 0, 1, 1]), 2)
    >>> answers["t2i"]["rank"].tolist(), answers["t2i"]["top1"].tolist()
    ([1, 2, 1, 1], [0, 1, 1, 1])
    >>> answers["i2t"]["rank"].tolist(), answers["i2t"]["top1"].tolist()
    ([1, 2], [0, 1])
    """
    image_of_caption = torch.as_tensor(np.asarray(image_of_caption), dtype=torch.int64)
    tile_of_caption = image_of_caption // TILE
    rows_of = torch.arange(images).split(TILE)
    sizes = tile_of_caption.bincount(minlength=len(rows_of)).tolist()
    columns_of = torch.argsort(tile_of_caption, stable=True).split(sizes)
    t2i, i2t, sides = _Race(len(image_of_caption)), _Race(images), range(len(rows_of))
    for a, b in [(k, k) for k in sides] + [(a, b) for b in sides for a in sides if a != b]:
        rows, columns = rows_of[a], columns_of[b]
        if not len(columns):
            continue
        tile = score(_slice(rows), _slice(columns))  # (n, m)
        if watch is not None:
            watch(tile, rows, columns)
        if a == b:
            image = image_of_caption[columns]
            right = tile[image - rows[0], torch.arange(len(columns))].cpu()  # (m,), what each caption's image has
            t2i.aim(columns, right, image)
            order = np.lexsort((columns, -right.double(), image))  # an image's best caption comes first
            best = order[np.unique(image[order], return_index=True)[1]]
            i2t.aim(image[best], right[best], columns[best])
        t2i.run(tile, columns, rows, dim=0, has_right=a == b)
        i2t.run(tile, rows, columns, dim=1, has_right=a == b)
    return {"t2i": t2i.answers(torch.arange(len(image_of_caption))), "i2t": i2t.answers(image_of_caption.unique())}


def _slice(rows):
    """Ascending rows as a slice, which copies nothing, where they follow each other."""
    first, last = rows[0].item(), rows[-1].item()
    return slice(first, last + 1) if last - first == len(rows) - 1 else rows


class _Race:
    """For every query of one direction, the best answer so far and how many answers beat the best right one."""

    def __init__(self, queries):
        self.target = torch.full((queries,), torch.inf, dtype=torch.float64)  # of the best right answer; inf: none
        self.target_row = torch.zeros(queries, dtype=torch.int64)
        self.rank = torch.ones(queries, dtype=torch.int64)
        self.best = torch.full((queries,), -torch.inf, dtype=torch.float64)
        self.top1 = torch.full((queries,), -1, dtype=torch.int64)

    def aim(self, queries, similarity, row):
        """Set the best right answer of some queries, which is the best so far: its similarity and row."""
        self.target[queries], self.target_row[queries] = similarity.double(), row
        self.best[queries], self.top1[queries] = similarity.double(), row

    def run(self, tile, queries, answers, dim, has_right):
        """Take in the similarities of some queries and answers, whose rows ascend and which lie along this dimension.

        Few passes over the tile, each of a kind that runs at the speed of the cache: two here, and one more where lower
        and higher rows than the best right answer's are among the answers, as they are on the diagonal (has_right).
        """
        target, row = self.target[queries].to(tile), self.target_row[queries]  # (q,)
        is_lower = (answers[-1] < row).to(tile.device)  # of all answers: equal ones beat it, too
        beaten = torch.where(is_lower, target.nextafter(target.new_tensor(-torch.inf)), target)
        beat = _count(torch.gt, tile, beaten, dim)  # (q,), how many beat it
        unsure = ((answers[0] < row) & (row <= answers[-1])).nonzero().flatten()
        if len(unsure):  # whose equal ones are to be looked at, apart from the right answer itself
            unsure = unsure[_count(torch.eq, tile, target, dim)[unsure] > int(has_right)]
            chosen = unsure.to(tile.device)
            equal = tile.index_select(1 - dim, chosen) == target[chosen].unsqueeze(dim)
            equal = equal.cpu() if dim else equal.T.cpu()  # (u, n)
            beat[unsure] += (equal & (answers < row[unsure, None])).sum(dim=1)
        self.rank[queries] += beat
        highest, best = tile.amax(dim=dim).cpu().double(), self.best[queries]
        if highest.isnan().any():
            raise ValueError("a similarity is not a number")
        better = ((beat > 0) & (highest >= best)).nonzero().flatten()
        where = tile.index_select(1 - dim, better.to(tile.device)).max(dim=dim).indices  # the first of equal ones
        where = answers[where.cpu()]
        wins = (highest[better] > best[better]) | (where < self.top1[queries[better]])
        better, where = better[wins], where[wins]
        self.best[queries[better]], self.top1[queries[better]] = highest[better], where

    def answers(self, queries):
        """What it has found for some queries, as arrays."""
        return {"query": queries.numpy(), "top1": self.top1[queries].numpy(), "rank": self.rank[queries].numpy()}


def _count(compare, tile, limit, dim):
    """How many of each query's similarities compare so with its limit (q,): (q,) int64 on the CPU.

    They are written as 0.0 and 1.0: a comparison between numbers of one type has vector instructions, one that gives
    truth values has not.
    """
    return compare(tile, limit.unsqueeze(dim), out=torch.empty_like(tile)).sum(dim=dim).cpu().long()


def rank_relevant(score, relevance, answers):
    """How well all right answers are found, where a query has several of them; memory is linear in N.

    Args:
        score: function of (query rows (q,), answer rows (n,)), int64 tensors, that returns the similarities (q, n).
        relevance: Q lists of right answers, each once, at least one.
        answers: N, how many there are to choose from.
    Returns: arrays with one entry a query: relevant (R, how many answers are right), relevant_rank (of the first right
        answer, 1 = best), ap_at_r (average precision at R in [0, 1]: sum over right ones among the best R of (precision
        at its rank) / R) and r_precision (the share of the best R that are right, in [0, 1]).
    Source: Musgrave et al., "A metric learning reality check", arXiv 2003.08505, sec. 3.2.

    Example: answers 0 and 2 are right, and the order is 2, 1, 0: AP@R = (1/1 + 0) / 2.
    >>> judged = rank_relevant(lambda q, a: torch.tensor([[0.1, 0.5, 0.9]]), [[0, 2]], 3)
    >>> judged["relevant"].tolist(), judged["relevant_rank"].tolist(), judged["ap_at_r"].tolist()
    ([2], [1], [0.5])
    """
    count = np.array([len(rows) for rows in relevance])
    everything, ranks = torch.arange(answers), []
    for queries in torch.arange(len(count)).split(TILE):
        order = score(queries, everything).argsort(dim=1, descending=True, stable=True)  # (q, N), best first
        is_right = np.zeros(order.shape, dtype=bool)
        for row, query in zip(is_right, queries.tolist(), strict=True):
            row[relevance[query]] = True
        is_right = torch.from_numpy(is_right).to(order.device).gather(1, order).cpu().numpy()
        ranks.append(is_right.nonzero()[1] + 1)
    rank, query = np.concatenate(ranks), np.repeat(np.arange(len(count)), count)  # of every right answer, best first
    first = np.cumsum(count) - count  # where a query's right answers begin
    precision, is_high = (np.arange(1, len(rank) + 1) - first[query]) / rank, rank <= count[query]
    ap_at_r, r_precision = (np.bincount(query, weights=share) / count for share in (precision * is_high, is_high))
    return {"relevant": count, "relevant_rank": rank[first], "ap_at_r": ap_at_r, "r_precision": r_precision}
