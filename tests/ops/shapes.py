"""Sizes that are no multiples of a tile, and those that are."""

RANKS = (1, 2, 3, 5, 8, 13, 16, 17, 64, 100, 256)
ROWS = (0, 1, 2, 5, 6, 7, 31, 33, 70, 130)
NARROW = [(1, 1), (1, 65), (3, 17), (17, 3)]  # N, K
WIDE = [(63, 65), (100, 257), (257, 100)]
