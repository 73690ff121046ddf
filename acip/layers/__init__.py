"""One linear layer y = W x + b in the forms that it takes from the base model to any size.

    nn.Linear --parametrize--> SVDLinear --sort by score--> ElasticLinear --materialize--> LowRankLinear, PivotLinear
                                                                                           or a plain nn.Linear

Legend: M = out features, N = in features, K = min(M, N) directions, R = adapter rank, r = kept rank.

* `SVDLinear` is pruned: it has one trainable mask entry per direction (paper 2.2.1, eq. 5).
* `ElasticLinear` holds the same directions sorted by importance. Rank r is a contiguous prefix of the rows of two tensors.
* `LowRankLinear` and `PivotLinear` (`acip.modeling_acip`) are the layer at one size, with the adapters folded in.

The first two carry adapters (`acip.layers.adapters`).
"""
