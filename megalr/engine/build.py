"""The DeepSpeed engine around a decoder, and the few facts about it that the loop asks for."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megalr.config.schema import RunConfig
from megalr.engine.config import is_unwrapped
from megalr.engine.cuda_graph import MicroBatchGraph, ScaledLoss
from megalr.engine.patches import batch_parameters
from megalr.engine.state import attach_layouts, check_ranks
from megalr.engine.unwrapped_step import install_clip_and_skip, without_accumulation_dtype
from megalr.engine.wrappers import wrapper_of
from megalr.errors import UserError
from megalr.models.build import build_decoder, make_plan, sizes_of
from megalr.models.decoder import Decoder
from megalr.models.drawing import Fill, hold, pieces
from megalr.models.lr_transfer import scales_of
from megalr.models.ranks import has_ranks
from megalr.models.recompute import SELECTIVE
from megalr.optim.groups import OUTER_PARTS, describe_groups, parameter_groups
from megalr.optim.methods import RunFacts, build_optimizer, kinds_apart
from megalr.sharding.tensor_shard import shard_of
from megalr.tensor_parallel.mesh import Mesh


def compile_blocks(decoder: Decoder, hooked: bool = False) -> None:
    """Compile each block, the last norm and the loss separately; equal blocks share one program.

    ``hooked``: ZeRO 3 puts hooks on these modules, which gather their weights. Then only what runs
    between the hooks is compiled, so that the program sees whole weights and no gathering.

    Blocks of other ranks need programs of their own. torch gives up after a number of them and
    would go on without compilation, so that number is raised where they are many.
    """
    shapes = {tuple(p.shape for p in block.parameters()) for block in decoder.blocks()}
    limits = torch._dynamo.config
    # With and without gradients, and once more where a fixed number was taken for a variable one.
    limits.cache_size_limit = max(limits.cache_size_limit, 4 * len(shapes))
    for module in (*decoder.blocks(), decoder.norm):
        if hooked:
            module.forward = torch.compile(module.forward, dynamic=False)
        else:
            module.compile(dynamic=False)
    decoder.head.compile_loss()


def import_deepspeed() -> Any:
    """The module ``deepspeed``, quiet and without its CPU shared-memory all-reduce.

    Imported here because it takes seconds and ``--help`` should not. That all-reduce is used for
    inference only; compiling it takes a minute at the first start on a machine, and a process
    killed meanwhile leaves a lock file for which every later start waits
    (docs/dev/deepspeed-notes.md).
    """
    import deepspeed
    from deepspeed import ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 has renamed: nothing a user can fix.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _prints_hidden(ds_config: dict[str, Any]) -> Iterator[None]:
    """Hide what is printed on stdout, unless it fails or ``log_level`` is info or debug.

    BF16_Optimizer of DeepSpeed 0.19 prints 3 lines of memory for every group of parameters. The
    logger's warnings are shown: it keeps the stdout of its import.
    """
    if ds_config.get("log_level") in ("info", "debug"):
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except BaseException:
        sys.stdout.write(printed.getvalue())
        raise


def build_engine(
    config: RunConfig, ds_config: dict[str, Any], decoder: Decoder, fill: Fill | None = None
) -> Any:
    """DeepSpeed's engine with the run's optimizer.

    ``fill``: at ZeRO 3, sets the weights of one piece of a decoder that is empty so far
    (models.drawing); None: the decoder has its weights.

    Raises:
        UserError: a combination that cannot work (CUDA graphs with ZeRO-3, ...).
    """
    deepspeed = import_deepspeed()
    stage = ds_config["zero_optimization"]["stage"]
    mesh = decoder.plan.mesh
    _check_stage(config, stage)
    if config.train.kernels == "auto":
        selective = config.train.activation_checkpointing in SELECTIVE
        decoder.use_kernels(flex=config.train.compile or not selective)
    if config.train.compile:
        compile_blocks(decoder, hooked=stage == 3)
    unwrapped = is_unwrapped(config.train.precision, stage)
    if unwrapped and config.train.precision == "paper_bf16":
        decoder.bfloat16()  # else DeepSpeed does it
    optimizer = _optimizer_of(config, decoder)
    if config.train.cuda_graphs:
        _check_graphs(ds_config, decoder)
        # Capture is not possible on the default stream, and the engine's tensors must live on the
        # stream of the capture.
        torch.cuda.set_stream(torch.cuda.Stream())
    # DeepSpeed keeps the mesh of an earlier engine of this process and uses it when given none.
    deepspeed.utils.groups.mpu = None
    with _prints_hidden(ds_config):
        if fill is not None:
            # Else zero.Init, which comes before initialize, would take this for the only rank.
            backend = deepspeed.get_accelerator().communication_backend_name()
            deepspeed.init_distributed(backend, dist_init_required=False, verbose=False)
            _share_out(decoder, fill, ds_config)
        engine, _, _, _ = deepspeed.initialize(
            model=decoder,
            optimizer=optimizer,
            config=without_accumulation_dtype(ds_config) if unwrapped else ds_config,
            mpu=mesh if decoder.plan.parallel else None,
            dist_init_required=False,
        )
    # bf16 without ZeRO has made a step on zero gradients (docs/dev/deepspeed-notes.md): harmless
    # at learning rate 0, but Adam's counter and moments must start from nothing.
    engine.basic_optimizer.state.clear()
    attach_layouts(engine)
    if unwrapped:
        install_clip_and_skip(engine)
    batch_parameters(engine)
    if decoder.plan.parallel and wrapper_of(engine).reads_marks_of_gradients:
        _mark_gradients(decoder)
    # The first product makes a workspace that stays. In a segment that the start has left free it
    # would hold all of that: 2.5 GiB of a dense 1B model (benchmarks/lab/memory.md).
    torch.cuda.empty_cache()
    graph = None
    if config.train.cuda_graphs:
        shape = config.train.micro_batch_size, config.data.sequence_length
        consumed = _gradients_are_consumed(engine)
        graph = MicroBatchGraph(decoder, shape, consumed, config.data.document_mask)
    decoder.forward = ScaledLoss(decoder, graph)  # type: ignore[method-assign]
    return engine


def _share_out(decoder: Decoder, fill: Fill, ds_config: dict[str, Any]) -> None:
    """Fill an empty decoder piece by piece, each shared out over the ranks before the next.

    As DeepSpeed's ``initialize`` shares out a decoder that is whole on every rank; it passes over
    parameters that are shared out already.
    """
    from deepspeed import zero

    first, *others = pieces(decoder)
    hold(first)
    fill(first)
    shared_out: Any = decoder.embedding.weight
    zero.Init(module=first, dtype=shared_out.dtype, config_dict_or_path=ds_config)
    for piece in others:
        hold(piece)
        fill(piece)
        shared_out.convert_to_zero_parameters(param_list=list(piece.parameters()))


def _optimizer_of(config: RunConfig, decoder: Decoder) -> torch.optim.Optimizer:
    scales = scales_of(config.method, decoder.config.hidden_size)
    apart = set(kinds_apart(config.optimizer))
    if config.restarts.resets and config.restarts.reset_scope == "layers":
        apart |= set(OUTER_PARTS.values())  # they keep their step counter, one for each group
    groups = parameter_groups(
        decoder,
        decoder.factor_parameters(),
        config.optimizer.weight_decay,
        scales.ratios(config.optimizer.lr_ratio),
        config.optimizer.weight_decay_ratio,
        apart,
    )
    facts = RunFacts(
        total_updates=config.train.updates,
        hidden_size=decoder.config.hidden_size,
        seed=config.run.seed,
        bf16_states=config.train.precision == "paper_bf16",
        kernels=config.train.kernels == "auto",
    )
    return build_optimizer(config.optimizer, config.method, groups, facts)


def check_run(
    config: RunConfig, stage: int | None = None, ranks: int = 1
) -> dict[str, dict[str, float]]:
    """Reject what the model, the optimizer or the engine would reject, without weights or GPUs.

    For use before a job waits in a queue. A run from a pretrained model is not checked: its sizes
    are in a folder that may be elsewhere. ``stage``: of ZeRO, if it is known. ``ranks``:
    data-parallel ones, at least. Returns the parameter groups as :func:`describe_groups` does, {}
    for a pretrained model.

    Raises:
        UserError: as :func:`build_model` and :func:`build_engine`, except for CUDA graphs.
    """
    if config.model.from_pretrained is not None:
        return {}
    sizes = sizes_of(config)
    mesh = Mesh(tensor_size=config.parallel.tensor)
    plan = make_plan(sizes, config.method, mesh, config.parallel.layout)
    layers = sizes.num_layers if has_ranks(config.method) else 1  # else all are equal
    with torch.device("meta"):
        decoder = build_decoder(
            replace(sizes, num_layers=layers),
            config.method,
            config.run.seed,
            config.train.activation_checkpointing,
            plan,
            initialize=False,
        )
    optimizer = _optimizer_of(config, decoder)
    check_ranks(optimizer, stage == 0, ranks, mesh.tensor_size)
    if stage is not None:
        _check_stage(config, stage)
    return describe_groups(optimizer.param_groups, config.optimizer.lr)


def _check_stage(config: RunConfig, stage: int) -> None:
    """Reject what cannot be combined with ZeRO stage 3."""
    if stage == 3 and config.parallel.tensor > 1:
        raise UserError(
            f"parallel.tensor {config.parallel.tensor} with ZeRO stage 3: DeepSpeed gathers "
            "parameters over data-parallel ranks in the middle of layers; use stage 0, 1 or 2, or "
            "parallel.tensor=1"
        )


def _check_graphs(ds_config: dict[str, Any], decoder: Decoder) -> None:
    zero = ds_config["zero_optimization"]
    reason = None
    if decoder.embedding.weight.device.type != "cuda":
        reason = "there is no CUDA device"
    elif zero["stage"] == 3:
        reason = "ZeRO stage 3 gathers weights by hooks, which a graph does not run"
    elif zero.get("offload_optimizer", {}).get("device", "none") != "none":
        reason = "the optimizer is offloaded, and gradients are still being copied at the next run"
    if reason is not None:
        raise UserError(f"train.cuda_graphs is true but {reason}: leave it out")


def _gradients_are_consumed(engine: Any) -> bool:
    """Whether the engine no longer needs ``.grad`` when the next micro-batch starts.

    BF16_Optimizer adds every micro-batch to its own float32 buffer; the other wrappers accumulate
    in ``.grad`` itself, which is consumed only if an update has one micro-batch.
    """
    return wrapper_of(engine).sums_gradients or engine.gradient_accumulation_steps() == 1


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of every group, times the group's ratio, from the next update on."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def set_update(engine: Any, update: int) -> None:
    """Tell an optimizer that rounds stochastically the number of the next update, from 1 on."""
    for group in engine.optimizer.param_groups:
        if "update" in group:
            group["update"] = update


def described_groups(engine: Any, config: RunConfig) -> dict[str, dict[str, float]]:
    """Name to peak learning rate and weight decay of each parameter group."""
    return describe_groups(engine.optimizer.param_groups, config.optimizer.lr)


def data_parallel_ranks(engine: Any) -> int:
    """Number of ranks with different batches; the engine averages gradients over them."""
    return engine.dp_world_size


def ranks_of_batches(engine: Any) -> dist.ProcessGroup:
    """The ranks with different batches."""
    return engine.seq_data_parallel_group


def _mark_gradients(decoder: Decoder) -> None:
    """Mark the gradients of sharded parameters as DeepSpeed expects parameters to be marked.

    bf16 without ZeRO takes the norm of the gradients and looks for the mark on them
    (docs/dev/deepspeed-notes.md).
    """

    def mark(parameter: torch.Tensor) -> None:
        parameter.grad.tensor_model_parallel = True  # type: ignore[union-attr]

    for parameter in decoder.parameters():
        if shard_of(parameter) is not None and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(mark)
