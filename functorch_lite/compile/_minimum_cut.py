"""Minimum cuts of networks with integer capacities."""

from __future__ import annotations

from collections import deque

#: The capacity of an edge that is in no cut.
INFINITE = 1 << 200


class Network:
    """A directed network. Vertices are numbers from 0 on; ``SOURCE`` and ``SINK`` are there from the start.

    `minimum_cut` is the algorithm of Dinic: as long as there is a path with room left, fill up all shortest ones.

    References:
        E. A. Dinic, *Algorithm for solution of a problem of maximum flow in networks with power estimation*, 1970.
    """

    SOURCE, SINK = 0, 1

    def __init__(self) -> None:
        self._edges: list[list[int]] = [[], []]  # of each vertex, those that leave it
        self._heads: list[int] = []
        # Of each edge what is left. Edge i ^ 1 is i turned round.
        self._room: list[int] = []

    def vertex(self) -> int:
        """Add a vertex."""
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, tail: int, head: int, capacity: int) -> None:
        """Add an edge."""
        for start, end, room in ((tail, head, capacity), (head, tail, 0)):
            self._edges[start].append(len(self._heads))
            self._heads.append(end)
            self._room.append(room)

    def minimum_cut(self) -> set[int] | None:
        """The vertices on the sink's side of the minimum cut that is nearest to the sink. None if all are infinite."""
        while self._fill(self._distances()):
            pass
        # What could still send something to the sink.
        side = {self.SINK}
        queue = deque(side)
        while queue:
            for edge in self._edges[queue.popleft()]:
                if self._room[edge ^ 1] and self._heads[edge] not in side:
                    side.add(self._heads[edge])
                    queue.append(self._heads[edge])
        return None if sum(self._room[edge ^ 1] for edge in self._edges[self.SOURCE]) >= INFINITE else side

    def _distances(self) -> list[int]:
        """From the sink, along edges with room; the number of vertices for those from which it cannot be reached."""
        far = len(self._edges)
        distances = [far] * far
        distances[self.SINK] = 0
        queue = deque([self.SINK])
        while queue:
            vertex = queue.popleft()
            for edge in self._edges[vertex]:
                if self._room[edge ^ 1] and distances[self._heads[edge]] == far:
                    distances[self._heads[edge]] = distances[vertex] + 1
                    queue.append(self._heads[edge])
        return distances

    def _fill(self, distances: list[int]) -> bool:
        """Fill all shortest paths. Returns whether there was one."""
        if distances[self.SOURCE] == len(self._edges):
            return False
        edges, heads, room = self._edges, self._heads, self._room
        following = [0] * len(edges)  # of each vertex, the first edge that may still lead to the sink
        path: list[int] = []
        vertex = self.SOURCE
        while True:
            if vertex == self.SINK:
                amount = min(room[edge] for edge in path)
                for edge in path:
                    room[edge] -= amount
                    room[edge ^ 1] += amount
                full = next(place for place, edge in enumerate(path) if not room[edge])
                vertex = heads[path[full] ^ 1]
                del path[full:]
            leaving, place = edges[vertex], following[vertex]
            while place < len(leaving):
                edge = leaving[place]
                if room[edge] and distances[heads[edge]] == distances[vertex] - 1:
                    break
                place += 1
            following[vertex] = place
            if place < len(leaving):
                path.append(edge)
                vertex = heads[edge]
            elif vertex == self.SOURCE:
                return True
            else:
                distances[vertex] = len(edges)  # a dead end
                vertex = heads[path.pop() ^ 1]
