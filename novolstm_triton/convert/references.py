"""Who holds an object: the graph of Python objects that a model reaches, and replacing objects wherever they are held.

A module is not only in its parent's `_modules`. Lists, dictionaries, closures, bound methods and hooks hold it, too,
and go on calling it after it was replaced in one place only.
"""

import collections
import contextlib
import dis
import functools
import gc
import logging
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from novolstm_triton import pytorch

_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.Size,
)
_ATOMS += (types.ModuleType, types.CodeType, types.FrameType, types.TracebackType, logging.Logger, logging.Handler)
"""Types whose instances hold no module, or lead out of the model into the whole program."""

_REBUILT = (types.FunctionType, types.MethodType, functools.partial, weakref.ref, tuple, frozenset)
"""Types whose instances are made anew where they cannot be changed: immutable, or shared with something else."""

_EXPANDED = ("_modules", "_parameters", "_buffers")
"""Dictionaries of a module whose names are the module's own."""

_CACHES = ("_flat_weights", "_flat_weight_refs")
"""Attributes of an nn.LSTM that hold its parameters a second time."""

_KEY = "(key)"

_LIBRARIES = sys.stdlib_module_names | {"torch", "novolstm_triton"}
"""Packages whose classes are known to hold no modules of a program."""

Put = Callable[[Any, Any], None]
"""Puts a new object in the place of the present one: put(present, new)."""

Content = tuple[str, Any, Put | None]
"""Where an object has something, what, and what puts another thing there, if that can be done."""


class Link(NamedTuple):
    """A holder's hold on an object."""

    holder: Any
    label: str
    held: Any
    put: Put | None
    """Changes the holder; None where only a new holder helps, or nothing."""
    rebuilt: bool
    """Whether a new holder helps."""


class References:
    """All that a root reaches, and who holds it.

    Args:
        root: where to begin.
        shared: ids of objects that are not the root's alone, and are not changed for it. If there are any, what their
            classes hold beside functions is passed over: it is everybody's.
        named: ids of objects that count as reached, too, if code that is reached loads them as global variables.
        closed: ids of objects into which the search does not go.
    """

    def __init__(
        self, root: Any, shared: Collection[int] = (), named: Collection[int] = (), closed: Collection[int] = ()
    ) -> None:
        self._shared, self._named, self._root = shared, named, root
        # The objects themselves keep their ids from being given to others.
        self.reached: dict[int, Any] = {id(root): root}
        self._links: dict[int, list[Link]] = collections.defaultdict(list)
        queue = collections.deque([root])
        while queue:
            for link in self._held(queue.popleft()):
                key = id(link.held)
                self._links[key].append(link)
                if key not in self.reached:
                    self.reached[key] = link.held
                    if key not in closed:
                        queue.append(link.held)

    def holders(self, held: Any) -> Iterator[tuple[Any, str]]:
        """Yield the holders of an object, each with the path of the place."""
        for link in self._links[id(held)]:
            yield link.holder, self._path(link)

    def path(self, held: Any) -> str:
        """Return the shortest path from the root to an object, "" for the root."""
        return "" if held is self._root else self._path(self._links[id(held)][0])

    def obstacle(self, held: Any, new: Any) -> str | None:
        """Return the path of a place in which an object cannot be replaced by a new one, or None."""
        begun: set[int] = set()
        finished: set[int] = set()

        def can_change(link: Link, new: Any) -> bool:
            key, holder = id(link.holder), link.holder
            if link.put is not None or key in finished:
                return True
            if not link.rebuilt or not _fits(holder, link.held, new):
                return False
            if key in begun:
                # Of what is made anew only a function can hold itself.
                return isinstance(holder, types.FunctionType)
            begun.add(key)
            possible = all(can_change(further, holder) for further in self._links[key])
            if possible:
                finished.add(key)
            return possible

        return next((self._path(link) for link in self._links[id(held)] if not can_change(link, new)), None)

    def replace(self, replacements: Mapping[int, Any]) -> Callable[[], None]:
        """Put new objects in the places of others, none of which has an obstacle; return what undoes it.

        Args:
            replacements: the new objects by the ids of the old ones.
        """
        dirty = self._to_rebuild(replacements)
        renewal = _Renewal(replacements, dirty)
        links = [link for key in (*replacements, *dirty) for link in self._links[key] if link.put is not None]
        done: list[tuple[Put, Any, Any]] = []
        # Keys last: a value is found by the key that it has.
        for link in sorted(links, key=lambda link: link.label == _KEY):
            new = renewal.of(link.held)
            assert link.put is not None
            link.put(link.held, new)
            done.append((link.put, new, link.held))

        def undo() -> None:
            for put, new, old in reversed(done):
                put(new, old)

        return undo

    def _to_rebuild(self, replaced: Iterable[int]) -> set[int]:
        """Return the ids of the holders that have to be made anew."""
        dirty: set[int] = set()
        pending = list(replaced)
        while pending:
            for link in self._links[pending.pop()]:
                if link.put is None and link.rebuilt and id(link.holder) not in dirty:
                    dirty.add(id(link.holder))
                    pending.append(id(link.holder))
        return dirty

    def _path(self, link: Link) -> str:
        labels = [link.label]
        while link.holder is not self._root:
            # The first link found leads to the root, over holders found before.
            link = self._links[id(link.holder)][0]
            labels.append(link.label)
        return "".join(reversed(labels)).removeprefix(".")

    def _held(self, holder: Any) -> Iterator[Link]:
        """Yield what an object holds, atoms left out."""
        fixed, rebuilt = id(holder) in self._shared, _can_be_rebuilt(holder)
        for label, held, put in self._contents(holder):
            if not issubclass(type(held), _ATOMS):
                yield Link(holder, label, held, None if fixed else put, rebuilt)
        if type(holder) is types.FunctionType:
            for label, held, put in _in_globals(holder, self._named):
                yield Link(holder, label, held, None if fixed else put, rebuilt=False)

    def _contents(self, holder: Any) -> Iterator[Content]:
        if isinstance(holder, type):
            yield from _in_class(holder, functions_only=bool(self._shared))
        elif type(holder) is types.FunctionType:
            yield from _in_function(holder)
        elif type(holder) is types.MethodType:
            yield from (("(self)", holder.__self__, None), ("(function)", holder.__func__, None))
        elif type(holder) is functools.partial:
            yield from _in_partial(holder)
        elif issubclass(type(holder), weakref.ref):
            yield "(weak)", holder(), None
        elif issubclass(type(holder), weakref.ProxyTypes):
            yield "(weak)", holder.__repr__.__self__, None
        else:
            yield from _in_container(holder)
            yield from _in_attributes(holder)


