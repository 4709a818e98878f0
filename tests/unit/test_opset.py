"""The allow-list against torch itself: every line says what torch's schema says, or less."""

import torch

from shared.opset import OPERATORS, Argument

OURS = {
    "T": {"Tensor"},
    "N": {"Tensor"},
    "T[]": {"List[Tensor]"},
    "T?[]": {"List[Optional[Tensor]]"},
    "S": {"number"},
    "f": {"float"},
    "f[]": {"List[float]"},
    "i": {"int", "SymInt"},
    "n": {"int", "SymInt", "number"},
    "p": {"int", "SymInt"},
    "i[]": {"List[int]", "List[SymInt]"},
    "n[]": {"List[int]", "List[SymInt]"},
    "p[]": {"List[int]", "List[SymInt]"},
    "b": {"bool"},
    "dtype": {"ScalarType"},
    "memory": {"MemoryFormat"},
    "layout": {"Layout"},
    "equation": {"str"},
}

FORBIDDEN = {
    *("resize_", "resize_as_", "set_", "as_strided", "as_strided_", "empty"),
    *("empty_like", "new_empty", "empty_strided", "empty_permuted", "_unsafe_view", "set_data"),
    *("from_file", "save", "item", "_local_scalar_dense", "nonzero", "masked_select"),
    *("unique", "_unique2", "bincount", "embedding_bag", "embedding_renorm_", "sparse_coo_tensor"),
    *("to_sparse", "view_as_complex", "fft_fft", "_assert_async", "manual_seed"),
    *("put_", "record_stream", "data_ptr", "random_", "normal_", "uniform_"),
    *("bernoulli_"),
}


def aten() -> dict[str, torch._C.FunctionSchema]:
    """Torch's schema of every aten operator on the list."""
    found = {}
    for name in OPERATORS:
        if name.startswith("aten."):
            _, packet, overload = name.split(".")
            found[name] = getattr(getattr(torch.ops.aten, packet), overload)._schema
    return found


def test_each_argument_is_torch_s_or_narrower() -> None:
    """An argument on the list exists in torch, at the same place, with a type that ours is or is part of."""
    for name, schema in aten().items():
        theirs = {argument.name: argument for argument in schema.arguments}
        order = [argument.name for argument in schema.arguments]
        mine = OPERATORS[name].arguments
        positional = [argument.name for argument in mine if not argument.keyword]
        assert positional == order[: len(positional)], name
        for argument in mine:
            their = theirs[argument.name]
            assert argument.keyword == their.kwarg_only, (name, argument.name)
            assert_narrower(name, argument, their)


def assert_narrower(name: str, mine: Argument, their: torch._C.Argument) -> None:
    """One argument: its type, whether it may be None, whether it may be left out."""
    real = str(their.real_type)
    nullable = real.startswith("Optional[")
    real = real.removeprefix("Optional[").removesuffix("]") if nullable else real
    allowed = OURS.get(mine.type, {"str"} if "|" in mine.type else set())
    assert real in allowed, (name, mine.name, mine.type, real)
    assert not mine.nullable or nullable, (name, mine.name)
    assert mine.required or their.has_default_value(), (name, mine.name)


def test_what_is_left_out_torch_can_do_without() -> None:
    """Arguments that torch has and the list has not are those with a default, so a call without them is complete."""
    for name, schema in aten().items():
        mine = {argument.name for argument in OPERATORS[name].arguments}
        for argument in schema.arguments:
            assert argument.name in mine or argument.has_default_value(), (name, argument.name)
            assert argument.name not in ("device", "generator", "pin_memory") or argument.name not in mine, name


def test_results_and_changes_are_torch_s() -> None:
    """Each line returns what the schema returns, and is marked `inplace` exactly when torch changes an argument."""
    for name, schema in aten().items():
        line = OPERATORS[name]
        if line.returns == ("i",):
            assert [str(result.real_type) in ("SymInt", "int") for result in schema.returns] == [True]
        elif line.returns == ("T[]",):
            assert [str(result.type) for result in schema.returns] == ["List[Tensor]"], name
        else:
            assert [str(result.type) for result in schema.returns] == ["Tensor"] * len(line.returns), name
        writes = [bool(argument.alias_info and argument.alias_info.is_write) for argument in schema.arguments]
        assert line.inplace == any(writes), name
        assert not any(writes[1:]), f"{name} changes another argument than its first"


def test_what_torch_calls_a_view_is_marked() -> None:
    """Every operator whose result shares memory by torch's schema is marked `view`, so in-place changes are seen."""
    for name, schema in aten().items():
        shares = any(result.alias_info and not result.alias_info.is_write for result in schema.returns)
        assert OPERATORS[name].view or not shares, name


def test_nothing_dangerous_is_on_the_list() -> None:
    """No operator that resizes, reinterprets or leaves memory uninitialised, or makes shapes of values."""
    packets = {name.split(".")[1] for name in aten()}
    assert not packets & FORBIDDEN
    assert all(name.startswith(("aten.", "int.")) for name in OPERATORS)
