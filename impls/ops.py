"""The public ops, with flash-linear-attention's arguments in its order and with its meaning."""

import inspect
import warnings

import torch

from impls import again, checks
from impls.table import chosen, described, find

DECODE_TOKENS = 16
"""Up to this many tokens the recurrent form is the faster one: a chunk is worked on whole."""


def _renamed(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """Return the state layout that was asked for, under its name or its old one (DeprecationWarning)."""
    checks.check_flag("transpose_state_layout", transpose_state_layout)
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("state_v_first and transpose_state_layout are the same argument: expected one, got both")
    if not torch.compiler.is_compiling():  # fullgraph has no warnings
        warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=4)
    return transpose_state_layout


def _refuse_elsewhere(cp_context, use_graph: bool, max_num_seqs: int | None) -> None:
    """Refuse what these implementations cannot do, rather than ignore it."""
    if cp_context is not None:
        raise ValueError(
            "cp_context must be None: to split a sequence over devices pass each part's final_state on as the next "
            f"part's initial_state, got {type(cp_context).__name__}"
        )
    checks.check_flag("use_graph", use_graph)
    if use_graph:
        raise ValueError("use_graph must be False: these ops bound nothing by it, got use_graph=True")
    if max_num_seqs is not None:
        raise ValueError(f"max_num_seqs must be None without use_graph=True, got {max_num_seqs}")


def _settled(
    cp_context=None,
    use_graph=False,
    max_num_seqs=None,
    disable_recompute=False,
    state_v_first=False,
    transpose_state_layout=None,
    **keywords,
) -> dict[str, object]:
    """Return the keywords that `Impl.call` takes, without those that are refused, change nothing or are renamed."""
    _refuse_elsewhere(cp_context, use_graph, max_num_seqs)
    checks.check_flag("disable_recompute", disable_recompute)
    keywords["state_v_first"] = _renamed(state_v_first, transpose_state_layout)
    return keywords | ({"disable_recompute": True} if disable_recompute else {})


