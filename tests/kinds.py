"""Every kind of object whose journey tpool promises something about: how to make it, and how to tell that it arrived.

One table (``KINDS``) for all suites: codec level, pools over start method and direction; and for the docs, whose table
is ``docs_table()``; ``python tests/kinds.py`` writes it there. ``make`` gives equal objects in any process, so that a
receiver checks what arrived against its own.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tempfile
import types
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = [
    "DOCS",
    "GROUPS",
    "KINDS",
    "KINDS_BY_NAME",
    "Kind",
    "docs_table",
    "docs_with_table",
    "forget_scratch",
    "quiet",
    "same",
]

DOCS = Path(__file__).parent.parent / "tpool" / "tensors" / "KINDS.md"


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        name: unique.
        group: the heading it stands under in the docs.
        make: a fresh object, equal to that of any other call in any process.
        check: raises AssertionError unless what arrived is right; (made here, arrived).
        status: ``"exact"``; ``"changed"``: arrives, and ``note`` tells what differs; ``"refused"``: an error, whose
            message has ``note`` in it.
        note: see ``status``; for an exact kind what else there is to know.
        cuda: needs a GPU; in the docs it is untested until it was run on one.
    """

    name: str
    group: str
    make: Callable[[], Any]
    check: Callable[[Any, Any], None]
    status: str = "exact"
    note: str = ""
    cuda: bool = False


KINDS: list[Kind] = []
KINDS_BY_NAME: dict[str, Kind] = {}

GROUPS = (
    "dtypes",
    "shapes and strides",
    "bits",
    "aliases",
    "autograd",
    "modules",
    "layouts",
    "subclasses",
    "storages and descriptions",
    "containers",
    "files and foreign memory",
    "numpy",
    "CUDA",
    "refused",
)


def docs_table() -> str:
    """The table of kinds for the docs, as Markdown."""
    lines = ["| kind | arrives | remarks |", "|---|---|---|"]
    for group in GROUPS:
        lines.append(f"| **{group}** | | |")
        lines.extend(_docs_row(kind) for kind in KINDS if kind.group == group)
    return "\n".join(lines) + "\n"


def _docs_row(kind: Kind) -> str:
    status, note = ("untested", "no GPU was at hand") if kind.cuda else (kind.status, kind.note)
    return f"| {kind.name} | {status} | {note} |" if note else f"| {kind.name} | {status} | |"


def docs_with_table() -> str:
    """What ``DOCS`` has to say: its own words, and between its two marks the table of today."""
    text = DOCS.read_text()
    before, begin, rest = text.partition("<!-- the table: written by python tests/kinds.py -->\n")
    _, end, after = rest.partition("<!-- end of the table -->\n")
    assert begin, "no mark for the beginning of the table"
    assert end, "no mark for its end"
    return before + begin + docs_table() + end + after


