"""Tables held in vector registers: the machine under ``lut``, ``shift_add`` and ``binary``.

A register of 16 float32 is a table of 16 entries, and one permute instruction reads it at 16
places at once: 16 rows look up the same table, each at its own 4 bits. Numba does not emit that
instruction for ``table[index]`` (it emits a gather, one load a lane), so the inner loops here are
written in LLVM's own language: ``vpermps`` with AVX-512, two half tables and a blend with AVX2, 16
plain loads elsewhere (right everywhere, fast on the first two).

Words come in tiles of 64 rows (four registers): int32 [tiles, words a row, planes, 64], read from
beginning to end in the order in which they lie. All Numba code stays in this one file, because
Numba's cache watches only the file of the function that it compiled.
"""

import numpy as np

from lib.kernels.dispatch import OPTIONS, njit, numba, prange

LANES, TILE = 16, 64
VECTORS = TILE // LANES
# The signs of four activations, for each of the 16 patterns of four bits.
SIGNS = np.array([[1 if i >> j & 1 else -1 for i in range(16)] for j in range(4)], np.float32)


if numba is None:
    sum_lookups = sum_products = widen = None
else:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    I32, F32 = ir.IntType(32), ir.FloatType()
    INDEX, VALUE = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
    LOOSE = ("reassoc", "contract", "nsz")

    def _start(context, builder, kind, array):
        """Where a flat array's first element lies."""
        return context.make_array(kind)(context, builder, array).data

    def _after(builder, place, *counts):
        """The place so many elements on: Python numbers or values of LLVM."""
        for n in counts:
            n = ir.IntType(64)(n) if isinstance(n, int) else n
            place = builder.gep(place, [n])
        return place

    def _read(builder, place, as_type):
        """What lies there, as ``as_type`` (possibly a vector)."""
        return builder.load(builder.bitcast(place, as_type.as_pointer()), align=4)

    def _half(builder, vector, part):
        kept = ir.Constant(ir.VectorType(I32, 8), list(range(8 * part, 8 * part + 8)))
        return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), kept)

    def _look_up(context, builder, place, index):
        """The table of 16 at ``place`` at ``index & 15``, lane by lane."""
        table = _read(builder, place, VALUE)
        features = context.codegen().magic_tuple()[2].split(",")

        def call(name, *args):
            kind = ir.FunctionType(args[0].type, [a.type for a in args])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

        if "+avx512f" in features:
            return call("llvm.x86.avx512.permvar.sf.512", table, index)
        if "+avx2" in features:
            parts = []
            for part in (0, 1):
                at = _half(builder, index, part)
                halves = [_half(builder, table, p) for p in (0, 1)]
                low, high = (call("llvm.x86.avx2.permps", half, at) for half in halves)
                bit = builder.and_(at, ir.Constant(at.type, [8] * 8))
                upper = builder.icmp_unsigned("!=", bit, ir.Constant(at.type, [0] * 8))
                parts.append(builder.select(upper, high, low))
            whole = ir.Constant(INDEX, list(range(16)))
            return builder.shuffle_vector(*parts, whole)
        index = builder.and_(index, ir.Constant(INDEX, [15] * LANES))
        found = ir.Constant(VALUE, ir.Undefined)
        for lane in range(LANES):
            value = builder.load(builder.gep(place, [builder.extract_element(index, I32(lane))]))
            found = builder.insert_element(found, value, I32(lane))
        return found

    class _Sums:
        """The four running registers of a tile: begin with ``acc``, end by writing it back."""

        def __init__(self, builder, acc):
            self.builder = builder
            self.places = [_after(builder, acc, LANES * v) for v in range(VECTORS)]
            self.slots = [cgutils.alloca_once(builder, VALUE) for _ in self.places]
            for place, slot in zip(self.places, self.slots, strict=True):
                builder.store(_read(builder, place, VALUE), slot)

        def add(self, v, values):
            total = self.builder.fadd(self.builder.load(self.slots[v]), values, flags=LOOSE)
            self.builder.store(total, self.slots[v])

        def finish(self):
            for place, slot in zip(self.places, self.slots, strict=True):
                place = self.builder.bitcast(place, VALUE.as_pointer())
                self.builder.store(self.builder.load(slot), place, align=4)

    @intrinsic
    def sum_lookups(typing, tables, t, words, w, step, count, acc):
        """acc[r] += Σ_i Σ_k tables[t + 128 i + 16 k + (words[w + step·i + r] >> 4 k & 15)].

        For the 64 rows r of a tile, ``count`` words i and the 8 nibbles k of a word.
        """
        ints = types.intp
        signature = types.void(tables, ints, words, ints, ints, ints, acc)

        def codegen(context, builder, signature, args):
            t, w, step, count = (args[i] for i in (1, 3, 4, 5))
            tables, words, acc = (
                _start(context, builder, signature.args[i], args[i]) for i in (0, 2, 6)
            )
            sums = _Sums(builder, acc)
            with cgutils.for_range(builder, count) as loop:
                word = _after(builder, words, w, builder.mul(loop.index, step))
                table = _after(builder, tables, t, builder.shl(loop.index, loop.index.type(7)))
                index = [
                    _read(builder, _after(builder, word, LANES * v), INDEX) for v in range(VECTORS)
                ]
                for k in range(8):
                    place = _after(builder, table, 16 * k)
                    shift = ir.Constant(INDEX, [4 * k] * LANES)
                    for v in range(VECTORS):
                        at = builder.lshr(index[v], shift)
                        sums.add(v, _look_up(context, builder, place, at))
            sums.finish()
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic
    def sum_products(typing, book, words, w, count, width, each, x, j, acc):
        """acc[r] += Σ_i Σ_k book[words[w + 64 i + r] >> width·k & 15] · x[j + each·i + k].

        For the 64 rows r of a tile, ``count`` words i and the ``each`` codes k of a word.
        """
        ints = types.intp
        signature = types.void(book, words, ints, ints, ints, ints, x, ints, acc)

        def codegen(context, builder, signature, args):
            w, count, width, each, j = (args[i] for i in (2, 3, 4, 5, 7))
            book, words, x, acc = (
                _start(context, builder, signature.args[i], args[i]) for i in (0, 1, 6, 8)
            )

            def spread(value, kind):
                none = ir.Constant(kind, ir.Undefined)
                one = builder.insert_element(none, value, I32(0))
                return builder.shuffle_vector(one, none, ir.Constant(INDEX, [0] * LANES))

            sums = _Sums(builder, acc)
            shift = spread(builder.trunc(width, I32), INDEX)
            index = [cgutils.alloca_once(builder, INDEX) for _ in range(VECTORS)]
            with cgutils.for_range(builder, count) as outer:
                word = _after(builder, words, w, builder.shl(outer.index, outer.index.type(6)))
                for v in range(VECTORS):
                    builder.store(_read(builder, _after(builder, word, LANES * v), INDEX), index[v])
                factors = _after(builder, x, j, builder.mul(outer.index, each))
                with cgutils.for_range(builder, each) as inner:
                    factor = spread(builder.load(_after(builder, factors, inner.index)), VALUE)
                    for v in range(VECTORS):
                        now = builder.load(index[v])
                        weight = _look_up(context, builder, book, now)
                        sums.add(v, builder.fmul(weight, factor, flags=LOOSE))
                        builder.store(builder.lshr(now, shift), index[v])
            sums.finish()
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic
    def widen(typing, stored):
        """A stored scale as float32: a finite float16's bits (int16) or a power of two (uint8).

        The byte of a power of two is its sign and 7 bits e: ±2^(e − 95), and 0 where e = 0.
        """

        def codegen(context, builder, signature, args):
            if signature.args[0] == types.int16:  # by hand: not every CPU converts float16
                half = builder.zext(args[0], I32)
                bits = builder.shl(builder.and_(half, I32(0x7FFF)), I32(13))
                value = builder.fmul(builder.bitcast(bits, F32), ir.Constant(F32, 2.0**112))
                sign = builder.shl(builder.and_(half, I32(0x8000)), I32(16))
                return builder.bitcast(builder.or_(builder.bitcast(value, I32), sign), F32)
            byte = builder.zext(args[0], I32)
            exponent = builder.and_(byte, I32(127))
            bits = builder.shl(builder.add(exponent, I32(127 - 95)), I32(23))
            zero = builder.icmp_unsigned("==", exponent, I32(0))
            sign = builder.shl(builder.and_(byte, I32(128)), I32(24))
            return builder.bitcast(builder.or_(builder.select(zero, I32(0), bits), sign), F32)

        return types.float32(stored), codegen


