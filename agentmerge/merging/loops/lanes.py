"""Loops over arrays that use every lane of the processor, compiled by LLVM while the program runs.

A loop's body is Python that computes on ``Lanes``, one value for each of ``WIDTH`` neighbouring
elements, as if they were numbers. It runs once and leaves machine code. Compilers that look for
lanes by themselves (numba's was tried) missed or undid them in half of these loops; here nothing is
left to find. This module knows element types and arithmetic, and nothing of merges.

Arithmetic is IEEE's in the order written: nothing is reassociated, nothing is fused but ``fma``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

#: Elements worked on at once: two vectors of float32 on the widest processors of today, so that
#: one has work while the other waits.
WIDTH = 32
#: Values that a lane adds in the working type before the sum goes to float64; a power of two.
_FLUSH = 16

_BIT, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_FLOAT, _DOUBLE, _HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
_STORED = {
    "bfloat16": _I16,
    "float16": _HALF,
    "float32": _FLOAT,
    "float64": _DOUBLE,
    "int32": _I32,
    "int64": _I64,
}
_WORKING = {"float32": _FLOAT, "float64": _DOUBLE}
#: A float's exponent, all ones where it is not finite.
_EXPONENTS = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float32": 0x7F800000,
    "float64": 0x7FF0000000000000,
}
#: What a loop is given besides start and stop, by place; ``machine.Compiled`` passes them.
_ADDRESSES, _REALS, _WORDS, _SUMS, _COUNTS = range(5)
_SIGNATURE = ir.FunctionType(
    ir.VoidType(),
    [_I64, _I64, *(kind.as_pointer() for kind in (_I64, _DOUBLE, _I32, _DOUBLE, _I64))],
)


class Lanes:
    """One value a lane: floats of the working type, integers of 32 or 64 bits, or truths."""

    __slots__ = ("loop", "value")

    def __init__(self, loop: Loop, value: Any) -> None:
        self.loop, self.value = loop, value

    def __add__(self, other: Lanes) -> Lanes:
        build = self.loop.build
        return self._with(build.fadd if self.is_float else build.add, other)

    def __sub__(self, other: Lanes) -> Lanes:
        build = self.loop.build
        return self._with(build.fsub if self.is_float else build.sub, other)

    def __mul__(self, other: Lanes) -> Lanes:
        build = self.loop.build
        return self._with(build.fmul if self.is_float else build.mul, other)

    def __truediv__(self, other: Lanes) -> Lanes:
        return self._with(self.loop.build.fdiv, other)

    def __and__(self, other: Lanes) -> Lanes:
        return self._with(self.loop.build.and_, other)

    def __or__(self, other: Lanes) -> Lanes:
        return self._with(self.loop.build.or_, other)

    def __xor__(self, other: Lanes) -> Lanes:
        return self._with(self.loop.build.xor, other)

    def __rshift__(self, places: int) -> Lanes:
        amount = self.loop.same(ir.Constant(_scalar(self.value.type), places))
        return Lanes(self.loop, self.loop.build.lshr(self.value, amount))

    def __lt__(self, other: Lanes) -> Lanes:
        return self._compared("<", other)

    def __le__(self, other: Lanes) -> Lanes:
        return self._compared("<=", other)

    def __gt__(self, other: Lanes) -> Lanes:
        return self._compared(">", other)

    def __ge__(self, other: Lanes) -> Lanes:
        return self._compared(">=", other)

    @property
    def is_float(self) -> bool:
        return _scalar(self.value.type) in (_FLOAT, _DOUBLE)

    def equals(self, other: Lanes) -> Lanes:
        return self._compared("==", other)

    def differs(self, other: Lanes) -> Lanes:
        return self._compared("!=", other)

    def _with(self, operation: Callable[[Any, Any], Any], other: Lanes) -> Lanes:
        return Lanes(self.loop, operation(self.value, other.value))

    def _compared(self, sign: str, other: Lanes) -> Lanes:
        build = self.loop.build
        compare = build.fcmp_ordered if self.is_float else build.icmp_unsigned
        return Lanes(self.loop, compare(sign, self.value, other.value))


class Loop:
    """What a body computes with, at one width: ``WIDTH``, or 1 for the elements that are left.

    stored: the dtype of each array, by its place among the addresses. working: the float type that
        is computed in, float32 or float64.
    """

    def __init__(
        self, entry: Any, arguments: Sequence[Any], stored: Sequence[str], working: str, width: int
    ) -> None:
        self._entry, self._arguments = entry, arguments
        self._stored, self._working, self._width = stored, _WORKING[working], width
        self._given: dict[tuple[int, int], Any] = {}
        self._sums: dict[int, Any] = {}
        self._parts: dict[int, Any] = {}
        self._counts: dict[int, Any] = {}
        self._highest: dict[int, Any] = {}
        self.build: Any = None
        self._at: Any = None

    def position(self, build: Any, at: Any) -> None:
        """Where the body's instructions go, and the first lane's element."""
        self.build, self._at = build, at

    # What goes in

    def load(self, array: int) -> Lanes:
        """The elements of an array of floats, exactly, in the working type."""
        kind = self._stored[array]
        value = self._read(array, self._at)
        if kind == "bfloat16":
            wide = self.build.zext(value, self._lanes(_I32))
            value = self.build.shl(wide, self.same(ir.Constant(_I32, 16)))
            value = self.build.bitcast(value, self._lanes(_FLOAT))
        return Lanes(self, self._cast(value, self._working))

    def load_integers(self, array: int, period: int = 0) -> Lanes:
        """The elements of an array of signed integers, as 64-bit ones.

        period: a power of two that ``WIDTH`` divides; the array repeats after so many elements.
        """
        at = self._at
        if period:
            at = self.build.and_(at, ir.Constant(_I64, period - 1))
        value = self._read(array, at)
        if _scalar(value.type) != _I64:
            value = self.build.sext(value, self._lanes(_I64))
        return Lanes(self, value)

    def number(self, value: float) -> Lanes:
        return Lanes(self, self.same(ir.Constant(self._working, value)))

    def word(self, value: int) -> Lanes:
        return Lanes(self, self.same(ir.Constant(_I32, value)))

    def long(self, value: int) -> Lanes:
        """A 64-bit integer."""
        return Lanes(self, self.same(ir.Constant(_I64, value)))

    def given_number(self, place: int) -> Lanes:
        """A number that the call gives, rounded to the working type."""
        return Lanes(self, self._once(_REALS, place, self._working))

    def given_word(self, place: int) -> Lanes:
        """A 32-bit word that the call gives."""
        return Lanes(self, self._once(_WORDS, place, _I32))

    def places(self) -> Lanes:
        """Each lane's element number, in 64 bits."""
        first = self._spread(self.build, self._at)
        if self._width == 1:
            return Lanes(self, first)
        steps = ir.Constant(self._lanes(_I64), list(range(self._width)))
        return Lanes(self, self.build.add(first, steps))

    def low_places(self) -> Lanes:
        """Each lane's element number modulo 2**32, as a word."""
        first = self._spread(self.build, self.build.trunc(self._at, _I32))
        if self._width == 1:
            return Lanes(self, first)
        steps = ir.Constant(self._lanes(_I32), list(range(self._width)))
        return Lanes(self, self.build.add(first, steps))

    # What is computed, besides the operators of ``Lanes``

    def where(self, truth: Lanes, one: Lanes, other: Lanes) -> Lanes:
        return Lanes(self, self.build.select(truth.value, one.value, other.value))

    def negated_unless(self, truth: Lanes, lanes: Lanes) -> Lanes:
        """Floats as they are where ``truth`` holds, with the other sign elsewhere."""
        kind = lanes.value.type
        bits = ir.IntType(8 * _bytes(_scalar(kind)))
        none, sign = (self.same(ir.Constant(bits, value)) for value in (0, 1 << bits.width - 1))
        turn = self.build.select(truth.value, none, sign)
        turned = self.build.xor(self.build.bitcast(lanes.value, self._lanes(bits)), turn)
        return Lanes(self, self.build.bitcast(turned, kind))

    def fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
        """a times b plus c, rounded once."""
        return Lanes(self, self._intrinsic("llvm.fma", a, b, c))

    def absolute(self, lanes: Lanes) -> Lanes:
        return Lanes(self, self._intrinsic("llvm.fabs", lanes))

    def single(self, lanes: Lanes) -> Lanes:
        """In float32, whatever the working type."""
        return Lanes(self, self._cast(lanes.value, _FLOAT))

    def double(self, lanes: Lanes) -> Lanes:
        """In float64, whatever the working type."""
        return Lanes(self, self._cast(lanes.value, _DOUBLE))

    def bits(self, single: Lanes) -> Lanes:
        """The bits of float32 values, as words."""
        return Lanes(self, self.build.bitcast(single.value, self._lanes(_I32)))

    # What comes out

    def store(self, array: int, lanes: Lanes) -> None:
        """Round to nearest, ties to even, and write; count 0 tells if anything was not finite.

        float64 goes to the 16-bit types by way of float32, as in torch.
        """
        kind = self._stored[array]
        value = self._cast(lanes.value, _DOUBLE if kind == "float64" else _FLOAT)
        if kind == "bfloat16":
            value = self._to_bfloat16(Lanes(self, value))
        else:
            value = self._cast(value, _STORED[kind])
        self.build.store(value, self._place(array, self._at), align=1)
        bits = ir.IntType(8 * _bytes(_STORED[kind]))
        unsigned = self.same(ir.Constant(bits, (1 << bits.width - 1) - 1))
        size = self.build.and_(self.build.bitcast(value, self._lanes(bits)), unsigned)
        variable = self._variable(self._highest, array, bits)
        highest = self.build.load(variable)
        larger = self.build.icmp_unsigned(">", size, highest)
        self.build.store(self.build.select(larger, size, highest), variable)

    def add_to_sum(self, place: int, lanes: Lanes) -> None:
        """Add to a float64 sum; each lane adds ``_FLUSH`` values in the working type first."""
        self._variable(self._sums, place, _DOUBLE)
        part = self._variable(self._parts, place, self._working)
        self.build.store(self.build.fadd(self.build.load(part), lanes.value), part)

    def add_to_count(self, place: int, lanes: Lanes) -> None:
        """Add 64-bit integers, or the number of truths, modulo 2**64."""
        value, lane_type = lanes.value, _scalar(lanes.value.type)
        if lane_type == _BIT:
            value = self.build.zext(value, self._lanes(_I64))
        variable = self._variable(self._counts, place, _I64)
        self.build.store(self.build.add(self.build.load(variable), value), variable)

    def collect(
        self, place: int, array: int, truth: Lanes, notes: Callable[[], Sequence[Lanes]], most: int
    ) -> None:
        """Append the element numbers where ``truth`` holds to an int64 array; a count counts them.

        notes: what else to write of these elements, as float64, in the arrays that follow; computed
            only where there is one. most: place of the given word that says how many are expected.
            The arrays have room for one more, where all beyond that go: elements of a file that is
            overwritten meanwhile are not those that were counted.
        """
        build, hits = self.build, truth.value
        if self._width > 1:
            hits = build.bitcast(hits, ir.IntType(self._width))
        none = ir.Constant(hits.type, 0)
        with build.if_then(build.icmp_unsigned("!=", hits, none), likely=False):
            count = self._argument(_COUNTS, place, build)
            limit = build.zext(self._loaded(_WORDS, most), _I64)
            values = [self._cast(note.value, _DOUBLE) for note in notes()]
            starts = [
                build.inttoptr(self._loaded(_ADDRESSES, array + at), kind.as_pointer())
                for at, kind in enumerate((_I64, *[_DOUBLE] * len(values)))
            ]
            for lane in range(self._width):
                bit = build.trunc(build.lshr(hits, ir.Constant(hits.type, lane)), _BIT)
                seen = build.load(count)
                noted = [self._lane(value, lane) for value in values]
                # Always written, and kept only where it counts: no branch a lane.
                element = build.add(self._at, ir.Constant(_I64, lane))
                within = build.icmp_unsigned("<", seen, limit)
                at = build.select(within, seen, limit)
                for start, value in zip(starts, (element, *noted), strict=True):
                    build.store(value, build.gep(start, [at]))
                build.store(build.add(seen, build.zext(bit, _I64)), count)

    def first_equal(self, place: int, words: Lanes, wanted: int, most: int) -> Lanes:
        """Where words equal a given one, the first so many times; a count counts them.

        wanted, most: places of the given words. The count is no more than ``most`` until the last
        ones, which are fewer than ``WIDTH``; after them it may be.
        """
        build, one = self.build, ir.Constant(_I64, 1)
        count = self._argument(_COUNTS, place, build)
        limit = build.zext(self._loaded(_WORDS, most), _I64)
        seen = build.load(count)
        if self._width == 1:
            equal = build.icmp_unsigned("==", words.value, self._loaded(_WORDS, wanted))
            build.store(build.add(seen, build.zext(equal, _I64)), count)
            return Lanes(self, build.and_(equal, build.icmp_unsigned("<", seen, limit)))
        sought = self._entry.alloca(self._lanes(_I32))
        self._entry.store(self._once(_WORDS, wanted, _I32), sought)
        truths = ir.IntType(self._width)
        equal = build.icmp_unsigned("==", words.value, build.load(sought))
        hits = build.bitcast(equal, truths)
        after = build.add(seen, build.zext(build.ctpop(hits), _I64))
        build.store(after, count)
        kept = self._entry.alloca(truths)
        build.store(hits, kept)
        with build.if_then(build.icmp_unsigned(">", after, limit), likely=False):
            # Once in a call: these are the last, and from here on nothing is sought.
            room, some = build.sub(limit, seen), ir.Constant(truths, 0)
            for lane in range(self._width):
                hit = build.trunc(build.lshr(hits, ir.Constant(truths, lane)), _BIT)
                has_room = build.icmp_unsigned(">", room, ir.Constant(_I64, 0))
                taken = build.and_(hit, has_room)
                bit = build.select(taken, ir.Constant(truths, 1 << lane), ir.Constant(truths, 0))
                some = build.or_(some, bit)
                room = build.select(taken, build.sub(room, one), room)
            build.store(some, kept)
            build.store(limit, count)
            build.store(self.same(ir.Constant(_I32, 0xFFFF_FFFF)), sought)
        return Lanes(self, build.bitcast(build.load(kept), self._lanes(_BIT)))

    def store_truth(self, array: int, truth: Lanes) -> None:
        """Write one bit an element. A loop that does must start at a multiple of ``WIDTH``, or end
        before it has gone so far."""
        build, place = self.build, self._truth_place(array)
        bits = build.bitcast(truth.value, ir.IntType(self._width))
        if self._width == 1:
            bit = build.trunc(build.and_(self._at, ir.Constant(_I64, 7)), _I8)
            others = build.xor(build.shl(ir.Constant(_I8, 1), bit), ir.Constant(_I8, 0xFF))
            old = build.and_(build.load(place, align=1), others)
            bits = build.or_(old, build.shl(build.zext(bits, _I8), bit))
        build.store(bits, place, align=1)

    def load_truth(self, array: int) -> Lanes:
        """What ``store_truth`` wrote: of eight elements, the first is the lowest bit."""
        bits = self.build.load(self._truth_place(array), align=1)
        if self._width == 1:
            bit = self.build.trunc(self.build.and_(self._at, ir.Constant(_I64, 7)), _I8)
            return Lanes(self, self.build.trunc(self.build.lshr(bits, bit), _BIT))
        return Lanes(self, self.build.bitcast(bits, self._lanes(_BIT)))

    def end_step(self) -> None:
        """Call it when the body is done: brings partial sums to float64 now and then."""
        if not self._parts:
            return
        build = self.build
        step = build.and_(self._at, ir.Constant(_I64, self._width * _FLUSH - 1))
        with build.if_then(build.icmp_unsigned("==", step, ir.Constant(_I64, 0)), likely=False):
            for place, part in self._parts.items():
                self._flush(build, part, self._sums[place])

    def finish(self, build: Any) -> None:
        """Bring the lanes' sums and counts together and hand them to the caller."""
        for array, variable in self._highest.items():
            bits = ir.IntType(8 * _bytes(_STORED[self._stored[array]]))
            limit = self.same(ir.Constant(bits, _EXPONENTS[self._stored[array]]))
            broken = build.icmp_unsigned(">=", build.load(variable), limit)
            broken = build.zext(broken, self._lanes(_I64))
            target = self._argument(_COUNTS, 0, build)
            for lane in range(self._width):
                part = self._lane(broken, lane, build)
                build.store(build.add(build.load(target), part), target)
        for place, part in self._parts.items():
            self._flush(build, part, self._sums[place])
        for place, variable in self._sums.items():
            self._hand_over(build, variable, self._argument(_SUMS, place, build), build.fadd)
        for place, variable in self._counts.items():
            self._hand_over(build, variable, self._argument(_COUNTS, place, build), build.add)

    def same(self, value: Any) -> Any:
        """A constant in every lane."""
        if self._width == 1:
            return value
        return ir.Constant(self._lanes(value.type), [value] * self._width)

    def _to_bfloat16(self, single: Lanes) -> Any:
        bits = self.bits(single)
        rounded = (bits + self.word(0x7FFF) + (bits >> 16 & self.word(1))) >> 16
        nan = Lanes(self, self.build.fcmp_unordered("uno", single.value, single.value))
        return self.build.trunc(
            self.where(nan, self.word(0x7FC0), rounded).value, self._lanes(_I16)
        )

    def _hand_over(self, build: Any, variable: Any, target: Any, operation: Any) -> None:
        value = build.load(variable)
        for lane in range(self._width):
            part = self._lane(value, lane, build)
            if part.type == _I32:
                part = build.zext(part, _I64)
            build.store(operation(build.load(target), part), target)

    def _lane(self, value: Any, lane: int, build: Any = None) -> Any:
        if self._width == 1:
            return value
        return (build or self.build).extract_element(value, ir.Constant(_I32, lane))

    def _flush(self, build: Any, part: Any, total: Any) -> None:
        wide = build.load(part)
        if self._working != _DOUBLE:
            wide = build.fpext(wide, self._lanes(_DOUBLE))
        build.store(build.fadd(build.load(total), wide), total)
        build.store(ir.Constant(self._lanes(self._working), None), part)

    def _lanes(self, kind: Any) -> Any:
        return kind if self._width == 1 else ir.VectorType(kind, self._width)

    def _cast(self, value: Any, kind: Any) -> Any:
        have, want = _bytes(_scalar(value.type)), _bytes(kind)
        if have == want:
            return value
        convert = self.build.fpext if have < want else self.build.fptrunc
        return convert(value, self._lanes(kind))

    def _read(self, array: int, at: Any) -> Any:
        return self.build.load(self._place(array, at), align=1)

    def _place(self, array: int, at: Any) -> Any:
        stored = _STORED[self._stored[array]]
        first = self.build.inttoptr(self._loaded(_ADDRESSES, array), stored.as_pointer())
        return self.build.bitcast(self.build.gep(first, [at]), self._lanes(stored).as_pointer())

    def _truth_place(self, array: int) -> Any:
        build, kind = self.build, ir.IntType(max(8, self._width))
        byte = build.lshr(self._at, ir.Constant(_I64, 3))
        return build.inttoptr(build.add(self._loaded(_ADDRESSES, array), byte), kind.as_pointer())

    def _once(self, argument: int, place: int, kind: Any) -> Any:
        value = self._loaded(argument, place)
        if value.type == _DOUBLE and kind == _FLOAT:
            value = self._entry.fptrunc(value, _FLOAT)
        return self._spread(self._entry, value)

    def _loaded(self, argument: int, place: int) -> Any:
        """What the call gives, read before the loop begins."""
        if (argument, place) not in self._given:
            pointer = self._argument(argument, place, self._entry)
            self._given[argument, place] = self._entry.load(pointer)
        return self._given[argument, place]

    def _argument(self, argument: int, place: int, build: Any) -> Any:
        return build.gep(self._arguments[argument], [ir.Constant(_I64, place)])

    def _spread(self, build: Any, value: Any) -> Any:
        if self._width == 1:
            return value
        empty = ir.Constant(self._lanes(value.type), ir.Undefined)
        first = build.insert_element(empty, value, ir.Constant(_I32, 0))
        return build.shuffle_vector(first, empty, ir.Constant(self._lanes(_I32), None))

    def _variable(self, known: dict[int, Any], place: int, kind: Any) -> Any:
        if place not in known:
            known[place] = self._entry.alloca(self._lanes(kind))
            self._entry.store(ir.Constant(self._lanes(kind), None), known[place])
        return known[place]

    def _intrinsic(self, name: str, *lanes: Lanes) -> Any:
        kind = lanes[0].value.type
        short = {_FLOAT: "f32", _DOUBLE: "f64"}[_scalar(kind)]
        name = f"{name}.{short if self._width == 1 else f'v{self._width}{short}'}"
        function = self.build.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(kind, [kind] * len(lanes))
            function = ir.Function(self.build.module, signature, name)
        return self.build.call(function, [each.value for each in lanes])


