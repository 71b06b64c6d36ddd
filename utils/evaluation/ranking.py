"""Ranks the answers to every query, without holding the whole similarity matrix.

Similarities are (N images, M captions); larger = better match. Of equal similarities, the one with
the smaller row counts as the better match.
"""

import numpy as np
import torch

TILE = 640  # images per tile, with all their captions: for COCO, 640 x 3,200 similarities, 8 MB


def rank_queries(score, image_of_caption, images):
    """Answer every query of both directions, one tile of the similarity matrix at a time.

    The images are cut into groups of 640. A tile compares the images of one group with all captions
    of one group, and a caption is in the group of its image. So all right pairs lie in the tiles on
    the diagonal. These come first: then we know the similarity of every query's best right answer,
    and the rank is one plus the number of answers that beat it.

    Args:
        score: function of (image rows (n,), caption rows (m,)) that returns the similarities
            (n, m). Rows are int64 tensors, or slices where they are consecutive.
        image_of_caption: row of each caption's image, (M,).
        images: N.
    Returns: {"t2i": of the M captions, "i2t": of the images that have captions}, each a dict of
        arrays with one entry per query: query (its row), top1 (row of its first answer) and rank
        (of its first right answer, 1 = best).
    Raises: ValueError if a similarity is not a number.

    Example: two images with two captions each. Caption 1 prefers the wrong image, and image 1
    prefers a caption of image 0.
    >>> s = torch.tensor([[0.9, 0.4, 0.1, 0.2], [0.3, 0.8, 0.7, 0.6]])
    >>> answers = rank_queries(lambda i, j: s[i][:, j], np.array([0, 0, 1, 1]), 2)
    >>> answers["t2i"]["rank"].tolist(), answers["t2i"]["top1"].tolist()
    ([1, 2, 1, 1], [0, 1, 1, 1])
    >>> answers["i2t"]["rank"].tolist(), answers["i2t"]["top1"].tolist()
    ([1, 2], [0, 1])
    """
    image_of_caption = torch.as_tensor(np.asarray(image_of_caption), dtype=torch.int64)
    image_tiles = torch.arange(images).split(TILE)
    tile_of_caption = image_of_caption // TILE
    captions_per_tile = tile_of_caption.bincount(minlength=len(image_tiles))
    captions_by_tile = torch.argsort(tile_of_caption, stable=True)
    caption_tiles = captions_by_tile.split(captions_per_tile.tolist())
    t2i = _Ranks(len(image_of_caption))
    i2t = _Ranks(images)
    for row, column in _diagonal_first(len(image_tiles)):
        image_rows = image_tiles[row]
        caption_rows = caption_tiles[column]
        if len(caption_rows) == 0:
            continue
        tile = score(_as_slice(image_rows), _as_slice(caption_rows))  # (n, m)
        if row == column:
            image = image_of_caption[caption_rows]
            right = tile[image - image_rows[0], torch.arange(len(caption_rows))].cpu()  # (m,)
            t2i.set_right_answers(caption_rows, right, image)
            best = _best_of_each_image(image, right, caption_rows)
            i2t.set_right_answers(image[best], right[best], caption_rows[best])
        t2i.compare(tile, caption_rows, image_rows)
        i2t.compare(tile.T, image_rows, caption_rows)
    return {
        "t2i": t2i.results(torch.arange(len(image_of_caption))),
        "i2t": i2t.results(image_of_caption.unique()),
    }


def _diagonal_first(tiles):
    """Yield (row, column) of all tiles of a square, those on the diagonal first."""
    for tile in range(tiles):
        yield tile, tile
    for column in range(tiles):
        for row in range(tiles):
            if row != column:
                yield row, column


def _as_slice(rows):
    """Ascending rows as a slice, which copies nothing, if they are consecutive."""
    first = rows[0].item()
    last = rows[-1].item()
    return slice(first, last + 1) if last - first == len(rows) - 1 else rows


def _best_of_each_image(image, similarity, caption):
    """The positions of the most similar caption of each image; of equal ones, the smaller row."""
    order = np.lexsort((caption, -similarity.cpu().double(), image))
    _, first = np.unique(image[order], return_index=True)
    return order[first]