@contextmanager
def quiet() -> Iterator[None]:
    """torch warns once per process that some kinds are experimental, deprecated or in beta: not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant).*"
        )
        warnings.filterwarnings("ignore", message=".*(not writable|`torch.jit|torch.jit.).*")
        yield


# Equality ----------------------------------------------------------------------------------------------------------


def same(expected: Any, arrived: Any) -> None:
    """Equal in type, value and everything that a tensor of any kind has; recursively through containers."""
    assert type(arrived) is type(expected), f"{type(arrived)} is not {type(expected)}"
    if isinstance(expected, torch.Tensor):
        _same_tensor(expected, arrived)
    elif isinstance(expected, np.ma.MaskedArray):
        same(expected.mask, arrived.mask)
        assert arrived.filled(0).tolist() == expected.filled(0).tolist()
    elif isinstance(expected, np.ndarray):
        _same_array(expected, arrived)
    elif isinstance(expected, dict):
        assert list(arrived) == list(expected)
        for key, value in expected.items():
            same(value, arrived[key])
    elif isinstance(expected, (tuple, list)):
        assert len(arrived) == len(expected)
        for one, other in zip(expected, arrived, strict=True):
            same(one, other)
    elif isinstance(expected, torch.UntypedStorage):
        assert arrived.device == expected.device
        assert bytes(arrived) == bytes(expected)
    elif isinstance(expected, torch.TypedStorage):
        assert arrived.dtype == expected.dtype
        assert list(arrived) == list(expected)
    elif isinstance(expected, torch.Generator):
        same(expected.get_state(), arrived.get_state())
    elif isinstance(expected, nn.Module):
        same(dict(expected.state_dict()), dict(arrived.state_dict()))
    elif dataclasses.is_dataclass(expected):
        same(vars(expected), vars(arrived))
    else:
        assert arrived == expected, f"{arrived!r} != {expected!r}"


def _same_tensor(expected: torch.Tensor, arrived: torch.Tensor) -> None:
    for what in ("dtype", "device", "layout", "requires_grad", "is_leaf", "is_quantized", "is_nested", "shape"):
        if what == "shape" and expected.is_nested:  # has none, and raises
            continue
        one, other = getattr(expected, what), getattr(arrived, what)
        assert other == one, f"{what}: {other} is not {one}"
    assert arrived.is_conj() == expected.is_conj(), "the conjugate bit"
    assert arrived.is_neg() == expected.is_neg(), "the negative bit"
    assert getattr(arrived, "is_inference", bool)() is False
    _same_attributes(expected, arrived)
    if expected.is_leaf:
        assert (expected.grad is None) == (arrived.grad is None), "the gradient"
        if expected.grad is not None:
            same(expected.grad, arrived.grad)
    if expected.layout is torch.strided and not expected.is_nested:
        assert arrived.stride() == expected.stride()
    if expected.device.type == "meta":
        return
    if expected.is_quantized:
        _same_quantizer(expected, arrived)
    for one, other in zip(_parts(expected), _parts(arrived), strict=True):
        assert torch.equal(_bits(one), _bits(other)), f"{arrived} is not {expected}"


def _same_attributes(expected: torch.Tensor, arrived: torch.Tensor) -> None:
    ours, theirs = ({k: v for k, v in vars(t).items() if v is not t} for t in (expected, arrived))
    assert set(ours) == set(theirs), f"attributes {set(theirs)} are not {set(ours)}"
    for name, value in ours.items():
        if type(expected) is not torch._subclasses.FakeTensor and not name.startswith("_"):
            same(value, theirs[name])


def _same_quantizer(expected: torch.Tensor, arrived: torch.Tensor) -> None:
    assert arrived.qscheme() == expected.qscheme()
    if expected.qscheme() is torch.per_tensor_affine:
        assert arrived.q_scale() == expected.q_scale()
        assert arrived.q_zero_point() == expected.q_zero_point()
    else:
        same(expected.q_per_channel_scales(), arrived.q_per_channel_scales())
        same(expected.q_per_channel_zero_points(), arrived.q_per_channel_zero_points())
        assert arrived.q_per_channel_axis() == expected.q_per_channel_axis()


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that a tensor of any layout is made of."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values(), torch.tensor([tensor.is_coalesced()])]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    return [tensor]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, so that NaNs are equal and every dtype can be compared."""
    tensor = tensor.as_subclass(torch.Tensor).cpu()
    if tensor.is_quantized:
        if tensor.dtype in (torch.quint4x2, torch.quint2x4):  # several to a byte, and no int_repr
            return torch.tensor(list(tensor.untyped_storage()))
        return tensor.int_repr()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype is torch.complex128:
        tensor = torch.view_as_real(tensor)
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.view(same_size) if tensor.dtype is not same_size else tensor


# The table ---------------------------------------------------------------------------------------------------------


