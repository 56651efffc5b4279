"""Attention between q, k and v and the output projection.

A CTA takes one key head, with all queries of its group, and every so many chunks of 16 slots: a chunk is a
warp's, which multiplies keys and queries, and values and weights, on the tensor cores, and has a running softmax. They
are merged in the CTA, then by whoever reads them.
"""

from __future__ import annotations

from typing import Any

from kernels_pallas.fused_block.base import Base
from kernels_pallas.fused_block.memory_layout import chunk_copies
from kernels_pallas.fused_block.tiling import ATTENDING, CHUNK, LOAD, PADDED, QUAD, QUERIES, WARP

MERGED_AT_ONCE = 8  # splits that are waited for together
VECTOR = 8  # features of 16 bytes
NOTHING = -1e30  # a score that no slot has


class Attention(Base):
    """Attends, and merges what was attended to in splits."""

    def attend(self) -> None:
        """One key head and one split of the slots: send what it attends to, and its softmax's terms."""
        m, at, splits = self.m, self.at, self.config.attention_splits
        head, split = self.cta // splits, self.cta % splits
        slot, start = m.load(at["slot"]), m.load(at["start"])
        window = m.load(at["windows"] + self.decoder * 4)
        begin = m.minimum(m.maximum(start, slot - window + 1), slot)
        warps = min(ATTENDING, self.warps)
        # The slots before the warp's first chunk, and from there to its next one.
        skipped, whole = (self.warp * splits + split) * CHUNK, warps * splits * CHUNK
        mine = m.select(self.warp < warps, m.maximum(slot - begin - skipped, 0), m.integer(0))

        def fetch(i: Any) -> None:
            self.copy_chunk(head, begin + skipped + i * whole, slot, i)

        def next_chunk(i: Any, state: list[Any]) -> list[Any]:
            fetch(i + 1)
            m.wait_for_copies(1)
            return self.advance(state, self.chunk_at(i), mine - i * whole)

        # On its way while the queries are waited for.
        m.when(mine >= 1, lambda: fetch(m.integer(0)))
        self.make_ready(head, split, slot)
        nothing = [*[m.float32(NOTHING)] * 2, *[m.float32(0.0)] * (2 + self.sums())]
        state = m.for_loop((mine + (whole - 1)) // whole, nothing, next_chunk)
        m.wait_for_copies(0)
        m.when(self.warp < warps, lambda: self.put_piece(state))
        m.sync()
        self.send_attended(head, split, warps)

    def sums(self) -> int:
        """A lane's registers of a chunk's product with the values."""
        return 16 * -(-self.shape.head_dim // 64)

    def chunk_at(self, i: Any) -> Any:
        """Where a lane's part of a chunk is; two chunks have room."""
        return self.smem("chunks") + ((i & 1) * (chunk_copies(self.shape) * ATTENDING * WARP) + self.thread) * LOAD

    def copy_chunk(self, head: Any, first: Any, slot: Any, i: Any) -> None:
        """Begin to copy the keys and values of 16 slots, for each lane its own part; zeros where there is none.

        Of a key's features a lane has 8 of every 32, of two slots, and of the values 8 of every 64, of four.
        """
        m, dim, at = self.m, self.shape.head_dim, self.chunk_at(i)
        g, t = self.lane // QUAD, self.lane % QUAD
        wanted = []
        for part in range(dim // WARP):
            wanted += [("keys", g + row, t * VECTOR + part * WARP, self.always) for row in (0, CHUNK // 2)]
        for part in range(-(-dim // 64)):
            vector = g + 8 * part
            inside = vector < dim // VECTOR
            wanted += [("values", t * QUAD + row, vector * VECTOR, inside) for row in range(QUAD)]
        starts = {name: self.address(name) for name in ("keys", "values")}
        for k, (name, row, feature, inside) in enumerate(wanted):
            offset = ((first + row) * self.shape.sizes_in[1] + head * dim + feature) * 2
            there = inside & (first + row < slot)
            m.copy_async(at + k * ATTENDING * WARP * LOAD, starts[name] + offset, there)
        m.commit_copies()

    def advance(self, state: list[Any], chunk: Any, left: Any) -> list[Any]:
        """One chunk more, of which so many slots are there: the highest scores, sums of weights, and sums of values.

        A lane has two of the queries: of the scores two slots, of the sums the features of its vectors.
        """
        m, dim = self.m, self.shape.head_dim
        g, t = self.lane // QUAD, self.lane % QUAD

        def words(k: int) -> list[Any]:
            return m.read_four(chunk + k * ATTENDING * WARP * LOAD)

        scores = [m.float32(0.0)] * 4
        for part in range(dim // WARP):
            low, high = words(2 * part), words(2 * part + 1)
            query = m.read_four(self.smem("queries", g * (dim // 2) + part * (WARP // 2) + t * 4))
            for k in (0, 2):
                scores = m.mma("bf16", [low[k], high[k], low[k + 1], high[k + 1]], query[k : k + 2], scores)
        real = [g < left, g + CHUNK // 2 < left]
        scores = [m.select(real[k // 2], s * dim**-0.5, m.float32(NOTHING)) for k, s in enumerate(scores)]
        tops, sums = [], []
        for query in range(2):
            top = m.maximum(scores[query], scores[query + 2])
            for distance in (4, 8, 16):
                top = m.maximum(top, m.shuffle_xor(top, distance))
            tops.append(m.maximum(top, state[query]))
        weights = [m.select(real[k // 2], m.exp(s - tops[k % 2]), m.float32(0.0)) for k, s in enumerate(scores)]
        shrink = [m.exp(state[query] - tops[query]) for query in range(2)]
        for query in range(2):
            sums.append(m.fma(state[2 + query], shrink[query], weights[query] + weights[query + 2]))
        row = self.warp * (QUERIES * PADDED)
        for k, weight in enumerate(weights):
            to = row + (t * 2 + k % 2) * PADDED + g + CHUNK // 2 * (k // 2)
            m.write(self.smem("shares", to), [m.as_bits(weight)])
        m.sync_warp()
        mine = [m.as_float(w) for w in m.read_four(self.smem("shares", row + g * PADDED + t * QUAD))]
        m.sync_warp()
        # In two bfloat16 each, as one alone costs more than the rounding of the result; none is zero or negative, or an
        # infinite value would become none at all.
        upper = [m.as_float(m.as_bits(weight) & -65536) for weight in mine]
        lower = [m.maximum(weight - most, weight * 2.0**-20) for weight, most in zip(mine, upper, strict=True)]
        shares = [[m.pack_bfloat16(n[k], n[k + 1]) for k in (0, 2)] for n in (upper, lower)]
        totals, out = [total * shrink[k % 2] for k, total in enumerate(state[4:])], []
        for part in range(self.sums() // 16):
            rows = [words(dim // WARP * 2 + QUAD * part + k) for k in range(QUAD)]
            for w in range(4):
                a = self.fragments(rows, w)
                total = totals[16 * part + 4 * w : 16 * part + 4 * w + 4]
                for share in shares:
                    total = m.mma("bf16", a, share, total)
                out += total
        return [*tops, *sums, *out]

    def put_piece(self, state: list[Any]) -> None:
        """Store the warp's part of the sum in shared memory."""
        m, dim, group = self.m, self.shape.head_dim, self.shape.group
        g, t = self.lane // QUAD, self.lane % QUAD
        for query in range(2):
            top, weight, sums = state[query], state[2 + query], state[4 + query :: 2]
            for distance in (4, 8, 16):
                weight = weight + m.shuffle_xor(weight, distance)
            row, own = self.warp * QUERIES + t * 2 + query, t * 2 + query
            m.write(self.smem("weights", row * 2), [m.as_bits(top), m.as_bits(weight)], self.lane < QUAD)
            for part in range(self.sums() // 16):
                vector = g + 8 * part
                for k in (0, 4):
                    words = [m.as_bits(n) for n in sums[8 * part + k : 8 * part + k + 4]]
                    at = self.smem("pieces", (self.warp * group + own) * dim + vector * VECTOR + k)
                    m.write(at, words, (vector < dim // VECTOR) & (own < group))

    def make_ready(self, head: Any, split: Any, slot: Any) -> None:
        """Finish a key head's queries, and in the first split the new key and value, which go to the cache too."""
        m, shape, at = self.m, self.shape, self.at
        dim, half, group = shape.head_dim, shape.head_dim // 2, shape.group
        queries, features, parts = group * dim, (group + 2) * dim, self.cuts["attn_in"].splits
        attended, kv, _ = shape.sizes_in
        first, rounds, mailboxes = split.equals(0), [], []
        for i in range(-(-features // self.threads)):
            own = self.thread + i * self.threads
            inside, feature = own < features, m.minimum(own, features - 1)
            which = feature // dim
            is_query, is_value = feature < queries, which.equals(group + 1)
            j = feature % dim
            column = m.select(is_query, head * queries + feature, head * dim + j)
            layer = m.select(is_query, m.integer(0), which - (group - 1))
            before = m.select(is_query, m.integer(0), layer * kv + (attended - kv))
            wanted = inside & (is_query | first)
            cos, sin = (m.as_float(m.load(at[name] + (j % half) * 4)) for name in ("cos", "sin"))
            bias = m.float32(0.0)
            if "q" in shape.biases:
                bias = m.load_bfloat16(self.address("bias_q", layer) + column * 2)
            gains = []
            if shape.qk_norm:
                gain = m.select(is_query, self.address("q_norm"), self.address("k_norm"))
                gains = [m.load_bfloat16(gain + k * 2) for k in (j, (j + half) % dim)]
            for p in range(parts):
                mailboxes.append((self.mailbox("qkv", before + column + p * sum(shape.sizes_in)), wanted))
            rounds.append((own, inside, feature, j, column, is_query, is_value, cos, sin, bias, gains))
        words = m.poll([], mailboxes, self.flag)
        numbers = []
        for i, (own, inside, _, _, _, _, _, _, _, bias, _) in enumerate(rounds):
            y = m.round_bfloat16(self.sum([m.as_float(w) for w in words[parts * i : parts * (i + 1)]]))
            y = m.round_bfloat16(y + bias) if "q" in shape.biases else y
            numbers.append(y)
            m.write(self.smem("raw", own), [m.as_bits(y)], inside)
            if shape.qk_norm:
                square = self.warp_sum(y * y)
                m.write(self.smem("heads", own // WARP), [m.as_bits(square)], inside & self.lane.equals(0))
        m.sync()
        for y, (own, inside, feature, j, column, is_query, is_value, cos, sin, _, gains) in zip(
            numbers, rounds, strict=True
        ):
            mine, other = y, m.as_float(m.read(self.smem("raw", feature - j + (j + half) % dim)))
            if shape.qk_norm:
                many = dim // WARP
                sums = [m.as_float(m.read(self.smem("heads", feature // dim * many + k))) for k in range(many)]
                scale = m.reciprocal_root(self.sum(sums) * (1.0 / dim) + shape.eps)
                mine, other = (
                    m.round_bfloat16(m.round_bfloat16(n * scale) * gain)
                    for n, gain in zip((mine, other), gains, strict=True)
                )
            turned = m.select(j < half, mine * cos - other * sin, mine * cos + other * sin)
            made = m.select(is_value, y, m.round_bfloat16(turned))
            m.write(self.smem("ready", own), [m.as_bits(made)], inside)
            m.write(self.smem("queries", own // 2), [self.pair(made)], is_query & inside & (own % 2).equals(0))
            cache = m.select(is_value, self.address("values"), self.address("keys"))
            where = cache + (slot * kv + column) * 2
            m.store_bfloat16(where, made, inside & first & (is_query ^ True))
        m.sync()
        # By warps that have no chunk, if there are so many.
        query = self.warp - (ATTENDING if self.warps >= ATTENDING + group else 0)
        m.when((query >= 0) & (query < group), lambda: self.score_new(first, query))

    def score_new(self, first: Any, own: Any) -> None:
        """The score of a query with the new key, a warp a query; of one split."""
        m, dim, group = self.m, self.shape.head_dim, self.shape.group
        terms = []
        for k in range(0, dim, WARP):
            query = m.read(self.smem("ready", own * dim + self.lane + k))
            key = m.read(self.smem("ready", self.lane + (group * dim + k)))
            terms.append(m.as_float(query) * m.as_float(key))
        score = m.select(first, self.warp_sum(self.sum(terms)) * dim**-0.5, m.float32(NOTHING))
        m.write(self.smem("fresh", own), [m.as_bits(score)], self.lane.equals(0))

    def send_attended(self, head: Any, split: Any, warps: int) -> None:
        """Merge the pieces and the new token, a lane a feature."""
        m, shape = self.m, self.shape
        dim, group = shape.head_dim, shape.group
        for i in range(-(-group * dim // self.threads)):
            own = self.thread + i * self.threads
            inside, feature = own < group * dim, m.minimum(own, group * dim - 1)
            query, j = feature // dim, feature % dim
            fresh = m.as_float(m.read(self.smem("fresh", query)))
            new = m.as_float(m.read(self.smem("ready", j + (group + 1) * dim)))
            weights = [
                [m.as_float(word) for word in m.read_two(self.smem("weights", (query + w * QUERIES) * 2))]
                for w in range(warps)
            ]
            pieces = [m.as_float(m.read(self.smem("pieces", feature + w * group * dim))) for w in range(warps)]
            top = fresh
            for other, _ in weights:
                top = m.maximum(top, other)
            # Only one split has the new token, the others have no value for it.
            holds = split.equals(0)
            share = m.select(holds, m.exp(fresh - top), m.float32(0.0))
            above, below = [share * m.select(holds, new, m.float32(0.0))], [share]
            for (one, weight), piece in zip(weights, pieces, strict=True):
                share = m.exp(one - top)
                above.append(share * piece)
                below.append(share * weight)
            index = split * shape.attended + head * (group * dim) + feature
            m.send(self.mailbox("attended", index), m.as_bits(self.sum(above)), self.flag, inside)
            where = (split * shape.heads + head * group + query) * 2
            one = inside & j.equals(0)
            m.send(self.mailbox("weights", where), m.as_bits(top), self.flag, one)
            m.send(self.mailbox("weights", where + 1), m.as_bits(self.sum(below)), self.flag, one)

    def merge(self, task: Any) -> None:
        """Attention at the channels of a split of the output projection, each lane some of them."""
        m = self.m
        for i in range(-(-self.cuts["attn_out"].channels // self.threads)):
            own = self.thread + i * self.threads

            def merge_one(own: Any = own) -> None:
                m.write(self.smem("merged", own), [m.as_bits(self.merged(task.first_channel + own))])

            m.when(own < task.channels, merge_one)
        m.sync()

    def merged(self, channel: Any) -> Any:
        """Attention at a channel, from the splits."""
        m, shape = self.m, self.shape
        head = channel // shape.head_dim
        top, below, above = m.float32(NOTHING), m.float32(0.0), m.float32(0.0)
        for first in range(0, self.config.attention_splits, MERGED_AT_ONCE):
            splits = range(first, min(first + MERGED_AT_ONCE, self.config.attention_splits))
            weights = [(self.mailbox("weights", (head + s * shape.heads) * 2), self.always) for s in splits]
            outs = [(self.mailbox("attended", channel + s * shape.attended), self.always) for s in splits]
            words = [m.as_float(word) for word in m.poll(weights, outs, self.flag)]
            tops, sums, parts = words[: 2 * len(splits) : 2], words[1 : 2 * len(splits) : 2], words[2 * len(splits) :]
            new = top
            for t in tops:
                new = m.maximum(new, t)
            shrink = m.exp(top - new)
            above, below, top = above * shrink, below * shrink, new
            for t, weight, part in zip(tops, sums, parts, strict=True):
                share = m.exp(t - top)
                above, below = m.fma(share, part, above), m.fma(share, weight, below)
        return m.round_bfloat16(above / below)