@njit(parallel=True, **OPTIONS)
def planes(words, scales, offsets, x, doubling, span, out):
    """out[b, r] = Σ_g (Σ_p scale_gp(r) Σ_c ±_p(r, c) x[b, c] + offset_g(r) Σ_c x[b, c]), c in g.

    Args:
        words: int32 [tiles, blocks, planes, 64]: bit k of a word is the sign at column 32·block+k.
        scales: int16 or uint8 (see ``widen``) [tiles, groups, scales a group, 64]; with
            ``doubling`` one a group, else the same number for each plane, which add.
        offsets: like scales [tiles, groups, 1, 64], or with no groups.
        x: float32 [batch, 32·blocks].
        doubling: plane p counts 2^(planes − 1 − p) times.
        span: blocks in a group (the last may have fewer).
        out: float32 [batch, 64·tiles].
    """
    tiles, blocks, n_planes = words.shape[0], words.shape[1], words.shape[2]
    groups, terms = scales.shape[1], scales.shape[2] // (1 if doubling else n_planes)
    batch = len(x)
    tables = np.empty((batch, 8 * blocks, 16), np.float32)
    totals = np.zeros((batch, groups), np.float32)
    for b in range(batch):
        for t in range(8 * blocks):
            for i in range(16):
                tables[b, t, i] = (
                    SIGNS[0, i] * x[b, 4 * t]
                    + SIGNS[1, i] * x[b, 4 * t + 1]
                    + SIGNS[2, i] * x[b, 4 * t + 2]
                    + SIGNS[3, i] * x[b, 4 * t + 3]
                )
            totals[b, t // (8 * span)] += tables[b, t, 15]
    flat, stream = tables.reshape(-1), words.reshape(-1)
    for tile in prange(tiles):
        acc = np.empty(TILE, np.float32)
        y = np.zeros((batch, TILE), np.float32)
        for g in range(groups):
            start = g * span
            count = min(span, blocks - start)
            for b in range(batch):
                table = (b * blocks + start) * 128
                acc[:] = 0
                for p in range(n_planes):
                    if p > 0:
                        for r in range(TILE):
                            acc[r] = acc[r] + acc[r] if doubling else np.float32(0)
                    word = ((tile * blocks + start) * n_planes + p) * TILE
                    sum_lookups(flat, table, stream, word, n_planes * TILE, count, acc)
                    if not doubling:
                        for r in range(TILE):
                            scale = widen(scales[tile, g, p * terms, r])
                            for s in range(p * terms + 1, p * terms + terms):
                                scale += widen(scales[tile, g, s, r])
                            y[b, r] += scale * acc[r]
                if doubling:
                    for r in range(TILE):
                        y[b, r] += widen(scales[tile, g, 0, r]) * acc[r]
                if offsets.shape[1] > 0:
                    for r in range(TILE):
                        y[b, r] += widen(offsets[tile, g, 0, r]) * totals[b, g]
        for b in range(batch):
            for r in range(TILE):
                out[b, tile * TILE + r] = y[b, r]


@njit(parallel=True, **OPTIONS)
def codes(words, book, scales, x, width, each, out):
    """out[b, r] = scale(r) Σ_c book[code(r, c)] x[b, c].

    Args:
        words: int32 [tiles, words a row, 1, 64]: ``each`` codes of ``width`` bits a word, the
            first lowest.
        book: float32 [16]; codes of fewer than 4 bits find their value at every place that ends
            in their bits.
        scales: uint8 or int16 (see ``widen``) [tiles, 64].
        x: float32 [batch, each · words a row].
        out: float32 [batch, 64·tiles].
    """
    tiles, n_words, batch = words.shape[0], words.shape[1], len(x)
    stream, values = words.reshape(-1), x.reshape(-1)
    for tile in prange(tiles):
        acc = np.empty(TILE, np.float32)
        for b in range(batch):
            acc[:] = 0
            at, j = tile * n_words * TILE, b * n_words * each
            sum_products(book, stream, at, n_words, width, each, values, j, acc)
            for r in range(TILE):
                out[b, tile * TILE + r] = widen(scales[tile, r]) * acc[r]