def kind(name: str, group: str, **more: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter the decorated ``make`` into the table; without a ``check``, all of it must be the same."""

    def enter(make: Callable[[], Any]) -> Callable[[], Any]:
        entry = Kind(name, group, make, more.pop("check", same), **more)
        assert name not in KINDS_BY_NAME, name
        assert group in GROUPS, group
        KINDS.append(entry)
        KINDS_BY_NAME[name] = entry
        return make

    return enter


def simple(group: str, **makes: Callable[[], Any]) -> None:
    """Enter kinds that need no more than an expression; underscores in the names become spaces."""
    for name, make in makes.items():
        kind(name.replace("_", " "), group)(make)


def number(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """0, 1, 2, … in this shape."""
    return torch.arange(int(np.prod(shape)), dtype=torch.float64).to(dtype).reshape(shape)


# dtypes


def _enter_dtypes() -> None:
    dtypes = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
    for name, dtype in sorted(dtypes.items()):
        if not name.startswith("q"):
            kind(f"torch.{name}", "dtypes")(lambda dtype=dtype: torch.frombuffer(bytearray(range(48)), dtype=dtype))


_enter_dtypes()
simple(
    "dtypes",
    quint8_per_tensor=lambda: torch.quantize_per_tensor(number(3, 4), 0.5, 3, torch.quint8),
    qint8_per_tensor=lambda: torch.quantize_per_tensor(number(3, 4), 0.5, -3, torch.qint8),
    qint32_per_tensor=lambda: torch.quantize_per_tensor(number(3, 4), 0.25, 7, torch.qint32),
    quantized_view=lambda: torch.quantize_per_tensor(number(6, 4), 0.5, 3, torch.quint8)[2:].t(),
    qint8_per_channel=lambda: torch.quantize_per_channel(
        number(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1, 0, 2]), 0, torch.qint8
    ),
    quint8_per_channel_of_axis_1=lambda: torch.quantize_per_channel(
        number(2, 3), torch.tensor([0.5, 0.25, 0.125]), torch.tensor([1, 0, 2]), 1, torch.quint8
    ),
    quint4x2_per_channel=lambda: torch.quantize_per_channel(
        number(3, 4), torch.tensor([0.5, 0.25, 1.0]), torch.tensor([1.0, 0.0, 2.0]), 0, torch.quint4x2
    ),
    quint2x4_per_channel=lambda: torch.quantize_per_channel(
        number(3, 4), torch.tensor([0.5, 0.25, 1.0]), torch.tensor([1.0, 0.0, 2.0]), 0, torch.quint2x4
    ),
)

# shapes and strides

simple(
    "shapes and strides",
    zero_dimensions=lambda: torch.tensor(3.5),
    one_dimension=lambda: number(7),
    five_dimensions=lambda: number(1, 2, 3, 2, 2),
    empty=lambda: torch.empty(0),
    zero_size_dimension=lambda: torch.empty(3, 0, 2),
    zero_size_slice=lambda: number(4, 4)[2:2],
    transposed=lambda: number(3, 5).t(),
    non_contiguous_slice=lambda: number(6, 6)[1:5:2, ::3],
    expanded=lambda: number(3, 1).expand(3, 4),
    expanded_scalar=lambda: torch.tensor(2.0).expand(4, 5),
    channels_last=lambda: number(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    channels_last_3d=lambda: number(1, 2, 3, 2, 2).contiguous(memory_format=torch.channels_last_3d),
    storage_offset=lambda: number(20)[13:],
    one_element_of_many=lambda: number(1000)[17],
    overlapping=lambda: number(10).as_strided((4, 3), (2, 1), 1),
    read_as_another_dtype=lambda: number(8).view(torch.int16),
    unusual_strides_of_one_row=lambda: number(12).as_strided((1, 4), (7, 3)),
    whole_row_with_any_stride=lambda: number(4).as_strided((1, 4), (9, 1)),
    one_element_with_stride_0=lambda: number(1).as_strided((1,), (0,)),
    large=lambda: number(300, 1000),
)

# bits

simple(
    "bits",
    conjugate=lambda: torch.view_as_complex(number(4, 2)).conj(),
    conjugate_view=lambda: torch.view_as_complex(number(4, 2)).conj()[1:3],
    conjugate_transposed=lambda: torch.view_as_complex(number(3, 4, 2)).mH,
    negative=lambda: torch._neg_view(number(5)),
    negative_view=lambda: torch._neg_view(number(5))[1:],
    imag_of_a_conjugate=lambda: torch.view_as_complex(number(4, 2)).conj().imag,
    real_of_a_conjugate=lambda: torch.view_as_complex(number(4, 2)).conj().real,
    conjugate_and_negative=lambda: torch._neg_view(torch.view_as_complex(number(4, 2)).conj()),
    conjugate_that_requires_grad=lambda: torch.view_as_complex(number(4, 2)).conj().requires_grad_(),
)

# aliases


def aliased(*pairs: tuple[int, int]) -> Callable[[Any, Any], None]:
    """A check for a sequence of which these items share memory."""

    def check(expected: Any, arrived: Any) -> None:
        same(expected, arrived)
        for one, other in pairs:
            tensors = [torch.empty(0, dtype=torch.uint8).set_(_storage_of(arrived[i])) for i in (one, other)]
            assert tensors[0].untyped_storage()._cdata == tensors[1].untyped_storage()._cdata
            before = int(tensors[0][-1])
            tensors[0][-1] = before ^ 77
            assert tensors[1][-1] == before ^ 77, "written through one alias, not seen through the other"
            tensors[0][-1] = before  # what arrived travels on

    return check


def _storage_of(item: Any) -> torch.UntypedStorage:
    if isinstance(item, torch.UntypedStorage):
        return item
    return item.untyped_storage() if isinstance(item, torch.Tensor) else item._untyped_storage


@kind("two overlapping views", "aliases", check=aliased((0, 1)))
def _overlapping_views() -> Any:
    base = number(10)
    return base[:7], base[3:]


@kind("a tensor and a view of it", "aliases", check=aliased((0, 1)))
def _tensor_and_view() -> Any:
    base = number(4, 4)
    return base, base.t()[1:]


@kind("a view, then its tensor", "aliases", check=aliased((0, 1)))
def _view_and_tensor() -> Any:
    base = number(4, 4)
    return base[2:], base


@kind("a tensor and its storage", "aliases", check=aliased((0, 1)))
def _tensor_and_storage() -> Any:
    base = number(5)
    return base, base.untyped_storage()


@kind("a view, then its storage", "aliases", check=aliased((0, 1)))
def _view_and_storage() -> Any:
    base = number(50)
    return base[20:30], base.untyped_storage()


@kind("a view of another dtype", "aliases", check=aliased((0, 1)))
def _dtype_view() -> Any:
    base = number(6)
    return base, base.view(torch.uint8)


@kind("a complex tensor and its imaginary part", "aliases", check=aliased((0, 1)))
def _imaginary() -> Any:
    base = torch.view_as_complex(number(4, 2)).clone()
    return base, base.imag


@kind("a tensor and its conjugate", "aliases", check=aliased((0, 1)))
def _conjugate() -> Any:
    base = torch.view_as_complex(number(4, 2)).clone()
    return base, base.conj()


@kind("parts of one tensor", "aliases")
def _parts_of_one() -> Any:
    return list(number(6, 4).unbind())


def _check_one_object(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived[0] is arrived[1]["again"]


@kind("one tensor twice", "aliases", check=_check_one_object)
def _twice() -> Any:
    tensor = number(3)
    return tensor, {"again": tensor}


@kind("a tensor and its detached twin", "aliases", check=aliased((0, 1)))
def _detached() -> Any:
    leaf = number(3).requires_grad_()
    return leaf, leaf.detach()


@kind("a module at two places", "aliases", check=lambda expected, arrived: _check_same_item(expected, arrived))
def _shared_submodule() -> Any:
    layer = _seeded(lambda: nn.Linear(3, 3))
    return nn.ModuleList([layer, layer])


def _check_same_item(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived[0] is arrived[1]


def _check_tied(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived[0].weight is arrived[1].weight


@kind("tied parameters", "aliases", check=_check_tied)
def _tied() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    return nn.ModuleList([one, other])


# autograd


@kind("leaf with a gradient", "autograd")
def _leaf_with_grad() -> Any:
    leaf = number(3).requires_grad_()
    (leaf * leaf).sum().backward()
    return leaf


@kind("gradient of a tensor that requires none", "autograd")
def _grad_without() -> Any:
    tensor = number(3)
    tensor.grad = torch.ones(3)
    return tensor


@kind("leaf with a sparse gradient", "autograd")
def _sparse_grad() -> Any:
    leaf = number(4, 2).requires_grad_()
    leaf.grad = torch.sparse_coo_tensor([[1, 2]], number(2, 2), (4, 2))
    return leaf


simple(
    "autograd",
    leaf=lambda: number(3).requires_grad_(),
    complex_leaf=lambda: torch.view_as_complex(number(3, 2)).clone().requires_grad_(),
    leaf_view_of_a_larger_storage=lambda: number(8)[2:5].requires_grad_(),
    detached=lambda: (number(3).requires_grad_() * 2).detach(),
)


def _check_inference(expected: Any, arrived: Any) -> None:
    with torch.inference_mode(False):
        same(expected.clone(), arrived)


@kind("inference tensor", "autograd", check=_check_inference, status="changed", note="is a normal tensor")
def _inference() -> Any:
    with torch.inference_mode():
        return number(3, 2)


@kind("non-leaf tensor", "refused", status="refused", note="send tensor.detach()")
def _non_leaf() -> Any:
    return number(3).requires_grad_() * 2


# modules


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()


@kind("Parameter with a gradient and attributes", "modules")
def _parameter_dressed() -> Any:
    parameter = nn.Parameter(number(3))
    parameter.grad = torch.ones(3)
    parameter.tag = "mine"
    return parameter


def _check_buffer(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert isinstance(arrived, nn.Buffer)
    assert arrived.persistent is False


@kind("Buffer", "modules", check=_check_buffer)
def _buffer() -> Any:
    return nn.Buffer(number(3), persistent=False)


def _check_lazy(expected: Any, arrived: Any) -> None:
    assert type(arrived) is type(expected)
    assert (arrived.dtype, arrived.requires_grad) == (expected.dtype, expected.requires_grad)
    assert nn.parameter.is_lazy(arrived)


kind("uninitialized parameter", "modules", check=_check_lazy)(
    lambda: nn.UninitializedParameter(requires_grad=False, dtype=torch.float64)
)
kind("uninitialized buffer", "modules", check=_check_lazy)(lambda: nn.UninitializedBuffer(dtype=torch.float16))


def _check_module(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    same(expected(number(2, 4)).detach(), arrived(number(2, 4)).detach())
    for one, other in zip(expected.parameters(), arrived.parameters(), strict=True):
        same(one, other)


simple(
    "modules",
    Parameter=lambda: nn.Parameter(number(3, 2)),
    Parameter_without_grad=lambda: nn.Parameter(number(3, dtype=torch.int64), requires_grad=False),
    Parameter_with_a_conjugate_bit=lambda: nn.Parameter(torch.view_as_complex(number(3, 2)).conj()),
    expanded_Parameter=lambda: nn.Parameter(number(3, 1).expand(3, 4)),
    ParameterDict=lambda: nn.ParameterDict({"a": number(2)}),
    ParameterList=lambda: nn.ParameterList([number(2), number(3)]),
    state_dict=lambda: _seeded(lambda: nn.Linear(3, 2)).state_dict(),
    state_dict_of_an_optimizer=lambda: _trained_optimizer().state_dict(),
)
kind("Module", "modules", check=_check_module)(
    lambda: _seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval())
)
kind("lazy Module", "modules", check=lambda expected, arrived: _check_lazy(expected.weight, arrived.weight))(
    lambda: nn.LazyLinear(3)
)


def _trained_optimizer() -> Any:
    model = _seeded(lambda: nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(number(4, 3)).sum().backward()
    optimizer.step()
    return optimizer


def _check_script(expected: Any, arrived: Any) -> None:
    with quiet():
        assert isinstance(arrived, torch.jit.ScriptModule)
        same(expected(number(2, 4)).detach(), arrived(number(2, 4)).detach())


@kind("ScriptModule", "modules", check=_check_script, status="changed", note="its tensors are copied, never shared")
def _script_module() -> Any:
    with quiet():
        return torch.jit.script(_seeded(lambda: nn.Linear(4, 2)))


@kind("traced Module", "modules", check=_check_script, status="changed", note="its tensors are copied, never shared")
def _traced_module() -> Any:
    with quiet():
        return torch.jit.trace(_seeded(lambda: nn.Linear(4, 2)), number(2, 4))


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@kind("TorchScript function", "refused", status="refused", note="send the Python function")
def _script_function() -> Any:
    with quiet():
        return torch.jit.script(_scripted)


# layouts


def _coo(coalesced: bool) -> torch.Tensor:
    indices = torch.tensor([[0, 1, 1], [2, 0, 0]])
    tensor = torch.sparse_coo_tensor(indices, torch.tensor([3.0, 4.0, 5.0]), (2, 3))
    return tensor.coalesce() if coalesced else tensor


def _blocks() -> torch.Tensor:
    return torch.block_diag(number(2, 2) + 1, number(2, 2) + 5)


simple(
    "layouts",
    sparse_COO_coalesced=lambda: _coo(True),
    sparse_COO_not_coalesced=lambda: _coo(False),
    sparse_COO_that_requires_grad=lambda: _coo(True).requires_grad_(),
    sparse_COO_hybrid=lambda: number(3, 4).to_sparse(1),
    sparse_COO_empty=lambda: torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (3, 3)),
    sparse_CSR=lambda: _blocks().to_sparse_csr(),
    sparse_CSC=lambda: _blocks().to_sparse_csc(),
    sparse_BSR=lambda: _blocks().to_sparse_bsr((2, 2)),
    sparse_BSC=lambda: _blocks().to_sparse_bsc((2, 2)),
    sparse_CSR_that_requires_grad=lambda: _blocks().to_sparse_csr().requires_grad_(),
    sparse_CSC_that_requires_grad=lambda: _blocks().to_sparse_csc().requires_grad_(),
    sparse_BSR_that_requires_grad=lambda: _blocks().to_sparse_bsr((2, 2)).requires_grad_(),
    sparse_BSC_that_requires_grad=lambda: _blocks().to_sparse_bsc((2, 2)).requires_grad_(),
    sparse_CSR_in_a_batch=lambda: torch.stack([_blocks(), _blocks()]).to_sparse_csr(),
    sparse_COO_of_complex_numbers_conjugated=lambda: torch.eye(3, dtype=torch.complex64).to_sparse().conj(),
    sparse_Parameter=lambda: nn.Parameter(_coo(True)),
    nested_strided=lambda: torch.nested.nested_tensor([number(2, 3), number(1, 3)]),
    nested_strided_that_requires_grad=lambda: torch.nested.nested_tensor(
        [number(2, 3), number(1, 3)]
    ).requires_grad_(),
    nested_strided_transposed=lambda: torch.nested.nested_tensor([number(2, 3), number(1, 3)]).transpose(1, 2),
    meta=lambda: torch.empty(3, 4, device="meta"),
    meta_view=lambda: torch.empty(3, 4, device="meta", dtype=torch.int8).t()[1:],
)


def _check_jagged(expected: Any, arrived: Any) -> None:
    assert type(arrived) is type(expected)
    assert (arrived.dtype, arrived.requires_grad, arrived.layout) == (
        torch.float32,
        expected.requires_grad,
        torch.jagged,
    )
    same([t.detach() for t in expected.unbind()], [t.detach() for t in arrived.unbind()])


kind("nested jagged", "layouts", check=_check_jagged)(
    lambda: torch.nested.nested_tensor([number(2, 3), number(1, 3)], layout=torch.jagged)
)
kind("nested jagged transposed", "layouts", check=_check_jagged)(
    lambda: torch.nested.nested_tensor([number(2, 3), number(1, 3)], layout=torch.jagged).transpose(1, 2)
)
kind("nested jagged that requires grad", "layouts", check=_check_jagged)(
    lambda: torch.nested.nested_tensor([number(2, 3), number(1, 3)], layout=torch.jagged, requires_grad=True)
)
kind("mkldnn", "layouts", status="changed", note="its bytes are copied, never shared")(
    lambda: number(3, 4).to_mkldnn()
)


def _check_meta_pair(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived[0].untyped_storage()._cdata == arrived[1].untyped_storage()._cdata


@kind("meta tensor and its view", "layouts", check=_check_meta_pair)
def _meta_pair() -> Any:
    base = torch.empty(4, device="meta")
    return base, base[2:]


# subclasses


class Tagged(torch.Tensor):
    """A subclass with memory of its own and Python attributes."""

    tag: str


class Counting(torch.Tensor):
    """Counts torch functions; ours must not."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


class Slotted(torch.Tensor):
    """A subclass with slots."""

    __slots__ = ("extra",)


class Scaled(torch.Tensor):
    """A wrapper that names its inner tensors."""

    data_part: torch.Tensor
    scale_part: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=scale.dtype, requires_grad=requires_grad
        )

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, requires_grad: bool = False) -> None:
        self.data_part, self.scale_part = data, scale

    def __tensor_flatten__(self) -> Any:
        return ["data_part", "scale_part"], {"requires_grad": self.requires_grad}

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return Scaled(inner["data_part"], inner["scale_part"], context["requires_grad"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].data_part, args[0].scale_part)
        raise NotImplementedError(func)