def _run(form: str | None, q, k, v, g, beta, keywords: dict) -> tuple[torch.Tensor, ...]:
    """Run the first implementation of this form that supports these inputs; of either form where None.

    Packed sequences count with their sum: to look at each length would mean to wait for the device.
    """
    checks.check_inputs(q, k, v, g, beta)
    chunk_size = keywords.get("chunk_size")
    if form is None:
        packing = keywords.get("cu_seqlens")
        longest = q.shape[1] if packing is None else q.shape[1] // max(1, len(packing) - 1)
        form = "recurrent" if chunk_size is None and longest <= DECODE_TOKENS else "chunk"
    others = (keywords.get(name) for name in ("initial_state", "A_log", "dt_bias"))
    backward = checks.wants_gradient((q, k, v, g, beta, *others))
    implementation = chosen(form=form, backward=backward, chunk_size=chunk_size, **described(q, v))
    return implementation.load()(q, k, v, g, beta, **keywords)


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: object | None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    chunk_size: int | None = None,
    state_interval: int | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run Kimi Delta Attention chunk by chunk: for training and prefill.

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,   o_t = scale * S_t^T q_t

    K and V are independent, from 1 to 256; T = 0 and empty sequences pass the state through, as a copy. The first
    implementation of the table that works in chunks and supports these inputs runs. Flags may be None, for False.

    Args:
        q, k: queries and keys [B, T, H, K], float64, float32, bfloat16 or float16.
        v: values [B, T, HV, V] in q's dtype; HV a multiple of H, value head h uses query head h // (HV // H).
        g: log decays [B, T, HV, K], natural logarithm, at most 0, -inf allowed; raw gates with use_gate_in_kernel.
        beta: write strengths [B, T, HV], with 0 <= beta |k|^2 <= 2; logits with use_beta_sigmoid_in_kernel.
        scale: factor of the outputs; K^-1/2 where None.
        initial_state: [N, HV, K, V], float32, bfloat16 or float16, float64 too for float64 inputs; 0 where None.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: replace q and k by x / sqrt(sum x^2 + 1e-6).
        use_gate_in_kernel: replace g by -exp(A_log) softplus(g + dt_bias), or with a lower bound by
            lower_bound * sigmoid(exp(A_log) (g + dt_bias)), A_log = 0 where None.
        use_beta_sigmoid_in_kernel: replace beta by sigmoid(beta); with allow_neg_eigval by 2 sigmoid(beta).
        safe_gate: accepted, changes nothing: any gate is safe here.
        lower_bound: negative, finite; see use_gate_in_kernel, without which it changes nothing.
        disable_recompute: keep what the backward needs of the forward instead of computing it again, where Triton's
            kernels run: the same gradients; elsewhere it changes nothing.
        return_intermediate_states: also return the states that enter every `state_interval` tokens; not differentiable.
            This differs from flash-linear-attention, which returns one per chunk: its NT counts chunks, ours intervals.
        state_v_first: states are [N, HV, V, K]; transpose_state_layout is the old name (DeprecationWarning).
        cu_seqlens: [N + 1] int64 or int32, rising from 0 to T: B = 1 and N sequences packed along T; cu_seqlens_cpu is
            its copy on the CPU.
        cp_context, use_graph, max_num_seqs: must keep their defaults.
        A_log: HV elements. dt_bias: HV * K elements.
        chunk_size: 16, 32, 64 or 128; None for the default.
        state_interval: tokens between intermediate states, a multiple of the chunk size; None for 64, or for the chunk
            size where that is larger.

    Returns:
        o [B, T, HV, V] in q's dtype; the final state [N, HV, K, V] in float32 (float64 for float64 inputs) or None; and
        with return_intermediate_states h [B, NT, HV, K, V] in q's dtype, NT counting the intervals of every sequence.

    Raises:
        TypeError: an unknown keyword, an argument of another type, a dtype that is not supported. NotImplementedError:
        double backward, forward-mode differentiation. ValueError: everything else, with what was expected and what
        came. Values of tensors are not checked, those of cu_seqlens excepted.
    """
    keywords = _settled(
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        cp_context=cp_context,
        use_graph=use_graph,
        max_num_seqs=max_num_seqs,
        A_log=A_log,
        dt_bias=dt_bias,
        chunk_size=chunk_size,
        state_interval=state_interval,
        transpose_state_layout=transpose_state_layout,
    )
    return _run("chunk", q, k, v, g, beta, keywords)


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run Kimi Delta Attention token by token, as in decoding; differentiable too.

    Args, returns and raises are those of `chunk_kda`, in the order of flash-linear-attention's function of this name.
    """
    if cu_seqlens is None and transpose_state_layout is None:
        tensors = q, k, v, g, beta, initial_state, A_log, dt_bias
        flags = output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel
        options = scale, lower_bound, *flags, allow_neg_eigval, state_v_first
        if (known := again.known(tensors, None, options)) is not None:
            return known(*tensors)
    keywords = _settled(
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        transpose_state_layout=transpose_state_layout,
    )
    return _run("recurrent", q, k, v, g, beta, keywords)


KEYWORDS = frozenset(inspect.signature(chunk_kda).parameters) - {"q", "k", "v", "g", "beta"}
"""What `kda` takes by name, beside its own two."""


def kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    implementation: str | None = None,
    config: object | None = None,
    **keywords,
) -> tuple[torch.Tensor, ...]:
    """Run Kimi Delta Attention with the implementation of that name, or with the first that fits these inputs.

    Without a name up to DECODE_TOKENS tokens (of packed sequences, on average) run token by token, unless a chunk_size
    is given, and more in chunks.
    keywords: those of `chunk_kda` from scale onwards, with its meaning; an unknown one is a TypeError. config: a launch
    configuration of the implementation, which must then be named. Raises KeyError for an unknown name, ValueError for a
    config without a name and for inputs that nothing supports, with every reason, and what the implementation raises:
    there is no fallback from the one that was named.
    """
    if unknown := set(keywords) - KEYWORDS:
        raise TypeError(f"kda() got an unexpected keyword argument {min(unknown)!r}")
    if implementation == "recurrent_torch" or implementation is None and config is None:
        tensors = q, k, v, g, beta, *map(keywords.get, again.NAMED)
        if (known := again.known(tensors, config, again.options(keywords))) is not None:
            return known(*tensors)
    keywords = _settled(**keywords)
    if implementation is not None:
        return find(implementation).call(q, k, v, g, beta, config=config, **keywords)
    if config is not None:
        raise ValueError(f"implementation must be named where a config is given, got None and {config!r}")
    return _run(None, q, k, v, g, beta, keywords)
