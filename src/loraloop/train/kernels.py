"""Native kernels for the CPU, in bfloat16: attention over a prefix tree, and the element-wise passes round it, each in one go.

They are exact in the sense of torch's own bfloat16 kernels: float32 inside, one rounding at the end, the same bytes on every run.
`load_kernels` gives them or says why there are none; a caller then uses torch. Every method checks what it is given and raises
ValueError; nothing is copied or converted in silence. Tensors may be column slices of a wider matrix: only their last axes must be
contiguous. This module knows nothing of models or autograd.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from loraloop.train.kernel_library import Library, open_library

if TYPE_CHECKING:
    import torch

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 16


def load_kernels() -> tuple[Kernels | None, str]:
    """The kernels and the instruction set they use, or None and the reason why not."""
    library = open_library()
    if isinstance(library, str):
        return None, library
    return Kernels(library), library.isa


class Kernels:
    """The kernels of a loaded library. Work is spread over `torch.get_num_threads()` threads; the GIL is free meanwhile."""

    def __init__(self, library: Library) -> None:
        self.isa = library.isa
        self._library = library.functions

    def attention_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, end: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the T rows of a block, in depth-first order of a prefix tree, over S >= T keys.

        The first S - T keys are the path above the block, which every row sees; row i sees the block's own key j exactly when
        j <= i < end[j]. q is (T, query heads, D), k and v are (S, heads, D), bfloat16; D is a multiple of 16 up to 256; query heads
        are a multiple of the heads, and share one in order. `end` is (T,) int32 with j < end[j] <= T: the end of the subtree of the
        node that row j is in; T everywhere makes it causal. Gives the output (T, query heads, D) and the natural log-sum-exp of the
        scaled scores (query heads, T) in float32.
        """
        import torch

        call = _attention_call(q, k, v, end, scale=scale, isa=self.isa)
        out = torch.empty(q.shape, dtype=torch.bfloat16) if out is None else out
        _check("out", out, torch.bfloat16, q.shape)
        call.out_row = _row(out)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        if out.numel():
            self._run("attention_forward", ctypes.byref(call), q, k, v, end, out, lse)
        return out, lse

    def attention_backward(
        self,
        d_out: torch.Tensor,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        end: torch.Tensor,
        scale: float,
        d_k: torch.Tensor,
        d_v: torch.Tensor,
        d_q: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of `attention_forward`: d_q (T, query heads, D) in bfloat16 is given, or written into the given tensor.

        d_k and d_v are (S, heads, D) float32 and are added to: what descendants gave before is kept. The result does not depend on
        the number of threads.
        """
        import torch

        call = _attention_call(q, k, v, end, scale=scale, isa=self.isa)
        d_q = torch.empty(q.shape, dtype=torch.bfloat16) if d_q is None else d_q
        for name, tensor in (("d_out", d_out), ("out", out), ("d_q", d_q)):
            _check(name, tensor, torch.bfloat16, q.shape)
        for name, tensor in (("d_k", d_k), ("d_v", d_v)):
            _check(name, tensor, torch.float32, k.shape)
        _check("lse", lse, torch.float32, (q.shape[1], q.shape[0]))
        if not lse.is_contiguous():
            raise ValueError("lse must be contiguous")
        call.out_row, call.d_out_row, call.d_q_row = _row(out), _row(d_out), _row(d_q)
        call.d_k_row, call.d_v_row = _row(d_k), _row(d_v)
        if q.numel():
            self._run("attention_backward", ctypes.byref(call), d_out, q, k, v, out, lse, end, d_q, d_k, d_v)
        return d_q

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, *, eps: float, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """X * rsqrt(mean(x^2) + eps) * weight for each row of x (T, n); also the second factor (T,), in float32, for the backward pass."""
        import torch

        _check_matrices(x=x)
        _check("weight", weight, torch.bfloat16, x.shape[1:])
        out = torch.empty(x.shape, dtype=torch.bfloat16) if out is None else out
        _check("out", out, torch.bfloat16, x.shape)
        rstd = torch.empty(x.shape[0], dtype=torch.float32)
        self._rows("rms_norm", x.shape, x, _row(x), weight, float(eps), out, _row(out), rstd)
        return out, rstd

    def rms_norm_backward(
        self, d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, rstd: torch.Tensor, d_x: torch.Tensor
    ) -> None:
        """Add the gradient of `rms_norm` with regard to x to `d_x`; the weight is frozen."""
        import torch

        _check_matrices(x=x, d_out=d_out, d_x=d_x)
        _check("weight", weight, torch.bfloat16, x.shape[1:])
        _check("rstd", rstd, torch.float32, x.shape[:1])
        self._rows("rms_norm_backward", x.shape, d_out, _row(d_out), x, _row(x), weight, rstd, d_x, _row(d_x))

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate) * up, all (T, n)."""
        import torch

        out = torch.empty(gate.shape, dtype=torch.bfloat16) if out is None else out
        _check_matrices(gate=gate, up=up, out=out)
        self._rows("swiglu", gate.shape, gate, _row(gate), up, _row(up), out, _row(out))
        return out

    def swiglu_backward(
        self,
        d_h: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        d_gate: torch.Tensor,
        d_up: torch.Tensor,
        h: torch.Tensor,
    ) -> None:
        """From the gradient of h = silu(gate) * up: write d_gate, d_up and h once more, all (T, n).

        An output may be an input itself, element for element: gate and d_gate, up and d_up, d_h and h.
        """
        _check_matrices(gate=gate, up=up, d_h=d_h, d_gate=d_gate, d_up=d_up, h=h)
        inputs = (d_h, _row(d_h), gate, _row(gate), up, _row(up))
        self._rows("swiglu_backward", gate.shape, *inputs, d_gate, _row(d_gate), d_up, _row(d_up), h, _row(h))

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, sign: int = 1) -> None:
        """Rotate x (T, heads, D) in place, halves of a head against each other, by angles whose cos and sin are (T, D/2) float32.

        sign=-1 turns back, which is the gradient.
        """
        import torch

        if x.dim() != 3 or x.shape[2] % 2 or sign not in {1, -1}:
            raise ValueError(f"x must be (tokens, heads, even dim) and sign 1 or -1, not {tuple(x.shape)} and {sign}")
        rows, heads, dim = x.shape
        _check("x", x, torch.bfloat16, x.shape)
        for name, table in (("cos", cos), ("sin", sin)):
            _check(name, table, torch.float32, (rows, dim // 2))
            if not table.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        self._rows("rope", (rows, dim // 2), x, _row(x), heads, cos, sin, float(sign))

    def head_softmax(self, logits: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
        """Each row's log-sum-exp (R,) in float32, and in place softmax(row) * coef[row]; logits (R, V) are bfloat16 or float32."""
        import torch

        if logits.dim() != 2 or logits.dtype not in {torch.bfloat16, torch.float32} or not logits.shape[1]:
            raise ValueError(f"logits must be (rows, vocabulary) in bfloat16 or float32, not {tuple(logits.shape)} {logits.dtype}")
        _check("logits", logits, logits.dtype, logits.shape)
        _check("coef", coef, torch.float32, logits.shape[:1])
        lse = torch.empty(logits.shape[0], dtype=torch.float32)
        self._rows("head_softmax", logits.shape, logits, _row(logits), logits.dtype == torch.float32, coef, lse)
        return lse

    def dropout(self, x: torch.Tensor, *, keep: float, draw: tuple[int, int], out: torch.Tensor, add: bool = False) -> None:
        """`out` := x * mask / keep, (T, n), or += that; each value is kept with the probability `keep`, in steps of 1/65536.

        `draw` is (key, number of the first row): the mask follows from key, row and column alone.
        """
        _check_matrices(x=x, out=out)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, not {keep}")
        self._rows("dropout", x.shape, x, _row(x), out, _row(out), draw[0] % 2**62, draw[1], float(keep), int(add))

    def rank_products(self, u: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        """Out += u^T y, (R, N) in float32, of u (T, R) and y (T, N) in bfloat16: the gradient of a LoRA matrix.

        Made for R far below N, where reading y once is what it costs. The result does not depend on the number of threads.
        """
        import torch

        if u.dim() != 2 or y.dim() != 2:
            raise ValueError(f"u and y must be matrices, not {tuple(u.shape)} and {tuple(y.shape)}")
        (n_rows, n_ranks), n = u.shape, y.shape[1]
        _check("u", u, torch.bfloat16, u.shape)
        _check("y", y, torch.bfloat16, (n_rows, n))
        _check("out", out, torch.float32, (n_ranks, n))
        if not (n_rows and n_ranks and n):
            return
        call = _RankCall(n_rows, n, n_ranks, _row(u), _row(y), _row(out), torch.get_num_threads(), self.isa == "amx")
        self._run("rank_products", ctypes.byref(call), u, y, out)

    def _rows(self, name: str, shape: tuple[int, ...], *arguments: object) -> None:
        """Call a function of rows.c, unless there is nothing to do."""
        import torch

        if shape[0] and shape[1]:
            self._run(name, torch.get_num_threads(), shape[0], shape[1], *arguments)

    def _run(self, name: str, *arguments: object) -> None:
        """Call a function of the library: tensors as addresses, whole numbers as int64, others as double."""
        import torch

        values: list[object] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, int):
                values.append(ctypes.c_int64(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_double(argument))
            else:
                values.append(argument)
        if self._library[name](*values):
            raise MemoryError(f"{name}: no memory for its buffers")


class _AttentionCall(ctypes.Structure):
    """`Call` of attention.h; rows are the values from one token to the next."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_queries", "n_keys", "n_heads", "n_kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("q_row", "k_row", "v_row", "out_row", "d_out_row", "d_q_row", "d_k_row", "d_v_row")),
        *((name, ctypes.c_int64) for name in ("n_threads", "amx")),
        ("scale", ctypes.c_double),
    )


class _RankCall(ctypes.Structure):
    """`RankCall` of ranks.c."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("n_rows", "n", "n_ranks", "u_row", "y_row", "out_row", "n_threads", "amx"))


def _attention_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor, *, scale: float, isa: str) -> _AttentionCall:
    """The arguments that forward and backward share, checked."""
    import torch

    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(f"q and k must be (tokens, heads, dim), not {tuple(q.shape)} and {tuple(k.shape)}")
    (n_queries, n_heads, dim), (n_keys, n_kv_heads, _) = q.shape, k.shape
    _check("q", q, torch.bfloat16, q.shape)
    _check("k", k, torch.bfloat16, (n_keys, n_kv_heads, dim))
    _check("v", v, torch.bfloat16, (n_keys, n_kv_heads, dim))
    _check("end", end, torch.int32, (n_queries,))
    if dim % HEAD_DIM_STEP or not 0 < dim <= MAX_HEAD_DIM:
        raise ValueError(f"heads of {dim} values: only multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM} are supported")
    if not n_kv_heads or n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads cannot share {n_kv_heads} heads")
    if n_keys < n_queries:
        raise ValueError(f"{n_keys} keys for {n_queries} rows: the rows' own keys must be the last of them")
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    return _AttentionCall(
        n_queries=n_queries,
        n_keys=n_keys,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        dim=dim,
        q_row=_row(q),
        k_row=_row(k),
        v_row=_row(v),
        n_threads=torch.get_num_threads(),
        amx=isa == "amx",
        scale=scale,
    )


def _row(tensor: torch.Tensor) -> int:
    """The values from one row to the next."""
    return tensor.stride(0)


def _check_matrices(**matrices: torch.Tensor) -> None:
    """Raise ValueError unless all are bfloat16 matrices of the first one's shape."""
    import torch

    shape = next(iter(matrices.values())).shape
    if len(shape) != 2:
        raise ValueError(f"{next(iter(matrices))} must be a matrix, not {tuple(shape)}")
    for name, matrix in matrices.items():
        _check(name, matrix, torch.bfloat16, shape)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor is what the library will take it for: only the first axis may have a stride of its own."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be {tuple(shape)} {dtype} on the CPU, not {tuple(tensor.shape)} {tensor.dtype} on {tensor.device.type}"
        )
    inner = 1
    for size, stride in reversed(list(zip(tensor.shape[1:], tensor.stride()[1:], strict=True))):
        if size > 1 and stride != inner:
            raise ValueError(f"{name} must be contiguous in all axes but the first; its strides are {tensor.stride()}")
        inner *= size
    if tensor.dim() and tensor.shape[0] > 1 and tensor.stride(0) < inner:
        raise ValueError(f"{name} has rows that overlap; its strides are {tensor.stride()}")