def _can_be_rebuilt(holder: Any) -> bool:
    return type(holder) in _REBUILT or (isinstance(holder, tuple) and hasattr(type(holder), "_make"))


def _fits(holder: Any, held: Any, new: Any) -> bool:
    """Return whether a new holder can hold the new object as it holds the old one."""
    if type(holder) is not types.MethodType or holder.__self__ is not held or type(new) is type(held):
        return True
    name = holder.__func__.__name__
    # A method of another class: the new object has its own of that name.
    return getattr(type(held), name, None) is holder.__func__ and isinstance(getattr(new, name, None), types.MethodType)


class _Renewal:
    """What takes the place of every object: its replacement, or itself made anew with replaced contents, or itself."""

    def __init__(self, replacements: Mapping[int, Any], dirty: Collection[int]) -> None:
        self._made, self._dirty = dict(replacements), dirty

    def of(self, held: Any) -> Any:
        """Return what takes an object's place."""
        if self._changes(held) and id(held) not in self._made:
            self._make(held)
        return self._made.get(id(held), held)

    def _changes(self, held: Any) -> bool:
        return id(held) in self._made or id(held) in self._dirty

    def _make(self, old: Any) -> None:
        new: Any
        match old:
            case types.FunctionType():
                return self._make_function(old)
            case types.MethodType():
                owner, name = self.of(old.__self__), old.__func__.__name__
                same = type(owner) is type(old.__self__)
                new = types.MethodType(self.of(old.__func__), owner) if same else getattr(owner, name)
            case functools.partial():
                keywords = {name: self.of(value) for name, value in old.keywords.items()}
                new = functools.partial(self.of(old.func), *map(self.of, old.args), **keywords)
            case weakref.ref():
                new = weakref.ref(self.of(old()), old.__callback__)
            case _:
                new = getattr(type(old), "_make", type(old))(map(self.of, old))
        self._made[id(old)] = new

    def _make_function(self, old: types.FunctionType) -> None:
        closure = [(cell, _in_cell(cell)) for cell in old.__closure__ or ()]
        # What does not change stays in the cell that other functions see, too.
        cells = [types.CellType() if any(map(self._changes, held)) else cell for cell, held in closure]
        new = types.FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__, tuple(cells))
        # Entered before it has its contents, because it may hold itself.
        self._made[id(old)] = new
        for cell, (_, held) in zip(cells, closure, strict=True):
            if any(map(self._changes, held)):
                cell.cell_contents = self.of(held[0])
        # Python 3.14 computes annotations when they are asked for, which may fail.
        annotations = "__annotate__" if hasattr(old, "__annotate__") else "__annotations__"
        for name in ("__qualname__", "__module__", "__doc__", annotations):
            setattr(new, name, getattr(old, name))
        if old.__defaults__ is not None:
            new.__defaults__ = tuple(map(self.of, old.__defaults__))
        if old.__kwdefaults__ is not None:
            new.__kwdefaults__ = {name: self.of(value) for name, value in old.__kwdefaults__.items()}
        vars(new).update({name: self.of(value) for name, value in vars(old).items()})


def _in_container(holder: Any) -> Iterator[Content]:
    """Yield the elements of a container; nothing for another object."""
    if isinstance(holder, dict):
        for key, value in list(holder.items()):
            yield f"[{key!r}]" if issubclass(type(key), _ATOMS) else "[...]", value, _item_put(holder, key)
            yield _KEY, key, functools.partial(_put_key, holder)
    elif isinstance(holder, (list, collections.deque)):
        yield from ((f"[{i}]", value, _item_put(holder, i)) for i, value in enumerate(list(holder)))
    elif isinstance(holder, tuple):
        names = getattr(type(holder), "_fields", None)
        yield from ((f".{names[i]}" if names else f"[{i}]", value, None) for i, value in enumerate(holder))
    elif isinstance(holder, (set, frozenset)):
        put = functools.partial(_put_element, holder) if isinstance(holder, set) else None
        yield from (("(element)", element, put) for element in list(holder))