class _Ranks:
    """For all queries of one direction: the rank of the best right answer, and the first answer."""

    def __init__(self, queries):
        self.right = torch.full((queries,), torch.inf, dtype=torch.float64)  # its similarity
        self.right_row = torch.zeros(queries, dtype=torch.int64)
        self.rank = torch.ones(queries, dtype=torch.int64)
        self.best = torch.full((queries,), -torch.inf, dtype=torch.float64)  # of all answers so far
        self.best_row = torch.full((queries,), -1, dtype=torch.int64)

    def set_right_answers(self, queries, similarity, rows):
        """Set the best right answer of some queries: its similarity and its row."""
        self.right[queries] = similarity.cpu().double()
        self.right_row[queries] = rows

    def compare(self, similarity, queries, answers):
        """Compare similarities (n, q) of some answers, whose rows ascend, with what is known."""
        self.rank[queries] += self._count_better(similarity, queries, answers)
        highest, where = similarity.max(dim=0)  # of equal ones, the first
        highest = highest.cpu().double()
        row = answers[where.cpu()]
        if highest.isnan().any():
            raise ValueError("a similarity is not a number")
        best = self.best[queries]
        is_tie_with_smaller_row = (highest == best) & (row < self.best_row[queries])
        wins = (highest > best) | is_tie_with_smaller_row
        self.best[queries[wins]] = highest[wins]
        self.best_row[queries[wins]] = row[wins]

    def _count_better(self, similarity, queries, answers):
        """How many of the answers beat the right answer of each query: (q,)."""
        right = self.right[queries].to(similarity)  # (q,)
        right_row = self.right_row[queries]
        # If all rows here are smaller than the right answer's, equal similarities beat it too:
        # compare with the next smaller number.
        are_smaller = (answers[-1] < right_row).to(similarity.device)
        next_smaller = right.nextafter(torch.full_like(right, -torch.inf))
        limit = torch.where(are_smaller, next_smaller, right)
        # Written as floats, since a sum of truth values takes five times as long.
        is_better = torch.gt(similarity, limit, out=torch.empty_like(similarity))
        better = is_better.sum(dim=0).cpu().long()
        # If the right row lies among the rows here, only smaller rows win a tie.
        is_among = (answers[0] < right_row) & (right_row <= answers[-1])
        mixed = is_among.nonzero().flatten()
        if len(mixed):
            on_device = mixed.to(similarity.device)
            is_equal = similarity[:, on_device] == right[on_device]
            has_smaller_row = answers[:, None] < right_row[mixed]  # (n, mixed)
            better[mixed] += (is_equal.cpu() & has_smaller_row).sum(dim=0)
        return better

    def results(self, queries):
        """The answers to some queries, as arrays."""
        return {
            "query": queries.numpy(),
            "top1": self.best_row[queries].numpy(),
            "rank": self.rank[queries].numpy(),
        }


def rank_relevant(score, relevance, answers):
    """How well all right answers are found, if a query has several. Memory is linear in N.

    Args:
        score: function of (query rows (q,), answer rows (n,)), int64 tensors, that returns the
            similarities (q, n).
        relevance: the right answers of each of Q queries: lists of rows, each row once, at least
            one per query.
        answers: N, how many answers there are.
    Returns: arrays with one entry per query: relevant (R: how many answers are right),
        relevant_rank (of the first right answer, 1 = best), ap_at_r (average precision at R, in
        [0, 1]: the sum, over right answers among the best R, of the precision at their rank,
        divided by R) and r_precision (the share of right answers among the best R, in [0, 1]).
    Source: Musgrave et al., "A metric learning reality check", arXiv 2003.08505, sec. 3.2.

    Example: answers 0 and 2 are right, and the order is 2, 1, 0: AP@R = (1/1 + 0) / 2.
    >>> judged = rank_relevant(lambda q, a: torch.tensor([[0.1, 0.5, 0.9]]), [[0, 2]], 3)
    >>> judged["relevant"].tolist(), judged["relevant_rank"].tolist(), judged["ap_at_r"].tolist()
    ([2], [1], [0.5])
    """
    all_answers = torch.arange(answers)
    relevant = np.array([len(rows) for rows in relevance])
    first_rank = []
    ap_at_r = []
    r_precision = []
    for queries in torch.arange(len(relevance)).split(TILE):
        similarity = score(queries, all_answers)
        order = similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy()  # (q, N)
        for query, answers_in_order in zip(queries.tolist(), order, strict=True):
            is_right = np.zeros(answers, dtype=bool)
            is_right[relevance[query]] = True
            ranks = np.flatnonzero(is_right[answers_in_order]) + 1  # of the right answers
            precision = np.arange(1, len(ranks) + 1) / ranks
            is_among_best = ranks <= len(ranks)
            first_rank.append(ranks[0])
            ap_at_r.append(precision[is_among_best].sum() / len(ranks))
            r_precision.append(is_among_best.mean())
    return {
        "relevant": relevant,
        "relevant_rank": np.array(first_rank),
        "ap_at_r": np.array(ap_at_r),
        "r_precision": np.array(r_precision),
    }