def llvm_text(body: Callable[[Loop], None], stored: Sequence[str], working: str) -> str:
    """LLVM's language for ``body`` over start to stop, as a function called ``loop``.

    stored, working: as in ``Loop``.
    """
    module = ir.Module("lanes")
    function = ir.Function(module, _SIGNATURE, "loop")
    start, stop, *arguments = function.args
    entry = ir.IRBuilder(function.append_basic_block("entry"))
    begin = function.append_basic_block("begin")
    build, at = ir.IRBuilder(begin), entry.alloca(_I64)
    entry.store(start, at)
    loops = [Loop(entry, arguments, stored, working, width) for width in (WIDTH, 1)]
    for loop, width in zip(loops, (WIDTH, 1), strict=True):
        test, inside, after = (function.append_basic_block(n) for n in ("test", "inside", "after"))
        build.branch(test)
        build.position_at_end(test)
        now = build.load(at)
        ahead = build.add(now, ir.Constant(_I64, width))
        build.cbranch(build.icmp_signed("<=", ahead, stop), inside, after)
        build.position_at_end(inside)
        loop.position(build, now)
        body(loop)
        loop.end_step()
        build.store(ahead, at)
        build.branch(test)
        build.position_at_end(after)
    for loop in loops:
        loop.finish(build)
    build.ret_void()
    entry.branch(begin)
    return str(module)


def _scalar(kind: Any) -> Any:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _bytes(kind: Any) -> int:
    return {_HALF: 2, _FLOAT: 4, _DOUBLE: 8}.get(kind) or kind.width // 8
