"""A Python function of (b, h, q, kv) with run-time arguments -> its expression with every slot filled, in each call.

    given     what a call passes by name                 checked against the function's own keywords
    implied   what follows from the sizes of the call    by names that nobody can pass
    captured  what the function's code reads by itself   looked up again at each call

A trace is found by the kinds of all these (`traces`), and its slots are filled with their values. Under torch.compile
dynamo follows `bind`. The trace it can't follow: that is made aside, on stand-ins for the arguments, and dynamo reads
the result off the function as plain data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, ClassVar, Final, NamedTuple, Self, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from maskflash.expr.evaluate import Inputs
from maskflash.functions.sizes import Fits, Sizes
from maskflash.functions.slots import Slots, aside, bits_of_hex
from maskflash.functions.traces import (
    Case,
    Exact,
    Kinds,
    Reading,
    Record,
    Traces,
    exact_of,
    kind_of,
    open_names,
    put,
    stand_ins,
)
from maskflash.ground import arguments
from maskflash.trace.sources import is_captured
from maskflash.trace.trace import Traced

F = TypeVar("F", bound="Function")
T = TypeVar("T")

_NOTHING: Final = Reading()
_MOST_MADE: Final = 64  # of what graphs make of two functions; the first to come is the first to go
_MOST_RECIPES: Final = 4096

_numbers = count()
_numbered: WeakValueDictionary[str, Function] = WeakValueDictionary()  # those that were paired with another, by number
_recipes: OrderedDict[str, Recipe] = OrderedDict()  # by the attribute that holds what they make


class Identity:
    """Equal to itself alone."""


class Recipe(NamedTuple):
    """How a function makes something of itself, and perhaps of another function.

    Attributes:
        make: gets the function, the other one if there is one, and `how`.
        number: of the other one.
        how: in which way.
    """

    make: Callable[..., Any]
    number: str = ""
    how: tuple[str, ...] = ()


class Bound(NamedTuple):
    """A function in one call.

    Attributes:
        slots: its expression, and what fills it.
        params: the numbers, of floats their 64 bits.
        tables: the tensors; those that it captured are on the device of the call.
    """

    slots: Slots
    params: list[int]
    tables: list[Tensor]

    @property
    def inputs(self) -> Inputs:
        """The values of all slots, floats as they are."""
        return Inputs(self.slots.expr.decoded(self.params), tuple(self.tables))


class Function:
    """What a function with run-time arguments has to say of itself, whatever it returns.

    Attributes:
        name: what messages call it.
        keywords: names of the arguments it takes at run time.
        defaults: values of those that may be left out.
        implied_names: arguments that follow from a call, by names that nobody can pass.
        sizes: which of a call's "q_len", "kv_len", "batch" and "heads" it depends on, rather than just its pairs.
        fits: what its tables are made for.
        traces: its traces so far.
        identity: what no other function of this process has, those that are gone included.
        number: likewise, a text that dynamo guards; there once a graph has made something with the function.
        reachable: attributes that its `__call__` reads, which a function that calls it captures with it.
    """

    reachable: ClassVar[tuple[str, ...]] = ()
    number: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """One that is not there yet, outside of graphs: what is called aside has no look at what a graph makes."""
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(
                f"maskflash makes a {cls.__name__} here, for which torch.compile breaks the graph: make masks and "
                "score functions outside of what is compiled; what varies goes in by keyword"
            )
        return super().__new__(cls)

    def __init__(
        self,
        name: str,
        keywords: tuple[str, ...],
        defaults: dict[str, Any],
        implied_names: tuple[str, ...] = (),
        sizes: tuple[str, ...] = (),
        fits: Fits | None = None,
    ) -> None:
        self.name = name
        self.keywords = keywords
        self.defaults = defaults
        self.implied_names = implied_names
        self.sizes = sizes
        self.fits = fits
        self.traces: Traces = Traces(self.retrace)
        self.identity: Identity = Identity()

    def __call__(self, *indices: Any, **mask_args: Any) -> Any:
        """The value at a pair, (b, h, q, kv) or what else it takes: numbers, tensors or the symbols of a trace."""
        raise NotImplementedError

    # What kinds of functions differ in

    def trace(self, mask_args: dict[str, Any]) -> Traced:
        """The expression for arguments like these, made now; what is captured comes into its slots by name."""
        raise NotImplementedError

    def plain(self, traced: Traced) -> Slots:
        """A trace as plain data."""
        return Slots.of(traced)

    def implied(self, sizes: Sizes) -> dict[str, int]:
        """The values of `implied_names` in a call.

        Raises:
            ArgumentError: the function has sizes of its own, and the call doesn't fit them.
        """
        if self.fits is not None:
            self.fits.check(self.name, sizes)
        return {}

    def look(self) -> int:
        """Read again what is captured; another number if something else is there now."""
        return 0

    def reading(self) -> Reading:
        """What is captured, as `look` found it."""
        return _NOTHING

    def read(self) -> dict[str, Any]:
        """What fills captured slots, read now and in dynamo's sight, which makes inputs or guards of it."""
        return {}

    @property
    def followed(self) -> bool:
        """Whether `look` sees all that is captured; else the function is traced at each call."""
        return True

    def held(self) -> tuple[Tensor, ...]:
        """Tensors that the function looks up, besides its arguments."""
        return self.reading().tensors

    # What all have

    def bind(self, sizes: Sizes, given: dict[str, Any], stamp: int | None = None) -> Bound:
        """The function in a call.

        Args:
            sizes: of the call.
            given: its keyword arguments.
            stamp: what `look` has given in this very call, if it was asked.

        Raises:
            ArgumentError: an argument, or a size, that the function has no use for.
            ArgumentTypeError: an argument that is missing, or of a wrong type.
            MaskTraceError: the function does something that can't become an expression.
        """
        values: Mapping[str, Any] = self.implied(sizes)
        if given or self.keywords:
            values = {**arguments.mask_args(sizes.operation, given, self.keywords, self.defaults), **values}
        slots, values = self.slots(values, stamp)
        return Bound(slots, *slots.filled(values, sizes.device))

    def slots(self, given: Mapping[str, Any], stamp: int | None = None) -> tuple[Slots, Mapping[str, Any]]:
        """The slots for checked arguments (see `arguments.mask_args`), and all values that may fill them."""
        if torch.compiler.is_dynamo_compiling():
            return self._slots_of_dynamo(given)
        if stamp is None:
            stamp = self.look()
        if not given:
            plain = self.traces.plain  # read once: another thread may put another there
            if plain is not None and plain[0] == stamp:
                return plain[1], plain[2]
        while self.followed:
            now = self.reading()
            values = {**given, **now.slots}
            kinds = tuple([kind_of(name, value) for name, value in values.items()])
            found = self._find(kinds, values)
            if found is not None and self.reading().stamp == now.stamp:  # else the function changed it when traced
                if not given:
                    self.traces.plain = now.stamp, found, now.slots
                return found, values
        return self._unfollowed(dict(given)), {**given, **self.reading().slots}

    def _slots_of_dynamo(self, given: Mapping[str, Any]) -> tuple[Slots, dict[str, Any]]:
        values = {**given, **self.read()}
        kinds = tuple([kind_of(name, value) for name, value in values.items()])
        found = None
        while found is None:
            found = self._find(kinds, values)
        real = (float, torch.SymFloat)  # a graph's numbers are integers, so a float is a constant
        return found, {name: bits_of_hex(x.hex()) if isinstance(x, real) else x for name, x in values.items()}

    def _find(self, kinds: Kinds, values: dict[str, Any]) -> Slots | None:
        """The slots for values of these kinds; None if a trace has just shown that more of them matter."""
        exact = tuple([(name, exact_of(name, values[name])) for name in self.depends(kinds)])
        name = self.slots_name(kinds, exact)
        found: Slots | None = None if name is None else getattr(self.traces, name)
        return found

    @aside
    def depends(self, kinds: Kinds) -> tuple[str, ...]:
        """The values (of tensors the layout) that traces for these kinds are known to depend on."""
        case = self._case(kinds)
        names = self.traces.depends(case)
        if names is None:
            open_ = open_names(kinds)
            try:
                self._trace(kinds, {})
            except Exception:  # it may do with the true values; if not, the error had better name those
                if all(map(is_captured, open_)):
                    raise
                self.traces.depend(case, open_)
            names = self.traces.depends(self._case(kinds))
        return names or ()

    @aside
    def slots_name(self, kinds: Kinds, exact: Exact) -> str | None:
        """Which attribute of `traces` has the slots for these; None if a trace depends on more than `exact` has."""
        name = self.traces.name(self._case(kinds), exact)
        if name is None and self.followed:
            self._trace(kinds, dict(exact))
            name = self.traces.name(self._case(kinds), exact)
        return name

    def _case(self, kinds: Kinds) -> Case:
        return self.reading().structure, kinds

    def _trace(self, kinds: Kinds, exact: dict[str, Any]) -> None:
        """Trace the function on stand-ins of these kinds, and keep what comes of it."""
        given = stand_ins(kinds, exact)
        now = self.reading()
        traced = self.trace(given)
        if self.followed and self.look() != now.stamp:  # another thread, or the function itself, has changed captures
            now = self.reading()
            traced = self.trace(given)
        if not self.followed:  # as the trace has shown
            return
        case = now.structure, kinds
        names = self.traces.depend(case, open_names(kinds) & traced.specialised)
        values = {**given, **now.slots}
        self.traces.keep(case, tuple((x, exact_of(x, values[x])) for x in names), self.plain(traced))

    def retrace(self, case: Case, exact: Exact) -> None:
        """Have the slots of a case and such values among the traces, if that is how things are here."""
        self.look()
        if self.followed and self.reading().structure == case[0]:
            self._trace(case[1], dict(exact))

    def _unfollowed(self, given: dict[str, Any]) -> Slots:
        traced = self.trace(given)
        kinds = tuple(kind_of(name, value) for name, value in given.items())
        exact = tuple((name, exact_of(name, given[name])) for name in sorted(open_names(kinds)))
        self.traces.unfollowed = Record(kinds, exact, traced)
        return self.plain(traced)

    def traced(self, given: dict[str, Any]) -> Traced:
        """The trace for checked arguments, with what is captured now in its slots."""
        slots, values = self.slots(given)
        return slots.traced.filled(values)

    # What is made of a function, and found on it

    def twin(self, make: Callable[[Any], T]) -> T:
        """`make(self)`, made at the first call: its traces are kept as long as this function's are."""
        return self._made(f"made_{make.__name__}", make)

    def pair(self, make: Callable[..., T], other: Function, *how: str) -> T:
        """`make(self, other, *how)`, of this function and another one.

        A graph finds it on this function, where it is made once: what a graph makes by itself is new in each run, and
        guards on it never hold.
        """
        if not torch.compiler.is_dynamo_compiling():
            return make(self, other, *how)
        other._be_found()
        return self._made("_".join(("made", make.__name__, other.number, *how)), make, other.number, how)

    def _made(self, name: str, make: Callable[..., T], number: str = "", how: tuple[str, ...] = ()) -> T:
        self._make(name, make, number, how)
        found: T = getattr(self, name)
        return found

    @aside
    def _be_found(self) -> None:
        if "number" not in vars(self):
            self.number = f"n{next(_numbers)}"
            _numbered[self.number] = self

    @aside
    def _make(self, name: str, make: Callable[..., Any], number: str, how: tuple[str, ...]) -> None:
        if name not in vars(self):
            put(_recipes, name, Recipe(make, number, how), _MOST_RECIPES)
            self.__getattr__(name)

    def __getattr__(self, name: str) -> Any:
        """What a graph's guards look for on another function than it was made with, made now as that one's was."""
        recipe = _recipes.get(name)
        if recipe is not None:
            others = [_numbered[recipe.number]] if recipe.number in _numbered else []
            if bool(recipe.number) == bool(others):
                made = recipe.make(self, *others, *recipe.how)
                setattr(self, name, made)
                self._drop_oldest()
                return made
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _drop_oldest(self) -> None:
        pairs = [name for name in vars(self) if name in _recipes and _recipes[name].number]
        for name in pairs[:-_MOST_MADE]:
            delattr(self, name)

    def known(self) -> Traced | None:
        """A trace: the only one, or the latest; None for a function whose arguments nobody gave yet."""
        if not self.keywords:
            return self.traced(dict.fromkeys(self.implied_names, 1))
        self.look()
        now = self.reading()
        latest = self.traces.latest(now.structure)
        return latest and latest.filled(now.slots)

    def __repr__(self) -> str:
        return self.name