class Boxed(torch.Tensor):
    """A wrapper that does not name its inner tensor."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, elem.shape, dtype=elem.dtype)

    def __init__(self, elem: torch.Tensor) -> None:
        self.elem = elem

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class OwnReduce(torch.Tensor):
    """Reduces itself."""

    note: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _own, (self.as_subclass(torch.Tensor),)


def _own(tensor: torch.Tensor) -> OwnReduce:
    arrived = tensor.as_subclass(OwnReduce)
    arrived.note = "made by its own reducer"
    return arrived


class SpecialParameter(nn.Parameter):
    """A subclass of Parameter."""


@kind("subclass with attributes", "subclasses")
def _tagged() -> Any:
    tensor = number(3, 2).as_subclass(Tagged)
    tensor.tag = "mine"
    tensor.partner = number(2)  # type: ignore[attr-defined]
    return tensor


@kind("subclass with attributes that requires grad", "subclasses")
def _tagged_grad() -> Any:
    tensor = torch.Tensor._make_subclass(Tagged, number(3, 2), True)
    tensor.tag = "mine"
    tensor.grad = torch.ones(3, 2)
    return tensor


def _check_untouched(expected: Any, arrived: Any) -> None:
    assert type(arrived) is Counting
    same(expected.as_subclass(torch.Tensor), arrived.as_subclass(torch.Tensor))


kind("subclass with __torch_function__", "subclasses", check=_check_untouched)(
    lambda: number(3, 2).t().as_subclass(Counting)
)


def _check_slots(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived.extra == expected.extra


@kind("subclass with slots", "subclasses", check=_check_slots)
def _slotted() -> Any:
    tensor = number(3).as_subclass(Slotted)
    tensor.extra = "in a slot"
    return tensor


def _check_scaled(expected: Any, arrived: Any) -> None:
    assert type(arrived) is Scaled
    assert (arrived.shape, arrived.dtype, arrived.requires_grad) == (
        expected.shape,
        expected.dtype,
        expected.requires_grad,
    )
    same(expected.data_part, arrived.data_part)
    same(expected.scale_part, arrived.scale_part)
    assert arrived.tag == expected.tag


@kind("wrapper subclass with inner tensors", "subclasses", check=_check_scaled)
def _scaled() -> Any:
    tensor = Scaled(number(3, 2).to(torch.int8), torch.tensor(0.5))
    tensor.tag = "wrapped"  # type: ignore[attr-defined]
    return tensor


@kind("wrapper subclass that requires grad", "subclasses", check=_check_scaled)
def _scaled_grad() -> Any:
    tensor = Scaled(number(3, 2).to(torch.int8), torch.tensor(0.5), requires_grad=True)
    tensor.tag = "wrapped"  # type: ignore[attr-defined]
    return tensor


def _check_boxed(expected: Any, arrived: Any) -> None:
    assert type(arrived) is Boxed
    assert arrived.shape == expected.shape
    same(expected.elem, arrived.elem)


kind("wrapper subclass with a plain attribute", "subclasses", check=_check_boxed)(lambda: Boxed(number(3)))
kind("subclass that reduces itself", "subclasses")(lambda: _own(number(3)))
kind("subclass of Parameter", "subclasses")(lambda: SpecialParameter(number(3)))


def _check_parameter(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert isinstance(arrived, nn.Parameter)


@kind("Parameter of a subclass", "subclasses", check=_check_parameter)
def _parameter_of_a_subclass() -> Any:
    return nn.Parameter(number(3).as_subclass(Tagged))


def _check_self_cycle(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived.me is arrived


@kind("tensor with attributes, one of them itself", "subclasses", check=_check_self_cycle)
def _self_cycle() -> Any:
    tensor = number(3)
    tensor.tag = {"a": [1, number(2)]}  # type: ignore[attr-defined]
    tensor.me = tensor  # type: ignore[attr-defined]
    return tensor


# Sent objects are told by the name of their class, so that torch.distributed (a second) need not be imported.
DTensor = types.new_class("DTensor", (torch.Tensor,))
DTensor.__module__ = "torch.distributed.tensor"


@kind("DTensor", "refused", status="refused", note="send tensor.to_local() or .full_tensor()")
def _dtensor() -> Any:
    return number(3).as_subclass(DTensor)


@kind("fake tensor", "refused", status="refused", note="has no data")
def _fake() -> Any:
    with torch._subclasses.FakeTensorMode():
        return torch.empty(3)


@kind("tensor of zeros without memory", "refused", status="refused", note="send it from outside, or a clone()")
def _zero_tensor() -> Any:
    return torch._efficientzerotensor((3,))


@kind("functional tensor", "refused", status="refused", note="functionalization")
def _functional() -> Any:
    return torch._to_functional_tensor(number(3))


# storages and descriptions

simple(
    "storages and descriptions",
    UntypedStorage=lambda: number(3).untyped_storage(),
    empty_UntypedStorage=lambda: torch.UntypedStorage(),
    Size=lambda: torch.Size([2, 3]),
    dtype=lambda: torch.bfloat16,
    device=lambda: torch.device("cpu"),
    layout=lambda: torch.sparse_coo,
    memory_format=lambda: torch.channels_last,
    qscheme=lambda: torch.per_tensor_affine,
    Generator=lambda: torch.Generator().manual_seed(7),
    PackedSequence=lambda: nn.utils.rnn.pack_sequence([number(3), number(2)]),
)
kind("TypedStorage", "storages and descriptions")(
    lambda: torch.TypedStorage(wrap_storage=number(3).untyped_storage(), dtype=torch.float32, _internal=True)
)
kind("FloatStorage", "storages and descriptions")(
    lambda: torch.FloatStorage(wrap_storage=number(3).untyped_storage(), _internal=True)
)

# containers

Point = namedtuple("Point", "x y")


@dataclass
class Batch:
    """A dataclass with tensors."""

    inputs: torch.Tensor
    more: dict[str, torch.Tensor]


class Attrs:
    """What attrs makes of a class with slots."""

    __slots__ = ("x", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __getstate__(self) -> Any:
        return self.x, self.y

    def __setstate__(self, state: Any) -> None:
        self.x, self.y = state

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Attrs)
        same((self.x, self.y), (other.x, other.y))
        return True

    __hash__ = None  # type: ignore[assignment]


simple(
    "containers",
    dict=lambda: {"a": number(3), ("b", 1): [number(2), None]},
    OrderedDict=lambda: OrderedDict(b=number(1), a=number(2)),
    namedtuple=lambda: Point(number(2), number(3)),
    dataclass=lambda: Batch(number(2), {"x": number(3)}),
    attrs_like_class=lambda: Attrs(number(2), 1),
    bytes_and_strings=lambda: [b"x" * 10_000, "y" * 10_000, 10**30],
)


def _check_cycle(expected: Any, arrived: Any) -> None:
    same(expected[0], arrived[0])
    assert arrived[1] is arrived


@kind("cyclic list", "containers", check=_check_cycle)
def _cycle() -> Any:
    cycle: list[Any] = [number(3)]
    cycle.append(cycle)
    return cycle


def _check_many(expected: Any, arrived: Any) -> None:
    assert len(arrived) == len(expected)
    assert torch.equal(torch.stack(arrived), torch.stack(expected))


kind("2,000 small tensors", "containers", check=_check_many)(lambda: [torch.full((3,), float(i)) for i in range(2000)])

# files and foreign memory


def _scratch(name: str, data: bytes) -> str:
    """A fresh file with this content; see ``forget_scratch``."""
    fd, path = tempfile.mkstemp(prefix=f"tpool-kinds-{os.getpid()}-{name}-")
    with open(fd, "wb") as file:
        file.write(data)
    return path


def forget_scratch() -> None:
    """Delete the files that this process's kinds made."""
    for path in Path(tempfile.gettempdir()).glob(f"tpool-kinds-{os.getpid()}-*"):
        path.unlink()