def _in_attributes(holder: Any) -> Iterator[Content]:
    """Yield the attributes of an instance, what it holds in C, and its class."""
    kind, attributes = type(holder), _attributes(holder)
    known = {id(attributes), id(kind)}
    for name, value in list(attributes.items()):
        known.add(id(value))
        if issubclass(kind, nn.Module) and name in _EXPANDED and type(value) is dict:
            yield from ((f".{own}", registered, _item_put(value, own)) for own, registered in list(value.items()))
        elif not (name in _CACHES and issubclass(kind, pytorch.RNNBase)):
            yield f".{name}", value, _item_put(attributes, name)
    for name in _slots(kind):
        with contextlib.suppress(AttributeError):
            value = object.__getattribute__(holder, name)
            known.add(id(value))
            yield f".{name}", value, _attribute_put(holder, name)
    if issubclass(kind, Tensor):
        yield "(hooks)", holder._backward_hooks, None
        yield "(hooks)", holder._post_accumulate_grad_hooks, None
    elif not issubclass(kind, (dict, list, tuple, set, frozenset, collections.deque)):
        # Iterators, generators and the like.
        for value in gc.get_referents(holder):
            if id(value) not in known and not isinstance(value, type):
                yield f"(in {kind.__name__})", value, None
    yield f"(class {kind.__name__})", kind, None


def _in_class(cls: type, functions_only: bool) -> Iterator[Content]:
    """Yield what a class that is not of a library holds, and its bases."""
    if cls.__module__.partition(".")[0] in _LIBRARIES:
        return
    yield from (("", base, None) for base in cls.__bases__)
    for name, value in list(vars(cls).items()):
        if isinstance(value, property):
            yield from ((f".{name}", function, None) for function in (value.fget, value.fset))
            continue
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, types.FunctionType) or not (functions_only or name.startswith("__")):
            yield f".{name}", value, None


def _in_function(function: types.FunctionType) -> Iterator[Content]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from ((f"({name})", held, _attribute_put(cell, "cell_contents")) for held in _in_cell(cell))
    for position, value in enumerate(function.__defaults__ or ()):
        yield "(default)", value, functools.partial(_put_default, function, position)
    keywords = function.__kwdefaults__ or {}
    yield from ((f"({name})", value, _item_put(keywords, name)) for name, value in keywords.items())
    yield from ((f".{name}", value, _item_put(vars(function), name)) for name, value in vars(function).items())


def _in_globals(function: types.FunctionType, named: Collection[int]) -> Iterator[Content]:
    """Yield the named objects that a function, or one inside it, loads as global variables."""
    scope, codes = function.__globals__, [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        if found := {name for name in code.co_names if id(scope.get(name)) in named}:
            loaded = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
            yield from ((f"({name})", scope[name], _item_put(scope, name)) for name in found & loaded)


def _in_partial(partial: functools.partial) -> Iterator[Content]:
    put = functools.partial(_put_in_partial, partial)
    yield "(function)", partial.func, put
    yield from ((f"({i})", value, put) for i, value in enumerate(partial.args))
    yield from ((f"({name})", value, put) for name, value in partial.keywords.items())


def _in_cell(cell: types.CellType) -> list[Any]:
    """Return a list with what a cell of a closure holds, if it holds anything."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of an instance, without its own say."""
    try:
        attributes = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _slots(cls: type) -> Iterator[str]:
    """Yield the attributes for which a class keeps room instead of a dictionary."""
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            yield from (n for n, member in vars(base).items() if isinstance(member, types.MemberDescriptorType))


def _item_put(container: Any, key: Any) -> Put:
    return lambda _, new: container.__setitem__(key, new)


def _attribute_put(holder: Any, name: str) -> Put:
    # Not the holder's own __setattr__, which may refuse: a frozen dataclass has one.
    return lambda _, new: object.__setattr__(holder, name, new)


def _put_key(holder: dict[Any, Any], present: Any, new: Any) -> None:
    items = [(new if key is present else key, value) for key, value in holder.items()]
    holder.clear()
    holder.update(items)


def _put_element(holder: set[Any], present: Any, new: Any) -> None:
    holder.discard(present)
    holder.add(new)


def _put_default(function: types.FunctionType, position: int, _: Any, new: Any) -> None:
    defaults = list(function.__defaults__ or ())
    defaults[position] = new
    function.__defaults__ = tuple(defaults)


def _put_in_partial(partial: Any, present: Any, new: Any) -> None:
    args = tuple(new if value is present else value for value in partial.args)
    keywords = {name: new if value is present else value for name, value in partial.keywords.items()}
    partial.__setstate__((new if partial.func is present else partial.func, args, keywords, vars(partial)))
