"""Superposition codes: how many sparse features d dimensions can carry, and which decoder recovers them.

A code is a dictionary `[n_atoms, d]` of unit rows f_i and a set of k active atoms; its signal is the plain sum x =
sum_{i in set} f_i. The laboratory measures when a decoder finds the set again.

* `dictionaries`  random and optimised dictionaries, whole or implicit (rows made on demand)
* `subsets`       exact uniform k-subsets
* `decoders`      threshold, top-k, MAP, integer pursuit, and every solver of `saejax.sparse_coding` with rounding
* `success`       measured probability of exact recovery over the dimension, sharded and blocked
* `capacity`      closed forms: entropy, capacity, statistical dimension, Gaussian success formulas, rules of thumb
* `coherence`     interference of a dictionary and the bounds it obeys
* `awgn`          a single codeword in white noise

It handles arrays only and knows `sparse_coding`, but nothing of training, activations or files.
"""