NUMBERS = bytes(number(16).numpy())


@kind("torch.from_file shared", "files and foreign memory", note="stays the same file: writes reach it")
def _file_shared() -> Any:
    return torch.from_file(_scratch("shared", NUMBERS), shared=True, size=16)


@kind("torch.from_file private", "files and foreign memory")
def _file_private() -> Any:
    return torch.from_file(_scratch("private", NUMBERS), shared=False, size=16)


@kind("torch.load with mmap", "files and foreign memory")
def _load_mmap() -> Any:
    buffer = io.BytesIO()
    torch.save({"a": number(5), "b": number(2, 3)}, buffer)
    return torch.load(_scratch("saved", buffer.getvalue()), mmap=True)


@kind("tensor on a numpy memmap", "files and foreign memory")
def _memmap() -> Any:
    return torch.from_numpy(np.memmap(_scratch("memmap", NUMBERS), dtype=np.float32, mode="r+"))


@kind("tensor from numpy", "files and foreign memory")
def _from_numpy() -> Any:
    return torch.from_numpy(np.arange(12.0).reshape(3, 4))[1:]


@kind("tensor that numpy sees", "files and foreign memory")
def _seen_by_numpy() -> Any:
    tensor = number(6)
    tensor.numpy()
    return tensor


@kind("tensor shared by descriptor", "files and foreign memory", note="goes by torch's own handle")
def _shared_by_fd() -> Any:
    return number(3, 4).share_memory_().t()


