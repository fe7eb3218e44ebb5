"""Pair rows with columns at the least total cost."""

import numpy as np
from numpy.typing import NDArray


def assign(cost: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the pairs (row, column), min(n, m) of them and each row and column at most once, of least total cost.

    Args:
        cost: (n, m), finite.

    Source: the Hungarian algorithm in its shortest-augmenting-path form (Jonker and Volgenant, 1987).
    """
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in assign(cost.T))
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.zeros(columns + 1, int)  # of each column, counted from 1; 0 is free, and column 0 is the path's start
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        distance, previous = np.full(columns + 1, np.inf), np.zeros(columns + 1, int)
        visited = np.zeros(columns + 1, bool)
        while row_of[column] or not column:
            visited[column] = True
            step = np.full(columns + 1, np.inf)
            step[1:] = cost[row_of[column] - 1] - row_price[row_of[column]] - column_price[1:]
            shorter = ~visited & (step < distance)
            distance[shorter], previous[shorter] = step[shorter], column
            column = int(np.where(visited, np.inf, distance).argmin())
            gap = distance[column]
            row_price[row_of[visited]] += gap
            column_price[visited] -= gap
            distance[~visited] -= gap
        while column:  # shift every match along the path by one
            row_of[column], column = row_of[previous[column]], int(previous[column])
    return sorted((int(row_of[c]) - 1, c - 1) for c in range(1, columns + 1) if row_of[c])