@kind("tensor shared by name", "files and foreign memory", note="goes by torch's own handle")
def _shared_by_name() -> Any:
    tensor = number(3, 4)
    tensor.untyped_storage()._share_filename_cpu_()
    return tensor


# numpy


def _same_array(expected: np.ndarray[Any, Any], arrived: np.ndarray[Any, Any]) -> None:
    assert arrived.dtype == expected.dtype
    assert arrived.shape == expected.shape
    assert arrived.flags.writeable == expected.flags.writeable
    if expected.dtype.hasobject:
        assert arrived.tolist() == expected.tolist()
    else:
        assert arrived.tobytes() == expected.tobytes()


def _check_fortran(expected: Any, arrived: Any) -> None:
    same(expected, arrived)
    assert arrived.flags.f_contiguous


def _read_only() -> Any:
    array = np.arange(5000.0)
    array.flags.writeable = False
    return array


def _enter_numpy_dtypes() -> None:
    for code in np.typecodes["All"]:  # one letter for each built-in dtype
        sized = np.dtype({"S": "S3", "U": "U3", "V": "V3", "M": "M8[s]", "m": "m8[ns]"}.get(code, code))
        if sized.hasobject:
            continue  # has rows of its own
        name = f"array of {np.dtype(code).type.__name__} ({code})"
        kind(name, "numpy")(lambda sized=sized: np.frombuffer(bytes(range(96)), dtype=sized).copy())


def _check_memmap(expected: Any, arrived: Any) -> None:
    assert type(arrived) is np.memmap
    _same_array(expected, arrived)


@kind("numpy memmap", "numpy", check=_check_memmap, status="changed", note="a copy in memory, no longer the file")
def _numpy_memmap() -> Any:
    return np.memmap(_scratch("array", NUMBERS), dtype=np.float32, mode="r+")


class TaggedArray(np.ndarray):  # type: ignore[type-arg]
    """A subclass of an array."""


_enter_numpy_dtypes()
simple(
    "numpy",
    float64_array=lambda: np.arange(6.0).reshape(2, 3),
    view_of_a_large_array=lambda: np.arange(100_000.0)[50_000:90_000],
    big_endian_array=lambda: np.arange(5, dtype=">i4"),
    nested_structured_array=lambda: np.array(
        [((1, 2), [3.5, 4.5])], dtype=[("pair", [("a", "i2"), ("b", ">u8")]), ("list", "f4", (2,))]
    ),
    structured_array_with_objects=lambda: np.array([(1, "x"), (2, None)], dtype=[("a", "i4"), ("b", object)]),
    masked_array=lambda: np.ma.masked_array(np.arange(4.0), mask=[False, True, False, True]),
    subclass_of_ndarray=lambda: np.arange(4.0).view(TaggedArray),
    structured_scalar=lambda: np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])[0],
    large_array=lambda: np.arange(100_000, dtype=np.int32).reshape(100, 1000),
    bool_array=lambda: np.arange(7) % 2 == 0,
    complex_array=lambda: np.arange(3) + 1j,
    structured_array=lambda: np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")]),
    object_array=lambda: np.array([1, "two", None], dtype=object),
    string_array=lambda: np.array(["a", "bcd"]),
    datetime_array=lambda: np.array(["2024-01-01"], dtype="M8[D]"),
    array_of_0_dimensions=lambda: np.array(3.5),
    empty_array=lambda: np.empty((0, 3)),
    numpy_scalar=lambda: np.float32(1.5),
)
kind("Fortran order", "numpy", check=_check_fortran)(lambda: np.asfortranarray(np.arange(6000.0).reshape(60, 100)))
kind("strided array", "numpy", status="changed", note="contiguous, as numpy pickles it")(
    lambda: np.arange(24).reshape(4, 6)[::2, 1:5]
)
kind("array of variable strings", "numpy")(lambda: np.array(["a", "bcd"], dtype=np.dtypes.StringDType()))


def _check_values(expected: Any, arrived: Any) -> None:
    assert arrived.tolist() == expected.tolist()


@kind("strided read-only array", "numpy", check=_check_values, status="changed", note="contiguous, and can be written")
def _strided_read_only() -> Any:
    return np.broadcast_to(np.arange(3.0), (4, 3))


kind("small read-only array", "numpy")(lambda: _read_only()[:3])
kind("large read-only array", "numpy")(_read_only)

# CUDA


def _cuda(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cuda()


kind("CUDA tensor", "CUDA", cuda=True)(lambda: _cuda(number(3, 4)))
kind("CUDA view", "CUDA", cuda=True)(lambda: _cuda(number(6, 4))[2:].t())
kind("CUDA conjugate", "CUDA", cuda=True)(lambda: _cuda(torch.view_as_complex(number(4, 2))).conj())
kind("CUDA Parameter", "CUDA", cuda=True)(lambda: nn.Parameter(_cuda(number(3))))
kind("CUDA sparse COO", "CUDA", cuda=True)(lambda: _coo(True).cuda())


if __name__ == "__main__":
    DOCS.write_text(docs_with_table())
